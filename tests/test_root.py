"""The root package: lazy, complete, and without effect until a name is used."""

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import laminar

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "laminar" / "__init__.py"


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_import_loads_nothing():
    loaded = run("import sys, laminar; print(' '.join(m.split('.')[0] for m in sys.modules))")
    heavy = {"jax", "jaxlib", "equinox", "numpy", "pyarrow", "matplotlib", "sklearn", "rich"}
    assert not heavy & set(loaded.split())


def test_core_loads_no_optional_package():
    loaded = run(
        "import sys, laminar\n"
        "laminar.Flow, laminar.fit, laminar.read_table, laminar.check, laminar.save, laminar.nsf\n"
        "print(' '.join(m.split('.')[0] for m in sys.modules))"
    )
    # Not flatbuffers: JAX itself loads it where it finds it.
    optional = {"pyarrow", "matplotlib", "sklearn", "rich", "typer"}
    assert not optional & set(loaded.split())


def test_no_setting_of_jax_is_changed():
    # Each module is loaded; values of every option before and after are compared.
    code = (
        "import jax, importlib, pkgutil, laminar\n"
        "before = dict(jax.config.values)\n"
        "for m in pkgutil.walk_packages(laminar.__path__, 'laminar.'):\n"
        "    importlib.import_module(m.name)\n"
        "after = dict(jax.config.values)\n"
        "print([k for k in before if before[k] != after[k]])"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize("name", laminar.__all__)
def test_name_is_found(name):
    value = getattr(laminar, name)
    assert value is not None
    if name in laminar._HOMES:
        assert value is getattr(importlib.import_module(laminar._HOMES[name]), name)


def test_names_for_type_checkers_are_the_lazy_ones():
    block = next(
        node
        for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    shown = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == laminar._HOMES


def test_no_name_is_that_of_a_module():
    # Loading the module would put it in the place of the name.
    modules = {path.stem for path in SOURCE.parent.iterdir()}
    assert not modules & set(laminar._HOMES)
    assert set(laminar._MODULES) <= modules


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = laminar.no_such_name
    assert not hasattr(laminar, "__wrapped__")


def test_dir_and_star():
    assert set(laminar.__all__) <= set(dir(laminar))
    assert len(set(laminar.__all__)) == len(laminar.__all__)
    assert laminar.__version__ == importlib.metadata.version("laminar")
