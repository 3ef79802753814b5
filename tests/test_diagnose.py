"""The check passes what is right and catches one planted fault for each of its claims."""

import json
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from scipy import stats

import laminar
from laminar._errors import InputError, ShapeError
from laminar._params import trainable
from laminar._typing import Shape
from laminar.bijections.base import AbstractBijection
from laminar.bijections.compose import Chain, repeat
from laminar.bijections.elementwise import Affine, Exp, Sigmoid, SinhArcsinh
from laminar.bijections.linear import LU
from laminar.density import AbstractDistribution
from laminar.diagnose import check, integrate
from laminar.diagnose.integrate import Scale
from laminar.distributions import Normal, StudentT, Uniform
from laminar.flow import Flow
from laminar.mixtures import GaussianMixture, Mixture
from laminar.zoo import nsf

KEY = jr.key(0)
INTEGRAL, SAMPLES = "density integrates to one", "samples follow the density"
JACOBIAN, AGREE = "log-det is the Jacobian's", "log_prob is sample_and_log_prob's"
TRIP = "data → latent → data"


def shake(tree, key, size=0.3):
    """Random parameters of order `size` in place of the identity."""
    dynamic, static = eqx.partition(tree, trainable(tree))
    leaves, structure = jtu.tree_flatten(dynamic)
    keys = jr.split(key, len(leaves))
    moved = [x + size * jr.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jtu.tree_unflatten(structure, moved), static)


def simple(dim=2):
    """A quick flow with every kind of entry in its Jacobian."""
    parts = [repeat(lambda key: LU(dim, key=key), 2, key=KEY), SinhArcsinh(shape=(dim,))]
    return Flow(Normal(dim), shake(Chain(parts), jr.key(1), 0.2))


def failed(report):
    return {line.name for line in report.lines if line.passed is False}


# --- What is right passes -------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 3])
def test_good_flows_pass(dim):
    report = check(simple(dim), key=KEY)
    assert report.passed, str(report)
    assert all(line.passed for line in report.lines)


@pytest.mark.slow
def test_a_neural_flow_with_a_condition_and_data():
    flow = shake(nsf(2, key=KEY, layers=2, width=8, depth=1, bins=4, cond_dim=1), jr.key(1), 0.2)
    condition = jr.normal(jr.key(2), (50, 1))
    data = flow.sample(jr.key(3), (), condition)
    report = check(flow, key=KEY, n=128, data=data, condition=condition)
    assert report.passed, str(report)
    assert check(flow, key=KEY, n=128, condition=condition[0]).passed
    with pytest.raises(InputError, match="needs a condition"):
        check(flow, key=KEY)
    with pytest.raises(ShapeError, match="50 rows and there are 20 conditions"):
        check(flow, key=KEY, data=data, condition=condition[:20])


def test_many_dimensions_go_through_the_flow():
    flow = simple(24)
    report = check(flow, key=KEY, n=64)
    assert report.passed, str(report)
    assert "importance" in report[INTEGRAL].detail
    assert report[INTEGRAL].budget < 0.1


def test_float64():
    with jax.enable_x64(True):
        flow = shake(Flow(Normal(2), Chain([LU(2), SinhArcsinh(shape=(2,))])), KEY)
        report = check(flow, key=KEY)
        assert report.passed, str(report)
        assert report[TRIP].budget == 1e-6
        assert report[JACOBIAN].value < 1e-12


@pytest.mark.parametrize(
    "distribution",
    [
        Normal(()),
        StudentT(2, df=1.0),
        Uniform(3, -1.0, 2.0),
        GaussianMixture(np.ones(3), 5 * np.eye(3, 5), np.full((3, 5), 0.1)),
        Flow(Normal(2), Chain([Affine(0.0, 2.0, shape=(2,)), Sigmoid((2,))])),
        Flow(Uniform((2, 3)), Affine(1.0, 1e-4, shape=(2, 3))),
    ],
    ids=lambda d: f"{d.name}{d.shape}",
)
def test_supports_tails_and_shapes(distribution):
    report = check(distribution, key=KEY, n=128)
    assert report.passed, str(report)


