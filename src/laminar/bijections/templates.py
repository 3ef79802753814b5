"""Any scalar bijection as a template: what coupling and autoregressive layers repeat by entry.

A template is an elementwise map whose parameters a network sets. `as_elementwise` makes one of any
scalar bijection.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from laminar._errors import ShapeError
from laminar._params import Frozen, partition
from laminar._typing import Array, Shape
from laminar.bijections.base import AbstractTransform, Invert, call, check_transform
from laminar.bijections.elementwise import AbstractElementwise, AbstractParametric


class Adapted(AbstractParametric):
    """A scalar bijection with its trained leaves laid out as the parameter vector of a kernel.

    Made by `as_elementwise`.
    """

    inner: Frozen[AbstractTransform]

    def __init__(self, params: Array, inner: Frozen[AbstractTransform], in_shape: Shape = ()):
        self.params, self.inner, self.in_shape = params, inner, in_shape

    def _run(self, direction, params, x):
        trained, rest = partition(self.inner.tree)
        leaves, treedef = jtu.tree_flatten(trained)

        def one(vector, x):
            filled, start = [], 0
            for leaf in leaves:
                filled.append(vector[start : start + leaf.size].reshape(leaf.shape))
                start += leaf.size
            bijection = eqx.combine(jtu.tree_unflatten(treedef, filled), rest)
            return call(bijection, direction, x)

        for _ in range(x.ndim):
            one = jax.vmap(one, in_axes=-1, out_axes=-1)
        return one(jnp.broadcast_to(params, (params.shape[0], *x.shape)), x)

    def forward_kernel(self, params, x):
        """``bijection.forward`` with its trained leaves read from `params`."""
        return self._run("forward", params, x)

    def inverse_kernel(self, params, y):
        """``bijection.inverse`` with its trained leaves read from `params`."""
        return self._run("inverse", params, y)

    @property
    def name(self) -> str:
        """The wrapped name."""
        return self.inner.tree.name


class Composed(AbstractParametric):
    """Scalar maps one after the other as a single kernel, with their parameters end to end.

    Args:
        parts: Elementwise maps of one shape, first applied first.

    Raises:
        ShapeError: If there is none, or the shapes differ.
    """

    parts: Frozen[tuple[AbstractElementwise, ...]]
    counts: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, parts: Sequence[AbstractElementwise]):
        shapes = {part.in_shape for part in parts}
        if len(shapes) != 1:
            raise ShapeError(f"Composed takes maps of one shape, and got {sorted(shapes)}.")
        self.params = jnp.concatenate([part.params for part in parts])
        self.counts = tuple(part.params.shape[0] for part in parts)
        # The parts are kernels only; their parameters are kept once, in `params`.
        self.parts = Frozen(tuple(_without_params(part) for part in parts))
        self.in_shape = shapes.pop()

    def _run(self, direction, params, x):
        ends = itertools.accumulate(self.counts)
        pieces = [
            (part, params[end - count : end])
            for part, count, end in zip(self.parts.tree, self.counts, ends, strict=True)
        ]
        total = jnp.zeros((), x.dtype)
        for part, own in pieces if direction == "forward_kernel" else pieces[::-1]:
            x, log_det = getattr(part, direction)(own, x)
            total = total + log_det
        return x, total

    def forward_kernel(self, params, x):
        """The parts in order, with the summed log-derivative."""
        return self._run("forward_kernel", params, x)

    def inverse_kernel(self, params, y):
        """The parts' inverses, last one first, with the summed log-derivative."""
        return self._run("inverse_kernel", params, y)

    @property
    def name(self) -> str:
        """The parts' names in order."""
        return " + ".join(part.name for part in self.parts.tree)


