"""Continuous tables for density benchmarks: loaded, dequantised once, split, z-scored on train.

A continuous likelihood on tied values is unbounded: it measures only how narrow a spike a method
dares to put on them. So columns with ties get uniform noise of their own resolution, from a fixed
seed and before any method sees them, and all methods compete on the same continuous rows.
"""

from typing import NamedTuple

import numpy as np
from _common import Arrays

ADBENCH = {
    "ionosphere": "18_Ionosphere",
    "wdbc": "43_WDBC",
    "letter": "20_letter",
    "satellite": "30_satellite",
    "pendigits": "28_pendigits",
    "magic.gamma": "22_magic.gamma",
    "shuttle": "32_shuttle",
    "ALOI": "1_ALOI",
}
UCI = ("yacht", "pol", "protein")
TABLES = ("yacht", *list(ADBENCH)[:6], "pol", "protein", "shuttle")
"""Names of the tables, cheap ones first."""


class Split(NamedTuple):
    """Rows for training and for the final score, in units of the training rows' deviation."""

    train: np.ndarray
    test: np.ndarray


def noise_width(column: np.ndarray) -> float:
    """Width of the uniform noise for one column: 0 when it has no ties worth speaking of.

    A grid (at most 512 distinct values, fewer than half the rows) gets its median gap; a column
    with a heavier atom (over 1% and at least 5 rows on one value) gets 1% of its range.
    """
    values, counts = np.unique(column, return_counts=True)
    if len(values) <= min(512, len(column) // 2):
        return float(np.median(np.diff(values)))
    if counts.max() > max(0.01 * len(column), 4):
        return 0.01 * float(values[-1] - values[0])
    return 0.0


def load(name: str, optional: bool = False) -> np.ndarray:
    """All usable rows of a table: normal rows only for ADBench, all columns for UCI; float64."""
    if name in ADBENCH:
        arrays = Arrays("adbench.npz", optional)
        rows = arrays[f"{ADBENCH[name]}__X"].astype(np.float64)
        rows = rows[arrays[f"{ADBENCH[name]}__y"] == 0]
    elif name in UCI:
        rows = Arrays("uci_regression.npz", optional)[f"{name}__xy"].astype(np.float64)
    else:
        raise SystemExit(f"Unknown table {name!r}; choose from {', '.join(TABLES)}.")
    rows = rows[:, rows.min(0) < rows.max(0)]
    rng = np.random.default_rng(20150521)
    for j in range(rows.shape[1]):
        width = noise_width(rows[:, j])
        rows[:, j] += width * (rng.random(len(rows)) - 0.5)
    return rows


def split(rows: np.ndarray, size: int | None, seed: int, *, most: int, most_test: int) -> Split:
    """One random split: a fifth for the test, `size` (None: all, at most `most`) for training."""
    order = np.random.default_rng([7, seed]).permutation(len(rows))
    held = min(len(rows) // 5, most_test)
    train = rows[order[len(rows) // 5 :]][: most if size is None else size]
    test = rows[order[:held]]
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return Split(
        ((train - mean) / deviation).astype(np.float32),
        ((test - mean) / deviation).astype(np.float32),
    )
