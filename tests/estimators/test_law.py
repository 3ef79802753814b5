"""The law of one number: probabilities, quantiles and means against quadrature and each other."""

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import t as student

from laminar.estimators import law as laws
from laminar.train.mixtures import fit_knots

LEVELS = np.array([1e-4, 0.05, 0.5, 0.9, 0.9999])


@pytest.fixture(scope="module")
def law():
    """Three members far from the template, a tail of 2%, and a skewed map behind them."""
    members = laws.make_members(jr.key(0), 3, 4, width=8, depth=1, bins=6)
    head = members.bijection.net.head
    noisy = head.weight + 0.2 * jr.normal(jr.key(1), head.weight.shape, head.weight.dtype)
    members = eqx.tree_at(lambda m: m.bijection.net.head.weight, members, noisy)
    skewed = np.random.default_rng(3).gamma(3.0, size=(300, 1)) - 3.0
    return laws.make_law(members, 0.02, fit_knots(skewed))


@pytest.fixture(scope="module")
def condition():
    return np.random.default_rng(0).normal(size=(5, 4))


def test_density_distribution_and_mean_agree_with_quadrature(law, condition):
    z = np.linspace(-200.0, 200.0, 40_001)
    step = z[1] - z[0]
    one = np.repeat(condition[:1], len(z), 0)
    p = np.exp(laws.log_density(law, z, one))
    below = laws.probability(law, z[[0, -1]], one[:2])
    assert below[0] < 1e-4 < 1 - 1e-4 < below[1]
    assert p.sum() * step == pytest.approx(below[1] - below[0], abs=2e-4)

    at = np.searchsorted(z, [-2.0, 0.0, 0.7, 4.0])
    got = laws.probability(law, z[at], one[:4])
    np.testing.assert_allclose(got, below[0] + (np.cumsum(p) - 0.5 * p)[at] * step, atol=3e-4)

    mean = laws.mean(law, condition)
    assert mean.shape == (5,)
    # Beyond the grid the two tails of the mixture weigh about c / reach each, and partly cancel.
    assert mean[0] == pytest.approx((z * p).sum() * step, abs=5e-3)
    assert np.ptp(mean) > 0.01


def test_quantiles_invert_probabilities(law, condition):
    q = laws.quantile(law, LEVELS, condition)
    assert q.shape == (5, 5)
    assert (np.diff(q, axis=1) > 0).all()
    for i, level in enumerate(LEVELS):
        got = laws.probability(law, q[:, i], condition)
        # A map as steep as these leaves few float32 numbers between two levels.
        np.testing.assert_allclose(got, level, rtol=1e-2, atol=2e-7)


def test_draws_follow_the_law(law, condition):
    draws = laws.draw(law, jr.key(3), 4_000, condition)
    assert draws.shape == (5, 4_000)
    for row in range(5):
        u = laws.probability(law, draws[row], np.repeat(condition[row : row + 1], 4_000, 0))
        # Kolmogorov's distance of 4,000 uniforms exceeds 0.035 about once in ten thousand times.
        distance = np.abs(np.sort(u) - (np.arange(4_000) + 0.5) / 4_000).max()
        assert distance < 0.035


def test_the_tail_is_students(law, condition):
    from laminar.estimators.law import _tail_probability, _tail_quantile

    t = np.array([-1e30, -50.0, -1.0, 0.0, 0.3, 20.0, 1e30], np.float32)
    np.testing.assert_allclose(_tail_probability(t), student.cdf(t, 2.0), rtol=2e-4, atol=1e-7)
    got = _tail_quantile(LEVELS, 1 - LEVELS)
    np.testing.assert_allclose(got, student.ppf(LEVELS, 2.0), rtol=1e-4, atol=1e-6)


def test_rows_do_not_depend_on_their_neighbours(law):
    many = np.random.default_rng(1).normal(size=(70, 4))
    value = np.linspace(-3, 3, 70)
    whole = laws.log_density(law, value, many)
    for rows in (slice(0, 1), slice(30, 37)):
        np.testing.assert_allclose(
            laws.log_density(law, value[rows], many[rows]), whole[rows], rtol=1e-5
        )
