"""FlowClassifier: Bayes' rule, calibration, densities and draws of the classes."""

import pickle

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from laminar import FlowClassifier
from laminar._errors import InputError
from laminar.estimators.classification import best_temperature


def make(rows, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.choice(["left", "right", "up"], rows, p=[0.5, 0.3, 0.2])
    centre = {"left": (-1.5, 0.0), "right": (1.5, 0.0), "up": (0.0, 2.0)}
    X = np.array([centre[k] for k in label]) + rng.normal(size=(rows, 2))
    return X, label


@pytest.fixture(scope="module")
def fitted():
    return FlowClassifier(random_state=0).fit(*make(400))


@pytest.fixture(scope="module")
def test_set():
    return make(2_000, seed=1)


def exact(X):
    parts = [
        p * multivariate_normal(mean).pdf(X)
        for p, mean in ((0.5, (-1.5, 0.0)), (0.3, (1.5, 0.0)), (0.2, (0.0, 2.0)))
    ]
    return np.stack(parts, 1) / np.sum(parts, 0)[:, None]


def test_probabilities_are_near_the_truth_and_calibrated(fitted, test_set):
    X, label = test_set
    p = fitted.predict_proba(X)
    np.testing.assert_allclose(p.sum(1), 1.0)
    assert np.abs(p - exact(X)).mean() < 0.04
    code = np.searchsorted(fitted.classes_, label)
    truth = np.log(exact(X)[np.arange(len(X)), code]).mean()
    assert fitted.log_score(X, label) > truth - 0.03
    assert fitted.score(X, label) > (exact(X).argmax(1) == code).mean() - 0.02


def test_bayes_rule_holds(fitted, test_set):
    X = test_set[0][:50]
    logits = fitted.class_log_prob(X) + np.log(fitted.priors_)
    log_p = logits / fitted.temperature_
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    np.testing.assert_allclose(fitted.predict_log_proba(X), log_p, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fitted.score_samples(X), np.log(np.exp(logits).sum(1)), rtol=1e-5)
    np.testing.assert_array_equal(fitted.predict(X), fitted.classes_[logits.argmax(1)])
    # In the units of the columns: twice as long, and each density is a quarter.
    scaled = FlowClassifier(random_state=0).fit(2 * make(400)[0], make(400)[1])
    np.testing.assert_allclose(
        scaled.class_log_prob(2 * X), fitted.class_log_prob(X) - 2 * np.log(2), atol=0.05
    )


def test_draws_by_class(fitted):
    X, label = fitted.sample(600, label="up", random_state=0)
    assert (label == "up").all()
    np.testing.assert_allclose(X.mean(0), [0.0, 2.0], atol=0.3)
    _, label = fitted.sample(2_000, random_state=0)
    assert (label == "left").mean() == pytest.approx(0.5, abs=0.08)
    with pytest.raises(InputError, match="no class 'down'"):
        fitted.sample(3, label="down")


def test_a_copy_through_bytes_says_the_same(fitted, test_set):
    X = test_set[0][:100]
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))


def test_the_temperature_mends_what_is_too_sure():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4_000, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    code = (p.cumsum(1) > rng.uniform(size=(4_000, 1))).argmax(1)
    w = np.ones(4_000)
    assert best_temperature(logits, code, w) == pytest.approx(1.0, abs=0.08)
    assert best_temperature(5 * logits, code, w) == pytest.approx(5.0, rel=0.1)
    assert best_temperature(np.full((3, 2), -np.inf), np.zeros(3, int), np.ones(3)) == 1.0


def test_classes_of_few_rows_and_constant_columns():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(40, 3)), rng.normal(size=(3, 3)) + 4])
    X[:, 2] = 1.0
    y = np.repeat([0, 1], [40, 3])
    model = FlowClassifier(random_state=0).fit(X, y)
    assert model.score(X, y) > 0.95
    p = model.predict_proba([[100.0, -100.0, 1.0]])
    assert np.isfinite(p).all()


def test_priors_and_bad_options():
    X, label = make(60)
    uniform = FlowClassifier(priors=[1 / 3] * 3, random_state=0).fit(X, label)
    np.testing.assert_allclose(uniform.priors_, 1 / 3)
    with pytest.raises(InputError, match="3 positive numbers"):
        FlowClassifier(priors=[0.5, 0.5]).fit(X, label)
    with pytest.raises(InputError, match="validation is"):
        FlowClassifier(validation=1.5).fit(X, label)
    with pytest.raises(InputError, match="the class 'down'"):
        uniform.log_score(X[:1], ["down"])


def test_more_classes_than_are_scored_at_once():
    rng = np.random.default_rng(0)
    code = np.repeat(np.arange(70), 8)
    X = np.stack([code % 10, code // 10], 1) * 3.0 + rng.normal(size=(560, 2))
    model = FlowClassifier(random_state=0).fit(X, code)
    p = model.predict_proba(X)
    assert p.shape == (560, 70)
    np.testing.assert_allclose(p.sum(1), 1.0)
    assert model.score(X, code) > 0.7
