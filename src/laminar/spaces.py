"""Manifolds that events may lie on, and the measures that densities and log-dets refer to there.

A transform names the space of either side and a distribution that of its events; None, which is
what everything names that has never heard of manifolds, is Lebesgue measure on the coordinates.
A circle or torus in angles is such a case: its measure is that of the box [−π, π)^D.

Points of the other spaces are kept in embedding coordinates, which have more numbers than the
space has dimensions. The log-det of a map f with the Jacobian J is then ½ ln det (J T)ᵀ(J T) for an
orthonormal basis T of the tangent space, up to the constants of the two measures.
"""

import abc
import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from laminar._typing import Array, Shape

TOLERANCE = 1e-3
"""How far a point may stand off its manifold and count as rounded."""
_FAR = 1e6  # nothing beyond is near a manifold, and no square of it overflows
_NONE = 1e-12  # squared length of a vector that has no direction


@dataclasses.dataclass(frozen=True)
class AbstractSpace(abc.ABC):
    """A compact manifold in embedding coordinates, with a measure."""

    @property
    @abc.abstractmethod
    def shape(self) -> Shape:
        """Shape of one point."""

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """The manifold's dimension, less than the number of coordinates."""

    @property
    @abc.abstractmethod
    def log_volume(self) -> float:
        """The logarithm of the whole measure."""

    @property
    @abc.abstractmethod
    def log_unit(self) -> float:
        """The logarithm of the measure relative to the surface measure of the embedding."""

    @property
    @abc.abstractmethod
    def noise(self) -> int:
        """How many standard normal numbers `place` turns into one point."""

    @abc.abstractmethod
    def place(self, noise: Array) -> Array:
        """Uniform points ``shape + batch`` from normal numbers ``(noise, *batch)``."""

    @abc.abstractmethod
    def project(self, x: Array) -> Array:
        """A point of the manifold for any ``shape + batch``: the point itself if it is on it."""

    @abc.abstractmethod
    def tangents(self, points: np.ndarray) -> np.ndarray:
        """Orthonormal bases ``(m, size, dim)`` of the tangent spaces at flat points."""

    def clamp(self, x: Array) -> tuple[Array, Array]:
        """The points on the manifold for any ``shape + batch``, and which were off it, ``batch``.

        NaN stays NaN and is not off.
        """
        axes = tuple(range(len(self.shape)))
        on = jnp.where(jnp.any(jnp.isnan(x), axes, keepdims=True), jnp.nan, self.project(x))
        return on, jnp.sum(jnp.square(x - on), axes) > TOLERANCE**2


@dataclasses.dataclass(frozen=True)
class Sphere(AbstractSpace):
    """The sphere S^n of unit vectors in ℝ^{n+1}, with its surface measure.

    Args:
        n: Dimension; the circle, as unit vectors of the plane, is n = 1.
    """

    n: int

    @property
    def shape(self) -> Shape:
        """``(n + 1,)``."""
        return (self.n + 1,)

    @property
    def dim(self) -> int:
        """The n."""
        return self.n

    @property
    def log_volume(self) -> float:
        """The logarithm of 2 π^{(n+1)/2} / Γ((n+1)/2)."""
        half = 0.5 * (self.n + 1)
        return math.log(2) + half * math.log(math.pi) - math.lgamma(half)

    @property
    def log_unit(self) -> float:
        """Zero."""
        return 0.0

    @property
    def noise(self) -> int:
        """The n + 1."""
        return self.n + 1

    def place(self, noise: Array) -> Array:
        """Normal vectors at length one."""
        return self.project(noise)

    def project(self, x: Array) -> Array:
        """The vector at length one; one without a direction gives the first axis."""
        return unit(x)

    def tangents(self, points: np.ndarray) -> np.ndarray:
        """Completions of the points to orthonormal bases."""
        return np.linalg.qr(points[..., None], mode="complete")[0][..., 1:]


@dataclasses.dataclass(frozen=True)
class Simplex(AbstractSpace):
    """Vectors of positive parts that sum to one, with Lebesgue measure on all parts but the last.

    That is the measure of the usual Dirichlet density, 1/√D of the surface measure in ℝ^D. The
    boundary, where a part is zero, is off the manifold.

    Args:
        parts: D.
    """

    parts: int

    @property
    def shape(self) -> Shape:
        """``(D,)``."""
        return (self.parts,)

    @property
    def dim(self) -> int:
        """The D − 1."""
        return self.parts - 1

    @property
    def log_volume(self) -> float:
        """The logarithm of 1 / (D − 1)!."""
        return -math.lgamma(self.parts)

    @property
    def log_unit(self) -> float:
        """The −½ ln D."""
        return -0.5 * math.log(self.parts)

    @property
    def noise(self) -> int:
        """Two for each part."""
        return 2 * self.parts

    def place(self, noise: Array) -> Array:
        """Exponential numbers, half the squared lengths of normal pairs, divided by their sum."""
        square = noise * noise
        return self.project(square[: self.parts] + square[self.parts :])

    def project(self, x: Array) -> Array:
        """The positive parts divided by their sum."""
        x = jnp.clip(x, least(x.dtype), _FAR)
        total = jnp.sum(x, 0)[None]
        none = total < _NONE
        return jnp.where(none, 1 / self.parts, x / jnp.where(none, 1, total))

    def clamp(self, x: Array) -> tuple[Array, Array]:
        """See `AbstractSpace.clamp`: here by the sum; a part below `least` is off too."""
        on, _ = super().clamp(x)
        off = jnp.abs(jnp.sum(x, 0) - 1) > TOLERANCE
        return on, off | jnp.any(x < least(x.dtype), 0)

    def tangents(self, points: np.ndarray) -> np.ndarray:
        """One basis of the vectors that sum to zero."""
        basis = np.linalg.qr(np.ones((self.parts, 1)), mode="complete")[0][:, 1:]
        return np.broadcast_to(basis, (len(points), *basis.shape))


