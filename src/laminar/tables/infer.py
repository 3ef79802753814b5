"""What the columns of a table are: inferred from their cells, or declared by the user.

::

    kind            cells                                              density or probability
    real            numbers                                            density; in a mixed table the
                                                                       probability of a grid's cell
    positive        numbers above `low`, widely spread                 density of ln(x − low)
    bounded         numbers between two ends, declared                 density of the logit
    integer         whole numbers                                      probability of the cell
    datetime        dates and times                                    probability of the cell
    ordinal         categories with an order                           probability of the cell
    boolean         true and false                                     probability
    categorical     names                                              probability
    constant        one value, or none                                 left out, and remembered
    ignored         an identifier, a row number or free text           left out
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import cast

import numpy as np

from laminar._errors import InputError
from laminar.tables.cells import Cells
from laminar.tables.columns import FINE, KINDS, Column, Kind
from laminar.tables.table import listing

FEW = 50
"""Up to so many distinct values, each taken twice or more on average, make a column discrete."""

MOST_STATES = 64
"""Categories beyond the most frequent ones share a state, in which each has its own share."""

_SMOOTHING = 0.01  # the least noise on values that many rows share, in units of the column's scale
_LARGEST = 1e150  # squares stay within float64
_SPREAD = 3.0  # the most by which the standard deviation may exceed the robust scale
_GAIN = 0.3  # nats a row by which a logarithm must look more normal
_FEWEST = 20  # values that a spread can be taken of
_FAR = 10.0  # in scales from the middle: values beyond it speak of heavy tails
_FEW_NUMBERS = 10  # whole numbers that are told one by one
_ENDS = 0.04  # of the rows on the highest number of a scale, at least
_DIGITS = 6  # after the point, that samples are rounded to at most
_BY_CHANCE = 14.0  # nats: what is less probable than one in a million is no chance
SURE = 50  # rows; fewer do not say on what grid a column lies, or where it ends


def learn_column(
    name: str,
    values: np.ndarray,
    train: np.ndarray | None = None,
    condition: bool = False,
    *,
    cells: Cells | None = None,
    declared: str | None = None,
    typed: bool = False,
) -> Column:
    """What one column is, from all its values, scaled by the training ones; see `Column`.

    Args:
        name: Its name.
        values: Its numbers, NaN where missing.
        train: Those of the rows that location and scale are taken from.
        condition: Whether it is conditioned on, and so has no density.
        cells: How the numbers stand for the user's cells.
        declared: The kind the user says it is, with ends as in ``"bounded:0:1"``; see `KINDS`.
        typed: Whether the table says what its cells are; the columns of a bare array are real.

    Raises:
        InputError: When the kind does not fit the values; the message names the column.
    """
    cells = cells or Cells()
    kind, ends = parse_kind(name, declared)
    there = values[~np.isnan(values)]
    missing = len(there) < len(values)
    if kind == "ignored":
        return _left_out(name, cells)
    distinct, counts = np.unique(there, return_counts=True)
    if not len(distinct):
        return Column(name, "constant", math.nan, cells=cells)
    if max(abs(distinct[0]), abs(distinct[-1])) > _LARGEST:
        raise InputError(f"Column {name!r} holds values beyond 1e150; divide it by a constant.")
    if len(distinct) == 1 and not missing:
        return Column(name, "constant", float(distinct[0]), cells=cells)
    inferred = kind is None
    kind = kind or _kind(cells, there, condition)
    if kind == "ignored":
        return _left_out(name, cells)
    _check_fit(name, kind, cells)
    seen = there if train is None else train[~np.isnan(train)]
    seen = seen if len(seen) else there
    if kind in ("boolean", "categorical") or (len(distinct) == 1 and missing):
        return _categorical(name, kind, cells, missing, distinct, counts)
    if kind in ("integer", "datetime", "ordinal"):
        column = _counted(name, kind, cells, missing, there, seen, ends, condition)
    else:
        guess = inferred and typed
        column = _continuous(name, kind, cells, missing, there, seen, ends, condition, typed, guess)
    if condition or column.states_only or kind == "datetime":  # the calendar has an end
        return column
    z = column.standardise(there[~np.isin(there, column.spikes)])
    if len(z) < _FEWEST or np.abs(z).max() <= _FAR:
        return column
    # The bulk: the scale itself may be several times wider where there are outliers.
    low, high = np.percentile(z, (5.0, 95.0))
    unit = max((high - low) / 3.289707, column.step / column.scale, 1e-6)
    return dataclasses.replace(column, heavy=float(unit))


def _left_out(name: str, cells: Cells) -> Column:
    """A column that is not modelled, without its texts: who has the model need not have them."""
    return Column(name, "ignored", 0.0, cells=dataclasses.replace(cells, levels=()))


def parse_kind(name: str, declared: str | None) -> tuple[Kind | None, tuple[float, ...]]:
    """The kind and the ends in a declaration such as ``"bounded:0:1"``."""
    if declared is None:
        return None, ()
    first, *numbers = declared.split(":")
    kind = cast(Kind, first)
    if kind not in KINDS or kind == "constant":
        choices = ", ".join(k for k in KINDS if k != "constant")
        raise InputError(f"Column {name!r} is declared {declared!r}; choose among {choices}.")
    try:
        ends = tuple(float(number) for number in numbers)
    except ValueError:
        ends = (math.nan,)
    most = {"bounded": 2, "positive": 1, "integer": 2}.get(kind, 0)
    wrong = len(ends) > most or any(not math.isfinite(end) for end in ends)
    if wrong or (kind == "bounded" and (len(ends) != 2 or not ends[0] < ends[1])):
        raise InputError(
            f"Column {name!r} is declared {declared!r}; write kinds as real, positive, "
            "positive:0, bounded:0:1, integer:0 or categorical."
        )
    return kind, ends


def check_declared(kinds: Mapping[str, str], names: tuple[str, ...], source: str) -> None:
    """Refuse a declaration of a column that is not there."""
    from laminar.tables.table import unknown_column

    for name, kind in kinds.items():
        if name not in names:
            raise unknown_column(name, names, source)
        parse_kind(name, kind)


def looks_like_identifier(cells: Cells, values: np.ndarray) -> bool:
    """Whether a column of texts has many, most of them in one row only."""
    there = values[~np.isnan(values)]
    many = len(np.unique(there))
    return cells.kind == "text" and many > FEW and 2 * many > len(there)


def numbers_rows(there: np.ndarray) -> bool:
    """Whether whole numbers only tell rows apart: chance would have repeated some, and none is.

    Of n independent draws from any law on m points all differ with a probability of at most
    exp(−n (n − 1) / 2m); the uniform law has the greatest (the birthday problem).
    """
    n = len(there)
    if n < SURE or len(np.unique(there)) < n:
        return False
    return 0.5 * n * (n - 1) > _BY_CHANCE * (there.max() - there.min() + 1)


def _kind(cells: Cells, there: np.ndarray, condition: bool) -> Kind:
    """What the cells say a column is."""
    if cells.kind == "integer" and not condition and numbers_rows(there):
        return "ignored"
    if cells.kind == "text":
        if looks_like_identifier(cells, there):
            return "ignored"
        return "ordinal" if cells.ordered and not condition else "categorical"
    return cells.kind if cells.kind in ("boolean", "integer", "datetime") else "real"


def _check_fit(name: str, kind: str, cells: Cells) -> None:
    if kind == "datetime" and cells.kind != "datetime":
        raise InputError(
            f"Column {name!r} holds no dates and is declared datetime; write dates as 2024-12-31 "
            "or 2024-12-31T23:59:59, or declare it real or integer."
        )
    names = cells.kind == "text"
    if names and kind not in ("categorical", "ordinal", "boolean"):
        raise InputError(
            f"Column {name!r} holds text and is declared {kind!r}; declare it categorical, ordinal "
            "or ignored."
        )


def _categorical(name, kind, cells, missing, distinct, counts) -> Column:
    """Categories, the most frequent first; those beyond the most that have states are rare."""
    if kind == "boolean" and len(distinct) > 2:
        raise InputError(
            f"Column {name!r} is declared boolean and has {len(distinct)} different values."
        )
    order = np.argsort(-counts, kind="stable")
    codes, counts = distinct[order], counts[order]
    total = int(counts.sum())
    rare, shares = (), ()
    if len(codes) > MOST_STATES:
        left = counts[MOST_STATES - 1 :] / counts[MOST_STATES - 1 :].sum()
        rare, shares = tuple(map(float, codes[MOST_STATES - 1 :])), tuple(map(float, left))
        codes = codes[: MOST_STATES - 1]
    # The chance that the next row brings a category of its own, by Laplace's rule; a boolean and
    # a missing cell have no other.
    closed = kind == "boolean" and len(distinct) == 2
    return Column(
        name,
        "boolean" if kind == "boolean" else "categorical",
        0.0,
        cells=cells,
        missing=missing,
        codes=tuple(map(float, codes)),
        rare=rare,
        shares=shares,
        unseen=0.0 if closed else 1.0 / (total + 2),
    )


def _counted(name, kind, cells, missing, there, seen, ends, condition) -> Column:
    """Whole numbers, dates, or categories with an order: points of a grid."""
    distinct = np.unique(there)
    if kind == "integer" and not (distinct == np.round(distinct)).all():
        at = distinct[distinct != np.round(distinct)][0]
        raise InputError(f"Column {name!r} is declared integer and holds {at:g}.")
    step, low, high = 1.0, None, None
    if kind == "ordinal":
        texts = cells.kind == "text"
        low = 0.0 if texts else float(distinct[0])
        high = float(len(cells.levels) - 1) if texts else float(distinct[-1])
    elif len(there) >= SURE and len(distinct) >= 5:
        step = max(grid_step(distinct), 1.0)
    origin = float(distinct[0])
    if kind == "integer":
        low = ends[0] if ends else (math.fmod(origin, step) if origin >= 0 else None)
        high = ends[1] if len(ends) > 1 else None
    location, scale = _standard(seen, there)
    scale = math.hypot(scale, step / math.sqrt(12.0))
    if condition:
        return Column(name, kind, location, scale, cells=cells, missing=missing)
    # On a fine grid a cell is as narrow as a density allows; a spike there needs its own state.
    fine = step < FINE * scale
    spikes = _shared(*np.unique(there, return_counts=True)) if fine else ()
    few = kind == "integer" and not ends and len(distinct) <= _FEW_NUMBERS
    if few and len(there) >= SURE and (there == distinct[-1]).mean() > _ENDS:
        # Grades and the like, which do not thin out towards their highest number: one beyond those
        # that occur is as new as a new category.
        codes = tuple(map(float, distinct))
        new = 1.0 / (len(there) + 2)
        return Column(name, kind, 0.0, cells=cells, missing=missing, codes=codes, unseen=new)
    column = Column(
        name,
        kind,
        0.0,
        step=step,
        origin=origin,
        levels=spikes,
        discrete=True,
        cells=cells,
        missing=missing,
        low=low,
        high=high,
        # Values off a coarse grid have the chance that the next row brings one.
        unseen=1.0 / (len(there) + 2) if step > 1 else 0.0,
        cell=True,
        fine=fine,
    )
    if not column.supports(there).all():
        bad = float(there[~column.supports(there)][0])
        raise InputError(
            f"Column {name!r} is {kind} and holds {bad:g}, which its grid and ends leave no room "
            "for; declare it real or categorical, or give other ends."
        )
    if fine and low is not None:
        rest = seen[~np.isin(seen, spikes)]
        t = column.standardise(rest if len(rest) > 1 else there)
        location, scale = _standard(t, t)
    return dataclasses.replace(column, location=location, scale=scale or 1.0)


def _continuous(
    name: str, kind: Kind, cells, missing, there, seen, ends, condition, typed, guess
) -> Column:
    """Numbers with a density: as they are, or their logarithm or logit; a real one by `guess`."""
    location, scale = _standard(seen, there)
    common = {"cells": cells, "missing": missing}
    if condition:
        return Column(name, "real", location, scale, **common)
    distinct, counts = np.unique(there, return_counts=True)
    discrete, resolution, step, levels = _ties(distinct, counts, scale)
    if kind == "real" and guess and not discrete:
        kind = _positive(there, levels)
    if kind == "real":
        if resolution > 0:
            # The noise is part of what is standardised, and may be wider than the bulk.
            scale = math.hypot(scale, resolution / math.sqrt(12.0))
        step = step or _digits(distinct, typed)
        origin = float(distinct[0]) if step else 0.0
        grid = (resolution, step, origin, levels, discrete)
        return Column(name, "real", location, scale, *grid, **common)
    low = ends[0] if ends else 0.0
    high = ends[1] if kind == "bounded" else None
    # Values at the very ends have no logarithm; as many as there are make a spike of their own.
    edges = tuple(v for v in (low, high) if v is not None and (there == v).any())
    spikes = tuple(sorted({*edges, *(() if discrete else levels)}))
    step = _digits(distinct, typed)
    common |= {"step": step, "origin": float(distinct[0]) if step else 0.0}
    column = Column(name, kind, 0.0, levels=spikes, low=low, high=high, **common)
    if not column.supports(there).all():
        bad = float(there[~column.supports(there)][0])
        span = f"above {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise InputError(f"Column {name!r} is declared {kind} ({span}) and holds {bad:g}.")
    inside = seen[~np.isin(seen, spikes)]
    inside = inside if len(inside) > 1 else there[~np.isin(there, spikes)]
    if len(inside) < 2:
        raise InputError(
            f"Column {name!r} is declared {kind} and has no values besides "
            f"{listing([f'{v:g}' for v in spikes])}; "
            "declare it categorical."
        )
    t = column.standardise(inside)
    location, scale = _standard(t, t)
    return Column(name, kind, location, scale or 1.0, levels=spikes, low=low, high=high, **common)


def _digits(distinct: np.ndarray, typed: bool) -> float:
    """The grid that samples are rounded to, so that they have the digits of the table, or 0."""
    if not typed or len(distinct) < SURE:
        return 0.0
    step = grid_step(distinct)
    if not step > 0 or round(step, _DIGITS) != step:
        return 0.0
    # A step that is rounded itself would move values that are many steps away.
    steps = (distinct - distinct[0]) / step
    return step if np.abs(steps - np.round(steps)).max() < 1e-3 else 0.0


def _standard(seen: np.ndarray, there: np.ndarray) -> tuple[float, float]:
    location, scale = location_scale(seen)
    return (location, scale) if scale > 0 else location_scale(there)


def _positive(values: np.ndarray, levels: tuple[float, ...]) -> Kind:
    """Whether the logarithm of values above zero looks more normal by far than they do."""
    if values.min() < 0 or (values.min() == 0 and 0.0 not in levels):
        return "real"
    x = values[values > 0]
    if len(x) < 20 or x.min() <= 0:
        return "real"
    logs = np.log(x)
    spread, own = float(np.std(x / x.max())), float(np.std(logs))
    if not (spread > 0 and own > 0):
        return "real"
    gain = math.log(spread) + math.log(float(x.max())) - math.log(own) - float(logs.mean())
    # A spike at zero says that zero is an end, unless the logarithm looks far less normal.
    return "positive" if gain > (_GAIN if values.min() > 0 else -_GAIN) else "real"


def location_scale(values: np.ndarray) -> tuple[float, float]:
    """Median, and the standard deviation unless outliers blow it up.

    The robust scale is the larger of the interquartile range and the range of the middle 90%, each
    divided by its length for a standard normal; the scale is the standard deviation or three times
    the robust scale, whichever is less, so that outliers cannot crush the bulk. Where more than 90%
    of the values are equal, the middle 98% stand in, or else the standard deviation alone decides.
    """
    levels = (1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0)
    q01, q05, q25, median, q75, q95, q99 = (float(q) for q in np.percentile(values, levels))
    reach = float(np.abs(values - median).max())
    # Squares of 1e200 or 1e-200 leave the range of float64.
    sd = reach * float(np.std((values - median) / reach)) if reach > 0 else 0.0
    robust = max((q75 - q25) / 1.348980, (q95 - q05) / 3.289707) or (q99 - q01) / 4.652696
    return median, min(sd, _SPREAD * robust) if robust > 0 else sd


def _ties(
    distinct: np.ndarray, counts: np.ndarray, scale: float
) -> tuple[bool, float, float, tuple[float, ...]]:
    """Whether a column that is not constant is discrete, its resolution, step and levels.

    Few distinct values make it discrete; so do many, if they lie on a grid and are taken twice or
    more on average. Otherwise single values that many rows share are levels of a continuous column.
    """
    total, many = int(counts.sum()), len(distinct)
    if many <= FEW:
        if total < 2 * many:
            return False, 0.0, 0.0, ()
        step = grid_step(distinct)
        if step >= _SMOOTHING * scale:
            return True, step, step, ()
        gap = float(np.diff(distinct).min())
        return True, max(gap, _SMOOTHING * scale), 0.0, tuple(map(float, distinct))
    levels = _shared(distinct, counts)
    heavy = np.isin(distinct, levels)
    repeats = counts[~heavy].sum() / max(int((~heavy).sum()), 1)
    step = grid_step(distinct) if repeats >= 2 else 0.0
    if step and (not levels or step >= _SMOOTHING * scale):
        return True, step, step, ()
    if not levels:
        return False, 0.0, 0.0, ()
    return False, _SMOOTHING * scale, step, levels


def _shared(distinct: np.ndarray, counts: np.ndarray) -> tuple[float, ...]:
    """Single values that many rows share."""
    heavy = (counts >= 5) & (counts > counts.sum() * max(0.01, 5.0 / len(distinct)))
    return tuple(map(float, distinct[heavy]))


def grid_step(distinct: np.ndarray) -> float:
    """The largest step of which all differences of sorted distinct values are multiples, or 0.

    Euclid's algorithm on all differences at once, up to the rounding of the values (that of float32
    when all of them are float32 numbers); a step lost in that rounding is none.
    """
    with np.errstate(over="ignore"):
        single = distinct.astype(np.float32).astype(np.float64)
    whole = bool((distinct == np.round(distinct)).all())
    epsilon = 2.0**-23 if (single == distinct).all() and not whole else 2.0**-52
    tolerance = 4.0 * epsilon * float(np.abs(distinct).max())
    offsets = distinct - distinct[0]
    step = float(np.diff(distinct).min())
    while step > 100.0 * tolerance:
        step = _refined(step, offsets, tolerance)
        rest = np.abs(offsets - np.round(offsets / step) * step)
        rest = rest[rest > tolerance]
        if not rest.size:
            return _decimal(step, tolerance)
        step = float(rest.min())
    return 0.0


def _refined(step: float, offsets: np.ndarray, tolerance: float) -> float:
    """A step known to within a tolerance, improved by ever larger multiples of it."""
    limit = 8.0
    while True:
        times = np.round(offsets / step)
        last = int(np.searchsorted(times, limit, side="right")) - 1
        if times[last] > 0 and abs(offsets[last] - times[last] * step) <= limit * tolerance:
            step = float(offsets[last] / times[last])
        if last == len(offsets) - 1:
            return step
        limit *= 8.0


def _decimal(step: float, tolerance: float) -> float:
    """The shortest decimal within the rounding of a step."""
    for digits in range(16):
        near = round(step, digits)
        if near > 0 and abs(near - step) <= tolerance:
            return near
    return step