def test_steep_maps_are_not_blamed_for_rounding():
    layers = [Affine(0.3, 1e4, shape=(2,)), LU(2), Affine(-1e3, 1e-5, shape=(2,))]
    report = check(Flow(Normal(2), Chain(layers)), key=KEY)
    assert report.passed, str(report)


def test_the_public_name():
    assert laminar.check is check


# --- What is wrong is caught ----------------------------------------------------------------------


MAP_FAULTS = ("none", "inverse", "forward log-det", "inverse log-det", "both log-dets", "nan")


class Faulty(AbstractBijection):
    """y = 2 x with one fault, a number so that all share one compiled check."""

    fault: jax.Array
    scale: jax.Array
    trap: bool = eqx.field(static=True)
    in_shape: Shape = eqx.field(static=True, default=(2,))
    cond_shape: None = eqx.field(static=True, default=None)
    batch_last: ClassVar[bool] = False

    def __init__(self, fault):
        self.trap = fault == "gradient"
        self.fault = jnp.array(MAP_FAULTS.index("none" if self.trap else fault), jnp.int32)
        self.scale = jnp.array(2.0)

    @property
    def out_shape(self):
        return self.in_shape

    def on(self, fault, value):
        return jnp.where(self.fault == MAP_FAULTS.index(fault), value, 0)

    def forward(self, x, condition=None, *, key=None):
        log_det = self.in_shape[0] * jnp.log(self.scale)
        log_det += self.on("forward log-det", 0.01) + self.on("both log-dets", 0.01)
        log_det += self.on("nan", jnp.where(x[0] > 2.5, jnp.nan, 0))
        return x * self.scale, log_det

    def inverse(self, y, condition=None, *, key=None):
        x = y / self.scale
        log_det = -self.in_shape[0] * jnp.log(self.scale)
        log_det += self.on("inverse log-det", 0.01) - self.on("both log-dets", 0.01)
        x += self.on("inverse", 0.01 * jnp.sin(x))
        if self.trap:
            x = x + 0 * jnp.sqrt(jnp.abs(x) * 0)
        return x, log_det


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("none", set()),
        ("inverse", {TRIP, "latent → data → latent", AGREE}),
        ("forward log-det", {"log-det both ways", JACOBIAN, AGREE}),
        ("inverse log-det", {"log-det both ways", AGREE, INTEGRAL}),
        ("both log-dets", {JACOBIAN, INTEGRAL}),
        ("nan", {AGREE}),
        ("gradient", {"gradients of inputs"}),
    ],
)
def test_faults_of_a_map(fault, names):
    report = check(Flow(Normal(2), Faulty(fault)), key=KEY)
    assert names <= failed(report), str(report)
    assert report.passed == (fault == "none"), str(report)
    assert f"FAIL: {len(failed(report))} of" in str(report) or fault == "none"


def test_the_faulty_step_is_named():
    chain = Chain([Affine(shape=(2,)), Faulty("both log-dets"), LU(2)])
    report = check(Flow(Normal(2), chain), key=KEY)
    assert report[JACOBIAN].detail == "worst in step 2 of 3, Faulty"


DENSITY_FAULTS = ("none", "mass", "hole", "nan", "wide", "shift", "blow-up")
TRAPS = ("parameter", "sampling gradient")


