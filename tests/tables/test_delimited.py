"""CSV: what a column is, from how its cells are spelt, in any of the usual encodings."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laminar._errors import InputError
from laminar.tables.cells import Cells
from laminar.tables.delimited import NULLS
from laminar.tables.read import read_table, write_table


def read(folder, text, **options):
    path = folder / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(path, **options)


def column(folder, cells, quote=False):
    """One column of a table that has another, so that an empty line is no empty cell."""
    marks = '"{}",1' if quote else "{},1"
    table = read(folder, "\n".join(["c,other", *(marks.format(cell) for cell in cells)]) + "\n")
    return table.column("c"), table.cells[0]


DAY = 86_400


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["1", "-2", " 3 ", "7"], "integer", [1, -2, 3, 7]),
        (["1", "2."], "number", [1, 2]),
        (["1", "2e0"], "number", [1, 2]),
        (["+1", "-.5", ""], "number", [1, -0.5, None]),
        (["1", "NA", "", "null", "N/A", "NaN", "None"], "integer", [1, *[None] * 6]),
        (["", "NA"], "number", [None, None]),
        (["true", "False", ""], "boolean", [1, 0, None]),
        ([" TRUE ", "fAlse"], "boolean", [1, 0]),
        (["1", "0"], "integer", [1, 0]),
        (["1", "true"], "text", [0, 1]),
        (["yes", "no"], "text", [1, 0]),
        (["2024-01-02", "2024-01-01", ""], "D", [1, 0, None]),
        (["2024-01-02 00:00", "2024-01-01"], "D", [1, 0]),
        (["2024-01-01T10:00:01", "2024-01-01 10:00"], "s", [1, 0]),
        (["2024-01-01T10:00:01.5", "2024-01-01 10:00:01.499"], "ms", [1, 0]),
        (["1969-12-31T23:59:59.123456", "1970-01-01"], "us", [0, 876_544]),
        (["2024-01-01T00:00:00.000000001", "2024-01-01"], "ns", [1, 0]),
        (["9999-12-31 23:59:59.5", "2024-01-01"], "ms", [251_698_233_599_500, 0]),
        (["0001-01-01", "9999-12-31"], "D", [0, 3_652_058]),
        ([" 2024-01-01T10:00:00 +01:00", "2024-01-01T10:00:00 Z"], "s", [0, 3600]),
        (["2024-01-01", "2024-01-01T10:00:00Z"], "text", [0, 1]),
        (["2024-02-30", "2024-01-01"], "text", [1, 0]),
        (["01/02/2024", "1.2.2024"], "text", [0, 1]),
        (["10:30:00", "09:15"], "text", [1, 0]),
        (["b", "a", "", "b", "NA"], "text", [1, 0, None, 1, None]),
        (["1_000", "2"], "text", [0, 1]),
    ],
)
def test_kinds(tmp_path, cells, kind, values):
    found, meaning = column(tmp_path, cells)
    assert kind == (meaning.unit if meaning.kind == "datetime" else meaning.kind)
    np.testing.assert_array_equal(found, np.array(values, float))


@pytest.mark.parametrize(
    ("cells", "zone"),
    [
        (["2024-01-01T10:00:00Z", "2024-07-01T10:00:00Z"], "UTC"),
        (["2024-01-01T10:00:00+0200", "2024-07-01T10:00:00+02"], "+02:00"),
        (["2024-01-01T10:00:00-05:30", ""], "-05:30"),
        (["2024-01-01T10:00:00+01:00", "2024-07-01T10:00:00+02:00"], "UTC"),
        (["2024-01-01T10:00:00", "2024-07-01T10:00:00"], ""),
    ],
)
def test_zones(tmp_path, cells, zone):
    values, meaning = column(tmp_path, cells)
    assert meaning.zone == zone
    shown = meaning.decode(values)[0]
    hours = {"UTC": 0, "": 0, "+02:00": -2, "-05:30": 5.5}[zone] - ("+01" in cells[0])
    assert (shown - np.datetime64("2024-01-01T10:00:00")) / np.timedelta64(1, "m") == 60 * hours


def test_quotes_tell_a_text_from_a_missing_cell(tmp_path):
    values, meaning = column(tmp_path, ["NA", "None", "", "x"], quote=True)
    assert meaning.levels == ("NA", "None", "x")
    np.testing.assert_array_equal(values, [0, 1, np.nan, 2])
    # Where everything is quoted, numbers and dates still are what they are.
    np.testing.assert_array_equal(column(tmp_path, ["1", "", "NA"], True)[0], [1, np.nan, np.nan])
    assert column(tmp_path, ["2024-01-01", ""], True)[1].kind == "datetime"
    values, meaning = column(tmp_path, ["", ""], True)
    assert np.isnan(values).all()
    assert meaning == Cells()
    assert {"", "NA", "NaN", "null", "N/A", "None"} <= set(NULLS)


@pytest.mark.parametrize(
    ("good", "typo", "what"),
    [("0.5", "1,5", "a number"), ("2024-01-01", "2024-1-2", "a date")],
)
def test_a_typing_error_is_no_text(tmp_path, good, typo, what):
    with pytest.raises(InputError, match=f"not {what}") as caught:
        column(tmp_path, ["", *[good] * 20, typo, "?"], quote=True)
    assert f"row 22 holds {typo!r}" in str(caught.value)
    assert "1 more such row" in str(caught.value)
    # Of fewer cells nobody can tell, and where more than a tenth are texts, texts are meant.
    assert column(tmp_path, [*[good] * 19, typo], quote=True)[1].kind == "text"
    assert column(tmp_path, [*[good] * 30, *[typo] * 4], quote=True)[1].kind == "text"


def test_identifiers_and_free_text_are_read(tmp_path):
    values, meaning = column(tmp_path, [f"id-{k:04}" for k in range(500)])
    np.testing.assert_array_equal(values, np.arange(500))
    assert meaning.levels[7] == "id-0007"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path, encoding):
    text = 'ö,n\n"a, ""b""\nü",1\nЖ,2\n' if encoding != "cp1252" else 'ö,n\n"a, ""b""\nü",1\n€,2\n'
    table = read(tmp_path, text.encode(encoding))
    assert table.names == ("ö", "n")
    second = "€" if encoding == "cp1252" else "Ж"
    assert table.decoded()["ö"].tolist() == ['a, "b"\nü', second]
    np.testing.assert_array_equal(table.column("n"), [1, 2])
    assert bool(table.notes) == (encoding == "cp1252")
    if table.notes:
        assert "Windows-1252" in table.notes[0]
    assert read(tmp_path, text.encode(encoding), columns=["n"]).names == ("n",)


def test_mixed_encodings_and_what_is_no_text(tmp_path):
    mixed = read(tmp_path, "c\né\n".encode() + b"\xe9\n")
    assert mixed.decoded()["c"].tolist() == ["Ã©", "é"]
    assert mixed.notes
    for data in (b"c\n\xe9\x81\n", b"P\x00K\x03\n1\n", b"\x81,b\n1,2\n"):
        with pytest.raises(InputError, match="not a text file"):
            read(tmp_path, data)


def test_names_and_cells_survive_a_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["🙂", 'say "hi"', "a,b;c\td", "two\nlines", " spaced ", "NA", "Ünïcode", "'", "\\"]
    columns = {
        '😀 "quoted", name': np.array(texts, object),
        "gap": np.array([None, *texts[1:]], object),
        "two\nlines": rng.normal(size=len(texts)),
        "truth": np.array([True, False, None] * 3, object),
        "day": np.array(["2024-02-29", "NaT", "1969-12-31"] * 3, "datetime64[D]"),
        "moment": np.datetime64("2024-01-01T00:00:00.123456789") + rng.integers(0, 99, len(texts)),
        "count": np.arange(len(texts)),
    }
    for suffix in (".csv", ".tsv", ".csv.gz"):
        path = tmp_path / f"t{suffix}"
        write_table(path, columns)
        table = read_table(path)
        assert list(table.names) == list(columns)
        for name, cells in table.decoded().items():
            np.testing.assert_array_equal(cells, columns[name])
            assert cells.dtype == columns[name].dtype
        write_table(path, table)
        again = read_table(path)
        np.testing.assert_array_equal(again.values, table.values)
        assert again.cells == table.cells


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cells=st.lists(st.none() | ANY_TEXT.filter(str.strip), max_size=5),
    name=ANY_TEXT.filter(lambda text: "\0" not in text),
)
def test_any_text_survives(tmp_path, cells, name):
    name, column = f"c{name}c", np.array([*cells, "text"], object)
    write_table(tmp_path / "t.csv", {name: column, "row": np.arange(len(column))})
    table = read_table(tmp_path / "t.csv")
    assert table.names == (name, "row")
    assert table.decoded()[name].tolist() == column.tolist()


def test_codes_with_leading_zeros_are_texts(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("zip,n\n01067,10\n10115,7\n80331,0\n")
    table = read_table(path)
    assert list(table.decoded()["zip"]) == ["01067", "10115", "80331"]
    assert [cells.kind for cells in table.cells] == ["text", "integer"]
    write_table(tmp_path / "again.csv", table)
    assert list(read_table(tmp_path / "again.csv").decoded()["zip"]) == ["01067", "10115", "80331"]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_decimal_commas_where_commas_do_not_separate(tmp_path, mark):
    path = tmp_path / "t.csv"
    path.write_text(f"price{mark}n\n103,20{mark}1\n-7{mark}2\n,5{mark}3\n{mark}4\n")
    table = read_table(path)
    np.testing.assert_array_equal(table.column("price"), [103.2, -7, 0.5, np.nan])
    assert [cells.kind for cells in table.cells] == ["number", "integer"]


@pytest.mark.parametrize(
    "cells", [[1.5, None, 3.25], ["a, b", None, 'say "c"'], [True, None, False], [None, 2, None]]
)
def test_missing_cells_of_a_single_column_are_rows(tmp_path, cells):
    path = tmp_path / "t.csv"
    write_table(path, {"x": np.array(cells, object)})
    table = read_table(path)
    assert len(table) == 3
    found = [None if c is None or c != c else c for c in table.decoded()["x"]]
    assert found == cells


@pytest.mark.parametrize(
    ("cells", "what"),
    [
        ([f'"{i},234.50"' for i in range(1, 40)], "numbers"),
        ([f"{i}%" for i in range(40)], "numbers"),
        ([f"${i}.5" for i in range(40)], "numbers"),
        ([*(str(i) for i in range(32)), *("-" * 6)], "numbers"),
        ([f"03/{i:02d}/2024" for i in range(1, 30)], "dates"),
    ],
)
def test_texts_that_look_like_numbers_or_dates_are_remarked_on(tmp_path, cells, what):
    path = tmp_path / "t.csv"
    path.write_text("name,x\n" + "".join(f"{cell},n{i}\n" for i, cell in enumerate(cells)))
    (note,) = read_table(str(path)).notes
    assert "'name'" in note
    assert f"look like {what}" in note
