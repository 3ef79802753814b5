"""The four energies of Rezende & Mohamed (2015, table 1) as proper densities of the plane.

    w1(x) = sin(2π x / 4),   w2(x) = 3 exp(−½ ((x − 1) / 0.6)²),   w3(x) = 3 σ((x − 1) / 0.3)

    U1 = ½ ((|z| − 2) / 0.4)² − ln(e^{−½ ((x − 2) / 0.6)²} + e^{−½ ((x + 2) / 0.6)²})
    U2 = ½ ((y − w1) / 0.4)²
    U3 = −ln(e^{−½ ((y − w1) / 0.35)²} + e^{−½ ((y − w1 + w2) / 0.35)²})
    U4 = −ln(e^{−½ ((y − w1) / 0.4)²} + e^{−½ ((y − w1 + w3) / 0.35)²})

with z = (x, y). Only the first has finite mass: the others go on for ever along x. So all four get
a soft wall beyond the window that the paper draws, and the density is

    p(x, y) ∝ exp(−U(x, y) − ½ (max(|x| − 4, 0) / 0.4)²)
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from laminar._typing import Array

NAMES = ("U1", "U2", "U3", "U4")
WALL, SOFTNESS = 4.0, 0.4
HALF_WIDTH = 8.0
"""Half the side of the square that is integrated over; beyond it a density is below e^−50."""


class Energy(eqx.Module):
    """The unnormalised ln p of one of the four; the number is an array, so all share a program."""

    number: Array

    def __init__(self, name: str):
        self.number = jnp.asarray(NAMES.index(name), jnp.int32)

    def __call__(self, z: Array) -> Array:
        x, y = z
        w1 = jnp.sin(0.5 * math.pi * x)
        w2 = 3 * jnp.exp(_bump(x - 1, 0.6))
        w3 = 3 * jax.nn.sigmoid((x - 1) / 0.3)
        square = x * x + y * y
        # The root has no gradient at zero, where nothing pulls anyway.
        radius = jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0).astype(z.dtype)
        values = (
            _bump(radius - 2, 0.4) + jnp.logaddexp(_bump(x - 2, 0.6), _bump(x + 2, 0.6)),
            _bump(y - w1, 0.4),
            jnp.logaddexp(_bump(y - w1, 0.35), _bump(y - w1 + w2, 0.35)),
            jnp.logaddexp(_bump(y - w1, 0.4), _bump(y - w1 + w3, 0.35)),
        )
        wall = _bump(jnp.maximum(jnp.abs(x) - WALL, 0), SOFTNESS)
        return jnp.stack(values)[self.number] + wall


def _bump(x: Array, scale: float) -> Array:
    return -0.5 * (x / scale) ** 2


def grid(points: int, half: float = HALF_WIDTH) -> np.ndarray:
    """A square grid of the plane, ``(points, points, 2)``, x along the first axis."""
    line = np.linspace(-half, half, points)
    return np.stack(np.meshgrid(line, line, indexing="ij"), -1)


def log_normaliser(name: str, points: int = 801) -> float:
    """ln ∫ p by the trapezoidal rule, in double precision.

    For a smooth function that vanishes at the ends the rule converges faster than any power of the
    spacing. The wall's kinks at |x| = 4 lie on the grid.
    """
    with jax.enable_x64(True):
        values = np.asarray(jax.vmap(jax.vmap(Energy(name)))(jnp.asarray(grid(points))))
    step = 2 * HALF_WIDTH / (points - 1)
    largest = values.max()
    return float(largest + np.log(np.exp(values - largest).sum()) + 2 * math.log(step))
