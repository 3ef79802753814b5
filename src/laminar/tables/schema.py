r"""What the columns of a table are, and the exact way from their units to standardised ones.

All of it is float64 on the host, because a float32 step at 1.7e9 (a date in seconds) is 128. Each
modelled column is standardised by

    z = (x − location) / scale,        ln p(x) = ln p(z) − Σ ln scale

with a location and a scale that a few outliers cannot move far. A column of ties is no continuous
variable: a density could rise without bound on its values. It is *dequantised*, that is, the flow
is fitted to x + resolution · u with u uniform on (−½, ½), and what is scored is the density of that
variable, at x itself. A constant column has no density at all: the row's density is that of the
other columns, and −inf where the constant differs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from laminar._errors import InputError
from laminar.tables.table import Table, listing

Kind = Literal["continuous", "discrete", "constant"]

FEW = 50
"""Up to so many distinct values, each taken twice or more on average, make a column discrete."""

_SMOOTHING = 0.01  # the least noise on values that many rows share, in units of the column's scale
_SMOOTHED = "smoothed by uniform noise"
_LARGEST = 1e150  # squares stay within float64
_SPREAD = 3.0  # the most by which the standard deviation may exceed the robust scale


@dataclass(frozen=True)
class Column:
    """One column, in the user's units.

    Attributes:
        name: Its name.
        kind: ``"continuous"``; ``"discrete"`` (every value belongs to a grid or a list); or
            ``"constant"``.
        location: Zero of the standardised units; the value itself of a constant.
        scale: One standardised unit.
        resolution: Width of the uniform noise it is dequantised with; zero where there are no ties.
        step: Spacing of the grid that samples are rounded to, or zero.
        origin: A point of that grid.
        levels: Values that samples are moved to: to the nearest always when discrete, and only from
            within half a resolution when continuous.
    """

    name: str
    kind: Kind
    location: float
    scale: float = 1.0
    resolution: float = 0.0
    step: float = 0.0
    origin: float = 0.0
    levels: tuple[float, ...] = ()

    def restore(self, z: np.ndarray) -> np.ndarray:
        """From standardised units to the user's, onto the values that a column of ties can take."""
        x = self.location + self.scale * np.asarray(z, dtype=np.float64)
        if self.step > 0:
            x = _onto_grid(x, self.origin, self.step)
        if self.levels:
            levels = np.asarray(self.levels)
            right = np.clip(np.searchsorted(levels, x), 1, max(len(levels) - 1, 1))
            left = levels[right - 1]
            right = levels[np.minimum(right, len(levels) - 1)]
            nearest = np.where(np.abs(x - left) <= np.abs(right - x), left, right)
            near = np.abs(x - nearest) <= self.resolution / 2
            x = np.where(near | (self.kind == "discrete"), nearest, x)
        return x


