"""Builders of whole flows under the names the field knows them by.

Every builder takes ``dim`` and ``key`` and says which direction is cheap. All start as the
identity, so the first density is that of the base. Layers are repeated by a scan: depth costs no
compile time. Coordinates keep their places, because each layer carries an order of its own instead
of permuting, so the path z_0, …, z_K can be followed column by column.

`planar`, `radial` and `sylvester` have no networks: a condition sets all their numbers through one
network (see `laminar.bijections.amortized`), which is how `width` and `depth` are meant there.
"""

from collections.abc import Callable
from typing import Literal, get_args

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from laminar._errors import InputError
from laminar._typing import Array, PRNGKeyArray
from laminar.bijections.amortized import amortized
from laminar.bijections.autoregressive import masked_autoregressive
from laminar.bijections.base import AbstractTransform, Invert
from laminar.bijections.compose import Chain, Permute, Repeat, repeat
from laminar.bijections.continuous import Adjoint, Continuous, Divergence, VelocityField
from laminar.bijections.coupling import coupling
from laminar.bijections.elementwise import Affine, Shift
from laminar.bijections.linear import LU, Householder
from laminar.bijections.rank_one import Planar, Radial, Sylvester, SylvesterKind
from laminar.bijections.splines import RationalQuadratic
from laminar.density import AbstractDistribution
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.preset import Preset as Preset
from laminar.preset import preset as preset

Fast = Literal["log_prob", "sample"]
Mixing = Literal["order", "permutation", "orthogonal"]

MAX_LOG_SCALE = 3.0
"""Bound on the log-scale of one affine layer: enough for any standardised data, and what keeps
deep affine flows from overflowing."""


