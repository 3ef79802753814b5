"""Checkpoints: nothing lost, nothing mixed up, and the same bits after an interruption."""

import subprocess
import sys
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar._errors import InputError, ModelFileError
from laminar.bijections.elementwise import Affine
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.objectives import Batch, nll
from laminar.train import Checkpoint, History, fit, load_checkpoint, save_checkpoint
from laminar.train.checkpoint import static_hash

fit_module = sys.modules[fit.__module__]
X = np.random.default_rng(0).normal(size=(90, 2)) * 2 + 1


def flow(dim=2):
    return Flow(Normal((dim,)), Affine(shape=(dim,)))


def same(a, b):
    return bool(eqx.tree_equal(eqx.filter(a, eqx.is_array), eqx.filter(b, eqx.is_array)))


def tree():
    return {
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "single": jnp.asarray([[1.5, jnp.nan, jnp.inf]], jnp.float32),
        "count": jnp.asarray(7, jnp.int32),
        "flag": jnp.asarray(True),
        "empty": jnp.zeros((0, 4)),
        "key": jr.key(3),
        "old_key": jr.PRNGKey(4),
        "static": "text",
        "none": None,
    }


def blank():
    return {
        **{k: jnp.zeros_like(v) for k, v in tree().items() if k not in ("key", "static", "none")},
        "key": jr.key(0),
        "static": "text",
        "none": None,
    }


def some_history():
    history = History(stop_reason="steps", best_step=3, best_loss=1.25, seconds=2.5, rollbacks=1)
    history.loss = np.array([1.0, np.nan, 0.5], np.float32)
    history.validation_steps = np.array([0, 3])
    return history


def test_what_is_saved_comes_back(tmp_path):
    save_checkpoint(tmp_path / "c", tree(), some_history(), {"lr": 0.1})
    state, history, settings = load_checkpoint(tmp_path / "c", blank(), {"lr": 0.1})
    for name, value in tree().items():
        if name == "key":
            assert jr.key_data(state[name]).tolist() == jr.key_data(value).tolist()
        elif eqx.is_array(value):
            assert state[name].dtype == value.dtype
            assert np.array_equal(
                np.asarray(state[name], np.float32), np.asarray(value, np.float32), equal_nan=True
            )
    expected = some_history()
    assert np.array_equal(history.loss, expected.loss, equal_nan=True)
    assert history.to_dict() == expected.to_dict()
    assert isinstance(history.best_step, int)
    assert settings == {"lr": 0.1}


def test_another_structure_is_refused_by_name(tmp_path):
    save_checkpoint(tmp_path / "c", tree(), History(), {})
    other = blank() | {"single": jnp.zeros((2, 3))}
    with pytest.raises(
        ModelFileError, match=r"\['single'\] is float32 \(1, 3\) there and float32 \(2, 3\) here"
    ):
        load_checkpoint(tmp_path / "c", other, {})
    with pytest.raises(ModelFileError, match=r"it has no \['new'\]"):
        load_checkpoint(tmp_path / "c", blank() | {"new": jnp.zeros(1)}, {})
    less = blank()
    del less["flag"]
    with pytest.raises(ModelFileError, match=r"it also has \['flag'\]"):
        load_checkpoint(tmp_path / "c", less, {})


def test_other_settings_are_refused_by_name(tmp_path):
    save_checkpoint(tmp_path / "c", tree(), History(), {"batch_size": 8, "lr": 0.1})
    with pytest.raises(InputError, match="batch_size = 8, and this one has 16"):
        load_checkpoint(tmp_path / "c", blank(), {"batch_size": 16, "lr": 0.1})


def test_damage_is_noticed(tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, tree(), History(), {})
    data = path.read_bytes()
    damaged = {
        "cut": data[:-3],
        "header": data[:20],
        "bit": data[:-1] + bytes([data[-1] ^ 1]),
        "described": data.replace(b"settings", b"settingz"),
        "empty": b"",
        "foreign": b"not a checkpoint",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelFileError):
            load_checkpoint(tmp_path / name, blank(), {})
    with pytest.raises(InputError, match="There is no file"):
        load_checkpoint(tmp_path / "absent", blank(), {})


