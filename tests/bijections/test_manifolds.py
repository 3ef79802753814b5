"""Maps and laws on manifolds against quadrature, published formulas and each other."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import randomise
from scipy import stats

from laminar import zoo
from laminar._errors import InputError, ShapeError
from laminar.bijections.amortized import amortized
from laminar.bijections.autoregressive import masked_autoregressive
from laminar.bijections.base import Identity, Invert, call
from laminar.bijections.circle import CircleMoebius
from laminar.bijections.compose import Chain, Independent, Permute, Repeat, Stack
from laminar.bijections.elementwise import Affine
from laminar.bijections.linear import LU
from laminar.bijections.manifolds import Cylindrical, ExponentialMap, Projective, SphereMoebius
from laminar.bijections.rotations import QuaternionMap, RotationCoupling
from laminar.bijections.simplex import Softmax, StickBreaking
from laminar.bijections.splines import RationalQuadratic
from laminar.diagnose import check
from laminar.directional import Dirichlet, PowerSpherical, UniformOn, VonMisesFisher
from laminar.distributions import Normal, Uniform
from laminar.flow import Flow
from laminar.mixtures import Mixture
from laminar.spaces import Rotations, Simplex, Sphere, from_quaternion, to_quaternion, unit

CIRCLE = (-math.pi, math.pi)
SMALL = {"layers": 2, "width": 8, "depth": 1}
INTEGRAL, SAMPLES = "density integrates to one", "samples follow the density"
JACOBIAN = "log-det is the Jacobian's"


def shaken(flow, scale=0.5, key=2):
    return eqx.tree_at(lambda f: f.bijection, flow, randomise(flow.bijection, jr.key(key), scale))


# --- Quadrature -----------------------------------------------------------------------------------
# Periodic axes take equally spaced points, which converge fast for smooth densities.


def _axis(n):
    return np.linspace(-np.pi, np.pi, n, endpoint=False) + np.pi / n, np.full(n, 2 * np.pi / n)


def _product(*axes):
    """Points (m, D) and weights (m,) of a product rule."""
    points = np.stack([g.ravel() for g in np.meshgrid(*[a[0] for a in axes], indexing="ij")], 1)
    weights = np.stack([g.ravel() for g in np.meshgrid(*[a[1] for a in axes], indexing="ij")], 1)
    return points, weights.prod(1)


def on_torus(n=200):
    return _product(_axis(n), _axis(n))


def on_circle(n=400):
    angle, weights = _axis(n)
    return np.stack([np.cos(angle), np.sin(angle)], 1), weights


def on_sphere(n=200):
    points, weights = _product(np.polynomial.legendre.leggauss(n // 2), _axis(n))
    h, angle = points.T
    r = np.sqrt(1 - h * h)
    return np.stack([r * np.cos(angle), r * np.sin(angle), h], 1), weights


def on_three_sphere(n=60):
    """The angle w = cos ψ from the last axis has the weight √(1 − w²)."""
    w, weight = np.polynomial.legendre.leggauss(n)
    s, inner = on_sphere(n)
    r = np.sqrt(1 - w * w)
    points = np.concatenate([r[:, None, None] * s[None], np.tile(w[:, None, None], (len(s), 1))], 2)
    return points.reshape(-1, 4), ((weight * r)[:, None] * inner[None]).ravel()


def on_simplex(n=300):
    """Two free parts, by squares of square roots so that the edges are no trouble."""
    u, weights = np.polynomial.legendre.leggauss(n)
    u, weights = (u + 1) / 2, weights / 2
    points, product = _product((u, weights), (u, weights))
    a, b = points.T
    a, jacobian = a**3 * (10 - 15 * a + 6 * a * a), 30 * (a * (1 - a)) ** 2
    b, jacobian = b**3 * (10 - 15 * b + 6 * b * b), jacobian * 30 * (b * (1 - b)) ** 2
    parts = np.stack([a, (1 - a) * b, (1 - a) * (1 - b)], 1)
    return parts, product * jacobian * (1 - a)


def on_rotations(n=24):
    """Euler angles: the turn about z, the cosine of the tilt, the turn about z."""
    half = np.polynomial.legendre.leggauss(n)
    points, weights = _product(_axis(2 * n), half, _axis(2 * n))
    a, tilt, b = points[:, 0], np.arccos(points[:, 1]), points[:, 2]
    matrices = _about_z(a) @ _about_x(tilt) @ _about_z(b)
    return matrices, weights / (8 * np.pi**2)


def _about_z(t):
    c, s, o, i = np.cos(t), np.sin(t), np.zeros_like(t), np.ones_like(t)
    return np.moveaxis(np.array([[c, -s, o], [s, c, o], [o, o, i]]), -1, 0)


def _about_x(t):
    c, s, o, i = np.cos(t), np.sin(t), np.zeros_like(t), np.ones_like(t)
    return np.moveaxis(np.array([[i, o, o], [o, c, -s], [o, s, c]]), -1, 0)


def total(distribution, rule, condition=None):
    points, weights = rule()
    return float(np.exp(np.asarray(distribution.log_prob(points, condition), float)) @ weights)


def _flow(bijection, scale=0.7):
    return Flow(UniformOn(bijection.in_space), randomise(bijection, jr.key(3), scale))


FLOWS = {
    "torus": (lambda: shaken(zoo.torus(2, key=jr.key(0), bins=4, **SMALL), 0.2), on_torus),
    "circle": (lambda: shaken(zoo.sphere(1, key=jr.key(0), bins=4, **SMALL), 0.3), on_circle),
    "sphere": (lambda: shaken(zoo.sphere(2, key=jr.key(0), bins=4, **SMALL), 0.2), on_sphere),
    "moebius": (lambda: _flow(SphereMoebius(2)), on_sphere),
    "projective": (lambda: _flow(Projective(LU(4, bias=False)), 0.4), on_three_sphere),
    "exponential": (lambda: _flow(ExponentialMap(2, 4, key=jr.key(1))), on_sphere),
    "simplex": (
        lambda: Flow(Normal(2), Chain([Affine(0.3, 1.2, shape=(2,)), Softmax(3)])),
        on_simplex,
    ),
    "stick": (lambda: Flow(Normal(2), StickBreaking(3)), on_simplex),
    "rotations": (lambda: shaken(zoo.rotations(key=jr.key(0), **SMALL), 0.2), on_rotations),
    "Von Mises–Fisher": (lambda: VonMisesFisher([1.0, 2.0, -1.0], 7.0), on_sphere),
    "power 1": (lambda: PowerSpherical([0.5, 2.0], 3.0), on_circle),
    "power 2": (lambda: PowerSpherical([0.5, 2.0, 1.0], 0.5), on_sphere),
    "power 3": (lambda: PowerSpherical([0.5, 2.0, 1.0, 0.0], 4.0), on_three_sphere),
    "Dirichlet": (lambda: Dirichlet([1.5, 2.0, 4.0]), on_simplex),
}


@pytest.mark.parametrize("name", FLOWS)
def test_density_integrates_to_one(name):
    make, rule = FLOWS[name]
    assert total(make(), rule) == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("space", [Sphere(1), Sphere(2), Sphere(3), Simplex(3), Rotations()])
def test_spaces_know_their_measure_and_their_tangents(space):
    points = np.asarray(UniformOn(space).sample(jr.key(0), (5,)), float)
    flat = points.reshape(5, -1)
    basis = space.tangents(flat)
    assert basis.shape == (5, flat.shape[1], space.dim)
    unit_matrix = np.broadcast_to(np.eye(space.dim), (5, space.dim, space.dim))
    np.testing.assert_allclose(np.swapaxes(basis, 1, 2) @ basis, unit_matrix, atol=1e-6)
    moved = flat[..., None] + 1e-3 * basis  # still on the manifold to second order
    moved = jnp.asarray(np.moveaxis(moved, 0, -1).reshape((*space.shape, -1)))
    np.testing.assert_allclose(space.project(moved), moved, atol=3e-6)
    rule = {1: on_circle, 2: on_sphere, 3: on_three_sphere}
    if isinstance(space, Sphere):
        assert rule[space.n]()[1].sum() == pytest.approx(math.exp(space.log_volume), rel=1e-3)
    else:
        rule = on_simplex if isinstance(space, Simplex) else on_rotations
        assert rule()[1].sum() == pytest.approx(math.exp(space.log_volume), rel=1e-6)


# --- Samples, log-dets and gradients: the check ---------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "moebius",
        "Von Mises–Fisher",
        "Dirichlet",
        pytest.param("sphere", marks=pytest.mark.slow),
        pytest.param("rotations", marks=pytest.mark.slow),
        pytest.param("power 3", marks=pytest.mark.slow),
        pytest.param("exponential", marks=pytest.mark.slow),
        pytest.param("simplex", marks=pytest.mark.slow),
        pytest.param("torus", marks=pytest.mark.slow),
    ],
)
def test_the_check_passes(name):
    report = check(FLOWS[name][0](), key=jr.key(0), n=128)
    assert report.passed, str(report)
    assert report[INTEGRAL].passed
    assert report[SAMPLES].passed


class Forgetful(Projective):
    """Gives the log-det of the linear map as that of the map of the sphere."""

    def _apply(self, direction, x):
        return super()._apply(direction, x)[0], call(self.linear, direction, x)[1]


def test_a_forgotten_metric_is_caught():
    flow = Flow(UniformOn(Sphere(2)), randomise(Forgetful(LU(3, bias=False)), jr.key(0), 0.7))
    report = check(flow, key=jr.key(0), n=64)
    failed = {line.name for line in report.lines if line.passed is False}
    assert {JACOBIAN, INTEGRAL} <= failed


def test_a_wrong_volume_is_caught():
    law = eqx.tree_at(lambda d: d.height.tree, UniformOn(Sphere(3)), jnp.asarray(-3.1))
    report = check(law, key=jr.key(0), n=64)
    assert {line.name for line in report.lines if line.passed is False} == {INTEGRAL}


# --- Formulas -------------------------------------------------------------------------------------


def test_circle_moebius_makes_the_wrapped_cauchy_law():
    bijection = randomise(CircleMoebius(), jr.key(0))
    angle, weights = _axis(400)
    density = np.exp(bijection.inverse(jnp.asarray(angle))[1]) / (2 * np.pi)
    moments = [(density * weights * np.exp(1j * k * angle)).sum() for k in range(4)]
    np.testing.assert_allclose(moments, moments[1] ** np.arange(4), atol=1e-5)
    assert abs(moments[1]) > 0.1


def test_sphere_moebius_of_the_circle_is_a_circle_moebius():
    bijection = randomise(SphereMoebius(1), jr.key(0))
    points, weights = on_circle()
    density = np.exp(bijection.inverse(jnp.asarray(points.T))[1]) / (2 * np.pi)
    z = points[:, 0] + 1j * points[:, 1]
    moments = [(density * weights * z**k).sum() for k in range(4)]
    np.testing.assert_allclose(moments, moments[1] ** np.arange(4), atol=1e-5)
    omega = np.asarray(bijection.raw) / (1 + np.sqrt(1 + np.sum(bijection.raw**2)))
    w = omega[0] + 1j * omega[1]
    image = (1 - abs(w) ** 2) / np.abs(z - w) ** 2 * (z - w) - w
    y = np.asarray(bijection.forward(jnp.asarray(points.T))[0])
    np.testing.assert_allclose(y[0] + 1j * y[1], image, atol=1e-5)


def test_a_mean_of_moebius_maps_closes_around_the_circle():
    bijection = randomise(CircleMoebius(4), jr.key(0))
    end = jnp.asarray([-math.pi, math.pi])
    y, log_slope = bijection.forward(end)
    assert abs(math.remainder(float(y[0] - y[1]), 2 * math.pi)) < 1e-5
    np.testing.assert_allclose(log_slope[0], log_slope[1], atol=1e-5)


def test_a_linear_map_makes_the_angular_central_gaussian():
    bijection = randomise(Projective(LU(3, bias=False)), jr.key(1), 0.5)
    a = np.asarray(bijection.linear.forward(jnp.eye(3))[0], float)
    precision = np.linalg.inv(a @ a.T)
    x, _ = on_sphere(6)
    square = np.einsum("mi,ij,mj->m", x, precision, x)
    expected = 0.5 * np.linalg.slogdet(precision)[1] - 1.5 * np.log(square)
    np.testing.assert_allclose(bijection.inverse(jnp.asarray(x.T))[1], expected, atol=1e-4)


def test_laws_agree_with_scipy():
    alpha = np.array([1.5, 2.0, 4.0])
    x = np.random.default_rng(0).dirichlet(alpha, 5)
    expected = [stats.dirichlet.logpdf(row, alpha) for row in x]
    np.testing.assert_allclose(Dirichlet(alpha).log_prob(x), expected, rtol=1e-4)
    mean = np.array([1.0, 2.0, -2.0]) / 3
    x = np.asarray(UniformOn(Sphere(2)).sample(jr.key(0), (5,)))
    for kappa in (1e-3, 1.0, 300.0):
        expected = stats.vonmises_fisher(mean, kappa).logpdf(x / np.linalg.norm(x, axis=1)[:, None])
        np.testing.assert_allclose(VonMisesFisher(mean, kappa).log_prob(x), expected, rtol=1e-4)


def test_isometric_coordinates_treat_parts_alike():
    bijection = Softmax(5)
    y = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(5), 7).T, jnp.float32)
    x, log_det = bijection.inverse(y)
    again, log_det_again = bijection.inverse(y[jnp.array([3, 1, 4, 0, 2])])
    np.testing.assert_allclose((x**2).sum(0), (again**2).sum(0), rtol=1e-4)
    np.testing.assert_allclose(log_det, log_det_again, rtol=1e-5)
    np.testing.assert_allclose(StickBreaking(5).forward(jnp.zeros(4))[0], 0.2, rtol=1e-6)


def test_quaternions_come_back_up_to_sign():
    q = unit(jr.normal(jr.key(0), (4, 100)))
    q = jnp.concatenate([q, jnp.eye(4)], 1)
    matrices = from_quaternion(q)
    np.testing.assert_allclose(jnp.abs(jnp.sum(q * to_quaternion(matrices), 0)), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.det(np.moveaxis(matrices, -1, 0)), 1, rtol=1e-5)


def test_the_inverse_of_an_exponential_map_at_its_limit():
    bijection = ExponentialMap(2, 3, key=jr.key(0))
    for scale in (1e6, -1e6):  # all the pull there may be, in one sharp centre and two
        weights = jnp.asarray([1.0, 0.5, 0.5]) * scale
        hard = eqx.tree_at(
            lambda b: (b.weights, b.sharpness), bijection, (weights, 30 * weights**0)
        )
        x = UniformOn(Sphere(2)).sample(jr.key(1), (200,))
        y, log_det = jax.vmap(hard.forward)(x)
        back, log_det_back = jax.vmap(hard.inverse)(y)
        np.testing.assert_allclose(back, x, atol=1e-4)
        np.testing.assert_allclose(log_det_back, -log_det, atol=1e-3)


def test_symmetric_maps_are_odd():
    x = UniformOn(Sphere(3)).sample(jr.key(1), (5,))
    for bijection in (
        ExponentialMap(3, 3, symmetric=True, key=jr.key(0)),
        Projective(LU(4, bias=False)),
    ):
        bijection = randomise(bijection, jr.key(2), 0.7)
        there, back = jax.vmap(bijection.forward)(x), jax.vmap(bijection.forward)(-x)
        np.testing.assert_allclose(there[0], -back[0], atol=1e-5)
        np.testing.assert_allclose(there[1], back[1], atol=1e-5)


# --- Edges ----------------------------------------------------------------------------------------


def test_poles_are_points_like_others():
    bijection = Cylindrical(3)
    poles = jnp.eye(4).T

    def value(y):
        x, log_det = bijection.inverse(y)
        return x.sum() + log_det

    assert jnp.isfinite(jax.vmap(value)(poles)).all()
    assert jnp.isfinite(jax.vmap(jax.grad(value))(poles)).all()
    np.testing.assert_allclose(bijection.forward(bijection.inverse(poles)[0])[0], poles, atol=1e-6)


def test_what_is_off_the_manifold_has_no_density():
    for space in (Sphere(2), Simplex(3), Rotations()):
        law = UniformOn(space)
        x = law.sample(jr.key(0))
        assert law.log_prob(x) == pytest.approx(-space.log_volume, abs=1e-6)
        assert law.log_prob(1.01 * x) == -jnp.inf
        assert jnp.isnan(law.log_prob(x.at[-1].set(jnp.nan)))
    assert UniformOn(Simplex(2)).log_prob(jnp.asarray([0.0, 1.0])) == -jnp.inf


@pytest.mark.parametrize("coupling", [True, False])
def test_the_density_of_a_torus_closes(coupling):
    flow = shaken(zoo.torus(3, key=jr.key(0), bins=4, coupling=coupling, **SMALL), 0.4)
    x = jr.uniform(jr.key(1), (20, 3), minval=-3.1, maxval=3.1)
    for column in range(3):
        ends = [flow.log_prob(x.at[:, column].set(end)) for end in (-math.pi, math.pi)]
        np.testing.assert_allclose(ends[0], ends[1], atol=1e-3)
    np.testing.assert_allclose(flow.to_data(flow.to_latent(x)), x, atol=1e-3)


@pytest.mark.slow
def test_angles_may_follow_a_graph():
    circle = RationalQuadratic(4, interval=CIRCLE, tails="circular")
    sizes = {"width": 12, "depth": 2}
    layer = masked_autoregressive(
        4, circle, graph=((3,), (0, 3), (3,), ()), periodic=True, key=jr.key(0), **sizes
    )
    layer = randomise(layer, jr.key(1), 0.4)
    x = jr.uniform(jr.key(2), (4, 9), minval=-3.1, maxval=3.1)
    y, log_det = layer.forward(x)
    back, log_det_back = layer.inverse(y)
    np.testing.assert_allclose(back, x, atol=1e-4)
    np.testing.assert_allclose(log_det_back, -log_det, atol=1e-4)
    turned = layer.inverse(y.at[3].add(2 * math.pi))[0]
    np.testing.assert_allclose(turned[:3], back[:3], atol=1e-4)


# --- Composition ----------------------------------------------------------------------------------


def test_spaces_must_fit():
    sphere = SphereMoebius(2)
    with pytest.raises(ShapeError, match=r"part 0 \(Affine\) gives events on None"):
        Chain([Affine(shape=(3,)), sphere])
    with pytest.raises(ShapeError, match=r"gives events on Sphere\(n=2\).*on Simplex"):
        Chain([sphere, Invert(Softmax(3))])
    with pytest.raises(ShapeError, match="Repeat: part 0"):
        Repeat([Chain([Invert(Cylindrical(2)), Permute([1, 0]), StickBreaking(3)])])
    with pytest.raises(ShapeError, match="has events on None"):
        Flow(Normal(3), sphere)
    with pytest.raises(ShapeError, match="component 1"):
        Mixture([UniformOn(Sphere(2)), Normal(3)])
    for make in (lambda: Independent(sphere, 2), lambda: Stack([sphere, sphere])):
        with pytest.raises(ShapeError, match="takes no parts on manifolds"):
            make()
    chain = Chain([sphere, Invert(sphere), Identity((3,), space=Sphere(2))])
    assert chain.in_space == chain.out_space == Sphere(2)
    assert Chain([Softmax(3), Invert(Softmax(3))]).in_space is None


def test_a_path_starts_on_the_manifold():
    flow = shaken(zoo.sphere(2, key=jr.key(0), bins=4, **SMALL), 0.2)
    path = flow.path(x=flow.sample(jr.key(1), (3,)))
    assert len(path.points) == 3
    np.testing.assert_allclose(path.log_probs[0], -Sphere(2).log_volume, rtol=1e-5)
    assert flow.upto(0).space == Sphere(2)
    np.testing.assert_allclose(flow.upto(0).log_prob(path.points[0]), path.log_probs[0])


def test_misuse_is_named():
    with pytest.raises(ShapeError, match="without a shift"):
        Projective(LU(3))
    with pytest.raises(ShapeError, match="linear map"):
        Projective(Affine(shape=(3,)))
    with pytest.raises(ShapeError, match="opposite"):
        QuaternionMap(SphereMoebius(3))
    with pytest.raises(ShapeError, match="opposite"):
        QuaternionMap(Projective(LU(3, bias=False)))
    with pytest.raises(InputError, match="at least 2 parts"):
        Softmax(1)
    with pytest.raises(InputError, match="components"):
        CircleMoebius(0)
    with pytest.raises(InputError, match="dimension n"):
        Cylindrical(0)
    with pytest.raises(InputError, match="no direction"):
        VonMisesFisher(jnp.zeros(3))
    with pytest.raises(ShapeError, match=r"vector \(3,\)"):
        VonMisesFisher(jnp.ones(4))
    with pytest.raises(InputError, match="concentration"):
        PowerSpherical(jnp.ones(4), -1.0)
    with pytest.raises(InputError, match="concentration"):
        Dirichlet([1.0, 0.0])
    layer = RotationCoupling(cond_dim=2, width=4, depth=1, key=jr.key(0))
    with pytest.raises(ShapeError, match="needs a condition"):
        layer.forward(jnp.eye(3))


# --- Zoo ------------------------------------------------------------------------------------------

BUILDERS = {
    "torus": lambda **options: zoo.torus(2, **options),
    "sphere": lambda **options: zoo.sphere(2, **options),
    "rotations": zoo.rotations,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_start_uniform_and_invert_under_a_condition(name):
    flow = BUILDERS[name](key=jr.key(0), cond_dim=2, **SMALL)
    x, condition = flow.base.sample(jr.key(1), (7,)), jr.normal(jr.key(2), (7, 2))
    np.testing.assert_allclose(flow.log_prob(x, condition), flow.base.log_prob(x), atol=1e-4)
    flow = shaken(flow, 0.3)
    z = flow.to_latent(x, condition)
    np.testing.assert_allclose(flow.to_data(z, condition), x, atol=1e-3)
    y, log_q = flow.sample_and_log_prob(jr.key(3), (), condition)
    np.testing.assert_allclose(flow.log_prob(y, condition), log_q, atol=2e-3)
    other = flow.log_prob(x, -condition)
    assert not np.allclose(other, flow.log_prob(x, condition), atol=1e-2)


def test_conditions_reach_maps_without_networks():
    bijection = amortized(SphereMoebius(2), 2, key=jr.key(0))
    flow = Flow(UniformOn(Sphere(2)), randomise(bijection, jr.key(1)))
    for condition in ([1.0, 0.5], [-0.5, 0.3]):
        assert total(flow, on_sphere, jnp.asarray(condition)) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_sphere_flow_learns_a_mixture_that_a_condition_moves():
    from laminar.train.fit import fit

    def truth(c):
        means = [[c, 1.0, 0.0], [0.0, -c, 1.0]]
        return Mixture([VonMisesFisher(mean, 20.0) for mean in means])

    conditions = jnp.repeat(jnp.asarray([[-1.0], [1.0]]), 2000, axis=0)
    x = jnp.concatenate([truth(c).sample(jr.key(i), (2000,)) for i, c in enumerate((-1.0, 1.0))])
    flow = zoo.sphere(2, key=jr.key(0), layers=3, width=32, depth=2, cond_dim=1)
    options = {"steps": 600, "learning_rate": 1e-2, "progress": False}
    fitted, _ = fit(jr.key(1), flow, x, condition=conditions, **options)
    for c in (-1.0, 1.0):
        held_out, log_p = truth(c).sample_and_log_prob(jr.key(5), (2000,))
        gap = (log_p - fitted.log_prob(held_out, jnp.asarray([c]))).mean()
        assert abs(gap) < 0.08


def test_training_reaches_every_parameter():
    flow = shaken(zoo.sphere(2, key=jr.key(0), bins=4, **SMALL), 0.3)
    x = UniformOn(Sphere(2)).sample(jr.key(1), (16,))
    grads = eqx.filter_grad(lambda flow: flow.log_prob(x).mean())(flow)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads.bijection):
        assert jnp.isfinite(leaf).all(), path
        assert jnp.abs(leaf).max() > 0, path


@pytest.mark.slow
def test_a_base_may_be_trained():
    law = PowerSpherical([1.0, 0.0, 1.0], 2.0)
    x = VonMisesFisher([0.0, 1.0, 0.0], 5.0).sample(jr.key(0), (32,))
    grads = eqx.filter_grad(lambda law: law.log_prob(x).mean())(law)
    assert jnp.abs(grads.direction).max() > 0
    assert float(grads.raw_concentration) != 0
    moved = jax.jacrev(lambda k: PowerSpherical([1.0, 0.0, 1.0], k).sample(jr.key(0), (64,)))(2.0)
    assert jnp.isfinite(moved).all()
    assert jnp.abs(moved).max() > 0
    assert isinstance(zoo.torus(2, key=jr.key(0), **SMALL).base, Uniform)


def test_points_off_a_manifold_are_told_in_many_dimensions_too():
    parts = UniformOn(Simplex(1000))
    assert parts.log_prob(jnp.full(1000, 0.0018)) == -jnp.inf
    assert jnp.isfinite(parts.log_prob(jnp.full(1000, 0.001)))
    sphere = UniformOn(Sphere(2999))
    point = sphere.sample(jr.key(0), ())
    assert jnp.isfinite(sphere.log_prob(point))
    assert sphere.log_prob(1.05 * point) == -jnp.inf


def test_directions_of_any_length_are_themselves():
    np.testing.assert_allclose(unit(jnp.array([4e6, 1e6, 0])), [0.970143, 0.242536, 0], rtol=1e-5)
    np.testing.assert_allclose(unit(jnp.array([3e20, 4e20])), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(unit(jnp.array([3e-5, 4e-5])), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("law", [VonMisesFisher, PowerSpherical])
def test_narrow_laws_keep_their_digits(law):
    kappa, mean = 1e6, np.array([0.36, 0.48, 0.8])
    narrow = law(mean, kappa)
    x = np.asarray(narrow.sample(jr.key(0), (200,)), np.float64)
    unit_mean = np.asarray(mean, np.float32).astype(np.float64)
    unit_mean /= np.linalg.norm(unit_mean)
    square = ((x - unit_mean) ** 2).sum(1)
    if law is VonMisesFisher:
        truth = -0.5 * kappa * square - np.log(2 * np.pi) + np.log(kappa)
    else:
        truth = kappa * np.log1p(-square / 4) - np.log(4 * np.pi) + np.log(kappa + 1)
    # The points themselves are rounded, which moves the exponent by as much as this.
    allowed = 1e-3 + 2 * kappa * np.sqrt(square) * 1.2e-7
    found = np.asarray(narrow.log_prob(jnp.asarray(x, jnp.float32)), np.float64)
    assert (np.abs(found - truth) < allowed).all()


@pytest.mark.slow
def test_a_law_too_narrow_to_integrate_is_not_called_wrong():
    report = check(VonMisesFisher([0.0, 0.0, 1.0], 1e6), key=jr.key(0), n=64)
    assert report.passed
    assert "too narrow" in str(report)
