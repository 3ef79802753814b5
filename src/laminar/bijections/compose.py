"""Composition: chains, scanned repetition, shared maps over an axis, and moves of elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer

from laminar._errors import InputError, ShapeError
from laminar._typing import Array, PRNGKeyArray, PyTree, Shape
from laminar.bijections.base import (
    AbstractBijection,
    AbstractTransform,
    Exactness,
    call,
    check_flat,
    check_joints,
    check_transform,
    merge_cond_shapes,
    weakest,
)
from laminar.bijections.frames import (
    AbstractAlike,
    AbstractComposite,
    AbstractOfOne,
    AbstractSameShape,
    AbstractShaped,
    AbstractTwoWay,
)


class Chain(AbstractComposite):
    """Composition in reading order: ``Chain([f_1, …, f_K])`` is f_K ∘ … ∘ f_1.

    The log-det is the sum of the parts' log-dets (Rezende & Mohamed 2015, eq. 6).

    Raises:
        ShapeError: Where one part's output does not fit the next part's input.
    """

    parts: tuple[AbstractTransform, ...]
    cond_shape: Shape | None = eqx.field(static=True)

    def __init__(self, parts: Sequence[AbstractTransform]):
        if not parts:
            raise ShapeError("Chain needs at least one part; use Identity(shape) for none.")
        check_joints("Chain", parts)
        self.parts = tuple(parts)
        self.cond_shape = merge_cond_shapes("Chain", parts)

    @property
    def in_shape(self) -> Shape:
        """What the first part takes."""
        return self.parts[0].in_shape

    @property
    def out_shape(self) -> Shape:
        """What the last part gives."""
        return self.parts[-1].out_shape

    @property
    def in_space(self):
        """That of the first part."""
        return self.parts[0].in_space

    @property
    def out_space(self):
        """That of the last part."""
        return self.parts[-1].out_space

    @property
    def exactness(self) -> Exactness:
        """The weakest exactness among the parts."""
        return weakest(self.parts)

    def _run(self, direction, x, condition, key, apply=call):
        forward = direction == "forward"
        keys = [None] * len(self.parts) if key is None else jr.split(key, len(self.parts))
        event = self.in_shape if forward else self.out_shape
        total = jnp.zeros(x.shape[len(event) :], x.dtype)
        for part, part_key in zip(self.parts if forward else self.parts[::-1], keys, strict=True):
            x, log_det = apply(part, direction, x, condition, key=part_key)
            total = total + log_det
        return x, total

    def init_from_data(self, data, condition=None, side="out"):
        """Initialise part after part, starting at the side where the data stand."""
        order = range(len(self.parts))
        done = list(self.parts)
        for i in reversed(order) if side == "out" else order:
            done[i] = done[i].init_from_data(data, condition, side)
            direction = "inverse" if side == "out" else "forward"
            data = done[i].points(direction, data, condition, key=jr.key(i))
        return Chain(done)

    def row_cost(self, direction):
        """That of the dearest part."""
        return max(part.row_cost(direction) for part in self.parts)

    def steps(self):
        """The steps of all parts in order."""
        return tuple(step for part in self.parts for step in part.steps())


class Repeat(AbstractAlike, AbstractComposite):
    """K layers of one structure and different parameters, applied one after the other.

    The layers are stored stacked along a leading axis and run by ``lax.scan``, so compile time does
    not grow with depth. Whatever differs between layers, permutations included, must be an array.

    Args:
        layers: Either a list of layers, or a layer whose arrays carry a leading layer axis (as
            ``eqx.filter_vmap(make)(keys)`` gives; see `repeat`).

    Raises:
        ShapeError: If the layers differ in structure, or one does not map a shape to itself.
    """

    layers: AbstractTransform
    length: int = eqx.field(static=True)

    def __init__(self, layers: AbstractTransform | Sequence[AbstractTransform]):
        if not isinstance(layers, AbstractTransform):
            layers = _stack(layers)
        lengths = {x.shape[:1] for x in jtu.tree_leaves(layers) if eqx.is_array(x)}
        if len(lengths) != 1 or lengths == {()}:
            raise ShapeError(
                "Repeat: every array of the stacked layers needs one leading layer axis; "
                f"found leading sizes {sorted(lengths)}."
            )
        check_joints("Repeat", [layers, layers])
        self.layers = layers
        self.length = lengths.pop()[0]

    @property
    def _like(self):
        return self.layers

    @property
    def cond_shape(self) -> Shape | None:
        """The condition every layer takes."""
        return self.layers.cond_shape

    def layer(self, i: int) -> AbstractTransform:
        """The i-th layer on its own."""
        return jtu.tree_map(lambda x: x[i] if eqx.is_array(x) else x, self.layers)

    def _run(self, direction, x, condition, key, apply=call):
        dynamic, static = eqx.partition(self.layers, eqx.is_array)
        keys = None if key is None else jr.split(key, self.length)
        batch = x.shape[len(self.in_shape) :]

        def body(carry, slice_and_key):
            x, total = carry
            part, layer_key = slice_and_key
            layer = eqx.combine(part, static)
            x, log_det = apply(layer, direction, x, condition, key=layer_key)
            return (x, total + log_det), None

        start = (x, jnp.zeros(batch, x.dtype))
        (x, total), _ = lax.scan(body, start, (dynamic, keys), reverse=direction == "inverse")
        return x, total

    def init_from_data(self, data, condition=None, side="out"):
        """Initialise layer after layer by one scan, starting at the side where the data stand."""
        dynamic, static = eqx.partition(self.layers, eqx.is_array)
        direction = "inverse" if side == "out" else "forward"

        def body(data, part_and_key):
            part, key = part_and_key
            layer = eqx.combine(part, static).init_from_data(data, condition, side)
            data = layer.points(direction, data, condition, key=key)
            return data, eqx.filter(layer, eqx.is_array)

        keys = jr.split(jr.key(0), self.length)
        _, done = lax.scan(body, data, (dynamic, keys), reverse=side == "out")
        return Repeat(eqx.combine(done, static))

    def row_cost(self, direction):
        """That of one layer."""
        return eqx.filter_eval_shape(self.layer, 0).row_cost(direction)

    def steps(self):
        """The layers unstacked; a layer counts as one step, whatever it is made of."""
        return tuple(self.layer(i) for i in range(self.length))

    @property
    def name(self) -> str:
        """The layer's name and how often it is repeated."""
        return f"Repeat({self.layers.name} × {self.length})"


