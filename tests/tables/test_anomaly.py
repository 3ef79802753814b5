"""Detectors: exact p-values and lists, reasons, all scores, and what is kept in the file."""

import dataclasses
import itertools

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import chi2, norm
from scipy.stats import t as student

from laminar import io
from laminar._errors import InputError
from laminar.bijections.base import AbstractBijection, Identity
from laminar.bijections.elementwise import Affine
from laminar.distributions import MultivariateNormal, Normal, StudentT
from laminar.flow import Flow
from laminar.mixed import autoregressive_distribution
from laminar.mixtures import GaussianMixture, IsotropicMixture, Mixture
from laminar.tables import anomaly as anomaly_module
from laminar.tables import flow as flow_module
from laminar.tables.anomaly import Detector, fit_detector
from laminar.tables.calibration import calibrate
from laminar.tables.cells import Cells
from laminar.tables.flow import Trained, split
from laminar.tables.latent import latent_log_tail
from laminar.tables.metric import learn_metric
from laminar.tables.model import TableFlow
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table, array_table


def rng(seed=0):
    return np.random.default_rng(seed)


def normal_model(table):
    """The model whose standardised rows are standard normal."""
    schema = learn_schema(table)
    return TableFlow(Flow(Normal(schema.shape), Identity(schema.shape)), schema)


def detector_of(train, held):
    model = normal_model(train)
    return Detector(model, calibrate(model, train, held))


@pytest.fixture(scope="module")
def detector():
    values = rng().normal(size=(500, 3)) * [1, 10, 0.1] + [0, 100, 0]
    table = Table(("a", "b", "c"), values)
    return detector_of(table.take(np.arange(300)), table.take(np.arange(300, 500)))


def test_the_false_discovery_rate_over_whole_experiments():
    """Training, calibration and new rows are drawn anew each time; the model is merely rough."""
    generator = rng(1)
    false = {0.1: [], 0.2: []}
    p_normal, power = [], []
    for _ in range(100):
        train, held = (array_table(generator.standard_t(4, size=(n, 2))) for n in (60, 200))
        normal = generator.standard_t(4, size=(80, 2))
        strange = generator.normal(9, 1, size=(20, 2))
        found = detector_of(train, held).detect(array_table(np.concatenate([normal, strange])), 0.2)
        p_normal.append(found.scores.p_value[:80])
        for level, shares in false.items():
            listed = found.adjusted <= level
            shares.append(listed[:80].sum() / max(listed.sum(), 1))
        power.append(found.listed[80:].mean())
    for level, shares in false.items():
        error = np.std(shares) / np.sqrt(len(shares))
        assert np.mean(shares) < 0.8 * level + 3 * error
    assert np.mean(false[0.2]) > 0.05
    assert np.mean(power) > 0.5
    p = np.concatenate(p_normal)
    for t in (0.05, 0.2, 0.5):
        assert (p <= t).mean() == pytest.approx(t, abs=0.03)


def test_calibration_rows_are_hidden_from_the_fit(monkeypatch):
    seen = []

    def spy(table, **options):
        seen.append(table)
        model = normal_model(table)
        return model, {"rows": len(table)}

    monkeypatch.setattr(anomaly_module, "fit_table", spy)
    values = rng(2).normal(size=(120, 2))
    found, report = fit_detector(array_table(values), seed=3)
    assert report["calibration_rows"] == 24
    assert len(seen[0]) == 96
    hidden = np.setdiff1d(np.arange(1, 121), seen[0].rows) - 1
    assert len(hidden) == 24
    expected = found.model.log_prob(array_table(values[np.sort(hidden)]))
    np.testing.assert_allclose(np.sort(found.calibration.log_p), np.sort(expected), rtol=1e-6)
    with pytest.raises(InputError, match="20 rows, and a detector needs at least 30"):
        fit_detector(array_table(values[:20]))


