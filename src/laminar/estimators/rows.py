"""Rows as the estimators take them: arrays of numbers, and frames of any cells."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.utils import check_array, check_consistent_length, column_or_1d

from laminar._errors import InputError
from laminar.estimators.common import LEAST_ROWS, FlowEstimator, validate_data
from laminar.tables.cells import Cells
from laminar.tables.frames import from_frame, is_frame
from laminar.tables.table import Table, recode

_WEIGHT = "weight of the row"


class RowReader(FlowEstimator):
    """Base of the estimators: reads rows, and remembers how.

    An array, or a frame of numbers alone, is a table of real columns. A frame with texts, dates or
    categories, or any frame with `kinds` where the estimator takes them, is a table whose columns
    are what their cells say.
    """

    kinds: Mapping[str, str] | None = None

    def __sklearn_tags__(self):
        """Missing values are allowed."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _read(
        self, X: Any, y: Any = None, *, reset: bool = False, least: int = LEAST_ROWS, **options: Any
    ) -> tuple[Table, Any]:
        """The rows as a table, and y; names and numbers of columns are checked.

        Args:
            X: Rows.
            y: What belongs to them, or None.
            reset: Whether these are the rows of `fit`.
            least: Fewer rows than this cannot be fitted.
            **options: Passed on to scikit-learn's `validate_data`.
        """
        if reset:
            self._typed = is_frame(X) and (self.kinds is not None or not _all_numbers(X))
            self._like = _empty(X) if is_frame(X) else None
        if self._typed:
            return self._read_frame(X, y, reset, least)
        options = {
            "dtype": np.float64,
            "ensure_all_finite": "allow-nan",
            "ensure_min_samples": least if reset else 1,
            **options,
        }
        if y is None:
            options.pop("y_numeric", None)
            values = validate_data(self, X, reset=reset, **options)
        else:
            values, y = validate_data(self, X, y, reset=reset, **options)
        names = getattr(self, "feature_names_in_", None)
        if names is None:
            names = [f"x{i}" for i in range(1, values.shape[1] + 1)]
        if self.kinds is not None and reset:
            unknown = next((name for name in self.kinds if name not in names), None)
            if unknown is not None:
                raise InputError(f"kinds names a column {unknown!r} that X does not have.")
        return Table(tuple(names), values, "X", named=False), y

    def _read_frame(self, X: Any, y: Any, reset: bool, least: int) -> tuple[Table, Any]:
        """A frame whose cells say what its columns are."""
        owner = type(self).__name__
        if not is_frame(X):
            raise InputError(
                f"{owner} was fitted to a frame with columns that are no real numbers; give a "
                f"frame, not {type(X).__name__}."
            )
        validate_data(self, X, skip_check_array=True, reset=reset)
        table = from_frame(X, source="X")
        if y is not None:
            y = column_or_1d(_as_it_is(y), warn=True)
            check_consistent_length(table.values, y)
        if reset:
            self._cells = dict(zip(table.names, table.cells, strict=True))
            if len(table) < least:
                raise InputError(
                    f"{owner}: X has n_samples={len(table)} rows, and fitting needs at least "
                    f"{least}."
                )
            return table, y
        return recode(table, self._cells), y


def _as_it_is(y: Any) -> np.ndarray:
    """Classes or numbers as an array, of whatever type they are."""
    return check_array(y, ensure_2d=False, dtype=None)  # pyright: ignore[reportArgumentType]


def with_weights(table: Table, weights: np.ndarray | None) -> tuple[Table, str | None]:
    """The table with its weights (N,) as one more column, and the name of that column."""
    if weights is None:
        return table, None
    name = _WEIGHT
    while name in table.names:
        name += "'"
    both = np.concatenate([table.values, weights[:, None]], axis=1)
    cells = (*table.cells, Cells())
    names = (*table.names, name)
    return Table(names, both, table.source, table.named, table.rows, cells), name


def _all_numbers(X: Any) -> bool:
    """Whether a frame of pandas or Polars holds numbers and booleans alone."""
    dtypes = getattr(X, "dtypes", None)
    if dtypes is None:
        return False
    for dtype in dtypes:
        kind = getattr(dtype, "kind", None)
        number = dtype.is_numeric() if hasattr(dtype, "is_numeric") else kind in tuple("biuf")
        if not number:
            return False
    return True


def _empty(X: Any) -> Any:
    """A frame of the same kind without rows: it says what draws should look like."""
    return X.head(0) if hasattr(X, "head") else X.slice(0, 0)
