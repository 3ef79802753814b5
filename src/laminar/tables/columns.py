r"""One column of a table: the exact way between the user's numbers and what a flow is fitted to.

All of it is float64 on the host, because a float32 step at 1.7e9 (a date in seconds) is 128. A
value x with a density is taken to

    z = (t(x) − location) / scale,     ln p(x) = ln p(z) + ln |t′(x)| − ln scale

with t(x) = x, ln(x − low) for a positive column, or ln((x − low) / (high − x)) for a bounded one. A
value on a grid has a probability instead, that of its cell, and ln p gets no such term; nor has a
category. Where cells are very narrow, their probability is the density times their width. Where a
column has single values with a probability each on such a grid, the density still counts at these,
and near its lower end ln(x − low) is curved within a cell: the probabilities then sum to a little
less than one (0.98 of counts whose logarithm has a standard deviation of 3, 0.999 where it is 2).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from laminar.mixed import WITHHELD, ColumnLaw
from laminar.tables.cells import Cells

Kind = Literal[
    "real",
    "positive",
    "bounded",
    "integer",
    "ordinal",
    "boolean",
    "categorical",
    "datetime",
    "constant",
    "ignored",
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
"""What a column can be."""

FINE = 1e-3
"""A grid of steps below this part of the scale has cells so small that a density times the step
is their probability, up to about its square."""

_ON_GRID = 1e-6
_COUNTED = ("integer", "ordinal", "datetime")


@dataclass(frozen=True)
class Column:
    """One column, in the user's units.

    Attributes:
        name: Its name.
        kind: What it is; see `KINDS`. ``"constant"`` and ``"ignored"`` columns are not modelled.
        location: Zero of the standardised units; the value itself of a constant (NaN when the
            column is empty).
        scale: One standardised unit.
        resolution: Width of the uniform noise that a real column of ties is dequantised with where
            all columns are real; zero where there are no ties.
        step: Spacing of the grid that values lie on and samples are rounded to, or zero.
        origin: A point of that grid.
        levels: Values that many rows share: all values of a discrete column without a grid; single
            ones of a real column.
        discrete: Whether every value belongs to a grid or a list.
        cells: How its numbers stand for the user's cells.
        missing: Whether a cell may be missing, which then has a probability of its own.
        low: The least value there can be, or None.
        high: The greatest, or None.
        codes: The numbers of the categories, one for each state.
        rare: Numbers of rare categories, which share one more state.
        shares: The probability of each of these within it.
        unseen: The probability of a category that was not there, or of all values off the grid.
        cell: Whether values on the grid count with the probabilities of their cells.
        fine: Whether these are so narrow that a density times the step stands for them.
        heavy: Where values lie so far out that a mixed table's law needs tails of powers, the
            spread of their bulk in standardised units; else zero.
    """

    name: str
    kind: Kind
    location: float
    scale: float = 1.0
    resolution: float = 0.0
    step: float = 0.0
    origin: float = 0.0
    levels: tuple[float, ...] = ()
    discrete: bool = False
    cells: Cells = dataclasses.field(default_factory=Cells)
    missing: bool = False
    low: float | None = None
    high: float | None = None
    codes: tuple[float, ...] = ()
    rare: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    unseen: float = 0.0
    cell: bool = False
    fine: bool = False
    heavy: float = 0.0

    @property
    def modelled(self) -> bool:
        """Whether it is a dimension of the flow."""
        return self.kind not in ("constant", "ignored")

    @property
    def states_only(self) -> bool:
        """Whether its values are categories, without an order that the density uses."""
        return bool(self.codes)

    @property
    def on_grid(self) -> bool:
        """Whether its values have the probabilities of cells, and no density."""
        return self.modelled and self.cell and self.step > 0 and not self.states_only

    @property
    def plain(self) -> bool:
        """Whether a flow over real columns alone can hold it."""
        grid = self.on_grid and not self.fine
        spikes = bool(self.spikes) and not self.resolution
        return not (self.states_only or self.missing or grid or spikes)

    @property
    def spikes(self) -> tuple[float, ...]:
        """Single values of a column of numbers that have a probability each, in a mixed table."""
        return () if self.states_only or (self.kind == "real" and self.discrete) else self.levels

    @property
    def law(self) -> ColumnLaw:
        """What it is in a mixed table; see `laminar.mixed`."""
        if self.states_only:
            count = len(self.codes) + bool(self.rare) + self.missing
            return ColumnLaw(count, None, gap=self.missing)
        states = 1 + len(self.spikes) + self.missing
        if not self.on_grid or self.fine:
            return ColumnLaw(states, "density", gap=self.missing, heavy=self.heavy)
        low, high, origin = (
            None if v is None else (v - self.location) / self.scale
            for v in (self.low, self.high, self.origin)
        )
        width = self.step / self.scale
        ends = (low, high)
        return ColumnLaw(states, "cells", width, origin or 0.0, *ends, self.missing, self.heavy)

    # ---------------------------------------------------------------------------- numbers

    def standardise(self, x: np.ndarray) -> np.ndarray:
        """To standardised units, float64; NaN stays, and what has no logarithm is ±inf."""
        x = np.asarray(x, dtype=np.float64)
        return (self._transformed(x) - self.location) / self.scale

    def unstandardise(self, z: np.ndarray) -> np.ndarray:
        """The exact inverse of `standardise`, which moves nothing onto shared values or a grid."""
        return self._back(self.location + self.scale * np.asarray(z, dtype=np.float64))

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        """The logarithm of the slope of `standardise`, ln |dz/dx|."""
        x = np.asarray(x, dtype=np.float64)
        slope = np.full(x.shape, -math.log(self.scale))
        low, high = self.ends
        with np.errstate(divide="ignore", invalid="ignore"):
            if low is not None:
                slope = slope - np.log(x - low)
            if low is not None and high is not None:
                slope = slope - np.log(high - x) + math.log(high - low)
        return slope

    def place(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Standardised values, and what the units bring to their log-densities, each (N,).

        A value off a grid stands in the cell of the nearest point, whose neighbours up to the next
        share the probability of values off the grid. Outside the support the term is −inf and the
        value one inside; NaN stays.
        """
        x = np.asarray(x, dtype=np.float64)
        keep = self.supports(x)
        if not self.on_grid:
            term = self.log_slope(np.where(keep, x, np.nan))
        else:
            near = _onto_grid(x, self.origin, self.step)
            near = near if self.low is None and self.high is None else self._clipped(near)
            term = self.log_slope(near) + math.log(self.step) if self.fine else np.zeros(x.shape)
            if self.unseen > 0:
                off = np.abs(x - near) > _ON_GRID * np.maximum(self.step, np.abs(x))
                share = math.log(self.unseen) - math.log(self.step - 1)
                term = term + np.where(off, share, math.log1p(-self.unseen))
            x = np.where(keep, near, x)
        gone = np.isnan(x)
        value = np.where(keep & ~gone, self.standardise(np.where(keep, x, np.nan)), 0.0)
        return np.where(gone, np.nan, value), np.where(keep, np.where(gone, 0.0, term), -np.inf)

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """The ends that a logarithm or logit takes to infinity; None for the real line's own."""
        if self.kind in ("positive", "bounded"):
            return self.low or 0.0, self.high if self.kind == "bounded" else None
        if self.fine and self.low is not None:
            # Half a step beyond, so that the cells of both ends are whole.
            high = None if self.high is None else self.high + self.step / 2
            return self.low - self.step / 2, high
        return None, None

    def _clipped(self, x: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(x), x, np.clip(x, self.low, self.high))

    def supports(self, x: np.ndarray) -> np.ndarray:
        """Whether each value, missing ones included, can occur at all."""
        x = np.asarray(x, dtype=np.float64)
        gone = np.isnan(x)
        if self.kind == "ignored":
            return np.ones(x.shape, dtype=bool)
        if self.kind == "constant":
            return gone if math.isnan(self.location) else (x == self.location) | gone
        keep = np.ones(x.shape, dtype=bool)
        with np.errstate(invalid="ignore"):
            if self.kind in ("positive", "bounded"):
                inside = x > (self.low or 0.0)
                if self.high is not None:
                    inside &= x < self.high
                keep = inside | np.isin(x, self.spikes)
            elif self.kind in _COUNTED and self.on_grid:
                # A date between two of its units is in the cell of the nearest.
                units = x - self.origin
                whole = np.abs(units - np.round(units)) <= _ON_GRID * np.maximum(1, np.abs(units))
                keep = whole | (self.kind == "datetime")
                keep &= self._within_ends(x)
            elif self.on_grid:
                keep = self._within_ends(x)
        return keep | gone

    def _within_ends(self, x: np.ndarray) -> np.ndarray:
        """Whether values lie within the cells of both ends, where there are such."""
        low = -math.inf if self.low is None else self.low - self.step / 2
        high = math.inf if self.high is None else self.high + self.step / 2
        return (x >= low) & (x <= high)

    def restore(self, z: np.ndarray) -> np.ndarray:
        """From standardised units to the user's, onto the values that a column of ties can take."""
        x = self._back(self.location + self.scale * np.asarray(z, dtype=np.float64))
        if self.step > 0:
            x = _onto_grid(x, self.origin, self.step)
        if self.on_grid and (self.low, self.high) != (None, None):
            x = self._clipped(x)
        if self.step > 0 and self.kind in ("positive", "bounded"):
            # Rounding must not reach the ends, where there is no density.
            x = np.maximum(x, (self.low or 0.0) + self.step)
            x = x if self.high is None else np.minimum(x, self.high - self.step)
        if self.levels and self.kind == "real":
            levels = np.asarray(self.levels)
            right = np.clip(np.searchsorted(levels, x), 1, max(len(levels) - 1, 1))
            left = levels[right - 1]
            right = levels[np.minimum(right, len(levels) - 1)]
            nearest = np.where(np.abs(x - left) <= np.abs(right - x), left, right)
            near = np.abs(x - nearest) <= self.resolution / 2
            x = np.where(near | self.discrete, nearest, x)
        return x

    def _transformed(self, x: np.ndarray) -> np.ndarray:
        low, high = self.ends
        if low is None:
            return x
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.log(np.maximum(x - low, 0.0))
            return t if high is None else t - np.log(np.maximum(high - x, 0.0))

    def _back(self, t: np.ndarray) -> np.ndarray:
        low, high = self.ends
        if low is None:
            return t
        if high is None:
            with np.errstate(over="ignore"):
                return low + np.clip(np.exp(t), 5e-324, 1.7e308)
        # Each side is measured from its own end, where it has all its digits.
        width = high - low
        rest = np.exp(-np.abs(t)) / (1.0 + np.exp(-np.abs(t)))
        inside = np.where(t > 0, high - width * rest, low + width * rest)
        return np.clip(inside, np.nextafter(low, np.inf), np.nextafter(high, -np.inf))

    # ---------------------------------------------------------------------- events of mixed rows

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, states and the log-density's terms of the units, each (N,).

        A missing cell is a state where the column has gaps, and withheld where it has none. What
        lies outside the support has the term −inf.
        """
        x = np.asarray(x, dtype=np.float64)
        gone = np.isnan(x)
        if self.states_only:
            state, term = self._category(x)
            value = np.zeros(x.shape)
        else:
            state = np.zeros(x.shape)
            value, term = self.place(x)
            for number, spike in enumerate(self.spikes, start=1):
                at = x == spike
                state, term = np.where(at, number, state), np.where(at, 0.0, term)
                value = np.where(at, 0.0, value)
        keep = self.supports(x)
        # All but a new category, the missing cell among them, share what its chance leaves.
        blank = math.log1p(-self.unseen) if self.states_only and self.missing else 0.0
        term = np.where(gone, blank, np.where(keep, term, -np.inf))
        value = np.where(gone | ~keep, 0.0, value)
        last = self.law.states - 1
        state = np.where(gone, last if self.missing else WITHHELD, state)
        return value, state, term

    def _category(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The states of categories, and the terms that unseen and rare ones bring."""
        state = np.full(x.shape, float(WITHHELD))
        term = np.full(x.shape, math.log1p(-self.unseen))
        for number, code in enumerate(self.codes):
            state[x == code] = number
        rare = np.isin(x, self.rare)
        if self.rare:
            order = np.argsort(self.rare)
            place = np.searchsorted(np.asarray(self.rare)[order], x[rare])
            term[rare] += np.log(np.asarray(self.shares)[order][place])
            state[rare] = len(self.codes)
        # A category that was not there says nothing to the columns after it.
        with np.errstate(divide="ignore"):
            term[state == WITHHELD] = np.log(self.unseen)
        return state, term

    def decode(self, value: np.ndarray, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The numbers of values and states, NaN where missing; rare categories are drawn."""
        last = self.law.states - 1
        if self.states_only:
            codes = np.asarray([*self.codes, *([np.nan] if self.rare else [])], dtype=np.float64)
            x = codes[np.clip(state, 0, len(codes) - 1).astype(int)]
            if self.rare:
                drawn = rng.choice(self.rare, x.shape, p=np.asarray(self.shares))
                x = np.where(state == len(self.codes), drawn, x)
        else:
            x = self.restore(value)
            for number, spike in enumerate(self.spikes, start=1):
                x = np.where(state == number, spike, x)
        return np.where(state == last, np.nan, x) if self.missing else x

    # ------------------------------------------------------------------------------- conditions

    @property
    def given_size(self) -> int:
        """How many numbers the condition has for it."""
        if not self.modelled:
            return 0
        own = len(self.codes) + bool(self.rare) if self.states_only else 1
        return own + self.missing

    def as_condition(self, x: np.ndarray) -> np.ndarray:
        """What a network sees of a given column, (N, given_size); unseen categories are zero."""
        x = np.asarray(x, dtype=np.float64)
        gone = np.isnan(x)
        if self.states_only:
            state, _ = self._category(x)
            flags = np.arange(len(self.codes) + bool(self.rare))
            parts = [(state[:, None] == flags).astype(np.float64)]
        else:
            parts = [np.where(gone, 0.0, self.standardise(x))[:, None]]
        if self.missing:
            parts.append(gone.astype(np.float64)[:, None])
        return np.concatenate(parts, axis=1)


def _onto_grid(x: np.ndarray, origin: float, step: float) -> np.ndarray:
    """The nearest points origin + k · step, as short decimals where the grid has them."""
    points = origin + np.round((x - origin) / step) * step
    for digits in range(13):
        if round(step, digits) == step and round(origin, digits) == origin:
            return np.round(points, digits)
    return points
