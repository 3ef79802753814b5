"""Gaussian approximations found by optimisation: where a flow begins, and what it must not miss.

From dispersed starts, L-BFGS climbs the log density; along each climb normal laws are made from the
curvature at several points, and the one with the highest bound on the evidence is kept (the idea of
Pathfinder, Zhang et al. 2022, with exact Hessians in place of the estimates of L-BFGS; the last
point gives Laplace's approximation). The kept ones serve twice: the best is the flow's first shape,
and all of them are places that the finished approximation is tried at.

All climbs go on side by side on the host, where linear algebra in double precision costs nothing to
compile; only the log density and its derivatives are compiled.
"""

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

_STEPS, _TRIES = 200, 300
_MEMORY = 10
_MARKS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Points of a climb at which the curvature is taken, as fractions of its length."""
_POLISHING = 12
_DRAWS = 64
_MOST_DENSE = 400
_WIDEST = 1e6
_APART = 3.0


class Gaussians(NamedTuple):
    """The normal laws of all starts, from the highest bound to the lowest.

    Attributes:
        means: ``(S, D)``.
        factors: Lower triangular factors of the covariances, ``(S, D, D)``; only their diagonals,
            ``(S, D)``, above 400 dimensions.
        elbos: Bounds on the log evidence, ``(S,)``.
    """

    means: np.ndarray
    factors: np.ndarray
    elbos: np.ndarray

    @property
    def dense(self) -> bool:
        """Whether the factors are matrices."""
        return self.factors.ndim == 3

    def one(self, index: int) -> "Gaussians":
        """The law of one start."""
        return Gaussians(*(part[index : index + 1] for part in self))

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
    """The best normal law along the climb from each start, best first, near-equal ones left out.

    Args:
        key: Draws the noise under which all candidates are compared.
        log_density: Of one vector ``(D,)``; it must hash, as compiled programs are kept by it.
        starts: ``(S, D)``, in the dtype in which the log density is evaluated.

    Returns:
        At least one law: where no candidate has a finite bound, the standard normal at the start
        of the highest density.
    """
    noise = generator(key)
    hill = _Hill(log_density, starts.dtype)
    count, dim = starts.shape
    points = _climb(hill, np.asarray(starts, np.float64))
    if dim <= _MOST_DENSE:
        points = np.concatenate([points, _polish(hill, points[:, -1])[:, None]], 1)
    means, factors = _candidates(hill, points.reshape(-1, dim), noise)
    elbos = _bounds(hill, means, factors, _even_noise(noise, dim)).reshape(count, -1)
    best = np.argmax(elbos, 1)
    rows = np.arange(count)
    means = means.reshape(count, -1, dim)[rows, best]
    factors = factors.reshape(count, elbos.shape[1], *factors.shape[1:])[rows, best]
    return _distinct(Gaussians(means, factors, elbos[rows, best]))


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
        return np.where(np.isfinite(height), -height, np.inf), np.where(
            np.isfinite(slope), -slope, 0
        )

    def axes(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Principal axes at points, in columns, and the standard deviations along them.

        A saddle is as wide as it is steep, and nothing is flat.
        """
        hessian = -curvatures(self.log_density, z, self.dtype)
        curvature, axes = np.linalg.eigh(np.where(np.isfinite(hessian), hessian, 0))
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
        useful = product > 1e-10 * np.sqrt(square * np.square(step).sum(1))
        rows, step, change = rows[useful], step[useful], change[useful]
        product, square = product[useful], square[useful]
        for memory, new in (
            (self.steps, step),
            (self.changes, change),
            (self.inverse, 1 / product),
        ):
            memory[:-1, rows] = memory[1:, rows]
            memory[-1, rows] = new
        self.scale[rows] = product / square

    def direction(self, slope: np.ndarray) -> np.ndarray:
        """The way down from slopes ``(S, D)``; the first step has length one at most."""
        left, weights = slope.copy(), np.zeros_like(self.inverse)
        for i in range(_MEMORY - 1, -1, -1):
            weights[i] = self.inverse[i] * (self.steps[i] * left).sum(1)
            left -= weights[i][:, None] * self.changes[i]
        short = 1 / np.maximum(1, np.linalg.norm(slope, axis=1))
        left *= np.where(self.scale > 0, self.scale, short)[:, None]
        for i in range(_MEMORY):
            back = self.inverse[i] * (self.changes[i] * left).sum(1)
            left += (weights[i] - back)[:, None] * self.steps[i]
        return -left


