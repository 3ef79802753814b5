"""Flows of images and sequences: identity at the start, both ways, training on digits, files."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from cases import randomise

from laminar import io, zoo
from laminar._errors import ShapeError
from laminar.bijections.splines import RationalQuadratic
from laminar.objectives import Batch, nll
from laminar.train.fit import fit

GLOW = {"scales": 2, "layers": 2, "width": 4, "depth": 1}
TAR = {"layers": 2, "width": 8, "depth": 1, "heads": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "shape", "options"),
    [
        (zoo.glow, (1, 4, 4), GLOW),
        (zoo.glow, (3, 4), {**GLOW, "scales": 1, "template": RationalQuadratic(4)}),
        (zoo.tarflow, (1, 4, 4), TAR),
        (zoo.tarflow, (2, 6), {**TAR, "patch": 3, "template": RationalQuadratic(4)}),
    ],
)
def test_a_flow_starts_as_its_base_and_inverts_at_random_parameters(
    build, shape, options, tmp_path
):
    flow = build(shape, key=jr.key(0), cond_dim=2, **options)
    x, c = jr.normal(jr.key(1), (5, *shape)), jr.normal(jr.key(2), (5, 2))
    flat = -0.5 * (x**2).sum(tuple(range(1, x.ndim))) - 0.5 * x[0].size * np.log(2 * np.pi)
    np.testing.assert_allclose(flow.log_prob(x, c), flat, rtol=1e-4)
    flow = randomise(flow, jr.key(3), 0.2)
    samples, log_q = flow.sample_and_log_prob(jr.key(4), (), c)
    assert samples.shape == (5, *shape)
    np.testing.assert_allclose(flow.log_prob(samples, c), log_q, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(flow.to_data(flow.to_latent(x, c), c), x, atol=1e-3)
    io.save(tmp_path / "flow.lam", flow)
    again = io.load(tmp_path / "flow.lam")
    np.testing.assert_array_equal(again.log_prob(x, c), flow.log_prob(x, c))


def _digits():
    """The 1,797 digits of scikit-learn, 8 × 8 with 17 levels."""
    from sklearn.datasets import load_digits

    return load_digits().images[:, None].astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "options", "most"),
    [
        (zoo.glow, {"layers": 3, "width": 24, "depth": 1, "variational": True}, 3.0),
        (zoo.tarflow, {"layers": 2, "width": 64, "depth": 1}, 3.0),
    ],
)
def test_training_on_digits_lowers_the_bits(build, options, most):
    x = _digits()
    flow = build((1, 8, 8), key=jr.key(0), levels=17, **options)
    fitted = fit(jr.key(1), flow, x, steps=200, batch_size=128)[0]

    def bits(flow):
        return -flow.log_prob(x[::4], key=jr.key(2)).mean() / 64 / np.log(2)

    assert bits(fitted) < most < bits(flow) - 1
    drawn = fitted.sample(jr.key(3), (100,))
    np.testing.assert_array_equal(drawn, jnp.round(drawn))
    assert 0 <= drawn.min() < drawn.max() <= 16


@pytest.mark.parametrize("build", [zoo.glow, zoo.tarflow])
def test_a_step_of_training_reaches_all_parameters(build):
    options = GLOW if build is zoo.glow else TAR
    if build is zoo.glow:
        options = {**options, "scales": 1, "variational": True}
    flow = build((1, 4, 4), key=jr.key(0), levels=8, **options)
    flow = randomise(flow, jr.key(1), 0.2)
    x = jr.randint(jr.key(2), (6, 1, 4, 4), 0, 8).astype(float)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(flow):
        return nll(flow, Batch(x), jr.key(3))[0]

    for path, grad in jtu.tree_leaves_with_path(gradient(flow)):
        assert jnp.isfinite(grad).all(), path
        assert grad.size == 0 or grad.any(), path


@pytest.mark.slow
def test_statistics_are_set_from_whole_numbers():
    flow = zoo.glow((1, 4, 4), key=jr.key(0), levels=8, **GLOW)
    x = jr.randint(jr.key(1), (1, 4, 4, 300), 0, 8).astype(float)
    bijection = flow.bijection.init_from_data(x)
    z = bijection.points("inverse", x, key=jr.key(2))
    np.testing.assert_allclose(z.mean(), 0, atol=0.1)
    np.testing.assert_allclose(z.std(), 1, atol=0.3)


def test_sampling_is_one_program_of_one_scan():
    flow = zoo.tarflow((1, 8, 8), key=jr.key(0), **TAR)
    traces = 0

    @eqx.filter_jit
    def draw(flow, key):
        nonlocal traces
        traces += 1
        return flow.sample(key, (3,))

    draw(flow, jr.key(0))
    draw(randomise(flow, jr.key(1), 0.1), jr.key(2))
    assert traces == 1
    # Layers, tokens and blocks are a scan each, one within the other.
    text = str(jax.make_jaxpr(lambda z: flow.bijection.forward(z)[0])(jnp.zeros((4, 16))))
    assert text.count("scan[") == 3


def test_misuse_is_named():
    with pytest.raises(ShapeError, match="multiples of 4"):
        zoo.glow((1, 6, 6), key=jr.key(0))
    with pytest.raises(ShapeError, match="lengths of space"):
        zoo.tarflow((1, 6, 6), key=jr.key(0), patch=4)
