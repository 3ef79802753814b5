"""Builders of flows of vectors.

Every builder takes ``dim`` and ``key`` and says which direction is cheap. All start as the
identity, so the first density is that of the base. Layers are repeated by a scan: depth costs no
compile time. Coordinates keep their places, because each layer carries an order of its own instead
of permuting, so the path z_0, …, z_K can be followed column by column.

`planar`, `radial` and `sylvester` have no networks: a condition sets all their numbers through one
network (see `laminar.bijections.amortized`), which is how `width` and `depth` are meant there.
"""

from collections.abc import Sequence
from typing import get_args

import jax.random as jr

from laminar._checks import check_sizes
from laminar._errors import InputError
from laminar._typing import Array, ArrayLike, PRNGKeyArray
from laminar.bijections.amortized import amortized
from laminar.bijections.base import AbstractTransform, Invert
from laminar.bijections.block import BlockAutoregressive
from laminar.bijections.compose import Chain, Permute, repeat
from laminar.bijections.continuous import Adjoint, Continuous, Divergence, VelocityField
from laminar.bijections.elementwise import Affine, Shift
from laminar.bijections.linear import ActNorm, Triangular
from laminar.bijections.monotone import DeepSigmoidal
from laminar.bijections.rank_one import Planar, Radial, Sylvester, SylvesterKind
from laminar.bijections.residual import LogDet, Residual
from laminar.bijections.splines import RationalQuadratic
from laminar.density import AbstractDistribution
from laminar.flow import Flow
from laminar.nn.lipschitz import LipschitzMLP
from laminar.zoo.stacks import (
    MAX_LOG_SCALE,
    Fast,
    Mixing,
    affine_template,
    check_fast,
    conditioned,
    flow_over,
    paired_orders,
    random_rotation,
    rank_one,
    stacked,
)

Graph = ArrayLike | Sequence[Sequence[int]] | None


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
    graph: Graph = None,
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
        graph: Which columns each column depends on, if known: an array (D, D) or a list of parents
            (see `laminar.bijections.autoregressive.masked_autoregressive`). All layers keep to it.
        base: Base distribution, by default a standard normal.

    Raises:
        InputError: If a size or `fast` has no meaning.
    """
    template = RationalQuadratic(bins, interval=(-interval, interval))
    if affine:
        template = Chain([template, Affine(max_log_scale=MAX_LOG_SCALE)])
    stack = conditioned(
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
        graph=graph,
    )
    return flow_over(base, dim, stack)


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
    graph: Graph = None,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Masked autoregressive flow with affine maps (Papamakarios et al. 2017).

    ``log_prob`` is one dense pass, and sampling costs about as much. A single column gets spline
    maps: affine ones could only fit a Gaussian. Arguments are those of `nsf`.
    """
    stack = conditioned(
        "maf",
        dim,
        affine_template(dim),
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        fast=fast,
        residual=residual,
        linear=linear,
        graph=graph,
    )
    return flow_over(base, dim, stack)


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
    keep_volume: bool = False,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Affine coupling layers (Dinh et al. 2017): both directions are one network pass.

    A single column gets spline maps. With `keep_volume` the log-scales of each layer have mean zero
    (GIN, Sorrenson et al. 2020): all volume is the base's. Other arguments are those of `nsf`.
    """
    stack = conditioned(
        "realnvp",
        dim,
        affine_template(dim),
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        coupled=True,
        linear=linear,
        keep_volume=keep_volume,
    )
    return flow_over(base, dim, stack)


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
    stack = conditioned(
        "nice",
        dim,
        Shift() if dim > 1 else affine_template(dim),
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        coupled=True,
        mixing=mixing,
    )
    return flow_over(base, dim, Chain([stack, Affine(shape=(dim,))]))


def naf(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 2,
    width: int = 128,
    depth: int = 2,
    units: int = 16,
    sigmoid_layers: int = 1,
    cond_dim: int = 0,
    fast: Fast = "log_prob",
    base: AbstractDistribution | None = None,
) -> Flow:
    """Neural autoregressive flow (Huang et al. 2018): the scalar maps are small networks.

    The fast direction is one dense pass and closed; the other finds a root for every column, one
    column after the other. A map has `sigmoid_layers` layers of `units` sigmoids; more than one
    layer is the paper's deep dense kind. For other scalar maps see
    `laminar.bijections.autoregressive.masked_autoregressive`. Other arguments are those of `nsf`.
    """
    stack = conditioned(
        "naf",
        dim,
        Invert(DeepSigmoidal(units, sigmoid_layers)),
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        fast=fast,
    )
    return flow_over(base, dim, stack)


def bnaf(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 2,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    fast: Fast = "log_prob",
    base: AbstractDistribution | None = None,
) -> Flow:
    """Block neural autoregressive flow (De Cao et al. 2019): each layer is one monotone network.

    The fast direction is one dense pass; the other solves for one column after the other. Each
    column has ⌈width / D⌉ hidden units, at least 4, in each of `depth` hidden layers. Arguments
    are those of `nsf`.
    """
    check_sizes("bnaf", cond_dim, dim=dim, layers=layers, width=width, depth=depth)
    check_fast("bnaf", fast)
    units = max(4, -(-width // dim))

    def make(at) -> AbstractTransform:
        order, layer_key = at
        layer = BlockAutoregressive(
            dim, units=units, depth=depth, cond_dim=cond_dim, order=order, key=layer_key
        )
        return Invert(layer) if fast == "log_prob" else layer

    order_key, layer_key = jr.split(key)
    over = (paired_orders(dim, layers, order_key), jr.split(layer_key, layers))
    return flow_over(base, dim, repeat(make, layers, over=over))


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
    layer = rank_one("planar", lambda at: Planar(dim, key=at[1]), fast)
    return stacked("planar", dim, layer, key, layers, width, depth, cond_dim, base)


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
    layer = rank_one("radial", lambda at: Radial(dim, key=at[1]), fast)
    return stacked("radial", dim, layer, key, layers, width, depth, cond_dim, base)


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

    layer = rank_one("sylvester", make, fast)
    return stacked("sylvester", dim, layer, key, layers, width, depth, cond_dim, base)


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
        fixed_steps: A fixed number of steps for each field, rounded up to a multiple of `times`;
            None for adaptive ones.
        solver: The solver's name.
        tolerance: Of adaptive steps.
        adjoint: How solutions are differentiated.
        times: Points of the path of a single field.
        base: Base distribution, by default a standard normal.

    Raises:
        InputError: If a size or an option has no meaning.
    """
    check_sizes("cnf", cond_dim, dim=dim, layers=layers, width=width, depth=depth)

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

    return flow_over(base, dim, make(key) if layers == 1 else repeat(make, layers, key=key))


