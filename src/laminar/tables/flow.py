"""TableFlow: the density of a table's rows in the user's units, and how it is fitted."""

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
from laminar.objectives import Batch, nll
from laminar.preset import preset
from laminar.tables.baselines import Mixture, Rows, gaussian
from laminar.tables.schema import Schema, dependent, learn_schema
from laminar.tables.table import Table, array_table, listing, refuse_non_finite, unknown_column
from laminar.train.density import fit_density, refit
from laminar.train.fit import fit
from laminar.train.history import History
from laminar.zoo import BUILDERS

MIN_ROWS = 20
"""Fewer rows than this are not fitted."""

_MOST_HELD_OUT = 50_000
_SMALL = 5_000  # rows; fewer get narrower networks
_FOR_SAMPLING = ("planar", "radial", "sylvester")  # which score fast only when told

Given = Table | Mapping[str, float] | np.ndarray | None


class TableFlow(eqx.Module):
    """A flow over standardised rows and the schema that ties it to a table's own units.

    Args:
        flow: A distribution of events (d,), d the number of columns that are not constant, with
            conditions (c,) where columns are given.
        schema: The columns.
    """

    flow: AbstractDistribution
    schema: Schema = eqx.field(static=True)

    def __check_init__(self):
        shape = (len(self.schema.modelled),)
        if self.flow.shape != shape:
            raise InputError(
                f"TableFlow: the schema has {shape[0]} columns that vary, and the flow has events "
                f"of shape {self.flow.shape}."
            )

    def log_prob(self, rows: Table | np.ndarray, given: Given = None) -> np.ndarray:
        """The log-density of each row, ln p(row | given), in nats and the user's units.

        A column of ties counts with the density of its dequantised values (see
        `laminar.tables.schema`). A row in which a constant column has another value scores −inf.

        Args:
            rows: A table with the columns of the schema, by name and in any order; it may hold the
                given columns too, and others. Columns without names are told by position where
                their numbers x1, …, xD are not the schema's names. Or an array, always by position:
                (N, D) of the columns in the schema's order, or with the given ones in the table's.
            given: The condition where `rows` does not hold it: a table or array of N rows, or
                name → value for all rows.

        Returns:
            float64 of shape (N,).

        Raises:
            InputError: When a column is missing, or its name is misspelt.
        """
        values, condition = self._split(rows, given)
        z = self.schema.standardise(values)
        log_p = np.asarray(self.flow.log_prob(_cast(z, self.flow), _cast(condition, self.flow)))
        log_p = log_p.astype(np.float64) + self.schema.log_det
        return np.where(self.schema.on_support(values), log_p, -np.inf)

    def sample(self, key: PRNGKeyArray, n: int, given: Given = None) -> Table:
        """Draw rows in the user's units.

        Values of columns of ties are rounded to those that the column can take, and constants have
        their value.

        Args:
            key: Random key.
            n: How many rows, for each row of `given` if there are any.
            given: The condition: a table, an array (M, C), or name → value.

        Returns:
            A table of n rows, or of n · M rows: n for the first condition, then n for the second.
            It has the columns of the fitted table in their order, the given ones among them.
        """
        if n < 1:
            raise InputError(f"The number of rows to sample must be at least 1, not {n}.")
        names = self.schema.names
        if not self.schema.given:
            if given is not None:
                raise InputError("The model takes no condition; sample without given values.")
            z = np.asarray(self.flow.sample(key, (n,)))
            return Table(names, self.schema.restore(z), "the samples")
        conditions = self._given(given, None)
        standard = self.schema.condition(conditions)
        rows = np.repeat(conditions, n, axis=0)
        if standard is None:
            z = np.asarray(self.flow.sample(key, (len(rows),)))
        else:
            z = np.asarray(self.flow.sample(key, (n,), _cast(standard, self.flow)))
            z = np.moveaxis(z, 0, 1).reshape(len(rows), -1)
        values = np.concatenate([self.schema.restore(z), rows], axis=1)
        drawn = Table((*names, *self.schema.given_names), values, "the samples")
        return drawn.select(self.schema.order)

    def batch(self, rows: Table | np.ndarray, given: Given = None) -> tuple[Array, Array | None]:
        """Standardised events (N, d) and conditions (N, c), as the inner flow takes them."""
        values, condition = self._split(rows, given)
        return _cast(self.schema.standardise(values), self.flow), _cast(condition, self.flow)

    def _split(self, rows: Table | np.ndarray, given: Given) -> tuple[np.ndarray, Any]:
        """Columns of the rows, (N, D), and the standardised condition."""
        names, given_names = self.schema.names, self.schema.given_names
        if isinstance(rows, Table):
            known = rows.named or set(names) <= set(rows.names)
            table = rows if known else self._named(rows, given is None)
        else:
            table = self._named(array_table(rows, source="the array of rows"), given is None)
        missing = [name for name in names if name not in table.names]
        if missing:
            error = unknown_column(missing[0], table.names, table.source)
            raise InputError(f"{str(error).rstrip('.')} (the model needs {_count(names)}).")
        values = table.select(names).values
        if not self.schema.given:
            return values, None
        if given is None:
            absent = [name for name in given_names if name not in table.names]
            if absent:
                raise InputError(
                    f"{table.source} has no column {absent[0]!r}, on which the model is "
                    f"conditioned; add the column or give its value."
                )
            given = table.select(given_names)
        return values, self.schema.condition(self._given(given, len(values)))

    def _named(self, table: Table, whole: bool) -> Table:
        """Give columns without names those of the schema, by position."""
        names = self.schema.names
        if whole and table.values.shape[1] != len(names):
            names = self.schema.order
        if table.values.shape[1] != len(names):
            raise InputError(
                f"{table.source} has {table.values.shape[1]} columns and the model was fitted to "
                f"{_count(names)}."
            )
        return Table(names, table.values, table.source, rows=table.rows)

    def _given(self, given: Given, rows: int | None) -> np.ndarray:
        """The given columns in the schema's order, (rows, C)."""
        names = self.schema.given_names
        if given is None:
            raise InputError(f"The model is conditioned on {_count(names)}; give a value for each.")
        if isinstance(given, Mapping):
            for name in given:
                if name not in names:
                    raise unknown_column(name, names, "The condition")
            for name in names:
                if name not in given:
                    raise InputError(f"The condition has no value for {name!r}; give one.")
            values = np.array([[float(given[name]) for name in names]])
        else:
            if isinstance(given, Table):
                table, known = given, given.named or set(names) <= set(given.names)
            else:
                table, known = array_table(given, source="the condition"), False
            if not known and table.values.shape[1] == len(names):
                table = Table(names, table.values, table.source)
            values = table.select(names).values
        refuse_non_finite(Table(names, values, "The condition"))
        if rows is not None and len(values) == 1:
            values = np.repeat(values, rows, axis=0)
        if rows is not None and len(values) != rows:
            raise InputError(
                f"There are {rows} rows and {len(values)} conditions; give one for each row."
            )
        return values


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
    flow: str = "auto",
    seed: int = 0,
    validation: float = 0.1,
    notify: Callable[[str], None] = lambda note: None,
    **options: Any,
) -> tuple[TableFlow, dict[str, Any]]:
    """Fit a flow to the rows of a table.

    A part of the rows, drawn by the seed, is held out for the score and decides nothing. Of the
    others location and scale are taken; a part of them is set aside again, to stop training or to
    choose by. The default for small tables trains no network, and is fitted once more to all rows
    after it has been scored.

    Args:
        table: Finite rows, at least `MIN_ROWS`.
        given: Columns to condition on: the density is that of the others given these.
        weights: The column of the rows' weights, which is not modelled.
        flow: ``"auto"`` chooses by the size of the table and on held-out rows; otherwise a name in
            `laminar.zoo.BUILDERS`.
        seed: Of the split, the noise on ties, the parameters and the order of batches.
        validation: Fraction of rows held out, and of the others set aside for early stopping.
        notify: Called before training with each thing a user should know about the columns.
        **options: Passed on to `laminar.train.fit`: ``steps``, ``time_limit``, ``batch_size``,
            ``learning_rate``, ``checkpoint``, ``resume``, ``progress``.

    Returns:
        The fitted flow, and a report that JSON can express: rows, columns, notes, the mean
        held-out log-density in the user's units with its standard error, that of a Gaussian on the
        same rows, and the course of training.

    Raises:
        InputError: When rows or columns cannot be used; the message says which and why.
        TrainingError: When training stays non-finite; rows have their numbers in the table.
    """
    begun = time.monotonic()
    train_flow = fit_auto if flow == "auto" else fit_named(flow)
    data = _prepare(table, tuple(given), weights, seed, validation)
    for note in data.notes:
        notify(note)
    schema, auto = data.schema, flow == "auto"
    try:
        # Networks have fresh noise in every batch.
        rows = data.part(data.train, noisy=auto)
        trained = train_flow(seed, rows, noise=schema.noise, validation=validation, **options)
    except TrainingError as error:
        raise error.renumbered(data.table.rows[data.train].tolist()) from error
    model = TableFlow(trained.flow, schema)
    log_p = model.log_prob(data.table.take(data.held))
    held = data.part(data.held, noisy=False)
    report = {
        "table": table.source,
        "rows": len(data.table),
        "train_rows": len(data.train),
        "held_out_rows": len(data.held),
        "columns": list(schema.names),
        "dimensions": len(schema.modelled),
        "given": list(given),
        "weights": weights,
        "flow": flow,
        "seed": seed,
        "held_out": weighted_mean(log_p, held.weights),
        "gaussian": score(gaussian(data.part(data.train, noisy=True)), held, schema),
        "training": trained.report,
        "notes": data.notes,
    }
    if trained.refit is not None:
        # Without networks it is quick to use the held-out rows too, and where rows are few it pays.
        everything = data.part(np.arange(len(data.table)), noisy=True)
        model = TableFlow(trained.refit(everything), schema)
    return model, {**report, "seconds": round(time.monotonic() - begun, 3)}


