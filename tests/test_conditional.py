"""The conditional of a joint mixture, against the joint law and its marginal."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import norm

from laminar._errors import InputError, ShapeError
from laminar.conditional import ConditionalMixture
from laminar.mixtures import GaussianMixture


def parameters(seed=0, count=3, dim=4):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(count, dim, dim))
    covariances = factors @ factors.transpose(0, 2, 1) + 0.3 * np.eye(dim)
    return rng.dirichlet(np.ones(count)), rng.normal(size=(count, dim)), covariances


def test_is_the_joint_over_the_marginal():
    weights, means, covariances = parameters()
    rng = np.random.default_rng(1)
    c, x = rng.normal(size=(10, 2)), rng.normal(size=(10, 2))
    with jax.enable_x64(True):
        joint = GaussianMixture(weights, means, covariances)
        marginal = GaussianMixture(weights, means[:, :2], covariances[:, :2, :2])
        dist = ConditionalMixture(weights, means, covariances, cond_dim=2)
        want = joint.log_prob(np.concatenate([c, x], 1)) - marginal.log_prob(c)
        np.testing.assert_allclose(dist.log_prob(x, c), want, rtol=1e-9)
        np.testing.assert_allclose(dist.log_prob(x, c[0])[0], want[0], rtol=1e-9)


def test_draws_follow_the_density():
    weights, means, covariances = parameters(dim=2)
    dist = ConditionalMixture(weights, means, covariances, cond_dim=1)
    draws = np.asarray(dist.sample(jr.key(0), (40_000,), np.array([0.7], np.float32)))
    grid = np.linspace(-15, 15, 6001)
    density = np.exp(np.asarray(dist.log_prob(grid[:, None], np.array([0.7])), np.float64))
    step = grid[1] - grid[0]
    np.testing.assert_allclose(density.sum() * step, 1, atol=1e-3)
    mean = (grid * density).sum() * step
    np.testing.assert_allclose(draws.mean(), mean, atol=5 * draws.std() / 200)
    second = (grid**2 * density).sum() * step
    np.testing.assert_allclose((draws**2).mean(), second, rtol=0.05)


def test_bad_input():
    weights, means, covariances = parameters()
    with pytest.raises(ShapeError, match="cond_dim must lie between 1 and 3"):
        ConditionalMixture(weights, means, covariances, cond_dim=4)
    with pytest.raises(ShapeError, match="weights have shape"):
        ConditionalMixture(weights[:2], means, covariances, cond_dim=1)
    with pytest.raises(InputError, match="positive definite"):
        ConditionalMixture(weights, means, -covariances, cond_dim=1)
    with pytest.raises(InputError, match="non-negative"):
        ConditionalMixture(-weights, means, covariances, cond_dim=1)


def test_integers_zero_weights_and_far_conditions_are_taken():
    joint = ConditionalMixture([1, 0], [[0, 0], [3, 3]], np.stack([np.eye(2)] * 2), cond_dim=1)
    assert joint.dtype == jnp.float32
    want = norm.logpdf(0.1)
    np.testing.assert_allclose(joint.log_prob(jnp.array([0.1]), jnp.array([0.2])), want, rtol=1e-4)
    assert jnp.isfinite(joint.log_prob(jnp.array([0.1]), jnp.array([1e20])))
