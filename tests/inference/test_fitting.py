"""Posteriors: what is found, what is said of it, and what is refused."""

import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from laminar._errors import InputError, ShapeError
from laminar.bijections.elementwise import Affine
from laminar.density import AbstractDistribution
from laminar.distributions import MultivariateNormal, Normal
from laminar.flow import Flow
from laminar.inference import Assessment, as_target, fit_posterior
from laminar.inference.assessment import Gap, Missed, assess, find_gap, judge, missed, widen
from laminar.inference.fitting import _Fitter, _joined
from laminar.inference.walk import NO_DRIFT, find_drift
from laminar.inference.warmstart import Gaussians, find_gaussians
from laminar.objectives import linear_annealing
from laminar.report.posterior import plot_posterior

NOTHING = Missed(np.zeros(0, int))
Y = np.array([1.2, 0.7, 2.1, 1.4, 0.3])


def conjugate(y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", 5 if y is None else len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def two_modes(x):
    """Two round laws 8 standard deviations apart, of weights 0.7 and 0.3; normalised."""
    near = jnp.log(0.7) - 0.5 * ((x - 4) ** 2).sum()
    far = jnp.log(0.3) - 0.5 * ((x + 4) ** 2).sum()
    return jnp.logaddexp(near, far) - jnp.log(2 * jnp.pi)


def square(x):
    return -0.5 * (x**2).sum()


@pytest.fixture(scope="module")
def exact():
    return fit_posterior(jr.key(0), conjugate, Y, draws=4_000, progress=False)


def test_a_conjugate_posterior_is_found_with_its_evidence(exact):
    precision = 1 / 4 + len(Y)
    covariance = np.eye(5) + 4 * np.ones((5, 5))
    evidence = float(MultivariateNormal(np.zeros(5), covariance).log_prob(Y))
    assert float(exact.log_evidence.value) == pytest.approx(evidence, abs=2e-3)
    assert float(exact.elbo.value) == pytest.approx(evidence, abs=2e-3)
    assert exact.verdict.grade == "good"
    assert exact.ess > 3_900
    row = exact.summary()[0]
    assert row["name"] == "mu"
    assert row["mean"] == pytest.approx(Y.sum() / precision, abs=0.03)
    assert row["sd"] == pytest.approx(precision**-0.5, abs=0.02)
    assert float(exact.mean(lambda v: v["mu"] ** 2)) == pytest.approx(
        row["mean"] ** 2 + row["sd"] ** 2, rel=1e-5
    )
    assert "Good." in str(exact)
    assert "evidence" in str(exact)


def test_draws_and_densities_are_in_the_users_space(exact):
    draws = exact.sample(jr.key(1), (7, 2))
    assert draws["mu"].shape == (7, 2)
    log_q = exact.log_prob(draws)
    assert log_q.shape == (7, 2)
    truth = dist.Normal(Y.sum() / 5.25, 5.25**-0.5).log_prob(draws["mu"])
    np.testing.assert_allclose(log_q, truth, atol=0.02)
    again = exact.resample(jr.key(2), 500)["mu"]
    assert again.shape == (500,)
    assert exact.resample(jr.key(2), (3, 4))["mu"].shape == (3, 4)
    assert repr(exact) == str(exact)
    assert float(again.mean()) == pytest.approx(Y.sum() / 5.25, abs=0.06)


def test_the_way_to_arviz(exact):
    seen = exact.to_arviz(jr.key(1), 200)
    assert {"posterior", "log_likelihood", "posterior_predictive"} <= set(seen.groups())
    assert np.isfinite(exact.loo(jr.key(2), 200).elpd_loo)
    new = exact.predictive(jr.key(3), 50)
    assert new["y"].shape == (50, 5)


def test_figures_are_plain_values(exact, tmp_path):
    found = json.loads(json.dumps(exact.to_dict(), allow_nan=False))
    assert found["verdict"] == "good"
    assert found["draws"] == 4_000
    plot_posterior(exact, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 2_000


def test_the_density_of_constrained_values_integrates_to_one():
    target = as_target(
        lambda v: dist.Gamma(3.0, 2.0).log_prob(v["s"]),
        example={"s": ()},
        supports={"s": "positive"},
    )
    posterior = fit_posterior(jr.key(0), target, flow="normal", steps=300, draws=2_000)
    grid = np.linspace(1e-3, 12, 4_001)
    density = np.exp(np.asarray(posterior.log_prob({"s": grid})))
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.01)
    assert abs(float(posterior.log_evidence.value)) < 0.02


@pytest.fixture(scope="module")
def mixed():
    return fit_posterior(jr.key(3), two_modes, example=2, draws=4_000, progress=False)


def test_two_modes_far_apart_are_both_found(mixed):
    assert float(mixed.log_evidence.value) == pytest.approx(0, abs=0.03)
    assert mixed.verdict.grade == "good"
    right = float((mixed.resample(jr.key(0), 4_000)[:, 0] > 0).mean())
    assert right == pytest.approx(0.7, abs=0.03)


def test_a_lost_mode_is_never_called_good(mixed):
    one = Flow(Normal((2,)), Affine(jnp.full(2, 4.0), shape=(2,)))
    found = assess(jr.key(0), one, mixed.target, 4_000)
    # Its own draws show nothing.
    assert found.k_hat < 0.5
    assert found.ess > 3_900
    evidence = float(found.log_evidence.value)
    lost = missed(jr.key(1), one, mixed.target, mixed.places, evidence)
    assert len(lost.places) == 1
    verdict = judge(mixed.target, found, found, Gap(0.0, 0.0), NO_DRIFT, mixed.places, lost)
    assert verdict.grade == "do not trust"
    assert "misses" in str(verdict)
    assert len(missed(jr.key(1), mixed.flow, mixed.target, mixed.places, 0.0).places) == 0


def test_too_narrow_an_approximation_is_never_called_good():
    target = as_target(square, example=4)
    places = Gaussians(np.zeros((1, 4)), np.eye(4)[None], np.array([3.6]))
    for scale, grade in ((0.4, "do not trust"), (1.0, "good")):
        flow = Flow(Normal((4,)), Affine(jnp.zeros(4), jnp.full(4, scale)))
        found = assess(jr.key(0), flow, target, 4_000)
        gap = find_gap(jr.key(1), flow, target, found)
        assert judge(target, found, found, gap, NO_DRIFT, places, NOTHING).grade == grade
        assert gap.value > 0.1 if scale < 1 else not gap.significant
    # Two fifths too narrow, which the weights of its own draws do not tell as clearly.
    found = Assessment(np.zeros((1_000, 4)), np.zeros(1_000), np.zeros(1_000))
    assert (
        judge(target, found, found, Gap(0.2, 0.01), NO_DRIFT, places, NOTHING).grade
        == "do not trust"
    )
    assert (
        judge(target, found, found, Gap(0.03, 0.001), NO_DRIFT, places, NOTHING).grade
        == "usable after reweighting"
    )
    assert (
        judge(target, found, found, Gap(0.0, 0.0), NO_DRIFT, places, NOTHING, ["Fled."]).grade
        == "do not trust"
    )


def test_a_wider_proposal_makes_an_approximation_usable_not_good():
    target = as_target(square, example=2)
    places = Gaussians(np.zeros((1, 2)), np.eye(2)[None], np.zeros(1))
    narrow = Flow(Normal((2,)), Affine(jnp.zeros(2), jnp.full(2, 0.6)))
    own = assess(jr.key(0), narrow, target, 4_000)
    assert own.k_hat >= 0.5
    fitter = _Fitter(target, "auto", 6, 2, None, None, False)
    proposal, found = fitter.defend(jr.key(1), narrow, own)
    assert proposal is not narrow
    assert found.k_hat < 0.5
    assert float(found.log_evidence.value) == pytest.approx(np.log(2 * np.pi), abs=0.05)
    verdict = judge(target, own, found, Gap(0.0, 0.0), NO_DRIFT, places, NOTHING)
    assert verdict.grade == "usable after reweighting"
    assert "mixed with wider draws" in str(verdict)
    exact = Flow(Normal((2,)), Affine(jnp.zeros(2), jnp.ones(2)))
    own = assess(jr.key(0), exact, target, 4_000)
    assert fitter.defend(jr.key(1), exact, own) == (exact, own)


def test_weights_of_draws_that_fail_or_fall_outside():
    log_p = np.where(np.arange(1_000) < 100, -np.inf, 0.0)
    log_p[-1] = np.nan
    found = Assessment(np.zeros((1_000, 1)), np.zeros(1_000), log_p)
    assert found.failures == 1
    assert found.weights[:100].sum() == found.weights[-1] == 0
    assert found.weights.sum() == pytest.approx(1)
    assert found.ess == pytest.approx(899)
    assert float(found.log_evidence.value) == pytest.approx(np.log(0.899))
    target = as_target(square, example=1)
    places = Gaussians(np.zeros((1, 1)), np.eye(1)[None], np.zeros(1))
    verdict = judge(target, found, found, Gap(0.0, 0.0), NO_DRIFT, places, NOTHING)
    assert verdict.grade == "do not trust"
    assert "NaN or +∞ at 1 of 1,000" in str(verdict)
    nothing = Assessment(np.zeros((50, 1)), np.zeros(50), np.full(50, -np.inf))
    assert nothing.k_hat == np.inf
    assert nothing.ess == 0
    assert (
        judge(target, nothing, nothing, Gap(0.0, 0.0), NO_DRIFT, places, NOTHING).grade
        == "do not trust"
    )


def test_widening_keeps_a_density_and_reaches_farther():
    flow = Flow(Normal((2,)), Affine(jnp.ones(2), jnp.full(2, 2.0)))
    wide = widen(flow, 0.2, 1.5)
    assert wide.sample(jr.key(0), (20_000,)).std() > flow.sample(jr.key(0), (20_000,)).std()
    apart = float(wide.log_prob(jnp.ones(2)) - flow.log_prob(jnp.ones(2)))
    scale = 1 + 1.5 / np.sqrt(2)
    assert apart == pytest.approx(np.log(0.8 + 0.2 / scale**2), abs=1e-5)


def test_a_bound_that_runs_away_is_named():
    fitter = _Fitter(as_target(square, example=1), "auto", 6, 2, None, None, False)
    trail = [
        Assessment(np.linspace(-s, s, 100)[:, None], np.zeros(100), np.full(100, float(i)))
        for i, s in enumerate((1, 2, 4))
    ]
    fitter._look_for_flight(trail)
    assert "may be improper" in fitter.notes[0]
    fitter.notes.clear()
    fitter._look_for_flight(trail[:2])
    fitter._look_for_flight([trail[0]] * 3)
    assert fitter.notes == []


def test_climbs_end_at_laplace_approximations():
    covariance = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 0.5]])
    law = MultivariateNormal(np.array([1.0, -2.0, 0.5]), covariance)
    target = as_target(lambda x: law._log_prob(x), example=3)
    found = find_gaussians(jr.key(0), target.log_density, target.start(jr.key(1), 4))
    assert len(found.means) == 1
    np.testing.assert_allclose(found.means[0], [1.0, -2.0, 0.5], atol=1e-3)
    np.testing.assert_allclose(found.factors[0] @ found.factors[0].T, covariance, atol=1e-2)
    assert found.elbos[0] == pytest.approx(0, abs=1e-3)
    assert found.draw(np.zeros((5, 3))).shape == (1, 5, 3)


