"""fit_density: the best density we know how to fit to a table, as one exact distribution.

    flow, history = fit_density(key, rows)

It trains candidates of different kinds (see `laminar.train.shallow` for those that need no
gradient, and neural spline flows over a normal or a mixture base) and returns their mixture, with
weights fitted to held-out rows. So it falls behind none of them by more than the noise of a few
weights: neither a network on a few hundred rows nor a mixture on a hundred thousand is right.
"""

import dataclasses
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._errors import InputError, TrainingError
from laminar._files import PathLike
from laminar._lengths import bucket
from laminar._params import Frozen, positive_inverse
from laminar._typing import Array, ArrayLike, PRNGKeyArray
from laminar.bijections.base import AbstractTransform
from laminar.bijections.elementwise import Affine
from laminar.bijections.linear import Triangular
from laminar.bijections.quantile import QuantileMap
from laminar.conditional import ConditionalMixture
from laminar.density import AbstractDistribution
from laminar.distributions import Normal, StudentT
from laminar.flow import Flow
from laminar.mixtures import GaussianMixture, IsotropicMixture, Mixture
from laminar.objectives import Batch
from laminar.preset import Preset
from laminar.preset import preset as make_preset
from laminar.train import mixtures, shallow
from laminar.train.checkpoint import Checkpoint
from laminar.train.fit import OTHER_DOORS, fit
from laminar.train.history import History
from laminar.train.search import MOST_REFIT, Found, Plan, load_plan, search, settings_of
from laminar.train.source import ArraySource, MappedSource
from laminar.train.table import Table, host_seed, make_table

_NOTICED = 0.1
_MOST_DOUBLED = 1_024  # components up to which a program may take twice as many as there are


