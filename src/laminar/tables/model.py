"""TableFlow: the density of a table's rows in the user's units."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._errors import InputError
from laminar._lengths import bucket
from laminar._typing import Array, PRNGKeyArray
from laminar.density import AbstractDistribution
from laminar.mixed import WITHHELD, AutoregressiveDistribution
from laminar.tables.calibration import Calibration
from laminar.tables.cells import UNSEEN, CellError, Cells
from laminar.tables.frames import from_frame, is_frame
from laminar.tables.schema import Schema
from laminar.tables.table import (
    Table,
    array_table,
    listing,
    recode,
    refuse_non_finite,
    unknown_column,
)

Given = Table | Mapping[str, Any] | np.ndarray | None

PARTICLES = 256
"""Draws of the missing cells of a row from which those that are given out are chosen."""

_LEAST_PADDED, _DOUBLED = 32, 4096  # rows; above the second three quarters are lengths too
_MOST_SCALARS = 10_000_000  # of particles at once, so that memory stays bounded
_FAR = 10.0  # deviations of a condition, beyond which nothing is known
_ENOUGH = 32.0  # particles, effectively, behind the draws of a row
_MOST = 64  # times as many particles for rows whose first ones nearly all miss


class TableFlow(eqx.Module):
    """A flow over rows in standardised units and the schema that ties it to a table's own units.

    The log-density of a row is that of a density in the columns that have one, and of a probability
    in the others: categories, whole numbers, points of a grid, gaps (see `laminar.tables.schema`).

    Args:
        flow: A distribution of events of the schema's shape, with conditions (c,) where columns
            are given.
        schema: The columns.
        calibration: Scores of rows that were held out, by which strange rows are told: see
            `laminar.tables.anomaly.Detector`.
    """

    flow: AbstractDistribution
    schema: Schema = eqx.field(static=True)
    calibration: Calibration | None = None

    def __check_init__(self):
        shape = self.schema.shape
        if self.flow.shape != shape:
            raise InputError(
                f"TableFlow: the schema has {shape[-1]} columns that vary, in events of shape "
                f"{shape}, and the flow has events of shape {self.flow.shape}."
            )

    def log_prob(self, rows: Table | np.ndarray, given: Given = None) -> np.ndarray:
        """The log-density of each row, ln p(row | given), in nats and the user's units.

        A row in which a constant column has another value, or a value lies where its column has
        none, scores −inf. A category that was not there when the model was fitted has the
        probability that the next row brings a new one. A missing cell counts with the probability
        that it is missing if the column had gaps; otherwise, in a mixed table, the row scores the
        density of its other columns.

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
            InputError: When a column is missing, its name is misspelt, or a cell cannot be read as
                what its column is.
        """
        events, condition, terms = self._encoded(rows, given)
        parts = (cast(padded(part), self.flow) for part in (events, condition))
        log_p = np.asarray(self.flow.log_prob(*parts))[: len(terms)]
        # Rows outside the support were moved inside it, so what the flow says of them is finite.
        return np.where(np.isneginf(terms), -np.inf, log_p.astype(np.float64) + terms)

    def sample(
        self,
        key: PRNGKeyArray,
        n: int,
        given: Given = None,
        *,
        fixed: Mapping[str, Any] | None = None,
    ) -> Table:
        """Draw rows in the user's units.

        Values of columns of ties are rounded to those that the column can take, and constants have
        their value; categories, dates and gaps are as in the table.

        Args:
            key: Random key.
            n: How many rows, for each row of `given` if there are any.
            given: The condition: a table, an array (M, C), or name → value.
            fixed: For some columns, name → the value that all rows shall have, as in "what if":
                the others are drawn conditional on it. For models of mixed tables.

        Returns:
            A table of n rows, or of n · M rows: n for the first condition, then n for the second.
            It has the columns of the fitted table in their order, the given ones among them. Where
            fixed values are so improbable together that few draws count beside them, rows repeat,
            and a warning says so.

        Raises:
            InputError: If n is not positive, a condition is missing or not wanted, or a fixed value
                is none that its column can have, or impossible beside another.
        """
        if n < 1:
            raise InputError(f"The number of rows to sample must be at least 1, not {n}.")
        schema = self.schema
        if not schema.given and given is not None:
            raise InputError("The model takes no condition; sample without given values.")
        conditions = self._given(given, None) if schema.given else None
        count = 1 if conditions is None else len(conditions)
        standard = None if conditions is None else schema.condition(conditions)
        if conditions is not None:
            _say_far(schema, conditions)
        held = None if fixed is None else self._fixed(fixed)
        if held is not None:
            events = np.repeat(self._opened(schema.encode(held)[0], held), count, axis=0)
            drawn, effective = self._completed(key, events, standard, n, PARTICLES)
            _say_collapsed(effective, n)
        elif standard is None:
            drawn = np.asarray(self.flow.sample(key, (padded_length(n * count),)))[: n * count]
        else:
            drawn = np.asarray(
                self.flow.sample(key, (padded_length(n),), cast(padded(standard), self.flow))
            )[:n, :count]
            drawn = np.moveaxis(drawn, 0, 1).reshape(n * count, *schema.shape)
        values = schema.decode(drawn, seed=_seed(key))
        if held is not None:
            # As the user gave them: single precision has fewer digits, and rare categories share.
            values = np.where(np.isnan(held), values, held)
        table = self._table(schema.names, values, "the samples")
        if conditions is None:
            return table
        rows = np.repeat(conditions, n, axis=0)
        both = np.concatenate([values, rows], axis=1)
        return self._table((*schema.names, *schema.given_names), both, "the samples").select(
            schema.order
        )

    def impute(
        self,
        key: PRNGKeyArray,
        rows: Table,
        draws: int = 1,
        *,
        given: Given = None,
        particles: int = PARTICLES,
    ) -> tuple[Table, np.ndarray]:
        r"""Fill in missing cells with draws from their law given the cells that are there.

        The missing cells of a row are drawn `particles` times, column by column, weighted by the
        probability of the cells that are there, and resampled by these weights
        (`laminar.mixed.AutoregressiveDistribution.complete`). Cells are taken to be missing at
        random: that a cell is missing says nothing of its value beyond what the others say.

        Args:
            key: Random key.
            rows: A table with the columns of the schema; NaN where a cell is missing.
            draws: How many draws of each row.
            given: The condition, as in `log_prob`.
            particles: Draws that the result is chosen from. Rows in which nearly all of them miss,
                because the cells that are there say much of the others, get up to 64 times as many.

        Returns:
            The table of draws · N rows, all draws of the first row first; and the effective sample
            size of the particles of each row, (N,): where it is small the draws repeat, and where
            it is 0 the cells that are there cannot stand beside each other.

        Raises:
            InputError: If the model is not one of mixed rows, or a cell that is there is none that
                its column can have.
        """
        if draws < 1:
            raise InputError(f"The number of draws must be at least 1, not {draws}.")
        rows = from_frame(rows) if is_frame(rows) else rows
        values, condition = self._split(rows, given)
        self._refuse_impossible(values, rows)
        events, _ = self.schema.encode(values)
        filled, effective = self._completed(
            key, self._opened(events, values), condition, draws, max(particles, draws)
        )
        whole = self.schema.decode(filled, seed=_seed(key))
        kept = np.repeat(values, draws, axis=0)
        whole = np.where(np.isnan(kept), whole, kept)
        table = self._table(self.schema.names, whole, f"{rows.source}, filled in")
        beside = [name for name in self.schema.given_names if name in rows.names]
        if beside:
            known = rows.select(beside)
            table = Table(
                (*table.names, *beside),
                np.concatenate([table.values, np.repeat(known.values, draws, axis=0)], axis=1),
                table.source,
                cells=(*table.cells, *known.cells),
            ).select([n for n in self.schema.order if n in (*table.names, *beside)])
        return _with_new_texts(table, rows, draws), effective

    def batch(self, rows: Table | np.ndarray, given: Given = None) -> tuple[Array, Array | None]:
        """Events (N, *shape) and conditions (N, c), as the inner flow takes them."""
        events, condition, _ = self._encoded(rows, given)
        return cast(events, self.flow), cast(condition, self.flow)

    # ------------------------------------------------------------------------------ internals

    def _encoded(self, rows, given) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Events, conditions, and the log-density's terms of the units."""
        values, condition = self._split(rows, given)
        if isinstance(rows, Table) and not self.schema.mixed:
            table = Table(self.schema.names, values, rows.source, rows=rows.rows)
            table = table.select([column.name for column in self.schema.modelled])
            if np.isnan(table.values).any():
                refuse_non_finite(table)
        events, terms = self.schema.encode(values)
        return events, condition, terms

    def _partial(self) -> AutoregressiveDistribution:
        """The flow as one whose columns can be withheld, given that no cell is missing."""
        if not isinstance(self.flow, AutoregressiveDistribution):
            raise InputError(
                "This model has one density for whole rows, and cannot fill in cells or hold "
                "columns fixed; fit it with partial=True (--partial)."
            )
        return self.flow.without_gaps()

    def _opened(self, events: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Events in which missing cells are withheld, and no longer gaps."""
        self._partial()
        kept = [column.modelled for column in self.schema.columns]
        gone = np.isnan(values[:, kept])
        return np.where(gone[:, None], np.array([0.0, WITHHELD])[:, None], events)

    def _refuse_impossible(self, values: np.ndarray, rows: Table) -> None:
        """Refuse cells that their columns cannot have, by row and column."""
        for column, x in zip(self.schema.columns, values.T, strict=True):
            bad = np.flatnonzero(~column.supports(x))
            if len(bad):
                raise InputError(
                    f"{rows.source}: column {column.name!r}, row {rows.rows[bad[0]]} holds "
                    f"{x[bad[0]]:g}, which the model says it cannot; correct it, or leave it empty."
                )

    def _fixed(self, fixed: Mapping[str, Any]) -> np.ndarray:
        """One row of the columns held fixed, (1, D), NaN in the others."""
        schema = self.schema
        values = np.full((1, len(schema.names)), np.nan)
        for name, cell in fixed.items():
            if name not in schema.names:
                raise unknown_column(name, schema.names, "The model")
            column = schema.columns[schema.names.index(name)]
            x = _number(name, cell, column.cells)
            known = (*column.codes, *column.rare)
            if np.isnan(x) or (known and x not in known) or not column.supports(np.array([x]))[0]:
                hint = ""
                if known:
                    cells = column.cells.decode(np.asarray(column.codes))
                    hint = f": it has {listing([str(c) for c in cells], 6)}"
                raise InputError(
                    f"Column {name!r} cannot have the value {cell!r}{hint}; give one that it can "
                    "take."
                )
            values[0, schema.names.index(name)] = x
        return values

    def _completed(
        self,
        key: PRNGKeyArray,
        events: np.ndarray,
        condition: np.ndarray | None,
        draws: int,
        particles: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws of whole events, (N · draws, 2, d), and effective sample sizes (N,)."""
        particles = bucket(particles, PARTICLES, doubled=PARTICLES)
        filled, effective = [], []
        size = max(_MOST_SCALARS // (particles * 2 * len(self.schema.modelled)), 1)
        for begin in range(0, len(events), size):
            draw_key, choose_key = jr.split(jr.fold_in(key, begin))
            part = slice(begin, begin + size)
            own = None if condition is None else condition[part]
            found = self._weighted(draw_key, events[part], own, max(_ENOUGH, draws), particles)
            effective += [_effective(log_w) for _, log_w in found]
            # Systematic resampling: one uniform number, and equal steps through the weights.
            start = np.asarray(jr.uniform(choose_key, (padded_length(len(found)),)), np.float64)
            for (x, log_w), u in zip(found, start, strict=False):
                top = log_w.max()
                heaped = np.cumsum(np.exp(log_w - (top if np.isfinite(top) else 0.0)))
                points = (u + np.arange(draws)) / draws
                chosen = np.searchsorted(heaped, points * heaped[-1])
                filled.append(x[np.minimum(chosen, len(x) - 1)])
        return np.concatenate(filled), np.asarray(effective)

    def _weighted(
        self,
        key: PRNGKeyArray,
        events: np.ndarray,
        condition: np.ndarray | None,
        wanted: float,
        particles: int,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Particles (P, 2, d) of each row and their log-weights (P,), more where few of them count.

        Rows that lack some fill the whole batch in further rounds, so that all of them run the
        same program.
        """
        flow, length = self._partial(), padded_length(len(events))
        found = [(np.zeros((0, *self.schema.shape)), np.zeros(0)) for _ in events]
        rows, turn = np.arange(length) % len(events), 0
        while len(rows):
            own = None if condition is None else cast(condition[rows], flow)
            x, log_w = flow.complete(
                jr.fold_in(key, turn), cast(events[rows], flow), (particles,), own
            )
            x, log_w = np.asarray(x), np.asarray(log_w, np.float64)
            lacking = []
            for row in np.unique(rows):
                mine = np.flatnonzero(rows == row)[:_MOST]
                drawn = x[:, mine].reshape(-1, *self.schema.shape)
                own_x, own_w = found[row]
                found[row] = (
                    np.concatenate([own_x, drawn]),
                    np.concatenate([own_w, log_w[:, mine].reshape(-1)]),
                )
                count = len(found[row][1])
                if _effective(found[row][1]) < wanted and count < _MOST * max(particles, wanted):
                    lacking.append(row)
            rows, turn = np.resize(np.asarray(lacking, dtype=int), length * bool(lacking)), turn + 1
        return found

    def _table(self, names: Sequence[str], values: np.ndarray, source: str) -> Table:
        """A table of rows that this model made, with the cells of the table it was fitted to."""
        cells = self.schema.cells
        return Table(tuple(names), values, source, cells=tuple(cells[name] for name in names))

    def _split(self, rows: Table | np.ndarray, given: Given) -> tuple[np.ndarray, Any]:
        """Columns of the rows, (N, D), and the standardised condition."""
        names, given_names = self.schema.names, self.schema.given_names
        rows = from_frame(rows, "the frame of rows") if is_frame(rows) else rows
        if isinstance(rows, Table):
            known = rows.named or set(names) <= set(rows.names)
            table = rows if known else self._named(rows, given is None)
        else:
            table = self._named(array_table(rows, source="the array of rows"), given is None)
        table = self.schema.completed(table)
        missing = [name for name in names if name not in table.names]
        if missing:
            error = unknown_column(missing[0], table.names, table.source)
            raise InputError(f"{str(error).rstrip('.')} (the model needs {_count(names)}).")
        own = {name: self.schema.cells[name] for name in names}
        values = recode(table.select(names), own).values
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
        return replace(table, names=names)

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
            cells = self.schema.cells
            values = np.array([[_number(name, given[name], cells[name]) for name in names]])
            for column, x in zip(self.schema.given, values[0], strict=True):
                known = (*column.codes, *column.rare)
                if known and x not in known and not np.isnan(x):
                    seen = listing([str(c) for c in column.cells.decode(np.array(column.codes))], 6)
                    raise InputError(
                        f"Column {column.name!r} has no category {given[column.name]!r}; it has "
                        f"{seen}."
                    )
        else:
            given = from_frame(given, "the frame of given rows") if is_frame(given) else given
            if isinstance(given, Table):
                table, known = given, given.named or set(names) <= set(given.names)
            else:
                table, known = array_table(given, source="the condition"), False
            if not known and table.values.shape[1] == len(names):
                table = replace(table, names=names)
            values = recode(table.select(names), {n: self.schema.cells[n] for n in names}).values
        whole = [
            n for n, column in zip(names, self.schema.given, strict=True) if not column.missing
        ]
        refuse_non_finite(Table(names, values, "The condition").select(whole))
        if rows is not None and len(values) == 1:
            values = np.repeat(values, rows, axis=0)
        if rows is not None and len(values) != rows:
            raise InputError(
                f"There are {rows} rows and {len(values)} conditions; give one for each row."
            )
        return values


def padded(rows: np.ndarray | None) -> np.ndarray | None:
    """Rows repeated up to one of few lengths, so that few programs are compiled."""
    if rows is None or not len(rows):
        return rows
    return rows[np.minimum(np.arange(padded_length(len(rows))), len(rows) - 1)]


def padded_length(rows: int) -> int:
    """The length that so many rows are padded to."""
    return bucket(rows, _LEAST_PADDED, doubled=_DOUBLED)


def _effective(log_w: np.ndarray) -> float:
    """The effective sample size (Σ w)² / Σ w² of particles; 0 where none has a weight."""
    top = log_w.max()
    if not np.isfinite(top):
        return 0.0
    w = np.exp(log_w - top)
    return float(w.sum() ** 2 / np.square(w).sum())


def _say_far(schema: Schema, conditions: np.ndarray) -> None:
    """Warn of conditions far beyond those that the model has seen."""
    for column, x in zip(schema.given, conditions.T, strict=True):
        if not column.modelled or column.states_only:
            continue
        far = np.abs(column.standardise(x)) > _FAR
        if far.any():
            warnings.warn(
                f"The condition {column.name} = {x[far][0]:g} lies more than {_FAR:g} deviations "
                "from those that the model was fitted to; what it says there is a guess.",
                stacklevel=3,
            )


def _say_collapsed(effective: np.ndarray, n: int) -> None:
    """Refuse fixed values that cannot stand together, and warn where their draws repeat."""
    least = float(effective.min())
    if least == 0:
        raise InputError(
            "The fixed values cannot stand beside each other: the model has found no row that has "
            "them all; fix fewer columns, or other values."
        )
    if least < max(min(n, _ENOUGH), n / 4):
        warnings.warn(
            f"The fixed values are improbable together: the rows repeat, and are worth about "
            f"{max(least, 1):.0f} independent draws{' of a condition' * (len(effective) > 1)}.",
            stacklevel=3,
        )


def _with_new_texts(table: Table, rows: Table, draws: int) -> Table:
    """The table with the texts of rows that are no levels of its own, as further levels."""
    values, cells = table.values.copy(), list(table.cells)
    for i, name in enumerate(table.names):
        new = values[:, i] == UNSEEN
        if cells[i].kind != "text" or not new.any():
            continue
        at = rows.names.index(name)
        texts = np.repeat(rows.cells[at].decode(rows.values[:, at]), draws)[new].astype(str)
        more, codes = np.unique(texts, return_inverse=True)
        values[new, i] = len(cells[i].levels) + codes
        cells[i] = replace(cells[i], levels=(*cells[i].levels, *map(str, more)))
    return replace(table, values=values, cells=tuple(cells))


def cast(values: np.ndarray | None, flow: AbstractDistribution) -> Any:
    """Host float64 as an array of the flow's dtype; what overflows becomes an infinity."""
    if values is None:
        return None
    with np.errstate(over="ignore"):
        return jnp.asarray(np.asarray(values).astype(flow.dtype))


def _number(name: str, cell: Any, cells: Cells) -> float:
    """The number of one cell that the user gave by name."""
    try:
        return float(cells.encode([cell])[0])
    except CellError as error:
        raise InputError(f"The value of {name!r} {error.reason}; give another.") from None


def _seed(key: PRNGKeyArray) -> int:
    return int(jr.bits(key, (), jnp.uint32))


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} column{'s' * (len(names) != 1)}: {listing(names)}"