def residual(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 16,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    fast: Fast = "log_prob",
    log_det: LogDet = "exact",
    terms: int = 8,
    probes: int = 1,
    lipschitz: float = 0.9,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Residual flow (Behrmann et al. 2019; Chen et al. 2019), with an `ActNorm` after each layer.

    The fast direction is explicit, the other a fixed point. An exact log-det costs D passes; for
    many columns train with ``"roulette"`` and evaluate by
    `laminar.bijections.residual.with_log_det`. See `laminar.bijections.residual.Residual` for
    `log_det`, `terms` and `probes`, and `laminar.nn.lipschitz.LipschitzMLP` for `lipschitz`. Other
    arguments are those of `nsf`.
    """
    check_sizes("residual", cond_dim, dim=dim, layers=layers, width=width, depth=depth)
    check_fast("residual", fast)

    def make(net_key: PRNGKeyArray) -> AbstractTransform:
        net = LipschitzMLP(
            dim, width=width, depth=depth, cond_dim=cond_dim, lipschitz=lipschitz, key=net_key
        )
        layer = Residual(net, log_det, terms, probes)
        return Chain([Invert(layer) if fast == "log_prob" else layer, ActNorm(dim)])

    return flow_over(base, dim, repeat(make, layers, key=key))


def gaussianization(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 8,
    width: int = 128,
    depth: int = 2,
    bins: int = 16,
    cond_dim: int = 0,
    interval: float = 5.0,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Gaussianization flow (Meng et al. 2020): rotate, make every marginal normal, repeat.

    A layer scales and bends each coordinate of a rotated system on its own, by an `ActNorm`, which
    is set from data, and a spline; both directions cost a few thin products. The rotations are
    random and trained from there. There are no networks but for a condition, which moves the
    splines: `width` and `depth` are those of that network. Other arguments are those of `nsf`.
    """
    check_sizes("gaussianization", cond_dim, dim=dim, layers=layers, width=width, depth=depth)

    def make(layer_key: PRNGKeyArray) -> AbstractTransform:
        move_key, net_key = jr.split(layer_key)
        turn = random_rotation(dim, key=move_key)
        bend = RationalQuadratic(bins, (dim,), interval=(-interval, interval), tails="linear")
        if cond_dim:
            bend = amortized(bend, cond_dim, width=width, depth=depth, key=net_key)
        return Chain([Invert(turn), bend, ActNorm(dim), turn])

    return flow_over(base, dim, repeat(make, layers, key=key))


def triangular_spline(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 8,
    width: int = 128,
    depth: int = 2,
    bins: int = 8,
    cond_dim: int = 0,
    interval: float = 5.0,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Triangular spline flow (as in FlowJAX): bend every column, mix them linearly, repeat.

    A layer is a spline with linear tails for each column and a `Triangular` map, by turns in an
    order and its reverse; both directions cost D² and are exact. There are no networks but for a
    condition, which sets the numbers of each layer: `width` and `depth` are those of that network.
    Other arguments are those of `nsf`.
    """
    check_sizes("triangular_spline", cond_dim, dim=dim, layers=layers, width=width, depth=depth)

    def make(at: tuple[Array, PRNGKeyArray]) -> AbstractTransform:
        order, net_key = at
        move = Permute(order)
        bend = RationalQuadratic(bins, (dim,), interval=(-interval, interval), tails="linear")
        layer = Chain([bend, move, Triangular(dim), Invert(move)])
        if cond_dim:
            layer = amortized(layer, cond_dim, width=width, depth=depth, key=net_key)
        return layer

    order_key, net_key = jr.split(key)
    over = (paired_orders(dim, layers, order_key), jr.split(net_key, layers))
    return flow_over(base, dim, repeat(make, layers, over=over))
