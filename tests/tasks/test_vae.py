"""The deep latent Gaussian model, against quadrature and on handwritten digits of 8 × 8 pixels."""

import functools
import math
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from sklearn.datasets import load_digits

import laminar
from laminar._errors import InputError, ShapeError
from laminar._params import Frozen
from laminar.distributions import ConditionalNormal, Normal
from laminar.objectives import Batch, linear_annealing
from laminar.tasks.vae import (
    LAYERS,
    VAE,
    Bernoulli,
    UniformDequantisation,
    binarise,
    free_energy,
    vae,
)
from laminar.train import Checkpoint

KINDS = tuple(LAYERS)
GREY = (load_digits().data / 16).astype(np.float32)
BITS = np.asarray(binarise(jr.key(0), jnp.asarray(GREY)))
TRAIN, TEST = BITS[:1500], BITS[1500:]


def some(kinds):
    """The kinds, of which two are tested every time and the others with the slow tests."""
    return [pytest.param(k, marks=[pytest.mark.slow] * (k not in ("planar", "iaf"))) for k in kinds]


def small(posterior="diagonal", **options):
    """A model of the digits that trains in seconds."""
    sizes = {"width": 48, "depth": 1, "window": 2, "flow_width": 24, "layers": 3, "latent": 6}
    return vae(64, posterior=posterior, key=jr.key(1), **{**sizes, **options})


def train(model, steps=300, data=TRAIN, **options):
    objective = options.pop("objective", free_energy(linear_annealing(over=steps // 3)))
    settings = {"batch_size": 100, "learning_rate": 4e-3, "validation": None, "progress": False}
    settings.update(objective=objective, steps=steps, **options)
    return laminar.fit(jr.key(2), model, data, **settings)


def bound(model, x=TEST, samples=200):
    return model.log_likelihood(jr.key(3), x, samples)


def finite(tree):
    leaves = jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))
    return all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)


def same(a, b):
    return bool(eqx.tree_equal(eqx.filter(a, eqx.is_array), eqx.filter(b, eqx.is_array)))


def tiny(posterior="diagonal", **options):
    """A model of three bits with one latent number, so that quadrature is exact."""
    sizes = {"width": 8, "depth": 1, "window": 2, "flow_width": 4, "layers": 2, **options}
    model = vae(3, 1, posterior=posterior, key=jr.key(4), **sizes)
    # Larger weights, so that the bits depend on z and the posterior is not normal.
    return eqx.tree_at(lambda m: m.decoder.net.head.weight, model, replace_fn=lambda w: 20 * w)


def by_quadrature(model, x):
    z = jnp.linspace(-9, 9, 4001)[None]
    log_p = jax.vmap(lambda x: model.decoder._log_prob(jnp.outer(x, jnp.ones_like(z[0])), z))(x)
    log_p = log_p + model._prior._log_prob(z)[None]
    return jax.nn.logsumexp(log_p, axis=1) + math.log(18 / 4000)


ALL_BITS = jnp.asarray([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)], jnp.float32)


@pytest.mark.parametrize("posterior", some(KINDS))
def test_log_likelihood_is_the_integral(posterior):
    model = tiny(posterior)
    truth = by_quadrature(model, ALL_BITS)
    assert jnp.exp(truth).sum() == pytest.approx(1, abs=1e-4)
    found = model.log_likelihood(jr.key(0), ALL_BITS, 20_000)
    assert (jnp.abs(found.log_prob - truth) < 5 * found.error + 1e-4).all()
    assert (found.error < 0.05).all()
    assert (found.elbo < truth + 0.02).all()
    assert ((found.ess > 1) & (found.ess <= 20_001)).all()


def test_estimates_do_not_depend_on_how_the_rows_are_cut():
    model = tiny()
    x = jnp.tile(ALL_BITS, (3, 1)).reshape(4, 6, 3)
    for size in (5, 24, 1000):
        found = model.log_likelihood(jr.key(1), x, 3_001, batch_size=size)
        assert found.log_prob.shape == (4, 6)
        truth = by_quadrature(model, x.reshape(-1, 3)).reshape(4, 6)
        assert (jnp.abs(found.log_prob - truth) < 6 * found.error + 1e-3).all()


def test_the_error_is_the_spread_of_repeated_estimates():
    model = tiny()
    runs = [model.log_likelihood(jr.key(i), ALL_BITS, 100) for i in range(200)]
    spread = np.std([r.log_prob for r in runs], axis=0, ddof=1)
    told = np.mean([r.error for r in runs], axis=0)
    assert np.all((told > 0.6 * spread) & (told < 1.6 * spread))
    assert jnp.isnan(model.log_likelihood(jr.key(0), ALL_BITS, 1).error).all()


