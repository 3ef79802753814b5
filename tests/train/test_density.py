"""fit_density and its parts: numbers against closed forms, and bad input."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from laminar import io
from laminar._errors import InputError, ShapeError, TrainingError
from laminar.objectives import Batch
from laminar.preset import Preset, preset
from laminar.train import ArraySource, Checkpoint, MappedSource, fit, mixtures, shallow
from laminar.train.density import _assemble, fit_density
from laminar.train.search import Found, Plan, load_plan
from laminar.train.table import make_table
from laminar.zoo import preset as zoo_preset


def skewed(rows: int, dim: int = 3, seed: int = 0) -> np.ndarray:
    """Rows that no Gaussian suits: exponentials of correlated normals."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, dim))
    z[:, 1:] += 0.8 * z[:, :-1]
    return np.exp(z) * 10.0 ** np.arange(dim) + 5.0


QUICK = Preset(0, 0, components=(1, 4), kernel_widths=(0.3,), folds=2)


# --- parts -------------------------------------------------------------------------------------


def test_components_score_as_scipy_does():
    rng = np.random.default_rng(1)
    factors = np.tril(rng.normal(size=(2, 3, 3)), -1) + np.eye(3)
    part = mixtures.Components(np.array([0.3, 0.7]), rng.normal(size=(2, 3)), factors)
    x = rng.normal(size=(10, 3))
    want = sum(
        w * multivariate_normal(m, f @ f.T).pdf(x)
        for w, m, f in zip(part.weights, part.means, part.factors, strict=True)
    )
    np.testing.assert_allclose(np.exp(part.log_prob(x)), want, rtol=1e-10)


def test_one_component_without_prior_is_maximum_likelihood():
    x = skewed(400)
    part = mixtures.fit_components(x, 1, 0.0, seed=0)
    np.testing.assert_allclose(part.means[0], x.mean(0), rtol=1e-6)
    want = np.cov(x.T, bias=True)
    np.testing.assert_allclose(part.factors[0] @ part.factors[0].T, want, rtol=1e-4)


def test_integer_weights_count_rows():
    x = skewed(60)
    w = np.tile([1.0, 2.0, 0.0], 20)
    repeated = np.repeat(x, w.astype(int), axis=0)
    a = mixtures.fit_components(x, 1, 0.0, seed=0, weights=w)
    b = mixtures.fit_components(repeated, 1, 0.0, seed=0)
    np.testing.assert_allclose(a.factors, b.factors, rtol=1e-6)


def test_covariance_is_definite_with_fewer_rows_than_columns():
    cov = mixtures.pooled_covariance(np.random.default_rng(0).normal(size=(5, 20)))
    assert np.linalg.eigvalsh(cov).min() > 0


def test_kernels_score_as_a_mixture_of_them():
    x = skewed(30, 2)
    kernels = mixtures.fit_kernels(x, 0.3, diagonal=False)
    np.testing.assert_allclose(mixtures.kernel_log_prob(kernels, x), kernels.log_prob(x), rtol=1e-8)


def test_quantile_maps_make_columns_normal():
    x = np.random.default_rng(0).gamma([2.0, 5.0], size=(5000, 2))
    z, log_det = mixtures.apply_knots(mixtures.fit_knots(x), x)
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.03
    assert np.abs(np.mean(z**3, axis=0)).max() < 0.15
    moved, _ = mixtures.apply_knots(mixtures.fit_knots(x), x * (1 + 1e-6))
    secant = np.log((moved - z) / (x * 1e-6)).sum(1)
    np.testing.assert_allclose(np.median(secant - log_det), 0, atol=1e-3)


def test_quantile_knots_survive_ties():
    x = np.random.default_rng(0).integers(0, 3, size=(200, 1)).astype(float)
    knots = mixtures.fit_knots(x)
    assert (np.diff(knots.x, axis=0) > 0).all()
    assert np.isfinite(mixtures.apply_knots(knots, x)[1]).all()


def test_stacking_finds_the_weights_of_a_mixture():
    rng = np.random.default_rng(0)
    x = np.where(rng.random(20_000) < 0.3, rng.normal(size=20_000), 4 + rng.normal(size=20_000))
    logs = np.stack([norm.logpdf(x), norm.logpdf(x, 4)], 1)
    np.testing.assert_allclose(mixtures.stack(logs), [0.3, 0.7], atol=0.02)


