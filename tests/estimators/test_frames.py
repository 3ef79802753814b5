"""Frames with texts, dates and gaps, in and out of all four estimators."""

import pickle

import numpy as np
import pytest

from laminar import FlowClassifier, FlowDensity, FlowRegressor
from laminar._errors import InputError

pd = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    town = rng.choice(["Bern", "Graz", "Łódź"], 160, p=[0.5, 0.3, 0.2])
    size = rng.normal(size=160) + np.select([town == "Bern", town == "Graz"], [4.0, 0.0], -4.0)
    return pd.DataFrame({"town": town, "size": size, "number": rng.integers(0, 20, 160)})


def test_a_density_of_names_and_numbers(people):
    model = FlowDensity(steps=200, random_state=0).fit(people)
    known = model.score(people)
    strange = people.assign(town=people["town"].to_numpy()[::-1])
    assert model.score(strange) < known - 1
    drawn = model.sample(200, random_state=0)
    assert list(drawn.columns) == list(people.columns)
    assert set(drawn["town"]) <= {"Bern", "Graz", "Łódź"}
    assert pd.api.types.is_integer_dtype(drawn["number"])
    with pytest.raises(InputError, match="give a frame"):
        model.score(np.ones((3, 3)))


def test_a_regressor_sees_names(people):
    model = FlowRegressor(members=2, steps=150, width=16, depth=1, random_state=0)
    model.fit(people[["town", "number"]], people["size"])
    assert model.score(people[["town", "number"]], people["size"]) > 0.8
    new = pd.DataFrame({"town": ["Bern", "nowhere"], "number": [3, 4]})
    assert np.isfinite(model.predict(new)).all()


@pytest.mark.slow
def test_a_classifier_sees_names(people):
    X = people.assign(tall=people["size"] > 2)[["town", "number"]]
    y = np.where(people["size"] > 2, "tall", "short")
    model = FlowClassifier(random_state=0).fit(X, y)
    assert model.score(X, y) > 0.85
    rows, label = model.sample(20, label="tall", random_state=0)
    assert set(rows["town"]) <= {"Bern", "Graz", "Łódź"}
    assert (label == "tall").all()
    gaps = X.assign(number=[None, *X["number"][1:]])
    with pytest.raises(InputError, match="'number'"):
        model.predict(gaps)


def towns_and_classes(rows, seed):
    """Every second of twelve names is of one class, the more surely if a number is missing."""
    rng = np.random.default_rng(seed)
    town, gone = rng.integers(0, 12, rows), rng.random(rows) < 0.3
    chance = np.where(town % 2 == 0, 0.8, 0.2) + np.where(gone, 0.15, -0.15)
    X = pd.DataFrame(
        {
            "town": [f"town {k:02d}" for k in town],
            "number": np.where(gone, np.nan, rng.normal(size=rows)),
            "year": 2024,
            "name": [None, *(f"row {seed} {i}" for i in range(1, rows))],
            "nothing": None,
        }
    )
    return X, rng.random(rows) < chance, chance


@pytest.fixture(scope="module")
def sorted_towns():
    X, y, _ = towns_and_classes(900, 0)
    return FlowClassifier(random_state=0).fit(X, y, np.r_[np.ones(800), np.full(100, 0.5)])


def test_a_classifier_takes_names_without_an_order_and_gaps(sorted_towns):
    X, y, chance = towns_and_classes(500, 1)
    assert np.abs(sorted_towns.predict_proba(X)[:, 1] - chance).mean() < 0.08
    # What no class has says nothing of which it is.
    later = X.assign(year=2025)
    np.testing.assert_array_equal(sorted_towns.predict(later), sorted_towns.predict(X))
    assert np.isneginf(sorted_towns.class_log_prob(later)).all()
    # With the number missing the twelve names are nearly all that there is.
    rows = pd.concat([X[X["number"].isna()][:1]] * 12).assign(
        town=[f"town {k:02d}" for k in range(12)]
    )
    gone = np.exp(sorted_towns.class_log_prob(rows)).sum(0)
    shares = [X["number"].isna()[y == k].mean() for k in (False, True)]
    np.testing.assert_allclose(gone, shares, atol=0.08)
    again = pickle.loads(pickle.dumps(sorted_towns))  # noqa: S301
    np.testing.assert_array_equal(again.predict_proba(X), sorted_towns.predict_proba(X))


def test_draws_of_a_classifier_have_its_names_and_gaps(sorted_towns):
    rows, label = sorted_towns.sample(400, random_state=0)
    assert list(rows.columns) == ["town", "number", "year", "name", "nothing"]
    even = rows["town"].str[-1].isin(list("02468"))
    assert even[label].mean() > 0.6
    assert even[~label].mean() < 0.4
    assert rows["number"].isna()[label].mean() > rows["number"].isna()[~label].mean()


def test_a_classifier_of_few_mixed_rows_says_so():
    X, _, _ = towns_and_classes(24, 0)
    with pytest.raises(InputError, match="n_samples=24"):
        FlowClassifier(validation=0.9).fit(X, np.zeros(24, int))


def test_gaps_in_an_array_are_told_too():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    X = rng.normal(size=(300, 2))
    X[rng.random(300) < 0.1 + 0.8 * y, 0] = np.nan
    model = FlowClassifier(random_state=0).fit(X, y)
    assert model.score(X, y) > 0.85


def test_a_classifier_of_polars_frames_gives_them_back(people):
    pl = pytest.importorskip("polars")
    X = pl.DataFrame({"town": people["town"].tolist(), "number": people["number"].tolist()})
    y = np.where(people["size"] > 2, "tall", "short")
    model = FlowClassifier(random_state=0).fit(X, y)
    same = FlowClassifier(random_state=0).fit(people[["town", "number"]], y)
    np.testing.assert_allclose(
        model.predict_proba(X), same.predict_proba(people[["town", "number"]]), rtol=1e-5
    )
    rows, _ = model.sample(20, label="tall", random_state=0)
    assert isinstance(rows, pl.DataFrame)
    assert rows.schema["number"].is_integer()
    assert set(rows["town"]) <= {"Bern", "Graz", "Łódź"}
