"""A column as it is shown: its values in the data and in samples, its axis, and words for them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from laminar.report.axes import (
    Axis,
    date_axis,
    level_axis,
    log_axis,
    minus,
    number_axis,
    short_number,
)
from laminar.scores.twosample import TwoSample, category_test, ks_test
from laminar.tables.cells import UNSEEN, Cells
from laminar.tables.columns import Column

_TRIM = 0.005  # share of the values left outside the axis on each side
_SKEWED = 30.0  # the upper end over the median from where on ratios are shown
_FEW = 24  # distinct numbers that are shown one by one


@dataclass(frozen=True)
class View:
    """A column of the data and of the samples.

    Attributes:
        name: Its name.
        kind: What the model takes it for, as `laminar.tables.columns` says.
        cells: How numbers stand for the user's cells.
        data: Its values in the rows that are shown, (N,), NaN where missing.
        drawn: Its values in the samples, (M,).
        codes: The values of a category, one for each bar; empty where it has none.
        axis: On which values stand, those of a category as the position among `codes`.
        step: Of the grid that its values lie on, or zero.
    """

    name: str
    kind: str
    cells: Cells
    data: np.ndarray
    drawn: np.ndarray
    codes: np.ndarray
    axis: Axis
    step: float = 0.0

    @property
    def categorical(self) -> bool:
        """Whether its values are names without distances."""
        return len(self.codes) > 0

    @property
    def levels(self) -> np.ndarray:
        """The distinct values of a number that has few, in order; else none."""
        if self.categorical or self.kind == "datetime":
            return np.zeros(0)
        found = np.unique(self.data[np.isfinite(self.data)])
        tied = len(found) <= min(_FEW, len(self.data) // 4)
        return found if tied and not self.axis.log else np.zeros(0)

    def bare_axis(self) -> Axis:
        """The axis without its name, for pictures that have it as their title."""
        return dataclasses.replace(self.axis, label="")

    def count_axis(self) -> Axis:
        """The same for bars at `levels`, all of which it holds."""
        low, high = float(self.levels[0]), float(self.levels[-1])
        margin = 0.6 * (float(np.diff(self.levels).min()) if len(self.levels) > 1 else 1.0)
        whole = bool((self.levels == np.round(self.levels)).all())
        return number_axis(low - margin, high + margin, whole=whole)

    def positions(self, values: np.ndarray) -> np.ndarray:
        """Values as numbers on the axis; NaN for what has no place there."""
        if not self.categorical:
            return values
        place = np.clip(np.searchsorted(self.codes, values), 0, len(self.codes) - 1)
        return np.where(self.codes[place] == values, place.astype(np.float64), np.nan)

    def spread(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Positions for a cloud: names are spread about their place, so that none hides another."""
        at = self.positions(values)
        return at + rng.uniform(-0.3, 0.3, at.shape) if self.categorical else at

    def text(self, value: Any) -> str:
        """One value as the user writes it."""
        return cell_text(self.cells, float(value))

    def test(self) -> TwoSample:
        """How far samples are from the data: Kolmogorov–Smirnov, or χ² for names."""
        return (category_test if self.categorical else ks_test)(self.data, self.drawn)

    def difference(self) -> float:
        """The largest difference in probability of any interval from below, or set of names.

        A missing cell is a name, and beside numbers an interval of its own.
        """
        gaps = [float(np.isnan(values).mean()) for values in (self.data, self.drawn)]
        apart = abs(gaps[0] - gaps[1])
        if not self.categorical:
            return float(np.fmax(self.test().statistic, apart))
        a, b = (
            self.frequencies(values) * (1 - gap)
            for values, gap in zip((self.data, self.drawn), gaps, strict=True)
        )
        return 0.5 * (float(np.abs(a - b).sum()) + apart)

    def frequencies(self, values: np.ndarray) -> np.ndarray:
        """The shares of `codes` among the cells that are not missing."""
        there = values[~np.isnan(values)]
        return np.array([(there == code).mean() if len(there) else 0.0 for code in self.codes])

    def middle(self, values: np.ndarray) -> str:
        """The median and the middle 90%, or the most common names, in words."""
        there = values[np.isfinite(values)]
        if not len(there):
            return "nothing but missing cells"
        if self.categorical:
            shares = self.frequencies(there)
            best = np.argsort(-shares, kind="stable")[:3]
            parts = [f"{self.text(self.codes[k])} {100 * shares[k]:.0f}%" for k in best]
            return ", ".join(part for k, part in zip(best, parts, strict=True) if shares[k] > 0)
        low, median, high = np.quantile(there, [0.05, 0.5, 0.95], method="inverted_cdf")
        return f"median {self.text(median)}, 90% between {self.text(low)} and {self.text(high)}"

    def gaps(self) -> str:
        """What there is to say of missing cells, or nothing."""
        a, b = (float(np.isnan(values).mean()) for values in (self.data, self.drawn))
        return f"Missing: {percent(a)} of the rows, {percent(b)} of the samples." if a + b else ""