@dataclass(frozen=True)
class Schema:
    """The columns of a table whose rows have a density, and those it is conditioned on.

    Attributes:
        columns: The columns that rows consist of, constants among them, in the user's order.
        given: The columns of the condition; a constant one carries no information and is ignored.
        order: The names of both in the order of the table, in which samples are given and rows
            without names are read.
    """

    columns: tuple[Column, ...]
    given: tuple[Column, ...]
    order: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns that rows consist of."""
        return tuple(column.name for column in self.columns)

    @property
    def given_names(self) -> tuple[str, ...]:
        """Names of the columns of the condition."""
        return tuple(column.name for column in self.given)

    @property
    def modelled(self) -> tuple[Column, ...]:
        """The columns that are not constant: the dimensions of the flow."""
        return tuple(column for column in self.columns if column.kind != "constant")

    @property
    def conditions(self) -> tuple[Column, ...]:
        """The given columns that are not constant: the dimensions of the flow's condition."""
        return tuple(column for column in self.given if column.kind != "constant")

    @property
    def log_det(self) -> float:
        """The log-det ln |det ∂z/∂x| = −Σ ln scale, the same for every row."""
        return -math.fsum(math.log(column.scale) for column in self.modelled)

    @property
    def noise(self) -> np.ndarray:
        """Widths of the dequantising noise in standardised units; shape (d,)."""
        return np.array([column.resolution / column.scale for column in self.modelled])

    def standardise(self, values: np.ndarray) -> np.ndarray:
        """Rows of all columns, (N, D), as rows of standardised modelled ones, (N, d)."""
        return _standardise(values, self.columns)

    def condition(self, values: np.ndarray) -> np.ndarray | None:
        """Rows of given columns, (N, C), as standardised conditions (N, c), or None when c = 0."""
        return _standardise(values, self.given) if self.conditions else None

    def restore(self, z: np.ndarray) -> np.ndarray:
        """Standardised rows, (N, d), as rows of all columns in the user's units, (N, D)."""
        parts, position = [], 0
        for column in self.columns:
            if column.kind == "constant":
                parts.append(np.full(len(z), column.location))
            else:
                parts.append(column.restore(z[:, position]))
                position += 1
        return np.stack(parts, axis=1)

    def on_support(self, values: np.ndarray) -> np.ndarray:
        """Whether each row of all columns, (N, D), has the constants' values; shape (N,)."""
        keep = np.ones(len(values), dtype=bool)
        for column, cells in zip(self.columns, values.T, strict=True):
            if column.kind == "constant":
                keep &= (cells == column.location) | np.isnan(cells)
        return keep

    def notes(self) -> list[str]:
        """What a user should know about the columns, one sentence each."""
        constants = [c.name for c in self.columns if c.kind == "constant"]
        notes = []
        if constants:
            notes.append(
                f"{_columns(constants)} constant and left out of the density; samples repeat the "
                f"value, and a row with another value scores -inf."
            )
        ignored = [c.name for c in self.given if c.kind == "constant"]
        if ignored:
            notes.append(f"{_columns(ignored)} constant and ignored as a condition.")
        groups: dict[tuple, list[Column]] = {}
        for column in self.modelled:
            if column.kind == "discrete":
                groups.setdefault((column.resolution, bool(column.levels)), []).append(column)
        for (resolution, irregular), members in groups.items():
            many = len(members) > 1
            grid = "values off any regular grid" if irregular else "few distinct values or ties"
            notes.append(
                f"{_columns([c.name for c in members], 'takes', 'take')} {grid}; dequantised at "
                f"{'their' if many else 'its'} resolution {resolution:.6g}: densities are those of "
                f"the value plus uniform noise of that width."
            )
        shared = [c for c in self.modelled if c.kind == "continuous" and c.levels]
        if len(shared) == 1:
            values = listing([f"{value:.6g}" for value in shared[0].levels], 4)
            notes.append(
                f"Column {shared[0].name!r} has {values} in many rows; {_SMOOTHED} of width "
                f"{shared[0].resolution:.3g}, because the density on a shared value is unbounded."
            )
        elif shared:
            notes.append(
                f"{_columns([c.name for c in shared], 'has', 'have')} single values that many rows "
                f"share; {_SMOOTHED} of 1% of a standard deviation, because the density on a "
                f"shared value is unbounded."
            )
        return notes


def learn_schema(table: Table, given: Sequence[str] = (), rows: np.ndarray | None = None) -> Schema:
    """Find out what the columns are.

    Args:
        table: Finite rows.
        given: The columns of the condition; all others are modelled.
        rows: Indices of the rows that location and scale are taken from (the training split); what
            kind of column it is comes from all rows.

    Raises:
        InputError: When no modelled column remains.
    """
    names = [name for name in table.names if name not in given]
    if not names:
        raise InputError(
            f"{table.source} has no column left to model; name fewer columns with --given."
        )
    train = table if rows is None else table.take(rows)

    def column(name: str, condition: bool) -> Column:
        return learn_column(name, table.column(name), train.column(name), condition=condition)

    schema = Schema(
        tuple(column(name, False) for name in names),
        tuple(column(name, True) for name in given),
        table.names,
    )
    if not schema.modelled:
        raise InputError(
            f"{table.source}: {_columns(names)} constant, so that no density remains to fit; "
            f"choose a column that varies."
        )
    return schema


