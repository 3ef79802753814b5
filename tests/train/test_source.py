"""The order of rows, and the sources that follow it."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laminar._errors import InputError, ShapeError
from laminar.objectives import Batch
from laminar.train.source import (
    ArraySource,
    Cursor,
    MappedSource,
    Prefetcher,
    Stream,
    advance,
    pad_batch,
    rows_at,
    seed_words,
    shuffled,
)

SEED = np.array([123456789, 987654321], np.uint32)


def order(n, epoch=0, seed=SEED):
    return shuffled(seed, epoch, np.arange(n, dtype=np.uint32), n)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3000),
    epoch=st.integers(0, 2**32 - 1),
    words=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
)
def test_every_row_stands_once_in_an_epoch(n, epoch, words):
    rows = order(n, epoch, np.array(words, np.uint32))
    assert np.array_equal(np.sort(rows), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_device_and_host_agree(n):
    position = np.arange(n, dtype=np.uint32)
    on_device = jax.jit(lambda s, e, p: shuffled(s, e, p, n))(
        jnp.asarray(SEED), jnp.uint32(3), jnp.asarray(position)
    )
    assert np.array_equal(np.asarray(on_device), order(n, 3))


def test_epochs_and_seeds_differ():
    assert not np.array_equal(order(100, 0), order(100, 1))
    assert not np.array_equal(order(100), order(100, seed=SEED + np.uint32(1)))
    one, two = seed_words(jr.key(0)), seed_words(jr.key(1))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_every_row_is_equally_likely_at_every_position(n):
    epochs = 4000
    rows = np.stack([order(n, e) for e in range(epochs)])
    counts = np.stack([(rows == v).sum(0) for v in range(n)])
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    freedom = (n - 1) ** 2
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_neighbours_are_not_kept_together():
    rows = order(1000).astype(int)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.1
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.02


def test_the_tail_of_an_epoch_is_completed_by_the_next():
    n, size = 10, 4
    rows = np.concatenate([rows_at(SEED, Cursor.at(t, size, n), size, n) for t in range(5)])
    assert np.array_equal(rows[:10], order(n, 0))
    assert np.array_equal(rows[10:], order(n, 1))


def test_the_cursor_on_the_device_follows_the_one_on_the_host():
    n, size = 7, 5
    cursor = Cursor(jnp.uint32(0), jnp.uint32(0))
    for t in range(12):
        assert (int(cursor.epoch), int(cursor.position)) == Cursor.at(t, size, n)
        cursor = advance(cursor, size, n)


def test_mapped_arrays_give_the_batches_of_arrays(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = MappedSource(np.load(tmp_path / "x.npy", mmap_mode="r"), weights=np.arange(50.0))
    arrays = ArraySource(jnp.asarray(x), weights=jnp.arange(50.0))
    for t in (0, 3, 9):
        ours = mapped.batch(SEED, Cursor.at(t, 16, 50), 16)
        cursor = Cursor(*(jnp.uint32(v) for v in Cursor.at(t, 16, 50)))
        theirs = arrays.batch(jnp.asarray(SEED), cursor, 16)
        assert np.array_equal(ours.x, theirs.x)
        assert np.array_equal(ours.weights, theirs.weights)


def test_a_subset_keeps_to_its_rows():
    source = MappedSource(np.arange(20.0)[:, None]).subset(np.array([3, 5, 8]))
    assert len(source) == 3
    assert source.take(np.array([2, 0])).x[:, 0].tolist() == [8.0, 3.0]
    assert source.subset(np.array([1])).take(np.array([0])).x[0, 0] == 5.0


def test_a_short_batch_is_padded_with_weight_zero():
    batch = pad_batch(Batch(np.ones((3, 2)), np.zeros((3, 1))), 5)
    assert batch.x.shape == (5, 2)
    assert batch.condition.shape == (5, 1)
    assert batch.weights.tolist() == [1, 1, 1, 0, 0]
    with pytest.raises(InputError, match="batch of 6 rows"):
        pad_batch(Batch(np.ones((6, 2))), 5)


def test_leading_axes_must_agree():
    with pytest.raises(ShapeError, match="weights have shape"):
        ArraySource(jnp.ones((4, 2)), weights=jnp.ones(3))
    with pytest.raises(ShapeError, match="a condition has shape"):
        MappedSource(np.ones((4, 2)), condition={"a": np.ones((5, 1))})
    with pytest.raises(ShapeError, match="between 1 and"):
        ArraySource(jnp.ones((0, 2)))


def test_a_stream_is_recognised_by_what_it_offers():
    class Mine:
        def __len__(self):
            return 2

        def batch(self, epoch, index):
            return np.ones((4, 1))

    assert isinstance(Mine(), Stream)
    assert not isinstance(np.ones(3), Stream)


def test_what_is_read_ahead_serves_any_count():
    seen = []
    reader = Prefetcher(lambda number: seen.append(number) or number)
    assert list(reader.get(0, 4, 3)) == [0, 1, 2, 3]
    assert list(reader.get(4, 1, 5)) == [4]
    assert list(reader.get(5, 4, 1)) == [5, 6, 7, 8]
    assert list(reader.get(9, 2, 0)) == [9, 10]
    assert seen == list(range(11))
    assert list(reader.get(3, 2, 0)) == [3, 4]  # not what was expected: loaded anew
    reader.close()
    assert seen[11:] == [3, 4]


def test_an_error_of_the_stream_comes_through():
    def load(number):
        raise ValueError("mine")

    reader = Prefetcher(load)
    with pytest.raises(ValueError, match="mine"):
        list(reader.get(0, 1, 0))
    reader.close()
