"""The conditioner: values against plain numpy, the batch last, conditions, initialisation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar._errors import InputError, ShapeError
from laminar.nn.mlp import (
    MLP,
    Concatenated,
    Dense,
    activation_gain,
    apply_network,
    matmul,
    resolve_activation,
    time_features,
)


def vmapped(net, x, condition=None):
    """The events one by one, stacked last."""
    n = x.shape[1]
    cs = [None if condition is None else condition[:, i] for i in range(n)]
    return np.stack([np.asarray(net(x[:, i], cs[i])) for i in range(n)], -1)


@pytest.mark.parametrize(
    ("cond_dim", "film", "depth"), [(0, False, 2), (2, False, 1), (2, True, 2), (2, False, 0)]
)
def test_batch_last_equals_single_events(cond_dim, film, depth):
    net = MLP(
        3, (4, 5), key=jr.key(0), width=8, depth=depth, cond_dim=cond_dim, film=film,
        zero_head=False, activation="gelu",
    )  # fmt: skip
    x = jr.normal(jr.key(1), (3, 6))
    c = jr.normal(jr.key(2), (cond_dim, 6)) if cond_dim else None
    out = net(x, c)
    assert out.shape == (4, 5, 6)
    np.testing.assert_allclose(out, vmapped(net, x, c), rtol=2e-5, atol=2e-6)
    two = net(x.reshape(3, 2, 3), None if c is None else c.reshape(cond_dim, 2, 3))
    np.testing.assert_allclose(two.reshape(4, 5, 6), out, rtol=2e-5, atol=2e-6)
    if c is not None:
        shared = net(x, c[:, 0])
        repeated = net(x, jnp.repeat(c[:, :1], 6, 1))
        np.testing.assert_allclose(shared, repeated, rtol=2e-5, atol=2e-6)
        assert np.abs(shared - out)[..., 1:].max() > 1e-3


def test_values_against_numpy():
    net = MLP(3, 2, key=jr.key(0), width=5, depth=1, cond_dim=2, zero_head=False)
    x, c = np.float32([0.3, -1.2, 0.5]), np.float32([1.0, -0.4])

    def dense(layer, v):
        return np.asarray(layer.weight) @ v + (0.0 if layer.bias is None else layer.bias)

    relu = lambda v: np.maximum(v, 0)  # noqa: E731
    h = dense(net.first, x) + dense(net.condition_first, c)
    h = h + dense(net.blocks[0].outer, relu(dense(net.blocks[0].inner, relu(h))))
    expected = dense(net.head, relu(h))
    np.testing.assert_allclose(net(jnp.asarray(x), jnp.asarray(c)), expected, rtol=1e-5)


def test_head_starts_at_zero_and_learns():
    net = MLP(3, (2, 3), key=jr.key(0), width=8, cond_dim=1)
    x, c = jr.normal(jr.key(1), (3, 7)), jr.normal(jr.key(2), (1, 7))
    np.testing.assert_array_equal(net(x, c), 0.0)
    grads = eqx.filter_grad(lambda net: jnp.sum(jnp.cos(net(x, c) + 1.0)))(net)
    assert float(jnp.abs(grads.head.weight).max()) > 0


@pytest.mark.parametrize("film", [False, True])
def test_without_input_the_condition_still_reaches_every_unit(film):
    net = MLP(0, 3, key=jr.key(0), width=16, cond_dim=2, film=film, zero_head=False)
    out = net(jnp.zeros((0, 5)), jr.normal(jr.key(1), (2, 5)))
    assert out.shape == (3, 5)
    assert float(jnp.std(out, axis=1).min()) > 0.05


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "tanh", "softplus"])
@pytest.mark.parametrize("depth", [1, 8])
def test_outputs_are_of_order_one_at_the_start(name, depth):
    net = MLP(20, 50, key=jr.key(3), width=128, depth=depth, activation=name, zero_head=False)
    out = net(jr.normal(jr.key(1), (20, 64)))
    assert 0.4 < float(jnp.sqrt(jnp.mean(out**2))) < 4.0


def test_gains():
    assert activation_gain(jax.nn.relu) == pytest.approx(2**0.5, rel=1e-3)
    assert activation_gain(jax.nn.tanh) == pytest.approx(1.5925, rel=1e-3)


def test_builds_under_vmap_and_jit():
    def make(key):
        return MLP(3, 2, key=key, width=4, cond_dim=2, film=True, zero_head=False)

    stacked = eqx.filter_jit(eqx.filter_vmap(make))(jr.split(jr.key(0), 3))
    assert stacked.head.weight.shape == (3, 2, 4)
    assert (stacked.in_dim, stacked.cond_dim) == (3, 2)


def test_float64():
    with jax.enable_x64(True):
        net = MLP(3, 2, key=jr.key(0), width=4, cond_dim=2)
        out = net(jnp.ones((3, 2)), jnp.ones(2))
        assert out.dtype == net.head.weight.dtype == jnp.float64


def test_apply_network_takes_any_callable():
    ours = MLP(3, 4, key=jr.key(0), width=8, cond_dim=2, zero_head=False)
    x, c = jr.normal(jr.key(1), (3, 2, 5)), jr.normal(jr.key(2), (2, 2, 5))
    single = lambda x, c: ours(x, c)  # noqa: E731
    assert not hasattr(single, "batch_last")
    for condition in (c, c[:, 0, 0]):
        a, b = apply_network(ours, x, condition), apply_network(single, x, condition)
        assert a.shape == (4, 2, 5)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)

    theirs = eqx.nn.MLP(3, 4, 8, 1, key=jr.key(3))
    assert apply_network(theirs, x).shape == (4, 2, 5)
    joined = Concatenated(eqx.nn.MLP(5, 4, 8, 1, key=jr.key(4)))
    a = apply_network(joined, x, c[:, 0, 0])
    b = apply_network(joined, x, jnp.broadcast_to(c[:, :1, :1], c.shape))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    batched = Concatenated(Dense(5, 4, key=jr.key(5)))
    assert apply_network(batched, x, c[:, 0, 0]).shape == (4, 2, 5)


def test_time_features():
    t = jnp.linspace(0.0, 1.0, 11)
    features = time_features(t, 4, highest=8.0)
    assert features.shape == (8, 11)
    np.testing.assert_allclose(features[0], np.cos(np.pi * np.asarray(t)), atol=1e-6)
    np.testing.assert_allclose(features[7], np.sin(8 * np.pi * np.asarray(t)), atol=1e-5)
    assert time_features(jnp.asarray(0.5), 3).shape == (6,)
    assert np.all(np.diff(features[0]) < 0)
    with pytest.raises(InputError, match="at least one frequency"):
        time_features(t, 0)


def test_errors_name_both_shapes():
    net = MLP(3, 2, key=jr.key(0), width=4, cond_dim=2)
    with pytest.raises(ShapeError, match=r"\(3, \*batch\) and got \(4,\)"):
        net(jnp.ones(4), jnp.ones(2))
    with pytest.raises(ShapeError, match=r"condition \(2, \*batch\) and got none"):
        net(jnp.ones(3))
    with pytest.raises(ShapeError, match=r"condition \(2, \*batch\) and got \(3,\)"):
        net(jnp.ones(3), jnp.ones(3))
    with pytest.raises(InputError, match="no activation 'rleu'"):
        MLP(3, 2, key=jr.key(0), activation="rleu")
    with pytest.raises(InputError, match="width must be at least 1"):
        MLP(3, 2, key=jr.key(0), width=0)
    with pytest.raises(InputError, match="needs a condition"):
        MLP(3, 2, key=jr.key(0), film=True)
    assert resolve_activation("silu") is jax.nn.silu


def test_the_gradient_of_a_product_copies_no_cotangent():
    weight, h, cotangent = jnp.ones((5, 7, 3)), jnp.ones((3, 11)), jnp.ones((5, 7, 11))

    def pull(weight, h, cotangent):
        # A source that would be computed twice if one product wanted it in another order.
        return jax.vjp(matmul, weight, h)[1](jnp.sqrt(cotangent))

    text = jax.jit(pull).lower(weight, h, cotangent).compile().as_text()
    assert "f32[35,11]" in text
    assert "f32[11,35]" not in text