class _Data(NamedTuple):
    """A table made ready for training: checked, split, and in standardised units.

    Attributes:
        table: Without the column of weights, and without rows of weight zero.
        schema: Its columns.
        z: Standardised rows, (N, d).
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
    table: Table, given: tuple[str, ...], weights: str | None, seed: int, validation: float
) -> _Data:
    w = None
    if weights is not None:
        w, table = _weights(table, weights, given)
    table.positions(given)
    if len(table) < MIN_ROWS:
        raise InputError(
            f"{table.source} has {len(table)} row{'s' * (len(table) != 1)}, and fitting needs at "
            f"least {MIN_ROWS}."
        )
    rng = np.random.default_rng(seed)
    train, held = split(len(table), validation, rng)
    schema = learn_schema(table, given, train)
    z = schema.standardise(table.select(schema.names).values)
    notes = schema.notes()
    notes += [
        f"Column {schema.modelled[i].name!r} is a linear function of other columns, so that the "
        f"density is unbounded; leave it out."
        for i in dependent(z)
    ]
    noisy = z + schema.noise * rng.uniform(-0.5, 0.5, z.shape)
    conditions = schema.condition(table.select(given).values) if given else None
    return _Data(table, schema, z, noisy, conditions, w, train, held, notes)


class Trained(NamedTuple):
    """What `fit_auto` and the functions of `fit_named` return.

    Attributes:
        flow: A distribution of standardised rows.
        report: The course of training, of what JSON can express.
        refit: Fits the same density to other rows, where that is quick.
    """

    flow: Flow
    report: dict[str, Any]
    refit: Callable[[Rows], Flow] | None = None


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
            Batch(*(_cast(part, flow) for part in rows.take(index))) for index in (kept, stop)
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


def summary(history: History) -> dict[str, Any]:
    """The course of training without the loss of every step."""
    whole = history.to_dict()
    return {name: value for name, value in whole.items() if name not in ("loss", "rate")}


def score(density: Mixture, rows: Rows, schema: Schema) -> dict[str, Any]:
    """The mean log-density of a baseline in the user's units."""
    return weighted_mean(density.log_prob(rows) + schema.log_det, rows.weights)


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


def _weights(table: Table, name: str, given: tuple[str, ...]) -> tuple[np.ndarray, Table]:
    """The column of weights, checked and scaled to mean one, and the table without it."""
    weights = table.column(name)
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
    rest = [column for column in table.names if column != name]
    if not rest:
        raise InputError(f"{table.source} has no column besides the weights; name one to model.")
    keep = np.flatnonzero(weights > 0)
    weights = weights[keep]
    return weights / weights.mean(), table.select(rest).take(keep)


def _cast(values: np.ndarray | None, flow: AbstractDistribution) -> Any:
    """Host float64 as an array of the flow's dtype; what overflows becomes an infinity."""
    if values is None:
        return None
    with np.errstate(over="ignore"):
        return jnp.asarray(np.asarray(values).astype(flow.dtype))


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} column{'s' * (len(names) != 1)}: {listing(names)}"
