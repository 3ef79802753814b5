"""Images and sequences: values against their definitions, masks, scales, and cells of integers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from cases import randomise
from scipy.stats import norm

from laminar._errors import InputError, ShapeError
from laminar._params import partition
from laminar.bijections.base import Identity, Invert
from laminar.bijections.compose import Chain
from laminar.bijections.coupling import Coupling
from laminar.bijections.dequantise import Dequantise, dequantisation_noise
from laminar.bijections.elementwise import Affine, Sigmoid
from laminar.bijections.image import (
    Haar,
    PeriodicConv,
    Positionwise,
    Squeeze,
    conv1x1,
    multiscale,
)
from laminar.bijections.linear import ActNorm
from laminar.bijections.masks import (
    MaskedCoupling,
    channel_mask,
    checkerboard_mask,
    conv_coupling,
)
from laminar.bijections.residual import Residual
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.nn.lipschitz import LipschitzMLP


def test_squeezing_moves_blocks_to_channels():
    x = jnp.arange(2 * 4 * 6.0).reshape(2, 4, 6)
    y, _ = Squeeze((2, 4, 6)).forward(x)
    assert y.shape == (8, 2, 3)
    for c, i, j in [(0, 1, 2), (1, 0, 1)]:
        np.testing.assert_array_equal(
            y[4 * c : 4 * c + 4, i, j], x[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].ravel()
        )
    y, _ = Squeeze((1, 6), 3).forward(jnp.arange(6.0)[None])
    np.testing.assert_array_equal(y, [[0, 3], [1, 4], [2, 5]])


def test_the_wavelet_is_orthogonal_and_averages_come_first():
    x = jr.normal(jr.key(0), (2, 4, 4))
    y, _ = Haar((2, 4, 4)).forward(x)
    means = x.reshape(2, 2, 2, 2, 2).mean((2, 4))
    np.testing.assert_allclose(y[:2], 2 * means, atol=1e-6)
    np.testing.assert_allclose((y**2).sum(), (x**2).sum(), rtol=1e-5)
    flat, _ = Haar((1, 4)).forward(jnp.ones((1, 4)))
    np.testing.assert_allclose(flat, [[2**0.5] * 2, [0, 0]], atol=1e-6)


@pytest.mark.parametrize("space", [(4,), (3, 4), (4, 5), (2, 3, 2)])
def test_a_periodic_convolution_is_the_sum_over_shifts(space):
    kernel = tuple(min(3, s - 1 + s % 2) for s in space)
    conv = randomise(PeriodicConv((2, *space), kernel), jr.key(0), 0.3)
    x = jr.normal(jr.key(1), (2, *space))
    y, log_det = conv.forward(x)
    axes = tuple(range(1, 1 + len(space)))
    expected = conv.shift.reshape(2, *(1,) * len(space))
    for at in np.ndindex(*kernel):
        shift = [k // 2 - i for i, k in zip(at, kernel, strict=True)]
        w = conv.weight[(slice(None), slice(None), *at)]
        expected = expected + jnp.tensordot(w, jnp.roll(x, shift, axes), 1)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jacobian = jax.jacfwd(lambda x: conv.forward(x)[0])(x).reshape(x.size, x.size)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobian)[1], atol=1e-4)


def test_one_by_one_convolutions_mix_the_channels_of_each_position():
    layer = randomise(conv1x1((3, 2, 2), key=jr.key(0)), jr.key(1))
    x = jr.normal(jr.key(2), (3, 2, 2))
    expected = jnp.einsum("oi,ihw->ohw", layer.bijection.matrix, x)
    np.testing.assert_allclose(layer.forward(x)[0], expected, atol=1e-5)
    data = 5 + 2 * jr.normal(jr.key(3), (3, 2, 2, 400))
    z = Positionwise(ActNorm(3), (2, 2)).init_from_data(data).inverse(data)[0]
    np.testing.assert_allclose(z.mean((1, 2, 3)), 0, atol=1e-4)
    estimate = Residual(LipschitzMLP(3, key=jr.key(0), width=4), "roulette")
    with pytest.raises(ShapeError, match="exact"):
        Positionwise(estimate, (2, 2))


def test_what_a_mask_lets_pass_sets_the_rest():
    shape = (2, 4, 4)
    for mask in (checkerboard_mask(shape), channel_mask(shape, flip=True)):
        layer = conv_coupling(shape, Affine(), key=jr.key(0), mask=mask, width=4, depth=1)
        x = jr.normal(jr.key(1), shape)
        np.testing.assert_array_equal(layer.forward(x)[0], x)
        layer = randomise(layer, jr.key(2), 0.5)
        moved = layer.forward(x)[0] != x
        np.testing.assert_array_equal(moved, ~mask)
        assert isinstance(layer, MaskedCoupling)
    assert bool(checkerboard_mask(shape)[0, 0, 0])
    np.testing.assert_array_equal(checkerboard_mask(shape), ~checkerboard_mask(shape, True))
    np.testing.assert_array_equal(checkerboard_mask((1, 4))[0], [True, False, True, False])
    assert channel_mask(shape)[0].all()
    assert not channel_mask(shape)[1].any()
    halves = conv_coupling(shape, Affine(), key=jr.key(0), width=4)
    assert isinstance(halves, Coupling)
    with pytest.raises(ShapeError, match="channels pass"):
        conv_coupling((1, 4, 4), Affine(), key=jr.key(0))
    with pytest.raises(ShapeError, match="needs a condition"):
        conv_coupling(shape, Affine(), key=jr.key(0), mask=mask, width=4, cond_shape=(2,)).forward(
            x
        )


def test_scales_take_their_channels_from_a_flat_latent():
    fine, coarse = Squeeze((1, 4, 4)), Squeeze((2, 2, 2))
    flow = multiscale([Chain([Affine(2.0, 3.0, shape=(8, 1, 1)), Invert(coarse)]), Invert(fine)])
    assert (flow.in_shape, flow.out_shape) == ((16,), (1, 4, 4))
    x = jr.normal(jr.key(0), (1, 4, 4, 3))
    z, log_det = flow.inverse(x)
    squeezed = fine.forward(x)[0]
    np.testing.assert_allclose(z[8:], squeezed[2:].reshape(8, 3))
    kept = coarse.forward(squeezed[:2])[0].reshape(8, 3)
    np.testing.assert_allclose(z[:8], (kept - 2) / 3, rtol=1e-5)
    np.testing.assert_allclose(log_det, -8 * np.log(3), rtol=1e-5)
    assert len(flow.steps()) == 3
    with pytest.raises(ShapeError, match="more channels"):
        multiscale([Identity((2, 2)), Identity((2, 2))])


def _cells(noise=None):
    """Two pixels of four values under a normal law seen through the logistic function."""
    return Flow(Normal((2,), 0.3, 0.8), Chain([Sigmoid((2,)), Dequantise((2,), 4, noise)]))


def _exact():
    """The probability of each of the sixteen images."""
    ends = np.concatenate([[-np.inf], np.log([1 / 3, 1, 3]), [np.inf]])
    cell = np.diff(norm.cdf(ends, 0.3, 0.8))
    return np.log(cell[:, None] * cell[None])


@pytest.mark.parametrize("kind", ["uniform", "logistic"])
def test_dequantised_likelihoods_are_bounds_of_the_probabilities(kind):
    noise = None if kind == "uniform" else Chain([Affine(0.2, 1.2, shape=(2,)), Sigmoid((2,))])
    flow = _cells(noise)
    assert flow.exactness == "bound"
    images = jnp.stack(jnp.meshgrid(jnp.arange(4.0), jnp.arange(4.0), indexing="ij"), -1)
    log_p = eqx.filter_jit(jax.vmap(lambda key: flow.log_prob(images, key=key)))(
        jr.split(jr.key(0), 10_000)
    )
    exact = _exact()
    np.testing.assert_allclose(jax.nn.logsumexp(log_p, 0) - np.log(10_000), exact, atol=0.03)
    assert (log_p.mean(0) < exact).all()
    counts = flow.sample(jr.key(1), (40_000,))
    frequency = np.histogram2d(*np.asarray(counts).T, bins=4, range=[[-0.5, 3.5]] * 2)[0] / 40_000
    np.testing.assert_allclose(frequency, np.exp(exact), atol=0.01)
    assert flow.log_prob(jnp.asarray([0.5, 1.0]), key=jr.key(2)) == -jnp.inf
    assert flow.log_prob(jnp.asarray([4.0, 1.0]), key=jr.key(2)) == -jnp.inf
    assert jnp.isnan(flow.log_prob(jnp.asarray([jnp.nan, 1.0]), key=jr.key(2)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_cells_are_left_by_no_rounding(dtype, levels):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.tile(jnp.arange(levels, dtype=dtype), 200)[None]
        layer = Dequantise((1,), levels)
        y, log_det = layer.inverse(x, key=jr.key(0))
        assert ((y > 0) & (y < 1)).all()
        back, log_det_back = layer.forward(y)
        np.testing.assert_array_equal(back, x)
        np.testing.assert_allclose(log_det, -np.log(levels), rtol=1e-5)
        np.testing.assert_allclose(log_det_back, np.log(levels), rtol=1e-5)
        for edge in (0.0, 1e-30, 1.0, -1.0, 1e6):
            image, log_det = layer.forward(jnp.asarray([edge], dtype))
            assert 0 <= image[0] < levels
            assert jnp.isfinite(log_det) == (0 < edge < 1)


def test_variational_noise_starts_uniform_is_conditioned_and_agrees_both_ways():
    shape = (1, 4, 2)
    layer = Dequantise(shape, 8, dequantisation_noise(shape, key=jr.key(0), layers=2, width=4))
    x = jr.randint(jr.key(1), (*shape, 5), 0, 8).astype(float)
    np.testing.assert_allclose(layer.inverse(x, key=jr.key(2))[1], -8 * np.log(8), rtol=1e-4)
    layer = randomise(layer, jr.key(3), 0.3)
    y, log_det = layer.inverse(x, key=jr.key(2))
    back, log_det_back = layer.forward(y)
    np.testing.assert_array_equal(back, x)
    np.testing.assert_allclose(log_det, -log_det_back, atol=1e-2)
    other = layer.inverse(x.at[0, 0, 0].set(7.0 - x[0, 0, 0]), key=jr.key(2))[0]
    assert not np.allclose((8 * other) % 1, (8 * y) % 1, atol=1e-3)
    trained, rest = partition(layer)

    def loss(trained):
        return eqx.combine(trained, rest).inverse(x, key=jr.key(2))[1].sum()

    for grad in jtu.tree_leaves(jax.grad(loss)(trained)):
        assert jnp.isfinite(grad).all()
        assert grad.size == 0 or grad.any()


def test_dequantisation_names_misuse():
    with pytest.raises(InputError, match="random key"):
        Dequantise((2,), 4).inverse(jnp.zeros(2))
    np.testing.assert_allclose(
        Dequantise((2,), 4).points("inverse", jnp.asarray([0.0, 3.0])), [0.125, 0.875]
    )
    with pytest.raises(InputError, match="2 levels"):
        Dequantise((2,), 1)
    with pytest.raises(ShapeError, match="noise"):
        Dequantise((2,), 4, Sigmoid((3,)))
    for bad in (lambda: Squeeze((1, 3)), lambda: Haar((1, 5)), lambda: Squeeze((4,))):
        with pytest.raises(ShapeError, match="lengths of space"):
            bad()
    with pytest.raises(InputError, match="odd length"):
        PeriodicConv((1, 4), 2)
    with pytest.raises(ShapeError, match="three axes"):
        PeriodicConv((4,))


def test_cells_too_narrow_for_the_precision_are_refused():
    with pytest.raises(InputError, match="too narrow for float32; take float64 or fewer levels"):
        Dequantise((1,), 2**22).inverse(jnp.array([5.0]), key=jr.key(0))
    # 16 bits are not.
    image = Dequantise((64,), 2**16)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2**16, 64), jnp.float32)
    for seed in range(20):
        y, _ = image.inverse(x, key=jr.key(seed))
        assert (image.forward(y)[0] == x).all()