def test_what_is_planted_is_found_and_explained():
    generator = rng(4)
    covariance = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]])
    values = generator.multivariate_normal(np.zeros(3), covariance, 500)
    table = Table(("a", "b", "c"), values)
    schema = learn_schema(table)
    z = [(column.location, column.scale) for column in schema.columns]
    location, scale = np.array(z).T
    law = MultivariateNormal(-location / scale, covariance / np.outer(scale, scale))
    model = TableFlow(Flow(law, Identity((3,))), schema)
    train, held = table.take(np.arange(300)), table.take(np.arange(300, 500))
    found = Detector(model, calibrate(model, train, held))
    new = values[300:308].copy()
    new[0] = [1.5, -1.5, 0.0]  # each cell is usual, and both together are not
    new[1] = [0.0, 0.0, 30.0]
    turned = Table(("c", "b", "a"), new[:, ::-1])
    listed = found.detect(turned, 0.1)
    assert listed.listed[:2].all()
    assert set(listed.rows[listed.order[:2]]) == {1, 2}
    first, second = found.explain(turned.take(np.arange(2)))
    assert {reason.column for reason in first[:2]} == {"a", "b"}
    assert second[0].column == "c"
    assert second[0].excess == pytest.approx(450 - 0.227, rel=0.01)
    assert second[0].p_value == pytest.approx(1 / 201)
    assert all(a.excess >= b.excess for a, b in itertools.pairwise(first))
    usual = found.explain(Table(("a", "b", "c"), np.zeros((1, 3))))[0]
    assert all(reason.excess < 0.5 for reason in usual)
    assert found.explain(turned.take(np.arange(0))) == []


def test_a_model_fitted_again_keeps_the_flow_that_was_calibrated(monkeypatch):
    """Of a small table the last fit has seen the calibration rows, and must not score them."""
    fits = []

    def train(seed, rows, **options):
        def flow_of(part):
            fits.append(len(part.x))
            return Flow(Normal((2,), loc=float(len(fits))), Identity((2,)))

        return Trained(flow_of(rows), {}, flow_of)

    monkeypatch.setattr(flow_module, "fit_auto", train)
    table = Table(("a", "b"), rng(8).normal(size=(200, 2)))
    model, report = flow_module.fit_table(table, seed=4)
    assert fits == [160, 200]
    assert float(model.flow.base.loc[0]) == 2.0
    found = Detector.of(model)
    assert float(found.model.flow.base.loc[0]) == 1.0
    _, held = split(200, 0.1, np.random.default_rng(4))
    np.testing.assert_array_equal(found.calibration.rows, table.values[held])
    log_p = found.model.log_prob(table.take(held))
    np.testing.assert_allclose(found.calibration.log_p, log_p, rtol=1e-6)
    assert report["held_out"]["log_density"] == pytest.approx(log_p.mean())
    scored = found.score(table.take(held))
    np.testing.assert_allclose(scored.score, found.calibration.scores, rtol=1e-5)


def test_tables_of_all_kinds(tmp_path):
    generator, count = rng(9), 300
    text = Cells("text", ("a", "b", "c"))
    values = np.column_stack(
        [
            generator.normal(size=count),
            generator.choice(3, count, p=[0.6, 0.39, 0.01]),
            np.where(generator.random(count) < 0.2, np.nan, generator.integers(0, 30, count)),
        ]
    )
    table = Table(("x", "kind", "n"), values, cells=(Cells(), text, Cells("integer")))
    schema = learn_schema(table)
    assert schema.mixed
    shares = [None, jnp.array([0.6, 0.39, 0.01]), jnp.array([0.8, 0.2])]
    law = autoregressive_distribution(schema.laws, key=jr.key(0), width=8, depth=1, shares=shares)
    model = TableFlow(law, schema)
    train, held = table.take(np.arange(200)), table.take(np.arange(200, 300))
    found = Detector(model, calibrate(model, train, held))
    io.save(tmp_path / "m", found)
    found = io.load(tmp_path / "m")
    # The levels of another file have another order, and one that was not there.
    new = Table(
        ("n", "kind", "x"),
        np.array([[4, 0, 0.1], [4, 1, 0.1], [np.nan, 1, 9.0], [4, 2, 0.1]]),
        cells=(Cells("integer"), Cells("text", ("b", "c", "z")), Cells()),
    )
    scores = found.scores(new)
    assert np.isnan(scores.latent_radius).all()
    for values in (scores.log_density, scores.typicality, scores.contrast, scores.neighbours):
        assert np.isfinite(values).all()
    assert scores.score[0] > max(scores.score[1:])
    reasons = found.explain(new)
    assert [reason[0].column for reason in reasons[1:]] == ["kind", "x", "kind"]


