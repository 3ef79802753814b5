"""Residual flows: the bound on their network, the three log-dets, and the fixed point."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from cases import randomise

from laminar._errors import InputError, ShapeError
from laminar.bijections.base import Invert
from laminar.bijections.compose import Chain, repeat
from laminar.bijections.dynamics import Langevin
from laminar.bijections.residual import Residual, with_log_det
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.nn.lipschitz import LipschitzConv, LipschitzMLP, _norm, spectral_bound


def _layer(dim=3, lipschitz=0.8, **options):
    net = LipschitzMLP(dim, width=16, depth=2, lipschitz=lipschitz, key=jr.key(0))
    return randomise(Residual(net, **options), jr.key(1))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (64, 64)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_the_spectral_bound_is_above_and_near(shape, scale):
    for weight in (jr.normal(jr.key(0), shape), jnp.eye(*shape)):
        exact = np.linalg.svd(np.asarray(weight, np.float64))[1].max() * scale
        bound = float(spectral_bound(weight * scale))
        assert exact * (1 - 1e-5) <= bound <= exact * (min(shape) ** (1 / 256) + 1e-5)


def test_the_gradient_of_the_spectral_bound():
    assert bool((jax.grad(spectral_bound)(jnp.zeros((3, 4))) == 0).all())
    with jax.enable_x64(True):
        weight = jr.normal(jr.key(0), (4, 3))
        u, _, vt = np.linalg.svd(weight)
        np.testing.assert_allclose(
            jax.grad(spectral_bound)(weight), np.outer(u[:, 0], vt[0]), atol=1e-3
        )


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_network_is_a_contraction_at_any_parameters(scale):
    net = randomise(
        LipschitzMLP(4, width=8, depth=2, lipschitz=0.7, key=jr.key(0)), jr.key(1), scale
    )
    x = 10 * jr.normal(jr.key(2), (4, 500))
    jacobian = jax.vmap(jax.jacfwd(net), in_axes=-1)(x)
    assert np.linalg.norm(jacobian, 2, axis=(1, 2)).max() <= 0.7 + 1e-5


@pytest.mark.parametrize("space", [(5,), (4, 3), (3, 6), (3, 3, 4)])
def test_the_norm_of_a_convolution_is_bounded_at_every_size_of_space(space):
    net = randomise(LipschitzConv((2, *space), key=jr.key(0), width=4), jr.key(1))
    weights = [net.weights[0], net.weights[0] * 0, net.weights[0].at[...].set(1.0)]
    for weight in weights:
        g = eqx.tree_at(lambda g: (g.weights, g.biases), net.at(), ((weight,), (jnp.zeros(()),)))
        matrix = np.asarray(g(jnp.eye(2 * math.prod(space))), np.float64)
        exact, bound = np.linalg.norm(matrix, 2), float(_norm(weight, space))
        assert exact * (1 - 1e-5) <= bound <= exact * (4 ** (1 / 256) + 1e-5)
        grads = jax.grad(lambda w: _norm(w, space))(weight)
        assert bool(jnp.isfinite(grads).all())


@pytest.mark.parametrize("depth", [1, 3])
def test_a_convolutional_network_is_a_contraction_and_moves_with_the_image(depth):
    net = LipschitzConv((2, 4, 5), width=6, depth=depth, cond_dim=3, lipschitz=0.7, key=jr.key(0))
    assert not net(jnp.ones((2, 4, 5)), jnp.ones(3)).any()
    net = randomise(net, jr.key(1), 3.0)
    x, c = 2 * jr.normal(jr.key(2), (2, 4, 5, 6)), jr.normal(jr.key(3), (3, 6))
    whole = eqx.filter_jit(net)(x, c)
    np.testing.assert_allclose(net(x[..., 2], c[:, 2]), whole[..., 2], atol=1e-5)
    jacobian = jax.vmap(jax.jacfwd(net), in_axes=-1)(x, c).reshape(6, 40, 40)
    size = np.linalg.norm(jacobian, 2, axis=(1, 2)).max()
    assert 0.05 < size <= 0.7 + 1e-5
    turned = net(jnp.roll(x, (1, 2), (1, 2)), c)
    np.testing.assert_allclose(turned, jnp.roll(whole, (1, 2), (1, 2)), atol=1e-5)


@pytest.mark.slow
def test_the_estimates_of_an_image_are_those_of_its_jacobian():
    net = LipschitzConv((2, 3, 4), width=6, lipschitz=0.7, key=jr.key(0))
    exact = randomise(Residual(net), jr.key(1))
    x = jr.normal(jr.key(2), (2, 3, 4, 2))
    y, truth = exact.forward(x)
    jacobian = jax.vmap(jax.jacfwd(exact.net), in_axes=-1)(x).reshape(2, 24, 24)
    expected = np.linalg.slogdet(np.eye(24) + np.asarray(jacobian))[1]
    np.testing.assert_allclose(truth, expected, atol=1e-5)
    back, log_det = exact.inverse(y)
    np.testing.assert_allclose(back, x, atol=1e-5)
    np.testing.assert_allclose(log_det, -truth, atol=1e-5)
    guess = with_log_det(exact, "roulette", terms=2)
    draws = jax.jit(jax.vmap(lambda k: guess.forward(x, key=k)[1]))(jr.split(jr.key(3), 3000))
    assert _mean_within_errors(draws, np.asarray(truth))


@pytest.mark.parametrize("lipschitz", [0.5, 0.99])
def test_the_fixed_point_is_found_far_out_and_near_the_limit(lipschitz):
    layer = _layer(lipschitz=lipschitz)
    x = jr.normal(jr.key(2), (3, 50)) * 10.0 ** jnp.linspace(-3, 5, 50)[None]
    y = layer.points("forward", x)
    back = eqx.filter_jit(layer.points)("inverse", y)
    error = jnp.abs(back - x).max(0) / (1 + jnp.abs(x).max(0))
    assert float(error.max()) < 1e-6 / (1 - lipschitz)


def test_a_new_layer_is_the_identity_and_all_parameters_learn():
    net = LipschitzMLP(3, width=8, depth=2, cond_dim=2, key=jr.key(0))
    x, condition = jr.normal(jr.key(1), (3, 5)), jr.normal(jr.key(2), (2, 5))
    layer = Residual(net)
    y, log_det = layer.forward(x, condition)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(log_det, 0)
    layer = randomise(layer, jr.key(3))

    def loss(layer, direction, key):
        y, log_det = getattr(layer, direction)(x, condition, key=key)
        return jnp.sin(y).sum() + log_det.sum()

    for log_det in ("exact", "roulette"):
        for direction in ("forward", "inverse"):
            at = with_log_det(layer, log_det)
            grads = eqx.filter_jit(eqx.filter_grad(loss))(at, direction, jr.key(4))
            for leaf in jtu.tree_leaves(eqx.filter(grads, eqx.is_inexact_array)):
                assert bool(jnp.isfinite(leaf).all())
                assert float(jnp.abs(leaf).max()) > 0


def _mean_within_errors(draws, exact, errors=4.0):
    draws = np.asarray(draws, np.float64)
    mean, error = draws.mean(0), draws.std(0, ddof=1) / np.sqrt(len(draws))
    return bool((np.abs(mean - exact) <= errors * error + 1e-6).all())


def _value_and_gradient(layer, x):
    """For one key: log-dets, and the gradient of their sum in the point and one weight."""

    def total(weight, x, key):
        at = eqx.tree_at(lambda s: s.net.weights[1], layer, weight)
        log_det = at.forward(x, key=key)[1]
        return log_det.sum(), log_det

    @jax.jit
    def run(keys):
        grad = jax.grad(total, argnums=(0, 1), has_aux=True)
        (by_weight, by_x), log_det = jax.vmap(lambda k: grad(layer.net.weights[1], x, k))(keys)
        return jnp.concatenate(
            [log_det, by_x.reshape(len(keys), -1), by_weight.reshape(len(keys), -1)[:, :20]], -1
        )

    return run


@pytest.mark.parametrize(("lipschitz", "probes"), [(0.6, 1), (0.9, 2)])
def test_roulette_is_unbiased_in_value_and_gradient(lipschitz, probes):
    layer = _layer(lipschitz=lipschitz)
    x = jr.normal(jr.key(2), (3, 4))
    keys = jr.split(jr.key(3), 4000)
    exact = np.asarray(_value_and_gradient(layer, x)(keys[:1]))[0]
    layer = with_log_det(layer, "roulette", terms=2, probes=probes)
    draws = _value_and_gradient(layer, x)(keys)
    assert _mean_within_errors(draws, exact)
    # The test would see a series that stops where roulette starts.
    short = with_log_det(layer, "power_series", terms=1)
    assert not _mean_within_errors(_value_and_gradient(short, x)(keys), exact)


@pytest.mark.slow
def test_the_power_series_is_what_it_says():
    with jax.enable_x64(True):
        layer = jtu.tree_map(
            lambda v: v.astype("float64") if eqx.is_array(v) else v, _layer(lipschitz=0.8)
        )
        x = jr.normal(jr.key(2), (3, 4))
        jacobian = jax.vmap(jax.jacfwd(layer.net), in_axes=-1)(x)
        exact = layer.forward(x)[1]
        np.testing.assert_allclose(
            exact, np.linalg.slogdet(np.eye(3) + np.asarray(jacobian))[1], rtol=1e-12
        )
        for terms in (1, 4):
            powers = [np.linalg.matrix_power(jacobian, k) for k in range(1, terms + 1)]
            series = sum(
                (-1.0) ** (k + 1) / k * np.trace(p, axis1=1, axis2=2)
                for k, p in enumerate(powers, start=1)
            )
            keys = jr.split(jr.key(3), 3000)
            at = with_log_det(layer, "power_series", terms=terms)
            draws = jax.jit(jax.vmap(lambda k, at=at: at.forward(x, key=k)[1]))(keys)
            assert _mean_within_errors(draws, series)
            bias = 3 * 0.8 ** (terms + 1) / ((terms + 1) * 0.2)
            assert np.abs(series - exact).max() <= bias


def test_memory_does_not_grow_with_the_number_of_terms():
    def memory(terms):
        layer = _layer(log_det="power_series", terms=terms)

        def loss(net, x):
            at = eqx.tree_at(lambda s: s.net, layer, net)
            return at.forward(x, key=jr.key(0))[1].sum()

        arrays, static = eqx.partition(layer.net, eqx.is_array)
        grad = jax.jit(jax.grad(lambda arrays, x: loss(eqx.combine(arrays, static), x)))
        compiled = grad.lower(arrays, jnp.zeros((3, 64))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(100) == memory(2)


def test_a_flow_of_estimates_asks_for_its_key_and_may_be_made_exact():
    stack = repeat(lambda key: Invert(_layer(log_det="roulette")), 2, key=jr.key(0))
    flow = Flow(Normal(3), Chain([stack]))
    x = jr.normal(jr.key(1), (5, 3))
    assert flow.exactness == "unbiased"
    with pytest.raises(InputError, match="unbiased estimate, not exact, so log_prob needs"):
        flow.log_prob(x)
    with pytest.raises(InputError, match="needs a random key"):
        _layer(log_det="roulette").forward(x.T)
    biased = with_log_det(flow, "power_series")
    assert biased.exactness == "biased"
    with pytest.raises(InputError, match="a biased estimate"):
        biased.log_prob(x)
    exact = with_log_det(flow, "exact")
    assert exact.exactness == "exact"
    draws = jnp.stack([flow.log_prob(x, key=k) for k in jr.split(jr.key(2), 30)])
    assert _mean_within_errors(draws, np.asarray(exact.log_prob(x)), errors=5.0)


def test_misuse_is_named():
    net = LipschitzMLP(2, width=4, key=jr.key(0))
    with pytest.raises(InputError, match="log_det must be"):
        Residual(net, log_det="guess")
    with pytest.raises(InputError, match="at least 1"):
        Residual(net, terms=0)
    with pytest.raises(InputError, match=r"lipschitz in \(0, 1\)"):
        LipschitzMLP(2, lipschitz=1.0, key=jr.key(0))
    with pytest.raises(InputError, match="width must be at least 1"):
        LipschitzMLP(2, width=0, key=jr.key(0))
    with pytest.raises(InputError, match="needs a condition"):
        LipschitzMLP(2, cond_dim=2, key=jr.key(0))(jnp.zeros(2))
    with pytest.raises(InputError, match="odd length of at most 2"):
        LipschitzConv((1, 4, 2), key=jr.key(0))
    with pytest.raises(ShapeError, match=r"takes events \(C, \*space\)"):
        LipschitzConv((4,), key=jr.key(0))
    with pytest.raises(InputError, match="LipschitzConv needs a condition"):
        LipschitzConv((1, 3), cond_dim=2, key=jr.key(0))(jnp.zeros((1, 3)))
    with pytest.raises(ShapeError, match="takes no bounds"):
        Invert(Langevin(lambda z: -(z**2).sum(), 2))
