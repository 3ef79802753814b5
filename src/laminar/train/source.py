"""Sources of batches: arrays on the device, memory-mapped arrays, or a user's own stream.

The order of rows is a function of (seed, epoch, position) and nothing else, so training can be cut
anywhere and go on with the same rows. `shuffled` computes the row at a position directly, by a
small Feistel network that permutes 0…n−1 for every (seed, epoch): no permutation is ever stored or
sorted, on the device or off it, and a table larger than memory is shuffled as easily as a small
one.

Every row is used exactly once per epoch. The last rows of an epoch that do not fill a batch are
completed with the first rows of the next epoch's permutation, so every batch is full and none is
padded.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax

from laminar._errors import InputError, ShapeError
from laminar._typing import Array, PRNGKeyArray, PyTree
from laminar.objectives import Batch

_ROUND_PAIRS = 4
_GOLDEN = np.uint32(0x9E3779B9)
MAX_ROWS = 2**31 - 1


def seed_words(key: PRNGKeyArray) -> Array:
    """Two 32-bit words that seed the order of rows, drawn from a key."""
    return jax.random.bits(key, (2,), jnp.uint32)


def _mix(x):
    """The finaliser of MurmurHash3: a bijection of 32-bit words in which each bit moves half."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _grid(n: int) -> tuple[np.uint32, np.uint32]:
    """Sides a × b of the smallest near-square grid with at least n cells; fewer than a too many."""
    a = math.isqrt(n - 1) + 1
    return np.uint32(a), np.uint32(-(-n // a))


def _scramble(x, seed, epoch, n: int, xp: Any):
    """One pass of the Feistel network over the a × b grid that covers 0…n−1.

    The cell (l, r) goes through l ← l + F_1(r) mod a, r ← r + F_2(l) mod b, and so on; each half
    round can be undone, hence the whole is a permutation (Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains").
    """
    a, b = _grid(n)
    tweak = _mix(seed[0] + _mix(seed[1] ^ _mix(epoch + _GOLDEN)))

    def two_rounds(j, cell):
        left, right = cell
        tweaked = tweak + xp.asarray(j, xp.uint32) * _GOLDEN
        left = (left + _mix(right ^ _mix(tweaked)) % a) % a
        return left, (right + _mix(left ^ _mix(~tweaked)) % b) % b

    cell = (x // b, x % b)
    if xp is jnp:
        # A loop, since eight rounds spelled out take long to compile.
        left, right = lax.fori_loop(1, _ROUND_PAIRS + 1, two_rounds, cell)
    else:
        for j in range(1, _ROUND_PAIRS + 1):
            cell = two_rounds(np.full(1, j), cell)
        left, right = cell
    return left * b + right


def shuffled(seed, epoch, position, n: int):
    """The rows that stand at given positions of an epoch's permutation of 0…n−1.

    Args:
        seed: Two 32-bit words, as `seed_words` gives.
        epoch: uint32, of the same shape as `position` or a scalar.
        position: uint32 positions below n, one-dimensional. NumPy arrays are computed by NumPy,
            JAX arrays by JAX, with equal results.
        n: Number of rows, static, below 2³¹.

    Returns:
        uint32 row numbers, distinct for distinct positions.
    """
    if isinstance(position, np.ndarray):
        seed = [np.full(1, word, np.uint32) for word in np.asarray(seed)]
        epoch = np.broadcast_to(np.asarray(epoch, np.uint32), position.shape)
        row = _scramble(position, seed, epoch, n, np)
        while (outside := row >= n).any():
            row[outside] = _scramble(row[outside], seed, epoch[outside], n, np)
        return row
    epoch = jnp.broadcast_to(epoch, position.shape)

    # The grid has a few cells too many; a point that lands there walks on along its cycle.
    def walk(carry):
        row, outside = carry
        row = jnp.where(outside, _scramble(row, seed, epoch, n, jnp), row)
        return row, row >= np.uint32(n)

    start = (position, jnp.ones(position.shape, bool))
    return lax.while_loop(lambda carry: jnp.any(carry[1]), walk, start)[0]


class Cursor(NamedTuple):
    """Where the next batch begins: the epoch, and the row (or batch of a stream) within it."""

    epoch: Any
    position: Any

    @classmethod
    def at(cls, step: int, size: int, rows: int) -> "Cursor":
        """The cursor of a step when batches of `size` are cut from epochs of `rows` rows."""
        return cls(*divmod(step * size, rows))


def rows_at(seed, cursor: Cursor, size: int, n: int):
    """Row numbers of the batch at a cursor; rows past the end of the epoch come from the next."""
    xp = jnp if isinstance(cursor.position, jax.Array) else np
    offset = xp.arange(size, dtype=xp.uint32) + xp.asarray(cursor.position, xp.uint32)
    wrapped = (offset >= np.uint32(n)).astype(xp.uint32)
    epoch = xp.asarray(cursor.epoch, xp.uint32) + wrapped
    return shuffled(seed, epoch, offset - wrapped * np.uint32(n), n)


def advance(cursor: Cursor, size: int, n: int) -> Cursor:
    """The cursor after a batch, on the device (uint32)."""
    position = cursor.position + np.uint32(size)
    wrapped = (position >= np.uint32(n)).astype(jnp.uint32)
    return Cursor(cursor.epoch + wrapped, position - wrapped * np.uint32(n))


class ArraySource(eqx.Module):
    """Rows held on the device.

    Attributes:
        x: Events, ``(rows, *shape)``.
        condition: Conditions with the same leading axis (any pytree of arrays), or None.
        weights: Non-negative weights ``(rows,)``, or None for equal ones.
    """

    x: Array
    condition: PyTree = None
    weights: Array | None = None

    def __check_init__(self):
        _check_rows(self)

    def __len__(self) -> int:
        """Number of rows."""
        return self.x.shape[0]

    def take(self, rows: Any) -> Batch:
        """The rows of given numbers as a batch."""
        return jtu.tree_map(lambda a: a[rows], Batch(self.x, self.condition, self.weights))

    def batch(self, seed: Array, cursor: Cursor, size: int) -> Batch:
        """The batch at a cursor; ``size`` is at most the number of rows."""
        return self.take(rows_at(seed, cursor, size, len(self)))


@runtime_checkable
class Stream(Protocol):
    """What a user's own source of batches must offer.

    ``len(stream)`` is the number of batches in an epoch, and ``stream.batch(epoch, index)`` gives
    one of them: a `Batch` of host arrays (or an array alone), every time the same for the same
    arguments. It is called ahead of time from one other thread. A batch shorter than the first
    one is padded with rows of weight zero.
    """

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def batch(self, epoch: int, index: int) -> Any:
        """One batch of host arrays."""
        ...


class MappedSource:
    """Rows in host arrays, which may be memory-mapped files larger than memory.

    Batches have the rows, and the order, that `ArraySource` gives for the same seed.

    Args:
        x: ``(rows, *shape)``, for instance ``np.load(path, mmap_mode="r")``.
        condition: Array (or pytree of arrays) with the same leading axis, or None.
        weights: ``(rows,)`` or None.
        rows: Use only these row numbers (an array), by default all.

    Raises:
        ShapeError: If the leading axes differ.
    """

    def __init__(self, x, condition: PyTree = None, weights=None, *, rows=None):
        self.x, self.condition, self.weights = x, condition, weights
        self.rows = rows
        _check_rows(self)

    def __len__(self) -> int:
        """Number of rows."""
        return self.x.shape[0] if self.rows is None else len(self.rows)

    def take(self, rows: Any) -> Batch:
        """The rows of given numbers, read in the order in which they lie in the file."""
        rows = rows if self.rows is None else self.rows[rows]
        order = np.argsort(rows, kind="stable")
        back = np.argsort(order, kind="stable")
        ordered = rows[order]
        return jtu.tree_map(
            lambda a: np.asarray(a[ordered])[back], Batch(self.x, self.condition, self.weights)
        )

    def batch(self, seed: np.ndarray, cursor: Cursor, size: int) -> Batch:
        """The batch at a cursor."""
        return self.take(rows_at(seed, cursor, size, len(self)))

    def subset(self, rows: np.ndarray) -> "MappedSource":
        """The source of some of the rows only."""
        rows = rows if self.rows is None else self.rows[rows]
        return MappedSource(self.x, self.condition, self.weights, rows=rows)


Source = ArraySource | MappedSource | Stream


def _check_rows(source) -> None:
    name = type(source).__name__
    n = source.x.shape[0] if source.x.ndim else 0
    if not 0 < n <= MAX_ROWS:
        raise ShapeError(
            f"{name}: x has shape {source.x.shape}; it needs between 1 and {MAX_ROWS:,} rows on "
            "its first axis."
        )
    for leaf in jtu.tree_leaves(source.condition):
        if leaf.ndim == 0 or leaf.shape[0] != n:
            raise ShapeError(f"{name}: x has {n} rows, but a condition has shape {leaf.shape}.")
    if source.weights is not None and source.weights.shape != (n,):
        raise ShapeError(f"{name}: x has {n} rows, but weights have shape {source.weights.shape}.")


def as_batch(value: Any) -> Batch:
    """What a stream gave, as a `Batch`: a Batch itself, or an array of events alone."""
    return value if isinstance(value, Batch) else Batch(value)


def pad_batch(batch: Batch, size: int) -> Batch:
    """A batch of host arrays brought to `size` rows; the rows added are copies of weight zero."""
    batch = jtu.tree_map(np.asarray, as_batch(batch))
    n = batch.x.shape[0]
    if not 0 < n <= size:
        raise InputError(
            f"The stream gave a batch of {n} rows; all must have between 1 and {size} rows, the "
            "size of its first batch."
        )
    weights = np.ones(n, np.float32) if batch.weights is None else batch.weights
    if n < size:
        index = np.minimum(np.arange(size), n - 1)
        batch = jtu.tree_map(lambda a: a[index], batch._replace(weights=None))
        weights = np.where(np.arange(size) < n, weights[index], 0).astype(weights.dtype)
    return batch._replace(weights=weights)


class Prefetcher:
    """Runs ``load(number)`` for consecutive numbers in a thread, ahead of their being asked for."""

    def __init__(self, load: Callable[[int], Any]):
        self._load = load
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="laminar-source")
        self._next = 0
        self._begun: deque[Future] = deque()

    def get(self, start: int, count: int, following: int) -> Iterator[Any]:
        """The results of `count` numbers from `start`, while those of the following are begun.

        At most ``count + following`` results exist at a time. What was read ahead serves any later
        call that goes on where this one ends, of whatever count.
        """
        if start != self._next:
            for future in self._begun:
                future.cancel()
            self._begun.clear()
            self._next = start
        for number in range(start + len(self._begun), start + count + following):
            self._begun.append(self._pool.submit(self._load, number))
        for _ in range(count):
            self._next += 1
            yield self._begun.popleft().result()

    def close(self) -> None:
        """End the thread, waiting for the number it is at."""
        self._pool.shutdown(wait=True, cancel_futures=True)
