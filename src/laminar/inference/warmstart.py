"""Gaussian approximations found by optimisation: where a flow begins, and what it must not miss.

From dispersed starts, L-BFGS climbs the log density; along each climb normal laws are made from the
curvature at several points, and the one with the highest bound on the evidence is kept (the idea of
Pathfinder, Zhang et al. 2022, with exact Hessians in place of the estimates of L-BFGS; the last
point gives Laplace's approximation). The kept ones serve twice: the best is the flow's first shape,
and all of them are places that the finished approximation is tried at.

All climbs go on side by side on the host, where linear algebra in double precision costs nothing to
compile; only the log density and its derivatives are compiled.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._typing import PRNGKeyArray
from laminar.inference.evaluate import (
    LogDensity,
    curvatures,
    diagonal_curvatures,
    log_densities,
    slopes,
)

MOST_DENSE = 400
"""Dimensions up to which covariances are whole matrices."""

_STEPS, _TRIES = 200, 300
_MEMORY = 10
_MARKS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Points of a climb at which the curvature is taken, as fractions of its length."""
_MARKS_OF_MANY = (0.2, 1.0)
_POLISHING = 12
_DRAWS = 64
_MOST_MARKED = 100
_WIDEST = 1e6
_APART, _SCALED = 3.0, 5.0
_HUGE, _TINY = 1e100, 1e-200
_NEGLIGIBLE, _CONSIDERABLE = 20.0, 5.0
"""Nats below the best law at which another holds nothing, even if its mass is underestimated; and
at which a further law of the same climb surely holds something."""


class Gaussians(NamedTuple):
    """Distinct normal laws, from the highest bound to the lowest.

    Attributes:
        means: ``(S, D)``.
        factors: Lower triangular factors of the covariances, ``(S, D, D)``; only their diagonals,
            ``(S, D)``, above 400 dimensions.
        elbos: Bounds on the log evidence, ``(S,)``.
        climbs: How many climbs began where there is a density.
        lawless: How many of them ended where no normal law has a bound.
    """

    means: np.ndarray
    factors: np.ndarray
    elbos: np.ndarray
    climbs: int = 1
    lawless: int = 0

    @property
    def dense(self) -> bool:
        """Whether the factors are matrices."""
        return self.factors.ndim == 3

    def one(self, index: int) -> "Gaussians":
        """The law of one start."""
        at = slice(index, index + 1)
        return self._replace(means=self.means[at], factors=self.factors[at], elbos=self.elbos[at])

    def draw(self, noise: np.ndarray) -> np.ndarray:
        """Draws ``(S, N, D)`` from standard normal noise ``(N, D)``."""
        if self.dense:
            return self.means[:, None] + np.einsum("sij,nj->sni", self.factors, noise)
        return self.means[:, None] + self.factors[:, None] * noise

    def log_prob(self, noise: np.ndarray) -> np.ndarray:
        """The log density ``(S, N)`` of each law at its draws from that noise."""
        diagonal = np.diagonal(self.factors, axis1=1, axis2=2) if self.dense else self.factors
        norm = np.log(np.abs(diagonal)).sum(1) + 0.5 * noise.shape[1] * np.log(2 * np.pi)
        return -0.5 * np.square(noise).sum(1)[None] - norm[:, None]


def find_gaussians(key: PRNGKeyArray, log_density: LogDensity, starts: Any) -> Gaussians:
    """The best normal laws along the climbs from all starts, best first, near-equal ones left out.

    Of each climb the best one, and all others that hold a considerable part of the mass: a narrow
    mode may stand in the middle of a wide one.

    Args:
        key: Draws the noise under which all candidates are compared.
        log_density: Of one vector ``(D,)``; it must hash, as compiled programs are kept by it.
        starts: ``(S, D)``, in the dtype in which the log density is evaluated.

    Returns:
        At least one law. Laws that hold a negligible part of the mass are left out. Where no
        bound is finite, it is the unit normal about the highest point that was reached.
    """
    noise = generator(key)
    hill = _Hill(log_density, starts.dtype)
    starts = np.asarray(starts, np.float64)
    dim = starts.shape[1]
    owners, points = _points(hill, starts)
    means, spreads = _candidates(hill, points, noise)
    elbos, masses = _bounds(hill, means, spreads, _even_noise(noise, dim))
    heights = hill(points)[0]
    climbed = np.unique(owners[np.isfinite(heights)])
    which = np.argmax(elbos, 1)
    rows = np.arange(len(points))
    elbo, mass = elbos[rows, which], masses[rows, which]
    best = [max(np.flatnonzero(owners == owner), key=lambda i: elbo[i]) for owner in climbed]
    best = [i for i in best if np.isfinite(elbo[i])]
    if not best:
        top = points[np.argmin(heights)][None]
        unit = np.eye(dim)[None] if dim <= MOST_DENSE else np.ones((1, dim))
        return Gaussians(top, unit, np.full(1, -np.inf), len(climbed), len(climbed))
    lawless = len(climbed) - len(best)
    more = np.flatnonzero(elbo > elbo[best].max() - _CONSIDERABLE)
    best = np.unique([*best, *more])
    which = which[best]
    spread = spreads[best, which]
    factors = _triangular(spread) if dim <= MOST_DENSE else spread
    found = Gaussians(means[best, which], factors, elbo[best], len(climbed), lawless)
    return _distinct(found, mass[best] > mass[best].max() - _NEGLIGIBLE)


