"""The contract of a distribution: private batch-last methods, public batch-first doors.

Inside the library every array is batch-last (see `laminar.bijections.base`), nothing is jitted and
nothing is checked. The public methods are the doors: they check shapes, cast, broadcast, compile,
cut large inputs into chunks so that memory stays bounded, and decide what ±inf and NaN mean.
"""

import abc
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax

from laminar._errors import InputError, ShapeError
from laminar._typing import Array, ArrayLike, Callable, Condition, PRNGKeyArray, PyTree, Shape

_MEMORY = 2**25
"""Scalars that the working arrays of one chunk may hold, by the estimate of `_row_cost`."""
_MOST_ROWS = 2**16


class Estimate(NamedTuple):
    """A Monte Carlo mean and its standard error."""

    value: Array
    error: Array


class AbstractDistribution(eqx.Module):
    """A distribution over events of one shape, possibly conditional, that scores and samples.

    A subclass writes `_log_prob` and `_sample` (and `_sample_and_log_prob` where one pass gives
    both); everything public comes from here. The shape rules of the public methods:

    | call | arguments | result |
    |---|---|---|
    | ``log_prob(x)`` | x ``B + shape`` | ``B`` |
    | ``log_prob(x, c)`` | x ``B + shape``, c ``C + cond_shape`` | ``broadcast(B, C)`` |
    | ``sample(key, S)`` | | ``S + shape`` |
    | ``sample(key, S, c)`` | c ``C + cond_shape`` | ``S + C + shape`` |

    Inputs are cast to the distribution's own dtype. A row with ±inf lies outside every support
    and scores −inf with zero gradients; a row with NaN scores NaN, and so does a numerical failure.

    Attributes:
        shape: Shape of one event.
        cond_shape: Shape of one condition, or None when it takes none; a dictionary or tuple of
            shapes when the condition is such a tree (see `laminar.flow.Flow`).
    """

    if TYPE_CHECKING:
        # A type checker would take abstract variables for constructor arguments.
        shape: Shape = eqx.field(init=False)
        cond_shape: Any = eqx.field(init=False)
    else:
        shape: eqx.AbstractVar[Shape]
        cond_shape: eqx.AbstractVar[Any]

    @abc.abstractmethod
    def _log_prob(
        self, x: Array, condition: Condition = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """The log-density ln p(x | condition) of batch-last events ``shape + batch``, giving ``batch``."""

    @abc.abstractmethod
    def _sample(self, key: PRNGKeyArray, batch: Shape = (), condition: Condition = None) -> Array:
        """Batch-last draws ``shape + batch``; the condition has ``batch`` too, or is shared."""

    def _sample_and_log_prob(
        self, key: PRNGKeyArray, batch: Shape = (), condition: Condition = None
    ) -> tuple[Array, Array]:
        """Batch-last draws with their log-density, in one pass where a subclass can."""
        sample_key, density_key = jr.split(key)
        x = self._sample(sample_key, batch, condition)
        return x, self._log_prob(x, condition, key=density_key)

    def _encode(self, condition: Condition) -> "tuple[AbstractDistribution, Condition]":
        """Turn batch-first conditions into what the returned inner distribution takes."""
        return self, condition

    @property
    def exactness(self) -> str:
        """Whether `log_prob` is ``"exact"``, an ``"unbiased"`` estimate or a ``"bound"``."""
        return "exact"

    @property
    def _row_cost(self) -> int:
        """About how many scalars the work on one event holds at once: it sets the chunk size."""
        return 32 * max(math.prod(self.shape), 8)

    @property
    def dtype(self) -> jnp.dtype:
        """The floating-point dtype of the parameters, to which inputs are cast."""
        for leaf in jtu.tree_leaves(self):
            if eqx.is_inexact_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf.dtype
        return jnp.result_type(float)

    def log_prob(
        self,
        x: ArrayLike,
        condition: Condition = None,
        *,
        key: PRNGKeyArray | None = None,
        batch_size: int | None = None,
    ) -> Array:
        """The log-density ln p(x | condition) in nats.

        Args:
            x: Events ``batch + shape``.
            condition: ``batch + cond_shape``, broadcast against the batch of x.
            key: Needed only when the log-determinant is estimated.
            batch_size: Rows in one chunk, chosen from the size of an event by default. The last
                chunk is padded, so that one compiled chunk serves all.

        Returns:
            Log-densities of the broadcast batch shape.

        Raises:
            ShapeError: If shapes do not fit; the message prints both.
            InputError: If a needed key or condition is missing.
        """
        if key is None and self.exactness != "exact":
            raise InputError(
                f"{self.name}: the log-density is {self.exactness}, not exact, so log_prob needs "
                "a random key: log_prob(x, key=key)."
            )
        x, batch = self._check_event(x, self.shape, "x")
        condition, cond_batch = self._check_condition(condition)
        target = _broadcast(self.name, batch, cond_batch)
        return _apply(_score, self, key, x, batch, condition, cond_batch, target, batch_size)

    def sample(
        self,
        key: PRNGKeyArray,
        shape: Shape | int = (),
        condition: Condition = None,
        *,
        batch_size: int | None = None,
    ) -> Array:
        """Draw events, differentiably in the parameters.

        Args:
            key: Random key. The draws depend on it and on `batch_size`.
            shape: How many events for each condition.
            condition: ``batch + cond_shape``.
            batch_size: Rows in one chunk.

        Returns:
            Events of shape ``shape + batch + self.shape``.
        """
        return self._draw(_generate, key, shape, condition, batch_size)

    def sample_and_log_prob(
        self,
        key: PRNGKeyArray,
        shape: Shape | int = (),
        condition: Condition = None,
        *,
        batch_size: int | None = None,
    ) -> tuple[Array, Array]:
        """Draw events with their log-densities in one pass; arguments as in `sample`.

        Returns:
            Events ``shape + batch + self.shape`` and log-densities ``shape + batch``.
        """
        return self._draw(_generate_and_score, key, shape, condition, batch_size)

    def entropy(self, key: PRNGKeyArray, n: int = 10_000, condition: Condition = None) -> Estimate:
        """Estimate the entropy −E ln p(x) in nats from n draws, for each condition."""
        _, log_p = self.sample_and_log_prob(key, (n,), condition)
        return _mean(-log_p)

    def kl(
        self,
        other: "AbstractDistribution",
        key: PRNGKeyArray,
        n: int = 10_000,
        condition: Condition = None,
    ) -> Estimate:
        """Estimate KL(self ‖ other) = E_self[ln p − ln q] in nats from n draws of this one.

        Args:
            other: The distribution in the second place, over events of the same shape.
            key: Random key.
            n: Number of draws for each condition.
            condition: Given to each of the two that takes one.
        """
        if other.shape != self.shape:
            raise ShapeError(
                f"kl: {self.name} has events of shape {self.shape}, {other.name} of shape "
                f"{other.shape}."
            )
        sample_key, other_key = jr.split(key)
        own = None if self.cond_shape is None else condition
        x, log_p = self.sample_and_log_prob(sample_key, (n,), own)
        theirs = None if other.cond_shape is None else condition
        return _mean(log_p - other.log_prob(x, theirs, key=other_key).astype(log_p.dtype))

    @property
    def name(self) -> str:
        """What to call this distribution in messages and plots."""
        return type(self).__name__

    def _draw(self, fn, key, shape, condition, batch_size):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        condition, cond_batch = self._check_condition(condition)
        target = shape + cond_batch
        return _apply(fn, self, key, None, (), condition, cond_batch, target, batch_size)

    def _check_event(self, x: ArrayLike, event: Shape, what: str) -> tuple[Array, Shape]:
        """Cast to the dtype and split off the batch shape."""
        shape = jnp.shape(x)
        split = len(shape) - len(event)
        if split < 0 or shape[split:] != event:
            raise ShapeError(
                f"{self.name}: {what} has shape {shape}, but an event has shape {event}, so "
                f"{what} must have shape (…, {', '.join(map(str, event))})."
                if event
                else f"{self.name}: {what} has shape {shape}, but an event has shape {event}."
            )
        return jnp.asarray(x, self.dtype), shape[:split]

    def _check_condition(self, condition: Condition) -> tuple[Condition, Shape]:
        """Cast inexact leaves, split off the batch shape and give it to every leaf."""
        if self.cond_shape is None:
            if condition is not None:
                raise InputError(f"{self.name} takes no condition, but one was given.")
            return None, ()
        if condition is None:
            raise InputError(
                f"{self.name} needs a condition of shape {self.cond_shape} (batch axes first)."
            )
        shapes, structure = jtu.tree_flatten(self.cond_shape, is_leaf=is_shape)
        if is_shape(self.cond_shape):
            leaves = [condition]
        else:
            try:
                leaves = structure.flatten_up_to(condition)
            except (ValueError, TypeError) as error:
                raise ShapeError(
                    f"{self.name}: the condition is not a tree of arrays like {self.cond_shape}."
                ) from error
        cast, batches = [], []
        for leaf, event in zip(leaves, shapes, strict=True):
            split = len(jnp.shape(leaf)) - len(event)
            if split < 0 or jnp.shape(leaf)[split:] != event:
                raise ShapeError(
                    f"{self.name}: the condition has shape {jnp.shape(leaf)}, but one condition "
                    f"has shape {event} (batch axes first)."
                )
            leaf = jnp.asarray(leaf)
            inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
            cast.append(leaf.astype(self.dtype) if inexact else leaf)
            batches.append(leaf.shape[:split])
        batch = _broadcast(f"{self.name}: condition", *batches)
        cast = [
            x if b == batch else jnp.broadcast_to(x, batch + event)
            for x, b, event in zip(cast, batches, shapes, strict=True)
        ]
        return jtu.tree_unflatten(structure, cast), batch


def is_shape(x: Any) -> bool:
    """Whether x is one shape, and not a tree of shapes."""
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def apply_net(net: Callable, x: PyTree, shapes: PyTree) -> Array:
    """Apply a network to batch-last inputs, mapping it over the batch if it knows none.

    Args:
        net: A callable of one input; with an attribute ``batch_last = True`` it takes trailing
            batch axes itself.
        x: An array, or a tree of arrays, ``shape + batch``.
        shapes: The shape of one input, or the like tree of shapes.
    """
    leaf, shape = jtu.tree_leaves(x)[0], jtu.tree_leaves(shapes, is_leaf=is_shape)[0]
    if getattr(net, "batch_last", False) or leaf.ndim == len(shape):
        return net(x)
    return jax.vmap(lambda x: apply_net(net, x, shapes), in_axes=-1, out_axes=-1)(x)


def _mean(values: Array) -> Estimate:
    n = values.shape[0]
    return Estimate(values.mean(0), values.std(0, ddof=min(1, n - 1)) / math.sqrt(n))


def _broadcast(name: str, *shapes: Shape) -> Shape:
    try:
        return jnp.broadcast_shapes(*shapes)
    except ValueError as error:
        listed = " and ".join(map(str, shapes))
        raise ShapeError(f"{name}: batch shapes {listed} do not broadcast.") from error


# What the doors run: functions of (distribution, key, rows, x, condition) on one chunk. x and the
# condition come batch-first, what they return is batch-last.


def _score(dist, key, rows, x, condition):
    x = jnp.moveaxis(x, 0, -1)
    events = tuple(range(len(dist.shape)))
    infinite, missing = jnp.isinf(x), jnp.isnan(x)
    # Double where: the density never sees the infinity, so its gradient cannot turn into NaN.
    log_p = dist._log_prob(jnp.where(infinite, 0, x), condition, key=key)
    log_p = jnp.where(infinite.any(events), -jnp.inf, log_p)
    return jnp.where(missing.any(events), jnp.nan, log_p)


def _generate(dist, key, rows, x, condition):
    return dist._sample(key, (rows,), condition)


def _generate_and_score(dist, key, rows, x, condition):
    return dist._sample_and_log_prob(key, (rows,), condition)


@eqx.filter_jit
def _piece(fn, dist, key, rows, x, condition):
    """One chunk. Compiled on its own, so that it is traced once for any number of chunks."""
    if dist.cond_shape is None:
        condition = None
    elif condition.ndim > len(dist.cond_shape):
        condition = jnp.moveaxis(condition, 0, -1)
    return fn(dist, key, rows, x, condition)


@eqx.filter_jit
def _apply(fn, dist, key, x, batch, condition, cond_batch, target, batch_size):
    """Run `fn` over all rows of the batch shape `target`, in one piece or in chunks."""
    cost, dtype = dist._row_cost, dist.dtype
    count = math.prod(target)
    dist, condition = dist._encode(condition)
    if condition is not None:
        condition = condition.astype(dtype)
    if count == 0:
        out = eqx.filter_eval_shape(
            _piece, fn, dist, key, 1, _row_struct(x, batch), _row_struct(condition, cond_batch)
        )
        return jtu.tree_map(lambda s: jnp.zeros(target + s.shape[:-1], s.dtype), out)
    sources = {
        "x": None if x is None else _rows(x, batch, target),
        # One condition for all rows stays one array: networks then see it once.
        "condition": None
        if condition is None
        else condition.reshape(condition.shape[len(cond_batch) :])
        if math.prod(cond_batch) == 1
        else _rows(condition, cond_batch, target),
    }
    size = _chunk_size(count, cost, batch_size)
    if size >= count:
        out = _piece(fn, dist, key, count, **{k: _take(s) for k, s in sources.items()})
        out = jtu.tree_map(lambda y: jnp.moveaxis(y, -1, 0), out)
    else:
        out = _in_chunks(fn, dist, key, count, size, sources)
    return jtu.tree_map(lambda y: y.reshape(target + y.shape[1:]), out)


class _Rows(eqx.Module):
    """Rows of a flat array: all of them in order, or those that an index picks."""

    array: Array
    index: Array | None


def _rows(array: Array, batch: Shape, target: Shape) -> _Rows:
    """The rows of ``batch + event`` that a broadcast to `target` needs, without making copies."""
    flat = array.reshape((math.prod(batch), *array.shape[len(batch) :]))
    if batch == target:
        return _Rows(flat, None)
    index = jnp.arange(len(flat), dtype=jnp.int32).reshape(
        (1,) * (len(target) - len(batch)) + batch
    )
    return _Rows(flat, jnp.broadcast_to(index, target).reshape(-1))


def _take(source):
    if not isinstance(source, _Rows):
        return source
    return source.array if source.index is None else source.array[source.index]


def _chunk_size(count: int, cost: int, batch_size: int | None) -> int:
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        return batch_size
    most = min(max(_MEMORY // cost, 1), _MOST_ROWS)
    if count <= most:
        return count
    # Equal chunks in whole vector registers waste the fewest padded rows.
    even = -(-count // -(-count // most))
    return -(-even // 16) * 16


def _in_chunks(fn, dist, key, count, size, sources):
    chunks = -(-count // size)

    def cut(rows):
        # Padding repeats a true row: a row of zeros may have infinite gradients.
        pad = [(0, chunks * size - count)] + [(0, 0)] * (rows.ndim - 1)
        return jnp.pad(rows, pad, mode="edge").reshape((chunks, size, *rows.shape[1:]))

    moving = {
        name: cut(s.array if s.index is None else s.index)
        for name, s in sources.items()
        if isinstance(s, _Rows)
    }

    def arguments(cuts):
        for name, source in sources.items():
            if name not in cuts:
                yield name, source
            elif source.index is None:
                yield name, cuts[name]
            else:
                yield name, source.array[cuts[name]]

    def body(_, step):
        chunk_key, cuts = step
        return None, _piece(fn, dist, chunk_key, size, **dict(arguments(cuts)))

    keys = None if key is None else jr.split(key, chunks)
    # Checkpointing keeps memory bounded under reverse differentiation too.
    _, out = lax.scan(jax.checkpoint(body), None, (keys, moving), length=chunks)

    def join(y):
        y = jnp.moveaxis(y, -1, 1)
        return y.reshape((chunks * size, *y.shape[2:]))[:count]

    return jtu.tree_map(join, out)


def _row_struct(x, batch):
    if x is None:
        return None
    return jax.ShapeDtypeStruct((1, *x.shape[len(batch) :]), x.dtype)
