"""The contract: a transform is a value with two methods, and everything else is composition.

Arrays inside the library are *batch-last*. A transform is defined on one event of shape
``in_shape``; a class that sets ``batch_last = True`` also takes ``in_shape + batch`` and returns
``out_shape + batch`` with log-dets of shape ``batch``. Keeping the batch on the last, contiguous
axis is what makes scalar maps and masked products fast. `call` hides the difference: it maps a
transform that knows only single events over the trailing axes.
"""

import abc
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from laminar._errors import InputError, ShapeError
from laminar._typing import Array, Condition, Direction, PRNGKeyArray, Shape
from laminar.spaces import AbstractSpace

Exactness = Literal["exact", "unbiased", "bound", "biased"]
Side = Literal["out", "in"]


class AbstractTransform(eqx.Module):
    r"""A map between latent and data space with the log-density contribution it makes.

    ``forward`` goes from latent to data, as in Rezende & Mohamed (2015):

        y = f(x),        log_det = ln |det ∂f/∂x|

    ``inverse`` goes back and returns ln |det ∂f⁻¹/∂y|, the negative of the above at the same point.

    Attributes:
        in_shape: Shape of one latent event.
        out_shape: Shape of one data event.
        cond_shape: Shape of one condition, or None when the transform takes none. A transform that
            takes none ignores the one it is given, so parts of a chain need not agree to have one.
        exactness: Whether the log-det is ``"exact"``, an ``"unbiased"`` estimate, a ``"bound"``, or
            an estimate that is ``"biased"``.
        batch_last: Whether trailing batch axes are accepted (see the module's first lines).

    Outside the support ``inverse`` returns a finite clamped point and a log-det of −inf; NaN stays
    NaN; gradients are finite everywhere.

    On manifolds the determinant is that of the map between tangent spaces, with respect to the
    measures of `in_space` and `out_space` (see `laminar.spaces`).
    """

    if TYPE_CHECKING:
        # A type checker would take abstract variables for constructor arguments.
        in_shape: Shape = eqx.field(init=False)
        out_shape: Shape = eqx.field(init=False)
        cond_shape: Shape | None = eqx.field(init=False)
        exactness: Exactness = eqx.field(init=False)
    else:
        in_shape: eqx.AbstractVar[Shape]
        out_shape: eqx.AbstractVar[Shape]
        cond_shape: eqx.AbstractVar[Shape | None]
        exactness: eqx.AbstractVar[Exactness]

    batch_last: ClassVar[bool] = False

    @property
    def in_space(self) -> AbstractSpace | None:
        """The manifold that latent events lie on; None for Lebesgue measure."""
        return None

    @property
    def out_space(self) -> AbstractSpace | None:
        """The manifold that data events lie on; None for Lebesgue measure."""
        return None

    @abc.abstractmethod
    def forward(
        self, x: Array, condition: Condition = None, *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, Array]:
        """Latent → data: ``(y, log |det ∂y/∂x|)``."""

    @abc.abstractmethod
    def inverse(
        self, y: Array, condition: Condition = None, *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, Array]:
        """Data → latent: ``(x, log |det ∂x/∂y|)``."""

    def points(
        self,
        direction: Direction,
        x: Array,
        condition: Condition = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """The image alone, for transforms whose log-det costs extra; arguments as in `call`."""
        return call(self, direction, x, condition, key=key)[0]

    def trajectory(
        self,
        direction: Direction,
        x: Array,
        condition: Condition = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[list[Array], list[Array]] | None:
        """Images and log-dets of all `steps()` where one pass gives them, else None."""
        return None

    def init_from_data(self, data: Array, condition: Condition = None, side: Side = "out") -> Self:
        """Return a copy whose data-dependent parameters suit a batch.

        Args:
            data: Events with the batch on the last axis.
            condition: Conditions likewise, or one shared condition, or None.
            side: The side of the transform the data stand on: with ``"out"`` the inverse of the
                data is what gets standardised, with ``"in"`` the forward image.

        Returns:
            Itself, unless the class has something to learn from data (as `ActNorm` has).
        """
        return self

    @property
    def draws(self) -> bool:
        """Whether ``forward`` needs a key though the log-det of ``inverse`` is exact."""
        return False

    def row_cost(self, direction: Direction) -> int:
        """About how many scalars the work on one event holds at once: it sets the chunk size."""
        return 8 * max(math.prod(self.in_shape), math.prod(self.out_shape), 8)

    def steps(self) -> tuple["AbstractTransform", ...]:
        """The elementary transforms f_1, …, f_K this one is made of, first applied first."""
        return (self,)

    def between(self, first: int, last: int) -> "AbstractTransform | None":
        """The `steps()` first, …, last − 1 as one transform where that is cheaper, else None."""
        return None

    @property
    def name(self) -> str:
        """What to call this transform in messages and plots."""
        return type(self).__name__


class AbstractBijection(AbstractTransform):
    """The exact case: an invertible smooth map between shapes of one size; ``key`` is ignored."""

    @property
    def exactness(self) -> Exactness:
        """``"exact"``."""
        return "exact"


def call(
    transform: AbstractTransform,
    direction: Direction,
    x: Array,
    condition: Condition = None,
    *,
    key: PRNGKeyArray | None = None,
) -> tuple[Array, Array]:
    """Apply a transform to events with any number of trailing batch axes.

    Args:
        transform: The transform.
        direction: ``"forward"`` or ``"inverse"``.
        x: ``event_shape + batch``.
        condition: ``cond_shape + batch``, or ``cond_shape`` alone to share one condition.
        key: Split along the batch where the transform knows only single events.

    Returns:
        The image, ``event_shape + batch``, and the log-dets, ``batch``.

    Raises:
        ShapeError: If the array does not begin with the event, or the transform gives an image or a
            log-det of another shape.
    """
    event = check_events(transform, direction, x)
    method = getattr(transform, direction)
    batch = x.ndim - len(event)
    cond_ndim = 0 if transform.cond_shape is None else len(transform.cond_shape)
    if transform.cond_shape is None:
        condition = None
    if batch == 0 or transform.batch_last:
        y, log_det = method(x, condition, key=key)
        given = transform.out_shape if direction == "forward" else transform.in_shape
        if jnp.shape(y) != (*given, *x.shape[len(event) :]):
            raise ShapeError(
                f"{transform.name}: {direction} gave an image of shape {jnp.shape(y)}, and it "
                f"should be {(*given, *x.shape[len(event) :])}."
            )
        if jnp.shape(log_det) != x.shape[len(event) :]:
            raise ShapeError(
                f"{transform.name}: {direction} gave a log-det of shape {jnp.shape(log_det)}, and "
                f"it should be {x.shape[len(event) :]}: one number for each event, summed over its "
                "entries."
            )
        return y, log_det
    cond_axis = None if condition is None or condition.ndim == cond_ndim else -1
    keys = None if key is None else jr.split(key, x.shape[-1])

    def one(x, condition, key):
        return call(transform, direction, x, condition, key=key)

    return jax.vmap(one, in_axes=(-1, cond_axis, None if key is None else 0), out_axes=-1)(
        x, condition, keys
    )


def check_events(transform: AbstractTransform, direction: Direction, x: Array) -> Shape:
    """The shape of the events that a direction takes.

    Raises:
        ShapeError: If the array does not begin with it; told is what to do where rows stand first.
    """
    event = tuple(transform.in_shape if direction == "forward" else transform.out_shape)
    shape = jnp.shape(x)
    if shape[: len(event)] == event:
        return event
    text = f"{transform.name}: {direction} takes {event} with batch axes behind, and got {shape}"
    if shape[len(shape) - len(event) :] != event:
        raise ShapeError(text + ".")
    raise ShapeError(
        text + "; put the batch last, as in jnp.moveaxis(x, 0, -1), or use a Flow's methods."
    )


def image(
    transform: AbstractTransform,
    direction: Direction,
    x: Array,
    condition: Condition = None,
    *,
    key: PRNGKeyArray | None = None,
) -> tuple[Array, Array]:
    """In place of `call` where points alone are wanted: the image, and a zero."""
    return transform.points(direction, x, condition, key=key), jnp.zeros((), x.dtype)


def weakest(parts: Iterable[Any]) -> Exactness:
    """The exactness of several parts: a bias spoils all, then a bound, then an estimate."""
    kinds = {part.exactness for part in parts}
    order: tuple[Exactness, ...] = ("biased", "bound", "unbiased", "exact")
    return next(kind for kind in order if kind in kinds)


def merge_cond_shapes(owner: str, parts: Sequence[AbstractTransform]) -> Shape | None:
    """The one condition shape that all conditioned parts share; None when no part takes one."""
    found: tuple[int, Shape] | None = None
    for i, part in enumerate(parts):
        if part.cond_shape is None:
            continue
        if found is not None and found[1] != part.cond_shape:
            raise ShapeError(
                f"{owner}: part {found[0]} takes a condition of shape {found[1]}, "
                f"part {i} ({part.name}) one of shape {part.cond_shape}."
            )
        found = found or (i, part.cond_shape)
    return None if found is None else found[1]


def check_transform(owner: str, part: Any) -> None:
    """Refuse what is not a transform, such as a class instead of an instance of it."""
    if isinstance(part, type):
        raise InputError(f"{owner} got the class {part.__name__}; call it to make a transform.")
    if not isinstance(part, AbstractTransform):
        raise InputError(f"{owner} is made of transforms, and got a {type(part).__name__}.")


def check_joints(owner: str, parts: Sequence[AbstractTransform]) -> None:
    """Refuse parts of which one does not take what the one before it gives."""
    for part in parts:
        check_transform(owner, part)
    for i, (a, b) in enumerate(itertools.pairwise(parts)):
        if a is b and a.out_shape != a.in_shape:
            raise ShapeError(
                f"{owner}: {a.name} takes {a.in_shape} and gives {a.out_shape}, so it cannot "
                "follow itself."
            )
        if a.out_shape != b.in_shape:
            raise ShapeError(
                f"{owner}: part {i} ({a.name}) gives {a.out_shape}, "
                f"part {i + 1} ({b.name}) takes {b.in_shape}."
            )
        if a.out_space != b.in_space:
            raise ShapeError(
                f"{owner}: part {i} ({a.name}) gives events on {a.out_space}, "
                f"part {i + 1} ({b.name}) takes them on {b.in_space} (None: Lebesgue measure)."
            )


def check_flat(owner: str, part: AbstractTransform, *, exact: bool = True) -> None:
    """Refuse a part on a manifold, whose product with others is none that could be named.

    And, if it must be `exact`, one that is not, or one that draws when it samples.
    """
    check_transform(owner, part)
    if exact and part.exactness != "exact":
        raise ShapeError(f"{owner} takes an exact bijection, not {part.name}.")
    if exact and any(step.draws for step in part.steps()):
        raise ShapeError(f"{owner} takes a bijection, and {part.name} draws what it samples.")
    if (part.in_space, part.out_space) != (None, None):
        raise ShapeError(
            f"{owner} takes no parts on manifolds: {part.name} maps {part.in_space} to "
            f"{part.out_space}."
        )


class Invert(AbstractTransform):
    """The inverse of a bijection as a bijection: forward and inverse change places.

    The log-det may be an estimate, but not a bound, which would then be one on the other side.
    """

    bijection: AbstractTransform
    batch_last: ClassVar[bool] = True

    @property
    def in_shape(self) -> Shape:
        """The shape that the wrapped bijection gives."""
        return self.bijection.out_shape

    @property
    def out_shape(self) -> Shape:
        """The shape that the wrapped bijection takes."""
        return self.bijection.in_shape

    @property
    def cond_shape(self) -> Shape | None:
        """The condition of the wrapped bijection."""
        return self.bijection.cond_shape

    @property
    def in_space(self):
        """That of the data of the wrapped bijection."""
        return self.bijection.out_space

    @property
    def out_space(self):
        """That of the latents of the wrapped bijection."""
        return self.bijection.in_space

    def __check_init__(self):
        check_transform("Invert", self.bijection)
        if self.bijection.exactness == "bound":
            raise ShapeError(
                f"Invert takes no bounds, and {self.bijection.name} is declared 'bound'."
            )
        if any(step.draws for step in self.bijection.steps()):
            raise ShapeError(
                f"Invert: {self.bijection.name} draws what it samples, so its inverse would be a "
                "bound; where it can lose information the other way (loses='forward') it may be "
                "inverted if it is then exact."
            )

    @property
    def exactness(self) -> Exactness:
        """That of the wrapped bijection."""
        return self.bijection.exactness

    def forward(self, x, condition=None, *, key=None):
        """``bijection.inverse``."""
        return call(self.bijection, "inverse", x, condition, key=key)

    def inverse(self, y, condition=None, *, key=None):
        """``bijection.forward``."""
        return call(self.bijection, "forward", y, condition, key=key)

    def points(self, direction, x, condition=None, *, key=None):
        """The image of the wrapped bijection in the other direction."""
        other: Direction = "inverse" if direction == "forward" else "forward"
        return self.bijection.points(other, x, condition, key=key)

    def init_from_data(self, data, condition=None, side="out"):
        """Pass the data on as standing on the other side."""
        other: Side = "in" if side == "out" else "out"
        return Invert(self.bijection.init_from_data(data, condition, other))

    def row_cost(self, direction):
        """That of the wrapped bijection in the other direction."""
        return self.bijection.row_cost("inverse" if direction == "forward" else "forward")

    def steps(self):
        """The inverses of the wrapped steps, last one first."""
        return tuple(Invert(step) for step in reversed(self.bijection.steps()))

    @property
    def name(self) -> str:
        """The wrapped name, marked as inverted."""
        return f"Invert({self.bijection.name})"


class Identity(AbstractBijection):
    """The map y = x, with log-det zero, on any space."""

    in_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True, default=None)
    space: AbstractSpace | None = eqx.field(static=True, default=None)
    batch_last: ClassVar[bool] = True

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

    @property
    def in_space(self):
        """The `space` given."""
        return self.space

    @property
    def out_space(self):
        """The `space` given."""
        return self.space

    def forward(self, x, condition=None, *, key=None):
        """``(x, 0)``."""
        return x, jnp.zeros(x.shape[len(self.in_shape) :], x.dtype)

    def inverse(self, y, condition=None, *, key=None):
        """``(y, 0)``."""
        return self.forward(y)
