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
def _bounds(flow, x, condition, keys):
    def one(key):
        return flow.log_prob(x, condition, key=key)

    return jax.vmap(one)(keys)


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
    bound is an unbiased estimate of p, then so that the left side is never overestimated. Where all
    samples are whole numbers, p is a probability and the integral a sum.

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
    x, log_g, every = _places(samples, rng)
    points = jnp.asarray(x, flow.dtype).reshape((-1, *flow.shape))
    found = np.asarray(_bounds(flow, points, condition, jr.split(key, _BOUND_KEYS)), float)
    log_p = found.mean(0)
    with np.errstate(over="ignore", invalid="ignore"):
        weight = np.exp(log_p - log_g)
        noise = np.where(np.isfinite(log_p), found.std(0, ddof=1), 0) / np.sqrt(_BOUND_KEYS)
    terms, theirs = weight[:, None] * _positive(scale, x), _positive(scale, samples)
    mass, share = terms.mean(0), theirs.mean(0)
    # Draws from a proposal vary among themselves; where every place is taken, only keys do.
    spread = ((terms * noise[:, None]) ** 2).mean(0) if every else terms.var(0, ddof=1)
    variance = spread / len(terms)
    error = float(np.sqrt(variance[0]))
    if not np.isnan(mass[0]) and not (mass[0] > 0 and error < 0.1 * mass[0]):
        return np.nan, f"no proposal is close enough in {dim} dimensions"
    # Float32 leaves something that more draws would not remove.
    variance = variance + theirs.var(0, ddof=1) / len(theirs) + 1e-12
    score = (mass - share - 2e-3) / np.sqrt(variance)
    worst = float(np.max(np.where(np.isnan(score), np.inf, score)))
    return worst, f"its integral is {mass[0]:.3f} ± {error:.3f}"


def _places(
    samples: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | float, bool]:
    """Points, the log-density they are drawn with, and whether they are all there are."""
    if not (samples == np.round(samples)).all():
        near = samples.shape[1] <= _MAX_KERNEL
        proposal = integrate.kernels(rng, samples) if near else integrate.fitted(samples)
        x = proposal.draw(rng, _BOUND_ROWS)
        return x, proposal.log_density(x), False
    lo, hi = samples.min(0), samples.max(0)
    log_count = float(np.log(hi - lo + 1).sum())
    if every := log_count < np.log(_BOUND_ROWS):
        axes = [np.arange(a, b + 1) for a, b in zip(lo, hi, strict=True)]
        x = np.stack([grid.ravel() for grid in np.meshgrid(*axes, indexing="ij")], 1)
    else:
        x = rng.integers(lo.astype(int), hi.astype(int) + 1, (_BOUND_ROWS, len(lo))).astype(float)
    return x, -log_count, every


def _positive(scale: Scale, x: np.ndarray) -> np.ndarray:
    """One, and sigmoids from both sides of each standardised coordinate and of its absolute."""
    u = np.clip((x - scale.centre) / scale.spread, -30, 30)
    sides = np.tanh(np.concatenate([u, np.abs(u) - 1], axis=1))
    return np.concatenate([np.ones((len(x), 1)), (1 + sides) / 2, (1 - sides) / 2], axis=1)
