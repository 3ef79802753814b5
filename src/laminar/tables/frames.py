"""Frames of pandas, Polars and Arrow as tables, and tables as frames of the same kind.

None of those packages is imported unless an object of its own is given.
"""

import datetime
import decimal
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laminar._errors import InputError
from laminar.tables.arrow import Column, arrow, arrow_column, from_arrow, stacked, to_arrow
from laminar.tables.cells import (
    CellError,
    Cells,
    datetime_column,
    datetime_counts,
    is_missing,
    iso_offset,
    moments_column,
    nanoseconds,
    object_array,
    short,
    spelling,
    text_column,
)
from laminar.tables.table import Table, choose, first_line, refuse_non_finite


def is_frame(obj: Any) -> bool:
    """Whether an object is a frame that `from_frame` takes: no array, and no mapping."""
    package = _package(obj)
    if package == "pandas":
        return hasattr(obj, "columns")
    return hasattr(obj, "__arrow_c_stream__") or (package == "polars" and hasattr(obj, "collect"))


def from_frame(obj: Any, source: str = "the frame", columns: Sequence[str] | None = None) -> Table:
    """A table of the columns of a frame.

    The index of a pandas frame is ignored. A categorical of texts keeps the order of its levels if
    it has one. A column of objects is what all its cells are: booleans, numbers, dates, or else
    texts, among which numbers, booleans and dates stand as they are spelt: 1, 0.5, true,
    2024-12-31. Texts are never taken for numbers.

    Args:
        obj: A pandas or Polars frame (a lazy one is collected), a pyarrow table or record batch, or
            any object with ``__arrow_c_stream__``; or column name → array (N,) of cells.
        source: What to call it in messages.
        columns: The columns wanted, in this order; all of them when None.

    Returns:
        The table: float64 of shape (N, D), with `Table.cells`; NaN where a cell is missing.

    Raises:
        InputError: When the object is no frame; a name occurs twice or is not there; there are no
            rows; a cell is infinite or an integer that float64 cannot hold; or a column is of a
            type that is no number, text or date.
    """
    wanted = None if columns is None else list(columns)
    package = _package(obj)
    if package == "pandas":
        table = _from_pandas(obj, source, wanted)
    elif isinstance(obj, Mapping):
        arrays = {str(name): cells for name, cells in obj.items()}
        names = choose([str(name) for name in obj], wanted, (), source)
        parts = [_column(arrays[name], name, source) for name in names]
        if len({len(values) for values, _ in parts}) > 1:
            lengths = ", ".join(str(len(values)) for values, _ in parts)
            raise InputError(f"The columns of {source} have different lengths: {lengths}.")
        table = stacked(names, parts, len(parts[0][0]) if parts else 0, source)
    else:
        data = _arrow_table(obj, source)
        table = from_arrow(data, choose(data.schema.names, wanted, (), source), source)
    if len(table) == 0:
        raise InputError(f"{source} has no rows; give at least one.")
    refuse_non_finite(table, missing=False)
    return table


def to_frame(table: Table, like: Any) -> Any:
    """A table as a frame of the same kind as another, and where it can of the same types.

    Args:
        table: The table.
        like: A frame as `from_frame` takes it. A column of the same name gives its type, unless
            that cannot hold the cells: missing ones among integers, or other texts than a
            categorical's. Dates that were objects become pandas' own.

    Returns:
        A pandas frame with a fresh index; a Polars frame, lazy if `like` is; a pyarrow record batch
        or table; a dict of arrays for a mapping.

    Raises:
        InputError: When `like` is no frame.
    """
    package = _package(like)
    if package == "pandas":
        return _to_pandas(table, like)
    if package == "polars":
        return _to_polars(table, like)
    if isinstance(like, Mapping):
        return table.decoded()
    if is_frame(like):
        return _to_arrow_like(table, like)
    raise InputError(f"A table cannot become a {type(like).__name__}; give a frame.")


def _package(obj: Any) -> str:
    """The package among those known here that an object's class, or a class it extends, is of."""
    packages = (cls.__module__.partition(".")[0] for cls in type(obj).__mro__)
    return next((name for name in packages if name in ("pandas", "polars", "pyarrow")), "")


# ----------------------------------------------------------------------------- arrays and objects


def _column(cells: Any, name: str, source: str) -> Column:
    """The numbers of any array or sequence of cells, and what they stand for."""
    package = _package(cells)
    if package == "pandas":
        return _pandas_column(cells, name, source)
    if package in ("polars", "pyarrow"):
        (pa,) = arrow()
        return arrow_column(pa.chunked_array(cells), name, source)
    array = cells if isinstance(cells, np.ndarray) else object_array(cells)
    if array.ndim != 1:
        raise InputError(
            f"{source}: column {name!r} has shape {array.shape}, and (rows,) is needed."
        )
    return _array_column(array, name, source)