class Wrong(AbstractDistribution):
    """A normal law with one fault, a number so that all share one compiled check."""

    fault: jax.Array
    loc: jax.Array
    trap: str | None = eqx.field(static=True)
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True, default=None)

    def __init__(self, fault, dim):
        self.trap = fault if fault in TRAPS else None
        self.fault = jnp.array(DENSITY_FAULTS.index("none" if self.trap else fault), jnp.int32)
        self.loc = jnp.ones(dim)
        self.shape = (dim,)

    def on(self, fault, value, otherwise=0):
        return jnp.where(self.fault == DENSITY_FAULTS.index(fault), value, otherwise)

    def _log_prob(self, x, condition=None, *, key=None):
        z = x - self.loc.reshape(self.shape + (1,) * (x.ndim - 1))
        log_p = (-0.5 * z * z - 0.5 * math.log(2 * math.pi)).sum(0)
        log_p += self.on("mass", 0.05)
        log_p = jnp.where((x[0] > 1.5) & self.on("hole", True, False), -jnp.inf, log_p)
        log_p = jnp.where((x[0] > 1e3) & self.on("nan", True, False), jnp.nan, log_p)
        if self.trap == "parameter":
            log_p = log_p + jnp.sqrt(jnp.abs(self.loc * 0)).sum()
        return log_p

    def _sample(self, key, batch=(), condition=None):
        x = jr.normal(key, self.shape + batch) * self.on("wide", 1.1, 1)
        x = x.at[0].add(self.on("shift", 0.15))
        x = jnp.where((x > 2) & self.on("blow-up", True, False), jnp.inf, x)
        if self.trap == "sampling gradient":
            x = x + jnp.sqrt(jnp.abs(self.loc * 0)).sum()
        return x + self.loc.reshape(self.shape + (1,) * (x.ndim - 1))


@pytest.mark.parametrize(
    ("fault", "name", "dim"),
    [
        ("none", None, 2),
        ("none", None, 5),
        ("mass", INTEGRAL, 1),
        ("shift", SAMPLES, 3),
        ("mass", INTEGRAL, 5),
        ("hole", INTEGRAL, 2),
        ("hole", INTEGRAL, 5),
        ("wide", SAMPLES, 1),
        ("wide", SAMPLES, 5),
        ("shift", SAMPLES, 5),
    ],
)
def test_faults_of_a_density(fault, name, dim):
    report = check(Wrong(fault, dim), key=KEY, n=64)
    assert (name in failed(report)) == (name is not None), str(report)
    assert report.passed == (name is None), str(report)


@pytest.mark.parametrize(
    ("fault", "name", "detail"),
    [
        ("nan", INTEGRAL, "log_prob is NaN at ("),
        ("parameter", "gradients of parameters", "first in flow.loc"),
        ("sampling gradient", "gradients of sampling", ""),
        ("blow-up", INTEGRAL, "samples are not finite"),
    ],
)
def test_what_is_not_finite(fault, name, detail):
    report = check(Wrong(fault, 2), key=KEY, n=64)
    assert name in failed(report), str(report)
    assert detail in report[name].detail


def test_mass_outside_the_domain_is_noticed():
    report = check(Flow(Normal(1), Chain([Affine(0.0, 9.0, shape=(1,)), Faulty1()])), key=KEY)
    assert {AGREE, INTEGRAL} <= failed(report), str(report)


class Faulty1(AbstractBijection):
    """Keeps points below one and clamps the others, as if the base had no mass there."""

    in_shape: Shape = eqx.field(static=True, default=(1,))
    cond_shape: None = eqx.field(static=True, default=None)

    @property
    def out_shape(self):
        return self.in_shape

    def forward(self, x, condition=None, *, key=None):
        return jnp.minimum(x, 1), jnp.where(x[0] > 1, -jnp.inf, 0)

    def inverse(self, y, condition=None, *, key=None):
        return self.forward(y)


def test_data_outside_the_support_are_told():
    flow = Flow(Normal(2), Exp((2,)))
    data = flow.sample(KEY, (20,)).at[:3].multiply(-1.0)
    report = check(flow, key=KEY, data=data)
    assert report.passed
    assert "3 of 20 rows of data are outside" in report[TRIP].detail


# --- The report and the arguments -----------------------------------------------------------------


def test_the_report():
    report = check(Wrong("nan", 2), key=KEY, n=64)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["passed"] is False
    assert [line["name"] for line in plain["lines"]] == [line.name for line in report.lines]
    text = str(report)
    assert text.splitlines()[0] == "Wrong of shape (2,), float32, 64 samples"
    assert all(len(row) < 120 for row in text.splitlines())
    with pytest.raises(KeyError):
        report["nothing"]