def test_stacking_leaves_no_weight_at_zero():
    weights = mixtures.stack(np.array([[0.0, -1000.0]] * 50))
    assert 0.005 < weights[1] < 0.02


def test_assembled_distribution_is_the_host_one():
    x = (skewed(80) - skewed(80).mean(0)) / skewed(80).std(0)
    specs = [
        shallow.Spec("mixture", 2, 1.0),
        shallow.Spec("marginal", 2, 1.0),
        shallow.Spec("kernel", 0, 0.2),
        shallow.Spec("kernel", 0, 0.5),
        shallow.Spec("tail"),
    ]
    shares = np.array([0.2, 0.3, 0.1, 0.2, 0.2])
    with jax.enable_x64(True):
        host = shallow.refit(specs, shares, x, None, seed=0)
        total = sum(w * np.exp(np.asarray(d.log_prob(x))) for w, d in _assemble(host))
    np.testing.assert_allclose(np.log(total), host.log_prob(x), rtol=1e-6, atol=1e-6)


# --- fit_density -------------------------------------------------------------------------------


def test_beats_a_gaussian_mixture_on_skewed_rows():
    from sklearn.mixture import GaussianMixture

    train, test = skewed(300), skewed(2000, seed=1)
    flow, history = fit_density(jr.key(0), train, preset=QUICK)
    rival = max(GaussianMixture(k, random_state=0).fit(train).score(test) for k in (1, 2, 4, 8))
    assert float(flow.log_prob(test).mean()) > rival + 0.3
    np.testing.assert_allclose(sum(history.weights), 1, rtol=1e-6)
    assert len(history.candidates) == len(history.weights) == len(history.scores)
    assert history.seconds > 0


def test_is_a_density_and_samples_from_it():
    x = np.random.default_rng(0).gamma(2.0, size=(200, 1))
    flow, _ = fit_density(jr.key(0), x, preset=QUICK)
    grid = np.linspace(-100, 100, 40_001)
    log_p = np.asarray(flow.log_prob(grid[:, None], batch_size=10_000), np.float64)
    np.testing.assert_allclose(np.exp(log_p).sum() * (grid[1] - grid[0]), 1, atol=2e-3)
    draws = np.asarray(flow.sample(jr.key(1), (20_000,)))
    np.testing.assert_allclose(np.median(draws), np.median(x), atol=0.15)


def test_same_key_same_result_and_weights_matter():
    x = skewed(60)
    w = np.where(x[:, 0] > np.median(x[:, 0]), 1.0, 0.01)
    a, _ = fit_density(jr.key(0), x, preset=QUICK)
    b, _ = fit_density(jr.key(0), x, preset=QUICK)
    c, _ = fit_density(jr.key(0), x, preset=QUICK, weights=w)
    np.testing.assert_array_equal(a.log_prob(x), b.log_prob(x))
    above = w > 0.5
    assert float(c.log_prob(x[above]).mean()) > float(a.log_prob(x[above]).mean())


@pytest.mark.slow
def test_conditional_flow_follows_its_condition():
    rng = np.random.default_rng(0)
    c = rng.uniform(-1, 1, size=(2000, 1))
    x = 3 * c + 0.2 * rng.normal(size=(2000, 1))
    sizes = dataclasses.replace(preset(2000, 1, 1), steps=400, layers=2, width=32)
    flow, history = fit(jr.key(0), sizes, x, condition=c)
    truth = norm.logpdf(x, 3 * c, 0.2).mean()
    assert float(flow.log_prob(x, c).mean()) > truth - 0.1
    assert history.steps > 0


@pytest.mark.slow
def test_flows_join_the_mixture():
    sizes = dataclasses.replace(
        QUICK, bases=("mixture", "normal"), steps=60, layers=2, width=16, depth=1
    )
    x = skewed(400)
    flow, history = fit(jr.key(0), sizes, x)
    assert set(history.flows) == {"flow over mixture", "flow over normal"}
    assert history.candidates[-2:] == ["flow over mixture", "flow over normal"]
    assert np.isfinite(np.asarray(flow.log_prob(x))).all()
    assert history.to_dict()["steps"] == history.steps > 0


