"""Transformers over tokens: who sees whom, the incremental pass, its cost, and gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from cases import randomise

from laminar._errors import InputError, ShapeError
from laminar._params import partition
from laminar.bijections.attention import TransformerAutoregressive, transformer_autoregressive
from laminar.bijections.elementwise import Affine
from laminar.bijections.splines import RationalQuadratic
from laminar.nn.attention import CausalTransformer

ORDER = np.array([2, 0, 3, 1])


def _layer(template=None, seed=0, **options):
    options = {"width": 8, "depth": 2, "heads": 2, **options}
    template = Affine(max_log_scale=1.0) if template is None else template
    layer = transformer_autoregressive((3, 4), template, key=jr.key(seed), **options)
    return randomise(layer, jr.key(seed + 1), 0.4)


def test_a_token_sees_those_before_it_and_no_other():
    net = _layer(order=ORDER).net
    sees = jax.jacfwd(lambda x: net(x))(jr.normal(jr.key(2), (3, 4)))
    sees = np.abs(np.asarray(sees)).max((0, 1, 3)) > 0
    np.testing.assert_array_equal(sees, ORDER[:, None] > ORDER[None])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_incremental_pass_is_the_dense_one_to_rounding(dtype):
    with jax.enable_x64(dtype == "float64"):
        layer = jtu.tree_map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
            _layer(order=ORDER, cond_dim=2),
        )
        z = jr.normal(jr.key(2), (3, 4, 2, 3), dtype)
        c = jr.normal(jr.key(3), (2, 2, 3), dtype)
        x, log_det = layer.forward(z, c)
        theta = layer.net(x, c, layer.template.params)
        again, log_dets = layer.template.forward_kernel(theta, z)
        tolerance = 200 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(x, again, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(log_det, log_dets.sum((0, 1)), rtol=tolerance, atol=tolerance)


def test_any_scalar_map_will_do_and_the_start_is_the_template():
    spline = transformer_autoregressive((3, 4), RationalQuadratic(4), key=jr.key(0), width=8)
    x = jr.normal(jr.key(1), (3, 4))
    np.testing.assert_allclose(spline.forward(x)[0], x, atol=1e-5)
    layer = _layer(RationalQuadratic(4))
    np.testing.assert_allclose(layer.inverse(layer.forward(x)[0])[0], x, atol=1e-4)


def test_a_step_is_compiled_once_for_all_tokens_and_blocks():
    def equations(length, depth):
        layer = transformer_autoregressive(
            (2, length), Affine(), key=jr.key(0), width=4, heads=1, depth=depth
        )
        return len(str(jax.make_jaxpr(layer.forward)(jnp.zeros((2, length)))))

    assert equations(16, 4) < 1.1 * equations(4, 2)


def test_training_reaches_every_parameter():
    trained, rest = partition(_layer(cond_dim=2))
    x, c = jr.normal(jr.key(2), (3, 4, 5)), jr.normal(jr.key(3), (2, 5))

    def loss(trained):
        z, log_det = eqx.combine(trained, rest).inverse(x, c)
        return (z**2).sum() - log_det.sum()

    for path, grad in jtu.tree_leaves_with_path(jax.grad(loss)(trained)):
        assert jnp.isfinite(grad).all()
        assert grad.any() or "template" in jtu.keystr(path), path


def test_misuse_is_named():
    with pytest.raises(InputError, match="heads must divide"):
        _layer(heads=3)
    with pytest.raises(InputError, match="depth must be"):
        _layer(depth=0)
    with pytest.raises(ShapeError, match="tokens"):
        transformer_autoregressive((3,), Affine(), key=jr.key(0))
    net = CausalTransformer(2, 3, 1, key=jr.key(0), width=4, cond_dim=2)
    with pytest.raises(ShapeError, match="takes 2 parameters"):
        TransformerAutoregressive(Affine(), net)
    with pytest.raises(ShapeError, match="scalar"):
        TransformerAutoregressive(Affine(shape=(2,)), net)
    with pytest.raises(ShapeError, match="takes a condition"):
        net(jnp.zeros((2, 3)))
