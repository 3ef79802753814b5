"""The layering contracts hold, and each of them catches a planted fault."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "laminar"
CONFIG = ROOT / "pyproject.toml"

# Optional or slow packages, which only functions may import. The command line's own entry is built
# with Typer and may load it at once; the bridge to NumPyro subclasses its classes, and the
# estimators those of scikit-learn.
LAZY = {
    "pyarrow",
    "matplotlib",
    "PIL",
    "sklearn",
    "rich",
    "typer",
    "flatbuffers",
    "pandas",
    "numpyro",
    "arviz",
}
MAY_IMPORT = {"cli": {"typer"}, "inference": {"numpyro"}, "estimators": {"sklearn"}}


def lint(source: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", CONFIG],
        cwd=source,
        env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin", "HOME": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_contracts_hold():
    result = lint(ROOT / "src")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("flow.py", "import laminar.train.fit", "Layers of the package"),
        ("nn/mlp.py", "import laminar.bijections.base", "Layers of the package"),
        ("stray.py", "", "Layers of the package"),
        ("bijections/linear.py", "import laminar.bijections.coupling", "Tiers of the bijections"),
        ("bijections/splines.py", "import laminar.nn.mlp", "Transforms without networks"),
        ("zoo/vectors.py", "from laminar import Flow", "Nobody imports the root"),
    ],
)
def test_planted_faults_are_caught(tmp_path, module, line, contract):
    shutil.copytree(SOURCE, tmp_path / "laminar", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "laminar" / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode != 0
    report = result.stdout + result.stderr
    broken = [row for row in report.splitlines() if "BROKEN" in row or "not listed" in row]
    assert any(contract in row for row in broken) or "stray" in report, report


def imported_at_once(tree: ast.Module) -> set[str]:
    """Top-level names of the packages that importing a module imports."""
    found = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


def test_optional_packages_are_imported_late():
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0]
        early = imported_at_once(ast.parse(path.read_text())) & LAZY
        assert early <= MAY_IMPORT.get(room, set()), f"{path} imports {sorted(early)} at once."


def test_late_import_check_sees_what_it_must():
    text = "import jax\ntry:\n    import pyarrow.csv\nexcept ImportError:\n    pass\n"
    assert imported_at_once(ast.parse(text)) == {"jax", "pyarrow"}
    text = "if TYPE_CHECKING:\n    import rich\ndef f():\n    import typer\n"
    assert imported_at_once(ast.parse(text)) == set()