def test_nothing_is_left_beside_the_file_and_a_failed_save_keeps_the_old(tmp_path, monkeypatch):
    path = tmp_path / "c"
    save_checkpoint(path, tree(), History(), {"n": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["c"]

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InputError, match="No space left"):
        save_checkpoint(path, tree(), History(), {"n": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    load_checkpoint(path, blank(), {"n": 1})


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def interrupt_after(monkeypatch, saves):
    """Let training be killed right after it has saved so many times."""
    left = [saves]

    def saving(*arguments):
        save_checkpoint(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(fit_module, "save_checkpoint", saving)


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, monkeypatch):
    options = {
        "steps": 200,
        "batch_size": 16,
        "validate_every": 30,
        "ema": 0.9,
        "learning_rate": 0.05,
        "weights": np.linspace(0, 2, len(X)),
    }
    whole, one = fit(jr.key(0), flow(), X, **options)
    # Cuts of 13 steps, so that saves do not coincide with validations.
    count = fit_module.Clock.count
    monkeypatch.setattr(
        fit_module.Clock, "count", lambda self, step: (min(13, count(self, step)[0]), 0)
    )
    saving = {"checkpoint": Checkpoint(tmp_path / "c", seconds=1e9, steps=13)}
    for _ in range(3):
        interrupt_after(monkeypatch, 4)
        with pytest.raises(Killed):
            fit(jr.key(0), flow(), X, **options, **saving, resume=True)
    monkeypatch.setattr(fit_module, "save_checkpoint", save_checkpoint)
    resumed, two = fit(jr.key(0), flow(), X, **options, **saving, resume=True)
    assert same(whole, resumed)
    for name in ("loss", "rate", "validation", "validation_ema", "validation_steps"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert (one.best_step, one.best_loss) == (two.best_step, two.best_loss)
    # A run that is complete returns its result at once.
    again, three = fit(jr.key(0), flow(), X, **options, **saving, resume=True)
    assert same(again, whole)
    assert three.steps == 200


def test_a_stream_is_resumed_at_its_position(tmp_path, monkeypatch):
    class Numbered:
        def __init__(self):
            self.asked = []

        def __len__(self):
            return 7

        def batch(self, epoch, index):
            self.asked.append((epoch, index))
            return Batch(np.random.default_rng([epoch, index]).normal(size=(8, 2)))

    options = {"steps": 40, "validation": None}
    whole, _ = fit(jr.key(0), flow(), Numbered(), **options)
    saving = {"checkpoint": Checkpoint(tmp_path / "c", seconds=0)}
    monkeypatch.setattr("laminar.train.feed._MOST_STACKED", 10)
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Killed):
        fit(jr.key(0), flow(), Numbered(), **options, **saving)
    monkeypatch.setattr(fit_module, "save_checkpoint", save_checkpoint)
    rest = Numbered()
    resumed, _ = fit(jr.key(0), flow(), rest, **options, **saving, resume=True)
    assert same(whole, resumed)
    assert divmod(25, 7) in rest.asked
    assert divmod(15, 7) not in rest.asked


def test_a_time_limited_run_counts_the_seconds_before(tmp_path):
    options = {"time_limit": 1.0, "checkpoint": tmp_path / "c", "patience": None}
    _, first = fit(jr.key(0), flow(), X, **options)
    _, again = fit(jr.key(0), flow(), X, **options, resume=True)
    assert first.stop_reason == again.stop_reason == "time limit"
    assert again.steps == first.steps


def test_a_run_that_used_up_its_time_goes_on_when_given_more(tmp_path):
    path = tmp_path / "c"
    options = {"checkpoint": path, "resume": True, "patience": None}
    _, first = fit(jr.key(0), flow(), X, time_limit=0.5, **options)
    _, more = fit(jr.key(0), flow(), X, time_limit=1.5, **options)
    assert first.stop_reason == more.stop_reason == "time limit"
    assert more.steps > first.steps
    assert np.array_equal(more.loss[: first.steps], first.loss)
    assert more.rate[first.steps] == first.rate.max()
    assert more.rate[-1] < 0.1 * first.rate.max()
    _, few = fit(jr.key(1), flow(), X, time_limit=60, steps=30, checkpoint=tmp_path / "d")
    _, many = fit(
        jr.key(1), flow(), X, time_limit=60, steps=50, checkpoint=tmp_path / "d", resume=True
    )
    assert (few.steps, many.steps, many.stop_reason) == (30, 50, "steps")


def test_the_static_hash_sees_classes_fields_and_functions_but_no_values():
    class Part(eqx.Module):
        value: jax.Array
        act: Callable = eqx.field(static=True)
        size: int = eqx.field(static=True)

    first = Part(jnp.zeros(2), jax.nn.silu, 3)
    assert static_hash(first) == static_hash(Part(jnp.ones(2), jax.nn.silu, 3))
    assert static_hash(first) != static_hash(Part(jnp.zeros(2), jax.nn.silu, 4))
    assert static_hash(first) != static_hash(Part(jnp.zeros(2), jax.nn.relu, 3))
    code = "from laminar.zoo import nsf; import jax.random as jr; import sys;"
    code += "from laminar.train.checkpoint import static_hash;"
    code += "print(static_hash(nsf(2, key=jr.key(0), layers=1, width=4)))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout


def other_objective(flow, batch, key):
    return nll(flow, batch, key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 30}, "steps = 20, and this one has 30"),
        ({"batch_size": 8}, "batch_size = 81, and this one has 8"),
        ({"learning_rate": 0.5}, "learning_rate = 0.003, and this one has 0.5"),
        ({"validation": 0.3}, "data = "),
        ({"key": 1}, "key = "),
        ({"data": X + 1}, "data = "),
        ({"flow": 3, "data": np.ones((90, 3))}, "another model or optimiser: .* is float32"),
        ({"patience": 3}, "patience = 20, and this one has 3"),
        ({"objective": other_objective}, r"objective = laminar\.objectives\.nll, and this one"),
        ({"validation": Batch(X + 1)}, "validation = "),
        ({"ema": 0.9}, "it has no .ema"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, change, words):
    arguments = {"key": 0, "flow": 2, "data": X, "steps": 20}
    if isinstance(change.get("validation"), Batch):
        arguments["validation"] = Batch(X)

    def run(key, flow_dim, data, **options):
        path = tmp_path / "c"
        return fit(jr.key(key), flow(flow_dim), data, checkpoint=path, resume=True, **options)

    def call(arguments):
        arguments = dict(arguments)
        return run(arguments.pop("key"), arguments.pop("flow"), arguments.pop("data"), **arguments)

    call(arguments)  # no file yet: begins anew
    with pytest.raises(InputError, match=words):
        call(arguments | change)


def test_a_checkpoint_is_written_when_due():
    due = Checkpoint("c", seconds=60, steps=100)
    assert due.due(61, 1)
    assert due.due(1, 100)
    assert not due.due(59, 99)
    with pytest.raises(InputError, match="seconds must be at least 0"):
        Checkpoint("c", seconds=-1)


def test_a_damaged_checkpoint_is_not_trained_over(tmp_path):
    (tmp_path / "c").write_bytes(b"garbage!!")
    with pytest.raises(ModelFileError, match="is not a laminar checkpoint"):
        fit(jr.key(0), flow(), X, steps=5, checkpoint=tmp_path / "c", resume=True)
    assert (tmp_path / "c").read_bytes() == b"garbage!!"


def test_donated_states_can_be_loaded_twice(tmp_path):
    state = {"a": jnp.arange(4.0)}
    save_checkpoint(tmp_path / "c", state, History(), {})
    one, _, _ = load_checkpoint(tmp_path / "c", state, {})
    jax.jit(lambda s: {"a": s["a"] + 1}, donate_argnums=0)(one)
    two, _, _ = load_checkpoint(tmp_path / "c", state, {})
    assert two["a"].tolist() == [0, 1, 2, 3]
