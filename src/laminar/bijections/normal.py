"""The tails of the normal law by their logarithms, which keep their digits however far out."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from laminar._typing import Array

_FRACTION_TERMS = 32  # of Laplace's continued fraction, which is then exact in float64 beyond 3


def hazard(z: Array) -> Array:
    """The slope of −ln erfc(z/√2) for z ≥ 0, which is φ(z)/Φ(−z)."""
    far = z > 3
    near = jnp.where(far, 1, z)
    body = math.sqrt(2 / math.pi) * jnp.exp(-0.5 * near * near)
    body = body / lax.erfc(near * math.sqrt(0.5))
    z = jnp.where(far, z, 3)
    tail = z
    for k in range(_FRACTION_TERMS, 0, -1):
        tail = z + k / tail
    return jnp.where(far, tail, body)


def minus_log_erfc(z: Array) -> Array:
    """−ln erfc(z/√2) for z ≥ 0, precise near zero and without underflow."""
    low = z < 1
    near = jnp.where(low, z, 0)
    far = 0.5 * z * z + jnp.log(math.sqrt(math.pi / 2) * hazard(jnp.where(low, 1, z)))
    return jnp.where(low, -jnp.log1p(-lax.erf(near * math.sqrt(0.5))), far)


@jax.custom_jvp
def tail_quantile(h: Array) -> Array:
    """The z ≥ 0 with −ln erfc(z/√2) = h; zero where h is below zero by rounding.

    The left side is convex, and at least z²/2 and z √(2/π); so Newton's method from the smaller of
    the two bounds approaches the root from the right.
    """
    h = jnp.maximum(h, 0)
    z = jnp.minimum(jnp.sqrt(2 * h), math.sqrt(math.pi / 2) * h)

    def step(_, z):
        return jnp.maximum(z - (minus_log_erfc(z) - h) / hazard(z), 0)

    return lax.fori_loop(0, 6, step, z)  # unrolled it takes twice the time to compile


@tail_quantile.defjvp
def _tail_quantile_jvp(primals, tangents):
    z = tail_quantile(primals[0])
    return z, tangents[0] / hazard(z)
