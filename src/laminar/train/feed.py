"""What stands between the user's data and a compiled segment: checks, the split, and feeding.

A feed gives a segment of training everything it needs to make its own batches. Arrays go to the
device once; anything else is read ahead in a thread, a bounded stack of batches at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laminar._errors import InputError, ShapeError, list_rows
from laminar._files import checksum
from laminar._typing import Array, PyTree
from laminar.objectives import Batch
from laminar.train.source import (
    ArraySource,
    Cursor,
    MappedSource,
    Prefetcher,
    Stream,
    advance,
    as_batch,
    pad_batch,
    rows_at,
    shuffled,
)

_STACK_BYTES = 2**25
_MOST_HELD_OUT = 100_000
_CHUNK_ROWS = 1024
_MOST_STACKED = 256
_PIECE = 2**20


class Placement(NamedTuple):
    """Where arrays live: the devices that share each batch, or None for the default device."""

    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """How many devices share a batch."""
        return 1 if self.mesh is None else self.mesh.size

    def sharding(self, *axes: str | None) -> NamedSharding | None:
        """The sharding with given axes spread over the devices."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def put(self, tree: PyTree, *axes: str | None) -> PyTree:
        """The arrays of a tree on the devices, replicated along all axes but those named."""
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.device_put(arrays, self.sharding(*axes)), rest)

    def spread(self, batch: Batch) -> Batch:
        """Inside a compiled function: share the rows of a batch among the devices."""
        if self.mesh is None:
            return batch
        return jax.lax.with_sharding_constraint(batch, self.sharding("batch"))


Named = tuple[str, Sequence[int] | np.ndarray]
"""Rows in words, and their numbers in the data given, none for those of a stream."""


def place(devices: int | Sequence[Any] | Mesh | None) -> Placement:
    """The placement for what the user gave as `devices`.

    Raises:
        InputError: If there are fewer devices, or a mesh has several axes.
    """
    if devices is None:
        return Placement()
    if isinstance(devices, Mesh):
        if len(devices.axis_names) != 1:
            raise InputError(f"devices: the mesh has axes {devices.axis_names}; give one axis.")
        devices = list(devices.devices.flat)
    if isinstance(devices, int):
        found = jax.devices()
        if not 1 <= devices <= len(found):
            raise InputError(f"devices is {devices}, but JAX sees {len(found)} device(s).")
        devices = found[:devices]
    # An axis that is not "explicit": the compiler decides how work inside a batch is shared.
    return Placement(Mesh(np.asarray(devices), ("batch",)))


class Prepared(NamedTuple):
    """Data ready for training: a source, the user's numbers of its rows, the held-out rows."""

    source: Any
    rows: np.ndarray | None
    held_out: Batch | None


def prepare(
    flow: Any, data: Any, condition: PyTree, weights: Any, validation: Any, seed: np.ndarray
) -> Prepared:
    """Check the data against the flow and set the validation rows apart.

    Args:
        flow: The flow to be trained.
        data: An array of rows, a `Batch`, or a source (see `laminar.train.source`).
        condition: Conditions beside an array of rows.
        weights: Weights beside an array of rows; rows of weight zero are left out.
        validation: A fraction of the rows, a `Batch`, or None.
        seed: Decides which rows the fraction is.

    Raises:
        InputError, ShapeError: With one sentence on what does not fit.
    """
    fraction = _fraction(validation)
    given = None if fraction is not None else check_batch(flow, as_batch(validation), "validation")
    if isinstance(data, np.memmap):
        data = MappedSource(data, condition, weights)
    elif condition is not None or weights is not None:
        if isinstance(data, Batch | ArraySource | MappedSource | Stream):
            raise InputError(
                f"condition and weights belong to an array of rows; put them into the "
                f"{type(data).__name__} that is given as data."
            )
        data = Batch(data, condition, weights)
    if isinstance(data, MappedSource):
        return _prepare_mapped(flow, data, fraction, given, seed)
    if isinstance(data, Stream) and not isinstance(data, ArraySource | Batch | Sequence):
        if fraction:
            raise InputError(
                "A stream cannot be split; give held-out rows as validation=Batch(x, condition, "
                "weights), or validation=None."
            )
        if len(data) < 1:
            raise InputError("The stream has no batches.")
        return Prepared(data, None, given)
    if isinstance(data, ArraySource):
        data = Batch(data.x, data.condition, data.weights)
    batch = check_batch(flow, as_batch(data), "data")
    rows = np.arange(len(batch.x))
    if batch.weights is not None:
        rows = np.flatnonzero(batch.weights > 0)
    inside, outside = _split(len(rows), fraction, seed)
    rows, held_rows = rows[inside], rows[outside]
    held_out = given if len(held_rows) == 0 else _rows_of(batch, held_rows)
    return Prepared(_rows_of(batch, rows), rows, held_out)


