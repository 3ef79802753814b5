"""Whether a generator repeats its training rows.

A generator that copies has samples nearer to the training rows than new rows of the same kind are.
So for every sample and every held-out row the distance to the nearest training row is taken, and
the two sets of distances are compared by rank (Meehan, Chaudhuri & Dasgupta 2020, "A
non-parametric test to detect data-copying in generative models", whose C_T this is for one cell).
"""

from typing import NamedTuple

import numpy as np

from laminar._errors import InputError


class Memorisation(NamedTuple):
    """What `memorisation` found.

    Attributes:
        closer: The chance that a sample is nearer to the training rows than a held-out row is, ties
            counting half; ½ when nothing is copied.
        z: C_T: that difference in standard deviations, negative where samples are nearer.
        p_value: How often samples that copy nothing are as near: one-sided.
        copies: The share of samples that equal a training row.
        held_out_copies: That of held-out rows.
    """

    closer: float
    z: float
    p_value: float
    copies: float
    held_out_copies: float


def memorisation(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Memorisation:
    """Test whether samples lie nearer to the training rows than held-out rows do.

    Given the training rows, the distances of samples and of held-out rows are independent draws,
    and if the generator has learnt the distribution they have one law; the Mann–Whitney test
    compares them. It sees copying, and not the opposite: samples farther off give p near one.

    Args:
        samples: Rows (n, d) that the generator drew, finite, in units in which distances mean
            something.
        train: Rows (N, d) it was trained on.
        held_out: Rows (m, d) that it has not seen.

    Raises:
        InputError: If shapes do not fit, a set is empty, or a value is not finite.
    """
    from scipy.stats import mannwhitneyu

    near = nearest_distances(samples, train)
    usual = nearest_distances(held_out, train)
    copies, held_copies = float((near == 0).mean()), float((usual == 0).mean())
    both = np.concatenate([near, usual])
    if both.min() == both.max():
        return Memorisation(0.5, 0.0, 1.0, copies, held_copies)
    found = mannwhitneyu(near, usual, alternative="less", method="asymptotic")
    n, m = len(near), len(usual)
    larger = float(found.statistic) / (n * m)
    _, ties = np.unique(both, return_counts=True)
    total = n + m
    tied = float((ties.astype(np.float64) ** 3 - ties).sum()) / (total * (total - 1))
    deviation = np.sqrt(n * m / 12 * (total + 1 - tied))
    z = (larger - 0.5) * n * m / deviation
    return Memorisation(1 - larger, float(z), float(found.pvalue), copies, held_copies)


def nearest_distances(
    rows: np.ndarray, reference: np.ndarray, k: int = 1, *, own: bool = False
) -> np.ndarray:
    """The Euclidean distance of each row to its k-th nearest reference row.

    Args:
        rows: Rows (N, d), finite.
        reference: Rows (M, d), finite.
        k: Which neighbour, from 1.
        own: Whether the rows are the reference rows themselves, of which each leaves itself out.

    Returns:
        Distances (N,), float64.

    Raises:
        InputError: If shapes do not fit, a value is not finite, or there are too few rows.
    """
    from sklearn.neighbors import NearestNeighbors

    x, y = np.asarray(rows, np.float64), np.asarray(reference, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise InputError(
            f"Rows of shape {x.shape} and reference rows of shape {y.shape} do not fit: both need "
            "the same columns."
        )
    for name, values in (("rows", x), ("reference rows", y)):
        if not np.isfinite(values).all():
            raise InputError(f"The {name} hold values that are missing or not finite.")
    if not len(x) or k < 1 or len(y) < k + own:
        raise InputError(
            f"Neighbour {k} of {len(x)} rows among {len(y)} reference rows cannot be found; give "
            "more rows."
        )
    # Found again pair by pair: a difference of squares is not exactly zero between equal rows.
    nearest = NearestNeighbors(n_neighbors=k + own).fit(y).kneighbors(x, return_distance=False)
    gaps = np.stack([np.sqrt(np.square(x - y[column]).sum(axis=1)) for column in nearest.T], axis=1)
    if own:
        # Its own entry need not come first among duplicates, but one of distance zero is it.
        gaps = np.sort(gaps, axis=1)
        return gaps[:, k]
    return np.sort(gaps, axis=1)[:, k - 1]
