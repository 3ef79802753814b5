"""Training as a whole: what is learnt, what is promised, and what is refused."""

import io
import json
import sys
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

from laminar._errors import InputError, ShapeError, TrainingError
from laminar._params import Frozen, expand
from laminar._typing import Array
from laminar.bijections.compose import Chain
from laminar.bijections.elementwise import AbstractElementwise, Affine
from laminar.bijections.linear import ActNorm, Triangular
from laminar.density import AbstractDistribution
from laminar.distributions import Normal, Uniform
from laminar.flow import Flow
from laminar.objectives import Batch, nll
from laminar.preset import Preset, preset
from laminar.train import ArraySource, Checkpoint, History, MappedSource, fit
from laminar.train import fit as fit_module_function
from laminar.train.blame import _finite_rows
from laminar.train.feed import Placement, prepare, stack_held_out

fit_module = sys.modules[fit_module_function.__module__]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 2)) * np.array([2.0, 0.5]) + np.array([1.0, -3.0])


def normal(dim=2):
    return Normal((dim,))


def same(a, b):
    return bool(eqx.tree_equal(eqx.filter(a, eqx.is_array), eqx.filter(b, eqx.is_array)))


class Regression(AbstractDistribution):
    """x | c ~ N(slope · c + offset, 1): a user's own conditional distribution."""

    slope: Array
    offset: Array
    shape: ClassVar[tuple] = ()
    cond_shape: ClassVar[tuple] = (1,)

    def _log_prob(self, x, condition=None, *, key=None):
        z = x - (self.slope * condition[0] + self.offset)
        return -0.5 * z * z - 0.9189385

    def _sample(self, key, batch=(), condition=None):
        return self.slope * condition[0] + self.offset + jr.normal(key, batch)


# --- What is learnt -------------------------------------------------------------------------------


def test_a_linear_flow_recovers_mean_and_covariance():
    mean, factor = np.array([1.0, -0.5]), np.array([[1.5, 0.0], [-0.8, 0.6]])
    x = RNG.normal(size=(400, 2)) @ factor.T + mean
    flow = Flow(Frozen(Normal((2,))), Triangular(2))
    flow, history = fit(
        jr.key(0), flow, x, validation=None, steps=600, batch_size=100, learning_rate=0.05
    )

    @jax.jit
    def at_zero(z):
        return flow.bijection.forward(z)[0], jax.jacfwd(lambda z: flow.bijection.forward(z)[0])(z)

    at, jacobian = at_zero(jnp.zeros(2))
    covariance = np.cov(x.T, bias=True)
    assert np.allclose(at, x.mean(0), atol=0.02)
    assert np.allclose(jacobian @ jacobian.T, covariance, atol=0.05)
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    assert history.loss[-4:].mean() == pytest.approx(entropy, abs=0.01)


def test_weights_are_honoured_in_training_and_validation():
    weights = RNG.uniform(0, 3, size=len(X)) * (X[:, 0] > 1)
    mean = (weights[:, None] * X).sum(0) / weights.sum()
    var = (weights[:, None] * (X - mean) ** 2).sum(0) / weights.sum()
    flow, history = fit(
        jr.key(0),
        normal(),
        X,
        weights=weights,
        validation=Batch(X, None, weights),
        steps=800,
        learning_rate=0.1,
    )
    assert np.allclose(flow.loc, mean, atol=0.02)
    assert np.allclose(jnp.exp(2 * flow.log_scale), var, rtol=0.05)
    expected = 0.5 * np.log(2 * np.pi * np.e * var).sum()
    assert history.best_loss == pytest.approx(expected, abs=2e-3)


def test_conditions_travel_with_their_rows():
    c = RNG.normal(size=(200, 1))
    x = 3 * c[:, 0] - 1 + 0.1 * RNG.normal(size=200)
    model = Regression(jnp.zeros(()), jnp.zeros(()))
    flow, _ = fit(jr.key(0), model, x, condition=c, steps=400, batch_size=64, learning_rate=0.1)
    assert float(flow.slope) == pytest.approx(3, abs=0.05)
    assert float(flow.offset) == pytest.approx(-1, abs=0.05)


def test_double_precision_stays_double():
    with jax.enable_x64(True):
        flow = Normal((2,), loc=jnp.zeros(2, jnp.float64))
        flow, _ = fit(jr.key(0), flow, X, steps=20, learning_rate=0.1, ema=0.9)
        assert flow.loc.dtype == jnp.float64


