"""Surjections: exact where they claim it, bounds whose mean is the density, and honest labels."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import randomise

from laminar import io
from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, partition
from laminar.bijections.base import Identity, Invert, call
from laminar.bijections.compose import Chain, Independent, Indexed
from laminar.bijections.elementwise import Affine, Exp
from laminar.bijections.image import Positionwise
from laminar.bijections.linear import Triangular
from laminar.bijections.surjections import AbsoluteValue, Ordered, Slice, Sort
from laminar.diagnose import check
from laminar.distributions import ConditionalNormal, MultivariateNormal, Normal
from laminar.flow import Flow
from laminar.nn.mlp import MLP, Concatenated
from laminar.objectives import nll
from laminar.testing import check_bijection
from laminar.train.fit import fit

COVARIANCE = np.array([[1.0, 0.6, -0.3], [0.6, 1.5, 0.4], [-0.3, 0.4, 0.8]])
LOC = np.array([0.3, -1.0, 0.5])


def joint():
    return MultivariateNormal(LOC, COVARIANCE)


def law(dim, cond_dim, key, scale=0.2):
    """A normal whose mean and scale a random network sets."""
    net = randomise(MLP(cond_dim, (2, dim), key=key, width=8, depth=1), key, scale)
    return ConditionalNormal(net, dim, cond_dim)


def padded(q, loses="forward", dim=2):
    return Slice(q, dim, loses=loses)


# --- Slice ----------------------------------------------------------------------------------------


def test_padded_with_noise_the_mean_of_the_estimates_is_the_density():
    flow = Flow(joint(), padded(law(1, 2, jr.key(0))))
    assert flow.exactness == "bound"
    exact = MultivariateNormal(LOC[:2], COVARIANCE[:2, :2])
    for x in ([0.0, 0.0], [1.5, -2.0]):
        rows = jnp.broadcast_to(jnp.asarray(x), (40_000, 2))
        log_q = np.asarray(flow.log_prob(rows, key=jr.key(1)), np.float64)
        truth = float(exact.log_prob(jnp.asarray(x)))
        ratio = np.exp(log_q - truth)
        error = ratio.std() / math.sqrt(len(ratio))
        assert error < 0.02
        assert abs(ratio.mean() - 1) < 4 * error
        assert log_q.mean() < truth
    samples = flow.sample(jr.key(2), (20_000,))
    np.testing.assert_allclose(np.cov(samples.T), COVARIANCE[:2, :2], atol=0.06)


def test_under_the_true_conditional_nothing_is_lost():
    gain = COVARIANCE[2, :2] @ np.linalg.inv(COVARIANCE[:2, :2])
    spread = math.sqrt(COVARIANCE[2, 2] - gain @ COVARIANCE[:2, 2])

    def posterior(x):
        mean = LOC[2] + jnp.asarray(gain, x.dtype) @ (x - jnp.asarray(LOC[:2], x.dtype))
        return jnp.stack([mean, jnp.full_like(mean, 7 * math.atanh(math.log(spread) / 7))])[:, None]

    flow = Flow(joint(), padded(ConditionalNormal(posterior, 1, 2)))
    x = jr.normal(jr.key(0), (9, 2))
    exact = MultivariateNormal(LOC[:2], COVARIANCE[:2, :2])
    np.testing.assert_allclose(flow.log_prob(x, key=jr.key(1)), exact.log_prob(x), atol=1e-4)


def test_appended_entries_are_exact():
    q = law(1, 2, jr.key(0))
    flow = Flow(Normal(2), Chain([Triangular(2), padded(q, "inverse")]))
    assert flow.exactness == "exact"
    x, log_p = flow.sample_and_log_prob(jr.key(1), (7,))
    np.testing.assert_allclose(flow.log_prob(x), log_p, atol=1e-5)
    expected = Normal(2).log_prob(x[:, :2]) + q.log_prob(x[:, 2:], x[:, :2])
    np.testing.assert_allclose(log_p, expected, atol=1e-5)
    with pytest.raises(InputError, match="forward needs a random key"):
        flow.to_data(jnp.zeros((3, 2)))


def test_a_condition_and_later_axes_reach_the_law():
    net = randomise(MLP(2 * 2 + 3, (2, 1, 2), key=jr.key(0), width=8, depth=1), jr.key(0), 0.3)
    q = ConditionalNormal(net, (1, 2), (7,))
    transform = Slice(Frozen(q), (2, 2), loses="inverse", cond_dim=3)
    y = jr.normal(jr.key(1), (3, 2, 5))
    condition = jr.normal(jr.key(2), (3, 5))
    x, log_det = transform.inverse(y, condition)
    given = jnp.concatenate([y[:2].reshape(4, 5), condition])
    np.testing.assert_allclose(log_det, q._log_prob(y[2:], given), rtol=1e-6)
    assert x.shape == (2, 2, 5)
    shared, _ = transform.forward(x, condition[:, 0], key=jr.key(3))
    assert shared.shape == (3, 2, 5)
    assert not jax.tree_util.tree_leaves(partition(transform)[0])
    with pytest.raises(ShapeError, match="needs a condition"):
        transform.inverse(y)


# --- Signs and orders -----------------------------------------------------------------------------


def test_absolute_values_of_a_symmetric_latent_are_exact_whatever_is_drawn():
    flow = Flow(Normal(2, scale=jnp.array([0.5, 2.0])), AbsoluteValue(2, loses="forward"))
    x = jnp.abs(jr.normal(jr.key(0), (9, 2)))
    expected = flow.base.log_prob(x) + 2 * math.log(2)
    np.testing.assert_allclose(flow.log_prob(x, key=jr.key(1)), expected, rtol=1e-6)
    x = flow.sample(jr.key(2), (5,))
    assert bool((x >= 0).all())
    assert bool((flow.log_prob(-x - 1e-3, key=jr.key(1)) == -jnp.inf).all())


def test_absolute_values_of_a_shifted_latent_are_bounded():
    flow = Flow(Normal((), loc=0.5), AbsoluteValue(loses="forward"))
    for x in (0.1, 1.0):
        log_q = flow.log_prob(jnp.full((4000,), x), key=jr.key(0))
        both = jnp.array([x, -x])
        truth = float(jax.nn.logsumexp(flow.base.log_prob(both)))
        values = np.unique(np.asarray(log_q))
        assert len(values) == 2
        np.testing.assert_allclose(values, np.sort(flow.base.log_prob(both) + math.log(2)), 1e-5)
        ratio = np.exp(np.asarray(log_q, np.float64) - truth)
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
        assert float(log_q.mean()) < truth


def test_signs_with_a_law_of_their_own():
    net = randomise(MLP(2 + 1, 2, key=jr.key(0), width=8, depth=1), jr.key(0), 0.4)
    signs = AbsoluteValue(2, loses="inverse", net=Concatenated(net), cond_dim=1)
    signs = eqx.tree_at(lambda s: s.logits, signs, jnp.array([0.7, -0.2]))
    z, condition = jnp.exp(jr.normal(jr.key(1), (2, 5))), jr.normal(jr.key(2), (1, 5))
    total = 0.0
    for choice in itertools.product([-1.0, 1.0], repeat=2):
        x = jnp.asarray(choice)[:, None] * z
        back, log_q = signs.inverse(x, condition)
        np.testing.assert_array_equal(back, z)
        total = total + jnp.exp(log_q)
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)
    x, log_det = signs.forward(z, condition, key=jr.key(3))
    np.testing.assert_allclose(-log_det, signs.inverse(x, condition)[1], rtol=1e-6)


def test_the_edges_of_the_signs():
    signs = AbsoluteValue(2, loses="inverse")
    z, log_det = signs.forward(jnp.array([[-1.0, 1.0], [2.0, jnp.nan]]), key=jr.key(0))
    assert log_det[0] == -jnp.inf
    assert bool(jnp.isfinite(z[:, 0]).all())
    assert bool(jnp.isnan(z[1, 1]))
    for value in (0.0, 1e-30, 1e6):
        assert float(jax.grad(lambda x: signs.inverse(x)[0].sum())(jnp.full((2,), value))[0]) == 1


def test_sorted_draws():
    flow = Flow(Normal(3), Sort(3, loses="forward"))
    x = jnp.sort(jr.normal(jr.key(0), (9, 3)), axis=-1)
    expected = flow.base.log_prob(x) + math.log(6)
    np.testing.assert_allclose(flow.log_prob(x, key=jr.key(1)), expected, rtol=1e-5)
    assert bool((flow.log_prob(x[:, ::-1], key=jr.key(1)) == -jnp.inf).all())
    assert bool((jnp.diff(flow.sample(jr.key(2), (50,)), axis=-1) >= 0).all())


def test_exchangeable_data_of_ordered_latents():
    flow = Flow(Normal(3), Chain([Ordered(3), Sort(3, loses="inverse")]))
    x, log_p = flow.sample_and_log_prob(jr.key(0), (20,))
    np.testing.assert_allclose(flow.log_prob(x), log_p, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(flow.log_prob(x[:, [2, 0, 1]]), flow.log_prob(x), rtol=1e-6)
    first = np.asarray(jnp.argmin(flow.sample(jr.key(1), (3000,)), axis=-1))
    assert np.abs(np.bincount(first, minlength=3) / 3000 - 1 / 3).max() < 0.04


def test_rows_stay_together():
    rows = Sort((4, 2), loses="inverse")
    y = jr.normal(jr.key(0), (4, 2, 5))
    x, log_q = rows.inverse(y)
    for i in range(5):
        expected = sorted(np.asarray(y[:, :, i]).tolist())
        np.testing.assert_array_equal(x[:, :, i], expected)
    np.testing.assert_allclose(log_q, -math.log(24), rtol=1e-6)
    again, _ = rows.inverse(rows.forward(x, key=jr.key(1))[0])
    np.testing.assert_array_equal(again, x)


def test_ordered_vectors():
    with jax.enable_x64(True):
        ordered = Ordered(4)
        x = jr.normal(jr.key(0), (4, 6), jnp.float64)
        y, log_det = ordered.forward(x)
        assert bool((jnp.diff(y, axis=0) > 0).all())
        back, log_det_back = ordered.inverse(y)
        np.testing.assert_allclose(back, x, atol=1e-12)
        np.testing.assert_allclose(log_det_back, -log_det, atol=1e-12)
        jacobian = jax.jacfwd(lambda x: ordered.forward(x)[0])(x[:, 0])
        np.testing.assert_allclose(jnp.linalg.slogdet(jacobian)[1], log_det[0], atol=1e-12)
        x, log_det = ordered.inverse(jnp.array([0.0, 2.0, 1.0, 3.0]))
        assert bool(jnp.isfinite(x).all())
        assert log_det == -jnp.inf
        assert bool(jnp.isnan(ordered.inverse(jnp.array([0.0, jnp.nan, 1.0, 3.0]))[0]).any())


# --- All of them ----------------------------------------------------------------------------------


ALL = {
    "slice": lambda loses: padded(law(1, 2, jr.key(0)), loses),
    "absolute": lambda loses: AbsoluteValue(2, loses=loses),
    "sort": lambda loses: Sort((3, 2), loses=loses),
}


@pytest.mark.parametrize("loses", ["forward", "inverse"])
@pytest.mark.parametrize("name", ALL)
def test_shapes_keys_and_files(name, loses, tmp_path):
    transform = ALL[name](loses)
    draws = "inverse" if loses == "forward" else "forward"
    shape = transform.narrow
    x = jnp.sort(jnp.abs(jr.normal(jr.key(0), (*shape, 4, 2))), axis=0)
    with pytest.raises(InputError, match=f"{draws} needs a random key"):
        getattr(transform, draws)(x)
    z, log_det = getattr(transform, draws)(x, key=jr.key(1))
    assert z.shape == (*transform.wide, 4, 2)
    assert log_det.shape == (4, 2)
    again, log_det_back = getattr(transform, loses)(z)
    np.testing.assert_array_equal(again, x)
    np.testing.assert_allclose(log_det_back, -log_det, rtol=1e-5)
    one, _ = jax.vmap(lambda z: call(transform, loses, z), in_axes=-1, out_axes=-1)(z[..., 0, :])
    np.testing.assert_allclose(one, again[..., 0, :], rtol=1e-6)
    io.save(tmp_path / "map.lam", transform)
    loaded = io.load(tmp_path / "map.lam")
    np.testing.assert_array_equal(getattr(loaded, loses)(z)[0], again)


@pytest.mark.parametrize("name", ["slice", "absolute"])
def test_bounds_keep_the_contract(name):
    image = (0.0, math.inf) if name == "absolute" else (-math.inf, math.inf)
    report = check_bijection(ALL[name]("forward"), key=jr.key(0), image=image)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "transform",
    [
        Chain([Exp((2,)), AbsoluteValue(2, loses="inverse")]),
        Chain([Ordered(2), Sort(2, loses="inverse")]),
        AbsoluteValue(2, loses="forward"),
    ],
    ids=["signs", "exchangeable", "positive"],
)
def test_a_flow_of_them_passes_its_check(transform):
    report = check(Flow(Normal(2), transform), key=jr.key(0), n=128)
    assert report.passed, str(report)
    if report.lines and transform.exactness == "bound":
        assert report["log_prob is a lower bound"].passed
    else:
        assert report["density integrates to one"].passed


def test_what_has_no_meaning_is_refused():
    with pytest.raises(InputError, match="must be 'forward'"):
        Sort(3, loses="both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ShapeError, match="at least one axis"):
        Sort((), loses="forward")
    with pytest.raises(ShapeError, match="at least 1, not 0"):
        Ordered(0)
    with pytest.raises(InputError, match="leave out net"):
        AbsoluteValue(2, loses="forward", net=lambda x: x)
    with pytest.raises(InputError, match="nothing takes the condition"):
        AbsoluteValue(2, loses="inverse", cond_dim=1)
    with pytest.raises(ShapeError, match="must agree in all"):
        Slice(Normal((1, 2)), (2, 3), loses="forward")
    with pytest.raises(ShapeError, match=r"takes a condition \(3,\), but gets \(2,\)"):
        Slice(law(1, 3, jr.key(0)), 2, loses="forward")
    with pytest.raises(InputError, match="a bound one"):
        Slice(Flow(Normal(1), AbsoluteValue(1, loses="forward")), 2, loses="forward")


def test_training_reaches_the_flow_and_the_law_and_narrows_the_bound():
    rows = joint().sample(jr.key(0), (4000,))[:, :2]
    start = Chain([Affine(shape=(3,)), Triangular(3), padded(law(1, 2, jr.key(1), 0.05))])
    flow, _ = fit(
        jr.key(2),
        Flow(Frozen(Normal(3)), start),
        rows,
        objective=nll,
        steps=400,
        validation=0.2,
        progress=False,
    )
    before, after = partition(start)[0], partition(flow.bijection)[0]
    for a, b in zip(*map(jax.tree_util.tree_leaves, (before, after)), strict=True):
        assert not np.array_equal(a, b)
    best = -float(MultivariateNormal(LOC[:2], COVARIANCE[:2, :2]).log_prob(rows).mean())
    found = -float(flow.log_prob(rows, key=jr.key(3)).mean())
    assert best - 0.02 < found < best + 0.05


def test_what_draws_is_not_taken_for_a_bijection():
    """Exact as it is, it has no inverse, and parts that pass no key on cannot sample it."""
    signs = AbsoluteValue((3,), loses="inverse")
    makers = (
        lambda: Invert(signs),
        lambda: Invert(Chain([Identity((3,)), signs])),
        lambda: Positionwise(signs, (2, 2)),
        lambda: Independent(signs, 2),
        lambda: Indexed(signs, [0, 1, 2], 4),
    )
    for make in makers:
        with pytest.raises(ShapeError, match="draws what it samples"):
            make()