@jax.custom_vjp
def one_way(x):
    """½ x², for which only reverse mode is defined."""
    return 0.5 * x**2


one_way.defvjp(lambda x: (one_way(x), x), lambda x, g: (g * x,))


@pytest.mark.parametrize("dim", [3, 401])
def test_climbs_need_reverse_mode_alone(dim):
    target = as_target(lambda x: -4.0 * one_way(x).sum(), example=dim)
    found = find_gaussians(jr.key(0), target.log_density, target.start(jr.key(1), 2))
    factor = found.factors[0] if dim > 400 else np.diagonal(found.factors[0])
    np.testing.assert_allclose(factor, 0.5, rtol=0.02)


def test_high_dimensions_use_diagonal_laws():
    scale = jnp.linspace(0.5, 2.0, 450)
    target = as_target(lambda x: -0.5 * ((x / scale) ** 2).sum(), example=450)
    found = find_gaussians(jr.key(0), target.log_density, target.start(jr.key(1), 2))
    assert not found.dense
    np.testing.assert_allclose(found.factors[0], scale, rtol=1e-3)
    np.testing.assert_allclose(found.means[0], 0, atol=0.05)


def test_a_flow_of_ones_own_is_trained():
    def build(dim, key):
        return Flow(Normal((dim,)), Affine(shape=(dim,)))

    posterior = fit_posterior(
        jr.key(0), square, example=2, flow=build, steps=12, samples=16, draws=500
    )
    assert posterior.target.dim == 2
    assert np.isfinite(float(posterior.elbo.value))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"flow": "glow"}, InputError, "choose 'auto'"),
        ({"steps": 2}, InputError, "steps is 2"),
        ({"draws": 10.5}, InputError, "draws is 10.5"),
        ({"flow": lambda d, k: Normal((d,))}, InputError, "must make a Flow"),
        ({"flow": lambda d, k: Flow(Normal((3,)), Affine(shape=(3,)))}, ShapeError, r"\(3,\)"),
    ],
)
def test_what_cannot_be_used_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        fit_posterior(jr.key(0), square, example=2, **options)


