"""Langevin and Hamiltonian steps: exact where they claim it, honest bounds where they draw."""

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
from laminar._params import partition
from laminar._typing import Array
from laminar.bijections.amortized import amortized
from laminar.bijections.base import call
from laminar.bijections.compose import Chain, repeat
from laminar.bijections.dynamics import Hamiltonian, Langevin, Leapfrog
from laminar.bijections.elementwise import Affine
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.objectives import reverse_kl
from laminar.train.fit import fit

GRID = np.linspace(-12, 12, 4001)
WIDTH = GRID[1] - GRID[0]


def bump(z):
    """Two unequal modes in one dimension, ln ∫ = 0 for weights that sum to one."""
    a, b = jnp.log(0.7) - 0.5 * (z + 1) ** 2, jnp.log(0.3) - 0.5 * ((z - 2) / 0.6) ** 2
    values = jnp.logaddexp(a, b - math.log(0.6)) - 0.5 * math.log(2 * math.pi)
    return values.sum()


def bowl(z):
    return -0.5 * (z**2).sum()


class Ridge(eqx.Module):
    """A quadratic whose arrays a decoder might own."""

    scale: Array

    def __call__(self, z, condition=None):
        shift = 0.0 if condition is None else condition.sum()
        return -0.5 * (((z - shift) * self.scale) ** 2).sum()


def _normal(x, mean, scale):
    return np.exp(-0.5 * ((x - mean) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))


def _flow(transform):
    return Flow(Normal((1,), loc=0.4, scale=0.8), transform)


def _random(transform, seed=0):
    """Random reverse densities: the identities hold for all of them."""
    reverse = randomise(transform.reverse, jr.key(seed), 0.15)
    return eqx.tree_at(lambda t: t.reverse, transform, reverse)


def _exact_langevin(transform, y):
    """The density of z' by quadrature over z."""
    mean, scale, _ = transform._step(jnp.asarray(GRID, jnp.float32)[None], None)
    joint = _normal(GRID, 0.4, 0.8) * _normal(y, np.asarray(mean[0]), np.asarray(scale[0]))
    return joint.sum() * WIDTH


def _exact_hamiltonian(transform, y):
    """The density of z' by quadrature over the momentum it ended with."""
    ends = jnp.stack([jnp.full(GRID.shape, y, jnp.float32), jnp.asarray(GRID, jnp.float32)])
    (z, v), log_det = transform.leapfrog.inverse(ends)
    joint = _normal(np.asarray(z), 0.4, 0.8) * _normal(np.asarray(v), 0, math.sqrt(1.3))
    return (joint * np.exp(np.asarray(log_det))).sum() * WIDTH


