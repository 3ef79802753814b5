"""Columns of every kind: inferred or declared, to events and back, and the log-density's terms."""

import numpy as np
import pytest

from laminar._errors import InputError
from laminar.mixed import ColumnLaw
from laminar.tables.cells import Cells
from laminar.tables.columns import Column
from laminar.tables.infer import learn_column, parse_kind
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table


def rng():
    return np.random.default_rng(3)


TEXT = Cells("text", ("ant", "bee", "cat"))
WHOLE, TRUTH = Cells("integer"), Cells("boolean")
DAY = Cells("datetime", unit="D", origin=19_000)


def column(values, cells=None, declared=None, typed=True):
    return learn_column("c", np.asarray(values, float), cells=cells, declared=declared, typed=typed)


@pytest.mark.parametrize(
    ("values", "cells", "kind"),
    [
        (rng().normal(size=200), Cells(), "real"),
        (rng().lognormal(0, 1.5, 200), Cells(), "positive"),
        (rng().lognormal(0, 0.1, 200), Cells(), "real"),
        (rng().poisson(3, 200), WHOLE, "integer"),
        (rng().integers(0, 2, 200), TRUTH, "boolean"),
        (rng().integers(0, 3, 200), TEXT, "categorical"),
        (rng().integers(0, 3, 200), Cells("text", TEXT.levels, ordered=True), "ordinal"),
        (rng().integers(0, 900, 200), DAY, "datetime"),
        (np.arange(200) + 1_000, WHOLE, "ignored"),  # row numbers
        (rng().permutation(1_000)[:200], WHOLE, "ignored"),
        (np.arange(40), WHOLE, "integer"),  # few rows prove nothing
        (rng().integers(0, 10**9, 200), WHOLE, "integer"),  # as different by chance
        (np.arange(200), DAY, "datetime"),
        (np.full(200, 7.0), WHOLE, "constant"),
        (np.full(200, np.nan), Cells(), "constant"),
        (np.arange(200), Cells("text", tuple(map(str, range(200)))), "ignored"),
    ],
)
def test_what_a_column_is_follows_from_its_cells(values, cells, kind):
    found = column(values, cells)
    assert found.kind == kind
    assert not found.missing


@pytest.mark.parametrize(
    ("values", "cells", "declared"),
    [
        (rng().normal(size=100), Cells(), None),
        (np.where(rng().random(300) < 0.3, 0, rng().lognormal(0, 1, 300)), Cells(), None),
        (rng().lognormal(0, 1, 100), Cells(), "positive"),
        (3 + rng().lognormal(0, 1, 100), Cells(), "positive:3"),
        (rng().beta(0.3, 0.3, 100), Cells(), "bounded:0:1"),
        (rng().poisson(3, 100), WHOLE, None),
        (10 * rng().integers(-5, 50, 100), WHOLE, None),
        (rng().integers(0, 10**9, 100), WHOLE, None),
        (rng().integers(0, 2, 100), TRUTH, None),
        (rng().integers(0, 3, 100), TEXT, None),
        (rng().integers(0, 3, 100), Cells("text", TEXT.levels, ordered=True), None),
        (rng().integers(0, 900, 100), DAY, None),
        (rng().choice([1.5, 2.5, 7.0], 100), Cells(), "categorical"),
        (
            np.minimum(rng().zipf(1.2, 3000), 500) - 1,
            Cells("text", tuple(map(str, range(500)))),
            None,
        ),
    ],
)
def test_cells_come_back_from_events(values, cells, declared):
    values = np.asarray(values, float)
    values[::7] = np.nan
    found = column(values, cells, declared)
    assert found.missing
    value, state, term = found.encode(values)
    assert np.isfinite(value).all()
    assert np.isfinite(term).all()
    assert ((state >= 0) & (state < found.law.states)).all()
    back = found.decode(value, state, rng())
    if found.rare:
        kept = np.isin(values, found.codes) | np.isnan(values)
        assert np.isin(back[~kept], found.rare).all()
        back, values = back[kept], values[kept]
    np.testing.assert_allclose(back, values, rtol=1e-12)


@pytest.mark.parametrize(
    "found",
    [
        Column("c", "real", 3.0, 2.0),
        Column("c", "positive", 1.0, 0.5, low=2.0),
        Column("c", "bounded", 0.3, 0.7, low=-1.0, high=4.0),
    ],
)
def test_the_terms_are_the_logarithms_of_the_slopes(found):
    x = np.array([2.3, 2.5, 3.0, 3.9])
    h = 1e-6
    slope = (found.standardise(x + h) - found.standardise(x - h)) / (2 * h)
    np.testing.assert_allclose(found.log_slope(x), np.log(slope), rtol=1e-8)
    np.testing.assert_allclose(found.unstandardise(found.standardise(x)), x, rtol=1e-12)


