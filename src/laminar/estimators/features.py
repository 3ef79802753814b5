"""What a network is told of a row: every column twice, on its own scale and by its ranks."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from laminar.tables.infer import location_scale

_MOST_KNOTS = 500
_MOST_LEVELS = 32
_FAR = 4.0  # from here on values on their own scale are squashed
_FARTHEST = 3.0  # of ranks as normal deviates: 0.1% at either end share it


class Features(NamedTuple):
    """Columns of numbers as features of order one, without missing ones.

    A column x gives u / √(1 + (u/4)²) with u = (x − median) / scale, so that an outlier is far and
    not infinitely so, and Φ⁻¹ of its rank among the training rows, which no outlier moves. A column
    of two values gives the first alone; one that was missing somewhere gives an indicator too. A
    column of names gives an indicator for each of its most frequent ones.

    Attributes:
        numbers: Positions of the columns of numbers.
        location, scale: Of each of these; the scale of a constant column is one.
        knots: For each of these with ranks, its distinct values at even ranks, and None for others.
        gaps: Positions of all columns that were missing somewhere.
        levels: Column of names → the codes that have an indicator.
    """

    numbers: np.ndarray
    location: np.ndarray
    scale: np.ndarray
    knots: tuple[np.ndarray | None, ...]
    gaps: np.ndarray
    levels: dict[int, np.ndarray]

    @classmethod
    def learn(cls, x: np.ndarray, names: Collection[int] = ()) -> "Features":
        """Look at training rows (N, C), NaN where missing.

        Args:
            x: The rows.
            names: Positions of the columns whose numbers are codes of names.
        """
        numbers = np.array([j for j in range(x.shape[1]) if j not in names], dtype=int)
        location, scale = np.zeros(len(numbers)), np.ones(len(numbers))
        knots: list[np.ndarray | None] = []
        for i, j in enumerate(numbers):
            column = np.sort(x[~np.isnan(x[:, j]), j])
            many = len(np.unique(column))
            if many > 1:
                location[i], spread = location_scale(column)
                scale[i] = spread if spread > 0 else 1.0
            if many < 3:
                knots.append(None)
                continue
            ranks = np.linspace(0, len(column) - 1, min(_MOST_KNOTS, len(column)))
            knots.append(column[np.round(ranks).astype(int)])
        gaps = np.flatnonzero(np.isnan(x).any(axis=0))
        levels = {j: _frequent(x[:, j]) for j in sorted(names)}
        return cls(numbers, location, scale, tuple(knots), gaps, levels)

    def transform(self, x: np.ndarray) -> np.ndarray:
        """Features (N, F) of rows (N, C), float64."""
        own = x[:, self.numbers]
        u = np.clip((own - self.location) / self.scale, -1e6, 1e6)
        parts = [np.nan_to_num(u / np.sqrt(1 + (u / _FAR) ** 2), nan=0.0)]
        with_ranks = [(own[:, i], knots) for i, knots in enumerate(self.knots) if knots is not None]
        ranked = [_deviate(column, knots)[:, None] for column, knots in with_ranks]
        flags = [(x[:, [j]] == codes).astype(np.float64) for j, codes in self.levels.items()]
        missing = [np.isnan(x[:, self.gaps]).astype(np.float64)]
        return np.concatenate([*parts, *ranked, *flags, *missing], axis=1)


def _frequent(column: np.ndarray) -> np.ndarray:
    """The most frequent codes of a column of names."""
    codes, counts = np.unique(column[~np.isnan(column)], return_counts=True)
    return np.sort(codes[np.argsort(-counts, kind="stable")[:_MOST_LEVELS]])


def _deviate(column: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """The normal deviate of each value's rank among the knots, zero where the value is missing."""
    from scipy.special import ndtri

    # Between the ranks of the knots below and of those not above: ties get their middle.
    places = np.linspace(0.0, 1.0, len(knots))
    forward = np.interp(column, knots, places)
    backward = 1.0 - np.interp(-column, -knots[::-1], places)
    deviate = np.clip(ndtri(0.5 * (forward + backward)), -_FARTHEST, _FARTHEST)
    return np.where(np.isnan(column), 0.0, deviate)
