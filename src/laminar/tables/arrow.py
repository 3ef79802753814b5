"""Columns to and from Arrow, and Parquet, Arrow and Feather files as tables, through pyarrow."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laminar._errors import InputError, MissingExtraError
from laminar.tables.cells import (
    EXACT,
    NANOSECONDS,
    Cells,
    datetime_column,
    datetime_counts,
    short,
    text_column,
)
from laminar.tables.table import Table, choose, first_line, inexact

Column = tuple[np.ndarray, Cells]


def read_parquet(path: str, wanted: list[str] | None, also: Sequence[str], _key: None) -> Table:
    """A Parquet file, as `laminar.tables.read.read_table` says."""
    pa, pq = arrow("parquet")
    try:
        with pq.ParquetFile(path) as file:
            names = choose(file.schema_arrow.names, wanted, also, path)
            return from_arrow(file.read(columns=names), names, path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {first_line(error)}.") from None
    except pa.ArrowException as error:
        raise InputError(f"{path} cannot be read as Parquet: {first_line(error)}.") from None


def read_arrow(path: str, wanted: list[str] | None, also: Sequence[str], _key: None) -> Table:
    """An Arrow file or stream, or a Feather file, as `laminar.tables.read.read_table` says."""
    pa, feather, ipc = arrow("feather", "ipc")
    try:
        try:
            data = feather.read_table(path, memory_map=False)
        except pa.ArrowInvalid:
            with pa.OSFile(path) as file, ipc.open_stream(file) as stream:
                data = stream.read_all()
    except pa.ArrowException as error:
        raise InputError(f"{path} is not an Arrow or Feather file: {first_line(error)}.") from None
    names = choose(data.schema.names, wanted, also, path)
    return from_arrow(data, names, path)


def from_arrow(data: Any, names: Sequence[str], source: str) -> Table:
    """Some columns of a pyarrow table.

    Raises:
        InputError: When a column is of a type that has no numbers, texts or dates, or holds an
            integer that float64 cannot.
    """
    columns = [arrow_column(data[name], name, source) for name in names]
    return stacked(names, columns, data.num_rows, source)


def stacked(names: Sequence[str], columns: Sequence[Column], rows: int, source: str) -> Table:
    """A table of columns of numbers, each with its cells."""
    values = np.column_stack([v for v, _ in columns]) if columns else np.zeros((rows, 0))
    return Table(tuple(names), values, source, cells=tuple(cells for _, cells in columns))


def arrow_column(column: Any, name: str, source: str) -> Column:
    """The numbers of one pyarrow column, shape (N,), and what they stand for."""
    pa, pc = arrow("compute")
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return arrow_column(column.cast(kind.storage_type), name, source)
    if pa.types.is_run_end_encoded(kind):
        return arrow_column(pc.run_end_decode(column), name, source)
    if pa.types.is_dictionary(kind) and not _is_text(kind.value_type):
        return arrow_column(column.cast(kind.value_type), name, source)
    if pa.types.is_dictionary(kind) or _is_text(kind):
        return _text(column, name, source)
    if pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale <= 0):
        values = _floats(column)
        for row in np.flatnonzero(np.abs(values) >= EXACT):
            exact = column[int(row)].as_py()
            if int(values[row]) != int(exact):
                raise inexact(source, name, int(row) + 1, str(exact))
        return values, Cells("integer")
    if pa.types.is_boolean(kind):
        return _floats(column), Cells("boolean")
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return _floats(column), Cells()
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return _dates(column)
    if pa.types.is_temporal(kind):
        advice = "turn it into a number, such as seconds"
    else:
        advice = "turn it into numbers or texts"
    first = column[0].as_py() if len(column) else None
    raise InputError(
        f"{source}: column {name!r}, row 1 holds {short(str(first))} of type {kind}, which is no "
        f"number, text or date; {advice}, or choose other columns with --columns."
    )


def _is_text(kind: Any) -> bool:
    (pa,) = arrow()
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _floats(column: Any) -> np.ndarray:
    pa, pc = arrow("compute")
    return pc.cast(column, pa.float64(), safe=False).to_numpy().astype(np.float64, copy=False)


def _text(column: Any, name: str, source: str) -> Column:
    (pa,) = arrow()
    ordered = pa.types.is_dictionary(column.type) and bool(column.type.ordered)
    try:
        indices, spelt = dictionary(column)
        texts = spelt.to_pylist()
    except UnicodeDecodeError:
        raise InputError(f"{source}: column {name!r} holds text that is not UTF-8.") from None
    # A dictionary may name a text twice, and nothing.
    levels = list(dict.fromkeys(text for text in texts if text is not None))
    places = {text: float(place) for place, text in enumerate(levels)}
    moved = np.array([*(places.get(text, np.nan) for text in texts), np.nan])
    return text_column(moved[indices], levels, ordered)


def dictionary(column: Any) -> tuple[np.ndarray, Any]:
    """Positions in an array of texts, −1 where missing, and that array, of large strings."""
    pa, pc = arrow("compute")
    if pa.types.is_dictionary(column.type):
        # Views of text, which Polars gives, cannot be unified.
        chunks = [
            pa.DictionaryArray.from_arrays(chunk.indices, chunk.dictionary.cast(pa.large_string()))
            for chunk in column.chunks
        ]
        kind = pa.dictionary(column.type.index_type, pa.large_string())
        whole = pa.chunked_array(chunks, kind).unify_dictionaries().combine_chunks()
    else:
        whole = pc.dictionary_encode(column.cast(pa.large_string()).combine_chunks())
    indices = pc.fill_null(whole.indices.cast(pa.int64()), -1)
    return indices.to_numpy(zero_copy_only=False), whole.dictionary


def _dates(column: Any) -> Column:
    pa, pc = arrow("compute")
    kind = column.type
    if pa.types.is_timestamp(kind):
        unit, zone = kind.unit, kind.tz or ""
    else:
        unit, zone = ("D" if pa.types.is_date32(kind) else "ms"), ""
    counts = column.cast(pa.int32()) if pa.types.is_date32(kind) else column
    counts = pc.fill_null(counts.cast(pa.int64()), 0).to_numpy()
    missing = pc.is_null(column).to_numpy(zero_copy_only=False) if column.null_count else None
    absent = np.zeros(len(counts), bool) if missing is None else missing
    return datetime_column(counts, absent, unit, zone)


# ------------------------------------------------------------------------------------ to Arrow


def to_arrow(columns: Table | Mapping[str, Any]) -> Any:
    """A table, or arrays of cells by name, as a pyarrow table; missing cells are null.

    Integers and booleans stay such, ordered levels become an ordered dictionary, and dates keep
    their unit and zone. NaN in an array of floats stays NaN.

    Raises:
        InputError: When a column mixes cells that no Arrow type holds.
    """
    (pa,) = arrow()
    if isinstance(columns, Table):
        parts = zip(columns.names, columns.values.T, columns.cells, strict=True)
        return pa.table({name: _from_cells(name, values, cells) for name, values, cells in parts})
    return pa.table({name: _from_array(cells, name) for name, cells in columns.items()})


def _from_cells(name: str, values: np.ndarray, cells: Cells) -> Any:
    (pa,) = arrow()
    missing = np.isnan(values)
    if cells.kind == "datetime":
        counts = cells.decode(values).astype(np.int64)
        counts[missing] = 0
        unit = cells.unit
        if unit == "D" and (np.abs(counts) >= 2**31).any():
            raise InputError(f"Column {name!r} holds a date that Arrow cannot: too far away.")
        if unit == "D" and not cells.zone:
            return pa.array(counts.astype(np.int32), mask=missing).cast(pa.date32())
        if unit == "D":
            unit, counts = "s", counts * (NANOSECONDS["D"] // NANOSECONDS["s"])
        return pa.array(counts, mask=missing).cast(pa.timestamp(unit, cells.zone or None))
    if cells.kind == "text" and cells.ordered and not (values < 0).any():
        codes = pa.array(np.where(missing, 0, values).astype(np.int32), mask=missing)
        return pa.DictionaryArray.from_arrays(
            codes, pa.array(cells.levels, pa.string()), ordered=True
        )
    if cells.kind == "text":
        return pa.array(cells.decode(values), pa.string())
    if cells.kind == "boolean":
        return pa.array(cells.decode(np.where(missing, 0.0, values)), mask=missing)
    if cells.kind == "integer":
        filled = cells.decode(np.where(missing, 0.0, values))
        return pa.array(filled, mask=missing)
    return pa.array(values, mask=missing)


def _from_array(cells: Any, name: str) -> Any:
    (pa,) = arrow()
    array = np.asarray(cells)
    if array.dtype.kind == "M":
        counts, unit = datetime_counts(array)
        array = counts.view(f"datetime64[{unit}]")
    try:
        return pa.array(array, from_pandas=array.dtype.kind == "O")
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(
            f"Column {name!r} cannot be written: {first_line(error)}; give it cells of one kind."
        ) from None


def arrow(*modules: str) -> tuple[Any, ...]:
    """The pyarrow package and some of its modules, or the error that says how to install it."""
    import importlib

    try:
        return tuple(
            importlib.import_module(f"pyarrow.{module}" if module else "pyarrow")
            for module in ("", *modules)
        )
    except ImportError:
        raise MissingExtraError(
            "pyarrow", "tables", "Reading and writing CSV, Parquet and Arrow tables"
        ) from None
