"""Log densities, gradients and Hessians of many points by programs that are compiled once.

Points go through in batches of one size, so that the number of points never compiles anything
anew; what is done with the values happens on the host, in double precision.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from laminar._typing import Array
from laminar.density import AbstractDistribution

LogDensity = Callable[[Array], Array]
"""Of one vector ``(D,)``. Programs are kept by it, so it must hash."""

_FEW, _MANY = 8, 512
_PROBES = 32


def log_densities(log_density: LogDensity, z: np.ndarray, dtype) -> np.ndarray:
    """Values ``(N,)`` at points ``(N, D)``."""
    (values,) = _in_batches(_values, _MANY, log_density, z, dtype)
    return values


def slopes(log_density: LogDensity, z: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Values ``(N,)`` and gradients ``(N, D)`` at points ``(N, D)``."""
    values, gradients = _in_batches(_slopes, _FEW, log_density, z, dtype)
    return values, gradients


def curvatures(log_density: LogDensity, z: np.ndarray, dtype) -> np.ndarray:
    """Hessians ``(N, D, D)`` at points ``(N, D)``."""
    (found,) = _in_batches(_hessians, _FEW, log_density, z, dtype)
    return 0.5 * (found + np.swapaxes(found, 1, 2))


def diagonal_curvatures(
    log_density: LogDensity, z: np.ndarray, dtype, noise: np.random.Generator
) -> np.ndarray:
    """Unbiased estimates ``(N, D)`` of the Hessians' diagonals (Hutchinson 1989)."""
    signs = noise.choice([-1.0, 1.0], (_PROBES, z.shape[1])).astype(dtype)
    (found,) = _in_batches(_diagonals, _FEW, log_density, z, dtype, signs)
    return found


def approximate_log_prob(approximation: AbstractDistribution, z: np.ndarray) -> np.ndarray:
    """The log density ``(N,)`` of a flow at points ``(N, D)``."""
    (values,) = _in_batches(_log_prob, _MANY, approximation, z, approximation.dtype)
    return values


@eqx.filter_jit
def _log_prob(approximation: AbstractDistribution, z: Array) -> tuple[Array]:
    return (approximation._log_prob(z.T),)


def _in_batches(program, size: int, density: Any, z: np.ndarray, dtype, *more):
    """The outputs of a program over all points, as float64."""
    count = len(z)
    filled = np.concatenate([z, np.broadcast_to(z[:1], (-count % size, z.shape[1]))])
    batches = filled.reshape(-1, size, z.shape[1]).astype(dtype)
    # All are under way before the first is waited for.
    parts = jax.device_get([program(density, batch, *more) for batch in batches])
    return [np.concatenate(x).astype(np.float64)[:count] for x in zip(*parts, strict=True)]


@jax.jit(static_argnums=0)
def _values(log_density: LogDensity, z: Array) -> tuple[Array]:
    return (jax.vmap(log_density)(z),)


@jax.jit(static_argnums=0)
def _slopes(log_density: LogDensity, z: Array) -> tuple[Array, Array]:
    return jax.vmap(jax.value_and_grad(log_density))(z)


@jax.jit(static_argnums=0)
def _hessians(log_density: LogDensity, z: Array) -> tuple[Array]:
    slope = jax.grad(log_density)

    def hessian(z):
        if _allows_forward(slope, z):
            return jax.jacfwd(slope)(z)
        # Central differences: what defines its own reverse mode, as an ODE's adjoint, has no other.
        step = _difference(z) * (1 + jnp.abs(z))
        away = jnp.diag(step)
        ahead, behind = jax.vmap(slope)(z[None] + away), jax.vmap(slope)(z[None] - away)
        return (ahead - behind) / (2 * step[:, None])

    return (lax.map(hessian, z),)


@jax.jit(static_argnums=0)
def _diagonals(log_density: LogDensity, z: Array, signs: Array) -> tuple[Array]:
    slope = jax.grad(log_density)

    def diagonal(z):
        forward = _allows_forward(slope, z)
        step = _difference(z) * (1 + jnp.abs(z).max())

        def product(v):
            if forward:
                return v * jax.jvp(slope, (z,), (v,))[1]
            return v * (slope(z + step * v) - slope(z - step * v)) / (2 * step)

        return lax.map(product, signs).mean(0)

    return (lax.map(diagonal, z),)


def _difference(z: Array) -> Array:
    """The step of a central difference."""
    return jnp.cbrt(jnp.finfo(z.dtype).eps).astype(z.dtype)


def _allows_forward(function: Callable[[Array], Array], z: Array) -> bool:
    try:
        jax.eval_shape(jax.jacfwd(function), z)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        return False
    return True
