"""Features of rows: finite and of order one whatever the columns are."""

import numpy as np

from laminar.estimators.features import Features


def test_outliers_gaps_and_constants_stay_finite():
    rng = np.random.default_rng(0)
    x = np.stack(
        [
            rng.normal(size=200),
            rng.normal(size=200) * 1e-3 + 1e9,
            np.full(200, 7.0),
            rng.integers(0, 2, 200).astype(float),
            np.where(np.arange(200) % 5 == 0, np.nan, rng.exponential(size=200)),
        ],
        1,
    )
    x[3, 0] = 1e12
    features = Features.learn(x)
    f = features.transform(x)
    # Five columns, ranks of the three that take more than two values, one indicator.
    assert f.shape == (200, 9)
    assert np.isfinite(f).all()
    assert np.abs(f).max() <= 4.0
    assert np.abs(f[:, :2]).std(0).min() > 0.1
    np.testing.assert_array_equal(f[:, 8], np.isnan(x[:, 4]))
    far = features.transform(np.full((1, 5), 1e300))
    assert np.isfinite(far).all()


def test_ranks_are_normal_deviates():
    x = np.random.default_rng(1).exponential(size=(4_000, 1))
    ranks = Features.learn(x).transform(x)[:, 1]
    assert abs(ranks.mean()) < 0.02
    assert abs(ranks.std() - 1) < 0.03
    assert (np.argsort(x[:, 0])[::400] == np.argsort(ranks, kind="stable")[::400]).mean() > 0.8


def test_ties_share_the_middle_of_their_ranks():
    x = np.repeat([0.0, 1.0, 2.0], [50, 100, 50])[:, None]
    ranks = Features.learn(x).transform(np.array([[0.0], [1.0], [2.0]]))[:, 1]
    assert ranks[1] == 0.0 or abs(ranks[1]) < 0.02
    assert ranks[0] < -0.5 < 0.5 < ranks[2]


def test_names_have_indicators():
    rng = np.random.default_rng(2)
    code = rng.integers(0, 3, 100).astype(float)
    x = np.stack([rng.normal(size=100), code], 1)
    features = Features.learn(x, names=[1])
    f = features.transform(np.array([[0.0, 2.0], [0.0, -1.0], [np.nan, np.nan]]))
    np.testing.assert_array_equal(f[:, -3:], [[0, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert np.isfinite(f).all()
