"""`fit_posterior`: from a log density or a NumPyro model to a posterior, with a verdict on it.

Stages, each of which ends the work where it suffices:

1. normal laws from climbs (see `laminar.inference.warmstart`);
2. a flow over the best of them by reverse KL with path gradients, in rounds of growing length;
3. where its weights are still not well behaved, rounds of forward KL by importance sampling;
4. where a law of the first stage holds mass that the flow misses, another flow there, in a mixture.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from laminar import zoo
from laminar._errors import InputError, ShapeError, TrainingError
from laminar._params import Frozen, positive_inverse
from laminar._typing import Array, PRNGKeyArray, PyTree
from laminar.bijections.base import AbstractBijection
from laminar.bijections.compose import Chain
from laminar.bijections.elementwise import Affine
from laminar.bijections.linear import Triangular
from laminar.density import AbstractDistribution, check_key
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.inference.assessment import (
    GOOD,
    USABLE,
    Assessment,
    Gap,
    assess,
    check_count,
    find_gap,
    judge,
    missed,
    widen,
)
from laminar.inference.posterior import Posterior
from laminar.inference.target import STARTS, Target, as_target
from laminar.inference.walk import find_drift
from laminar.inference.warmstart import Gaussians, find_gaussians
from laminar.mixtures import Mixture
from laminar.objectives import Annealing, forward_kl, reverse_kl
from laminar.train.fit import fit

Builder = Callable[[int, PRNGKeyArray], Flow]

_TRIAL = 4_000
_MANY, _NEARLY_ALL = 0.6, 0.95
_DEFENCE = (0.15, 1.5)
_ROUNDS = (1 / 6, 1 / 3, 1 / 2)
_REFINING = (1 / 12, 1 / 4)
_RATE, _REFINING_RATE = 5e-3, 1e-3
_MOST_COUPLED = 64
_FARTHER = (4.0, 16.0, 64.0)
LEAST_DRAWS = 400
"""Fewer draws than twice what a verdict must be able to count tell nothing."""


def fit_posterior(
    key: PRNGKeyArray,
    target: Target | Callable,
    *args: Any,
    supports: PyTree = None,
    example: PyTree = None,
    dtype: Any = None,
    flow: str | Builder = "auto",
    steps: int = 3_000,
    samples: int = 256,
    starts: int = 16,
    modes: int = 4,
    draws: int = 10_000,
    anneal: Annealing | None = None,
    time_limit: float | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Posterior:
    """Approximate a posterior by a normalizing flow, and say whether it can be trusted.

        q* = argmin_q KL(q ‖ p),   q a flow over ℝ^D,   then weights p̃ / q on draws of q*

    (Rezende & Mohamed 2015; path gradients of Roeder et al. 2017; smoothed weights of Vehtari et
    al. 2024).

    Args:
        key: Random key; the same call gives the same posterior.
        target: A NumPyro model, a JAX log density with its `example`, or a ready
            `laminar.inference.Target`.
        *args: Arguments of the model, or further ones of the log density.
        supports: See `laminar.inference.as_target`.
        example: Likewise.
        dtype: float32 or float64 (which JAX must have been allowed).
        flow: ``"auto"``, by dimension: stop at a normal law where it suffices, else a neural spline
            flow (autoregressive up to 64 dimensions, coupling above); ``"normal"``, ``"nsf"``,
            ``"coupling"``, ``"iaf"``, ``"realnvp"``, ``"planar"`` or ``"radial"`` (Rezende &
            Mohamed 2015, with 16 layers) or ``"sylvester"``, always trained; or a function
            ``(dim, key) -> Flow``.
        steps: Most steps of reverse KL for one mode; those of forward KL, if needed, are a third as
            many.
        samples: Draws in each step.
        starts: Climbs from dispersed starting points, every other one of them 4, 16 or 64 times as
            far out.
        modes: Most flows in a mixture, one for each mode that would be missed otherwise.
        draws: Draws on which the verdict rests, kept in the posterior.
        anneal: The inverse temperature β of the first round's steps, such as
            ``laminar.linear_annealing(over=250)`` (the paper's eq. 20); rounds after it have β = 1.
            The first round is a sixth of `steps`.
        time_limit: Seconds after which no further training begins; what has begun is finished,
            and judged. Climbs and the judgement itself are not counted.
        progress: Show progress on standard error; None shows it on a terminal only.
        **kwargs: Keyword arguments of the model or log density. One that is named like an option
            here can be given by making the target first.

    Raises:
        InputError: If the target or an option cannot be used; see `Target.check`.
    """
    begun = time.monotonic()
    check_key("fit_posterior", key)
    for name, value, least in (
        ("steps", steps, 6),
        ("samples", samples, 2),
        ("starts", starts, 1),
        ("modes", modes, 1),
        ("draws", draws, LEAST_DRAWS),
    ):
        check_count(name, value, least)
    if anneal is not None and not callable(anneal):
        raise InputError(f"anneal must be a function of the step, not {type(anneal).__name__}.")
    made = as_target(target, *args, supports=supports, example=example, dtype=dtype, **kwargs)
    keys = _children(key, 9)
    try_key, start_key, climb_key, fit_key, draw_key, wide_key, mix_key, miss_key, walk_key = keys
    limit = None if time_limit is None else begun + time_limit
    fitter = _Fitter(made, flow, steps, samples, anneal, limit, progress)
    if flow != "auto":
        # Before any work, so that what does not fit is said at once.
        fitter.build(fit_key, made.dim)
    odd = made.check(try_key)
    # As many as are checked, since they cost nothing and their number would be compiled anew.
    begin = np.array(made.start(start_key, max(starts, STARTS)))[:starts]
    begin[1::2] *= np.resize(_FARTHER, len(begin[1::2]))[:, None]
    places = find_gaussians(climb_key, made.log_density, begin)
    approximation = fitter.run(fit_key, places, modes)
    own = assess(draw_key, approximation, made, draws)
    proposal, found = fitter.defend(mix_key, approximation, own)
    gap = find_gap(wide_key, proposal, made, found)
    lost = missed(miss_key, approximation, made, places, float(found.log_evidence.value))
    verdict = judge(made, own, found, gap, None, places, lost, fitter.notes)
    if verdict.grade != "do not trust":
        seen = found.z, found.log_p, found.weights, float(found.log_evidence.value)
        drift = find_drift(walk_key, approximation, made, *seen)
        verdict = judge(made, own, found, gap, drift, places, lost, fitter.notes)
    return Posterior(
        target=made,
        flow=approximation,
        own=own,
        proposal=proposal,
        assessment=found,
        verdict=verdict,
        places=places,
        remarks=(*odd, *fitter.remarks),
        seconds=time.monotonic() - begun,
    )


def _children(key: PRNGKeyArray, count: int) -> list[PRNGKeyArray]:
    """Independent keys; `jax.random.split` would be compiled once for each count."""
    return [jr.fold_in(key, i) for i in range(count)]


@dataclasses.dataclass
class _Fitter:
    """The stages, and what they note on the way."""

    target: Target
    flow: str | Builder
    steps: int
    samples: int
    anneal: Annealing | None
    limit: float | None
    progress: bool | None
    notes: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)

    def run(self, key: PRNGKeyArray, places: Gaussians, modes: int) -> AbstractDistribution:
        """One flow, or a mixture of one for each mode that would be missed."""
        parts, evidences = [], []
        left, tried = [0], []
        while left and len(parts) < modes and not (parts and self._late()):
            key, fit_key, look_key = _children(key, 3)
            part, found = self._fit_one(fit_key, places.one(left[0]))
            tried.append(left[0])
            parts.append(part)
            evidences.append(float(found.log_evidence.value))
            total = float(np.logaddexp.reduce(evidences))
            lost = missed(look_key, _joined(parts, evidences), self.target, places, total)
            left = [int(at) for at in lost.places if at not in tried]
        return self._cast(_joined(parts, evidences))

    def defend(
        self, key: PRNGKeyArray, approximation: AbstractDistribution, own: Assessment
    ) -> tuple[AbstractDistribution, Assessment]:
        """What to draw weighted draws from: with a wider part where that lightens their tail."""
        if own.k_hat < GOOD:
            return approximation, own
        wide = widen(approximation, *_DEFENCE)
        trial_key, final_key = _children(key, 2)
        trial = assess(trial_key, wide, self.target, len(own.log_q))
        if (trial.k_hat < USABLE, trial.k_hat < GOOD) <= (own.k_hat < USABLE, False):
            return approximation, own
        # Fresh draws, since those that decided look better than they are.
        return wide, assess(final_key, wide, self.target, len(own.log_q))

    def _late(self) -> bool:
        return self.limit is not None and time.monotonic() > self.limit

    def _fit_one(self, key: PRNGKeyArray, place: Gaussians) -> tuple[Flow, Assessment]:
        """The flow that begins at one normal law, as far as it has to be trained."""
        build_key, look_key, last_key, *round_keys = _children(key, len(_ROUNDS) + 3)
        first = self._look(look_key, self._cast(_over(None, place)))
        if self._late() or (self.flow == "auto" and first.suffices):
            return first.flow, first.found
        flow = self._cast(_over(self.build(build_key, place.means.shape[1]), place))
        objective = reverse_kl(self.target.log_density, self.samples, anneal=self.anneal)
        trail = []
        for part, round_key in zip(_ROUNDS, round_keys, strict=True):
            if trail and self.anneal is not None:
                objective = reverse_kl(self.target.log_density, self.samples)
            count = max(1, round(self.steps * part))
            trained = self._train(round_key, flow, objective, count, _RATE, self.notes)
            if trained is None:
                break
            flow = trained
            trail.append(self._look(look_key, flow))
            if trail[-1].suffices or trail[-1].close or self._late():
                break
        if not trail:
            return first.flow, first.found
        self._look_for_flight([seen.found for seen in trail])
        best = trail[-1]
        if best.suffices or self._late():
            return best.flow, best.found
        # With a wider part the weights may do; if not, both are trained on the target's draws.
        wide = self._look(look_key, widen(best.flow, *_DEFENCE))
        light = best.close and wide.found.k_hat < USABLE and not wide.gap.significant
        if wide.suffices or light or self._late():
            return best.flow, wide.found
        objective = forward_kl(self.target.log_density, 4 * self.samples)
        refined = wide
        for part, round_key in zip(_REFINING, _children(last_key, len(_REFINING)), strict=True):
            count = max(1, round(self.steps * part))
            # Where it fails, what was sound before is given, and is judged as it is.
            told = (_REFINING_RATE, self.remarks)
            again = self._train(round_key, refined.flow, objective, count, *told)
            if again is None:
                break
            refined = self._look(look_key, again)
            if refined.suffices or self._late():
                break
        if refined is wide or refined.rank < wide.rank:
            return best.flow, wide.found
        return Flow(best.flow.base, refined.flow.bijection), refined.found

    def _look(self, key: PRNGKeyArray, flow: Any) -> "_Look":
        own, wide = _children(key, 2)
        return _Look(flow, assess(own, flow, self.target, _TRIAL), self.target, wide)

    def _train(
        self,
        key: PRNGKeyArray,
        flow: Flow,
        objective,
        steps: int,
        rate: float,
        failures: list[str],
    ) -> Flow | None:
        """The flow after a round; None, and a sentence, where training stays non-finite."""
        try:
            fitted, history = fit(
                key,
                flow,
                objective=objective,
                steps=steps,
                learning_rate=rate,
                weight_decay=0.0,
                patience=None,
                validation=None,
                # What whitens stays, so that steps of training are of the posterior's own scale.
                freeze=_whitening,
                progress=self.progress,
            )
        except TrainingError as error:
            failures.append(f"Training failed, and what was there before is given: {error}")
            return None
        if history.rollbacks:
            self.remarks.append(
                f"{history.rollbacks} of {steps:,} steps of training were not finite and were "
                "taken back."
            )
        return fitted

    def build(self, key: PRNGKeyArray, dim: int) -> Flow:
        """The flow in whitened coordinates that was asked for."""
        if callable(self.flow):
            made = self.flow(dim, key)
            if not isinstance(made, Flow):
                raise InputError(f"flow must make a Flow, not {type(made).__name__}.")
            if made.shape != (dim,) or made.cond_shape is not None:
                raise ShapeError(
                    f"flow makes one over events of shape {made.shape} with conditions "
                    f"{made.cond_shape}, but the target takes vectors ({dim},) and no condition."
                )
            return made
        kind = self.flow
        if kind == "auto":
            kind = "nsf" if dim <= _MOST_COUPLED else "coupling"
        if kind not in _BUILDERS:
            raise InputError(
                f"flow is {kind!r}; choose 'auto', {', '.join(map(repr, _BUILDERS))}, or give a "
                "function (dim, key) -> Flow."
            )
        # One program in place of the hundred small ones that initialisation would compile.
        return eqx.filter_jit(_BUILDERS[kind])(dim, key)

    def _cast(self, tree: Any) -> Any:
        """A flow in the target's dtype."""
        dtype = self.target.dtype
        return jtu.tree_map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)

    def _look_for_flight(self, trail: list[Assessment]) -> None:
        """Note a bound that keeps rising while the draws spread: an improper target has no end."""
        if len(trail) < len(_ROUNDS):
            return
        bounds = [float(found.elbo.value) for found in trail]
        spreads = [float(np.abs(found.z - np.median(found.z, 0)).max()) for found in trail]
        rising = all(b > a + 0.05 for a, b in itertools.pairwise(bounds))
        spreading = all(b > 1.3 * a for a, b in itertools.pairwise(spreads))
        if rising and spreading:
            self.notes.append(
                f"The bound was still rising (by {bounds[-1] - bounds[-2]:.2f} nats in the last "
                "round) while the draws spread ever wider: the target may be improper, or have "
                "tails far heavier than a flow's."
            )


