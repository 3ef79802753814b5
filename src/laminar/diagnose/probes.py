"""The compiled pieces of a check: functions of a transform or flow and batch-last points."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from laminar._errors import InputError
from laminar._params import partition
from laminar._typing import Array, Condition, Shape
from laminar.bijections.base import AbstractTransform, Invert, call
from laminar.bijections.compose import Chain
from laminar.density import AbstractDistribution
from laminar.spaces import log_units, restrict


def encode(flow: AbstractDistribution, condition: Condition, batch: Shape) -> tuple[Any, Any]:
    """The flow without its embedding, and conditions ``batch + …`` as it takes them, batch last."""
    inner, encoded = flow._encode(condition, batch, None)
    if encoded is not None and batch:
        encoded = jnp.moveaxis(encoded, 0, -1)
    return inner, encoded


class Image(NamedTuple):
    """The image of batch-last points under a map, and how much the map magnifies there.

    Attributes:
        points: The images.
        log_det: The log-dets.
        stretch: Per row, the relative change of the image for a relative change of the point.
        twist: Per row, the change of the log-det for a relative change of the point.
    """

    points: np.ndarray
    log_det: np.ndarray
    stretch: np.ndarray
    twist: np.ndarray


def image(transform, direction, points, condition, signs, key) -> Image:
    """Map points and, to measure magnification, the same points moved a little along `signs`."""
    step = math.sqrt(float(jnp.finfo(points.dtype).eps))
    moved = points + (step * size(points) * signs).astype(points.dtype)
    space = transform.in_space if direction == "forward" else transform.out_space
    if space is not None:
        moved = np.asarray(space.project(jnp.asarray(moved)))
    if condition is not None:
        condition = np.concatenate([condition, condition], axis=-1)
    both = np.concatenate([points, moved], axis=-1)
    out = _apply(transform, direction, both, condition, key)
    n = points.shape[-1]
    (y, y_moved), (ld, ld_moved) = (
        (a[..., :n], a[..., n:]) for a in (np.asarray(a, np.float64) for a in out)
    )
    with np.errstate(invalid="ignore", over="ignore"):
        stretch = (np.abs(y_moved - y) / size(y)).reshape(-1, n).max(0) / step
        twist = np.abs(ld_moved - ld) / step
    return Image(y, ld, stretch, twist)


def size(points: np.ndarray) -> np.ndarray:
    """The size of every entry: its absolute value plus the median deviation over the batch."""
    points = np.asarray(points, np.float64)
    finite = np.where(np.isfinite(points), points, 0)
    middle = np.median(finite, axis=-1, keepdims=True)
    spread = 1.48 * np.median(np.abs(finite - middle), axis=-1, keepdims=True)
    # A floor for entries that stand still.
    return np.abs(points) + np.maximum(spread, 1e-3 * spread.mean() + 1e-30)


def error(first: np.ndarray, again: Image) -> np.ndarray:
    """Per row, the worst relative error of a round trip, with the magnification taken out."""
    n = first.shape[-1]
    with np.errstate(invalid="ignore"):
        worst = (np.abs(again.points - first) / size(first)).reshape(-1, n).max(0)
    return worst / _at_least_one(again.stretch)


def asymmetry(first: Image, back: Image, dim: int) -> np.ndarray:
    """Per row, the sum of the log-dets of two maps that undo each other, per dimension."""
    with np.errstate(invalid="ignore"):
        total = np.abs(first.log_det + back.log_det) / dim
    return total / _at_least_one(back.twist / dim)


def _at_least_one(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), np.maximum(x, 1), 1)


@eqx.filter_jit
def _apply(transform, direction, points, condition, key):
    return call(transform, direction, points, condition, key=key)


@eqx.filter_jit
def _jacobian(step, x, condition, jacobian, key):
    """Jacobians (m, out, in), images (*shape, m) and log-dets (m,) at batch-last points."""

    def one(x, condition):
        def f(flat):
            y, log_det = call(step, "forward", flat.reshape(step.in_shape), condition, key=key)
            return y.reshape(-1), (y, log_det)

        return jacobian(f, has_aux=True)(x.reshape(-1))

    axis = None if condition is None else -1
    return jax.vmap(one, in_axes=(-1, axis), out_axes=(0, (-1, 0)))(x, condition)


def pieces(transform: AbstractTransform) -> tuple[AbstractTransform, ...]:
    """The steps of a transform, but a solution that has a trajectory as one.

    The parts of a solution are alike, so they say no more than the whole, and each of them would be
    compiled.
    """
    if isinstance(transform, Invert):
        return tuple(Invert(part) for part in reversed(pieces(transform.bijection)))
    if isinstance(transform, Chain):
        return tuple(piece for part in transform.parts for piece in pieces(part))
    if type(transform).trajectory is not AbstractTransform.trajectory:
        return (transform,)
    return transform.steps()


def draws(transform: AbstractTransform, dtype: Any) -> bool:
    """Whether `forward` needs a key."""
    shape = transform.cond_shape
    condition = None if shape is None else jax.ShapeDtypeStruct(shape, dtype)
    x = jax.ShapeDtypeStruct(transform.in_shape, dtype)
    try:
        eqx.filter_eval_shape(lambda t, x, c: t.forward(x, c), transform, x, condition)
    except InputError:
        return True
    return False


class Step(NamedTuple):
    """One step at some points, batch last.

    Attributes:
        points: The images.
        log_det: The log-dets as the step gives them, float64.
        exact: ln |det J| by automatic differentiation, float64.
        excess: The error that the condition of J explains, in multiples of `unit`.
    """

    points: Array
    log_det: np.ndarray
    exact: np.ndarray
    excess: np.ndarray


def differentiate(step, x, condition, unit: float, key=None) -> Step:
    """Compare a step's log-det with its Jacobian's; `unit` is one rounding in budgets."""
    if step.cond_shape is None:
        condition = None
    try:
        matrix, (y, log_det) = _jacobian(step, x, condition, jax.jacfwd, key)
    except TypeError:  # a custom rule for reverse mode only
        matrix, (y, log_det) = _jacobian(step, x, condition, jax.jacrev, key)
    matrix, log_det = np.asarray(matrix, np.float64), np.asarray(log_det, np.float64)
    if not np.isfinite(matrix).all():
        return Step(y, log_det, np.full(log_det.shape, np.nan), np.zeros(log_det.shape))
    flat = np.moveaxis(np.asarray(x), -1, 0).reshape((len(matrix), -1))
    matrix = restrict(matrix, step.in_space, flat)
    exact = np.linalg.slogdet(matrix)[1] + log_units(step.in_space, step.out_space)
    # A derivative smaller than one rounding is zero to automatic differentiation, as of a sigmoid
    # where it has reached one.
    lost = (exact == -np.inf) & (log_det < math.log(float(jnp.finfo(x.dtype).eps)))
    exact = np.where(lost, log_det, exact)
    # Scaling of rows and columns loses no digits, so it must not count as ill-conditioning.
    for axis in (2, 1):
        length = np.linalg.norm(matrix, axis=axis, keepdims=True)
        matrix = matrix / np.where(length > 0, length, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        condition_number = np.nan_to_num(np.linalg.cond(matrix), nan=np.inf)
    return Step(y, log_det, exact, 10 * unit * np.minimum(condition_number, 1e5))


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


def sampling_derivative(flow, key, n, condition):
    """The derivative of samples along a random change of all parameters, shaped as the samples.

    Forward mode, which compiles in half the time of reverse mode, where the flow allows it.
    """
    try:
        return _sampling_forward(flow, key, n, condition)
    except TypeError:  # a custom rule for reverse mode only
        return _sampling_reverse(flow, key, n, condition)


def _samples_of(flow, key, n, condition):
    params, rest = partition(flow)
    shape = (n,) if condition is None else ()
    return params, lambda params: eqx.combine(params, rest).sample(key, shape, condition)


@eqx.filter_jit
def _sampling_forward(flow, key, n, condition):
    params, sample = _samples_of(flow, key, n, condition)
    # Unequal steps, so that no two entries cancel.
    steps = jtu.tree_map(
        lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params
    )
    return jax.jvp(sample, (params,), (steps,))[1]


@eqx.filter_jit
def _sampling_reverse(flow, key, n, condition):
    params, sample = _samples_of(flow, key, n, condition)
    return jax.grad(lambda params: sample(params).sum())(params)


@eqx.filter_jit
def push(flow, z, condition):
    """Latent points to data, with log-dets."""
    return call(flow._map, "forward", z, condition)
