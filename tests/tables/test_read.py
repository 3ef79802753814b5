"""Reading and writing tables: round trips in every format, and errors that name the cell."""

import contextlib
import datetime
import decimal
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from laminar._errors import InputError
from laminar.tables.cells import Cells
from laminar.tables.read import SUFFIXES, read_table, write_table
from laminar.tables.table import Table, array_table

TWENTY = "1,2\n" * 20
VALUES = np.array([0.1, -1e300, 1 / 3, 5e-324, 1.7e9 + 2**-20])


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def error(spec, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_table(spec, *args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_back_the_same_bits(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    write_table(path, {"row": np.arange(1, 6), "file": VALUES, "a, b": -VALUES})
    table = read_table(path)
    np.testing.assert_array_equal(table.values, np.stack([np.arange(1, 6), VALUES, -VALUES], 1))
    assert table.named == (suffix != ".npy")
    assert table.names == (("row", "file", "a, b") if table.named else ("x1", "x2", "x3"))
    np.testing.assert_array_equal(table.rows, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_selects_columns_in_the_order_asked_for(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    write_table(path, {"x1": VALUES, "x2": 2 * VALUES, "x3": -VALUES})
    table = read_table(path, ["x3", "x1"])
    assert table.names == ("x3", "x1")
    np.testing.assert_array_equal(table.values, np.stack([-VALUES, VALUES], 1))
    assert "x4" in error(path, ["x4"])


@pytest.mark.parametrize(
    ("name", "text", "names", "values"),
    [
        ("bom.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n", ("a", "b"), [[1, 2]]),
        ("semicolon.csv", "a;b\n1;2\n", ("a", "b"), [[1, 2]]),
        ("quoted.csv", '"a, b";c\n1;2\n', ("a, b", "c"), [[1, 2]]),
        ("tabs.tsv", "a,b\tc\n1\t2\n", ("a,b", "c"), [[1, 2]]),
        (
            "quotes.csv",
            '\n\n"a, b" , c\n\n"1", 2e3 \n\n+3,-.5\n',
            ("a, b", "c"),
            [[1, 2e3], [3, -0.5]],
        ),
        ("line.csv", '"a\nb",c\n1,2\n', ("a\nb", "c"), [[1, 2]]),
        ("booleans.csv", "a,b\n1,True\n2,false\n", ("a", "b"), [[1, 1], [2, 0]]),
        ("big.csv", "a\n9007199254740992\n1e300\n-36028797018963968\n", ("a",), None),
        ("no_end.csv", "a\n1\n2", ("a",), [[1], [2]]),
    ],
)
def test_csv_dialects(tmp_path, name, text, names, values):
    table = read_table(write(tmp_path / name, text))
    assert table.names == names
    if values is not None:
        np.testing.assert_array_equal(table.values, values)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("empty.csv", "", ["empty.csv", "empty"]),
        ("blank.csv", "\n\n", ["blank.csv", "empty"]),
        ("header.csv", "a,b\n", ["header.csv", "no rows"]),
        ("twice.csv", "a,b,a\n1,2,3\n", ["two columns named 'a'"]),
        ("unnamed.csv", "a,,c\n1,2,3\n", ["column 2 has no name"]),
        ("headless.csv", "1,2\n3,4\n", ["line of numbers", "names"]),
        ("typo.csv", f"a,b\n{TWENTY}3,x\n4,y\n", ["'b'", "row 21", "'x'", "1 more"]),
        ("infinite.csv", "a\n1\ninf\n-inf\n1e999\n", ["'a'", "3 infinite", "row 2"]),
        ("long.csv", "a,b\n1,2\n3,4,5\n", ["row 2", "3 cells", "2 columns"]),
        ("short.csv", "a,b\n1,2\n\n3\n", ["row 2", "1 cell", "2 columns"]),
        ("exact.csv", "a\n1\n9007199254740993\n", ["'a'", "row 2", "9007199254740993", "2**53"]),
        ("binary.csv", b"a\x81,b\n1,2\n", ["UTF-8"]),
        ("gzip.csv.gz", b"no gzip", ["gzip.csv.gz", "gzip"]),
        ("fake.parquet", "hello", ["fake.parquet", "Parquet"]),
        ("fake.arrow", "hello, world", ["fake.arrow", "Arrow"]),
        ("fake.npy", "hello", ["fake.npy"]),
        ("fake.npz", "hello", ["fake.npz"]),
        ("table.xlsx", "hello", ["table.xlsx", ".parquet"]),
    ],
)
def test_bad_files(tmp_path, name, text, parts):
    message = error(write(tmp_path / name, text))
    assert str(tmp_path / name) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("text.csv", "a,b\n1,2\n3,x\n4,y\n", ["'b'", "row 1", "'2'", "not a number"]),
        ("date.csv", "a\n2024-01-01\n", ["'a'", "row 1", "'2024-01-01'", "not a number"]),
        ("underscore.csv", "a\n1_000\n", ["'1_000'"]),
        ("missing.csv", "a,b\n1,2\n3,\nNA,nan\n", ["'a'", "1 missing", "row 3", "1 other column"]),
    ],
)
def test_where_only_numbers_will_do(tmp_path, name, text, parts):
    path = write(tmp_path / name, text)
    message = error(path, numeric=True)
    for part in (path, *parts):
        assert part in message
    read_table(path)


def test_what_is_not_there(tmp_path):
    path = write(tmp_path / "heights.csv", "height,width\n1,2\n")
    assert "does not exist" in error(tmp_path / "other.csv")
    assert "did you mean" in error(tmp_path / "height.csv")
    assert "directory" in error(tmp_path)
    assert "did you mean 'height'" in error(path, ["hight"])
    assert "its columns are height, width" in error(path, ["zzz"])
    assert "two columns named 'width'" in error(path, ["width", "width"])
    assert "two_moons" in error("builtin:xyz")
    assert "did you mean builtin:wine" in error("builtin:wines")


def test_types_of_parquet_columns(tmp_path):
    path = tmp_path / "t.parquet"
    zoned = pa.timestamp("us", "Europe/Berlin")
    columns = {
        "half": pa.array([0.5, 2.0], pa.float32()),
        "cents": pa.array([decimal.Decimal("1.25"), decimal.Decimal(2)]),
        "truth": [True, False],
        "day": [datetime.date(2024, 1, 1)] * 2,
        "word": ["x", "y"],
        "level": pa.DictionaryArray.from_arrays([1, 0], ["low", "high", "top"], ordered=True),
        "view": pa.array(["x", None], pa.string_view()),
        "nothing": pa.nulls(2),
        "moment": pa.array([0, 1_500_000], zoned),
        "day64": pa.array([None, 86_400_000], pa.date64()),
        "code": pa.array([3, 4]).dictionary_encode(),
        "hole": [None, 1.5],
        "id": [1, 2**53 + 1],
        "id2": pa.array([1, 2**64 - 1], pa.uint64()),
        "even": [2**60, -(2**53)],
        "list": [[1], [2]],
        "clock": [datetime.time(10), None],
        "bytes": [b"x", b"y"],
    }
    pyarrow.parquet.write_table(pa.table(columns), path)
    table = read_table(path, ["half", "cents", "truth", "code", "even"])
    np.testing.assert_array_equal(
        table.values, [[0.5, 1.25, 1, 3, 2.0**60], [2, 2, 0, 4, -(2.0**53)]]
    )
    kinds = ("number", "number", "boolean", "integer", "integer")
    assert table.cells == tuple(map(Cells, kinds))
    rest = ["day", "word", "level", "view", "nothing", "moment", "day64", "hole"]
    table = read_table(path, rest)
    gap = np.nan
    np.testing.assert_array_equal(
        table.values, [[0, 0, 1, 0, gap, 0, gap, gap], [0, 1, 0, gap, gap, 1500, 0, 1.5]]
    )
    assert table.cells == (
        Cells("datetime", unit="D", origin=19_723),
        Cells("text", ("x", "y")),
        Cells("text", ("low", "high", "top"), ordered=True),
        Cells("text", ("x",)),
        Cells(),
        Cells("datetime", unit="ms", zone="Europe/Berlin"),
        Cells("datetime", unit="D", origin=1),
        Cells(),
    )
    assert "1 missing" in error(path, ["hole"], numeric=True)
    for name, kind in (("list", "list"), ("clock", "time64"), ("bytes", "binary")):
        assert "row 1 holds" in error(path, [name])
        assert f"of type {kind}" in error(path, [name])
    assert "row 2 holds 9007199254740993" in error(path, ["id"])
    assert "row 2 holds 18446744073709551615" in error(path, ["id2"])


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".csv", ".tsv", ".csv.gz"])
def test_a_table_of_every_kind_comes_back(tmp_path, suffix):
    """The same numbers and the same meaning; CSV has no order of levels and no names of zones."""
    gap = np.nan
    typed = suffix in (".parquet", ".arrow", ".feather")
    zone = "Europe/Berlin" if typed else "+01:00"
    kinds = {
        "x": (Cells(), [0.1, gap, -1e300]),
        "n": (Cells("integer"), [1, gap, 2.0**53]),
        "b": (Cells("boolean"), [gap, 1, 0]),
        "t": (Cells("text", ("", "a, b") if typed else ("NA", "a, b")), [0, gap, 1]),
        "o": (Cells("text", ("a", "b"), ordered=typed), [1, 0, gap]),
        "d": (Cells("datetime", unit="D", origin=-5), [0, 3, gap]),
        "s": (Cells("datetime", unit="s", origin=1_700_000_000), [0, gap, 1]),
        "ns": (Cells("datetime", unit="ns", origin=-1), [2, 0, gap]),
        "z": (Cells("datetime", unit="s", origin=1_700_000_000, zone=zone), [0, 1, gap]),
        "u": (Cells("datetime", unit="D", origin=19_000, zone="UTC"), [0, 1, gap]),
    }
    values = np.stack([values for _, values in kinds.values()], axis=1)
    table = Table(tuple(kinds), values, cells=tuple(cells for cells, _ in kinds.values()))
    path = tmp_path / f"t{suffix}"
    write_table(path, table)
    again = read_table(path)
    np.testing.assert_array_equal(again.values, table.values)
    assert again.cells == table.cells
    # The decoded cells of any column can be written too; a zone is all they lack.
    write_table(path, table.decoded())
    again = read_table(path)
    np.testing.assert_array_equal(
        again.select(["x", "t", "d", "ns"]).values, values[:, [0, 3, 5, 7]]
    )
    if typed:
        unseen = Table(("o",), np.array([[1.0], [-1.0]]), cells=(table.cells[4],))
        write_table(path, unseen)
        assert read_table(path).decoded()["o"].tolist() == ["b", "(unseen)"]


