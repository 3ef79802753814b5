"""Flows whose parameters come from a network: the inference network of Rezende & Mohamed (2015)."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from laminar._checks import check_sizes
from laminar._errors import InputError, ShapeError
from laminar._params import expand, partition, trainable
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractTransform, Invert, call, check_transform
from laminar.bijections.compose import Chain, Repeat, Stack
from laminar.bijections.elementwise import AbstractElementwise
from laminar.bijections.frames import AbstractAlike, AbstractComposite, needed
from laminar.nn.mlp import MLP, Activation, Dense, apply_network


class Amortized(AbstractAlike, AbstractComposite):
    r"""Any transform with its trained numbers moved by a network of the condition.

        y = f(x; θ(c)),    θ(c) = θ_0 + net(c)

    θ_0 are the trained leaves of `bijection`, those of every layer of a `Repeat` included, laid end
    to end in the order of its tree; they stay trained. A network that gives zero leaves the
    template. So each row of a batch has a flow of its own, as in amortised variational inference:
    ``Flow(ConditionalNormal(…), Amortized(…), embed=encoder)`` is an inference network.

    Under one condition shared by all rows the parameters are computed once, and the transform runs
    as if they were its own. With a condition for each row, planar, radial, Sylvester and
    elementwise maps, and what is composed of them, take their parameters with the batch last, which
    is fast; any other transform is mapped over the rows.

    Args:
        bijection: The template f. One that takes a condition itself is given the same.
        net: A network ``net(c)`` that gives P numbers, of any shape, for a condition
            ``(cond_dim,)``; with an attribute ``batch_last = True`` it must take trailing batch
            axes. See `amortized` for one that fits.
        cond_dim: Length of the condition.

    Raises:
        InputError: If `cond_dim` is not positive, or the template has no trained numbers.
        ShapeError: If the network does not give P numbers, or the template takes another condition.
    """

    bijection: AbstractTransform
    net: Callable
    cond_shape: Shape = eqx.field(static=True)

    def __init__(self, bijection: AbstractTransform, net: Callable, cond_dim: int):
        self.bijection, self.net = bijection, net
        self.cond_shape = _check_template(bijection, cond_dim)
        _check_network(net, cond_dim, bijection)

    @property
    def _like(self):
        return self.bijection

    @property
    def name(self) -> str:
        """The template's name, marked as amortised."""
        return f"Amortized({self.bijection.name})"

    def row_cost(self, direction):
        """The parameters of one row beside what the template needs."""
        return 2 * count_parameters(self.bijection) + self.bijection.row_cost(direction)

    def steps(self):
        """The steps of the template, each with its part of the network's numbers."""
        steps = self.bijection.steps()
        if len(steps) == 1:
            return (self,)
        # Whatever cuts and reorders the parameters does the same to their positions.
        trained, rest = partition(self.bijection)
        leaves, structure = jtu.tree_flatten(trained)
        starts = [sum(leaf.size for leaf in leaves[:i]) for i in range(len(leaves))]
        positions = [
            start + jnp.arange(leaf.size).reshape(leaf.shape)
            for start, leaf in zip(starts, leaves, strict=True)
        ]
        marked = eqx.combine(jtu.tree_unflatten(structure, positions), rest).steps()
        return tuple(
            self._step(step, eqx.filter(mark, trainable(step)))
            for step, mark in zip(steps, marked, strict=True)
        )

    def _step(self, step: AbstractTransform, positions) -> AbstractTransform:
        index = [jnp.ravel(leaf) for leaf in jtu.tree_leaves(positions)]
        if not index:
            return step
        net = PartOfNetwork(self.net, jnp.concatenate(index))
        return Amortized(step, net, self.cond_shape[0])

    def _run(self, direction, x, condition, key, apply=call):
        condition = needed(self, condition)
        batch = condition.shape[1:]
        moves = apply_network(self.net, condition).reshape((-1, *batch))
        trained, rest = partition(self.bijection)
        leaves, structure = jtu.tree_flatten(trained)
        moved, start = [], 0
        for leaf in leaves:
            piece = moves[start : start + leaf.size].reshape(leaf.shape + batch)
            moved.append(expand(leaf, piece.ndim) + piece.astype(leaf.dtype))
            start += leaf.size

        def run(moved, x, condition, key):
            bijection = eqx.combine(jtu.tree_unflatten(structure, moved), rest)
            return apply(bijection, direction, x, condition, key=key)

        if not takes_batched_parameters(self.bijection):
            for _ in batch:
                run = _over_rows(run)
        return run(moved, x, condition, key)

    def init_from_data(self, data, condition=None, side="out"):
        """Pass the data on to the template, as if the network gave zero."""
        done = self.bijection.init_from_data(data, condition, side)
        return eqx.tree_at(lambda s: s.bijection, self, done)