def test_saves_and_loads_and_standardises_conditions(tmp_path):
    x = skewed(80)
    flow, _ = fit_density(jr.key(0), x[:, 1:], condition=x[:, :1], preset=QUICK)
    alone, _ = fit_density(jr.key(0), x[:, 1:], preset=QUICK)
    scores = flow.log_prob(x[:, 1:], x[:, :1])
    assert float(scores.mean()) > float(alone.log_prob(x[:, 1:]).mean()) + 0.2
    assert flow.sample(jr.key(1), (3,), x[:5, :1]).shape == (3, 5, 2)
    io.save(tmp_path / "model.laminar", flow)
    again = io.load(tmp_path / "model.laminar")
    np.testing.assert_array_equal(scores, again.log_prob(x[:, 1:], x[:, :1]))
    scaled, _ = fit_density(jr.key(0), x[:, 1:], condition=1e5 * x[:, :1] - 7e6, preset=QUICK)
    np.testing.assert_allclose(
        scaled.log_prob(x[:, 1:], 1e5 * x[:, :1] - 7e6), scores, rtol=1e-2, atol=0.02
    )


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (np.zeros((20,)), {}, ShapeError, r"rows \(N, D\)"),
        ("text", {}, InputError, "data must be an array of numbers, and not str"),
        (np.zeros((3, 2)), {}, InputError, "at least 8 rows"),
        (np.zeros((20, 2)), {}, InputError, "column 0 is constant"),
        (np.full((20, 2), np.nan), {}, InputError, "not finite at row 0, column 0"),
        (skewed(20), {"weights": np.ones(3)}, ShapeError, r"weights must be \(20,\)"),
        (skewed(20), {"weights": -np.ones(20)}, InputError, "non-negative"),
        (skewed(20), {"condition": np.ones((3, 1))}, ShapeError, "with 20 rows"),
        (skewed(20), {"validation": 1.5}, InputError, "between 0 and 1"),
    ],
)
def test_bad_input(data, options, error, words):
    with pytest.raises(error, match=words):
        fit_density(jr.key(0), data, **options)


def test_options_that_a_preset_decides_are_refused():
    with pytest.raises(InputError, match="steps means nothing with a preset"):
        fit(jr.key(0), QUICK, skewed(20), steps=10)
    with pytest.raises(InputError, match="share of rows to hold out"):
        fit(jr.key(0), QUICK, skewed(20), validation=None)
    for source in (ArraySource(jnp.asarray(skewed(20))), MappedSource(skewed(20))):
        with pytest.raises(InputError, match=f"not a source such as {type(source).__name__}"):
            fit(jr.key(0), QUICK, source)
    with pytest.raises(InputError, match="put condition and weights into the Batch"):
        fit(jr.key(0), QUICK, Batch(skewed(20)), weights=np.ones(20))


# --- preset ------------------------------------------------------------------------------------


def test_presets_grow_with_rows():
    assert zoo_preset is preset
    sizes = [preset(n, 5) for n in (150, 1_000, 5_000, 50_000, 1_000_000)]
    work = [s.layers * s.width**2 * s.steps * len(s.bases) for s in sizes]
    assert work == sorted(work)
    assert work[0] == 0
    assert preset(200, 3, 2).bases == ("normal",)
    with pytest.raises(InputError, match="at least one row"):
        preset(0, 3)


def test_arrays_of_either_library_are_taken():
    flow, _ = fit_density(jr.key(0), jnp.asarray(skewed(40, 2), jnp.float32), preset=QUICK)
    assert flow.shape == (2,)


@pytest.mark.slow
def test_every_flow_keeps_a_checkpoint_and_resumes(tmp_path, monkeypatch):
    chosen = dataclasses.replace(QUICK, bases=("mixture", "normal"), layers=1, width=8, steps=40)
    x = skewed(120, 2)
    whole, _ = fit_density(jr.key(0), x, preset=chosen)
    path = tmp_path / "run.ckpt"
    state = Checkpoint(path, seconds=0.0)
    module = importlib.import_module("laminar.train.density")
    save, saves = module.save_checkpoint, []

    def save_and_stop(target, *rest):
        save(target, *rest)
        saves.append(target)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        fit_density(jr.key(0), x, preset=chosen, checkpoint=state)
    assert state.files()
    monkeypatch.setattr(module, "save_checkpoint", save)
    # The search is not repeated.
    monkeypatch.setattr("laminar.train.density.search", None)
    resumed, _ = fit_density(jr.key(0), x, preset=chosen, checkpoint=state, resume=True)
    assert [file.name for file in state.files()] == [
        "run.ckpt",
        "run.ckpt.flow-mixture",
        "run.ckpt.flow-normal",
    ]
    np.testing.assert_array_equal(resumed.log_prob(x), whole.log_prob(x))
    other = dataclasses.replace(chosen, components=(1, 2))
    for wrong, key, data in ((other, 0, x), (chosen, 1, x), (chosen, 0, x + 1)):
        with pytest.raises(InputError, match=r"written by a run with other (components|key|data)"):
            fit_density(jr.key(key), data, preset=wrong, checkpoint=state, resume=True)
    with pytest.raises(InputError, match="give checkpoint="):
        fit_density(jr.key(0), x, preset=chosen, resume=True)


