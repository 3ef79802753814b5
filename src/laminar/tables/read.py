"""Read a table from a file or a built-in set, and write one; errors name the cell.

Everything is float64 on the host: nothing here touches JAX.
"""

import difflib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from laminar._errors import InputError
from laminar._files import atomic_write
from laminar.tables.arrow import arrow, read_arrow, read_parquet, to_arrow
from laminar.tables.cells import NANOSECONDS, Cells, time_zone
from laminar.tables.delimited import read_csv
from laminar.tables.table import (
    Table,
    array_table,
    choose,
    first_line,
    listing,
    refuse_duplicates,
    refuse_non_finite,
    refuse_non_numeric,
)

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".parquet", ".arrow", ".feather", ".npy", ".npz")
"""The file formats that are read and written, told apart by suffix."""


def read_table(
    spec: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    also: Sequence[str] = (),
    *,
    numeric: bool = False,
) -> Table:
    """Read columns of a table: numbers, integers, booleans, texts, dates, and cells that miss.

    In CSV a column is what all its cells are spelt as: integers, numbers, true and false, ISO dates
    and date-times (with T or a space, fractions down to nanoseconds, Z or an offset), and otherwise
    text. Missing are empty cells, also in quotes, and those that `laminar.tables.delimited.NULLS`
    lists, such as NA and NaN; in quotes these are text in a column of text. A column of which at
    least 90%, and 20, of the cells are numbers or dates is no text: a cell that is not one is an
    error. Dates with different offsets are given in UTC.

    Args:
        spec: A path ending in one of `SUFFIXES`; ``file.npz:key`` for one array of an NPZ archive;
            or ``builtin:NAME`` (see `laminar.tables.builtin`). CSV files have a header line, are
            separated by commas, semicolons or tabs, and are in UTF-8, in UTF-16 with a byte order
            mark, or else in Windows-1252, of which there is then a note.
        columns: The columns wanted, in this order; all of them when None.
        also: Columns wanted besides those; a built-in set may have some that it does not give
            unasked, such as the class of a flower.
        numeric: Whether every cell must be a number: texts, dates and missing cells are errors.

    Returns:
        The table, float64 with `Table.cells` saying what the numbers stand for; NaN is a missing
        cell. Decimals become the nearest float64.

    Raises:
        InputError: When there is no such file, column or set, or a cell is infinite, an integer
            that float64 cannot hold, of a type that is no number, text or date (lists, durations),
            or a typing error in a column of numbers or dates.
    """
    wanted = None if columns is None else list(dict.fromkeys([*columns, *also]))
    if columns is not None:
        refuse_duplicates(columns, "The list of columns")
    text = os.fspath(spec)
    if text.startswith("builtin:"):
        from laminar.tables.builtin import load_builtin

        return load_builtin(text.removeprefix("builtin:"), wanted, also)
    path, npz_key = split_key(text)
    try:
        reader = _READERS[_existing_file(path)]
        table = reader(path, wanted, also, npz_key)
    except OSError as error:
        shown = path if len(path) <= 300 else f"{path[:150]}…"
        raise InputError(f"{shown} cannot be read: {first_line(error)}.") from None
    if len(table) == 0:
        raise InputError(f"{path} has column names but no rows; add at least one row of cells.")
    if numeric:
        refuse_non_numeric(table)
    refuse_non_finite(table, missing=numeric)
    return table


def write_table(path: str | os.PathLike[str], columns: Mapping[str, Any] | Table) -> None:
    """Write columns of equal length to a file whose format its suffix says, all or nothing.

    Floats are written so that reading gives the same float64 back, and dates so that it gives the
    same dates in the same unit. The zone of a `Table`'s dates is kept, except that CSV has the
    offsets of a named zone instead; the order of its levels is kept in Parquet, Arrow and Feather.
    NPY holds one array (N, D) without names; NPZ one array (N,) per column; neither holds texts or
    dates. An empty text in CSV is read as a missing cell.

    Args:
        path: Where to write; the suffix is one of `SUFFIXES`. An existing file is replaced.
        columns: A table, whose missing cells are left empty; or column name → array (N,) of floats,
            integers, booleans or datetime64, or of objects, None among them where cells miss.

    Raises:
        InputError: When the suffix is unknown, the format cannot hold a column, or the file cannot
            be written.
    """
    suffix = table_suffix(os.fspath(path))
    stream = io.BytesIO()
    if suffix in (".npy", ".npz"):
        arrays = columns.decoded() if isinstance(columns, Table) else columns
        _WRITERS[suffix](stream, {k: _numeric(np.asarray(v), k, path) for k, v in arrays.items()})
    else:
        _WRITERS[suffix](stream, to_arrow(columns))
    atomic_write(path, stream.getvalue())


