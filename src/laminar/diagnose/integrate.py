"""Numerical integrals of a density, to see whether it integrates to one and its samples follow it.

Three methods on the host in float64; the density itself is evaluated wherever the caller does it.

- `quadrature`: adaptive cubature in one to three dimensions. Each axis is mapped by
  x = c + s sinh(t), so that a grid of moderate length in t reaches 10⁶ spreads and heavy tails
  become smooth. Cells with the largest error, or whose integral disagrees with the share of samples
  in them, are halved along every axis until the error is small or the evaluations are spent.
- `importance`: any dimension, from a proposal that is wider than the density, with standard error.
- `on_manifold`: the mean over uniform points of a compact manifold, times its measure.

All also give the means of a few bounded statistics under the density, to be compared with samples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from laminar.spaces import AbstractSpace

LogDensity = Callable[[np.ndarray], np.ndarray]
"""Maps points (m, D) to log-densities (m,)."""

_REACH = 1e6
# Dimension -> intervals per axis between quantiles, and in each tail; the two Gauss orders.
_GRIDS = {1: (64, 24, 15, 10), 2: (10, 5, 5, 4), 3: (4, 3, 4, 3)}
_MAX_CELLS = 4096  # split in one round


class Integral(NamedTuple):
    """An integral over the whole space.

    Attributes:
        value: ∫ p.
        error: An estimate of its error: summed over cells, or one standard error.
        means: ∫ p φ_j / ∫ p for the statistics φ.
        mean_errors: Estimated errors of these.
        effective: Effective number of evaluations, as a share of all (1 for quadrature).
        evaluations: How often the density was evaluated.
    """

    value: float
    error: float
    means: np.ndarray
    mean_errors: np.ndarray
    effective: float
    evaluations: int


class Scale(NamedTuple):
    """Centre and spread of every axis, and the statistics that are compared."""

    centre: np.ndarray
    spread: np.ndarray

    @staticmethod
    def of(samples: np.ndarray) -> "Scale":
        """Median and median deviation, with the standard deviation where that is zero."""
        finite = samples[np.isfinite(samples).all(1)]
        if not len(finite):
            return Scale(np.zeros(samples.shape[1]), np.ones(samples.shape[1]))
        centre = np.median(finite, axis=0)
        spread = 1.48 * np.median(np.abs(finite - centre), axis=0)
        spread = np.where(spread > 0, spread, finite.std(0))
        return Scale(centre, np.where(spread > 0, spread, 1.0))

    def statistics(self, x: np.ndarray, log_p: np.ndarray) -> np.ndarray:
        """The log-density, and tanh of each standardised coordinate and of its absolute value.

        Bounded (or nearly), so that their means exist for every density; ``(m, 1 + 2 D)``.
        """
        u = np.clip((x - self.centre) / self.spread, -30, 30)
        log_p = np.where(np.isfinite(log_p), log_p, 0.0)[:, None]
        return np.concatenate([log_p, np.tanh(u), np.tanh(np.abs(u) - 1)], axis=1)


class _Cells(NamedTuple):
    lo: np.ndarray  # (M, D) in t
    hi: np.ndarray
    sums: np.ndarray  # (M, 1 + J): ∫ p and ∫ p φ
    error: np.ndarray  # (M,)
    inside: np.ndarray  # (M,) how many samples

    def join(self, other: "_Cells") -> "_Cells":
        return _Cells(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))

    def keep(self, mask: np.ndarray) -> "_Cells":
        return _Cells(*(part[mask] for part in self))


def quadrature(
    log_density: LogDensity,
    samples: np.ndarray,
    *,
    evaluations: int = 250_000,
    tolerance: float = 1e-3,
) -> Integral:
    """Integrate a density over ℝ^D, D ≤ 3, by adaptive Gauss–Legendre cubature.

    Args:
        log_density: The log-density.
        samples: Draws from it, (N, D): they say where to look, and do not enter the value.
        evaluations: About how often the density may be evaluated.
        tolerance: Refinement stops once the estimated error is below this.
    """
    n, dim = samples.shape
    scale = Scale.of(samples)
    limit = math.asinh(_REACH)
    t = np.clip(np.arcsinh((samples - scale.centre) / scale.spread), -limit, limit)
    t = t[np.isfinite(t).all(1)]
    intervals, tails, order, lower = _GRIDS[dim]
    rules = [_rule(order, dim), _rule(lower, dim)]
    cost = sum(len(weights) for _, weights in rules)

    def integrate(lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        half, middle = (hi - lo) / 2, (hi + lo) / 2
        volume = half.prod(1)
        sums = []
        for nodes, weights in rules:
            at = (middle[:, None] + half[:, None] * nodes).reshape(-1, dim)
            x = scale.centre + scale.spread * np.sinh(at)
            log_p = log_density(x)
            p = np.exp(log_p) * (scale.spread * np.cosh(at)).prod(1)
            terms = p[:, None] * np.concatenate(
                [np.ones((len(x), 1)), scale.statistics(x, log_p)], axis=1
            )
            terms = terms.reshape(len(lo), len(weights), -1)
            sums.append(np.einsum("mqj,q->mj", terms, weights) * volume[:, None])
        return sums[0], np.abs(sums[0][:, 0] - sums[1][:, 0])

    edges = [_edges(t[:, d], intervals, tails, limit) for d in range(dim)]
    lo = np.stack([g.ravel() for g in np.meshgrid(*[e[:-1] for e in edges], indexing="ij")], 1)
    hi = np.stack([g.ravel() for g in np.meshgrid(*[e[1:] for e in edges], indexing="ij")], 1)
    places = [
        np.clip(np.searchsorted(e, t[:, d], "right") - 1, 0, len(e) - 2)
        for d, e in enumerate(edges)
    ]
    owner = np.ravel_multi_index(places, [len(e) - 1 for e in edges])
    cells = _Cells(lo, hi, *integrate(lo, hi), np.bincount(owner, minlength=len(lo)))
    used = len(lo) * cost
    while used < evaluations and cells.error.sum() > tolerance / 2:
        # Where samples lie and the rule saw nothing, the rule has missed a narrow peak.
        expected = cells.inside / n
        missed = np.abs(cells.sums[:, 0] - expected) - 5 * np.sqrt(cells.inside + 1) / n
        urgency = np.maximum(cells.error, missed)
        most = min(_MAX_CELLS, max(1, (evaluations - used) // (cost * 2**dim)))
        rank = np.argsort(-urgency)
        share = np.cumsum(urgency[rank]) / urgency.sum()
        chosen = rank[: min(most, 1 + int(np.searchsorted(share, 0.8)))]
        lo, hi, count = _split(cells, chosen, t)
        used += len(lo) * cost
        rest = np.ones(len(cells.lo), bool)
        rest[chosen] = False
        cells = cells.keep(rest).join(_Cells(lo, hi, *integrate(lo, hi), count))
        if not np.isfinite(cells.sums[:, 0]).all():
            break
    total = cells.sums.sum(0)
    error = float(cells.error.sum())
    means = total[1:] / total[0]
    return Integral(float(total[0]), error, means, np.full_like(means, error), 1.0, used)


def _rule(order: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (Q, D) and weights (Q,) of the product Gauss–Legendre rule on [−1, 1]^D."""
    node, weight = np.polynomial.legendre.leggauss(order)
    nodes = np.stack([g.ravel() for g in np.meshgrid(*[node] * dim, indexing="ij")], 1)
    weights = np.stack([g.ravel() for g in np.meshgrid(*[weight] * dim, indexing="ij")], 1)
    return nodes, weights.prod(1)