class Inverted(AbstractParametric):
    """A scalar map with its two kernels exchanged and the same parameters.

    What `as_elementwise` makes of ``Invert(map)``: the template of a layer whose dense pass should
    be the direction in which the map is closed.

    Args:
        part: The elementwise map.
    """

    part: Frozen[AbstractElementwise]

    def __init__(self, part: AbstractElementwise):
        self.params, self.in_shape = part.params, part.in_shape
        self.part = Frozen(_without_params(part))

    def row_cost(self, direction):
        """That of the wrapped map in the other direction, with the parameters held here."""
        other = "inverse" if direction == "forward" else "forward"
        return super().row_cost(direction) + self.part.tree.row_cost(other)

    def forward_kernel(self, params, x):
        """The wrapped inverse kernel."""
        return self.part.tree.inverse_kernel(params, x)

    def inverse_kernel(self, params, y):
        """The wrapped forward kernel."""
        return self.part.tree.forward_kernel(params, y)

    @property
    def name(self) -> str:
        """The wrapped name, marked as inverted."""
        return f"Invert({self.part.tree.name})"


def _without_params(part: AbstractElementwise) -> AbstractElementwise:
    """The part with an empty parameter axis, unless its class computes `params` from others."""
    if not any(field.name == "params" for field in dataclasses.fields(part)):
        return part
    return eqx.tree_at(lambda part: part.params, part, part.params[:0])


def _turned(step: AbstractTransform) -> AbstractTransform:
    """An inverted elementwise map as an elementwise map; any other transform as it is."""
    inner = step.bijection if isinstance(step, Invert) else None
    return Inverted(inner) if isinstance(inner, AbstractElementwise) and _is_kernel(inner) else step


def _is_kernel(part: AbstractElementwise) -> bool:
    """Whether nothing but `params` is trained: a `NumericalInverse` kernel may have arrays too."""
    if not any(field.name == "params" for field in dataclasses.fields(part)):
        return True
    return all(leaf is part.params for leaf in jtu.tree_leaves(partition(part)[0]))


def as_template(
    owner: str, template: AbstractTransform, params: int | None = None
) -> AbstractElementwise:
    """The template of a layer as an elementwise map; errors say why it cannot be one.

    Args:
        owner: The layer that errors name.
        template: A scalar bijection of shape ().
        params: How many parameters for each entry the layer's network gives, where it is known.

    Raises:
        ShapeError: If the template is not scalar, or the count does not fit it.
    """
    check_transform(owner, template)
    if template.in_shape != () or template.out_shape != ():
        raise ShapeError(
            f"{owner}: the template must be a scalar map of shape (), and {template.name} maps "
            f"{template.in_shape} to {template.out_shape}."
        )
    scalar = as_elementwise(template)
    count = scalar.params.shape[0]
    if params is not None and count != params:
        raise ShapeError(
            f"{owner}: {template.name} takes {count} parameters, the network gives {params}."
        )
    return scalar


def as_elementwise(bijection: AbstractTransform) -> AbstractElementwise:
    """Use any scalar bijection, such as a `Chain` of scalar maps, where a kernel is asked for.

    Args:
        bijection: An unconditioned exact bijection of shape ``()``. Its trained leaves, in the
            order of the tree, become the P parameters; everything else stays fixed.

    Returns:
        The bijection itself if it is elementwise already, one fused kernel if it is a chain of
        elementwise maps or their inverses, otherwise an adapter.

    Raises:
        ShapeError: If it is not a scalar map, takes a condition, or is not exact.
    """
    check_transform("as_elementwise", bijection)
    if isinstance(bijection, AbstractElementwise):
        return bijection
    if bijection.in_shape != () or bijection.out_shape != ():
        raise ShapeError(
            f"as_elementwise takes a map of scalars, shape (), but {bijection.name} maps "
            f"{bijection.in_shape} to {bijection.out_shape}."
        )
    if bijection.cond_shape is not None or bijection.exactness != "exact":
        raise ShapeError(
            f"as_elementwise takes an exact bijection without a condition; {bijection.name} is "
            f"{bijection.exactness!r} and takes a condition of shape {bijection.cond_shape}."
        )
    steps = [_turned(step) for step in bijection.steps()]
    maps = [step for step in steps if isinstance(step, AbstractElementwise) and _is_kernel(step)]
    if len(maps) == len(steps):
        return maps[0] if len(maps) == 1 else Composed(maps)
    trained, _ = partition(bijection)
    leaves = [jnp.ravel(leaf) for leaf in jtu.tree_leaves(trained)]
    params = jnp.concatenate(leaves) if leaves else jnp.zeros((0,))
    return Adapted(params, Frozen(bijection))