def _stack(layers: Sequence[AbstractTransform]) -> AbstractTransform:
    """Stack the arrays of layers that agree in everything else."""
    if not layers:
        raise ShapeError("Repeat needs at least one layer.")
    for layer in layers:
        check_transform("Repeat", layer)
    split = [eqx.partition(layer, eqx.is_array) for layer in layers]
    first, static = split[0]
    for i, (arrays, rest) in enumerate(split[1:], start=1):
        same = jtu.tree_structure(arrays) == jtu.tree_structure(first) and bool(
            eqx.tree_equal(rest, static)
        )
        shapes = [x.shape for x in jtu.tree_leaves(arrays)]
        if not same or shapes != [x.shape for x in jtu.tree_leaves(first)]:
            raise ShapeError(
                f"Repeat: layer {i} ({layers[i].name}) differs from layer 0 ({layers[0].name}) in "
                "structure; stack only layers of one kind and size, and Chain the others."
            )
    stacked = jtu.tree_map(lambda *xs: jnp.stack(xs), *[arrays for arrays, _ in split])
    return eqx.combine(stacked, static)


def repeat(
    make: Callable[[PyTree], AbstractTransform],
    length: int,
    *,
    key: PRNGKeyArray | None = None,
    over: PyTree = None,
) -> Repeat:
    """Build `length` layers at once by mapping `make` over one key, or other input, per layer.

    Args:
        make: Builds one layer. It is traced once, so it costs the same at any depth.
        length: How many layers.
        key: Split into one key for each layer, given to `make`.
        over: Instead of a key, a tree of arrays whose leading axis of `length` is mapped over.
    """
    if (key is None) == (over is None):
        raise InputError("repeat: give either a key or the tree to map over.")
    inputs = jr.split(key, length) if key is not None else over
    return Repeat(eqx.filter_vmap(make)(inputs))


