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


def test_a_classifier_takes_names_without_an_order_and_gaps():
    """Every second of twelve names is of one class, the more surely if a number is missing."""
    rng = np.random.default_rng(0)
    town = rng.integers(0, 12, 900)
    gone = rng.random(900) < 0.3
    y = rng.random(900) < np.where(town % 2 == 0, 0.8, 0.2) + np.where(gone, 0.15, -0.15)
    number = np.where(gone, np.nan, rng.normal(size=900))
    X = pd.DataFrame({"town": [f"town {k:02d}" for k in town], "number": number})
    model = FlowClassifier(random_state=0).fit(X, y)
    sure = np.where(town % 2 == 0, 0.8, 0.2) + np.where(gone, 0.15, -0.15)
    assert np.abs(model.predict_proba(X)[:, 1] - sure).mean() < 0.08
    p = np.exp(model.class_log_prob(X[gone][:1].assign(town="town 00")))
    towns = pd.DataFrame({"town": sorted(set(X["town"])), "number": [np.nan] * 12})
    both = np.exp(model.class_log_prob(towns)).sum(0)
    # With the number missing the twelve names are nearly all that there is.
    assert (p < both).all()
    assert (np.abs(both - model_share(gone, y)) < 0.1).all()
    again = pickle.loads(pickle.dumps(model))  # noqa: S301
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def model_share(gone, y):
    """How often the number is missing in each class."""
    return np.array([gone[~y].mean(), gone[y].mean()])
