"""Tables of mixed columns: fitted, scored, drawn, asked what if, and filled in."""

import jax.random as jr
import numpy as np
import pytest
from scipy.special import logsumexp

from laminar import io
from laminar._errors import InputError
from laminar.mixed import autoregressive_distribution
from laminar.tables.cells import Cells
from laminar.tables.flow import TableFlow, fit_table
from laminar.tables.model import _say_collapsed
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table

NAMES = ("city", "visits", "spend", "member", "score")
CELLS = (
    Cells("text", ("Aix", "Bern", "Cork")),
    Cells("integer"),
    Cells(),
    Cells("boolean"),
    Cells(),
)


def make(rows=600, seed=0, gaps=0.15):
    rng = np.random.default_rng(seed)
    city = rng.choice(3, rows, p=[0.5, 0.3, 0.2])
    visits = rng.poisson(2 + 4 * city)
    spend = np.where(rng.random(rows) < 0.3, 0, np.exp(rng.normal(3 + city, 0.5)))
    member = rng.random(rows) < np.array([0.1, 0.5, 0.9])[city]
    values = np.column_stack([city, visits, spend, member, rng.normal(2 * city, 0.5)]).astype(float)
    values[rng.random(values.shape) < gaps] = np.nan
    return Table(NAMES, values, "the visits", cells=CELLS)


@pytest.fixture(scope="module")
def fitted():
    return fit_table(make(), steps=300)


def test_it_is_better_than_independent_columns(fitted):
    model, report = fitted
    assert model.schema.mixed
    assert report["baseline"]["name"] == "independent columns"
    assert report["held_out"]["log_density"] > report["baseline"]["log_density"] + 0.5
    assert any("missing at random" in note for note in report["notes"])


def test_probabilities_of_a_discrete_row_sum_to_one():
    table = make().select(("city", "member", "visits"))
    model, _ = fit_table(table, steps=50)
    unseen = sum(column.unseen for column in model.schema.columns)
    grid = [[*range(3), np.nan], [0, 1, np.nan], [*range(200), np.nan]]
    rows = np.array(np.meshgrid(*grid, indexing="ij")).reshape(3, -1).T
    total = np.exp(logsumexp(model.log_prob(Table(table.names, rows, cells=table.cells))))
    assert total == pytest.approx(1, abs=unseen + 1e-4)
    assert total < 1


def test_samples_look_like_rows(fitted):
    model, _ = fitted
    drawn = model.sample(jr.key(0), 500)
    cells = drawn.decoded()
    assert set(cells["city"]) <= {"Aix", "Bern", "Cork", None}
    assert set(cells["member"]) <= {True, False, None}
    visits = drawn.column("visits")
    assert (visits[~np.isnan(visits)] == np.round(visits[~np.isnan(visits)])).all()
    assert np.nanmin(visits) >= 0
    assert (drawn.column("spend") == 0).mean() == pytest.approx(0.25, abs=0.1)
    assert np.isnan(drawn.values).mean() == pytest.approx(0.15, abs=0.05)
    assert np.isfinite(model.log_prob(drawn)).all()


def test_texts_are_matched_by_name(fitted):
    model, _ = fitted
    row = np.array([[1.0, 3, 0.0, 1, 2.0]])
    here = Table(NAMES, row, cells=CELLS)
    other = (Cells("text", ("Bern", "Zug")), *CELLS[1:])
    there = Table(NAMES, np.array([[0.0, 3, 0.0, 1, 2.0]]), cells=other)
    assert model.log_prob(here) == model.log_prob(there)
    new = Table(NAMES, row, cells=other)  # Zug, which the model has not seen
    assert np.isfinite(model.log_prob(new))
    assert model.log_prob(new) < model.log_prob(here)


def test_what_if(fitted):
    model, _ = fitted
    drawn = model.sample(jr.key(1), 400, fixed={"city": "Cork", "member": True})
    assert (drawn.column("city") == 2).all()
    assert (drawn.column("member") == 1).all()
    assert not np.isnan(drawn.values).any()
    assert np.mean(drawn.column("score")) == pytest.approx(4, abs=0.5)
    assert np.mean(drawn.column("visits")) == pytest.approx(10, abs=1.5)
    with pytest.raises(InputError, match="cannot have the value"):
        model.sample(jr.key(1), 5, fixed={"visits": -3})
    with pytest.raises(InputError, match="did you mean 'city'"):
        model.sample(jr.key(1), 5, fixed={"citi": "Cork"})