class PartOfNetwork(eqx.Module):
    """Some of the numbers that a network gives, in a chosen order.

    Args:
        net: The network; see `Amortized`.
        index: Positions in its output laid flat.
    """

    net: Callable
    index: Array
    batch_last: ClassVar[bool] = True

    def __call__(self, condition: Array) -> Array:
        """The picked numbers, ``(len(index), *batch)``."""
        moves = apply_network(self.net, condition)
        return moves.reshape((-1, *condition.shape[1:]))[self.index]


def amortized(
    bijection: AbstractTransform,
    cond_dim: int,
    *,
    key: PRNGKeyArray,
    width: int | None = None,
    depth: int = 2,
    activation: str | Activation = jax.nn.relu,
) -> Amortized:
    """Build an `Amortized` transform with a network that fits it and starts at the template.

    Args:
        bijection: The template.
        cond_dim: Length of the condition.
        key: Draws the network.
        width: Hidden units of a residual network, or None for a linear map alone, as suits a
            condition that an encoder has made already.
        depth: Residual blocks.
        activation: A function of `jax.nn` or its name.

    Raises:
        InputError: If a size is not positive, or the template has no trained numbers.
        ShapeError: If the template takes a condition of another shape.
    """
    _check_template(bijection, cond_dim)
    count = count_parameters(bijection)
    if width is None:
        net = Dense(cond_dim, count, key=key, gain=0.0, use_bias=False)
    else:
        net = MLP(cond_dim, count, key=key, width=width, depth=depth, activation=activation)
    return Amortized(bijection, net, cond_dim)


def count_parameters(bijection: AbstractTransform) -> int:
    """How many trained numbers a transform has."""
    return sum(leaf.size for leaf in jtu.tree_leaves(partition(bijection)[0]))


def takes_batched_parameters(bijection: AbstractTransform) -> bool:
    """Whether the trained leaves of a transform may carry the points' trailing batch axes."""
    if isinstance(bijection, Chain | Stack):
        return all(takes_batched_parameters(part) for part in bijection.parts)
    if isinstance(bijection, Repeat):
        return takes_batched_parameters(bijection.layers)
    if isinstance(bijection, Invert):
        return takes_batched_parameters(bijection.bijection)
    leaves = jtu.tree_leaves(partition(bijection)[0])
    if isinstance(bijection, AbstractElementwise):
        # Kernels take parameters with the axes of the points, by contract; other leaves may not.
        return all(leaf is bijection.params for leaf in leaves)
    if not leaves:
        return bijection.batch_last
    return getattr(bijection, "batched_parameters", False)


def _over_rows(run):
    """Map a function of parameters, points, conditions and a key over the last axis."""

    def mapped(moved, x, condition, key):
        keys = None if key is None else jr.split(key, x.shape[-1])
        axes = (-1, -1, -1, None if key is None else 0)
        return jax.vmap(run, in_axes=axes, out_axes=-1)(moved, x, condition, keys)

    return mapped


def _check_template(bijection: AbstractTransform, cond_dim: int) -> Shape:
    """The shape of the condition."""
    check_transform("Amortized", bijection)
    check_sizes("Amortized", cond_dim=cond_dim)
    if bijection.cond_shape not in (None, (cond_dim,)):
        raise ShapeError(
            f"Amortized: the condition has shape ({cond_dim},), but {bijection.name} takes one of "
            f"shape {bijection.cond_shape}."
        )
    if count_parameters(bijection) == 0:
        raise InputError(
            f"Amortized: {bijection.name} has no trained numbers that a network could move."
        )
    return (cond_dim,)


def _check_network(net: Callable, cond_dim: int, template: AbstractTransform) -> None:
    """Evaluate the shape of the network's output on one condition, without running it."""
    dtype = jtu.tree_leaves(partition(template)[0])[0].dtype
    condition = jax.ShapeDtypeStruct((cond_dim,), dtype)
    try:
        out = jax.eval_shape(lambda c: apply_network(net, c), condition)
    except (TypeError, ValueError) as error:
        raise ShapeError(
            f"Amortized: the network cannot take a condition of shape ({cond_dim},): {error}"
        ) from error
    wanted = count_parameters(template)
    if getattr(out, "size", None) != wanted:
        raise ShapeError(
            f"Amortized: the network must give {wanted} numbers, the parameters of "
            f"{template.name}, for a condition of shape ({cond_dim},), and gives "
            f"{getattr(out, 'shape', None)}."
        )
