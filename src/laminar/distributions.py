"""The few distributions that flows need as bases and targets (NumPyro has the rest).

Scales are kept as their logarithms and other positive parameters through `_params.positive`, so
that every array is unconstrained. They are trained by default; wrap a base in `_params.Frozen` to
fix it.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer

from laminar._errors import InputError, ShapeError
from laminar._params import expand
from laminar._typing import Array, ArrayLike, Shape
from laminar.density import AbstractDistribution, Estimate

__all__ = ["AbstractDistribution", "Estimate", "Normal"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Normal(AbstractDistribution):
    """Independent normal entries: x_i ~ N(loc_i, scale_i²).

        ln p(x) = Σ_i [ −½ ((x_i − loc_i) / scale_i)² − ln scale_i − ½ ln 2π ]

    Args:
        shape: Event shape.
        loc: Means, broadcast to `shape`.
        scale: Standard deviations, positive, broadcast to `shape`.

    Raises:
        InputError: If a scale is not positive.
        ShapeError: If an argument does not broadcast to `shape`.
    """

    loc: Array
    log_scale: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, shape: Shape | int = (), loc: ArrayLike = 0.0, scale: ArrayLike = 1.0):
        self.shape = _as_shape(shape)
        self.loc, scale = _parameters("Normal", self.shape, loc=loc, scale=scale)
        self.log_scale = jnp.log(scale)
        self.cond_shape = None

    def _log_prob(self, x, condition=None, *, key=None):
        log_scale = expand(self.log_scale, x.ndim)
        z = (x - expand(self.loc, x.ndim)) * jnp.exp(-log_scale)
        return _sum(-0.5 * z * z - log_scale - _HALF_LOG_TWO_PI, self.shape)

    def _sample(self, key, batch=(), condition=None):
        noise = jr.normal(key, self.shape + batch, self.loc.dtype)
        return _place(noise, self.loc, self.log_scale)

    def _sample_and_log_prob(self, key, batch=(), condition=None):
        noise = jr.normal(key, self.shape + batch, self.loc.dtype)
        log_scale = expand(self.log_scale, noise.ndim)
        log_p = _sum(-0.5 * noise * noise - log_scale - _HALF_LOG_TWO_PI, self.shape)
        return _place(noise, self.loc, self.log_scale), log_p


def _sum(values: Array, shape: Shape) -> Array:
    """Sum over the leading event axes."""
    return values.sum(tuple(range(len(shape))))


def _place(noise: Array, loc: Array, log_scale: Array) -> Array:
    """The affine map loc + scale · noise, with batch axes last."""
    return expand(loc, noise.ndim) + jnp.exp(expand(log_scale, noise.ndim)) * noise


def _as_shape(shape: Shape | int | Sequence[int]) -> Shape:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _parameters(owner: str, shape: Shape, **values: ArrayLike) -> list[Array]:
    """Arrays of one dtype broadcast to `shape`; a parameter called scale or df must be positive."""
    given = [v for v in values.values() if hasattr(v, "dtype")]
    kinds = [v.dtype for v in given if jnp.issubdtype(v.dtype, jnp.inexact)]  # pyright: ignore
    dtype = jax.dtypes.canonicalize_dtype(kinds[0] if kinds else float)
    arrays = []
    for name, value in values.items():
        array = jnp.asarray(value, dtype)
        if array.ndim > len(shape) or np.broadcast_shapes(array.shape, shape) != shape:
            raise ShapeError(
                f"{owner}: {name} has shape {array.shape}, which does not broadcast to the event "
                f"shape {shape}."
            )
        concrete = not isinstance(array, Tracer)
        if name in ("scale", "df") and concrete and not bool((array > 0).all()):
            raise InputError(f"{owner}: {name} must be positive everywhere.")
        arrays.append(jnp.broadcast_to(array, shape))
    return arrays
