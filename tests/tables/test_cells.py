"""Cells: numbers for what people write, and back, exactly; and other tables in the same terms."""

import datetime
import decimal
import zoneinfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laminar._errors import InputError
from laminar.tables.cells import (
    NANOSECONDS,
    UNSEEN,
    UNSEEN_TEXT,
    CellError,
    Cells,
    datetime_column,
    localised,
    moments_column,
    text_column,
)
from laminar.tables.table import Table, recode

COLOURS = Cells("text", ("blue", "red", "white"))
DAYS = Cells("datetime", unit="D", origin=19_000)
BERLIN = Cells("datetime", unit="s", zone="Europe/Berlin")


@pytest.mark.parametrize(
    ("cells", "values", "expected"),
    [
        (Cells(), [0.5, np.nan], np.array([0.5, np.nan])),
        (Cells("integer"), [3.0, -1.0], np.array([3, -1])),
        (Cells("integer"), [3.0, np.nan], np.array([3.0, np.nan])),
        (Cells("integer"), [3.5, 1.0], np.array([3.5, 1.0])),
        (Cells("boolean"), [1.0, 0.0], np.array([True, False])),
        (Cells("boolean"), [1.0, np.nan], np.array([True, None], object)),
        (COLOURS, [2.0, np.nan, 0.0], np.array(["white", None, "blue"], object)),
        (Cells("text"), [np.nan], np.array([None], object)),
        (DAYS, [0.2, np.nan], np.array(["2022-01-08", "NaT"], "datetime64[D]")),
        (
            Cells("datetime", unit="ns", origin=5),
            [1.0],
            np.array(["1970-01-01T00:00:00.000000006"], "datetime64[ns]"),
        ),
    ],
)
def test_numbers_become_cells_and_numbers_again(cells, values, expected):
    decoded = cells.decode(np.array(values))
    assert decoded.dtype == expected.dtype
    np.testing.assert_array_equal(decoded, expected)
    if cells != DAYS:
        np.testing.assert_array_equal(cells.encode(decoded), values)
    np.testing.assert_array_equal(DAYS.encode(DAYS.decode(np.array([7.0, np.nan]))), [7, np.nan])


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (Cells("boolean"), [0.0, 2.0]),
        (COLOURS, [0.0, 3.0]),
        (COLOURS, [0.0, 0.5]),
        (COLOURS, [0.0, -2.0]),
        (DAYS, [0.0, 1e30]),
        (DAYS, [0.0, np.inf]),
    ],
)
def test_numbers_that_stand_for_no_cell(cells, values):
    with pytest.raises(CellError, match="Cell 2 is") as caught:
        cells.decode(np.array(values))
    assert caught.value.position == 1


def test_a_text_in_no_level_is_unseen():
    np.testing.assert_array_equal(COLOURS.encode(["red", "green", None, float("nan")])[:2], [1, -1])
    assert COLOURS.decode(np.array([UNSEEN]))[0] == UNSEEN_TEXT


@pytest.mark.parametrize(
    ("cells", "given", "codes"),
    [
        (
            Cells(),
            [1, 2.5, " 3e2 ", True, decimal.Decimal("0.1"), None],
            [1, 2.5, 300, 1, 0.1, None],
        ),
        (Cells("integer"), np.array([1, 2], np.uint8), [1, 2]),
        (Cells("boolean"), [True, np.False_, "TRUE", "0", 1.0, None], [1, 0, 1, 0, 1, None]),
        (Cells("text", ("01", "2", "x")), [1, 2.0, "1", "01", 7], [0, 1, -1, 0, -1]),
        (Cells("text", ("1", "1.0")), [1, 1.0, "1.0"], [0, 0, 1]),
        (Cells("text", ("01", "1.0")), [1], [-1]),
        (Cells("text", ("False", "True", "maybe")), [True, False], [1, 0]),
        (Cells("text", ("2024-01-01", "2024-01-01 10:00:00")), [datetime.date(2024, 1, 1)], [0]),
        (
            Cells("text", ("2024-01-01 10:00:00", "x")),
            np.array(["2024-01-01T10:00:00", "NaT"], "datetime64[s]"),
            [0, None],
        ),
        (
            DAYS,
            ["2022-01-09", datetime.date(2022, 1, 8), "2022-01-08T12:00", np.datetime64("NaT")],
            [1, 0, 0.5, None],
        ),
        (
            BERLIN,
            [
                "1970-01-01T01:00",
                "1970-01-01T00:00:00.5Z",
                "1970-01-01 05:30+05:30",
                datetime.datetime(1970, 7, 1, tzinfo=datetime.UTC),
                datetime.datetime(1970, 1, 1, 1),
                np.datetime64("1970-01-01T00:01"),
            ],
            [0, 0.5, 0, 181 * 86_400, 0, 60],
        ),
    ],
)
def test_other_spellings_of_the_same_cells(cells, given, codes):
    expected = np.array([np.nan if code is None else code for code in codes], float)
    np.testing.assert_array_equal(cells.encode(given), expected)