def _joined(parts: list[Flow], log_masses: list[float]) -> AbstractDistribution:
    """One flow, or the mixture of several by the mass that each holds."""
    if len(parts) == 1:
        return parts[0]
    # In double precision: single does not tell large evidences apart.
    logits = np.asarray(log_masses, np.float64)
    return Mixture(parts, jnp.asarray(logits - logits.max()))


def _whitening(flow: Any) -> Any:
    return flow.bijection.parts[-1]


@dataclasses.dataclass(eq=False)
class _Look:
    """A flow on its way, and how good it is."""

    flow: Any
    found: Assessment
    target: Target
    key: PRNGKeyArray

    @functools.cached_property
    def gap(self) -> Gap:
        """What wider draws find; looked for only where all else is well."""
        return find_gap(self.key, self.flow, self.target, self.found)

    @property
    def share(self) -> float:
        """The effective part of the draws."""
        return self.found.ess / len(self.found.log_q)

    @property
    def close(self) -> bool:
        """Whether q is as close as training makes it, and only the tail may be wrong."""
        return self.share > _NEARLY_ALL and self.found.failures == 0

    @property
    def suffices(self) -> bool:
        """Whether nothing needs to be mended."""
        found = self.found
        steady = found.k_hat < GOOD and self.share > _MANY and found.failures == 0
        return steady and not self.gap.significant

    @property
    def rank(self) -> tuple[bool, bool, bool, bool, float]:
        """What decides between two flows, the greater the better."""
        found = self.found
        tail = found.k_hat < USABLE, found.k_hat < GOOD
        return found.failures == 0, *tail, not self.gap.significant, found.ess


