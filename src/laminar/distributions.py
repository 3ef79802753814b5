"""The few distributions that flows need as bases and targets (NumPyro has the rest).

Scales are kept as their logarithms and other positive parameters through `_params.positive`, so
that every array is unconstrained. They are trained by default; wrap a base in `_params.Frozen` to
fix it.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import gammaln

from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, bounded, expand, positive, positive_inverse
from laminar._typing import Array, ArrayLike, Callable, Shape
from laminar.density import AbstractDistribution, Estimate, apply_net
from laminar.mixtures import GaussianMixture, IsotropicMixture, Mixture

__all__ = [
    "AbstractDistribution",
    "ConditionalNormal",
    "Estimate",
    "GaussianMixture",
    "IsotropicMixture",
    "Logistic",
    "Mixture",
    "MultivariateNormal",
    "Normal",
    "StudentT",
    "Uniform",
]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Normal(AbstractDistribution):
    """Independent normal entries: x_i ~ N(loc_i, scale_i²).

        ln p(x) = Σ_i [ −½ ((x_i − loc_i) / scale_i)² − ln scale_i − ½ ln 2π ]

    Args:
        shape: Event shape.
        loc: Means, broadcast to `shape`.
        scale: Standard deviations, positive, broadcast to `shape`.

    Raises:
        InputError: If a scale is not positive.
        ShapeError: If an argument does not broadcast to `shape`.
    """

    loc: Array
    log_scale: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, shape: Shape | int = (), loc: ArrayLike = 0.0, scale: ArrayLike = 1.0):
        self.shape = _as_shape(shape)
        self.loc, scale = _parameters("Normal", self.shape, loc=loc, scale=scale)
        self.log_scale = jnp.log(scale)
        self.cond_shape = None

    def _log_prob(self, x, condition=None, *, key=None):
        log_scale = expand(self.log_scale, x.ndim)
        z = (x - expand(self.loc, x.ndim)) * jnp.exp(-log_scale)
        return _sum(-0.5 * z * z - log_scale - _HALF_LOG_TWO_PI, self.shape)

    def _sample(self, key, batch=(), condition=None):
        noise = jr.normal(key, self.shape + batch, self.loc.dtype)
        return _place(noise, self.loc, self.log_scale)

    def _sample_and_log_prob(self, key, batch=(), condition=None):
        noise = jr.normal(key, self.shape + batch, self.loc.dtype)
        log_scale = expand(self.log_scale, noise.ndim)
        log_p = _sum(-0.5 * noise * noise - log_scale - _HALF_LOG_TWO_PI, self.shape)
        return _place(noise, self.loc, self.log_scale), log_p


class Uniform(AbstractDistribution):
    """Independent uniform entries on the closed intervals [lo_i, hi_i].

        ln p(x) = −Σ_i ln(hi_i − lo_i) inside, −∞ outside

    The edges are frozen: the likelihood always gains by narrowing the support until data fall out
    of it, so gradients cannot fit them.

    Args:
        shape: Event shape.
        lo: Lower edges, broadcast to `shape`.
        hi: Upper edges, above the lower ones.

    Raises:
        InputError: If an upper edge is not above the lower one.
        ShapeError: If an argument does not broadcast to `shape`.
    """

    lo: Frozen[Array]
    hi: Frozen[Array]
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, shape: Shape | int = (), lo: ArrayLike = 0.0, hi: ArrayLike = 1.0):
        self.shape = _as_shape(shape)
        lo, hi = _parameters("Uniform", self.shape, lo=lo, hi=hi)
        if not isinstance(hi - lo, Tracer) and not bool((hi > lo).all()):
            raise InputError("Uniform: every hi must be above its lo.")
        self.lo, self.hi = Frozen(lo), Frozen(hi)
        self.cond_shape = None

    def _log_prob(self, x, condition=None, *, key=None):
        lo, hi = expand(self.lo.value, x.ndim), expand(self.hi.value, x.ndim)
        log_p = jnp.where((x < lo) | (x > hi), -jnp.inf, -jnp.log(hi - lo))
        return _sum(jnp.where(jnp.isnan(x), jnp.nan, log_p), self.shape)

    def _sample(self, key, batch=(), condition=None):
        lo, hi = self.lo.value, self.hi.value
        noise = jr.uniform(key, self.shape + batch, lo.dtype)
        return expand(lo, noise.ndim) + expand(hi - lo, noise.ndim) * noise


class Logistic(AbstractDistribution):
    """Independent logistic entries, the law whose distribution function is the sigmoid.

        ln p(x) = Σ_i [ −z_i − 2 ln(1 + e^{−z_i}) − ln scale_i ],   z = (x − loc) / scale

    Args:
        shape: Event shape.
        loc: Centres, broadcast to `shape`.
        scale: Scales, positive; the standard deviation is scale · π/√3.

    Raises:
        InputError: If a scale is not positive.
        ShapeError: If an argument does not broadcast to `shape`.
    """

    loc: Array
    log_scale: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, shape: Shape | int = (), loc: ArrayLike = 0.0, scale: ArrayLike = 1.0):
        self.shape = _as_shape(shape)
        self.loc, scale = _parameters("Logistic", self.shape, loc=loc, scale=scale)
        self.log_scale = jnp.log(scale)
        self.cond_shape = None

    def _log_prob(self, x, condition=None, *, key=None):
        log_scale = expand(self.log_scale, x.ndim)
        z = (x - expand(self.loc, x.ndim)) * jnp.exp(-log_scale)
        return _sum(jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z) - log_scale, self.shape)

    def _sample(self, key, batch=(), condition=None):
        noise = jr.logistic(key, self.shape + batch, self.loc.dtype)
        return _place(noise, self.loc, self.log_scale)


class StudentT(AbstractDistribution):
    """Independent Student-t entries with learnable degrees of freedom ν, for heavy tails.

        ln p(x) = Σ_i [ −½(ν_i + 1) ln(1 + z_i²/ν_i) − ln B(½, ν_i/2) − ½ ln ν_i − ln scale_i ]

    with z = (x − loc) / scale. Draws are √(ν (U^{−2/ν} − 1)) cos(2πV) of two uniforms, exact at any
    ν and differentiable in it (Bailey 1994).

    Args:
        shape: Event shape.
        df: Degrees of freedom ν, positive, broadcast to `shape`.
        loc: Centres.
        scale: Scales, positive.

    Raises:
        InputError: If a scale or df is not positive.
        ShapeError: If an argument does not broadcast to `shape`.
    """

    loc: Array
    log_scale: Array
    raw_df: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(
        self,
        shape: Shape | int = (),
        df: ArrayLike = 5.0,
        loc: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
    ):
        self.shape = _as_shape(shape)
        df, self.loc, scale = _parameters("StudentT", self.shape, df=df, loc=loc, scale=scale)
        self.raw_df = positive_inverse(df)
        self.log_scale = jnp.log(scale)
        self.cond_shape = None

    @property
    def df(self) -> Array:
        """The degrees of freedom, of the event's shape."""
        return positive(self.raw_df)

    def _log_prob(self, x, condition=None, *, key=None):
        log_scale = expand(self.log_scale, x.ndim)
        df = expand(self.df, x.ndim)
        z = (x - expand(self.loc, x.ndim)) * jnp.exp(-log_scale)
        constant = _log_gamma_step(0.5 * df) - _HALF_LOG_TWO_PI - log_scale
        return _sum(constant - 0.5 * (df + 1) * _log1p_square(z / jnp.sqrt(df)), self.shape)

    def _sample(self, key, batch=(), condition=None):
        radius_key, angle_key = jr.split(key)
        shape, dtype = self.shape + batch, self.loc.dtype
        df = expand(self.df, len(shape))
        # The root has no derivative at zero, which the exponential reaches when its uniform does.
        energy = jnp.maximum(jr.exponential(radius_key, shape, dtype), jnp.finfo(dtype).tiny)
        angle = 2 * math.pi * jr.uniform(angle_key, shape, dtype)
        radius = jnp.exp(energy / df) * jnp.sqrt(-df * jnp.expm1(-2 * energy / df))
        return _place(radius * jnp.cos(angle), self.loc, self.log_scale)


