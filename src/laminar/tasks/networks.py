"""Networks that the tasks share; like all of laminar's they keep the batch last."""

import functools
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._params import expand
from laminar._typing import Array, PRNGKeyArray
from laminar.nn.mlp import Dense, matmul


class Maxout(eqx.Module):
    """Deterministic hidden layers h_l = a(W_l h_{l−1} + b_l), batch last.

    a is maxout, the largest of `window` affine maps for each unit (Goodfellow et al. 2013); with a
    window of one it is ReLU.

    Args:
        in_dim: Length of the input.
        key: Draws the weights, normal with the variance that keeps units at unit scale.
        width: Units in a layer.
        depth: Number of layers.
        window: Affine maps for each unit.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    in_dim: int = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self, in_dim: int, *, key: PRNGKeyArray, width: int = 400, depth: int = 2, window: int = 4
    ):
        self.in_dim, gain = in_dim, _maxout_gain(window)
        weights, sizes = [], [in_dim] + [width] * depth
        for layer, layer_key in enumerate(jr.split(key, depth)):
            scale = (gain if layer else 1.0) / math.sqrt(sizes[layer])
            weights.append(scale * jr.normal(layer_key, (window, width, sizes[layer])))
        self.weights = tuple(weights)
        self.biases = tuple(jnp.zeros((window, width)) for _ in weights)

    def __call__(self, x: Array) -> Array:
        """``(in_dim, *batch) -> (width, *batch)``."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            maps = matmul(weight, x)
            maps = maps + expand(bias, maps.ndim)
            x = functools.reduce(jnp.maximum, [maps[i] for i in range(len(maps))])
            x = jax.nn.relu(x) if len(maps) == 1 else x
        return x


@functools.lru_cache(maxsize=64)
def _maxout_gain(window: int) -> float:
    """The factor E[max(z_1, …, z_k)²]^(−1/2) of standard normals, and √2 for ReLU."""
    if window == 1:
        return math.sqrt(2)
    z = np.linspace(-9.0, 9.0, 4097)
    density = np.exp(-0.5 * z**2)
    below = np.cumsum(density) / density.sum()
    weight = window * below ** (window - 1) * density
    return float(1 / np.sqrt((weight * z**2).sum() / weight.sum()))


class Gentle(eqx.Module):
    """An affine layer divided by the square root of its number of inputs, W h / √n.

    Adam moves every weight by about the learning rate, and so an output by up to n times as much.
    The division makes that √n, without which the numbers of many flow layers at once leap.
    """

    layer: Dense
    batch_last: ClassVar[bool] = True

    def __call__(self, h: Array) -> Array:
        """``(in_dim, *batch) -> (out_dim, *batch)``."""
        return self.layer(h) / math.sqrt(self.layer.weight.shape[1])


class Decoder(eqx.Module):
    """A trunk and an affine head: from a latent vector to the parameters of p(x | z)."""

    trunk: Maxout
    head: Dense
    batch_last: ClassVar[bool] = True

    def __call__(self, z: Array) -> Array:
        """``(latent, *batch) -> (out, *batch)``."""
        return self.head(self.trunk(z))
