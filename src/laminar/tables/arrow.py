"""CSV, Parquet, Arrow and Feather files as tables, through pyarrow."""

import re
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np

from laminar._errors import InputError, MissingExtraError
from laminar.tables.table import EXACT, Table, choose, first_line, inexact, refuse_duplicates, short

# ------------------------------------------------------------------------------------ CSV


def read_csv(path: str, wanted: list[str] | None, also: Sequence[str], _key: None) -> Table:
    """CSV with a header line, as `laminar.tables.read.read_table` says."""
    pa, pc, csv = arrow("compute", "csv")
    header, skip, delimiter = _csv_header(path)
    names = choose(header, wanted, also, path)

    def parse(kind: Any, columns: Sequence[str], **convert: Any):
        return csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=header, skip_rows=skip),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, kind), **convert
            ),
        )

    def parse_text(columns: Sequence[str]):
        return parse(
            pa.string(), columns, strings_can_be_null=True, quoted_strings_can_be_null=True
        )

    try:
        try:
            data = parse(pa.float64(), names)
            values = np.column_stack([data[name].to_numpy() for name in names])
        except pa.ArrowInvalid as error:
            if "conversion error" not in str(error):
                raise
            text = parse_text(names)
            values = np.column_stack([_numbers(text[name], name, path, pa, pc) for name in names])
        large = [n for n, big in zip(names, _any_beyond(values), strict=True) if big]
        if large:
            _refuse_inexact_text(parse_text(large), large, path)
    except pa.ArrowInvalid as error:
        raise _csv_error(path, header, skip, delimiter, error) from None
    return Table(tuple(names), values, path)


def _csv_header(path: str) -> tuple[list[str], int, str]:
    """The column names, the lines up to the end of the header, and the delimiter."""
    import csv
    import gzip
    import zlib

    opener: Callable[..., IO[str]] = gzip.open if path.lower().endswith(".gz") else open  # type: ignore[assignment]
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            blank, line = 0, stream.readline()
            while line and not line.strip():
                blank, line = blank + 1, stream.readline()
            if not line:
                raise InputError(f"{path} is empty; it needs a header line and rows of numbers.")
            delimiter = "\t" if path.lower().endswith(".tsv") else _delimiter(line)

            def lines():
                yield line
                yield from stream

            reader = csv.reader(lines(), delimiter=delimiter)
            header = [name.strip() for name in next(reader)]
            skip = blank + reader.line_num
    except zlib.error as error:
        raise InputError(f"{path} is a damaged gzip file: {first_line(error)}.") from None
    except (UnicodeDecodeError, csv.Error, EOFError) as error:
        raise InputError(
            f"{path} is not a text file in UTF-8 ({first_line(error)}); save it as CSV in UTF-8."
        ) from None
    if any(_is_number(name) for name in header) and all(
        _is_number(name) or not name for name in header
    ):
        raise InputError(
            f"{path} begins with a line of numbers where the column names belong; "
            f"add a first line that names the columns."
        )
    if not all(header):
        raise InputError(
            f"{path}: column {header.index('') + 1} has no name in the header line; name it, or "
            "leave it out (pandas writes its index so: to_csv(…, index=False))."
        )
    refuse_duplicates(header, path)
    return header, skip, delimiter


def _delimiter(line: str) -> str:
    """The first of the comma, the semicolon and the tab that stands outside quotes."""
    bare = re.sub(r'"[^"]*("|$)', "", line)
    return next((mark for mark in (",", ";", "\t") if mark in bare), ",")