class Independent(AbstractComposite, AbstractOfOne):
    """One bijection applied to each of `size` slices along a new leading event axis.

    The log-dets are summed over the slices.

    Args:
        bijection: The map of one slice. With ``stacked`` its arrays carry a leading axis of
            `size`, so each slice has its own parameters; otherwise all slices share them.
        size: Number of slices.
        stacked: Whether the parameters are stacked.
    """

    size: int = eqx.field(static=True)
    stacked: bool = eqx.field(static=True, default=False)

    @property
    def in_shape(self) -> Shape:
        """``(size, *bijection.in_shape)``."""
        return (self.size, *self.bijection.in_shape)

    @property
    def out_shape(self) -> Shape:
        """``(size, *bijection.out_shape)``."""
        return (self.size, *self.bijection.out_shape)

    def row_cost(self, direction):
        """That of all slices together."""
        return self.size * self.bijection.row_cost(direction)

    def __check_init__(self):
        check_flat("Independent", self.bijection)
        sizes = {x.shape[:1] for x in jtu.tree_leaves(self.bijection) if eqx.is_array(x)}
        if self.stacked and not sizes <= {(self.size,)}:
            raise ShapeError(
                f"Independent: stacked arrays need a leading axis of {self.size}; found "
                f"{sorted(sizes)}."
            )

    def _run(self, direction, x, condition, key, apply=call):
        def one(bijection, x):
            return apply(bijection, direction, x, condition)

        axes = (eqx.if_array(0) if self.stacked else None, 0)
        y, log_det = eqx.filter_vmap(one, in_axes=axes)(self.bijection, x)
        return y, log_det.sum(0)

    def init_from_data(self, data, condition=None, side="out"):
        """Initialise each slice's own parameters, or shared ones from all slices together."""

        def initialised(bijection, data):
            return bijection.init_from_data(data, condition, side)

        if self.stacked:
            axes = (eqx.if_array(0), 0)
            inner = eqx.filter_vmap(initialised, in_axes=axes)(self.bijection, data)
        else:
            pooled = jnp.moveaxis(data, 0, -2)
            if condition is not None and condition.ndim > len(self.cond_shape or ()):
                condition = jnp.tile(condition, self.size)
            inner = initialised(self.bijection, pooled.reshape((*pooled.shape[:-2], -1)))
        return Independent(inner, self.size, self.stacked)


class Stack(AbstractComposite):
    """A map of its own for each slice along a new leading axis: y[i] = f_i(x[i]).

        log_det = Σ_i log_det_i

    The maps may differ in kind, as the columns of a table do; scalar maps, of shape ``()``, make a
    map of vectors. Use `Independent` for many slices of one kind: it compiles once for all.

    Args:
        parts: Maps that agree in their event shapes.

    Raises:
        ShapeError: If there is none, or their shapes or conditions differ.
    """

    parts: tuple[AbstractTransform, ...]
    cond_shape: Shape | None = eqx.field(static=True)

    def __init__(self, parts: Sequence[AbstractTransform]):
        if not parts:
            raise ShapeError("Stack needs at least one part.")
        first = parts[0]
        for i, part in enumerate(parts):
            check_flat("Stack", part, exact=False)
            if (part.in_shape, part.out_shape) != (first.in_shape, first.out_shape):
                raise ShapeError(
                    f"Stack: part 0 ({first.name}) maps {first.in_shape} to {first.out_shape}, "
                    f"part {i} ({part.name}) maps {part.in_shape} to {part.out_shape}."
                )
        self.parts = tuple(parts)
        self.cond_shape = merge_cond_shapes("Stack", parts)

    @property
    def in_shape(self) -> Shape:
        """``(number of parts, *in_shape of each)``."""
        return (len(self.parts), *self.parts[0].in_shape)

    @property
    def out_shape(self) -> Shape:
        """``(number of parts, *out_shape of each)``."""
        return (len(self.parts), *self.parts[0].out_shape)

    @property
    def exactness(self) -> Exactness:
        """The weakest exactness among the parts."""
        return weakest(self.parts)

    def _run(self, direction, x, condition, key, apply=call):
        keys = [None] * len(self.parts) if key is None else jr.split(key, len(self.parts))
        results = [
            apply(part, direction, x[i], condition, key=part_key)
            for i, (part, part_key) in enumerate(zip(self.parts, keys, strict=True))
        ]
        images, log_dets = zip(*results, strict=True)
        return jnp.stack(images), jnp.sum(jnp.stack(log_dets), 0)

    def init_from_data(self, data, condition=None, side="out"):
        """Initialise each part from its slice."""
        return Stack(
            [part.init_from_data(data[i], condition, side) for i, part in enumerate(self.parts)]
        )

    def row_cost(self, direction):
        """That of all parts together."""
        return sum(part.row_cost(direction) for part in self.parts)