def _array_column(array: np.ndarray, name: str, source: str) -> Column:
    kind = array.dtype.kind
    if kind == "M":
        return datetime_column(*_counts(array))
    if kind in "OUT":
        return _object_column(array, name, source)
    if kind not in _KINDS:
        raise _unknown(str(array[0]) if len(array) else "", str(array.dtype), name, 0, source)
    cells = Cells(_KINDS[kind])
    try:
        return cells.encode(array), cells
    except CellError as error:
        raise _refused(error, name, source) from None


_KINDS: dict[str, Any] = {"b": "boolean", "i": "integer", "u": "integer", "f": "number"}


def _counts(array: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    counts, unit = datetime_counts(array)
    return counts, np.isnat(array), unit


def _object_column(array: np.ndarray, name: str, source: str) -> Column:
    """What all the cells are, or texts; see `from_frame`."""
    there = [row for row, cell in enumerate(array) if not is_missing(cell)]
    kinds = set()
    for row in there:
        kind = _kind(array[row])
        if kind is None:
            raise _unknown(str(array[row]), type(array[row]).__name__, name, row, source)
        kinds.add(kind)
    cells = None
    if not kinds:
        return np.full(len(array), np.nan), Cells()
    if kinds <= {"integer", "number"}:
        cells = Cells("number" if "number" in kinds else "integer")
    elif kinds == {"boolean"}:
        cells = Cells("boolean")
    if cells is not None:
        try:
            return cells.encode(array), cells
        except CellError as error:
            raise _refused(error, name, source) from None
    if kinds in ({"date"}, {"zoned"}):
        zone = _zone_of([array[row] for row in there]) if kinds == {"zoned"} else ""
        moments = {row: nanoseconds(array[row], zone) for row in there}
        column = moments_column([moments.get(row) for row in range(len(array))], zone)
        if column is not None:
            return column
    places: dict[str, int] = {}
    indices = np.full(len(array), np.nan)
    for row in there:
        cell = array[row]
        text = str(cell) if isinstance(cell, str) else spelling(cell)
        indices[row] = places.setdefault(text, len(places))
    return text_column(indices, list(places))


def _kind(cell: Any) -> str | None:
    if isinstance(cell, str):
        return "text"
    if isinstance(cell, bool | np.bool_):
        return "boolean"
    if isinstance(cell, numbers.Integral):
        return "integer"
    if isinstance(cell, numbers.Real | decimal.Decimal):
        return "number"
    if isinstance(cell, datetime.datetime) and cell.tzinfo is not None:
        return "zoned"
    return "date" if isinstance(cell, datetime.date | np.datetime64) else None


def _zone_of(cells: Sequence[datetime.datetime]) -> str:
    """The zone of dates that all have one and the same, or else UTC."""
    zones = {_zone_name(cell.tzinfo) or iso_offset(f"2000-01-01T00{cell:%z}") for cell in cells}
    zone = zones.pop() if len(zones) == 1 else None
    return zone or "UTC"


def _zone_name(zone: Any) -> str:
    """The IANA name of a zone, or its offset; empty where it has neither."""
    if isinstance(zone, datetime.timezone):
        return iso_offset(f"2000-01-01T00{datetime.datetime(2000, 1, 1, tzinfo=zone):%z}") or ""
    return str(getattr(zone, "key", None) or getattr(zone, "zone", None) or "")


def _unknown(cell: str, kind: str, name: str, row: int, source: str) -> InputError:
    return InputError(
        f"{source}: column {name!r}, row {row + 1} holds {short(cell)} of type {kind}, which is no "
        f"number, text or date; turn it into one of these, or leave the column out."
    )


def _refused(error: CellError, name: str, source: str) -> InputError:
    return InputError(
        f"{source}: column {name!r}, row {error.position + 1} {error.reason}; correct it, or leave "
        f"the column out."
    )


# ---------------------------------------------------------------------------------------- pandas


def _from_pandas(frame: Any, source: str, wanted: list[str] | None) -> Table:
    if not hasattr(frame, "columns"):
        raise InputError(f"{source} is a {type(frame).__name__}, and a DataFrame is needed.")
    labels = [str(label) for label in frame.columns]
    names = choose(labels, wanted, (), source)
    parts = [_pandas_column(frame.iloc[:, labels.index(name)], name, source) for name in names]
    return stacked(names, parts, len(frame), source)


def _pandas_column(series: Any, name: str, source: str) -> Column:
    # Extension types are known by name, since old and new releases have different ones.
    kind = series.dtype
    if isinstance(kind, np.dtype):
        return _array_column(series.to_numpy(), name, source)
    match type(kind).__name__:
        case "CategoricalDtype" if all(isinstance(c, str) for c in kind.categories):
            codes = np.asarray(series.cat.codes, dtype=np.float64)
            codes[codes < 0] = np.nan
            return text_column(codes, [str(c) for c in kind.categories], bool(kind.ordered))
        case "DatetimeTZDtype":
            utc = series.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy()
            return datetime_column(*_counts(utc), _zone_name(kind.tz) or "UTC")
        case "ArrowDtype":
            (pa,) = arrow()
            return arrow_column(pa.chunked_array([pa.array(series.array)]), name, source)
    return _object_column(series.astype(object).to_numpy(), name, source)


def _to_pandas(table: Table, like: Any) -> Any:
    import pandas

    labels = dict(zip(map(str, like.columns), like.columns, strict=True))
    kinds = dict(zip(map(str, like.columns), like.dtypes, strict=True))
    columns = {}
    for name, cells, values in zip(table.names, table.cells, table.values.T, strict=True):
        kind = kinds.get(name)
        objects = isinstance(kind, np.dtype) and kind.hasobject
        series = _series(pandas, cells, values, objects)
        if kind is not None and not (objects and cells.kind == "datetime"):
            series = _retyped(series, kind)
        columns[labels.get(name, name)] = series
    return pandas.DataFrame(columns)


def _series(pandas: Any, cells: Cells, values: np.ndarray, objects: bool) -> Any:
    missing = np.isnan(values).any()
    # As texts of their own type they would lose None on the way to objects.
    keep = objects and cells.kind == "text"
    series = pandas.Series(cells.decode(values), dtype=object if keep else None)
    if cells.kind == "datetime" and cells.zone:
        return series.dt.tz_localize("UTC").dt.tz_convert(cells.zone)
    if cells.kind == "integer" and missing:
        return _retyped(series, pandas.Int64Dtype())
    if cells.kind == "boolean" and missing:
        return series.astype("boolean")
    if cells.kind == "text" and cells.ordered:
        return _retyped(series, pandas.CategoricalDtype(list(cells.levels), ordered=True))
    return series


def _retyped(series: Any, kind: Any) -> Any:
    """A series in another type, if that holds all its cells; otherwise as it is."""
    if (
        type(kind).__name__ == "CategoricalDtype"
        and not series.dropna().isin(kind.categories).all()
    ):
        return series
    try:
        cast = series.astype(kind)
    except (TypeError, ValueError):
        return series
    there = series.notna()
    kept = there.equals(cast.notna())
    return cast if kept and bool((cast[there] == series[there]).all()) else series


# ------------------------------------------------------------------------------ Polars and Arrow


def _arrow_table(obj: Any, source: str) -> Any:
    (pa,) = arrow()
    if _package(obj) == "polars" and hasattr(obj, "collect"):
        obj = obj.collect()
    if not hasattr(obj, "__arrow_c_stream__"):
        raise InputError(
            f"{source} is a {type(obj).__name__}; give a frame of pandas, Polars or pyarrow."
        )
    try:
        return pa.Table.from_batches([obj]) if isinstance(obj, pa.RecordBatch) else pa.table(obj)
    except (pa.ArrowException, TypeError) as error:
        raise InputError(f"{source} is not a frame of columns: {first_line(error)}.") from None


def _to_polars(table: Table, like: Any) -> Any:
    import polars

    data = polars.DataFrame(to_arrow(table))
    kinds = like.collect_schema()
    for series in data.get_columns():
        kind = kinds.get(series.name)
        if kind is None or kind == series.dtype:
            continue
        try:
            cast = series.cast(kind)
            same = cast.cast(series.dtype).equals(series)
        except polars.exceptions.PolarsError:
            continue
        data = data.with_columns(cast) if same else data
    return data.lazy() if isinstance(like, polars.LazyFrame) else data


def _to_arrow_like(table: Table, like: Any) -> Any:
    (pa,) = arrow()
    data = to_arrow(table)
    # Asking a stream for its type may use it up; pyarrow's own frames say it.
    kinds = {field.name: field.type for field in like.schema} if _package(like) else {}
    columns = []
    for name, column in zip(data.column_names, data.columns, strict=True):
        try:
            columns.append(column.cast(kinds.get(name, column.type)))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            columns.append(column)
    data = pa.table(columns, names=data.column_names)
    if isinstance(like, pa.RecordBatch):
        return data.combine_chunks().to_batches()[0]
    return data
