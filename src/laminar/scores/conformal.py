r"""From scores to p-values to a list of discoveries with a bound on the share of false ones.

A score is low where a row is strange, as a log-density is. Let s_1, …, s_n be the scores of
*calibration* rows, which the scored model has not seen, and s that of a new row. If the new row
comes from the same distribution, the n + 1 scores are exchangeable, and

    p = (#{i : s_i ≤ s} + 1) / (n + 1),        P(p ≤ t) ≤ t for every t

whatever the model and however wrong it is. That holds *marginally*, over the draw of the new row
and of the calibration rows together. Given one calibration set the p-values of many new rows share
its luck: the share of normal rows with p ≤ t is t only up to a deviation of about √(t (1 − t) / n).
`conditional_p_values` are larger ones that hold given the calibration set, with a stated
confidence. Benjamini & Hochberg's procedure keeps its level on the marginal ones nevertheless,
because p-values that share a calibration set are positively dependent (Bates et al. 2023).

References:
    Vovk, Gammerman & Shafer (2005), "Algorithmic Learning in a Random World".
    Bates, Candès, Lei, Romano & Sesia (2023), "Testing for outliers with conformal p-values".
    Benjamini & Hochberg (1995), "Controlling the false discovery rate".
    Storey (2002), "A direct approach to false discovery rates".
"""

import math
from typing import Literal

import numpy as np

from laminar._errors import InputError


