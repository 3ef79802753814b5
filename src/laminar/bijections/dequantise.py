r"""Dequantisation: counts and pixel values as cells of a continuous density.

A value x ∈ {0, …, K−1} stands for the cell (x, x + 1) / K, and its probability is the integral of
the density p over the cell. With any density q(u | x) on (0, 1)^D,

    ln P(x) ≥ E_{u ~ q} [ ln p((x + u) / K) − D ln K − ln q(u | x) ]

(Theis et al. 2016 for uniform q; Ho et al. 2019, "Flow++", for one that is a flow itself).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from laminar._errors import InputError, ShapeError
from laminar._params import clip
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractTransform, Exactness, call
from laminar.bijections.compose import Chain, Repeat, repeat
from laminar.bijections.elementwise import Affine, Sigmoid
from laminar.bijections.frames import AbstractShaped
from laminar.bijections.masks import checkerboard_mask, conv_coupling

_LARGEST_MARGIN = 0.02
"""Share of a cell at either end that noise may leave out."""


class Dequantise(AbstractShaped):
    r"""Whole numbers 0, …, K−1 from points of (0, 1): x = ⌊K y⌋ in each entry.

        inverse:  y = (x + u) / K with u ~ q(u | x),    log_det = −D ln K − ln q(u | x)
        forward:  x = ⌊K y⌋,    log_det = D ln K + ln q(K y − x | x)

    ``Flow(…, Chain([…, Sigmoid(shape), Dequantise(shape, 256)]))`` is a law of 8-bit images. Its
    ``log_prob`` needs a key and is the logarithm of an unbiased estimate of the probability, so on
    average a lower bound on its logarithm; averaged over draws it is the usual bound. Where it
    draws, ``sample_and_log_prob`` gives on average an upper bound instead, as u is then drawn by p.
    Without a key `points`, and so ``to_latent``, takes the middles of the cells.

    Values that are not 0, …, K−1 have log-det −inf.

    Args:
        shape: Event shape.
        levels: K.
        noise: What makes q, a transform that maps logistic noise of the event's shape to u, such as
            one that ends with ``Sigmoid``; its condition, if it takes one, is the image 2 x / (K−1)
            − 1. None for uniform u. See `dequantisation_noise`.

    Raises:
        InputError: If there are not at least two levels, or a key is missing.
        ShapeError: If `noise` has another shape or condition, or is not exact.
    """

    noise: AbstractTransform | None
    levels: int = eqx.field(static=True)

    def __init__(self, shape: Shape, levels: int = 256, noise: AbstractTransform | None = None):
        shape = tuple(shape)
        if levels < 2:
            raise InputError(f"Dequantise: there must be at least 2 levels, not {levels}.")
        if noise is not None and (
            (noise.in_shape, noise.out_shape, noise.exactness) != (shape, shape, "exact")
            or noise.cond_shape not in (None, shape)
        ):
            raise ShapeError(
                f"Dequantise: the noise must be an exact map of {shape} with no condition or one "
                f"of that shape; {noise.name} is {noise.exactness!r}, maps {noise.in_shape} to "
                f"{noise.out_shape} and takes {noise.cond_shape}."
            )
        super().__init__(shape)
        self.levels, self.noise = levels, noise

    @property
    def exactness(self) -> Exactness:
        """``"bound"``."""
        return "bound"

    def row_cost(self, direction):
        """That of the noise."""
        own = super().row_cost(direction)
        return own if self.noise is None else max(own, self.noise.row_cost("forward"))

    def _inside(self, u: Array) -> Array:
        """Away from the ends of the cell, so that rounding cannot move (x + u) / K to another."""
        margin = 1.25 * self.levels * float(jnp.finfo(u.dtype).eps)
        if margin > _LARGEST_MARGIN:
            raise InputError(
                f"{self.name}: cells of {self.levels:,} levels are too narrow for {u.dtype}; take "
                "float64 or fewer levels."
            )
        return clip(u, margin, 1 - margin)

    def _condition(self, x: Array) -> Array | None:
        if self.noise is None or self.noise.cond_shape is None:
            return None
        return 2 * x / (self.levels - 1) - 1

    def _constant(self) -> float:
        return math.prod(self.in_shape) * math.log(self.levels)

    def _sum(self, values: Array) -> Array:
        return values.sum(tuple(range(len(self.in_shape))))

    def forward(self, x, condition=None, *, key=None):
        """``(⌊K y⌋, D ln K + ln q)``, which needs no key."""
        scaled = self.levels * x
        image = clip(jnp.floor(scaled), 0, self.levels - 1)
        log_q = jnp.zeros(x.shape[len(self.in_shape) :], x.dtype)
        if self.noise is not None:
            u = self._inside(scaled - image)
            z, log_det = call(self.noise, "inverse", u, self._condition(image))
            log_q = self._sum(_logistic(z)) + log_det
        outside = self._any((x <= 0) | (x >= 1))
        return image, jnp.where(outside, -jnp.inf, self._constant() + log_q)

    def inverse(self, y, condition=None, *, key=None):
        """``((x + u) / K, −D ln K − ln q(u | x))`` with u drawn."""
        if key is None:
            raise InputError(
                f"{self.name}: the noise within the cells is drawn, so a random key is needed; "
                "give key=…."
            )
        x = self._level(y)
        batch = y.shape[len(self.in_shape) :]
        if self.noise is None:
            u, log_q = jr.uniform(key, y.shape, y.dtype), jnp.zeros(batch, y.dtype)
        else:
            z = jr.logistic(key, y.shape, y.dtype)
            u, log_det = call(self.noise, "forward", z, self._condition(x))
            log_q = self._sum(_logistic(z)) - log_det
        outside = self._any((x != y) & ~jnp.isnan(y))
        log_det = jnp.where(outside, -jnp.inf, -self._constant() - log_q)
        return (x + self._inside(u)) / self.levels, log_det

    def points(self, direction, x, condition=None, *, key=None):
        """The image alone; without a key the middles of the cells."""
        if direction == "inverse" and key is None:
            return (self._level(x) + 0.5) / self.levels
        return call(self, direction, x, condition, key=key)[0]

    def _level(self, y: Array) -> Array:
        """The nearest level; NaN stays."""
        return clip(jnp.round(y), 0, self.levels - 1)

    def _any(self, flags: Array) -> Array:
        return flags.any(tuple(range(len(self.in_shape))))


def dequantisation_noise(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    layers: int = 4,
    width: int = 32,
    depth: int = 2,
) -> Chain:
    """A flow q(u | x) for `Dequantise`: checkerboard couplings conditioned on the image.

    It starts as uniform noise, and can only raise the bound from there.

    Args:
        shape: ``(C, *space)``.
        key: Draws the networks.
        layers: Number of couplings; the halves of the checkerboard take turns.
        width: Channels of a network.
        depth: Its blocks.
    """

    def make(at: tuple[Array, PRNGKeyArray]) -> AbstractTransform:
        flip, net_key = at
        template = Affine(max_log_scale=2.0)
        mask = checkerboard_mask(shape, flip)
        return conv_coupling(
            shape,
            template,
            key=net_key,
            mask=mask,
            width=width,
            depth=depth,
            cond_shape=tuple(shape),
        )

    flips = jnp.arange(layers) % 2 == 1
    stack: Repeat = repeat(make, layers, over=(flips, jr.split(key, layers)))
    return Chain([stack, Sigmoid(tuple(shape))])


def _logistic(z: Array) -> Array:
    """The logistic log-density of each entry."""
    return jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z)
