"""Squashing maps: formulas, both tails against SciPy, and the ends of the numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from laminar._errors import InputError
from laminar.bijections.squashing import CDF, LogTanh, Softclip

LAWS = {"normal": scipy.stats.norm, "cauchy": scipy.stats.cauchy, "gumbel": scipy.stats.gumbel_r}
FAR = {"normal": (-12.0, 5.0), "cauchy": (-1e15, 1e5), "gumbel": (-4.2, 14.0)}


@pytest.mark.parametrize("law", LAWS)
def test_a_distribution_function_keeps_its_digits_in_both_tails(law):
    x = jnp.asarray([FAR[law][0], -2.0, 0.0, 1.5, FAR[law][1]])
    y, log_det = jax.vmap(CDF(law).forward)(x)
    exact = np.asarray(x, float)
    np.testing.assert_allclose(y, LAWS[law].cdf(exact), rtol=2e-5)
    np.testing.assert_allclose(log_det, LAWS[law].logpdf(exact), rtol=1e-6)
    p = jnp.asarray([1e-18, 1e-4, 0.3, 0.5, 0.9, 0.9999])
    x, log_det = jax.vmap(CDF(law).inverse)(p)
    np.testing.assert_allclose(x, LAWS[law].ppf(np.asarray(p, float)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(-log_det, LAWS[law].logpdf(np.asarray(x, float)), rtol=1e-5)


def test_quantiles_of_cauchy_go_on_where_their_slope_overflows():
    x, log_det = CDF("cauchy").inverse(jnp.float32(1e-30))
    np.testing.assert_allclose(x, -1 / (math.pi * 1e-30), rtol=1e-6)
    np.testing.assert_allclose(log_det, -math.log(math.pi) + 2 * math.log(math.pi * -x), rtol=1e-6)


def test_the_density_of_gumbel_does_not_rise_again_far_out():
    x = jnp.asarray([-1e38, -1e6, -100.0, -80.0, -20.0])
    log_det, slope = jax.vmap(jax.value_and_grad(lambda x: CDF("gumbel").forward(x)[1]))(x)
    assert bool((jnp.diff(log_det) >= 0).all() & (slope >= 0).all())


def test_softclip_and_log_tanh_are_their_formulas():
    x = np.array([-1e4, -1.7, -0.4, 0.0, 0.9, 1.2, 1e4])
    y, log_det = jax.vmap(Softclip(bound=2.0).forward)(jnp.asarray(x))
    np.testing.assert_allclose(y, x / (1 + abs(x) / 2), rtol=1e-6)
    np.testing.assert_allclose(log_det, -2 * np.log1p(abs(x) / 2), rtol=1e-6)
    y, log_det = jax.vmap(LogTanh(bound=0.8).forward)(jnp.asarray(x))
    tail = math.tanh(0.8) + 0.8 / math.cosh(0.8) ** 2 * np.log(np.maximum(abs(x), 0.8) / 0.8)
    expected = np.where(abs(x) < 0.8, np.tanh(x), np.sign(x) * tail)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    step = 1e-3
    with jax.enable_x64(True):
        ends = [float(LogTanh(bound=0.8).forward(jnp.float64(0.8 + s))[0]) for s in (-step, step)]
    slope = (ends[1] - ends[0]) / (2 * step)
    assert abs(slope * math.cosh(0.8) ** 2 - 1) < 1e-3  # no corner


@pytest.mark.parametrize("bijection", [Softclip(bound=1.5), LogTanh(), *map(CDF, LAWS)])
@pytest.mark.parametrize("x", [-3e38, -1e25, -0.0, 1e-30, 1e25, 3e38, math.inf])
def test_any_number_gives_a_point_that_comes_back_as_one(bijection, x):
    y, log_det = bijection.forward(jnp.float32(x))
    back, log_det_back = bijection.inverse(y)
    assert bool(jnp.isfinite(y) & jnp.isfinite(back) & jnp.isfinite(log_det_back))
    assert not bool(jnp.isnan(log_det))
    for direction in (bijection.forward, bijection.inverse):
        slopes = jax.jacfwd(direction)(jnp.float32(min(abs(x), 1e25)))
        assert all(bool(jnp.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Softclip(bound=0.0),
        lambda: Softclip(bound=math.inf),
        lambda: LogTanh(bound=2.5),
        lambda: CDF("uniform"),
    ],
)
def test_bad_options(make):
    with pytest.raises(InputError):
        make()
