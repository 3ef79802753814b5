"""Bijections of spheres, and what all bijections on manifolds share.

Points of a sphere are unit vectors, and log-dets refer to its surface measure (`laminar.spaces`).
Whatever is within rounding of the manifold is first put on it; what is further off has a log-det of
−inf.
"""

import abc
import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from laminar._checks import check_sizes
from laminar._errors import InputError, ShapeError
from laminar._params import clip, expand, positive
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections import linear, orthogonal
from laminar.bijections.base import AbstractBijection, AbstractTransform, Invert, call
from laminar.bijections.compose import Permute
from laminar.bijections.frames import AbstractSameShape, AbstractUnconditional
from laminar.spaces import AbstractSpace, Sphere, unit

_LINEAR = (
    linear.Triangular,
    linear.LU,
    linear.Householder,
    linear.LowRank,
    orthogonal.SVD,
    orthogonal.QR,
    orthogonal.Cayley,
    orthogonal.MatrixExponential,
    Permute,
)
_LONGEST = 0.7
"""Bound on the steps d of an exponential map, and on the second derivatives of its potential. Those
of half the squared distance are at least d cot d ≥ 0.83, so no Jacobian is singular."""
_MOST_STEPS = 60
_AT_POLE = 1e-24  # squared distance from an axis below which the angle about it means nothing


class AbstractOnManifold(AbstractBijection):
    """A bijection with a manifold on at least one side.

    A subclass names the spaces and writes `_forward` and `_inverse` for points on the manifold;
    this class puts points there and marks those that were off it.
    """

    batch_last: ClassVar[bool] = True

    @abc.abstractmethod
    def _forward(self, x: Array, condition: Array | None) -> tuple[Array, Array]:
        """The image of points on the manifold, and the log-det."""

    @abc.abstractmethod
    def _inverse(self, y: Array, condition: Array | None) -> tuple[Array, Array]:
        """The latents of points on the manifold, and the log-det."""

    def _run(self, fn: Callable, space: AbstractSpace | None, x, condition):
        if space is None:
            return fn(x, condition)
        on, off = space.clamp(x)
        y, log_det = fn(on, condition)
        return y, jnp.where(off, -jnp.inf, log_det)

    def forward(self, x, condition=None, *, key=None):
        """The image and its log-det; −inf off the manifold."""
        return self._run(self._forward, self.in_space, x, condition)

    def inverse(self, y, condition=None, *, key=None):
        """The latent and its log-det; −inf off the manifold."""
        return self._run(self._inverse, self.out_space, y, condition)


class AbstractWithin(AbstractSameShape, AbstractOnManifold):
    """A bijection of a manifold to itself."""

    @property
    @abc.abstractmethod
    def in_space(self) -> AbstractSpace:
        """The manifold."""

    @property
    def out_space(self) -> AbstractSpace:
        """The manifold."""
        return self.in_space

    @property
    def in_shape(self) -> Shape:
        """The shape of its points."""
        return self.in_space.shape


class AbstractOnSphere(AbstractWithin, AbstractUnconditional):
    """A bijection of the sphere S^n of unit vectors.

    For a condition take `laminar.bijections.amortized`.

    Attributes:
        n: Dimension of the sphere.
    """

    n: eqx.AbstractVar[int]

    @property
    def in_space(self):
        """The sphere."""
        return Sphere(self.n)