@dataclasses.dataclass
class DensityHistory:
    """What `fit_density` tried.

    Attributes:
        candidates: Names of the parts of the result.
        weights: Their weights in it.
        scores: The mean held-out log-density of each alone, in standardised units.
        flows: The training history of each neural flow, by name.
        best_loss: Minus the mean held-out log-density of the whole, in standardised units.
        seconds: Wall-clock time in all.
        stop_reason: ``"steps"`` or ``"time limit"``.
        found: The mixtures that the search kept, for `refit`; not part of `to_dict`.
    """

    candidates: list[str] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    flows: dict[str, History] = dataclasses.field(default_factory=dict)
    best_loss: float = float("nan")
    seconds: float = 0.0
    stop_reason: str = "steps"
    found: Found | None = dataclasses.field(default=None, repr=False)

    @property
    def steps(self) -> int:
        """Steps of gradient descent in all."""
        return sum(history.steps for history in self.flows.values())

    def to_dict(self) -> dict[str, Any]:
        """The same as lists and numbers that JSON can hold."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "found"]
        fields = {name: getattr(self, name) for name in names}
        fields["flows"] = {name: history.to_dict() for name, history in self.flows.items()}
        return {"steps": self.steps, **fields}


def fit_density(
    key: PRNGKeyArray,
    data: ArrayLike,
    *,
    condition: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    preset: Preset | None = None,
    steps: int | None = None,
    validation: float = 0.1,
    time_limit: float | None = None,
    checkpoint: PathLike | Checkpoint | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> tuple[Flow, DensityHistory]:
    """Fit a density to rows of continuous values.

    Args:
        key: Random key; the same call gives the same result.
        data: Rows (N, D), in any units. Columns must vary, and should have few ties: a continuous
            density of ties is unbounded.
        condition: Conditions (N, C), or None.
        weights: Non-negative sample weights (N,), or None. Rows of weight zero count as absent.
        preset: Sizes, by default `laminar.zoo.preset` for this table.
        steps: Steps for each flow, in place of the preset's. With a time limit training ends at
            whichever comes first. The steps that `laminar.zoo.preset` chose itself are a default
            for runs without a time limit, and do not end one that has it.
        validation: Share of the rows held out while flows are trained. Mixtures are fitted to all
            rows in the end.
        time_limit: Seconds in all, roughly; what is not tried by then is left out.
        checkpoint: Where the state of training is kept, as in `fit`: this file holds what the
            search for mixtures found, and each flow keeps a file of its own beside it
            (`Checkpoint.files` lists them). Nothing is kept where no flow is trained.
        resume: Go on from these files where they exist; the seconds of the earlier run count. Under
            a greater time limit flows that had used up theirs go on; the search is not repeated.
        progress: Show the training of flows; None shows it on a terminal only.

    Returns:
        The distribution of rows, ``Flow(Mixture(…), standardisation)``, and what was tried.

    Raises:
        ShapeError: If data is not (N, D) or another array has other rows.
        InputError: If values are not finite, a column is constant, there are fewer than 8 rows or
            the checkpoint does not fit.
        TrainingError: If the training of a flow stays non-finite; its `rows` are those of `data`.

    References:
        Smyth & Wolpert (1999), "Linearly combining density estimators via stacking".
    """
    start = time.monotonic()
    split_key, shallow_key, *flow_keys = jr.split(key, 8)
    table = make_table(split_key, data, condition, weights, validation)
    own = make_preset(len(np.asarray(data)), table.x.shape[1], table.given)
    chosen = preset or own
    budget = chosen.steps if steps is None else steps
    if time_limit is not None and steps is None and chosen.steps == own.steps:
        budget = None
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    if resume and checkpoint is None:
        raise InputError("resume needs the file to resume from; give checkpoint=.")
    if not chosen.bases:
        checkpoint = None
    clock = _Clock(start, time_limit)
    settings = settings_of(key, table, chosen)
    plan = load_plan(checkpoint, settings, time_limit) if checkpoint and resume else None
    if plan is None:
        share = 0.4 if chosen.bases else 0.8
        found = search(table, chosen, host_seed(shallow_key), lambda: clock.spent(share))
        plan = Plan(found, clock.elapsed(), time_limit)
    else:
        clock.before = plan.seconds
    history = DensityHistory()

    def save() -> None:
        if checkpoint is not None:
            plan.save(checkpoint, settings)

    options = {"steps": budget, "checkpoint": checkpoint, "progress": progress, "resume": resume}
    parts = _train(flow_keys, table, chosen, plan, clock, history, save, options)
    dist = _combine(table, plan.found, parts, history)
    history.found = plan.found
    history.seconds = clock.elapsed()
    history.stop_reason = "time limit" if clock.spent() else "steps"
    return dist, history


def refit(
    history: DensityHistory,
    data: ArrayLike,
    *,
    condition: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Flow:
    """Fit what `fit_density` found again, to other rows, without the search and without flows.

    For rows that were kept from the search, to score its result, and are to count in the end.

    Args:
        history: What `fit_density` returned; flows in it are left out.
        data: Rows, as there.
        condition: Conditions, as there.
        weights: Weights, as there.
    """
    if history.found is None:
        raise InputError("refit takes the history that fit_density returned.")
    table = make_table(jr.key(history.found.seed), data, condition, weights, 0.1)
    return _combine(table, history.found, [], DensityHistory())


def fit_preset(
    key: PRNGKeyArray,
    preset: Preset,
    data: Any,
    condition: Any,
    weights: Any,
    validation: Any,
    time_limit: float | None,
    checkpoint: PathLike | Checkpoint | None,
    resume: bool,
    progress: bool | None,
    given: dict[str, bool],
) -> tuple[Flow, DensityHistory]:
    """What ``fit(key, preset(…), data)`` does: `fit_density`, after refusing what has no meaning.

    Args:
        key: As in `fit`, like all that follow but the last.
        preset: What to try.
        data: Rows, or a `Batch` of them.
        condition: One condition for each row.
        weights: One weight for each row.
        validation: Share of the rows to hold out.
        time_limit: Seconds in all.
        checkpoint: Where the state of training is kept.
        resume: Whether to go on from there.
        progress: Whether to show progress.
        given: For options of `fit` that a preset decides itself, whether they were given.

    Raises:
        InputError: If one was given, or the data are not arrays.
    """
    for name in (name for name, present in given.items() if present):
        raise InputError(
            f"fit: {name} means nothing with a preset, which decides it; change the preset with "
            "dataclasses.replace, or give a flow."
        )
    if isinstance(data, Batch):
        if condition is not None or weights is not None:
            raise InputError("fit: put condition and weights into the Batch that is given as data.")
        data, condition, weights = data
    elif isinstance(data, ArraySource | MappedSource) or hasattr(data, "batch"):
        raise InputError(
            f"fit: with a preset, data must be an array of rows or a Batch, and not a source such "
            f"as {type(data).__name__}; give a flow to train from a source."
        )
    if not isinstance(validation, float):
        raise InputError("fit: with a preset, validation must be the share of rows to hold out.")
    return fit_density(
        key,
        data,
        condition=condition,
        weights=weights,
        preset=preset,
        validation=validation,
        time_limit=time_limit,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


@dataclasses.dataclass
class _Clock:
    """Counts the seconds of this run, and those of an earlier one that need not be spent again."""

    start: float
    limit: float | None
    before: float = 0.0

    def elapsed(self) -> float:
        """Seconds so far."""
        return self.before + time.monotonic() - self.start

    def left(self) -> float | None:
        """Seconds left, or None without a limit."""
        return None if self.limit is None else self.limit - self.elapsed()

    def spent(self, share: float = 1.0) -> bool:
        """Whether this share of the time has passed."""
        return self.limit is not None and self.elapsed() > share * self.limit


# --- neural flows ------------------------------------------------------------------------------


def _train(keys, table, chosen, plan, clock, history, save, options):
    """Flows over each base, as (name, distribution of standardised rows, held-out log-density)."""
    if not chosen.bases:
        return []
    knots = mixtures.fit_knots(table.x[table.fit], table.at("weights", table.fit))
    latent, log_det = mixtures.apply_knots(knots, table.x)
    quantiles = _quantile_map(knots)
    done = []
    for i, (kind, key) in enumerate(zip(chosen.bases, keys, strict=False)):
        left = clock.left()
        if left is not None and kind not in plan.limits:
            if clock.spent(0.9):
                break
            plan.limits[kind] = max(left / (len(chosen.bases) - i), 1.0)
        save()
        base = _base(kind, plan.found, latent, table)
        own = options | {"time_limit": plan.limits.get(kind)}
        if own["checkpoint"] is not None:
            own["checkpoint"] = own["checkpoint"].part(kind)
        began = clock.elapsed()
        flow, record = _train_one(key, base, latent, table, chosen, own)
        clock.before += max(record.seconds - (clock.elapsed() - began), 0.0)
        name = f"flow over {kind}"
        history.flows[name] = record
        log_p = _host_log_prob(flow, latent[table.held], table.at("condition", table.held))
        whole = Flow(flow, quantiles)
        done.append((name, whole, log_p + log_det[table.held]))
    return done


def _base(kind, found, latent, table) -> AbstractDistribution:
    dim = table.x.shape[1]
    if kind == "normal":
        return Normal(dim)
    behind = [
        (w, s) for w, s in zip(found.shares, found.specs, strict=True) if s.kind == "marginal"
    ]
    spec = max(behind)[1] if behind else shallow.Spec("marginal", 4, dim / 2 + 1)
    rows = table.fit[:MOST_REFIT]
    both = latent if table.given == 0 else np.concatenate([table.condition, latent], axis=1)
    components = mixtures.fit_components(
        both[rows],
        spec.components,
        spec.strength,
        seed=found.seed,
        weights=table.at("weights", rows),
    )
    return _gaussian_mixture(components, table.given)


def _train_one(key, base, latent, table, chosen, options):
    from laminar.zoo import nsf

    net_key, fit_key = jr.split(key)
    dim = latent.shape[1]
    flow = nsf(
        dim,
        key=net_key,
        layers=chosen.layers,
        width=chosen.width,
        depth=chosen.depth,
        bins=chosen.bins,
        cond_dim=chosen.condition,
        base=base,
    )

    def batch(rows):
        return Batch(
            jnp.asarray(latent[rows], flow.dtype),
            _array(table.at("condition", rows), flow.dtype),
            _array(table.at("weights", rows), flow.dtype),
        )

    try:
        return fit(
            fit_key,
            flow,
            batch(table.fit),
            validation=batch(table.held),
            batch_size=min(chosen.batch_size, len(table.fit)),
            learning_rate=chosen.learning_rate,
            weight_decay=chosen.weight_decay,
            ema=chosen.ema,
            patience=chosen.patience,
            **options,
        )
    except TrainingError as error:
        raise error.renumbered(table.rows[table.fit]) from error


def _array(value, dtype) -> Array | None:
    return None if value is None else jnp.asarray(value, dtype)


def _host_log_prob(flow, x, condition) -> np.ndarray:
    x = jnp.asarray(x, flow.dtype)
    condition = _array(condition, flow.dtype)
    return np.asarray(flow.log_prob(x, condition), np.float64)


# --- putting it together -----------------------------------------------------------------------


def _combine(table: Table, found: Found, parts, history: DensityHistory) -> Flow:
    """Weigh everything on the held-out rows, fit the mixtures again to all rows, and assemble."""
    names, dists, logs = ([part[i] for part in parts] for i in range(3))
    w = table.at("weights", table.held)
    history.scores = [float(np.average(log_p, weights=w)) for log_p in logs]
    trial = None
    shares, history.best_loss = np.ones(1), -found.score
    if parts:
        trial = found.fit(table, table.fit)
        logs = np.stack([trial.log_prob(table.joint[table.held]), *logs], axis=1)
        shares = mixtures.stack(logs, w)
        total = mixtures.log_sum(logs + np.log(shares))
        history.best_loss = -float(np.average(total, weights=w))
    # Where flows carry nearly all the weight, a second fit would not be noticed.
    if trial is None or shares[0] > _NOTICED:
        trial = found.fit(table, np.concatenate([table.held, table.fit]))
    pieces = _assemble(trial)
    dists = [*(dist for _, dist in pieces), *dists]
    history.candidates = [*(spec.label for spec in found.specs), *names]
    history.weights = [float(v) for v in (*(shares[0] * found.shares), *shares[1:])]
    history.scores = [*found.scores, *history.scores]
    shares = np.concatenate([[shares[0] * v for v, _ in pieces], shares[1:]])
    logits = jnp.asarray(np.log(shares), dists[0].dtype)
    mixture = dists[0] if len(dists) == 1 else Mixture(dists, logits)
    dtype = mixture.dtype
    back = Affine(jnp.asarray(table.loc, dtype), jnp.asarray(table.scale, dtype))
    return Flow(mixture, Frozen(back), table.embed)


def _assemble(final: shallow.Shallow) -> list[tuple[float, AbstractDistribution]]:
    """One distribution for all candidates of a kind, with its share."""
    pieces = []
    for kind in ("mixture", "marginal"):
        merged = shallow.merge(final, kind)
        if merged is not None:
            share, components = merged
            dist = _gaussian_mixture(components, final.given)
            if kind == "marginal" and final.knots is not None:
                dist = Flow(dist, _quantile_map(final.knots))
            pieces.append((share, dist))
    kernels = [
        (w, spec.strength, part)
        for spec, w, part in zip(final.specs, final.weights, final.parts, strict=True)
        if spec.kind == "kernel"
    ]
    if kernels:
        pieces.append(_kernel_mixture(kernels))
    for spec, w, part in zip(final.specs, final.weights, final.parts, strict=True):
        if spec.kind == "tail":
            dim = len(part.mean)
            base = StudentT(dim, df=shallow.TAIL_DF)
            pieces.append((float(w), Flow(base, _triangular(part.factor, part.mean))))
    return pieces


def _kernel_mixture(kernels) -> tuple[float, AbstractDistribution]:
    """Kernels of all widths as round components behind the factor that they share."""
    share = sum(w for w, _, _ in kernels)
    _, width, first = kernels[0]
    factor = first.factors[0] / width
    whitened = np.linalg.solve(factor, first.means.T).T
    rows = len(whitened)
    mixture = IsotropicMixture(
        _padded(np.tile(whitened, (len(kernels), 1)).astype(_dtype())),
        _padded(np.repeat([width for _, width, _ in kernels], rows)),
        _padded(np.concatenate([w / share * part.weights for w, _, part in kernels]), weights=True),
    )
    return float(share), Flow(mixture, _triangular(factor, np.zeros(len(factor))))


def _gaussian_mixture(components: mixtures.Components, given: int = 0) -> AbstractDistribution:
    """The mixture, or that of the later columns conditional on the first ones."""
    covariances = _padded(components.factors @ components.factors.transpose(0, 2, 1))
    means = _padded(components.means.astype(_dtype()))
    weights = _padded(components.weights, weights=True)
    if given == 0:
        return GaussianMixture(weights, means, covariances)
    return ConditionalMixture(weights, means, covariances, cond_dim=given)


def _padded(array: np.ndarray, *, weights: bool = False) -> np.ndarray:
    """Components up to the next of few numbers, with copies of the first that have no weight.

    Fits of like tables then have like shapes, and share their compiled programs.
    """
    length = bucket(len(array), 4, doubled=_MOST_DOUBLED)
    extra = np.repeat(array[:1], length - len(array), axis=0)
    return np.concatenate([array, 0 * extra if weights else extra])


def _quantile_map(knots: mixtures.Knots) -> Frozen[AbstractTransform]:
    """The map through the knots, and through more in its linear tail, up to a multiple of eight."""
    z, x, slope = (np.array(v) for v in knots)
    beyond = np.arange(1, -len(z) % 8 + 1)[:, None]
    arrays = (
        np.concatenate([z, z[-1:] + beyond]),
        np.concatenate([x, x[-1:] + slope[-1:] * beyond]),
        np.concatenate([slope, np.repeat(slope[-1:], len(beyond), axis=0)]),
    )
    return Frozen(QuantileMap(*(jnp.asarray(v, _dtype()) for v in arrays)))


def _triangular(factor: np.ndarray, shift: np.ndarray) -> Triangular:
    """The map x ↦ factor · x + shift."""
    dtype = _dtype()
    diagonal = np.asarray(positive_inverse(jnp.asarray(np.diag(factor), dtype)))
    raw = jnp.asarray(np.tril(factor, -1) + np.diag(diagonal), dtype)
    where = (raw, jnp.asarray(shift, dtype))
    return eqx.tree_at(lambda t: (t.raw, t.shift), Triangular(len(factor)), where)


def _dtype():
    return jax.dtypes.canonicalize_dtype(np.float64)


OTHER_DOORS[Preset] = fit_preset
