"""TableFlow: densities in the user's units, sampling back, and fitting."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from laminar import io
from laminar._errors import InputError, TrainingError, list_rows
from laminar.bijections.base import AbstractBijection, Identity
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.objectives import Batch
from laminar.tables import flow as flow_module
from laminar.tables.baselines import Rows, gaussian, mixture
from laminar.tables.compare import compare_table
from laminar.tables.flow import (
    DequantisedNLL,
    TableFlow,
    fit_table,
    split,
    weighted_mean,
)
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table, array_table
from laminar.train.density import fit_density

SMALL = {"steps": 4, "batch_size": 32, "progress": False}


def rows(n=60, d=2, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def standard(table, given=()):
    """The model whose standardised rows are standard normal, whatever is given."""
    schema = learn_schema(table, given)
    shape = (len(schema.modelled),)
    return TableFlow(Flow(Normal(shape), Identity(shape)), schema)


class Shifted(AbstractBijection):
    """z = x + the sum of the condition."""

    in_shape: tuple = (1,)
    out_shape: tuple = (1,)
    cond_shape: tuple = (2,)

    def forward(self, x, condition=None, *, key=None):
        return x + condition.sum(), jnp.zeros(x.shape[1:], x.dtype)

    def inverse(self, y, condition=None, *, key=None):
        return y - condition.sum(), jnp.zeros(y.shape[1:], y.dtype)


def conditional():
    table = Table(("c", "x", "d"), rows(80, 3))
    schema = learn_schema(table, ("d", "c"))
    return table, TableFlow(Flow(Normal((1,)), Shifted()), schema)


def test_densities_are_in_the_users_units():
    values = rows()
    metres = Table(("a", "b"), values * [1, 1] + [5, 0])
    millimetres = Table(("a", "b"), metres.values * [1000, 1])
    first, second = standard(metres), standard(millimetres)
    log_p = first.log_prob(metres)
    assert log_p.dtype == np.float64
    np.testing.assert_allclose(second.log_prob(millimetres), log_p - np.log(1000), rtol=1e-6)
    columns = first.schema.columns
    expected = sum(norm.logpdf(metres.column(c.name), c.location, c.scale) for c in columns)
    np.testing.assert_allclose(log_p, expected, rtol=1e-5)


def test_dates_keep_their_small_steps():
    seconds = 1.7e9 + np.random.default_rng(0).normal(size=400) * 0.01
    model = standard(Table(("t",), seconds[:, None]))
    column = model.schema.columns[0]
    z = (seconds - column.location) / column.scale
    expected = norm.logpdf(z) - np.log(column.scale)
    np.testing.assert_allclose(model.log_prob(seconds), expected, rtol=1e-5)
    drawn = model.sample(jr.key(0), 500).column("t")
    assert np.std(drawn) == pytest.approx(0.01, rel=0.2)


def test_columns_are_matched_by_name_or_else_by_position():
    table = Table(("a", "b"), rows())
    model = standard(table)
    log_p = model.log_prob(table)
    turned = Table(("b", "x", "a"), table.values[:, [1, 0, 0]])
    np.testing.assert_array_equal(model.log_prob(turned), log_p)
    np.testing.assert_array_equal(model.log_prob(table.values), log_p)
    with pytest.raises(InputError, match="has no column 'b'; did you mean"):
        model.log_prob(Table(("a", "B2"), table.values))
    with pytest.raises(InputError, match=r"has 3 columns .* 2 columns: a, b"):
        model.log_prob(rows(5, 3))


def test_columns_of_arrays_keep_their_numbers():
    table = array_table(rows(60, 3))
    model = standard(table.select(["x3", "x1"]))
    log_p = model.log_prob(table)
    named = Table(("x1", "x3"), table.values[:, [0, 2]])
    np.testing.assert_array_equal(model.log_prob(named), log_p)
    np.testing.assert_array_equal(model.log_prob(table.values[:, [2, 0]]), log_p)
    turned = standard(table.select(["x2", "x1"]))
    two = array_table(table.values[:, :2])
    np.testing.assert_array_equal(turned.log_prob(two), turned.log_prob(two.values[:, ::-1]))


def test_samples_without_names_can_be_scored():
    _, model = conditional()
    drawn = model.sample(jr.key(0), 9, {"c": 1.0, "d": 2.0})
    np.testing.assert_array_equal(model.log_prob(drawn.values), model.log_prob(drawn))


def test_constants_and_what_is_not_finite():
    values = np.c_[rows(), np.full(60, 3.0)]
    model = standard(Table(("a", "b", "c"), values))
    assert model.flow.shape == (2,)
    test = np.tile(values[0], (5, 1))
    test[1, 2] = 3.1
    test[2, 0] = np.nan
    test[3, 1] = np.inf
    test[4, 0] = 1e60
    log_p = model.log_prob(test)
    assert np.isfinite(log_p[0])
    assert np.isnan(log_p[2])
    np.testing.assert_array_equal(log_p[[1, 3, 4]], -np.inf)
    drawn = model.sample(jr.key(0), 7)
    assert drawn.names == ("a", "b", "c")
    np.testing.assert_array_equal(drawn.column("c"), 3.0)


def test_ties_are_sampled_on_their_grid_and_scored_at_the_centre():
    values = np.c_[np.random.default_rng(0).integers(0, 5, 200) * 0.25, rows(200)[:, 0]]
    model = standard(Table(("a", "b"), values))
    column = model.schema.columns[0]
    drawn = model.sample(jr.key(1), 300).column("a")
    np.testing.assert_array_equal(drawn, np.round(drawn * 4) / 4)
    expected = norm.logpdf(0.5, column.location, column.scale)
    expected += norm.logpdf(0.0, model.schema.columns[1].location, model.schema.columns[1].scale)
    np.testing.assert_allclose(model.log_prob(np.array([[0.5, 0.0]])), expected, rtol=1e-5)


def test_conditions_come_with_the_rows_or_apart():
    table, model = conditional()
    given = table.select(["c", "d"])
    log_p = model.log_prob(table)
    np.testing.assert_array_equal(model.log_prob(table.select(["x"]), given), log_p)
    np.testing.assert_array_equal(
        model.log_prob(table.column("x"), table.select(["d", "c"]).values), log_p
    )
    np.testing.assert_array_equal(model.log_prob(table.values), log_p)
    one = model.log_prob(table.select(["x"]), {"c": 0.5, "d": -1.0})
    z, c, d = (
        (value - column.location) / column.scale
        for value, column in zip(
            (table.column("x"), 0.5, -1.0),
            (model.schema.columns[0], model.schema.given[1], model.schema.given[0]),
            strict=True,
        )
    )
    expected = norm.logpdf(z - c - d) - np.log(model.schema.columns[0].scale)
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


def test_samples_follow_their_conditions_in_order():
    table, model = conditional()
    drawn = model.sample(jr.key(0), 3, table.take(np.arange(4)))
    assert drawn.names == ("c", "x", "d")
    assert len(drawn) == 12
    np.testing.assert_array_equal(drawn.column("c"), np.repeat(table.column("c")[:4], 3))
    with pytest.warns(UserWarning, match="c = 1000 lies more than 10 deviations"):
        far = model.sample(jr.key(0), 200, {"c": 1000.0, "d": 0.0}).column("x")
    assert far.min() > 100
    with pytest.raises(InputError, match="conditioned on 2 columns: d, c"):
        model.sample(jr.key(0), 3)
    with pytest.raises(InputError, match="no value for 'c'"):
        model.sample(jr.key(0), 3, {"d": 1.0})
    with pytest.raises(InputError, match="no column 'dd'"):
        model.sample(jr.key(0), 3, {"dd": 1.0})
    with pytest.raises(InputError, match="infinite"):
        model.sample(jr.key(0), 3, {"c": np.inf, "d": 0.0})
    with pytest.raises(InputError, match="at least 1"):
        model.sample(jr.key(0), 0, {"c": 1.0, "d": 0.0})
    with pytest.raises(InputError, match="takes no condition"):
        standard(table).sample(jr.key(0), 3, {"c": 1.0})


def test_the_noise_of_the_objective_is_uniform_and_fresh():
    flow = Flow(Normal((2,)), Identity((2,)))
    objective = DequantisedNLL(jnp.array([2.0, 0.0]))
    batch = Batch(jnp.zeros((20_000, 2)))
    loss, _ = objective(flow, batch, jr.key(0))
    # E[u² / 2] = width² / 24 for u uniform of that width.
    assert float(loss) == pytest.approx(np.log(2 * np.pi) + 4 / 24, abs=5e-3)
    assert float(loss) != float(objective(flow, batch, jr.key(1))[0])


def test_splits_and_weighted_means():
    train, held = split(100, 0.1, np.random.default_rng(0))
    assert (len(train), len(held)) == (80, 20)
    assert len(split(2000, 0.1, np.random.default_rng(0))[1]) == 200
    np.testing.assert_array_equal(np.sort(np.r_[train, held]), np.arange(100))
    x = rows()[:, 0]
    plain = weighted_mean(x)
    assert plain["log_density"] == pytest.approx(x.mean())
    assert plain["error"] == pytest.approx(x.std(ddof=1) / np.sqrt(len(x)))
    some = weighted_mean(np.r_[x, np.nan, -np.inf], np.r_[np.full(len(x), 2.0), 0, 0])
    assert some["log_density"] == pytest.approx(plain["log_density"])
    assert some["error"] == pytest.approx(plain["error"])
    assert weighted_mean(np.array([0.0, -np.inf]))["log_density"] is None


def test_baselines_agree_with_scipy_and_condition_exactly():
    x = rows(300, 3) @ np.triu(np.ones((3, 3)))
    mean, covariance = x.mean(axis=0), np.cov(x.T, ddof=0) + 1e-6 * np.eye(3)
    expected = multivariate_normal.logpdf(x, mean, covariance)
    np.testing.assert_allclose(gaussian(Rows(x)).log_prob(Rows(x)), expected, rtol=1e-9)
    apart = Rows(x[:, :2], x[:, 2:])
    marginal = norm.logpdf(x[:, 2], mean[2], np.sqrt(covariance[2, 2]))
    np.testing.assert_allclose(gaussian(apart).log_prob(apart), expected - marginal, rtol=1e-9)
    doubled = gaussian(Rows(np.r_[x, x[:50]]))
    weights = np.r_[np.full(50, 2.0), np.ones(250)]
    weighted = gaussian(Rows(x, None, weights))
    np.testing.assert_allclose(weighted.covariances, doubled.covariances, rtol=1e-9)
    two = np.r_[rows(200) - 5, rows(200, seed=1) + 5]
    found = mixture(Rows(two[::2]), Rows(two[1::2]))
    assert len(found.weights) >= 2
    assert found.log_prob(Rows(two)).mean() > gaussian(Rows(two)).log_prob(Rows(two)).mean() + 0.5
    # Once the number is chosen, the mixture is fitted to all rows.
    np.testing.assert_allclose(found.weights @ found.means, two.mean(axis=0), atol=1e-6)


@pytest.fixture(scope="module")
def fitted():
    values = np.c_[rows(120, 2), np.tile([0.0, 1, 2], 40), np.ones(120)]
    table = Table(("a", "b", "k", "one"), values, "numbers.csv")
    notes: list[str] = []
    model, report = fit_table(
        table, flow="realnvp", given=("b",), weights=None, seed=3, notify=notes.append, **SMALL
    )
    return table, model, report, notes


def test_a_report_says_what_was_fitted(fitted, tmp_path):
    table, model, report, notes = fitted
    assert report["columns"] == ["a", "k", "one"]
    assert report["dimensions"] == 2
    assert report["given"] == ["b"]
    assert report["train_rows"] + report["held_out_rows"] == report["rows"] == 120
    assert report["notes"] == notes
    assert len(notes) == 2
    assert report["training"]["steps"] == 4
    for name in ("held_out", "baseline"):
        assert np.isfinite(report[name]["log_density"])
        assert report[name]["error"] > 0
    io.save(tmp_path / "m", model, report)
    again = io.load(tmp_path / "m")
    assert again.schema == model.schema
    np.testing.assert_array_equal(again.log_prob(table), model.log_prob(table))
    assert io.read_header(tmp_path / "m").meta["held_out"] == report["held_out"]


def test_the_same_seed_gives_the_same_bits(fitted):
    table, model, _, _ = fitted
    again, _ = fit_table(table, flow="realnvp", given=("b",), seed=3, **SMALL)
    np.testing.assert_array_equal(again.log_prob(table), model.log_prob(table))


def test_weights_are_left_out_of_the_rows_and_repeat_them():
    values = np.c_[rows(100, 2), np.ones(100)]
    values[50:, 2] = 0.0
    values[50:, :2] += 100
    model, report = fit_table(Table(("a", "b", "w"), values), weights="w", flow="realnvp", **SMALL)
    assert report["columns"] == ["a", "b"]
    assert report["rows"] == 50
    assert abs(model.schema.columns[0].location) < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow": "nosuch"}, "no flow named 'nosuch'"),
        ({"given": ("zz",)}, "no column 'zz'"),
        ({"given": ("a", "b")}, "no column left"),
        ({"weights": "zz"}, "no column 'zz'"),
        ({"weights": "b"}, "negative in row"),
        ({"weights": "a", "given": ("a",)}, "both as given and as weights"),
        ({"validation": 1.5}, "between 0 and 1"),
        ({"flow": "auto", "resume": True}, "resume needs"),
    ],
)
def test_what_cannot_be_fitted(options, message):
    values = rows(100)
    values[:, 0] = np.abs(values[:, 0])
    with pytest.raises(InputError, match=message):
        fit_table(Table(("a", "b"), values), **options)
    with pytest.raises(InputError, match="10 rows, and fitting needs at least 20"):
        fit_table(Table(("a", "b"), values[:10]))


@pytest.mark.parametrize("name", ["realnvp", "auto"])
def test_errors_in_training_name_rows_of_the_table(name, monkeypatch):
    """Through two splits, and where rows of weight zero or of the file were left out."""
    values = np.c_[rows(100), np.ones(100)]
    values[::7, 2] = 0.0
    table = Table(("a", "b", "w"), values, rows=np.arange(100) * 2 + 5)
    seen = []

    def fail(key, *arguments, **_):
        data = arguments[-1]
        x = data.x if isinstance(data, Batch) else data
        seen.append(np.asarray(x)[[3, 8], 0])
        raise TrainingError("It stopped for rows 3, 8. Look there.", [3, 8])

    monkeypatch.setattr("laminar.tables.flow.fit", fail)
    monkeypatch.setattr("laminar.tables.flow.fit_density", fail)
    with pytest.raises(TrainingError) as caught:
        fit_table(table, flow=name, weights="w", **SMALL)
    positions = [int(np.flatnonzero(table.rows == row)[0]) for row in caught.value.rows]
    kept = table.select(["a", "b"]).take(np.flatnonzero(values[:, 2]))
    train, _ = split(len(kept), 0.1, np.random.default_rng(0))
    column = learn_schema(kept, (), train).columns[0]
    expected = (values[positions, 0] - column.location) / column.scale
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5)
    assert f"for {list_rows(caught.value.rows)}. Look" in str(caught.value)


def test_the_score_is_of_rows_that_decided_nothing(monkeypatch):
    """Neither early stopping nor the search of candidates sees the rows that are held out."""
    table = Table(("a", "b"), rows(200))
    seen = []

    def spy(function):
        def called(key, *arguments, **options):
            seen.extend(part.x for part in arguments if isinstance(part, Batch))
            seen.extend(part for part in arguments if isinstance(part, np.ndarray))
            seen.extend(p.x for p in options.values() if isinstance(p, Batch))
            return function(key, *arguments, **options)

        return called

    monkeypatch.setattr("laminar.tables.flow.fit", spy(flow_module.fit))
    monkeypatch.setattr("laminar.tables.flow.fit_density", spy(flow_module.fit_density))
    for name, parts in (("realnvp", 2), ("auto", 1)):
        seen.clear()
        _, report = fit_table(table, flow=name, seed=1, **SMALL)
        assert len(seen) == parts
        _, held = split(200, 0.1, np.random.default_rng(1))
        schema = learn_schema(table, (), np.setdiff1d(np.arange(200), held))
        used = np.concatenate([np.asarray(part)[:, 0] for part in seen])
        assert len(used) == report["train_rows"] == 160
        hidden = schema.encode(table.values[held])[0][:, 0]
        assert np.abs(used[:, None] - hidden[None]).min() > 1e-6


def test_the_search_is_not_repeated_for_the_last_fit(monkeypatch):
    calls = []

    def counted(key, data, **options):
        calls.append(len(data))
        return fit_density(key, data, **options)

    monkeypatch.setattr("laminar.tables.flow.fit_density", counted)
    table = Table(("a", "b"), rows(150) * [1, 2] + [50, 0])
    model, report = fit_table(table, seed=2)
    assert calls == [120]
    assert report["training"]["flows"] == {}
    assert report["held_out"]["rows"] == 30
    drawn = model.sample(jr.key(0), 500).column("a")
    assert drawn.mean() == pytest.approx(50, abs=0.3)
    assert np.isfinite(model.log_prob(table)).all()


def test_a_column_that_repeats_others_is_noticed():
    class Noticed(Exception):
        pass

    def notify(note):
        if "linear function" in note:
            raise Noticed(note)

    values = rows(60)
    with pytest.raises(Noticed, match="leave it out"):
        fit_table(Table(("a", "b", "sum"), np.c_[values, values.sum(axis=1)]), notify=notify)


def test_comparisons_are_paired_and_sorted():
    report = compare_table(Table(("a", "b"), rows(100)), ["realnvp"], **SMALL)
    names = {entry["name"] for entry in report["results"]}
    assert names == {"realnvp", "Gaussian", "Gaussian mixture"}
    means = [entry["log_density"] for entry in report["results"]]
    assert means == sorted(means, reverse=True)
    assert report["results"][0]["behind"] == 0
    assert report["train_rows"] + report["test_rows"] == 100
    with pytest.raises(InputError, match="at least 40"):
        compare_table(Table(("a",), rows(30, 1)), ["realnvp"])


def test_float64_flows_are_fed_float64():
    table = Table(("a", "b"), rows())
    with jax.enable_x64(True):
        model = standard(table)
        assert model.flow.dtype == jnp.float64
        columns = model.schema.columns
        expected = sum(norm.logpdf(table.column(c.name), c.location, c.scale) for c in columns)
        np.testing.assert_allclose(model.log_prob(table), expected, rtol=1e-13)