def _prepare_mapped(flow, source: MappedSource, fraction, given, seed) -> Prepared:
    check_shapes(flow, source.take(np.arange(1)), "data")
    count = len(source)
    numbers = np.arange(count) if source.rows is None else np.asarray(source.rows)
    if source.weights is not None:
        _check_mapped_weights(source.weights, numbers)
    if fraction:
        fraction = min(fraction, _MOST_HELD_OUT / count)
    inside, outside = _split(count, fraction, seed)
    if len(outside) == 0:
        return Prepared(source, numbers, given)
    batch = source.take(outside)
    # What is read later is checked as it is read.
    _check_values(
        _as_dtype(batch, np.dtype(flow.dtype)), lambda bad: list_rows(numbers[outside[bad]])
    )
    held_out = check_batch(flow, batch, "validation")
    return Prepared(source.subset(inside), numbers[inside], held_out)


def _check_mapped_weights(weights: Any, numbers: np.ndarray) -> None:
    """Refuse negative or non-finite weights of mapped rows, a piece of the file at a time."""
    some = False
    for start in range(0, len(numbers), _PIECE):
        rows = numbers[start : start + _PIECE]
        piece = np.asarray(weights[rows])
        bad = ~(np.isfinite(piece) & (piece >= 0))
        if bad.any():
            raise InputError(
                f"data: weights must be finite and not negative; {list_rows(rows[bad])} "
                f"{'are' if bad.sum() > 1 else 'is'} not."
            )
        some = some or bool((piece > 0).any())
    if not some:
        raise InputError("data: every weight is zero; there is nothing to learn from.")


def _as_dtype(batch: Batch, dtype: np.dtype) -> Batch:
    """Host arrays with every real number, and all of x, in the flow's dtype."""

    def cast(a):
        return a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a

    # What is too large becomes infinite, which `_check_values` refuses.
    with np.errstate(over="ignore"):
        batch = jtu.tree_map(cast, batch)
        return batch._replace(x=batch.x.astype(dtype))


def _check_values(batch: Batch, words: Callable[[np.ndarray], str]) -> None:
    """Refuse what is not finite, and negative weights, with the rows in words."""
    named = (("x", batch.x), ("the condition", batch.condition), ("weights", batch.weights))
    for name, tree in named:
        for leaf in jtu.tree_leaves(tree):
            bad = ~np.isfinite(leaf)
            if bad.any():
                rows = np.flatnonzero(bad.reshape(len(bad), -1).any(1))
                raise InputError(
                    f"data: {name} has NaN, infinite or too large numbers in {words(rows)}; "
                    "remove or fill them."
                )
    if batch.weights is not None and (batch.weights < 0).any():
        rows = np.flatnonzero(batch.weights < 0)
        raise InputError(f"data: weights must not be negative, as in {words(rows)}.")


def _fraction(validation: Any) -> float | None:
    """The fraction to hold out (0 for None), or None when rows are given."""
    if validation is None or validation is False:
        return 0.0
    if isinstance(validation, int | float):
        if not 0 <= validation < 1:
            raise InputError(
                f"validation is {validation}; give a fraction from 0 up to, not including, 1, or "
                "a Batch of held-out rows."
            )
        return float(validation)
    return None


