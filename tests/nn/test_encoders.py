"""Encoders of conditions: what order and padding must not change, and posteriors that are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar import io
from laminar._errors import InputError
from laminar._params import partition
from laminar.bijections.elementwise import Shift
from laminar.distributions import ConditionalNormal
from laminar.flow import Flow
from laminar.nn.encoders import ImageEncoder, SequenceEncoder, SetEncoder
from laminar.nn.mlp import MLP
from laminar.train.fit import fit
from laminar.zoo import realnvp

MAKE = {
    "mean_max": lambda **o: SetEncoder(3, 4, size=5, width=8, key=jr.key(0), **o),
    "attention": lambda **o: SetEncoder(
        3, 4, size=5, width=8, pool="attention", key=jr.key(0), **o
    ),
}


@pytest.mark.parametrize("pool", MAKE)
def test_the_order_of_a_set_is_nothing(pool):
    encoder = MAKE[pool]()
    x = jr.normal(jr.key(1), (5, 3, 2))
    code = encoder(x)
    assert code.shape == (4, 2)
    np.testing.assert_allclose(encoder(x[jnp.array([4, 2, 0, 1, 3])]), code, atol=1e-5)
    np.testing.assert_allclose(encoder(x[..., 0]), code[:, 0], atol=1e-5)
    assert float(jnp.abs(encoder(x.at[0].add(1.0)) - code).max()) > 1e-3


@pytest.mark.parametrize("pool", MAKE)
def test_padding_of_a_set_is_nothing(pool):
    encoder = MAKE[pool](masked=True)
    x = jr.normal(jr.key(1), (5, 3, 2))
    mask = jnp.array([[1, 1], [1, 0], [0, 0], [1, 0], [0, 0]], bool)  # three elements, and one
    holes = jnp.where(mask[:, None], x, jnp.nan)
    code = encoder({"values": holes, "mask": mask})
    assert bool(jnp.isfinite(code).all())
    moved = jnp.array([3, 4, 1, 0, 2])
    again = encoder({"values": x[moved], "mask": mask[moved].astype(jnp.float32)})
    np.testing.assert_allclose(again, code, atol=1e-5)
    alone = SetEncoder(3, 4, size=1, width=8, pool=pool, key=jr.key(0))  # the same weights
    np.testing.assert_allclose(alone(x[:1])[:, 1], code[:, 1], atol=1e-5)

    for chosen in (mask[:, 0], jnp.zeros((5,), bool)):
        grads = _gradients(encoder, holes[..., 0], chosen)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree_util.tree_leaves(grads))


def _gradients(encoder, values, mask):
    trained, rest = partition(encoder)

    def total(trained, values):
        return (eqx.combine(trained, rest)({"values": values, "mask": mask}) ** 2).sum()

    return jax.grad(total, argnums=(0, 1))(trained, values)


def test_a_sequence_has_an_order_and_an_end():
    encoder = SequenceEncoder(2, 4, length=6, width=8, key=jr.key(0))
    x = jr.normal(jr.key(1), (6, 2, 3))
    code = encoder(x)
    assert code.shape == (4, 3)
    np.testing.assert_allclose(encoder(x[..., 1]), code[:, 1], atol=1e-5)
    assert float(jnp.abs(encoder(x[::-1]) - code).max()) > 1e-3

    padded = SequenceEncoder(2, 4, length=6, width=8, padded=True, key=jr.key(0))
    length = jnp.array([6, 4, 0])
    live = jnp.arange(6)[:, None] < length[None]
    holes = jnp.where(live[:, None], x, jnp.nan)
    ends = padded({"values": holes, "length": length})
    np.testing.assert_allclose(ends[:, 0], code[:, 0], atol=1e-5)
    np.testing.assert_allclose(ends[:, 1], encoder(x[:4, :, 1]), atol=1e-5)
    assert bool(jnp.isfinite(ends).all())
    one = padded({"values": holes[..., 1], "length": length[1]})
    np.testing.assert_allclose(one, ends[:, 1], atol=1e-5)


def test_the_recurrence_is_that_of_the_paper():
    encoder = SequenceEncoder(2, 3, length=4, width=5, key=jr.key(0))
    x = jr.normal(jr.key(1), (4, 2))
    h, states = jnp.zeros(5), []
    for t in range(4):
        a, b = encoder.inward(x[t]), encoder.across(h)
        reset, update = (jax.nn.sigmoid(a[i : i + 5] + b[i : i + 5]) for i in (0, 5))
        h = update * h + (1 - update) * jnp.tanh(a[10:] + reset * b[10:])
        states.append(h)
    expected = encoder.out(jnp.concatenate([h, jnp.stack(states).mean(0)]))
    np.testing.assert_allclose(encoder(x), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 6, 2), (9, 1)])
def test_images_and_signals(shape):
    encoder = ImageEncoder(shape, 4, channels=(3, 5), key=jr.key(0))
    x = jr.normal(jr.key(1), (*shape, 2, 3))
    code = encoder(x)
    assert code.shape == (4, 2, 3)
    np.testing.assert_allclose(encoder(x[..., 1, 2]), code[:, 1, 2], atol=1e-5)


ENCODERS = {
    "set": SetEncoder(2, 3, size=4, masked=True, width=8, key=jr.key(0)),
    "attention": SetEncoder(2, 3, size=4, width=8, pool="attention", key=jr.key(0)),
    "sequence": SequenceEncoder(2, 3, length=4, padded=True, width=8, key=jr.key(0)),
    "image": ImageEncoder((4, 4, 1), 3, channels=(4,), key=jr.key(0)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_flow_takes_it_and_a_file_keeps_it(name, tmp_path):
    encoder = ENCODERS[name]
    inner = realnvp(2, layers=1, width=8, depth=1, cond_dim=3, key=jr.key(1))
    flow = Flow(inner.base, inner.bijection, embed=encoder)
    shapes = encoder.in_shape
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    condition = jax.tree_util.tree_map(lambda s: jnp.ones((5, *s)), shapes, is_leaf=is_shape)
    x = jnp.zeros((5, 2))
    log_p = flow.log_prob(x, condition)
    assert log_p.shape == (5,)
    assert flow.sample(jr.key(2), (3,), condition).shape == (3, 5, 2)
    io.save(tmp_path / "flow.lam", flow)
    np.testing.assert_array_equal(io.load(tmp_path / "flow.lam").log_prob(x, condition), log_p)


@pytest.mark.slow
def test_a_posterior_given_a_set_is_found():
    """μ ~ N(0, 1) and x_i ~ N(μ, 0.5²): the posterior is normal, and narrows with their number."""
    size, rows, noise = 8, 8192, 0.5
    count_key, mean_key, noise_key = jr.split(jr.key(0), 3)
    count = jr.randint(count_key, (rows,), 1, size + 1)
    mu = jr.normal(mean_key, (rows, 1))
    values = mu[..., None] + noise * jr.normal(noise_key, (rows, size, 1))
    mask = jnp.arange(size)[None] < count[:, None]
    encoder = SetEncoder(1, 8, size=size, masked=True, width=16, key=jr.key(1))
    head = ConditionalNormal(MLP(8, (2, 1), width=16, depth=1, key=jr.key(2)), 1, 8)
    flow = Flow(head, Shift(shape=(1,)), embed=encoder)
    condition = {"values": values, "mask": mask}
    flow, _ = fit(jr.key(3), flow, mu, condition=condition, steps=1500, progress=False)
    for n in (1, 3, 8):
        seen = {"values": values[:50], "mask": jnp.arange(size) < n}
        variance = 1 / (1 + n / noise**2)
        mean = variance * values[:50, :n, 0].sum(1) / noise**2
        drawn = np.asarray(flow.sample(jr.key(4), (2000,), seen))[..., 0]
        assert np.abs(drawn.mean(0) - np.asarray(mean)).max() < 0.15
        assert np.abs(drawn.mean(0) - np.asarray(mean)).mean() < 0.05
        assert abs(drawn.std(0).mean() / np.sqrt(variance) - 1) < 0.12


def test_what_has_no_meaning_is_refused():
    key = jr.key(0)
    for make in (
        lambda: SetEncoder(0, 2, size=3, key=key),
        lambda: SetEncoder(1, 2, size=3, pool="sum", key=key),
        lambda: SetEncoder(1, 2, size=3, pool="attention", width=6, heads=4, key=key),
        lambda: SequenceEncoder(1, 2, length=0, key=key),
        lambda: ImageEncoder((3,), 2, key=key),
        lambda: ImageEncoder((3, 3, 1), 2, channels=(), key=key),
    ):
        with pytest.raises(InputError):
            make()
