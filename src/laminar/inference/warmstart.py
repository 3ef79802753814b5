"""Gaussian approximations found by optimisation: where a flow begins, and what it must not miss.

From dispersed starts, L-BFGS climbs the log density; along each climb normal laws are made from the
curvature at several points, and the one with the highest bound on the evidence is kept (the idea of
Pathfinder, Zhang et al. 2022, with exact Hessians in place of the estimates of L-BFGS; the last
point gives Laplace's approximation). The kept ones serve twice: the best is the flow's first shape,
and all of them are places that the finished approximation is tried at.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax

from laminar._typing import Array, PRNGKeyArray

_STEPS = 200
_MARKS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Points of a climb at which the curvature is taken, as fractions of its length."""
_POLISHING = 12
_DRAWS = 64
_MOST_DENSE = 400
_PROBES = 32
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


def find_gaussians(
    key: PRNGKeyArray, log_density: Callable[[Array], Array], starts: Array
) -> Gaussians:
    """The best normal law along the climb from each start, best first, near-equal ones left out.

    Args:
        key: Draws the noise under which all candidates are compared.
        log_density: Of one vector ``(D,)``; it must hash, as compiled programs are kept by it.
        starts: ``(S, D)``.

    Returns:
        At least one law: where no candidate has a finite bound, the standard normal at the start
        of the highest density.
    """
    noise_key, probe_key = jr.split(key)
    points = _climb(log_density, starts)
    if starts.shape[1] <= _MOST_DENSE:
        tops = _polish(log_density, points[:, -1])
        points = jnp.concatenate([points, tops[:, None]], axis=1)
    means, factors = _candidates(log_density, points, probe_key)
    noise = jnp.asarray(_even_noise(noise_key, starts.shape[1]), starts.dtype)
    elbos = _bounds(log_density, means, factors, noise)
    means, factors, elbos = (np.asarray(a, np.float64) for a in (means, factors, elbos))
    count = len(starts)
    elbos = elbos.reshape(count, -1)
    best = np.argmax(np.where(np.isnan(elbos), -np.inf, elbos), 1)
    rows = np.arange(count)
    means = means.reshape(count, -1, means.shape[-1])[rows, best]
    factors = factors.reshape(count, elbos.shape[1], *factors.shape[1:])[rows, best]
    return _distinct(Gaussians(means, factors, elbos[rows, best]))


