"""The command posterior: what it prints and writes, and what it refuses in one sentence."""

import json

import pytest
from typer.testing import CliRunner

from laminar import io
from laminar.cli.main import app

MODEL = """
import numpyro
import numpyro.distributions as dist
from laminar.inference import as_target
from helper import SCALE

def normal(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, SCALE))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

target = as_target(lambda x: -0.5 * (x**2).sum(), example=2)
number = 3

def faulty(y):
    return y.nothing

def counting(y):
    numpyro.sample("k", dist.Poisson(3.0))
"""


@pytest.fixture(autouse=True, scope="module")
def _no_cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINAR_CACHE_DIR", "off")
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text("SCALE = 2.0\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "data.json").write_text('{"y": [1.2, 0.7, 2.1, 1.4, 0.3]}')
    (tmp_path / "ragged.json").write_text('{"y": [[1, 2], [3]]}')
    (tmp_path / "words.json").write_text('{"y": ["a"]}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    result = CliRunner().invoke(app, ["posterior", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_model_is_fitted_written_and_judged(folder):
    result = run(
        "model.py:normal", "--data", "data.json", "--out", "out", "--draws", 1000, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert found["verdict"] == "good"
    assert found["summary"][0]["mean"] == pytest.approx(5.7 / 5.25, abs=0.05)
    assert found["files"] == ["summary.json", "flow.lam", "draws.csv", "posterior.png"]
    assert {p.name for p in (folder / "out").iterdir()} == set(found["files"])
    assert json.loads((folder / "out/summary.json").read_text())["verdict"] == "good"
    assert io.load(folder / "out/flow.lam").shape == (1,)
    lines = (folder / "out/draws.csv").read_text().splitlines()
    assert lines[0].replace(chr(34), "") == "mu,weight"
    assert len(lines) == 1001


def test_a_target_needs_no_data_and_is_printed(folder):
    result = run("model.py:target", "--draws", 500)
    assert result.exit_code == 0, result.stderr
    assert "x[0]" in result.stdout
    assert "log evidence" in result.stdout
    assert "Good." in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.py"], "names no function"),
        (["absent.py:f"], "There is no file absent.py"),
        (["model.py:absent"], "model.py has no absent; it has normal, faulty, counting"),
        (["model.py:number"], "neither a function nor a Target"),
        (["broken.py:f"], "broken.py, line 1: SyntaxError"),
        (["model.py:normal"], "missing a required argument: 'y'"),
        (["model.py:target", "--data", "data.json"], "--data has no use"),
        (["model.py:faulty", "--data", "data.json"], "model.py, line 16: AttributeError"),
        (["model.py:counting", "--data", "data.json"], "discrete"),
        (["model.py:normal", "--data", "absent.json"], "absent.json cannot be read"),
        (["model.py:normal", "--data", "bad.json"], "bad.json is not JSON"),
        (["model.py:normal", "--data", "list.json"], "one JSON object"),
        (["model.py:normal", "--data", "ragged.json"], "y has rows of different lengths"),
        (["model.py:normal", "--data", "words.json"], "y must hold numbers"),
        (["model.py:normal", "--data", "data.json", "--out", "helper.py"], "is a file"),
        (["model.py:normal", "--steps", "1"], "--steps must be at least 6"),
        (["model.py:target", "--flow", "glow"], "choose 'auto'"),
    ],
)
def test_bad_input_gets_one_sentence(folder, words, said):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