class SphereMoebius(AbstractOnSphere):
    r"""The Möbius map of S^n with the centre ω, |ω| < 1 (Rezende et al. 2020).

        y = (1 − |ω|²) / |x − ω|² (x − ω) − ω,    log_det = n ln((1 − |ω|²) / |x − ω|²)

    It draws the sphere away from ω, towards the opposite pole; the inverse is the map of −ω. With
    the raw vector r, ω = r / (1 + √(1 + |r|²)); zero gives the identity.

    Args:
        n: Dimension of the sphere.

    Raises:
        InputError: If n is not positive.
    """

    raw: Array
    n: int = eqx.field(static=True)
    batched_parameters: ClassVar[bool] = True

    def __init__(self, n: int):
        self.n = _check_dim("SphereMoebius", n)
        self.raw = jnp.zeros((n + 1,))

    def _forward(self, x, condition):
        y, log_stretch = moebius(expand(self.raw, x.ndim), x)
        return y, self.n * log_stretch

    def _inverse(self, y, condition):
        x, log_stretch = moebius(expand(-self.raw, y.ndim), y)
        return x, self.n * log_stretch


def moebius(raw: Array, x: Array) -> tuple[Array, Array]:
    """The image of unit vectors ``(D, *batch)``, and the logarithm of the conformal factor."""
    bottom = 1 + jnp.sqrt(1 + jnp.sum(raw * raw, 0))
    omega, gap = raw / bottom[None], 2 / bottom  # the gap is 1 − |ω|²
    away = x - omega
    stretch = gap / jnp.sum(away * away, 0)
    return stretch[None] * away - omega, jnp.log(stretch)


class Projective(AbstractOnSphere):
    r"""A linear map of ℝ^{n+1} as a map of S^n.

        y = A x / |A x|,    log_det = ln |det A| − (n + 1) ln |A x|

    Orthogonal maps turn the sphere, which keeps the measure; others make the angular central
    Gaussian of uniform points (Tyler 1987). Opposite points have opposite images.

    Args:
        linear: A linear map of vectors of n + 1 entries without a shift, such as ``LU(n + 1,
            bias=False)`` or ``Cayley(n + 1)``, or a chain of some.

    Raises:
        ShapeError: If it is not one, or has a shift.
    """

    linear: AbstractTransform
    n: int = eqx.field(static=True)

    def __init__(self, linear: AbstractTransform):
        shape = linear.in_shape
        if len(shape) != 1 or shape[0] < 2 or not all(map(_is_linear, linear.steps())):
            raise ShapeError(
                f"Projective takes a linear map of vectors without a shift (bias=False), not "
                f"{linear.name} of {shape}."
            )
        self.linear, self.n = linear, shape[0] - 1

    def _apply(self, direction, x):
        y, log_det = call(self.linear, direction, x)
        length = jnp.sqrt(jnp.sum(y * y, 0))
        return y / length[None], log_det - (self.n + 1) * jnp.log(length)

    def _forward(self, x, condition):
        return self._apply("forward", x)

    def _inverse(self, y, condition):
        return self._apply("inverse", y)

    @property
    def name(self) -> str:
        """The class with the name of the linear map."""
        return f"Projective({self.linear.name})"


def bare(step: AbstractTransform) -> AbstractTransform:
    """A step without the `Invert` around it."""
    return bare(step.bijection) if isinstance(step, Invert) else step


def _is_linear(step: AbstractTransform) -> bool:
    inner = bare(step)
    return isinstance(inner, _LINEAR) and getattr(inner, "shift", None) is None


