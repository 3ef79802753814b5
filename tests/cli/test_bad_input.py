"""Everything a user can get wrong: one sentence, exit status 2, nothing written."""

import json
import os
import subprocess
import sys
from io import StringIO

import numpy as np
import pytest
from typer.testing import CliRunner

from laminar import io
from laminar.bijections.base import Identity
from laminar.cli.common import FLOWS, jax_session
from laminar.cli.main import app
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.tables.flow import TableFlow
from laminar.tables.read import write_table
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table
from laminar.zoo import BUILDERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good and bad tables, two models, and a folder that is none."""
    path = tmp_path_factory.mktemp("bad")
    values = np.random.default_rng(0).normal(size=(60, 2))
    write_table(path / "good.csv", {"a": values[:, 0], "b": values[:, 1]})
    write_table(path / "other.csv", {"a": values[:, 0], "bb": values[:, 1]})
    write_table(path / "more.npy", {"a": values[:, 0], "b": values[:, 1], "c": values[:, 1]})
    write_table(path / "constant.csv", {"a": np.ones(60), "b": np.ones(60)})
    write_table(path / "few.csv", {"a": values[:5, 0], "b": values[:5, 1]})
    write_table(path / "negative.csv", {"a": values[:, 0], "w": values[:, 1]})
    for name, text in {
        "empty.csv": "",
        "header.csv": "a,b\n",
        "text.csv": "a,b\n" + "1,2\n" * 20 + "3,four\n",
        "nan.csv": "a,b\n1,2\n3,\n5,nan\n7,inf\n",
        "twice.csv": "a,a\n1,2\n",
        "ragged.csv": "a,b\n1,2\n3\n",
        "note.txt": "hello",
        "not.laminar": "this is no model",
    }.items():
        (path / name).write_text(text)
    (path / "folder").mkdir()
    (path / "link.ckpt").symlink_to("new.laminar")
    os.mkfifo(path / "fifo")
    (path / "protected.laminar").touch(0o400)
    table = Table(("a", "b"), values)
    flow = Flow(Normal((2,)), Identity((2,)))
    io.save(path / "m.laminar", TableFlow(flow, learn_schema(table)))
    io.save(path / "flow.laminar", flow)
    (path / "cut.laminar").write_bytes((path / "m.laminar").read_bytes()[:-9])
    return path


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


FIT = ["--out", "new.laminar"]
CASES = [
    # Tables
    (["fit", "missing.csv", *FIT], ["missing.csv", "does not exist"]),
    (["fit", "goood.csv", *FIT], ["did you mean good.csv"]),
    (["fit", "empty.csv", *FIT], ["empty.csv", "is empty"]),
    (["fit", "header.csv", *FIT], ["header.csv", "no rows"]),
    (["fit", "text.csv", *FIT], ["text.csv", "'b'", "row 21", "'four'"]),
    (["fit", "nan.csv", *FIT], ["nan.csv", "'b'", "1 infinite", "row 4"]),
    (["fit", "twice.csv", *FIT], ["twice.csv", "two columns named 'a'"]),
    (["fit", "ragged.csv", *FIT], ["ragged.csv", "row 2"]),
    (["fit", "folder", *FIT], ["folder", "directory"]),
    (["fit", "note.txt", *FIT], ["note.txt", ".parquet"]),
    (["fit", "few.csv", *FIT], ["few.csv", "5 rows", "at least 20"]),
    (["fit", "constant.csv", *FIT], ["constant.csv", "'a'", "constant"]),
    (["fit", "builtin:nope", *FIT], ["built-in", "two_moons"]),
    (["fit", "builtin:iriss", *FIT], ["did you mean builtin:iris"]),
    # Columns
    (["fit", "good.csv", *FIT, "--columns", "A2"], ["no column 'A2'", "did you mean 'a'"]),
    (["fit", "good.csv", *FIT, "--columns", "a,a"], ["two columns named 'a'"]),
    (["fit", "good.csv", *FIT, "--columns", "a,,b"], ["--columns"]),
    (["fit", "good.csv", *FIT, "--given", "zzz"], ["no column 'zzz'", "a, b"]),
    (["fit", "good.csv", *FIT, "--given", "a,b"], ["no column left"]),
    (["fit", "negative.csv", *FIT, "--weights", "w"], ["'w'", "negative in row"]),
    (["fit", "good.csv", *FIT, "--weights", "zzz"], ["no column 'zzz'"]),
    # Outputs
    (["fit", "good.csv", "--out", "folder"], ["folder"]),
    (["fit", "good.csv", "--out", "no/m"], ["no/m", "does not exist"]),
    (["fit", "good.csv", "--out", "good.csv"], ["the input itself"]),
    (["fit", "good.csv", "--out", "n.ckpt", "--checkpoint", "./n.ckpt"], ["--checkpoint", "--out"]),
    (["fit", "good.csv", *FIT, "--checkpoint", "link.ckpt"], ["--checkpoint", "--out"]),
    (["fit", "good.csv", *FIT, "--checkpoint", "good.csv"], ["--checkpoint", "the input itself"]),
    (["fit", "good.csv", "--out", "n.flow-normal", "--checkpoint", "n"], ["--out", "--checkpoint"]),
    (["fit", "good.csv", "--out", "fifo"], ["fifo", "regular file"]),
    (["fit", "good.csv", "--out", "protected.laminar"], ["protected.laminar", "write-protected"]),
    (["fit", "good.csv", "--out", "m" * 300], ["too long"]),
    (["fit", "m" * 300 + ".csv", *FIT], ["too long"]),
    (["score", "m.laminar", "good.csv", "--out", "good.csv"], ["the input itself"]),
    (["score", "m.laminar", "good.csv", "--out", "m.laminar"], [".parquet"]),
    (["score", "m.laminar", "good.csv", "--out", "s.xls"], ["s.xls", ".parquet"]),
    (["sample", "m.laminar", "-n", "3", "--out", "no/s.csv"], ["no/s.csv", "does not exist"]),
    # Models
    (["score", "none.laminar", "good.csv", "--out", "s.csv"], ["none.laminar"]),
    (["score", "not.laminar", "good.csv", "--out", "s.csv"], ["not.laminar"]),
    (["score", "good.csv", "good.csv", "--out", "s.csv"], ["good.csv"]),
    (["score", "cut.laminar", "good.csv", "--out", "s.csv"], ["cut.laminar"]),
    (["score", "flow.laminar", "good.csv", "--out", "s.csv"], ["flow.laminar", "a Flow"]),
    (["info", "folder"], ["folder"]),
    (["info", "m" * 300], ["too long"]),
    (["check", "not.laminar"], ["not.laminar"]),
    (["export", "not.laminar", "--out", "out"], ["not.laminar"]),
    # Other columns at score time
    (["score", "m.laminar", "other.csv", "--out", "s.csv"], ["other.csv", "'b'", "a, b"]),
    (["score", "m.laminar", "more.npy", "--out", "s.csv"], ["more.npy", "3 columns", "a, b"]),
    (["score", "m.laminar", "folder", "--out", "s.csv"], ["folder", "directory"]),
    (["score", "m.laminar", "gone.csv", "--out", "s.csv"], ["gone.csv", "does not exist"]),
    (["score", "m.laminar", "nan.csv", "--out", "s.csv"], ["nan.csv", "row 4"]),
    (["check", "m.laminar", "other.csv"], ["other.csv", "'b'"]),
    (["sample", "m.laminar", "-n", "2", "--given", "a=1", "--out", "s.csv"], ["no condition"]),
    (["sample", "m.laminar", "-n", "2", "--given", "good.csv", "--out", "s.csv"], ["no condition"]),
    (["sample", "m.laminar", "-n", "2", "--given", "a=", "--out", "s.csv"], ["NAME=VALUE"]),
    # Values of options
    (["fit", "good.csv", *FIT, "--steps", "0"], ["--steps", "at least 1"]),
    (["fit", "good.csv", *FIT, "--steps", "-3"], ["--steps", "at least 1"]),
    (["fit", "good.csv", *FIT, "--steps", "many"], ["--steps"]),
    (["fit", "good.csv", *FIT, "--time-limit", "0"], ["--time-limit", "positive"]),
    (["fit", "good.csv", *FIT, "--validation", "1"], ["--validation", "between 0 and 1"]),
    (["fit", "text.csv", *FIT, "--weights", "b"], ["'b'", "not a number"]),
    (["report", "m.laminar", "good.csv", "--out", "r.pdf"], ["r.pdf", ".html"]),
    (["fit", "good.csv", *FIT, "--time-limit", "nan"], ["--time-limit", "positive"]),
    (["fit", "good.csv", *FIT, "--batch-size", "0"], ["--batch-size"]),
    (["fit", "good.csv", *FIT, "--learning-rate", "-1"], ["--learning-rate"]),
    (["fit", "good.csv", *FIT, "--learning-rate", "1e9"], ["--learning-rate"]),
    (["fit", "good.csv", *FIT, "--seed", "-1"], ["--seed"]),
    (["fit", "good.csv", *FIT, "--seed", "99999999999999999999"], ["--seed"]),
    (["fit", "good.csv", *FIT, "--flow", "nfs"], ["did you mean nsf"]),
    (["fit", "good.csv", *FIT, "--precision", "float16"], ["--precision"]),
    (["fit", "good.csv"], ["--out"]),
    (["compare", "good.csv", "--flows", "nsf,what"], ["no flow named 'what'"]),
    (["compare", "few.csv", "--flows", "nsf"], ["few.csv", "at least 40"]),
    (["sample", "m.laminar", "-n", "0", "--out", "s.csv"], ["-n", "at least 1"]),
    (["sample", "m.laminar", "-n", "1000000000000000", "--out", "s.csv"], ["memory"]),
    (["nosuch"], ["nosuch"]),
    (["fit", "good.csv", *FIT, "--nosuch"], ["--nosuch"]),
]


@pytest.mark.parametrize(("words", "parts"), CASES, ids=lambda x: " ".join(x)[:60])
def test_one_sentence_and_nothing_written(folder, monkeypatch, words, parts):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LAMINAR_CACHE_DIR", "off")
    before = snapshot(folder)
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith("laminar: ")
    for part in parts:
        assert part in lines[0]
    assert snapshot(folder) == before


def test_an_error_is_one_json_object_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["fit", "missing.csv", "--out", "new.laminar", "--json"])
    assert result.exit_code == 2
    assert "missing.csv" in json.loads(result.stdout)["error"]


def test_a_folder_without_permission(folder, monkeypatch):
    from laminar import _files

    monkeypatch.chdir(folder)
    monkeypatch.setattr(_files.os, "access", lambda path, mode: False)
    result = CliRunner().invoke(app, ["fit", "good.csv", "--out", "new.laminar"])
    assert result.exit_code == 2
    assert "no permission" in result.stderr


def run(*words, cwd, **variables):
    return subprocess.run(
        [sys.executable, "-m", "laminar", *words],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_real_process_shows_no_traceback(folder):
    before = snapshot(folder)
    result = run("fit", "text.csv", "--out", "new.laminar", cwd=folder)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "'four'" in result.stderr
    assert snapshot(folder) == before


def test_a_cache_that_cannot_be_written_is_no_error(folder, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    out = tmp_path / "s.csv"
    words = ("score", "m.laminar", "good.csv", "--out", str(out))
    result = run(*words, cwd=folder, LAMINAR_CACHE_DIR=str(blocked / "sub"))
    assert result.returncode == 0, result.stderr
    assert out.exists()


def test_help_comes_without_loading_what_is_heavy(folder):
    heavy = {"jax", "jaxlib", "equinox", "optax", "numpy", "scipy", "pyarrow", "sklearn", "pandas"}
    probe = (
        "import sys\n"
        "from laminar.cli.main import app\n"
        "code = app(sys.argv[1:], standalone_mode=False)\n"
        f"print(code, sorted({heavy} & set(sys.modules)))\n"
    )
    for words in (["--help"], ["fit", "--help"], ["--version"]):
        result = subprocess.run(
            [sys.executable, "-c", probe, *words], capture_output=True, text=True, check=True
        )
        assert result.stdout.splitlines()[-1] == "0 []"
    result = run("--help", cwd=folder)
    assert result.returncode == 0
    assert "compare" in result.stdout


def test_the_names_of_flows_are_those_that_can_be_built():
    assert ("auto", *BUILDERS) == FLOWS


def test_compiled_programs_are_kept_for_the_next_run(folder, tmp_path):
    cache, out = tmp_path / "cache", str(tmp_path / "s.csv")
    words = ("score", "m.laminar", "good.csv", "--out", out)
    kept = []
    for _ in range(2):
        result = run(*words, cwd=folder, LAMINAR_CACHE_DIR=str(cache))
        assert result.returncode == 0, result.stderr
        # Beside each program JAX notes when it was last used.
        kept.append({entry.name for entry in cache.iterdir() if not entry.name.endswith("-atime")})
    assert kept[0]
    assert kept[1] == kept[0]
    run(*words, "--no-cache", cwd=folder, LAMINAR_CACHE_DIR=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_session_puts_the_settings_back(tmp_path, monkeypatch):
    import jax

    monkeypatch.setenv("LAMINAR_CACHE_DIR", str(tmp_path))
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_raise_persistent_cache_errors",
    )
    before = [getattr(jax.config, name) for name in names]
    with jax_session("float64"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert [getattr(jax.config, name) for name in names] == before


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_what_goes_on(monkeypatch, capsys, terminal):
    shown = StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", shown)
    with jax_session("float32", no_cache=True, doing="Counting sheep"):
        print("a result")
    assert ("Counting sheep" in shown.getvalue()) == terminal
    assert capsys.readouterr().out == "a result\n"
