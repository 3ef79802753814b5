"""Densities that need no gradient: regularised Gaussian mixtures, kernels, marginal quantile maps.

They are fitted on the host in float64 and are strong where rows are few. A covariance of component
k is the posterior mode under a prior worth ν rows of the pooled covariance Ψ, shrunk to the size a
k-th part of the data should have:

    Σ_k = (Σ_i r_ik (x_i − μ_k)(x_i − μ_k)ᵀ + ν K^{−2/max(D,4)} Ψ) / (Σ_i r_ik + ν)

so a component with few rows takes the shape of the whole table instead of collapsing (Fraley &
Raftery 2007). A kernel density is the same family at its other end, one component for each row.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np

# SciPy is imported where it is used: that takes a quarter of a second, and `fit` needs none of it.

_LOG_TWO_PI = math.log(2 * math.pi)
_TINY = 1e-10
_BLOCK = 500_000
_NEAR = 1e-7


class Components(NamedTuple):
    """A Gaussian mixture on the host: weights (K,), means (K, D), lower Cholesky factors."""

    weights: np.ndarray
    means: np.ndarray
    factors: np.ndarray

    def log_parts(self, x: np.ndarray) -> np.ndarray:
        """The log-density of each row (N,) under each component, ln w_k + ln N(x; μ_k, Σ_k)."""
        count, dim = self.means.shape
        # One product with all inverse factors side by side; L⁻¹ x and L⁻¹ μ are then subtracted.
        whiten = np.tril(np.linalg.inv(self.factors))
        flat = whiten.transpose(2, 0, 1).reshape(dim, count * dim)
        shift = np.einsum("kij,kj->ki", whiten, self.means)
        constant = np.log(np.diagonal(whiten, axis1=1, axis2=2)).sum(1) + np.log(self.weights)
        out = np.empty((len(x), count))
        step = max(_BLOCK // (count * dim), 1)
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            z = (x[rows] @ flat).reshape(-1, count, dim) - shift
            out[rows] = constant - 0.5 * np.einsum("nkd,nkd->nk", z, z)
        return out - 0.5 * dim * _LOG_TWO_PI

    def marginal(self, columns: int) -> "Components":
        """The law of the first columns alone: the upper left block of each Cholesky factor."""
        return Components(
            self.weights, self.means[:, :columns], self.factors[:, :columns, :columns]
        )

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """The log-density of each row."""
        return log_sum(self.log_parts(x))


def pooled_covariance(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The covariance with correlations shrunk as far as their sampling noise demands.

    The share of the diagonal is that of Schäfer & Strimmer (2005), at least 1e-4, so the result is
    positive definite for fewer rows than columns too.
    """
    n, dim = x.shape
    w = np.full(n, 1 / n) if weights is None else weights / weights.sum()
    centred = x - w @ x
    scale = np.sqrt(np.maximum(w @ centred**2, _TINY))
    z = centred / scale
    r = (w[:, None] * z).T @ z
    if dim == 1:
        return np.outer(scale, scale) * r
    variance = ((w[:, None] * z**2).T @ z**2 - r**2) * (w @ w)
    off = ~np.eye(dim, dtype=bool)
    share = np.clip(variance[off].sum() / max((r[off] ** 2).sum(), _TINY), 1e-4, 1.0)
    r = (1 - share) * r + share * np.eye(dim)
    return np.outer(scale, scale) * r


