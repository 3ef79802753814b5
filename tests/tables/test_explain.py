"""Conditional densities of cells against laws whose conditionals are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import geom, kstest, logistic, multivariate_normal, norm, poisson

from laminar._errors import InputError
from laminar.tables.cells import Cells, datetime_column
from laminar.tables.explain import conditionals, quantiles
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table

WHOLE = Cells("integer")


def rng(seed=0):
    return np.random.default_rng(seed)


def known(table, log_prob, kinds=None):
    """A model of known log-density over the columns of a table."""

    def scored(rows):
        return log_prob(rows.select(table.names).values)

    return SimpleNamespace(schema=learn_schema(table, kinds=kinds), log_prob=scored)


@pytest.mark.parametrize("rho", [0.0, 0.9, 0.9999])
def test_the_normal_law(rho):
    covariance = np.array([[1.0, rho], [rho, 1.0]])
    values = rng().multivariate_normal([0, 0], covariance, 400)
    strange = np.array([[3.0, -3.0], [40.0, 0.0], [0.0, 0.0], [50.0, -50.0]])
    scale, shift = np.array([1.0, 1e-3]), np.array([1e3, 0.0])
    table = Table(("a", "b"), values * scale + shift)
    model = known(
        table,
        lambda x: (
            multivariate_normal.logpdf((x - shift) / scale, [0, 0], covariance) - np.log(1e-3)
        ),
    )
    rows = np.concatenate([values[:60], strange])
    found = conditionals(model, Table(("a", "b"), rows * scale + shift), table)
    sd = np.sqrt(1 - rho**2)
    for d, unit in ((0, 0.0), (1, np.log(1e-3))):
        z = (rows[:, d] - rho * rows[:, 1 - d]) / sd
        expected = norm.logpdf(z) - np.log(sd) - unit
        np.testing.assert_allclose(found.log_p[:60, d], expected[:60], atol=0.02)
        np.testing.assert_allclose(found.below[:60, d], norm.cdf(z[:60]), atol=0.01)
        # Beside a cell that is far out the mass is far out too, and found with less precision.
        np.testing.assert_allclose(found.log_p[60:, d], expected[60:], rtol=0.02, atol=0.02)
    np.testing.assert_array_equal(found.at, 0.0)


def test_two_modes_far_from_the_cell():
    """The mass lies where the cell is not, and between the nodes of the column's quantiles."""
    values = np.concatenate([rng().normal(-5, 0.05, (200, 1)), rng(1).normal(5, 0.05, (200, 1))])
    table = Table(("a",), values)

    def log_prob(x):
        parts = [norm.logpdf(x[:, 0], m, 0.05) for m in (-5, 5)]
        return logsumexp(parts, axis=0) - np.log(2)

    model = known(table, log_prob)
    rows = Table(("a",), np.array([[0.0], [5.01], [-5.2]]))
    found = conditionals(model, rows, table)
    np.testing.assert_allclose(found.log_p[:, 0], log_prob(rows.values), atol=0.02)
    np.testing.assert_allclose(found.below[:2, 0], [0.5, 0.5 + 0.5 * norm.cdf(0.2)], atol=0.01)