STEPS = {
    "langevin": (lambda: Langevin(bump, 1, step_size=0.7), _exact_langevin),
    "hamiltonian": (
        lambda: Hamiltonian(bump, 1, steps=3, step_size=0.3, mass=1.3, tempering=0.95),
        _exact_hamiltonian,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_inverse_gives_an_unbiased_density(name):
    make, exact = STEPS[name]
    transform = _random(make())
    flow = _flow(transform)
    assert flow.exactness == "bound"
    for y in (-1.2, 0.5, 2.0):
        rows = jnp.full((20_000, 1), y)
        log_q = np.asarray(flow.log_prob(rows, key=jr.key(1)), np.float64)
        density = np.exp(log_q)
        error = density.std() / math.sqrt(len(density))
        truth = exact(transform, y)
        assert abs(density.mean() - truth) < 4 * error
        assert error < 0.04 * truth
        assert log_q.mean() < math.log(truth)


@pytest.mark.parametrize("name", STEPS)
def test_the_forward_pass_gives_a_bound_and_unbiased_weights(name):
    flow = _flow(_random(STEPS[name][0](), 1))
    x, log_q = flow.sample_and_log_prob(jr.key(2), (40_000,))
    log_w = np.asarray(jax.vmap(bump)(x) - log_q, np.float64)
    weights = np.exp(log_w)
    error = weights.std() / math.sqrt(len(weights))
    assert abs(weights.mean() - 1) < 4 * error
    assert error < 0.05
    assert log_w.mean() + 4 * log_w.std() / math.sqrt(len(log_w)) < 0


def test_one_draw_and_its_undoing_have_opposite_log_dets():
    for make, _ in STEPS.values():
        transform = _random(make())
        x = jr.normal(jr.key(0), (1, 5))
        y, log_det = transform.forward(x, key=jr.key(1))
        assert y.shape == (1, 5)
        assert log_det.shape == (5,)
        back, log_det_back = transform.inverse(y, key=jr.key(2))
        # Another draw, so neither the point nor the log-det comes back.
        assert not np.allclose(back, x)
        assert bool(jnp.isfinite(log_det_back).all())


def test_the_true_reverse_leaves_no_gap():
    """For a normal base and target the reverse of a step is normal, and within the family."""
    m, s, size = 0.4, 0.8, 0.5
    keep = 1 - 0.5 * size**2
    gain = keep * s**2 / (keep**2 * s**2 + size**2)
    spread = s * size / math.sqrt(keep**2 * s**2 + size**2)
    langevin = Langevin(bowl, 1, step_size=size)
    values = (m * (1 - gain * keep) / size, (gain - keep) / size, math.log(spread / size))
    langevin = eqx.tree_at(
        lambda t: (t.reverse.shift, t.reverse.gain, t.reverse.log_scale),
        langevin,
        tuple(jnp.array([value]) for value in values),
    )
    y = jnp.linspace(-2, 2, 9)[:, None]
    exact = Normal((1,), loc=keep * m, scale=math.sqrt(keep**2 * s**2 + size**2))
    flow = _flow(langevin)
    np.testing.assert_allclose(flow.log_prob(y, key=jr.key(0)), exact.log_prob(y), atol=2e-5)
    x, log_q = flow.sample_and_log_prob(jr.key(1), (9,))
    np.testing.assert_allclose(log_q, exact.log_prob(x), atol=2e-5)


@pytest.mark.slow
def test_many_langevin_steps_come_to_the_target():
    steps = repeat(lambda key: Langevin(bowl, 1, step_size=0.3), 150, key=jr.key(0))
    flow = Flow(Normal((1,), loc=4.0, scale=0.2), steps)
    x = np.asarray(flow.sample(jr.key(1), (20_000,)))
    # The chain of steps of this size has the variance 1 / (1 − ε²/4).
    assert abs(x.mean()) < 0.04
    assert abs(x.var() - 1 / (1 - 0.3**2 / 4)) < 0.05
    assert flow.path(jnp.zeros((2, 1)), key=jr.key(2)).log_probs.shape == (151, 2)


@pytest.mark.slow
def test_training_the_reverse_density_closes_the_gap():
    target = Normal((1,), loc=1.0, scale=0.5)
    steps = repeat(lambda key: Langevin(target._log_prob, 1, step_size=0.4), 2, key=jr.key(0))
    flow = Flow(Normal((1,)), steps)
    objective = reverse_kl(target._log_prob, 64)
    fitted, _ = fit(
        jr.key(1), flow, None, objective=objective, steps=400, learning_rate=3e-2, validation=None
    )
    before, after = (float(objective(f, None, jr.key(2))[1]["elbo"]) for f in (flow, fitted))
    # ln ∫ p is zero.
    assert before < -0.5
    assert -0.05 < after < 0.02


def test_leapfrog_conserves_energy_returns_and_scales_volume():
    with jax.enable_x64(True):
        z = jr.normal(jr.key(0), (4, 6), jnp.float64)
        plain = Leapfrog(bowl, 2, steps=20, step_size=0.05, mass=jnp.array([0.5, 2.0]))
        end, log_det = plain.forward(z)
        np.testing.assert_array_equal(log_det, np.zeros(6))
        mass = np.array([[0.5], [2.0]])

        def energy(x):
            return 0.5 * (x[:2] ** 2).sum(0) + 0.5 * (x[2:] ** 2 / mass).sum(0)

        np.testing.assert_allclose(energy(np.asarray(end)), energy(np.asarray(z)), rtol=3e-3)
        # Time runs backwards when momenta change their sign.
        flipped = jnp.concatenate([end[:2], -end[2:]])
        back, _ = plain.forward(flipped)
        np.testing.assert_allclose(back[:2], z[:2], atol=1e-12)
        alphas = jnp.array([0.9, 1.2, 1.1])
        tempered = Leapfrog(bowl, 2, steps=3, step_size=0.1, tempering=alphas)
        _, log_det = tempered.forward(z)
        np.testing.assert_allclose(log_det, np.full(6, 2 * np.log(alphas).sum()))
        jacobian = jax.jacfwd(lambda x: tempered.forward(x)[0])(z[:, 0])
        np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], log_det[0], rtol=1e-12)


