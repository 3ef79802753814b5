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
from laminar._typing import (
    Array,
    ArrayLike,
    Callable,
    Condition,
    Direction,
    PRNGKeyArray,
    PyTree,
    Shape,
)
from laminar.spaces import AbstractSpace

_WORKING_SET = {"cpu": 3 * 2**20}
"""Scalars that one chunk may hold, by the estimate of `_row_cost`: what a CPU's caches hold."""
_MOST_MEMORY = 2**27
"""The same for other devices, which want as many rows at once as there is memory for."""
_LEAST_ROWS = 256


class Estimate(NamedTuple):
    """A Monte Carlo mean and its standard error, which is NaN for a single draw."""

    value: Array
    error: Array


def check_key(owner: str, key: Any) -> None:
    """Refuse what is no random key, such as a flow or a number in the first place."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == jnp.uint32 and key.ndim == 1)
    ):
        raise InputError(
            f"{owner}: the first argument is a random key, as jax.random.key(0), not "
            f"{type(key).__name__}."
        )


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
        """The log-density of batch-last events ``shape + batch``, of shape ``batch``."""

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

    def _encode(
        self, condition: Condition, batch: Shape, batch_size: int | None
    ) -> "tuple[AbstractDistribution, Array | None]":
        """Turn conditions ``batch + cond_shape`` into what the returned inner distribution takes.

        The doors call it once, before conditions meet events, so each condition is encoded once.
        """
        return self, None if condition is None else condition.astype(self.dtype)

    @property
    def space(self) -> AbstractSpace | None:
        """The manifold that events lie on, and its measure; None for Lebesgue measure."""
        return None

    @property
    def exactness(self) -> str:
        """Whether `log_prob` is ``"exact"``, ``"unbiased"``, a ``"bound"`` or ``"biased"``."""
        return "exact"

    def _row_cost(self, direction: Direction) -> int:
        """About how many scalars the work on one event holds at once: it sets the chunk size.

        To score is ``"inverse"``, to draw ``"forward"``.
        """
        return 8 * max(math.prod(self.shape), 8)

    @property
    def dtype(self) -> jnp.dtype:
        """The floating-point dtype of the parameters, to which inputs are cast."""
        for leaf in jtu.tree_leaves(self):
            array = eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
            if array and jnp.issubdtype(leaf.dtype, jnp.inexact):
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
        self._check_key(key, "log_prob")
        x, batch = self._check_event(x, self.shape, "x")
        condition, cond_batch = self._check_condition(condition)
        target = broadcast(self.name, batch, cond_batch)
        rows = (key, x, batch, condition, cond_batch, target, batch_size)
        return apply_to_rows(_score, "inverse", self, *rows)

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
        check_key("sample", key)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        condition, cond_batch = self._check_condition(condition)
        target = shape + cond_batch
        rows = (key, None, (), condition, cond_batch, target, batch_size)
        return apply_to_rows(fn, "forward", self, *rows)

    def _check_key(self, key: PRNGKeyArray | None, method: str) -> None:
        if key is None and self.exactness != "exact":
            kind = {"unbiased": "an unbiased estimate", "biased": "a biased estimate"}.get(
                self.exactness, "a bound"
            )
            raise InputError(
                f"{self.name}: the log-density is {kind}, not exact, so {method} needs a random "
                f"key: {method}(…, key=key)."
            )

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
        batch = broadcast(f"{self.name}: condition", *batches)
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
    if n < 2:
        return Estimate(values.mean(0), jnp.full_like(values[0], jnp.nan))
    return Estimate(values.mean(0), values.std(0, ddof=1) / math.sqrt(n))


def freeze_shapes(shapes: PyTree) -> tuple:
    """A hashable form of a tree (dictionaries, tuples, lists) of shapes, fit for a static field."""
    if isinstance(shapes, dict):
        return ("dict", *((name, freeze_shapes(s)) for name, s in sorted(shapes.items())))
    if is_shape(tuple(shapes)):
        return tuple(shapes)
    return ("tuple", *(freeze_shapes(s) for s in shapes))


def thaw_shapes(frozen: tuple) -> PyTree:
    """The tree of shapes that `freeze_shapes` was given, with lists as tuples."""
    if frozen and frozen[0] == "dict":
        return {name: thaw_shapes(s) for name, s in frozen[1:]}
    if frozen and frozen[0] == "tuple":
        return tuple(thaw_shapes(s) for s in frozen[1:])
    return frozen


def broadcast(name: str, *shapes: Shape) -> Shape:
    """The common batch shape, or a `ShapeError` that names the part."""
    try:
        return jnp.broadcast_shapes(*shapes)
    except ValueError as error:
        listed = " and ".join(map(str, shapes))
        raise ShapeError(f"{name}: batch shapes {listed} do not broadcast.") from error


# What the doors run: functions of (distribution, key, rows, x, condition) on one batch-last chunk.


def _score(dist, key, rows, x, condition):
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
    x = None if x is None else jnp.moveaxis(x, 0, -1)
    if dist.cond_shape is None:
        condition = None
    elif condition.ndim > len(dist.cond_shape):
        condition = jnp.moveaxis(condition, 0, -1)
    return fn(dist, key, rows, x, condition)


@eqx.filter_jit
def apply_to_rows(fn, direction, dist, key, x, batch, condition, cond_batch, target, batch_size):
    """Run ``fn(dist, key, rows, x, condition)`` over all rows of a batch shape, in chunks.

    Args:
        fn: A function of the module level; it gets one chunk with the batch last, and returns
            arrays with the batch last.
        direction: Which way it goes, which decides what a row costs.
        dist: The distribution, whose `_encode` and `_row_cost` are used.
        key: A key, split for the chunks, or None.
        x: Events ``batch + shape``, or None.
        batch: The batch shape of x.
        condition: What `dist` takes as condition, ``cond_batch + cond_shape``, or None.
        cond_batch: The batch shape of the condition.
        target: The batch shape of the result, to which both others broadcast.
        batch_size: Rows in one chunk, or None to choose.

    Returns:
        The tree that `fn` returns, with ``target`` in front.
    """
    count = math.prod(target)
    size = _chunk_size(count, dist._row_cost(direction), batch_size)
    dist, condition = dist._encode(condition, cond_batch, batch_size)

    def run(key, rows, x, condition):
        return _piece(fn, dist, key, rows, x, condition)

    sources = {
        "x": None if x is None else _rows(x, batch, target),
        # One condition for all rows stays one array: networks then see it once.
        "condition": None
        if condition is None
        else condition.reshape(condition.shape[len(cond_batch) :])
        if math.prod(cond_batch) == 1
        else _rows(condition, cond_batch, target),
    }
    out = _in_chunks(run, key, count, size, sources)
    return jtu.tree_map(lambda y: y.reshape(target + y.shape[1:]), out)


def encode_rows(net, tree, shapes, batch, batch_size):
    """Apply a network to each of the trees ``batch + shapes`` once, in chunks.

    Returns:
        What the network gives, with ``batch`` in front.
    """

    def run(key, rows, tree):
        return apply_net(net, jtu.tree_map(lambda c: jnp.moveaxis(c, 0, -1), tree), shapes)

    cost = 32 * sum(math.prod(s) for s in jtu.tree_leaves(shapes, is_leaf=is_shape))
    count = math.prod(batch)
    sources = {"tree": jtu.tree_map(lambda c: _rows(c, batch, batch), tree)}
    size = _chunk_size(count, max(cost, 256), batch_size)
    out = _in_chunks(run, None, count, size, sources)
    return out.reshape(batch + out.shape[1:])


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


def _chunk_size(count: int, cost: int, batch_size: int | None) -> int:
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        return batch_size
    memory = _WORKING_SET.get(jax.default_backend(), _MOST_MEMORY)
    most = max(memory // cost, min(_LEAST_ROWS, _MOST_MEMORY // cost), 1)
    if count <= most:
        return count
    # Equal chunks in whole vector registers waste the fewest padded rows.
    even = -(-count // -(-count // most))
    return even if most < 16 else min(-(-even // 16) * 16, most)


def _in_chunks(run, key, count, size, sources):
    """Call ``run(key, rows, **arguments)`` on pieces of all `_Rows` in `sources`; join the results.

    Whatever in `sources` is not `_Rows` is given to every call as it is.
    """

    def is_rows(x):
        return isinstance(x, _Rows)

    def pick(source, cut=None):
        if not is_rows(source):
            return source
        if source.index is None:
            return source.array if cut is None else cut
        return source.array[source.index if cut is None else cut]

    if count == 0:
        # Run one row of zeros, by shapes alone.
        struct = jtu.tree_map(
            lambda s: jnp.zeros((1, *s.array.shape[1:]), s.array.dtype) if is_rows(s) else s,
            sources,
            is_leaf=is_rows,
        )
        out = eqx.filter_eval_shape(lambda: run(key, 1, **struct))
        return jtu.tree_map(lambda s: jnp.zeros((0, *s.shape[:-1]), s.dtype), out)
    if size >= count:
        out = run(key, count, **jtu.tree_map(pick, sources, is_leaf=is_rows))
        return jtu.tree_map(lambda y: jnp.moveaxis(y, -1, 0), out)

    chunks = -(-count // size)

    def cut(source):
        if not is_rows(source):
            return None
        rows = source.array if source.index is None else source.index
        # Padding repeats a true row: a row of zeros may have infinite gradients.
        pad = [(0, chunks * size - count)] + [(0, 0)] * (rows.ndim - 1)
        return jnp.pad(rows, pad, mode="edge").reshape((chunks, size, *rows.shape[1:]))

    leaves, structure = jtu.tree_flatten(sources, is_leaf=is_rows)

    def body(_, step):
        chunk_key, cuts = step
        picked = [pick(source, c) for source, c in zip(leaves, cuts, strict=True)]
        return None, run(chunk_key, size, **jtu.tree_unflatten(structure, picked))

    keys = None if key is None else jr.split(key, chunks)
    moving = [cut(source) for source in leaves]
    # Checkpointing keeps memory bounded under reverse differentiation too.
    _, out = lax.scan(jax.checkpoint(body), None, (keys, moving), length=chunks)

    def join(y):
        y = jnp.moveaxis(y, -1, 1)
        return y.reshape((chunks * size, *y.shape[2:]))[:count]

    return jtu.tree_map(join, out)