def test_the_free_energy_is_the_negative_bound():
    model = tiny("iaf")
    x = jnp.tile(ALL_BITS, (400, 1))
    loss, aux = free_energy(linear_annealing(0.5, 10))(model, Batch(x), jr.key(5))
    elbo = model.log_likelihood(jr.key(6), ALL_BITS, 5_000).elbo.mean()
    assert -loss == pytest.approx(float(elbo), abs=0.1)
    assert aux["elbo"] == pytest.approx(float(aux["log_likelihood"] - aux["kl"]), abs=1e-5)
    mean = -laminar.nll(model, Batch(x), jr.key(5))[0]
    assert mean == pytest.approx(float(elbo), abs=0.1)
    several, _ = free_energy(samples=3)(model, Batch(x), jr.key(5))
    assert several == pytest.approx(-float(elbo), abs=0.06)


def test_annealing_weighs_the_joint_density():
    model, x, key = tiny(), jnp.tile(ALL_BITS, (50, 1)), jr.key(7)
    objective = free_energy(linear_annealing(0.1, 10))

    def loss(step):
        return float(objective(model, Batch(x), key, step=step)[0])

    full = objective(model, Batch(x), key)[1]
    at = {t: loss(jnp.asarray(t, jnp.int32)) for t in (0, 4, 100)}
    slope = (at[4] - at[0]) / 0.4
    assert at[100] == pytest.approx(-float(full["elbo"]), abs=1e-4)
    assert at[100] == pytest.approx(at[0] + 0.9 * slope, abs=1e-4)


def test_rows_of_weight_zero_count_for_nothing():
    model = tiny()
    x = ALL_BITS.at[5:].set(jnp.nan)
    weights = jnp.asarray([1, 1, 2, 1, 1, 0, 0, 0], jnp.float32)

    def loss(model, x, weights):
        return free_energy()(model, Batch(x, None, weights), jr.key(0))[0]

    value, grads = eqx.filter_value_and_grad(loss)(model, x, weights)
    assert jnp.isfinite(value)
    assert finite(grads)
    assert loss(model, x, 0 * weights) == 0
    _, aux = free_energy()(model, Batch(x, None, weights), jr.key(0))
    assert aux["weight"] == 6


@pytest.mark.parametrize("posterior", some(KINDS))
def test_path_gradients_vanish_where_the_posterior_is_exact(posterior):
    # With a decoder that ignores z the posterior is the prior.
    model = tiny(posterior)
    model = eqx.tree_at(lambda m: m.decoder.net.head.weight, model, replace_fn=jnp.zeros_like)
    head = model.posterior.base.net
    model = eqx.tree_at(lambda m: m.posterior.base.net, model, jtu.tree_map(jnp.zeros_like, head))

    def gradient(path):
        def loss(model):
            return free_energy(path_gradient=path)(model, Batch(ALL_BITS), jr.key(0))[0]

        grads = eqx.filter_grad(loss)(model)
        leaves = jtu.tree_leaves(grads.posterior)
        return max(float(jnp.abs(leaf).max()) for leaf in leaves)

    assert gradient(True) < 1e-6
    assert gradient(False) > 1e-2


@pytest.mark.slow
def test_path_gradients_have_the_same_mean():
    model = tiny("nice")
    x = jnp.tile(ALL_BITS, (2_000, 1))

    def gradient(path):
        def loss(model):
            return free_energy(path_gradient=path)(model, Batch(x), jr.key(0))[0]

        return eqx.filter_grad(loss)(model).posterior.base.net.bias

    np.testing.assert_allclose(gradient(True), gradient(False), atol=0.05)


def test_doors():
    model = small("iaf")
    assert model.shape == (64,)
    assert model.cond_shape is None
    assert model.exactness == "bound"
    with pytest.raises(InputError, match="needs a random key"):
        model.log_prob(TEST[:5])
    assert model.log_prob(TEST[:5], key=jr.key(0)).shape == (5,)
    drawn = model.sample(jr.key(0), (7, 2))
    assert drawn.shape == (7, 2, 64)
    assert set(np.unique(drawn)) <= {0.0, 1.0}
    z = model.encode(jr.key(0), TEST[:5], 3)
    assert z.shape == (3, 5, 6)
    pixels = model.decode(jr.key(0), z)
    assert pixels.shape == (3, 5, 64)
    assert ((pixels > 0) & (pixels < 1)).all()
    assert model.reconstruct(jr.key(0), TEST[:5]).shape == (5, 64)
    assert model.log_likelihood(jr.key(0), TEST[:0]).log_prob.shape == (0,)


def test_a_fresh_model_has_the_mean_of_the_data():
    model = small(mean=TRAIN.mean(0), latent=2)
    drawn = model.sample(jr.key(0), (4000,))
    np.testing.assert_allclose(drawn.mean(0), np.clip(TRAIN.mean(0), 0.01, 0.99), atol=0.06)