def test_what_the_clock_cut_is_kept_for_a_resumed_run(tmp_path):
    found = Found([shallow.Spec("tail")], np.ones(1), [-1.0], -1.0, 7)
    state = Checkpoint(tmp_path / "run.ckpt")
    assert load_plan(state, {"key": 1}, 60.0) is None
    Plan(found, 12.0, 60.0, {"normal": 24.0}).save(state, {"key": 1})
    again = load_plan(state, {"key": 1}, 60.0)
    assert again is not None
    assert again.found == found
    assert (again.seconds, again.limits) == (12.0, {"normal": 24.0})
    more = load_plan(state, {"key": 1}, 90.0)
    assert more is not None
    assert more.limits == {}
    # Of another run there is nothing to lose but the search.
    assert load_plan(state, {"key": 2}, 60.0) is None


@pytest.fixture
def fitted(monkeypatch):
    """What `fit_density` hands on to `fit`, which fails for rows 0 and 3."""
    seen = []

    def failing(key, flow, data, **options):
        seen.append((data, options))
        raise TrainingError("It stopped, for rows 0, 3. Look there.", [0, 3])

    monkeypatch.setattr(importlib.import_module("laminar.train.density"), "fit", failing)
    return seen


def test_steps_that_were_given_hold_under_a_time_limit(fitted):
    x = skewed(120, 2)
    own = dataclasses.replace(preset(120, 2), bases=("normal",), components=(1,), folds=1)
    changed = dataclasses.replace(own, steps=70)
    for chosen, options in (
        (own, {}),
        (own, {"time_limit": 60.0}),
        (own, {"time_limit": 60.0, "steps": own.steps}),
        (changed, {"time_limit": 60.0}),
        (own, {"steps": 30}),
    ):
        with pytest.raises(TrainingError):
            fit_density(jr.key(0), x, preset=chosen, **options)
    assert [options["steps"] for _, options in fitted] == [own.steps, None, own.steps, 70, 30]
    assert fitted[0][1]["time_limit"] is None
    assert 0 < fitted[1][1]["time_limit"] < 60


def test_an_error_of_training_names_the_rows_given(fitted):
    x = skewed(120, 2)
    weights = np.where(np.arange(120) < 40, 0.0, 1.0)
    chosen = dataclasses.replace(QUICK, bases=("normal",), components=(1,), folds=1)
    with pytest.raises(TrainingError, match="for rows ") as caught:
        fit_density(jr.key(0), x, weights=weights, preset=chosen)
    table = make_table(jr.split(jr.key(0), 8)[0], x, None, weights, 0.1)
    expected = sorted(table.rows[table.fit[[0, 3]]].tolist())
    assert list(caught.value.rows) == expected
    assert f"for rows {expected[0]}, {expected[1]}." in str(caught.value)
    assert min(expected) >= 40


def test_rows_of_weight_zero_count_as_absent():
    x, w = skewed(60), np.tile([1.0, 0.0], 30)
    wild = x.copy()
    wild[1::2] = np.nan
    one, _ = fit_density(jr.key(0), x, weights=w, preset=QUICK)
    two, _ = fit_density(jr.key(0), wild, weights=w, preset=QUICK)
    np.testing.assert_array_equal(one.log_prob(x), two.log_prob(x))
    wild[8] = np.inf
    with pytest.raises(InputError, match="not finite at row 8, column 0"):
        fit_density(jr.key(0), wild, weights=w, preset=QUICK)
    with pytest.raises(InputError, match="at least 8 rows of positive weight, not 5"):
        fit_density(jr.key(0), x, weights=w * (np.arange(60) < 10), preset=QUICK)


def test_ties_start_clusters_without_a_warning():
    x = np.repeat(np.arange(3.0), 20)[:, None]
    assert mixtures.fit_components(x, 8, 1.0, seed=0).weights.shape == (8,)
