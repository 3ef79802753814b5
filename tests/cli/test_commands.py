"""The commands on a small table, in one process: fit, score, sample, check, info, compare."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from laminar import io
from laminar.cli.main import app
from laminar.tables.read import read_table, write_table

TRAINING = ["--flow", "realnvp", "--steps", "4", "--batch-size", "32"]


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
    """What a command prints with --json, which must be one JSON object and nothing else."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    out = laminar(*words, "--json", code=code).stdout
    assert out.endswith("\n")
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table of numbers, with a constant, a column of ties, and one of text; and its model."""
    path = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    columns = {
        "height": 1000 + rng.normal(size=90),
        "width": 1e-3 * rng.normal(size=90),
        "count": rng.integers(0, 4, 90).astype(float),
        "unit": np.full(90, 7.0),
    }
    write_table(path / "t.parquet", columns)
    lines = (path / "t.csv").open("w")
    with lines:
        lines.write("name," + ",".join(columns) + "\n")
        for i, row in enumerate(zip(*columns.values(), strict=True)):
            lines.write(f"row {i}," + ",".join(map(repr, map(float, row))) + "\n")
    report = as_json(
        "fit", path / "t.parquet", "-o", path / "m.laminar", "--given", "count", *TRAINING
    )
    (path / "report.json").write_text(json.dumps(report))
    return path


def test_fit_reports_what_it_did(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["model"] == str(folder / "m.laminar")
    assert report["columns"] == ["height", "width", "unit"]
    assert report["dimensions"] == 2
    assert report["training"]["steps"] == 4
    assert len(report["notes"]) == 1
    assert report["precision"] == "float32"
    assert {"log_density", "error", "rows"} <= set(report["held_out"])


def test_score_writes_rows_and_densities(folder):
    for suffix in ("csv", "npz"):
        out = folder / f"scores.{suffix}"
        report = as_json("score", folder / "m.laminar", folder / "t.csv", "--out", out)
        scores = read_table(out)
        assert scores.names == ("row", "log_density")
        np.testing.assert_array_equal(scores.column("row"), np.arange(1, 91))
        assert scores.column("log_density").mean() == pytest.approx(report["log_density"])
    model = io.load(folder / "m.laminar")
    np.testing.assert_array_equal(
        scores.column("log_density"), model.log_prob(read_table(folder / "t.parquet"))
    )
    text = laminar("score", folder / "m.laminar", folder / "t.csv", "-o", out).stdout
    assert "90 rows scored" in text


def test_rows_off_a_constant_score_minus_infinity(folder):
    table = read_table(folder / "t.parquet")
    columns = dict(zip(table.names, table.values.T, strict=True))
    columns["unit"] = np.where(np.arange(90) < 3, 8.0, 7.0)
    write_table(folder / "off.csv", columns)
    out = folder / "off.npy"
    report = as_json("score", folder / "m.laminar", folder / "off.csv", "--out", out)
    assert report["outside_support"] == 3
    assert report["log_density"] is None
    log_p = np.load(out)[:, 1]
    assert np.isneginf(log_p[:3]).all()
    assert np.isfinite(log_p[3:]).all()


def test_sample_gives_rows_that_can_be_scored(folder):
    out = folder / "new.csv"
    report = as_json("sample", folder / "m.laminar", "-n", "5", "--given", "count=2", "-o", out)
    assert report["rows"] == 5
    drawn = read_table(out)
    assert drawn.names == ("height", "width", "count", "unit")
    np.testing.assert_array_equal(drawn.column("count"), 2)
    np.testing.assert_array_equal(drawn.column("unit"), 7)
    as_json("score", folder / "m.laminar", out, "-o", folder / "new_scores.csv")
    first = out.read_bytes()
    laminar("sample", folder / "m.laminar", "-n", "5", "--given", "count=2", "-o", out)
    assert out.read_bytes() == first
    laminar(
        "sample", folder / "m.laminar", "-n", "5", "--given", "count=2", "-o", out, "--seed", "1"
    )
    assert out.read_bytes() != first
    report = as_json(
        "sample", folder / "m.laminar", "-n", "2", "--given", folder / "t.csv", "-o", out
    )
    assert report["rows"] == 180


def test_a_model_that_fit_wrote_knows_what_is_strange(folder):
    report = as_json("detect", folder / "m.laminar", folder / "t.csv", "--fdr", "0.5")
    assert report["calibration_rows"] == 18
    out = folder / "explained.csv"
    laminar("score", folder / "m.laminar", folder / "t.csv", "-o", out, "--explain", "--top", "2")
    scores = read_table(out)
    assert scores.column("p_value").min() >= 1 / 19
    assert {"score", "column_1", "excess_1"} <= set(scores.names)


def test_info_and_data(folder):
    report = as_json("info", folder / "m.laminar")
    assert [column["name"] for column in report["columns"]] == ["height", "width", "unit", "count"]
    assert report["columns"][2]["kind"] == "constant"
    assert report["fit"]["rows"] == 90
    assert report["parameters"] > 0
    text = laminar("info", folder / "m.laminar").stdout
    assert "realnvp fitted to" in text
    assert "height" in text
    names = [table["name"] for table in as_json("data")["tables"]]
    assert "builtin:digits" in names
    assert "builtin:digits" in laminar("data").stdout


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"table": "t.csv"},
        {"table": 3, "flow": [], "rows": "many", "seed": None, "held_out": {"log_density": 1}},
        {"held_out": {"log_density": None, "error": None}, "baseline": 2, "precision": 1},
        {
            "table": "t.csv",
            "rows": 90,
            "baseline": {"name": "a Gaussian", "log_density": 1.0, "error": 0.1},
        },
    ],
)
def test_info_on_models_saved_from_python(folder, tmp_path, meta):
    io.save(tmp_path / "m", io.load(folder / "m.laminar"), meta)
    text = laminar("info", tmp_path / "m").stdout
    assert "parameters" in text
    assert "height" in text
    assert ("t.csv" in text) == (meta.get("table") == "t.csv")
    assert as_json("info", tmp_path / "m")["fit"] == meta


def test_check_says_whether_the_mathematics_holds(folder):
    report = as_json("check", folder / "m.laminar", folder / "t.parquet")
    assert report["passed"] is True
    assert {"name", "value", "budget", "passed", "detail"} <= set(report["lines"][0])


def test_an_export_runs_without_laminar(folder):
    out = folder / "exported"
    report = as_json("export", folder / "m.laminar", "--out", out)
    assert {"log_prob.bin", "sample.bin", "export.json", "table.py"} <= set(report["files"])
    model, table = io.load(folder / "m.laminar"), read_table(folder / "t.parquet")
    np.savez(
        out / "rows.npz",
        rows=table.select(model.schema.names).values,
        given=table.select(["count"]).values,
    )
    script = (
        "import sys, numpy as np, table\n"
        "data = np.load('rows.npz')\n"
        "np.save('log_p.npy', table.log_density(data['rows'], data['given']))\n"
        "np.save('drawn.npy', table.sample(given=data['given'], seed=1))\n"
        "assert 'laminar' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=out, check=True)
    np.testing.assert_allclose(np.load(out / "log_p.npy"), model.log_prob(table), rtol=1e-5)
    drawn = np.load(out / "drawn.npy")
    assert drawn.shape == (90, 3)
    np.testing.assert_array_equal(drawn[:, 2], 7.0)


def test_compare_sorts_flows_and_baselines(folder):
    words = ("compare", folder / "t.parquet", "--columns", "height,width", "--flows", "realnvp")
    report = as_json(*words, *TRAINING[2:])
    assert len(report["results"]) == 3
    means = [entry["log_density"] for entry in report["results"]]
    assert means == sorted(means, reverse=True)


def test_an_interrupted_fit_can_go_on(folder, monkeypatch):
    # The package shows the function of that name, which hides the module.
    module = importlib.import_module("laminar.train.fit")
    out, checkpoint = folder / "long.laminar", folder / "long.ckpt"
    words = ("fit", folder / "t.parquet", "-o", out, "--columns", "height,width", *TRAINING)
    laminar(*words)
    whole = out.read_bytes()
    out.unlink()
    saved = module.save_checkpoint

    def save_and_stop(*arguments):
        saved(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("laminar.cli.fitting._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(module, "save_checkpoint", save_and_stop)
    result = laminar(*words, "--checkpoint", checkpoint, code=130)
    assert "--resume" in result.stderr
    assert checkpoint.exists()
    assert not out.exists()
    assert "--resume" in laminar(*words, "--checkpoint", checkpoint, code=2).stderr
    monkeypatch.setattr(module, "save_checkpoint", saved)
    laminar(*words, "--checkpoint", checkpoint, "--resume")
    assert not checkpoint.exists()
    table = read_table(folder / "t.parquet")
    resumed = io.load(out).log_prob(table)
    out.write_bytes(whole)
    np.testing.assert_array_equal(resumed, io.load(out).log_prob(table))


def test_double_precision_holds_from_fit_to_score(folder):
    out = folder / "double.laminar"
    words = ("fit", folder / "t.parquet", "-o", out, "--columns", "height,width", *TRAINING)
    laminar(*words, "--precision", "float64")
    report = as_json("info", out)
    assert report["fit"]["precision"] == "float64"
    as_json("score", out, folder / "t.parquet", "-o", folder / "double.csv")
    import jax.numpy as jnp

    assert jnp.zeros(()).dtype == jnp.float32
