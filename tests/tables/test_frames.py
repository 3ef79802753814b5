"""Frames of pandas, Polars and Arrow: the same table from each, and the same frame back."""

import datetime
import decimal
import subprocess
import sys
import zoneinfo

import numpy as np
import pyarrow as pa
import pytest

from laminar._errors import InputError
from laminar.tables.cells import Cells
from laminar.tables.frames import from_frame, is_frame, to_frame
from laminar.tables.table import Table

GAP = np.nan
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
KINDS = {
    "x": (Cells(), [0.5, GAP, -2]),
    "n": (Cells("integer"), [3, 1, 2]),
    "n gap": (Cells("integer"), [3, GAP, 2]),
    "b": (Cells("boolean"), [1, 0, 1]),
    "b gap": (Cells("boolean"), [1, GAP, 0]),
    "t": (Cells("text", ("blue", "🙂")), [1, GAP, 0]),
    "c": (Cells("text", ("x", "y")), [1, 0, GAP]),
    "o": (Cells("text", ("low", "mid", "high"), ordered=True), [2, GAP, 0]),
    "d": (Cells("datetime", unit="D", origin=19_000), [0, GAP, 7]),
    "s": (Cells("datetime", unit="s", origin=1_700_000_000), [1, 0, GAP]),
    "z": (Cells("datetime", unit="s", origin=1_700_000_000, zone="Europe/Berlin"), [1, GAP, 0]),
}
TABLE = Table(
    tuple(KINDS),
    np.stack([values for _, values in KINDS.values()], axis=1).astype(float),
    cells=tuple(cells for cells, _ in KINDS.values()),
)
DAYS = [datetime.date(2022, 1, 8), None, datetime.date(2022, 1, 15)]
MOMENTS = [datetime.datetime(2023, 11, 14, 22, 13, 21), datetime.datetime(2023, 11, 14, 22, 13, 20)]
ZONED = [
    moment.replace(tzinfo=datetime.UTC).astimezone(BERLIN) if moment else None
    for moment in (MOMENTS[0], None, MOMENTS[1])
]


def pandas_frame():
    pandas = pytest.importorskip("pandas")
    levels = pandas.CategoricalDtype(["low", "mid", "high"], ordered=True)
    return pandas.DataFrame(
        {
            "x": [0.5, GAP, -2],
            "n": [3, 1, 2],
            "n gap": pandas.array([3, None, 2], dtype="Int64"),
            "b": [True, False, True],
            "b gap": pandas.array([True, None, False], dtype="boolean"),
            "t": ["🙂", None, "blue"],
            "c": pandas.Categorical(["y", "x", None]),
            "o": pandas.Series(["high", None, "low"], dtype=levels),
            "d": pandas.Series(DAYS, dtype=object),
            "s": pandas.to_datetime([*MOMENTS, None]),
            "z": pandas.to_datetime(ZONED),
        }
    ).set_index(pandas.Index([7, 7, 9]))


def polars_frame():
    polars = pytest.importorskip("polars")
    return polars.DataFrame(
        {
            "x": [0.5, None, -2.0],
            "n": [3, 1, 2],
            "n gap": polars.Series([3, None, 2], dtype=polars.Int16),
            "b": [True, False, True],
            "b gap": [True, None, False],
            "t": ["🙂", None, "blue"],
            "c": polars.Series(["y", "x", None], dtype=polars.Categorical),
            "o": polars.Series(["high", None, "low"], dtype=polars.Enum(["low", "mid", "high"])),
            "d": DAYS,
            "s": [*MOMENTS, None],
            "z": polars.Series(ZONED, dtype=polars.Datetime("ms", "Europe/Berlin")),
        }
    )


def arrow_frame():
    levels = pa.DictionaryArray.from_arrays([2, None, 0], ["low", "mid", "high"], ordered=True)
    return pa.table(
        {
            "x": pa.array([0.5, None, -2], pa.float32()),
            "n": pa.array([3, 1, 2], pa.uint8()),
            "n gap": [3, None, 2],
            "b": [True, False, True],
            "b gap": [True, None, False],
            "t": pa.array(["🙂", None, "blue"], pa.large_string()),
            "c": pa.array(["y", "x", None]).dictionary_encode(),
            "o": levels,
            "d": DAYS,
            "s": pa.array([*MOMENTS, None], pa.timestamp("ms")),
            "z": pa.array(ZONED, pa.timestamp("us", "Europe/Berlin")),
        }
    )


class Stream:
    """A frame of an unknown package."""

    def __init__(self, data):
        self.data = data

    def __arrow_c_stream__(self, requested_schema=None):
        return self.data.__arrow_c_stream__(requested_schema)


