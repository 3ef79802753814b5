"""The pure step: what it changes, what it leaves, and what it does when numbers fail."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

from laminar._errors import InputError
from laminar._params import Frozen
from laminar.bijections.compose import Chain, Repeat, repeat
from laminar.bijections.coupling import coupling
from laminar.bijections.elementwise import Affine
from laminar.bijections.linear import LU
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.objectives import Batch
from laminar.train import Recipe, init, step, validate
from laminar.train.state import decay_mask, training_spec

X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 2)) * 2 + 1, jnp.float32)


def flow():
    return Flow(Normal((2,)), Affine(shape=(2,)))


def run(recipe, model, batches, state=None):
    take = eqx.filter_jit(step)
    state = init(jr.key(0), model, recipe) if state is None else state
    infos = []
    for batch in batches:
        state, info = take(state, batch, recipe)
        infos.append(info)
    return state, infos


def same(a, b):
    return bool(eqx.tree_equal(eqx.filter(a, eqx.is_array), eqx.filter(b, eqx.is_array)))


def test_a_step_is_pure_and_goes_downhill():
    model = flow()
    recipe = Recipe(model, steps=50, learning_rate=0.1)
    start = init(jr.key(0), model, recipe)
    kept = jtu.tree_map(lambda x: np.asarray(x), eqx.filter(start.model, eqx.is_array))
    one, infos = run(recipe, model, [Batch(X)] * 20, start)
    two, _ = run(recipe, model, [Batch(X)] * 20, start)
    assert same(one.model, two.model)
    assert same(kept, start.model)
    assert infos[-1].loss < infos[0].loss
    assert int(one.step) == 20
    assert int(one.rollbacks) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.sgd(0.05, momentum=0.9),
        lambda: optax.adamw(optax.cosine_decay_schedule(0.05, 100)),
        lambda: optax.lion(0.01),
        lambda: optax.chain(optax.scale_by_rms(), optax.scale(-0.05)),
    ],
)
def test_any_optax_transformation_trains(make):
    model = flow()
    recipe = Recipe(model, steps=30, optimizer=make())
    _, infos = run(recipe, model, [Batch(X)] * 30)
    assert infos[-1].loss < infos[0].loss
    assert float(infos[0].rate) == 1.0


def test_frozen_parts_stay_and_the_others_move():
    model = Flow(Normal((2,)), Chain([Affine(shape=(2,)), LU(2, key=jr.key(1))]))
    recipe = Recipe(model, steps=20, freeze=lambda f: (f.base, f.bijection.parts[0]))
    state, _ = run(recipe, model, [Batch(X)] * 5)
    assert same(state.model.base, model.base)
    assert same(state.model.bijection.parts[0], model.bijection.parts[0])
    assert not same(state.model.bijection.parts[1], model.bijection.parts[1])
    held = Flow(Frozen(Normal((2,))), Affine(shape=(2,)))
    state, _ = run(Recipe(held, steps=20), held, [Batch(X)] * 3)
    assert same(state.model.base, held.base)


def test_freezing_what_is_not_there_is_refused():
    with pytest.raises(InputError, match="freeze must return parts"):
        Recipe(flow(), freeze=lambda f: f.nothing)
    with pytest.raises(InputError, match="nothing to train"):
        init(jr.key(0), flow(), Recipe(flow(), freeze=lambda f: f))


def test_the_specification_has_the_structure_of_the_flow():
    model = Flow(Frozen(Normal((2,))), Affine(shape=(2,)))
    spec = training_spec(model, lambda f: f.bijection)
    assert jtu.tree_structure(spec) == jtu.tree_structure(model)
    assert not any(jtu.tree_leaves(spec))


@pytest.fixture(scope="module")
def deep():
    """A flow with stacked networks, linear maps and stacked scalar maps."""

    @eqx.filter_jit
    def make(key):
        layers = repeat(lambda k: coupling(4, Affine(), width=8, depth=1, key=k), 2, key=key)
        stack = Repeat([Affine(shape=(4,)), Affine(shape=(4,))])
        return Flow(Normal((4,)), Chain([layers, LU(4, key=key), stack]))

    return make(jr.key(0))


def test_only_weight_matrices_of_networks_decay(deep):
    mask = decay_mask(deep)
    assert jtu.tree_structure(mask) == jtu.tree_structure(deep)
    names = {jtu.keystr(p): x for p, x in jtu.tree_leaves_with_path(eqx.filter(deep, mask))}
    assert names
    assert all(leaf.ndim == 3 for leaf in names.values())
    assert not any("bias" in n or ".base" in n or "parts[1]" in n for n in names)
    assert not any("parts[2]" in n or "template" in n for n in names)


def test_weight_decay_pulls_matrices_towards_zero(deep):
    recipe = Recipe(deep, weight_decay=0.5)
    params = eqx.filter(deep, recipe.spec)

    @eqx.filter_jit
    def update(params):
        zero = jtu.tree_map(jnp.zeros_like, params)
        with jax.numpy_dtype_promotion("standard"):
            return recipe.transform.update(zero, recipe.transform.init(params), params)[0]

    updates = update(params)
    mask = eqx.filter(decay_mask(deep), recipe.spec)
    for change, value, on in zip(*map(jtu.tree_leaves, (updates, params, mask)), strict=True):
        assert np.array_equal(change, (-0.5 if on else 0.0) * np.asarray(value))


def test_gradients_are_clipped_by_their_global_norm():
    model = flow()
    recipe = Recipe(model, optimizer=optax.sgd(1.0), clip=0.5)
    state, infos = run(recipe, model, [Batch(X * 100)])
    moved = jtu.tree_map(
        lambda a, b: a - b, *(eqx.filter(m, recipe.spec) for m in (state.model, model))
    )
    assert float(infos[0].norm) > 0.5
    assert float(optax.tree.norm(moved)) == pytest.approx(0.5, rel=1e-4)


def test_the_average_follows_the_parameters():
    model = flow()
    recipe = Recipe(model, optimizer=optax.sgd(0.1), ema=0.9)
    state, _ = run(recipe, model, [Batch(X)])
    params, before = (eqx.filter(m, recipe.spec) for m in (state.model, model))
    keep = 0.1  # min(0.9, 1 / 10) at the first step
    for e, p, b in zip(*map(jtu.tree_leaves, (state.ema, params, before)), strict=True):
        assert jnp.allclose(e, keep * b + (1 - keep) * p, atol=1e-6)


def test_schedules():
    rate = Recipe(flow(), steps=1000, learning_rate=0.1).rate
    values = np.array(jax.vmap(rate)(jnp.arange(1001)))
    assert values[0] == pytest.approx(0.1 / 50)
    assert values.max() == pytest.approx(0.1)
    assert values.argmax() in (49, 50)
    assert values[525] == pytest.approx(0.05, rel=1e-3)
    assert values[1000] == pytest.approx(0, abs=1e-8)
    constant = Recipe(flow(), learning_rate=0.1).rate
    assert float(constant(jnp.int32(10_000))) == pytest.approx(0.1)
    falling = constant.decaying(10_000, 100)
    assert float(falling(jnp.int32(10_000))) == pytest.approx(0.1)
    assert float(falling(jnp.int32(10_050))) == pytest.approx(0.05)
    assert float(falling(jnp.int32(10_200))) == 0


def test_a_nonfinite_step_is_not_taken_and_halves_the_rate():
    model = flow()
    recipe = Recipe(model, learning_rate=0.1, warmup=0)
    state, _ = run(recipe, model, [Batch(X)] * 3)
    after, infos = run(recipe, model, [Batch(X.at[4, 1].set(jnp.nan))], state)
    assert not np.isfinite(infos[0].loss)
    assert same(after.model, state.model)
    assert same(after.opt, state.opt)
    assert float(after.scale) == 0.5
    assert (int(after.rollbacks), int(after.failed_at), int(after.step)) == (1, 3, 4)
    further, infos = run(recipe, model, [Batch(X)], after)
    assert float(infos[0].rate) == pytest.approx(0.5 * 0.1)
    assert int(further.in_a_row) == 0
    assert not same(further.model, after.model)


def test_two_failures_in_a_row_go_back_to_the_last_good_parameters():
    model = flow()
    recipe = Recipe(model, learning_rate=0.1)
    state, _ = run(recipe, model, [Batch(X)] * 3)
    bad = Batch(jnp.full_like(X, jnp.inf))
    after, _ = run(recipe, model, [bad, bad], state)
    assert same(eqx.filter(after.model, recipe.spec), eqx.filter(model, recipe.spec))
    assert float(after.scale) == 0.25
    chunks = Batch(X[None], None, jnp.ones((1, len(X))))
    checked, _ = validate(state, chunks, jr.key(0), recipe)
    after, _ = run(recipe, model, [bad, bad], checked)
    assert same(after.model, state.model)


def test_after_the_last_rollback_the_state_stands_still():
    model = flow()
    recipe = Recipe(model, max_rollbacks=3)
    bad = Batch(jnp.full_like(X, jnp.nan))
    state, _ = run(recipe, model, [Batch(X), bad, bad, bad])
    assert int(state.rollbacks) == 3
    after, _ = run(recipe, model, [bad, Batch(X)], state)
    assert same(after.model, state.model)
    assert (int(after.rollbacks), int(after.failed_at)) == (3, 3)


def test_validation_weighs_rows_and_ignores_padding():
    model = flow()
    recipe = Recipe(model, ema=0.9)
    state = init(jr.key(0), model, recipe)
    weights = jnp.arange(1.0, 33.0)
    log_p = model.log_prob(X)
    expected = -float((weights * log_p).sum() / weights.sum())
    pad = jnp.full((8, 2), 1e6)
    chunks = Batch(
        jnp.concatenate([X, pad]).reshape(4, 10, 2),
        None,
        jnp.concatenate([weights, jnp.zeros(8)]).reshape(4, 10),
    )
    after, found = validate(state, chunks, jr.key(0), recipe)
    assert float(found.loss) == pytest.approx(expected, rel=1e-5)
    assert float(found.ema_loss) == pytest.approx(expected, rel=1e-5)
    assert float(after.best_loss) == pytest.approx(expected, rel=1e-5)


def test_the_best_parameters_are_kept_and_nan_is_never_best():
    model = flow()
    recipe = Recipe(model, learning_rate=0.1, warmup=0)
    chunks = Batch(X[None], None, jnp.ones((1, len(X))))
    state, _ = run(recipe, model, [Batch(X)] * 10)
    best, _ = validate(state, chunks, jr.key(0), recipe)
    worse, _ = run(recipe, model, [Batch(X - 50)] * 20, best)
    worse, _ = validate(worse, chunks, jr.key(0), recipe)
    assert same(worse.best, eqx.filter(state.model, recipe.spec))
    assert int(worse.best_step) == 10
    broken = eqx.tree_at(lambda s: s.model.base.loc, worse, jnp.full(2, jnp.nan))
    broken, found = validate(broken, chunks, jr.key(0), recipe)
    assert np.isnan(found.loss)
    assert same(broken.best, worse.best)
    assert same(broken.good, worse.good)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"clip": 0.0}, "clip is 0.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_rollbacks": 0}, "max_rollbacks is 0"),
        ({"schedule": "linear"}, "choose 'cosine' or 'constant'"),
        ({"schedule": "cosine"}, "needs the number of steps"),
        ({"optimizer": "adam"}, "Optax transformation"),
    ],
)
def test_options_out_of_range_are_refused(option, words):
    with pytest.raises(InputError, match=words):
        Recipe(flow(), **option)