@pytest.mark.parametrize(
    ("cells", "cell"),
    [
        (Cells(), "1_000"),
        (Cells(), []),
        (Cells(), 2**53 + 1),
        (Cells(), "9007199254740993"),
        (Cells("boolean"), 2),
        (Cells("boolean"), "yes"),
        (COLOURS, ["red"]),
        (DAYS, "01/02/2024"),
        (DAYS, "2024-02-30"),
        (DAYS, 5),
        (DAYS, "2024-01-01T00:00Z"),
        (DAYS, datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)),
    ],
)
def test_what_is_no_cell_of_its_column_is_named(cells, cell):
    with pytest.raises(CellError, match="Cell 2 holds") as caught:
        cells.encode([None, cell, cell])
    assert caught.value.position == 1
    with pytest.raises(InputError, match=r"shape \(1, 1\)"):
        cells.encode(np.zeros((1, 1)))
    with pytest.raises(CellError, match=r"2\*\*53"):
        Cells().encode(np.array([1, 2**63 - 1]))


@given(
    unit=st.sampled_from(tuple(NANOSECONDS)),
    counts=st.lists(st.integers(-(2**40), 2**40) | st.none(), min_size=1, max_size=9),
)
def test_dates_are_counted_exactly_in_the_coarsest_unit(unit, counts):
    """Whatever the unit of the source, the same dates come back, and no coarser unit would do."""
    missing = np.array([count is None for count in counts])
    there = np.array([count or 0 for count in counts], np.int64)
    values, cells = datetime_column(there, missing, unit)
    decoded = cells.decode(values)
    expected = there.view(f"datetime64[{unit}]")
    expected[missing] = np.datetime64("NaT")
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(cells.encode(expected), values)
    np.testing.assert_array_equal(np.isnan(values), missing)
    if not missing.all():
        assert np.nanmin(values) == 0
    units = tuple(NANOSECONDS)
    for coarser in units[: units.index(cells.unit)]:
        assert (expected[~missing] != expected[~missing].astype(f"datetime64[{coarser}]")).any()
    nanoseconds = [None if c is None else c * NANOSECONDS[unit] for c in counts]
    again = moments_column(nanoseconds, "")
    assert again is not None
    np.testing.assert_array_equal(again[0], values)
    assert again[1] == cells


def test_dates_at_the_ends_of_what_int64_holds():
    ends = np.array([-(2**63) + 1, 2**63 - 1])
    values, cells = datetime_column(ends, np.zeros(2, bool), "ns")
    assert cells.unit == "ns"
    np.testing.assert_array_equal(values, [0, 2.0**64])
    far = np.array(["0001-01-01", "9999-12-31"], "datetime64[D]")
    np.testing.assert_array_equal(
        Cells("datetime", unit="ns").encode(far), far.astype(np.int64) * 86_400e9
    )
    assert moments_column([2**63], "") is None
    assert moments_column([253_402_214_400_000_000_000], "") is not None


def test_clocks_that_change():
    place = zoneinfo.ZoneInfo("Europe/Berlin")
    wall = np.array(["2024-03-31T01:59:59", "2024-03-31T03:00:00", "2024-10-27T02:30:00"], "M8[s]")
    utc = [w.replace(tzinfo=place).astimezone(datetime.UTC) for w in wall.tolist()]
    shown = localised(wall.astype(np.int64), "s", "Europe/Berlin")
    np.testing.assert_array_equal(shown, [np.datetime64(u.replace(tzinfo=None)) for u in utc])
    with pytest.raises(InputError, match="no time zone 'Mars/Olympus'"):
        localised(wall.astype(np.int64), "s", "Mars/Olympus")


def test_levels_are_those_that_occur_unless_they_have_an_order():
    indices = np.array([2.0, np.nan, 0.0])
    codes, cells = text_column(indices, ["white", "green", "blue"])
    assert cells == Cells("text", ("blue", "white"))
    np.testing.assert_array_equal(codes, [0, np.nan, 1])
    codes, cells = text_column(indices, ["white", "green", "blue"], ordered=True)
    assert cells == Cells("text", ("white", "green", "blue"), ordered=True)
    np.testing.assert_array_equal(codes, indices)
    assert text_column(np.array([np.nan]), [])[1] == Cells("text")


