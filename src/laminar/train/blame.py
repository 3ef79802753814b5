"""Which layer and which rows made a step non-finite."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from laminar._params import Frozen
from laminar._typing import Array, Condition, PRNGKeyArray, PyTree
from laminar.bijections.base import call
from laminar.flow import Flow
from laminar.objectives import Batch
from laminar.train.state import Objective

_DRAWS = 256


class Blame(NamedTuple):
    """A finding: the part in words, and the positions in the batch of the rows, None for all."""

    part: str
    rows: np.ndarray | None


def find_blame(
    flow: Any, batch: Batch, key: PRNGKeyArray, objective: Objective, spec: PyTree
) -> Blame:
    """Look for the origin of a non-finite loss or gradient.

    First the flow is walked from the data to the latent side (without data, draws the other way),
    one step after the other, and the first one that gives anything non-finite is named; then the
    base; then the objective. If every value is finite the gradient is to blame, and the parameters
    with a non-finite gradient are named, with the rows whose own gradient is not finite.

    Args:
        flow: The flow as it was when the step failed.
        batch: The offending batch.
        key: The key of that step.
        objective: The objective.
        spec: Which leaves are trained.
    """
    batch = jtu.tree_map(jnp.asarray, batch)
    found = _walk_draws(flow, key) if batch.x is None else _walk(flow, batch)
    if found is not None:
        return found
    params, rest = eqx.partition(flow, spec)

    def loss_of(params, batch):
        return objective(eqx.combine(params, rest), batch, key)[0]

    @eqx.filter_jit
    def measure(params, batch):
        loss, grads = eqx.filter_value_and_grad(loss_of)(params, batch)
        return loss, jtu.tree_map(lambda g: jnp.isfinite(g).all(), grads)

    loss, sound = measure(params, batch)
    if not bool(jnp.isfinite(loss)):
        return Blame("the loss itself, while every layer is finite", None)
    paths = [p for p, ok in jtu.tree_leaves_with_path(sound) if not bool(ok)]
    if not paths:
        return Blame("the optimiser's update, while loss and gradient are finite", None)

    part = f"the gradient of flow{jtu.keystr(paths[0])}"
    if batch.x is None:
        return Blame(part, None)

    @eqx.filter_jit
    def rows_of(params, batch):
        def one(row):
            row = jtu.tree_map(lambda a: a[None], row)
            grads = eqx.filter_grad(loss_of)(params, row)
            return jnp.stack([jnp.isfinite(g).all() for g in jtu.tree_leaves(grads)]).all()

        return jax.lax.map(one, batch)

    rows = np.flatnonzero(~np.asarray(rows_of(params, batch._replace(weights=None))))
    return Blame(part, rows if len(rows) else None)


def _walk(flow: Any, batch: Batch) -> Blame | None:
    """The first part of a flow, from the data inwards, that gives a non-finite value."""
    if not isinstance(flow, Flow):
        return None
    bijection, base = _thaw(flow.bijection), _thaw(flow.base)
    point, condition = jtu.tree_map(lambda a: jnp.moveaxis(a, 0, -1), (batch.x, batch.condition))
    condition = flow._embedded(condition)
    bad = ~_finite_rows(condition, point.shape[-1])
    if bad.any():
        return Blame("the embedding of the condition", np.flatnonzero(bad))
    steps = bijection.steps()
    for number in range(len(steps), 0, -1):
        step = steps[number - 1]
        point, log_det = _invert(step, point, condition)
        bad = ~(_finite_rows(point, point.shape[-1]) & np.isfinite(np.asarray(log_det)))
        if bad.any():
            return Blame(f"step {number} of {len(steps)} ({step.name})", np.flatnonzero(bad))
    bad = ~np.isfinite(np.asarray(eqx.filter_jit(base._log_prob)(point, condition)))
    if bad.any():
        return Blame(f"the base ({type(base).__name__})", np.flatnonzero(bad))
    return None


def _walk_draws(flow: Any, key: PRNGKeyArray) -> Blame | None:
    """The first part of a flow, from the base outwards, that gives a non-finite value."""
    if not isinstance(flow, Flow):
        return None
    point = eqx.filter_jit(_thaw(flow.base)._sample)(key, (_DRAWS,))
    steps = _thaw(flow.bijection).steps()
    if not _finite_rows(point, _DRAWS).all():
        return Blame(f"the base ({type(_thaw(flow.base)).__name__})", None)
    for number, step in enumerate(steps, 1):
        point, log_det = _apply(step, point)
        if not (_finite_rows(point, _DRAWS) & np.isfinite(np.asarray(log_det))).all():
            return Blame(f"step {number} of {len(steps)} ({step.name})", None)
    return None


@eqx.filter_jit
def _apply(step: Any, point: Array) -> tuple[Array, Array]:
    return call(step, "forward", point, None, key=jr.key(0))


@eqx.filter_jit
def _invert(step: Any, point: Array, condition: Condition) -> tuple[Array, Array]:
    return call(step, "inverse", point, condition, key=jr.key(0))


def _thaw(part: Any) -> Any:
    return part.value if isinstance(part, Frozen) else part


def _finite_rows(tree: PyTree, count: int) -> np.ndarray:
    """Which of `count` rows, along the last axis of all arrays of a tree, are finite throughout."""
    sound = np.ones(count, bool)
    for leaf in jtu.tree_leaves(tree):
        sound &= np.isfinite(np.asarray(leaf)).reshape(-1, count).all(0)
    return sound
