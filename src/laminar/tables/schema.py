r"""The columns of a table whose rows have a density, and what a flow is given of them.

Where every column is real, positive or bounded, without gaps, an event is the vector of
standardised values. A column of ties is then *dequantised*: a density could rise without bound on
its values, so the flow is fitted to x + resolution · u with u uniform on (−½, ½), and what is
scored is the density of that variable, at x itself. As soon as one column has categories, whole
numbers with ties, single values of their own or gaps, the table is *mixed*: events are values and
states (see `laminar.mixed`), and nothing is dequantised.

A constant column has no density at all: the row's density is that of the other columns, and −inf
where the constant differs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from laminar._errors import InputError
from laminar.mixed import ColumnLaw
from laminar.tables.cells import Cells
from laminar.tables.columns import FINE, Column
from laminar.tables.infer import SURE, check_declared, learn_column
from laminar.tables.table import Table, listing

_SMOOTHED = "smoothed by uniform noise"
_SPIKED = 0.1  # of the rows, on single values of a column: a table of real columns is mixed then


@dataclass(frozen=True)
class Schema:
    """The columns of a table whose rows have a density, and those it is conditioned on.

    Attributes:
        columns: The columns that rows consist of, those left out among them, in the user's order.
        given: The columns of the condition; a constant one carries no information and is ignored.
        order: The names of both in the order of the table, in which samples are given and rows
            without names are read.
        mixed: Whether events are values and states, (2, d), or values alone, (d,).
    """

    columns: tuple[Column, ...]
    given: tuple[Column, ...]
    order: tuple[str, ...]
    mixed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns that rows consist of."""
        return tuple(column.name for column in self.columns)

    @property
    def given_names(self) -> tuple[str, ...]:
        """Names of the columns of the condition."""
        return tuple(column.name for column in self.given)

    @property
    def modelled(self) -> tuple[Column, ...]:
        """The columns that are left: the dimensions of the flow."""
        return tuple(column for column in self.columns if column.modelled)

    @property
    def conditions(self) -> tuple[Column, ...]:
        """The given columns that are left."""
        return tuple(column for column in self.given if column.modelled)

    @property
    def cond_size(self) -> int:
        """The length of the flow's condition."""
        return sum(column.given_size for column in self.conditions)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an event."""
        d = len(self.modelled)
        return (2, d) if self.mixed else (d,)

    @property
    def laws(self) -> tuple[ColumnLaw, ...]:
        """What the columns of a mixed table are."""
        return tuple(column.law for column in self.modelled)

    @property
    def cells(self) -> dict[str, Cells]:
        """How the numbers of each column stand for the user's cells."""
        return {column.name: column.cells for column in (*self.columns, *self.given)}

    @property
    def noise(self) -> np.ndarray:
        """Widths of the dequantising noise in standardised units; shape (d,)."""
        if self.mixed:
            return np.zeros(len(self.modelled))
        return np.array([column.resolution / column.scale for column in self.modelled])

    def encode(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of all columns as events, and the part of the log-density that the units bring.

        Args:
            values: (N, D), float64, NaN where missing.

        Returns:
            Events (N, *shape) and terms (N,); −inf where a row lies outside the support.
        """
        terms = np.zeros(len(values))
        numbers, states = [], []
        for column, x in zip(self.columns, values.T, strict=True):
            if not column.modelled:
                terms = terms + np.where(column.supports(x), 0.0, -np.inf)
            elif self.mixed:
                value, state, term = column.encode(x)
                numbers.append(value)
                states.append(state)
                terms = terms + term
            else:
                value, term = column.place(x)
                numbers.append(value)
                terms = terms + term
        z = np.stack(numbers, axis=1)
        return (np.stack([z, np.stack(states, axis=1)], axis=1) if self.mixed else z), terms

    def completed(self, table: Table) -> Table:
        """The table with an empty column for each that is left out here and absent there."""
        absent = [c for c in self.columns if c.kind == "ignored" and c.name not in table.names]
        if not absent:
            return table
        gone = np.full((len(table), len(absent)), np.nan)
        return dataclasses.replace(
            table,
            names=(*table.names, *(c.name for c in absent)),
            values=np.concatenate([table.values, gone], axis=1),
            cells=(*table.cells, *(c.cells for c in absent)),
        )

    def new_gaps(self, table: Table) -> np.ndarray:
        """Whether rows have a gap in a column that had none in the fit, (N,)."""
        whole = [c.name for c in (*self.columns, *self.given) if c.modelled and not c.missing]
        gone = np.isnan(table.select([name for name in whole if name in table.names]).values)
        return np.asarray(gone.any(axis=1))

    def condition(self, values: np.ndarray) -> np.ndarray | None:
        """Rows of given columns, (N, C), as conditions (N, c), or None when c = 0."""
        parts = [
            column.as_condition(x)
            for column, x in zip(self.given, values.T, strict=True)
            if column.modelled
        ]
        return np.concatenate(parts, axis=1) if parts else None

    def decode(self, events: np.ndarray, seed: int = 0) -> np.ndarray:
        """Events (N, *shape) as rows of all columns in the user's units, (N, D), NaN where missing.

        Args:
            events: What the flow draws.
            seed: Of the draws among rare categories.
        """
        rng = np.random.default_rng(seed)
        events = np.asarray(events, dtype=np.float64)
        parts, position = [], 0
        for column in self.columns:
            if not column.modelled:
                value = column.location if column.kind == "constant" else math.nan
                parts.append(np.full(len(events), value))
                continue
            if self.mixed:
                value, state = events[:, 0, position], events[:, 1, position]
                parts.append(column.decode(value, state, rng))
            else:
                parts.append(column.restore(events[:, position]))
            position += 1
        return np.stack(parts, axis=1)

    def notes(self) -> list[str]:
        """What a user should know about the columns, one sentence each."""
        return [*self._left_out(), *self._kinds(), *(() if self.mixed else self._ties())]

    def _left_out(self) -> list[str]:
        notes = []
        constants = [c.name for c in self.columns if c.kind == "constant"]
        if constants:
            notes.append(
                f"{_columns(constants)} constant and left out of the density; samples repeat the "
                f"value, and a row with another value scores -inf."
            )
        ignored = [c.name for c in self.columns if c.kind == "ignored"]
        if ignored:
            notes.append(
                f"{_columns(ignored)} left out of the density and empty in samples: identifiers "
                "(texts that mostly differ, whole numbers that never repeat), free text, or "
                "declared ignored. To keep one, declare its kind."
            )
        unused = [c.name for c in self.given if not c.modelled]
        if unused:
            notes.append(
                f"{_columns(unused)} constant, or an identifier, and ignored as a condition."
            )
        return notes

    def _kinds(self) -> list[str]:
        if not self.mixed:
            return []
        notes = []
        gaps = [c.name for c in self.modelled if c.missing]
        if gaps:
            notes.append(
                f"{_columns(gaps, 'has', 'have')} missing cells; a missing cell has a probability "
                "of its own, and what is said of the values behind the gaps assumes that they are "
                "missing at random."
            )
        discrete = [c.name for c in self.modelled if c.law.value != "density"]
        if discrete:
            notes.append(
                f"{_columns(discrete, 'counts', 'count')} with the probability of "
                f"{'its' if len(discrete) == 1 else 'their'} values, the others with a density."
            )
        rare = [c.name for c in self.modelled if c.rare]
        if rare:
            notes.append(
                f"{_columns(rare, 'has', 'have')} many categories; the rare ones share one state, "
                "in which each keeps its share."
            )
        return notes

    def _ties(self) -> list[str]:
        notes = []
        groups: dict[tuple, list[Column]] = {}
        for column in self.modelled:
            if column.discrete and column.resolution > 0:
                groups.setdefault((column.resolution, bool(column.levels)), []).append(column)
        for (resolution, irregular), members in groups.items():
            many = len(members) > 1
            grid = "values off any regular grid" if irregular else "few distinct values or ties"
            notes.append(
                f"{_columns([c.name for c in members], 'takes', 'take')} {grid}; dequantised at "
                f"{'their' if many else 'its'} resolution {resolution:.6g}: densities are those of "
                f"the value plus uniform noise of that width."
            )
        shared = [c for c in self.modelled if not c.discrete and c.levels]
        if len(shared) == 1:
            values = listing([f"{value:.6g}" for value in shared[0].levels], 4)
            notes.append(
                f"Column {shared[0].name!r} has {values} in many rows; {_SMOOTHED} of width "
                f"{shared[0].resolution:.3g}, because the density on a shared value is unbounded."
            )
        elif shared:
            notes.append(
                f"{_columns([c.name for c in shared], 'has', 'have')} single values that many rows "
                f"share; {_SMOOTHED} of 1% of a standard deviation, because the density on a "
                f"shared value is unbounded."
            )
        return notes


def learn_schema(
    table: Table,
    given: Sequence[str] = (),
    rows: np.ndarray | None = None,
    kinds: Mapping[str, str] | None = None,
    partial: bool = False,
) -> Schema:
    """Find out what the columns are.

    Args:
        table: The rows; NaN where a cell is missing.
        given: The columns of the condition; all others are modelled.
        rows: Indices of the rows that location and scale are taken from (the training split); what
            kind of column it is comes from all rows.
        kinds: For some columns what the user says they are; see `laminar.tables.infer`.
        partial: Whether the table is to be mixed in any case.

    Raises:
        InputError: When no modelled column remains, or a declaration does not fit.
    """
    kinds = dict(kinds or {})
    check_declared(kinds, table.names, table.source)
    names = [name for name in table.names if name not in given]
    if not names:
        raise InputError(
            f"{table.source} has no column left to model; name fewer columns with --given."
        )
    train = table if rows is None else table.take(rows)
    cells = dict(zip(table.names, table.cells, strict=True))

    def column(name: str, condition: bool) -> Column:
        return learn_column(
            name,
            table.column(name),
            train.column(name),
            condition,
            cells=cells[name],
            declared=kinds.get(name),
            typed=table.named,
        )

    columns = tuple(column(name, False) for name in names)
    # A bare array says nothing of its columns, and a few ties are those of rounding: then single
    # values that many rows share are smoothed.
    spiked = table.named and any(
        np.isin(table.column(c.name), c.spikes).mean() >= _SPIKED for c in columns if c.modelled
    )
    mixed = partial or spiked or any(c.modelled and not c.plain for c in columns)
    if mixed:
        columns = tuple(_exact(c, len(table)) if c.kind == "real" else c for c in columns)
    schema = Schema(columns, tuple(column(name, True) for name in given), table.names, mixed)
    if not schema.modelled:
        raise InputError(
            f"{table.source}: {_columns(names)} constant or ignored, so that no density remains to "
            "fit; choose a column that varies."
        )
    return schema


def _exact(column: Column, rows: int) -> Column:
    """A real column as it is in a mixed table, where nothing is dequantised.

    On a grid its values have the probabilities of cells; those of an irregular list are categories;
    single ones that many rows share have a probability each.
    """
    if not column.discrete:
        return dataclasses.replace(column, resolution=0.0)
    if column.step > 0:
        fine = column.step < FINE * column.scale
        # An amount whose least value is zero has none below.
        low = 0.0 if column.origin == 0 and rows >= SURE and not fine else None
        return dataclasses.replace(column, cell=True, fine=fine, low=low)
    return dataclasses.replace(column, codes=column.levels, unseen=1.0 / (rows + 2))


def dependent(z: np.ndarray) -> list[int]:
    """Positions of standardised columns, (N, d), that are linear functions of other columns.

    Found by a pivoted QR decomposition; columns early in the pivot order are kept.
    """
    from scipy.linalg import qr

    sample = z[:10_000]
    centred = sample - sample.mean(axis=0)
    norms = np.sqrt((centred**2).sum(axis=0))
    centred = centred / np.where(norms > 0, norms, 1.0)
    if len(centred) <= centred.shape[1]:
        return []
    triangle, order = qr(centred, mode="r", pivoting=True)  # type: ignore[misc]
    small = np.abs(np.diag(np.asarray(triangle))) < 1e-7
    return sorted(int(position) for position in np.asarray(order)[small])


def _columns(names: Sequence[str], one: str = "is", many: str = "are") -> str:
    quoted = [repr(name) for name in names]
    if len(quoted) == 1:
        return f"Column {quoted[0]} {one}"
    return f"{len(quoted)} columns ({listing(quoted, 6)}) {many}"