FRAMES = {
    "pandas": pandas_frame,
    "polars": polars_frame,
    "lazy": lambda: polars_frame().lazy(),
    "pyarrow": arrow_frame,
    "batch": lambda: arrow_frame().to_batches()[0],
    "stream": lambda: Stream(arrow_frame()),
    "mapping": lambda: {
        name: cells.decode(TABLE.column(name)) for name, (cells, _) in KINDS.items()
    },
}


@pytest.mark.parametrize("kind", FRAMES)
def test_the_same_table_from_every_frame(kind):
    table = from_frame(FRAMES[kind]())
    expected = list(TABLE.cells)
    if kind == "mapping":
        # NumPy has neither gaps in integers, nor orders, nor zones.
        expected[2] = Cells()
        expected[7] = Cells("text", ("high", "low"))
        expected[10] = Cells("datetime", unit="s", origin=1_700_000_000)
    assert table.names == TABLE.names
    assert table.cells == tuple(expected)
    same = [name for name in KINDS if name != "o" or kind != "mapping"]
    np.testing.assert_array_equal(table.select(same).values, TABLE.select(same).values)
    part = from_frame(FRAMES[kind](), columns=["t", "x"])
    assert part.names == ("t", "x")


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_of_the_same_kind_comes_back(kind):
    like = FRAMES[kind]()
    frame = to_frame(from_frame(like), FRAMES[kind]())
    if kind == "pandas":
        import pandas

        like["d"] = pandas.to_datetime(like["d"]).astype("datetime64[s]")
        pandas.testing.assert_frame_equal(frame, like.reset_index(drop=True))
    elif kind in ("polars", "lazy"):
        from polars.testing import assert_frame_equal

        assert_frame_equal(frame, like)
    elif kind == "mapping":
        assert isinstance(frame, dict)
        np.testing.assert_array_equal(frame["t"], like["t"])
    elif kind == "stream":
        assert frame.column_names == list(KINDS)
    else:
        assert type(frame) is type(like)
        assert frame.equals(like)


@pytest.mark.parametrize("kind", ["pandas", "polars", "pyarrow"])
def test_types_that_cannot_hold_the_cells_give_way(kind):
    like = FRAMES[kind]()
    values = TABLE.values.copy()
    values[0, 1], values[1, 3], values[2, 7] = GAP, GAP, -1
    unseen = Table(TABLE.names, values, cells=TABLE.cells)
    back = from_frame(to_frame(unseen, like))
    assert np.isnan(back.column("n")[0])
    assert np.isnan(back.column("b")[1])
    assert back.decoded()["o"].tolist() == ["high", None, "(unseen)"]
    halves = Table(("n", "new"), np.array([[0.5, 1], [1.5, 2]]))
    back = from_frame(to_frame(halves, like))
    np.testing.assert_array_equal(back.values, halves.values)


def test_objects_are_what_all_of_them_are():
    half = decimal.Decimal("0.5")
    utc, plus = datetime.UTC, datetime.timezone(datetime.timedelta(hours=2))
    moment = datetime.datetime(2024, 1, 1)
    cases = {
        "number": ([1, 2.5, half, None], Cells(), [1, 2.5, 0.5, GAP]),
        "integer": ([1, np.int8(2), None, GAP], Cells("integer"), [1, 2, GAP, GAP]),
        "boolean": ([True, np.False_, None, None], Cells("boolean"), [1, 0, GAP, GAP]),
        "mixed": ([1, "a", 0.5, True], Cells("text", ("0.5", "1", "a", "true")), [1, 2, 0, 3]),
        "spelt": (["1", "2", "", None], Cells("text", ("", "1", "2")), [1, 2, 0, GAP]),
        "odd": ([True, 2, None, 2], Cells("text", ("2", "true")), [1, 0, GAP, 0]),
        "nothing": ([None] * 4, Cells(), [GAP] * 4),
        "day": (
            [datetime.date(2024, 1, 2), moment, np.datetime64("2024-01-03"), None],
            Cells("datetime", unit="D", origin=19_723),
            [1, 0, 2, GAP],
        ),
        "zoned": (
            [moment.replace(tzinfo=plus), None, None, None],
            Cells("datetime", unit="s", origin=19_723 * 86_400 - 7200, zone="+02:00"),
            [0, GAP, GAP, GAP],
        ),
        "zones": (
            [moment.replace(tzinfo=plus), moment.replace(tzinfo=utc), None, None],
            Cells("datetime", unit="s", origin=19_723 * 86_400 - 7200, zone="UTC"),
            [0, 7200, GAP, GAP],
        ),
        "named": (
            [moment.replace(tzinfo=BERLIN), moment.replace(month=7, tzinfo=BERLIN), None, None],
            Cells("datetime", unit="s", origin=19_723 * 86_400 - 3600, zone="Europe/Berlin"),
            [0, 182 * 86_400 - 3600, GAP, GAP],
        ),
        "half zoned": (
            [moment, moment.replace(tzinfo=utc), None, None],
            Cells("text", ("2024-01-01T00:00:00", "2024-01-01T00:00:00+00:00")),
            [0, 1, GAP, GAP],
        ),
    }
    table = from_frame({name: cells for name, (cells, _, _) in cases.items()})
    for name, (_, cells, values) in cases.items():
        assert table.cells[table.positions((name,))[0]] == cells, name
        np.testing.assert_array_equal(table.column(name), np.array(values, float))


