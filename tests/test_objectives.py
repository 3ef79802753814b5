"""Objectives: weighted likelihood and reverse KL, their values and what they converge to."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar._errors import InputError, ShapeError
from laminar.bijections.base import Identity
from laminar.distributions import ConditionalNormal, MultivariateNormal, Normal
from laminar.flow import Flow
from laminar.objectives import (
    Batch,
    forward_kl,
    geometric_annealing,
    importance_weighted,
    linear_annealing,
    nll,
    reverse_kl,
)
from laminar.zoo import nsf

RNG = np.random.default_rng(0)


def conditional():
    return ConditionalNormal(lambda c: jnp.stack([c, jnp.zeros_like(c)]), 2, 2)


def test_nll_is_the_weighted_mean():
    flow = Normal((2,), 0.5, 2.0)
    x = RNG.normal(size=(6, 2))
    weights = np.array([1.0, 0.5, 0.0, 2.0, 1.0, 0.25])
    log_p = np.asarray(flow.log_prob(x))
    loss, aux = nll(flow, Batch(x), jr.key(0))
    assert float(loss) == pytest.approx(-log_p.mean(), rel=1e-6)
    assert float(aux["weight"]) == 6
    loss, aux = nll(flow, Batch(x, weights=weights))
    assert float(loss) == pytest.approx(-np.average(log_p, weights=weights), rel=1e-6)
    assert float(aux["log_prob"]) == -float(loss)
    assert float(aux["weight"]) == pytest.approx(4.75)


def test_rows_of_weight_zero_are_padding():
    flow = Normal((2,))
    x = np.array([[0.0, 1.0], [np.inf, 0.0], [np.nan, 0.0]])
    loss, _ = nll(flow, Batch(x, weights=np.array([1.0, 0.0, 0.0])))
    assert float(loss) == pytest.approx(0.5 + np.log(2 * np.pi))
    loss, aux = nll(flow, Batch(x, weights=np.zeros(3)))
    assert float(loss) == float(aux["weight"]) == 0


@pytest.mark.parametrize("embed", [False, True])
def test_nll_with_conditions(embed):
    c = RNG.normal(size=(5, 2))
    x = RNG.normal(size=(5, 2))
    flow = conditional()
    if embed:
        flow = Flow(flow, Identity((2,)), lambda c: c["a"] * 2, {"a": (2,)})
        batch = Batch(x, {"a": c / 2})
    else:
        batch = Batch(x, c)
    loss, _ = nll(flow, batch)
    assert float(loss) == pytest.approx(-float(flow.log_prob(*batch[:2]).mean()), rel=1e-6)
    one = jax.tree_util.tree_map(lambda c: c[0], batch.condition)
    assert float(nll(flow, Batch(x, one))[0]) == pytest.approx(
        -float(flow.log_prob(x, one).mean()), rel=1e-6
    )


def test_nll_has_its_gradient_at_the_weighted_moments():
    """The likelihood of a normal law is greatest at the weighted mean and deviation."""
    x = jnp.asarray(RNG.normal(size=(50, 2)) * 2 + 1, float)
    weights = jnp.asarray(RNG.uniform(0, 2, 50), float)
    mean = np.average(x, axis=0, weights=weights)
    deviation = np.sqrt(np.average((np.asarray(x) - mean) ** 2, axis=0, weights=weights))
    grad = eqx.filter_grad(lambda f: nll(f, Batch(x, weights=weights))[0])
    at_best = grad(Normal((2,), mean, deviation))
    np.testing.assert_allclose(at_best.loc, 0, atol=1e-5)
    np.testing.assert_allclose(at_best.log_scale, 0, atol=1e-5)
    assert np.abs(grad(Normal((2,))).loc).min() > 0.1


def test_reverse_kl_is_least_at_the_target():
    covariance = np.array([[1.0, 0.6], [0.6, 2.0]])
    target = MultivariateNormal(np.array([1.0, -1.0]), covariance)
    objective = reverse_kl(lambda x: target._log_prob(x) + 3.0, samples=1000)
    loss, aux = objective(target, None, jr.key(0))
    assert float(loss) == pytest.approx(-3, abs=1e-4)
    assert float(aux["elbo"]) == -float(loss)
    other = MultivariateNormal(np.zeros(2))
    kl = other.kl(target, jr.key(1), 1000)
    assert float(objective(other, None, jr.key(0))[0]) == pytest.approx(
        float(kl.value) - 3, abs=6 * float(kl.error)
    )

    def loss_of(flow, key):
        return objective(flow, None, key)[0]

    @eqx.filter_jit
    def train(flow):
        def step(flow, key):
            grads = eqx.filter_grad(loss_of)(flow, key)
            return jax.tree_util.tree_map(lambda p, g: p - 0.1 * g, flow, grads), None

        return jax.lax.scan(step, flow, jr.split(jr.key(2), 150))[0]

    flow = train(other)
    np.testing.assert_allclose(flow.loc, target.loc, atol=0.05)
    np.testing.assert_allclose(flow.covariance, covariance, atol=0.1)


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        (Batch(np.zeros((4, 3))), ShapeError, r"x has shape \(4, 3\)"),
        (Batch(np.zeros(2)), ShapeError, "exactly one"),
        (Batch(np.zeros((4, 2)), weights=np.ones(3)), ShapeError, r"\(3,\).*\(4,\)"),
        (Batch(np.zeros((4, 2)), np.zeros((4, 2))), InputError, "takes no condition"),
    ],
)
def test_errors_say_both_shapes(batch, error, match):
    with pytest.raises(error, match=match):
        nll(Normal((2,)), batch)
    if batch.condition is not None:
        with pytest.raises(ShapeError, match=r"\(4,\), its condition \(3,\)"):
            nll(conditional(), Batch(np.zeros((4, 2)), np.zeros((3, 2))))


def test_padding_reaches_no_gradient():
    flow = nsf(2, key=jr.key(0), layers=1, width=8, cond_dim=1)
    x = jnp.array([[0.3, 1.0], [jnp.nan, 0.3]])
    batch = Batch(x, jnp.array([[1.0], [jnp.nan]]), jnp.array([1.0, 0.0]))
    got = eqx.filter_grad(lambda flow: nll(flow, batch, jr.key(1))[0])(flow)
    only = Batch(x[:1], jnp.array([[1.0]]), jnp.array([1.0]))
    want = eqx.filter_grad(lambda flow: nll(flow, only, jr.key(1))[0])(flow)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_reverse_kl_refuses_conditions():
    flow = nsf(2, key=jr.key(0), layers=1, width=8, cond_dim=1)
    with pytest.raises(InputError, match="takes a condition"):
        reverse_kl(lambda x: -(x**2).sum())(flow, None, jr.key(1))
    with pytest.raises(InputError, match="samples must be at least 1"):
        reverse_kl(banana, 0)


def banana(x):
    return -0.5 * (x[0] / 2) ** 2 - 0.5 * (x[1] - 0.3 * x[0] ** 2) ** 2


def gradient(objective, flow, key):
    leaves = jax.tree.leaves(eqx.filter_grad(lambda f: objective(f, None, key)[0])(flow))
    return jnp.concatenate([leaf.ravel() for leaf in leaves])


def perturbed(flow, scale=0.1):
    params, rest = eqx.partition(flow, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(params)
    keys = jr.split(jr.key(7), len(leaves))
    moved = [p + scale * jr.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, moved), rest)


@pytest.mark.slow
def test_path_gradient_has_the_same_mean_and_no_variance_at_the_target():
    target = MultivariateNormal(np.array([1.0, -1.0]), np.array([[1.0, 0.6], [0.6, 2.0]]))
    path = reverse_kl(target._log_prob, 64)
    total = reverse_kl(target._log_prob, 64, path_gradient=False)
    assert np.abs(gradient(path, target, jr.key(0))).max() < 1e-5
    assert np.abs(gradient(total, target, jr.key(0))).max() > 1e-2
    flow = perturbed(nsf(2, key=jr.key(0), layers=1, width=8, bins=3))
    keys = jr.split(jr.key(1), 400)
    a, b = (
        np.asarray(jax.lax.map(lambda k, o=o: gradient(o, flow, k), keys, batch_size=50))
        for o in (reverse_kl(banana, 64), reverse_kl(banana, 64, path_gradient=False))
    )
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert (np.abs(a.mean(0) - b.mean(0)) <= 5 * error + 1e-5).all()


@pytest.mark.slow
def test_doubly_reparametrised_gradient_has_the_same_mean():
    flow = perturbed(Flow(Normal((2,)), nsf(2, key=jr.key(0), layers=1, width=4, bins=3).bijection))
    keys = jr.split(jr.key(1), 600)
    a, b = (
        np.asarray(jax.lax.map(lambda k, o=o: gradient(o, flow, k), keys, batch_size=50))
        for o in (
            importance_weighted(banana, 32, 4),
            importance_weighted(banana, 32, 4, path_gradient=False),
        )
    )
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert (np.abs(a.mean(0) - b.mean(0)) <= 5 * error + 1e-5).all()
    assert np.abs(b.mean(0)).max() > 10 * np.median(error)


def test_importance_weighting_tightens_the_bound():
    wide = Normal((2,), 0.0, 3.0)
    truth = float(jnp.log(2 * 2 * jnp.pi))
    bounds = [
        float(importance_weighted(banana, 2000, k)(wide, None, jr.key(0))[1]["bound"])
        for k in (1, 8, 64)
    ]
    assert bounds[0] < bounds[1] < bounds[2] < truth + 0.02
    near = Normal((2,), 0.0, 1.0)
    one = importance_weighted(banana, 20_000, 1)(near, None, jr.key(0))[1]["bound"]
    elbo = reverse_kl(banana, 20_000)(near, None, jr.key(1))[1]["elbo"]
    assert float(one) == pytest.approx(float(elbo), abs=0.05)


def test_forward_kl_is_the_cross_entropy():
    target, flow = Normal((2,), 0.5, 1.0), Normal((2,), 0.0, 1.5)
    objective = forward_kl(lambda x: target._log_prob(x) - 4.0, 20_000)
    loss, aux = objective(flow, None, jr.key(0))
    cross = float(target.entropy(jr.key(1), 100_000).value + target.kl(flow, jr.key(2), 100_000)[0])
    assert float(loss) == pytest.approx(cross, abs=0.05)
    assert 0.3 < float(aux["ess"]) < 0.95
    # A proposal that never meets the support gives weight nowhere and no NaN gradient.
    cut = forward_kl(lambda x: jnp.where(x[0] > 0, target._log_prob(x), -jnp.inf), 256)
    assert np.isfinite(gradient(cut, flow, jr.key(3))).all()


def test_annealing_weighs_the_target_by_the_step():
    flow = Normal((2,), 0.5, 2.0)
    path = reverse_kl(banana, 64, anneal=linear_annealing(0.01, 100))
    plain = reverse_kl(banana, 64)
    x, log_q = flow._sample_and_log_prob(jr.key(0), (64,))
    log_p = jax.vmap(banana, in_axes=-1)(x)
    for step, beta in ((0, 0.01), (50, 0.51), (99, 1.0), (10_000, 1.0)):
        loss, aux = path(flow, None, jr.key(0), step=jnp.int32(step))
        assert float(loss) == pytest.approx(float((log_q - beta * log_p).mean()), rel=1e-4)
        assert float(aux["elbo"]) == pytest.approx(-float(plain(flow, None, jr.key(0))[0]))
    assert float(path(flow, None, jr.key(0))[0]) == pytest.approx(-float(aux["elbo"]))
    beta = geometric_annealing(0.01, 100)
    assert [float(beta(jnp.int32(t))) for t in (0, 50, 100, 200)] == pytest.approx(
        [0.01, 0.1, 1, 1]
    )
    with pytest.raises(InputError, match="starts at 0"):
        linear_annealing(0.0)


def test_importance_weighting_leaves_out_what_falls_outside_the_support():
    def boxed(x):
        return jnp.where((jnp.abs(x) < 1).all(), 0.0, -jnp.inf)

    flow = Normal((2,), 0.0, 1.0)
    for path in (True, False):
        objective = importance_weighted(boxed, 16, 16, path_gradient=path)
        assert np.isfinite(float(objective(flow, None, jr.key(0))[0]))
        assert np.isfinite(gradient(objective, flow, jr.key(0))).all()