def nsf(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 5,
    width: int = 128,
    depth: int = 2,
    bins: int = 8,
    cond_dim: int = 0,
    coupling: bool = False,
    fast: Fast = "log_prob",
    interval: float = 5.0,
    residual: bool = False,
    linear: bool = False,
    affine: bool = False,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Neural spline flow: rational-quadratic splines (Durkan et al. 2019).

    Autoregressive layers are the more expressive; their slow direction still costs only one
    network pass (see `laminar.nn.masked`). Coupling layers are equally fast both ways.

    Args:
        dim: Number of columns D.
        key: Draws the weights and the orders.
        layers: Number of layers K.
        width: Hidden units of a conditioner.
        depth: Hidden layers of a conditioner, or residual blocks if `residual`.
        bins: Bins of a spline.
        cond_dim: Length of the condition; 0 for none.
        coupling: Use coupling layers instead of autoregressive ones. A single column has nothing
            to couple with and stays autoregressive.
        fast: The direction that is one dense pass in an autoregressive layer: ``"log_prob"`` as
            in a masked autoregressive flow, ``"sample"`` as in an inverse autoregressive flow.
        interval: Splines act on [−interval, interval] and are the identity outside.
        residual: Use residual blocks in the conditioners.
        linear: Follow every layer by a learned linear map (LU), as the paper does for tables.
        affine: Follow every spline by a scale and shift that depend on the other columns too, which
            brings heavy-tailed columns of varying spread into the interval.
        base: Base distribution, by default a standard normal.

    Raises:
        InputError: If a size or `fast` has no meaning.
    """
    template = RationalQuadratic(bins, interval=(-interval, interval))
    if affine:
        template = Chain([template, Affine(max_log_scale=MAX_LOG_SCALE)])
    stack = _build(
        "nsf",
        dim,
        template,
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        coupled=coupling,
        fast=fast,
        residual=residual,
        linear=linear,
    )
    return _over(base, dim, stack)


def maf(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 5,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    fast: Fast = "log_prob",
    residual: bool = False,
    linear: bool = False,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Masked autoregressive flow with affine maps (Papamakarios et al. 2017).

    ``log_prob`` is one dense pass, and sampling costs about as much. A single column gets spline
    maps: affine ones could only fit a Gaussian. Arguments are those of `nsf`.
    """
    stack = _build(
        "maf",
        dim,
        _affine(dim),
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        fast=fast,
        residual=residual,
        linear=linear,
    )
    return _over(base, dim, stack)


def iaf(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 5,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    residual: bool = False,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Inverse autoregressive flow (Kingma et al. 2016): sampling is one dense pass.

    Made for variational inference, where samples with their densities are needed. Equal to `maf`
    with ``fast="sample"``. Arguments are those of `nsf`.
    """
    return maf(
        dim,
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        fast="sample",
        residual=residual,
        base=base,
    )


def realnvp(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 8,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    linear: bool = False,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Affine coupling layers (Dinh et al. 2017): both directions are one network pass.

    A single column gets spline maps. Arguments are those of `nsf`.
    """
    stack = _build(
        "realnvp",
        dim,
        _affine(dim),
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        coupled=True,
        linear=linear,
    )
    return _over(base, dim, stack)


def nice(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 8,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    mixing: Mixing = "order",
    base: AbstractDistribution | None = None,
) -> Flow:
    """Additive coupling layers and one final scaling (Dinh et al. 2014).

    All layers but the diagonal scaling preserve volume. A single column gets spline maps. Other
    arguments are those of `nsf`.

    Args:
        dim: Number of columns D.
        key: Draws the weights and the mixing.
        layers: Number of layers K.
        width: Hidden units of a conditioner.
        depth: Residual blocks of a conditioner.
        cond_dim: Length of the condition; 0 for none.
        mixing: What stands between the couplings. ``"order"``: the halves change places, and every
            other time are drawn anew. ``"permutation"``: a random permutation each time, though
            never one that lets the same half pass. ``"orthogonal"``: a random orthogonal matrix,
            trained from there. The latter two are those of Rezende & Mohamed (2015). Each layer
            undoes its mixing, so coordinates keep their places.
        base: Base distribution, by default a standard normal.
    """
    if mixing not in get_args(Mixing):
        raise InputError(
            f"nice: mixing must be 'order', 'permutation' or 'orthogonal', not {mixing!r}."
        )
    stack = _build(
        "nice",
        dim,
        Shift() if dim > 1 else _affine(dim),
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        coupled=True,
        mixing=mixing,
    )
    return _over(base, dim, Chain([stack, Affine(shape=(dim,))]))


def planar(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 32,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    fast: Fast = "sample",
    base: AbstractDistribution | None = None,
) -> Flow:
    """Planar flow (Rezende & Mohamed 2015): each layer bends space along one direction.

    A layer has 2 D + 1 numbers and costs O(D), so many are needed and cheap. Made for variational
    inference: sampling is closed, ``log_prob`` solves one equation of one unknown in each layer.

    Args:
        dim: Number of columns D.
        key: Draws the directions, and the network of a condition.
        layers: Number of layers K.
        width: Hidden units of the network that turns a condition into the numbers of all layers;
            unused without a condition.
        depth: Its residual blocks.
        cond_dim: Length of the condition; 0 for none.
        fast: The direction that is closed: ``"sample"``, or ``"log_prob"`` for fitting data.
        base: Base distribution, by default a standard normal.

    Raises:
        InputError: If a size or `fast` has no meaning.
    """
    layer = _rank_one("planar", lambda at: Planar(dim, key=at[1]), fast)
    return _stacked("planar", dim, layer, key, layers, width, depth, cond_dim, base)


def radial(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 32,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    fast: Fast = "sample",
    base: AbstractDistribution | None = None,
) -> Flow:
    """Radial flow (Rezende & Mohamed 2015): each layer pushes from a point or pulls towards it.

    A layer has D + 2 numbers; both directions are closed and cost O(D). Arguments are those of
    `planar`.
    """
    layer = _rank_one("radial", lambda at: Radial(dim, key=at[1]), fast)
    return _stacked("radial", dim, layer, key, layers, width, depth, cond_dim, base)


def sylvester(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 8,
    columns: int | None = None,
    kind: SylvesterKind = "orthogonal",
    reflections: int | None = None,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    fast: Fast = "sample",
    base: AbstractDistribution | None = None,
) -> Flow:
    """Sylvester flow (van den Berg et al. 2018): each layer makes M bends at once.

    Sampling is closed, ``log_prob`` solves M equations of one unknown in each layer. See
    `laminar.bijections.rank_one.Sylvester` for `columns` (M), `kind` and `reflections`;
    ``"triangular"`` layers take the columns in an order and its reverse by turns. Other arguments
    are those of `planar`.
    """

    def make(at: tuple[Array, PRNGKeyArray]) -> AbstractTransform:
        order = at[0] if kind == "triangular" else None
        return Sylvester(dim, columns, kind=kind, reflections=reflections, order=order, key=at[1])

    layer = _rank_one("sylvester", make, fast)
    return _stacked("sylvester", dim, layer, key, layers, width, depth, cond_dim, base)


def cnf(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 1,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    divergence: Divergence = "exact",
    fixed_steps: int | None = None,
    solver: str | None = None,
    tolerance: float | None = None,
    adjoint: Adjoint = "checkpoint",
    times: int = 8,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Continuous normalizing flow (Chen et al. 2018; FFJORD, Grathwohl et al. 2019).

    Both directions solve an equation; sampling without densities is the cheaper. Train it by
    `laminar.matching.flow_matching`, which solves none, by maximum likelihood, or by
    `laminar.matching.rnode`. See `laminar.bijections.continuous.Continuous` for `divergence`,
    `fixed_steps`, `solver`, `tolerance`, `adjoint` and `times`.

    Args:
        dim: Number of columns D.
        key: Draws the weights.
        layers: Number of velocity fields, one after the other; flow matching takes one.
        width: Hidden units of a field.
        depth: Its residual blocks.
        cond_dim: Length of the condition; 0 for none.
        divergence: ``"exact"``, or ``"hutchinson"`` for many columns.
        fixed_steps: A fixed number of steps for each field, or None for adaptive ones.
        solver: The solver's name.
        tolerance: Of adaptive steps.
        adjoint: How solutions are differentiated.
        times: Points of the path of a single field.
        base: Base distribution, by default a standard normal.

    Raises:
        InputError: If a size or an option has no meaning.
    """
    _check_sizes("cnf", cond_dim, dim=dim, layers=layers, width=width, depth=depth)

    def make(net_key: PRNGKeyArray) -> AbstractTransform:
        return Continuous(
            field=VelocityField(dim, key=net_key, width=width, depth=depth, cond_dim=cond_dim),
            in_shape=(dim,),
            cond_shape=(cond_dim,) if cond_dim else None,
            divergence=divergence,
            fixed_steps=fixed_steps,
            solver=solver,
            tolerance=tolerance,
            adjoint=adjoint,
            times=times,
        )

    return _over(base, dim, make(key) if layers == 1 else repeat(make, layers, key=key))


BUILDERS = {
    "nsf": nsf,
    "maf": maf,
    "iaf": iaf,
    "realnvp": realnvp,
    "nice": nice,
    "planar": planar,
    "radial": radial,
    "sylvester": sylvester,
}
"""Builders by name, as the command line knows them: it fits by maximum likelihood, so without
`cnf`."""


def _affine(dim: int) -> AbstractTransform:
    """The affine template, or for a single column a spline of the same default width."""
    return Affine(max_log_scale=MAX_LOG_SCALE) if dim > 1 else RationalQuadratic(16)


def _build(
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
) -> Repeat:
    """A scanned stack of layers of one kind, whose parameters networks set."""
    _check_sizes(name, cond_dim, dim=dim, layers=layers, width=width, depth=depth)
    _check_fast(name, fast)

    def autoregressive(order: Array, net_key: PRNGKeyArray) -> AbstractTransform:
        layer = masked_autoregressive(
            dim,
            template,
            width=width,
            depth=depth,
            cond_dim=cond_dim,
            residual=residual,
            order=order,
            key=net_key,
        )
        return Invert(layer) if fast == "sample" else layer

    def coupled_layer(order: Array, net_key: PRNGKeyArray) -> AbstractTransform:
        if mixing == "orthogonal":
            mix_key, net_key = jr.split(net_key)
            move = _random_rotation(dim, key=mix_key)
        else:
            # The entry at position i of the order comes to place i; the first half conditions.
            move = Permute(jnp.argsort(order))
        layer = coupling(dim, template, width=width, depth=depth, cond_dim=cond_dim, key=net_key)
        return Chain([move, layer, Invert(move)])

    def make(at: tuple[Array, PRNGKeyArray]) -> AbstractTransform:
        order, net_key = at
        layer = (coupled_layer if coupled and dim > 1 else autoregressive)(order, net_key)
        return Chain([layer, LU(dim)]) if linear else layer

    order_key, net_key = jr.split(key)
    orders = (_random_orders if mixing == "permutation" else _orders)(dim, layers, order_key)
    return repeat(make, layers, over=(orders, jr.split(net_key, layers)))


def _rank_one(
    name: str, make: Callable[[tuple[Array, PRNGKeyArray]], AbstractTransform], fast: Fast
) -> Callable[[tuple[Array, PRNGKeyArray]], AbstractTransform]:
    """A maker of layers that are closed in the direction asked for."""
    _check_fast(name, fast)
    return make if fast == "sample" else lambda at: Invert(make(at))


def _stacked(
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
    _check_sizes(name, cond_dim, dim=dim, layers=layers, width=width, depth=depth)
    layer_key, net_key = jr.split(key)
    orders = jnp.arange(layers)[:, None] % 2 * (dim - 1)
    orders = jnp.abs(orders - jnp.arange(dim)[None]).astype(jnp.int32)
    stack = repeat(make, layers, over=(orders, jr.split(layer_key, layers)))
    if cond_dim:
        stack = amortized(stack, cond_dim, width=width, depth=depth, key=net_key)
    return _over(base, dim, stack)


def _random_rotation(dim: int, *, key: PRNGKeyArray) -> Householder:
    """A random orthogonal map: its reflections do not come in pairs that cancel."""
    pair_key, key = jr.split(key)
    rotation = Householder(dim, dim, key=pair_key)
    return eqx.tree_at(lambda h: h.vectors, rotation, jr.normal(key, (dim, dim)))


def _check_sizes(name: str, cond_dim: int, **sizes: int) -> None:
    for size, value in sizes.items():
        if value < 1:
            raise InputError(f"{name}: {size} must be at least 1, not {value}.")
    if cond_dim < 0:
        raise InputError(f"{name}: cond_dim must be 0 or more, not {cond_dim}.")


def _check_fast(name: str, fast: str) -> None:
    if fast not in ("log_prob", "sample"):
        raise InputError(f"{name}: fast must be 'log_prob' or 'sample', not {fast!r}.")


def _over(base: AbstractDistribution | None, dim: int, stack: AbstractTransform) -> Flow:
    """The flow of a stack over a base, by default the standard normal."""
    return Flow(Normal(dim) if base is None else base, stack)


def _orders(dim: int, layers: int, key: PRNGKeyArray) -> Array:
    """One order for each layer, ``(layers, dim)``: random ones, each followed by its reverse.

    An order and its reverse together let every column depend on every other, so two layers already
    have no independence built in.
    """
    pairs = jnp.stack([jr.permutation(k, dim) for k in jr.split(key, (layers + 1) // 2)])
    pairs = pairs.at[0].set(jnp.arange(dim))
    both = jnp.stack([pairs, dim - 1 - pairs], axis=1).reshape(-1, dim)
    return both[:layers].astype(jnp.int32)


def _random_orders(dim: int, layers: int, key: PRNGKeyArray) -> Array:
    """A random order for each layer, turned around where the half that passes would stay the same.

    In a few dimensions independent orders would often leave some columns where they are.
    """

    def draw(before: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        order = jr.permutation(key, dim).astype(jnp.int32)
        half = order < dim // 2
        order = jnp.where(jnp.array_equal(half, before), dim - 1 - order, order)
        return order < dim // 2, order

    return lax.scan(draw, jnp.ones((dim,), bool), jr.split(key, layers))[1]
