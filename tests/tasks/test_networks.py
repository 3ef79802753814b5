"""The networks of the tasks: scale at the start, and shapes with the batch last."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar.nn.mlp import Dense
from laminar.tasks.networks import Decoder, Gentle, Maxout


@pytest.mark.parametrize("window", [1, 2, 4])
def test_units_start_at_unit_scale(window):
    net = Maxout(50, width=200, depth=3, window=window, key=jr.key(0))
    h = net(jr.normal(jr.key(1), (50, 2000)))
    assert h.shape == (200, 2000)
    # A ReLU halves the square of the first layer, which has no gain; then the scale is kept.
    assert 0.4 < float((h**2).mean()) < 1.6


def test_maxout_is_the_largest_of_its_maps():
    net = Maxout(3, width=2, depth=1, window=3, key=jr.key(0))
    x = jr.normal(jr.key(1), (3, 5))
    maps = jnp.einsum("kij,jn->kin", net.weights[0], x)
    np.testing.assert_allclose(net(x), maps.max(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net(x[:, 0]), maps.max(0)[:, 0], rtol=1e-5, atol=1e-6)


def test_a_gentle_layer_divides_by_the_root_of_its_inputs():
    layer = Dense(16, 3, key=jr.key(0))
    h = jr.normal(jr.key(1), (16, 2, 5))
    np.testing.assert_allclose(Gentle(layer)(h), layer(h) / 4, rtol=1e-6)


def test_a_decoder_takes_any_batch():
    trunk = Maxout(2, width=4, depth=1, window=2, key=jr.key(0))
    net = Decoder(trunk, Dense(4, 7, key=jr.key(1)))
    assert net(jnp.zeros((2,))).shape == (7,)
    assert net(jnp.zeros((2, 3, 5))).shape == (7, 3, 5)
