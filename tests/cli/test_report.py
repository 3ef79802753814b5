"""The commands report and plot on a small model: files written, or one sentence."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import laminar
from laminar import io
from laminar.cli.main import app
from laminar.tables.model import TableFlow
from laminar.tables.read import write_table
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table


@pytest.fixture(autouse=True, scope="module")
def _no_cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINAR_CACHE_DIR", "off")
        yield


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that needs no training, its table, and another table."""
    path = tmp_path_factory.mktemp("report")
    values = np.random.default_rng(0).normal(size=(80, 2))
    table = Table(("a", "b"), values)
    flow = laminar.Flow(laminar.Normal(2), laminar.Affine(jnp.zeros(2), 1.0))
    io.save(path / "m.laminar", TableFlow(flow, learn_schema(table)), {"seed": 0, "flow": "affine"})
    write_table(path / "t.csv", {"a": values[:, 0], "b": values[:, 1]})
    write_table(path / "other.csv", {"a": values[:, 0], "c": values[:, 1]})
    (path / "file").write_text("")
    return path


def test_report_is_a_page_that_repeats_to_the_byte(folder):
    out = folder / "report.html"
    words = ("report", folder / "m.laminar", folder / "t.csv", "--out", out)
    said = json.loads(run(*words, "--json").stdout)
    assert said["rows"] == 80
    assert said["held_out"] is False
    assert said["bytes"] == out.stat().st_size
    first = out.read_bytes()
    assert first.startswith(b"<!DOCTYPE html>")
    assert "80 rows" in run(*words).stdout
    assert out.read_bytes() == first
    run(*words, "--seed", "1", "--title", "A & B")
    assert b"<h1>A &amp; B</h1>" in out.read_bytes()


def test_plot_writes_one_picture_or_all(folder):
    words = ("plot", folder / "m.laminar", folder / "t.csv", "--out")
    said = json.loads(run(*words, folder / "p.svg", "--kind", "pairs", "--json").stdout)
    assert said["files"] == [str(folder / "p.svg")]
    assert (folder / "p.svg").read_text().startswith("<?xml")
    run(*words, folder / "pictures")
    names = sorted(path.name for path in (folder / "pictures").iterdir())
    # The file does not say how it was fitted, so there is no picture of that.
    assert names == ["marginals.png", "pairs.png", "path.png", "pit.png"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "m.laminar", "t.csv", "--out", "t.csv"], ["the input itself"]),
        (["report", "m.laminar", "t.csv", "--out", "no/r.html"], ["no/r.html", "does not exist"]),
        (["report", "m.laminar", "other.csv", "--out", "r.html"], ["other.csv", "'b'"]),
        (["report", "m.laminar", "gone.csv", "--out", "r.html"], ["gone.csv", "does not exist"]),
        (["report", "t.csv", "t.csv", "--out", "r.html"], ["t.csv"]),
        (["plot", "m.laminar", "t.csv", "--out", "a.png"], ["one file", "several"]),
        (["plot", "m.laminar", "t.csv", "--out", "a.pdf", "--kind", "pit"], [".png or .svg"]),
        (["plot", "m.laminar", "t.csv", "--out", "a.png", "--kind", "pti"], ["'pti'", "pit"]),
        (["plot", "m.laminar", "t.csv", "--out", "a.png", "--kind", "fit"], ["how it was fitted"]),
        (["plot", "m.laminar", "t.csv", "--out", "file"], ["is a file", "folder"]),
        (["plot", "m.laminar", "t.csv", "--out", "no/p"], ["no/p", "does not exist"]),
        (["plot", "m.laminar", "t.csv", "--out", "m.laminar"], ["the input itself"]),
    ],
)
def test_what_cannot_be_done_is_one_sentence(folder, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    result = run(*words, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for part in said:
        assert part in result.stderr
    assert sorted(folder.rglob("*")) == before
