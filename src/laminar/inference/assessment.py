"""How good an approximation is: importance weights, what follows from them, and a verdict in words.

All figures come from N draws z_i of the approximation q and their weights w_i = p̃(z_i) / q(z_i).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._errors import InputError
from laminar._params import Frozen
from laminar._typing import Array, PRNGKeyArray
from laminar.bijections.elementwise import Affine
from laminar.density import AbstractDistribution, Estimate
from laminar.flow import Flow
from laminar.inference.arviz import psis
from laminar.inference.evaluate import approximate_log_prob, log_densities
from laminar.inference.target import Target, in_words
from laminar.inference.walk import Drift, lack_beyond
from laminar.inference.warmstart import Gaussians, generator
from laminar.mixtures import Mixture

Grade = Literal["good", "usable after reweighting", "do not trust"]

GOOD, USABLE = 0.5, 0.7
"""Limits of the shape k̂ of the tail of the weights (Vehtari et al. 2024): below the first the
draws can be used as they are, below the second with their weights."""

USABLE_GAP = 0.05
"""Nats of evidence in the tails that an approximation may miss and still be usable."""

_TOLERATED_GAP = 0.01
_CHUNK = 2_000
_LEAST_MASS = math.log(0.005)
_LEAST_UNSURE = -10.0
"""Ln of the least share of the mass, where few draws tell it: they may miss most of it by nats."""
_MISSED, _MOST_LACKING = 3.0, 50.0
_TELLING = 10.0
"""Effective draws at a place below which they do not tell its mass."""
_GRADES: tuple[Grade, ...] = ("good", "usable after reweighting", "do not trust")
_ADVICE = {
    "good": "The flow's own draws can be used as they are.",
    "usable after reweighting": "Use weighted or resampled draws.",
    "do not trust": "Reparametrise (as non-centred), allow more steps, or run NUTS, if need be in "
    "the flow's latent space.",
}
_PROBES = 512
_NAMED = 3  # places that are missed, at most
_LEAST_EFFECTIVE = 200
_SAME_MEAN, _SAME_SPREAD = 0.1, 0.1


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an approximation can be trusted, in words.

    Attributes:
        grade: ``"good"``, ``"usable after reweighting"`` or ``"do not trust"``.
        reasons: Sentences with the figures that decided it.
        caveat: What no figure of the approximation's own draws can show.
    """

    grade: Grade
    reasons: tuple[str, ...]
    caveat: str

    def __str__(self) -> str:
        return " ".join([f"{self.grade[0].upper()}{self.grade[1:]}.", *self.reasons, self.caveat])


@dataclasses.dataclass(frozen=True, eq=False)
class Assessment:
    """Draws of an approximation with their densities, and what their weights say.

    Attributes:
        z: Draws in the unconstrained space, ``(N, D)``.
        log_q: Their log density under the approximation, ``(N,)``.
        log_p: Their log density under the target, unnormalised, ``(N,)``.
    """

    z: np.ndarray
    log_q: np.ndarray
    log_p: np.ndarray

    @property
    def failures(self) -> int:
        """Draws whose log density is NaN or +∞."""
        return int((~self._sound).sum())

    @property
    def _sound(self) -> np.ndarray:
        return ~(np.isnan(self.log_p) | np.isnan(self.log_q) | (self.log_p == np.inf))

    @functools.cached_property
    def log_ratios(self) -> np.ndarray:
        """Ln w_i, ``(N,)``; −∞ for draws outside the support and for those that failed."""
        with np.errstate(invalid="ignore"):
            ratios = self.log_p.astype(np.float64) - self.log_q.astype(np.float64)
        return np.where(self._sound, ratios, -np.inf)

    @functools.cached_property
    def _smoothed(self) -> tuple[np.ndarray, float]:
        alive = np.isfinite(self.log_ratios)
        weights = np.full(len(alive), -np.inf)
        if alive.sum() < 25:
            return weights, math.inf
        if np.ptp(self.log_ratios[alive]) < 1e-3:
            # Equal up to rounding, which has no tail to speak of.
            weights[alive] = -math.log(alive.sum())
            return weights, 0.0
        found, k_hat = psis(self.log_ratios[alive])
        weights[alive] = found
        return weights, float(k_hat)

    @property
    def log_weights(self) -> np.ndarray:
        """Pareto-smoothed, normalised log-weights, ``(N,)`` (Vehtari et al. 2024)."""
        return self._smoothed[0]

    @property
    def weights(self) -> np.ndarray:
        """Pareto-smoothed weights that sum to one, ``(N,)``; zeros where none could be found."""
        return np.exp(self.log_weights)

    @property
    def k_hat(self) -> float:
        """The shape of the tail of the weights: moments below 1/k̂ exist. It is 0 for equal ones."""
        return self._smoothed[1]

    @property
    def ess(self) -> float:
        """The effective sample size 1 / Σ w̄_i², at most N."""
        total = float((self.weights**2).sum())
        return 1 / total if total > 0 else 0.0

    @property
    def elbo(self) -> Estimate:
        """The bound E_q[ln p̃ − ln q] with its standard error, in nats."""
        values = self.log_ratios
        return _estimate(values.mean(), _error(values))

    @property
    def log_evidence(self) -> Estimate:
        """Ln (1/N) Σ w_i, an estimate of ln ∫ p̃, with the standard error by the delta method.

        The error means something only where k̂ is below 0.7.
        """
        top = self.log_ratios.max()
        if not np.isfinite(top):
            return _estimate(top, np.nan)
        scaled = np.exp(self.log_ratios - top)
        value = top + math.log(scaled.mean())
        return _estimate(value, _error(scaled) / scaled.mean())