def test_categories_counts_spikes_and_gaps():
    """x in {a, b, c}; n Poisson-like on a grid; y is missing, exactly zero, or normal about x."""
    generator, count = rng(2), 600
    chances = np.array([0.6, 0.3, 0.1])
    x = generator.choice(3, count, p=chances).astype(float)
    n = generator.binomial(6, 0.2 + 0.2 * x)
    state = generator.choice(3, count, p=[0.5, 0.3, 0.2])
    y = np.where(state == 0, generator.normal(3 * x + 7, 1), np.where(state == 1, 0.0, np.nan))
    cells = (Cells("text", ("a", "b", "c")), Cells("integer"), Cells())
    table = Table(("x", "n", "y"), np.column_stack([x, n, y]), cells=cells)

    from scipy.stats import binom

    def log_prob(v):
        level = np.where(np.isin(v[:, 0], [0, 1, 2]), v[:, 0], 0).astype(int)
        out = np.where(v[:, 0] == level, np.log(chances[level]), np.log(1e-3))
        out = out + binom.logpmf(v[:, 1], 6, 0.2 + 0.2 * level)
        gone, zero = np.isnan(v[:, 2]), v[:, 2] == 0
        dense = np.log(0.5) + norm.logpdf(v[:, 2], 3 * level + 7, 1)
        return out + np.where(gone, np.log(0.2), np.where(zero, np.log(0.3), dense))

    model = known(table, log_prob)
    kinds = {column.name: column.kind for column in model.schema.columns}
    assert kinds["x"] == "categorical"
    assert model.schema.columns[1].on_grid
    assert model.schema.columns[2].missing
    assert model.schema.columns[2].spikes == (0.0,)
    rows = Table(
        ("x", "n", "y"),
        np.array([[0, 1, 7.0], [2, 5, 0.0], [1, 3, np.nan], [2, 0, 7.0], [-1, 1, 7.0]]),
        cells=cells,
    )
    found = conditionals(model, rows, table)
    whole = log_prob(rows.values)
    for i, row in enumerate(rows.values):
        for d, states in ((0, [0, 1, 2]), (1, range(7))):
            altered = np.tile(row, (len(states), 1))
            altered[:, d] = list(states)
            terms = log_prob(altered)
            if row[d] not in states:
                terms = np.append(terms, whole[i])
            assert found.log_p[i, d] == pytest.approx(whole[i] - logsumexp(terms), abs=1e-6)
            assert found.at[i, d] == pytest.approx(np.exp(found.log_p[i, d]))
    np.testing.assert_allclose(found.log_p[1, 2], np.log(0.3), atol=0.02)
    np.testing.assert_allclose(found.log_p[2, 2], np.log(0.2), atol=0.02)
    np.testing.assert_allclose(found.log_p[0, 2], np.log(0.5) + norm.logpdf(0), atol=0.02)
    np.testing.assert_allclose(found.below[2, 2], 0.8, atol=0.01)
    # Given a row that is a draw, the transforms are uniform, also where functions jump.
    u = conditionals(model, table, table).transforms(rng(3))
    for d in range(3):
        assert kstest(u[:, d], "uniform").pvalue > 1e-3


def test_whole_numbers_of_a_wide_range_are_summed_and_not_integrated():
    generator = rng(4)
    values = np.round(generator.normal(0, 300, (2_000, 1)))
    cells = (Cells("integer"),)
    table = Table(("n",), values, cells=cells)

    def log_prob(x):
        on = x[:, 0] == np.round(x[:, 0])
        inside = norm.cdf((x[:, 0] + 0.5) / 300) - norm.cdf((x[:, 0] - 0.5) / 300)
        with np.errstate(divide="ignore"):
            return np.where(on, np.log(inside), -np.inf)

    model = known(table, log_prob, {"n": "integer"})
    assert model.schema.columns[0].on_grid
    rows = Table(("n",), np.array([[0.0], [250.0], [-900.0]]), cells=cells)
    found = conditionals(model, rows, table)
    np.testing.assert_allclose(found.log_p[:, 0], log_prob(rows.values), atol=0.02)
    np.testing.assert_allclose(found.below[:2, 0], norm.cdf([0, 250 / 300]), atol=0.01)


def test_what_is_impossible_is_told_apart():
    """A constant that differs, a value outside the support, and cells beside such a cell."""
    values = np.column_stack([rng(5).random(200) + 0.5, rng(6).normal(size=200), np.full(200, 7.0)])
    table = Table(("a", "b", "c"), values)

    def log_prob(x):
        a, b, c = x.T
        inside = (a > 0) & (c == 7)
        return np.where(inside, norm.logpdf(np.log(np.maximum(a, 1e-9))) + norm.logpdf(b), -np.inf)

    model = known(table, log_prob, {"a": "positive"})
    rows = Table(("a", "b", "c"), np.array([[1.0, 0.0, 7.0], [1.0, 0.0, 8.0], [-1.0, 0.0, 7.0]]))
    found = conditionals(model, rows, table).log_p
    assert np.isfinite(found[0]).all()
    assert np.isneginf(found[1, 2])
    assert np.isnan(found[1, :2]).all()
    assert np.isneginf(found[2, 0])
    assert np.isnan(found[2, 1])
    assert found[2, 2] == 0


