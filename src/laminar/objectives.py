"""What training minimises: functions ``(flow, batch, key) -> (loss, aux)``.

An objective with a keyword ``step`` is given the number of the step by training, and None where
losses are compared, as in validation: whatever it anneals is then at its end.
"""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax

from laminar._checks import check_sizes
from laminar._errors import InputError, ShapeError
from laminar._params import Frozen
from laminar._typing import Array, Callable, PRNGKeyArray, Shape
from laminar.density import AbstractDistribution
from laminar.mixed import WITHHELD

Annealing = Callable[[Array], Array]


class Batch(NamedTuple):
    """Rows of data, batch-first.

    Attributes:
        x: Events, ``(N, *shape)``; None in training without data.
        condition: One condition for each row, ``(N, *cond_shape)`` (or a tree of such), or None.
        weights: Non-negative sample weights, ``(N,)``, or None for equal ones.
    """

    x: Any
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
    inner, x, condition = take_rows("nll", flow, batch)
    mean, total = weighted_mean(inner._log_prob(x, condition, key=key), batch.weights)
    return -mean, {"log_prob": mean, "weight": total}


class WithheldNLL(eqx.Module):
    """`nll` of mixed rows some of whose cells are withheld, so that the law of any is learned.

    Half of the rows are as they are. Of each other row a share of the cells, itself uniform on
    (0, 1), is withheld at random; see `laminar.mixed`. Where losses are compared, nothing is.

    Args:
        share: Of the rows from which cells are withheld.
    """

    share: float = eqx.field(static=True, default=0.5)

    def __call__(self, flow: AbstractDistribution, batch: Batch, key: PRNGKeyArray, *, step=None):
        """The loss and what `nll` gives beside it."""
        if step is None:
            return nll(flow, batch, key)
        rows_key, share_key, cell_key, key = jr.split(key, 4)
        x = jnp.asarray(batch.x, flow.dtype)
        count = (x.shape[0], 1)
        share = jnp.where(
            jr.bernoulli(rows_key, self.share, count), jr.uniform(share_key, count), 0
        )
        gone = jr.uniform(cell_key, (x.shape[0], x.shape[2])) < share
        state = jnp.where(gone, WITHHELD, x[:, 1])
        return nll(flow, batch._replace(x=x.at[:, 1].set(state)), key)


def take_rows(
    owner: str, flow: AbstractDistribution, batch: Batch
) -> tuple[AbstractDistribution, Array, Array | None]:
    """Check a batch and encode its conditions.

    Args:
        owner: The objective, for messages.
        flow: The distribution.
        batch: The rows; what stands in those of weight zero reaches no gradient.

    Returns:
        The distribution that takes encoded conditions, events with the batch last, and their
        conditions likewise, or one shared by all, or None.

    Raises:
        ShapeError: If the batch does not fit the flow.
    """
    x, rows = flow._check_event(batch.x, flow.shape, "x")
    if len(rows) != 1:
        raise ShapeError(f"{owner}: x has batch axes {rows}, but a batch has exactly one.")
    if batch.weights is not None:
        if batch.weights.shape != rows:
            raise ShapeError(
                f"{owner}: weights have shape {batch.weights.shape}, the batch {rows}."
            )
        x = _blank(jnp.asarray(batch.weights) > 0, x, 0)
    inner, condition = _encode(owner, flow, batch.condition, rows, batch.weights)
    return inner, jnp.moveaxis(x, 0, -1), condition


def weighted_mean(values: Array, weights: Array | None) -> tuple[Array, Array]:
    """Σ w_i v_i / Σ w_i and Σ w_i; values of weight zero do not count, whatever they are."""
    if weights is None:
        return values.mean(), jnp.asarray(values.size, values.dtype)
    weights = jnp.asarray(weights, values.dtype)
    total = weights.sum()
    used = jnp.where(weights > 0, values, 0)
    # A batch of padding alone has mean zero and weight zero.
    return (weights * used).sum() / jnp.where(total > 0, total, 1), total


def linear_annealing(start: float = 0.01, over: int = 10_000) -> Annealing:
    """The inverse temperature β_t = min(1, start + t / over) of Rezende & Mohamed (2015, §6.2)."""
    _check_annealing(start, over)
    return functools.partial(_linear, start, over)


def geometric_annealing(start: float = 0.01, over: int = 10_000) -> Annealing:
    """The inverse temperature β_t = start^max(0, 1 − t / over): equal ratios up to one."""
    _check_annealing(start, over)
    return functools.partial(_geometric, start, over)


