"""Frames that many transforms share: equal shapes, shapes of another transform, two directions."""

import abc
from typing import ClassVar

import equinox as eqx

from laminar._checks import check_sizes
from laminar._errors import ShapeError
from laminar._typing import Array, Condition, Direction, PRNGKeyArray, Shape
from laminar.bijections.base import (
    AbstractBijection,
    AbstractTransform,
    Exactness,
    call,
    check_events,
    image,
)
from laminar.spaces import AbstractSpace


class AbstractSameShape(AbstractTransform):
    """A transform whose data have the shape of its latents; it takes trailing batch axes."""

    batch_last: ClassVar[bool] = True

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape


class AbstractUnconditional(AbstractTransform):
    """A transform that takes no condition."""

    @property
    def cond_shape(self) -> None:
        """None."""
        return None


class AbstractShaped(AbstractSameShape):
    """A transform of events of a given shape that takes no condition.

    Args:
        shape: Event shape, or a length.
    """

    in_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, shape: int | Shape):
        self.in_shape, self.cond_shape = as_shape(shape), None


class AbstractVectorMap(AbstractShaped, AbstractBijection):
    """A bijection of vectors that takes no condition.

    Args:
        dim: Length D of the vectors.

    Raises:
        InputError: If it is not positive.
    """

    def __init__(self, dim: int):
        check_sizes(type(self).__name__, dim=dim)
        super().__init__(dim)


class AbstractTwoWay(AbstractTransform):
    """A transform whose two directions are one computation."""

    batch_last: ClassVar[bool] = True

    @abc.abstractmethod
    def _run(
        self, direction: Direction, x: Array, condition: Condition, key: PRNGKeyArray | None
    ) -> tuple[Array, Array]:
        """The image in a direction, and the log-det."""

    def forward(self, x, condition=None, *, key=None):
        """Latent → data, with the log-det; see the class."""
        check_events(self, "forward", x)
        return self._run("forward", x, condition, key)

    def inverse(self, y, condition=None, *, key=None):
        """Data → latent, with the log-det; see the class."""
        check_events(self, "inverse", y)
        return self._run("inverse", y, condition, key)


class AbstractComposite(AbstractTwoWay):
    """A transform made of others, which `_run` applies by its argument `apply`, as `call` does."""

    @abc.abstractmethod
    def _run(self, direction, x, condition, key, apply=call) -> tuple[Array, Array]:
        """As `AbstractTwoWay._run`; with `image` for `apply` the log-det is of no account."""

    def points(self, direction, x, condition=None, *, key=None):
        """The image alone, by those of the parts."""
        return self._run(direction, x, condition, key, image)[0]


class AbstractOfOne(AbstractTwoWay, AbstractBijection):
    """A bijection made of another one that takes the same condition."""

    bijection: AbstractTransform

    @property
    def cond_shape(self) -> Shape | None:
        """The condition of the bijection."""
        return self.bijection.cond_shape


class AbstractAlike(AbstractTransform):
    """A transform between the spaces of another one, and as exact as that."""

    @property
    @abc.abstractmethod
    def _like(self) -> AbstractTransform:
        """The other transform."""

    @property
    def in_shape(self) -> Shape:
        """What the transform inside takes."""
        return self._like.in_shape

    @property
    def out_shape(self) -> Shape:
        """What the transform inside gives."""
        return self._like.out_shape

    @property
    def in_space(self) -> AbstractSpace | None:
        """That of the transform inside."""
        return self._like.in_space

    @property
    def out_space(self) -> AbstractSpace | None:
        """That of the transform inside."""
        return self._like.out_space

    @property
    def exactness(self) -> Exactness:
        """That of the transform inside."""
        return self._like.exactness


def as_shape(shape: int | Shape) -> Shape:
    """A shape, or a length as one."""
    return (shape,) if isinstance(shape, int) else tuple(shape)


def needed(transform: AbstractTransform, condition: Condition) -> Condition:
    """The condition where the transform takes one, else None.

    Raises:
        ShapeError: If it takes one and there is none.
    """
    if transform.cond_shape is None:
        return None
    if condition is None:
        raise ShapeError(
            f"{transform.name} needs a condition of shape {transform.cond_shape}; got none."
        )
    return condition
