"""Columns: what kind they are, and the exact way to standardised units and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laminar._errors import InputError
from laminar.tables.infer import grid_step, learn_column, location_scale
from laminar.tables.schema import dependent, learn_schema
from laminar.tables.table import Table


def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize(
    ("values", "discrete", "resolution", "levels"),
    [
        (rng().normal(size=500), False, 0, 0),
        (rng().integers(0, 17, 500), True, 1, 0),
        (1.7e9 + 60 * rng().integers(0, 100, 1000), True, 60, 0),
        (1.7e9 + 1e-3 * rng().integers(0, 200, 1000), True, 1e-3, 0),
        (np.float32(0.01) * rng().integers(0, 300, 2000).astype(np.float32), True, 0.01, 0),
        (rng().integers(0, 300, 1000) / 3, True, 1 / 3, 0),
        (np.round(rng().normal(size=50), 3), False, 0, 0),
        (rng().choice([1.25, 3.333, 9.99, 24.5], 400), True, 2.083, 4),
        (np.repeat(rng().normal(size=500), 2), False, 0, 0),
        (np.array([0.0, 1.0] * 30), True, 1, 0),
        (np.arange(30.0), False, 0, 0),
    ],
)
def test_ties(values, discrete, resolution, levels):
    column = learn_column("c", values.astype(np.float64))
    assert column.kind == "real"
    assert column.discrete == discrete
    assert column.resolution == pytest.approx(resolution, rel=1e-4)
    assert len(column.levels) == levels


def test_a_value_that_many_rows_share_is_smoothed():
    values = np.where(rng().random(1000) < 0.4, 0.0, rng().lognormal(size=1000))
    column = learn_column("c", values)
    assert column.kind == "real"
    assert not column.discrete
    assert column.levels == (0.0,)
    assert 0 < column.resolution < 0.1
    near, far = 0.49 * column.resolution, 0.51 * column.resolution
    z = (np.array([0.0, near, -near, far, 1.0]) - column.location) / column.scale
    restored = column.restore(z)
    assert (restored[:3] == 0).all()
    np.testing.assert_allclose(restored[3:], [far, 1.0], rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    step=st.sampled_from([1e-6, 0.01, 0.1, 0.25, 1 / 3, 1.0, 7.0, 60.0, 1e6]),
    origin=st.sampled_from([0.0, -3.0, 0.05, 1.7e9, 12345.678]),
    count=st.integers(3, 400),
    seed=st.integers(0, 2**16),
)
def test_grid_steps_are_found(step, origin, count, seed):
    if origin + step == origin or step < 1e4 * np.spacing(origin):
        return
    generator = np.random.default_rng(seed)
    multiples = np.unique(np.r_[0, 1, generator.integers(0, 5 * count, count)])
    found = grid_step(np.unique(origin + step * multiples))
    assert found == pytest.approx(step, rel=1e-6)


def test_no_grid_in_continuous_values():
    assert grid_step(np.unique(rng().normal(size=300))) == 0


@settings(max_examples=40, deadline=None)
@given(
    location=st.floats(-1e9, 1e9),
    scale=st.floats(1e-6, 1e6),
    outlier=st.floats(1e7, 1e12),
)
def test_outliers_do_not_crush_the_bulk(location, scale, outlier):
    bulk = location + scale * rng().normal(size=999)
    spoilt = np.r_[bulk, location + scale * outlier]
    median, unit = location_scale(spoilt)
    assert abs(median - location) < 0.2 * scale + 1e-6 * abs(location)
    assert 0.5 * scale < unit < 4 * scale
    assert location_scale(bulk)[1] == pytest.approx(np.std(bulk - bulk[0]), rel=1e-6)


@pytest.mark.parametrize("size", [1e-300, 1e-9, 1.0, 1e140])
def test_extreme_magnitudes(size):
    median, unit = location_scale(size * rng().normal(size=200))
    assert 0.5 * size < unit < 2 * size
    assert abs(median) < size
    with pytest.raises(InputError, match="1e150"):
        learn_column("c", np.array([1e200, 0.0, 1.0]))


def test_date_like_columns_are_exact():
    values = 1.7e9 + np.arange(400) * 2.0**-10
    schema = learn_schema(Table(("t",), values[:, None]))
    z, _ = schema.encode(values[:, None])
    np.testing.assert_allclose(schema.decode(z)[:, 0], values, rtol=0, atol=2.0**-21)
    np.testing.assert_allclose(np.diff(z[:, 0]) * schema.modelled[0].scale, 2.0**-10, rtol=1e-4)


def test_ties_come_back_exactly_from_within_their_noise():
    table = Table(
        ("pixel", "price", "constant", "tenth"),
        np.stack(
            [
                rng().integers(0, 17, 300),
                rng().choice([1.25, 3.333, 9.99], 300),
                np.full(300, 4.2),
                np.round(rng().normal(size=300), 1),
            ],
            axis=1,
        ),
    )
    schema = learn_schema(table)
    assert [column.discrete for column in schema.columns] == [True, True, False, True]
    assert schema.columns[2].kind == "constant"
    assert not schema.mixed
    z, _ = schema.encode(table.values)
    assert z.shape == (300, 3)
    noise = 0.999 * schema.noise * rng().uniform(-0.5, 0.5, z.shape)
    np.testing.assert_array_equal(schema.decode(z + noise), table.values)
    assert sum("constant" in note for note in schema.notes()) == 1
    assert sum("dequantised" in note for note in schema.notes()) == 3


def test_location_and_scale_come_from_the_training_rows():
    values = np.r_[rng().normal(size=100), 50 + rng().normal(size=100)]
    train = np.arange(100)
    column = learn_schema(Table(("a",), values[:, None]), rows=train).columns[0]
    assert abs(column.location) < 0.5
    assert 0.5 < column.scale < 2
    # A column that happens to be constant on the training rows is no constant.
    values = np.r_[np.zeros(100), rng().normal(size=100)]
    column = learn_schema(Table(("a",), values[:, None]), rows=train).columns[0]
    assert column.kind != "constant"
    assert column.scale > 0


def test_nothing_left_to_model():
    table = Table(("a", "b"), np.ones((30, 2)))
    with pytest.raises(InputError, match=r"'a'.*'b'.*constant"):
        learn_schema(table)
    with pytest.raises(InputError, match="no column left"):
        learn_schema(table, ("a", "b"))


def test_linear_dependence_is_seen():
    x = rng().normal(size=(200, 4))
    assert dependent(x) == []
    x[:, 2] = 3 * x[:, 0] - x[:, 1]
    assert len(dependent(x)) == 1
    assert dependent(x[:3]) == []


def test_grids_of_enormous_numbers_are_looked_for_in_silence():
    values = np.random.default_rng(0).normal(size=200) * 1e140
    assert grid_step(np.unique(values)) == 0