def reverse_kl(
    log_density: Callable[[Array], Array],
    samples: int = 256,
    *,
    path_gradient: bool | None = None,
    anneal: Annealing | None = None,
) -> "ReverseKL":
    """An objective for variational inference, the flow free energy: KL(q ‖ p) up to ln ∫ p.

        loss_t = E_q[ln q(x) − β_t ln p(x)], by reparametrised draws (Rezende & Mohamed 2015,
        eqs. 15 and 20)

    Args:
        log_density: The unnormalised ln p of one event, of shape ``()``.
        samples: Draws for each step.
        path_gradient: Leave out the score E_q[∂_θ ln q_θ], which is zero on average, so that the
            gradient has no variance where q equals p ("sticking the landing", Roeder et al. 2017).
            It costs the inverse of the draws. None does so where the density is exact.
        anneal: The inverse temperature β as a function of the step, such as `linear_annealing()`;
            validation always has β = 1.

    The weights of a mixture do not learn from draws, of which each belongs to one component; train
    components apart and weigh them by their evidence, as `laminar.inference` does.

    Returns:
        An objective; it ignores its batch, so `fit` takes None for data. Its ``aux`` holds
        ``{"elbo": E_q[ln p − ln q]}``.
    """
    check_sizes("reverse_kl", samples=samples)
    return ReverseKL(log_density, samples, path_gradient, anneal)


