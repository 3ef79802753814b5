"""Limits of floating-point types, and functions that stay within them.

Arguments are clipped before the arithmetic, so gradients are finite everywhere; NaN stays NaN.
"""

import math

import jax
import jax.numpy as jnp

from laminar._typing import Array

_LOG_TWO = math.log(2.0)


def tiny(x: Array) -> float:
    """The smallest positive normal number of an array's type."""
    return float(jnp.finfo(x.dtype).tiny)


def log_tiny(x: Array) -> float:
    """The logarithm of `tiny`."""
    return math.log(tiny(x))


def largest(x: Array) -> float:
    """The largest number of an array's type."""
    return float(jnp.finfo(x.dtype).max)


def epsneg(x: Array) -> float:
    """The distance from one to the next smaller number of an array's type."""
    return float(jnp.finfo(x.dtype).epsneg)


def finite(x: Array) -> Array:
    """The nearest finite numbers."""
    return jnp.clip(x, -largest(x), largest(x))


def clip_positive(x: Array) -> Array:
    """The nearest positive normal numbers."""
    return jnp.clip(x, tiny(x), largest(x))


def not_positive(x: Array) -> Array:
    """Outside (0, ∞); False for NaN, which must stay NaN."""
    return (x <= 0) | (x == jnp.inf)


def unless(outside: Array, log_det: Array) -> Array:
    """The log-det inside the support, and −inf outside."""
    return jnp.where(outside, -jnp.inf, log_det)


def clamped_exp(x: Array) -> Array:
    """The exponential within the normal numbers, a hair below the largest."""
    return jnp.exp(jnp.clip(x, log_tiny(x) + 1e-4, math.log(largest(x)) - 1e-4))


def clamped_sinh(u: Array) -> Array:
    """The hyperbolic sine without overflow; half the largest number is far enough out."""
    edge = math.log(largest(u)) - 1
    return jnp.sinh(jnp.clip(u, -edge, edge))


def log_cosh(u: Array) -> Array:
    """The logarithm of cosh u, smooth at zero and free of overflow."""
    return u + jax.nn.softplus(-2 * u) - _LOG_TWO


def log_sech2(x: Array) -> Array:
    """The logarithm of 1 − tanh² x."""
    return -2 * log_cosh(x)