# --- What is promised -----------------------------------------------------------------------------


def test_one_trace_for_training_and_one_for_validation():
    traces = []

    def counting(flow, batch, key):
        traces.append(batch.x.shape)
        return nll(flow, batch, key)

    options = {
        "objective": counting,
        "steps": 130,
        "validate_every": 20,
        "ema": 0.9,
        "batch_size": 32,
    }
    fit(jr.key(0), normal(), X, **options)
    assert sorted(traces) == [(12, 2), (32, 2)]
    fit(jr.key(1), normal(), X + 1, **options)
    assert len(traces) == 2, "a second training of like shapes compiles nothing"


def test_a_segment_reports_to_the_host_once(monkeypatch):
    fetches, segments = [], []
    monkeypatch.setattr(
        fit_module.jax,
        "device_get",
        lambda tree, get=jax.device_get: fetches.append(1) or get(tree),
    )
    run_segment = fit_module._segment

    def counting(fixed, state):
        segments.append(int(fixed[2]))
        return run_segment(fixed, state)

    monkeypatch.setattr(fit_module, "_segment", counting)
    _, history = fit(jr.key(0), normal(), X, steps=200, validate_every=50)
    assert sum(segments) == history.steps == 200
    assert len(fetches) == len(segments) + 1  # and the loss before training
    assert len(segments) < 10


def test_the_same_key_gives_the_same_bits_and_another_does_not():
    results = [fit(jr.key(k), normal(), X, steps=60, batch_size=32) for k in (0, 0, 1)]
    assert same(results[0][0], results[1][0])
    assert np.array_equal(results[0][1].loss, results[1][1].loss)
    assert not same(results[0][0], results[2][0])


def test_old_style_keys_are_taken():
    flow, _ = fit(jr.PRNGKey(0), normal(), X, steps=10)
    assert np.isfinite(flow.loc).all()


def test_where_the_host_cuts_changes_nothing(monkeypatch):
    options = {"steps": 90, "validate_every": 30, "batch_size": 32, "ema": 0.9}
    whole, one = fit(jr.key(0), normal(), X, **options)
    monkeypatch.setattr(fit_module.Clock, "count", lambda self, step: (min(7, 30 - step % 30), 0))
    cut, two = fit(jr.key(0), normal(), X, **options)
    assert same(whole, cut)
    assert np.array_equal(one.loss, two.loss)
    assert np.array_equal(one.validation, two.validation)


def test_the_flow_given_is_neither_changed_nor_deleted():
    flow = Flow(Normal((2,)), Affine(shape=(2,)))
    before = jtu.tree_map(lambda a: np.array(a), eqx.filter(flow, eqx.is_array))
    trained, _ = fit(jr.key(0), flow, X, steps=20)
    assert same(flow, before)
    assert np.isfinite(flow.log_prob(X)).all()
    assert not same(trained, flow)


def test_the_split_is_fixed_complete_and_drawn_by_the_seed():
    flow = normal()
    seed = np.array([1, 2], np.uint32)
    weights = np.where(np.arange(120) % 10 == 0, 0.0, 1.0)
    found = prepare(flow, X, None, weights, 0.25, seed)
    assert len(found.held_out.x) == 27
    assert len(found.rows) == 81
    together = np.concatenate([found.source.x, found.held_out.x])
    used = X[weights > 0].astype(np.float32)
    assert np.array_equal(np.sort(together, 0), np.sort(used, 0))
    assert np.array_equal(found.source.x, X[found.rows].astype(np.float32))
    again = prepare(flow, X, None, weights, 0.25, seed)
    other = prepare(flow, X, None, weights, 0.25, seed + np.uint32(1))
    assert np.array_equal(found.rows, again.rows)
    assert not np.array_equal(found.rows, other.rows)


def test_every_held_out_row_is_used():
    batch = Batch(np.arange(2500.0)[:, None], None, np.ones(2500))
    chunks = stack_held_out(batch, 64, Placement())
    assert chunks.weights.sum() == 2500
    kept = chunks.x[..., 0][np.asarray(chunks.weights) > 0]
    assert np.array_equal(np.sort(kept), np.arange(2500))


