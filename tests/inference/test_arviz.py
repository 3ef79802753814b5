"""Draws in ArviZ: smoothed weights against known tails, groups, LOO, WAIC and predictions."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from laminar._errors import InputError, ShapeError
from laminar.inference import as_target
from laminar.inference.arviz import load_arviz, loo, predictive, psis, to_arviz, waic

az = load_arviz()
KEY, RNG = jr.key(0), np.random.default_rng(0)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_psis_finds_the_shape_of_a_pareto_tail(shape):
    # The exponential of k times an exponential variable is Pareto with shape k.
    log_w = shape * RNG.exponential(size=(16, 20_000))
    smoothed, k_hat = psis(log_w)
    assert (smoothed.shape, k_hat.shape) == ((16, 20_000), (16,))
    # A tail of n draws tells the shape to about (1 + k) / sqrt(n).
    error = (1 + shape) / np.sqrt(3 * np.sqrt(20_000))
    np.testing.assert_allclose(k_hat, shape, atol=4 * error)
    np.testing.assert_allclose(k_hat.mean(), shape, atol=4 * error / np.sqrt(16))
    np.testing.assert_allclose(np.exp(smoothed).sum(-1), 1)
    assert (np.exp(smoothed).max(-1) < np.exp(log_w).max(-1) / np.exp(log_w).sum(-1) * 1.5).all()


def test_psis_takes_target_over_proposal():
    # Draws from a narrow q have heavy weights, from a wide one bounded weights.
    def k_hat(sd):
        x = sd * RNG.normal(size=10_000)
        return float(psis(stats.norm.logpdf(x) - stats.norm.logpdf(x, scale=sd))[1])

    assert k_hat(0.5) > 0.5
    assert k_hat(2.0) < 0.3


def test_psis_is_blind_to_a_factor_and_to_float32():
    log_w = RNG.normal(size=1000).astype(np.float32)
    smoothed, k_hat = psis(log_w)
    assert smoothed.dtype == np.float64
    other, same = psis(log_w + np.float32(500))
    np.testing.assert_allclose(other, smoothed, atol=1e-4)
    assert same == pytest.approx(float(k_hat), abs=1e-3)


def test_weights_without_a_tail():
    smoothed, k_hat = psis(np.full(100, 3.0))
    np.testing.assert_allclose(smoothed, -np.log(100))
    assert k_hat == 0
    smoothed, k_hat = psis(np.where(np.arange(100) < 50, -np.inf, 0.0))
    np.testing.assert_allclose(np.exp(smoothed), np.where(np.arange(100) < 50, 0, 1 / 50))
    assert k_hat == 0
    smoothed, k_hat = psis(np.r_[np.full(500, -np.inf), RNG.normal(size=500)])
    assert np.isfinite(k_hat)
    np.testing.assert_allclose(np.exp(smoothed).sum(), 1)
    assert psis(RNG.normal(size=20))[1] == np.inf
    smoothed, k_hat = psis(500 * RNG.normal(size=4000))
    assert k_hat > 5
    np.testing.assert_allclose(np.exp(smoothed).sum(), 1)
    for bad in (np.nan, np.inf):
        smoothed, k_hat = psis(np.r_[bad, RNG.normal(size=50)])
        assert np.isnan(smoothed).all()
        assert np.isnan(k_hat)
    assert np.isnan(psis(np.full(30, -np.inf))[1])
    with pytest.raises(ShapeError, match="one axis"):
        psis(1.0)


def regression(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    mean = numpyro.deterministic("mean", slope * x)
    numpyro.factor("nothing", 0.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)


X = np.linspace(-1, 1, 12).astype(np.float32)
Y = (2 * X + 0.3 * RNG.normal(size=12)).astype(np.float32)


def draws(*batch):
    return {
        "slope": 2 + 0.1 * RNG.normal(size=batch).astype(np.float32),
        "scale": 0.3 + 0.02 * RNG.random(size=batch).astype(np.float32),
    }


@pytest.mark.parametrize("batch", [(40,), (2, 40)])
def test_a_model_gives_every_group(batch):
    target = as_target(regression, X, y=Y)
    values = draws(*batch)
    data = to_arviz(target, values, KEY)
    chains = batch if len(batch) == 2 else (1, *batch)
    assert set(data.groups()) == {
        "posterior",
        "log_likelihood",
        "posterior_predictive",
        "observed_data",
    }
    assert set(data.posterior.data_vars) == {"slope", "scale", "mean"}
    assert data.posterior["slope"].shape == chains
    np.testing.assert_array_equal(
        data.posterior["slope"].to_numpy().reshape(batch), values["slope"]
    )
    mean = data.posterior["mean"].to_numpy()
    slope, scale = (values[k].reshape(*chains, 1) for k in ("slope", "scale"))
    np.testing.assert_allclose(mean, slope * X, rtol=1e-5)
    assert set(data.log_likelihood.data_vars) == {"y"}
    expected = stats.norm.logpdf(Y, mean, scale)
    np.testing.assert_allclose(data.log_likelihood["y"], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(data.observed_data["y"], Y)
    drawn = data.posterior_predictive["y"].to_numpy()
    assert drawn.shape == (*chains, 12)
    assert np.std((drawn - mean) / scale) == pytest.approx(1, abs=0.15)
    assert az.summary(data, var_names=["slope", "scale"]).shape[0] == 2
    if len(batch) == 1:
        assert "posterior_predictive" not in to_arviz(target, values).groups()
        assert "log_likelihood" not in to_arviz(target, values, log_likelihood=False).groups()


def test_loo_and_waic():
    data = to_arviz(as_target(regression, X, y=Y), draws(400))
    expected = stats.norm.logpdf(Y, 2 * X, 0.31).sum()
    assert loo(data).elpd_loo == pytest.approx(expected, abs=1.5)
    assert waic(data, var_name="y").elpd_waic == pytest.approx(expected, abs=1.5)
    assert len(loo(data, pointwise=True).pareto_k) == 12
    with pytest.raises(InputError, match="observes y, and not 'z'"):
        loo(data, var_name="z")


def two_sites(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("a", dist.Normal(x, 1.0), obs=y)
    numpyro.sample("b", dist.Poisson(jnp.exp(x)), obs=jnp.array([1, 2]))


def test_several_sites_and_none():
    data = to_arviz(as_target(two_sites, Y), {"x": RNG.normal(size=50).astype(np.float32)}, KEY)
    assert set(data.posterior_predictive.data_vars) == {"a", "b"}
    assert data.posterior_predictive["b"].shape == (1, 50, 2)
    with pytest.raises(InputError, match="observes a, b; name one"):
        loo(data)
    plain = as_target(lambda v: -(v["s"] ** 2) - v["t"].sum(), example={"s": (), "t": 2})
    data = to_arviz(plain, plain.constrain(jnp.ones((3, 5, 3))), KEY)
    assert data.groups() == ["posterior"]
    assert data.posterior["t"].shape == (3, 5, 2)
    with pytest.raises(InputError, match="no log likelihood"):
        waic(data)
    with pytest.raises(InputError, match="needs a NumPyro model"):
        predictive(plain, plain.constrain(jnp.ones((5, 3))), KEY)


def test_predictions_for_old_and_new_rows():
    target = as_target(regression, X, y=Y)
    values = draws(600)
    old = predictive(target, values, KEY)
    assert {k: v.shape for k, v in old.items()} == {"mean": (600, 12), "y": (600, 12)}
    assert np.abs(old["y"] - Y).min(0).max() > 0
    new = predictive(target, values, KEY, np.array([3.0, -1.0, 0.0], np.float32))
    assert new["y"].shape == (600, 3)
    np.testing.assert_allclose(new["y"].mean(0), [6, -2, 0], atol=0.15)
    pairs = predictive(target, draws(2, 5), KEY, x=X[:3], y=Y[:3])
    assert pairs["y"].shape == (2, 5, 3)


def test_draws_that_do_not_fit():
    target = as_target(regression, X, y=Y)
    with pytest.raises(ShapeError, match="leading axes"):
        to_arviz(target, {"slope": 1.0, "scale": 1.0})
    with pytest.raises(ShapeError, match="leading axes"):
        to_arviz(target, {"slope": np.ones(3), "scale": np.ones(4)})
    with pytest.raises(InputError, match="lack the model's sites scale"):
        to_arviz(target, {"slope": np.ones(3)})


def test_values_of_jax_serve_too():
    target = as_target(regression, X, y=Y)
    z = target.start(KEY, 8)
    data = to_arviz(target, target.constrain(z), KEY)
    assert isinstance(z, jax.Array)
    assert data.posterior["scale"].shape == (1, 8)
