"""Matrices and shifts applied to vectors with the batch behind."""

import math

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from laminar._params import expand
from laminar._typing import Array


def product(matrix: Array, x: Array) -> Array:
    """A matrix (M, N) times vectors (N, *batch), at full precision on every device.

    Each vector may have its own matrix, (M, N, *batch).
    """
    if matrix.ndim > 2:
        return jnp.sum(matrix * x[None], 1)
    return jnp.tensordot(matrix, x, axes=1, precision=lax.Precision.HIGHEST)


def solve(matrix: Array, y: Array, *, lower: bool, unit: bool = False) -> Array:
    """The solution of a triangular system with the batch, flattened, as right-hand sides."""
    columns = y.reshape(y.shape[0], math.prod(y.shape[1:]))
    x = solve_triangular(matrix, columns, lower=lower, unit_diagonal=unit)
    return x.reshape(y.shape)


def take(x: Array, index: Array) -> Array:
    """The rows of a permutation, in its order."""
    return jnp.take(x, index, axis=0, unique_indices=True, mode="clip")


def add(x: Array, shift: Array | None) -> Array:
    """Points moved by a shift, if there is one."""
    return x if shift is None else x + expand(shift, x.ndim)


def subtract(y: Array, shift: Array | None) -> Array:
    """The inverse of `add`."""
    return y if shift is None else y - expand(shift, y.ndim)


def fill(log_det: Array, x: Array, event_ndim: int = 1) -> Array:
    """One log-det for all events of a batch."""
    return jnp.broadcast_to(log_det, x.shape[event_ndim:])
