"""Linear maps against dense numpy computations, and what ActNorm does to a batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
import scipy.fft
import scipy.linalg
from cases import randomise

from laminar._errors import InputError, ShapeError
from laminar._params import positive
from laminar.bijections.base import Invert
from laminar.bijections.compose import Chain, Repeat, random_permutation, repeat
from laminar.bijections.linear import DCT, LU, ActNorm, Householder, LowRank, Matrix, Triangular
from laminar.bijections.orthogonal import QR, SVD, Cayley, MatrixExponential

MAKERS = {
    "lower": lambda key, dim: Triangular(dim),
    "upper": lambda key, dim: Triangular(dim, lower=False, bias=False),
    "lu": lambda key, dim: LU(dim, key=key),
    "lu_plain": lambda key, dim: LU(dim, bias=False),
    "householder": lambda key, dim: Householder(dim, key=key),
    "householder_odd": lambda key, dim: Householder(dim, 3, key=key),
    "low_rank": lambda key, dim: LowRank(dim, min(2, dim), key=key),
    "svd": lambda key, dim: SVD(dim, key=key),
    "qr": lambda key, dim: QR(dim, key=key, bias=False),
    "cayley": lambda key, dim: Cayley(dim),
    "any": lambda key, dim: Matrix(dim),
    "exponential": lambda key, dim: MatrixExponential(dim),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dim", [1, 4])
def test_against_the_dense_matrix(name, dim):
    with jax.enable_x64(True):
        b = randomise(MAKERS[name](jr.key(0), dim), jr.key(1))
        matrix = np.asarray(b.matrix)
        shift = np.asarray(b.forward(jnp.zeros(dim))[0])
        x = np.asarray(jr.normal(jr.key(2), (dim, 3, 2)))
        y, log_det = eqx.filter_jit(b.forward)(jnp.asarray(x))
        expected = np.einsum("ij,jkl->ikl", matrix, x) + shift[:, None, None]
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
        _, value = np.linalg.slogdet(matrix)
        np.testing.assert_allclose(log_det, np.full((3, 2), value), rtol=1e-12, atol=1e-13)
        back, minus = eqx.filter_jit(b.inverse)(y)
        solved = np.linalg.solve(matrix, (expected - shift[:, None, None]).reshape(dim, 6))
        np.testing.assert_allclose(back, solved.reshape(x.shape), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(back, x, rtol=1e-11, atol=1e-12)
        np.testing.assert_array_equal(minus, -log_det)
        one, _ = b.inverse(y[:, 0, 0])
        np.testing.assert_allclose(one, x[:, 0, 0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_starts_at_the_identity(name):
    b = MAKERS[name](jr.key(0), 5)
    x = jr.normal(jr.key(1), (5, 3))
    y, log_det = b.forward(x)
    if name == "lu":
        x = x[b.index]
        assert sorted(b.index.tolist()) == [0, 1, 2, 3, 4]
    if name == "householder_odd":
        np.testing.assert_allclose(np.linalg.det(b.matrix), -1.0, rtol=1e-5)
    else:
        np.testing.assert_allclose(y, x, atol=2e-6)
    np.testing.assert_allclose(log_det, 0.0, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_every_parameter_has_a_finite_gradient(name):
    b = randomise(MAKERS[name](jr.key(0), 4), jr.key(1))
    x = jr.normal(jr.key(2), (4, 5))

    def loss(b, direction):
        y, log_det = getattr(b, direction)(x)
        return jnp.sum(jnp.sin(y)) + jnp.sum(log_det)

    for direction in ("forward", "inverse"):
        grads = jax.jit(jax.grad(loss, allow_int=True), static_argnums=1)(b, direction)
        for leaf in jtu.tree_leaves(eqx.filter(grads, eqx.is_inexact_array)):
            assert bool(jnp.isfinite(leaf).all())
            assert float(jnp.abs(leaf).max()) > 0


def test_the_gradient_of_the_low_rank_map_is_that_of_finite_differences():
    with jax.enable_x64(True):
        b = randomise(LowRank(4, 2, key=jr.key(0)), jr.key(1))
        x = jr.normal(jr.key(2), (4,))

        def value(t):
            basis = b.basis.at[1, 0].add(t)
            y, _ = eqx.tree_at(lambda s: s.basis, b, basis).inverse(x)
            return y.sum()

        step = 1e-5
        expected = (value(step) - value(-step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(value)(0.0), expected, rtol=1e-7)


@pytest.mark.parametrize("kind", [Triangular, LU])
def test_extreme_diagonals_stay_finite(kind):
    def sum_of_both(raw):
        y, log_det = eqx.tree_at(lambda s: s.raw, kind(3), raw).forward(jnp.ones(3))
        return y.sum() + log_det

    raw = jnp.diag(jnp.asarray([-1e4, 0.0, 1e4]))
    value, grads = jax.value_and_grad(sum_of_both)(raw)
    assert np.isfinite(value)
    assert np.all(np.isfinite(grads))


def test_the_matrix_of_factors_has_their_dtype_and_no_rounding_of_the_shift():
    with jax.enable_x64(True):
        qr = QR(3, key=jr.key(0))
        qr = jtu.tree_map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, qr)
        moved = eqx.tree_at(lambda m: m.triangular.shift, qr, jnp.full(3, 1e6, jnp.float32))
        assert moved.matrix.dtype == jnp.float32
        np.testing.assert_allclose(moved.matrix, jnp.eye(3), atol=1e-6)


def test_reflections_of_any_length_are_orthogonal():
    vectors = jnp.asarray([[0.0, 1e30, 1e-30], [0.0, 1e30, 3e-30], [0.0, -2e30, 1e-30]])
    b = eqx.tree_at(lambda s: s.vectors, Householder(3, 3, key=jr.key(0)), vectors)
    q = np.asarray(b.matrix)
    np.testing.assert_allclose(q @ q.T, np.eye(3), atol=1e-6)
    unit = np.asarray(vectors, np.float64)
    unit[:, 0] = [1, 0, 0]
    expected = np.eye(3)
    for k in range(3):
        v = unit[:, k] / np.linalg.norm(unit[:, k])
        expected = expected @ (np.eye(3) - 2 * np.outer(v, v))
    np.testing.assert_allclose(q, expected, atol=1e-6)
    grads = jax.grad(lambda b: b.forward(jnp.asarray([1.0, 2.0, 3.0]))[0].sum())(b)
    assert bool(jnp.isfinite(grads.vectors).all())


def test_the_low_rank_map_is_invertible_at_wild_parameters():
    with jax.enable_x64(True):
        for seed in range(5):
            b = randomise(LowRank(6, 3, key=jr.key(seed)), jr.key(seed + 10), scale=4.0)
            sign, log_det = np.linalg.slogdet(b.matrix)
            assert sign == 1
            np.testing.assert_allclose(log_det, b.forward(jnp.zeros(6))[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", MAKERS)
def test_stacks_in_repeat(name):
    layers = repeat(lambda key: randomise(MAKERS[name](key, 4), key, 0.5), 3, key=jr.key(0))
    x = jr.normal(jr.key(1), (4, 5))
    y, log_det = layers.forward(x)
    z, total = x, jnp.zeros(5)
    for layer in layers.steps():
        z, step = layer.forward(z)
        total = total + step
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_det, total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layers.inverse(y)[0], x, rtol=1e-3, atol=1e-3)


def data(n=400):
    """Features on very different scales, one constant, one constant that does not round well."""
    x = jr.normal(jr.key(0), (4, n))
    scale, loc = jnp.asarray([3.0, 1e-3, 0.0, 0.0]), jnp.asarray([10.0, -1.0, 0.1, 1e6])
    return scale[:, None] * x + loc[:, None]


def assert_standard(z, varying=(0, 1), atol=2e-3):
    z = np.asarray(z, np.float64)
    np.testing.assert_allclose(z.mean(1), 0.0, atol=atol)
    np.testing.assert_allclose(z.std(1)[list(varying)], 1.0, atol=atol)


@pytest.mark.parametrize("inverted", [False, True])
def test_act_norm_standardises_on_either_side(inverted):
    x = data()
    norm = ActNorm(4)
    b = (Invert(norm) if inverted else norm).init_from_data(x)
    z, log_det = b.inverse(x)
    assert_standard(z, atol=1e-3)
    assert bool(jnp.isfinite(log_det).all())
    held = b.bijection if inverted else b
    np.testing.assert_array_equal(held.log_scale[2:], 0.0)
    b = (Invert(norm) if inverted else norm).init_from_data(x, side="in")
    assert_standard(b.forward(x)[0], atol=1e-3)


def test_act_norm_in_chains_and_repeats():
    def make(key):
        lu_key, perm_key, raw_key = jr.split(key, 3)
        lu = randomise(LU(4, key=lu_key), raw_key, 0.3)
        return Chain([random_permutation(4, key=perm_key), lu, ActNorm(4)])

    x = data()
    for side in ("out", "in"):
        b = Chain([ActNorm(4), repeat(make, 3, key=jr.key(1)), ActNorm(4)])
        b = eqx.filter_jit(lambda b, side=side: b.init_from_data(x, side=side))(b)
        z = b.inverse(x)[0] if side == "out" else b.forward(x)[0]
        assert_standard(z, varying=range(2), atol=5e-2)
        stack = b.parts[1]
        assert isinstance(stack, Repeat)
        part = x
        if side == "out":
            part = b.parts[2].inverse(part)[0]
            for layer in stack.steps()[::-1]:
                part = layer.parts[2].inverse(part)[0]
                np.testing.assert_allclose(part.mean(1), 0.0, atol=1e-2)
                part = layer.parts[0].inverse(layer.parts[1].inverse(part)[0])[0]


def test_act_norm_per_channel():
    x = 5.0 + 3.0 * jr.normal(jr.key(0), (2, 4, 4, 50)) * jnp.asarray([1.0, 10.0]).reshape(
        2, 1, 1, 1
    )
    b = ActNorm((2, 4, 4), per_channel=True).init_from_data(x)
    assert b.shift.shape == (2,)
    z, log_det = b.inverse(x)
    np.testing.assert_allclose(z.mean((1, 2, 3)), 0.0, atol=1e-3)
    np.testing.assert_allclose(z.std((1, 2, 3)), 1.0, atol=1e-3)
    np.testing.assert_allclose(log_det, np.full(50, -16 * float(b.log_scale.sum())), rtol=1e-5)
    jacobian = jax.jacobian(lambda x: b.forward(x)[0].ravel())(x[..., 0]).reshape(32, 32)
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], b.forward(x[..., 0])[1], rtol=1e-5)


def test_act_norm_of_one_event_or_none():
    event = ActNorm(3).init_from_data(jnp.asarray([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(event.log_scale, 0.0)
    np.testing.assert_array_equal(event.shift, [1.0, 2.0, 3.0])
    empty = ActNorm(3).init_from_data(jnp.zeros((3, 0)))
    np.testing.assert_array_equal(empty.shift, 0.0)


def test_the_singular_values_are_those_of_the_parameters():
    with jax.enable_x64(True):
        b = randomise(SVD(4, key=jr.key(0)), jr.key(1))
        values = jnp.sort(positive(b.scale.params[1]))[::-1]
        np.testing.assert_allclose(np.linalg.svd(b.matrix)[1], values, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_cayley_transform_is_a_rotation_at_any_parameters(scale):
    b = randomise(Cayley(5), jr.key(0), scale)
    np.testing.assert_allclose(b.matrix @ b.matrix.T, np.eye(5), atol=2e-6 * (1 + scale))
    np.testing.assert_allclose(np.linalg.det(b.matrix), 1.0, rtol=2e-6 * (1 + scale))
    lower = np.tril(b.raw, -1).astype(np.float64)
    skew, unit = lower - lower.T, np.eye(5)
    np.testing.assert_allclose(
        b.matrix, np.linalg.solve(unit + skew, unit - skew), atol=2e-6 * (1 + scale)
    )


def test_the_matrix_exponential_keeps_digits_under_a_common_scale():
    raw = np.asarray(jr.normal(jr.key(0), (4, 4)) * 0.3) + 20 * np.eye(4, dtype=np.float32)
    b = eqx.tree_at(lambda b: b.raw, MatrixExponential(4), jnp.asarray(raw))
    np.testing.assert_allclose(b.matrix, scipy.linalg.expm(raw.astype(np.float64)), rtol=2e-5)
    x = jr.normal(jr.key(1), (4, 5))
    np.testing.assert_allclose(b.inverse(b.forward(x)[0])[0], x, atol=1e-5)


def test_a_random_start_is_a_rotation_and_a_singular_matrix_has_no_density():
    matrix = Matrix(4, key=jr.key(0))
    np.testing.assert_allclose(matrix.forward(jnp.ones(4))[1], 0, atol=1e-6)
    flat = eqx.tree_at(lambda m: m.matrix, matrix, jnp.ones((4, 4)))
    assert float(flat.forward(jnp.ones(4))[1]) == -np.inf
    assert not bool(jnp.isfinite(flat.inverse(jnp.ones(4))[0]).all())


@pytest.mark.parametrize("axis", [0, -1])
def test_the_cosine_transform_is_that_of_scipy_along_an_axis_of_the_event(axis):
    x = jr.normal(jr.key(0), (3, 5, 7))  # a batch of seven
    y, log_det = DCT((3, 5), axis=axis).forward(x)
    expected = scipy.fft.dct(np.asarray(x), axis=axis % 2, norm="ortho")
    np.testing.assert_allclose(y, expected, atol=1e-6)
    assert log_det.shape == (7,)
    with pytest.raises(ShapeError, match="nothing along axis 2"):
        DCT((3, 5), axis=2)


def test_empty_batches():
    for make in MAKERS.values():
        y, log_det = make(jr.key(0), 3).inverse(jnp.zeros((3, 0)))
        assert (y.shape, log_det.shape) == ((3, 0), (0,))


def test_errors():
    with pytest.raises(InputError, match="between 1 and 3, not 4"):
        LowRank(3, 4, key=jr.key(0))
    with pytest.raises(InputError, match="at least one reflection"):
        Householder(3, 0, key=jr.key(0))
    for make in (lambda: Cayley(0), lambda: SVD(0, key=jr.key(0)), lambda: MatrixExponential(0)):
        with pytest.raises(InputError, match="dim must be at least 1"):
            make()
    with pytest.raises(InputError, match="Triangular: dim must be at least 1"):
        Triangular(0)
    with pytest.raises(ShapeError, match="channel axis"):
        ActNorm((), per_channel=True)