def look(column: Column, data: np.ndarray, drawn: np.ndarray) -> View:
    """The view of a column, with an axis that holds nearly all of it."""
    name, cells = column.name, column.cells
    axis = number_axis(0.0, 1.0, name)
    view = View(name, column.kind, cells, data, drawn, np.zeros(0), axis, column.step)
    both = np.concatenate([data, drawn])
    both = both[np.isfinite(both)]
    if cells.kind in ("text", "boolean"):
        codes = np.unique(both)
        texts = [cell_text(cells, code) for code in codes]
        return dataclasses.replace(view, codes=codes, axis=level_axis(texts, name))
    low, high = limits(both, data[np.isfinite(data)])
    if cells.kind == "datetime":
        return dataclasses.replace(view, axis=date_axis(low, high, cells.unit, cells.origin, name))
    there = data[np.isfinite(data)]
    least = float(both.min()) if len(both) else 0.0
    if least > 0 and np.quantile(there, 1 - _TRIM) > _SKEWED * np.median(there):
        shown = both[both <= np.quantile(both, 1 - _TRIM / 5)]
        bottom = float(np.quantile(shown, _TRIM / 5))
        return dataclasses.replace(
            view, axis=log_axis(bottom / 1.1, float(shown.max()) * 1.1, name)
        )
    whole = cells.kind == "integer"
    return dataclasses.replace(view, axis=number_axis(low, high, name, whole=whole))


def limits(values: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """An interval that holds nearly all finite values and all of the middle of the reference."""
    values, reference = values[np.isfinite(values)], reference[np.isfinite(reference)]
    if not len(values) or not len(reference):
        return -1.0, 1.0
    low, high = np.quantile(reference, [_TRIM, 1 - _TRIM])
    outer = np.quantile(values, [_TRIM, 1 - _TRIM])
    low, high = min(low, outer[0]), max(high, outer[1])
    margin = 0.06 * (high - low) or max(abs(low), 1.0) * 0.05
    return float(low - margin), float(high + margin)


def cell_text(cells: Cells, value: float) -> str:
    """One cell as text: a number to four digits, a date, a name, or a dash where it is missing."""
    if np.isnan(value):
        return "missing"
    if cells.kind == "text" and value == UNSEEN:
        return "a name not seen before"
    if cells.kind in ("text", "boolean"):
        return str(cells.decode(np.array([value]))[0])
    if cells.kind == "datetime":
        text = str(cells.decode(np.array([value]))[0]).replace("T", " ")
        return f"{text} UTC" if cells.zone else text
    if value == round(value) and abs(value) < 1e7:
        return minus(f"{value:,.0f}")
    return short_number(float(value))


def percent(share: float) -> str:
    """A share as a percentage with sensible digits."""
    if 0 < share < 0.001:
        return "under 0.1%"
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"
