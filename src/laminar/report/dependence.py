"""How strongly two columns depend on each other, in whatever way: by mutual information."""

import numpy as np

_BINS = 8
_MOST_ROWS = 5_000
_MOST_COLUMNS = 48


def dependent_pairs(
    columns: np.ndarray, count: int, rng: np.random.Generator
) -> list[tuple[int, int, float]]:
    """The pairs of columns that depend on each other most.

    Each column is cut into up to 8 intervals that hold as many rows each (a missing cell is one
    more), and the mutual information of a pair in nats is estimated from the table of counts, with
    Miller and Madow's correction for its bias. Of more than 48 columns those are looked at whose
    ranks correlate most.

    Args:
        columns: Cells (N, D) as numbers, NaN where missing.
        count: How many pairs.
        rng: Draws the rows that are looked at.

    Returns:
        Up to `count` triples of two positions and their mutual information, the largest first; no
        column stands in more than half of them, where others are left.
    """
    if len(columns) > _MOST_ROWS:
        columns = columns[rng.choice(len(columns), _MOST_ROWS, replace=False)]
    shown = _foremost(columns)
    codes = [_codes(columns[:, d]) for d in shown]
    found = [
        (shown[i], shown[j], mutual_information(codes[i], codes[j]))
        for i in range(len(shown))
        for j in range(i + 1, len(shown))
    ]
    found.sort(key=lambda entry: (-entry[2], entry[:2]))
    picked: list[tuple[int, int, float]] = []
    most = max(1, count // 2)
    for entry in found:
        used = [p for p in picked for d in entry[:2] if d in p[:2]]
        if len(used) < most:
            picked.append(entry)
        if len(picked) == count:
            return picked
    rest = [entry for entry in found if entry not in picked]
    return sorted([*picked, *rest[: count - len(picked)]], key=lambda entry: -entry[2])


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """I(A; B) = Σ p(a, b) ln p(a, b) / p(a) p(b) of two columns of codes 0, 1, …, in nats."""
    width = int(b.max()) + 1
    table = np.bincount(a * width + b, minlength=(int(a.max()) + 1) * width)
    table = table.reshape(-1, width).astype(np.float64)
    total = table.sum()
    rows, columns = table.sum(1), table.sum(0)
    expected = np.outer(rows, columns) / total
    seen = table > 0
    raw = float((table[seen] * np.log(table[seen] / expected[seen])).sum() / total)
    bias = (int((rows > 0).sum()) - 1) * (int((columns > 0).sum()) - 1) / (2 * total)
    return max(raw - bias, 0.0)


def _codes(values: np.ndarray) -> np.ndarray:
    """Intervals of about equal counts; missing cells are the last one."""
    there = np.isfinite(values)
    borders = (
        np.unique(np.quantile(values[there], np.arange(1, _BINS) / _BINS)) if any(there) else []
    )
    codes = np.searchsorted(borders, values, side="right")
    return np.where(there, codes, len(borders) + 1)


def _foremost(columns: np.ndarray) -> list[int]:
    """Positions of up to 48 columns: those of the strongest rank correlations."""
    from scipy.stats import rankdata

    count = columns.shape[1]
    if count <= _MOST_COLUMNS:
        return list(range(count))
    ranks = rankdata(np.nan_to_num(columns), axis=0).astype(np.float32)
    ranks -= ranks.mean(axis=0)
    ranks /= np.sqrt((ranks**2).sum(axis=0)) + 1e-12
    strength = np.abs(ranks.T @ ranks)
    np.fill_diagonal(strength, 0.0)
    best = np.argsort(-strength.max(axis=0), kind="stable")[:_MOST_COLUMNS]
    return sorted(int(d) for d in best)
