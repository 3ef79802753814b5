"""What training minimises: functions ``(flow, batch, key) -> (loss, aux)``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from laminar._errors import InputError, ShapeError
from laminar._typing import Array, Callable, PRNGKeyArray, Shape
from laminar.density import AbstractDistribution


class Batch(NamedTuple):
    """Rows of data, batch-first.

    Attributes:
        x: Events, ``(N, *shape)``.
        condition: One condition for each row, ``(N, *cond_shape)`` (or a tree of such), or None.
        weights: Non-negative sample weights, ``(N,)``, or None for equal ones.
    """

    x: Array
    condition: Any = None
    weights: Array | None = None


def nll(
    flow: AbstractDistribution, batch: Batch, key: PRNGKeyArray | None = None
) -> tuple[Array, dict[str, Array]]:
    """Weighted negative log-likelihood, −Σ w_i ln p(x_i | c_i) / Σ w_i.

    Rows of weight zero are left out whatever their density is, so they may serve as padding.

    Args:
        flow: Any distribution.
        batch: The rows.
        key: Used only where the log-density is estimated.

    Returns:
        The loss, and ``{"log_prob": weighted mean log-likelihood, "weight": Σ w_i}``: means over
        several batches combine by their weights.

    Raises:
        ShapeError: If the batch does not fit the flow.
    """
    x, rows = flow._check_event(batch.x, flow.shape, "x")
    if len(rows) != 1:
        raise ShapeError(f"nll: x has batch axes {rows}, but a batch has exactly one.")
    if batch.weights is not None:
        if batch.weights.shape != rows:
            raise ShapeError(f"nll: weights have shape {batch.weights.shape}, the batch {rows}.")
        x = _blank(jnp.asarray(batch.weights) > 0, x, 0)
    inner, condition = _encode(flow, batch.condition, rows, batch.weights)
    log_p = inner._log_prob(jnp.moveaxis(x, 0, -1), condition, key=key)
    if batch.weights is None:
        mean, total = log_p.mean(), jnp.asarray(log_p.size, log_p.dtype)
    else:
        weights = jnp.asarray(batch.weights, log_p.dtype)
        total = weights.sum()
        used = jnp.where(weights > 0, log_p, 0)
        # A batch of padding alone has mean zero and weight zero.
        mean = (weights * used).sum() / jnp.where(total > 0, total, 1)
    return -mean, {"log_prob": mean, "weight": total}


def reverse_kl(
    log_density: Callable[[Array], Array], samples: int = 256
) -> Callable[[AbstractDistribution, Batch | None, PRNGKeyArray], tuple[Array, dict[str, Array]]]:
    """An objective for variational inference: KL(q ‖ p) up to the constant ln ∫ p.

        loss = E_q[ln q(x) − ln p(x)], by reparametrised draws (Rezende & Mohamed 2015, eq. 15)

    Args:
        log_density: The unnormalised ln p of one event, of shape ``()``.
        samples: Draws for each step.

    Returns:
        An objective; it ignores its batch, and its ``aux`` holds ``{"elbo": −loss}``.
    """

    def objective(flow: AbstractDistribution, batch: Batch | None, key: PRNGKeyArray):
        if flow.cond_shape is not None:
            raise InputError(
                f"reverse_kl: {flow.name} takes a condition of shape {flow.cond_shape}, and the "
                "target has none; use an unconditional flow."
            )
        x, log_q = flow._sample_and_log_prob(key, (samples,))
        log_p = jax.vmap(log_density, in_axes=-1)(x)
        loss = (log_q - log_p).mean()
        return loss, {"elbo": -loss}

    return objective


def _blank(used: Array, values: Array, axis: int) -> Array:
    """Zeros in the rows that do not count, so that what stands there reaches no gradient."""
    shape = [1] * values.ndim
    shape[axis] = used.size
    return jnp.where(used.reshape(shape), values, jnp.zeros((), values.dtype))


def _encode(flow: AbstractDistribution, condition: Any, rows: Shape, weights: Array | None):
    """The inner distribution and its batch-last (or shared) condition."""
    condition, batch = flow._check_condition(condition)
    if batch not in ((), rows):
        raise ShapeError(f"nll: x has batch axes {rows}, its condition {batch}.")
    if batch and weights is not None:
        used = jnp.asarray(weights) > 0
        condition = jtu.tree_map(lambda leaf: _blank(used, leaf, 0), condition)
    inner, condition = flow._encode(condition, batch, max(1, *rows))
    if condition is not None and batch:
        condition = jnp.moveaxis(condition, 0, -1)
    return inner, condition
