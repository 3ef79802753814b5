"""What training minimises: functions ``(flow, batch, key) -> (loss, aux)``."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu

from laminar._errors import ShapeError
from laminar._typing import Array, PRNGKeyArray
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
    """
    x = jnp.moveaxis(jnp.asarray(batch.x, flow.dtype), 0, -1)
    condition = jtu.tree_map(lambda c: jnp.moveaxis(c, 0, -1), batch.condition)
    log_p = flow._log_prob(x, condition, key=key)
    if batch.weights is None:
        mean, total = log_p.mean(), jnp.asarray(log_p.size, log_p.dtype)
    else:
        if batch.weights.shape != log_p.shape:
            raise ShapeError(
                f"nll: weights have shape {batch.weights.shape}, the batch has {log_p.shape}."
            )
        weights = jnp.asarray(batch.weights, log_p.dtype)
        total = weights.sum()
        used = jnp.where(weights > 0, log_p, 0)
        # A batch of padding alone has mean zero and weight zero.
        mean = (weights * used).sum() / jnp.where(total > 0, total, 1)
    return -mean, {"log_prob": mean, "weight": total}