def _even_noise(key: PRNGKeyArray, dim: int) -> np.ndarray:
    """Standard normal draws of mean zero and, as far as they suffice, of unit covariance exactly.

    The bound of a law for a normal target is then exact, so that chance does not choose the law.
    """
    half = np.asarray(jr.normal(key, (_DRAWS // 2, dim)), np.float64)
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


def _safe(log_density: Callable[[Array], Array]):
    """The negative log density with a high plateau in place of what is not finite."""

    def value(z):
        log_p = log_density(z)
        ceiling = float(np.sqrt(np.finfo(np.dtype(log_p.dtype)).max))
        sound = jnp.isfinite(log_p)
        return jnp.where(sound, -jnp.where(sound, log_p, 0), ceiling)

    def value_and_grad(z):
        height, slope = jax.value_and_grad(value)(z)
        return height, jnp.where(jnp.isfinite(slope), slope, 0)

    return value, value_and_grad


@jax.jit(static_argnums=0)
def _climb(log_density: Callable[[Array], Array], starts: Array) -> Array:
    """Points of the climbs from all starts, ``(S, marks, D)``."""
    value, value_and_grad = _safe(log_density)
    optimiser = optax.lbfgs(
        memory_size=10, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=15)
    )

    def climb(start):
        def step(carry):
            i, z, state, trail, _ = carry
            height, slope = value_and_grad(z)
            updates, state = optimiser.update(
                slope, state, z, value=height, grad=slope, value_fn=value
            )
            move = cast(Array, updates)
            new = z + jnp.where(jnp.isfinite(move), move, 0)
            moved = jnp.abs(new - z).max() > 1e-4 * (1 + jnp.abs(z).max())
            return i + 1, new, state, trail.at[i].set(new), moved

        def unfinished(carry):
            return (carry[0] < _STEPS) & carry[-1]

        trail = jnp.zeros((_STEPS, *start.shape), start.dtype)
        first = (jnp.zeros((), jnp.int32), start, optimiser.init(start), trail, jnp.asarray(True))
        count, _, _, trail, _ = lax.while_loop(unfinished, step, first)
        marks = jnp.asarray(_MARKS, jnp.float32) * count.astype(jnp.float32)
        return trail[jnp.clip(jnp.ceil(marks).astype(jnp.int32) - 1, 0, _STEPS - 1)]

    # Optax mixes dtypes, which a user's strict settings may forbid.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.vmap(climb)(starts)


@jax.jit(static_argnums=0)
def _candidates(
    log_density: Callable[[Array], Array], points: Array, key: PRNGKeyArray
) -> tuple[Array, Array]:
    """Normal laws with the curvature at points ``(S, M, D)``, centred there and a Newton step on.

    Returns:
        Means ``(2·S·M, D)`` and factors, the two of one point beside each other.
    """
    value, value_and_grad = _safe(log_density)
    dim = points.shape[-1]

    def dense(z):
        axes, width = _shape(value, z)
        newton = z - _newton(axes, width, value_and_grad(z)[1])
        # The factor R of the covariance A diag(w²) Aᵀ = Rᵀ R is triangular.
        upper = jnp.linalg.qr((axes * width[None]).T, mode="r")
        lower = upper.T * jnp.sign(jnp.diagonal(upper))[None]
        return jnp.stack([z, newton]), jnp.stack([lower, lower])

    def diagonal(z):
        slope = value_and_grad(z)[1]
        signs = jr.rademacher(key, (_PROBES, dim), z.dtype)

        forward = _allows_forward(jax.grad(value), z)
        step = jnp.cbrt(jnp.finfo(z.dtype).eps).astype(z.dtype)

        def product(v):
            if forward:
                return v * jax.jvp(jax.grad(value), (z,), (v,))[1]
            ahead, behind = (jax.grad(value)(z + sign * step * v) for sign in (1, -1))
            return v * (ahead - behind) / (2 * step)

        curvature = lax.map(product, signs).mean(0)
        width = _width(jnp.where(jnp.isfinite(curvature), curvature, 0))
        return jnp.stack([z, z - width**2 * slope]), jnp.stack([width, width])

    law = dense if dim <= _MOST_DENSE else diagonal
    means, factors = lax.map(law, points.reshape(-1, dim))
    return means.reshape(-1, dim), factors.reshape(-1, *factors.shape[2:])


def _shape(value: Callable[[Array], Array], z: Array) -> tuple[Array, Array]:
    """Principal axes at a point, in columns, and the standard deviations along them.

    A saddle is as wide as it is steep, and nothing is flat.
    """
    slope = jax.grad(value)
    if _allows_forward(slope, z):
        hessian = jax.jacfwd(slope)(z)
    else:
        # Central differences: what defines its own reverse mode, as an ODE's adjoint, has no other.
        step = jnp.cbrt(jnp.finfo(z.dtype).eps).astype(z.dtype) * (1 + jnp.abs(z))
        away = jnp.diag(step)
        ahead, behind = jax.vmap(slope)(z[None] + away), jax.vmap(slope)(z[None] - away)
        hessian = (ahead - behind) / (2 * step[:, None])
    hessian = jnp.where(jnp.isfinite(hessian), hessian, 0)
    curvature, axes = jnp.linalg.eigh(0.5 * (hessian + hessian.T))
    return axes, _width(curvature)


def _allows_forward(function: Callable[[Array], Array], z: Array) -> bool:
    try:
        jax.eval_shape(jax.jacfwd(function), z)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        return False
    return True


def _newton(axes: Array, width: Array, slope: Array) -> Array:
    return axes @ (width**2 * (axes.T @ slope))


@jax.jit(static_argnums=0)
def _polish(log_density: Callable[[Array], Array], points: Array) -> Array:
    """Points ``(S, D)`` a few Newton steps farther down, each as long as serves best.

    L-BFGS alone stops short where scales differ by many orders of magnitude.
    """
    value, value_and_grad = _safe(log_density)
    lengths = jnp.asarray([0.0, *(0.25**i for i in range(6))], points.dtype)

    def step(z, _):
        move = _newton(*_shape(value, z), value_and_grad(z)[1])
        tries = z[None] - lengths[:, None] * move[None]
        heights = jax.vmap(value)(tries)
        return tries[jnp.argmin(heights)], None

    return lax.map(lambda z: lax.scan(step, z, length=_POLISHING)[0], points)


def _width(curvature: Array) -> Array:
    """Standard deviations from curvatures, which may be negative or zero."""
    return lax.rsqrt(jnp.maximum(jnp.abs(curvature), _WIDEST**-2))


@jax.jit(static_argnums=0)
def _bounds(
    log_density: Callable[[Array], Array], means: Array, factors: Array, noise: Array
) -> Array:
    """The bound E[ln p − ln q] of each law, −∞ where a draw has no density or there is a NaN."""
    dim = means.shape[-1]
    entropy = 0.5 * dim * (1 + np.log(2 * np.pi))

    def bound(law):
        mean, factor = law
        if factor.ndim == 2:
            draws, diagonal = mean[None] + noise @ factor.T, jnp.diagonal(factor)
        else:
            draws, diagonal = mean[None] + noise * factor[None], factor
        log_p = jax.vmap(log_density)(draws)
        elbo = log_p.mean() + jnp.log(jnp.abs(diagonal)).sum() + entropy
        return jnp.where(jnp.isfinite(elbo), elbo, -jnp.inf)

    return lax.map(bound, (means, factors))
