"""Models that need no training, beside tables that they fit, shared by the tests of the report."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import laminar
from laminar.mixed import autoregressive_distribution
from laminar.report.page import write_report
from laminar.tables.cells import Cells
from laminar.tables.model import TableFlow
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table

HOSTILE = "</script><b>\"'&🌊 ]]>"


@pytest.fixture(scope="session")
def hostile():
    """A name that would break a page that does not escape it."""
    return HOSTILE


@pytest.fixture(scope="session")
def plain_table():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(240, 3)) @ np.array([[1.0, 0.9, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    return Table(
        ("height", HOSTILE, "time"), np.stack([170 + 8 * z[:, 0], z[:, 1], 1e9 + z[:, 2]], 1)
    )


@pytest.fixture(scope="session")
def plain(plain_table):
    """A mixture of a Gaussian mixture and a flow of layers that bend, as `fit_density` gives."""
    bends = [laminar.SinhArcsinh(skew, 1.0, shape=(3,)) for skew in (0.5, -0.3, 0.5, -0.3)]
    parts = [
        laminar.GaussianMixture(np.ones(2), np.array([[0.0, 0, 0], [1, 1, 1]])),
        laminar.Flow(laminar.Normal(3), laminar.Chain(bends)),
    ]
    mixture = laminar.Mixture(parts, jnp.log(jnp.array([0.4, 0.6])))
    flow = laminar.Flow(mixture, laminar.Frozen(laminar.Affine(jnp.zeros(3), 1.0)))
    return TableFlow(flow, learn_schema(plain_table))


@pytest.fixture(scope="session")
def mixed_table():
    """Numbers, whole numbers, categories, dates and gaps."""
    rng = np.random.default_rng(1)
    count = 300
    group = rng.integers(0, 3, count).astype(float)
    values = np.stack(
        [
            rng.normal(size=count) + group,
            rng.poisson(3, count).astype(float),
            np.where(rng.random(count) < 0.1, np.nan, group),
            np.cumsum(rng.integers(1, 4, count)).astype(float),
        ],
        axis=1,
    )
    cells = (
        Cells(),
        Cells("integer"),
        Cells("text", ("blue", HOSTILE, "red")),
        Cells("datetime", unit="D", origin=18_000),
    )
    return Table(("size", "count", "colour", "day"), values, "mixed.csv", cells=cells)


@pytest.fixture(scope="session")
def mixed(mixed_table):
    schema = learn_schema(mixed_table)
    assert schema.mixed
    flow = autoregressive_distribution(schema.laws, key=jr.key(0), width=16, depth=1)
    return TableFlow(flow, schema)


def written(folder, model, table):
    path = folder / "report.html"
    return path, write_report(model, table, path, key=jr.key(0), meta=META)


@pytest.fixture(scope="session")
def plain_page(tmp_path_factory, plain, plain_table):
    """The path of a page, and what was said of it."""
    return written(tmp_path_factory.mktemp("plain"), plain, plain_table)


@pytest.fixture(scope="session")
def mixed_page(tmp_path_factory, mixed, mixed_table):
    """The same of a mixed table."""
    return written(tmp_path_factory.mktemp("mixed"), mixed, mixed_table)


META = {
    "table": "wine.csv",
    "rows": 240,
    "seed": 5,
    "flow": "auto",
    "held_out": {"log_density": -3.21, "error": 0.11, "rows": 48},
    "baseline": {"name": "a Gaussian", "log_density": -4.0, "error": 0.2, "rows": 48},
    "training": {
        "parts": [
            {"name": f"part {HOSTILE}", "weight": 0.6, "score": -3.0},
            {"name": "mixture", "weight": 0.4, "score": -3.5},
        ],
        "flows": {
            "flow over normal": {
                "validation": [3.0, 2.0, None],
                "validation_ema": [3.1, 1.9, 1.8],
                "validation_steps": [10, 20, 30],
                "best_step": 30,
                "best_loss": 1.8,
            }
        },
    },
    "notes": [f"Column {HOSTILE!r} takes few distinct values."],
    "seconds": 2.5,
}


@pytest.fixture(scope="session")
def meta():
    """What the file of a model says of how it was fitted."""
    return META