def fit_components(
    x: np.ndarray,
    count: int,
    prior_rows: float,
    *,
    seed: int,
    weights: np.ndarray | None = None,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> Components:
    """Fit a Gaussian mixture by EM with the prior of this module's first lines.

    Args:
        x: Rows (N, D), float64.
        count: Number of components K.
        prior_rows: ν, how many rows the prior on each covariance is worth.
        seed: For the k-means that starts it.
        weights: Non-negative sample weights (N,), or None.
        iterations: At most this many steps.
        tolerance: Stop when the mean log-likelihood grows by less.
    """
    n, dim = x.shape
    w = np.ones(n) if weights is None else weights * (n / weights.sum())
    # In few dimensions the exponent would make narrow spikes of components with few rows.
    prior = prior_rows * count ** (-2 / max(dim, 4)) * pooled_covariance(x, weights)
    r = np.ones((n, 1)) if count == 1 else np.eye(count)[_clusters(x, count, w, seed)]
    mixture = _maximise(x, r * w[:, None], prior, prior_rows)
    last = -np.inf
    for _ in range(iterations):
        parts = mixture.log_parts(x)
        log_p = log_sum(parts)
        mean = float(w @ log_p / n)
        if mean - last < tolerance:
            break
        last, r = mean, np.exp(parts - log_p[:, None])
        mixture = _maximise(x, r * w[:, None], prior, prior_rows)
    return mixture


def _clusters(x, count, w, seed):
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    spread = x.std(0)
    few = x if len(x) <= 5000 else x[np.random.default_rng(seed).choice(len(x), 5000, False)]
    w = w if len(x) <= 5000 else None
    means = KMeans(count, n_init="auto", max_iter=20, random_state=seed)
    with warnings.catch_warnings():
        # It warns where there are fewer distinct rows than clusters, which a start may well have.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return means.fit(few / spread, sample_weight=w).predict(x / spread)


def _maximise(x, r, prior, prior_rows) -> Components:
    dim, count = x.shape[1], r.shape[1]
    rows = r.sum(0) + 1e-9
    means = (r.T @ x) / rows[:, None]
    factors = np.empty((count, dim, dim))
    jitter = _TINY * np.eye(dim)
    for k in range(count):
        # Rows far from the component add nothing; leaving them out makes K components cost as one.
        near = r[:, k] > _NEAR
        y = (x[near] - means[k]) * np.sqrt(r[near, k])[:, None]
        factors[k] = np.linalg.cholesky((y.T @ y + prior) / (rows[k] + prior_rows) + jitter)
    return Components((rows + 1) / (rows.sum() + count), means, factors)


def fit_kernels(
    x: np.ndarray, width: float, *, diagonal: bool, weights: np.ndarray | None = None
) -> Components:
    """A kernel density with covariance width² Ψ, or width² diag Ψ, at each row."""
    cov = pooled_covariance(x, weights)
    factor = np.diag(np.sqrt(np.diag(cov))) if diagonal else np.linalg.cholesky(cov)
    w = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()
    return Components(w, x, np.broadcast_to(width * factor, (len(x), *factor.shape)))


def kernel_log_prob(kernels: Components, x: np.ndarray) -> np.ndarray:
    """`Components.log_prob` for kernels that share one covariance, by one matrix product."""
    from scipy.linalg import solve_triangular

    factor = kernels.factors[0]
    a = solve_triangular(factor, kernels.means.T, lower=True)
    b = solve_triangular(factor, x.T, lower=True)
    squares = (b**2).sum(0)[:, None] + (a**2).sum(0)[None] - 2 * b.T @ a
    constant = 0.5 * x.shape[1] * _LOG_TWO_PI + np.log(np.diag(factor)).sum()
    parts = np.log(kernels.weights) - 0.5 * np.maximum(squares, 0)
    return log_sum(parts) - constant


class Knots(NamedTuple):
    """Every column's map through knots: latent z (K, D), data x (K, D), slopes dx/dz (K, D)."""

    z: np.ndarray
    x: np.ndarray
    slope: np.ndarray


def fit_knots(x: np.ndarray, weights: np.ndarray | None = None) -> Knots:
    """Map standard normal quantiles to the data's, column by column.

    There are about ⅔ √N knots, between 6 and 33, at equal steps of probability, and in both tails
    more at a quarter of the probability each, down to ½/N. A gap is at least 1/50 of what a normal
    column of the same spread (by quartiles) would have, so ties give a bounded density. Slopes are
    the harmonic means of the secants on both sides, which keep a rational-quadratic spline
    monotone (Gregory & Delbourgo 1982). Outside the knots the map goes on linearly, that is with
    normal tails.
    """
    from scipy.special import ndtri

    n, dim = x.shape
    w = np.full(n, 1 / n) if weights is None else weights / weights.sum()
    effective = 1 / float(w @ w)
    levels = _levels(effective)
    bins = len(levels) - 1
    z = ndtri(levels)
    data = np.empty((bins + 1, dim))
    for j in range(dim):
        order = np.argsort(x[:, j], kind="stable")
        cumulative = np.cumsum(w[order])
        middle = cumulative - 0.5 * w[order]
        data[:, j] = np.interp(levels, middle, x[order, j])
    deviation = np.sqrt(np.maximum(w @ (x - w @ x) ** 2, _TINY))
    quartiles = np.stack([np.interp([0.25, 0.75], levels, column) for column in data.T])
    spread = np.clip(np.diff(quartiles, axis=1)[:, 0] / 1.349, 0.05 * deviation, deviation)
    least = 0.02 * spread * np.diff(z)[:, None]
    for k in range(bins):
        data[k + 1] = np.maximum(data[k + 1], data[k] + least[k])
    secant = np.diff(data, axis=0) / np.diff(z)[:, None]
    slope = np.empty_like(data)
    slope[[0, -1]] = secant[[0, -1]]
    slope[1:-1] = 2 / (1 / secant[:-1] + 1 / secant[1:])
    return Knots(np.broadcast_to(z[:, None], data.shape), data, slope)


def _levels(rows: float) -> np.ndarray:
    bins = int(np.clip(rows**0.5 / 1.5, 5, 32))
    inner = np.arange(1, bins) / bins
    tail = [0.5 / rows]
    level = inner[0] / 4
    while level * rows >= 4:
        tail.append(level)
        level /= 4
    low = np.sort(tail)
    return np.concatenate([low, inner, 1 - low[::-1]])


def apply_knots(knots: Knots, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Data to latent, (N, D) → (N, D), with the summed ln |dz/dx|."""
    out, log_det = np.empty_like(x), np.zeros(len(x))
    for j in range(x.shape[1]):
        u, v, s = knots.x[:, j], knots.z[:, j], knots.slope[:, j]
        k = np.clip(np.searchsorted(u, x[:, j], side="right") - 1, 0, len(u) - 2)
        r = np.clip((x[:, j] - u[k]) / (u[k + 1] - u[k]), 0, 1)
        left, right, secant = s[k], s[k + 1], (u[k + 1] - u[k]) / (v[k + 1] - v[k])
        # As `laminar.bijections.splines.rational_place`, in float64 whatever JAX is set to.
        lean = left * (1 - r) - right * r
        near = np.sqrt(lean**2 + 4 * secant**2 * r * (1 - r)) + np.abs(lean)
        far = 2 * secant * np.where(lean >= 0, r, 1 - r)
        t, rest = np.where(lean >= 0, (far, near), (near, far)) / (near + far)
        bottom = secant * (t**2 + rest**2) + (left + right) * t * rest
        top = right * t**2 + 2 * secant * t * rest + left * rest**2
        log_det -= 2 * np.log(secant) + np.log(top) - 2 * np.log(bottom)
        below, above = np.minimum(x[:, j] - u[0], 0), np.maximum(x[:, j] - u[-1], 0)
        out[:, j] = v[k] + (v[k + 1] - v[k]) * t + below / s[0] + above / s[-1]
    return out, log_det


def log_sum(terms: np.ndarray) -> np.ndarray:
    """The logarithm of the sum over columns of exponentials, for each row."""
    from scipy.special import logsumexp

    return np.asarray(logsumexp(terms, axis=1))


def stack(log_p: np.ndarray, weights: np.ndarray | None = None, prior: float = 1.0) -> np.ndarray:
    """Weights of a mixture of densities that suit held-out rows best (Smyth & Wolpert 1999).

    Args:
        log_p: Log-densities of held-out rows (N, M) under the M densities.
        weights: Sample weights (N,), or None.
        prior: Rows the uniform prior over densities is worth: no weight falls to zero, as the next
            row may be unlike all seen so far.
    """
    n, count = log_p.shape
    w = np.ones(n) if weights is None else weights * (n / weights.sum())
    share = np.full(count, 1 / count)
    for _ in range(300):
        parts = np.log(share) + log_p
        r = np.exp(parts - log_sum(parts)[:, None])
        share = (w @ r + prior / count) / (n + prior)
    return share
