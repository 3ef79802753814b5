"""The law of one number given a vector: its distribution function, quantiles and mean.

A law is a mixture of one-dimensional flows, whose maps are increasing, and of a heavy tail that no
condition moves, behind one more increasing map g, from normal quantiles to those of the data:

    r = g(z),    P(Z ≤ z | c) = Σ_m w_m Φ(f_m⁻¹(z; c)) + w_tail F_t(z),    f_m = affine ∘ spline

with Φ the normal distribution function, that of the base. So a probability costs one inverse of
each map, and a quantile is found between the smallest and the largest of the parts' quantiles
f_m(Φ⁻¹(u); c), which are explicit. Nothing is simulated. A flow that does nothing leaves the
marginal law of the data: that is where training begins.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr, ndtri

from laminar._params import Frozen
from laminar._typing import Array, PRNGKeyArray
from laminar.bijections.coupling import coupling
from laminar.bijections.elementwise import Affine
from laminar.bijections.quantile import QuantileMap
from laminar.bijections.splines import RationalQuadratic
from laminar.bijections.templates import Composed
from laminar.distributions import Normal, StudentT
from laminar.flow import Flow
from laminar.mixtures import Mixture
from laminar.tables.model import padded_length
from laminar.train.mixtures import Knots

TAIL_DF = 2.0
"""Degrees of freedom of the tail: the fewest that have a mean, and whose quantiles are explicit."""

_REACH = 4.0  # of the splines, in units of the base
_HALVINGS = 40
_REACH_OF_MEAN, _STEP_OF_MEAN = 8.0, 0.25
_CHUNK = 2048


def make_members(
    key: PRNGKeyArray, count: int, condition: int, *, width: int, depth: int, bins: int
) -> Flow:
    """Flows of one number, stacked along a leading axis, each with a network of its own.

    Args:
        key: Draws the networks.
        count: M, how many.
        condition: C, the length of a condition.
        width: Hidden units of each network.
        depth: Its residual blocks.
        bins: Bins of each spline.
    """
    keys = jax.random.split(key, count)
    # One by one, so that the program does not depend on their number.
    made = [_make_member(one, condition, width, depth, bins) for one in keys]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *made)


@eqx.filter_jit
def _make_member(key: PRNGKeyArray, condition: int, width: int, depth: int, bins: int) -> Flow:
    spline = RationalQuadratic(bins, interval=(-_REACH, _REACH), tails="linear")
    layer = coupling(
        1,
        Composed([spline, Affine()]),
        key=key,
        n_identity=0,
        cond_dim=condition,
        width=width,
        depth=depth,
        activation="silu",
    )
    return Flow(Frozen(Normal((1,))), layer)


def make_law(members: Flow, tail_share: float, knots: Knots) -> Flow:
    """The mixture of equally weighted members and the tail, behind the map through the knots.

    Args:
        members: From `make_members`.
        tail_share: Weight of the tail, in (0, 1).
        knots: From normal quantiles to the data's, of one column.
    """
    heavy = StudentT((1,), df=TAIL_DF)
    shares = jnp.log(jnp.asarray([1.0 - tail_share, tail_share], members.dtype))
    arrays = (jnp.asarray(np.array(v), members.dtype) for v in knots)
    return Flow(Mixture((Mixture(members), Frozen(heavy)), shares), Frozen(QuantileMap(*arrays)))


def log_density(law: Flow, value: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """The log-density of each value (N,) under its condition (N, C); float64 of shape (N,)."""
    return _by_chunks(_log_density, law, condition, value)


def probability(law: Flow, value: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """The distribution function F(value | condition), float64 of shape (N,)."""
    return _by_chunks(_probability, law, condition, value)


def quantile(law: Flow, levels: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """The values below which the law has the probabilities `levels` (Q,); float64 (N, Q)."""
    levels = np.asarray(levels, np.float64)
    run = functools.partial(_quantile, levels=jnp.asarray(levels, law.dtype))
    return _by_chunks(run, law, condition)


def mean(law: Flow, condition: np.ndarray) -> np.ndarray:
    """The mean E[r | c], float64 of shape (N,).

    By the trapezoid rule over the base, ∫ g(f(z)) φ(z) dz, whose error for maps with continuous
    derivatives is far below the noise of any data.
    """
    return _by_chunks(_mean, law, condition)


def draw(law: Flow, key: PRNGKeyArray, n: int, condition: np.ndarray) -> np.ndarray:
    """Draw n values for each condition, float64 of shape (N, n)."""
    drawn = law.sample(key, (n,), jnp.asarray(condition, law.dtype))
    return np.asarray(drawn, np.float64)[:, :, 0].T


# --- compiled, batch last ------------------------------------------------------------------------


def _by_chunks(run: Callable, law: Flow, condition: np.ndarray, *values: Any) -> np.ndarray:
    """Apply a function of (law, values (n,), conditions (C, n)) to rows in padded chunks."""
    rows = len(condition)
    chunk = min(padded_length(rows), _CHUNK)
    parts = []
    for start in range(0, rows, chunk):
        index = np.minimum(np.arange(start, start + chunk), rows - 1)
        given = [jnp.asarray(np.asarray(v)[index], law.dtype) for v in values]
        out = run(law, *given, condition=jnp.asarray(condition[index].T, law.dtype))
        parts.append(np.asarray(out, np.float64)[: rows - start])
    return np.concatenate(parts)


@eqx.filter_jit
def _log_density(law: Flow, value: Array, *, condition: Array) -> Array:
    return law._log_prob(value[None], condition)


@eqx.filter_jit
def _probability(law: Flow, value: Array, *, condition: Array) -> Array:
    z = law._map.inverse(value[None])[0][0]
    return _cumulative(law, _parameters(law, condition), z)


@eqx.filter_jit
def _quantile(law: Flow, *, condition: Array, levels: Array) -> Array:
    theta = _parameters(law, condition)

    def at(level: Array) -> Array:
        inner, far = _images(law, theta, ndtri(level)), _tail_quantile(level, 1 - level)
        low, high = jnp.minimum(inner.min(0), far), jnp.maximum(inner.max(0), far)

        def halve(_, ends):
            low, high = ends
            middle = low + 0.5 * (high - low)
            below = _cumulative(law, theta, middle) < level
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = lax.fori_loop(0, _HALVINGS, halve, (low, high))
        return _outer(law, low + 0.5 * (high - low))

    return lax.map(at, levels).T


@eqx.filter_jit
def _mean(law: Flow, *, condition: Array) -> Array:
    theta, mixture = _parameters(law, condition), cast(Mixture, law._base)
    count = round(2 * _REACH_OF_MEAN / _STEP_OF_MEAN) + 1
    nodes = jnp.linspace(-_REACH_OF_MEAN, _REACH_OF_MEAN, count, dtype=law.dtype)
    weights = jnp.exp(-0.5 * nodes * nodes)
    weights = weights / weights.sum()

    def add(total, node):
        z, weight = node
        far = _tail_quantile(ndtr(z), ndtr(-z))[None, None]
        images = _images(law, theta, z)
        points = jnp.concatenate([images, jnp.broadcast_to(far, images[:1].shape)])
        return total + weight * _outer(law, points), None

    shares = mixture.weights[0] * _members(law).weights
    shares = jnp.concatenate([shares, mixture.weights[1:]])
    start = jnp.zeros((shares.size, condition.shape[1]), law.dtype)
    total, _ = lax.scan(add, start, (nodes, weights))
    return (shares[:, None] * total).sum(0)


def _members(law: Flow) -> Any:
    """The mixture of the members, stacked."""
    return law._base.parts()[0]  # pyright: ignore[reportAttributeAccessIssue]


def _parameters(law: Flow, condition: Array) -> Array:
    """What the networks say: the parameters of every member's map, ``(M, P, 1, n)``."""
    nothing = jnp.zeros((0, condition.shape[1]), condition.dtype)
    return eqx.filter_vmap(
        lambda layer: layer._theta(nothing, condition), in_axes=(eqx.if_array(0),)
    )(_members(law).components.bijection)


