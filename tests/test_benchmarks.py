"""What the benchmarks share: results are kept, and what is missing takes one sentence."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield __import__("_common")
    for name in ("_common", "_continuous", "defaults"):
        sys.modules.pop(name, None)


def options(**given):
    return argparse.Namespace(**{"resume": False, "restart": False, **given})


def test_a_half_written_line_is_skipped_and_ended(common, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert common.read_lines(path) == [{"a": 1}]
    assert "line 2" in capsys.readouterr().out
    common.end_last_line(path)
    with path.open("a") as file:
        file.write('{"a": 3}\n')
    assert common.read_lines(path) == [{"a": 1}, {"a": 3}]
    common.end_last_line(tmp_path / "new.jsonl")
    assert (tmp_path / "new.jsonl").read_bytes() == b""


def test_results_are_replaced_on_request_only(common, tmp_path):
    path = tmp_path / "results.jsonl"
    common.guard([path], options())
    path.write_text("{}\n")
    with pytest.raises(SystemExit, match="--resume"):
        common.guard([path], options())
    common.guard([path], options(resume=True))
    assert path.exists()
    common.guard([path], options(restart=True))
    assert not path.exists()


def test_other_options_are_refused(common, tmp_path):
    common.refuse_change(tmp_path, {"width": 3, "more": 1}, {"width": 3})
    with pytest.raises(SystemExit, match="--em-rows 3, not 4"):
        common.refuse_change(tmp_path, {"em_rows": 3}, {"em_rows": 4})


def test_absent_data_take_one_sentence(common, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LAMINAR_DATA", raising=False)
    with pytest.raises(SystemExit, match="set LAMINAR_DATA"):
        common.Arrays("a.npz")
    with pytest.raises(SystemExit) as caught:
        common.Arrays("a.npz", optional=True)
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("Skipped: ")

    monkeypatch.setenv("LAMINAR_DATA", str(tmp_path))
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    assert common.Arrays("a.npz")["x"].tolist() == [0, 1, 2]
    with pytest.raises(SystemExit, match="no array 'y'"):
        common.Arrays("a.npz")["y"]
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(SystemExit, match="cannot be read"):
        common.Arrays("a.npz")["x"]


def test_the_paired_error_is_the_stricter(common, monkeypatch, capsys):
    defaults = __import__("defaults")
    hard = np.linspace(-5, 5, 100)
    best = [{"log_density": list(hard)}]
    mine = [{"log_density": list(hard - 0.1)}]
    gap, error = defaults._paired(best, mine)
    assert gap == pytest.approx(0.1)
    assert error < 1e-9
    assert defaults._verdict("kde", gap, defaults._pooled(best)[1]) == "within"
    assert defaults._verdict("kde", gap, error) == "behind"

    monkeypatch.setitem(defaults.RIVALS, "flowjax", "a_package_that_is_not_there")
    assert defaults._installed(("kde", "flowjax")) == ["kde"]
    assert "flowjax is left out" in capsys.readouterr().out


def test_rounding_errors_are_measured_and_shown(common):
    errors = __import__("errors")
    found = errors.measure(errors.CASES["affine"], 8)
    assert 0 < found["ordinary float32"][0] < 1e-5
    assert found["ordinary float64"][1] < 1e-12
    records = [
        {"case": "affine", "depth": 1, "errors": found},
        {"case": "exp", "depth": 1, "errors": found},
        {"case": "exp", "depth": 8},
    ]
    rows = errors.tables(records, (1, 8)).splitlines()
    assert sum(row.startswith("| `affine` |") and "· …" in row for row in rows) == 2
    assert sum(row.startswith("| `exp` |") and "· –" in row for row in rows) == 2
    assert errors.layers(errors.CASES["exp"], 8) is None
    sys.modules.pop("errors")


def test_anomalies_are_never_trained_on_and_lists_are_judged(common, monkeypatch):
    adbench = __import__("adbench")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(200, 2)), rng.normal(8, 1, (20, 2))]).astype(np.float32)
    y = np.repeat(np.array([0, 1], np.uint8), [200, 20])
    args = argparse.Namespace(most_rows=60, most_quadratic=40, most_test=400, time_limit=None)
    train, test, labels = adbench.rows_of(x, y, 0, args)
    assert train.shape == (60, 2)
    assert np.abs(train).max() < 5
    assert (len(test), labels.sum()) == (120, 20)
    records = []
    for method in ("Mahalanobis", "GMM(5)", "GMM"):
        found = adbench.measure(method, train, test, labels, 0, args)
        assert found["auroc"] > 0.99
        records.append({"table": "45_wine", "method": method, "seed": 0, **found})

    def ours(train, test, seed, args):
        scores = -adbench.mahalanobis(train, test, seed, args).scores
        return adbench.Found(-scores, np.where(labels == 1, 0.001, np.where(scores < -8, 0.001, 1)))

    monkeypatch.setitem(adbench.METHODS, "laminar", ours)
    found = adbench.measure("laminar", train, test, labels, 0, args)
    listed = found["listed@0.1"]
    assert found["power@0.1"] == 1
    assert found["fdp@0.1"] == pytest.approx(1 - 20 / listed)
    records.append({"table": "45_wine", "method": "laminar", "seed": 0, **found})
    lines = []
    adbench.report(records, ("laminar", "Mahalanobis", "GMM(5)", "GMM"), lines.append)
    text = "\n".join(lines)
    assert "mean rank" in text
    assert "of the anomalies listed 100.0%" in text
    sys.modules.pop("adbench")


def test_regression_goes_on_where_it_was(common, monkeypatch, tmp_path, capsys):
    regression = __import__("regression")
    rng = np.random.default_rng(0)
    masks = rng.permuted(np.repeat([[True], [False]], [6, 24], axis=0).repeat(2, axis=1), axis=0)
    arrays = {"yacht__xy": rng.normal(size=(30, 3)), "yacht__test_mask": masks}
    np.savez(tmp_path / "uci_regression.npz", **arrays)
    monkeypatch.setenv("LAMINAR_DATA", str(tmp_path))
    done = []

    def standard_normal(part, seed):
        done.append(seed)
        ends = np.full(len(part.y_test), 1.645)
        return regression.Law(-0.5 * part.y_test**2, np.stack([-ends, ends], 1), 0 * ends)

    monkeypatch.setattr(regression, "laminar", standard_normal)
    words = f"regression.py --tables yacht --methods laminar --out {tmp_path}/r.jsonl".split()
    for more in (["--splits", "1"], ["--splits", "2", "--resume"], ["--resume", "--budget", "0"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        capsys.readouterr()
        regression.main()
    assert done == [0, 1]
    assert "yacht" in capsys.readouterr().out
    sys.modules.pop("regression")