@dataclasses.dataclass(frozen=True)
class Rotations(AbstractSpace):
    """The rotations SO(3) as 3 × 3 matrices, with the Haar measure of total one."""

    @property
    def shape(self) -> Shape:
        """``(3, 3)``."""
        return (3, 3)

    @property
    def dim(self) -> int:
        """Three."""
        return 3

    @property
    def log_volume(self) -> float:
        """Zero."""
        return 0.0

    @property
    def log_unit(self) -> float:
        """Rotation vectors measure 8π², and each is √2 times as long in ℝ⁹."""
        return -math.log(8 * math.pi**2 * 2**1.5)

    @property
    def noise(self) -> int:
        """Four, for a quaternion."""
        return 4

    def place(self, noise: Array) -> Array:
        """The rotations of uniform unit quaternions."""
        return from_quaternion(unit(noise))

    def project(self, x: Array) -> Array:
        """The columns made orthonormal one after the other; the identity if they are degenerate."""
        x = jnp.clip(x, -_FAR, _FAR)
        first, second = x[:, 0], x[:, 1]
        across = second - jnp.sum(unit(first) * second, 0)[None] * unit(first)
        none = (jnp.sum(first * first, 0) < _NONE) | (jnp.sum(across * across, 0) < _NONE)
        eye = jnp.eye(3, dtype=x.dtype).reshape((3, 3) + (1,) * (x.ndim - 2))
        x = jnp.where(none[None, None], eye, x)
        first = unit(x[:, 0])
        second = unit(x[:, 1] - jnp.sum(first * x[:, 1], 0)[None] * first)
        return jnp.stack([first, second, jnp.cross(first, second, axis=0)], 1)

    def tangents(self, points: np.ndarray) -> np.ndarray:
        """The rotations at unit speed about the three axes."""
        turns = np.zeros((3, 3, 3))
        for k in range(3):
            i, j = (k + 1) % 3, (k + 2) % 3
            turns[k, i, j], turns[k, j, i] = -math.sqrt(0.5), math.sqrt(0.5)
        moved = np.einsum("kij,mjl->milk", turns, points.reshape((-1, 3, 3)))
        return moved.reshape((-1, 9, 3))


def least(dtype) -> float:
    """The smallest part of a simplex point; its reciprocals have room for sums."""
    return float(jnp.finfo(dtype).tiny) ** 0.8


def unit(x: Array) -> Array:
    """Vectors ``(D, *batch)`` at length one; the first axis where there is no direction."""
    largest = float(jnp.finfo(x.dtype).max) ** 0.75
    x = jnp.clip(x, -largest, largest)
    # Of length one or so, whose square is of use, and the same direction.
    x = x / lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x), 0), 1))[None]
    square = jnp.sum(x * x, 0)
    none = square < _NONE
    axis = (jnp.arange(x.shape[0]) == 0).astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.where(none[None], axis, x / jnp.sqrt(jnp.where(none, 1, square))[None])


def from_quaternion(q: Array) -> Array:
    """The rotation matrices ``(3, 3, *batch)`` of unit quaternions ``(4, *batch)``, w first.

    A quaternion and its negative give the same matrix.
    """
    w, x, y, z = q
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row) for row in rows])


def to_quaternion(r: Array) -> Array:
    """One of the two unit quaternions of rotation matrices ``(3, 3, *batch)``.

    The products 4 q_i q_j are sums of entries; their row with the largest q_i² is free of
    cancellation.
    """
    (a, b, c), (d, e, f), (g, h, i) = r
    rows = [
        jnp.stack([1 + a + e + i, h - f, c - g, d - b]),
        jnp.stack([h - f, 1 + a - e - i, b + d, c + g]),
        jnp.stack([c - g, b + d, 1 - a + e - i, f + h]),
        jnp.stack([d - b, c + g, f + h, 1 - a - e + i]),
    ]
    best, size = rows[0], rows[0][0]
    for k in (1, 2, 3):
        larger = rows[k][k] > size
        best = jnp.where(larger[None], rows[k], best)
        size = jnp.where(larger, rows[k][k], size)
    return unit(best)


def restrict(matrix: np.ndarray, space: AbstractSpace | None, points: np.ndarray) -> np.ndarray:
    """Square matrices with the |det| of Jacobians between tangent spaces, on the host in float64.

    Args:
        matrix: Jacobians ``(m, out, in)`` in coordinates.
        space: The space of the arguments.
        points: Where they were taken, flat, ``(m, in)``.

    Returns:
        ``(m, dim, dim)``: the matrices themselves where they are square and there is no space.
    """
    matrix = np.asarray(matrix, np.float64)
    if space is not None:
        matrix = matrix @ space.tangents(np.asarray(points, np.float64))
    if matrix.shape[1] == matrix.shape[2]:
        return matrix
    finite = np.isfinite(matrix).all((1, 2), keepdims=True)
    return np.where(finite, np.linalg.qr(np.where(finite, matrix, 0), mode="r"), np.nan)


def log_units(inner: AbstractSpace | None, outer: AbstractSpace | None) -> float:
    """What a map from one space to another adds to the log-det between surface measures."""
    units = [0.0 if space is None else space.log_unit for space in (inner, outer)]
    return units[1] - units[0]


def dimension(space: AbstractSpace | None, shape: Shape) -> int:
    """The dimension of a space, or of all arrays of a shape."""
    return math.prod(shape) if space is None else space.dim