def table_suffix(path: str) -> str:
    """The suffix of a table file, among `SUFFIXES`, or an error that lists them."""
    lower = path.lower()
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if lower.endswith(suffix):
            return suffix
    raise InputError(
        f"{path} does not end in a known table format; use one of {', '.join(SUFFIXES)}."
    )


# --------------------------------------------------------------------------- NumPy's own files


def _read_npy(path: str, wanted: list[str] | None, also: Sequence[str], _key: None) -> Table:
    with open(path, "rb") as file:
        array = _load_numpy(file, path)
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an archive of arrays; give it the suffix .npz.")
    return _from_numpy(array, wanted, also, path)


def _read_npz(path: str, wanted: list[str] | None, also: Sequence[str], key: str | None) -> Table:
    # Opened here, because NumPy leaves a damaged archive open.
    with open(path, "rb") as file:
        archive = _load_numpy(file, path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path} holds a single array; give it the suffix .npy.")
        with archive:
            names = [key] if key in archive.files else archive.files
            arrays = {name: _npz_entry(archive, name, path) for name in names}
    if key is not None:
        if key not in arrays:
            near = difflib.get_close_matches(key, arrays, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it holds {listing(list(arrays))}."
            raise InputError(f"{path} has no array {key!r}; {hint}")
        return _from_numpy(arrays[key], wanted, also, f"{path}:{key}")
    flat = [name for name, array in arrays.items() if array.ndim == 2]
    if len(flat) == 1:
        return _from_numpy(arrays[flat[0]], wanted, also, path)
    lengths = {array.shape for array in arrays.values()}
    if not flat and len(lengths) == 1 and len(next(iter(lengths))) == 1:
        return _columns(arrays, choose(list(arrays), wanted, also, path), path)
    shapes = listing([f"{name} {array.shape}" for name, array in arrays.items()])
    raise InputError(
        f"{path} holds {shapes or 'no arrays'}, so it is not clear which is the table; name one "
        f"as {path}:NAME."
    )


def _from_numpy(array: np.ndarray, wanted: list[str] | None, also: Sequence[str], path: str):
    if array.dtype.names:
        return _columns(array, choose(list(array.dtype.names), wanted, also, path), path)
    table = array_table(array, None, path)
    names = choose(list(table.names), wanted, also, path)
    return table if tuple(names) == table.names else table.select(names)


def _columns(arrays: Any, names: Sequence[str], path: str) -> Table:
    parts = [array_table(arrays[name], [name], path) for name in names]
    values = np.concatenate([part.values for part in parts], axis=1)
    return Table(tuple(names), values, path, cells=tuple(part.cells[0] for part in parts))


def _load_numpy(file: IO[bytes], path: str) -> Any:
    try:
        return np.load(file, allow_pickle=False)
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            raise
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            raise InputError(
                f"{path} is not an array of numbers (or holds pickled objects, which are never "
                f"loaded); save it with numpy.save from a numeric array."
            ) from None
        # Damage surfaces wherever it lies: in zip and zlib, in the header's tokens and its types.
        raise InputError(f"{path} is not a NumPy file: {first_line(error)}.") from None


def _npz_entry(archive: Any, name: str, path: str) -> np.ndarray:
    try:
        array = archive[name]
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise InputError(f"{path}: array {name!r} cannot be read: {first_line(error)}.") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} holds {name!r}, which is no array; name one as {path}:NAME.")
    return array


# ------------------------------------------------------------------------------------ writing


def _write_csv(stream: IO[bytes], data: Any, delimiter: str = ",") -> None:
    pa, csv, pc = arrow("csv", "compute")
    spelt = _spelt(data)
    if spelt.num_columns == 1 and spelt.column(0).null_count:
        # A line without anything would be no row: an empty cell of a single column needs quotes.
        import csv as text

        cells = pc.cast(spelt.column(0), pa.string()).to_pylist()
        lines = io.StringIO()
        writer = text.writer(lines, delimiter=delimiter, lineterminator="\n")
        writer.writerows([[spelt.column_names[0]], *([cell] for cell in cells)])
        stream.write(lines.getvalue().encode())
        return
    options = csv.WriteOptions(delimiter=delimiter, quoting_style="needed")
    csv.write_csv(spelt, stream, options)