def test_clocks_that_change_are_written_as_they_are(tmp_path):
    """CSV shows each date with its offset; those of times before offsets are given in UTC."""
    for origin, shown in ((1_700_000_000, "+0200"), (-4_000_000_000, "Z")):
        cells = Cells("datetime", unit="s", origin=origin, zone="Europe/Berlin")
        table = Table(("z",), np.array([[0.0], [2e7 + 1]]), cells=(cells,))
        write_table(tmp_path / "t.csv", table)
        again = read_table(tmp_path / "t.csv")
        np.testing.assert_array_equal(again.values, table.values)
        assert again.cells[0].zone == "UTC"
        assert shown in (tmp_path / "t.csv").read_text()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_numpys_files_hold_numbers_only(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    write_table(path, {"x1": np.array([True, None, False], object), "x2": np.array([1, 2, 3])})
    np.testing.assert_array_equal(read_table(path).values, [[1, 1], [np.nan, 2], [0, 3]])
    for name, cells in (("text", ["a", None]), ("day", np.array(["2024-01-01"], "M8[D]"))):
        with pytest.raises(InputError, match=rf"'{name}'.*\.csv, .*\.parquet"):
            write_table(path, {name: np.asarray(cells)})
    with pytest.raises(InputError, match="'mixed' cannot be written"):
        write_table(tmp_path / "t.csv", {"mixed": np.array(["a", 1], object)})


def test_arrow_streams_are_read_too(tmp_path):
    path = str(tmp_path / "t.arrow")
    data = pa.table({"a": [1.0, 2.0]})
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, data.schema) as stream:
        stream.write_table(data)
    np.testing.assert_array_equal(read_table(path).column("a"), [1, 2])


