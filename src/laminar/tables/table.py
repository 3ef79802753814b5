"""A numeric table in memory, and the sentences that its errors are made of.

Rows are counted from 1 and a header line is not counted, as a reader of the file counts them.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from laminar._errors import InputError

EXACT = 2.0**53
"""From here on float64 does not hold every integer."""


class UnknownColumnError(InputError):
    """A column is named that the table does not have."""


@dataclass(frozen=True, eq=False)
class Table:
    """Named numeric columns.

    Attributes:
        names: Column names, all different.
        values: The cells, float64 of shape (N, D).
        source: What to call the table in messages.
        named: Whether the names come from the source; arrays get x1, …, xD, and are matched with
            other tables by position.
        rows: The number of each row in the source, counted from 1; int64 of shape (N,).
    """

    names: tuple[str, ...]
    values: np.ndarray
    source: str = "the table"
    named: bool = True
    rows: np.ndarray = field(default=None)  # type: ignore[assignment]

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
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "rows", np.arange(1, len(values) + 1) if rows is None else rows)

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
        return replace(self, names=tuple(names), values=self.values[:, self.positions(names)])

    def take(self, index: np.ndarray) -> "Table":
        """The table of some rows, which keep their numbers."""
        return replace(self, values=self.values[index], rows=self.rows[index])


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
    return Table(labels, array.astype(np.float64), source, named=names is not None)


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


def refuse_non_finite(table: Table) -> None:
    """Raise an error that counts the cells that are missing or infinite and names the first."""
    finite = np.isfinite(table.values)
    if finite.all():
        return
    position = int(np.flatnonzero(~finite.all(axis=0))[0])
    column = table.values[:, position]
    bad = ~np.isfinite(column)
    missing, infinite = int(np.isnan(column).sum()), int(np.isinf(column).sum())
    kinds = [f"{missing:,} missing or NaN"] * (missing > 0) + [f"{infinite:,} infinite"] * (
        infinite > 0
    )
    others = int((~finite).any(axis=0).sum()) - 1
    more = f" (and {others} other column{'s' * (others > 1)} likewise)" if others else ""
    raise InputError(
        f"{table.source}: column {table.names[position]!r} has {' and '.join(kinds)} "
        f"value{'s' * (missing + infinite > 1)}, first in row {table.rows[bad.argmax()]}{more}; "
        f"fill in or remove such rows."
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


def short(text: str, limit: int = 40) -> str:
    """A cell in quotes, cut when it is long."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def first_line(error: Exception) -> str:
    """What an error says, without its period and what stands on further lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