class MultivariateNormal(AbstractDistribution):
    """The normal law on vectors with a full covariance Σ = L Lᵀ.

        ln p(x) = −½ ‖L⁻¹(x − μ)‖² − Σ_i ln L_ii − ½ D ln 2π

    Args:
        loc: Mean μ, ``(D,)``.
        covariance: Σ, ``(D, D)``, symmetric and positive definite; the identity by default.

    Raises:
        InputError: If the covariance is not positive definite.
        ShapeError: If the shapes do not fit.
    """

    loc: Array
    log_diagonal: Array
    lower: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, loc: ArrayLike, covariance: ArrayLike | None = None):
        shape = np.shape(loc)
        if len(shape) != 1:
            raise ShapeError(f"MultivariateNormal: loc must be a vector, and has shape {shape}.")
        (self.loc,) = _parameters("MultivariateNormal", shape, loc=loc)
        dim = shape[0]
        if covariance is None:
            covariance = jnp.eye(dim, dtype=self.loc.dtype)
        if np.shape(covariance) != (dim, dim):
            raise ShapeError(
                f"MultivariateNormal: covariance has shape {np.shape(covariance)}, but loc of "
                f"shape {shape} needs {(dim, dim)}."
            )
        factor = _cholesky(covariance, self.loc.dtype)
        self.log_diagonal = jnp.log(jnp.diagonal(factor))
        self.lower = jnp.tril(factor, -1)
        self.shape, self.cond_shape = shape, None

    @property
    def cholesky(self) -> Array:
        """The lower triangular factor L, ``(D, D)``."""
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_diagonal))

    @property
    def covariance(self) -> Array:
        """The covariance Σ = L Lᵀ, ``(D, D)``."""
        return self.cholesky @ self.cholesky.T

    def _log_normaliser(self):
        return self.log_diagonal.sum() + self.shape[0] * _HALF_LOG_TWO_PI

    def _log_prob(self, x, condition=None, *, key=None):
        centred = (x - expand(self.loc, x.ndim)).reshape((self.shape[0], -1))
        z = solve_triangular(self.cholesky, centred, lower=True)
        return (-0.5 * (z * z).sum(0) - self._log_normaliser()).reshape(x.shape[1:])

    def _sample(self, key, batch=(), condition=None):
        return self._sample_and_log_prob(key, batch)[0]

    def _sample_and_log_prob(self, key, batch=(), condition=None):
        noise = jr.normal(key, self.shape + batch, self.loc.dtype)
        x = expand(self.loc, noise.ndim) + jnp.tensordot(self.cholesky, noise, 1)
        return x, -0.5 * (noise * noise).sum(0) - self._log_normaliser()


