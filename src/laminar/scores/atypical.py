r"""Scores of rows beside the log-density itself, each with what it can and cannot see.

The log-density ranks rows by how rarely the model expects their like. It is known to fail in high
dimensions: what is *simpler* than the training data may score higher than all of it (Nalisnick et
al. 2019 a). Three scores look at the same model from other sides:

- `typicality`: |ln p(x) − E ln p|. Rows that are too probable are as strange as those that are not
  probable enough.
- `latent_radius`: how far out the latent point lies under a normal base, as a tail probability.
- `contrast`: ln p(x) − ln p₀(x), against a broad background p₀ that shares what makes rows simple.

References:
    Nalisnick, Matsukawa, Teh, Gorur & Lakshminarayanan (2019), "Do deep generative models know
    what they don't know?" (a), and Nalisnick, Matsukawa, Teh & Lakshminarayanan (2019), "Detecting
    out-of-distribution inputs to deep generative models using typicality" (b).
    Ren et al. (2019), "Likelihood ratios for out-of-distribution detection".
"""

import math
from typing import NamedTuple

import numpy as np

from laminar._errors import InputError
from laminar.scores.twosample import category_test

_NORMAL_LIMIT = 2_000  # values whose mean is normal enough


def typicality(log_p: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """The score −|ln p(x) − E ln p|, low where a row is too improbable or too probable.

    Args:
        log_p: Log-densities (N,).
        calibration: Log-densities (n,) of rows that decided nothing about the model; their mean
            estimates E ln p, minus the entropy. Those that are not finite are left out of it.

    Returns:
        (N,), at most zero; −inf where ln p is −inf, NaN where it is NaN.

    Raises:
        InputError: If no calibration value is finite.
    """
    known = np.asarray(calibration, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        raise InputError("typicality needs finite log-densities of calibration rows.")
    return -np.abs(np.asarray(log_p, dtype=np.float64) - known.mean())


class BatchTypicality(NamedTuple):
    """What `batch_typicality` found.

    Attributes:
        statistic: |mean of ln p over the batch − mean over the calibration rows|, in nats.
        p_value: How often a batch of calibration rows is as far off.
    """

    statistic: float
    p_value: float


def batch_typicality(
    log_p: np.ndarray, calibration: np.ndarray, rng: np.random.Generator, draws: int = 999
) -> BatchTypicality:
    """Whether a batch of rows is typical of the model, as a whole.

    The statistic |mean ln p − E ln p| of the batch is compared with what chance gives: that of as
    many rows drawn from the calibration ones, against the mean of a calibration set drawn likewise.
    A batch of normal rows has a statistic of the order of 1/√N + 1/√n, so that a shift too small to
    be seen in any row shows in the batch (Nalisnick et al. 2019 b). Rows of density zero have no
    part in a mean: their shares are compared by Fisher's exact test, and p is twice the smaller.

    Args:
        log_p: Log-densities (N,) of the batch.
        calibration: Log-densities (n,) of calibration rows; their mean estimates E ln p.
        rng: Draws the batches. Means of more than 2,000 values are drawn from their normal limit.
        draws: How many.

    Returns:
        The statistic, and the bootstrap's p = (#{as large} + 1) / (draws + 1), which is accurate
        for more than some dozen rows on either side.

    Raises:
        InputError: If there are no rows, or fewer than two finite calibration values.
    """
    batch = np.asarray(log_p, dtype=np.float64)
    known = np.asarray(calibration, dtype=np.float64)
    lost, rows = [np.isneginf(values) for values in (batch, known)], len(batch)
    batch, known = batch[~lost[0]], known[np.isfinite(known)]
    if not rows or len(known) < 2 or draws < 1:
        raise InputError(
            f"batch_typicality needs rows, at least two finite calibration values and draws, and "
            f"got {rows}, {len(known)} and {draws}."
        )
    statistic, p = math.inf, 1.0
    if len(batch):
        statistic = abs(float(batch.mean()) - float(known.mean()))
        if math.isnan(statistic):
            return BatchTypicality(math.nan, math.nan)
        own, other = (_means(known, size, draws, rng) for size in (len(batch), len(known)))
        p = (int((np.abs(own - other) >= statistic).sum()) + 1) / (draws + 1)
    if any(part.any() for part in lost):
        p = min(2 * min(p, category_test(*lost).p_value), 1.0)
    return BatchTypicality(statistic, p)


def _means(known: np.ndarray, size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of so many values drawn with replacement, (draws,)."""
    if size > _NORMAL_LIMIT:
        return rng.normal(known.mean(), known.std() / math.sqrt(size), draws)
    return rng.choice(known, (draws, size)).mean(axis=1)


def latent_radius(z: np.ndarray) -> np.ndarray:
    r"""The score ln P(χ²_d ≥ ‖z‖²) of latent points under a standard normal base.

    Zero at the origin, and low far out. Unlike ln p it leaves out the Jacobian, and so is the same
    whatever the columns are measured in; it cannot see a row that is strange only because it lies
    where the flow spreads little probability over much space.

    Args:
        z: Latent points (N, d).

    Returns:
        (N,), at most zero; NaN where a coordinate is NaN.
    """
    z = np.asarray(z, dtype=np.float64)
    if z.ndim != 2:
        raise InputError(f"latent_radius takes points of shape (rows, d), not {z.shape}.")
    with np.errstate(over="ignore"):
        squares = np.square(z).sum(axis=1)
    return chi_square_log_tail(squares, z.shape[1])


def chi_square_log_tail(squares: np.ndarray, dim: int) -> np.ndarray:
    r"""The logarithm of P(χ²_d ≥ r²), also where the probability itself underflows.

    Beyond the range of float64 it is the continued fraction of the incomplete gamma function,
    Γ(a, x) = e^{−x} x^a / (x + 1 − a − 1 (1 − a) / (x + 3 − a − …)), a = d/2, x = r²/2.

    Args:
        squares: r² (N,).
        dim: d, at least 1.
    """
    from scipy.special import gammainc, gammaincc, gammaln

    if dim < 1:
        raise InputError(f"A chi-square law needs at least one degree of freedom, not {dim}.")
    a = dim / 2
    x = np.asarray(squares, dtype=np.float64) / 2
    upper = gammaincc(a, x)
    deep = (upper < 1e-250) & np.isfinite(x)
    with np.errstate(divide="ignore"):
        out = np.where(upper < 0.5, np.log(upper), np.log1p(-gammainc(a, x)))
    if deep.any():
        y = x[deep]
        # Lentz from the far end; so deep in the tail a few dozen terms are exact.
        fraction = np.zeros_like(y)
        for k in range(60, 0, -1):
            fraction = k * (k - a) / (y + 2 * k + 1 - a - fraction)
        out[deep] = -y + a * np.log(y) - np.log(y + 1 - a - fraction) - gammaln(a)
    return out


def contrast(log_p: np.ndarray, log_background: np.ndarray) -> np.ndarray:
    """The log-likelihood ratio ln p(x) − ln p₀(x) against a broad background p₀.

    Low where the background explains a row better than the model does. The background may be any
    density of the same columns: a model of mixed or perturbed data, or a Gaussian with the same
    covariance.

    Args:
        log_p: ln p (N,).
        log_background: ln p₀ (N,).

    Returns:
        (N,); −inf where ln p is −inf, whatever the background says, and NaN where either is NaN.
    """
    p = np.asarray(log_p, dtype=np.float64)
    background = np.asarray(log_background, dtype=np.float64)
    if p.shape != background.shape:
        raise InputError(
            f"contrast: ln p has shape {p.shape} and the background {background.shape}."
        )
    with np.errstate(invalid="ignore"):
        ratio = p - background
    return np.where(np.isneginf(p) & ~np.isnan(background), -np.inf, ratio)