# ------------------------------------------------------------------------------ whole tables


def column(values, cells, rows=None):
    values = np.array(values, float)[:, None]
    return Table(("c",), values, "t.csv", cells=(cells,), rows=rows)


@pytest.mark.parametrize(
    ("have", "values", "wanted", "codes"),
    [
        (Cells("text", ("green", "red")), [0, 1, np.nan, 1], COLOURS, [-1, 1, np.nan, 1]),
        (COLOURS, [UNSEEN, 2], Cells("text", ("white",)), [UNSEEN, 0]),
        (Cells("integer"), [2, 1, 3], Cells("text", ("1", "2")), [1, 0, -1]),
        (Cells("boolean"), [1, 0], Cells("text", ("false", "true")), [1, 0]),
        (Cells("boolean"), [1, 0], Cells("integer"), [1, 0]),
        (Cells("integer"), [1, 0], Cells("boolean"), [1, 0]),
        (Cells("text", ("1.5", "2")), [1, 0], Cells(), [2, 1.5]),
        (Cells("text", ("false", "true")), [1, 0], Cells("boolean"), [1, 0]),
        (Cells(), [np.nan, np.nan], DAYS, [np.nan, np.nan]),
        (Cells("datetime", unit="s", origin=19_001 * 86_400), [0, 43_200], DAYS, [1, 1.5]),
        (Cells("text", ("2022-01-09", "2022-01-10")), [1, 0], DAYS, [2, 1]),
        (
            Cells("datetime", unit="D", zone="UTC"),
            [0, 1],
            BERLIN,
            [0, 86_400],
        ),
        (Cells("datetime", unit="D"), [0, 1], BERLIN, [-3600, 82_800]),
    ],
)
def test_cells_of_another_table_in_the_terms_of_this_one(have, values, wanted, codes):
    table = column(values, have)
    aligned = recode(table, {"c": wanted})
    np.testing.assert_array_equal(aligned.column("c"), codes)
    assert aligned.cells == (wanted,)
    np.testing.assert_array_equal(table.column("c"), values)
    np.testing.assert_array_equal(table.align({"c": wanted}).values, aligned.values)


@pytest.mark.parametrize(
    ("have", "values", "wanted", "parts"),
    [
        (Cells("text", ("1", "a", "z")), [0, 2, 1], Cells(), ["row 8", "'z'", "a number"]),
        (Cells("integer"), [1, 5], Cells("boolean"), ["row 8", "'5'", "true or false"]),
        (Cells("integer"), [np.nan, 5], DAYS, ["row 8", "'5'", "a date"]),
        (DAYS, [np.nan, 5], Cells(), ["row 8", "'2022-01-13'", "a number"]),
        (BERLIN, [0, 1], DAYS, ["row 7", "1970-01-01T00:00:00", "Europe/Berlin", "zone"]),
    ],
)
def test_cells_that_cannot_be_understood_are_named(have, values, wanted, parts):
    rows = np.array([7, 8, 9])[: len(values)]
    with pytest.raises(InputError, match=r"t\.csv: column 'c'") as caught:
        recode(column(values, have, rows), {"c": wanted})
    for part in parts:
        assert part in str(caught.value)


def test_columns_keep_their_cells():
    values = np.array([[1.0, 0.0, 3.0], [2.0, np.nan, 4.0]])
    kinds = (Cells("integer"), COLOURS, Cells())
    table = Table(("n", "c", "x"), values, cells=kinds)
    part = table.select(["x", "c"]).take(np.array([1]))
    assert part.cells == (Cells(), COLOURS)
    decoded = table.decoded()
    assert list(decoded) == ["n", "c", "x"]
    assert decoded["c"].tolist() == ["blue", None]
    np.testing.assert_array_equal(decoded["n"], [1, 2])
    aligned = recode(table, {"c": Cells("text", ("blue",))})
    assert aligned.cells[0] == kinds[0]
    with pytest.raises(InputError, match="did you mean 'c'"):
        recode(table, {"C": COLOURS})
    with pytest.raises(InputError, match="3 columns and 1 description"):
        Table(("n", "c", "x"), values, cells=(COLOURS,))
    assert Table(("n", "c", "x"), values).cells == (Cells(),) * 3
