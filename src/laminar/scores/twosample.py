r"""Whether two sets of rows come from one distribution: columns one at a time, and all together.

Each test has a p-value that is uniform, or larger, when nothing differs. Of many columns some look
different by chance: put their p-values through `laminar.scores.holm`. With enough rows the smallest
difference has a small p-value, so each test gives its statistic too, which says how large it is.

References:
    Gretton, Borgwardt, Rasch, Schölkopf & Smola (2012), "A kernel two-sample test".
    Phipson & Smyth (2010), "Permutation p-values should never be zero".
"""

from typing import NamedTuple

import numpy as np

from laminar._errors import InputError

_EXACT = 100_000  # pairs; up to here the law of the Kolmogorov–Smirnov statistic is enumerated
_LEAST_EXPECTED = 5.0
_BLOCK = 4_000_000  # entries of a kernel matrix that are held at a time


class TwoSample(NamedTuple):
    """The outcome of a test.

    Attributes:
        statistic: How large the difference is, in the test's own terms.
        p_value: How often chance alone gives as much.
    """

    statistic: float
    p_value: float


def ks_test(a: np.ndarray, b: np.ndarray) -> TwoSample:
    """Kolmogorov–Smirnov: the largest difference of two empirical distribution functions.

    Args:
        a: Values (n,); NaN is left out, and infinities count as the outermost values.
        b: Values (m,).

    Returns:
        The difference, in [0, 1], and its p-value, which is conservative where values are tied.
        NaN for both where a set is empty.
    """
    from scipy.stats import ks_2samp

    a, b = _present(a), _present(b)
    if not len(a) or not len(b):
        return TwoSample(float("nan"), float("nan"))
    method = "exact" if len(a) * len(b) <= _EXACT else "asymp"
    found = ks_2samp(a, b, method=method)
    return TwoSample(float(found.statistic), float(found.pvalue))  # type: ignore[attr-defined]


def uniform_test(u: np.ndarray) -> TwoSample:
    """Kolmogorov–Smirnov against the uniform law on (0, 1), for probability integral transforms.

    Args:
        u: Values (n,); NaN is left out.
    """
    from scipy.stats import kstest

    u = _present(u)
    if not len(u):
        return TwoSample(float("nan"), float("nan"))
    if u.min() < 0 or u.max() > 1:
        raise InputError(f"Probabilities lie between 0 and 1, not at {u.min():g} or {u.max():g}.")
    found = kstest(u, "uniform")
    return TwoSample(float(found.statistic), float(found.pvalue))  # type: ignore[attr-defined]


def category_test(a: np.ndarray, b: np.ndarray) -> TwoSample:
    """Pearson's χ² test that two sets take their categories with the same frequencies.

    Categories expected fewer than five times in either set are put together, and with the next rare
    ones until five are expected of them all. Where only two categories are left, or nothing else
    would be, Fisher's exact test takes the place of χ².

    Args:
        a: Categories (n,), as numbers; NaN, a missing one, is a category of its own.
        b: Categories (m,).

    Returns:
        The total-variation distance of the frequencies, in [0, 1], and the p-value; NaN for both
        where a set is empty.
    """
    from scipy.special import gammaincc

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not len(a) or not len(b):
        return TwoSample(float("nan"), float("nan"))
    levels, codes = np.unique(np.concatenate([a, b]), return_inverse=True, equal_nan=True)
    counts = np.stack(
        [np.bincount(c, minlength=len(levels)) for c in (codes[: len(a)], codes[len(a) :])]
    ).astype(np.float64)
    distance = 0.5 * float(np.abs(counts[0] / len(a) - counts[1] / len(b)).sum())
    counts = _pooled(counts)
    if counts.shape[1] < 2:
        return TwoSample(distance, 1.0)
    if counts.shape[1] == 2:
        from scipy.stats import fisher_exact

        return TwoSample(distance, float(fisher_exact(counts.astype(int)).pvalue))  # type: ignore[attr-defined]
    total = counts.sum(axis=0)
    mean = np.outer(counts.sum(axis=1) / counts.sum(), total)
    chi_square = float(((counts - mean) ** 2 / mean).sum())
    return TwoSample(distance, float(gammaincc((counts.shape[1] - 1) / 2, chi_square / 2)))


