"""The benchmark of the deep latent Gaussian model: it reports, is cut, goes on, and refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = [
    "--data",
    "digits",
    "--latent",
    "2",
    "--width",
    "8",
    "--flow-width",
    "4",
    "--depth",
    "1",
    "--window",
    "2",
    "--draws",
    "5",
]


@pytest.fixture
def dlgm(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield __import__("dlgm")
    for name in ("_common", "_pictures", "dlgm"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(dlgm, monkeypatch, tmp_path, capsys):
    def call(*options):
        out = ["--out", str(tmp_path / "found.jsonl")]
        monkeypatch.setattr(sys, "argv", ["dlgm.py", *SMALL, *out, *options])
        dlgm.main()
        return capsys.readouterr().out

    return call


def read(folder):
    return [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]


def test_a_cut_run_is_measured_and_goes_on(run, dlgm, monkeypatch, tmp_path):
    module = sys.modules[dlgm.laminar.fit.__module__]
    save = module.save_checkpoint

    def save_and_stop(path, state, history, settings):
        save(path, state, history, settings)
        if history.steps >= 10:
            raise dlgm.Spent

    options = ["--steps", "20", "--posterior", "diagonal", "--budget", "600"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", save_and_stop)
        patch.setattr(dlgm, "Checkpoint", lambda path, seconds: module.Checkpoint(path, 0.0))
        found = run(*options)
    assert "cut by the budget" in found
    first = read(tmp_path)[0]
    assert 10 <= first["steps_done"] < 20
    found = run(*options, "--resume", "--picture", str(tmp_path / "curve.png"))
    assert "cut by the budget" not in found
    second = read(tmp_path)[0]
    assert second["steps_done"] == 20
    assert second["curve_bound"][: len(first["curve_bound"]) - 1] == first["curve_bound"][:-1]
    assert second["nll"] < second["bound"]
    assert (tmp_path / "curve.png").stat().st_size > 0
    assert run(*options, "--resume") == found
    with pytest.raises(SystemExit, match="--steps 20, not 30"):
        run("--steps", "30", "--resume")
    with pytest.raises(SystemExit, match="--resume"):
        run(*options)


def test_no_time_is_said(run):
    found = run("--posterior", "diagonal,planar-3", "--budget", "0")
    assert "Not begun within 0 s: diagonal, planar-3." in found


def test_protocols_observe_differently(dlgm, monkeypatch, tmp_path):
    cells = {}
    for protocol in ("fixed", "dynamic"):
        out = ["--out", str(tmp_path / "found.jsonl"), "--protocol", protocol]
        monkeypatch.setattr(sys, "argv", ["dlgm.py", *SMALL, *out])
        cells[protocol] = dlgm.Cell("diagonal", dlgm.options(), {})
    fixed, dynamic = cells["fixed"], cells["dynamic"]
    assert set(np.unique(fixed.train)) == {0.0, 1.0}
    assert len(np.unique(dynamic.train)) == 17
    assert (fixed.test == dynamic.test).all()
    assert (fixed.held_out == dynamic.held_out).all()
    assert fixed.observe is None
    assert dynamic.observe is not None


def test_names_of_posteriors(dlgm):
    assert dlgm.posterior_names("planar-80,iaf") == ("planar-80", "iaf")
    for wrong in ("planer", "planar-0", "planar-", ""):
        with pytest.raises(dlgm.argparse.ArgumentTypeError, match="none of"):
            dlgm.posterior_names(wrong)