class Shifted(AbstractBijection):
    """The identity, moved by twice the condition."""

    in_shape: tuple = (1,)
    out_shape: tuple = (1,)
    cond_shape: tuple = (1,)

    def forward(self, x, condition=None, *, key=None):
        return x + 2 * condition, jnp.zeros(x.shape[1:], x.dtype)

    def inverse(self, y, condition=None, *, key=None):
        return y - 2 * condition, jnp.zeros(y.shape[1:], y.dtype)


def test_conditional_anomalies(monkeypatch):
    """Strange beside the given column, and in no column alone."""
    generator = rng(5)
    c = generator.normal(size=400)
    table = Table(("c", "x"), np.column_stack([c, 2 * c + generator.normal(size=400)]))

    def exact(rows, given, **options):
        schema = learn_schema(rows, given)
        units = tuple(
            dataclasses.replace(column, location=0.0, scale=1.0)
            for column in (*schema.columns, *schema.given)
        )
        schema = dataclasses.replace(schema, columns=units[:1], given=units[1:])
        return TableFlow(Flow(Normal((1,)), Shifted()), schema), {}

    monkeypatch.setattr(anomaly_module, "fit_table", exact)
    found, _ = fit_detector(table, given=["c"])
    rows = Table(("c", "x"), np.array([[2.0, -4.0], [2.0, 4.0]]))
    scores = found.scores(rows)
    np.testing.assert_allclose(scores.log_density, norm.logpdf([-8, 0]), rtol=1e-5)
    assert scores.p_value[0] == pytest.approx(1 / 81)
    assert scores.p_value[1] > 0.9
    np.testing.assert_array_equal(scores.score, scores.log_density)
    for none in (scores.neighbours, scores.contrast, scores.latent_radius):
        assert np.isnan(none).all()
    assert found.explain(rows)[0][0].column == "x"


def test_all_scores_are_low_where_rows_are_strange(detector):
    rows = Table(("a", "b", "c"), np.array([[0, 100.0, 0], [30, 100, 0], [np.inf, 100, 0]]))
    found = detector.scores(rows)
    for name, values in found._asdict().items():
        assert values[0] > values[1], name
    assert np.isneginf(found.score[2])
    assert found.p_value[2] == found.p_value[1] == 1 / 201
    quick = detector.score(rows)
    np.testing.assert_array_equal(quick.score, found.score)
    np.testing.assert_array_equal(quick.p_value, found.p_value)
    z = (np.array([30.0]) - detector.model.schema.columns[0].location) / (
        detector.model.schema.columns[0].scale
    )
    assert found.latent_radius[1] == pytest.approx(chi2.logsf(z**2, 3)[0], rel=0.01)
    uniform = detector.scores(rows.take(np.array([1])), rng=rng()).p_value
    assert 0 < uniform[0] < 1 / 201


def test_lists_say_what_the_calibration_rows_allow(detector):
    rows = Table(("a", "b", "c"), np.array([[0, 100.0, 0]] * 40))
    found = detector.detect(rows, 0.01)
    assert not found.listed.any()
    assert len(found.order) == 0
    assert found.least_p_value == 1 / 201
    assert found.least_together == int(np.ceil(40 / 201 / 0.01))
    strange = Table(("a", "b", "c"), np.array([[90, 100.0, 0]] * 30 + [[0, 100.0, 0]] * 10))
    listed = detector.detect(strange, 0.05)
    assert listed.listed[:30].all()
    careful = detector.detect(strange, 0.05, confidence=0.9)
    assert (careful.adjusted >= listed.adjusted).all()
    more = detector.detect(strange, 0.05, storey=True)
    assert (more.adjusted <= listed.adjusted).all()
    with pytest.raises(InputError, match="false-discovery rate"):
        detector.detect(rows, 1.0)
    with pytest.raises(InputError, match="no column 'b'"):
        detector.detect(rows.select(["a", "c"]))


