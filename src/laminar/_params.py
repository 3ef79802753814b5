"""Maps from unconstrained arrays to constrained ones, and which leaves of a tree are trained.

Everything that differentiates, averages, decays or casts parameters goes through `trainable`.
"""

import math
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from laminar._typing import Array, PyTree

T = TypeVar("T")

SOFTPLUS_ONE = math.log(math.expm1(1.0))
_LOWEST = -80.0  # below it the softplus, or its logarithm's derivative, underflows in float32


def positive(raw: Array) -> Array:
    """Map ℝ to (0, ∞) by a shifted softplus, so that raw = 0 gives exactly 1 up to rounding.

    The value never underflows: below raw = −80 it stays at about 3e-35.
    """
    return jax.nn.softplus(jnp.maximum(raw, _LOWEST) + SOFTPLUS_ONE)


@jax.custom_jvp
def reciprocal(raw: Array) -> Array:
    """1 / positive(raw), whose derivative is finite where the square of `positive` underflows."""
    return 1 / positive(raw)


@reciprocal.defjvp
def _reciprocal_jvp(primals, tangents):
    (raw,), (step,) = primals, tangents
    value = reciprocal(raw)
    # The slope of the logarithm is of order one; transposed, its factors alone would overflow.
    log_slope = jax.jvp(lambda r: jnp.log(positive(r)), (raw,), (jnp.ones_like(raw),))[1]
    return value, -(value * log_slope) * step


def positive_inverse(value: Array) -> Array:
    """The raw array that `positive` maps to `value`: ln(exp(v) − 1) − ln(e − 1)."""
    return value + jnp.log(-jnp.expm1(-value)) - SOFTPLUS_ONE


def bounded(raw: Array, limit: float) -> Array:
    """Map ℝ smoothly to (−limit, limit) with slope one at zero: limit · tanh(raw / limit)."""
    return limit * jnp.tanh(raw / limit)


def clip(value: Array, lo: float, hi: float) -> Array:
    """As jnp.clip, but with derivative one, not one half, at the two ends themselves."""
    return jnp.where(value < lo, lo, jnp.where(value > hi, hi, value))


def expand(value: Array, ndim: int) -> Array:
    """Append axes of size one up to `ndim` axes, so that event axes meet trailing batch axes."""
    return value.reshape(value.shape + (1,) * (ndim - value.ndim))


class Frozen(eqx.Module, Generic[T]):
    """Holds a tree that is saved and moved with its owner but never trained, averaged or decayed.

    Read it through `value`, which also stops gradients.
    """

    tree: T

    @property
    def value(self) -> T:
        """The tree held, with gradients stopped."""
        return jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, self.tree)


def _is_frozen(x: Any) -> bool:
    return isinstance(x, Frozen)


def trainable(tree: PyTree) -> PyTree:
    """A filter specification (a prefix tree of booleans) that marks the trained leaves of a tree.

    Trained are the floating-point arrays that stand outside every `Frozen`.
    """
    return jtu.tree_map(
        lambda x: not _is_frozen(x) and eqx.is_inexact_array(x), tree, is_leaf=_is_frozen
    )


def partition(tree: T, spec: PyTree | None = None) -> tuple[T, T]:
    """Split a tree into its trained leaves and the rest, by `spec` or else by `trainable`."""
    return eqx.partition(tree, trainable(tree) if spec is None else spec)