@functools.cache
def trained(posterior):
    """A trained model of a kind and its history; all kinds from the same seed."""
    return train(small(posterior, mean=TRAIN.mean(0)))


@pytest.mark.parametrize("posterior", some(KINDS))
def test_training_improves_and_the_bound_lies_below(posterior):
    before = bound(small(posterior, mean=TRAIN.mean(0)))
    model, history = trained(posterior)
    after = bound(model)
    assert np.isfinite(history.loss).all()
    assert finite(model)
    assert history.rollbacks == 0
    for value in after:
        assert jnp.isfinite(value).all()
    assert after.elbo.mean() > before.elbo.mean() + 3
    assert (after.elbo < after.log_prob).all()
    # Better than independent pixels, on rows that were not seen.
    p = np.clip(TRAIN.mean(0), 0.01, 0.99)
    independent = (TEST * np.log(p) + (1 - TEST) * np.log1p(-p)).sum(1).mean()
    assert after.log_prob.mean() > independent + 2


@pytest.mark.parametrize("posterior", some(kind for kind in KINDS if kind != "diagonal"))
def test_a_flow_is_at_least_as_good_as_the_diagonal(posterior):
    flow, diagonal = bound(trained(posterior)[0]), bound(trained("diagonal")[0])
    assert flow.elbo.mean() > diagonal.elbo.mean() - 0.3
    assert flow.log_prob.mean() > diagonal.log_prob.mean() - 0.3


@pytest.mark.slow
def test_the_dynamic_protocol_draws_anew():
    objective = free_energy(linear_annealing(over=100), observe=binarise)
    model, history = train(small(), 300, GREY[:1500], objective=objective)
    assert np.isfinite(history.loss).all()
    assert bound(model).log_prob.mean() > bound(small()).log_prob.mean() + 3
    rows = Batch(jnp.full((10, 64), 0.5))
    losses = {float(objective(model, rows, key)[0]) for key in jr.split(jr.key(0), 3)}
    assert len(losses) == 3
    bits = binarise(jr.key(1), jnp.asarray([[0.0, 0.3, 1.0]]).repeat(20_000, 0))
    np.testing.assert_allclose(bits.mean(0), [0, 0.3, 1], atol=0.02)


@pytest.mark.slow
def test_flow_prior_and_flow_decoder_train():
    model = small(prior="flow", decoder="flow", mean=GREY.mean(0))
    dequantise = UniformDequantisation(17)
    y = dequantise(jr.key(0), jnp.asarray(GREY))
    assert ((y > 0) & (y < 1)).all()
    assert (jnp.floor(y * 17) == np.round(GREY * 16)).mean() > 0.9999
    objective = free_energy(linear_annealing(over=100), observe=dequantise)
    fitted, history = train(model, 150, GREY[:1500], objective=objective, learning_rate=2e-3)
    assert np.isfinite(history.loss).all()
    assert finite(fitted)
    test = dequantise(jr.key(9), jnp.asarray(GREY[1500:]))
    before, after = bound(model, test, 20), bound(fitted, test, 20)
    assert after.elbo.mean() > before.elbo.mean() + 10
    assert after.log_prob.mean() > 0  # denser than the uniform law on the cube
    drawn = fitted.sample(jr.key(0), (50,))
    assert ((drawn > 0) & (drawn < 1)).all()
    assert fitted.decode(jr.key(0), fitted.encode(jr.key(1), test[:3])).shape == (3, 64)
    assert not same(fitted.prior, model.prior)


@pytest.mark.parametrize("posterior", some(KINDS))
def test_save_and_load(posterior, tmp_path):
    model, _ = trained(posterior)
    laminar.save(tmp_path / "model.lam", model)
    again = laminar.load(tmp_path / "model.lam")
    assert isinstance(again, VAE)
    assert same(again, model)
    assert (bound(again, TEST[:9], 20).log_prob == bound(model, TEST[:9], 20).log_prob).all()


class Stop(Exception):
    """A run is cut here."""


def cut_after(steps, monkeypatch):
    """Let training end abruptly at the first checkpoint after some steps."""
    module = sys.modules[laminar.fit.__module__]
    save = module.save_checkpoint

    def save_and_stop(path, state, history, settings):
        save(path, state, history, settings)
        if history.steps >= steps:
            raise Stop

    monkeypatch.setattr(module, "save_checkpoint", save_and_stop)


