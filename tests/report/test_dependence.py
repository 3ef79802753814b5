"""The pairs that depend on each other are found, in whatever way they do."""

import numpy as np
import pytest

from laminar.report.columns import _correlation
from laminar.report.dependence import dependent_pairs, mutual_information


def test_mutual_information_of_known_tables():
    a = np.repeat([0, 1], 5000)
    assert mutual_information(a, a) == pytest.approx(np.log(2), abs=1e-3)
    rng = np.random.default_rng(0)
    b, c = rng.integers(0, 8, (2, 2000))
    assert mutual_information(b, c) < 0.01


def test_pairs_without_correlation_are_found():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 5))
    angle = rng.uniform(0, 2 * np.pi, 2000)
    x[:, 1], x[:, 4] = np.cos(angle), np.sin(angle)
    x[:, 3] = x[:, 2] ** 2
    found = dependent_pairs(x, 2, rng)
    assert {pair[:2] for pair in found} == {(1, 4), (2, 3)}
    assert found[0][2] >= found[1][2] > 0.3


def test_no_column_takes_all_places():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 6))
    x[:, 1:4] = x[:, :1] + 0.1 * x[:, 1:4]
    x[:, 5] = x[:, 4] + 0.5 * x[:, 5]
    pairs = [pair[:2] for pair in dependent_pairs(x, 4, rng)]
    assert (4, 5) in pairs
    assert max(sum(d in pair for pair in pairs) for d in range(6)) <= 2


def test_gaps_and_constants_are_borne():
    x = np.ones((30, 3))
    x[:, 1] = np.nan
    x[::2, 2] = np.nan
    assert len(dependent_pairs(x, 4, np.random.default_rng(0))) == 3


def test_a_wide_table_is_looked_at_where_it_matters():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 300))
    x[:, 271] = x[:, 14] + 0.1 * x[:, 271]
    assert dependent_pairs(x, 1, rng)[0][:2] == (14, 271)


def test_ties_have_no_correlation_of_their_own():
    rng = np.random.default_rng(0)
    rare = (rng.random((2, 2_000)) < 0.05).astype(float)
    assert abs(_correlation(*rare)) < 0.1
    x = rng.normal(size=300)
    assert _correlation(x, np.exp(x)) == pytest.approx(1)