def test_the_target_is_frozen_unless_asked_for_and_may_take_a_condition():
    for train in (False, True):
        ridge = Ridge(jnp.array([1.0, 3.0]))
        step = Langevin(ridge, 2, cond_dim=3, train_density=train)
        trained, rest = partition(step)
        assert len(jax.tree.leaves(trained)) == 5 + train

        def loss(trained, rest=rest):
            y, log_det = eqx.combine(trained, rest).forward(
                jnp.ones((2,)), jnp.ones((3,)), key=jr.key(0)
            )
            return y.sum() + log_det

        grads = jax.grad(loss)(trained)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    x, c = jnp.ones((2, 4)), jr.normal(jr.key(0), (3, 4))
    y, _ = step.forward(x, c, key=jr.key(1))
    shared, _ = step.forward(x, c[:, 0], key=jr.key(1))
    np.testing.assert_allclose(y[:, 0], shared[:, 0], rtol=1e-6)
    assert not np.allclose(y[:, 1], shared[:, 1])


def test_draws_differ_between_rows_and_layers_when_amortised():
    template = Chain([repeat(lambda key: Langevin(bowl, 2), 2, key=jr.key(0)), Affine(shape=(2,))])
    transform = amortized(template, 3, key=jr.key(1))
    assert transform.exactness == "bound"
    x, c = jnp.zeros((2, 4)), jnp.ones((3, 4))
    y, log_det = call(transform, "forward", x, c, key=jr.key(2))
    assert len(np.unique(np.asarray(y))) == 8
    assert bool(jnp.isfinite(log_det).all())


def test_saving_takes_named_targets_and_refuses_lambdas(tmp_path):
    step = Langevin(Ridge(jnp.array([1.0, 3.0])), 2)
    io.save(tmp_path / "step.lam", step, classes=[Ridge])
    loaded = io.load(tmp_path / "step.lam", classes=[Ridge])
    x = jnp.ones((2, 3))
    for a, b in zip(step.forward(x, key=jr.key(0)), loaded.forward(x, key=jr.key(0)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="log_density"):
        io.save(tmp_path / "no.lam", Langevin(lambda z: -(z**2).sum(), 2))


def test_misuse_is_named():
    with pytest.raises(InputError, match="Langevin draws, so it needs a random key"):
        Langevin(bowl, 2).forward(jnp.zeros((2,)))
    with pytest.raises(InputError, match="needs a random key"):
        _flow(Langevin(bowl, 1)).log_prob(jnp.zeros((1,)))
    with pytest.raises(InputError, match="step_size must be positive"):
        Langevin(bowl, 2, step_size=-0.1)
    with pytest.raises(InputError, match="steps must be at least 1"):
        Leapfrog(bowl, 2, steps=0)
    with pytest.raises(ShapeError, match="mass has shape"):
        Leapfrog(bowl, 2, mass=jnp.ones((3,)))
    with pytest.raises(ShapeError, match=r"must have shape \(\), and has \(2,\)"):
        Leapfrog(lambda z: z, 2)
    with pytest.raises(ShapeError, match="got none"):
        Leapfrog(Ridge(jnp.ones((2,))), 2, cond_dim=1).forward(jnp.zeros((4,)))
