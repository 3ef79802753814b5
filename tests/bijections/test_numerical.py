"""Numerical inversion: brackets, precision, implicit gradients, and honest failure."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar._errors import InputError
from laminar.bijections.numerical import NumericalInverse, monotone_root


def _cubic(params, x):
    slope = jnp.exp(params[0])
    return slope * x**3 + x + params[1], jnp.log1p(3 * slope * x * x)


def _value(params, x):
    return _cubic(params, x)[0]


@pytest.mark.parametrize(("dtype", "budget"), [("float32", 2e-6), ("float64", 1e-14)])
def test_round_trip(dtype, budget):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray([0.0, 1e-12, -1e-3, 0.7, -30.0, 5e3], dtype)
        bijection = NumericalInverse(_cubic, jnp.zeros((2, 6), dtype))
        y, log_det = bijection.forward(x)
        back, log_det_back = bijection.inverse(y)
        assert back.dtype == x.dtype
        np.testing.assert_allclose(back, x, rtol=budget, atol=1e-20)
        np.testing.assert_allclose(log_det_back, -log_det, rtol=1e2 * budget)


@pytest.mark.parametrize(
    ("dtype", "step", "budget"), [("float32", 1e-2, 2e-3), ("float64", 1e-5, 1e-8)]
)
def test_implicit_gradients_against_differences(dtype, step, budget):
    with jax.enable_x64(dtype == "float64"):
        params = jr.normal(jr.key(0), (2, 4), dtype)
        y = 2 * jr.normal(jr.key(1), (4,), dtype)

        def solve(params, y):
            return jnp.sin(monotone_root(_value, params, y)).sum()

        solve = jax.jit(solve)
        by_params, by_y = jax.jit(jax.grad(solve, argnums=(0, 1)))(params, y)
        forward = jax.jit(jax.jacfwd(solve))(params, y)
        np.testing.assert_allclose(forward, by_params, rtol=1e3 * budget, atol=budget)
        d_params, d_y = jr.normal(jr.key(2), params.shape, dtype), jr.normal(jr.key(3), (4,), dtype)
        up = solve(params + step * d_params, y + step * d_y)
        down = solve(params - step * d_params, y - step * d_y)
        expected = (by_params * d_params).sum() + (by_y * d_y).sum()
        np.testing.assert_allclose((up - down) / (2 * step), expected, atol=budget)


def test_second_derivative():
    with jax.enable_x64(True):
        zero = jnp.zeros((0,))
        second = jax.grad(jax.grad(lambda y: monotone_root(lambda p, x: jnp.exp(x), zero, y)))
        np.testing.assert_allclose(second(jnp.asarray(2.0)), -0.25, rtol=1e-10)


def test_arrays_inside_the_function_are_differentiated():
    class Stretch(eqx.Module):
        factor: jax.Array

        def __call__(self, params, x):
            return self.factor * x

    def solve(stretch):
        return monotone_root(stretch, jnp.zeros((0,)), jnp.float32(6.0))

    grad = eqx.filter_grad(solve)(Stretch(jnp.float32(3.0)))
    np.testing.assert_allclose(grad.factor, -2 / 3, rtol=1e-5)


def test_bracket_grows_to_far_roots():
    roots = monotone_root(
        lambda params, x: x, jnp.zeros((0, 1)), jnp.array([1e30, -1e20, 1e6, 1e-6])
    )
    np.testing.assert_allclose(roots, [1e30, -1e20, 1e6, 1e-6], rtol=1e-6)


def test_no_bracket_gives_nan():
    y = jnp.array([2.0, -2.0, 0.5, jnp.nan])
    roots = monotone_root(lambda params, x: jnp.tanh(x), jnp.zeros((0, 1)), y)
    np.testing.assert_array_equal(jnp.isnan(roots), [True, True, False, True])


def test_domain_is_respected():
    def half_line(params, x):
        return jnp.log(x)

    roots = monotone_root(
        half_line, jnp.zeros((0, 1)), jnp.array([-3.0, 4.0]), bracket=(0.5, 1.0), domain=(1e-6, 1e6)
    )
    np.testing.assert_allclose(roots, np.exp([-3.0, 4.0]), rtol=1e-5)
    assert bool(
        jnp.isnan(
            monotone_root(
                half_line,
                jnp.zeros((0,)),
                jnp.float32(20.0),
                bracket=(0.5, 1.0),
                domain=(1e-6, 1e6),
            )
        )
    )


@pytest.mark.parametrize("bracket", [(1.0, -1.0), (0.0, float("inf")), (-2.0, 1.0)])
def test_bad_brackets(bracket):
    with pytest.raises(InputError, match="bracket"):
        monotone_root(
            _value, jnp.zeros((2,)), jnp.float32(0.0), bracket=bracket, domain=(-1.0, 9.0)
        )


def _squash(params, x):
    """Of the whole line onto (-1, 1)."""
    return jnp.tanh(x - params[0]), -2 * jnp.log(jnp.cosh(jnp.clip(x - params[0], -40.0, 40.0)))


def _root(params, x):
    """Of [0, ∞) onto itself, with an infinite slope at the domain's end."""
    return jnp.sqrt(x) * jnp.exp(params[0]), params[0] - jnp.log(2.0) - 0.5 * jnp.log(x)


@pytest.mark.parametrize("y", [-math.inf, -5.0, -1.0, 1.0, 5.0, math.inf])
def test_beyond_a_bounded_image(y):
    squash = NumericalInverse(_squash, jnp.array([0.5]))

    def run(params, y):
        return squash.inverse_kernel(params, y)

    x, log_det = run(squash.params, jnp.float32(y))
    assert bool(jnp.isfinite(x))
    assert np.sign(x) == np.sign(y)
    if abs(y) > 1:
        assert float(log_det) == -math.inf
    grads = jax.grad(lambda p, y: run(p, y)[0], (0, 1))(squash.params, jnp.float32(y))
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_outside_the_domain():
    positive = NumericalInverse(_root, jnp.zeros(1), bracket=(0.5, 2.0), domain=(0.0, math.inf))
    x, log_det = positive.inverse(jnp.float32(-1.0))
    assert (float(x), float(log_det)) == (0.0, -math.inf)
    np.testing.assert_allclose(positive.inverse(jnp.float32(3.0))[0], 9, rtol=1e-5)
    y, log_det = positive.forward(jnp.float32(-1.0))
    assert (float(y), float(log_det)) == (0.0, -math.inf)

    def total(params):
        return positive.inverse_kernel(params, jnp.float32(-1.0))[0]

    assert bool(jnp.isfinite(jax.grad(total)(positive.params)).all())


def test_nan_stays_nan():
    def nowhere(params, x):
        return x * jnp.nan, x

    for kernel, y in ((_squash, jnp.nan), (nowhere, 1.0)):
        x, log_det = NumericalInverse(kernel, jnp.zeros(1)).inverse(jnp.float32(y))
        assert bool(jnp.isnan(x) & jnp.isnan(log_det))
