"""The script of an exported table: the same units, the same values of ties, whole files only."""

import importlib.util
from dataclasses import replace

import jax.random as jr
import numpy as np
import pytest

from laminar._errors import InputError
from laminar.bijections.base import Identity
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.mixed import autoregressive_distribution
from laminar.tables.cells import Cells
from laminar.tables.export import export_table
from laminar.tables.flow import TableFlow
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table

pytest.importorskip("flatbuffers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of tenths, two heavy values, halves and thirds, a size, a share and a constant."""
    rng = np.random.default_rng(0)
    heavy = np.where(rng.random(300) < 0.5, rng.normal(size=300), rng.choice([0.0, 0.7], 300))
    columns = {
        "tenth": rng.integers(0, 9, 300) * 0.1,
        "heavy": heavy,
        "level": rng.choice([0.5, 1 / 3, 2], 300),
        "one": np.ones(300),
        "size": rng.lognormal(0, 1, 300),
        "share": rng.beta(2, 3, 300),
    }
    table = Table(tuple(columns), np.stack([*columns.values()], axis=1), named=False)
    schema = learn_schema(table, kinds={"size": "positive", "share": "bounded:0:1"})
    model = TableFlow(Flow(Normal((5,)), Identity((5,))), schema)
    return table, model, export_table(model, tmp_path_factory.mktemp("table") / "out")


def script(folder):
    spec = importlib.util.spec_from_file_location("exported_table", folder / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_scores_and_restores_alike(exported):
    table, model, folder = exported
    module = script(folder)
    np.testing.assert_allclose(
        module.log_density(table.values), model.log_prob(table), rtol=1e-5, atol=1e-5
    )
    outside = np.where(np.arange(6) == 4, -1.0, table.values[:2])
    assert (module.log_density(outside) == -np.inf).all()
    assert (model.log_prob(outside) == -np.inf).all()
    z = np.asarray(jr.normal(jr.key(0), (2000, 5)))
    for i, column in enumerate(model.schema.modelled):
        about = next(c for c in module._ALL if c["name"] == column.name)
        np.testing.assert_allclose(
            module._restore(about, z[:, i]), column.restore(z[:, i]), rtol=1e-13
        )
    drawn = module.sample(500)[:, 0]
    assert set(drawn) <= {round(k / 10, 1) for k in range(-60, 61)}
    assert module._load("sample.bin") is module._load("sample.bin")


def test_whole_numbers_and_dates_are_those_of_the_model(tmp_path):
    rng = np.random.default_rng(1)
    people = np.round(rng.lognormal(9, 1, 400))
    columns = {
        "people": (people, Cells("integer")),
        "money": (np.round(rng.normal(0, 5e4, 400)), Cells("integer")),
        "debt": (-people, Cells("integer")),
        "day": (rng.integers(0, 9_000, 400), Cells("datetime", unit="D", origin=10_000)),
        "hundreds": (100 * rng.integers(-9_000, 9_000, 400), Cells("integer")),
        "size": (np.round(rng.lognormal(3, 2, 400), 2) + 0.01, Cells()),
    }
    values = np.column_stack([x for x, _ in columns.values()]).astype(float)
    table = Table(tuple(columns), values, cells=tuple(cells for _, cells in columns.values()))
    schema = learn_schema(table, kinds={"debt": "integer:-10000000:0", "size": "positive"})
    assert not schema.mixed
    model = TableFlow(Flow(Normal((6,)), Identity((6,))), schema)
    module = script(export_table(model, tmp_path / "out"))
    rows = np.concatenate([values, values[:3] + 0.25, -values[:3], values[:1] + 1])
    known = model.log_prob(replace(table, values=rows, rows=None))
    np.testing.assert_allclose(module.log_density(rows), known, rtol=1e-5)
    assert np.isneginf(module.log_density(-values[:3])).all()
    z = np.asarray(jr.normal(jr.key(0), (2000, 6))) * 3
    for i, column in enumerate(schema.modelled):
        drawn = module._restore(module._ALL[i], z[:, i])
        np.testing.assert_allclose(drawn, column.restore(z[:, i]), rtol=1e-13)
        assert column.supports(drawn).all()


def test_the_script_refuses_what_is_damaged(exported):
    _, _, folder = exported
    whole = (folder / "log_prob.bin").read_bytes()
    (folder / "log_prob.bin").write_bytes(whole[:-1] + b"?")
    module = script(folder)
    with pytest.raises(ValueError, match="damaged"):
        module.log_density(np.zeros((1, 6)))
    (folder / "log_prob.bin").write_bytes(whole)
    assert np.isfinite(module.log_density(np.full((1, 6), [[1, 1, 1, 1, 1, 0.5]])))


def test_models_of_mixed_tables_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    table = Table(("a", "k"), np.column_stack([rng.normal(size=50), rng.integers(0, 3, 50)]))
    schema = learn_schema(table, kinds={"k": "categorical"})
    model = TableFlow(autoregressive_distribution(schema.laws, key=jr.key(0), width=8), schema)
    with pytest.raises(InputError, match="numbers without gaps"):
        export_table(model, tmp_path / "out")