def _cholesky(covariance: ArrayLike, dtype: jnp.dtype) -> Array:
    """The Cholesky factor, computed in double precision on the host unless traced."""
    if isinstance(covariance, Tracer):
        return jnp.linalg.cholesky(covariance.astype(dtype))
    matrix = np.asarray(covariance, np.float64)
    if not np.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-6 * np.abs(matrix).max(initial=0.0)):
        raise InputError("MultivariateNormal: the covariance is not symmetric.")
    try:
        return jnp.asarray(np.linalg.cholesky(matrix), dtype)
    except np.linalg.LinAlgError as error:
        message = "MultivariateNormal: the covariance is not positive definite."
        raise InputError(message) from error


class ConditionalNormal(AbstractDistribution):
    """Independent normal entries whose mean and scale a network reads from the condition.

        x_i ~ N(m_i(c), exp(2 s_i(c))),   s = limit · tanh(raw / limit)

    Args:
        net: Maps one condition to ``(2, *shape)`` (means, then raw log-scales); any callable. With
            an attribute ``batch_last = True`` it takes trailing batch axes itself, otherwise it is
            mapped over them.
        shape: Event shape.
        cond_shape: Shape of one condition.
        limit: Bound on the absolute log-scale, so that no density can collapse.

    Raises:
        ShapeError: When the network gives another number of outputs.
    """

    net: Callable
    shape: Shape = eqx.field(static=True)
    cond_shape: Shape = eqx.field(static=True)
    limit: float = eqx.field(static=True)

    def __init__(
        self, net: Callable, shape: Shape | int, cond_shape: Shape | int, limit: float = 7.0
    ):
        self.net, self.limit = net, limit
        self.shape, self.cond_shape = _as_shape(shape), _as_shape(cond_shape)

    def _moments(self, condition, ndim):
        """Mean and log-scale with `ndim` axes each."""
        out = apply_net(self.net, condition, self.cond_shape)
        batch = condition.shape[len(self.cond_shape) :]
        if out.size != 2 * math.prod(self.shape + batch):
            raise ShapeError(
                f"ConditionalNormal: the network gives {out.shape}, but events of shape "
                f"{self.shape} and conditions {condition.shape} need {(2, *self.shape, *batch)}."
            )
        loc, raw = out.reshape((2, *self.shape, *batch))
        return expand(loc, ndim), bounded(expand(raw, ndim), self.limit)

    def _log_prob(self, x, condition=None, *, key=None):
        loc, log_scale = self._moments(condition, x.ndim)
        z = (x - loc) * jnp.exp(-log_scale)
        return _sum(-0.5 * z * z - log_scale - _HALF_LOG_TWO_PI, self.shape)

    def _sample(self, key, batch=(), condition=None):
        return self._sample_and_log_prob(key, batch, condition)[0]

    def _sample_and_log_prob(self, key, batch=(), condition=None):
        loc, log_scale = self._moments(condition, len(self.shape + batch))
        noise = jr.normal(key, self.shape + batch, loc.dtype)
        log_p = _sum(-0.5 * noise * noise - log_scale - _HALF_LOG_TWO_PI, self.shape)
        return loc + jnp.exp(log_scale) * noise, log_p


