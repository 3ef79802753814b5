"""What the builders of `laminar.zoo` share: scanned stacks of layers, and the orders they take."""

from collections.abc import Callable, Sequence
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from laminar._checks import check_sizes
from laminar._errors import InputError
from laminar._typing import Array, ArrayLike, PRNGKeyArray
from laminar.bijections.amortized import amortized
from laminar.bijections.autoregressive import masked_autoregressive
from laminar.bijections.base import AbstractTransform, Invert
from laminar.bijections.compose import Chain, Permute, Repeat, repeat
from laminar.bijections.coupling import coupling
from laminar.bijections.elementwise import Affine
from laminar.bijections.linear import LU, Householder
from laminar.bijections.splines import RationalQuadratic
from laminar.density import AbstractDistribution
from laminar.distributions import Normal
from laminar.flow import Flow

Fast = Literal["log_prob", "sample"]
Mixing = Literal["order", "permutation", "orthogonal"]

MAX_LOG_SCALE = 3.0
"""Bound on the log-scale of one affine layer: enough for any standardised data, and what keeps
deep affine flows from overflowing."""


def affine_template(dim: int) -> AbstractTransform:
    """The affine template, or for a single column a spline of the same default width."""
    return Affine(max_log_scale=MAX_LOG_SCALE) if dim > 1 else RationalQuadratic(16)


def conditioned(
    name: str,
    dim: int,
    template: AbstractTransform,
    *,
    key: PRNGKeyArray,
    layers: int,
    width: int,
    depth: int,
    cond_dim: int,
    coupled: bool = False,
    fast: Fast = "log_prob",
    residual: bool = False,
    linear: bool = False,
    mixing: Mixing = "order",
    periodic: bool = False,
    graph: ArrayLike | Sequence[Sequence[int]] | None = None,
    keep_volume: bool = False,
) -> Repeat:
    """A scanned stack of layers of one kind, whose parameters networks set."""
    if graph is not None and (coupled or linear):
        raise InputError(f"{name}: coupling layers and linear maps do not keep to a graph.")
    if keep_volume and (dim == 1 or linear):
        raise InputError(f"{name}: keep_volume takes two columns or more, and no linear maps.")
    check_sizes(name, cond_dim, dim=dim, layers=layers, width=width, depth=depth)
    check_fast(name, fast)

    def autoregressive(order: Array, net_key: PRNGKeyArray) -> AbstractTransform:
        layer = masked_autoregressive(
            dim,
            template,
            width=width,
            depth=depth,
            cond_dim=cond_dim,
            residual=residual,
            order=order if graph is None else None,
            graph=graph,
            periodic=periodic,
            key=net_key,
        )
        return Invert(layer) if fast == "sample" else layer

    def coupled_layer(order: Array, net_key: PRNGKeyArray) -> AbstractTransform:
        if mixing == "orthogonal":
            mix_key, net_key = jr.split(net_key)
            move = random_rotation(dim, key=mix_key)
        else:
            # The entry at position i of the order comes to place i; the first half conditions.
            move = Permute(jnp.argsort(order))
        layer = coupling(
            dim,
            template,
            width=width,
            depth=depth,
            cond_dim=cond_dim,
            periodic=periodic,
            keep_volume=keep_volume,
            key=net_key,
        )
        return Chain([move, layer, Invert(move)])

    def make(at: tuple[Array, PRNGKeyArray]) -> AbstractTransform:
        order, net_key = at
        layer = (coupled_layer if coupled and dim > 1 else autoregressive)(order, net_key)
        return Chain([layer, LU(dim)]) if linear else layer

    order_key, net_key = jr.split(key)
    orders = (random_orders if mixing == "permutation" else paired_orders)(dim, layers, order_key)
    return repeat(make, layers, over=(orders, jr.split(net_key, layers)))


def rank_one(
    name: str, make: Callable[[tuple[Array, PRNGKeyArray]], AbstractTransform], fast: Fast
) -> Callable[[tuple[Array, PRNGKeyArray]], AbstractTransform]:
    """A maker of layers that are closed in the direction asked for."""
    check_fast(name, fast)
    return make if fast == "sample" else lambda at: Invert(make(at))


def stacked(
    name: str,
    dim: int,
    make: Callable[[tuple[Array, PRNGKeyArray]], AbstractTransform],
    key: PRNGKeyArray,
    layers: int,
    width: int,
    depth: int,
    cond_dim: int,
    base: AbstractDistribution | None,
) -> Flow:
    """A flow of layers without networks, one network for all of them if there is a condition."""
    check_sizes(name, cond_dim, dim=dim, layers=layers, width=width, depth=depth)
    layer_key, net_key = jr.split(key)
    orders = jnp.arange(layers)[:, None] % 2 * (dim - 1)
    orders = jnp.abs(orders - jnp.arange(dim)[None]).astype(jnp.int32)
    stack = repeat(make, layers, over=(orders, jr.split(layer_key, layers)))
    if cond_dim:
        stack = amortized(stack, cond_dim, width=width, depth=depth, key=net_key)
    return flow_over(base, dim, stack)


def random_rotation(dim: int, *, key: PRNGKeyArray) -> Householder:
    """A random orthogonal map: its reflections do not come in pairs that cancel."""
    pair_key, key = jr.split(key)
    rotation = Householder(dim, dim, key=pair_key)
    return eqx.tree_at(lambda h: h.vectors, rotation, jr.normal(key, (dim, dim)))


def check_fast(name: str, fast: str) -> None:
    """Refuse what is no direction."""
    if fast not in ("log_prob", "sample"):
        raise InputError(f"{name}: fast must be 'log_prob' or 'sample', not {fast!r}.")


def flow_over(base: AbstractDistribution | None, dim: int, stack: AbstractTransform) -> Flow:
    """The flow of a stack over a base, by default the standard normal."""
    return Flow(Normal(dim) if base is None else base, stack)


def paired_orders(dim: int, layers: int, key: PRNGKeyArray) -> Array:
    """One order for each layer, ``(layers, dim)``: random ones, each followed by its reverse.

    An order and its reverse together let every column depend on every other, so two layers already
    have no independence built in.
    """
    pairs = jnp.stack([jr.permutation(k, dim) for k in jr.split(key, (layers + 1) // 2)])
    pairs = pairs.at[0].set(jnp.arange(dim))
    both = jnp.stack([pairs, dim - 1 - pairs], axis=1).reshape(-1, dim)
    return both[:layers].astype(jnp.int32)


def random_orders(dim: int, layers: int, key: PRNGKeyArray) -> Array:
    """A random order for each layer, turned around where the half that passes would stay the same.

    In a few dimensions independent orders would often leave some columns where they are.
    """

    def draw(before: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        order = jr.permutation(key, dim).astype(jnp.int32)
        half = order < dim // 2
        order = jnp.where(jnp.array_equal(half, before), dim - 1 - order, order)
        return order < dim // 2, order

    return lax.scan(draw, jnp.ones((dim,), bool), jr.split(key, layers))[1]
