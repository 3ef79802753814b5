"""Scalar maps: values, extremes, options and the adapter."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laminar._errors import InputError, ShapeError
from laminar.bijections.base import Invert
from laminar.bijections.compose import Chain, Permute
from laminar.bijections.elementwise import (
    Affine,
    Exp,
    LeakyReLU,
    LeakyTanh,
    Power,
    Shift,
    Sigmoid,
    SignedPower,
    SinhArcsinh,
    Softplus,
    Tanh,
    logit,
)
from laminar.bijections.monotone import TailTransform
from laminar.bijections.templates import as_elementwise

MAPS = {
    "affine": Affine(0.3, 2.0),
    "bounded": Affine(0.3, 2.0, max_log_scale=1.0),
    "shift": Shift(0.3),
    "exp": Exp(),
    "softplus": Softplus(),
    "sigmoid": Sigmoid(),
    "logit": logit(),
    "tanh": Tanh(),
    "leaky": LeakyTanh(),
    "power": Power(1.5),
    "signed_power": SignedPower(1.5),
    "leaky_relu": LeakyReLU(0.2),
    "sinh_arcsinh": SinhArcsinh(0.5, 0.7),
}


@pytest.mark.parametrize(
    ("bijection", "expected"),
    [
        (Affine(0.3, 2.0), lambda x: 2 * x + 0.3),
        (Exp(), np.exp),
        (Softplus(), lambda x: np.log1p(np.exp(x))),
        (Sigmoid(), lambda x: 1 / (1 + np.exp(-x))),
        (Tanh(), np.tanh),
        (SinhArcsinh(0.5, 0.7), lambda x: np.sinh(0.7 * (np.arcsinh(x) + 0.5))),
        (SignedPower(1.5), lambda x: np.sign(x) * np.abs(x) ** 1.5),
        (LeakyReLU(0.2), lambda x: np.where(x < 0, 0.2 * x, x)),
    ],
    ids=lambda b: getattr(b, "name", ""),
)
def test_value(bijection, expected):
    with jax.enable_x64(True):
        x = jnp.linspace(-3.0, 3.0, 7)
        bijection = jax.tree_util.tree_map(lambda v: v.astype(x.dtype), bijection)
        y, _ = bijection.forward(x)
        np.testing.assert_allclose(y, expected(np.asarray(x)), rtol=1e-6)


@pytest.mark.parametrize("make", [Affine, Shift, Power, SignedPower, SinhArcsinh])
def test_default_is_the_identity(make):
    template = make()
    assert not template.params.any()
    assert not template.params.weak_type
    x = jnp.array([0.2, 1.0, 5.0])
    y, log_det = template.forward(x)
    np.testing.assert_allclose(y, x, rtol=2e-6)
    np.testing.assert_allclose(log_det, 0, atol=1e-6)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_number_gives_numbers_and_finite_gradients(name, direction, x):
    value, slope, steepness = _at(name, direction)(jnp.float32(x))
    assert not any(bool(jnp.isnan(v)) for v in value)
    if abs(x) <= 1e30 and not 0 < abs(x) < 1e-30:
        assert bool(jnp.isfinite(slope))
        assert bool(jnp.isfinite(steepness))


_compiled: dict = {}


def _at(name, direction):
    """One compiled function for each map and direction."""
    if (name, direction) not in _compiled:
        f = getattr(MAPS[name], direction)

        def run(x):
            slope, steepness = jax.jacfwd(f)(x)
            return f(x), slope, steepness

        _compiled[name, direction] = jax.jit(run)
    return _compiled[name, direction]


@pytest.mark.parametrize("bijection", [Exp(), Softplus(), Sigmoid(), Power(2.0)])
@pytest.mark.parametrize("y", [-1.0, 0.0, -math.inf, math.inf])
def test_outside_the_support(bijection, y):
    x, log_det = bijection.inverse(jnp.float32(y))
    assert bool(jnp.isfinite(x))
    assert float(log_det) == -math.inf


@pytest.mark.parametrize("x", [-1e6, -200.0, 200.0, 1e6])
@pytest.mark.parametrize("bijection", [Exp(), Softplus(), Sigmoid(), Tanh()])
def test_image_stays_inside_the_support(bijection, x):
    y, log_det = bijection.forward(jnp.float32(x))
    _, back = bijection.inverse(y)
    assert bool(jnp.isfinite(back))
    assert bool(jnp.isfinite(log_det))


def test_affine_bound_is_kept():
    template = Affine(max_log_scale=1.5)
    raw = jnp.array([0.0, 1e6])
    _, log_det = template.forward_kernel(raw, jnp.float32(1.0))
    assert float(log_det) <= 1.5


@pytest.mark.parametrize(("exponent", "expected"), [(2.0, -math.inf), (0.5, math.inf), (1.0, 0.0)])
def test_the_log_det_of_a_signed_power_at_zero_is_its_slope_there(exponent, expected):
    y, log_det = SignedPower(exponent).forward(jnp.zeros(()))
    assert (float(y), float(log_det)) == (0.0, expected)
    x, log_det = SignedPower(exponent).inverse(jnp.zeros(()))
    assert (float(x), float(log_det)) == (0.0, -expected)
    for method in (SignedPower(exponent).forward, SignedPower(exponent).inverse):
        assert float(jax.grad(lambda x, run=method: run(x)[0])(jnp.zeros(()))) == (exponent == 1)


def test_shapes_follow_arguments():
    assert Affine(jnp.zeros(3), 2.0).in_shape == (3,)
    assert Affine(shape=(2, 2)).params.shape == (2, 2, 2)
    assert Exp((4,)).params.shape == (0, 4)
    y, log_det = Affine(jnp.zeros(3), 2.0).forward(jnp.ones((3, 5, 7)))
    assert (y.shape, log_det.shape) == ((3, 5, 7), (5, 7))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(scale=0.0),
        lambda: Affine(scale=9.0, max_log_scale=2.0),
        lambda: Affine(max_log_scale=-1.0),
        lambda: Power(-1.0),
        lambda: SignedPower(0.0),
        lambda: LeakyReLU(-0.1),
        lambda: SinhArcsinh(tail=0.0),
        lambda: LeakyTanh(bound=0.0),
        lambda: LeakyTanh(bound=4.5),
    ],
)
def test_bad_options(make):
    with pytest.raises(InputError):
        make()


def test_as_elementwise_keeps_kernels():
    template = Affine()
    assert as_elementwise(template) is template


def test_as_elementwise_of_an_inverse():
    inner = Invert(SinhArcsinh(0.3, 1.2))
    adapted = as_elementwise(inner)
    assert adapted.params.shape == (2,)
    x = jr.normal(jr.key(0), (5,))
    np.testing.assert_allclose(adapted.forward(x)[0], inner.forward(x)[0], rtol=1e-6)
    np.testing.assert_allclose(adapted.inverse(x)[1], inner.inverse(x)[1], rtol=1e-5, atol=1e-6)
    # Parameters of its own for every element.
    params = adapted.params[:, None] + jnp.linspace(0.0, 1.0, 5)[None]
    y, _ = adapted.forward_kernel(params, x)
    other = eqx.tree_at(lambda b: b.bijection.params, inner, params[:, 3])
    np.testing.assert_allclose(y[3], other.forward(x[3])[0], rtol=1e-5)


def test_as_elementwise_refuses_vectors():
    with pytest.raises(ShapeError, match="scalars"):
        as_elementwise(Chain([Permute([1, 0])]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(jnp.zeros(2), shape=(3,)),
        lambda: Affine(jnp.zeros(2), jnp.ones(3)),
        lambda: Affine(jnp.zeros((2, 3)), shape=(3,)),
        lambda: Shift(jnp.zeros(2), shape=(3,)),
        lambda: Power(jnp.ones(2), shape=(3,)),
        lambda: SinhArcsinh(jnp.zeros(2), shape=(3,)),
    ],
)
def test_shapes_that_do_not_fit(make):
    with pytest.raises(ShapeError, match="broadcast"):
        make()


def test_composed_keeps_its_parameters_once():
    composed = as_elementwise(Chain([Affine(0.3, 2.0), SinhArcsinh(0.5, 0.7), Shift(0.1)]))
    arrays = jax.tree_util.tree_leaves(eqx.filter(composed, eqx.is_array))
    assert sum(a.size for a in arrays) == composed.params.size == 5
    y, _ = composed.forward(jnp.float32(0.4))
    np.testing.assert_allclose(composed.inverse(y)[0], 0.4, rtol=1e-5)


@pytest.mark.parametrize("raw", [-1e30, -200.0])
def test_scales_do_not_underflow(raw):
    params = jnp.array([0.0, raw])
    x, log_det = Affine().inverse_kernel(params, jnp.float32(0.0))
    assert bool(jnp.isfinite(x))
    assert bool(jnp.isfinite(log_det))


@pytest.mark.parametrize("raw", [-1e30, -79.0, -60.0, 60.0])
@pytest.mark.parametrize(
    "bijection", [Affine(), Power(), SignedPower(), LeakyReLU(), SinhArcsinh(), TailTransform()]
)
def test_gradients_are_finite_at_extreme_parameters(bijection, raw):
    for index in range(len(bijection.params)):
        params = bijection.params.at[index].set(raw)
        for kernel in (bijection.forward_kernel, bijection.inverse_kernel):
            for part in (0, 1):
                gradients = jax.grad(lambda *a, k=kernel, i=part: k(*a)[i], (0, 1))(params, 0.7)
                assert all(bool(jnp.isfinite(g).all()) for g in gradients), (index, kernel, part)