class ExponentialMap(AbstractOnSphere):
    r"""A step along the gradient of a potential on S^n (Sei 2013; Rezende et al. 2020).

        y = exp_x(∇φ(x)),    φ(x) = Σ_k α_k / β_k exp(β_k (xᵀμ_k − 1))

    with unit centres μ_k, β_k > 0 and Σ |α_k| < 0.7, so that no step is longer than that, no two
    points meet and the map is a bijection: it gathers points around centres of positive weight and
    drives them from the others. The log-det is that of the Jacobian, of n + 1 rows. ``inverse``
    is solved for by Newton's method to rounding; its derivatives, in both modes, are those of the
    implicit function. Weights start at zero, so the map starts as the identity.

    Args:
        n: Dimension of the sphere.
        components: Number of centres.
        symmetric: Whether the potential is the mean of that at x and at −x, so that opposite points
            have opposite images.
        key: Draws the centres.

    Raises:
        InputError: If a size is not positive.
    """

    centres: Array
    weights: Array
    sharpness: Array
    n: int = eqx.field(static=True)
    symmetric: bool = eqx.field(static=True)
    batch_last: ClassVar[bool] = False

    def __init__(self, n: int, components: int = 8, *, symmetric: bool = False, key: PRNGKeyArray):
        self.n, self.symmetric = _check_dim("ExponentialMap", n), symmetric
        check_sizes("ExponentialMap", components=components)
        self.centres = jr.normal(key, (n + 1, components))
        self.weights = jnp.zeros((components,))
        self.sharpness = jnp.zeros((components,))

    def row_cost(self, direction):
        """The Jacobian along every coordinate for every component."""
        return 4 * (self.n + 1) * (self.n + 1 + self.weights.shape[0])

    def _potential(self) -> tuple[Array, Array, Array]:
        """Centres ``(n + 1, K)``, α and β ``(K,)``."""
        count = self.weights.shape[0]
        alpha = _LONGEST * self.weights / jnp.sqrt(1 + count * jnp.sum(self.weights**2))
        return unit(self.centres), alpha, positive(self.sharpness)

    def _cone(self, potential: tuple[Array, Array, Array], x: Array) -> Array:
        """The map of one vector continued to all lengths, |x| f(x/|x|).

        Its Jacobian sends x to y and the tangent space at x to that at y, so its determinant is
        that between the tangent spaces.
        """
        centres, alpha, beta = potential
        length = jnp.sqrt(jnp.sum(x * x))
        x = x / length
        near = jnp.sum(centres * x[:, None], 0)
        pull = jnp.exp(beta * (near - 1))
        if self.symmetric:
            pull = 0.5 * (pull - jnp.exp(-beta * (near + 1)))
        slope = jnp.sum(centres * (alpha * pull)[None], 1)
        slope = slope - jnp.sum(slope * x) * x
        square = jnp.sum(slope * slope)
        short = square < 1e-4
        size = jnp.sqrt(jnp.where(short, 1, square))
        cos = jnp.where(short, 1 - square / 2 + square**2 / 24, jnp.cos(size))
        sinc = jnp.where(short, 1 - square / 6 + square**2 / 120, jnp.sin(size) / size)
        return length * (cos * x + sinc * slope)

    def _jacobian(self, potential, x):
        """The image, and the log-det there."""

        def both(x):
            y = self._cone(potential, x)
            return y, y

        matrix, y = jax.jacfwd(both, has_aux=True)(x)
        return y, jnp.linalg.slogdet(matrix)[1]

    def _forward(self, x, condition):
        return self._jacobian(self._potential(), x)

    def _inverse(self, y, condition):
        potential = self._potential()

        def residual(x):
            return self._cone(potential, x) - y

        x = lax.custom_root(residual, y, _newton, _solve_linear)
        return x, -self._jacobian(potential, x)[1]


def _solve_linear(product: Callable[[Array], Array], b: Array) -> Array:
    """Solve ``product(x) = b`` by the whole matrix."""
    return jnp.linalg.solve(jax.jacfwd(product)(jnp.zeros_like(b)), b)


def _newton(residual: Callable[[Array], Array], start: Array) -> Array:
    """Newton's method on the sphere, with shorter steps where a whole one does not help.

    The residual is homogeneous up to a constant, so that its root has length one by itself.
    """
    eps = float(jnp.finfo(start.dtype).eps)

    def unsettled(state):
        count, _, _, size, step = state
        return (count < _MOST_STEPS) & (size > (2 * eps) ** 2) & (step > 1e-4)

    def improve(state):
        count, x, value, size, step = state
        matrix = jax.jacfwd(residual)(x)
        tried = x - step * jnp.linalg.solve(matrix, value)
        tried = tried / jnp.sqrt(jnp.sum(tried * tried))
        new = residual(tried)
        new_size = jnp.sum(new * new)
        better = new_size < size
        return (
            count + 1,
            jnp.where(better, tried, x),
            jnp.where(better, new, value),
            jnp.where(better, new_size, size),
            jnp.where(better, jnp.minimum(4 * step, 1), step / 8),
        )

    value = residual(start)
    one = jnp.ones((), start.dtype)
    state = (jnp.zeros((), jnp.int32), start, value, jnp.sum(value * value), one)
    return lax.while_loop(unsettled, improve, state)[1]


