"""One map between another and its inverse."""

import jax.random as jr

from laminar.bijections.base import (
    AbstractTransform,
    Exactness,
    Invert,
    call,
    check_joints,
    check_transform,
    merge_cond_shapes,
    weakest,
)
from laminar.bijections.compose import Chain
from laminar.bijections.frames import AbstractComposite, AbstractSameShape


class Conjugate(AbstractSameShape, AbstractComposite):
    """y = g⁻¹(f(g(x))), with f = `inner` in the coordinates that g = `outer` gives.

        log_det = ln |g′(x)| + ln |f′(g(x))| − ln |g′(y)|

    The two g are one: they share their parameters, and stay inverse to each other while they train,
    as the parts of ``Chain([g, f, Invert(g)])`` would not.

    Args:
        outer: g; it may be conditioned, and change the shape or the space.
        inner: f, of what g gives.

    Raises:
        ShapeError: If `inner` does not map what `outer` gives to the same shape and space, or
            `outer` has no exact inverse.
    """

    outer: AbstractTransform
    inner: AbstractTransform

    def __check_init__(self):
        check_transform("Conjugate", self.outer)
        parts = [self.outer, self.inner, Invert(self.outer)]
        check_joints("Conjugate", parts)
        merge_cond_shapes("Conjugate", parts)

    def chain(self) -> Chain:
        """The three maps one after the other, with g twice."""
        return Chain([self.outer, self.inner, Invert(self.outer)])

    @property
    def in_shape(self):
        """What `outer` takes."""
        return self.outer.in_shape

    @property
    def in_space(self):
        """That of `outer`."""
        return self.outer.in_space

    @property
    def out_space(self):
        """That of `outer`."""
        return self.outer.in_space

    @property
    def exactness(self) -> Exactness:
        """The weaker of the two."""
        return weakest((self.outer, self.inner))

    @property
    def cond_shape(self):
        """The condition that the parts share."""
        return self.chain().cond_shape

    def _run(self, direction, x, condition, key, apply=call):
        return apply(self.chain(), direction, x, condition, key=key)

    def init_from_data(self, data, condition=None, side="out"):
        """Initialise `outer`, whose input the data are on either side, and `inner` behind it."""
        outer = self.outer.init_from_data(data, condition, "in")
        moved = outer.points("forward", data, condition, key=jr.key(0))
        return Conjugate(outer, self.inner.init_from_data(moved, condition, side))

    def row_cost(self, direction):
        """That of the dearest part."""
        return self.chain().row_cost(direction)

    def steps(self):
        """Those of g, f and g⁻¹."""
        return self.chain().steps()

    @property
    def name(self) -> str:
        """The names of the two."""
        return f"Conjugate({self.outer.name}, {self.inner.name})"