def test_quantiles_of_a_normal_law():
    rho = 0.9
    covariance = np.array([[1.0, rho], [rho, 1.0]])
    table = Table(("a", "b"), rng().multivariate_normal([0, 0], covariance, 300))
    model = known(table, lambda x: multivariate_normal.logpdf(x, [0, 0], covariance))
    rows = table.values[:20].copy()
    rows[:, 1] = np.nan
    levels = (0.01, 0.25, 0.5, 0.9)
    found = quantiles(model, Table(("a", "b"), rows), table, "b", levels)
    expected = rho * rows[:, :1] + np.sqrt(1 - rho**2) * norm.ppf(levels)
    np.testing.assert_allclose(found, expected, atol=0.005)


def test_quantiles_where_the_law_jumps():
    """A spike of 0.3 at zero and the unit normal law, and counts."""
    values = np.where(rng().random(400) < 0.3, 0.0, rng(1).normal(size=400))
    table = Table(
        ("a", "k"), np.column_stack([values, rng().poisson(3, 400)]), cells=(Cells(), WHOLE)
    )

    def log_prob(x):
        rest = norm.logpdf(x[:, 0]) + np.log(0.7)
        return np.where(x[:, 0] == 0, np.log(0.3), rest) + poisson.logpmf(x[:, 1], 3)

    model = known(table, log_prob)
    row = Table(("a", "k"), np.array([[0.5, 3.0]]), cells=(Cells(), WHOLE))
    found = quantiles(model, row, table, "a", (0.1, 0.34, 0.36, 0.64, 0.66, 0.9))[0]
    below, above = norm.ppf([0.1 / 0.7, 0.34 / 0.7]), norm.ppf([0.36 / 0.7, 0.6 / 0.7])
    np.testing.assert_allclose(found, [*below, 0, 0, *above], atol=0.02)
    counts = quantiles(model, row.take(np.array([0])), table, "k", (0.1, 0.5, 0.99))[0]
    np.testing.assert_array_equal(counts, poisson.ppf([0.1, 0.5, 0.99], 3))


def test_counts_with_much_mass_on_the_lowest():
    """Half of the rows at zero, and beyond them a wide geometric law."""
    values = np.where(rng().random(500) < 0.5, 0.0, rng(1).geometric(0.01, 500))
    table = Table(("k",), values[:, None], cells=(WHOLE,))
    tail = geom(0.01)
    model = known(
        table,
        lambda x: np.where(x[:, 0] == 0, 0.0, tail.logpmf(np.maximum(x[:, 0], 1))) - np.log(2),
        kinds={"k": "integer:0"},
    )
    rows = np.array([0.0, 1.0, 50.0, 300.0])
    found = conditionals(model, Table(("k",), rows[:, None], cells=(WHOLE,)), table)
    expected = np.where(rows == 0, 0.5, 0.5 * tail.pmf(rows))
    np.testing.assert_allclose(found.log_p[:, 0], np.log(expected), atol=0.02)
    below = np.where(rows == 0, 0.0, 0.5 + 0.5 * tail.cdf(rows - 1))
    np.testing.assert_allclose(found.below[:, 0], below, atol=0.01)


def test_quantiles_of_dates_are_dates():
    days, cells = datetime_column(20_000 + np.arange(400), np.zeros(400, bool), "D")
    table = Table(("when",), days[:, None], cells=(cells,))
    law = norm(days.mean(), 60.0)
    model = known(table, lambda x: law.logpdf(x[:, 0]))
    found = quantiles(model, table.take(np.arange(1)), table, "when", (0.1, 0.5))
    expected = cells.decode(np.rint(law.ppf([0.1, 0.5])))
    assert found.dtype == expected.dtype
    assert (np.abs(found[0] - expected) <= np.timedelta64(1, "D")).all()