def test_gaps_are_filled_from_what_is_there(fitted):
    model, _ = fitted
    whole = make(200, 5, gaps=0.0)
    values = whole.values.copy()
    values[:, 0] = np.nan
    filled, effective = model.impute(jr.key(2), Table(NAMES, values, cells=CELLS), draws=2)
    assert len(filled) == 400
    assert (effective >= 1).all()
    np.testing.assert_array_equal(filled.values[::2, 1:], whole.values[:, 1:])
    right = filled.column("city") == np.repeat(whole.column("city"), 2)
    assert right.mean() > 0.8  # the score alone tells the cities apart
    with pytest.raises(InputError, match="draws"):
        model.impute(jr.key(2), whole, draws=0)


def test_what_comes_back_from_a_file_scores_the_same(fitted, tmp_path):
    model, _ = fitted
    io.save(tmp_path / "m", model)
    table = make(50, 9)
    np.testing.assert_array_equal(io.load(tmp_path / "m").log_prob(table), model.log_prob(table))


def test_the_density_is_in_the_units_of_the_columns(fitted):
    """A change of units changes ln p by the logarithms of the units."""
    model, _ = fitted
    scaled = Table(NAMES, make().values * [1, 1, 1000, 1, 1000], cells=CELLS)
    other = TableFlow(model.flow, learn_schema(scaled))
    here, there = make(50, 3), make(50, 3).values * [1, 1, 1000, 1, 1000]
    counted = (here.column("spend") > 0).astype(int) + ~np.isnan(here.column("score"))
    # The schema of the model was scaled by its training rows alone.
    first = TableFlow(model.flow, learn_schema(make())).log_prob(here)
    second = other.log_prob(Table(NAMES, there, cells=CELLS))
    np.testing.assert_allclose(first, second + counted * np.log(1000), atol=1e-3)


def test_real_tables_can_be_asked_in_part_when_told():
    rng = np.random.default_rng(0)
    x = rng.normal(size=500)
    table = Table(("a", "b"), np.column_stack([x, x + 0.3 * rng.normal(size=500)]))
    whole, _ = fit_table(table.take(np.arange(60)))
    assert not whole.schema.mixed
    with pytest.raises(InputError, match="partial=True"):
        whole.sample(jr.key(0), 3, fixed={"a": 1.0})
    model, _ = fit_table(table, steps=150, partial=True)
    drawn = model.sample(jr.key(0), 500, fixed={"a": 1.5})
    assert np.mean(drawn.column("b")) == pytest.approx(1.5, abs=0.25)
    gap = Table(("a", "b"), np.array([[np.nan, 0.2]]))
    assert np.isfinite(model.log_prob(gap))
    with pytest.raises(InputError, match="missing"):
        whole.log_prob(gap)


def test_other_flows_refuse_mixed_columns():
    with pytest.raises(InputError, match="use auto"):
        fit_table(make(100), flow="nsf")


def test_weights_may_not_be_missing():
    table = make(100, gaps=0.0)
    values = np.column_stack([table.values, np.ones(100)])
    values[7, -1] = np.nan
    with pytest.raises(InputError, match="missing in row 8"):
        fit_table(Table((*NAMES, "w"), values, cells=(*CELLS, Cells())), weights="w")


def untrained(table, **options):
    """The law of a table before training: independent columns of about the right scales."""
    schema = learn_schema(table, **options)
    shares = [
        np.bincount(events[1][events[1] >= 0].astype(int), minlength=law.states) + 0.5
        for law, events in zip(
            schema.laws,
            np.moveaxis(schema.encode(table.values)[0], 2, 0).swapaxes(1, 2),
            strict=True,
        )
    ]
    flow = autoregressive_distribution(
        schema.laws, key=jr.key(0), width=8, depth=1, shares=[s / s.sum() for s in shares]
    )
    return TableFlow(flow, schema)


def one(values, cells, name="x"):
    return Table((name,), np.asarray(values, float)[:, None], cells=(cells,))


def test_amounts_with_a_spike_sum_to_one():
    rng = np.random.default_rng(0)
    money = np.where(rng.random(500) < 0.4, 0, np.round(rng.lognormal(7, 1, 500)))
    model = untrained(one(money, Cells("integer")))
    column = model.schema.columns[0]
    assert column.fine
    assert column.spikes == (0.0,)
    whole = np.arange(0, 3_000_000.0)
    total = np.exp(model.log_prob(one(whole, Cells("integer")))).sum()
    assert total == pytest.approx(1, abs=2e-3)
    assert model.log_prob(one([-1.0], Cells("integer"))) == -np.inf


def test_gaps_and_new_categories_sum_to_one():
    codes = np.array([0.0, 1, 2, np.nan] * 20)
    text = Cells("text", ("a", "b", "c"))
    model = untrained(one(codes, text))
    every = model.log_prob(one([0, 1, 2, np.nan, -1], text))
    assert np.exp(every).sum() == pytest.approx(1, abs=1e-6)


