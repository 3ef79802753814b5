"""FlowDensity and FlowOutlier: arrays, frames, tiny tables, and what scikit-learn asks."""

import pickle

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import laminar
from laminar import FlowDensity, FlowOutlier
from laminar._errors import InputError

pd = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(120, 2)) @ np.array([[1.0, 0.8], [0.0, 0.5]]) + 3.0


@pytest.fixture(scope="module")
def density(rows):
    return FlowDensity(random_state=0).fit(rows)


def test_score_is_the_mean_log_density(density, rows):
    log_p = density.score_samples(rows)
    assert density.score(rows) == pytest.approx(log_p.mean())
    w = np.arange(120.0)
    assert density.score(rows, sample_weight=w) == pytest.approx((w * log_p).sum() / w.sum())
    np.testing.assert_allclose(log_p, density.model_.log_prob(rows), rtol=1e-5)
    assert isinstance(density.model_, laminar.TableFlow)
    np.testing.assert_array_equal(density.transform(rows)[:, 0], log_p)


def test_draws_are_like_the_rows_and_repeatable(density, rows):
    drawn = density.sample(3_000, random_state=1)
    np.testing.assert_allclose(drawn.mean(0), rows.mean(0), atol=0.3)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(rows.T), atol=0.35)
    np.testing.assert_array_equal(drawn, density.sample(3_000, random_state=1))


def test_a_copy_through_bytes_scores_the_same(density, rows):
    again = pickle.loads(pickle.dumps(density))  # noqa: S301
    np.testing.assert_array_equal(again.score_samples(rows), density.score_samples(rows))


def test_it_stands_in_pipelines_and_searches(rows):
    pipe = make_pipeline(StandardScaler(), FlowDensity(random_state=0))
    search = GridSearchCV(pipe, {"flowdensity__validation": [0.1, 0.3]}, cv=2).fit(rows)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.score(rows) == pytest.approx(search.best_estimator_.score(rows))


def test_output_is_a_frame_when_asked_for(rows):
    frame = pd.DataFrame(rows, columns=["a", "b"])
    both = ColumnTransformer(
        [("density", FlowDensity(random_state=0), ["a", "b"])], remainder="passthrough"
    ).set_output(transform="pandas")
    out = both.fit_transform(frame)
    assert list(out.columns) == ["density__log_density"]
    pl = pytest.importorskip("polars")
    shown = FlowDensity(random_state=0).set_output(transform="polars").fit_transform(frame)
    assert isinstance(shown, pl.DataFrame)


def test_frames_of_numbers_are_what_arrays_are(density, rows):
    frame = pd.DataFrame(rows, columns=["a", "b"])
    model = FlowDensity(random_state=0).fit(frame)
    np.testing.assert_array_equal(model.score_samples(frame), density.score_samples(rows))
    drawn = model.sample(5, random_state=0)
    assert list(drawn.columns) == ["a", "b"]


def test_few_rows_and_constant_columns(rows):
    tiny = np.column_stack([rows[:9], np.full(9, 4.0)])
    model = FlowDensity(random_state=0).fit(tiny)
    assert np.isfinite(model.score(tiny))
    assert (model.sample(3, random_state=0)[:, 2] == 4.0).all()
    assert model.score_samples([[3.0, 3.0, 5.0]]) == -np.inf
    with pytest.raises(ValueError, match="minimum of 8"):
        FlowDensity().fit(tiny[:5])
    with pytest.raises(InputError, match="that varies"):
        FlowDensity().fit(np.ones((20, 2)))


def test_weights_decide(rows):
    far = np.concatenate([rows, rows + 20.0])
    w = np.repeat([1.0, 0.0], 120)
    model = FlowDensity(random_state=0).fit(far, sample_weight=w)
    assert model.score_samples(rows + 20.0).max() < model.score_samples(rows).min()


def test_outliers_are_below_the_offset(rows):
    model = FlowOutlier(contamination=0.1, random_state=0).fit(rows)
    found = model.predict(rows)
    assert (found == -1).sum() == 12
    np.testing.assert_array_equal(found == -1, model.decision_function(rows) < 0)
    np.testing.assert_allclose(
        model.decision_function(rows), model.score_samples(rows) - model.offset_
    )
    assert model.predict([[3.0, 3.0], [9.0, -3.0]]).tolist() == [1, -1]
    p = model.p_values([[3.0, 3.0], [9.0, -3.0]])
    assert p[0] > 0.2 > 0.1 > p[1] > 0
    again = pickle.loads(pickle.dumps(model))  # noqa: S301
    np.testing.assert_array_equal(again.score_samples(rows), model.score_samples(rows))
    few = FlowOutlier(random_state=0).fit(rows[:12])
    with pytest.raises(InputError, match="at least 30 rows"):
        few.p_values(rows)
    with pytest.raises(InputError, match="contamination"):
        FlowOutlier(contamination=0.7).fit(rows)


def test_unknown_kinds_are_refused(rows):
    with pytest.raises(InputError, match="kinds names"):
        FlowDensity(kinds={"age": "integer"}).fit(rows)
