"""Whether walks that keep the target stay where an approximation says that it is.

Weights see only where the approximation has draws. Chains of a Metropolis algorithm that begin at
the weighted draws go farther: if these follow the target, so do the chains at every later time,
and nothing changes on average; if the approximation is too narrow, they leave it.
"""

import dataclasses
import math

import numpy as np

from laminar._typing import PRNGKeyArray
from laminar.density import AbstractDistribution
from laminar.inference.evaluate import approximate_log_prob, log_densities
from laminar.inference.target import Target
from laminar.inference.warmstart import MOST_DENSE, generator

_CHAINS, _STEPS = 1_024, 32
_FEW_CHAINS, _MANY_STEPS = 128, 96
_BEST = 2.38
"""Steps of this over √D deviations mix fastest (Roberts, Gelman & Gilks 1997)."""
_GAIN, _SPREAD = 0.1, 0.1
_MOST_LACKING = 50.0
_FEWEST_TAKEN = 0.01


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far chains of the target went from the weighted draws that they began at.

    Attributes:
        gain: The rise of the mean of ln p̃ − ln q over the chains, in nats.
        gain_error: Its standard error.
        spread: The largest ratio of a coordinate's deviation at the end to that at the start.
        spread_error: Its standard error.
        taken: The share of steps that were taken.
    """

    gain: float
    gain_error: float
    spread: float
    spread_error: float
    taken: float = 1.0

    @property
    def significant(self) -> bool:
        """Whether they left, by more than chance."""
        gained = self.gain > _GAIN + 4 * self.gain_error
        return gained or self.spread - 1 > _SPREAD + 4 * self.spread_error

    @property
    def stuck(self) -> bool:
        """Whether chains hardly moved, and so say nothing."""
        return self.taken < _FEWEST_TAKEN


NO_DRIFT = Drift(0.0, 0.0, 1.0, 0.0)


def find_drift(
    key: PRNGKeyArray,
    approximation: AbstractDistribution,
    target: Target,
    z: np.ndarray,
    log_p: np.ndarray,
    weights: np.ndarray,
    log_evidence: float,
) -> Drift:
    """Walk from weighted draws, and compare where the walks end with where they began.

    Args:
        key: Chooses the starts and makes the steps.
        approximation: Its density is what the target's is compared with.
        target: What the chains keep.
        z: Draws, ``(N, D)``.
        log_p: The target's log density there, ``(N,)``.
        weights: Normalised weights, ``(N,)``.
        log_evidence: An estimate of ln ∫ p̃.
    """
    alive = weights > 0
    z, log_p, weights = z[alive].astype(np.float64), log_p[alive], weights[alive]
    if len(z) < 2:
        return NO_DRIFT
    noise = generator(key)
    chosen = noise.choice(len(z), _CHAINS, p=weights / weights.sum())
    start = z[chosen]
    end, height, taken = _walk(noise, target, start, log_p[chosen], _factor(z, weights), _STEPS)

    def lacking(at: np.ndarray, log_p: np.ndarray) -> np.ndarray:
        # The same function at both ends: its mean rises only where chains have gone.
        return _lacking(approximation, at, log_p, log_evidence)

    change = lacking(end, height) - lacking(start, log_p[chosen])
    wide, width = end.std(0), start.std(0)
    ratios = np.where(width > 0, wide / np.where(width > 0, width, 1), 1)
    worst = int(np.argmax(ratios))
    u = (end[:, worst] - end[:, worst].mean()) / max(wide[worst], np.finfo(float).tiny)
    return Drift(
        float(change.mean()),
        float(change.std() / math.sqrt(_CHAINS)),
        float(ratios[worst]),
        # Of the end beside the start, as if they were independent.
        float(np.sqrt(2 * max((u**4).mean() - 1, 0) / (4 * _CHAINS)) * ratios[worst]),
        taken,
    )


def lack_beyond(
    key: PRNGKeyArray,
    approximation: AbstractDistribution,
    target: Target,
    z: np.ndarray,
    log_p: np.ndarray,
    weights: np.ndarray,
    factor: np.ndarray,
    log_evidence: float,
) -> float:
    """The mean of ln p̃ − ln q − ln Z where walks from somewhere end, in nats.

    A mode that an approximation has lost holds its chains. The tail of what it covers does not:
    they soon are where there is more of the target, and where the approximation is.

    Args:
        key: Chooses the starts and makes the steps.
        approximation: Its density is what the target's is compared with.
        target: What the chains keep.
        z: Points, ``(N, D)``.
        log_p: The target's log density there, ``(N,)``.
        weights: What starts are chosen by, ``(N,)``.
        factor: Of the covariance of the steps, or deviations.
        log_evidence: An estimate of ln ∫ p̃.
    """
    noise = generator(key)
    chosen = noise.choice(len(z), _FEW_CHAINS, p=weights / weights.sum())
    end, height, _ = _walk(noise, target, z[chosen], log_p[chosen], factor, _MANY_STEPS)
    return float(_lacking(approximation, end, height, log_evidence).mean())


def _walk(
    noise: np.random.Generator,
    target: Target,
    start: np.ndarray,
    log_p: np.ndarray,
    factor: np.ndarray,
    count: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Where Metropolis chains end, the log density there, and the share of steps taken."""
    end, height = start.astype(np.float64), log_p.astype(np.float64)
    chains, dim = end.shape
    moves = 0
    for _ in range(count):
        steps = noise.standard_normal((chains, dim))
        steps *= _BEST / math.sqrt(dim) * noise.choice([0.25, 1.0], (chains, 1))
        new = end + (steps @ factor.T if factor.ndim == 2 else steps * factor)
        new_height = log_densities(target.log_density, new, target.dtype)
        # Comparisons with NaN are false, so a failure of the density is never walked into.
        taken = np.log(noise.random(chains)) < new_height - height
        end[taken], height[taken] = new[taken], new_height[taken]
        moves += int(taken.sum())
    return end, height, moves / (chains * count)


def _lacking(
    approximation: AbstractDistribution, at: np.ndarray, log_p: np.ndarray, log_evidence: float
) -> np.ndarray:
    """Ln p̃ − ln q − ln Z, bounded: without density, or where its inverse fails, all is lacking."""
    ratio = log_p - approximate_log_prob(approximation, at) - log_evidence
    return np.minimum(np.where(np.isnan(ratio), np.inf, ratio), _MOST_LACKING)


def _factor(z: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A factor of the weighted covariance, or the deviations where it is not definite."""
    weights = weights / weights.sum()
    centred = z - weights @ z
    if z.shape[1] <= MOST_DENSE:
        try:
            return np.linalg.cholesky((centred * weights[:, None]).T @ centred)
        except np.linalg.LinAlgError:
            pass
    return np.sqrt(weights @ np.square(centred))