def test_numpy_archives(tmp_path):
    path = str(tmp_path / "t.npz")
    np.savez(path, a=np.eye(2), b=np.ones((3, 3)), c=np.zeros(4))
    assert "a (2, 2)" in error(path)
    assert "did you mean 'a'" in error(f"{path}:aa")
    np.testing.assert_array_equal(read_table(f"{path}:a").values, np.eye(2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("note.txt", "hello")
    assert "'note.txt', which is no array" in error(path)
    np.testing.assert_array_equal(read_table(f"{path}:a").values, np.eye(2))
    np.savez(path, rows=np.ones((3, 2)), label=np.zeros(3))
    assert read_table(path).names == ("x1", "x2")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    assert "never loaded" in error(tmp_path / "objects.npy")
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    assert "(2, 2, 2)" in error(tmp_path / "cube.npy")
    np.save(tmp_path / "complex.npy", np.zeros(3, complex))
    assert "complex128" in error(tmp_path / "complex.npy")
    np.save(tmp_path / "names.npy", np.array([(1, 2.5)], dtype=[("u", "i4"), ("v", "f8")]))
    assert read_table(tmp_path / "names.npy").names == ("u", "v")


@pytest.mark.parametrize("suffix", [".csv.gz", ".npz", ".parquet", ".feather", ".npy", ".arrow"])
def test_damaged_files_are_errors(tmp_path, suffix):
    """Cut short, or with bytes changed anywhere: a table or an error, and nothing else."""
    path = tmp_path / f"t{suffix}"
    rng = np.random.default_rng(0)
    write_table(path, {"a": rng.normal(size=400), "b": rng.normal(size=400)})
    data = path.read_bytes()
    for size in np.linspace(1, len(data) - 1, 12).astype(int):
        path.write_bytes(data[:size])
        assert path.name in error(path)
    for place in [*range(24), *rng.integers(0, len(data), 40), *range(-24, -8)]:
        changed = bytearray(data)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        with contextlib.suppress(InputError):
            read_table(path)


def test_parquet_that_arrow_cannot_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise pa.ArrowNotImplementedError("nested lists")

    write_table(tmp_path / "t.parquet", {"a": VALUES})
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", refuse)
    assert "nested lists" in error(tmp_path / "t.parquet")


def test_paths_that_cannot_be_looked_at(tmp_path, monkeypatch):
    message = error(f"{tmp_path}/{'n' * 3000}.csv")
    assert "too long" in message
    assert len(message) < 300

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("laminar.tables.read.Path.is_dir", refuse)
    assert "permission denied" in error(tmp_path / "t.csv")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("old")
    with pytest.raises(Exception, match="length"):
        write_table(path, {"a": np.zeros(2), "b": np.zeros(3)})
    assert path.read_text() == "old"
    with pytest.raises(InputError, match=r"\.parquet"):
        write_table(tmp_path / "t.doc", {"a": np.zeros(2)})
    with pytest.raises(InputError, match="does not exist"):
        write_table(tmp_path / "no" / "t.csv", {"a": np.zeros(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_tables_check_what_they_are_made_of():
    with pytest.raises(InputError, match="two columns named 'a'"):
        Table(("a", "a"), np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"\(2, 2\)"):
        Table(("a",), np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"2\*\*53"):
        array_table(np.array([[2**53 + 1]]))
    table = Table(("a", "b"), np.arange(6.0).reshape(3, 2))
    part = table.take(np.array([2, 0])).select(["b"])
    np.testing.assert_array_equal(part.values, [[5.0], [1.0]])
    np.testing.assert_array_equal(part.rows, [3, 1])