def test_a_narrow_law_with_long_tails_is_found():
    """A logistic law a tenth as wide as its column, at any place: 5% of it is far out."""
    x = rng().uniform(-10, 10, 400)
    table = Table(("x", "y"), np.stack([x, x + rng(1).logistic(0, 0.5, 400)], 1))
    model = known(table, lambda v: logistic.logpdf(v[:, 1], v[:, 0], 0.5) - np.log(20))
    rows = table.values[:30]
    found = conditionals(model, Table(("x", "y"), rows), table)
    expected = logistic.logpdf(rows[:, 1], rows[:, 0], 0.5)
    np.testing.assert_allclose(found.log_p[:, 1], expected, atol=0.003)
    levels = np.array([0.01, 0.05, 0.5, 0.95, 0.999])
    quantile = quantiles(model, Table(("x", "y"), rows), table, "y", levels)
    share = logistic.cdf(quantile, rows[:, :1], 0.5)
    np.testing.assert_allclose(share, np.broadcast_to(levels, share.shape), atol=0.003)


def test_what_has_no_quantiles_is_refused():
    table = Table(("k",), rng().integers(0, 3, (90, 1)).astype(float))
    model = known(table, lambda x: np.zeros(len(x)), kinds={"k": "categorical"})
    with pytest.raises(InputError, match="has no quantiles"):
        quantiles(model, table, table, "k", (0.5,))
    with pytest.raises(InputError, match="between 0 and 1"):
        quantiles(model, table, table, "k", 1.0)
    with pytest.raises(InputError, match="between 0 and 1"):
        quantiles(model, table, table, "k", (1.5,))
    with pytest.raises(InputError, match="no column 'x'"):
        quantiles(model, table, table, "x", (0.5,))


def test_a_shared_value_that_is_smoothed_is_a_peak_of_the_density():
    """Concentrations of 5e-4 with a twentieth of zeros, in a table of real columns."""
    generator = rng(4)
    zero = generator.random(600) < 0.05
    x = np.where(zero, 0.0, generator.normal(5e-4, 1e-4, 600))
    table = Table(("x", "y"), np.column_stack([x, generator.normal(size=600)]))
    schema = learn_schema(table, kinds={"x": "real"})
    assert not schema.mixed
    width = schema.columns[0].resolution
    assert width > 0

    def log_prob(values):
        inside = np.abs(values[:, 0]) <= width / 2
        with np.errstate(divide="ignore"):
            peak = np.where(inside, np.log(0.05 / width), -np.inf)
        return np.logaddexp(peak, np.log(0.95) + norm.logpdf(values[:, 0], 5e-4, 1e-4))

    model = known(table, log_prob, {"x": "real"})
    rows = Table(("x", "y"), np.column_stack([[6e-4, 4e-4, 0.0], np.zeros(3)]))
    found = quantiles(model, rows, table, "x", [0.02, 0.3, 0.8])
    levels = norm.ppf((np.array([0.3, 0.8]) - 0.05) / 0.95, 5e-4, 1e-4)
    np.testing.assert_allclose(found[:, 1:], np.tile(levels, (3, 1)), rtol=0.02)
    np.testing.assert_allclose(found[:, 0], 0, atol=width)
    cells = conditionals(model, rows, table)
    np.testing.assert_allclose(cells.log_p[:, 0], log_prob(rows.values), atol=0.02)
    below = 0.05 + 0.95 * norm.cdf([6e-4, 4e-4], 5e-4, 1e-4)
    np.testing.assert_allclose(cells.below[:2, 0], below, atol=0.01)


def test_rare_categories_are_asked_for_once():
    codes = np.concatenate([np.repeat(np.arange(70), 10), np.arange(70, 170)]).astype(float)
    cells = Cells("text", tuple(f"c{i:03d}" for i in range(170)))
    x = rng(5).normal(size=len(codes))
    table = Table(("k", "x"), np.column_stack([codes, x]), cells=(cells, Cells()))
    schema, asked = learn_schema(table), []
    column = schema.columns[0]
    assert len(column.rare) > 100

    def log_prob(rows):
        asked.append(len(rows))
        terms = schema.encode(rows.values)[1]
        return terms - np.log(len(column.codes) + 1) + norm.logpdf(rows.values[:, 1])

    model = SimpleNamespace(schema=schema, log_prob=log_prob)
    few = table.take(np.array([0, 700, 799]))
    found = conditionals(model, few, table)
    terms = column.encode(few.values[:, 0])[2]
    own = terms - np.log(len(column.codes) + 1) - np.log1p(-column.unseen)
    np.testing.assert_allclose(found.log_p[:, 0], own, atol=1e-3)
    assert max(asked[1:2]) <= 256
