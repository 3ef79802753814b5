"""The contract of transforms whose log-det is an estimate or a bound."""

import jax.numpy as jnp
import jax.random as jr
import pytest
from cases import randomise

from laminar.bijections.base import Invert
from laminar.bijections.compose import Chain
from laminar.bijections.continuous import Continuous, VelocityField
from laminar.bijections.dequantise import Dequantise
from laminar.bijections.dynamics import Hamiltonian, Langevin
from laminar.bijections.elementwise import Affine, Sigmoid
from laminar.bijections.residual import Residual
from laminar.diagnose import check
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.nn.lipschitz import LipschitzMLP
from laminar.testing import check_bijection
from laminar.zoo import cnf


def bowl(z):
    return -0.5 * ((z - 0.5) ** 2).sum()


def residual(key, **options):
    net = LipschitzMLP(2, width=6, depth=1, lipschitz=0.6, cond_dim=2, key=key)
    return randomise(Residual(net, **options), key)


def hutchinson(key):
    field = VelocityField(2, key=key, width=8, depth=1, frequencies=2, activation="tanh")
    field = randomise(field, key, 0.4)
    return Continuous(field, (2,), divergence="hutchinson", fixed_steps=8, solver="dopri8", times=1)


CASES = {
    "roulette": lambda key: residual(key, log_det="roulette", terms=2),
    "power_series": lambda key: residual(key, log_det="power_series", terms=1),
    "hutchinson": hutchinson,
    "langevin": lambda key: Langevin(bowl, 2, step_size=0.5),
    "hamiltonian": lambda key: Hamiltonian(bowl, 2, steps=2, step_size=0.3),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n in ("power_series", "hutchinson")))
        for n in CASES
    ],
)
def test_contract(name):
    made = CASES[name](jr.key(0))
    report = check_bijection(made, key=jr.key(1), float64=name == "roulette")
    assert report.passed, str(report)
    bias = [check.error for check in report.checks if "bias of" in check.name]
    assert (max(bias, default=0) > 0.01) == (name == "power_series"), str(report)


@pytest.mark.slow
def test_a_flow_of_estimates_passes_its_check():
    net = LipschitzMLP(2, width=6, depth=1, lipschitz=0.6, key=jr.key(0))
    layer = randomise(Residual(net, log_det="roulette", terms=2), jr.key(0))
    flow = Flow(Normal(2), Chain([Affine(0.3, 2.0, shape=(2,)), Invert(layer)]))
    report = check(flow, key=jr.key(1), n=64)
    assert report.passed, str(report)
    assert report["log-det estimates are unbiased"].passed
    assert report["log-det is the Jacobian's"].passed  # of the other step
    assert jnp.isfinite(report["log-det estimates are unbiased"].value)


def test_a_law_of_whole_numbers_is_checked_on_them():
    made = Chain([Affine(0.3, 0.8, shape=(2,)), Sigmoid((2,)), Dequantise((2,), 4)])
    report = check(Flow(Normal(2), made), key=jr.key(0), n=64)
    assert report.passed, str(report)
    assert report["log_prob is a lower bound"].passed
    mass = float(report["log_prob is a lower bound"].detail.split()[3])
    assert 0.5 < mass < 1


@pytest.mark.slow
def test_a_continuous_flow_is_checked_in_one_piece():
    flow = cnf(2, key=jr.key(0), width=16)
    report = check(flow, key=jr.key(1), n=64)
    assert report.passed, str(report)
    assert report["log-det is the Jacobian's"].detail == ""
