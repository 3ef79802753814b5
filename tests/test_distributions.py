"""Densities against scipy, quadrature, the public doors, chunks and mixtures."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats as st
from hypothesis import given, settings
from hypothesis import strategies as hs

from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, trainable
from laminar._typing import Shape
from laminar.distributions import (
    AbstractDistribution,
    ConditionalNormal,
    GaussianMixture,
    IsotropicMixture,
    Logistic,
    Mixture,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
)

RNG = np.random.default_rng(0)
LOC = np.array([0.3, -1.0])
SCALE = np.array([0.7, 2.0])
COVARIANCE = np.array([[1.5, -0.6], [-0.6, 0.5]])
WEIGHTS = np.array([0.2, 0.5, 0.3])
MEANS = RNG.normal(size=(3, 2))
COVARIANCES = np.stack([COVARIANCE, np.eye(2), np.array([[0.2, 0.1], [0.1, 0.3]])])


def gaussian_mixture_log_pdf(x):
    parts = [
        w * st.multivariate_normal(m, c).pdf(x)
        for w, m, c in zip(WEIGHTS, MEANS, COVARIANCES, strict=True)
    ]
    return np.log(sum(parts))


def kernel_log_pdf(x):
    return np.log(
        sum(w * st.norm(m, 0.5).pdf(x).prod(-1) for w, m in zip(WEIGHTS, MEANS, strict=True))
    )


def stacked_normals(count=3):
    return eqx.filter_vmap(lambda m: Normal((2,), m, 0.5))(jnp.asarray(MEANS[:count], float))


# One line each: a distribution on ℝ², made in the current precision, and its log-density.
CASES = {
    "normal": (
        lambda: Normal((2,), LOC, SCALE),
        lambda x: st.norm(LOC, SCALE).logpdf(x).sum(-1),
    ),
    "uniform": (
        lambda: Uniform((2,), LOC - SCALE, LOC + SCALE),
        lambda x: st.uniform(LOC - SCALE, 2 * SCALE).logpdf(x).sum(-1),
    ),
    "logistic": (
        lambda: Logistic((2,), LOC, SCALE),
        lambda x: st.logistic(LOC, SCALE).logpdf(x).sum(-1),
    ),
    "student": (
        lambda: StudentT((2,), np.array([2.5, 40.0]), LOC, SCALE),
        lambda x: st.t(np.array([2.5, 40.0]), LOC, SCALE).logpdf(x).sum(-1),
    ),
    "multivariate": (
        lambda: MultivariateNormal(LOC, COVARIANCE),
        lambda x: st.multivariate_normal(LOC, COVARIANCE).logpdf(x),
    ),
    "gaussian mixture": (
        lambda: GaussianMixture(WEIGHTS, MEANS, COVARIANCES),
        gaussian_mixture_log_pdf,
    ),
    "isotropic mixture": (lambda: IsotropicMixture(MEANS, 0.5, WEIGHTS), kernel_log_pdf),
    "mixture": (
        lambda: Mixture([Normal((2,), LOC, SCALE), Frozen(Logistic((2,)))], np.log([0.25, 0.75])),
        lambda x: np.log(
            0.25 * st.norm(LOC, SCALE).pdf(x).prod(-1) + 0.75 * st.logistic.pdf(x).prod(-1)
        ),
    ),
    "stacked mixture": (lambda: Mixture(stacked_normals(), np.log(WEIGHTS)), kernel_log_pdf),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 3e-6), (True, 1e-12)])
def test_densities_agree_with_scipy(case, x64, tolerance):
    make, reference = case
    x = RNG.normal(size=(50, 4, 2)) * 1.2
    with jax.enable_x64(x64):
        dist = make()
        log_p = dist.log_prob(x)
        draws, log_q = dist.sample_and_log_prob(jr.key(0), (7, 3))
        again = dist.log_prob(draws)
    assert log_p.dtype == draws.dtype == (np.float64 if x64 else np.float32)
    assert log_p.shape == (50, 4)
    assert draws.shape == (7, 3, 2)
    np.testing.assert_allclose(log_p, reference(x), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(log_q, again, rtol=3 * tolerance, atol=3 * tolerance)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"student"}))
def test_densities_integrate_to_one_and_draws_have_their_moments(name):
    dist = CASES[name][0]()
    axis = np.linspace(-40, 40, 1601)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    mass = np.exp(np.asarray(dist.log_prob(grid), np.float64)) * (axis[1] - axis[0]) ** 2
    # The edges of a uniform law fall between grid points.
    assert mass.sum() == pytest.approx(1, abs=0.06 if name == "uniform" else 1e-4)
    mean = (mass[..., None] * grid).sum((0, 1)) / mass.sum()
    centred = grid - mean
    covariance = np.einsum("ij,ija,ijb->ab", mass, centred, centred) / mass.sum()
    draws = np.asarray(dist.sample(jr.key(1), (40_000,)), np.float64)
    error = np.sqrt(np.diag(covariance) / len(draws))
    assert (np.abs(draws.mean(0) - mean) < 5 * error + 0.05 * (name == "uniform")).all()
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.05 * covariance.max())


def test_student_draws_follow_their_law():
    dist = StudentT((), 3.0, 1.0, 2.0)
    draws = np.asarray(dist.sample(jr.key(0), (20_000,)), np.float64)
    assert st.kstest(draws, st.t(3, 1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("df", [0.1, 1.0, 30.0, 1e4, 1e7])
def test_student_keeps_its_digits_at_any_df(df):
    x = np.array([0.0, 0.5, 3.0, 1e4, 1e12])
    np.testing.assert_allclose(
        StudentT((), df).log_prob(x), st.t(df).logpdf(x), rtol=2e-5, atol=2e-6
    )


def test_gradients_reach_every_trained_parameter(case):
    dist = case[0]()
    # Far points too: there densities underflow, and gradients must stay numbers.
    far = np.array([[1e3, -1e3], [1e6, -1e6], [1e15, -1e15]])
    x = jnp.asarray(np.concatenate([RNG.normal(size=(20, 2)), far]), float)
    params, static = eqx.partition(dist, trainable(dist))

    def loss(params, x):
        dist = eqx.combine(params, static)
        return dist.log_prob(x).sum()

    grads, grad_x = jax.grad(loss, argnums=(0, 1))(params, x)
    grads = jax.tree_util.tree_leaves(grads)
    assert all(np.isfinite(g).all() for g in grads)
    assert all(np.abs(g).sum() > 0 for g in grads)
    assert np.isfinite(grad_x).all()


def test_draws_are_differentiable():
    """d E[x²] / d parameter, against closed forms: 2 scale² for ln scale, through ν for Student."""

    def second_moment(dist):
        return (dist.sample(jr.key(0), (20_000,)) ** 2).mean()

    grad = eqx.filter_grad(second_moment)(Normal((), 0.0, 1.5))
    assert float(grad.log_scale) == pytest.approx(2 * 1.5**2, rel=0.05)

    def absolute(dist):
        return jnp.abs(dist.sample(jr.key(0), (20_000,))).mean()

    t = StudentT((), 6.0)
    step = 1e-3
    exact = (st.t(6 + step).expect(np.abs) - st.t(6 - step).expect(np.abs)) / (2 * step)
    slope = jax.nn.sigmoid(t.raw_df + jnp.log(jnp.expm1(1.0)))
    assert float(eqx.filter_grad(absolute)(t).raw_df / slope) == pytest.approx(exact, rel=0.2)


def test_infinite_rows_are_outside_and_nan_stays(case):
    dist = case[0]()
    x = jnp.array([[jnp.inf, 0.1], [0.1, -jnp.inf], [jnp.nan, 0.1], [jnp.inf, jnp.nan], [0.1, 0.2]])
    log_p = np.asarray(dist.log_prob(x))
    assert (log_p[:2] == -np.inf).all()
    assert np.isnan(log_p[2:4]).all()
    assert np.isfinite(log_p[4])
    safe = jnp.concatenate([x[:2], x[4:]])
    grads = eqx.filter_grad(lambda args: args[0].log_prob(args[1]).sum())((dist, safe))
    leaves = jax.tree_util.tree_leaves(eqx.filter(grads, eqx.is_inexact_array))
    assert all(np.isfinite(g).all() for g in leaves)
    assert (np.asarray(grads[1][:2]) == 0).all()


def test_edges_belong_to_the_uniform():
    dist = Uniform((), -1.0, 1.0)
    np.testing.assert_array_equal(
        np.exp(dist.log_prob(np.array([-1.0, 1.0, 1.0001]))), [0.5, 0.5, 0]
    )
    assert jax.tree_util.tree_leaves(eqx.filter(dist, trainable(dist))) == []
    assert np.isnan(dist._log_prob(jnp.array(jnp.nan)))


def test_kernel_density_is_exact_beside_a_far_mean():
    """Expanding ‖x − μ‖² would lose all digits here."""
    far = np.array([[1e4, -1e4], [0.0, 0.0]], np.float32)
    dist = IsotropicMixture(far, 0.1)
    at_mean = -np.log(2) - np.log(2 * np.pi * 0.01)
    assert float(dist.log_prob(far[0])) == pytest.approx(at_mean, rel=1e-6)
    x = jnp.asarray(RNG.normal(size=(5, 2)), float)
    dist = IsotropicMixture(MEANS, 0.5, WEIGHTS)
    step = jnp.zeros_like(x).at[:, 0].set(1e-2)
    numeric = (dist.log_prob(x + step) - dist.log_prob(x - step)) / 2e-2
    exact = jax.jvp(dist.log_prob, (x,), (jnp.ones_like(x).at[:, 1].set(0),))[1]
    np.testing.assert_allclose(exact, numeric, rtol=2e-3, atol=1e-3)


def test_mixture_loads_a_fit_of_scikit_learn():
    sklearn_mixture = pytest.importorskip("sklearn.mixture")
    data = RNG.normal(size=(400, 4)) @ RNG.normal(size=(4, 4))
    for kind in ("full", "diag", "spherical"):
        fit = sklearn_mixture.GaussianMixture(3, covariance_type=kind, random_state=0).fit(data)
        ours = GaussianMixture(fit.weights_, fit.means_, fit.covariances_)
        np.testing.assert_allclose(ours.log_prob(data), fit.score_samples(data), atol=2e-4)
        np.testing.assert_allclose(ours.weights, fit.weights_, rtol=1e-5)


def test_a_component_of_weight_zero_is_never_drawn():
    dist = GaussianMixture([0.0, 1.0, 0.0], [[50.0], [0.0], [-50.0]])
    assert np.abs(dist.sample(jr.key(0), (5000,))).max() < 10
    grads = eqx.filter_grad(lambda d: d.log_prob(jnp.zeros((3, 1))).sum())(dist)
    assert np.isfinite(grads.logits).all()


def test_mixture_outside_every_support_has_zero_gradients():
    dist = Mixture([Uniform((1,)), Uniform((1,), 2, 3)])
    x = jnp.array([[0.5], [1.5], [2.5]])
    np.testing.assert_allclose(np.exp(dist.log_prob(x)), [0.5, 0, 0.5])
    grads = eqx.filter_grad(lambda d: d.log_prob(x)[1])(dist)
    np.testing.assert_array_equal(grads.logits, 0)


class Counted(AbstractDistribution):
    """A normal law that counts how often its density is traced."""

    loc: jax.Array
    shape: Shape = eqx.field(static=True, default=(2,))
    cond_shape: Shape | None = eqx.field(static=True, default=None)
    traces: ClassVar[list] = []

    def _log_prob(self, x, condition=None, *, key=None):
        self.traces.append(x.shape)
        shift = 0 if condition is None else condition.reshape((2, -1))
        return -0.5 * ((x - self.loc[:, None] - shift) ** 2).sum(0)

    def _sample(self, key, batch=(), condition=None):
        noise = jr.normal(key, (2, *batch))
        return noise if condition is None else noise + condition.reshape((2, -1))


def test_one_trace_serves_all_chunks_and_all_counts():
    dist = Counted(jnp.zeros(2))
    Counted.traces.clear()
    for rows in (64, 100, 1000):
        dist.log_prob(np.zeros((rows, 2)), batch_size=16)
    dist.log_prob(np.ones((100, 2)), batch_size=16)
    assert Counted.traces == [(2, 16)]


def test_chunks_are_chosen_from_the_size_of_an_event():
    dist = Counted(jnp.zeros(2))
    Counted.traces.clear()
    dist.log_prob(np.zeros((70_000, 2)))
    ((_, rows),) = Counted.traces
    assert rows < 70_000
    assert 2 * rows >= 70_000
    assert dist.sample(jr.key(0), (70_000,)).shape == (70_000, 2)


@settings(max_examples=12, deadline=None)
@given(
    x_batch=hs.sampled_from([(), (1,), (5,), (3, 1), (3, 5), (0,)]),
    cond_batch=hs.sampled_from([None, (), (1,), (5,), (3, 1), (2, 3, 5)]),
    size=hs.sampled_from([None, 1, 4, 64]),
)
def test_shape_rules(x_batch, cond_batch, size):
    loc = jnp.array([0.5, -0.5])
    dist = Counted(loc, (2,), None if cond_batch is None else (2,))
    x = RNG.normal(size=(*x_batch, 2))
    c = None if cond_batch is None else RNG.normal(size=(*cond_batch, 2))
    try:
        target = np.broadcast_shapes(x_batch, cond_batch or ())
    except ValueError:
        with pytest.raises(ShapeError, match="do not broadcast"):
            dist.log_prob(x, c, batch_size=size)
        return
    log_p = dist.log_prob(x, c, batch_size=size)
    expected = -0.5 * ((x - np.array([0.5, -0.5]) - (0 if c is None else c)) ** 2).sum(-1)
    assert log_p.shape == target
    np.testing.assert_allclose(log_p, np.broadcast_to(expected, target), rtol=1e-5)
    draws = dist.sample(jr.key(0), x_batch, c, batch_size=size)
    assert draws.shape == (*x_batch, *(cond_batch or ()), 2)


def test_drawn_rows_meet_their_own_condition():
    dist = Counted(jnp.zeros(2), (2,), (2,))
    means = np.array([[0.0, 100.0], [200.0, 300.0], [400.0, 500.0]])
    for size in (None, 4):
        draws = dist.sample(jr.key(0), (50,), means, batch_size=size)
        assert draws.shape == (50, 3, 2)
        assert np.abs(np.asarray(draws) - means).max() < 6


@pytest.mark.parametrize("name", ["normal", "gaussian mixture", "stacked mixture"])
def test_chunks_have_the_gradients_of_the_whole(name):
    dist = CASES[name][0]()
    x = jnp.asarray(LOC + 0.5 * RNG.uniform(-1, 1, size=(11, 2)), float)

    def grads(size):
        return eqx.filter_grad(lambda d: d.log_prob(x, batch_size=size).sum())(dist)

    for a, b in zip(*(jax.tree_util.tree_leaves(grads(n)) for n in (None, 4)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_conditional_normal_takes_any_network():
    class Net(eqx.Module):
        batch_last: ClassVar[bool] = True
        weight: jax.Array

        def __call__(self, c):
            return jnp.tensordot(self.weight, c, 1)

    weight = jr.normal(jr.key(0), (6, 2))
    known = ConditionalNormal(Net(weight), (3,), (2,), limit=2.0)
    plain = ConditionalNormal(lambda c: (weight @ c).reshape(2, 3), 3, 2, limit=2.0)
    x, c = RNG.normal(size=(20, 3)), RNG.normal(size=(20, 2)) * 3
    out = c @ np.asarray(weight).T
    expected = st.norm(out[:, :3], np.exp(2 * np.tanh(out[:, 3:] / 2))).logpdf(x).sum(-1)
    for dist in (known, plain):
        np.testing.assert_allclose(dist.log_prob(x, c), expected, rtol=2e-4)
        draws, log_q = dist.sample_and_log_prob(jr.key(0), (4,), c)
        assert draws.shape == (4, 20, 3)
        np.testing.assert_allclose(dist.log_prob(draws, c), log_q, rtol=1e-4, atol=1e-4)
        one = dist.log_prob(x, c[0])
        np.testing.assert_allclose(one[0], expected[0], rtol=2e-4)
    with pytest.raises(ShapeError, match=r"gives \(6, 20\)"):
        ConditionalNormal(Net(weight), (4,), (2,)).log_prob(RNG.normal(size=(20, 4)), c)


def test_entropy_and_kl_come_with_their_errors():
    p, q = Normal((2,), 0.0, 1.0), Normal((2,), 0.5, 2.0)
    entropy = p.entropy(jr.key(0), 20_000)
    assert abs(entropy.value - (1 + np.log(2 * np.pi))) < 4 * entropy.error
    assert 0 < entropy.error < 0.02
    kl = p.kl(q, jr.key(1), 20_000)
    exact = 2 * (np.log(2) + (1 + 0.25) / 8 - 0.5)
    assert abs(kl.value - exact) < 4 * kl.error
    assert p.kl(p, jr.key(2), 10).value == 0


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (
            lambda: Normal((3,)).log_prob(np.zeros((5, 4))),
            ShapeError,
            r"Normal: x has shape \(5, 4\)",
        ),
        (lambda: Normal((3,)).log_prob(0.0), ShapeError, r"\(\).*\(3,\)"),
        (lambda: Normal((3,), np.zeros(2)), ShapeError, r"loc has shape \(2,\).*\(3,\)"),
        (lambda: Normal((3,), 0.0, -1.0), InputError, "scale must be positive"),
        (lambda: StudentT((), df=0.0), InputError, "df must be positive"),
        (lambda: Uniform((2,), 1.0, [2.0, 0.5]), InputError, "above its lo"),
        (lambda: MultivariateNormal(0.0), ShapeError, "vector"),
        (lambda: MultivariateNormal(LOC, np.eye(3)), ShapeError, r"\(3, 3\).*\(2, 2\)"),
        (lambda: MultivariateNormal(LOC, -np.eye(2)), InputError, "positive definite"),
        (lambda: GaussianMixture(WEIGHTS, LOC), ShapeError, r"\(K, D\)"),
        (lambda: GaussianMixture(WEIGHTS, MEANS[:2]), ShapeError, "2 components"),
        (lambda: GaussianMixture(WEIGHTS, MEANS, np.eye(2)), ShapeError, r"\(3, 2, 2\)"),
        (lambda: GaussianMixture(WEIGHTS, MEANS, -COVARIANCES), InputError, "positive definite"),
        (lambda: GaussianMixture(-WEIGHTS, MEANS), InputError, "non-negative"),
        (lambda: IsotropicMixture(MEANS, -1.0), InputError, "positive"),
        (lambda: IsotropicMixture(MEANS, np.ones(2)), ShapeError, r"\(2,\)"),
        (lambda: IsotropicMixture(LOC), ShapeError, r"\(K, D\)"),
        (lambda: Mixture([]), ShapeError, "at least one"),
        (lambda: Mixture([Normal((2,)), Normal((3,))]), ShapeError, r"component 1 \(Normal\)"),
        (lambda: Mixture([Normal((2,))], np.zeros(3)), ShapeError, "1 components"),
        (lambda: Mixture(stacked_normals(), np.zeros(2)), ShapeError, "3 components"),
        (lambda: Mixture(Normal(())), ShapeError, "leading component axis"),
        (lambda: Normal(()).log_prob(0.0, np.zeros(2)), InputError, "takes no condition"),
        (
            lambda: ConditionalNormal(lambda c: c, 1, 2).log_prob(np.zeros(1)),
            InputError,
            r"needs a condition of shape \(2,\)",
        ),
        (
            lambda: ConditionalNormal(lambda c: c, 1, 2).log_prob(np.zeros(1), np.zeros(3)),
            ShapeError,
            r"condition has shape \(3,\)",
        ),
        (lambda: Normal(()).log_prob(np.zeros(3), batch_size=0), InputError, "batch_size"),
        (lambda: Normal((2,)).kl(Normal((3,)), jr.key(0)), ShapeError, "events of shape"),
    ],
)
def test_errors_name_the_part_and_say_what_to_do(act, error, match):
    with pytest.raises(error, match=match):
        act()


def test_mixture_of_conditional_components():
    flows = eqx.filter_vmap(Scaled)(jnp.array([1.0, 3.0]))
    dist = Mixture(flows)
    assert dist.cond_shape == (1,)
    x, c = RNG.normal(size=(9, 1)), RNG.normal(size=(9, 1))
    expected = np.log(0.5 * st.norm(c, 1).pdf(x) + 0.5 * st.norm(3 * c, 1).pdf(x))[:, 0]
    np.testing.assert_allclose(dist.log_prob(x, c), expected, rtol=1e-5)
    assert dist.sample(jr.key(0), (4,), c).shape == (4, 9, 1)


class Scaled(AbstractDistribution):
    """N(w c, 1), so that stacked components can differ."""

    weight: jax.Array
    shape: Shape = eqx.field(static=True, default=(1,))
    cond_shape: Shape = eqx.field(static=True, default=(1,))

    def _log_prob(self, x, condition=None, *, key=None):
        return Normal((1,))._log_prob(x - self.weight * condition)

    def _sample(self, key, batch=(), condition=None):
        return jr.normal(key, (1, *batch)) + self.weight * condition


@pytest.mark.parametrize("first", [jnp.zeros(2), 0.0, [0.5, 1.0]])
def test_parameters_in_the_place_of_a_shape_are_told(first):
    with pytest.raises(ShapeError, match="first argument of a distribution is the shape of an"):
        Normal(first)
    assert Normal(np.int64(3)).shape == Normal([np.int32(3)]).shape == (3,)