def _images(law: Flow, theta: Array, z: Array) -> Array:
    """f_m(z; c) of one latent value z, ``(M, n)``."""
    template = _members(law).components.bijection.template
    points = jnp.broadcast_to(z, (1, theta.shape[-1]))
    return jax.vmap(lambda t: template.forward_kernel(t, points)[0][0])(theta)


def _outer(law: Flow, z: Array) -> Array:
    """g(z), for any array of values."""
    return law._map.forward(z.reshape((1, -1)))[0].reshape(z.shape)


def _cumulative(law: Flow, theta: Array, value: Array) -> Array:
    """P(Z ≤ value) for each row, from parameters that are there already."""
    template = _members(law).components.bijection.template
    z = jax.vmap(lambda t: template.inverse_kernel(t, value[None])[0][0])(theta)
    inner = (_members(law).weights[:, None] * ndtr(z)).sum(0)
    shares = law._base.weights  # pyright: ignore[reportAttributeAccessIssue]
    return shares[0] * inner + shares[1] * _tail_probability(value)


def _tail_probability(t: Array) -> Array:
    """Student's distribution function at two degrees of freedom, ½ (1 + t / √(2 + t²))."""
    # Divided by the larger of the two, so that no square overflows.
    size = jnp.maximum(jnp.abs(t), math.sqrt(2.0))
    share = t / size
    return 0.5 + 0.5 * share / jnp.sqrt(2.0 / (size * size) + share * share)


def _tail_quantile(below: Array, above: Array) -> Array:
    """Its inverse at u = below, 1 − u = above: (2u − 1) / √(2 u (1 − u))."""
    return (below - above) / jnp.sqrt(2 * below * above)
