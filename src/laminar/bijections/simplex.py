"""Bijections of ℝ^{D−1} to the simplex, so that any flow before them is one of proportions.

Points are vectors of all D parts; see `laminar.spaces.Simplex` for the measure.
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from laminar._errors import InputError
from laminar._params import expand
from laminar._typing import Array, Shape
from laminar.bijections._matrices import product
from laminar.bijections.frames import AbstractUnconditional
from laminar.bijections.manifolds import AbstractOnManifold
from laminar.spaces import Simplex, least


class AbstractToSimplex(AbstractOnManifold, AbstractUnconditional):
    """A map of ℝ^{D−1} to the positive vectors of D parts that sum to one.

    Attributes:
        parts: D.
    """

    parts: eqx.AbstractVar[int]

    @property
    def in_shape(self) -> Shape:
        """``(D − 1,)``."""
        return (self.parts - 1,)

    @property
    def out_shape(self) -> Shape:
        """``(D,)``."""
        return (self.parts,)

    @property
    def out_space(self):
        """The simplex."""
        return Simplex(self.parts)

    def __check_init__(self):
        if self.parts < 2:
            raise InputError(f"{self.name}: there must be at least 2 parts, not {self.parts}.")

    @abc.abstractmethod
    def _log_parts(self, x: Array) -> Array:
        """The logarithms of the parts."""

    def _image(self, log_parts: Array):
        lowest = math.log(least(log_parts.dtype)) + 1e-3
        return jnp.exp(jnp.maximum(log_parts, lowest)), jnp.sum(log_parts, 0)

    def _forward(self, x, condition):
        return self._image(self._log_parts(jnp.clip(x, -1e6, 1e6)))


class StickBreaking(AbstractToSimplex):
    r"""Parts broken one after the other from a stick (Sethuraman 1994).

        y_k = (1 − Σ_{j<k} y_j) σ(x_k − ln(D − k)),    log_det = Σ_{k ≤ D} ln y_k

    Zero gives equal parts. The measure is Lebesgue's on all parts but the last.

    Args:
        parts: D.

    Raises:
        InputError: If there are fewer than 2 parts.
    """

    parts: int = eqx.field(static=True)

    def _centre(self, x: Array) -> Array:
        return expand(jnp.asarray(np.log(np.arange(self.parts - 1, 0, -1)), x.dtype), x.ndim)

    def _log_parts(self, x):
        x = x - self._centre(x)
        rest = jnp.cumsum(-jax.nn.softplus(x), 0)
        zero = jnp.zeros_like(x[:1])
        before = jnp.concatenate([zero, rest])
        return before + jnp.concatenate([-jax.nn.softplus(-x), zero])

    def _inverse(self, y, condition):
        rest = jnp.cumsum(y[::-1], 0)[::-1][1:]
        log_y = jnp.log(y)
        return log_y[:-1] - jnp.log(rest) + self._centre(y), -jnp.sum(log_y, 0)


class Softmax(AbstractToSimplex):
    r"""The softmax, from coordinates that treat all parts alike (Egozcue et al. 2003).

        y = softmax(V x),    x = Vᵀ ln y,    log_det = Σ_{k ≤ D} ln y_k + ½ ln D

    with the D − 1 orthonormal columns of V (Helmert's), each of which sums to zero: the isometric
    log-ratios of compositional data. The measure is Lebesgue's on all parts but the last.

    Args:
        parts: D.

    Raises:
        InputError: If there are fewer than 2 parts.
    """

    parts: int = eqx.field(static=True)

    def _basis(self, dtype) -> Array:
        count = np.arange(1, self.parts)
        upper = np.tril(np.ones((self.parts - 1, self.parts)))
        upper[np.arange(self.parts - 1), count] = -count
        return jnp.asarray((upper / np.sqrt(count * (count + 1))[:, None]).T, dtype)

    def _log_parts(self, x):
        return jax.nn.log_softmax(product(self._basis(x.dtype), x), 0)

    def _forward(self, x, condition):
        y, log_det = super()._forward(x, condition)
        return y, log_det + 0.5 * math.log(self.parts)

    def _inverse(self, y, condition):
        log_y = jnp.log(y)
        x = product(self._basis(y.dtype).T, log_y)
        return x, -jnp.sum(log_y, 0) - 0.5 * math.log(self.parts)