def test_a_count_far_beyond_the_others_has_a_finite_density():
    counts = np.random.default_rng(0).poisson(3, 300).astype(float)
    model = untrained(one(counts, Cells("integer")))
    far = model.log_prob(one([1e3, 3e8, 1e12], Cells("integer")))
    assert np.isfinite(far).all()
    assert (np.diff(far) < 0).all()


def test_fixed_values_stay_as_they_were_given(fitted):
    model, _ = fitted
    drawn = model.sample(jr.key(3), 7, fixed={"score": 0.1, "city": "Bern"})
    assert (drawn.column("score") == 0.1).all()
    assert (drawn.column("city") == 1).all()
    for wrong in ({"city": "Zug"}, {"city": None}, {"score": None}):
        with pytest.raises(InputError, match="cannot have the value"):
            model.sample(jr.key(3), 7, fixed=wrong)


def test_new_texts_survive_imputation_and_impossible_cells_are_named(fitted):
    model, _ = fitted
    cells = (Cells("text", ("Bern", "Zug")), *CELLS[1:])
    rows = Table(
        NAMES, np.array([[1.0, 3, np.nan, 1, 2.0], [0.0, 3, 5.0, np.nan, 2.0]]), cells=cells
    )
    filled, _ = model.impute(jr.key(0), rows, 2)
    assert list(filled.decoded()["city"]) == ["Zug", "Zug", "Bern", "Bern"]
    wrong = Table(NAMES, np.array([[0.0, -2, np.nan, 1, 2.0]]), cells=cells)
    with pytest.raises(InputError, match="'visits', row 1 holds -2"):
        model.impute(jr.key(0), wrong)


def test_a_law_far_narrower_than_its_neighbours_is_drawn_from():
    """z is y and little more: few draws of y are near a fixed z, so more are made."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=800)
    table = Table(("y", "z"), np.column_stack([y, y + 0.05 * rng.normal(size=800)]))
    model, _ = fit_table(table, partial=True, steps=400)
    drawn = model.sample(jr.key(0), 300, fixed={"z": 2.0})
    assert len(np.unique(drawn.column("y"))) > 150
    assert abs(np.median(drawn.column("y")) - 2) < 0.3
    _, effective = model.impute(jr.key(0), Table(("y", "z"), np.array([[np.nan, 2.0]] * 3)))
    assert (effective >= 32).all()
    with pytest.warns(UserWarning, match="improbable together"):
        _say_collapsed(np.array([300.0, 3.0]), 300)
    with pytest.raises(InputError, match="cannot stand beside each other"):
        _say_collapsed(np.array([0.0]), 300)


def test_tails_are_no_wider_than_the_law():
    """A scale that is too wide, made up for in the middle, drew rows dozens of deviations away."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=1_500)
    kind = rng.random(1_500) < 1 / (1 + np.exp(-2 * x))
    y = 2 * x + 5 * kind + 0.5 * rng.normal(size=1_500)
    cells = (Cells("boolean"), Cells(), Cells())
    table = Table(("kind", "x", "y"), np.column_stack([kind, x, y]).astype(float), cells=cells)
    model, report = fit_table(table)
    drawn = model.sample(jr.key(0), 10_000)
    rest = drawn.column("y") - 2 * drawn.column("x") - 5 * drawn.column("kind")
    assert np.std(rest) < 0.7
    assert (np.abs(rest) > 2.5).mean() < 0.004
    assert np.corrcoef(drawn.column("kind"), drawn.column("x"))[0, 1] > 0.4
    assert report["training"]["steps"] <= 3_000


def test_weights_are_numbers():
    with pytest.raises(InputError, match="not a number"):
        fit_table(make(60, gaps=0), weights="city")


def test_amounts_on_a_grid_end_at_zero():
    rng = np.random.default_rng(2)
    amount = np.round(np.where(rng.random(500) < 0.3, 0, rng.gamma(2, 3, 500)), 1)
    table = Table(("k", "x"), np.column_stack([rng.integers(0, 2, 500), amount]).astype(float))
    schema = learn_schema(table, kinds={"k": "categorical"})
    column = schema.columns[1]
    assert (column.kind, column.low) == ("real", 0.0)
    model = untrained(table, kinds={"k": "categorical"})
    assert np.isneginf(model.log_prob(np.array([[0.0, -0.1]]))).all()
    assert model.sample(jr.key(0), 2_000).column("x").min() == 0
    grid = np.column_stack([np.zeros(3_000), np.arange(3_000) / 10])
    both = [logsumexp(model.log_prob(grid + np.array([k, 0]))) for k in (0, 1)]
    unseen = schema.columns[0].unseen
    assert np.exp(both).sum() == pytest.approx(1 - unseen, abs=1e-3)
