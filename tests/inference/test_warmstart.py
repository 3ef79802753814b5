"""Normal laws by optimisation: right where they can be, sane where the density is not."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar.inference import as_target, fit_posterior
from laminar.inference.warmstart import find_gaussians

SCALES = jnp.asarray([1e-3, 1.0, 1e3])


def skewed(x):
    return (-jnp.exp(2 * x) + x - jnp.exp(-5 * x)).sum()


def one_sided(x):
    return jnp.where((x > 0).all(), -x.sum(), -jnp.inf)


def box(x):
    return jnp.where((jnp.abs(x) < 0.1).all(), 0.0, -jnp.inf)


def found(log_density, starts):
    target = as_target(log_density, example=starts.shape[1])
    return find_gaussians(jr.key(0), target.log_density, starts)


def spread_starts(dim, count=16):
    scales = np.resize([1.0, 4.0, 1.0, 64.0], count)[:, None]
    return np.random.default_rng(0).uniform(-2, 2, (count, dim)) * scales


def test_a_normal_law_is_found_exactly():
    def log_density(x):
        return -0.5 * jnp.square(x / SCALES.astype(x.dtype)).sum()

    law = found(log_density, spread_starts(3).astype(np.float32))
    assert len(law.means) == 1
    np.testing.assert_allclose(law.means[0] / np.asarray(SCALES), 0, atol=1e-3)
    np.testing.assert_allclose(np.diagonal(law.factors[0]), SCALES, rtol=1e-3)
    assert law.elbos[0] == pytest.approx(1.5 * np.log(2 * np.pi), abs=1e-3)


def test_slopes_of_any_size_overflow_nothing():
    with jax.enable_x64(True):
        law = found(skewed, spread_starts(8))
    assert len(law.means) == 1
    assert np.isfinite(law.elbos).all()


@pytest.mark.parametrize("log_density", [one_sided, box])
def test_undeclared_edges_give_no_law_without_end(log_density):
    law = found(log_density, spread_starts(2).astype(np.float32))
    assert np.isfinite(law.means).all()
    assert np.isfinite(law.factors).all()
    assert (np.diagonal(law.factors[0]) < 10).all()


def test_a_density_that_is_infinite_here_and_zero_there_is_no_law():
    def log_density(x):
        edges = jnp.where(x[0] > 1, jnp.inf, jnp.where(x[0] < -1, -jnp.inf, 0.0))
        return -0.5 * jnp.square(x).sum() + edges

    assert np.isfinite(found(log_density, spread_starts(2).astype(np.float32)).means).all()


def test_many_dimensions_need_no_matrix():
    law = found(lambda x: -0.5 * jnp.square(x - 1).sum(), spread_starts(500, 4).astype(np.float32))
    assert not law.dense
    np.testing.assert_allclose(law.means[0], 1, atol=1e-2)


def test_a_narrow_mode_does_not_hide_a_wide_one_around_it():
    def spike_and_slab(x):
        def law(scale):
            return -0.5 * jnp.square(x / scale).sum() - 3 * jnp.log(jnp.asarray(scale, x.dtype))

        return jnp.logaddexp(law(1e-3), law(1.0))

    law = found(spike_and_slab, spread_starts(3).astype(np.float32))
    widths = np.abs(np.linalg.det(law.factors)) ** (1 / 3)
    assert widths.min() < 2e-3
    assert widths.max() > 0.5


def test_a_climb_that_ends_at_an_edge_leaves_a_law():
    def mixture(x):
        at_edge = jnp.where(x[0] > 0, jnp.log(0.95) - x[0], -jnp.inf)
        away = jnp.log(0.05) - 0.5 * (x[0] - 30) ** 2 - 0.5 * jnp.log(2 * jnp.pi)
        return jnp.logaddexp(at_edge, away)

    starts = np.asarray([[1.5], [0.4], [25.0], [35.0]], np.float32)
    law = found(mixture, starts)
    assert law.climbs == 4
    assert law.lawless == 0
    assert (law.means[:, 0] < 1).any()
    assert (law.means[:, 0] > 25).any()


def test_a_law_cut_by_an_edge_keeps_its_bound():
    def cut(x):
        return jnp.where(x[0] < 0.015, -0.5 * jnp.square(x / 0.01).sum(), -jnp.inf)

    law = found(cut, spread_starts(5).astype(np.float32))
    truth = 5 * np.log(0.01 * np.sqrt(2 * np.pi)) + np.log(0.9332)
    assert law.elbos[0] == pytest.approx(truth, abs=0.2)


@pytest.mark.slow
def test_the_fewest_steps_reach_every_stage():
    def log_density(x):
        return -0.5 * jnp.square(x[0]) - 0.5 * jnp.square(10 * (x[1] - jnp.square(x[0])))

    posterior = fit_posterior(
        jr.key(0), log_density, example=2, flow="normal", steps=6, draws=400, progress=False
    )
    assert posterior.verdict.grade == "do not trust"