class Reshape(AbstractTwoWay, AbstractBijection):
    """Change the event's shape and keep its elements in row-major order; log-det zero."""

    in_shape: Shape = eqx.field(static=True)
    out_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if math.prod(self.in_shape) != math.prod(self.out_shape):
            raise ShapeError(f"Reshape: {self.in_shape} and {self.out_shape} differ in size.")

    def _run(self, direction, x, condition, key):
        shapes = self.in_shape, self.out_shape
        old, new = shapes if direction == "forward" else shapes[::-1]
        batch = x.shape[len(old) :]
        return x.reshape(new + batch), jnp.zeros(batch, x.dtype)


class Permute(AbstractShaped, AbstractTwoWay, AbstractBijection):
    """Reorder the leading axis: y[i] = x[index[i]]; log-det zero.

    The index is an integer array, never trained, so that `Repeat` can stack different permutations.

    Args:
        index: A permutation of 0, …, D−1.
        shape: Event shape, by default ``(D,)``.

    Raises:
        InputError: If `index` is not a permutation.
    """

    index: Array
    back: Array

    def __init__(self, index: Array | np.ndarray | Sequence[int], shape: Shape | None = None):
        index = jnp.asarray(index, jnp.int32)
        super().__init__(index.shape if shape is None else shape)
        if index.ndim != 1 or index.shape != self.in_shape[:1]:
            raise ShapeError(f"Permute: an index of shape {index.shape} for {self.in_shape}.")
        if not isinstance(index, Tracer) and not np.array_equal(
            np.sort(np.asarray(index)), np.arange(len(index))
        ):
            raise InputError(f"Permute: the index is not a permutation of 0…{len(index) - 1}.")
        self.index = index
        self.back = jnp.argsort(index).astype(jnp.int32)

    def _run(self, direction, x, condition, key):
        index = self.index if direction == "forward" else self.back
        zero = jnp.zeros(x.shape[len(self.in_shape) :], x.dtype)
        return jnp.take(x, index, axis=0, unique_indices=True, mode="clip"), zero


def reverse(dim: int) -> Permute:
    """The permutation that turns a vector of `dim` entries around."""
    return Permute(np.arange(dim)[::-1])


def random_permutation(dim: int, *, key: PRNGKeyArray) -> Permute:
    """A permutation of `dim` entries drawn from `key`."""
    return Permute(jr.permutation(key, dim))


class Indexed(AbstractSameShape, AbstractComposite, AbstractOfOne):
    """A bijection of some entries of a vector; the others pass unchanged.

    Args:
        bijection: A map of vectors of ``len(index)`` entries.
        index: Distinct positions in 0, …, dim−1.
        dim: Length of the whole vector.
    """

    index: Array
    in_shape: Shape = eqx.field(static=True)

    def __init__(
        self, bijection: AbstractTransform, index: Array | Sequence[int] | np.ndarray, dim: int
    ):
        index = jnp.asarray(index, jnp.int32)
        check_flat("Indexed", bijection)
        if bijection.in_shape != index.shape or bijection.out_shape != index.shape:
            raise ShapeError(
                f"Indexed: {bijection.name} maps {bijection.in_shape} to {bijection.out_shape}, "
                f"but the index has shape {index.shape}."
            )
        if not isinstance(index, Tracer) and not (
            set(np.asarray(index).tolist()) <= set(range(dim))
            and len(np.unique(index)) == index.size
        ):
            raise InputError(f"Indexed: the index must be distinct positions in 0…{dim - 1}.")
        self.bijection = bijection
        self.index = index
        self.in_shape = (dim,)

    def row_cost(self, direction):
        """That of the bijection, beside the whole vector."""
        return max(super().row_cost(direction), self.bijection.row_cost(direction))

    def _run(self, direction, x, condition, key, apply=call):
        y, log_det = apply(self.bijection, direction, x[self.index], condition)
        return x.at[self.index].set(y), log_det

    def init_from_data(self, data, condition=None, side="out"):
        """Pass the indexed entries on."""
        inner = self.bijection.init_from_data(data[self.index], condition, side)
        return eqx.tree_at(lambda s: s.bijection, self, inner)
