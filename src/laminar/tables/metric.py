"""Rows of any table as points whose Euclidean distances mean something."""

from collections.abc import Sequence

import equinox as eqx
import numpy as np

from laminar.tables.cells import Cells
from laminar.tables.table import Table

MOST_LEVELS = 64
"""Categories of a column that have an indicator each; the rarer ones share one."""

_FARTHEST = 1e6


class Metric(eqx.Module):
    """A map from rows to points: every column weighs the same, whatever its units and kind.

    A number is divided by its standard deviation. A category without an order becomes one
    indicator for each level, scaled so that two rows drawn at random are as far apart in it, in
    the mean of squares, as in a column of numbers. A column with gaps adds an indicator of them,
    and the gap itself stands at the column's mean.

    Args:
        names: The columns.
        location: Means, (D,).
        scale: Standard deviations, or the units of indicators; (D,).
        gap_scale: Units of the indicators of gaps, (D,); zero where there was no gap.
        levels: For each column the numbers of its most frequent categories, or none for numbers.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    location: np.ndarray
    scale: np.ndarray
    gap_scale: np.ndarray
    levels: tuple[np.ndarray, ...]

    @property
    def width(self) -> int:
        """F, the length of a point."""
        sizes = [len(found) + 1 if len(found) else 1 for found in self.levels]
        return sum(sizes) + int((self.gap_scale > 0).sum())

    def __call__(self, rows: Table) -> np.ndarray:
        """Points (N, F), float64 and finite; what is beyond a million deviations is put there."""
        parts = []
        for d, x in enumerate(rows.select(self.names).values.T):
            gone = np.isnan(x)
            if len(self.levels[d]):
                # A category that was not there has an indicator of its own.
                known = np.isin(x, self.levels[d])
                flags = np.column_stack([x[:, None] == self.levels[d], ~known & ~gone])
                parts.append(flags / self.scale[d])
            else:
                with np.errstate(over="ignore", invalid="ignore"):
                    z = (x - self.location[d]) / self.scale[d]
                parts.append(np.clip(np.where(gone, 0.0, z), -_FARTHEST, _FARTHEST)[:, None])
            if self.gap_scale[d] > 0:
                parts.append((gone / self.gap_scale[d])[:, None])
        return np.concatenate(parts, axis=1)


def learn_metric(rows: Table, names: Sequence[str] | None = None) -> Metric:
    """The metric of a table's columns, from its rows.

    Args:
        rows: The rows, NaN where a cell is missing.
        names: The columns that count, all by default; those that do not vary count nothing until
            they do.
    """
    names = tuple(rows.names if names is None else names)
    table = rows.select(names)
    location, scale, gap_scale, levels = [], [], [], []
    for cells, x in zip(table.cells, table.values.T, strict=True):
        present = x[np.isfinite(x)]
        missing = float(np.isnan(x).mean())
        gap_scale.append(np.sqrt(missing * (1 - missing)) if 0 < missing < 1 else 0.0)
        if _unordered(cells):
            found, counts = np.unique(present, return_counts=True)
            shares = counts / max(counts.sum(), 1)
            # Two rows differ with this chance, and then two indicators do.
            differ = 1.0 - float((shares**2).sum())
            # Rare categories are one, so that a point stays short.
            levels.append(np.sort(found[np.argsort(-counts, kind="stable")[:MOST_LEVELS]]))
            location.append(0.0)
            scale.append(np.sqrt(differ) if differ > 0 else 1.0)
        else:
            levels.append(np.zeros(0))
            location.append(float(present.mean()) if len(present) else 0.0)
            spread = _deviation(present)
            scale.append(spread if spread > 0 else 1.0)
    gaps = np.asarray(gap_scale)
    return Metric(names, np.asarray(location), np.asarray(scale), gaps, tuple(levels))


def _unordered(cells: Cells) -> bool:
    return cells.kind == "text" and not cells.ordered


def _deviation(x: np.ndarray) -> float:
    """The standard deviation, also of values whose squares leave float64."""
    reach = float(np.abs(x - x[0]).max()) if len(x) else 0.0
    return reach * float(np.std((x - x[0]) / reach)) if 0 < reach < np.inf else 0.0