def test_a_key_comes_first():
    for key in (0, square, np.zeros(3)):
        with pytest.raises(InputError, match="first argument is a random key"):
            fit_posterior(key, square, example=2)


def test_a_target_without_a_density_is_refused():
    with pytest.raises(InputError, match="NaN"):
        fit_posterior(jr.key(0), lambda x: jnp.log(x).sum(), example=2)


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["planar", "iaf", "realnvp", "coupling"])
def test_every_named_flow_finds_a_banana(flow):
    def banana(x):
        return -0.5 * (x[0] / 2) ** 2 - 0.5 * (x[1] - 0.3 * x[0] ** 2) ** 2

    found = fit_posterior(jr.key(0), banana, example=2, flow=flow, draws=4_000)
    truth = float(jnp.log(4 * jnp.pi))
    assert float(found.log_evidence.value) == pytest.approx(truth, abs=0.15)
    if flow != "planar":
        assert found.verdict.grade != "do not trust"
    with jax.numpy_dtype_promotion("standard"):
        assert np.isfinite(np.asarray(found.draws)).all()


def test_many_dimensions_hide_no_mode():
    """Eight standard deviations stay eight, however many dimensions there are beside."""

    def two(x):
        ahead = x.at[0].add(-4.0)
        behind = x.at[0].add(4.0)
        return jnp.logaddexp(-0.5 * (ahead**2).sum(), -0.5 * (behind**2).sum())

    target = as_target(two, example=12)
    places = find_gaussians(jr.key(0), target.log_density, target.start(jr.key(1), 8))
    assert len(places.means) == 2
    one = Flow(Normal((12,)), Affine(jnp.zeros(12).at[0].set(4.0), jnp.ones(12)))
    found = assess(jr.key(2), one, target, 2_000)
    evidence = float(found.log_evidence.value)
    assert len(missed(jr.key(3), one, target, places, evidence).places) == 1