def generator(key: PRNGKeyArray) -> np.random.Generator:
    """NumPy's generator of the same randomness, for noise that nothing need be compiled for."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.random.default_rng(np.asarray(jr.key_data(key) if typed else key))


class _Hill(NamedTuple):
    """The log density upside down, a high plateau where it is not finite."""

    log_density: LogDensity
    dtype: Any

    def __call__(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights ``(N,)`` and slopes ``(N, D)``."""
        height, slope = slopes(self.log_density, z, self.dtype)
        # Products of what is larger than this would overflow.
        sound = (np.abs(height) < _HUGE) & (np.abs(slope) < _HUGE).all(1)
        return np.where(sound, -height, np.inf), np.where(sound[:, None], -slope, 0)

    def axes(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Principal axes at points, in columns, and the standard deviations along them.

        A saddle is as wide as it is steep, and nothing is flat.
        """
        hessian = -curvatures(self.log_density, z, self.dtype)
        curvature, axes = np.linalg.eigh(np.where(np.abs(hessian) < _HUGE, hessian, 0))
        return axes, _width(curvature)


def _width(curvature: np.ndarray) -> np.ndarray:
    """Standard deviations from curvatures, which may be negative or zero."""
    return 1 / np.sqrt(np.maximum(np.abs(curvature), _WIDEST**-2))


def _newton(axes: np.ndarray, width: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Steps (A diag(w²) Aᵀ) g of all points."""
    return np.einsum("nij,nj->ni", axes, width**2 * np.einsum("nij,ni->nj", axes, slope))


class _Memory:
    """The last steps of each climb and the changes of slope over them, for L-BFGS."""

    def __init__(self, count: int, dim: int):
        self.steps = np.zeros((_MEMORY, count, dim))
        self.changes = np.zeros((_MEMORY, count, dim))
        self.inverse = np.zeros((_MEMORY, count))
        self.scale = np.zeros(count)

    def add(self, rows: np.ndarray, step: np.ndarray, change: np.ndarray) -> None:
        """Remember the steps of some climbs, except where the slope did not rise along them."""
        product = (step * change).sum(1)
        square = np.square(change).sum(1)
        # Zero and tiny products, whose inverse may overflow, are left out too.
        useful = product > 1e-10 * np.sqrt(square * np.square(step).sum(1)) + _TINY
        rows, step, change = rows[useful], step[useful], change[useful]
        product, square = product[useful], square[useful]
        kept = (self.steps, step), (self.changes, change), (self.inverse, 1 / product)
        for memory, new in kept:
            memory[:-1, rows] = memory[1:, rows]
            memory[-1, rows] = new
        self.scale[rows] = product / square

    def direction(self, rows: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """The way down from slopes ``(R, D)``; the first step has length one at most."""
        steps, changes, inverse = (x[:, rows] for x in (self.steps, self.changes, self.inverse))
        left, weights = slope.copy(), np.zeros_like(inverse)
        for i in range(_MEMORY - 1, -1, -1):
            weights[i] = inverse[i] * (steps[i] * left).sum(1)
            left -= weights[i][:, None] * changes[i]
        short = 1 / np.maximum(1, np.linalg.norm(slope, axis=1))
        scale = self.scale[rows]
        left *= np.where(scale > 0, scale, short)[:, None]
        for i in range(_MEMORY):
            back = inverse[i] * (changes[i] * left).sum(1)
            left += (weights[i] - back)[:, None] * steps[i]
        way = -left
        # What has overflowed, or does not lead down, begins anew with the slope.
        down = np.isfinite(way).all(1) & ((way * slope).sum(1) < 0)
        return np.where(down[:, None], way, -slope * short[:, None])


def _points(hill: _Hill, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points at which normal laws are made, ``(N, D)``, and the numbers of their climbs."""
    trails = _climb(hill, starts)
    dense, marks = starts.shape[1] <= MOST_DENSE, _MARKS
    if dense and starts.shape[1] > _MOST_MARKED:
        marks = _MARKS_OF_MANY
    marked = [_marked(trail, marks) for trail in trails]
    ends = np.stack([trail[-1] for trail in trails])
    if dense:
        marked = [[*row, top] for row, top in zip(marked, _polish(hill, ends), strict=True)]
    owners = np.repeat(np.arange(len(marked)), [len(row) for row in marked])
    return owners, np.concatenate([np.stack(row) for row in marked])


def _marked(trail: list[np.ndarray], marks: tuple[float, ...]) -> list[np.ndarray]:
    """The marked points of one climb, each once, the start left out where there is another."""
    last = len(trail) - 1
    return [trail[i] for i in sorted({min(math.ceil(mark * last), last) for mark in marks})]


def _climb(hill: _Hill, starts: np.ndarray) -> list[list[np.ndarray]]:
    """The points of the climbs from all starts: L-BFGS with weak Wolfe steps.

    The length of a step is bracketed by halving and doubling (Lewis & Overton 2013), which asks
    nothing of the log density beyond a value.
    """
    count, dim = starts.shape
    z = starts.copy()
    height, slope = hill(z)
    memory, trails = _Memory(count, dim), [[row] for row in starts]
    way = memory.direction(np.arange(count), slope)
    low, high, length = np.zeros(count), np.full(count, np.inf), np.ones(count)
    tries = np.zeros(count, int)
    on = np.flatnonzero(np.isfinite(height))
    rounding = 10 * np.finfo(hill.dtype).eps
    for _ in range(_TRIES):
        if not len(on):
            break
        new = z[on] + length[on, None] * way[on]
        new_height, new_slope = hill(new)
        fall = (slope[on] * way[on]).sum(1)
        lower = new_height <= height[on] + 1e-4 * length[on] * fall + rounding * np.abs(height[on])
        short = lower & ((new_slope * way[on]).sum(1) < 0.9 * fall) & (tries[on] < 12)
        tries[on] += 1
        high[on] = np.where(lower, high[on], length[on])
        low[on] = np.where(short, length[on], low[on])
        length[on] = np.where(np.isinf(high[on]), 2 * length[on], 0.5 * (low[on] + high[on]))
        taken = lower & ~short
        rows, new = on[taken], new[taken]
        moved = new - z[rows]
        memory.add(rows, moved, new_slope[taken] - slope[rows])
        for row, point in zip(rows, new, strict=True):
            trails[row].append(point)
        still = np.abs(moved).max(1) <= 1e-4 * (1 + np.abs(z[rows]).max(1))
        done = rows[still | np.array([len(trails[row]) > _STEPS for row in rows], bool)]
        z[rows], height[rows], slope[rows] = new, new_height[taken], new_slope[taken]
        way[rows] = memory.direction(rows, slope[rows])
        low[rows], high[rows], length[rows], tries[rows] = 0, np.inf, 1, 0
        on = np.setdiff1d(on[tries[on] < 40], done)
    return trails


def _polish(hill: _Hill, points: np.ndarray) -> np.ndarray:
    """Points ``(S, D)`` a few Newton steps farther down, each as long as it leads down.

    L-BFGS alone stops short where scales differ by many orders of magnitude.
    """
    z = points.copy()
    height, slope = hill(z)
    on = np.flatnonzero(np.isfinite(height))
    for _ in range(_POLISHING):
        if not len(on):
            break
        before, begun = height[on].copy(), z[on].copy()
        move = _newton(*hill.axes(begun), slope[on])
        left = np.arange(len(on))
        for length in 0.25 ** np.arange(6):
            new = begun[left] - length * move[left]
            new_height, new_slope = hill(new)
            down = new_height < before[left]
            rows = on[left[down]]
            z[rows], height[rows], slope[rows] = new[down], new_height[down], new_slope[down]
            left = left[~down]
            if not len(left):
                break
        on = on[before - height[on] > 1e-6]
    return z


def _candidates(
    hill: _Hill, points: np.ndarray, noise: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Normal laws with the curvature at points ``(N, D)``, centred there and a Newton step on.

    Those that stay are no wider than the length over which the slope changes the density by a
    factor e: at an edge, where a climb ends on a slope, curvature alone tells nothing.

    Returns:
        Means ``(N, 2, D)``, and what takes standard normal noise to the spread of each: matrices
        ``(N, 2, D, D)``, or deviations ``(N, 2, D)`` in many dimensions.
    """
    slope = hill(points)[1]
    if points.shape[1] <= MOST_DENSE:
        axes, width = hill.axes(points)
        along = np.einsum("nij,ni->nj", axes, slope)
        newton = points - _newton(axes, width, slope)
        spreads = axes[:, None] * np.stack([_tempered(width, along), width], 1)[:, :, None]
    else:
        curvature = -diagonal_curvatures(hill.log_density, points, hill.dtype, noise)
        width = _width(np.where(np.abs(curvature) < _HUGE, curvature, 0))
        newton = points - width**2 * slope
        spreads = np.stack([_tempered(width, slope), width], 1)
    return np.stack([points, newton], 1), spreads


def _tempered(width: np.ndarray, slope: np.ndarray) -> np.ndarray:
    return 1 / np.maximum(1 / width, np.abs(slope))


def _triangular(spreads: np.ndarray) -> np.ndarray:
    """The lower triangular factors, with positive diagonals, of covariances S Sᵀ."""
    upper = np.linalg.qr(np.swapaxes(spreads, 1, 2), mode="r")
    signs = np.where(np.diagonal(upper, axis1=1, axis2=2) < 0, -1, 1)
    return np.swapaxes(upper, 1, 2) * signs[:, None]


def _bounds(
    hill: _Hill, means: np.ndarray, spreads: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What is held by each law, ``(N, 2)`` and ``(N, 2)``.

    Returns:
        The bound E[ln p − ln q] of q cut to where p is a density, which is the mean over the draws
        there plus the logarithm of their share; and the mass by importance sampling.
    """
    if spreads.ndim == 4:
        away = np.einsum("naij,kj->naki", spreads, noise)
        log_scales = np.linalg.slogdet(spreads)[1]
    else:
        away, log_scales = spreads[:, :, None] * noise, np.log(spreads).sum(2)
    count, (draws, dim) = len(means), noise.shape
    z = (means[:, :, None] + away).reshape(-1, dim)
    log_p = log_densities(hill.log_density, z, hill.dtype).reshape(count, 2, draws)
    alive = np.isfinite(log_p)
    norm = log_scales[:, :, None] + 0.5 * dim * np.log(2 * np.pi)
    ratios = np.where(alive, log_p, -np.inf) + 0.5 * np.square(noise).sum(1) + norm
    kept = alive.sum(2)
    with np.errstate(divide="ignore"):
        share = np.log(kept / draws)
    bounds = np.where(alive, ratios, 0).sum(2) / np.maximum(kept, 1) + share
    return bounds, np.logaddexp.reduce(ratios, 2) - math.log(draws)


def _even_noise(noise: np.random.Generator, dim: int) -> np.ndarray:
    """Standard normal draws of mean zero and, as far as they suffice, of unit covariance exactly.

    The bound of a law for a normal target is then exact, so that chance does not choose the law.
    """
    half = noise.standard_normal((_DRAWS // 2, dim))
    if dim <= _DRAWS // 4:
        half = np.linalg.solve(np.linalg.cholesky(half.T @ half / len(half)), half.T).T
    else:
        half = half / np.sqrt(np.mean(half**2, 0, keepdims=True))
    return np.concatenate([half, -half])


def _distinct(found: Gaussians, worth: np.ndarray) -> Gaussians:
    """The laws worth keeping, by falling bound, that are not like better ones."""
    order = np.argsort(-np.where(np.isfinite(found.elbos), found.elbos, -np.inf), kind="stable")
    kept: list[int] = []
    for i in order:
        if not worth[i] or (kept and not np.isfinite(found.elbos[i])):
            continue
        if not any(_alike(found, i, j) for j in kept):
            kept.append(int(i))
    return found._replace(
        means=found.means[kept], factors=found.factors[kept], elbos=found.elbos[kept]
    )


def _alike(found: Gaussians, i: int, j: int) -> bool:
    """Whether means are near by the measure of the narrower law, and widths within a factor."""
    apart = found.means[i] - found.means[j]
    own, other = found.factors[i], found.factors[j]
    if found.dense:
        # One solution for both: the other's axes, and the distance, in units of the own.
        solved = np.linalg.solve(own, np.column_stack([other, apart]))
        ratios = np.linalg.svd(solved[:, :-1], compute_uv=False)
        near = np.linalg.norm(solved[:, -1]), np.linalg.norm(np.linalg.solve(other, apart))
    else:
        ratios, near = other / own, (np.linalg.norm(apart / own), np.linalg.norm(apart / other))
    same = ratios.max() < _SCALED and ratios.min() > 1 / _SCALED
    return bool(same and max(near) <= _APART)
