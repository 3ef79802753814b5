"""Monotone maps against their formulas, and what the contract cannot see."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special
import scipy.stats
from scipy.integrate import quad

from laminar._errors import InputError, ShapeError
from laminar.bijections.amortized import count_parameters
from laminar.bijections.autoregressive import masked_autoregressive
from laminar.bijections.base import Invert
from laminar.bijections.compose import Chain
from laminar.bijections.elementwise import Affine
from laminar.bijections.monotone import (
    Bernstein,
    DeepSigmoidal,
    MixtureCDF,
    SumOfSquares,
    TailTransform,
    UnconstrainedMonotone,
)
from laminar.bijections.numerical import NumericalInverse
from laminar.bijections.templates import Inverted, as_elementwise

AT_IDENTITY = [
    MixtureCDF(5),
    MixtureCDF(5, law="normal"),
    DeepSigmoidal(5),
    DeepSigmoidal(4, 3),
    UnconstrainedMonotone(4),
    SumOfSquares(),
    Bernstein(),
]


def _params(template, seed=0, scale=1.0):
    return scale * jr.normal(jr.key(seed), template.params.shape)


def _softplus(raw):
    return np.log1p((math.e - 1) * np.exp(np.asarray(raw, float)))


def _sigmoid(u):
    return 1 / (1 + np.exp(-u))


def _softmax(raw, axis=0):
    share = np.exp(np.asarray(raw, float))
    return share / share.sum(axis, keepdims=True)


@pytest.mark.parametrize("template", AT_IDENTITY, ids=lambda t: t.name)
def test_zero_parameters_are_the_identity(template):
    x = jnp.asarray([-1e6, -20.0, -3.0, 0.0, 0.5, 4.0, 1e6])
    params = jnp.zeros((*template.params.shape, 1))
    y, log_det = template.forward_kernel(params, x)
    np.testing.assert_allclose(y, x, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(log_det, 0, atol=3e-6)


@pytest.mark.parametrize("template", AT_IDENTITY, ids=lambda t: t.name)
def test_training_leaves_the_identity_and_reaches_every_parameter(template):
    x = jr.normal(jr.key(1), (256,))
    target = jnp.where(x > 0, x + 1.5, 0.5 * x - 1)

    def loss(params):
        y, log_det = template.forward_kernel(params[:, None], x)
        return jnp.mean((y - target) ** 2) - 0.1 * log_det.mean()

    @jax.jit
    def fit(params):
        def step(state, _):
            params, mean, square = state
            value, gradient = jax.value_and_grad(loss)(params)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.99 * square + 0.01 * gradient**2
            return (params - 0.05 * mean / (jnp.sqrt(square) + 1e-8), mean, square), value

        zeros = jnp.zeros_like(params)
        return jax.lax.scan(step, (params, zeros, zeros), None, length=150)

    (params, _, _), values = fit(template.params)
    assert (np.asarray(params) != 0).all()
    assert values[-1] < 0.6 * values[0]
    if isinstance(template, MixtureCDF | DeepSigmoidal):
        assert np.std(np.asarray(params)[: template.params.shape[0] // 3]) > 1e-2


def test_an_inverted_map_costs_what_its_kernel_does():
    for part in (DeepSigmoidal(8, 3), UnconstrainedMonotone()):
        assert as_elementwise(Invert(part)).row_cost("inverse") >= part.row_cost("forward")


def test_a_mixture_of_normals_keeps_its_digits_far_out():
    template = MixtureCDF(3, law="normal", affine=False)
    params = _params(template)
    log_weight = np.log(_softmax(params[:3]))
    pivot, a = np.linspace(-3, 3, 3), _softplus(params[6:9])
    x = np.array([-1e3, -30.0, -6.0, -1.0, 0.2, 2.0, 9.0, 1e3])
    u = a[:, None] * (x - pivot[:, None]) + (pivot - np.asarray(params[3:6]))[:, None]
    lower, upper = (
        scipy.special.logsumexp(log_weight[:, None] + scipy.special.log_ndtr(s * u), axis=0)
        for s in (1, -1)
    )
    expected = -np.sign(upper - lower) * abs(scipy.special.ndtri_exp(np.minimum(lower, upper)))
    weighted = log_weight[:, None] + np.log(a)[:, None] - 0.5 * u * u
    slope = scipy.special.logsumexp(weighted, axis=0) + 0.5 * expected**2
    y, log_det = template.forward_kernel(params[:, None], jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(log_det, slope, atol=2e-6)
    with pytest.raises(InputError, match="law must be"):
        MixtureCDF(law="cauchy")


def test_mixture_is_the_distribution_function_of_its_components():
    with jax.enable_x64(True):
        template = MixtureCDF(3)
        params = _params(template)
        raw_weight, m, raw_a = (np.asarray(params[3 * i : 3 * i + 3]) for i in range(3))
        pivot, a = np.linspace(-3, 3, 3), _softplus(raw_a)
        x = np.linspace(-4, 4, 9)
        centre = pivot + (m - pivot) / a
        cdf = scipy.stats.logistic.cdf(x[:, None], centre, 1 / a) @ _softmax(raw_weight)
        y, _ = template.forward_kernel(params[:, None], jnp.asarray(x))
        expected = np.log(cdf / (1 - cdf)) * _softplus(params[10]) + float(params[9])
        np.testing.assert_allclose(y, expected, rtol=1e-10)


def test_tails_of_a_mixture_keep_their_digits_in_float32():
    template = MixtureCDF(3, affine=False)
    params = _params(template)
    widest = _softplus(params[6:9]).min()
    y, log_det = template.forward_kernel(params[:, None], jnp.asarray([-1e6, 1e6]))
    np.testing.assert_allclose(y, [-1e6 * widest, 1e6 * widest], rtol=1e-4)
    np.testing.assert_allclose(log_det, math.log(widest), rtol=1e-5)


def test_deep_sigmoidal_is_equation_10_of_the_paper():
    with jax.enable_x64(True):
        k = 3
        template = DeepSigmoidal(k, 2)
        params = _params(template)
        pivot = np.linspace(-3, 3, k)
        gap = 4 / k * (np.arange(k)[:, None] - np.arange(k)[None])
        band = -0.5 * gap**2
        pieces = np.split(np.asarray(params), np.cumsum([k, k, k * k, k, k, k * k])[:])
        x = np.linspace(-4, 4, 9)
        a, b, w = pieces[:3]
        u = _softplus(a)[:, None] * (x - pivot[:, None]) + (pivot + b)[:, None]
        inner = _softmax(w.reshape(k, k) + band, 1) @ _sigmoid(u)
        h = np.log(inner / (1 - inner))
        a, b, mix, w = pieces[3:]
        h = _softmax(mix.reshape(k, k) + band, 1) @ h
        u = _softplus(a)[:, None] * (h - pivot[:, None]) + (pivot + b)[:, None]
        inner = _softmax(w) @ _sigmoid(u)
        y, _ = template.forward_kernel(params[:, None], jnp.asarray(x))
        np.testing.assert_allclose(y, np.log(inner / (1 - inner)), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_log_det_of_an_integral_is_the_slope_of_the_sum(dtype):
    """At random parameters the sum has converged to the budget of the contract."""
    with jax.enable_x64(dtype == "float64"):
        template = UnconstrainedMonotone()
        budget = 1e-5 if dtype == "float32" else 1e-9
        x = jnp.linspace(-6, 6, 121, dtype=dtype)
        for seed in range(5):
            params = jnp.asarray(_params(template, seed), dtype)[:, None]
            kernel = eqx.filter_jit(template.forward_kernel)
            (_, log_det), (slope, _) = jax.jvp(lambda x: kernel(params, x), (x,), (x * 0 + 1,))
            np.testing.assert_allclose(jnp.log(slope), log_det, atol=budget)


def test_the_integral_of_a_network_against_quadrature():
    with jax.enable_x64(True):
        template = UnconstrainedMonotone(3)
        params = _params(template)
        loc, w = float(params[0]), float(params[1])
        v, raw, b = (np.asarray(params[2 + 3 * i : 5 + 3 * i]) for i in range(3))
        pivot = np.linspace(-4, 4, 3)

        def slope(r):
            s = w + v @ np.tanh((1 + np.tanh(raw)) * (r - pivot) + b) / math.sqrt(3)
            return np.exp(8 * np.tanh(s / 8))

        x = np.asarray([-4.5, -1.0, 0.3, 5.0])
        expected = [loc + quad(slope, 0, r, epsabs=1e-12)[0] for r in x]
        y, log_det = template.forward_kernel(params[:, None], jnp.asarray(x))
        np.testing.assert_allclose(y, expected, rtol=1e-9)
        np.testing.assert_allclose(log_det, [np.log(slope(r)) for r in x], rtol=1e-9)


def test_sum_of_squares_is_the_integral_of_its_polynomials():
    with jax.enable_x64(True):
        template = SumOfSquares(2, 2, edge=3.0)
        params = _params(template)
        theta = np.asarray(params[1:]).reshape(2, 3).copy()
        theta[:, 0] += np.asarray([2, 1]) / math.sqrt(5)

        def slope(r):
            values = [np.polynomial.polynomial.polyval(r / 3, t) for t in theta]
            return 1e-3 + 0.999 * sum(v * v for v in values)

        x = np.asarray([-2.0, 0.1, 2.9])
        expected = [float(params[0]) + quad(slope, 0, r, epsabs=1e-13)[0] for r in x]
        y, log_det = template.forward_kernel(params[:, None], jnp.asarray(x))
        np.testing.assert_allclose(y, expected, rtol=1e-10)
        np.testing.assert_allclose(log_det, [np.log(slope(r)) for r in x], rtol=1e-10)


def test_bernstein_is_a_sum_of_binomial_probabilities():
    with jax.enable_x64(True):
        n = 5
        template = Bernstein(n, interval=(-2.0, 4.0))
        params = _params(template)
        steps = _softplus(params[1:]) * 6 / n
        alpha = np.concatenate([[0.0], np.cumsum(steps)])
        alpha += 1.0 + float(params[0]) - 0.5 * steps.sum()
        x = np.linspace(-2, 4, 13)
        basis = scipy.stats.binom.pmf(np.arange(n + 1), n, ((x + 2) / 6)[:, None])
        y, _ = template.forward_kernel(params[:, None], jnp.asarray(x))
        np.testing.assert_allclose(y, basis @ alpha, rtol=1e-10, atol=1e-12)
        outside, log_det = template.forward_kernel(params[:, None], jnp.asarray([-3.0, 6.0]))
        slopes = _softplus(params[jnp.asarray([1, n])])
        np.testing.assert_allclose(outside, y[jnp.asarray([0, -1])] + slopes * [-1, 2], rtol=1e-10)
        np.testing.assert_allclose(log_det, np.log(slopes), rtol=1e-10)


def test_bernstein_of_the_largest_degree_is_the_identity_at_the_start():
    template, x = Bernstein(128), jnp.linspace(-6, 6, 25)
    y, log_det = template.forward_kernel(template.params[:, None], x)
    np.testing.assert_allclose(y, x, atol=1e-4)
    np.testing.assert_allclose(log_det, 0, atol=1e-4)


def test_a_tail_transform_takes_shape_and_dtype_of_its_arguments():
    assert TailTransform(right=jnp.asarray([0.1, 0.2])).in_shape == (2,)
    with jax.enable_x64(True):
        assert TailTransform(*jnp.ones(4, jnp.float32)).params.dtype == jnp.float32
    with pytest.raises(ShapeError, match="cannot be broadcast"):
        TailTransform(right=jnp.ones(2), left=jnp.ones(3))


@pytest.mark.parametrize(("dtype", "budget"), [("float32", 1e-5), ("float64", 1e-12)])
def test_tails_are_the_formula_of_the_paper_and_invert_far_out(dtype, budget):
    with jax.enable_x64(dtype == "float64"):
        template = TailTransform(0.5, 2.0, 0.7, 0.2)
        x = jnp.asarray([-5.0, -1.0, -1e-4, 0.0, 1e-4, 0.4, 2.9, 3.1, 6.0], dtype)
        weight = np.where(x >= 0, 0.7, 0.2)
        x64 = np.asarray(x, float)
        erfc = 2 * scipy.stats.norm.sf(np.abs(x64))
        expected = 0.5 + 2 * np.sign(x64) * np.expm1(-weight * np.log(erfc)) / weight
        params = jnp.asarray(template.params, dtype)[:, None]
        y, log_det = template.forward_kernel(params, x)
        np.testing.assert_allclose(y, expected, rtol=10 * budget)
        far = jnp.asarray([-1e30, -1e6, 1e6, 1e30], dtype)
        back, log_back = template.inverse_kernel(params, far)
        again, log_det = template.forward_kernel(params, back)
        np.testing.assert_allclose(again, far, rtol=1e3 * budget)
        np.testing.assert_allclose(log_det, -log_back, rtol=10 * budget)


def test_a_normal_through_tails_is_heavy_with_the_weight_asked_for():
    template = TailTransform(right=0.5)
    x = jnp.asarray([6.0, 9.0])
    y, _ = template.forward_kernel(template.params[:, None], x)
    log_survival = scipy.stats.norm.logsf(np.asarray(x, float))
    slope = np.diff(log_survival) / np.diff(np.log(y))
    np.testing.assert_allclose(slope, -1 / 0.5, rtol=1e-2)


@pytest.mark.parametrize("template", [*AT_IDENTITY, TailTransform()], ids=lambda t: t.name)
def test_far_points_have_finite_values_both_ways(template):
    x = jnp.asarray([-1e6, 1e6])
    params = _params(template)[:, None]
    for kernel in (template.forward_kernel, template.inverse_kernel):
        value, log_det = eqx.filter_jit(kernel)(params, x)
        assert bool(jnp.isfinite(value).all() & jnp.isfinite(log_det).all())


def test_a_mixture_of_steep_components_is_finite_at_the_largest_numbers():
    template = MixtureCDF(3)
    params = template.params.at[6:9].set(5.0)[:, None]
    y, log_det = template.forward_kernel(params, jnp.asarray([-1e38, 1e38]))
    assert bool(jnp.isfinite(y).all() & jnp.isfinite(log_det).all())


def test_arrays_of_a_kernel_stay_trained_in_a_template():
    class Kernel(eqx.Module):
        tail: jax.Array

        def __call__(self, params, x):
            a = jnp.exp(params[0])
            return a * x + self.tail * jnp.tanh(x), jnp.log(a + self.tail / jnp.cosh(x) ** 2)

    part, y = NumericalInverse(Kernel(jnp.asarray(0.5)), jnp.zeros((1,))), jnp.asarray(0.7)
    for template in (Invert(part), Chain([part, Affine()])):
        wrapped = as_elementwise(template)
        assert wrapped.params.shape[0] == count_parameters(template)
        for a, b in zip(wrapped.inverse(y), template.inverse(y), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_an_inverted_map_is_a_template_closed_the_other_way():
    part = MixtureCDF(3)
    turned = as_elementwise(Invert(part))
    assert isinstance(turned, Inverted)
    params, y = _params(part)[:, None], jnp.linspace(-2, 2, 5)
    for a, b in zip(turned.inverse_kernel(params, y), part.forward_kernel(params, y), strict=True):
        np.testing.assert_array_equal(a, b)
    chain = as_elementwise(Chain([Invert(part), Affine()]))
    assert chain.params.shape == (part.params.shape[0] + 2,)
    # The dense direction of a layer is then free of loops.
    layer = masked_autoregressive(3, Invert(part), width=8, depth=1, key=jr.key(0))
    assert "while" not in str(eqx.filter_make_jaxpr(layer.inverse)(jnp.zeros(3))[0])
    assert "while" in str(eqx.filter_make_jaxpr(layer.forward)(jnp.zeros(3))[0])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MixtureCDF(0), "components must be at least 1"),
        (lambda: DeepSigmoidal(4, 0), "layers must be at least 1"),
        (lambda: UnconstrainedMonotone(nodes=0), "nodes must be"),
        (lambda: UnconstrainedMonotone(edge=math.inf), "edge must be positive"),
        (lambda: SumOfSquares(0), "degree must be"),
        (lambda: SumOfSquares(min_slope=0.0), "min_slope"),
        (lambda: Bernstein(interval=(1.0, 0.0)), "interval"),
        (lambda: Bernstein(129), "at most 128"),
        (lambda: TailTransform(right=0.0), "every right"),
    ],
)
def test_misuse_is_named(make, match):
    with pytest.raises(InputError, match=match):
        make()