def test_detectors_are_saved_whole(detector, tmp_path):
    io.save(tmp_path / "d.laminar", detector)
    again = io.load(tmp_path / "d.laminar")
    rows = Table(("a", "b", "c"), np.array([[0, 100.0, 0], [30, 100, 0]]))
    for a, b in zip(detector.scores(rows), again.scores(rows), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.explain(rows) == detector.explain(rows)
    assert Detector.of(again) is again
    for other in (detector.model, 3):
        with pytest.raises(InputError, match=r"m\.laminar has no calibration scores"):
            Detector.of(other, "m.laminar")


def test_the_latent_radius_of_mixtures_and_other_bases():
    generator = rng(6)
    x = generator.normal(size=(50, 2)) * 3
    means, w = np.array([[0.0, 0.0], [4.0, 1.0]]), np.array([0.7, 0.3])
    covariances = np.array([[[1.0, 0.5], [0.5, 2.0]], np.eye(2)])
    squares = np.stack(
        [
            np.einsum("ni,ij,nj->n", x - m, np.linalg.inv(c), x - m)
            for m, c in zip(means, covariances, strict=True)
        ],
        axis=1,
    )
    log_parts = np.log(w) - 0.5 * squares - 0.5 * np.log(np.linalg.det(covariances))
    share = log_parts - logsumexp(log_parts, axis=1, keepdims=True)
    expected = logsumexp(share + chi2.logsf(squares, 2), axis=1)
    gaussians = GaussianMixture(w, means, covariances)
    points = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(latent_log_tail(gaussians, points, None), expected, rtol=1e-3)

    shift = Affine(jnp.array([1.0, 2.0]), jnp.array([2.0, 0.5]))
    moved = Flow(Mixture((gaussians, Normal(2)), jnp.array([5.0, -60.0])), shift)
    y = shift.forward(points.T)[0].T
    np.testing.assert_allclose(latent_log_tail(moved, y, None), expected, rtol=1e-3)

    kernels = IsotropicMixture(means, 0.5, w)
    only = latent_log_tail(kernels, points[:1] * 0 + jnp.array([[4.0, 1.6]]), None)
    assert only[0] == pytest.approx(chi2.logsf(0.36 / 0.25, 2), rel=1e-2)
    heavy = latent_log_tail(StudentT(2, df=2.0), jnp.array([[3.0, 0.0]]), None)
    z = norm.isf(student.sf(3.0, 2.0))
    assert heavy[0] == pytest.approx(chi2.logsf(z**2, 2), rel=1e-3)


def test_the_metric_weighs_all_kinds_of_columns_alike():
    generator, count = rng(7), 4_000
    x = np.column_stack(
        [
            generator.normal(5, 100, count),
            generator.choice(4, count, p=[0.7, 0.1, 0.1, 0.1]),
            np.where(generator.random(count) < 0.3, np.nan, generator.normal(size=count)),
            np.full(count, 3.0),
        ]
    )
    cells = (Cells(), Cells("text", ("p", "q", "r", "s")), Cells(), Cells())
    table = Table(("a", "b", "c", "d"), x, cells=cells)
    metric = learn_metric(table)
    points = metric(table)
    assert np.isfinite(points).all()
    pairs = (points[: count // 2] - points[count // 2 :]) ** 2
    np.testing.assert_allclose(pairs[:, 0].mean(), 2, rtol=0.15)
    np.testing.assert_allclose(pairs[:, 1:6].sum(1).mean(), 2, rtol=0.15)
    np.testing.assert_allclose(pairs[:, 7].mean(), 2, rtol=0.15)
    odd = metric(Table(("a", "b", "c", "d"), np.array([[np.inf, -1, np.nan, 4.0]]), cells=cells))
    assert np.isfinite(odd).all()
    assert odd[0, 0] == 1e6
    assert odd[0, 5] > 0
    assert odd[0, -1] == 1


def test_weights_make_the_law_that_rows_are_strange_in(monkeypatch):
    """A tenth of the rows stands for half of all: what is normal there is not strange."""
    monkeypatch.setattr(anomaly_module, "fit_table", fitted_normal)
    generator, p = rng(2), []
    for seed in range(30):
        second = np.arange(600) < 60
        x = generator.normal(np.where(second, 6.0, 0.0), 1)
        values = np.column_stack([x, np.where(second, 9.0, 1.0)])
        found, _ = fit_detector(Table(("x", "w"), values), weights="w", seed=seed)
        assert found.calibration.weights is not None
        new = generator.normal(np.where(np.arange(200) < 100, 6.0, 0.0), 1)
        p.append(found.score(Table(("x",), new[:, None])).p_value)
        assert found.detect(Table(("x",), new[:, None])).least_p_value > 1 / 121
    p = np.concatenate(p)
    assert (p <= 0.1).mean() == pytest.approx(0.1, abs=0.03)
    with pytest.raises(InputError, match="leave confidence out"):
        found.detect(Table(("x",), new[:, None]), confidence=0.9)


def fitted_normal(table, *, weights=None, **_):
    names = [name for name in table.names if name != weights]
    return normal_model(table.select(names)), {}


def test_rows_without_weight_are_neither_neighbours_nor_usual(monkeypatch):
    monkeypatch.setattr(anomaly_module, "fit_table", fitted_normal)
    generator = rng(3)
    off = np.arange(400) < 80
    values = generator.normal(np.where(off, 8.0, 0.0)[:, None], 1, (400, 2))
    table = Table(("a", "b", "w"), np.column_stack([values, ~off]).astype(float))
    found, _ = fit_detector(table, weights="w")
    assert found.score(Table(("a", "b"), np.full((1, 2), 8.0))).p_value[0] < 0.02


def test_what_is_usual_is_drawn_from_a_sorted_table():
    t = np.linspace(0, 10, 3_000)
    table = Table(("t", "x"), np.column_stack([t, rng().normal(size=3_000)]))
    found = detector_of(table.take(np.arange(0, 3_000, 2)), table.take(np.arange(1, 3_000, 2)))
    reasons = found.explain(Table(("t", "x"), np.array([[5.0, 9.0]])), top=2)
    usual = found._usual(2)
    assert usual.names == ("t", "x")
    assert np.abs(np.median(usual.log_p[:, 0]) - np.median(found.calibration.log_p)) < 3
    assert reasons[0][0].column == "x"
    chosen = found.calibration.rows
    assert chosen[:, 0].max() > 9


def test_gaps_that_never_were_have_no_rank():
    generator = rng(6)
    values = np.column_stack([generator.normal(size=400), generator.poisson(3, 400)])
    cells = (Cells(), Cells("integer"))
    table = Table(("x", "c"), values.astype(float), cells=cells)
    schema = learn_schema(table)
    flow = autoregressive_distribution(schema.laws, key=jr.key(0), width=8, depth=1)
    model = TableFlow(flow, schema)
    found = Detector(model, calibrate(model, *(table.take(i) for i in np.split(np.arange(400), 2))))
    rows = Table(("x", "c"), np.array([[np.nan, np.nan], [np.nan, 3.0], [0.0, 3.0]]), cells=cells)
    scores = found.score(rows)
    assert np.isnan(scores.p_value).tolist() == [True, True, False]
    assert np.isfinite(scores.log_density).all()
    assert found.detect(rows).listed.sum() == 0
    assert np.isnan(found.scores(rows).score).tolist() == [True, True, False]


def test_identifiers_are_no_part_of_what_is_known():
    generator = rng(7)
    ids = Cells("text", tuple(f"u{i:04d}" for i in range(300)))
    values = np.column_stack([np.arange(300), generator.normal(size=300)])
    table = Table(("id", "x"), values, cells=(ids, Cells()))
    found = detector_of(table.take(np.arange(150)), table.take(np.arange(150, 300)))
    assert found.calibration.names == ("x",)
    rows = table.select(("x",)).take(np.arange(5))
    assert np.isfinite(found.score(rows).p_value).all()
    assert len(found.explain(rows)) == 5
    assert b"u0001" not in io.to_bytes(found)