def test_pandas_as_it_comes():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "object": pandas.Series(["a", 1, None], dtype=object),
            "numbers": pandas.Categorical([10, 20, 10]),
            "arrow": pandas.Series(["a", None, "b"], dtype=pandas.ArrowDtype(pa.string())),
            "sparse": pandas.arrays.SparseArray([0.0, 1.0, 0.0]),
            "fixed": pandas.to_datetime(["2024-01-01T00:00+02:00"] * 3),
            "nanoseconds": pandas.array([0, 1, 2], dtype="datetime64[ns]"),
            0: np.array([1, 2, 3], np.int8),
        }
    )
    table = from_frame(frame)
    zone = Cells("datetime", unit="s", origin=19_722 * 86_400 + 79_200, zone="+02:00")
    assert table.names == ("object", "numbers", "arrow", "sparse", "fixed", "nanoseconds", "0")
    assert table.cells == (
        Cells("text", ("1", "a")),
        Cells("integer"),
        Cells("text", ("a", "b")),
        Cells(),
        zone,
        Cells("datetime", unit="ns"),
        Cells("integer"),
    )
    np.testing.assert_array_equal(table.values[2], [GAP, 10, 1, 0, 0, 2, 3])
    assert from_frame({"s": frame["fixed"]}).cells == (zone,)
    back = to_frame(table, frame)
    assert list(back.columns) == list(frame.columns)
    for name, cells in (
        ("period", pandas.period_range("2024", periods=2, freq="M")),
        ("length", pandas.to_timedelta([1, 2], unit="s")),
    ):
        with pytest.raises(InputError, match=f"column '{name}', row 1 holds .* of type"):
            from_frame(pandas.DataFrame({name: cells}))
    with pytest.raises(InputError, match="two columns named 'a'"):
        from_frame(pandas.DataFrame(np.ones((2, 2)), columns=["a", "a"]))
    with pytest.raises(InputError, match="is a Series"):
        from_frame(frame["arrow"])


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (7, "is a int; give a frame"),
        ({"a": [1, 2], "b": [1]}, "different lengths: 2, 1"),
        ({"a": []}, "no rows"),
        ({"a": [1.0, np.inf]}, "'a' has 1 infinite value, first in row 2"),
        ({"a": [None, [1]]}, r"column 'a', row 2 holds '\[1\]' of type list"),
        ({"a": [None, 2**53 + 1]}, "column 'a', row 2 holds '9007199254740993'"),
        ({"a": np.array([1, 2**53 + 1])}, r"row 2 holds 9007199254740993.*2\*\*53"),
        ({"a": np.array([1j])}, "complex128"),
        ({"a": np.zeros((2, 2))}, r"shape \(2, 2\)"),
        (pa.table({"a": [[1]]}), "column 'a', row 1 holds"),
        (pa.table([[1], [2]], ["a", "a"]), "two columns named 'a'"),
    ],
)
def test_what_is_refused(frame, message):
    with pytest.raises(InputError, match=message):
        from_frame(frame)


def test_what_a_frame_is():
    assert all(is_frame(make()) for name, make in FRAMES.items() if name != "mapping")
    assert not is_frame(np.zeros((2, 2)))
    assert not is_frame({"a": [1]})
    with pytest.raises(InputError, match="cannot become a ndarray"):
        to_frame(TABLE, np.zeros((2, 2)))
    with pytest.raises(InputError, match="did you mean 'x'"):
        from_frame(arrow_frame(), columns=["X"])


def test_pandas_needs_no_arrow_and_nothing_needs_pandas():
    """Numbers, categories and dates of pandas without pyarrow; and no import that was not asked."""
    pytest.importorskip("pandas")
    script = """
import sys
sys.modules["pyarrow"] = None
from laminar.tables.frames import from_frame, to_frame
assert "pandas" not in sys.modules and "polars" not in sys.modules
import pandas
frame = pandas.DataFrame({
    "x": [1.5, None], "c": pandas.Categorical(["a", "b"]),
    "d": pandas.to_datetime(["2024-01-01"] * 2),
    "z": pandas.to_datetime(["2024-01-01"] * 2).tz_localize("UTC"),
    "t": pandas.Series(["a", None], dtype=object),
})
pandas.testing.assert_frame_equal(to_frame(from_frame(frame), frame), frame)
assert "polars" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
