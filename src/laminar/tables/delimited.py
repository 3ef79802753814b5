"""CSV files: what the cells of each column are, found from how they are spelt."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple

import numpy as np

from laminar._errors import InputError
from laminar.tables.arrow import Column, arrow, arrow_column, dictionary, stacked
from laminar.tables.cells import (
    EXACT,
    Cells,
    is_number,
    iso_offset,
    moments_column,
    nanoseconds,
    short,
    text_column,
)
from laminar.tables.table import Table, choose, first_line, inexact, refuse_duplicates

NULLS = (
    *("", "NA", "N/A", "n/a", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "None"),
    *("#NA", "#N/A", "#N/A N/A", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
)
"""The spellings of a missing cell."""

_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_OFFSET_AT_END = re.compile(r"(?:Z|[+-]\d\d(?::?\d\d)?)$")

# A column with so many cells of a kind, and so large a share of them, has typing errors and no
# other kind.
_TYPOS_COUNT, _TYPOS_SHARE = 20, 0.9


@dataclass(frozen=True)
class _Layout:
    """Where the rows of a file begin and how they are written."""

    path: str
    encoding: str
    header: list[str]
    skip: int
    delimiter: str

    def parse(self, names: Sequence[str], kind: Any = None, **options: Any) -> Any:
        """Some columns as a pyarrow table: of one type, or of those that Arrow infers."""
        _, csv = arrow("csv")
        handler = options.pop("invalid_row_handler", None)
        return csv.read_csv(
            self.path,
            read_options=csv.ReadOptions(
                column_names=self.header, skip_rows=self.skip, encoding=self.encoding, **options
            ),
            parse_options=csv.ParseOptions(
                delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=handler
            ),
            convert_options=csv.ConvertOptions(
                include_columns=names,
                column_types=None if kind is None else dict.fromkeys(names, kind),
                null_values=NULLS,
                true_values=_TRUE,
                false_values=_FALSE,
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )


_LOOKED_AT, _MANY_TEXTS, _MOSTLY = 10_000, 10, 0.8  # texts of a column, and the share that is told
_FORMS = (
    (
        "dates",
        re.compile(r"^\d{1,4}[./-]\d{1,2}[./-]\d{1,4}(\s.*)?$"),
        "write dates as 2024-12-31",
    ),
    (
        "numbers",
        re.compile(r"^[+-]?\s?[$€£¥]?\s?[+-]?\d[\d.,' ]*([eE][+-]?\d+)?\s?[%$€£¥]?$"),
        "write numbers as 1234.5, without marks or separators, and leave missing cells empty",
    ),
)
_ZEROS = re.compile(rb"""(?:^|[,;\t\r\n" ])0\d""")


class _NotUtf8Error(Exception):
    """Some text is not UTF-8."""


def read_csv(path: str, wanted: list[str] | None, also: Sequence[str], _key: None) -> Table:
    """CSV with a header line, as `laminar.tables.read.read_table` says."""
    try:
        return _read(_layout(path, _encoding(path)), wanted, also)
    except _NotUtf8Error:
        pass
    try:
        table = _read(_layout(path, "cp1252"), wanted, also)
    except _NotUtf8Error:
        raise InputError(
            f"{path} is not a text file in UTF-8, UTF-16 or Windows-1252; save it as CSV in UTF-8."
        ) from None
    note = f"{path} is not in UTF-8 and was read as Windows-1252: check its accented letters."
    return replace(table, notes=(note, *table.notes))


def _read(layout: _Layout, wanted: list[str] | None, also: Sequence[str]) -> Table:
    (pa,) = arrow()
    path, names = layout.path, choose(layout.header, wanted, also, layout.path)
    try:
        data = layout.parse(names)
        if any(pa.types.is_binary(kind) for kind in data.schema.types):
            raise _NotUtf8Error
        large = [name for name in names if _any_beyond(data[name])]
        again = [name for name in names if _shows_less(data[name].type)]
        whole = [name for name in names if pa.types.is_integer(data[name].type)]
        again += whole if whole and _has_zeros(layout) else []
        text = layout.parse([*large, *again], pa.string()) if large or again else {}
    except UnicodeError:
        raise _NotUtf8Error from None
    except pa.ArrowInvalid as error:
        raise _csv_error(layout, error) from None
    for name in large:
        _refuse_inexact(text[name].to_pylist(), name, path)
    columns = []
    for name in names:
        column, kind = data[name], data[name].type
        comma = layout.delimiter != ","
        if pa.types.is_time(kind) or (name in again and _padded(text[name], kind)):
            columns.append(_from_text(text[name], name, path, comma))
        elif pa.types.is_string(kind):
            columns.append(_from_text(column, name, path, comma))
        elif name in again and pa.types.is_timestamp(kind):
            values, cells = arrow_column(column, name, path)
            columns.append((values, replace(cells, zone=_zone(text[name]))))
        else:
            columns.append(arrow_column(column, name, path))
    table = stacked(names, columns, data.num_rows, path)
    return replace(table, notes=_looks(table))


def _looks(table: Table) -> tuple[str, ...]:
    """Remarks on columns of texts that are mostly numbers or dates in a form that is not read."""
    notes = []
    for name, cells in zip(table.names, table.cells, strict=True):
        texts = [text.strip() for text in cells.levels[:_LOOKED_AT]]
        if cells.kind != "text" or len(texts) < _MANY_TEXTS:
            continue
        for what, pattern, instead in _FORMS:
            like = [text for text in texts if pattern.match(text)]
            if len(like) >= _MOSTLY * len(texts):
                others = [text for text in texts if not pattern.match(text)]
                beside = f", beside others such as {short(others[0])}" if others else ""
                notes.append(
                    f"Column {name!r} of {table.source} is read as text, and its cells look like "
                    f"{what} ({short(like[0])}{beside}); {instead}."
                )
                break
    return tuple(notes)


def _has_zeros(layout: _Layout) -> bool:
    """Whether a cell somewhere may begin with a zero and go on with a digit."""
    if layout.encoding == "utf-16":
        return True
    before = b""
    with _open(layout.path, mode="rb") as file:
        while block := file.read(1 << 24):
            if _ZEROS.search(before + block):
                return True
            before = block[-3:]
    return False


def _padded(column: Any, kind: Any) -> bool:
    """Whether whole numbers are written as codes are, such as the postcode 01067."""
    pa, pc = arrow("compute")
    if not pa.types.is_integer(kind):
        return False
    return bool(pc.any(pc.match_substring_regex(column, r"^\s*0\d+\s*$")).as_py())


def _shows_less(kind: Any) -> bool:
    """Whether Arrow's type says less than the text: times of the day, and the offsets of zones."""
    (pa,) = arrow()
    return pa.types.is_time(kind) or (pa.types.is_timestamp(kind) and kind.tz is not None)


# ------------------------------------------------------------------------------------ the header


def _open(path: str, **options: Any) -> IO[Any]:
    import gzip

    opener: Callable[..., IO[Any]] = gzip.open if path.lower().endswith(".gz") else open
    return opener(path, **options)


def _encoding(path: str) -> str:
    """UTF-16 where a byte order mark says so, and UTF-8 until a cell shows otherwise."""
    import zlib

    try:
        with _open(path, mode="rb") as file:
            mark = file.read(2)
    except (zlib.error, EOFError) as error:
        raise _damaged(path, error) from None
    return "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _damaged(path: str, error: Exception) -> InputError:
    return InputError(f"{path} is a damaged gzip file: {first_line(error)}.")


def _layout(path: str, encoding: str) -> _Layout:
    """The column names, the lines up to the end of the header, and the delimiter."""
    import csv
    import zlib

    try:
        with _open(path, mode="rt", encoding=encoding, newline="") as stream:
            blank, line = 0, stream.readline()
            while line and not line.strip():
                blank, line = blank + 1, stream.readline()
            if not line:
                raise InputError(f"{path} is empty; it needs a header line and rows of cells.")
            delimiter = "\t" if path.lower().endswith(".tsv") else _delimiter(line)

            def lines():
                yield line
                yield from stream

            reader = csv.reader(lines(), delimiter=delimiter)
            header = [name.strip() for name in next(reader)]
            skip = blank + reader.line_num
    except (zlib.error, EOFError) as error:
        raise _damaged(path, error) from None
    except UnicodeError:
        raise _NotUtf8Error from None
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file: {first_line(error)}.") from None
    _check_header(header, path)
    return _Layout(path, "utf-8" if encoding == "utf-8-sig" else encoding, header, skip, delimiter)


def _check_header(header: list[str], path: str) -> None:
    if any("\0" in name for name in header):
        raise InputError(f"{path} is not a text file; save it as CSV in UTF-8.")
    if any(is_number(name) for name in header) and all(
        is_number(name) or not name for name in header
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


def _delimiter(line: str) -> str:
    """The first of the comma, the semicolon and the tab that stands outside quotes."""
    bare = re.sub(r'"[^"]*("|$)', "", line)
    return next((mark for mark in (",", ";", "\t") if mark in bare), ",")


def _csv_error(layout: _Layout, error: Exception) -> InputError:
    """Turn Arrow's complaint into one that names the row, by reading once more in one thread."""
    (pa,) = arrow()
    found: list[Any] = []

    def note(row: Any) -> str:
        found.append(row)
        return "skip"

    try:
        layout.parse(layout.header, pa.binary(), use_threads=False, invalid_row_handler=note)
    except pa.ArrowInvalid as other:
        error = other
    if not found:
        return InputError(f"{layout.path} is not a readable CSV file: {first_line(error)}.")
    row = found[0]
    where = f"row {row.number - layout.skip}" if row.number else "a row"
    return InputError(
        f"{layout.path}: {where} has {row.actual_columns} cell{'s' * (row.actual_columns != 1)} "
        f"and the header names {row.expected_columns} columns; correct that row."
    )


# ------------------------------------------------------------------------ columns that stayed text


def _from_text(column: Any, name: str, path: str, comma: bool = False) -> Column:
    """A column that Arrow took for text: that, or numbers, booleans or dates spelt unusually.

    Where cells are not separated by commas, these may stand for decimal points.
    """
    pa, pc = arrow("compute")
    indices, spelt = dictionary(column)
    counts = np.bincount(indices[indices >= 0], minlength=len(spelt))
    bare = pc.utf8_trim_whitespace(spelt)
    empty = _mask(pc.equal(bare, ""))
    there = np.flatnonzero(~_mask(pc.is_in(bare, value_set=pa.array(NULLS, bare.type))))
    if empty.all():
        return np.full(len(indices), np.nan), Cells()
    found = bare.take(pa.array(there))
    codes = _mask(pc.match_substring_regex(found, r"^0\d+$")).any()
    for spelling in () if codes else (*(_COMMAS if comma else ()), *_SPELLINGS):
        fits = _mask(pc.match_substring_regex(found, spelling.pattern))
        if spelling.check is not None:
            matched = np.flatnonzero(fits)
            fits[matched] = [spelling.check(text) for text in found.take(matched).to_pylist()]
        built = spelling.build(found.to_pylist()) if there.size and fits.all() else None
        if built is not None:
            values = np.full(len(spelt) + 1, np.nan)
            values[there] = built[0]
            if built[1].kind == "integer" and (np.abs(built[0]) >= EXACT).any():
                _refuse_inexact(pc.utf8_trim_whitespace(column).to_pylist(), name, path)
            return values[indices], built[1]
        good, cells = counts[there[fits]].sum(), counts[there].sum()
        if spelling.name and good < cells and good >= max(_TYPOS_COUNT, _TYPOS_SHARE * cells):
            rows = np.flatnonzero(np.isin(indices, there[~fits]))
            raise _typo(path, name, rows, spelt[int(indices[rows[0]])].as_py(), spelling.name)
    # In quotes, NA is a text; empty quotes are still no cell.
    missing = np.append(empty, True)
    return text_column(np.where(missing[indices], np.nan, indices), spelt.to_pylist())


def _mask(array: Any) -> np.ndarray:
    return np.array(array.to_numpy(zero_copy_only=False), dtype=bool)


def _typo(path: str, name: str, rows: np.ndarray, first: str, kind: str) -> InputError:
    others = f"{len(rows) - 1:,} more such row{'s' * (len(rows) > 2)}"
    more = f" (and {others})" if len(rows) > 1 else ""
    return InputError(
        f"{path}: column {name!r}, row {rows[0] + 1} holds {short(first)}, which is not {kind}"
        f"{more}; correct or empty it, or choose other columns with --columns."
    )


def _numbers(texts: list[str]) -> Column:
    whole = all(text.lstrip("+-").isdecimal() for text in texts)
    return np.array([float(text) for text in texts]), Cells("integer" if whole else "number")


def _with_commas(texts: list[str]) -> Column | None:
    if not any("," in text for text in texts):
        return None
    return _numbers([text.replace(",", ".") for text in texts])


def _booleans(texts: list[str]) -> Column:
    return np.array([text.lower() == "true" for text in texts], float), Cells("boolean")


def _is_date(text: str) -> bool:
    return iso_offset(text) is not None and nanoseconds(text, "UTC") is not None


def _dates(texts: list[str]) -> Column | None:
    """Dates all with an offset or all without one; None where they are mixed, or none fits."""
    zone = _one_zone({iso_offset(text) or "" for text in texts})
    if zone is None:
        return None
    return moments_column([nanoseconds(text, zone) for text in texts], zone)


class _Spelling(NamedTuple):
    """One of the things that the cells of a column may be.

    Attributes:
        name: In messages; empty where typing errors are not told from texts.
        pattern: What its cells match.
        check: Whether a cell that matches is one.
        build: The cells as numbers, and what these mean; None where they do not go together.
    """

    name: str
    pattern: str
    check: Callable[[str], bool] | None
    build: Callable[[list[str]], Column | None]


_SPELLINGS = (
    _Spelling(
        "a number",
        r"(?i)^[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|infinity|nan)$",
        None,
        _numbers,
    ),
    _Spelling("", r"(?i)^(true|false)$", None, _booleans),
    _Spelling("a date", r"^\d{4}-\d\d-\d\d([T ].*)?$", _is_date, _dates),
)


_COMMAS = (_Spelling("a number", r"(?i)^[+-]?(\d+,?\d*|,\d+)(e[+-]?\d+)?$", None, _with_commas),)


def _zone(column: Any) -> str:
    """The offset of dates that all have one, or UTC where they differ."""
    _, pc = arrow("compute")
    ends = pc.unique(pc.utf8_slice_codeunits(pc.utf8_rtrim_whitespace(column), -6)).drop_null()
    found = {_OFFSET_AT_END.search(end) for end in ends.to_pylist()}
    return _one_zone({iso_offset(f"2000-01-01T00{end[0]}") or "" for end in found if end}) or "UTC"


def _one_zone(offsets: set[str]) -> str | None:
    if len(offsets) <= 1:
        return next(iter(offsets), "")
    return None if "" in offsets else "UTC"


def _any_beyond(column: Any) -> bool:
    """Whether a column of floats holds numbers among which float64 lacks some integers."""
    pa, pc = arrow("compute")
    if not pa.types.is_floating(column.type):
        return False
    ends = pc.min_max(column).as_py()
    return any(end is not None and abs(end) >= EXACT for end in ends.values())


def _refuse_inexact(cells: Sequence[str | None], name: str, path: str) -> None:
    for row, cell in enumerate(cells, start=1):
        cell = (cell or "").strip()
        digits = cell.lstrip("+-")
        if digits.isdecimal() and int(float(digits)) != int(digits):
            raise inexact(path, name, row, cell)