def test_ends_keep_their_digits():
    found = Column("c", "bounded", 0.0, 1.0, low=0.0, high=1.0)
    x = np.array([1e-300, 1e-12, 0.5, 1 - 1e-12])
    np.testing.assert_allclose(found.unstandardise(found.standardise(x)), x, rtol=1e-9)
    assert (found.unstandardise(np.array([-1e4, 1e4])) > 0).all()
    assert (found.unstandardise(np.array([-1e4, 1e4])) < 1).all()


def test_what_lies_outside_has_no_probability():
    assert not column(rng().lognormal(0, 2, 200)).supports(np.array([-1.0, 0.0])).any()
    counts = column(rng().poisson(3, 200), WHOLE)
    np.testing.assert_array_equal(
        counts.supports(np.array([0.0, 40.0, -1.0, 0.5, np.nan])), [True, True, False, False, True]
    )
    tens = column(10.0 * rng().integers(0, 50, 100), WHOLE)
    assert tens.step == 10
    np.testing.assert_array_equal(tens.supports(np.array([15.0, 15.5])), [True, False])
    constant = column(np.full(30, 4.0))
    np.testing.assert_array_equal(constant.supports(np.array([4.0, 5.0])), [True, False])
    empty = column(np.full(30, np.nan))
    np.testing.assert_array_equal(empty.supports(np.array([np.nan, 5.0])), [True, False])


def test_a_spike_is_found_where_a_cell_is_too_narrow():
    gains = np.where(rng().random(500) < 0.9, 0, rng().integers(1000, 99_999, 500))
    found = column(gains, WHOLE)
    assert found.fine
    assert found.spikes == (0.0,)
    _, state, term = found.encode(np.array([0.0, 5000.0]))
    np.testing.assert_array_equal(state, [1, 0])
    assert term[0] == 0


def test_a_new_category_has_the_chance_of_one():
    found = column(rng().integers(0, 3, 98), TEXT)
    _, state, term = found.encode(np.array([-1.0, 0.0]))
    assert state[0] == -1
    np.testing.assert_allclose(np.exp(term), [0.01, 0.99])