def _sum(values: Array, shape: Shape) -> Array:
    """Sum over the leading event axes."""
    return values.sum(tuple(range(len(shape))))


def _place(noise: Array, loc: Array, log_scale: Array) -> Array:
    """The affine map loc + scale · noise, with batch axes last."""
    return expand(loc, noise.ndim) + jnp.exp(expand(log_scale, noise.ndim)) * noise


def _log_gamma_step(a: Array) -> Array:
    """The function ln Γ(a + ½) − ln Γ(a) − ½ ln a, which falls to zero like −1/(8a).

    From some a on the asymptotic series keeps the digits that the difference would lose (and JAX's
    `betaln` is good to 1e-7 only, whatever the dtype).
    """
    large = a > (4 if a.dtype == jnp.float32 else 20)
    near, far = jnp.where(large, 1, a), jnp.where(large, a, 1)
    inverse = 1 / far
    square = inverse * inverse
    series = jnp.zeros_like(a)
    for coefficient in (691 / 180224, -31 / 18432, 17 / 14336, -1 / 640, 1 / 192, -1 / 8):
        series = series * square + coefficient
    difference = gammaln(near + 0.5) - gammaln(near) - 0.5 * jnp.log(near)
    return jnp.where(large, series * inverse, difference)


def _log1p_square(z: Array) -> Array:
    """The function ln(1 + z²), without overflow of the square."""
    huge = jnp.abs(z) > 1e8
    near, far = jnp.where(huge, 0, z), jnp.where(huge, jnp.abs(z), 1)
    return jnp.where(huge, 2 * jnp.log(far), jnp.log1p(near * near))


def _as_shape(shape: Shape | int | Sequence[int]) -> Shape:
    shape = (shape,) if isinstance(shape, int | np.integer) else shape
    if not isinstance(shape, tuple | list) or not all(
        isinstance(n, int | np.integer) for n in shape
    ):
        raise ShapeError(
            "The first argument of a distribution is the shape of an event, such as 2 or (3, 4), "
            f"not {type(shape).__name__}; parameters follow it by name, as in loc=…."
        )
    return tuple(int(n) for n in shape)


def _parameters(owner: str, shape: Shape, **values: ArrayLike) -> list[Array]:
    """Arrays of one dtype broadcast to `shape`; a parameter called scale or df must be positive."""
    given = [v for v in values.values() if hasattr(v, "dtype")]
    kinds = [v.dtype for v in given if jnp.issubdtype(v.dtype, jnp.inexact)]  # pyright: ignore
    dtype = jax.dtypes.canonicalize_dtype(kinds[0] if kinds else float)
    arrays = []
    for name, value in values.items():
        array = jnp.asarray(value, dtype)
        try:
            arrays.append(jnp.broadcast_to(array, shape))
        except ValueError as error:
            raise ShapeError(
                f"{owner}: {name} has shape {array.shape}, which does not broadcast to the event "
                f"shape {shape}."
            ) from error
        concrete = not isinstance(array, Tracer)
        if name in ("scale", "df") and concrete and not bool((array > 0).all()):
            raise InputError(f"{owner}: {name} must be positive everywhere.")
    return arrays