def _estimate(value: float, error: float) -> Estimate:
    """In double precision on the host: single cannot hold a hundredth of large evidences."""
    return Estimate(*(cast(Array, np.float64(x)) for x in (value, error)))


def _error(values: np.ndarray) -> float:
    if not np.isfinite(values).all():
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def assess(
    key: PRNGKeyArray, approximation: AbstractDistribution, target: Target, n: int
) -> Assessment:
    """Draw n times from an approximation and weigh the draws."""
    size = min(n, _CHUNK)
    keys = [jr.fold_in(key, i) for i in range(-(-n // size))]
    parts = [jax.device_get(_draw(approximation, k, size)) for k in keys]
    z, log_q = (np.concatenate(part)[:n] for part in zip(*parts, strict=True))
    return Assessment(z, log_q, log_densities(target.log_density, z, target.dtype))


def widen(
    approximation: AbstractDistribution, share: float = 0.5, spread: float = 0.8
) -> AbstractDistribution:
    """A mixture of an approximation and of the same with its latent draws spread wider.

    Its draws reach into the tails that the approximation's own draws hardly see. As a proposal it
    bounds the weights there (a defensive mixture, Owen & Zhou 2000).

    Args:
        approximation: A flow, or a mixture of flows.
        share: The weight of the wider part.
        spread: Its latent draws are 1 + spread / √D times as far out.
    """
    if isinstance(approximation, Mixture):
        parts = [widen(part, share, spread) for part in approximation.parts()]
        return Mixture(parts, approximation.logits)
    if not isinstance(approximation, Flow):
        raise TypeError(f"cannot widen {approximation.name}")
    return Flow(_widened(approximation, share, spread), approximation.bijection)


@eqx.filter_jit
def _widened(flow: Flow, share: float, spread: float) -> Frozen:
    base, (dim,) = flow.base, flow.shape
    scale = jnp.asarray(1 + spread / math.sqrt(dim), flow.dtype)
    wide = Flow(base, Affine(jnp.zeros((), scale.dtype), scale, shape=(dim,)))
    logits = jnp.log(jnp.asarray([1 - share, share], scale.dtype))
    return Frozen(Mixture([base, wide], logits))


@dataclasses.dataclass(frozen=True)
class Gap:
    """How much more evidence wider draws find: ln Ẑ_wide − ln Ẑ, with its standard error.

    Attributes:
        value: The difference in nats.
        error: Its standard error.
        failures: Wider draws whose log density is NaN or +∞.
    """

    value: float
    error: float
    failures: int = 0

    @property
    def significant(self) -> bool:
        """Whether it is more than rounding and chance."""
        return not (self.value <= _TOLERATED_GAP or self.value <= 4 * self.error)


def find_gap(
    key: PRNGKeyArray, approximation: AbstractDistribution, target: Target, found: Assessment
) -> Gap:
    """Compare the evidence of an approximation's own draws with that of as many wider ones."""
    seen = assess(key, widen(approximation), target, len(found.log_q))
    wide, own = seen.log_evidence, found.log_evidence
    value = float(wide.value - own.value)
    return Gap(value, float(np.hypot(wide.error, own.error)), seen.failures)


@eqx.filter_jit
def _draw(approximation, key, size: int) -> tuple[Array, Array]:
    z, log_q = approximation._sample_and_log_prob(key, (size,))
    return z.T, log_q


class Missed(NamedTuple):
    """What an approximation lacks at the places that optimisation has found.

    Attributes:
        places: The numbers of the laws that are missed, from the highest bound to the lowest.
        failures: Draws of the laws at which the approximation's log density is NaN.
    """

    places: np.ndarray
    failures: int = 0


def missed(
    key: PRNGKeyArray,
    approximation: AbstractDistribution,
    target: Target,
    places: Gaussians,
    log_evidence: float,
) -> Missed:
    """Which of the normal laws found by optimisation hold mass that the approximation lacks.

    A law g_j is missed where by importance sampling from it there is more than a two-hundredth of
    the mass, or e^−10 of it where so few draws count that they may be far too low, and there
    ln p̃ − ln q is on average more than 3 above the log evidence; and is so still at the end of
    walks from there, which leave the tail of what the approximation covers, and stay in a mode.
    """
    key, walk_key = jr.split(key)
    noise = generator(key).standard_normal((_PROBES, target.dim))
    draws = places.draw(noise)
    log_p = log_densities(target.log_density, draws.reshape(-1, target.dim), target.dtype)
    log_p = np.where(np.isfinite(log_p), log_p, -np.inf).reshape(draws.shape[:2])
    # One place after the other, so that their number compiles nothing anew.
    log_q = np.stack([approximate_log_prob(approximation, z) for z in draws])
    # The mass at a place by its own draws; the bound alone is too low where it is not normal.
    ratios = log_p - places.log_prob(noise)
    found = np.logaddexp.reduce(ratios, 1)
    mass = found - math.log(_PROBES)
    failed = np.isnan(log_q)
    if not np.isfinite(log_evidence):
        return Missed(np.flatnonzero(np.isfinite(mass)), int(failed.sum()))
    with np.errstate(invalid="ignore"):
        # Over the mass, not over the law's draws: a poor law has draws where there is nothing.
        shares = np.exp(ratios - found[:, None])
        unsure = 1 / np.square(shares).sum(1) < _TELLING
        # No density at all is as little as there can be, but must not decide by a single draw.
        lacking = np.minimum(log_p - log_q - log_evidence, _MOST_LACKING)
        unknown = np.where(failed, shares, 0).sum(1)
        excess = np.where((shares > 0) & ~failed, shares * lacking, 0).sum(1)
        least = np.where(unsure, _LEAST_UNSURE, _LEAST_MASS)
        held = mass - log_evidence > least
        # Where most is unknown, so is whether it is covered.
        lost = held & ((unknown > 0.5) | (excess > _MISSED * (1 - unknown)))
    for i in np.flatnonzero(lost):
        at = (draws[i], log_p[i], shares[i], places.factors[i], log_evidence)
        beyond = lack_beyond(jr.fold_in(walk_key, int(i)), approximation, target, *at)
        lost[i] = beyond > _MISSED
    return Missed(np.flatnonzero(lost), int(failed.sum()))


def judge(
    target: Target,
    own: Assessment,
    found: Assessment,
    gap: Gap,
    drift: Drift | None,
    places: Gaussians,
    lost: Missed,
    notes: Sequence[str] = (),
) -> Verdict:
    """The verdict on an approximation.

    Args:
        target: The target.
        own: Its own draws and their weights.
        found: The draws to be used with their weights: the same, or those of a wider proposal.
        gap: What wider draws find beyond them.
        drift: Where chains of the target went from them; None if none have walked.
        places: The laws found by optimisation.
        lost: Those that were missed.
        notes: Sentences about trouble on the way; each forbids trust.
    """
    n = len(found.log_q)
    findings: list[tuple[Grade, str]] = [*_of_weights(own, found), *_of_draws(own, found)]
    own_failures = 0 if found is own else own.failures
    for words, failures in (
        ("draws", found.failures),
        ("of the flow's own draws", own_failures),
        ("wider draws", gap.failures),
    ):
        if failures:
            said = f"The log density is NaN or +∞ at {failures:,} of {n:,} {words}."
            findings.append(("do not trust", said))
    if gap.significant:
        share = -math.expm1(-gap.value)
        said = (
            f"Draws spread wider find {share:.1%} of the probability outside the reach of its own: "
            "it is too narrow, or its tails are too short."
        )
        slight = gap.value <= USABLE_GAP
        findings.append(("usable after reweighting" if slight else "do not trust", said))
    if drift is not None and drift.significant:
        said = (
            f"Chains that keep the target leave the weighted draws (ln p̃ − ln q rises by "
            f"{drift.gain:.2f} nats, the spread by a factor {drift.spread:.2f}): there is "
            "probability where they are not."
        )
        findings.append(("do not trust", said))
    if drift is not None and drift.stuck:
        said = f"Chains took {drift.taken:.1%} of their steps, so that they say nothing."
        findings.append(("usable after reweighting", said))
    if lost.failures:
        said = (
            f"The flow's density could not be computed at {lost.failures:,} of "
            f"{_PROBES * len(places.means):,} points found by optimisation."
        )
        findings.append(("usable after reweighting", said))
    if places.lawless:
        said = (
            f"{places.lawless} of {places.climbs} climbs ended where no normal law holds, as at an "
            "edge that was not declared: what is there is not compared."
        )
        findings.append(("usable after reweighting", said))
    for j in lost.places[:_NAMED]:
        said = (
            f"Optimisation found probability near {in_words(target, places.means[j], 3)} that the "
            "approximation misses."
        )
        findings.append(("do not trust", said))
    if len(lost.places) > _NAMED:
        said = (
            f"It found {len(lost.places) - _NAMED} more such places: where they are many, the "
            "target may have an infinite integral."
        )
        findings.append(("do not trust", said))
    findings.extend(("do not trust", note) for note in notes)
    grade = _GRADES[max(_GRADES.index(grade) for grade, _ in findings)]
    reasons = [said for _, said in findings]
    return Verdict(grade, (*reasons, _ADVICE[grade]), _caveat(places))


def _of_weights(own: Assessment, found: Assessment) -> list[tuple[Grade, str]]:
    """What the tail of the weights says."""
    k_hat = found.k_hat
    # Few draws cannot tell as much (Vehtari et al. 2024).
    usable = min(USABLE, 1 - 1 / math.log10(len(found.log_q)))
    if not k_hat < usable:
        said = (
            f"The tail of the importance weights is too heavy (k̂ = {k_hat:.2f}, at least "
            f"{usable:.2f}): single draws decide every average."
        )
        return [("do not trust", said)]
    if not k_hat < GOOD:
        said = (
            f"The weights have a finite variance or nearly so (k̂ = {k_hat:.2f}, between {GOOD} and "
            f"{usable:.2f})."
        )
        return [("usable after reweighting", said)]
    well = f"The importance weights are well behaved (k̂ = {k_hat:.2f}, below {GOOD})."
    if found is own:
        return [("good", well)]
    said = (
        f"These weights are those of the flow mixed with wider draws; those of the flow alone have "
        f"k̂ = {own.k_hat:.2f}."
    )
    return [("good", well), ("usable after reweighting", said)]


def _of_draws(own: Assessment, found: Assessment) -> list[tuple[Grade, str]]:
    """What the draws say: the flow's own beside the weighted ones, and how many count."""
    findings: list[tuple[Grade, str]] = []
    apart, ratio = _shift(own, found)
    if apart > _SAME_MEAN or abs(ratio - 1) > _SAME_SPREAD:
        said = (
            f"The flow's own draws are off by up to {apart:.2f} standard deviations in the mean "
            f"and by a factor {ratio:.2f} in the spread."
        )
        findings.append(("usable after reweighting", said))
    counted = f"{found.ess:,.0f} of {len(found.log_q):,} draws count after weighting."
    if found.ess < _LEAST_EFFECTIVE:
        return [*findings, ("do not trust", f"{counted} That is too few to average over.")]
    return [*findings, ("good", counted)]


def _shift(own: Assessment, found: Assessment) -> tuple[float, float]:
    """How far the flow's own draws are off, judged by the weighted ones, in the worst coordinate.

    Returns:
        The difference of the means in weighted standard deviations, and the ratio of deviations
        that is farthest from one.
    """
    if not found.weights.sum() > 0:
        return math.inf, math.inf
    # A draw without weight may be infinite, of which zero times is NaN.
    alive = found.weights > 0
    z, weights = found.z[alive].astype(np.float64), found.weights[alive]
    mean = weights @ z
    spread = np.sqrt(weights @ np.square(z - mean[None]))
    raw = own.z.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        apart = np.abs(raw.mean(0) - mean) / spread
        ratios = raw.std(0) / spread
        logs = np.abs(np.log(ratios))
    apart, logs = (np.where(np.isnan(x), np.inf, x) for x in (apart, logs))
    return float(apart.max(initial=0)), float(ratios[np.argmax(logs)])


def _caveat(places: Gaussians) -> str:
    distinct, climbs = len(places.means), places.climbs
    ends = "one normal law" if distinct == 1 else f"{distinct} different normal laws"
    return (
        "Weights see only where the approximation has draws: a mode that neither it nor the "
        f"optimisation ({climbs} {'climb' if climbs == 1 else 'climbs'} to {ends}) reached stays "
        "unseen. Compare another key, more starts, and data simulated from the posterior."
    )


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse numbers that are too small."""
    if value != int(value) or value < least:
        raise InputError(f"{name} is {value}; give a whole number of at least {least}.")
