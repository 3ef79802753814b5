"""Whether a log-det or a density that is estimated keeps to its label, by statistics.

Numbers are z-scores: 5.5 standard errors are exceeded by chance once in 25 million comparisons of
normal means, and a check makes a few hundred.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._typing import Array, Condition, Direction, PRNGKeyArray
from laminar.bijections.base import AbstractTransform, call
from laminar.density import AbstractDistribution
from laminar.diagnose import integrate
from laminar.diagnose.integrate import Scale

Z_SCORE = 5.5
KEYS = 400
_BOUND_KEYS = 16
_BOUND_ROWS = 4000
_MAX_KERNEL = 12


class Bias(NamedTuple):
    """How far the mean of an estimate is from the truth at some points.

    Attributes:
        gap: The mean over keys minus the truth.
        error: Its standard error.
    """

    gap: np.ndarray
    error: np.ndarray

    def score(self, allowed: np.ndarray | float) -> float:
        """The worst gap beyond what is allowed, in standard errors; NaN if there is one."""
        beyond = np.abs(self.gap) - allowed
        score = np.where(beyond > 0, beyond / np.maximum(self.error, 1e-300), 0)
        return float(np.where(np.isnan(beyond), np.nan, score).max())


@eqx.filter_jit
def _log_dets(transform, direction, x, condition, keys):
    def one(key):
        return call(transform, direction, x, condition, key=key)[1]

    return jax.vmap(one)(keys)


def bias(
    transform: AbstractTransform,
    direction: Direction,
    x: Array,
    condition: Condition,
    truth: np.ndarray,
    key: PRNGKeyArray,
) -> Bias:
    """Compare the log-dets under many keys with the Jacobian's, at batch-last points."""
    found = np.asarray(_log_dets(transform, direction, x, condition, jr.split(key, KEYS)), float)
    return Bias(found.mean(0) - truth, found.std(0, ddof=1) / np.sqrt(len(found)))


@eqx.filter_jit
def _mean_bound(flow, x, condition, keys):
    def one(key):
        return flow.log_prob(x, condition, key=key)

    return jax.vmap(one)(keys).mean(0)


def overstatement(
    flow: AbstractDistribution,
    condition: Condition,
    samples: np.ndarray,
    rng: np.random.Generator,
    key: PRNGKeyArray,
) -> tuple[float, str]:
    """By how many standard errors a lower bound on ln p gives more mass than samples have.

        ∫ φ(x) exp(E ln p̂(x)) dx ≤ E_p φ(x)

    for every φ ≥ 0. Tried are φ = 1, where the right side is one, and sigmoids of every coordinate
    and of its distance from the centre. The mean over a few keys stands for E ln p̂; if exp of the
    bound is an unbiased estimate of p, then so that the left side is never overestimated.

    Args:
        flow: The distribution.
        condition: One condition, or None.
        samples: Draws from it, flattened, ``(N, D)``.
        rng: Draws from the proposal of the integral.
        key: For the bound.

    Returns:
        The worst score, NaN where no proposal is close enough, and what the integral is.
    """
    dim = samples.shape[1]
    scale = Scale.of(samples)
    near = dim <= _MAX_KERNEL
    proposal = integrate.kernels(rng, samples) if near else integrate.fitted(samples)
    x = proposal.draw(rng, _BOUND_ROWS)
    points = jnp.asarray(x, flow.dtype).reshape((-1, *flow.shape))
    log_p = np.asarray(_mean_bound(flow, points, condition, jr.split(key, _BOUND_KEYS)), float)
    with np.errstate(over="ignore"):
        weight = np.exp(log_p - proposal.log_density(x))
    terms = weight[:, None] * _positive(scale, x)
    theirs = _positive(scale, samples)
    mass, share = terms.mean(0), theirs.mean(0)
    variance = terms.var(0, ddof=1) / len(terms) + theirs.var(0, ddof=1) / len(theirs)
    error = float(weight.std(ddof=1) / np.sqrt(len(weight)))
    if not np.isnan(mass[0]) and not (mass[0] > 0 and error < 0.1 * mass[0]):
        return np.nan, f"no proposal is close enough in {dim} dimensions"
    # Float32 leaves something that more draws would not remove.
    score = (mass - share - 2e-3) / np.sqrt(variance + 1e-12)
    worst = float(np.max(np.where(np.isnan(score), np.inf, score)))
    return worst, f"its integral is {mass[0]:.3f} ± {error:.3f}"


def _positive(scale: Scale, x: np.ndarray) -> np.ndarray:
    """One, and sigmoids from both sides of each standardised coordinate and of its absolute."""
    u = np.clip((x - scale.centre) / scale.spread, -30, 30)
    sides = np.tanh(np.concatenate([u, np.abs(u) - 1], axis=1))
    return np.concatenate([np.ones((len(x), 1)), (1 + sides) / 2, (1 - sides) / 2], axis=1)
