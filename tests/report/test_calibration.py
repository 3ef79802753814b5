"""Transforms are uniform for rows of the model itself and not for others; bands hold by chance."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

import laminar
from laminar.conditional import ConditionalMixture
from laminar.mixed import ColumnLaw, autoregressive_distribution
from laminar.report.calibration import (
    NoLatentError,
    chance_band,
    latent_uniforms,
    regions,
    transforms,
)

COVARIANCES = np.array([[[1.0, 0.8], [0.8, 1.0]], [[0.3, 0.0], [0.0, 2.0]]])


def mixture():
    return laminar.GaussianMixture(np.array([0.3, 0.7]), np.array([[0.0, 0], [3, 1]]), COVARIANCES)


def models():
    bend = laminar.SinhArcsinh(0.5, 1.2, shape=(2,))
    means = np.random.default_rng(0).normal(size=(30, 2))
    cells = ColumnLaw(1, "cells", 0.5, 0.0, 0.0, None, heavy=0.5)
    laws = [ColumnLaw(3, None), ColumnLaw(2, heavy=0.5), cells]
    return {
        "normal": laminar.Normal(2, loc=1.0, scale=2.0),
        "student": laminar.Flow(laminar.StudentT(2, df=3.0), bend),
        "logistic": laminar.Logistic(2, loc=1.0),
        "uniform": laminar.Uniform(2, -1.0, 3.0),
        "correlated": laminar.MultivariateNormal(np.ones(2), COVARIANCES[0]),
        "gaussians": mixture(),
        "kernels": laminar.IsotropicMixture(means, np.linspace(0.1, 1.0, 30)),
        "mixture of flows": laminar.Flow(
            laminar.Mixture([mixture(), laminar.Flow(laminar.Normal(2), bend)]), bend
        ),
        "mixed": autoregressive_distribution(
            laws, key=jr.key(1), width=8, depth=1, shares=[[0.2, 0.3, 0.5], [0.9, 0.1], None]
        ),
    }


@pytest.mark.parametrize("name", models())
def test_rows_of_the_model_have_uniform_transforms(name):
    model = models()[name]
    x = model.sample(jr.key(0), (1500,))
    found = transforms(latent_uniforms(model, x, None, np.random.default_rng(0)))
    assert found.u.shape == (1500, model.shape[-1])
    assert (found.p_value > 0.01).all()
    # Independent of each other too.
    assert abs(stats.spearmanr(found.u[:, 0], found.u[:, 1]).statistic) < 0.08


@pytest.mark.parametrize("name", ["normal", "gaussians", "mixture of flows"])
def test_rows_of_something_else_have_not(name):
    model = models()[name]
    x = 1.4 * model.sample(jr.key(0), (1500,))
    found = transforms(latent_uniforms(model, x, None, np.random.default_rng(0)))
    assert found.p_value.min() < 1e-4
    assert found.distance.max() > 0.05


def test_conditions_reach_every_part():
    means = np.array([[0.0, 0, 0], [2, 3, -1]])
    covariances = np.array([0.5 * np.eye(3) + 0.5, np.eye(3)])
    model = ConditionalMixture(np.array([0.5, 0.5]), means, covariances, cond_dim=1)
    flow = laminar.Flow(model, laminar.Affine(jnp.ones(2), 2.0))
    condition = np.random.default_rng(0).normal(size=(1500, 1)).astype(np.float32)
    x = flow.sample(jr.key(0), (), condition)
    rng = np.random.default_rng(1)
    right = transforms(latent_uniforms(flow, x, condition, rng))
    wrong = transforms(latent_uniforms(flow, x, condition[::-1].copy(), rng))
    assert right.p_value.min() > 0.01
    assert wrong.p_value.min() < 1e-4


def test_a_base_without_independent_entries_is_named():
    class Odd(laminar.AbstractDistribution):
        shape: tuple = (2,)
        cond_shape: None = None

        def _log_prob(self, x, condition=None, *, key=None):
            return -(x**2).sum(0)

        def _sample(self, key, batch=(), condition=None):
            return jr.normal(key, (2, *batch))

    with pytest.raises(NoLatentError, match="Odd"):
        latent_uniforms(Odd(), np.zeros((3, 2)), None, np.random.default_rng(0))


def test_a_band_holds_nineteen_histograms_in_twenty():
    rng = np.random.default_rng(0)
    low, high = chance_band(400, 10)
    counts = np.stack([np.histogram(rng.random(400), 10, (0, 1))[0] for _ in range(2000)])
    within = ((counts >= low) & (counts <= high)).all(axis=1).mean()
    assert 0.93 < within < 0.985


def test_regions_hold_what_they_should():
    rng = np.random.default_rng(0)

    def log_p(x):
        return stats.norm.logpdf(x).sum(axis=1)

    drawn = log_p(rng.normal(size=(20_000, 2)))
    right = regions(log_p(rng.normal(size=(3000, 2))), drawn)
    assert right.inside(0.5) == pytest.approx(0.5, abs=0.03)
    assert right.inside(0.9) == pytest.approx(0.9, abs=0.02)
    assert right.p_value > 0.01
    assert right.distance < right.band
    narrow = regions(log_p(1.5 * rng.normal(size=(3000, 2))), drawn)
    assert narrow.inside(0.5) == pytest.approx(1 - 0.5 ** (1 / 2.25), abs=0.03)
    assert narrow.p_value < 1e-6
    assert narrow.distance > narrow.band


def test_impossible_rows_lie_outside_every_region():
    found = regions(np.array([-np.inf, -np.inf, 0.0]), np.linspace(-3, 0, 100))
    assert found.inside(0.99) == pytest.approx(1 / 3)
