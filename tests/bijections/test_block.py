"""Block autoregression: structure, identity at the start, training, and misuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import randomise

from laminar._errors import InputError, ShapeError
from laminar._params import partition
from laminar.bijections.block import BlockAutoregressive, _bend


def test_it_starts_as_the_identity():
    layer = BlockAutoregressive(3, units=5, depth=3)
    x = 3 * jr.normal(jr.key(0), (3, 6))
    y, log_det = layer.forward(x)
    np.testing.assert_allclose(y, x, atol=1e-5)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)


def test_the_jacobian_is_triangular_in_the_order_and_positive_on_its_diagonal():
    order = jnp.asarray([2, 0, 3, 1])
    layer = randomise(BlockAutoregressive(4, units=3, order=order), jr.key(0))
    jacobian = np.asarray(eqx.filter_jit(jax.jacfwd(lambda x: layer.forward(x)[0]))(jnp.ones(4)))
    place = np.argsort(order)
    in_order = jacobian[np.ix_(place, place)]
    assert (np.triu(in_order, 1) == 0).all()
    assert (np.diag(in_order) > 0).all()
    assert (in_order[np.tril_indices(4)] != 0).all()


def test_a_layer_is_the_network_of_the_paper():
    """One hidden layer by the book: block triangular weights, positive diagonal blocks."""
    layer = randomise(BlockAutoregressive(2, units=2, depth=1, cond_dim=1), jr.key(0))
    condition, x = jnp.asarray([0.7]), np.asarray([0.3, -1.2])

    def softplus(raw):
        return np.log1p((np.e - 1) * np.exp(np.asarray(raw, float)))

    def weights(raw, out, into):
        raw = np.asarray(raw, float)
        dense = np.zeros_like(raw)
        for d in range(2):
            rows, own = slice(out * d, out * (d + 1)), slice(into * d, into * (d + 1))
            dense[rows, : into * d] = raw[rows, : into * d]
            dense[rows, own] = softplus(into * raw[rows, own]) / into
        return dense

    u = weights(layer.weights[0], 2, 1) @ x + np.asarray(layer.biases[0]) + [-2, 2, -2, 2]
    u = u + np.asarray(layer.cond @ condition)
    h = np.tanh(u) + softplus(layer.slopes[0]) * (u - np.tanh(u))
    y = weights(layer.weights[1], 1, 2) @ h + np.asarray(layer.biases[1])
    np.testing.assert_allclose(layer.forward(jnp.asarray(x, float), condition)[0], y, rtol=1e-5)


def test_a_start_that_bends():
    """With a key, layers differ, bend, and move about as far as the identity does."""
    x = jr.normal(jr.key(1), (3, 500))
    one, other = (BlockAutoregressive(3, units=64, key=jr.key(k)) for k in (0, 2))
    y, log_det = one.forward(x)
    assert not np.allclose(y, other.forward(x)[0])
    assert log_det.std() > 0.1
    assert 0.1 < y.std() < 10


def test_far_points_come_back():
    layer = randomise(BlockAutoregressive(2, units=3, depth=1), jr.key(0))
    x = jnp.asarray([[1e4, -1e6], [-1e4, 1e6]])
    y, log_det = layer.forward(x)
    back, log_det_back = eqx.filter_jit(lambda f, y: f.inverse(y))(layer, y)
    np.testing.assert_allclose(back, x, rtol=1e-4)
    np.testing.assert_allclose(log_det_back, -log_det, rtol=1e-4, atol=1e-4)


def test_out_of_reach_is_a_clamped_point_and_no_density():
    layer = randomise(BlockAutoregressive(2, units=3, depth=1), jr.key(0))
    y = jnp.asarray([[1e36, jnp.inf, jnp.nan, 1.0], [1.0, 1.0, 1.0, -jnp.inf]])
    x, log_det = eqx.filter_jit(lambda f, y: f.inverse(y))(layer, y)
    assert jnp.isfinite(x[:, [0, 1, 3]]).all()
    np.testing.assert_array_equal(log_det, [-jnp.inf, -jnp.inf, jnp.nan, -jnp.inf])


def test_the_log_slope_of_flat_units_keeps_its_digits():
    u = np.linspace(-12, 12, 49)
    for p in (1.0, 1e-3, 1e-7):
        found = _bend(jnp.asarray(u, jnp.float32), jnp.full(u.shape, p, jnp.float32))[1]
        np.testing.assert_allclose(found, np.log((1 - p) / np.cosh(u) ** 2 + p), atol=3e-6)


def test_products_keep_all_digits_in_both_directions():
    layer, x = BlockAutoregressive(2, units=2, depth=1, cond_dim=1), jnp.ones(2)
    for method in (layer.forward, layer.inverse):
        products = str(jax.make_jaxpr(method)(x, jnp.ones(1))).split("dot_general[")[1:]
        assert products
        assert all("HIGHEST" in product[:300] for product in products)


def test_training_reaches_every_parameter_that_counts():
    layer = BlockAutoregressive(3, units=4, depth=2, cond_dim=2)
    x, condition = jr.normal(jr.key(0), (3, 64)), jr.normal(jr.key(1), (2, 64))
    target = x + jnp.stack([condition[0], x[0] ** 2, jnp.sin(3 * x[1])])
    trained, rest = partition(layer)

    def loss(trained):
        y, log_det = eqx.combine(trained, rest).forward(x, condition)
        return jnp.mean((y - target) ** 2) - 0.1 * log_det.mean()

    @jax.jit
    def fit(trained):
        def step(trained, _):
            value, gradient = jax.value_and_grad(loss)(trained)
            return jax.tree.map(lambda p, g: p - 0.1 * g, trained, gradient), value

        return jax.lax.scan(step, trained, None, length=60)

    new, values = fit(trained)
    assert values[-1] < 0.8 * values[0]
    for leaf in (*new.biases, *new.slopes, new.cond):
        assert (np.asarray(leaf) != 0).all()
    for weight in new.weights:
        out, into = (size // 3 for size in weight.shape)
        allowed = np.kron(np.tri(3), np.ones((out, into))) > 0
        np.testing.assert_array_equal(np.asarray(weight) != 0, allowed)


def test_misuse_is_named():
    with pytest.raises(InputError, match="units must be at least 1"):
        BlockAutoregressive(2, units=0)
    with pytest.raises(InputError, match="cond_dim"):
        BlockAutoregressive(2, cond_dim=-1)
    with pytest.raises(InputError, match="each position"):
        BlockAutoregressive(2, order=jnp.asarray([0, 0]))
    with pytest.raises(ShapeError, match=r"order of shape \(3,\)"):
        BlockAutoregressive(2, order=jnp.arange(3))
    with pytest.raises(ShapeError, match="needs a condition"):
        BlockAutoregressive(2, cond_dim=1).forward(jnp.zeros(2))
