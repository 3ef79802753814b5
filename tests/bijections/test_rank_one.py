"""Planar, radial and Sylvester maps: exact at hostile parameters, identity at the start, smooth."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import randomise
from jax.test_util import check_grads

from laminar._errors import InputError, ShapeError
from laminar._params import partition
from laminar.bijections.base import call
from laminar.bijections.compose import repeat
from laminar.bijections.rank_one import Planar, Radial, Sylvester, tanh_root

KINDS = {
    "planar": lambda key: Planar(4, key=key),
    "radial": lambda key: Radial(4, key=key),
    "orthogonal": lambda key: Sylvester(4, 2, key=key),
    "householder": lambda key: Sylvester(4, kind="householder", key=key),
    "triangular": lambda key: Sylvester(4, kind="triangular", key=key),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_new_map_is_the_identity_and_can_leave_it(name):
    bijection = KINDS[name](jr.key(0))
    x = jr.normal(jr.key(1), (4, 9))
    for direction in ("forward", "inverse"):
        y, log_det = call(bijection, direction, x)
        np.testing.assert_allclose(y, x, atol=1e-6)
        np.testing.assert_allclose(log_det, 0, atol=1e-6)
    trained, rest = partition(bijection)

    def loss(trained):
        y, log_det = call(eqx.combine(trained, rest), "forward", x)
        return jnp.sum(y[0] * x[1]) + jnp.sum(log_det * x[2])

    norm = sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(jax.grad(loss)(trained)))
    assert float(norm) > 0.1


def test_the_root_is_found_wherever_it_lies():
    with jax.enable_x64(True):
        slope = np.logspace(-10, 6, 129)[:, None]
        r = np.concatenate([[0.0], np.logspace(-10, 6, 129)])[None]
        r = np.concatenate([-r, r], 1)
        s = np.asarray(tanh_root(jnp.asarray(slope), jnp.asarray(r)))
        back = s + (slope - 1) * np.tanh(s)
        # What rounding in the largest of the terms allows.
        room = np.abs(s) + np.abs((slope - 1) * np.tanh(s))
        assert float(np.max(np.abs(back - r) / (np.abs(r) + room + 1e-300))) < 1e-14
        single = np.asarray(tanh_root(*(jnp.asarray(v, jnp.float32) for v in (slope, r))))
        usual = (slope > 1e-3) & (slope < 1e3)
        room = np.where(usual, 1e-3 * np.abs(s) + 1e-6, np.inf)
        assert bool((np.abs(single - s) < room).all())


def test_the_root_has_derivatives_of_any_order_and_keeps_what_is_not_finite():
    with jax.enable_x64(True):
        points = jnp.array([0.3, 1.0, 4.0]), jnp.array([-0.7, 2.0, 0.1])
        check_grads(tanh_root, points, order=3, modes=("fwd", "rev"), eps=1e-4)
    odd = tanh_root(jnp.array([2.0, 0.5, jnp.nan, 0.5]), jnp.array([jnp.inf, -jnp.inf, 1, jnp.nan]))
    np.testing.assert_array_equal(odd, [jnp.inf, -jnp.inf, jnp.nan, jnp.nan])


def _planar(u, w, b=0.3):
    like = Planar(len(u), key=jr.key(0))
    values = [jnp.asarray(v, like.u.dtype) for v in (u, w, b)]
    return eqx.tree_at(lambda p: (p.u, p.w, p.b), like, values)


def test_a_planar_map_is_that_of_the_paper():
    with jax.enable_x64(True):
        u, w, x = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.3, -0.2]), np.array([0.1, 0.2, -0.5])
        y, log_det = _planar(u, w).forward(jnp.asarray(x))
        hat, slope = _planar(u, w)._bend()
        hat = np.asarray(hat)
        np.testing.assert_allclose(slope, 1 + w @ hat, rtol=1e-14)
        # û differs from u along w alone.
        np.testing.assert_allclose(np.cross(hat - u, w), 0, atol=1e-14)
        t = np.tanh(w @ x + 0.3)
        np.testing.assert_allclose(y, x + hat * t, rtol=1e-14)
        np.testing.assert_allclose(log_det, np.log(1 + (1 - t**2) * (w @ hat)), rtol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-30, 1e-10, 1.0, 1e4, 1e10])
def test_a_planar_map_stays_invertible_at_any_parameters(size):
    w = size * np.array([1.0, -0.5])
    for u in ([-300.0, 200.0], [0.0, 0.0], [5.0, 1.0], [-1e4, 0.0]):
        planar = _planar(u, w)
        trained, rest = partition(planar)

        def total(trained, x, rest=rest):
            y, log_det = eqx.combine(trained, rest).forward(x)
            return y.sum() + log_det

        hat, slope = planar._bend()
        grads = jax.grad(total, argnums=(0, 1))(trained, jnp.array([0.2, 0.1]))
        finite = [bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((hat, slope, grads))]
        if size * max(map(abs, u)) < 1e10:  # beyond, squares of the products leave float32
            assert all(finite)
            assert float(slope) > 0


def test_the_bend_of_a_planar_map_is_continuous_where_w_vanishes():
    u = [-3.0, 2.0]
    for direction in ([1.0, 0.0], [-0.6, 0.8]):
        hat, slope = _planar(u, 1e-5 * np.array(direction))._bend()
        np.testing.assert_allclose(hat, u, atol=1e-3)
        np.testing.assert_allclose(slope, 1, atol=1e-4)


@pytest.mark.parametrize("raw", [-50.0, -2.0, 0.0, 3.0, 100.0])
def test_a_radial_map_inverts_near_its_centre_and_far_away(raw):
    radial = eqx.tree_at(lambda r: r.raw_slope, Radial(3, key=jr.key(0), alpha=0.7), jnp.array(raw))
    direction = jnp.array([0.6, 0.0, -0.8])
    distance = jnp.array([0.0, 1e-6, 1e-2, 1.0, 1e3, 1e12, 1e25])
    x = radial.centre[:, None] + direction[:, None] * distance[None]
    y, log_det = radial.forward(x)
    back, log_det_back = radial.inverse(y)
    np.testing.assert_allclose(back, x, rtol=1e-4, atol=3e-5)
    np.testing.assert_allclose(-log_det_back, log_det, rtol=1e-4, atol=2e-3)
    with jax.enable_x64(True):
        radial = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), radial)
        x = radial.centre + jnp.array([0.1, 0.2, -0.2])
        jacobian = jax.jacfwd(lambda x: radial.forward(x)[0])(x)
        np.testing.assert_allclose(
            radial.forward(x)[1], np.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-12
        )


@pytest.mark.slow
def test_gradients_through_the_inverses_are_those_of_the_implicit_function():
    with jax.enable_x64(True):
        y = 0.8 * jr.normal(jr.key(5), (4,), jnp.float64)
        for i, make in enumerate(KINDS.values()):
            bijection = randomise(make(jr.key(i)), jr.key(10 + i), 0.8)
            trained, rest = partition(bijection)
            trained = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), trained)

            @jax.jit
            def out(trained, y, rest=rest):
                x, log_det = eqx.combine(trained, rest).inverse(y)
                return jnp.sin(x).sum() + log_det

            check_grads(out, (trained, y), order=1, modes=("fwd", "rev"), eps=1e-5, rtol=1e-5)


def test_sylvester_with_one_column_is_planar():
    with jax.enable_x64(True):
        sylvester = Sylvester(3, 1, key=jr.key(0))
        sylvester = eqx.tree_at(
            lambda s: (s.matrix, s.scale, s.b),
            sylvester,
            (jnp.array([[0.7]]), jnp.array([-1.3]), jnp.array([0.2])),
        )
        q = sylvester._lift(jnp.ones((1,)))
        planar = _planar(0.7 * q, -1.3 * q, 0.2)
        x = jr.normal(jr.key(1), (3, 5), jnp.float64)
        for a, b in zip(sylvester.forward(x), planar.forward(x), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_columns_are_orthonormal_at_hostile_parameters():
    sylvester = Sylvester(5, 3, key=jr.key(0))
    vectors = jnp.stack([jnp.zeros(5), 1e15 * jnp.arange(5.0), 1e-15 * jnp.ones(5)], 1)
    sylvester = eqx.tree_at(lambda s: s.vectors, sylvester, vectors)
    q = sylvester._lift(jnp.eye(3))
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-6)


def test_stacked_triangular_layers_may_have_orders_of_their_own():
    orders = jnp.stack([jnp.arange(3), jnp.arange(3)[::-1]])

    def make(at):
        order, key = at
        layer = Sylvester(3, kind="triangular", order=order, key=key)
        return randomise(layer, key, 0.5)

    stack = repeat(make, 2, over=(orders, jr.split(jr.key(0), 2)))
    x = jr.normal(jr.key(1), (3, 4))
    by_hand = x
    for layer in stack.steps():
        by_hand, _ = layer.forward(by_hand)
    np.testing.assert_allclose(stack.forward(x)[0], by_hand, rtol=1e-6)


def test_eighty_layers_invert():
    stack = repeat(lambda key: randomise(Planar(6, key=key), key, 0.4), 80, key=jr.key(0))
    x = jr.normal(jr.key(1), (6, 50))
    y, log_det = eqx.filter_jit(stack.forward)(x)
    back, log_det_back = eqx.filter_jit(stack.inverse)(y)
    np.testing.assert_allclose(back, x, atol=5e-3)
    np.testing.assert_allclose(log_det, -log_det_back, atol=2e-2)


def test_misuse_is_named():
    key = jr.key(0)
    for build, message in (
        (lambda: Planar(0, key=key), "Planar: dim must be at least 1"),
        (lambda: Radial(0, key=key), "Radial: dim must be at least 1"),
        (lambda: Radial(2, key=key, alpha=-1.0), "alpha must be positive"),
        (lambda: Sylvester(3, key=key, kind="qr"), "kind must be"),  # pyright: ignore
        (lambda: Sylvester(3, 4, key=key), "from 1 to 3 columns"),
        (lambda: Sylvester(3, 2, kind="triangular", key=key), "has 3 columns, not 2"),
        (lambda: Sylvester(3, reflections=2, key=key), "reflections belong to"),
        (lambda: Sylvester(3, order=jnp.arange(3), key=key), "order belongs to"),
    ):
        with pytest.raises(InputError, match=message):
            build()
    with pytest.raises(ShapeError, match="order of shape"):
        Sylvester(3, kind="triangular", order=jnp.arange(2), key=key)