def _numbers(column: Any, name: str, path: str, pa: Any, pc: Any) -> np.ndarray:
    """A text column as float64, or the error that names its first cell that is no number."""
    distinct = pc.unique(column).drop_null().to_pylist()
    if distinct and all(cell.strip().lower() in ("true", "false") for cell in distinct):
        truth = pc.equal(pc.utf8_lower(pc.utf8_trim_whitespace(column)), "true")
        return pc.cast(truth, pa.float64()).to_numpy()
    bad = {cell for cell in distinct if not _is_number(cell)}
    if not bad:
        return np.array([np.nan if c is None else float(c) for c in column.to_pylist()])
    cells = column.to_pylist()
    rows = [row for row, cell in enumerate(cells) if cell in bad]
    more = f" (and {len(rows) - 1:,} more such row{'s' * (len(rows) > 2)})" if len(rows) > 1 else ""
    raise InputError(
        f"{path}: column {name!r}, row {rows[0] + 1} holds {short(cells[rows[0]])}, which is not "
        f"a number{more}; correct it, or choose other columns with --columns."
    )


def _csv_error(path: str, header: list[str], skip: int, delimiter: str, error: Exception):
    """Turn Arrow's complaint into one that names the row, by reading once more in one thread."""
    pa, csv = arrow("csv")
    found: list[Any] = []

    def note(row: Any) -> str:
        found.append(row)
        return "skip"

    try:
        csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=header, skip_rows=skip, use_threads=False),
            parse_options=csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
        )
    except pa.ArrowInvalid as other:
        error = other
    if not found:
        return InputError(f"{path} is not a readable CSV file: {first_line(error)}.")
    row = found[0]
    where = f"row {row.number - skip}" if row.number else "a row"
    return InputError(
        f"{path}: {where} has {row.actual_columns} cell{'s' * (row.actual_columns != 1)} and the "
        f"header names {row.expected_columns} columns; correct that row."
    )


def _is_number(cell: str) -> bool:
    # Python would also take 1_000, which no other reader does.
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _any_beyond(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.asarray(((np.abs(values) >= EXACT) & np.isfinite(values)).any(axis=0))


def _refuse_inexact_text(text: Any, names: Sequence[str], path: str) -> None:
    for name in names:
        for row, cell in enumerate(text[name].to_pylist(), start=1):
            cell = (cell or "").strip()
            digits = cell.lstrip("+-")
            if digits.isdecimal() and int(float(digits)) != int(digits):
                raise inexact(path, name, row, cell)


# ------------------------------------------------------------------------- Parquet and Arrow


def read_parquet(path: str, wanted: list[str] | None, also: Sequence[str], _key: None) -> Table:
    """A Parquet file, as `laminar.tables.read.read_table` says."""
    pa, pq = arrow("parquet")
    try:
        with pq.ParquetFile(path) as file:
            names = choose(file.schema_arrow.names, wanted, also, path)
            return _from_arrow(file.read(columns=names), names, path)
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
    return _from_arrow(data, names, path)


def _from_arrow(data: Any, names: Sequence[str], path: str) -> Table:
    columns = [_arrow_column(data[name], name, path) for name in names]
    values = np.column_stack(columns) if columns else np.zeros((data.num_rows, 0))
    return Table(tuple(names), values, path)


def _arrow_column(column: Any, name: str, path: str) -> np.ndarray:
    pa, pc = arrow("compute")
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    kind = column.type
    if pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale <= 0):
        values = pc.cast(column, pa.float64(), safe=False).to_numpy().astype(np.float64)
        for row in np.flatnonzero(np.abs(values) >= EXACT):
            exact = column[int(row)].as_py()
            if int(values[row]) != int(exact):
                raise inexact(path, name, int(row) + 1, str(exact))
        return values
    number = pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if number or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return pc.cast(column, pa.float64(), safe=False).to_numpy().astype(np.float64)
    if pa.types.is_temporal(kind):
        advice = "turn it into a number, such as seconds"
    else:
        advice = "turn it into numbers"
    first = column[0].as_py() if len(column) else None
    raise InputError(
        f"{path}: column {name!r}, row 1 holds {short(str(first))} of type {kind}, which is not a "
        f"number; {advice}, or choose other columns with --columns."
    )


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
