"""Drift between tables, and from a model's rows: levels, what is named, and the words of it."""

import json

import numpy as np
import pytest

from laminar._errors import InputError
from laminar.bijections.base import Identity
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.tables.anomaly import Detector
from laminar.tables.calibration import calibrate
from laminar.tables.cells import Cells
from laminar.tables.drift import drift, drift_from, model_fit
from laminar.tables.model import TableFlow
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table


def rng(seed=0):
    return np.random.default_rng(seed)


def mixed(seed, rows=400, shift=0.0, gaps=0.2, level="b"):
    generator = rng(seed)
    x = generator.normal(size=rows)
    y = np.where(generator.random(rows) < gaps, np.nan, generator.normal(shift, 1, rows))
    levels = ("a", level)
    cells = (Cells(), Cells(), Cells("text", levels))
    values = np.column_stack([x, y, generator.integers(0, 2, rows)])
    return Table(("x", "y", "kind"), values, f"table {seed}", cells=cells)


def test_equal_tables_keep_the_level():
    found = [
        drift(mixed(i, 100), mixed(100 + i, 100), level=0.2, permutations=49) for i in range(60)
    ]
    assert np.mean([report.found for report in found]) < 0.35
    report = drift(mixed(0), mixed(1))
    assert "No drift is found" in report.verdict
    assert report.drifted == []


def test_what_differs_is_named():
    known = mixed(0)
    report = drift(known, mixed(1, shift=1.0))
    assert report.found
    assert report.drifted == ["y"]
    assert "1 of 3 columns differs (y)" in report.verdict
    assert "the joint distribution" in report.verdict
    more_gaps = drift(known, mixed(1, gaps=0.5))
    assert more_gaps.drifted == ["y"]
    other_level = drift(known, mixed(1, level="c"))
    assert other_level.drifted == ["kind"]
    assert other_level.columns[0].test == "chi-square"
    plain = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(plain)["drifted"] == ["y"]


def test_a_change_of_dependence_shows_in_the_whole():
    x = rng(2).normal(size=(500, 2))
    known = Table(("a", "b"), x)
    turned = Table(("b", "a"), rng(3).normal(size=(500, 2)) @ [[1, 0.8], [0, 0.6]])
    report = drift(known, turned)
    assert report.drifted == []
    assert report.found
    assert report.verdict.count("the joint distribution differs") == 1


@pytest.fixture(scope="module")
def detector():
    """The exact model of two independent normal columns."""
    table = Table(("a", "b"), rng(4).normal(size=(900, 2)), "the known rows")
    schema = learn_schema(table)
    model = TableFlow(Flow(Normal((2,)), Identity((2,))), schema)
    return Detector(
        model, calibrate(model, table.take(np.arange(400)), table.take(np.arange(400, 900)))
    )


def test_drift_from_a_model(detector):
    same = drift_from(detector, Table(("b", "a"), rng(5).normal(size=(600, 2)), "new"))
    assert not same.found
    assert {test.test for test in same.columns} == {"KS", "PIT"}
    turned = rng(6).normal(size=(600, 2)) * [1, 1.6]
    found = drift_from(detector, Table(("a", "b"), turned, "new"))
    assert found.drifted == ["b"]
    tests = {(test.what, test.test): test for test in (*found.columns, *found.rows)}
    assert tests["b", "PIT"].adjusted < 0.05
    assert tests["the mean log-density", "typicality"].adjusted < 0.01
    assert "new has drifted from the model's table" in found.verdict


def test_the_fit_of_a_model_is_judged_by_its_conditional_laws(detector):
    assert all(test.adjusted > 0.01 for test in model_fit(detector))
    model = detector.model
    scaled = tuple(
        type(c)(**{**vars(c), "scale": c.scale * (3 if c.name == "b" else 1)})
        for c in model.schema.columns
    )
    schema = type(model.schema)(scaled, (), model.schema.order, model.schema.mixed)
    wrong = Detector(TableFlow(model.flow, schema), detector.calibration)
    found = {test.what: test.adjusted for test in model_fit(wrong)}
    assert found["a"] > 0.01
    assert found["b"] < 1e-6


def test_what_cannot_be_compared():
    known = mixed(0)
    with pytest.raises(InputError, match="no column 'kind'"):
        drift(known, known.select(["x", "y"]))
    with pytest.raises(InputError, match="4 rows, and a comparison needs at least 5"):
        drift(known, known.take(np.arange(4)))
    with pytest.raises(InputError, match="level"):
        drift(known, known, level=0)


def test_a_model_with_an_identifier_sees_no_drift_in_new_ones():
    def made(seed):
        ids = Cells("text", tuple(f"{seed}-{i:04d}" for i in range(300)))
        values = np.column_stack([np.arange(300), rng(seed).normal(size=300)])
        return Table(("id", "x"), values, f"table {seed}", cells=(ids, Cells()))

    table = made(0)
    schema = learn_schema(table)
    model = TableFlow(Flow(Normal((1,)), Identity((1,))), schema)
    train, held = (table.take(part) for part in np.split(np.arange(300), 2))
    found = drift_from(Detector(model, calibrate(model, train, held)), made(1), permutations=99)
    assert not found.found
    assert [test.what for test in found.columns if test.test != "PIT"] == ["x"]
