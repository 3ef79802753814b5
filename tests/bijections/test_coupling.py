"""Coupling layers: values against the formula, any template, any network, conditions, errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from cases import randomise as draw

from laminar._errors import InputError, ShapeError
from laminar._params import partition
from laminar.bijections.compose import Chain, random_permutation, repeat, reverse
from laminar.bijections.coupling import Coupling, coupling
from laminar.bijections.elementwise import Affine, Exp, Shift, SinhArcsinh
from laminar.bijections.linear import ActNorm
from laminar.bijections.splines import RationalQuadratic
from laminar.nn.mlp import MLP, Concatenated

TEMPLATES = {
    "nice": Shift,
    "realnvp": lambda: Affine(max_log_scale=2.0),
    "spline": lambda: RationalQuadratic(5),
    "chain": lambda: Chain([Affine(), SinhArcsinh()]),
}


def randomise(tree, key):
    return draw(tree, key, 0.3)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("cond_dim", [0, 2])
def test_inverts_and_has_the_log_det_of_its_jacobian(name, cond_dim):
    with jax.enable_x64(True):
        b = coupling(5, TEMPLATES[name](), key=jr.key(0), cond_dim=cond_dim, width=8, depth=1)
        b = randomise(b, jr.key(1))
        assert (b.in_shape, b.out_shape, b.n_identity) == ((5,), (5,), 2)
        x = jr.normal(jr.key(2), (5, 2, 3))
        c = jr.normal(jr.key(3), (2, 2, 3)) if cond_dim else None
        c1 = None if c is None else c[:, 1, 2]

        @eqx.filter_jit
        def everything(b, x, c, c1):
            y, log_det = b.forward(x, c)
            jacobian = jax.jacfwd(lambda x: b.forward(x, c1)[0])(x[:, 1, 2])
            return y, log_det, b.inverse(y, c), b.forward(x[:, 1, 2], c1), jacobian

        y, log_det, (back, minus), (y1, log_det1), jacobian = everything(b, x, c, c1)
        np.testing.assert_array_equal(y[:2], x[:2])
        assert float(jnp.abs(y[2:] - x[2:]).max()) > 0.01
        np.testing.assert_allclose(back, x, atol=1e-11)
        np.testing.assert_allclose(minus, -log_det, atol=1e-11)
        np.testing.assert_allclose(y[:, 1, 2], y1, atol=1e-12)
        np.testing.assert_allclose(log_det[1, 2], log_det1, atol=1e-12)
        np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], log_det1, atol=1e-11)


def test_affine_values_against_the_formula():
    b = randomise(coupling(4, Affine(max_log_scale=2.0), key=jr.key(0), width=8), jr.key(1))
    x = jr.normal(jr.key(2), (4, 6))
    head = np.asarray(b.net(x[:2])) + np.asarray(b.template.params)[:, None, None]
    log_scale = 2.0 * np.tanh(head[1] / 2.0)
    y, log_det = b.forward(x)
    np.testing.assert_allclose(y[2:], np.exp(log_scale) * x[2:] + head[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_det, log_scale.sum(0), rtol=1e-5, atol=1e-6)
    assert np.all(np.abs(b.forward(1e6 * x)[1]) <= 4.0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_starts_at_the_identity(name):
    b = coupling(4, TEMPLATES[name](), key=jr.key(0), cond_dim=1, width=8)
    x = jr.normal(jr.key(1), (4, 3))
    y, log_det = b.forward(x, jnp.ones(1))
    np.testing.assert_allclose(y, x, atol=2e-6)
    np.testing.assert_allclose(log_det, 0.0, atol=2e-6)


def test_a_shared_condition_equals_a_repeated_one():
    b = randomise(coupling(3, Affine(), key=jr.key(0), cond_dim=2, width=8, film=True), jr.key(1))
    x, c = jr.normal(jr.key(2), (3, 5)), jr.normal(jr.key(3), (2,))
    many = jnp.broadcast_to(c[:, None], (2, 5))
    np.testing.assert_allclose(b.forward(x, c)[0], b.forward(x, many)[0], rtol=1e-5, atol=1e-6)


def test_one_dimension_is_moved_by_the_condition_alone():
    b = randomise(coupling(1, RationalQuadratic(4), key=jr.key(0), cond_dim=2, width=8), jr.key(1))
    assert b.n_identity == 0
    x, c = jr.normal(jr.key(2), (1, 5)), jr.normal(jr.key(3), (2, 5))
    y, _ = b.forward(x, c)
    np.testing.assert_allclose(b.inverse(y, c)[0], x, atol=1e-5)
    assert not np.allclose(y, b.forward(x, c[:, ::-1])[0])


def test_takes_any_network():
    x, c = jr.normal(jr.key(2), (4, 2, 3)), jr.normal(jr.key(3), (1, 2, 3))
    theirs = eqx.nn.MLP(2, 2 * 2, 8, 1, key=jr.key(0))
    by_hand = Coupling(Affine(), lambda a: theirs(a).reshape(2, 2), 4)
    flat = Coupling(Affine(), theirs, 4)
    for b in (by_hand, flat):
        y, _ = b.forward(x)
        np.testing.assert_allclose(b.inverse(y)[0], x, atol=1e-5)
    np.testing.assert_allclose(by_hand.forward(x)[0], flat.forward(x)[0], rtol=1e-5)
    joined = Concatenated(eqx.nn.MLP(3, 4, 8, 1, key=jr.key(0)))
    b = Coupling(Affine(), joined, 4, cond_dim=1)
    for condition in (c, c[:, 0, 0]):
        y, _ = b.forward(x, condition)
        np.testing.assert_allclose(b.inverse(y, condition)[0], x, atol=1e-5)


def test_marginal_moves_the_part_that_passes():
    with jax.enable_x64(True):
        marginal = Chain([RationalQuadratic(4, (2,)), ActNorm(2)])
        b = coupling(4, Affine(), key=jr.key(0), width=8, marginal=marginal)
        b = randomise(b, jr.key(1))
        x = jr.normal(jr.key(2), (4, 50))

        @eqx.filter_jit
        def everything(b, x):
            y, log_det = b.forward(x)
            jacobian = jax.jacfwd(lambda x: b.forward(x)[0])(x[:, 0])
            return y, log_det, *b.inverse(y), jacobian

        y, log_det, back, minus, jacobian = everything(b, x)
        np.testing.assert_allclose(back, x, atol=1e-11)
        np.testing.assert_allclose(minus, -log_det, atol=1e-11)
        np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], log_det[0], atol=1e-11)
        # ActNorm stands on the data side, so the standardised data pass on to the spline.
        fitted = b.init_from_data(y)
        z, _ = fitted.marginal.parts[1].inverse(y[:2])
        np.testing.assert_allclose(z.mean(1), 0.0, atol=1e-12)


def test_stacks_in_repeat_and_trains_every_parameter():
    def make(key):
        net_key, perm_key = jr.split(key)
        template = Chain([Affine(), SinhArcsinh()])
        layer = coupling(5, template, key=net_key, width=8, depth=1, cond_dim=2)
        return Chain([randomise(layer, net_key), random_permutation(5, key=perm_key)])

    b = repeat(make, 3, key=jr.key(0))
    x, c = jr.normal(jr.key(1), (5, 4)), jr.normal(jr.key(2), (2, 4))

    @eqx.filter_jit
    def both(b):
        z, total = x, jnp.zeros(4)
        for layer in b.steps():
            z, step = layer.forward(z, c)
            total = total + step
        return b.forward(x, c), (z, total)

    (y, log_det), (z, total) = both(b)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_det, total, rtol=1e-4, atol=1e-5)
    trained, rest = partition(b)

    @eqx.filter_jit
    def gradient(trained):
        def loss(trained):
            z, log_det = eqx.combine(trained, rest).inverse(y, c)
            return jnp.mean(0.5 * jnp.sum(z**2, 0) - log_det)

        return jax.grad(loss)(trained)

    for leaf in jtu.tree_leaves(gradient(trained)):
        assert bool(jnp.isfinite(leaf).all())
        assert float(jnp.abs(leaf).max()) > 0


def test_volume_is_kept_by_affine_maps_alone():
    layer = coupling(
        7, Affine(max_log_scale=2.0), key=jr.key(0), width=8, depth=1, keep_volume=True
    )
    layer = randomise(layer, jr.key(1))
    x = jr.normal(jr.key(2), (7,))
    y, log_det = layer.forward(x)
    scales = jnp.diag(jax.jacfwd(lambda x: layer.forward(x)[0])(x))[layer.n_identity :]
    assert float(log_det) == 0 == float(layer.inverse(y)[1])
    np.testing.assert_allclose(jnp.log(scales).sum(), 0, atol=1e-5)
    assert float(jnp.abs(jnp.log(scales)).max()) > 0.01
    with pytest.raises(InputError, match="keep_volume needs an Affine template"):
        coupling(4, RationalQuadratic(4), key=jr.key(0), keep_volume=True)


def test_gradients_are_finite_far_outside():
    b = randomise(coupling(4, RationalQuadratic(4), key=jr.key(0), width=8), jr.key(1))

    @jax.jit
    @jax.grad
    def gradient(y):
        x, log_det = b.inverse(y)
        return jnp.sum(x) + jnp.sum(log_det)

    y = jnp.broadcast_to(jnp.asarray([[1e6, -1e6, 5.0, 0.0]]), (4, 4))
    assert bool(jnp.isfinite(gradient(y)).all())


def test_errors():
    key = jr.key(0)
    with pytest.raises(ShapeError, match=r"event \(1,\) passes and there is no condition"):
        coupling(1, Affine(), key=key)
    with pytest.raises(ShapeError, match="4 of 4 entries pass"):
        coupling(4, Affine(), key=key, n_identity=4)
    with pytest.raises(ShapeError, match=r"must give \(2, 2\) .* and gives \(3, 2\)"):
        Coupling(Affine(), MLP(2, (3, 2), key=key, width=4), 4)
    with pytest.raises(ShapeError, match=r"cannot take an input of shape \(2,\)"):
        Coupling(Affine(), MLP(3, (2, 2), key=key, width=4), 4)
    with pytest.raises(ShapeError, match=r"and a condition of shape \(3,\)"):
        Coupling(Affine(), lambda x: x, 4, cond_dim=3)
    with pytest.raises(ShapeError, match=r"template must be a scalar map .* \(3,\) to \(3,\)"):
        coupling(4, reverse(3), key=key)
    with pytest.raises(InputError, match="Exp has no parameters"):
        coupling(4, Exp(), key=key)
    with pytest.raises(ShapeError, match=r"part that passes has shape \(2,\)"):
        coupling(4, Affine(), key=key, marginal=ActNorm(3))
    b = coupling(4, Affine(), key=key, cond_dim=3, width=4)
    with pytest.raises(ShapeError, match=r"needs a condition of shape \(3,\)"):
        b.forward(jnp.ones(4))