def _edges(t: np.ndarray, intervals: int, tails: int, limit: float) -> np.ndarray:
    """Edges of one axis: quantiles of the samples, then equal steps to the end of the reach.

    One more edge stands just outside each extreme, for a density that ends with a jump there.
    """
    if not len(t):
        return np.linspace(-limit, limit, 2 * tails + intervals + 1)
    t = np.sort(t)
    k = min(10, len(t) - 1)
    first, last = 2 * t[0] - t[k], 2 * t[-1] - t[-1 - k]
    inner = np.quantile(t, np.linspace(0, 1, intervals + 1))
    left = np.linspace(-limit, first, tails + 1)
    right = np.linspace(last, limit, tails + 1)
    edges = np.unique(np.clip(np.concatenate([left, inner, right]), -limit, limit))
    return edges[np.concatenate([[True], np.diff(edges) > 1e-9])]


def _split(cells: _Cells, chosen: np.ndarray, t: np.ndarray):
    """Halve cells along every axis, and count the samples in the children."""
    dim = t.shape[1]
    lo, hi = cells.lo[chosen], cells.hi[chosen]
    middle = (lo + hi) / 2
    los, his, counts = [], [], []
    inside = [
        t[((t >= a) & (t < b)).all(1)] if c else t[:0]
        for a, b, c in zip(lo, hi, cells.inside[chosen], strict=True)
    ]
    for corner in range(2**dim):
        upper = np.array([(corner >> d) & 1 for d in range(dim)], bool)
        los.append(np.where(upper, middle, lo))
        his.append(np.where(upper, hi, middle))
        counts.append(
            [int(((s >= m) == upper).all(1).sum()) for s, m in zip(inside, middle, strict=True)]
        )
    return np.concatenate(los), np.concatenate(his), np.concatenate(counts).astype(int)