def test_the_best_parameters_come_back_and_patience_ends_training():
    few, many = X[:12] + np.array([3.0, 0.0]), X
    flow, history = fit(
        jr.key(0),
        normal(),
        few,
        validation=Batch(many),
        steps=3000,
        learning_rate=0.05,
        schedule="constant",
        validate_every=10,
        patience=5,
    )
    assert history.stop_reason == "patience"
    assert history.steps < 3000
    assert history.best_loss == history.validation.min()
    assert history.best_step == history.validation_steps[history.validation.argmin()]
    assert history.steps == history.best_step + 50
    assert -float(flow.log_prob(many).mean()) == pytest.approx(history.best_loss, rel=1e-5)


def test_training_never_makes_a_flow_worse():
    flow = Normal((2,), loc=X.mean(0), scale=X.std(0))
    trained, history = fit(jr.key(0), flow, X + 3, validation=Batch(X), steps=30, learning_rate=0.1)
    assert history.best_step == 0
    assert same(trained, flow)


def test_the_average_is_returned_where_it_is_better():
    options = {"steps": 300, "batch_size": 8, "optimizer": optax.sgd(0.3), "ema": 0.98}
    flow, history = fit(jr.key(0), normal(), X, validation=Batch(X), **options)
    assert np.nanmin(history.validation_ema) < history.validation.min()
    assert history.best_loss == pytest.approx(np.nanmin(history.validation_ema))
    assert -float(flow.log_prob(X).mean()) == pytest.approx(history.best_loss, rel=1e-5)
    flow, _ = fit(jr.key(0), normal(), X, validation=None, **options)
    assert np.allclose(flow.loc, X.mean(0), atol=0.2)


@pytest.mark.parametrize("rows", [1, 2, 3, 11])
def test_few_rows_are_enough(rows):
    flow, history = fit(jr.key(0), normal(), X[:rows], steps=5)
    assert np.isfinite(history.loss).all()
    assert np.isfinite(flow.loc).all()
    assert list(history.validation_steps) == ([0, 1, 2, 5] if rows > 1 else [])


def test_frozen_parts_stay():
    flow = Flow(Normal((2,)), Affine(shape=(2,)))
    trained, _ = fit(jr.key(0), flow, X, steps=20, freeze=lambda f: f.base)
    assert same(trained.base, flow.base)
    assert not same(trained.bijection, flow.bijection)


def test_actnorm_starts_from_the_data_and_a_warm_start_leaves_it():
    flow = Flow(Frozen(Normal((2,))), Chain([ActNorm(2), Affine(shape=(2,))]))
    trained, history = fit(jr.key(0), flow, X * 50, steps=1, learning_rate=1e-6)
    scale = np.exp(trained.bijection.parts[0].log_scale)
    assert np.allclose(scale, (X * 50).std(0), rtol=0.2)
    again, later = fit(jr.key(0), trained, X, steps=1, learning_rate=1e-6, warm_start=True)
    assert np.allclose(np.exp(again.bijection.parts[0].log_scale), scale, rtol=1e-3)
    assert history.validation[0] < 15 < later.validation[0]


