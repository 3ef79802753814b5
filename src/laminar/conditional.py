"""Conditional densities from joint mixtures, and the standardisation of conditions."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from laminar._errors import ShapeError
from laminar._params import Frozen, expand
from laminar._typing import Array, ArrayLike, Direction, Shape
from laminar.density import AbstractDistribution
from laminar.mixtures import (
    HALF_LOG_TWO_PI,
    assemble_factors,
    float_dtype,
    inverse_factors,
    log_weights,
    product,
)


class ConditionalMixture(AbstractDistribution):
    r"""The conditional of a Gaussian mixture over (condition c, event x).

        p(x | c) = Σ_k π_k N((c, x); μ_k, Σ_k) / Σ_k π_k N(c; μ_k^c, Σ_k^cc)

    so the weights of the components, and their means, move with the condition. The inverse Cholesky
    factor W_k of a component has the condition first: its upper left block whitens the condition
    alone, and both sums come from one product.

    Args:
        weights: π, ``(K,)``, non-negative.
        means: μ, ``(K, C + D)``, the condition first.
        covariances: ``(K, C + D, C + D)``.
        cond_dim: C, the length of a condition.

    Raises:
        InputError: If a covariance is not positive definite, or no weight is positive.
        ShapeError: If the shapes do not fit.
    """

    logits: Array
    means: Array
    log_diagonal: Array
    lower: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: Shape = eqx.field(static=True)

    def __init__(
        self, weights: ArrayLike, means: ArrayLike, covariances: ArrayLike, *, cond_dim: int
    ):
        dtype = float_dtype(means)
        means = np.asarray(means, np.float64)
        if means.ndim != 2:
            raise ShapeError(
                f"ConditionalMixture: means must be (K, C + D), and have shape {means.shape}."
            )
        count, dim = means.shape
        if not 0 < cond_dim < dim:
            raise ShapeError(
                f"ConditionalMixture: cond_dim must lie between 1 and {dim - 1}, not {cond_dim}."
            )
        factors = inverse_factors("ConditionalMixture", covariances, count, dim)
        self.logits = jnp.asarray(log_weights("ConditionalMixture", weights, count), dtype)
        self.means = jnp.asarray(means, dtype)
        self.log_diagonal = jnp.asarray(np.log(np.diagonal(factors, axis1=1, axis2=2)), dtype)
        self.lower = jnp.asarray(np.tril(factors, -1), dtype)
        self.shape, self.cond_shape = (dim - cond_dim,), (cond_dim,)

    def _row_cost(self, direction: Direction) -> int:
        return self.logits.size * (self.means.shape[1] + 4)

    def _factors(self) -> Array:
        return assemble_factors(self.lower, self.log_diagonal)

    def _cond_terms(self, condition: Array) -> Array:
        """``ln π_k N_k(c)`` up to a constant, ``(K, rows)``."""
        size = self.cond_shape[0]

        def component(_, part):
            factor, mean, height = part
            z = product(factor[:size, :size], condition - mean[:size, None])
            return None, height - 0.5 * (z * z).sum(0)

        # Held within the range whose square is finite: far outside the nearest component decides.
        limit = 1e-2 * float(jnp.finfo(condition.dtype).max) ** 0.5
        condition = jnp.clip(condition, -limit, limit)
        heights = jax.nn.log_softmax(self.logits) + self.log_diagonal[:, :size].sum(1)
        return lax.scan(component, None, (self._factors(), self.means, heights))[1]

    def _log_prob(self, x, condition=None, *, key=None):
        batch, size = x.shape[1:], self.cond_shape[0]
        flat = x.reshape((self.shape[0], -1))
        c = _spread(condition, size, batch)
        both = jnp.concatenate([jnp.broadcast_to(c, (size, flat.shape[1])), flat])
        heights = self.log_diagonal[:, size:].sum(1)

        def component(_, part):
            factor, mean, height = part
            z = product(factor[size:], both - mean[:, None])
            return None, height - 0.5 * (z * z).sum(0)

        _, terms = lax.scan(component, None, (self._factors(), self.means, heights))
        shares = jax.nn.log_softmax(self._cond_terms(c), axis=0)
        log_p = jax.nn.logsumexp(terms + shares, axis=0) - self.shape[0] * HALF_LOG_TWO_PI
        return log_p.reshape(batch)

    def _sample(self, key, batch=(), condition=None):
        choice_key, noise_key = jr.split(key)
        rows, size = math.prod(batch), self.cond_shape[0]
        c = jnp.broadcast_to(_spread(condition, size, batch), (size, rows))
        choice = jr.categorical(choice_key, lax.stop_gradient(self._cond_terms(c)), axis=0)
        noise = jr.normal(noise_key, (self.shape[0], rows), self.means.dtype)

        identity = jnp.eye(self.shape[0], dtype=noise.dtype)

        # One small inversion for each component, one by one; see `GaussianMixture._sample`.
        def component(x, part):
            k, factor, mean = part
            root = solve_triangular(factor[size:, size:], identity, lower=True)
            rest = noise - product(factor[size:, :size], c - mean[:size, None])
            drawn = mean[size:, None] + product(root, rest)
            return jnp.where((choice == k)[None, :], drawn, x), None

        numbers = jnp.arange(self.logits.size, dtype=choice.dtype)
        parts = (numbers, self._factors(), self.means)
        x, _ = lax.scan(component, jnp.zeros_like(noise), parts)
        return x.reshape(self.shape + batch)


class Standardise(eqx.Module):
    """Brings conditions to mean zero and deviation one: (c − loc) / scale."""

    loc: Frozen[Array]
    scale: Frozen[Array]
    in_shape: tuple[int, ...] = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __call__(self, condition: Array) -> Array:
        """A condition ``(C,)``, or many ``(C, *batch)``."""
        loc, scale = (expand(v.value, condition.ndim) for v in (self.loc, self.scale))
        return (condition - loc) / scale


def _spread(condition: Array, size: int, batch: Shape) -> Array:
    """A condition for every row, or one shared by all, as ``(C, rows)`` or ``(C, 1)``."""
    if condition.ndim == 1:
        return condition[:, None]
    return jnp.broadcast_to(condition, (size, *batch)).reshape((size, -1))