class Cylindrical(AbstractOnManifold, AbstractUnconditional):
    r"""Heights and an angle as a point of S^n (Rezende et al. 2020, recursive flows).

        x_{n+1} = h_1,    x_n = r_1 h_2,    …,    (x_1, x_2) = r_{n−1} (cos θ, sin θ)

    with r_k = Π_{j ≤ k} √(1 − h_j²) and log_det = Σ_k ½ (n − 1 − k) ln(1 − h_k²), which is zero for
    S² (Archimedes). Between two of these, one inverted, any flow of n − 1 numbers in [−1, 1] and an
    angle in [−π, π) becomes one of the sphere. At the poles, where the angle has no meaning, its
    density may have a discontinuity: turn the sphere between layers (`Projective`).

    Args:
        n: Dimension of the sphere; events are ``(h_1, …, h_{n−1}, θ)``.

    Raises:
        InputError: If n is not positive.
    """

    n: int = eqx.field(static=True)

    def __check_init__(self):
        _check_dim("Cylindrical", self.n)

    @property
    def in_shape(self) -> Shape:
        """``(n,)``."""
        return (self.n,)

    @property
    def out_shape(self) -> Shape:
        """``(n + 1,)``."""
        return (self.n + 1,)

    @property
    def out_space(self):
        """The sphere."""
        return Sphere(self.n)

    def _log_det(self, log_squares: Array) -> Array:
        """Of ln(1 − h_k²), ``(n − 1, *batch)``."""
        powers = jnp.asarray(0.5 * (self.n - 2 - np.arange(self.n - 1)), log_squares.dtype)
        return jnp.sum(expand(powers, log_squares.ndim) * log_squares, 0)

    def _forward(self, x, condition):
        h, theta = clip(x[:-1], -1.0, 1.0), clip(x[-1], -math.pi, math.pi)
        off = jnp.any(jnp.abs(x[:-1]) > 1, 0) | (jnp.abs(x[-1]) > math.pi)
        square = jnp.maximum((1 - h) * (1 + h), float(jnp.finfo(x.dtype).tiny))
        radius = jnp.cumprod(jnp.sqrt(square), 0)
        before = jnp.concatenate([jnp.ones_like(x[:1]), radius])
        turn = jnp.stack([jnp.cos(theta), jnp.sin(theta)])
        y = jnp.concatenate([before[-1:] * turn, (before[:-1] * h)[::-1]])
        return y, jnp.where(off, -jnp.inf, self._log_det(jnp.log(square)))

    def _inverse(self, y, condition):
        squares = jnp.cumsum(y * y, 0)[1:]  # squared lengths of the first 2, 3, …, n + 1 entries
        none = squares < _AT_POLE
        squares = jnp.where(none, _AT_POLE, squares)
        h = clip(y[2:] / jnp.sqrt(squares[1:]), -1.0, 1.0)
        pole = none[:1]
        a, b = jnp.where(pole, 1, y[:1]), jnp.where(pole, 0, y[1:2])
        x = jnp.concatenate([h[::-1], clip(jnp.arctan2(b, a), -math.pi, math.pi)])
        return x, -self._log_det((jnp.log(squares[:-1]) - jnp.log(squares[1:]))[::-1])


def _check_dim(owner: str, n: int) -> int:
    if n < 1:
        raise InputError(f"{owner}: the dimension n must be at least 1, not {n}.")
    return n
