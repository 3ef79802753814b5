"""Conformal p-values, and the lists of discoveries made of them: levels, ties, weights, errors."""

import numpy as np
import pytest

from laminar._errors import InputError
from laminar.scores import (
    benjamini_hochberg,
    conditional_p_values,
    conformal_p_values,
    holm,
    null_share,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_p_values_count_the_calibration_scores_below_and_are_never_zero():
    calibration = np.array([1.0, 2.0, 2.0, 3.0])
    scores = np.array([-np.inf, 0.5, 1.0, 2.0, 2.5, 9.0, np.nan])
    p = conformal_p_values(scores, calibration)
    np.testing.assert_allclose(p[:6], np.array([1, 1, 2, 4, 4, 5]) / 5)
    assert np.isnan(p[6])


def test_p_values_are_uniform_over_calibration_sets():
    """Over many small calibration sets P(p ≤ t) is t exactly at multiples of 1/(n+1)."""
    draws = rng().normal(size=(10_000, 10))
    p = np.array([conformal_p_values(row[:1], row[1:])[0] for row in draws])
    for k in range(1, 10):
        assert (p <= k / 10 + 1e-9).mean() == pytest.approx(k / 10, abs=0.015)


def test_ties_are_conservative_or_exactly_uniform():
    draws = rng(1).integers(0, 3, size=(8_000, 10)).astype(float)
    plain = np.array([conformal_p_values(row[:1], row[1:])[0] for row in draws])
    generator = rng(2)
    random = np.array(
        [conformal_p_values(r[:1], r[1:], ties="random", rng=generator)[0] for r in draws]
    )
    assert random.min() > 0
    for t in (0.1, 0.25, 0.5, 0.8):
        assert (plain <= t).mean() <= t + 0.01
        assert (random <= t).mean() == pytest.approx(t, abs=0.015)
    assert (plain <= 0.25).mean() < 0.2


def test_weights_undo_a_known_shift():
    """New rows from N(1, 1), calibration from N(0, 1), weighted by the ratio exp(x − ½)."""
    generator = rng(3)
    calibration, new = generator.normal(size=5_000), generator.normal(1.0, 1.0, 5_000)
    shifted = conformal_p_values(new, calibration)
    weighted = conformal_p_values(
        new,
        calibration,
        weights=np.exp(new - 0.5),
        calibration_weights=np.exp(calibration - 0.5),
    )
    assert abs((weighted <= 0.2).mean() - 0.2) < 0.05
    assert abs((shifted <= 0.2).mean() - 0.2) > 0.1
    equal = conformal_p_values(new, calibration, weights=np.full(5_000, 2.0))
    np.testing.assert_allclose(equal, conformal_p_values(new, calibration), atol=1 / 5_000)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], []), {}, "at least one calibration score"),
        (([1.0], [np.nan, 1.0]), {}, "1 of 2 scores are NaN, first at position 0"),
        (([[1.0]], [1.0]), {}, r"shape \(1, 1\)"),
        (([1.0], [1.0]), {"ties": "random"}, "give rng="),
        (([1.0], [1.0]), {"ties": "no"}, "'conservative' or 'random'"),
        (([1.0], [1.0]), {"weights": np.zeros(1)}, "positive"),
        (([1.0], [1.0]), {"weights": np.ones(2)}, "2 entries for 1 scores"),
        (([1.0], [1.0]), {"calibration_weights": -np.ones(1)}, "0 or more"),
    ],
)
def test_what_p_values_cannot_be_made_of(arguments, options, message):
    with pytest.raises(InputError, match=message):
        conformal_p_values(*map(np.asarray, arguments), **options)


@pytest.mark.parametrize("n", [20, 201])
def test_conditional_p_values_hold_given_the_calibration_set(n):
    """In nine of ten calibration sets no threshold is passed by more than its share."""
    marginal = np.arange(1, n + 2) / (n + 1)
    larger = conditional_p_values(marginal, n, confidence=0.9)
    assert (larger >= marginal).all()
    assert (np.diff(larger) >= 0).all()
    assert larger[-1] == 1
    order = np.sort(rng(4).random((20_000, n)), axis=1)
    holds = (order <= larger[:-1]).all(axis=1)
    assert 0.895 < holds.mean() < 0.99
    assert np.isnan(conditional_p_values(np.array([np.nan]), n)[0])


def test_conditional_p_values_say_what_they_need():
    for p, n, confidence, message in (
        ([0.123], 9, 0.9, "no multiple of 1/10"),
        ([0.5], 0, 0.9, "at least 1"),
        ([0.5], 1, 1.0, "between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            conditional_p_values(np.array(p), n, confidence)


def test_benjamini_hochberg_is_the_step_up_procedure():
    p = rng(5).random(200) ** 2
    p[17] = np.nan
    adjusted = benjamini_hochberg(p)
    assert np.isnan(adjusted[17])
    tested = np.sort(p[~np.isnan(p)])
    for level in (0.05, 0.2, 0.5, 0.9):
        passing = np.flatnonzero(tested <= level * np.arange(1, 200) / 199)
        cut = tested[passing[-1]] if len(passing) else -1
        np.testing.assert_array_equal(adjusted <= level, p <= cut)
    with pytest.raises(InputError, match="between 0 and 1"):
        benjamini_hochberg(np.array([1.5]))
    with pytest.raises(InputError, match="null_share"):
        benjamini_hochberg(p, 0.0)
    assert benjamini_hochberg(np.array([])).shape == (0,)


def test_the_false_discovery_rate_is_controlled_with_a_shared_calibration_set():
    """Normal rows N(0, 1), anomalies N(−4, 1), the score is the value; 2,000 whole experiments."""
    generator = rng(6)
    false = {0.05: [], 0.1: [], 0.2: []}
    with_storey, found = [], []
    for _ in range(2_000):
        scores = np.concatenate([generator.normal(size=80), generator.normal(-4, 1, 20)])
        p = conformal_p_values(scores, generator.normal(size=400))
        adjusted = benjamini_hochberg(p)
        for level, shares in false.items():
            listed = adjusted <= level
            shares.append(listed[:80].sum() / max(listed.sum(), 1))
        found.append((adjusted <= 0.1)[80:].mean())
        listed = benjamini_hochberg(p, null_share(p)) <= 0.1
        with_storey.append(listed[:80].sum() / max(listed.sum(), 1))
    for level, shares in false.items():
        error = np.std(shares) / np.sqrt(len(shares))
        # Of 100 rows 80 are normal: the rate is at most 0.8 of the level.
        assert 0.5 * level < np.mean(shares) < 0.8 * level + 3 * error
    assert np.mean(with_storey) < 0.1 + 3 * np.std(with_storey) / np.sqrt(2_000)
    assert np.mean(found) > 0.8


def test_the_share_of_normal_rows():
    p = np.concatenate([rng(7).random(8_000), np.zeros(2_000), [np.nan]])
    assert null_share(p) == pytest.approx(0.8, abs=0.03)
    assert null_share(np.array([np.nan])) == 1
    assert null_share(np.ones(3)) == 1
    with pytest.raises(InputError, match="threshold"):
        null_share(p, 1.0)


def test_holm():
    adjusted = holm(np.array([0.01, 0.04, 0.03, np.nan, 0.9]))
    np.testing.assert_allclose(adjusted[[0, 1, 2, 4]], [0.04, 0.09, 0.09, 0.9])
    assert np.isnan(adjusted[3])
