"""Two-sample tests: their level when nothing differs, and what they see when something does."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from laminar._errors import InputError
from laminar.scores import (
    category_test,
    ks_test,
    memorisation,
    mmd_test,
    nearest_distances,
    uniform_test,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_ks_has_its_level_and_its_power():
    generator = rng()
    p = [ks_test(generator.normal(size=40), generator.normal(size=60)).p_value for _ in range(400)]
    assert abs(np.mean(np.array(p) <= 0.2) - 0.2) < 0.06
    found = ks_test(np.array([1.0, 2.0, np.nan, np.inf]), np.array([1.0, 5.0]))
    assert found.statistic == pytest.approx(1 / 3)
    assert ks_test(generator.normal(size=3_000), generator.normal(0.2, 1, 3_000)).p_value < 1e-4
    assert np.isnan(ks_test(np.array([np.nan]), np.array([1.0])).p_value)


def test_the_uniform_test():
    u = rng(1).random(2_000)
    assert uniform_test(u).p_value > 0.01
    assert uniform_test(u**1.3).p_value < 1e-6
    with pytest.raises(InputError, match="between 0 and 1"):
        uniform_test(np.array([0.5, 1.5]))


def test_categories():
    generator = rng(2)
    p = [
        category_test(generator.integers(0, 6, 80), generator.integers(0, 6, 120)).p_value
        for _ in range(400)
    ]
    assert abs(np.mean(np.array(p) <= 0.2) - 0.2) < 0.06
    a = np.array([0.0] * 50 + [1.0] * 50)
    b = np.array([0.0] * 90 + [np.nan] * 10)
    found = category_test(a, b)
    assert found.statistic == pytest.approx(0.5)
    assert found.p_value < 1e-6
    assert category_test(np.zeros(9), np.zeros(9)).p_value == 1
    assert category_test(np.arange(30.0), np.arange(30.0, 60.0)).p_value == 1  # all are rare
    assert np.isnan(category_test(np.array([]), a).p_value)


@pytest.mark.parametrize(("known", "new", "share"), [(10_000, 100, 1e-3), (1_000, 100, 5e-3)])
def test_rare_categories_are_no_surprise(known, new, share):
    generator = rng(3)
    p = []
    for _ in range(600):
        # Two rare ones besides, so that they are put together.
        draws = [
            generator.choice(4, n, p=[0.6, 0.4 - 1.5 * share, share, share / 2])
            for n in (known, new)
        ]
        p.append(category_test(*draws).p_value)
    assert np.mean(np.less_equal(p, 0.05)) < 0.08
    assert np.mean(np.less_equal(p, 0.001)) < 0.007


def test_mmd_has_its_level_and_sees_what_no_column_shows():
    generator = rng(3)
    p = [
        mmd_test(
            generator.normal(size=(30, 2)),
            generator.normal(size=(20, 2)),
            generator,
            permutations=39,
        ).p_value
        for _ in range(400)
    ]
    assert abs(np.mean(np.array(p) <= 0.2) - 0.2) < 0.06
    a = generator.normal(size=(400, 2))
    b = generator.normal(size=(400, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    found = mmd_test(a, b, generator)
    assert found.p_value == 1 / 500
    assert min(ks_test(a[:, d], b[:, d]).p_value for d in (0, 1)) > 0.01


def test_mmd_is_the_distance_of_mean_embeddings(monkeypatch):
    a, b = rng(4).normal(size=(60, 3)), rng(5).normal(1, 1, (45, 3))
    rows = np.concatenate([a, b])
    kernel = np.exp(-cdist(rows, rows, "sqeuclidean") / (2 * 1.5**2))
    expected = kernel[:60, :60].mean() + kernel[60:, 60:].mean() - 2 * kernel[:60, 60:].mean()
    found = mmd_test(a, b, rng(), bandwidth=1.5, permutations=9)
    assert found.statistic == pytest.approx(np.sqrt(expected), rel=1e-9)
    monkeypatch.setattr("laminar.scores.twosample._BLOCK", 200)
    in_blocks = mmd_test(a, b, rng(), bandwidth=1.5, permutations=9)
    np.testing.assert_allclose(in_blocks, found)
    assert mmd_test(a, b, rng(), most_rows=20, permutations=9).p_value <= 1


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), {}, "2 columns and 1"),
        (np.zeros((1, 2)), np.zeros((3, 2)), {}, "at least two rows"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), {}, "missing or not finite"),
        (np.zeros((3, 2)), np.zeros((3, 2)), {"permutations": 0}, "at least 1"),
        (np.zeros((3, 2)), np.zeros((3, 2)), {"bandwidth": -1.0}, "positive"),
    ],
)
def test_what_mmd_cannot_compare(a, b, options, message):
    with pytest.raises(InputError, match=message):
        mmd_test(a, b, rng(), **options)


def test_equal_rows_are_no_difference():
    ones = np.ones((30, 2))
    assert mmd_test(ones, ones, rng(), permutations=19).p_value == 1


def test_nearest_distances_are_exact():
    x, y = rng(6).normal(size=(40, 3)), rng(7).normal(size=(70, 3))
    y[5] = y[6]
    distances = np.sort(cdist(x, y), axis=1)
    for k in (1, 4):
        np.testing.assert_allclose(nearest_distances(x, y, k), distances[:, k - 1], rtol=1e-12)
    own = np.sort(cdist(y, y), axis=1)
    np.testing.assert_allclose(nearest_distances(y, y, own=True), own[:, 1], rtol=1e-12, atol=0)
    assert nearest_distances(y, y, own=True)[5] == 0
    for rows, reference, message in (
        (x, y[:, :2], "same columns"),
        (x, y[:0], "more rows"),
        (x * np.nan, y, "missing or not finite"),
    ):
        with pytest.raises(InputError, match=message):
            nearest_distances(rows, reference)


def test_copies_are_caught_and_new_rows_are_not():
    generator = rng(8)
    train = generator.normal(size=(300, 2))
    p = [
        memorisation(generator.normal(size=(60, 2)), train, generator.normal(size=(80, 2))).p_value
        for _ in range(300)
    ]
    assert abs(np.mean(np.array(p) <= 0.2) - 0.2) < 0.07
    held_out = generator.normal(size=(100, 2))
    near = memorisation(train[:100] + 0.01 * generator.normal(size=(100, 2)), train, held_out)
    assert near.p_value < 1e-6
    assert near.z < -5
    assert near.closer > 0.8
    assert near.copies == 0
    assert memorisation(train[:50], train, held_out).copies == 1
    assert memorisation(held_out + 3, train, held_out).p_value > 0.99
    same = memorisation(np.ones((5, 2)), np.ones((9, 2)), np.ones((7, 2)))
    assert same.p_value == 1
    assert same.held_out_copies == 1


def test_equal_rows_have_not_drifted():
    same = np.zeros((20, 1))
    assert mmd_test(same, same, rng=np.random.default_rng(0)).p_value == 1
