"""fit_density: the best density we know how to fit to a table, as one exact distribution.

    flow, history = fit_density(key, rows)

It trains candidates of different kinds (see `laminar.train.shallow` for those that need no
gradient, and neural spline flows over a normal or a mixture base) and returns their mixture, with
weights fitted to held-out rows. So it falls behind none of them by more than the noise of a few
weights: neither a network on a few hundred rows nor a mixture on a hundred thousand is right.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._errors import InputError, ShapeError
from laminar._files import PathLike
from laminar._params import Frozen, positive_inverse
from laminar._typing import Array, ArrayLike, PRNGKeyArray
from laminar.bijections.base import AbstractTransform
from laminar.bijections.elementwise import Affine
from laminar.bijections.linear import Triangular
from laminar.bijections.quantile import QuantileMap
from laminar.conditional import ConditionalMixture, Standardise
from laminar.density import AbstractDistribution
from laminar.distributions import Normal, StudentT
from laminar.flow import Flow
from laminar.mixtures import GaussianMixture, IsotropicMixture, Mixture
from laminar.objectives import Batch
from laminar.preset import Preset
from laminar.preset import preset as make_preset
from laminar.train import mixtures, shallow
from laminar.train.checkpoint import Checkpoint
from laminar.train.history import History

_MOST_SEARCH = 4_000  # rows that candidates are compared on: ranks are stable from there on
_MOST_REFIT = 20_000
_NOTICED = 0.1
_MOST_HELD_OUT = 20_000


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
    """

    candidates: list[str] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    flows: dict[str, History] = dataclasses.field(default_factory=dict)
    best_loss: float = float("nan")
    seconds: float = 0.0
    stop_reason: str = "steps"

    @property
    def steps(self) -> int:
        """Steps of gradient descent in all."""
        return sum(history.steps for history in self.flows.values())

    def to_dict(self) -> dict[str, Any]:
        """The same as lists and numbers that JSON can hold."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["flows"] = {name: history.to_dict() for name, history in self.flows.items()}
        return {"steps": self.steps, **fields}


@dataclasses.dataclass
class _Table:
    """Standardised rows on the host, and how to go back."""

    x: np.ndarray
    condition: np.ndarray | None
    weights: np.ndarray | None
    loc: np.ndarray
    scale: np.ndarray
    fit: np.ndarray
    held: np.ndarray
    embed: Standardise | None = None

    @property
    def given(self) -> int:
        """Columns of the condition."""
        return 0 if self.condition is None else self.condition.shape[1]

    @property
    def joint(self) -> np.ndarray:
        """Conditions and rows side by side."""
        if self.condition is None:
            return self.x
        return np.concatenate([self.condition, self.x], axis=1)

    def at(self, name: str, rows: np.ndarray) -> Any:
        """Some rows of a field that may be absent."""
        array = getattr(self, name)
        return None if array is None else array[rows]


def fit_density(
    key: PRNGKeyArray,
    data: ArrayLike,
    *,
    condition: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    preset: Preset | None = None,
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
        weights: Non-negative sample weights (N,), or None.
        preset: Sizes, by default `laminar.zoo.preset` for this table.
        validation: Share of the rows held out while flows are trained. Mixtures are fitted to all
            rows in the end.
        time_limit: Seconds in all, roughly; what is not tried by then is left out.
        checkpoint: A file for the state of training, as in `fit`; each flow keeps a file of its own
            beside it (`Checkpoint.files` lists them).
        resume: Go on from these files where they exist. The search for mixtures is done anew; it
            has the same result for the same key.
        progress: Show the training of flows; None shows it on a terminal only.

    Returns:
        The distribution of rows, ``Flow(Mixture(…), standardisation)``, and what was tried.

    Raises:
        ShapeError: If data is not (N, D) or another array has other rows.
        InputError: If values are not finite, a column is constant or there are fewer than 8 rows.

    References:
        Smyth & Wolpert (1999), "Linearly combining density estimators via stacking".
    """
    start = time.monotonic()
    split_key, shallow_key, *flow_keys = jr.split(key, 8)
    table = _prepare(split_key, data, condition, weights, validation)
    rows, columns = table.x.shape
    chosen = preset or make_preset(rows, columns, table.given)
    clock = _Clock(start, time_limit)
    history = DensityHistory()
    found = _search(table, chosen, _seed(shallow_key), clock)
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    options = {"checkpoint": checkpoint, "resume": resume, "progress": progress}
    parts = _train(flow_keys, table, chosen, found, clock, history, options)
    dist = _combine(table, found, parts, history)
    history.seconds = time.monotonic() - start
    history.stop_reason = "time limit" if clock.spent() else "steps"
    return dist, history


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
    if not isinstance(validation, float):
        raise InputError("fit: with a preset, validation must be the share of rows to hold out.")
    if isinstance(data, Batch):
        data, condition, weights = data
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
    start: float
    limit: float | None

    def left(self) -> float | None:
        """Seconds left, or None without a limit."""
        return None if self.limit is None else self.limit - (time.monotonic() - self.start)

    def spent(self, share: float = 1.0) -> bool:
        """Whether this share of the time has passed."""
        return self.limit is not None and time.monotonic() - self.start > share * self.limit


