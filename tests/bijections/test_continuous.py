"""Continuous flows against the matrix exponential, and whatever the contract cannot see."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.linalg as jsl
import numpy as np
import pytest
from cases import _continuous, randomise

import laminar
from laminar._errors import InputError, ShapeError
from laminar._params import Frozen
from laminar._registry import register
from laminar.bijections.amortized import amortized
from laminar.bijections.base import Invert, call
from laminar.bijections.compose import Chain, Independent, Indexed, Stack, repeat
from laminar.bijections.continuous import Continuous, VelocityField, _worst
from laminar.bijections.elementwise import Affine
from laminar.bijections.path import first_steps, walk
from laminar.matching import flow_matching
from laminar.nn.potential import PotentialField
from laminar.testing import check_bijection


@register("test_linear_field")
class Linear(eqx.Module):
    """v = A z, for single events."""

    matrix: jax.Array

    def __call__(self, t, z):
        return self.matrix @ z


MATRIX = 0.6 * jr.normal(jr.key(7), (3, 3))


def _field(key=None, **options):
    key = jr.key(0) if key is None else key
    options = {"width": 8, "depth": 1, "frequencies": 2, **options}
    return randomise(VelocityField(2, key=key, **options), key, 0.4)


@pytest.mark.parametrize(
    "options", [{}, {"fixed_steps": 16}, {"fixed_steps": 400, "solver": "heun"}]
)
def test_a_linear_field_gives_the_matrix_exponential(options):
    flow = Continuous(Linear(MATRIX), (3,), **options)
    x = jr.normal(jr.key(1), (3, 5))
    for direction, sign in (("forward", 1.0), ("inverse", -1.0)):
        y, log_det = eqx.filter_jit(call)(flow, direction, x)
        np.testing.assert_allclose(y, jsl.expm(sign * MATRIX) @ x, atol=2e-5)
        np.testing.assert_allclose(log_det, sign * jnp.trace(MATRIX), atol=2e-5)


def test_energies_are_those_of_the_linear_field():
    flow = Continuous(Linear(MATRIX), (3,))
    x = jr.normal(jr.key(1), (3, 4))
    y, energies = eqx.filter_jit(flow.energies)("forward", x)
    ts = jnp.linspace(0, 1, 201)
    speeds = jax.vmap(lambda t: ((MATRIX @ jsl.expm(t * MATRIX) @ x) ** 2).sum(0))(ts)
    np.testing.assert_allclose(energies.kinetic, np.trapezoid(speeds, ts, axis=0), rtol=1e-3)
    np.testing.assert_allclose(energies.jacobian, (MATRIX**2).sum(), rtol=1e-4)
    _, back = eqx.filter_jit(flow.energies)("inverse", y)
    np.testing.assert_allclose(back.kinetic, energies.kinetic, rtol=1e-4)


@pytest.mark.parametrize("probe", ["rademacher", "normal"])
def test_hutchinson_is_unbiased(probe):
    options = {"fixed_steps": 6, "times": 1}
    exact = Continuous(_field(), (2,), **options)
    guess = Continuous(_field(), (2,), divergence="hutchinson", probe=probe, **options)
    x = jr.normal(jr.key(1), (2,))
    truth = exact.forward(x)[1]
    many = jnp.broadcast_to(x[:, None], (2, 20_000))  # every event of a batch has its own probes
    y, found = eqx.filter_jit(guess.forward)(many, key=jr.key(2))
    error = found.std() / math.sqrt(found.size)
    assert abs(found.mean() - truth) < 4 * error + 1e-5
    assert error > 1e-5
    np.testing.assert_allclose(y[:, 0], exact.forward(x)[0], atol=1e-5)
    assert guess.exactness == "unbiased"
    with pytest.raises(InputError, match="needs a key"):
        guess.forward(x)
    assert jnp.isfinite(guess.points("forward", x)).all()
    averaged = Continuous(
        _field(), (2,), divergence="hutchinson", probe=probe, probes=16, **options
    )
    assert averaged.forward(many, key=jr.key(2))[1].std() < 0.5 * found.std()


@pytest.mark.slow
def test_adjoints_give_the_same_gradients():
    x = jr.normal(jr.key(1), (2, 4))

    @eqx.filter_jit
    def gradient(flow, x):
        def loss(flow):
            z, log_det = flow.inverse(x)
            return (0.5 * z**2).sum() - log_det.sum()

        return jax.tree.leaves(eqx.filter_grad(loss)(flow))

    options = ({"fixed_steps": 30}, {}, {"adjoint": "direct"}, {"adjoint": "backsolve"})
    first, *others = (gradient(Continuous(_field(), (2,), times=1, **o), x) for o in options)
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("options", [{}, {"fixed_steps": 10}])
def test_the_path_is_one_solution_kept_at_its_times(options):
    flow = Continuous(_field(), (2,), times=(0, 0.3, 0.5, 1), **options)
    assert [step.name for step in flow.steps()] == [
        "Continuous[0, 0.3]",
        "Continuous[0.3, 0.5]",
        "Continuous[0.5, 1]",
    ]
    x = jr.normal(jr.key(1), (2, 4))
    y, log_det = eqx.filter_jit(call)(flow, "forward", x)
    points, log_dets = eqx.filter_jit(walk)(flow, "forward", x)
    assert len(points) == 3
    np.testing.assert_allclose(points[-1], y, atol=1e-5)
    np.testing.assert_allclose(sum(log_dets), log_det, atol=2e-5)
    middle, part = eqx.filter_jit(call)(flow.steps()[1], "forward", points[0])
    np.testing.assert_allclose(middle, points[1], atol=1e-5)
    np.testing.assert_allclose(part, log_dets[1], atol=1e-5)
    back, back_dets = eqx.filter_jit(walk)(flow, "inverse", y)
    np.testing.assert_allclose(back[0], points[1], atol=1e-5)
    np.testing.assert_allclose(back_dets[0], -log_dets[2], atol=2e-5)
    for k in (1, 2):  # by one solution, also of the last steps
        first, (last,) = first_steps(flow, k), first_steps(Invert(flow), k).parts
        assert isinstance(first, Continuous)
        assert first.times == flow.times[: k + 1]
        np.testing.assert_allclose(call(first, "forward", x)[0], points[k - 1], atol=1e-5)
        assert last.bijection.times == flow.times[-k - 1 :]


def test_points_leave_the_divergence_out_in_every_composition():
    flow = Continuous(_field(), (2,), fixed_steps=6)
    chain = Chain([Affine(shape=(2,)), flow, Invert(flow)])
    stack = repeat(lambda key: Continuous(_field(key), (2,), fixed_steps=6), 2, key=jr.key(3))
    x = jr.normal(jr.key(1), (2, 4))
    guess = Continuous(_field(), (2,), fixed_steps=2, times=1, divergence="hutchinson")
    moved = amortized(guess, 2, key=jr.key(4))
    for transform, z in ((Stack([guess, guess]), jnp.stack([x, x])), (moved, x)):
        assert transform.points("inverse", z, x).shape == z.shape  # no key is asked for
    for transform in (flow, chain, stack, Indexed(flow, [1, 0], 2)):
        for direction in ("forward", "inverse"):
            alone = transform.points(direction, x)
            np.testing.assert_allclose(alone, call(transform, direction, x)[0], atol=1e-5)
    for transform, z in ((flow, x), (Independent(flow, 2), jnp.stack([x, x]))):
        plain, both = (
            str(jax.make_jaxpr(f)(z))
            for f in (lambda z, t=transform: t.points("forward", z), transform.forward)
        )
        assert len(plain) < 0.7 * len(both)


def test_a_missing_value_does_not_reach_other_events():
    flow = Continuous(_field(), (2,))
    x = jr.normal(jr.key(1), (2, 3))
    y, log_det = flow.forward(x.at[0, 1].set(jnp.nan))
    clean, clean_det = flow.forward(x)
    assert jnp.isnan(y[:, 1]).all()
    assert jnp.isnan(log_det[1])
    np.testing.assert_allclose(y[:, ::2], clean[:, ::2], atol=1e-5)
    np.testing.assert_allclose(log_det[::2], clean_det[::2], atol=1e-4)


def test_a_missing_condition_does_not_reach_other_events():
    flow = Continuous(_field(cond_dim=1), (2,), (1,), times=1)
    x, condition = jr.normal(jr.key(1), (2, 3)), jnp.asarray([[0.0, 2.0, 1.0]])
    solve = eqx.filter_jit(flow.inverse)
    clean, clean_det = solve(x, condition)
    y, log_det = solve(x, condition.at[0, 1].set(jnp.nan))
    assert jnp.isnan(y[:, 1]).all()
    assert jnp.isnan(log_det[1])
    np.testing.assert_allclose(y[:, ::2], clean[:, ::2], atol=1e-5)
    np.testing.assert_allclose(log_det[::2], clean_det[::2], atol=1e-4)
    assert jnp.isnan(solve(x, jnp.asarray([jnp.nan]))[1]).all()
    # Nor does one that comes up on the way, which would else make steps small without end.
    errors = jnp.asarray([[3.0, jnp.nan, 4.0]])
    np.testing.assert_allclose(_worst((errors, 0 * errors)), math.sqrt(8), rtol=1e-6)


def test_a_field_is_traced_once_and_its_products_are_not_rounded():
    calls = []

    class Counted(eqx.Module):
        field: VelocityField
        batch_last = True

        def __call__(self, t, z):
            calls.append(0)
            return self.field(t, z)

    x = jr.normal(jr.key(1), (2, 3))
    flow = Continuous(Counted(_field()), (2,), times=1)
    flow.forward(x)
    traced = len(calls)
    flow.forward(x + 1)
    assert len(calls) == traced
    fixed = Continuous(_field(), (2,), times=1, fixed_steps=2)
    products = str(jax.make_jaxpr(fixed.forward)(x)).split("dot_general[")[1:]
    assert products
    assert all("HIGHEST" in product[:300] for product in products)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_potential_field_is_a_gradient_and_knows_its_divergence(depth):
    field = PotentialField((1, 3), key=jr.key(0), width=8, depth=depth, cond_dim=2)
    field = randomise(field, jr.key(1), 0.5)
    t, z, c = jnp.asarray(0.3), jr.normal(jr.key(2), (1, 3)), jr.normal(jr.key(3), (2,))

    def potential(z):
        s = jnp.concatenate([z[0], t[None], c])
        layers = list(zip(field.weights, field.biases, strict=True))
        u = 0
        for i, (weight, bias) in enumerate(layers):
            x = weight @ (u if i else s) + bias
            u = u + jnp.log(2 * jnp.cosh(x)) / (max(1, depth - 1) if i else 1)
        return field.head @ u + 0.5 * ((field.root @ s) ** 2).sum() + field.drift @ z[0]

    v, trace = field.with_divergence(t, z, c)
    np.testing.assert_allclose(v, -jax.grad(potential)(z), atol=1e-5)
    np.testing.assert_array_equal(v, field(t, z, c))
    np.testing.assert_allclose(trace, -jnp.trace(jax.hessian(potential)(z)[0, :, 0]), atol=1e-5)
    with jax.enable_x64(True):  # which does not widen what is float32
        assert all(part.dtype == jnp.float32 for part in field.with_divergence(t, z, c))
    batch = jnp.stack([z, z + 1], -1)
    many = field.with_divergence(jnp.asarray([0.3, 0.6]), batch, c)
    np.testing.assert_allclose(many[1][0], trace, atol=1e-5)
    np.testing.assert_allclose(many[0][..., 1], field(jnp.asarray(0.6), z + 1, c), atol=1e-5)


def test_a_divergence_that_the_field_knows_is_taken():
    class Known(eqx.Module):
        matrix: jax.Array

        def __call__(self, t, z):
            return self.matrix @ z

        def with_divergence(self, t, z):
            return self(t, z), 7 + jnp.trace(self.matrix)  # told from the right one

    x = jr.normal(jr.key(1), (3, 4))
    for field in (Known(MATRIX), Frozen(Known(MATRIX))):
        flow = Continuous(field, (3,), fixed_steps=16)
        np.testing.assert_allclose(flow.forward(x)[1], 7 + jnp.trace(MATRIX), atol=1e-4)
        energies = flow.energies("forward", x)[1]  # which differentiates for the Jacobian's norm
        np.testing.assert_allclose(energies.log_det, jnp.trace(MATRIX), atol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("conv", marks=pytest.mark.slow), "potential"])
def test_flow_matching_trains_fields_of_images(kind):
    shape = (1, 3, 3)
    if kind == "conv":
        field = VelocityField(shape, key=jr.key(0), width=8, depth=1, cond_dim=1, kernel=3)
    else:
        field = PotentialField(shape, key=jr.key(0), width=16, cond_dim=1)
    solution = Continuous(field, shape, (1,), fixed_steps=8, solver="midpoint", times=1)
    flow = laminar.Flow(laminar.Normal(shape), solution)
    c = jr.bernoulli(jr.key(1), 0.5, (64, 1)).astype(jnp.float32)
    x = (2 * c - 1)[:, :, None, None] + 0.3 * jr.normal(jr.key(2), (64, *shape))
    before = flow.log_prob(x, c).mean()
    options = {"objective": flow_matching(), "steps": 200, "batch_size": 64, "learning_rate": 0.01}
    flow, _ = laminar.fit(jr.key(3), flow, x, condition=c, **options)
    assert flow.log_prob(x, c).mean() > before + 2
    drawn = flow.sample(jr.key(4), (40,), jnp.ones(1))
    assert drawn.shape == (40, *shape)
    assert drawn.mean() > 0.3


def test_too_few_steps_give_nan():
    y, log_det = Continuous(Linear(50 * MATRIX), (3,), max_steps=3).forward(jnp.ones(3))
    assert jnp.isnan(y).all()
    assert jnp.isnan(log_det)


def test_conditions_and_times_of_a_field_broadcast():
    field = _field(cond_dim=3)
    z, c, t = jr.normal(jr.key(1), (2, 5)), jr.normal(jr.key(2), (3, 5)), jnp.linspace(0, 1, 5)
    whole = field(t, z, c)
    for i in range(5):
        np.testing.assert_allclose(whole[:, i], field(t[i], z[:, i], c[:, i]), atol=1e-5)
    np.testing.assert_allclose(field(t, z, c[:, 0])[:, 0], whole[:, 0], atol=1e-5)
    flow = Continuous(Linear(MATRIX), (3,))
    np.testing.assert_allclose(flow.velocity(t, jnp.ones((3, 5)))[:, 1], MATRIX.sum(1), atol=1e-5)


def test_misuse_is_named():
    field = _field()
    for options, words in (
        ({"divergence": "none"}, "divergence is 'none'"),
        ({"solver": "rk"}, "solver is 'rk'"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"times": (1.0, 0.0)}, "must be two or more and increase"),
        ({"times": 0}, "times must be at least 1"),
        ({"adjoint": "backsolve", "fixed_steps": 3}, "for adaptive steps"),
        ({"solver": "euler"}, "needs fixed_steps"),
    ):
        with pytest.raises(InputError, match=words):
            Continuous(field, (2,), **options)
    with pytest.raises(ShapeError, match="is a vector"):
        Continuous(field, (2,), (2, 2))
    with pytest.raises(ShapeError, match="needs a condition"):
        Continuous(_field(cond_dim=1), (2,), (1,)).forward(jnp.zeros(2))
    with pytest.raises(InputError, match="depth and frequencies"):
        VelocityField(2, key=jr.key(0), depth=0)
    with pytest.raises(ShapeError, match=r"\(channels, \*space\)"):
        VelocityField(2, key=jr.key(0), kernel=3)
    with pytest.raises(InputError, match="rank must be at least 1"):
        PotentialField(2, key=jr.key(0), rank=0)
    with pytest.raises(ShapeError, match="PotentialField needs a condition"):
        PotentialField(2, key=jr.key(0), cond_dim=1)(jnp.zeros(()), jnp.zeros(2))
    with pytest.raises(InputError, match="cnf: dim"):
        laminar.cnf(0, key=jr.key(0))


def test_cnf_starts_as_its_base_and_inverts():
    flow = laminar.cnf(3, key=jr.key(0), width=8, depth=1, cond_dim=2, layers=2)
    x, c = jr.normal(jr.key(1), (5, 3)), jr.normal(jr.key(2), (2,))
    np.testing.assert_allclose(flow.log_prob(x, c), flow.base.log_prob(x), atol=1e-5)
    flow = eqx.tree_at(lambda f: f.bijection, flow, randomise(flow.bijection, jr.key(3), 0.3))
    np.testing.assert_allclose(flow.to_data(flow.to_latent(x, c), c), x, atol=1e-4)
    samples, log_q = flow.sample_and_log_prob(jr.key(4), (5,), c)
    np.testing.assert_allclose(samples, flow.sample(jr.key(4), (5,), c), atol=1e-4)
    np.testing.assert_allclose(flow.log_prob(samples, c), log_q, atol=1e-3)


@pytest.mark.slow
def test_adaptive_steps_keep_the_contract():
    make = (_continuous(key, adjoint="direct") for key in jr.split(jr.key(0)))
    assert check_bijection(next(make), key=jr.key(2), other=next(make)).passed
