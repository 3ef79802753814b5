"""FlowRegressor: a law that is known, intervals that hold, and the ways in which it is called."""

import pickle

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.base import clone

import laminar
from laminar import FlowRegressor
from laminar._errors import InputError
from laminar.estimators.regression import _say_shared
from laminar.tables.infer import learn_column

SMALL = {"members": 3, "steps": 400, "width": 24, "depth": 1, "random_state": 0}


def make(rows, seed=0):
    """A sine with noise whose width grows with the second column; NaN in the third."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-2, 2, size=(rows, 3))
    scale = 0.1 + 0.3 * (X[:, 1] + 2) / 4
    y = 10 + 5 * (np.sin(2 * X[:, 0]) + scale * rng.normal(size=rows))
    X[rng.uniform(size=rows) < 0.1, 2] = np.nan
    return X, y, 10 + 5 * np.sin(2 * X[:, 0]), 5 * scale


@pytest.fixture(scope="module")
def fitted():
    X, y, _, _ = make(900)
    return FlowRegressor(**SMALL).fit(X, y)


@pytest.fixture(scope="module")
def test_set():
    return make(1_500, seed=1)


def test_the_law_is_near_the_truth(fitted, test_set):
    X, y, loc, scale = test_set
    truth = norm.logpdf(y, loc, scale).mean()
    flat = norm.logpdf(y, y.mean(), y.std()).mean()
    assert truth - 0.25 < fitted.log_score(X, y) < truth + 0.02
    assert fitted.log_score(X, y) > flat + 0.8
    assert fitted.log_score_ == pytest.approx(fitted.log_score(X, y), abs=0.12)
    assert fitted.score(X, y) > 0.8  # noise leaves 0.87
    assert np.abs(fitted.predict(X) - loc).mean() < 0.8


def test_intervals_hold_and_follow_the_noise(fitted, test_set):
    X, y, _, scale = test_set
    low, high = fitted.predict_interval(X, 0.9).T
    assert 0.86 < ((low <= y) & (y <= high)).mean() < 0.94
    assert np.corrcoef(high - low, scale)[0, 1] > 0.8
    u = fitted.cdf(X, y)
    assert np.abs(np.sort(u) - (np.arange(len(u)) + 0.5) / len(u)).max() < 0.06


def test_quantiles_probabilities_and_draws_are_of_one_law(fitted, test_set):
    X = test_set[0][:40]
    q = fitted.predict_quantile(X, [0.1, 0.5, 0.9])
    assert q.shape == (40, 3)
    np.testing.assert_allclose(fitted.cdf(X, q[:, 2]), 0.9, atol=1e-4)
    np.testing.assert_array_equal(fitted.predict_quantile(X, 0.5), q[:, 1])
    draws = fitted.sample(X, 2_000, random_state=3)
    assert draws.shape == (40, 2_000)
    np.testing.assert_allclose((draws < q[:, [0]]).mean(1), 0.1, atol=0.03)
    np.testing.assert_array_equal(draws, fitted.sample(X, 2_000, random_state=3))
    # The mean of draws has the error of its spread; the heavy tail makes it a little wider.
    wide = 6 * draws.std(1) / np.sqrt(2_000)
    assert (np.abs(draws.mean(1) - fitted.predict(X)) < wide).all()


def test_the_density_integrates_to_one(fitted, test_set):
    X = np.repeat(test_set[0][:1], 4_001, 0)
    y = np.linspace(-60, 80, 4_001)
    total = np.exp(fitted.log_prob(X, y)).sum() * (y[1] - y[0])
    assert total == pytest.approx(1.0, abs=2e-3)


def test_copies_and_saved_laws_are_the_same(fitted, test_set, tmp_path):
    X, y, *_ = test_set
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301
    np.testing.assert_array_equal(again.log_prob(X, y), fitted.log_prob(X, y))
    laminar.save(tmp_path / "law.laminar", fitted.law_)
    assert laminar.load(tmp_path / "law.laminar").cond_shape == fitted.law_.cond_shape
    assert clone(fitted).get_params() == fitted.get_params()


def test_a_response_of_counts_is_dequantised_and_drawn_whole():
    rng = np.random.default_rng(0)
    X = rng.uniform(0, 3, size=(300, 1))
    y = rng.poisson(np.exp(X[:, 0])).astype(float)
    model = FlowRegressor(**{**SMALL, "steps": 150}).fit(X, y)
    draws = model.sample(X[:50], 20, random_state=0)
    np.testing.assert_array_equal(draws, np.round(draws))
    # A density on unit cells: sums over the counts are close to one, and it is no spike.
    counts = np.arange(-10, 120.0)
    one = np.repeat(X[:1], len(counts), 0)
    assert np.exp(model.log_prob(one, counts)).sum() == pytest.approx(1.0, abs=0.1)


def test_weights_count_and_rows_without_weight_do_not():
    X, y, *_ = make(200)
    bad = y.copy()
    bad[::4] = 1e6
    w = np.ones(200)
    w[::4] = 0
    quick = {**SMALL, "steps": 60}
    model = FlowRegressor(**quick).fit(X, bad, sample_weight=w)
    kept = w > 0
    alone = FlowRegressor(**quick).fit(X[kept], y[kept])
    np.testing.assert_allclose(model.predict(X), alone.predict(X), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": 1}, "at least 2"),
        ({"location": "forest"}, "'trees' or None"),
    ],
)
def test_options_without_meaning_are_refused(change, message):
    X, y, *_ = make(30)
    with pytest.raises(InputError, match=message):
        FlowRegressor(**{**SMALL, **change}).fit(X, y)


def test_bad_data_are_refused(fitted, test_set):
    X, y, *_ = test_set
    with pytest.raises(InputError, match="does not vary"):
        FlowRegressor().fit(X[:20], np.full(20, 3.0))
    with pytest.raises(ValueError, match="minimum of 8"):
        FlowRegressor().fit(X[:5], y[:5])
    with pytest.raises(InputError, match="n_samples=3"):
        FlowRegressor().fit(X[:20], y[:20], sample_weight=np.arange(20) < 3)
    with pytest.raises(InputError, match="one number for each row"):
        fitted.log_prob(X, y[:-1])
    with pytest.raises(InputError, match="between 0 and 1"):
        fitted.predict_quantile(X, [0.5, 1.0])
    with pytest.raises(InputError, match="share between 0 and 1"):
        fitted.predict_interval(X, 90)


def test_without_trees_the_flow_finds_the_location():
    X, y, loc, _ = make(900)
    model = FlowRegressor(**{**SMALL, "steps": 800, "location": None}).fit(X, y)
    assert np.corrcoef(model.predict(X), loc)[0, 1] > 0.9


def test_a_value_that_many_responses_share_is_warned_of():
    rng = np.random.default_rng(0)
    y = np.where(rng.random(500) < 0.7, 0.0, rng.lognormal(size=500))
    with pytest.warns(UserWarning, match="% of y are exactly 0"):
        _say_shared(learn_column("y", y), y)
    with pytest.raises(InputError, match="use FlowClassifier"):
        FlowRegressor().fit(rng.normal(size=(30, 2)), np.repeat(["a", "b"], 15).astype(object))