def test_a_time_limit_ends_with_a_decay():
    options = {"learning_rate": 0.01, "validation": None}
    fit(jr.key(0), normal(), X, steps=5, schedule="constant", **options)  # compiles
    _, history = fit(jr.key(0), normal(), X, time_limit=1.5, **options)
    assert history.stop_reason == "time limit"
    assert history.seconds < 5
    top = np.float32(0.01)
    assert (history.rate[100 : history.steps // 2] == top).all()
    assert history.rate[-1] < 0.02 * top
    falling = np.flatnonzero(history.rate[100:] < top)
    assert np.all(np.diff(history.rate[100 + falling[0] :]) < 0)


def test_patience_under_a_time_limit_decays_first():
    options = {"learning_rate": 0.05, "validation": Batch(X), "validate_every": 20, "patience": 5}
    _, history = fit(jr.key(0), normal(), X, time_limit=60, **options)
    assert history.stop_reason == "patience"
    assert history.seconds < 50
    assert history.rate[-1] < 0.01


def test_the_history_is_plain_json():
    _, history = fit(jr.key(0), normal(), X, steps=30, validate_every=10)
    loaded = json.loads(json.dumps(history.to_dict(), allow_nan=False))
    assert loaded["steps"] == 30
    assert len(loaded["loss"]) == len(loaded["rate"]) == 30
    assert loaded["validation_steps"] == [0, 10, 20, 30]
    assert loaded["validation_ema"] == [None] * 4
    assert loaded["stop_reason"] == "steps"
    assert loaded["seconds"] > 0
    assert History().steps == 0
    told = History(loss=np.zeros(7), best_step=5, best_loss=1.25, seconds=2.0, stop_reason="steps")
    assert repr(told) == "History(7 steps in 2.0 s, ended by steps; held-out loss 1.25 after 5)"


def test_a_preset_is_handed_on_and_decides_the_options(monkeypatch):
    seen = []
    monkeypatch.setitem(fit_module.OTHER_DOORS, Preset, lambda *a: seen.append(a) or (1, 2))
    chosen = preset(60, 2)
    assert fit(jr.key(0), chosen, X, validation=0.2, steps=10) == (1, 2)
    ((_, given, data, _, _, validation, *_, options),) = seen
    assert given is chosen
    assert data is X
    assert validation == 0.2
    assert options["steps"]
    assert not any(on for name, on in options.items() if name != "steps")
    monkeypatch.undo()
    with pytest.raises(InputError, match="steps means nothing with a preset"):
        fit(jr.key(0), chosen, X, steps=10)


# --- Sources --------------------------------------------------------------------------------------


def test_mapped_arrays_train_to_the_bits_of_arrays(tmp_path):
    x = X.astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    options = {"steps": 100, "batch_size": 32, "validate_every": 25}
    one, first = fit(jr.key(0), normal(), x, **options)
    two, second = fit(jr.key(0), normal(), mapped, **options)
    three, _ = fit(jr.key(0), normal(), ArraySource(jnp.asarray(x)), **options)
    four, _ = fit(jr.key(0), normal(), MappedSource(x), **options)
    assert np.allclose(one.loc, two.loc, atol=1e-6)
    assert np.allclose(first.loss, second.loss, atol=1e-5)
    assert same(one, three)
    assert same(two, four)


class Chunks:
    """A stream of 50 rows in batches of 16, 16, 16 and 2, in an order of its own."""

    def __init__(self, x):
        self.x, self.asked = x, []

    def __len__(self):
        return 4

    def batch(self, epoch, index):
        self.asked.append((epoch, index))
        rows = np.random.default_rng([7, epoch]).permutation(50)[16 * index : 16 * index + 16]
        return Batch(self.x[rows])


def test_a_stream_of_ones_own_trains():
    stream = Chunks(X[:50])
    flow, history = fit(
        jr.key(0), normal(), stream, validation=Batch(X[50:]), steps=600, learning_rate=0.1
    )
    assert history.steps == 600
    assert np.allclose(flow.loc, X[:50].mean(0), atol=0.4)
    again, _ = fit(
        jr.key(0), normal(), Chunks(X[:50]), validation=Batch(X[50:]), steps=600, learning_rate=0.1
    )
    assert same(flow, again)
    assert {(0, 0), (0, 3), (1, 0), (149, 3)} <= set(stream.asked)


def test_a_stream_is_stacked_within_bounded_memory(monkeypatch):
    monkeypatch.setattr("laminar.train.feed._STACK_BYTES", 16 * 2 * 4 * 3)
    biggest = []
    run_segment = fit_module._segment

    def watching(fixed, state):
        biggest.append(fixed[1].batches.x.shape[0])
        return run_segment(fixed, state)

    monkeypatch.setattr(fit_module, "_segment", watching)
    fit(jr.key(0), normal(), Chunks(X[:50]), validation=None, steps=20)
    assert set(biggest) == {2}


def test_little_is_read_that_is_not_used_under_a_time_limit(monkeypatch):
    stream = Chunks(X[:50])
    options = {"validation": Batch(X[50:]), "validate_every": 20, "steps": 60, "time_limit": 60.0}
    _, history = fit(jr.key(0), normal(), stream, **options)
    assert history.steps == 60
    assert len(stream.asked) <= 64  # the first one four times more, to learn its shape
    # How the steps are cut changes nothing.
    monkeypatch.setattr(fit_module.Clock, "count", lambda self, step: (min(7, 20 - step % 20), 3))
    again, cut = fit(jr.key(0), normal(), Chunks(X[:50]), **options | {"time_limit": None})
    monkeypatch.undo()
    whole, _ = fit(jr.key(0), normal(), Chunks(X[:50]), **options | {"time_limit": None})
    assert cut.steps == 60
    assert same(again, whole)


def test_bad_values_of_mapped_rows_and_streams_are_named():
    bad = X.copy()
    bad[37, 1] = np.inf
    words = "data: x has NaN, infinite or too large numbers in row 37;"
    for validation in (None, 0.9):
        with pytest.raises(InputError, match=words):
            fit(jr.key(0), normal(), MappedSource(bad), validation=validation, steps=20)
    weights = np.ones(120)
    weights[[5, 8]] = [-1, np.nan]
    with pytest.raises(InputError, match="rows 5, 8 are not"):
        fit(jr.key(0), normal(), MappedSource(X, weights=weights), steps=20)
    with pytest.raises(InputError, match="every weight is zero"):
        fit(jr.key(0), normal(), MappedSource(X, weights=np.zeros(120)), steps=20)
    with pytest.raises(InputError, match=r"in row \d+ of batch \d in epoch 0 of the stream"):
        fit(jr.key(0), normal(), Chunks(bad[:50]), validation=None, steps=20)


# --- Failures -------------------------------------------------------------------------------------


class Overflowing(AbstractElementwise):
    """An identity that overflows for inputs above 1e4: a user's faulty layer."""

    params: Array

    @property
    def in_shape(self):
        return self.params.shape[1:]

    def forward_kernel(self, params, x):
        return x, jnp.zeros_like(x)

    def inverse_kernel(self, params, y):
        return y + expand(params[0], y.ndim) * jnp.exp(jnp.abs(y) / 100), jnp.zeros_like(y)


def test_lasting_failure_names_step_part_and_rows():
    x = X.copy()
    x[17] = 9e4
    x[60] = -9e4
    layer = Overflowing(jnp.zeros((1, 2)) + 1e-6)
    flow = Flow(Normal((2,)), Chain([Affine(shape=(2,)), layer, Affine(shape=(2,))]))
    with pytest.raises(TrainingError) as caught:
        fit(jr.key(0), flow, x, validation=None, steps=50)
    words = str(caught.value)
    assert "step 5:" in words
    assert "5 steps were not finite" in words
    assert "step 2 of 3 (Overflowing)" in words
    assert "for rows 17, 60." in words
    assert caught.value.rows == (17, 60)
    moved = caught.value.renumbered(np.arange(120) + 1000)
    assert "for rows 1017, 1060." in str(moved)
    assert moved.rows == (1017, 1060)


def test_rows_are_looked_for_in_every_array_of_a_tree():
    tree = {"a": jnp.ones((2, 4)).at[1, 1].set(jnp.nan), "b": (jnp.asarray([1, 2, 3, 4]), None)}
    assert _finite_rows(tree, 4).tolist() == [True, False, True, True]
    assert _finite_rows(None, 4).all()


def test_patience_does_not_depend_on_saves(tmp_path):
    def hopeless(flow, batch, key):
        loss, aux = nll(flow, batch, key)
        # Minus infinity is no success either.
        return jnp.where(len(batch.x) == 40, -jnp.inf, loss), aux

    options = {"validation": Batch(X[:40]), "validate_every": 5, "patience": 3, "steps": 100}
    for saving in (None, Checkpoint(tmp_path / "c", seconds=0)):
        _, history = fit(
            jr.key(0), normal(), X[40:], objective=hopeless, checkpoint=saving, **options
        )
        assert (history.stop_reason, history.steps, history.best_step) == ("patience", 15, 15)
        assert np.isnan(history.best_loss)


def test_a_rare_failure_is_survived():
    x = X.copy()
    x[17] = 9e4
    layer = Overflowing(jnp.zeros((1, 2)) + 1e-6)
    flow = Flow(Frozen(Normal((2,))), Chain([Affine(shape=(2,)), layer]))
    _, history = fit(jr.key(0), flow, x, validation=None, steps=40, batch_size=12, max_rollbacks=10)
    assert 1 <= history.rollbacks <= 5
    assert (~np.isfinite(history.loss)).sum() == history.rollbacks
    assert history.rate[39] < history.rate.max() / 2


def test_a_row_outside_the_support_is_named():
    flow = Flow(Uniform((2,)), Affine(shape=(2,)))
    x = RNG.uniform(0.1, 0.9, size=(40, 2))
    x[3] = 7.0
    with pytest.raises(TrainingError, match=r"the base \(Uniform\), for row 3\."):
        fit(jr.key(0), flow, x, validation=None, steps=20)


def test_a_failing_gradient_is_named():
    def rooted(flow, batch, key):
        loss, aux = nll(flow, batch, key)
        return loss + jnp.sqrt(jnp.abs(flow.base.loc)).sum(), aux

    flow = Flow(Normal((2,)), Affine(shape=(2,)))
    with pytest.raises(TrainingError, match=r"the gradient of flow\.base\.loc"):
        fit(jr.key(0), flow, X, objective=rooted, steps=20)


def test_a_failing_objective_is_named():
    def broken(flow, batch, key):
        return nll(flow, batch, key)[0] / 0.0, {}

    with pytest.raises(TrainingError, match="the loss itself"):
        fit(jr.key(0), normal(), X, objective=broken, validation=None, steps=20)


def test_a_hopeless_rate_is_survived_or_named():
    with pytest.raises(TrainingError, match="the optimiser's update"):
        fit(jr.key(0), normal(), X, steps=20, learning_rate=1e38, clip=None)


BAD = X.copy()
BAD[[4, 9], 0] = np.nan


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (BAD, {}, InputError, r"NaN or infinite numbers in 2 row\(s\), the first of them row 4"),
        (X * 1e300, {}, InputError, "too large for float32"),
        (X[:, :1], {}, ShapeError, r"shape \(120, 1\), but the flow's events have shape \(2,\)"),
        (X[0], {}, ShapeError, "rows along the first axis"),
        (X[:0], {}, InputError, "data has no rows"),
        (X.astype(str), {}, InputError, "must be numbers"),
        (X, {"condition": X}, InputError, "the flow takes none"),
        (X, {"weights": np.ones(3)}, ShapeError, r"weights have shape \(3,\)"),
        (X, {"weights": -np.ones(120)}, InputError, "must not be negative; row 0 is"),
        (X, {"weights": np.zeros(120)}, InputError, "every weight is zero"),
        (Batch(X), {"weights": np.ones(120)}, InputError, "put them into the Batch"),
        (X, {"validation": 1.5}, InputError, "validation is 1.5"),
        (X, {"validation": Batch(X[:, :1])}, ShapeError, "validation: x has shape"),
        (X, {"validation": Batch(BAD)}, InputError, "validation: x has NaN"),
        (X, {"steps": 0}, InputError, "steps is 0"),
        (X, {"steps": 2.5}, InputError, "steps is 2.5"),
        (X, {"steps": 2**31}, InputError, "steps is 2147483648; give a whole number from 1 to"),
        (X, {"steps": np.inf}, InputError, "steps is inf"),
        (X, {"time_limit": np.inf}, InputError, "time_limit is inf"),
        (X, {"batch_size": 0}, InputError, "batch_size is 0"),
        (X, {"patience": 0}, InputError, "patience is 0"),
        (X, {"time_limit": -1.0}, InputError, "time_limit is -1.0"),
        (X, {"time_limit": 1.0, "schedule": "cosine"}, InputError, "leave schedule out"),
        (X, {"resume": True}, InputError, "give checkpoint="),
        (X, {"devices": 99}, InputError, "devices is 99"),
        (Chunks(X), {}, InputError, "A stream cannot be split"),
        (X, {"checkpoint": "/no/such/folder/c"}, InputError, "does not exist"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(data, options, error, words):
    with pytest.raises(error, match=words):
        fit(jr.key(0), normal(), data, **{"steps": 10, **options})


def test_a_missing_condition_is_refused():
    model = Regression(jnp.zeros(()), jnp.zeros(()))
    with pytest.raises(InputError, match="needs a condition of shape"):
        fit(jr.key(0), model, X[:, 0], steps=10)
    with pytest.raises(ShapeError, match=r"need \(120, 1\)"):
        fit(jr.key(0), model, X[:, 0], condition=X, steps=10)


# --- Progress -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_progress_is_silent_unless_asked_or_on_a_terminal(capsys, monkeypatch):
    fit(jr.key(0), normal(), X, steps=10)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("laminar.train.progress._LINE_SECONDS", 0.0)
    fit(jr.key(0), normal(), X, steps=10, progress=True)
    out, lines = capsys.readouterr()
    assert out == ""
    assert "step 1 " in lines
    assert "10 steps in" in lines


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for progress, shown in ((None, True), (False, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        fit(jr.key(0), normal(), X, steps=10, progress=progress)
        assert ("10 steps in" in terminal.getvalue()) == shown