class ReverseKL(eqx.Module):
    """The objective that `reverse_kl` makes."""

    log_density: Callable[[Array], Array]
    samples: int
    path_gradient: bool | None
    anneal: Annealing | None

    def __call__(
        self,
        flow: AbstractDistribution,
        batch: Batch | None,
        key: PRNGKeyArray,
        *,
        step: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of fresh draws, and the bound at β = 1."""
        x, log_q = _draw("reverse_kl", flow, key, (self.samples,), self.path_gradient)
        log_p = _log_densities(self.log_density, x, 1)
        elbo = (log_p - log_q).mean()
        if self.anneal is None or step is None:
            return -elbo, {"elbo": elbo}
        beta = jnp.asarray(self.anneal(step)).astype(log_p.dtype)
        return (log_q - beta * log_p).mean(), {"elbo": elbo}


def importance_weighted(
    log_density: Callable[[Array], Array],
    samples: int = 32,
    particles: int = 8,
    *,
    path_gradient: bool | None = None,
) -> "ImportanceWeighted":
    """The importance-weighted bound on ln ∫ p (Burda et al. 2016), to be made as high as it goes.

        loss = −E[ln (1/K) Σ_k w_k],    w_k = p(x_k) / q(x_k),    x_1, …, x_K ~ q

    Args:
        log_density: The unnormalised ln p of one event, of shape ``()``.
        samples: Independent bounds averaged in each step.
        particles: Draws K in each bound.
        path_gradient: Use the doubly reparametrised gradient (Tucker et al. 2019), whose signal
            does not drown in noise as K grows. None does so where the density is exact.

    Returns:
        An objective; it ignores its batch, and its ``aux`` holds ``{"bound": −loss}``.
    """
    check_sizes("importance_weighted", samples=samples, particles=particles)
    return ImportanceWeighted(log_density, samples, particles, path_gradient)


class ImportanceWeighted(eqx.Module):
    """The objective that `importance_weighted` makes."""

    log_density: Callable[[Array], Array]
    samples: int
    particles: int
    path_gradient: bool | None

    def __call__(
        self, flow: AbstractDistribution, batch: Batch | None, key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        """The negative bound of fresh draws."""
        shape = (self.particles, self.samples)
        x, log_q = _draw("importance_weighted", flow, key, shape, self.path_gradient)
        log_w = _log_densities(self.log_density, x, 2) - log_q
        bound = (jax.nn.logsumexp(log_w, axis=0) - math.log(self.particles)).mean()
        if _by_path(flow, self.path_gradient):
            share = lax.stop_gradient(jax.nn.softmax(log_w, axis=0))
            # A particle outside the support has no share, and its logarithm no place in a sum.
            signal = (share**2 * jnp.where(share > 0, log_w, 0)).sum(0).mean()
            # The value of the bound with the gradient of the signal.
            bound = lax.stop_gradient(bound - signal) + signal
        return -bound, {"bound": bound}


def forward_kl(
    log_density: Callable[[Array], Array],
    samples: int = 256,
    *,
    proposal: AbstractDistribution | None = None,
) -> "ForwardKL":
    """KL(p ‖ q) up to the entropy of p, by self-normalised importance sampling.

        loss = −Σ_i w̄_i ln q(x_i),    w̄_i ∝ p(x_i) / r(x_i),    x_i ~ r

    Unlike the reverse divergence it punishes a q narrower than p, so it suits as a refinement after
    `reverse_kl`. Weights above √S times their mean are cut (Ionides 2008), which bounds the
    variance of a step for a bias that vanishes as S grows.

    Args:
        log_density: The unnormalised ln p of one event, of shape ``()``.
        samples: Draws S for each step.
        proposal: The density r; by default the flow itself as it stands.

    Returns:
        An objective; it ignores its batch, and its ``aux`` holds the effective sample size as a
        fraction, ``{"ess": 1 / (S Σ w̄_i²)}``.
    """
    check_sizes("forward_kl", samples=samples)
    return ForwardKL(log_density, samples, None if proposal is None else Frozen(proposal))


class ForwardKL(eqx.Module):
    """The objective that `forward_kl` makes."""

    log_density: Callable[[Array], Array]
    samples: int
    proposal: Frozen[AbstractDistribution] | None

    def __call__(
        self, flow: AbstractDistribution, batch: Batch | None, key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        """The weighted negative log-likelihood of fresh draws."""
        _refuse_condition("forward_kl", flow)
        source = Frozen(flow) if self.proposal is None else self.proposal
        x, log_r = source.value._sample_and_log_prob(key, (self.samples,))
        x, log_r = lax.stop_gradient((x, log_r))
        log_w = lax.stop_gradient(_log_densities(self.log_density, x, 1)) - log_r
        total = jax.nn.logsumexp(log_w)
        log_w = jnp.minimum(log_w - total, -0.5 * math.log(self.samples))
        weights = jax.nn.softmax(log_w)
        log_q = flow._log_prob(x)
        # Where p is zero, so is the weight, whatever ln q is there.
        loss = -jnp.where(weights > 0, weights * log_q, 0).sum()
        return loss, {"ess": 1 / (self.samples * (weights**2).sum())}


def _linear(start: float, over: int, step: Array) -> Array:
    return jnp.minimum(1.0, start + step.astype(jnp.float32) / over)


def _geometric(start: float, over: int, step: Array) -> Array:
    left = jnp.maximum(0.0, 1 - step.astype(jnp.float32) / over)
    return jnp.exp(left * math.log(start))


def _check_annealing(start: float, over: int) -> None:
    if not (0 < start <= 1 and over >= 1):
        raise InputError(
            f"annealing starts at {start} and takes {over} steps; give a number in (0, 1] and at "
            "least one step."
        )


def _refuse_condition(owner: str, flow: AbstractDistribution) -> None:
    if flow.cond_shape is not None:
        raise InputError(
            f"{owner}: {flow.name} takes a condition of shape {flow.cond_shape}, and the target "
            "has none; use an unconditional flow."
        )


def _by_path(flow: AbstractDistribution, wanted: bool | None) -> bool:
    return flow.exactness == "exact" if wanted is None else wanted


def _draw(owner: str, flow: AbstractDistribution, key, batch: Shape, path: bool | None):
    """Batch-last draws and their log-densities, whose gradient takes the path alone if wanted."""
    _refuse_condition(owner, flow)
    if not _by_path(flow, path):
        return flow._sample_and_log_prob(key, batch)
    if flow.exactness != "exact":
        raise InputError(
            f"{owner}: the density of {flow.name} is estimated, which a path gradient cannot use; "
            "give path_gradient=False."
        )
    x = flow._sample(key, batch)
    return x, Frozen(flow).value._log_prob(x)


def _log_densities(log_density: Callable[[Array], Array], x: Array, axes: int) -> Array:
    """The target's log-density of batch-last events."""
    for _ in range(axes):
        log_density = jax.vmap(log_density, in_axes=-1, out_axes=-1)
    return log_density(x)


def _blank(used: Array, values: Array, axis: int) -> Array:
    """Zeros in the rows that do not count, so that what stands there reaches no gradient."""
    shape = [1] * values.ndim
    shape[axis] = used.size
    return jnp.where(used.reshape(shape), values, jnp.zeros((), values.dtype))


def _encode(
    owner: str, flow: AbstractDistribution, condition: Any, rows: Shape, weights: Array | None
):
    """The inner distribution and its batch-last (or shared) condition."""
    condition, batch = flow._check_condition(condition)
    if batch not in ((), rows):
        raise ShapeError(f"{owner}: x has batch axes {rows}, its condition {batch}.")
    if batch and weights is not None:
        used = jnp.asarray(weights) > 0
        condition = jtu.tree_map(lambda leaf: _blank(used, leaf, 0), condition)
    inner, condition = flow._encode(condition, batch, max(1, *rows))
    if condition is not None and batch:
        condition = jnp.moveaxis(condition, 0, -1)
    return inner, condition