def test_what_cannot_be_measured_says_so():
    report = check(Uniform(60), key=KEY, n=64)
    assert report.passed, str(report)
    assert report[INTEGRAL].passed is None
    assert "no proposal is close enough" in report[INTEGRAL].detail


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 1}, InputError, "at least 2 samples"),
        ({"data": np.ones((3, 5))}, ShapeError, r"\(3, 5\)"),
        ({"data": np.ones((0, 2))}, InputError, "no rows"),
        ({"data": np.array([[1.0, np.nan]])}, InputError, "1 rows of data have NaN"),
        ({"condition": np.ones(2)}, InputError, "takes no condition"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        check(Normal(2), key=KEY, **options)


def test_only_distributions():
    with pytest.raises(InputError, match="takes a flow"):
        check(LU(2), key=KEY)  # type: ignore[arg-type]


def test_the_same_key_gives_the_same_report():
    assert check(Wrong("none", 2), key=KEY, n=64) == check(Wrong("none", 2), key=KEY, n=64)


# --- The integrals --------------------------------------------------------------------------------


def ring(x):
    radius = np.hypot(*x.T)
    return stats.norm.logpdf(radius, 1, 0.02) - np.log(2 * np.pi * np.maximum(radius, 1e-300))


def ring_samples(rng, n):
    angle, radius = rng.uniform(0, 2 * np.pi, n), rng.normal(1, 0.02, n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


NARROW = np.array([[1, 0.999], [0.999, 1]])
DENSITIES = {
    "normal": (lambda x: stats.norm.logpdf(x[:, 0]), lambda r, n: r.standard_normal((n, 1))),
    "cauchy": (lambda x: stats.cauchy.logpdf(x[:, 0]), lambda r, n: r.standard_cauchy((n, 1))),
    "uniform": (lambda x: stats.uniform.logpdf(x).sum(1), lambda r, n: r.uniform(size=(n, 2))),
    "ring": (ring, ring_samples),
    "narrow": (
        lambda x: stats.multivariate_normal.logpdf(x, np.zeros(2), NARROW),
        lambda r, n: r.multivariate_normal(np.zeros(2), NARROW, n),
    ),
    "student": (lambda x: stats.t.logpdf(x, 2).sum(1), lambda r, n: r.standard_t(2, (n, 3))),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_cubature(name):
    log_density, draw = DENSITIES[name]
    samples = draw(np.random.default_rng(0), 4096)
    found = integrate.quadrature(log_density, samples)
    assert abs(found.value - 1) < 1e-3
    assert abs(found.value - 1) < 2 * found.error + 1e-6
    lost = integrate.quadrature(lambda x: log_density(x) - 0.1, samples)
    assert np.allclose(lost.value / found.value, math.exp(-0.1), atol=2e-3)


@pytest.mark.parametrize("name", DENSITIES)
def test_importance_sampling(name):
    log_density, draw = DENSITIES[name]
    rng = np.random.default_rng(0)
    samples = draw(rng, 4096)

    def target(x):
        return x, log_density(x), np.zeros(len(x))

    proposal = integrate.kernels(rng, samples)
    found = integrate.importance(target, proposal, Scale.of(samples), rng, 20_000)
    assert found.error < 0.03
    assert abs(found.value - 1) < 4 * found.error


def test_proposals_integrate_to_one():
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((500, 2)) @ np.array([[1, 0.3], [0, 0.2]])
    for proposal in (integrate.fitted(samples), integrate.kernels(rng, samples, 20)):
        drawn = proposal.draw(rng, 4096)
        found = integrate.quadrature(proposal.log_density, drawn)
        assert abs(found.value - 1) < 2e-3
        phi = Scale.of(drawn).statistics(drawn, proposal.log_density(drawn))
        z = (phi.mean(0) - found.means) / (phi.std(0) / 64)
        assert np.abs(z).max() < 5


def test_a_faulty_flow_inside_is_found():
    bad = Flow(Normal(2), Faulty("inverse"))
    for whole in (Flow(Mixture([Normal(2), bad]), Affine(shape=(2,))), Mixture([bad, Normal(2)])):
        report = check(whole, key=jr.key(0), n=64)
        line = report["data → latent → data"]
        assert line.passed is False
        assert "component" in line.detail
    fine = Flow(Normal(2), Affine(loc=1.0, scale=2.0, shape=(2,)))
    assert check(Mixture([fine, Normal(2)]), key=jr.key(0), n=256).passed
