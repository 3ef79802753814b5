"""Convolutional conditioners: values against scipy, the batch last, both kinds of condition."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import randomise
from scipy.signal import correlate

from laminar._errors import InputError, ShapeError
from laminar.nn.conv import Conv, ConvNet


@pytest.mark.parametrize(
    ("space", "kernel"), [((5,), (3,)), ((5, 4), (3, 1)), ((3, 4, 2), (3, 3, 1))]
)
def test_a_convolution_is_the_cross_correlation_with_zeros_around(space, kernel):
    conv = randomise(Conv(2, 3, kernel, key=jr.key(0)), jr.key(1))
    x = jr.normal(jr.key(2), (2, *space))
    expected = [
        sum(
            correlate(np.asarray(x[i]), np.asarray(conv.weight[o, i]), mode="same")
            for i in range(2)
        )
        + conv.bias[o]
        for o in range(3)
    ]
    np.testing.assert_allclose(conv(x), np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("cond_shape", [None, (3,), (1, 4, 2)])
def test_batch_last_equals_single_events(cond_shape):
    net = randomise(
        ConvNet((2, 4, 2), (3, 1), key=jr.key(0), width=4, depth=2, cond_shape=cond_shape),
        jr.key(1),
        0.3,
    )
    x = jr.normal(jr.key(2), (2, 4, 2, 3, 2))
    c = None if cond_shape is None else jr.normal(jr.key(3), (*cond_shape, 3, 2))
    out = net(x, c, jnp.ones(3))
    assert out.shape == (3, 1, 4, 2, 3, 2)
    one = net(x[..., 1, 0], None if c is None else c[..., 1, 0], jnp.ones(3))
    np.testing.assert_allclose(out[..., 1, 0], one, atol=1e-5)
    if c is not None:
        shared = net(x, c[..., 1, 0], jnp.ones(3))
        np.testing.assert_allclose(shared[..., 1, 0], one, atol=1e-5)
        assert not np.allclose(shared[..., 0, 0], out[..., 0, 0], atol=1e-3)


def test_it_starts_at_zero_and_names_misuse():
    net = ConvNet((1, 4), 2 * (2,), key=jr.key(0), width=4)
    assert not net(jnp.ones((1, 4))).any()
    with pytest.raises(ShapeError, match="takes an input"):
        net(jnp.ones((2, 4)))
    with pytest.raises(InputError, match="odd lengths"):
        Conv(1, 1, (2,), key=jr.key(0))
    with pytest.raises(InputError, match="width"):
        ConvNet((1, 4), (1,), key=jr.key(0), width=0)
    with pytest.raises(ShapeError, match="positions"):
        ConvNet((1, 4), (1,), key=jr.key(0), cond_shape=(1, 3))
    with pytest.raises(ShapeError, match="takes a condition"):
        ConvNet((1, 4), (1,), key=jr.key(0), width=4, cond_shape=(2,))(jnp.ones((1, 4)))
