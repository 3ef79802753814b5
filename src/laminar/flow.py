"""Flow: a base distribution carried through a transform, with everything one can ask of it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from laminar._errors import InputError, ShapeError
from laminar._params import Frozen
from laminar._typing import (
    Array,
    ArrayLike,
    Callable,
    Condition,
    Direction,
    PRNGKeyArray,
    Shape,
)
from laminar.bijections.base import AbstractTransform, call
from laminar.bijections.compose import weakest
from laminar.bijections.path import first_steps, step_names, walk
from laminar.density import (
    AbstractDistribution,
    apply_net,
    apply_to_rows,
    broadcast,
    encode_rows,
    freeze_shapes,
    is_shape,
    thaw_shapes,
)


class Path(NamedTuple):
    """The way of events through a flow.

    Attributes:
        points: z_0, …, z_K, from the base to the data; each ``batch + its event shape``.
        log_probs: ln q_0(z_0), …, ln q_K(z_K), ``(K + 1, *batch)``.
        names: The names of the K steps.
    """

    points: tuple[Array, ...]
    log_probs: Array
    names: tuple[str, ...]


class Flow(AbstractDistribution):
    """The distribution of x = f(z), z ~ base, f = f_K ∘ … ∘ f_1.

        ln q_K(x) = ln q_0(f⁻¹(x)) + ln |det ∂f⁻¹/∂x| = ln q_0(z) − Σ_k ln |det ∂f_k/∂z_{k−1}|

    (Rezende & Mohamed 2015, eqs. 5–7). Shape rules as in `AbstractDistribution`.

    Args:
        base: The distribution q_0 of the latent; in a `Frozen` it is not trained.
        bijection: The transform f, latent to data; likewise.
        embed: A network that turns one raw condition, which may be a dictionary or tuple of arrays,
            into the array that base and bijection take. It runs once for each condition, however
            many layers use it and however many events share it. Any callable; one with an attribute
            ``batch_last = True`` takes trailing batch axes itself.
        cond_shape: With `embed`, the shape of one raw condition, or a dictionary or tuple of shapes
            like it; read from ``embed.in_shape`` or ``embed.in_dim`` where the network has one.
            Without `embed`, a condition that is accepted though no part uses it.

    Raises:
        ShapeError: If base and bijection do not fit, in events or in conditions.
    """

    base: AbstractDistribution | Frozen[AbstractDistribution]
    bijection: AbstractTransform | Frozen[AbstractTransform]
    embed: Callable | None
    raw_shapes: Any = eqx.field(static=True)

    def __init__(
        self,
        base: AbstractDistribution | Frozen[AbstractDistribution],
        bijection: AbstractTransform | Frozen[AbstractTransform],
        embed: Callable | None = None,
        cond_shape: Any = None,
    ):
        self.base, self.bijection, self.embed = base, bijection, embed
        for part, kind in ((self._base, AbstractDistribution), (self._map, AbstractTransform)):
            if not isinstance(part, kind):
                if isinstance(part, type):
                    raise InputError(f"Flow got the class {part.__name__}; call it to make one.")
                raise InputError(
                    "Flow takes a base distribution and then one transform (a `Chain` of several); "
                    f"where the {kind.__name__.removeprefix('Abstract').lower()} belongs it got "
                    f"{type(part).__name__}."
                )
        if self._base.space != self._map.in_space:
            raise ShapeError(
                f"Flow: the base ({self._base.name}) has events on {self._base.space}, the "
                f"bijection ({self._map.name}) takes them on {self._map.in_space} (None: Lebesgue "
                "measure)."
            )
        if self._base.shape != self._map.in_shape:
            raise ShapeError(
                f"Flow: the base ({self._base.name}) has events of shape {self._base.shape}, the "
                f"bijection ({self._map.name}) takes {self._map.in_shape}."
            )
        ours, theirs = self._base.cond_shape, self._map.cond_shape
        if ours is not None and theirs is not None and ours != theirs:
            raise ShapeError(
                f"Flow: the base ({self._base.name}) takes a condition of shape {ours}, the "
                f"bijection ({self._map.name}) one of shape {theirs}."
            )
        if self._inner_shape is not None and not is_shape(self._inner_shape):
            raise ShapeError(
                f"Flow: the base ({self._base.name}) takes a tree of conditions "
                f"{self._inner_shape}; give the embedding to the outermost flow instead."
            )
        if embed is not None and cond_shape is None:
            cond_shape = getattr(embed, "in_shape", None)
            if cond_shape is None and isinstance(getattr(embed, "in_dim", None), int):
                cond_shape = (embed.in_dim,)  # pyright: ignore[reportFunctionMemberAccess]
            if cond_shape is None:
                raise ShapeError(
                    "Flow: the embedding does not say what it takes; give the shape of one raw "
                    "condition as cond_shape=(…)."
                )
        elif embed is None and cond_shape is not None:
            inner = self._inner_shape
            if inner not in (None, cond_shape):
                raise ShapeError(
                    f"Flow: cond_shape {cond_shape} was given, but its parts take {inner}."
                )
        self.raw_shapes = None if cond_shape is None else freeze_shapes(cond_shape)

    @property
    def _base(self) -> AbstractDistribution:
        return self.base.value if isinstance(self.base, Frozen) else self.base

    @property
    def _map(self) -> AbstractTransform:
        return self.bijection.value if isinstance(self.bijection, Frozen) else self.bijection

    @property
    def _inner_shape(self) -> Any:
        """The shape of the condition that base and bijection take."""
        return self._map.cond_shape if self._base.cond_shape is None else self._base.cond_shape

    @property
    def shape(self) -> Shape:
        """Shape of one data event."""
        return self._map.out_shape

    @property
    def space(self):
        """The manifold of data events, if any."""
        return self._map.out_space

    @property
    def cond_shape(self) -> Any:
        """Shape of one condition as the user gives it, so of the raw one with `embed`."""
        return self._inner_shape if self.raw_shapes is None else thaw_shapes(self.raw_shapes)

    @property
    def exactness(self) -> str:
        """The weaker exactness of base and bijection."""
        return weakest((self._base, self._map))

    def _row_cost(self, direction: Direction) -> int:
        return max(self._base._row_cost(direction), self._map.row_cost(direction))

    def _embedded(self, condition: Condition) -> Condition:
        """The batch-last condition as base and bijection take it."""
        if self._inner_shape is None or condition is None:
            return None
        if self.embed is None:
            return condition.astype(self.dtype)
        return self._check_embedding(apply_net(self.embed, condition, self.cond_shape), 0)

    def _check_embedding(self, encoded, start: int):
        inner = self._inner_shape
        if encoded.shape[start : start + len(inner)] != inner:
            raise ShapeError(
                f"Flow: the embedding gives {encoded.shape}, but base and bijection take a "
                f"condition of shape {inner}."
            )
        return encoded

    def _encode(self, condition, batch, batch_size):
        inner = Flow(self.base, self.bijection)
        if inner.cond_shape is None or condition is None:
            return inner, None
        if self.embed is not None:
            shapes = self.cond_shape
            condition = encode_rows(self.embed, condition, shapes, batch, batch_size)
            condition = self._check_embedding(condition, len(batch))
        return inner, condition.astype(self.dtype)

    def _log_prob(self, x, condition=None, *, key=None):
        condition = self._embedded(condition)
        base_key, map_key = (None, None) if key is None else jr.split(key)
        z, log_det = call(self._map, "inverse", x, condition, key=map_key)
        return self._base._log_prob(z, condition, key=base_key) + log_det

    def _sample(self, key, batch=(), condition=None):
        condition = self._embedded(condition)
        base_key, map_key = jr.split(key)
        z = self._base._sample(base_key, batch, condition)
        return self._map.points("forward", z, condition, key=map_key)

    def _sample_and_log_prob(self, key, batch=(), condition=None):
        condition = self._embedded(condition)
        base_key, map_key = jr.split(key)
        z, log_q = self._base._sample_and_log_prob(base_key, batch, condition)
        x, log_det = call(self._map, "forward", z, condition, key=map_key)
        return x, log_q - log_det

    def to_latent(
        self,
        x: ArrayLike,
        condition: Condition = None,
        *,
        key: PRNGKeyArray | None = None,
        batch_size: int | None = None,
    ) -> Array:
        """Map data to the latent space, z = f⁻¹(x).

        Args:
            x: ``batch + shape``.
            condition: ``batch + cond_shape``, broadcast against x.
            key: Needed only by transforms that draw.
            batch_size: Rows in one chunk.

        Returns:
            ``broadcast batch + base.shape``.
        """
        return self._carry(_to_latent, x, self.shape, "x", condition, key, batch_size)

    def to_data(
        self,
        z: ArrayLike,
        condition: Condition = None,
        *,
        key: PRNGKeyArray | None = None,
        batch_size: int | None = None,
    ) -> Array:
        """Map latent points to the data space, x = f(z); arguments as in `to_latent`."""
        return self._carry(_to_data, z, self._base.shape, "z", condition, key, batch_size)

    def path(
        self,
        z: ArrayLike | None = None,
        condition: Condition = None,
        *,
        x: ArrayLike | None = None,
        key: PRNGKeyArray | None = None,
        batch_size: int | None = None,
    ) -> Path:
        """Follow events through every step, with the density q_k of each point z_k.

            ln q_k(z_k) = ln q_0(z_0) − Σ_{j ≤ k} ln |det ∂f_j/∂z_{j−1}|

        Each q_k is ``upto(k)``, a flow that can be evaluated elsewhere too. Repeated layers count
        one by one.

        Args:
            z: Latent points ``batch + base.shape``, or
            x: data points ``batch + shape``: give one of the two.
            condition: ``batch + cond_shape``, broadcast against the points.
            key: Needed only by transforms that draw or estimate.
            batch_size: Rows in one chunk.

        Raises:
            InputError: Unless exactly one of z and x is given.
        """
        if (z is None) == (x is None):
            raise InputError("Flow.path takes either latent points z=… or data points x=….")
        self._check_key(key, "path")
        if x is None:
            out = self._carry(_path_up, z, self._base.shape, "z", condition, key, batch_size)
        else:
            out = self._carry(_path_down, x, self.shape, "x", condition, key, batch_size)
        points, log_probs = out
        return Path(tuple(points), jnp.stack(log_probs), step_names(self._map))

    def upto(self, k: int) -> "Flow":
        """The distribution q_k of z_k, after the first k steps; ``upto(0)`` is the base as a flow.

        It takes the same condition as the whole flow, used or not.

        Raises:
            ShapeError: If there are fewer than k steps.
        """
        steps = first_steps(self._map, k)
        frozen = isinstance(self.bijection, Frozen)
        return Flow(self.base, Frozen(steps) if frozen else steps, self.embed, self.cond_shape)

    def _carry(self, fn, points, event, what, condition, key, batch_size):
        points, batch = self._check_event(points, event, what)
        condition, cond_batch = self._check_condition(condition)
        target = broadcast(self.name, batch, cond_batch)
        direction: Direction = "forward" if what == "z" else "inverse"
        return apply_to_rows(
            fn, direction, self, key, points, batch, condition, cond_batch, target, batch_size
        )


# What the doors run on one batch-last chunk: functions of (flow, key, rows, points, condition).


def _to_latent(flow, key, rows, x, condition):
    return flow._map.points("inverse", x, condition, key=key)


def _to_data(flow, key, rows, z, condition):
    return flow._map.points("forward", z, condition, key=key)


def _path_up(flow, key, rows, z, condition):
    base_key, map_key = (None, None) if key is None else jr.split(key)
    log_q = [flow._base._log_prob(z, condition, key=base_key)]
    points, log_dets = walk(flow._map, "forward", z, condition, key=map_key)
    for log_det in log_dets:
        log_q.append(log_q[-1] - log_det)
    return [z, *points], log_q


def _path_down(flow, key, rows, x, condition):
    base_key, map_key = (None, None) if key is None else jr.split(key)
    points, log_dets = walk(flow._map, "inverse", x, condition, key=map_key)
    log_q = [flow._base._log_prob(points[-1], condition, key=base_key)]
    for log_det in reversed(log_dets):
        log_q.append(log_q[-1] + log_det)
    return [*reversed(points), x], log_q