def conformal_p_values(
    scores: np.ndarray,
    calibration: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    calibration_weights: np.ndarray | None = None,
    ties: Literal["conservative", "random"] = "conservative",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    r"""The conformal p-value of each score, where low scores are the strange ones.

    Without weights p = (#{s_i ≤ s} + 1) / (n + 1): never zero, and too large rather than too small
    where scores are tied. With ``ties="random"`` a tie counts in part,

        p = (#{s_i < s} + u (#{s_i = s} + 1)) / (n + 1),        u uniform on (0, 1]

    which is uniform exactly, at the price that it depends on the draw. With weights, for new rows
    from another distribution whose likelihood ratio w to that of the calibration rows is known,
    every row counts with its own (Tibshirani et al. 2019):

        p = (Σ w_i 1[s_i ≤ s] + w) / (Σ w_i + w)

    Args:
        scores: Scores (N,); −inf is the strangest of all.
        calibration: Scores (n,) of rows that decided nothing about the model.
        weights: w of each new row, (N,), positive; one each where only the others are given.
        calibration_weights: w_i of each calibration row, (n,), non-negative.
        ties: How equal scores count.
        rng: Draws u; needed with ``ties="random"``.

    Returns:
        p-values (N,), float64 in (0, 1]; NaN where the score is NaN.

    Raises:
        InputError: If there is no calibration score, one of them is NaN, or shapes do not fit.
    """
    s = _vector(scores, "scores")
    known = _vector(calibration, "calibration")
    if not len(known):
        raise InputError("conformal_p_values needs at least one calibration score, and got none.")
    if np.isnan(known).any():
        raise InputError(
            f"calibration: {int(np.isnan(known).sum()):,} of {len(known):,} scores are NaN, first "
            f"at position {int(np.isnan(known).argmax())}; score them with a model that can, or "
            "leave them out."
        )
    if ties not in ("conservative", "random"):
        raise InputError(f"ties must be 'conservative' or 'random', not {ties!r}.")
    if ties == "random" and rng is None:
        raise InputError("ties='random' needs a generator; give rng=numpy.random.default_rng(…).")
    w_new, w_known = _weights(weights, calibration_weights, len(s), len(known))
    order = np.argsort(known, kind="stable")
    below_or_equal = np.concatenate([[0.0], np.cumsum(w_known[order])])
    upto = below_or_equal[np.searchsorted(known[order], s, side="right")]
    if rng is None or ties == "conservative":
        count = upto + w_new
    else:
        below = below_or_equal[np.searchsorted(known[order], s, side="left")]
        count = below + (1.0 - rng.random(len(s))) * (upto - below + w_new)
    p = np.minimum(count / (below_or_equal[-1] + w_new), 1.0)
    return np.where(np.isnan(s), np.nan, p)


def conditional_p_values(p: np.ndarray, calibration: int, confidence: float = 0.9) -> np.ndarray:
    r"""Conformal p-values enlarged until they hold given the calibration set.

    A conformal p-value i / (n + 1) is replaced by b_i, where with the stated confidence over the
    calibration set U_(i) ≤ b_i for all order statistics of n uniform variables at once. The bounds
    are those of the generalised Simes inequality with k = n / 2,

        b_{n+1−i} = 1 − δ^{1/k} (i (i − 1) ⋯ (i − k + 1) / (n (n − 1) ⋯ (n − k + 1)))^{1/k}

    with δ = 1 − confidence. They are of the order of ln(1/δ) / n for the smallest p-values, and
    none reaches below 1 − δ^{2/n}.

    Args:
        p: Conservative unweighted p-values (N,) of `conformal_p_values`.
        calibration: n, the number of calibration scores behind them.
        confidence: 1 − δ.

    Returns:
        Larger p-values (N,); NaN stays NaN.

    Raises:
        InputError: If the values are not of that form, or a number is out of range.

    References:
        Bates et al. (2023), section 3; Sarkar (2008), "Generalizing Simes' test".
    """
    from scipy.special import gammaln

    values = _vector(p, "p")
    n = calibration
    if n < 1:
        raise InputError(f"The number of calibration scores must be at least 1, not {n}.")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, not {confidence}.")
    place = values * (n + 1)
    ranks = np.round(place)
    bad = ~np.isnan(values) & ((np.abs(place - ranks) > 1e-6 * (n + 1)) | (ranks < 1))
    bad |= ranks > n + 1
    if bad.any():
        raise InputError(
            f"p holds {values[bad.argmax()]:g}, which is no multiple of 1/{n + 1}: it must come "
            f"from {n} calibration scores, without weights or random ties."
        )
    k = max(n // 2, 1)
    i = np.arange(n, 0, -1)  # b_1, …, b_n
    inside = i >= k
    top = np.where(inside, i, k)
    log_share = gammaln(top + 1.0) - gammaln(top - k + 1.0)
    log_share -= gammaln(n + 1.0) - gammaln(n - k + 1.0)
    bounds = -np.expm1((math.log(1 - confidence) + log_share) / k)
    bounds = np.append(np.where(inside, bounds, 1.0), 1.0)
    found = bounds[np.where(np.isnan(ranks), 1, ranks).astype(int) - 1]
    return np.where(np.isnan(values), np.nan, np.maximum(found, values))


def benjamini_hochberg(p: np.ndarray, null_share: float = 1.0) -> np.ndarray:
    r"""Adjusted p-values: the rows with a value of at most α are a list with FDR at most α.

        q_(j) = min_{k ≥ j} π₀ m p_(k) / k,        p_(1) ≤ … ≤ p_(m)

    The false-discovery rate is the expected share of normal rows in the list, over repetitions of
    the whole experiment; one list may have more. It holds for independent p-values and for
    conformal ones that share a calibration set, not for weighted ones.

    Args:
        p: p-values (N,); NaN, where a score failed, is no test and is not counted in m.
        null_share: π₀, 1 or an estimate of the share of normal rows such as `null_share` makes.

    Returns:
        Adjusted p-values (N,), at most one; NaN where p is NaN.

    Raises:
        InputError: If a value does not lie in [0, 1], or `null_share` not in (0, 1].
    """
    if not 0 < null_share <= 1:
        raise InputError(f"null_share must lie in (0, 1], not {null_share}.")
    values = _p_values(p)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    m = len(order)
    steps = null_share * m * values[order] / np.arange(1, m + 1)
    adjusted = np.full(len(values), np.nan)
    adjusted[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1.0)
    return adjusted


def null_share(p: np.ndarray, threshold: float = 0.5) -> float:
    r"""Storey's estimate of the share of normal rows, π₀ = (1 + #{p ≥ λ}) / (m (1 − λ)).

    Multiplied into `benjamini_hochberg` it finds more where many rows are strange. It is biased
    upwards, so the rate stays controlled for independent p-values; for those that share a
    calibration set that is asymptotic (Bates et al. 2023).

    Args:
        p: p-values (N,); NaN is left out.
        threshold: λ, in (0, 1).

    Returns:
        π₀, at most 1; 1 where there is no p-value.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold must lie between 0 and 1, not {threshold}.")
    values = _p_values(p)
    values = values[~np.isnan(values)]
    if not len(values):
        return 1.0
    share = (1 + int((values >= threshold).sum())) / (len(values) * (1 - threshold))
    return min(share, 1.0)


def holm(p: np.ndarray) -> np.ndarray:
    r"""Holm's adjusted p-values: with those of at most α rejected, any error at all has chance α.

        q_(j) = max_{k ≤ j} (m − k + 1) p_(k)

    valid under any dependence (Holm 1979).

    Args:
        p: p-values (N,); NaN is no test and is not counted in m.

    Returns:
        Adjusted p-values (N,), at most one; NaN where p is NaN.
    """
    values = _p_values(p)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    steps = np.arange(len(order), 0, -1) * values[order]
    adjusted = np.full(len(values), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _vector(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"{name} must have shape (rows,) and has shape {array.shape}.")
    return array


def _p_values(p: np.ndarray) -> np.ndarray:
    values = _vector(p, "p")
    bad = ~np.isnan(values) & ~((values >= 0) & (values <= 1))
    if bad.any():
        raise InputError(f"p holds {values[bad.argmax()]:g}; p-values lie between 0 and 1.")
    return values


def _weights(
    new: np.ndarray | None, known: np.ndarray | None, rows: int, calibration: int
) -> tuple[np.ndarray, np.ndarray]:
    w_new = np.ones(rows) if new is None else _vector(new, "weights")
    w_known = np.ones(calibration) if known is None else _vector(known, "calibration_weights")
    for name, w, count in (
        ("weights", w_new, rows),
        ("calibration_weights", w_known, calibration),
    ):
        if len(w) != count:
            raise InputError(f"{name} has {len(w):,} entries for {count:,} scores.")
        if not (np.isfinite(w).all() and (w >= 0).all()):
            raise InputError(f"{name} must be finite and 0 or more.")
    if not (w_new > 0).all():
        raise InputError("weights of new rows must be positive, so that no p-value is zero.")
    return w_new, w_known
