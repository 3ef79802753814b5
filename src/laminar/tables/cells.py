"""What the numbers of a column stand for: integers, booleans, texts and dates, and the way back.

A table is float64 throughout. A `Cells` says how a column's numbers are read: a text is the
position of its level, a date the time since an origin, and NaN in any column a missing cell.
"""

import datetime
import decimal
import math
import numbers
import re
import zoneinfo
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from laminar._errors import InputError

CellKind = Literal["number", "integer", "boolean", "text", "datetime"]

EXACT = 2.0**53
"""From here on float64 does not hold every integer."""

UNSEEN = -1.0
"""The code of a text that is none of the levels."""

UNSEEN_TEXT = "(unseen)"
"""What stands for such a text when codes are turned into cells: which text it was is not known."""

NANOSECONDS = {"D": 86_400_000_000_000, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
"""The units of dates, the coarsest first, in nanoseconds."""

_DATE = "a date or date-time such as 2024-12-31 or 2024-12-31T23:59:59"
_ISO = re.compile(
    r"(\d{4}-\d\d-\d\d)"
    r"(?:[T ](\d\d(?::\d\d(?::\d\d(?:\.\d{1,9})?)?)?) ?(Z|[+-]\d\d(?::?\d\d)?)?)?"
)
_OFFSET = re.compile(r"([+-])(\d\d):?(\d\d)?")


class CellError(InputError):
    """A cell that cannot be what its column needs.

    Attributes:
        position: Which cell, counted from 0.
        reason: What is wrong with it, as the rest of a sentence: "holds 'x', which is no number".
    """

    def __init__(self, position: int, reason: str):
        super().__init__(f"Cell {position + 1} {reason}.")
        self.position = position
        self.reason = reason


@dataclass(frozen=True)
class Cells:
    """How the numbers of a column stand for the user's cells; NaN is a missing cell in all kinds.

    Attributes:
        kind: ``"number"``; ``"integer"``; ``"boolean"``, 0 or 1; ``"text"``, the position among
            `levels`, or `UNSEEN`; ``"datetime"``, the time in `unit` since `origin`.
        levels: The texts of a text column, all different: in their own order where `ordered`,
            otherwise sorted by code point.
        ordered: Whether the levels have an order, as in an ordered categorical.
        unit: Of a datetime: ``"D"``, ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``.
        origin: Of a datetime: the number of units from 1970-01-01T00:00 to where it counts from. A
            count is exact below 2⁵³ units, which are 104 days of nanoseconds and 285 years of
            microseconds; beyond, it is rounded to the nearest float64.
        zone: Of a datetime: the zone in which it is shown, an IANA name or an offset such as
            ``"+02:00"``; counts are those of UTC. Empty for dates without a zone.
    """

    kind: CellKind = "number"
    levels: tuple[str, ...] = ()
    ordered: bool = False
    unit: str = ""
    origin: int = 0
    zone: str = ""

    def decode(self, values: np.ndarray) -> np.ndarray:
        """The user's cells that numbers stand for.

        Args:
            values: Numbers of shape (N,), as `encode` gives them. A datetime is rounded to its
                unit.

        Returns:
            An array (N,): float64 of a number; int64 of an integer, or float64 when a cell is
            missing or not whole; bool of a boolean, or objects with None for missing cells; objects
            str or None of a text, `UNSEEN_TEXT` where the code is `UNSEEN`; datetime64 in `unit`,
            NaT for missing cells and in UTC if there is a zone.

        Raises:
            CellError: When a number stands for no cell of the kind.
        """
        values = np.asarray(values, dtype=np.float64)
        if self.kind == "number":
            return values
        missing = np.isnan(values)
        if self.kind == "integer":
            whole = (values == np.rint(values)) & (np.abs(values) < 2.0**63)
            return values.astype(np.int64) if whole.all() else values
        if self.kind == "boolean":
            _refuse_codes(missing | (values == 0) | (values == 1), values, "neither 0 nor 1")
            truth = values == 1
            if missing.any():
                truth = truth.astype(object)
                truth[missing] = None
            return truth
        if self.kind == "text":
            count = len(self.levels)
            known = (values == np.rint(values)) & (values >= UNSEEN) & (values < count)
            _refuse_codes(missing | known, values, f"the position of none of {count} levels")
            texts = np.array([*self.levels, None, UNSEEN_TEXT], dtype=object)
            return texts[np.where(missing, count, values).astype(np.int64)]
        counts = np.rint(np.where(missing, 0.0, values))
        _refuse_codes(np.abs(counts + self.origin) < 2.0**63, values, "beyond all dates")
        moments = (counts.astype(np.int64) + self.origin).view(f"datetime64[{self.unit}]")
        moments[missing] = np.datetime64("NaT")
        return moments

    def encode(self, cells: Any) -> np.ndarray:
        """The numbers that stand for the user's cells.

        None, NaN, NaT and pandas' NA are missing. Numbers and booleans are taken as text also. In
        a text column a cell that is no text is matched with the level that spells it: 1 with
        ``"1"`` or, if that is unique, ``"01"``; a date with its ISO form. A date without a zone, in
        a column that has one, is a wall-clock time there, except that datetime64 is UTC, as
        `decode` gives it.

        Args:
            cells: A sequence or array of shape (N,).

        Returns:
            float64 of shape (N,); NaN for missing cells, `UNSEEN` for a text in no level.

        Raises:
            CellError: When a cell is not of this kind; it has the cell's position.
        """
        array = _array(cells)
        if self.kind in ("number", "integer"):
            if array.dtype.kind in "fb":
                return array.astype(np.float64)
            if array.dtype.kind in "iu":
                return _exact(array)
            return _each(array, _number, "a number")
        if self.kind == "boolean":
            return _each(array, _truth, "true or false")
        if self.kind == "text":
            return _each(array, _Levels(self.levels).code, "a text")
        if array.dtype.kind == "M":
            counts, unit = datetime_counts(array)
            return _rebased(counts, np.isnat(array), unit, self.unit, self.origin)
        size = NANOSECONDS[self.unit]
        need = _DATE if self.zone else f"{_DATE}, without a time zone"

        def since_origin(cell: Any) -> float | None:
            moment = nanoseconds(cell, self.zone)
            return None if moment is None else (moment - self.origin * size) / size

        return _each(array, since_origin, need)


# ------------------------------------------------------------------------- columns from the source


def text_column(
    indices: np.ndarray, texts: Sequence[str], ordered: bool = False
) -> tuple[np.ndarray, Cells]:
    """The codes and levels of a text column.

    Args:
        indices: Positions in `texts`, shape (N,), NaN where missing.
        texts: Texts, all different. Ordered ones are all kept, in their order; of others those that
            occur are, sorted.
        ordered: Whether they have an order.
    """
    if ordered:
        return indices, Cells("text", tuple(texts), ordered=True)
    missing = np.isnan(indices)
    positions = np.where(missing, 0.0, indices).astype(np.int64)
    used = np.flatnonzero(np.bincount(positions[~missing], minlength=1)).tolist()
    order: list[int] = sorted(used, key=texts.__getitem__)
    codes = np.full(len(texts) or 1, np.nan)
    codes[order] = np.arange(len(order))
    codes = np.where(missing, np.nan, codes[positions])
    return codes, Cells("text", tuple(texts[position] for position in order))


def datetime_column(
    counts: np.ndarray, missing: np.ndarray, unit: str, zone: str = ""
) -> tuple[np.ndarray, Cells]:
    """The numbers of a column of dates: in the coarsest unit that divides all, since the earliest.

    Args:
        counts: Integers since 1970-01-01, in `unit`; int64 of shape (N,).
        missing: Which of them mean nothing.
        unit: Of the counts, one of `NANOSECONDS`.
        zone: The zone in which they are shown, or empty.
    """
    there = counts[~missing]
    factor = 1
    for coarse, size in NANOSECONDS.items():
        factor = size // NANOSECONDS[unit]
        if coarse == unit or not (there % factor).any():
            unit = coarse
            break
    origin = int(there.min() // factor) if there.size else 0
    values = np.full(len(counts), np.nan)
    # Unsigned, the difference of any two int64 is right.
    first = np.uint64(origin * factor % 2**64)
    values[~missing] = ((there.astype(np.uint64) - first) // np.uint64(factor)).astype(np.float64)
    return values, Cells("datetime", unit=unit, origin=origin, zone=zone)


def moments_column(moments: Sequence[int | None], zone: str) -> tuple[np.ndarray, Cells] | None:
    """A column of dates in nanoseconds since 1970-01-01T00:00, None where missing.

    As `datetime_column` otherwise; None where dates in the unit they need are beyond int64.
    """
    there = [moment for moment in moments if moment is not None]
    step = math.gcd(*there)
    unit = next(unit for unit, size in NANOSECONDS.items() if step % size == 0)
    if there and max(map(abs, there)) // NANOSECONDS[unit] >= 2**63:
        return None
    counts = np.array([(moment or 0) // NANOSECONDS[unit] for moment in moments], np.int64)
    return datetime_column(counts, np.array([m is None for m in moments], bool), unit, zone)


def datetime_counts(array: np.ndarray) -> tuple[np.ndarray, str]:
    """A datetime64 array as int64 counts and their unit, one of `NANOSECONDS`."""
    unit, multiple = np.datetime_data(array.dtype)
    if multiple != 1 or unit not in NANOSECONDS:
        coarser = unit in ("Y", "M", "W", "D")
        fits = "D" if coarser else "s" if unit in ("h", "m", "s", "generic") else "ns"
        array = array.astype(f"datetime64[{unit if unit in NANOSECONDS else fits}]")
        unit = np.datetime_data(array.dtype)[0]
    return array.astype(np.int64), unit


def localised(counts: np.ndarray, unit: str, zone: str) -> np.ndarray:
    """Wall-clock times in a zone, int64 counts of a unit, as datetime64[ns] or [us] of UTC.

    Of an hour that a zone has twice the first is meant.
    """
    fine = unit if unit in ("us", "ns") else "us"
    moments = counts.view(f"datetime64[{unit}]").astype(f"datetime64[{fine}]")
    place = time_zone(zone)
    wall = moments.astype("datetime64[us]").tolist()
    seconds = [int(_offset(when, place).total_seconds()) for when in wall]
    return moments - np.array(seconds, dtype="timedelta64[s]")


def time_zone(zone: str) -> datetime.tzinfo:
    """The zone of an IANA name or of an offset such as +02:00; an unknown one is an error."""
    match = _OFFSET.fullmatch(zone)
    try:
        return datetime.timezone(_signed(match)) if match else zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError):
        raise InputError(
            f"There is no time zone {zone!r} here; use an IANA name such as Europe/Berlin."
        ) from None


# -------------------------------------------------------------------------------------- one cell


def is_missing(cell: Any) -> bool:
    """Whether a cell of an object column is none: None, NaN, NaT or pandas' NA."""
    if cell is None or type(cell).__name__ == "NAType":
        return True
    unequal = float | np.generic | datetime.datetime | decimal.Decimal
    return isinstance(cell, unequal) and bool(cell != cell)


def is_number(text: str) -> bool:
    """Whether a text is a number as every reader takes it; Python alone would take 1_000."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def iso_offset(text: str) -> str | None:
    """The offset of a date in ISO form: UTC, such as +02:00, or empty; None if it is no date."""
    match = _ISO.fullmatch(text)
    if not match:
        return None
    signed = _OFFSET.fullmatch(match[3] or "")
    if not signed:
        return "UTC" if match[3] else ""
    sign, hours, minutes = signed.groups()
    offset = f"{sign}{hours}:{minutes or '00'}"
    return "UTC" if offset[1:] == "00:00" else offset


def spelling(cell: Any) -> str:
    """A number, boolean or date as text: 1, 0.5, true, 2024-12-31, 2024-12-31T23:59:59."""
    if isinstance(cell, bool | np.bool_):
        return "true" if cell else "false"
    if isinstance(cell, np.datetime64):
        return str(cell)
    if isinstance(cell, datetime.date):
        return cell.isoformat()
    if isinstance(cell, float | np.floating):
        number = float(cell)
        return str(int(number)) if number.is_integer() and abs(number) < EXACT else repr(number)
    return str(cell)


def short(text: str, limit: int = 40) -> str:
    """A cell in quotes, cut when it is long."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def nanoseconds(cell: Any, zone: str) -> int | None:
    """A date in nanoseconds since 1970-01-01T00:00, or None for what is none.

    Args:
        cell: A text in ISO form, or a date of Python's, NumPy's or pandas'.
        zone: The zone of a clock time without an offset, and the count is of UTC; where it is
            empty the count is as the clock says, and what has an offset is None.
    """
    if isinstance(cell, np.datetime64):
        return _wall(cell, "")
    if isinstance(cell, str):
        match = _ISO.fullmatch(cell.strip())
        if not match:
            return None
        day, clock, offset = match.groups()
        try:
            moment = np.datetime64(f"{day}T{clock}" if clock else day)
        except ValueError:
            return None
        if offset:
            if not zone:
                return None
            signed = _OFFSET.fullmatch(offset)
            moment -= np.timedelta64(_signed(signed) if signed else datetime.timedelta())
            return _wall(moment, "")
        return _wall(moment, zone)
    if isinstance(cell, datetime.datetime):
        # pandas' timestamps have nanoseconds besides.
        rest = getattr(cell, "nanosecond", 0)
        if cell.tzinfo is None:
            return _wall(np.datetime64(cell, "us"), zone) + rest
        if not zone:
            return None
        utc = cell.astimezone(datetime.UTC).replace(tzinfo=None)
        return _wall(np.datetime64(utc, "us"), "") + rest
    if isinstance(cell, datetime.date):
        return _wall(np.datetime64(cell), zone)
    return None


class _Levels:
    """Finds the code of a cell among the levels of a text column."""

    def __init__(self, levels: Sequence[str]):
        self.exact = {level: float(code) for code, level in enumerate(levels)}
        self.numeric = _unique((float(t), c) for t, c in self.exact.items() if is_number(t))
        self.truth = _unique((t.strip().lower(), c) for t, c in self.exact.items())

    def code(self, cell: Any) -> float | None:
        if isinstance(cell, str):
            return self.exact.get(cell, UNSEEN)
        if isinstance(cell, bool | np.bool_):
            return self.truth.get(spelling(cell), UNSEEN)
        if isinstance(cell, datetime.date | np.datetime64):
            iso = spelling(cell)
            return self.exact.get(iso, self.exact.get(iso.replace("T", " "), UNSEEN))
        if isinstance(cell, numbers.Number | decimal.Decimal):
            text = spelling(cell)
            return self.exact.get(text, self.numeric.get(float(cell), UNSEEN))  # type: ignore[arg-type]
        return None


def _unique(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    """The pairs whose key occurs once."""
    found: dict[Any, list[float]] = {}
    for key, code in pairs:
        found.setdefault(key, []).append(code)
    return {key: codes[0] for key, codes in found.items() if len(codes) == 1}


def _number(cell: Any) -> float | None:
    if isinstance(cell, str):
        text = cell.strip()
        if not is_number(text):
            return None
        cell = int(text) if text.lstrip("+-").isdecimal() else float(text)
    if isinstance(cell, numbers.Integral) and int(float(cell)) != int(cell):
        return None
    if isinstance(cell, numbers.Real | decimal.Decimal | np.bool_):
        return float(cell)
    return None


def _truth(cell: Any) -> float | None:
    if isinstance(cell, str):
        return {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}.get(cell.strip().lower())
    if isinstance(cell, numbers.Real | np.bool_) and cell in (0, 1):
        return float(cell)
    return None


def _wall(moment: np.datetime64, zone: str) -> int:
    """What the clock says in a zone, or in UTC, in nanoseconds of UTC."""
    counts, unit = datetime_counts(np.array([moment]))
    if zone:
        counts, unit = datetime_counts(localised(counts, unit, zone))
    return int(counts[0]) * NANOSECONDS[unit]


def _offset(when: Any, place: datetime.tzinfo) -> datetime.timedelta:
    # Beyond the year 9999 NumPy gives a number, and no zone has rules.
    known = isinstance(when, datetime.datetime)
    offset = when.replace(tzinfo=place).utcoffset() if known else None
    return offset if offset is not None else datetime.timedelta()


def _signed(match: re.Match[str]) -> datetime.timedelta:
    sign, hours, minutes = match.groups()
    size = datetime.timedelta(hours=int(hours), minutes=int(minutes or 0))
    return -size if sign == "-" else size


# --------------------------------------------------------------------------------- whole columns


def object_array(cells: Iterable[Any]) -> np.ndarray:
    """Cells of any kind as an object array (N,), each as it is."""
    listed = list(cells)
    array = np.empty(len(listed), dtype=object)
    array[:] = listed
    return array


def _array(cells: Any) -> np.ndarray:
    array = np.asarray(cells) if hasattr(cells, "__array__") else object_array(cells)
    if array.ndim != 1:
        raise InputError(f"The cells of a column have shape {array.shape}, and (N,) is needed.")
    return array


def _each(array: np.ndarray, convert: Callable[[Any], float | None], need: str) -> np.ndarray:
    """Every cell converted; the first that is not missing and gives None is an error."""
    values = np.full(len(array), np.nan)
    for position, cell in enumerate(array):
        if is_missing(cell):
            continue
        value = convert(cell)
        if value is None:
            raise CellError(position, f"holds {short(str(cell))}, which is not {need}")
        values[position] = value
    return values


def _exact(array: np.ndarray) -> np.ndarray:
    values = array.astype(np.float64)
    for position in np.flatnonzero(np.abs(values) >= EXACT):
        if int(values[position]) != int(array[position]):
            raise CellError(
                int(position),
                f"holds {array[position]}, an integer beyond 2**53 that float64 cannot hold "
                f"exactly",
            )
    return values


def _rebased(
    counts: np.ndarray, missing: np.ndarray, unit: str, wanted: str, origin: int
) -> np.ndarray:
    """Counts of one unit since 1970 as counts of another since an origin."""
    fine = min(NANOSECONDS[unit], NANOSECONDS[wanted])
    factor, size = NANOSECONDS[unit] // fine, NANOSECONDS[wanted] // fine
    there = counts[~missing]
    most = max(abs(int(there.min())), abs(int(there.max()))) if there.size else 0
    if max(most * factor, abs(origin) * size) >= 2**62:
        there = there.astype(object)
    values = np.full(len(counts), np.nan)
    values[~missing] = (there * factor - origin * size) / size
    return values


def _refuse_codes(fine: np.ndarray, values: np.ndarray, what: str) -> None:
    if not fine.all():
        position = int(np.argmin(fine))
        raise CellError(position, f"is {values[position]:g}, which is {what}")
