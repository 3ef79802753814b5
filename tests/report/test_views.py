"""Columns of every kind get an axis that suits them and words that say what they hold."""

import numpy as np
import pytest

from laminar.report.charts import histogram
from laminar.report.views import cell_text, look
from laminar.tables.cells import Cells
from laminar.tables.columns import Column

RNG = np.random.default_rng(0)


def view(data, drawn=None, cells=None, kind="real", step=0.0):
    data = np.asarray(data, np.float64)
    column = Column("x", kind, 0.0, cells=cells or Cells(), step=step)
    return look(column, data, data if drawn is None else np.asarray(drawn))


def test_numbers_leave_outliers_outside():
    values = np.concatenate([RNG.normal(size=1000), [1e9]])
    own = view(values)
    assert not own.categorical
    assert own.axis.high < 10
    assert own.middle(values).startswith("median ")
    assert own.difference() == 0


def test_skewed_positive_numbers_are_shown_by_ratios():
    assert view(np.exp(3 * RNG.normal(size=1000))).axis.log
    assert not view(np.exp(0.3 * RNG.normal(size=1000))).axis.log
    assert not view(np.exp(3 * RNG.normal(size=1000)) - 1.0).axis.log


def test_few_values_are_levels():
    assert list(view(np.repeat([1.0, 2.0, 5.0], 20)).levels) == [1, 2, 5]
    assert not len(view(RNG.normal(size=60)).levels)


def test_categories_have_names_and_shares():
    cells = Cells("text", ("a", "b", "c"))
    data, drawn = np.repeat([0.0, 1.0, np.nan], [6, 2, 2]), np.repeat([0.0, 2.0, -1.0], [5, 4, 1])
    own = view(data, drawn, cells, "categorical")
    assert [own.text(code) for code in own.codes] == ["a name not seen before", "a", "b", "c"]
    np.testing.assert_allclose(own.frequencies(data), [0, 0.75, 0.25, 0])
    # Half of 0.6 − 0.5, 0.2 − 0, 0 − 0.4, 0 − 0.1 and the gaps' 0.2 − 0.
    assert own.difference() == pytest.approx(0.5 * (0.1 + 0.2 + 0.4 + 0.1 + 0.2))
    assert own.middle(data) == "a 75%, b 25%"
    assert own.gaps() == "Missing: 20% of the rows, 0% of the samples."
    assert np.isnan(own.positions(data)[-1])
    spread = own.spread(data, RNG)
    assert (np.abs(spread[:8] - own.positions(data)[:8]) <= 0.3).all()


def test_dates_are_dates():
    cells = Cells("datetime", unit="D", origin=18_000)
    own = view(np.arange(200.0), None, cells, "datetime")
    assert all(text.startswith("2019") for _, text in own.axis.ticks)
    assert own.text(0.0) == "2019-04-14"


@pytest.mark.parametrize(
    ("cells", "value", "text"),
    [
        (Cells(), 3.0, "3"),
        (Cells(), 1234567.0, "1,234,567"),
        (Cells(), -0.12345, "−0.1235"),
        (Cells(), np.nan, "missing"),
        (Cells("boolean"), 1.0, "True"),
        (Cells("text", ("</b>",)), 0.0, "</b>"),
        (Cells("datetime", unit="s", origin=0, zone="UTC"), 60.0, "1970-01-01 00:01:00 UTC"),
    ],
)
def test_cells_as_text(cells, value, text):
    assert cell_text(cells, value) == text


@pytest.mark.parametrize("values", [[np.nan] * 5, [2.0] * 5, [1.0, np.nan]])
def test_columns_with_little_in_them(values):
    own = view(values)
    assert own.axis.high > own.axis.low
    assert isinstance(own.middle(own.data), str)


def test_whole_numbers_have_bars_of_as_many_values():
    values = np.repeat(np.arange(100.0), 30)
    own = view(values, None, Cells("integer"), "integer", step=1.0)
    picture = histogram("x", "", own.axis, own.data, own.drawn, own.step)
    heights = np.unique(np.round(picture.marks[-1].points[1:-1, 1], 6))
    # One height for all whole intervals, one at most for each cut end.
    assert len(heights) <= 3
