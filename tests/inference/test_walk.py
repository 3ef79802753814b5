"""Chains that keep the target leave a narrow approximation, and stay with a right one."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar.bijections.elementwise import Affine
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.inference import as_target
from laminar.inference.assessment import assess
from laminar.inference.walk import find_drift


def normal(x):
    return -0.5 * (x**2).sum()


def bent(x):
    return -0.5 * ((x[0] / 10) ** 2 + (x[1] + 0.03 * (x[0] ** 2 - 100)) ** 2)


def walked(log_density, scale, dim):
    target = as_target(log_density, example=dim)
    flow = Flow(Normal((dim,)), Affine(jnp.zeros(dim), scale, shape=(dim,)))
    found = assess(jr.key(0), flow, target, 4_000)
    evidence = float(found.log_evidence.value)
    return find_drift(jr.key(1), flow, target, found.z, found.log_p, found.weights, evidence)


@pytest.mark.parametrize("dim", [1, 5, 40])
def test_chains_stay_with_the_truth(dim):
    drift = walked(normal, jnp.ones(()), dim)
    assert not drift.significant
    assert drift.gain == pytest.approx(0, abs=1e-3)


def test_chains_stay_with_a_wider_approximation_once_it_is_weighted():
    assert not walked(normal, jnp.asarray(1.3), 3).significant


def test_chains_leave_what_is_too_narrow():
    drift = walked(bent, jnp.asarray([2.0, 1.0]), 2)
    assert drift.significant
    assert drift.spread > 1.2


def test_a_density_that_fails_is_not_walked_into():
    drift = walked(lambda x: jnp.where(x[0] > 1.5, jnp.nan, normal(x)), jnp.ones(()), 2)
    assert np.isfinite([drift.gain, drift.gain_error, drift.spread, drift.spread_error]).all()