class Proposal(NamedTuple):
    """A mixture of multivariate Student-t laws, each x = μ_k + L_k e with e of density t_ν.

    Attributes:
        weights: ``(K,)``, summing to one.
        means: ``(K, D)``.
        factors: Lower triangular ``(K, D, D)``.
        df: Degrees of freedom ν of each, ``(K,)``; infinity is the normal law.
    """

    weights: np.ndarray
    means: np.ndarray
    factors: np.ndarray
    df: np.ndarray

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draws (n, D)."""
        dim = self.means.shape[1]
        which = np.sort(rng.choice(len(self.weights), n, p=self.weights))
        e = rng.standard_normal((n, dim))
        df = self.df[which]
        heavy = np.isfinite(df)
        e[heavy] *= np.sqrt(df[heavy] / rng.chisquare(df[heavy]))[:, None]
        x = np.empty_like(e)
        for k in np.unique(which):
            mine = which == k
            x[mine] = self.means[k] + e[mine] @ self.factors[k].T
        return rng.permutation(x)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """The log-density (n,)."""
        dim = self.means.shape[1]
        total = np.full(len(x), -np.inf)
        for weight, mean, factor, df in zip(*self, strict=True):
            inverse = np.linalg.inv(factor)
            square = (((x - mean) @ inverse.T) ** 2).sum(1)
            height = math.log(weight) - np.log(np.abs(np.diagonal(factor))).sum()
            if math.isfinite(df):
                height += math.lgamma((df + dim) / 2) - math.lgamma(df / 2)
                height -= dim / 2 * math.log(df * math.pi)
                term = height - (df + dim) / 2 * np.log1p(square / df)
            else:
                term = height - dim / 2 * math.log(2 * math.pi) - square / 2
            total = np.logaddexp(total, term)
        return total


def widened(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> Proposal:
    """A Gaussian mixture made defensive: covariances grown, and a tenth of it heavy-tailed.

    The growth 1 + √(2/D) keeps the variance of the weights near e − 1 in every dimension if the
    mixture is the target itself.
    """
    count, dim = means.shape
    factors = np.linalg.cholesky(covariances * (1 + math.sqrt(2 / dim)))
    return Proposal(
        np.concatenate([0.9 * weights, 0.1 * weights]),
        np.concatenate([means, means]),
        np.concatenate([factors, 1.5 * factors]),
        np.concatenate([np.full(count, np.inf), np.full(count, 3.0)]),
    )


def fitted(samples: np.ndarray) -> Proposal:
    """One widened Gaussian with the mean and covariance of samples."""
    covariance = np.atleast_2d(np.cov(samples.T)) + 1e-9 * np.eye(samples.shape[1])
    return widened(np.ones(1), samples.mean(0)[None], covariance[None])


def kernels(rng: np.random.Generator, samples: np.ndarray, count: int = 400) -> Proposal:
    """Student-t kernels at some samples, each with the covariance of its neighbours.

    It follows thin and bent densities of few dimensions; a tenth is one wide Gaussian.
    """
    from scipy.spatial import KDTree

    n, dim = samples.shape
    count = min(count, n)
    neighbours = min(n, 3 * dim + 10)
    centres = samples[rng.choice(n, count, replace=False)]
    spread = Scale.of(samples).spread
    _, index = KDTree(samples / spread).query(centres / spread, neighbours)
    near = samples[index.reshape(count, neighbours)]
    moved = near - centres[:, None]
    covariances = 2 * np.einsum("kni,knj->kij", moved, moved) / neighbours
    tiny = 1e-10 * np.einsum("kii->k", covariances) / dim + 1e-300
    factors = np.linalg.cholesky(covariances + tiny[:, None, None] * np.eye(dim))
    wide = fitted(samples)
    return Proposal(
        np.concatenate([np.full(count, 0.9 / count), 0.1 * wide.weights]),
        np.concatenate([centres, wide.means]),
        np.concatenate([factors, wide.factors]),
        np.concatenate([np.full(count, 4.0), wide.df]),
    )


def importance(
    target: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
    proposal: Proposal,
    scale: Scale,
    rng: np.random.Generator,
    n: int,
) -> Integral:
    """Estimate ∫ p by E_q[p / q].

    Args:
        target: Maps draws of the proposal (m, D) to the points x they stand for (m, D), ln p(x),
            and ln |det ∂x/∂draw| (zeros when the draws are the points).
        proposal: The law q of the draws.
        scale: Scale of the points, for the statistics.
        rng: Source of randomness.
        n: Number of draws.
    """
    draws = proposal.draw(rng, n)
    x, log_p, log_det = target(draws)
    log_w = log_p + log_det - proposal.log_density(draws)
    # A draw carried to infinity has no density; a NaN stays one and spoils the estimate.
    log_w = np.where(np.isinf(x).any(1) | (log_p == -np.inf), -np.inf, log_w)
    with np.errstate(over="ignore"):
        w = np.exp(log_w)
    total = w.sum()
    phi = scale.statistics(np.where(np.isfinite(x), x, 0), log_p)
    means = (w[:, None] * phi).sum(0) / total if total > 0 else np.full(phi.shape[1], np.nan)
    spread = np.sqrt(((w[:, None] * (phi - means)) ** 2).sum(0)) / total if total > 0 else means
    effective = float(total**2 / (w**2).sum() / n) if total > 0 else 0.0
    return Integral(
        float(w.mean()), float(w.std(ddof=1) / math.sqrt(n)), means, spread, effective, n
    )


def on_manifold(
    space: AbstractSpace,
    log_density: LogDensity,
    scale: Scale,
    rng: np.random.Generator,
    *,
    repetitions: int = 16,
    log2_points: int = 11,
) -> Integral:
    """Integrate a density over a compact manifold by scrambled Sobol points.

    Args:
        space: The manifold.
        log_density: Of flat points, with respect to the measure of `space`.
        scale: Scale of the points, for the statistics.
        rng: Source of randomness.
        repetitions: How many independent scramblings, whose spread gives the errors.
        log2_points: The logarithm of the number of points in each.
    """
    from scipy.special import ndtri
    from scipy.stats import qmc

    values, squares, sums = [], [], []
    for _ in range(repetitions):
        cube = qmc.Sobol(space.noise, rng=rng).random_base2(log2_points)
        noise = ndtri(np.clip(cube, 1e-10, 1 - 1e-10)).T
        points = np.moveaxis(np.asarray(space.place(jnp.asarray(noise)), np.float64), -1, 0)
        x = points.reshape((len(points), -1))
        log_p = log_density(x)
        w = np.exp(log_p + space.log_volume)
        values.append(w.mean())
        squares.append((w * w).mean())
        sums.append((w[:, None] * scale.statistics(x, log_p)).mean(0))
    value, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(repetitions)
    ratios = np.stack(sums) / np.where(np.array(values) > 0, values, np.nan)[:, None]
    spread = ratios.std(0, ddof=1) / math.sqrt(repetitions)
    count = repetitions * 2**log2_points
    means = np.sum(sums, 0) / np.sum(values)
    effective = float(value**2 / np.mean(squares)) if value > 0 else 0.0
    return Integral(float(value), float(error), means, spread, effective, count)