def test_a_skewed_mode_that_its_normal_law_fits_badly_is_missed_too():
    """Its bound is many nats too low, but importance sampling from the law finds the mass."""

    def two(x):
        gamma = (x - 0.0 - jnp.exp(x)).sum()
        away = -0.5 * ((x - 10) ** 2).sum() - 0.5 * 20 * jnp.log(2 * jnp.pi)
        return jnp.logaddexp(gamma, away)

    target = as_target(two, example=20)
    starts = jnp.concatenate([jnp.full((2, 20), 10.5), jnp.full((2, 20), 0.3)])
    places = find_gaussians(jr.key(0), target.log_density, starts)
    one = Flow(Normal((20,)), Affine(jnp.full(20, 10.0), jnp.ones(20)))
    evidence = float(assess(jr.key(2), one, target, 2_000).log_evidence.value)
    assert places.elbos.min() < evidence - 1
    assert len(missed(jr.key(3), one, target, places, evidence).places) == 1


def test_a_proposal_that_wastes_its_draws_is_not_called_good():
    target = as_target(square, example=1)
    places = Gaussians(np.zeros((1, 1)), np.ones((1, 1, 1)), np.zeros(1))
    for scale, grade in ((3.0, "usable after reweighting"), (60.0, "do not trust")):
        wide = Flow(Normal((1,)), Affine(jnp.zeros(1), jnp.full(1, scale)))
        found = assess(jr.key(0), wide, target, 4_000)
        assert found.k_hat < (0.5 if scale < 10 else np.inf)
        assert judge(target, found, found, Gap(0.0, 0.0), NO_DRIFT, places, NOTHING).grade == grade


