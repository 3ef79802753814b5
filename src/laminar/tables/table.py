"""A table in memory, and the sentences that its errors are made of.

Rows are counted from 1 and a header line is not counted, as a reader of the file counts them.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from laminar._errors import InputError
from laminar.tables.cells import EXACT, CellError, Cells, datetime_counts, localised, short


class UnknownColumnError(InputError):
    """A column is named that the table does not have."""


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of numbers, and what the numbers stand for.

    Attributes:
        names: Column names, all different.
        values: The cells as numbers, float64 of shape (N, D); NaN where a cell is missing.
        source: What to call the table in messages.
        named: Whether the names come from the source; arrays get x1, …, xD, and are matched with
            other tables by position.
        rows: The number of each row in the source, counted from 1; int64 of shape (N,).
        cells: How the numbers of each column stand for the user's cells; numbers when None.
        notes: What a user should know about how the table was read.
    """

    names: tuple[str, ...]
    values: np.ndarray
    source: str = "the table"
    named: bool = True
    rows: np.ndarray = field(default=None)  # type: ignore[assignment]
    cells: tuple[Cells, ...] = field(default=None)  # type: ignore[assignment]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        values = np.asarray(self.values, dtype=np.float64)
        names = tuple(str(name) for name in self.names)
        if values.ndim != 2 or values.shape[1] != len(names):
            raise InputError(
                f"{self.source} needs an array of shape (rows, {len(names)}) for its {len(names)} "
                f"columns and got shape {values.shape}."
            )
        refuse_duplicates(names, self.source)
        rows = self.rows
        cells = (Cells(),) * len(names) if self.cells is None else tuple(self.cells)
        if len(cells) != len(names):
            raise InputError(
                f"{self.source} has {len(names)} columns and {len(cells)} descriptions of cells; "
                f"give one for each column."
            )
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "rows", np.arange(1, len(values) + 1) if rows is None else rows)
        object.__setattr__(self, "cells", cells)

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str) -> np.ndarray:
        """The cells of one column, shape (N,)."""
        return self.values[:, self.positions((name,))[0]]

    def positions(self, names: Sequence[str]) -> list[int]:
        """Where the named columns stand; an unknown name is an error that suggests the nearest."""
        for name in names:
            if name not in self.names:
                raise unknown_column(name, self.names, self.source)
        return [self.names.index(name) for name in names]

    def select(self, names: Sequence[str]) -> "Table":
        """The table of the named columns, in the order given."""
        refuse_duplicates(names, "The list of columns")
        positions = self.positions(names)
        return replace(
            self,
            names=tuple(names),
            values=self.values[:, positions],
            cells=tuple(self.cells[position] for position in positions),
        )

    def take(self, index: np.ndarray) -> "Table":
        """The table of some rows, which keep their numbers."""
        return replace(self, values=self.values[index], rows=self.rows[index])

    def decoded(self) -> dict[str, np.ndarray]:
        """The user's cells of every column, name → array (N,), as `Cells.decode` gives them."""
        columns = zip(self.names, self.cells, self.values.T, strict=True)
        return {name: cells.decode(values) for name, cells, values in columns}

    def align(self, cells: Mapping[str, Cells]) -> "Table":
        """The table with some columns' cells encoded as those of another table; see `recode`."""
        return recode(self, cells)


