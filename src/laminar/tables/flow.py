"""How the density of a table's rows is fitted."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._errors import InputError, TrainingError
from laminar._typing import Array, PRNGKeyArray
from laminar.density import AbstractDistribution
from laminar.flow import Flow
from laminar.mixed import ColumnLaw, autoregressive_distribution
from laminar.objectives import Batch, WithheldNLL, nll
from laminar.preset import preset
from laminar.tables.baselines import Rows, gaussian, independent
from laminar.tables.calibration import calibrate
from laminar.tables.frames import from_frame, is_frame
from laminar.tables.model import TableFlow, cast
from laminar.tables.schema import Schema, dependent, learn_schema
from laminar.tables.table import Table, refuse_non_numeric
from laminar.train.density import fit_density, refit
from laminar.train.fit import fit
from laminar.train.history import History
from laminar.zoo import BUILDERS

__all__ = ["TableFlow", "fit_table"]

MIN_ROWS = 20
"""Fewer rows than this are not fitted."""

_MOST_HELD_OUT = 50_000
_DECAY = 2_000.0  # of mixed rows: weight decay times rows
_EPOCHS, _BATCH = 60, 256  # of mixed rows: passes, and rows in a step
_STEPS = (3_000, 20_000)  # of mixed rows, at least and at most, unless held-out rows end them
_CLIP = 50.0  # of mixed rows: a row far out has a large gradient, which must not slow the others
_SMALL = 5_000  # rows; fewer get narrower networks
_FOR_SAMPLING = ("planar", "radial", "sylvester")  # which score fast only when told


class DequantisedNLL(eqx.Module):
    """The negative log-likelihood of rows with fresh uniform noise in every batch.

    E_u[−ln p(z + width · u)], u uniform on (−½, ½)ᵈ, which bounds the likelihood that ties can
    bring (Uria et al. 2013). Columns of width zero are left as they are.

    Args:
        width: Widths of the noise in standardised units, shape (d,).
    """

    width: Array

    def __call__(self, flow: AbstractDistribution, batch: Batch, key: PRNGKeyArray):
        """``nll`` of the noisy batch."""
        noise_key, key = jr.split(key)
        x = jnp.asarray(batch.x, flow.dtype)
        u = jr.uniform(noise_key, x.shape, x.dtype, -0.5, 0.5)
        return nll(flow, batch._replace(x=x + self.width.astype(x.dtype)[None] * u), key)


def fit_table(
    table: Table,
    *,
    given: Sequence[str] = (),
    weights: str | None = None,
    kinds: Mapping[str, str] | None = None,
    partial: bool = False,
    flow: str = "auto",
    seed: int = 0,
    validation: float = 0.1,
    notify: Callable[[str], None] = lambda note: None,
    **options: Any,
) -> tuple[TableFlow, dict[str, Any]]:
    """Fit a flow to the rows of a table.

    Columns may hold numbers, whole numbers, dates, categories, true and false, and gaps; what each
    is, is inferred or declared. A part of the rows, drawn by the seed, is held out for the score
    and decides nothing. Of the others location and scale are taken; a part of them is set aside
    again, to stop training or to choose by. The default for small tables of real columns trains no
    network, and is fitted once more to all rows after it has been scored.

    Args:
        table: At least `MIN_ROWS` rows, NaN where a cell is missing; or a frame of pandas, Polars
            or Arrow.
        given: Columns to condition on: the density is that of the others given these.
        weights: The column of the rows' weights, which is not modelled.
        kinds: What some columns are, where it is not to be inferred: column name → kind, as
            ``{"zip": "categorical", "share": "bounded:0:1"}``; see `laminar.tables.infer`.
        partial: Whether any columns may later be missing, held fixed or filled in. It is so in any
            case where the table has gaps; it costs a little of the density of whole rows.
        flow: ``"auto"`` chooses by the size of the table and on held-out rows; otherwise a name in
            `laminar.zoo.BUILDERS`, for tables of real columns.
        seed: Of the split, the noise on ties, the parameters and the order of batches.
        validation: Fraction of rows held out, and of the others set aside for early stopping.
        notify: Called before training with each thing a user should know about the columns.
        **options: Passed on to `laminar.train.fit`: ``steps``, ``time_limit``, ``batch_size``,
            ``learning_rate``, ``checkpoint``, ``resume``, ``progress``.

    Returns:
        The fitted flow, and a report that JSON can express: rows, columns, notes, the mean
        held-out log-density in the user's units with its standard error, that of a baseline on the
        same rows (a Gaussian, or independent columns where the table is mixed), and the course of
        training. The flow holds a calibration, by which strange rows are told: some of the rows
        themselves are in it and in its file (``dataclasses.replace(model, calibration=None)`` is
        the model without them).

    Raises:
        InputError: When rows or columns cannot be used; the message says which and why.
        TrainingError: When training stays non-finite; rows have their numbers in the table.
    """
    begun = time.monotonic()
    table = from_frame(table) if is_frame(table) else table
    train_flow = fit_auto if flow == "auto" else fit_named(flow)
    data = _prepare(table, tuple(given), weights, seed, validation, kinds, partial)
    for note in data.notes:
        notify(note)
    schema, auto = data.schema, flow == "auto"
    if schema.mixed:
        if not auto:
            raise InputError(
                f"{table.source} has columns that are no real numbers or have gaps, which the flow "
                f"{flow!r} cannot hold; use auto, or choose other columns."
            )
        train_flow = fit_mixed(schema, partial)
    try:
        # Networks have fresh noise in every batch.
        rows = data.part(data.train, noisy=auto)
        trained = train_flow(seed, rows, noise=schema.noise, validation=validation, **options)
    except TrainingError as error:
        raise error.renumbered(data.table.rows[data.train].tolist()) from error
    model = TableFlow(trained.flow, schema)
    log_p = model.log_prob(data.table.take(data.held))
    report = {
        "table": table.source,
        "rows": len(data.table),
        "train_rows": len(data.train),
        "held_out_rows": len(data.held),
        "columns": list(schema.names),
        "kinds": {column.name: column.kind for column in (*schema.columns, *schema.given)},
        "dimensions": len(schema.modelled),
        "given": list(given),
        "weights": weights,
        "flow": flow,
        "seed": seed,
        "validation": validation,
        "held_out": weighted_mean(log_p, data.part(data.held, noisy=False).weights),
        "mixed": schema.mixed,
        "baseline": _baseline(data),
        "training": trained.report,
        "notes": data.notes,
    }
    model = _calibrated(model, trained, data, seed)
    return model, {**report, "seconds": round(time.monotonic() - begun, 3)}


class _Data(NamedTuple):
    """A table made ready for training: checked, split, and in standardised units.

    Attributes:
        table: Without the column of weights, and without rows of weight zero.
        schema: Its columns.
        z: Events, (N, *shape).
        terms: What the units bring to their log-densities, (N,).
        noisy: The same with their noise on ties.
        conditions: Standardised conditions, (N, c), or None.
        weights: Weights (N,) of mean one, or None.
        train: Positions of the rows to train on.
        held: Positions of the rows to score.
        notes: What a user should know about the columns.
    """

    table: Table
    schema: Schema
    z: np.ndarray
    terms: np.ndarray
    noisy: np.ndarray
    conditions: np.ndarray | None
    weights: np.ndarray | None
    train: np.ndarray
    held: np.ndarray
    notes: list[str]

    def part(self, rows: np.ndarray, *, noisy: bool) -> Rows:
        """Some rows, as they are trained on or scored."""
        whole = Rows(self.noisy if noisy else self.z, self.conditions, self.weights)
        return whole.take(rows)


def _prepare(
    table: Table,
    given: tuple[str, ...],
    weights: str | None,
    seed: int,
    validation: float,
    kinds: Mapping[str, str] | None = None,
    partial: bool = False,
) -> _Data:
    w = None
    if weights is not None:
        check_weights(table, weights, given)
        w, table = _weights(table, weights)
    table.positions(given)
    if len(table) < MIN_ROWS:
        raise InputError(
            f"{table.source} has {len(table)} row{'s' * (len(table) != 1)}, and fitting needs at "
            f"least {MIN_ROWS}."
        )
    rng = np.random.default_rng(seed)
    train, held = split(len(table), validation, rng)
    schema = learn_schema(table, given, train, kinds, partial)
    z, terms = schema.encode(table.select(schema.names).values)
    notes = [*table.notes, *schema.notes()]
    notes += [
        f"Column {schema.modelled[i].name!r} is a linear function of other columns, so that the "
        f"density is unbounded; leave it out."
        for i in ([] if schema.mixed else dependent(z))
    ]
    noisy = z if schema.mixed else z + schema.noise * rng.uniform(-0.5, 0.5, z.shape)
    conditions = schema.condition(table.select(given).values) if given else None
    return _Data(table, schema, z, terms, noisy, conditions, w, train, held, notes)


def _calibrated(model: TableFlow, trained: "Trained", data: _Data, seed: int) -> TableFlow:
    """The model with its calibration, fitted once more to all rows where that is quick.

    The calibration is of the first fit, which the rows that were held out are new to.
    """
    train, held = (data.table.take(part) for part in (data.train, data.held))
    known = calibrate(
        model, train, held, weights=data.part(data.held, noisy=False).weights, seed=seed
    )
    if trained.refit is None:
        return TableFlow(trained.flow, data.schema, known)
    # Where rows are few, it pays to use those that were held out too.
    again = trained.refit(data.part(np.arange(len(data.table)), noisy=True))
    return TableFlow(again, data.schema, dataclasses.replace(known, flow=trained.flow))


def _baseline(data: _Data) -> dict[str, Any]:
    """The held-out score of what a fit has to beat, with its name."""
    train, held = data.part(data.train, noisy=True), data.part(data.held, noisy=False)
    if data.schema.mixed:
        name, log_p = "independent columns", independent(train, held, data.schema.laws)
    else:
        name, log_p = "a Gaussian", gaussian(train).log_prob(held)
    return {"name": name, **weighted_mean(log_p + data.terms[data.held], held.weights)}


class Trained(NamedTuple):
    """What `fit_auto` and the functions of `fit_named` return.

    Attributes:
        flow: A distribution of standardised rows.
        report: The course of training, of what JSON can express.
        refit: Fits the same density to other rows, where that is quick.
    """

    flow: AbstractDistribution
    report: dict[str, Any]
    refit: Callable[[Rows], AbstractDistribution] | None = None


def fit_named(name: str) -> Callable[..., Trained]:
    """The function that trains a flow of `laminar.zoo.BUILDERS`, or an error that lists them.

    It takes a part of its rows to stop by: those that the flow will be scored on must not be among
    the ones that chose it.
    """
    if name not in BUILDERS:
        raise InputError(f"There is no flow named {name!r}; choose auto, {', '.join(BUILDERS)}.")

    def train(
        seed: int, rows: Rows, *, noise: np.ndarray, validation: float, **options: Any
    ) -> Trained:
        flow_key, fit_key = jr.split(jr.key(seed))
        dim = rows.x.shape[1]
        cond_dim = 0 if rows.condition is None else rows.condition.shape[1]
        width = 64 if len(rows.x) < _SMALL else 128
        options_of = {"fast": "log_prob"} if name in _FOR_SAMPLING else {}
        flow = BUILDERS[name](dim, key=flow_key, width=width, cond_dim=cond_dim, **options_of)
        objective = DequantisedNLL(jnp.asarray(noise, flow.dtype)) if noise.any() else nll
        kept, stop = split(len(rows.x), validation, np.random.default_rng([seed, 2]))
        data, stopping = (
            Batch(*(cast(part, flow) for part in rows.take(index))) for index in (kept, stop)
        )
        try:
            flow, history = fit(
                fit_key, flow, data, validation=stopping, objective=objective, **options
            )
        except TrainingError as error:
            raise error.renumbered(kept.tolist()) from error
        return Trained(flow, summary(history))

    return train


def fit_auto(
    seed: int,
    rows: Rows,
    *,
    noise: np.ndarray,
    validation: float,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    time_limit: float | None = None,
    progress: bool | None = None,
    checkpoint: Any = None,
    resume: bool = False,
) -> Trained:
    """Train what suits the size of the table best: see `laminar.train.density.fit_density`.

    Ties must have had their noise. `fit_density` has its own way to hold out rows for its choices.
    """
    count, dim = rows.x.shape
    sizes = preset(count, dim, 0 if rows.condition is None else rows.condition.shape[1])
    chosen: dict[str, Any] = {
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    sizes = dataclasses.replace(sizes, **{k: v for k, v in chosen.items() if v is not None})
    flow, history = fit_density(
        jr.key(seed),
        rows.x,
        condition=rows.condition,
        weights=rows.weights,
        preset=sizes,
        steps=steps,
        time_limit=time_limit,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
    report = {
        "steps": history.steps,
        "seconds": history.seconds,
        "stop_reason": history.stop_reason,
        "parts": [
            {"name": name, "weight": weight, "score": score}
            for name, weight, score in zip(
                history.candidates, history.weights, history.scores, strict=True
            )
        ],
        "flows": {name: summary(course) for name, course in history.flows.items()},
    }

    def again(rows: Rows) -> Flow:
        return refit(history, rows.x, condition=rows.condition, weights=rows.weights)

    return Trained(flow, report, None if history.flows else again)


def fit_mixed(schema: Schema, partial: bool = False) -> Callable[..., Trained]:
    """The function that trains the law of mixed rows, `laminar.mixed.AutoregressiveDistribution`.

    Columns of few states come first: what follows is then told apart by category. With gaps, or
    with `partial`, cells are withheld at random in training, so that the law of any columns is
    learned beside that of all.
    """
    laws = schema.laws
    rank = np.array([(law.value is not None) * 10**6 + law.states for law in laws])
    order = np.argsort(np.argsort(rank, kind="stable"), kind="stable")
    withheld = partial or any(law.gap for law in laws)

    def train(
        seed: int, rows: Rows, *, noise: np.ndarray, validation: float, **options: Any
    ) -> Trained:
        flow_key, fit_key = jr.split(jr.key(seed))
        count = len(rows.x)
        kept, stop = split(count, validation, np.random.default_rng([seed, 2]))
        flow = autoregressive_distribution(
            laws,
            key=flow_key,
            width=64 if count < _SMALL else 128 if count < 20 * _SMALL else 256,
            cond_dim=0 if rows.condition is None else rows.condition.shape[1],
            order=jnp.asarray(order, jnp.int32),
            shares=[_shares(law, rows.x[kept, 1, i]) for i, law in enumerate(laws)],
        )
        data, stopping = (
            Batch(*(cast(part, flow) for part in rows.take(index))) for index in (kept, stop)
        )
        # As a prior on the weights would, the decay falls as rows are added.
        decay = min(max(_DECAY / len(kept), 0.05), 10.0)
        defaults: dict[str, Any] = {
            "learning_rate": 3e-3,
            "weight_decay": decay,
            "ema": 0.995,
            "clip": _CLIP,
        }
        if options.get("steps") is None and options.get("time_limit") is None:
            defaults["steps"] = int(np.clip(_EPOCHS * len(kept) // _BATCH, *_STEPS))
        options = {name: value for name, value in options.items() if value is not None}
        try:
            flow, history = fit(
                fit_key,
                flow,
                data,
                validation=stopping,
                objective=WithheldNLL() if withheld else nll,
                **defaults | options,
            )
        except TrainingError as error:
            raise error.renumbered(kept.tolist()) from error
        return Trained(flow, summary(history))

    return train


def _shares(law: ColumnLaw, states: np.ndarray) -> np.ndarray:
    """The shares of a column's states among rows, each as if it had been there half a time more."""
    counts = np.bincount(states[states >= 0].astype(int), minlength=law.states) + 0.5
    return counts / counts.sum()