def _pooled(counts: np.ndarray) -> np.ndarray:
    """Counts (2, K) with rare categories put together; at least two columns where there were."""
    counts = counts[:, np.argsort(counts.sum(axis=0), kind="stable")]
    share = counts.sum(axis=1).min() / counts.sum()
    expected = np.cumsum(counts.sum(axis=0)) * share
    # As many of the rarest as are rare, and more until their sum is not.
    rare = int((counts.sum(axis=0) * share < _LEAST_EXPECTED).sum())
    enough = int((expected < _LEAST_EXPECTED).sum()) + 1
    together = min(max(rare, enough if rare else 0), counts.shape[1] - 1)
    if together < 2:
        return counts
    return np.column_stack([counts[:, :together].sum(axis=1), counts[:, together:]])


def mmd_test(
    a: np.ndarray,
    b: np.ndarray,
    rng: np.random.Generator,
    *,
    permutations: int = 499,
    most_rows: int = 2_000,
    bandwidth: float | None = None,
) -> TwoSample:
    r"""The maximum mean discrepancy of two sets of rows, with a permutation p-value.

        MMD² = ‖mean_i φ(a_i) − mean_j φ(b_j)‖²,   ⟨φ(x), φ(y)⟩ = exp(−‖x − y‖² / (2 h²))

    It sees differences that no column shows alone, such as another correlation. Exchanging rows
    between the sets gives the law of the statistic when nothing differs, and
    p = (#{as large} + 1) / (permutations + 1), which is valid for any number of rows.

    Args:
        a: Rows (n, d), finite, in comparable units.
        b: Rows (m, d).
        rng: Draws permutations, and the rows where there are more than `most_rows`.
        permutations: How many; the p-value is a multiple of 1 / (permutations + 1).
        most_rows: Of each set at most so many are used. Time grows with their square; memory does
            not, since the kernel matrix is never held as a whole.
        bandwidth: h; by default the median distance of the rows of both sets.

    Returns:
        MMD (not squared) and the p-value.

    Raises:
        InputError: If shapes do not fit, a value is not finite, or a set has fewer than two rows.
    """
    a, b = (_few(x, most_rows, rng, name) for x, name in ((a, "a"), (b, "b")))
    if a.shape[1] != b.shape[1]:
        raise InputError(f"mmd_test: rows have {a.shape[1]} columns and {b.shape[1]}.")
    if permutations < 1:
        raise InputError(f"permutations must be at least 1, not {permutations}.")
    rows = np.concatenate([a, b])
    if bandwidth is None:
        bandwidth = _median_distance(rows, rng)
    if not bandwidth > 0:
        raise InputError(f"The bandwidth must be positive, not {bandwidth}.")
    signed = np.concatenate([np.full(len(a), 1 / len(a)), np.full(len(b), -1 / len(b))])
    draws = np.stack([signed, *(rng.permutation(signed) for _ in range(permutations))], axis=1)
    squares = _quadratic_forms(rows / bandwidth, draws)
    # Equal statistics may differ in their last digits.
    as_large = int((squares[1:] >= squares[0] * (1 - 1e-9) - 1e-12).sum())
    statistic = float(np.sqrt(max(squares[0], 0.0)))
    return TwoSample(statistic, (as_large + 1) / (permutations + 1))


def _quadratic_forms(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """uᵀ K u for each column of u (N, B), K the Gaussian kernel matrix of rows x (N, d)."""
    norms = np.square(x).sum(axis=1)
    out = np.zeros(u.shape[1])
    step = max(_BLOCK // len(x), 1)
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        squares = norms[part, None] + norms[None] - 2 * x[part] @ x.T
        out += (u[part] * (np.exp(-0.5 * np.maximum(squares, 0)) @ u)).sum(axis=0)
    return out


def _median_distance(rows: np.ndarray, rng: np.random.Generator) -> float:
    """The median over pairs of some rows, or their mean where half of the pairs coincide."""
    few = rows if len(rows) <= 1_000 else rows[rng.choice(len(rows), 1_000, replace=False)]
    norms = np.square(few).sum(axis=1)
    squares = norms[:, None] + norms[None] - 2 * few @ few.T
    distances = np.sqrt(np.maximum(squares[np.triu_indices(len(few), 1)], 0))
    return float(np.median(distances)) or float(distances.mean()) or 1.0


def _few(x: np.ndarray, most: int, rng: np.random.Generator, name: str) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise InputError(
            f"mmd_test: {name} must be at least two rows of shape (rows, d), and has shape "
            f"{x.shape}."
        )
    if not np.isfinite(x).all():
        raise InputError(f"mmd_test: {name} holds values that are missing or not finite.")
    return x if len(x) <= most else x[np.sort(rng.choice(len(x), most, replace=False))]


def _present(values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"A column of values has shape (rows,), not {array.shape}.")
    return array[~np.isnan(array)]