def learn_column(
    name: str, values: np.ndarray, train: np.ndarray | None = None, condition: bool = False
) -> Column:
    """What one column is, from all its values, scaled by the training ones; see `Column`."""
    distinct, counts = np.unique(values, return_counts=True)
    if max(abs(distinct[0]), abs(distinct[-1])) > _LARGEST:
        raise InputError(f"Column {name!r} holds values beyond 1e150; divide it by a constant.")
    if len(distinct) == 1:
        return Column(name, "constant", float(distinct[0]))
    location, scale = location_scale(values if train is None else train)
    if not scale > 0:
        location, scale = location_scale(values)
    if condition:
        return Column(name, "continuous", location, scale)
    kind, resolution, step, levels = _ties(distinct, counts, scale)
    if resolution > 0:
        # The noise is part of what is standardised, and may be wider than the bulk of the values.
        scale = math.hypot(scale, resolution / math.sqrt(12.0))
    origin = float(distinct[0]) if step else 0.0
    return Column(name, kind, location, scale, resolution, step, origin, levels)


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


def dependent(z: np.ndarray) -> list[int]:
    """Positions of standardised columns, (N, d), that are linear functions of other columns.

    Found by a pivoted QR decomposition; columns early in the pivot order are kept.
    """
    from scipy.linalg import qr

    sample = z[:10_000]
    centred = sample - sample.mean(axis=0)
    norms = np.sqrt((centred**2).sum(axis=0))
    centred = centred / np.where(norms > 0, norms, 1.0)
    if len(centred) <= centred.shape[1]:
        return []
    triangle, order = qr(centred, mode="r", pivoting=True)  # type: ignore[misc]
    small = np.abs(np.diag(np.asarray(triangle))) < 1e-7
    return sorted(int(position) for position in np.asarray(order)[small])


# ---------------------------------------------------------------------------------------- ties


def _ties(
    distinct: np.ndarray, counts: np.ndarray, scale: float
) -> tuple[Kind, float, float, tuple[float, ...]]:
    """Kind, resolution, step and levels of a column that is not constant.

    Few distinct values make it discrete; so do many, if they lie on a grid and are taken twice or
    more on average. Otherwise single values that many rows share are levels of a continuous column.
    """
    total, many = int(counts.sum()), len(distinct)
    if many <= FEW:
        if total < 2 * many:
            return "continuous", 0.0, 0.0, ()
        step = grid_step(distinct)
        if step >= _SMOOTHING * scale:
            return "discrete", step, step, ()
        gap = float(np.diff(distinct).min())
        return "discrete", max(gap, _SMOOTHING * scale), 0.0, tuple(map(float, distinct))
    heavy = (counts >= 5) & (counts > total * max(0.01, 5.0 / many))
    levels = tuple(map(float, distinct[heavy]))
    repeats = counts[~heavy].sum() / max(int((~heavy).sum()), 1)
    step = grid_step(distinct) if repeats >= 2 else 0.0
    if step and (not levels or step >= _SMOOTHING * scale):
        return "discrete", step, step, ()
    if not levels:
        return "continuous", 0.0, 0.0, ()
    return "continuous", _SMOOTHING * scale, step, levels


def grid_step(distinct: np.ndarray) -> float:
    """The largest step of which all differences of sorted distinct values are multiples, or 0.

    Euclid's algorithm on all differences at once, up to the rounding of the values (that of float32
    when all of them are float32 numbers); a step lost in that rounding is none.
    """
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


def _onto_grid(x: np.ndarray, origin: float, step: float) -> np.ndarray:
    """The nearest points origin + k · step, as short decimals where the grid has them."""
    points = origin + np.round((x - origin) / step) * step
    for digits in range(13):
        if round(step, digits) == step and round(origin, digits) == origin:
            return np.round(points, digits)
    return points


def _standardise(values: np.ndarray, columns: Sequence[Column]) -> np.ndarray:
    kept = [(i, column) for i, column in enumerate(columns) if column.kind != "constant"]
    location = np.array([column.location for _, column in kept])
    scale = np.array([column.scale for _, column in kept])
    return (values[:, [i for i, _ in kept]] - location) / scale


def _columns(names: Sequence[str], one: str = "is", many: str = "are") -> str:
    quoted = [repr(name) for name in names]
    if len(quoted) == 1:
        return f"Column {quoted[0]} {one}"
    return f"{len(quoted)} columns ({listing(quoted, 6)}) {many}"