def test_wider_draws_that_fail_are_told():
    target = as_target(square, example=1)
    places = Gaussians(np.zeros((1, 1)), np.ones((1, 1, 1)), np.zeros(1))
    fine = assess(jr.key(0), Flow(Normal((1,)), Affine(shape=(1,))), target, 1_000)
    verdict = judge(target, fine, fine, Gap(0.0, 0.0, 3), NO_DRIFT, places, NOTHING)
    assert verdict.grade == "do not trust"
    assert "3 of 1,000 wider draws" in str(verdict)
    assert Gap(float("nan"), 0.1).significant
    assert Gap(0.5, float("nan")).significant


@pytest.mark.slow
def test_the_first_round_is_annealed_when_asked():
    seen = []

    def schedule(step):
        seen.append(step)
        return linear_annealing(over=10)(step)

    found = fit_posterior(
        jr.key(0), two_modes, example=2, flow="planar", steps=60, draws=500, anneal=schedule
    )
    assert seen
    assert np.isfinite(float(found.elbo.value))


class Failing(AbstractDistribution):
    """The unit normal law, whose density cannot be computed at one point of every hundred."""

    normal: Normal
    everywhere: bool = False
    cond_shape: None = None

    @property
    def shape(self):
        return self.normal.shape

    @property
    def exactness(self):
        return "exact"

    def _sample(self, key, batch, condition=None):
        return self.normal._sample(key, batch, condition)

    def _sample_and_log_prob(self, key, batch, condition=None):
        return self.normal._sample_and_log_prob(key, batch, condition)

    def _log_prob(self, x, condition=None, *, key=None):
        fails = jnp.floor(jnp.abs(x[0]) * 1e4) % 100 == 7
        fails = fails | self.everywhere
        return jnp.where(fails, jnp.nan, self.normal._log_prob(x, condition))


def test_densities_that_fail_now_and_then_are_told_and_do_not_decide():
    target = as_target(square, example=3)
    places = find_gaussians(jr.key(0), target.log_density, target.start(jr.key(1), 8))
    flow = Failing(Normal((3,)))
    found = assess(jr.key(2), flow, target, 2_000)
    evidence = float(found.log_evidence.value)
    lost = missed(jr.key(3), flow, target, places, evidence)
    assert len(lost.places) == 0
    assert lost.failures > 0
    assert len(missed(jr.key(3), Failing(Normal((3,)), True), target, places, evidence).places)
    drift = find_drift(jr.key(4), flow, target, found.z, found.log_p, found.weights, evidence)
    assert not drift.significant
    verdict = judge(target, found, found, Gap(0.0, 0.0), drift, places, lost)
    assert verdict.grade == "usable after reweighting"
    assert f"could not be computed at {lost.failures} of" in str(verdict)


def test_large_evidences_weigh_the_parts_of_a_mixture():
    flow = Flow(Normal((1,)), Affine(shape=(1,)))
    mixed = _joined([flow, flow], [-1e7 - 0.3, -1e7])
    weights = jax.nn.softmax(mixed.logits)
    np.testing.assert_allclose(weights, [1 / (1 + np.exp(0.3)), 1 / (1 + np.exp(-0.3))], rtol=1e-5)


@pytest.mark.slow
def test_training_that_fails_leaves_the_normal_law_and_says_so():
    def holes(x):
        # Finite at the start and where a normal law is, NaN where the flow must go.
        return jnp.where(jnp.abs(x[0]) < 2, -0.5 * (x**2).sum(), jnp.log(-1.0 + 0 * x[0]))

    target = as_target(holes, example=2)
    fitter = _Fitter(target, "planar", 12, 8, None, None, False)
    place = Gaussians(np.zeros((1, 2)), np.eye(2)[None] * 5, np.zeros(1))
    flow, found = fitter._fit_one(jr.key(0), place)
    assert found.failures > 0
    assert isinstance(flow, Flow)
    assert "Training failed" in fitter.notes[0]


def test_draws_without_weight_do_not_spoil_averages():
    def cut(x):
        return jnp.where(x[0] > -1.5, -0.5 * (x**2).sum(), -jnp.inf)

    posterior = fit_posterior(jr.key(0), cut, example=2, draws=2_000, steps=6, progress=False)
    assert (posterior.weights == 0).any()
    assert np.isfinite(posterior.mean(lambda v: jnp.log(v[0] + 1.5)))
    assert all(np.isfinite(row["sd"]) for row in posterior.summary())


def test_too_few_draws_are_refused():
    with pytest.raises(InputError, match="draws is 150; give a whole number of at least 400"):
        fit_posterior(jr.key(0), square, example=1, draws=150)