def test_conditions_are_numbers_and_flags():
    numbers = rng().normal(5, 2, 100)
    numbers[3] = np.nan
    table = Table(
        ("x", "kind", "n"),
        np.column_stack([rng().normal(size=100), rng().integers(0, 3, 100), numbers]),
        cells=(Cells(), TEXT, Cells()),
    )
    schema = learn_schema(table, ("kind", "n"))
    assert schema.cond_size == 5
    found = schema.condition(table.select(("kind", "n")).values)
    assert found.shape == (100, 5)
    np.testing.assert_array_equal(found[:, :3].sum(1), 1)
    np.testing.assert_array_equal(found[3, 3:], [0, 1])
    assert not schema.mixed


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ("colour", "choose among"),
        ("bounded", "write kinds as"),
        ("bounded:1:0", "write kinds as"),
        ("bounded:a:b", "write kinds as"),
        ("real:1", "write kinds as"),
        ("constant", "choose among"),
    ],
)
def test_a_declaration_without_meaning_is_refused(declared, words):
    with pytest.raises(InputError, match=words) as caught:
        parse_kind("price", declared)
    assert "'price'" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "cells", "declared", "words"),
    [
        (rng().normal(size=50), Cells(), "positive", "holds -"),
        (rng().normal(size=50), Cells(), "bounded:-1:1", "between -1 and 1"),
        (rng().normal(size=50), Cells(), "integer", "declared integer and holds"),
        (rng().integers(0, 3, 50), TEXT, "real", "holds text"),
        (rng().integers(0, 3, 50), WHOLE, "boolean", "3 different values"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(values, cells, declared, words):
    with pytest.raises(InputError, match=words):
        column(values, cells, declared)


def test_a_declaration_of_no_column_is_refused():
    with pytest.raises(InputError, match="no column 'b'"):
        learn_schema(Table(("a",), rng().normal(size=(30, 1))), kinds={"b": "real"})


def test_values_off_the_grid_share_a_small_chance():
    tens = column(10.0 * rng().integers(0, 50, 98), WHOLE)
    _, term = tens.place(np.arange(20.0))
    off = np.arange(20) % 10 != 0
    np.testing.assert_allclose(term[~off], np.log(0.99))
    # Nine others stand beside each point of the grid.
    np.testing.assert_allclose(9 * np.exp(term[off]), 0.01)


@pytest.mark.parametrize("step", [0.01, 0.1])
def test_rounded_reals_have_a_density_on_either_side_of_a_fine_grid(step):
    """Of the value plus noise: no cell's width is in it, however many values there are."""
    values = step * np.round(rng().normal(0, 20, 20_000) / step)
    schema = learn_schema(Table(("a",), values[:, None]))
    assert schema.columns[0].discrete
    assert not schema.mixed
    _, terms = schema.encode(values[:3, None])
    np.testing.assert_allclose(terms, -np.log(schema.columns[0].scale))


def test_an_irregular_list_of_reals_is_a_list_of_categories_in_a_mixed_table():
    values = np.column_stack([rng().choice(np.log([1, 2, 3, 5, 7]), 200), rng().random(200) < 0.5])
    schema = learn_schema(Table(("x", "yes"), values, cells=(Cells(), TRUTH)))
    assert schema.mixed
    assert schema.laws[0] == ColumnLaw(5, None)
    events, _ = schema.encode(values)
    np.testing.assert_allclose(schema.decode(events), values)


def test_conditions_at_and_beyond_their_ends_are_numbers():
    x = rng().lognormal(0, 1, (100, 2))
    x[3, 1] = 0
    schema = learn_schema(Table(("y", "p"), x), ("p",), kinds={"p": "positive"})
    assert np.isfinite(schema.condition(np.array([[0.0], [-4.0], [2.0]]))).all()


@pytest.mark.parametrize(
    ("values", "cells", "declared", "words"),
    [
        (0.5 * rng().integers(1, 6, 60), Cells(), "ordinal", "no room"),
        (rng().normal(size=60), Cells(), "datetime", "no dates"),
        (rng().poisson(9, 60), WHOLE, "integer:0:5", "no room"),
    ],
)
def test_a_declaration_may_not_make_the_table_impossible(values, cells, declared, words):
    with pytest.raises(InputError, match=words):
        column(values, cells, declared)


def test_grades_are_told_one_by_one_and_counts_are_not():
    grades = column(rng().integers(1, 6, 200), WHOLE)
    assert grades.kind == "integer"
    assert grades.law == ColumnLaw(5, None)
    _, _, term = grades.encode(np.array([3.0, 6.0]))
    np.testing.assert_allclose(np.exp(term), [201 / 202, 1 / 202])
    assert column(rng().poisson(3, 400), WHOLE).law.value == "cells"


def test_samples_have_the_digits_of_the_table():
    prices = np.round(rng().lognormal(3, 1, 300), 2)
    found = column(prices)
    assert found.kind == "positive"
    x = found.restore(rng().normal(size=500))
    np.testing.assert_array_equal(x, np.round(x, 2))
    assert (x > 0).all()


def test_values_far_out_ask_for_heavy_tails():
    rng = np.random.default_rng(0)
    counts = np.floor(np.exp(rng.normal(2, 2, 500)))
    whole = Cells("integer")
    far = learn_column("visits", counts, cells=whole, typed=True)
    # The unit is that of the bulk, which the scale is wider than.
    assert 0 < far.law.heavy < 0.5
    near = rng.poisson(9, 500) * 1.0
    assert not learn_column("visits", near, cells=whole, typed=True).law.heavy
    # One far value among those held out counts as well, and a logarithm has none left.
    held = np.append(near, 1e4)
    assert learn_column("visits", held, near, cells=whole, typed=True).law.heavy
    assert not learn_column("cost", np.exp(rng.normal(2, 2, 500)), typed=True).law.heavy


def test_an_upper_end_of_zero_is_an_end():
    debts = -np.round(rng().lognormal(9, 1, 400))
    debts[:2] = 0
    found = column(debts, WHOLE, "integer:-1000000000:0")
    assert np.isfinite([found.location, found.scale]).all()
    np.testing.assert_allclose(found.unstandardise(found.standardise(debts)), debts, atol=1e-3)
    assert np.isfinite(found.log_slope(debts)).all()
    assert not found.supports(np.array([1.0]))[0]


def test_identifiers_are_not_kept():
    cells = Cells("text", tuple(f"user-{i}" for i in range(300)))
    assert column(np.arange(300), cells).cells.levels == ()


def test_what_is_declared_real_stays_real():
    assert column(rng().lognormal(0, 1.5, 200), declared="real").kind == "real"
    spiked = np.where(rng().random(400) < 0.7, 0.0, 50 * rng().beta(2, 5, 400))
    assert column(spiked).kind == "positive"  # zero is an end
