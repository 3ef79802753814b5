"""The compiled pieces of a check: functions of a transform or flow and batch-last points."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._params import partition
from laminar._typing import Array, Condition, Shape
from laminar.bijections.base import call
from laminar.bijections.path import walk
from laminar.density import AbstractDistribution


def encode(flow: AbstractDistribution, condition: Condition, batch: Shape) -> tuple[Any, Any]:
    """The flow without its embedding, and conditions ``batch + …`` as it takes them, batch last."""
    inner, encoded = flow._encode(condition, batch, None)
    if encoded is not None and batch:
        encoded = jnp.moveaxis(encoded, 0, -1)
    return inner, encoded


class Trip(NamedTuple):
    """Round trips of some rows; errors and asymmetry have their magnification taken out.

    Attributes:
        latent: The latent points, batch last.
        data_error: data → latent → data, per row.
        latent_error: latent → data → latent, per row.
        log_dets: Of the three passes, ``(3, n)``.
        asymmetry: The worst sum of the log-dets of two passes that undo each other, per row.
    """

    latent: Array
    data_error: Array
    latent_error: Array
    log_dets: Array
    asymmetry: Array


@eqx.filter_jit
def trip(transform, x, condition, noise_key, step, key) -> Trip:
    """Carry data → latent → data → latent, batch last.

    Args:
        transform: The transform.
        x: Points of the data space.
        condition: Their conditions, or None.
        noise_key: Draws the directions in which magnification is measured.
        step: The relative step for that.
        key: For transforms that draw.
    """
    n = x.shape[-1]
    twice = None
    if condition is not None:
        twice = jnp.concatenate([condition, condition], axis=-1)

    def both(direction, p):
        """The image of p and of p moved by a small relative step."""
        signs = jr.rademacher(noise_key, p.shape, p.dtype)
        moved = p + step * (jnp.abs(p) + _spread(p)) * signs
        points = jnp.concatenate([p, moved], axis=-1)
        y, log_det = call(transform, direction, points, twice, key=key)
        return (y[..., :n], log_det[:n]), (y[..., n:], log_det[n:])

    def error(p, start, moved):
        """Relative error per row, divided by the relative magnification of the map that gave p."""
        size = jnp.abs(start) + _spread(start)
        axes = tuple(range(p.ndim - 1))
        stretch = (jnp.abs(moved - p) / size).max(axes) / step
        return (jnp.abs(p - start) / size).max(axes) / _at_least_one(stretch)

    def asymmetry(first, second, moved):
        dim = max(1, math.prod(transform.in_shape))
        change = jnp.abs(moved - second) / (step * dim)
        return jnp.abs(first + second) / _at_least_one(change)

    z, ld_z = call(transform, "inverse", x, condition, key=key)
    (x_again, ld_x), (x_moved, ld_x_moved) = both("forward", z)
    (z_again, ld_again), (z_moved, ld_z_moved) = both("inverse", x_again)
    return Trip(
        z,
        error(x_again, x, x_moved),
        error(z_again, z, z_moved),
        jnp.stack([ld_z, ld_x, ld_again]),
        jnp.maximum(asymmetry(ld_z, ld_x, ld_x_moved), asymmetry(ld_x, ld_again, ld_z_moved)),
    )


def _spread(p: Array) -> Array:
    """Median deviation of every entry over the batch, with a floor for entries that stand still."""
    finite = jnp.where(jnp.isfinite(p), p, 0)
    middle = jnp.median(finite, axis=-1, keepdims=True)
    spread = 1.48 * jnp.median(jnp.abs(finite - middle), axis=-1, keepdims=True)
    return jnp.maximum(spread, 1e-3 * spread.mean() + jnp.finfo(p.dtype).tiny)


def _at_least_one(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), jnp.maximum(x, 1), 1)


@eqx.filter_jit
def points_of(transform, z, condition):
    """The points and log-dets after every step."""
    return walk(transform, "forward", z, condition)


@eqx.filter_jit
def log_det_of(transform, z, condition):
    """The log-det of the whole map."""
    return call(transform, "forward", z, condition)[1]


@eqx.filter_jit
def _jacobian(step, x, condition, jacobian):
    """Jacobians (m, D, D) and log-dets (m,) of a step at batch-last points."""

    def one(x, condition):
        def f(flat):
            y, log_det = call(step, "forward", flat.reshape(step.in_shape), condition)
            return y.reshape(-1), log_det

        return jacobian(f, has_aux=True)(x.reshape(-1))

    axis = None if condition is None else -1
    return jax.vmap(one, in_axes=(-1, axis))(x, condition)


def jacobian_log_det(step, x, condition, unit: float):
    """Ln |det J| in float64, the error that its condition explains in budgets, and the log-det."""
    if step.cond_shape is None:
        condition = None
    try:
        matrix, log_det = _jacobian(step, x, condition, jax.jacfwd)
    except TypeError:  # a custom rule for reverse mode only
        matrix, log_det = _jacobian(step, x, condition, jax.jacrev)
    matrix = np.asarray(matrix, np.float64)
    exact = np.linalg.slogdet(matrix)[1]
    # Scaling of rows and columns loses no digits, so it must not count as ill-conditioning.
    for axis in (2, 1):
        size = np.linalg.norm(matrix, axis=axis, keepdims=True)
        matrix = matrix / np.where(size > 0, size, 1)
    if not np.isfinite(matrix).all():
        return np.full(len(exact), np.nan), np.zeros(len(exact)), np.asarray(log_det, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        condition_number = np.minimum(np.nan_to_num(np.linalg.cond(matrix), nan=np.inf), 1e5)
    return exact, 10 * unit * condition_number, np.asarray(log_det, np.float64)


class Gradients(NamedTuple):
    """Log-densities with their gradients by inputs and summed by parameters."""

    log_p: Array
    x: Array
    params: Any


@eqx.filter_jit
def gradients(flow, x, condition, key) -> Gradients:
    """The gradients where the log-density is finite."""
    params, rest = partition(flow)

    def total(at):
        params, x = at
        log_p = eqx.combine(params, rest).log_prob(x, condition, key=key)
        return jnp.where(jnp.isfinite(log_p), log_p, 0).sum(), log_p

    (_, log_p), (by_params, by_x) = eqx.filter_value_and_grad(total, has_aux=True)((params, x))
    return Gradients(log_p, by_x, by_params)


@eqx.filter_jit
def sampling_gradient(flow, key, n, condition):
    """The gradient of summed samples by parameters."""
    params, rest = partition(flow)
    shape = (n,) if condition is None else ()

    def total(params):
        return eqx.combine(params, rest).sample(key, shape, condition).sum()

    return eqx.filter_grad(total)(params)


@eqx.filter_jit
def push(flow, z, condition):
    """Latent points to data, with log-dets."""
    return call(flow._map, "forward", z, condition)