def _prepare(key, data, condition, weights, validation) -> _Table:
    x = np.asarray(data, np.float64)
    if x.ndim != 2 or x.shape[1] < 1:
        raise ShapeError(f"fit_density: data must be rows (N, D), and has shape {x.shape}.")
    if len(x) < 8:
        raise InputError(f"fit_density needs at least 8 rows, not {len(x)}.")
    if not 0 < validation < 1:
        raise InputError(f"fit_density: validation is {validation}; give a share between 0 and 1.")
    w = _check_weights(weights, len(x))
    c = None if condition is None else np.asarray(condition, np.float64)
    if c is not None and (c.ndim != 2 or len(c) != len(x)):
        raise ShapeError(
            f"fit_density: condition must be (N, C) with {len(x)} rows, and has shape {c.shape}."
        )
    for what, array in (("data", x), ("condition", c)):
        if array is not None and not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0]
            raise InputError(f"fit_density: {what} is not finite at row {row}, column {column}.")
    constant = np.flatnonzero(x.min(0) == x.max(0))
    if len(constant):
        raise InputError(
            f"fit_density: column {constant[0]} is constant, so it has no density; drop it."
        )
    order = np.random.default_rng(_seed(key)).permutation(len(x))
    held = min(max(round(validation * len(x)), 2), _MOST_HELD_OUT)
    loc, scale = np.average(x, 0, w), x.std(0)
    table = _Table((x - loc) / scale, None, w, loc, scale, order[held:], order[:held])
    if c is not None:
        middle, spread = c.mean(0), c.std(0)
        spread = np.where(spread > 0, spread, 1.0)
        table.condition = (c - middle) / spread
        arrays = (Frozen(jnp.asarray(v, _dtype())) for v in (middle, spread))
        table.embed = Standardise(*arrays, in_shape=(c.shape[1],))
    return table


def _check_weights(weights, rows: int) -> np.ndarray | None:
    if weights is None:
        return None
    w = np.asarray(weights, np.float64)
    if w.shape != (rows,):
        raise ShapeError(f"fit_density: weights must be ({rows},), and have shape {w.shape}.")
    if not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise InputError("fit_density: weights must be finite and non-negative, not all zero.")
    return w


def _seed(key: PRNGKeyArray) -> int:
    return int(jr.bits(key, (), jnp.uint32)) % 2**31


# --- candidates without gradients --------------------------------------------------------------


class _Found(NamedTuple):
    """Mixtures kept by the search: their weights, the score of each and of all, and the seed."""

    specs: list[shallow.Spec]
    shares: np.ndarray
    scores: list[float]
    score: float
    seed: int

    def fit(self, table: _Table, rows: np.ndarray) -> shallow.Shallow:
        """Fit them again to some of the rows."""
        rows = rows[:_MOST_REFIT]
        return shallow.refit(
            self.specs,
            self.shares,
            table.joint[rows],
            table.at("weights", rows),
            seed=self.seed,
            given=table.given,
        )


def _search(table: _Table, chosen: Preset, seed: int, clock: _Clock) -> _Found:
    """Compare the candidates that need no gradient and keep the best."""
    folds = _folds(table, chosen.folds, seed)
    joint = table.joint
    widths = () if table.given else chosen.kernel_widths
    paths = shallow.candidates(joint.shape[1], chosen.components, widths, chosen.priors)
    specs, logs, held = shallow.search(
        joint,
        table.weights,
        folds,
        paths,
        seed=seed,
        given=table.given,
        out_of_time=lambda: clock.spent(0.4 if chosen.bases else 0.8),
    )
    w = table.at("weights", held)
    keep, shares = shallow.prune(specs, logs, w, chosen.parts)
    means = [float(np.average(logs[:, i], weights=w)) for i in keep]
    whole = mixtures.log_sum(logs[:, keep] + np.log(shares))
    return _Found(
        [specs[i] for i in keep], shares, means, float(np.average(whole, weights=w)), seed
    )


