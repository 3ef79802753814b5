"""Flow matching learns densities, respects weights and conditions, and solves no equation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import randomise

import laminar
from laminar import matching
from laminar._errors import InputError
from laminar.bijections.compose import Chain, repeat
from laminar.bijections.continuous import Continuous
from laminar.bijections.elementwise import Affine
from laminar.objectives import Batch, nll
from laminar.train import Recipe, init, step

PATHS = ["ot", "variance_preserving", "minibatch_ot", "schroedinger_bridge"]
MEANS = np.array([[1.5, 0.0], [-1.5, 0.5]], np.float32)


def _mixture(seed, n):
    rng = np.random.default_rng(seed)
    return MEANS[rng.integers(0, 2, n)] + 0.4 * rng.normal(size=(n, 2)).astype(np.float32)


def _truth(x):
    squares = ((np.asarray(x)[:, None] - MEANS) ** 2).sum(-1)
    return np.logaddexp.reduce(-squares / 0.32, 1) - np.log(2 * 2 * np.pi * 0.16)


def _cnf(dim=2, **options):
    return laminar.cnf(dim, key=jr.key(0), **{"width": 16, "depth": 1, **options})


@pytest.mark.parametrize(
    ("path", "gap"), [("ot", 0.06), pytest.param("minibatch_ot", 0.06, marks=pytest.mark.slow)]
)
def test_flow_matching_learns_a_mixture(path, gap):
    flow, history = laminar.fit(
        jr.key(1),
        _cnf(width=32, depth=2),
        _mixture(0, 3000),
        objective=laminar.flow_matching(path),
        steps=800,
        ema=0.99,
    )
    test = _mixture(1, 1000)
    assert flow.exactness == "exact"
    assert np.mean(_truth(test) - flow.log_prob(test)) < gap
    draws = flow.sample(jr.key(2), (1000,))
    assert abs(_truth(draws).mean() - _truth(test).mean()) < 0.3
    assert history.best_loss < history.validation[0]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_trains_all_parameters_and_compiles_once(path):
    objective = laminar.flow_matching(path)
    flow = eqx.tree_at(
        lambda f: f.bijection.field.net.head.weight, _cnf(cond_dim=3), jnp.full((2, 16), 0.1)
    )
    batch = Batch(jr.normal(jr.key(1), (8, 2)), jr.normal(jr.key(2), (8, 3)))
    traces = 0

    @eqx.filter_jit
    def gradient(flow, batch, key):
        nonlocal traces
        traces += 1
        return eqx.filter_value_and_grad(objective, has_aux=True)(flow, batch, key)

    for i in range(2):
        (loss, aux), grads = gradient(flow, batch, jr.key(i))
    assert traces == 1
    assert jnp.isfinite(loss)
    assert aux["weight"] == 8
    for leaf in jax.tree.leaves(grads.bijection):
        assert jnp.isfinite(leaf).all()
        assert (leaf != 0).any()
    recipe = Recipe(flow, objective=objective, steps=2)
    _, info = step(init(jr.key(3), flow, recipe), batch, recipe)
    assert jnp.isfinite(info.loss)


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_weight_zero_do_not_count(path):
    objective = laminar.flow_matching(path)
    flow, x = _cnf(), jr.normal(jr.key(1), (6, 2))
    weights = jnp.array([1.0, 2.0, 0.0, 1.0, 0.0, 1.0])
    values = [
        objective(flow, Batch(x.at[2].set(v).at[4].set(v), weights=weights), jr.key(2))[0]
        for v in (0.0, 1e30, jnp.nan)
    ]
    assert jnp.isfinite(values[0])
    assert values[0] == values[1] == values[2]
    empty, aux = objective(flow, Batch(x, weights=jnp.zeros(6)), jr.key(2))
    assert empty == 0
    assert aux["weight"] == 0


@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_is_the_derivative_of_the_path(path):
    objective = laminar.flow_matching(path)
    z, x = jr.normal(jr.key(1), (2, 2, 5))
    t = jnp.linspace(0.1, 0.9, 5)
    _, target = objective._on_path(jr.key(2), t, z, x)
    rate = jax.jvp(lambda t: objective._on_path(jr.key(2), t, z, x)[0], (t,), (jnp.ones(5),))[1]
    np.testing.assert_allclose(rate, target, rtol=1e-4, atol=1e-4)
    start = objective._on_path(jr.key(2), jnp.zeros(5), z, x)[0]
    end = objective._on_path(jr.key(2), jnp.ones(5), z, x)[0]
    np.testing.assert_allclose(start, z, atol=1e-6)
    np.testing.assert_allclose(end, x, atol=1e-6)


def test_the_bridge_leaves_out_its_ends_in_point_and_question(monkeypatch):
    asked = []

    class Field(eqx.Module):
        batch_last = True

        def __call__(self, t, z):
            asked.append(t)
            return jnp.zeros_like(z)

    monkeypatch.setattr(matching, "_times", lambda key, count, dtype: jnp.zeros(count, dtype))
    flow = laminar.Flow(laminar.Normal(2), Continuous(Field(), (2,)))
    loss, _ = laminar.flow_matching("schroedinger_bridge")(flow, Batch(jnp.ones((4, 2))), jr.key(0))
    assert jnp.isfinite(loss)
    np.testing.assert_allclose(asked[-1], 1e-3, rtol=1e-5)


def test_a_field_without_condition_is_matched_in_a_conditional_flow():
    layer = laminar.coupling(
        2, Affine(max_log_scale=1.0), key=jr.key(0), cond_dim=3, width=4, depth=1
    )
    flow = _cnf()
    flow = laminar.Flow(flow.base, Chain([flow.bijection, layer]))
    batch = Batch(jr.normal(jr.key(1), (8, 2)), jr.normal(jr.key(2), (8, 3)))
    assert jnp.isfinite(laminar.flow_matching()(flow, batch, jr.key(3))[0])


def test_a_plan_has_the_marginals_and_is_nearly_optimal():
    x, z = (jr.normal(jr.key(i), (1, 64)) for i in (1, 2))
    cost = matching._square_distances(x, z)
    np.testing.assert_allclose(cost[3, 5], ((x[:, 3] - z[:, 5]) ** 2).sum(), atol=1e-5)
    cost = cost / cost.mean()
    shares = jnp.full(64, 1 / 64)
    plan = jax.nn.softmax(matching._log_plan(cost, jnp.log(shares), 0.05), axis=1) / 64
    np.testing.assert_allclose(plan.sum(0), shares, atol=4e-3)
    sorted_cost = ((jnp.sort(x[0]) - jnp.sort(z[0])) ** 2).mean() / (
        matching._square_distances(x, z).mean()
    )
    assert (plan * cost).sum() < sorted_cost + 0.06
    # A small entropy takes more steps than a large one, and gets them.
    plan = jax.nn.softmax(matching._log_plan(cost, jnp.log(shares), 0.002), axis=1) / 64
    np.testing.assert_allclose(plan.sum(0), shares, rtol=0.05)


def test_plans_do_not_pair_across_conditions():
    condition = jnp.repeat(jnp.array([0.0, 1.0]), 16)[None]
    x, z = 3 * condition, jr.normal(jr.key(1), (1, 32))
    objective = laminar.flow_matching("minibatch_ot")
    pairs = objective._pairs(jr.key(2), x, z, condition, None)
    assert ((pairs < 16) == (jnp.arange(32) < 16)).mean() > 0.95


def test_a_conditional_flow_is_matched_behind_its_standardisation():
    rng = np.random.default_rng(0)
    c = rng.normal(size=(2000, 1)).astype(np.float32)
    x = 100 + 10 * (c + 0.3 * rng.normal(size=(2000, 1)).astype(np.float32))
    flow = _cnf(1, cond_dim=1)
    standard = Affine(jnp.array([100.0]), jnp.array([10.0]))
    flow = laminar.Flow(flow.base, Chain([flow.bijection, standard]))
    fitted, _ = laminar.fit(
        jr.key(1), flow, x, condition=c, objective=laminar.flow_matching(), steps=500, ema=0.99
    )
    draws = fitted.sample(jr.key(2), (2000,), jnp.array([1.0]))
    assert abs(draws.mean() - 110) < 1
    assert abs(draws.std() - 3) < 1
    np.testing.assert_array_equal(fitted.bijection.parts[1].params, standard.params)


@pytest.mark.slow
def test_rnode_is_the_likelihood_and_a_price():
    flow = eqx.tree_at(
        lambda f: f.bijection.field.net.head.weight,
        _cnf(fixed_steps=8),
        0.3 * jr.normal(jr.key(5), (2, 16)),
    )
    batch = Batch(jr.normal(jr.key(1), (8, 2)), weights=jnp.ones(8).at[3].set(0))
    plain, _ = nll(flow, batch)
    free, aux = laminar.rnode(0, 0)(flow, batch)
    dear, _ = laminar.rnode(0.5, 0.25)(flow, batch)
    np.testing.assert_allclose(free, plain, atol=1e-5)
    np.testing.assert_allclose(
        dear - free, 0.5 * aux["kinetic"] + 0.25 * aux["jacobian"], rtol=1e-4
    )
    assert aux["kinetic"] > 0
    assert aux["jacobian"] > 0
    _, history = laminar.fit(
        jr.key(2), flow, _mixture(0, 200), objective=laminar.rnode(), steps=20, batch_size=64
    )
    assert history.best_loss < history.validation[0]


@pytest.mark.slow
def test_the_program_of_a_stack_does_not_grow_with_its_layers():
    batch = Batch(jr.normal(jr.key(1), (4, 2)))

    def size(flow, objective):
        return len(str(eqx.filter_make_jaxpr(objective)(flow, batch, jr.key(0))[0]))

    def standardised(layers):
        after = repeat(lambda key: Affine(shape=(2,)), layers, key=jr.key(2))
        return laminar.Flow(laminar.Normal(2), Chain([_cnf().bijection, after]))

    for make, objective in (
        (lambda layers: _cnf(layers=layers, fixed_steps=2), laminar.rnode()),
        (standardised, laminar.flow_matching()),
    ):
        assert size(make(6), objective) < 1.1 * size(make(2), objective)
    deep = _cnf(layers=2, fixed_steps=8, times=1)
    deep = eqx.tree_at(lambda f: f.bijection, deep, randomise(deep.bijection, jr.key(4), 0.3))
    np.testing.assert_allclose(
        laminar.rnode(0, 0)(deep, batch)[0], nll(deep, batch)[0], rtol=1e-4, atol=1e-4
    )


def test_misuse_is_named():
    for arguments, words in (
        (("straight",), "path is 'straight'"),
        (("ot", 1.5), "sigma must be in"),
        (("schroedinger_bridge", 0.0), "sigma must be positive"),
        (("variance_preserving", 0.1), "has no sigma"),
    ):
        with pytest.raises(InputError, match=words):
            laminar.flow_matching(arguments[0], sigma=(*arguments, None)[1])
    with pytest.raises(InputError, match="condition_cost"):
        laminar.flow_matching(condition_cost=-1)
    with pytest.raises(InputError, match="kinetic must be"):
        laminar.rnode(-1)
    batch = Batch(jnp.zeros((4, 2)))
    with pytest.raises(InputError, match="with a Continuous part"):
        laminar.flow_matching()(laminar.realnvp(2, key=jr.key(0), layers=1), batch, jr.key(1))
    with pytest.raises(InputError, match="has 2 Continuous parts"):
        laminar.flow_matching()(_cnf(layers=2), batch, jr.key(1))