def _climb(hill: _Hill, starts: np.ndarray) -> np.ndarray:
    """Points of the climbs from all starts, ``(S, marks, D)``: L-BFGS with weak Wolfe steps.

    The length of a step is bracketed by halving and doubling (Lewis & Overton 2013), which asks
    nothing of the log density beyond a value.
    """
    count, dim = starts.shape
    z = starts.copy()
    height, slope = hill(z)
    memory, trails = _Memory(count, dim), [[row] for row in starts]
    way = memory.direction(slope)
    low, high, length = np.zeros(count), np.full(count, np.inf), np.ones(count)
    tries, alive = np.zeros(count, int), np.isfinite(height)
    rounding = 10 * np.finfo(hill.dtype).eps
    for _ in range(_TRIES):
        if not alive.any():
            break
        new = z + np.where(alive, length, 0)[:, None] * way
        new_height, new_slope = hill(new)
        fall = (slope * way).sum(1)
        lower = new_height <= height + 1e-4 * length * fall + rounding * np.abs(height)
        short = lower & ((new_slope * way).sum(1) < 0.9 * fall) & (tries < 12)
        tries += 1
        high, low = np.where(lower, high, length), np.where(short, length, low)
        length = np.where(np.isinf(high), 2 * length, 0.5 * (low + high))
        rows = np.flatnonzero(alive & lower & ~short)
        moved = new[rows] - z[rows]
        memory.add(rows, moved, new_slope[rows] - slope[rows])
        for row in rows:
            trails[row].append(new[row])
        far = np.abs(moved).max(1, initial=0) > 1e-4 * (1 + np.abs(z[rows]).max(1, initial=0))
        z[rows], height[rows], slope[rows] = new[rows], new_height[rows], new_slope[rows]
        way[rows] = memory.direction(slope)[rows]
        low[rows], high[rows], length[rows], tries[rows] = 0, np.inf, 1, 0
        alive[rows] = far & np.array([len(trails[row]) <= _STEPS for row in rows], bool)
        alive &= tries < 40
    return np.stack([_marked(trail) for trail in trails])


def _marked(trail: list[np.ndarray]) -> np.ndarray:
    """The marked points of one climb, the start left out where there is another."""
    steps = max(len(trail) - 1, 1)
    at = [min(int(np.ceil(mark * steps)), len(trail) - 1) for mark in _MARKS]
    return np.stack([trail[i] for i in at])


def _polish(hill: _Hill, points: np.ndarray) -> np.ndarray:
    """Points ``(S, D)`` a few Newton steps farther down, each as long as it leads down.

    L-BFGS alone stops short where scales differ by many orders of magnitude.
    """
    z = points.copy()
    height, slope = hill(z)
    alive = np.isfinite(height)
    for _ in range(_POLISHING):
        move = _newton(*hill.axes(z), slope)
        before, open_ = height.copy(), alive.copy()
        for length in 0.25 ** np.arange(6):
            new = z - length * move
            new_height, new_slope = hill(new)
            down = open_ & (new_height < height)
            z[down], height[down], slope[down] = new[down], new_height[down], new_slope[down]
            open_ &= ~down
            if not open_.any():
                break
        alive &= np.subtract(before, height, out=np.zeros(len(z)), where=alive) > 1e-6
        if not alive.any():
            break
    return z


def _candidates(
    hill: _Hill, points: np.ndarray, noise: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Normal laws with the curvature at points ``(N, D)``, centred there and a Newton step on.

    Returns:
        Means ``(2·N, D)`` and factors, the two of one point beside each other.
    """
    slope = hill(points)[1]
    if points.shape[1] <= _MOST_DENSE:
        axes, width = hill.axes(points)
        newton = points - _newton(axes, width, slope)
        # The factor R of the covariance A diag(w²) Aᵀ = Rᵀ R is triangular.
        upper = np.linalg.qr(width[:, :, None] * np.swapaxes(axes, 1, 2), mode="r")
        signs = np.sign(np.diagonal(upper, axis1=1, axis2=2))
        factors = np.swapaxes(upper, 1, 2) * signs[:, None]
    else:
        curvature = -diagonal_curvatures(hill.log_density, points, hill.dtype, noise)
        factors = _width(np.where(np.isfinite(curvature), curvature, 0))
        newton = points - factors**2 * slope
    means = np.stack([points, newton], 1)
    return means.reshape(-1, points.shape[1]), np.repeat(factors, 2, 0)


def _bounds(hill: _Hill, means: np.ndarray, factors: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The bound E[ln p − ln q] of each law, −∞ where a draw has no density or there is a NaN."""
    laws = Gaussians(means, factors, np.zeros(len(means)))
    log_p = log_densities(
        hill.log_density, laws.draw(noise).reshape(-1, noise.shape[1]), hill.dtype
    )
    elbos = (log_p.reshape(len(means), -1) - laws.log_prob(noise)).mean(1)
    return np.where(np.isfinite(elbos), elbos, -np.inf)


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


def _distinct(found: Gaussians) -> Gaussians:
    """The laws by falling bound, without those whose mean lies within a better one."""
    order = np.argsort(-np.where(np.isfinite(found.elbos), found.elbos, -np.inf), kind="stable")
    kept: list[int] = []
    for i in order:
        if kept and not np.isfinite(found.elbos[i]):
            continue
        if all(_distance(found, i, j) > _APART for j in kept):
            kept.append(int(i))
    return Gaussians(*(part[kept] for part in found))


def _distance(found: Gaussians, i: int, j: int) -> float:
    """How far apart the means of two laws are, in standard deviations of the narrower one."""
    apart = found.means[i] - found.means[j]

    def scaled(k: int) -> np.ndarray:
        factor = found.factors[k]
        return np.linalg.solve(factor, apart) if found.dense else apart / factor

    return float(max(np.linalg.norm(scaled(i)), np.linalg.norm(scaled(j))))