def array_table(
    values: Any, names: Sequence[str] | None = None, source: str = "the array"
) -> Table:
    """A table from an array of shape (N, D) or (N,); unnamed columns are called x1, …, xD."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise InputError(f"{source} holds {array.dtype} values, and numbers are needed.")
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(f"{source} has shape {array.shape}, and (rows, columns) is needed.")
    labels = tuple(names) if names is not None else _array_names(array.shape[1])
    if array.dtype.kind in "iu":
        refuse_inexact(array, labels, source)
    kinds = {"b": Cells("boolean"), "i": Cells("integer"), "u": Cells("integer"), "f": Cells()}
    return Table(
        labels,
        array.astype(np.float64),
        source,
        named=names is not None,
        cells=(kinds[array.dtype.kind],) * len(labels),
    )


def recode(table: Table, cells: Mapping[str, Cells]) -> Table:
    """The same table with some columns' cells encoded as those of another table.

    Texts are matched by level, those of no level getting the code ``-1``. Where texts are wanted,
    numbers, booleans and dates are matched with the level that spells them; where numbers, booleans
    or dates are wanted, texts are read as such. Dates without a zone are wall-clock times in the
    zone that is wanted.

    Args:
        table: The table.
        cells: Column name → the cells wanted.

    Returns:
        The table with all its columns; those named are encoded anew, the others as they were.

    Raises:
        InputError: When the table has no such column, or a cell of it cannot be so understood; the
            message names column, row and cell.
    """
    values, kinds = table.values.copy(), list(table.cells)
    for position, name in zip(table.positions(tuple(cells)), cells, strict=True):
        wanted, column = cells[name], values[:, position]
        try:
            values[:, position] = _recoded(column, kinds[position], wanted)
        except CellError as error:
            raise InputError(
                f"{table.source}: column {name!r}, row {table.rows[error.position]} "
                f"{error.reason}; correct it, or leave out the row."
            ) from None
        kinds[position] = wanted
    return replace(table, values=values, cells=tuple(kinds))


def _recoded(column: np.ndarray, have: Cells, wanted: Cells) -> np.ndarray:
    numeric = ("number", "integer", "boolean")
    if have == wanted or (have.kind in numeric and wanted.kind in numeric[:2]):
        return column
    there = np.flatnonzero(~np.isnan(column))
    distinct, first, inverse = np.unique(column[there], return_index=True, return_inverse=True)
    # In the order of the rows, so that an error names the first.
    order = np.argsort(first)
    cells: Any = have.decode(distinct[order])
    if have.kind == wanted.kind == "datetime" and have.zone != wanted.zone:
        cells = _shown_in(cells, have.zone, wanted.zone)
    try:
        codes = wanted.encode(cells)
    except CellError as error:
        row = int(there[first[order[error.position]]])
        raise CellError(row, error.reason) from None
    recoded = np.full(len(column), np.nan)
    recoded[there] = codes[np.argsort(order)[inverse]]
    return recoded


def _shown_in(moments: np.ndarray, have: str, wanted: str) -> np.ndarray:
    """Dates in one zone as datetime64 for a column in another, or in none."""
    if have and wanted:
        return moments
    if have and len(moments):
        raise CellError(
            0, f"holds {moments[0]} of the time zone {have}, and dates without a zone are needed"
        )
    return localised(*datetime_counts(moments), wanted)


def unknown_column(name: str, names: Sequence[str], source: str) -> UnknownColumnError:
    """The error for a column that is not there, with the nearest name or the list of names."""
    folded = {column.casefold(): column for column in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]!r}?" if near else f"its columns are {listing(names)}."
    return UnknownColumnError(f"{source} has no column {name!r}; {hint}")


def listing(names: Sequence[str], limit: int = 12) -> str:
    """Names separated by commas, cut after a dozen."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"


def refuse_non_finite(table: Table, missing: bool = True) -> None:
    """Raise an error that counts the cells that cannot be used and names the first.

    Args:
        table: The table.
        missing: Whether missing cells are refused too, and not the infinite ones alone.
    """
    finite = np.isfinite(table.values) if missing else ~np.isinf(table.values)
    if finite.all():
        return
    position = int(np.flatnonzero(~finite.all(axis=0))[0])
    column = table.values[:, position]
    bad = ~finite[:, position]
    infinite = int(np.isinf(column).sum())
    absent = int(bad.sum()) - infinite
    kinds = [f"{absent:,} missing or NaN"] * (absent > 0) + [f"{infinite:,} infinite"] * (
        infinite > 0
    )
    others = int((~finite).any(axis=0).sum()) - 1
    more = f" (and {others} other column{'s' * (others > 1)} likewise)" if others else ""
    raise InputError(
        f"{table.source}: column {table.names[position]!r} has {' and '.join(kinds)} "
        f"value{'s' * (absent + infinite > 1)}, first in row {table.rows[bad.argmax()]}{more}; "
        f"fill in or remove such rows."
    )


def refuse_non_numeric(table: Table) -> None:
    """Raise an error that names the first column of texts or dates, and its first cell."""
    for name, cells in zip(table.names, table.cells, strict=True):
        if cells.kind not in ("text", "datetime"):
            continue
        column = table.column(name)
        row = int(np.argmin(np.isnan(column)))
        cell = str(cells.decode(column[row : row + 1])[0])
        raise InputError(
            f"{table.source}: column {name!r}, row {table.rows[row]} holds {short(cell)}, which is "
            f"not a number; correct it, or choose other columns with --columns."
        )


def choose(
    names: Sequence[str], wanted: list[str] | None, also: Sequence[str], source: str
) -> list[str]:
    """The columns to read, checked against those there are."""
    refuse_duplicates(names, source)
    for name in [*(wanted or ()), *also]:
        if name not in names:
            raise unknown_column(name, names, source)
    return list(names) if wanted is None else wanted


def refuse_duplicates(names: Sequence[str], source: str) -> None:
    """Raise an error when a column name occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{source} has two columns named {name!r}; rename or drop one.")
        seen.add(name)


def refuse_inexact(array: np.ndarray, names: Sequence[str], source: str) -> None:
    """Raise an error when an integer of an array (N, D) has no equal in float64."""
    for row, position in np.argwhere(np.abs(array.astype(np.float64)) >= EXACT):
        exact = int(array[row, position])
        if int(float(exact)) != exact:
            raise inexact(source, names[int(position)], int(row) + 1, str(exact))


def inexact(source: str, name: str, row: int, value: str) -> InputError:
    """The error for an integer that float64 cannot hold."""
    return InputError(
        f"{source}: column {name!r}, row {row} holds {value}, an integer beyond 2**53 that float64 "
        f"cannot hold exactly; subtract an offset from the column, or choose others with --columns."
    )


def _array_names(count: int) -> tuple[str, ...]:
    return tuple(f"x{i}" for i in range(1, count + 1))


def first_line(error: Exception) -> str:
    """What an error says, without its period and what stands on further lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
