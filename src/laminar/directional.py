"""Distributions on manifolds: bases and targets of flows on spheres, simplices and rotations.

Densities refer to the measures that `laminar.spaces` states; points off the manifold have density
zero. A torus of angles takes ``Uniform(D, -math.pi, math.pi)``.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.core import Tracer
from jax.scipy.special import betaln, gammaln

from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, expand, positive, positive_inverse
from laminar._typing import Array, ArrayLike, Shape
from laminar.density import AbstractDistribution
from laminar.spaces import AbstractSpace, Simplex, Sphere, unit

_LOG_TWO_PI = math.log(2 * math.pi)


class UniformOn(AbstractDistribution):
    """The uniform law of a manifold.

        ln p(x) = −ln (the whole measure)

    That is zero for rotations, whose measure is one.

    Args:
        space: A space of `laminar.spaces`: ``Sphere(n)``, ``Simplex(parts)`` or ``Rotations()``.
    """

    on: AbstractSpace = eqx.field(static=True)
    height: Frozen[Array]
    cond_shape: None = eqx.field(static=True)

    def __init__(self, space: AbstractSpace):
        self.on, self.cond_shape = space, None
        self.height = Frozen(jnp.asarray(-space.log_volume, float))

    @property
    def shape(self) -> Shape:
        """Shape of one point."""
        return self.on.shape

    @property
    def space(self):
        """The manifold."""
        return self.on

    def _log_prob(self, x, condition=None, *, key=None):
        on, off = self.on.clamp(x)
        level = jnp.where(off, -jnp.inf, self.height.value)
        missing = jnp.any(jnp.isnan(on), tuple(range(len(self.shape))))
        return jnp.where(missing, jnp.nan, level)

    def _sample(self, key, batch=(), condition=None):
        return self.on.place(jr.normal(key, (self.on.noise, *batch), self.dtype))


class VonMisesFisher(AbstractDistribution):
    r"""The von Mises–Fisher law of the sphere S² (Fisher 1953).

        ln p(x) = −½ κ |x − μ|² − ln 2π − ln((1 − e^{−2κ}) / κ)

    Draws invert the distribution function of μᵀx, so they are exact and differentiable in both
    parameters. For other spheres see `PowerSpherical`.

    Args:
        mean: The mean direction μ, ``(3,)``, at any length but zero.
        concentration: κ > 0.

    Raises:
        InputError: If the mean has no direction or κ is not positive.
        ShapeError: If the mean has another shape.
    """

    direction: Array
    raw_concentration: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, concentration: ArrayLike = 1.0):
        self.direction, kappa = _checked("VonMisesFisher", mean, concentration)
        if self.direction.shape != (3,):
            raise ShapeError(
                f"VonMisesFisher: the mean must be a vector (3,), not {self.direction.shape}; "
                "PowerSpherical takes any."
            )
        self.raw_concentration = positive_inverse(kappa)
        self.shape, self.cond_shape = (3,), None

    @property
    def concentration(self) -> Array:
        """The κ."""
        return positive(self.raw_concentration)

    @property
    def space(self):
        """The sphere."""
        return Sphere(2)

    def _log_prob(self, x, condition=None, *, key=None):
        on, off = Sphere(2).clamp(x)
        kappa, square = self.concentration, _square_distance(self.direction, on)
        constant = _LOG_TWO_PI + jnp.log(-jnp.expm1(-2 * kappa) / kappa)
        return jnp.where(off, -jnp.inf, -0.5 * kappa * square - constant)

    def _sample(self, key, batch=(), condition=None):
        height_key, turn_key = jr.split(key)
        kappa, u = self.concentration, jr.uniform(height_key, batch, self.dtype)
        # Twice the share of the way from μ to its opposite; zero at u = 0.
        depth = -jnp.log1p(u * jnp.expm1(-2 * kappa)) / kappa
        return _around(self.direction, 0.5 * depth, jr.normal(turn_key, (3, *batch), self.dtype))


class PowerSpherical(AbstractDistribution):
    r"""The power spherical law of S^n (De Cao & Aziz 2020), close to the von Mises–Fisher law.

        ln p(x) = κ ln(1 − ¼ |x − μ|²) − 2 β ln 2 − β ln π − ln B(α, β) + ln Γ(β)

    with β = n/2 and α = β + κ, which is κ ln(1 + μᵀx) up to a constant. Draws are exact, from a
    Beta variable, and differentiable in both parameters.

    Args:
        mean: The mean direction μ, ``(n + 1,)``, at any length but zero.
        concentration: κ > 0.

    Raises:
        InputError: If the mean has no direction or κ is not positive.
        ShapeError: If the mean is not a vector of at least two entries.
    """

    direction: Array
    raw_concentration: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, concentration: ArrayLike = 1.0):
        self.direction, kappa = _checked("PowerSpherical", mean, concentration)
        self.raw_concentration = positive_inverse(kappa)
        self.shape, self.cond_shape = self.direction.shape, None

    @property
    def concentration(self) -> Array:
        """The κ."""
        return positive(self.raw_concentration)

    @property
    def space(self):
        """The sphere."""
        return Sphere(self.shape[0] - 1)

    def _log_prob(self, x, condition=None, *, key=None):
        on, off = self.space.clamp(x)
        kappa, beta = self.concentration, 0.5 * (self.shape[0] - 1)
        alpha = kappa + beta
        constant = beta * math.log(4 * math.pi) - math.lgamma(beta)
        constant = constant + betaln(alpha, jnp.asarray(beta, alpha.dtype))
        quarter = 0.25 * _square_distance(self.direction, on)
        quarter = jnp.minimum(quarter, 1 - float(jnp.finfo(on.dtype).eps))
        return jnp.where(off, -jnp.inf, kappa * jnp.log1p(-quarter) - constant)

    def _sample(self, key, batch=(), condition=None):
        height_key, turn_key = jr.split(key)
        beta = jnp.asarray(0.5 * (self.shape[0] - 1), self.dtype)
        share = jr.beta(height_key, beta, beta + self.concentration, batch, self.dtype)
        noise = jr.normal(turn_key, (*self.shape, *batch), self.dtype)
        return _around(self.direction, share, noise)


class Dirichlet(AbstractDistribution):
    r"""The Dirichlet law of vectors of positive parts that sum to one.

        ln p(x) = Σ_i (α_i − 1) ln x_i + ln Γ(Σ α) − Σ_i ln Γ(α_i)

    Args:
        concentration: α, ``(D,)``, positive; all one is the uniform law.

    Raises:
        InputError: If a concentration is not positive.
        ShapeError: If it is not a vector of at least two entries.
    """

    raw_concentration: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, concentration: ArrayLike):
        alpha = jnp.asarray(concentration, float)
        if alpha.ndim != 1 or alpha.shape[0] < 2:
            raise ShapeError(
                f"Dirichlet: the concentration must be a vector of at least 2, not {alpha.shape}."
            )
        if not isinstance(alpha, Tracer) and not bool((alpha > 0).all()):
            raise InputError("Dirichlet: every concentration must be greater than zero.")
        self.raw_concentration = positive_inverse(alpha)
        self.shape, self.cond_shape = alpha.shape, None

    @property
    def concentration(self) -> Array:
        """The α, ``(D,)``."""
        return positive(self.raw_concentration)

    @property
    def space(self):
        """The simplex."""
        return Simplex(self.shape[0])

    def _log_prob(self, x, condition=None, *, key=None):
        on, off = self.space.clamp(x)
        alpha = self.concentration
        constant = gammaln(jnp.sum(alpha)) - jnp.sum(gammaln(alpha))
        terms = (expand(alpha, on.ndim) - 1) * jnp.log(on)
        return jnp.where(off, -jnp.inf, jnp.sum(terms, 0) + constant)

    def _sample(self, key, batch=(), condition=None):
        alpha = jnp.broadcast_to(self.concentration, (*batch, *self.shape))
        share = jax.nn.softmax(jr.loggamma(key, alpha, dtype=self.dtype), -1)
        return self.space.project(jnp.moveaxis(share, -1, 0))


def _square_distance(direction: Array, x: Array) -> Array:
    """Squared distances of unit vectors ``(D, *batch)`` from a direction ``(D,)``.

    Twice one minus the cosine, with the digits that the difference would lose.
    """
    return jnp.sum(jnp.square(x - expand(unit(direction), x.ndim)), 0)


def _around(direction: Array, share: Array, noise: Array) -> Array:
    """Unit vectors at a share of the diameter below μ, in a direction across it taken from noise.

    Their cosines are 1 − 2 share, and the sines 2 √(share (1 − share)).
    """
    mean = expand(unit(direction), noise.ndim)
    across = unit(noise - jnp.sum(mean * noise, 0)[None] * mean)
    tiny = float(jnp.finfo(share.dtype).tiny)
    sine = 2 * jnp.sqrt(jnp.maximum(share * (1 - share), tiny))
    return unit((1 - 2 * share)[None] * mean + sine[None] * across)


def _checked(owner: str, mean: ArrayLike, concentration: ArrayLike) -> tuple[Array, Array]:
    """Both as floats, the concentration a scalar."""
    mean, kappa = jnp.asarray(mean, float), jnp.asarray(concentration, float)
    if mean.ndim != 1 or mean.shape[0] < 2 or kappa.shape != ():
        raise ShapeError(
            f"{owner}: the mean must be a vector of at least 2 and the concentration a number, not "
            f"{mean.shape} and {kappa.shape}."
        )
    if not isinstance(mean, Tracer) and not bool(jnp.sum(mean * mean) > 1e-12):
        raise InputError(f"{owner}: the mean has no direction.")
    if not isinstance(kappa, Tracer) and not bool(kappa > 0):
        raise InputError(f"{owner}: the concentration must be greater than zero.")
    return mean, kappa