def _folds(table: _Table, count: int, seed: int):
    if count < 2:
        return [(table.fit[:_MOST_SEARCH], table.held[:_MOST_SEARCH])]
    order = np.random.default_rng(seed).permutation(len(table.x))
    parts = np.array_split(order, count)
    return [
        (np.concatenate([p for j, p in enumerate(parts) if j != i]), part)
        for i, part in enumerate(parts)
    ]


# --- neural flows ------------------------------------------------------------------------------


def _train(keys, table, chosen, found, clock, history, options):
    """Flows over each base, as (name, distribution of standardised rows, held-out log-density)."""
    if not chosen.bases:
        return []
    knots = mixtures.fit_knots(table.x[table.fit], table.at("weights", table.fit))
    latent, log_det = mixtures.apply_knots(knots, table.x)
    quantiles = _quantile_map(knots)
    done = []
    for i, (kind, key) in enumerate(zip(chosen.bases, keys, strict=False)):
        if clock.spent(0.9):
            break
        left = clock.left()
        share = None if left is None else max(left / (len(chosen.bases) - i), 1.0)
        base = _base(kind, found, latent, table)
        own = dict(options)
        if own["checkpoint"] is not None:
            own["checkpoint"] = own["checkpoint"].part(kind)
        flow, record = _train_one(key, base, latent, table, chosen, share, own)
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
    rows = table.fit[:_MOST_REFIT]
    both = latent if table.given == 0 else np.concatenate([table.condition, latent], axis=1)
    components = mixtures.fit_components(
        both[rows],
        spec.components,
        spec.strength,
        seed=found.seed,
        weights=table.at("weights", rows),
    )
    return _gaussian_mixture(components, table.given)


def _train_one(key, base, latent, table, chosen, seconds, options):
    from laminar.train.fit import fit
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

    return fit(
        fit_key,
        flow,
        batch(table.fit),
        validation=batch(table.held),
        steps=chosen.steps if seconds is None else None,
        batch_size=min(chosen.batch_size, len(table.fit)),
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        ema=chosen.ema,
        patience=chosen.patience,
        time_limit=seconds,
        **options,
    )


def _array(value, dtype) -> Array | None:
    return None if value is None else jnp.asarray(value, dtype)


def _host_log_prob(flow, x, condition) -> np.ndarray:
    x = jnp.asarray(x, flow.dtype)
    condition = _array(condition, flow.dtype)
    return np.asarray(flow.log_prob(x, condition), np.float64)


# --- putting it together -----------------------------------------------------------------------


def _combine(table: _Table, found: _Found, parts, history: DensityHistory) -> Flow:
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
        np.tile(whitened, (len(kernels), 1)).astype(_dtype()),
        np.repeat([width for _, width, _ in kernels], rows),
        np.concatenate([w / share * part.weights for w, _, part in kernels]),
    )
    return float(share), Flow(mixture, _triangular(factor, np.zeros(len(factor))))


def _gaussian_mixture(components: mixtures.Components, given: int = 0) -> AbstractDistribution:
    """The mixture, or that of the later columns conditional on the first ones."""
    covariances = components.factors @ components.factors.transpose(0, 2, 1)
    means = components.means.astype(_dtype())
    if given == 0:
        return GaussianMixture(components.weights, means, covariances)
    return ConditionalMixture(components.weights, means, covariances, cond_dim=given)


def _quantile_map(knots: mixtures.Knots) -> Frozen[AbstractTransform]:
    return Frozen(QuantileMap(*(jnp.asarray(np.array(v), _dtype()) for v in knots)))


def _triangular(factor: np.ndarray, shift: np.ndarray) -> Triangular:
    """The map x ↦ factor · x + shift."""
    dtype = _dtype()
    diagonal = np.asarray(positive_inverse(jnp.asarray(np.diag(factor), dtype)))
    raw = jnp.asarray(np.tril(factor, -1) + np.diag(diagonal), dtype)
    where = (raw, jnp.asarray(shift, dtype))
    return eqx.tree_at(lambda t: (t.raw, t.shift), Triangular(len(factor)), where)


def _dtype():
    return jax.dtypes.canonicalize_dtype(np.float64)
