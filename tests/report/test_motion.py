"""Samples are followed through the steps of a flow, in numbers a page can hold."""

import base64
import json

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import laminar
from laminar.report.motion import SCALE, follow, followed
from laminar.report.study import study
from laminar.tables.model import TableFlow
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table

KEY = jr.key(0)


@pytest.fixture(scope="module")
def looked(plain, plain_table):
    return study(plain, plain_table, KEY)


def test_steps_lead_from_the_base_to_the_tables_units(looked, plain):
    motion = looked.motion(KEY)
    assert motion.names[0] == "the base, independent standard normal variables"
    assert motion.names[1:5] == ["after SinhArcsinh"] * 4
    assert motion.names[-1] == "the rows, in the table's units"
    assert motion.share == pytest.approx(0.6)
    assert motion.points.shape == (7, 3, motion.points.shape[2])
    # The base is standard normal, and the last step has the spread of the table.
    axis = motion.axes[0][0]
    z = axis.low + motion.points[0, 0] * (axis.high - axis.low)
    assert abs(z.mean()) < 0.1
    assert abs(z.std() - 1) < 0.1
    axis = motion.axes[-1][0]
    assert 100 < axis.low < 170 < axis.high < 320


def test_densities_are_those_of_the_laws_at_each_step(looked, plain):
    motion = looked.motion(KEY)
    flow, _ = followed(plain.flow)
    low, high = (np.array([[getattr(a, end)] for a in motion.axes[2]]) for end in ("low", "high"))
    z = (low + motion.points[2] * (high - low)).T
    np.testing.assert_allclose(flow.upto(2).log_prob(z), motion.log_q[2], atol=1e-4)
    # The last step has the units' part: three columns scaled.
    scales = np.log([column.scale for column in plain.schema.modelled]).sum()
    np.testing.assert_allclose(motion.log_q[-1], motion.log_q[-2] - scales, atol=1e-4)


def test_what_a_page_gets_is_json_and_decodes_to_the_points(looked):
    motion = looked.motion(KEY)
    page = json.loads(json.dumps(motion.to_page(), allow_nan=False))
    points = np.frombuffer(base64.b64decode(page["points"]), "<i2").reshape(motion.points.shape)
    np.testing.assert_allclose(points / SCALE, motion.points.clip(-1, 2), atol=1e-4)
    steps, columns = len(motion.names), len(motion.views)
    assert len(page["texts"]) == len(page["ramp"]) == len(page["ticks"]) == steps
    assert all(len(step) == columns for step in page["ticks"])
    heights = np.frombuffer(base64.b64decode(page["heights"]), "<i2").reshape(steps, -1) / SCALE
    assert 0.8 < ((heights >= 0) & (heights <= 1)).mean() < 0.99
    assert page["texts"][0][0].startswith("z₀: the base, ")


def test_mixed_rows_start_from_logistic_variables(mixed, mixed_table):
    found = study(mixed, mixed_table, KEY)
    motion = found.motion(KEY)
    assert [view.name for view in motion.views] == list(mixed_table.names)
    assert len(motion.names) == 3
    axis = motion.axes[0][2]
    z = axis.low + motion.points[0, 2] * (axis.high - axis.low)
    # Logistic: nine in ten within ±ln 19.
    assert (np.abs(z) < np.log(19)).mean() == pytest.approx(0.9, abs=0.04)
    # Missing colours are nowhere at the last step.
    gone = np.isnan(motion.points[-1, 2])
    assert gone.any()
    assert np.isfinite(motion.points[-1, 0]).all()
    json.dumps(motion.to_page(), allow_nan=False)


def test_conditions_are_those_of_rows():
    rng = np.random.default_rng(0)
    c = rng.normal(size=200)
    values = np.stack([c + 0.1 * rng.normal(size=200), rng.normal(size=200), c], 1)
    table = Table(("a", "b", "c"), values)
    flow = laminar.nsf(2, key=KEY, layers=2, width=8, cond_dim=1)
    model = TableFlow(flow, learn_schema(table, given=("c",)))
    motion = study(model, table, KEY).motion(KEY)
    assert [view.name for view in motion.views] == ["a", "b"]
    assert np.isfinite(motion.log_q).all()


def test_a_wide_table_keeps_the_columns_that_matter():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 300))
    x[:, 250] = x[:, 7] + 0.01 * x[:, 250]
    table = Table(tuple(f"c{i}" for i in range(300)), x)
    bends = [laminar.SinhArcsinh(0.1, 1.0, shape=(300,)) for _ in range(8)]
    flow = laminar.Flow(laminar.Normal(300), laminar.Chain(bends))
    motion = study(TableFlow(flow, learn_schema(table)), table, KEY).motion(KEY)
    names = [view.name for view in motion.views]
    assert {"c7", "c250"} <= set(names)
    assert motion.left_out == 300 - len(names) > 0
    assert len(motion.to_page()["points"]) < 2_000_000


def test_a_single_column_has_no_path():
    table = Table(("a",), np.random.default_rng(0).normal(size=(40, 1)))
    flow = laminar.Flow(laminar.Normal(1), laminar.Affine(jnp.zeros(1), 1.0))
    found = study(TableFlow(flow, learn_schema(table)), table, KEY)
    assert found.motion(KEY) is None
    assert follow(found.model, found.views, None, KEY) is None


def test_the_heaviest_deep_part_of_a_mixture_is_followed():
    bends = [laminar.SinhArcsinh(0.2 * i, 1.0, shape=(2,)) for i in range(4)]
    flow = laminar.Flow(laminar.Normal(2), laminar.Chain(bends))
    shallow = laminar.Flow(laminar.Normal(2), laminar.Affine(shape=(2,)))
    mixture = laminar.Mixture([shallow, flow], jnp.log(jnp.array([0.7, 0.3])))
    whole = laminar.Flow(mixture, laminar.Frozen(laminar.Affine(jnp.ones(2), 2.0)))
    part, share = followed(whole)
    assert share == pytest.approx(0.3)
    assert len(part.path(jnp.zeros((1, 2))).points) == 6
    nested = laminar.Flow(flow, laminar.Affine(shape=(2,)))
    part, share = followed(laminar.Flow(laminar.Mixture([shallow, nested]), shallow.bijection))
    assert share == 0.5
    assert len(part.path(jnp.zeros((1, 2))).points) == 7
    alone, share = followed(flow)
    assert share is None
    rows = np.random.default_rng(0).normal(size=(20, 2))
    assert jnp.array_equal(alone.log_prob(rows), flow.log_prob(rows))