def _split(count: int, fraction: float | None, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and to hold out, each in ascending order."""
    held = round(count * fraction) if fraction else 0
    if fraction and count > 1:
        held = min(max(held, 1), count - 1)
    order = np.arange(held, dtype=np.uint32)
    outside = np.sort(shuffled(seed, 0, order, count)).astype(np.int64)
    return np.setdiff1d(np.arange(count), outside, assume_unique=True), outside


def _rows_of(batch: Batch, rows: Any) -> Batch:
    return jtu.tree_map(lambda a: a[rows], batch)


def check_shapes(flow: Any, batch: Batch, name: str) -> None:
    """Refuse events or conditions of the wrong shape, missing conditions and superfluous ones."""
    n = len(batch.x) if batch.x.ndim else 0
    shape = getattr(flow, "shape", None)
    if shape is not None and (batch.x.ndim == 0 or batch.x.shape[1:] != tuple(shape)):
        raise ShapeError(
            f"{name}: x has shape {batch.x.shape}, but the flow's events have shape {shape}; give "
            f"rows along the first axis: (rows, {', '.join(map(str, shape))})."
        )
    if n == 0:
        raise InputError(f"{name} has no rows.")
    cond_shape = getattr(flow, "cond_shape", None)
    if cond_shape is None and batch.condition is not None:
        raise InputError(f"{name}: a condition is given, but the flow takes none.")
    if cond_shape is not None and batch.condition is None:
        raise InputError(f"{name}: the flow needs a condition of shape {cond_shape} for each row.")
    plain = isinstance(cond_shape, tuple) and all(isinstance(n, int) for n in cond_shape)
    if plain and cond_shape is not None:
        found = getattr(batch.condition, "shape", None)
        if found is None:
            raise ShapeError(f"{name}: the flow takes one array of conditions, not a tree.")
        if found != (n, *cond_shape):
            raise ShapeError(
                f"{name}: the condition has shape {found}; {n} rows of this flow need "
                f"{(n, *cond_shape)}."
            )
    for leaf in jtu.tree_leaves(batch.condition):
        if leaf.ndim == 0 or len(leaf) != n:
            raise ShapeError(f"{name}: x has {n} rows, but a condition has shape {leaf.shape}.")
    if batch.weights is not None and batch.weights.shape != (n,):
        raise ShapeError(f"{name}: x has {n} rows, but weights have shape {batch.weights.shape}.")


def check_batch(flow: Any, given: Batch, name: str) -> Batch:
    """Host arrays in the flow's dtype, after every check that can be made before training."""
    dtype = np.dtype(flow.dtype)
    batch: Any = jtu.tree_map(np.asarray, given)
    batch = batch._replace(
        x=_cast(batch.x, dtype, f"{name}: x"),
        condition=jtu.tree_map(
            lambda c: _cast_condition(flow, c, dtype, f"{name}: the condition"), batch.condition
        ),
        weights=None if batch.weights is None else _cast(batch.weights, dtype, f"{name}: weights"),
    )
    check_shapes(flow, batch, name)
    weights = batch.weights
    if weights is not None and (weights < 0).any():
        raise InputError(f"{name}: weights must not be negative; row {_first(weights < 0)} is.")
    if weights is not None and not (weights > 0).any():
        raise InputError(f"{name}: every weight is zero; there is nothing to learn from.")
    return batch


def _cast_condition(flow, value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    # An embedding may look integers up.
    whole = not np.issubdtype(value.dtype, np.inexact)
    return (
        value if whole and getattr(flow, "embed", None) is not None else _cast(value, dtype, name)
    )


def _cast(value: Any, dtype: np.dtype, name: str) -> np.ndarray:
    if value.dtype.kind not in "fiub":
        raise InputError(f"{name} must be numbers; it has dtype {value.dtype}.")
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    bad = ~np.isfinite(cast)
    if bad.any():
        rows = bad.reshape(len(bad), -1).any(1) if bad.ndim else bad.reshape(1)
        finite = value.dtype.kind != "f" or bool(np.isfinite(value).all())
        what = f"numbers too large for {dtype}" if finite else "NaN or infinite numbers"
        raise InputError(
            f"{name} has {what} in {int(rows.sum())} row(s), the first of them row {_first(rows)}; "
            "remove or fill them."
        )
    return cast


def _first(rows: Any) -> int:
    return int(np.flatnonzero(rows)[0])


def stack_held_out(batch: Batch, batch_size: int, placement: Placement) -> Batch:
    """All held-out rows as chunks of one size on the device, padded by rows of weight zero."""
    n, dtype = len(batch.x), batch.x.dtype
    chunks = -(-n // max(batch_size, _CHUNK_ROWS))
    size = -(-n // chunks)
    size += -size % placement.devices
    weights = np.ones(n, dtype) if batch.weights is None else batch.weights
    index = np.minimum(np.arange(chunks * size), n - 1)
    weights = np.where(np.arange(chunks * size) < n, weights[index], 0).astype(dtype)
    batch = jtu.tree_map(lambda a: a[index], batch._replace(weights=None))._replace(weights=weights)
    stacked = jtu.tree_map(lambda a: jnp.asarray(a.reshape(chunks, size, *a.shape[1:])), batch)
    return placement.put(stacked, None, "batch")


class Rows(eqx.Module):
    """A segment's batches, drawn on the device from arrays that live there."""

    source: ArraySource
    seed: Array
    cursor: Cursor
    size: int = eqx.field(static=True)

    def first(self) -> Cursor:
        """Where the segment begins."""
        return self.cursor

    def next(self, cursor: Cursor) -> tuple[Cursor, Batch]:
        """The batch at a cursor, and where the following one begins."""
        batch = self.source.batch(self.seed, cursor, self.size)
        return advance(cursor, self.size, len(self.source)), batch


class Stack(eqx.Module):
    """A segment's batches, stacked by the host."""

    batches: Batch

    def first(self) -> Array:
        """The number of the first batch."""
        return jnp.zeros((), jnp.int32)

    def next(self, cursor: Array) -> tuple[Array, Batch]:
        """The batch of a number, and the following number."""
        return cursor + 1, jtu.tree_map(lambda a: a[cursor], self.batches)


class ArrayFeed:
    """Feeds from host arrays that are put on the device whole."""

    capacity = None

    def __init__(self, batch: Batch, rows: Any, seed, size: int, placement: Placement):
        self.rows, self.size, self._seed, self._host = rows, size, np.asarray(seed), batch
        self.count = len(batch.x)
        source = ArraySource(*jtu.tree_map(jnp.asarray, batch))
        self._source, self._device_seed = placement.put((source, jnp.asarray(seed)))

    @property
    def steps_per_epoch(self) -> float:
        """How many batches make an epoch; not a whole number in general."""
        return self.count / self.size

    def segment(self, step: int, count: int, following: int) -> Rows:
        """What a segment of `count` steps from `step` needs."""
        epoch, position = Cursor.at(step, self.size, self.count)
        cursor = Cursor(jnp.asarray(epoch, jnp.uint32), jnp.asarray(position, jnp.uint32))
        return Rows(self._source, self._device_seed, cursor, self.size)

    def inspect(self, step: int) -> tuple[Batch, Callable[[np.ndarray], Named]]:
        """The batch of one step, and names for some of its rows."""
        rows = rows_at(self._seed, Cursor.at(step, self.size, self.count), self.size, self.count)
        return _rows_of(self._host, rows), lambda bad: _named(self.rows[rows[bad]])

    def sample(self, count: int) -> Batch:
        """Some rows to initialise from."""
        count = min(count, self.count)
        return _rows_of(self._host, rows_at(self._seed, Cursor(0, 0), count, self.count))

    def fingerprint(self) -> list:
        """What a checkpoint remembers of the data."""
        return ["rows", self.count, digest(self._host)]

    def close(self) -> None:
        """Nothing to end."""


class Nothing(eqx.Module):
    """A segment without data: every batch is empty."""

    def first(self) -> tuple[()]:
        """There is nothing to count."""
        return ()

    def next(self, cursor: tuple[()]) -> tuple[tuple[()], Batch]:
        """An empty batch."""
        return cursor, Batch(None)


class NoFeed:
    """For objectives that make their own draws, such as `laminar.objectives.reverse_kl`."""

    capacity = None
    size = 1

    def segment(self, step: int, count: int, following: int) -> Nothing:
        """What a segment needs."""
        return Nothing()

    def inspect(self, step: int) -> tuple[Batch, Callable[[np.ndarray], Named]]:
        """The batch of one step."""
        return Batch(None), lambda bad: ("the draws", ())

    def fingerprint(self) -> list:
        """What a checkpoint remembers of the data."""
        return ["no data"]

    def close(self) -> None:
        """Nothing to end."""


def same_draws(count: int) -> Batch:
    """The chunks of a validation without data: the objective's draws under `count` fixed keys."""
    return Batch(None, weights=jnp.ones((count, 1), jnp.float32))


class StreamFeed:
    """Feeds from mapped arrays or a user's stream, through a bounded stack read ahead."""

    def __init__(
        self, source: Any, rows: np.ndarray | None, seed, size: int, placement: Placement, flow: Any
    ):
        self._source, self.rows, self._seed = source, rows, np.asarray(seed)
        self._placement, self._dtype = placement, np.dtype(flow.dtype)
        self.mapped = isinstance(source, MappedSource)
        if self.mapped:
            self.size, self.count = size, len(source)
        else:
            first = as_batch(source.batch(0, 0))
            self.size = len(first.x) + -len(first.x) % placement.devices
            self.count = len(source) * self.size
        first = self._read(0)
        check_shapes(flow, first, "data")
        nbytes = sum(a.nbytes for a in jtu.tree_leaves(first))
        self.capacity = int(np.clip(_STACK_BYTES // max(nbytes, 1), 1, _MOST_STACKED))
        self._ahead = Prefetcher(self._read)
        # Batches are written into one stack that stays on the device, so that its shape, and with
        # it the compiled segment, is the same for every number of batches.
        self._stack = placement.put(
            jtu.tree_map(lambda a: jnp.zeros((self.capacity, *a.shape), a.dtype), self._put(first)),
            None,
            "batch",
        )

    @property
    def steps_per_epoch(self) -> float:
        """How many batches make an epoch."""
        return self.count / self.size if self.mapped else len(self._source)

    def _where(self, step: int) -> tuple[int, int]:
        return divmod(step, len(self._source))

    def _read(self, step: int) -> Batch:
        if self.mapped:
            batch = self._source.batch(
                self._seed, Cursor.at(step, self.size, self.count), self.size
            )
        else:
            batch = pad_batch(self._source.batch(*self._where(step)), self.size)
        batch = _as_dtype(batch, self._dtype)
        _check_values(batch, lambda bad: self._named(step, bad)[0])
        return batch

    def _named(self, step: int, bad: np.ndarray) -> Named:
        """Rows of the batch of a step, by the user's numbers where they have any."""
        if self.mapped and self.rows is not None:
            cursor = Cursor.at(step, self.size, self.count)
            return _named(self.rows[rows_at(self._seed, cursor, self.size, self.count)[bad]])
        epoch, index = self._where(step)
        return f"{list_rows(bad)} of batch {index} in epoch {epoch} of the stream", ()

    def _put(self, batch: Batch) -> Batch:
        return self._placement.put(jtu.tree_map(jnp.asarray, batch), "batch")

    def segment(self, step: int, count: int, following: int) -> Stack:
        """The stack for a segment of `count` steps from `step`; the following are read ahead.

        It holds good until the next call, which writes into it.
        """
        for i, batch in enumerate(self._ahead.get(step, count, following)):
            self._stack = _write(self._placement, self._stack, self._put(batch), np.int32(i))
        return Stack(self._stack)

    def inspect(self, step: int) -> tuple[Batch, Callable[[np.ndarray], Named]]:
        """The batch of one step, and names for some of its rows."""
        return self._read(step), lambda bad: self._named(step, bad)

    def sample(self, count: int) -> Batch:
        """Some rows to initialise from."""
        return self._read(0)

    def fingerprint(self) -> list:
        """What a checkpoint remembers of the data."""
        return ["stream", self.count, digest(self._read(0))]

    def close(self) -> None:
        """End the reading thread."""
        self._ahead.close()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _write(placement: Placement, stack: Batch, batch: Batch, at: Array) -> Batch:
    """The stack with one of its batches replaced, in place."""

    def write(whole, part):
        whole = jax.lax.dynamic_update_index_in_dim(whole, part, at, 0)
        sharding = placement.sharding(None, "batch")
        return whole if sharding is None else jax.lax.with_sharding_constraint(whole, sharding)

    return jtu.tree_map(write, stack, batch)


def _named(numbers: np.ndarray) -> Named:
    return list_rows(numbers), numbers


def digest(batch: Batch) -> str:
    """A checksum of shapes and of some rows, spread evenly over all."""
    n = len(jtu.tree_leaves(batch)[0])
    index = np.unique(np.linspace(0, n - 1, min(n, 4096)).astype(np.int64))
    rows = (np.asarray(a)[index] for a in jtu.tree_leaves(batch))
    return checksum(str(n).encode(), *(np.ascontiguousarray(a).tobytes() for a in rows))