def _write_tsv(stream: IO[bytes], data: Any) -> None:
    _write_csv(stream, data, "\t")


def _write_gzip(stream: IO[bytes], data: Any) -> None:
    import gzip

    with gzip.open(stream, "wb") as packed:
        _write_csv(packed, data)  # type: ignore[arg-type]


def _write_parquet(stream: IO[bytes], data: Any) -> None:
    _, pq = arrow("parquet")
    pq.write_table(data, stream)


def _write_arrow(stream: IO[bytes], data: Any) -> None:
    _, feather = arrow("feather")
    feather.write_feather(data, stream)


def _write_npy(stream: IO[bytes], columns: dict[str, np.ndarray]) -> None:
    stacked = np.column_stack([values.astype(np.float64) for values in columns.values()])
    np.save(stream, stacked, allow_pickle=False)


def _write_npz(stream: IO[bytes], columns: dict[str, np.ndarray]) -> None:
    import zipfile

    # np.savez takes names as keywords and so cannot write a column called "file".
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)


def _numeric(array: np.ndarray, name: str, path: Any) -> np.ndarray:
    """A column for NumPy's own files: booleans with missing cells become 0, 1 and NaN."""
    if array.dtype.kind in "fiub":
        return array
    if array.dtype.kind == "O" and all(cell is None or isinstance(cell, bool) for cell in array):
        return Cells("boolean").encode(array)
    what = "dates" if array.dtype.kind == "M" else "texts"
    raise InputError(
        f"{path} cannot hold column {name!r}, which has {what}; write to one of "
        f"{', '.join(suffix for suffix in SUFFIXES if suffix not in ('.npy', '.npz'))}."
    )


def _spelt(data: Any) -> Any:
    """The columns of a pyarrow table as CSV shows them: levels as texts, dates with offsets."""
    pa, pc = arrow("compute")
    columns = []
    for column in data.columns:
        kind = column.type
        if pa.types.is_dictionary(kind):
            column = column.cast(kind.value_type)
        elif pa.types.is_timestamp(kind) and kind.tz not in (None, "UTC"):
            time_zone(kind.tz)
            clock = pc.cast(pc.local_timestamp(column), pa.int64())
            ahead = pc.subtract(clock, pc.cast(column, pa.int64())).to_numpy()
            minute = 60 * NANOSECONDS["s"] // NANOSECONDS[kind.unit]
            # Before there were zones, clocks differed by seconds, which no offset can say.
            if not (ahead[~np.isnan(ahead)] % minute).any():
                column = pc.strftime(column, format="%Y-%m-%dT%H:%M:%S%z")
            else:
                column = column.cast(pa.timestamp(kind.unit, "UTC"))
        columns.append(column)
    return pa.table(columns, names=data.column_names)


# ------------------------------------------------------------------------------------ helpers

_READERS: dict[str, Callable[[str, list[str] | None, Sequence[str], Any], Table]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".npy": _read_npy,
    ".npz": _read_npz,
}
_WRITERS: dict[str, Callable[[IO[bytes], Any], None]] = {
    ".csv": _write_csv,
    ".tsv": _write_tsv,
    ".csv.gz": _write_gzip,
    ".parquet": _write_parquet,
    ".arrow": _write_arrow,
    ".feather": _write_arrow,
    ".npy": _write_npy,
    ".npz": _write_npz,
}


def _existing_file(path: str) -> str:
    """The suffix of a file that is there, is a file, and is not empty."""
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{path} is a directory; name a table file in it.")
    if not file.exists():
        try:
            neighbours = os.listdir(file.parent)
        except OSError:
            neighbours = []
        near = difflib.get_close_matches(file.name, neighbours, n=1, cutoff=0.8)
        hint = f"did you mean {file.parent / near[0]}?" if near else "check the path."
        raise InputError(f"{path} does not exist; {hint}")
    suffix = table_suffix(path)
    if file.is_file() and file.stat().st_size == 0:
        raise InputError(f"{path} is empty; it needs column names and rows of cells.")
    return suffix


def split_key(text: str) -> tuple[str, str | None]:
    """Split ``file.npz:key``, unless there is a file of that whole name."""
    head, mark, key = text.rpartition(":")
    if mark and head.lower().endswith(".npz") and not os.path.exists(text):
        return head, key
    return text, None