def _over(inner: Flow | None, place: Gaussians) -> Flow:
    """A flow in coordinates in which a normal law is the standard one."""
    whiten = _whitener(place.means[0], place.factors[0])
    if inner is None:
        return Flow(Normal(len(place.means[0])), whiten)
    return Flow(inner.base, Chain([inner._map, whiten]))


@jax.jit
def _whitener(mean: Array, factor: Array) -> AbstractBijection:
    if factor.ndim == 1:
        return Affine(mean, factor)
    raw = jnp.tril(factor, -1) + jnp.diag(positive_inverse(jnp.diag(factor)))
    return eqx.tree_at(lambda t: (t.raw, t.shift), Triangular(len(mean)), (raw, mean))


def _linear_tail(flow: Flow, dim: int) -> Flow:
    """A flow followed by a trained linear map, which corrects the first normal law."""
    last = Triangular(dim) if dim <= 400 else Affine(shape=(dim,))
    return Flow(Frozen(flow._base), Chain([flow._map, last]))


def _spline(dim: int, key: PRNGKeyArray) -> Flow:
    # Affine maps beside the splines: a conditional mean may leave their interval.
    flow = zoo.nsf(dim, key=key, layers=4, width=64, bins=8, fast="sample", affine=True)
    return _linear_tail(flow, dim)


def _coupling(dim: int, key: PRNGKeyArray) -> Flow:
    return _linear_tail(zoo.nsf(dim, key=key, layers=6, coupling=True, affine=True), dim)


_BUILDERS: dict[str, Builder] = {
    "normal": lambda dim, key: _linear_tail(Flow(Normal(dim), Chain([Affine(shape=(dim,))])), dim),
    "nsf": _spline,
    "coupling": _coupling,
    "iaf": lambda dim, key: _linear_tail(zoo.iaf(dim, key=key, width=64), dim),
    "realnvp": lambda dim, key: _linear_tail(zoo.realnvp(dim, key=key, width=64), dim),
    "planar": lambda dim, key: _linear_tail(zoo.planar(dim, key=key, layers=16), dim),
    "radial": lambda dim, key: _linear_tail(zoo.radial(dim, key=key, layers=16), dim),
    "sylvester": lambda dim, key: _linear_tail(zoo.sylvester(dim, key=key), dim),
}
