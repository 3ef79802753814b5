"""The commands detect, drift and impute, and score --explain, on small tables in one process."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from laminar import io
from laminar.bijections.base import Identity
from laminar.cli.main import app
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.tables.anomaly import Detector
from laminar.tables.calibration import calibrate
from laminar.tables.model import TableFlow
from laminar.tables.read import read_table, write_table
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table


@pytest.fixture(autouse=True, scope="module")
def _no_cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINAR_CACHE_DIR", "off")
        yield


def laminar(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def as_json(*words, code=0):
    out = laminar(*words, "--json", code=code).stdout
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A detector whose model is exact, and tables: as ever, with strange rows, and drifted."""
    path = tmp_path_factory.mktemp("anomalies")
    rng = np.random.default_rng(0)
    known = Table(("a", "b"), rng.normal(size=(700, 2)))
    schema = learn_schema(known)
    model = TableFlow(Flow(Normal((2,)), Identity((2,))), schema)
    train, held = known.take(np.arange(300)), known.take(np.arange(300, 700))
    io.save(path / "m.laminar", Detector(model, calibrate(model, train, held)))
    io.save(path / "plain.laminar", model)
    values = rng.normal(size=(90, 2))
    write_table(path / "usual.csv", {"b": values[:, 0], "a": values[:, 1]})
    values[[5, 40]] = [[0, 9], [-8, 0]]
    write_table(path / "strange.csv", {"a": values[:, 0], "b": values[:, 1]})
    write_table(path / "drifted.csv", {"a": values[:, 0], "b": values[:, 1] + 2})
    return path


def test_detect_lists_rows_with_their_reasons(folder):
    out = folder / "anomalies.csv"
    words = ("detect", folder / "m.laminar", folder / "strange.csv", "--fdr", "0.15")
    report = as_json(*words, "--out", out)
    assert report["calibration_rows"] == 400
    assert report["least_p_value"] == pytest.approx(1 / 401)
    rows = [entry["row"] for entry in report["listed"]]
    assert set(rows[:2]) == {6, 41}
    reasons = {entry["row"]: entry["columns"][0]["column"] for entry in report["listed"]}
    assert reasons[6] == "b"
    assert reasons[41] == "a"
    written = read_table(out)
    assert {"row", "score", "p_value", "adjusted_p_value", "column_1", "excess_1"} <= set(
        written.names
    )
    np.testing.assert_array_equal(written.column("row"), rows)
    assert (np.diff(written.column("p_value")) >= 0).all()
    text = laminar(*words).stdout
    assert "of 90 rows" in text
    assert "b (" in text
    short = as_json(*words, "--top", "1")
    assert "columns" in short["listed"][0]
    assert "columns" not in short["listed"][1]


def test_a_list_may_be_empty_and_says_why(folder):
    text = laminar("detect", folder / "m.laminar", folder / "usual.csv", "--fdr", "0.001").stdout
    assert "none of 90 rows" in text
    assert "no p-value can be below 0.0025" in text
    report = as_json("detect", folder / "m.laminar", folder / "usual.csv", "--fdr", "0.001")
    assert report["listed"] == []
    assert report["least_together"] == 225
    out = folder / "none.csv"
    laminar("detect", folder / "m.laminar", folder / "usual.csv", "--fdr", "0.001", "-o", out)
    assert "p_value" in out.read_text()


def test_score_can_explain(folder):
    io_model = io.load(folder / "m.laminar")
    out = folder / "scores.csv"
    # A model as fit writes it carries its own calibration.
    laminar(
        "score", folder / "m.laminar", folder / "strange.csv", "-o", out, "--explain", "--top", "3"
    )
    scores = read_table(out)
    assert scores.names[:4] == ("row", "log_density", "score", "p_value")
    rows = read_table(folder / "strange.csv")
    np.testing.assert_allclose(scores.column("p_value"), io_model.score(rows).p_value)
    assert int((~np.isnan(scores.column("excess_1"))).sum()) == 3
    assert not np.isnan(scores.column("excess_1")[[5, 40]]).any()


def test_drift_says_it_in_words(folder):
    words = ("drift", folder / "usual.csv", folder / "drifted.csv")
    report = as_json(*words)
    assert report["drift"] is True
    assert report["drifted"] == ["b"]
    assert "has drifted" in laminar(*words, "--out", folder / "tests.csv").stdout
    assert "adjusted" in read_table(folder / "tests.csv").names
    same = as_json("drift", folder / "usual.csv", folder / "usual.csv")
    assert same["drift"] is False
    model = as_json("drift", folder / "m.laminar", folder / "drifted.csv")
    assert model["drifted"] == ["b"]
    assert {test["test"] for test in model["columns"]} == {"KS", "PIT"}
    assert as_json("drift", folder / "m.laminar", folder / "usual.csv")["drift"] is False


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["detect", "plain.laminar", "usual.csv"], ["plain.laminar", "no calibration"]),
        (["detect", "m.laminar", "usual.csv", "--fdr", "0"], ["--fdr", "between 0 and 1"]),
        (["detect", "m.laminar", "usual.csv", "--confidence", "2"], ["--confidence"]),
        (["detect", "m.laminar", "usual.csv", "--top", "-1"], ["--top", "at least 0"]),
        (["detect", "m.laminar", "usual.csv", "-o", "usual.csv"], ["the input itself"]),
        (["detect", "m.laminar", "gone.csv"], ["gone.csv", "does not exist"]),
        (["detect", "usual.csv", "usual.csv"], ["usual.csv"]),
        (["drift", "usual.csv", "gone.csv"], ["gone.csv", "does not exist"]),
        (["drift", "gone.csv", "usual.csv"], ["gone.csv", "does not exist"]),
        (["drift", "plain.laminar", "usual.csv"], ["plain.laminar", "no calibration"]),
        (["drift", "usual.csv", "usual.csv", "--level", "1"], ["--level"]),
        (["drift", "usual.csv", "usual.csv", "--seed", "-1"], ["--seed"]),
        (["impute", "plain.laminar", "usual.csv", "-o", "f.csv"], ["partial"]),
        (["impute", "plain.laminar", "usual.csv", "-o", "f.csv", "--draws", "0"], ["--draws"]),
        (["score", "plain.laminar", "usual.csv", "-o", "s.csv", "--explain"], ["no calibration"]),
    ],
    ids=lambda x: " ".join(x)[:50],
)
def test_one_sentence_and_nothing_written(folder, monkeypatch, words, parts):
    monkeypatch.chdir(folder)
    before = {p.name for p in folder.iterdir()}
    result = laminar(*words, code=2)
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr
    assert {p.name for p in folder.iterdir()} == before
