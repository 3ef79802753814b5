"""The intermediate points of a composed transform: every step's image, log-det and name."""

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
from jax import lax

from laminar._errors import ShapeError
from laminar._typing import Array, Condition, PRNGKeyArray
from laminar.bijections.base import AbstractTransform, Direction, Identity, Invert, call
from laminar.bijections.compose import Chain, Repeat


def walk(
    transform: AbstractTransform,
    direction: Direction,
    x: Array,
    condition: Condition = None,
    *,
    key: PRNGKeyArray | None = None,
) -> tuple[list[Array], list[Array]]:
    """Apply a transform and keep what every one of its `steps()` gives.

    Repeated layers are run by one scan that collects, so compile time does not grow with depth.

    Args:
        transform: The transform.
        direction: ``"forward"`` or ``"inverse"``.
        x: ``event_shape + batch``.
        condition: ``cond_shape + batch``, or ``cond_shape`` shared by all.
        key: Split for the steps.

    Returns:
        The images and the log-dets after each step, in the order the steps are applied.
    """
    if isinstance(transform, Invert):
        other: Direction = "inverse" if direction == "forward" else "forward"
        return walk(transform.bijection, other, x, condition, key=key)
    if isinstance(transform, Repeat):
        return _walk_repeat(transform, direction, x, condition, key)
    whole = transform.trajectory(direction, x, condition, key=key)
    if whole is not None:
        return whole
    parts = transform.parts if isinstance(transform, Chain) else transform.steps()
    if len(parts) == 1 and not isinstance(transform, Chain):
        y, log_det = call(transform, direction, x, condition, key=key)
        return [y], [log_det]
    points, log_dets = [], []
    keys = [None] * len(parts) if key is None else jr.split(key, len(parts))
    ordered = parts if direction == "forward" else parts[::-1]
    for part, part_key in zip(ordered, keys, strict=True):
        ys, lds = walk(part, direction, x, condition, key=part_key)
        points += ys
        log_dets += lds
        x = ys[-1]
    return points, log_dets


def step_names(transform: AbstractTransform) -> tuple[str, ...]:
    """The names of the `steps()` of a transform, without taking a stack of layers apart."""
    if isinstance(transform, Invert):
        return tuple(f"Invert({name})" for name in reversed(step_names(transform.bijection)))
    if isinstance(transform, Repeat):
        return (transform.layers.name,) * transform.length
    if isinstance(transform, Chain):
        return tuple(name for part in transform.parts for name in step_names(part))
    return tuple(step.name for step in transform.steps())


def first_steps(transform: AbstractTransform, k: int) -> AbstractTransform:
    """The first k of the `steps()` as one transform; repeated layers stay scanned.

    Raises:
        ShapeError: If there are fewer than k steps, or k is negative.
    """
    total = len(step_names(transform))
    if not 0 <= k <= total:
        raise ShapeError(f"{transform.name} has {total} steps, so it has no first {k}.")
    if k == 0:
        return Identity(transform.in_shape, space=transform.in_space)
    if k == total:
        return transform
    if isinstance(transform, Invert):
        inner = _last_steps(transform.bijection, k)
        return Chain([Invert(part) for part in reversed(inner)])
    if isinstance(transform, Chain):
        kept: list[AbstractTransform] = []
        for part in transform.parts:
            n = min(k, len(step_names(part)))
            if n:
                kept.append(first_steps(part, n))
            k -= n
        return Chain(kept)
    if isinstance(transform, Repeat):
        return Repeat(jtu.tree_map(lambda x: x[:k] if eqx.is_array(x) else x, transform.layers))
    return transform.between(0, k) or Chain(transform.steps()[:k])


def _last_steps(transform: AbstractTransform, k: int) -> list[AbstractTransform]:
    """The last k steps, in the order they are applied, as few transforms as possible."""
    if k == len(step_names(transform)):
        return [transform]
    if isinstance(transform, Repeat):
        tail = jtu.tree_map(lambda x: x[-k:] if eqx.is_array(x) else x, transform.layers)
        return [Repeat(tail)]
    if isinstance(transform, Invert):
        return [Invert(first_steps(transform.bijection, k))]
    total = len(step_names(transform))
    whole = transform.between(total - k, total) if 0 < k < total else None
    if whole is not None:
        return [whole]
    parts = transform.parts if isinstance(transform, Chain) else transform.steps()
    kept: list[AbstractTransform] = []
    for part in reversed(parts):
        n = min(k, len(step_names(part)))
        if n:
            kept = _last_steps(part, n) + kept
        k -= n
    return kept


def _walk_repeat(transform, direction, x, condition, key):
    dynamic, static = eqx.partition(transform.layers, eqx.is_array)
    keys = None if key is None else jr.split(key, transform.length)

    def body(x, step):
        part, layer_key = step
        y, log_det = call(eqx.combine(part, static), direction, x, condition, key=layer_key)
        return y, (y, log_det)

    reverse = direction == "inverse"
    _, (points, log_dets) = lax.scan(body, x, (dynamic, keys), reverse=reverse)
    order = range(transform.length)[:: -1 if reverse else 1]
    return [points[i] for i in order], [log_dets[i] for i in order]