@pytest.mark.parametrize("observe", [None, binarise])
def test_resume_gives_the_same_bits(tmp_path, monkeypatch, observe):
    options = {
        "objective": free_energy(linear_annealing(over=20), observe=observe),
        "validation": 0.1,
        "validate_every": 10,
        "schedule": "constant",
    }
    data = GREY[:500] if observe else TRAIN[:500]
    whole, history = train(small(), 40, data, **options)

    file = Checkpoint(tmp_path / "run.ckpt", seconds=0)
    cut_after(20, monkeypatch)
    with pytest.raises(Stop):
        train(small(), 40, data, checkpoint=file, **options)
    monkeypatch.undo()
    resumed, second = train(small(), 40, data, checkpoint=file, resume=True, **options)
    assert same(whole, resumed)
    assert (second.loss == history.loss).all()


def test_another_objective_is_refused_on_resume(tmp_path):
    file = tmp_path / "run.ckpt"
    train(small(), 10, checkpoint=file)
    with pytest.raises(InputError, match="objective"):
        train(small(), 10, checkpoint=file, resume=True, objective=free_energy(samples=2))


def test_double_precision():
    with jax.enable_x64(True):
        model = tiny("planar")
        assert model.dtype == jnp.float64
        x = ALL_BITS.astype(jnp.float64)
        found = model.log_likelihood(jr.key(0), x, 20_000)
        assert found.log_prob.dtype == jnp.float64
        assert (jnp.abs(found.log_prob - by_quadrature(model, x)) < 5 * found.error + 1e-4).all()
        objective = free_energy(linear_annealing(), path_gradient=True, observe=binarise)
        loss, _ = objective(model, Batch(x), jr.key(0), step=jnp.asarray(3, jnp.int32))
        assert loss.dtype == jnp.float64


def test_parts_of_ones_own():
    net = eqx.nn.MLP(2, 5, 8, 1, key=jr.key(0))
    decoder = Bernoulli(net, 5, 2)
    model = vae(5, 2, key=jr.key(1), width=8, depth=1, decoder=decoder, prior=Normal(2))
    assert model.sample(jr.key(0), 3).shape == (3, 5)
    assert model.log_likelihood(jr.key(0), jnp.ones((4, 5)), 7).log_prob.shape == (4,)
    shared = decoder.log_prob(jnp.ones((4, 5)), jnp.zeros(2))
    p = jax.nn.sigmoid(net(jnp.zeros(2)))
    np.testing.assert_allclose(shared, jnp.log(p).sum(), rtol=1e-5)
    np.testing.assert_allclose(decoder.mean(jnp.zeros((3, 2)))[1], p, rtol=1e-5)


def test_errors():
    with pytest.raises(InputError, match="posterior is 'full'"):
        vae(5, 2, key=jr.key(0), posterior="full")
    with pytest.raises(InputError, match="prior is 'x'"):
        vae(5, 2, key=jr.key(0), prior="x")
    with pytest.raises(InputError, match="decoder is 'x'"):
        vae(5, 2, key=jr.key(0), decoder="x")
    with pytest.raises(InputError, match="window must be at least 1"):
        vae(5, 2, key=jr.key(0), window=0)
    with pytest.raises(ShapeError, match="mean has shape"):
        vae(5, 2, key=jr.key(0), mean=jnp.zeros(4))
    with pytest.raises(InputError, match="samples must be at least 1"):
        free_energy(samples=0)
    model = vae(5, 2, key=jr.key(0), width=8, depth=1)
    with pytest.raises(InputError, match="samples must be at least 1"):
        model.log_likelihood(jr.key(0), jnp.ones((1, 5)), 0)
    with pytest.raises(ShapeError):
        model.log_likelihood(jr.key(0), jnp.ones((1, 4)))
    with pytest.raises(ShapeError, match="all must be one shape"):
        VAE(model.posterior, Frozen(Normal(3)), model.decoder)
    with pytest.raises(ShapeError, match="decoder draws"):
        VAE(model.posterior, model.prior, vae(6, 2, key=jr.key(0), width=8).decoder)
    with pytest.raises(ShapeError, match="exactly one"):
        free_energy()(model, Batch(jnp.ones((2, 2, 5))), jr.key(0))
    with pytest.raises(ShapeError, match="network gives"):
        Bernoulli(lambda c: c, 5, 2).log_prob(jnp.ones((1, 5)), jnp.zeros((1, 2)))


def test_dequantised_levels_have_their_density():
    model = vae(4, 1, key=jr.key(0), width=4, depth=1)
    normal = ConditionalNormal(lambda z: jnp.zeros((2, 4)), 4, 1)
    model = eqx.tree_at(lambda m: m.decoder, model, normal)
    y = UniformDequantisation(4)(jr.key(1), jnp.full((100, 4), 1 / 3))
    assert ((y >= 0.25) & (y < 0.5)).all()
    expected = -0.5 * (y**2).sum(1) - 2 * math.log(2 * math.pi)
    found = model.log_likelihood(jr.key(2), y, 2_000)
    np.testing.assert_allclose(found.log_prob.mean(), expected.mean(), atol=0.05)
