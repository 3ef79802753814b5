"""Flows in NumPyro: a distribution, a guide and a preconditioner; BlackJAX takes it too."""

import blackjax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.reparam import NeuTraReparam

from laminar._errors import InputError, ShapeError
from laminar.bijections.base import Identity
from laminar.bijections.elementwise import Affine, Exp
from laminar.distributions import ConditionalNormal, Normal
from laminar.flow import Flow
from laminar.inference import as_target
from laminar.inference.numpyro import AutoFlow, FlowDistribution, FlowTransform, neutra
from laminar.zoo import nsf, realnvp

KEY = jr.key(0)


@pytest.fixture(autouse=True)
def _numpyro_promotes():
    """NumPyro's samplers and guides do not work under the suite's strict settings."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def flow(dim=2, **options):
    made = nsf(dim, key=KEY, layers=1, width=8, depth=1, bins=3, **options)
    leaves, tree = jax.tree_util.tree_flatten(made)
    shaken = [
        x + 0.1 * jr.normal(jr.key(i), x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for i, x in enumerate(leaves)
    ]
    return jax.tree_util.tree_unflatten(tree, shaken)


def conditional():
    return ConditionalNormal(lambda c: jnp.concatenate([c, 0 * c]), 2, 2)


def test_a_flow_is_a_numpyro_distribution():
    made = flow()
    d = FlowDistribution(made)
    assert (d.batch_shape, d.event_shape, d.has_rsample) == ((), (2,), True)
    assert d.support.event_dim == 1
    x = d.sample(KEY, (5, 3))
    assert x.shape == (5, 3, 2)
    np.testing.assert_allclose(d.log_prob(x), made.log_prob(x), rtol=1e-6)
    y, kept = d.sample_with_intermediates(KEY, (4,))
    np.testing.assert_allclose(d.log_prob(y, kept), made.log_prob(y), atol=1e-4)
    wide = d.expand((3,)).to_event(1)
    assert wide.log_prob(wide.sample(KEY, (2,))).shape == (2,)


@pytest.mark.slow
def test_it_goes_through_transformations():
    d, x = FlowDistribution(flow()), jnp.ones((6, 2))
    expected = d.log_prob(x)
    np.testing.assert_allclose(jax.jit(lambda d, x: d.log_prob(x))(d, x), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(d.log_prob)(x), expected, rtol=1e-5)
    three = jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf] * 3), d)
    mapped = jax.vmap(lambda d: d.log_prob(x))(three)
    np.testing.assert_allclose(mapped, jnp.stack([expected] * 3), rtol=1e-5)
    leaves, tree = jax.tree_util.tree_flatten(d)
    again = jax.tree_util.tree_unflatten(tree, leaves)
    assert (again.event_shape, again.support.event_dim) == ((2,), 1)
    grads = jax.grad(lambda d: d.log_prob(x).sum(), allow_int=True)(d)
    floats = [g for g in jax.tree_util.tree_leaves(grads) if g.dtype == jnp.float32]
    assert floats
    assert all(np.isfinite(g).all() for g in floats)


def test_conditions_are_its_batch():
    made = conditional()
    c = jnp.arange(6.0).reshape(3, 2)
    d = FlowDistribution(made, c)
    assert (d.batch_shape, d.event_shape) == ((3,), (2,))
    x = d.sample(KEY, (4,))
    assert x.shape == (4, 3, 2)
    np.testing.assert_allclose(d.log_prob(x), made.log_prob(x, c))
    assert jax.jit(lambda d: d.sample(KEY))(d).shape == (3, 2)
    with pytest.raises(InputError, match="needs a condition"):
        FlowDistribution(made)
    with pytest.raises(ShapeError, match="condition has shape"):
        FlowDistribution(made, jnp.ones(3))
    with pytest.raises(InputError, match="takes no condition"):
        FlowDistribution(flow(), c)


def test_supports_and_scalars():
    positive = Flow(Normal(2), Exp((2,)))
    d = FlowDistribution(positive, support=dist.constraints.positive)
    assert bool(d.support(jnp.array([1.0, 2.0])))
    assert not bool(d.support(jnp.array([1.0, -2.0])))
    scalar = FlowDistribution(Normal(()))
    assert scalar.sample(KEY, (3,)).shape == (3,)
    assert scalar.support is dist.constraints.real


def prior(made, y):
    x = numpyro.sample("x", FlowDistribution(made))
    numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


def test_it_serves_as_a_prior():
    target = as_target(prior, flow(), 2.0)
    z = jnp.array([0.3, 0.4])
    expected = flow().log_prob(z) + dist.Normal(0.7, 1.0).log_prob(2.0)
    assert float(target.log_density(z)) == pytest.approx(float(expected), rel=1e-5)
    draws = Predictive(prior, num_samples=7)(KEY, flow(), None)
    assert draws["x"].shape == (7, 2)


@pytest.mark.slow
def test_a_bijection_is_a_numpyro_transform():
    t = FlowTransform(flow().bijection)
    x = jr.normal(KEY, (3, 4, 2))
    y, log_det = t.call_with_intermediates(x)
    np.testing.assert_allclose(t.inv(y), x, atol=1e-4)
    np.testing.assert_allclose(t(x), y)
    assert log_det.shape == (3, 4)
    np.testing.assert_allclose(t.log_abs_det_jacobian(x, y), log_det)
    full = np.linalg.slogdet(np.asarray(jax.jacobian(t)(x[0, 0])))[1]
    assert float(log_det[0, 0]) == pytest.approx(full, abs=1e-4)
    d = dist.TransformedDistribution(FlowDistribution(flow().base), t)
    np.testing.assert_allclose(jax.jit(lambda d: d.log_prob(y))(d), flow().log_prob(y), atol=1e-3)
    assert t.eq(FlowTransform(flow().bijection))
    assert not t.eq(FlowTransform(Identity((2,))))
    with pytest.raises(ShapeError, match="must map vectors"):
        FlowTransform(Identity(()))
    with pytest.raises(InputError, match="takes a condition"):
        FlowTransform(realnvp(2, key=KEY, cond_dim=1, layers=1).bijection)


# A posterior in closed form: two correlated means and a positive scale that is known well.

COV = jnp.array([[1.0, 0.9], [0.9, 1.0]])


def correlated():
    numpyro.sample("mean", dist.MultivariateNormal(jnp.array([1.0, -2.0]), 4 * COV))
    numpyro.sample("scale", dist.LogNormal(0.5, 0.3))


def run(guide, steps=500):
    svi = SVI(correlated, guide, numpyro.optim.Adam(1e-2), Trace_ELBO(num_particles=16))
    return svi, svi.run(KEY, steps, progress_bar=False)


@pytest.mark.slow
def test_auto_flow_fits_and_preconditions():
    guide = AutoFlow(correlated, lambda dim, *, key: realnvp(dim, key=key, layers=2, width=16))
    _, result = run(guide)
    assert np.isfinite(result.losses).all()
    # The bound of a normalised target is at most zero and reaches it.
    assert -0.1 < -np.mean(result.losses[-50:]) < 0.05
    draws = guide.sample_posterior(jr.key(1), result.params, sample_shape=(4000,))
    assert draws["mean"].shape == (4000, 2)
    np.testing.assert_allclose(draws["mean"].mean(0), [1, -2], atol=0.25)
    np.testing.assert_allclose(np.corrcoef(np.asarray(draws["mean"]).T)[0, 1], 0.9, atol=0.05)
    np.testing.assert_allclose(np.log(draws["scale"]).mean(), 0.5, atol=0.05)
    fitted = guide.flow(result.params)
    assert isinstance(fitted, Flow)
    z = fitted.sample(KEY, (5,))
    q = guide.get_posterior(result.params)
    np.testing.assert_allclose(q.log_prob(z), fitted.log_prob(z), rtol=1e-5)

    transport = NeuTraReparam(guide, result.params)
    mcmc = MCMC(
        NUTS(transport.reparam(correlated)), num_warmup=100, num_samples=300, progress_bar=False
    )
    mcmc.run(jr.key(2))
    found = transport.transform_sample(mcmc.get_samples()["auto_shared_latent"])
    np.testing.assert_allclose(found["mean"].mean(0), [1, -2], atol=0.6)


def test_auto_flow_by_default_and_with_a_flow_of_ones_own():
    for given in (None, flow(3)):
        guide = AutoFlow(correlated, given)
        svi = SVI(correlated, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
        params = svi.get_params(svi.init(KEY))
        assert set(params) == {"auto_flow$params"}
        draws = guide.sample_posterior(KEY, params, sample_shape=(2,))
        assert {k: v.shape for k, v in draws.items()} == {"mean": (2, 2), "scale": (2,)}
        assert guide.flow(params).shape == (3,)
    for given, match in ((flow(2), "must have"), (Normal(3), "a Flow is needed")):
        with pytest.raises(InputError, match=match):
            run(AutoFlow(correlated, given if isinstance(given, Flow) else lambda d, key: given), 1)
    with pytest.raises(InputError, match="takes a condition"):
        run(AutoFlow(correlated, realnvp(3, key=KEY, layers=1, cond_dim=2)), 1)


def warped_pair():
    """A target of very different scales, the flow that equals it, and the target through it."""

    def log_density(x):
        log_b = jnp.log(x["b"])
        return (
            -0.5 * jnp.sum(jnp.square((x["a"] - 3.0) / 0.01)) - 0.5 * jnp.square(log_b / 5) - log_b
        )

    target = as_target(log_density, example={"a": (1,), "b": ()}, supports={"b": "positive"})
    exact = Flow(Normal(2), Affine(jnp.array([3.0, 0.0]), jnp.array([0.01, 5.0])))
    return target, exact, neutra(target, exact)


def test_neutra_is_the_base_for_a_perfect_flow():
    target, exact, warped = warped_pair()
    assert (warped.dim, warped.names) == (2, target.names)
    z = warped.start(KEY, 6)
    density = jax.vmap(warped.log_density)(z)
    base = exact._base.log_prob(z)
    np.testing.assert_allclose(density - density[0], base - base[0], atol=2e-3)
    np.testing.assert_allclose(jax.vmap(warped.potential)(z), -density)
    values = warped.constrain(z)
    assert values["a"].shape == (6, 1)
    x = exact.to_data(z)
    np.testing.assert_allclose(values["b"], jnp.exp(x[:, 1]), rtol=1e-5)
    np.testing.assert_allclose(warped.unconstrain(values), z, atol=1e-2)
    both = jax.vmap(target.log_jacobian)(x) + jnp.log(0.05)
    np.testing.assert_allclose(jax.vmap(warped.log_jacobian)(z), both, rtol=1e-4)
    assert warped.check(KEY) == ()
    with pytest.raises(ShapeError, match="2 unconstrained parameters"):
        neutra(target, flow(3))


@pytest.mark.slow
def test_neutra_serves_numpyro_and_blackjax():
    target, exact, warped = warped_pair()
    kernel = NUTS(potential_fn=warped.potential)
    mcmc = MCMC(kernel, num_warmup=100, num_samples=400, progress_bar=False)
    mcmc.run(KEY, init_params=warped.start(KEY, 1)[0])
    values = warped.constrain(mcmc.get_samples())
    assert float(values["a"].mean()) == pytest.approx(3, abs=0.01)
    assert float(jnp.log(values["b"]).std()) == pytest.approx(5, rel=0.25)

    adapt = blackjax.window_adaptation(blackjax.nuts, warped.log_density)
    (state, parameters), _ = adapt.run(KEY, warped.start(KEY, 1)[0], num_steps=100)
    step = jax.jit(blackjax.nuts(warped.log_density, **parameters).step)
    points = []
    for key in jr.split(jr.key(3), 300):
        state, _ = step(key, state)
        points.append(state.position)
    values = target.constrain(exact.to_data(jnp.stack(points)))
    assert float(values["a"].mean()) == pytest.approx(3, abs=0.01)
    assert float(jnp.log(values["b"]).std()) == pytest.approx(5, rel=0.3)