def summary(history: History) -> dict[str, Any]:
    """The course of training without the loss of every step."""
    whole = history.to_dict()
    return {name: value for name, value in whole.items() if name not in ("loss", "rate")}


def split(rows: int, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and held-out rows, each in the table's order.

    Small tables hold out more than the fraction: a fifth below 1,000 rows.
    """
    if not 0 < fraction < 1:
        raise InputError(f"The fraction of rows held out must lie between 0 and 1, not {fraction}.")
    share = max(fraction, 0.2) if rows < 1_000 else fraction
    held = min(max(round(share * rows), 2), _MOST_HELD_OUT, rows - 2)
    order = rng.permutation(rows)
    return np.sort(order[held:]), np.sort(order[:held])


def weighted_mean(log_p: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Any]:
    """The mean log-density, its standard error over the rows, and the number of rows.

    The error of a weighted mean is that of the ratio estimator; what is not finite is None.
    """
    w = np.ones(len(log_p)) if weights is None else weights
    # A row of weight zero counts as absent, whatever its density.
    log_p = np.where(w > 0, log_p, 0.0)
    mean = float((w * log_p).sum() / w.sum())
    if not math.isfinite(mean):
        return {"log_density": None, "error": None, "rows": len(log_p)}
    used = int((w > 0).sum())
    spread = math.sqrt(float(((w * (log_p - mean)) ** 2).sum())) / float(w.sum())
    error = spread * math.sqrt(used / max(used - 1, 1))
    return {"log_density": mean, "error": error, "rows": len(log_p)}


def check_weights(table: Table, name: str, given: Sequence[str]) -> None:
    """Refuse weights that are no numbers, missing, negative or all zero, or given as well."""
    weights = table.column(name)
    refuse_non_numeric(table.select((name,)))
    if np.isnan(weights).any():
        row = table.rows[int(np.isnan(weights).argmax())]
        raise InputError(
            f"{table.source}: column {name!r} of weights is missing in row {row}; fill it in or "
            "remove such rows."
        )
    if name in given:
        raise InputError(f"Column {name!r} is named both as given and as weights; choose one.")
    if (weights < 0).any():
        row = table.rows[int((weights < 0).argmax())]
        raise InputError(
            f"{table.source}: column {name!r} of weights is negative in row {row}; weights must be "
            f"0 or more."
        )
    if not weights.sum() > 0:
        raise InputError(f"{table.source}: column {name!r} of weights is zero in every row.")
    if len(table.names) == 1:
        raise InputError(f"{table.source} has no column besides the weights; name one to model.")


def _weights(table: Table, name: str) -> tuple[np.ndarray, Table]:
    """The column of weights, scaled to mean one, and the table of the rows with one, without it."""
    weights, rest = table.column(name), [column for column in table.names if column != name]
    keep = np.flatnonzero(weights > 0)
    weights = weights[keep]
    return weights / weights.mean(), table.select(rest).take(keep)
