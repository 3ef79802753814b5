"""Targets: supports and their Jacobians, models, and what is refused in one sentence."""

import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from laminar._errors import InputError, ShapeError
from laminar.inference import Target, as_target
from laminar.inference.supports import as_constraint

KEY = jr.key(0)


def total(values):
    """A smooth function of any tree: enough where only supports matter."""
    return -sum(jnp.sum(jnp.log1p(x * x)) for x in jax.tree_util.tree_leaves(values))


# Each support with a shape and the free coordinates that its density is over.
SUPPORTS = {
    "real": ((3,), lambda x: x),
    "positive": ((2, 2), lambda x: x),
    "unit_interval": ((), lambda x: x),
    ("interval", -1.0, 3.0): ((3,), lambda x: x),
    ("greater_than", 2): ((2,), lambda x: x),
    ("less_than", -2.0): ((2,), lambda x: x),
    "simplex": ((2, 4), lambda x: x[..., :-1]),
    "ordered": ((4,), lambda x: x),
    "positive_ordered": ((3,), lambda x: x),
    "correlation": ((4, 4), lambda x: x[jnp.tril_indices(4, -1)]),
    "correlation_cholesky": ((4, 4), lambda x: x[jnp.tril_indices(4, -1)]),
    "covariance": ((3, 3), lambda x: x[jnp.tril_indices(3)]),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_every_support_round_trips_with_its_jacobian(support, wide):
    shape, free = SUPPORTS[support]
    with jax.enable_x64(wide):
        target = as_target(total, example=shape, supports=support)
        assert target.dtype == (jnp.float64 if wide else jnp.float32)
        z = target.start(KEY, 7)
        assert (z.shape, z.dtype) == ((7, target.dim), target.dtype)
        values = target.constrain(z)
        assert (values.shape, values.dtype) == ((7, *shape), z.dtype)
        constraint = as_constraint(support, "x")
        with jax.numpy_rank_promotion("allow"):
            assert bool(jnp.all(constraint(values)))
        error = jnp.abs(target.unconstrain(values) - z).max()
        assert error < (1e-6 if wide else 5e-4)
        jacobian = jax.jit(jax.jacobian(lambda z: free(target.way.constrain(z)).reshape(-1)))(z[0])
        expected = np.linalg.slogdet(np.asarray(jacobian, np.float64))[1]
        error = 1e-9 if wide else 1e-4
        assert float(target.log_jacobian(z[0])) == pytest.approx(expected, abs=error)
        # The exponential of an exponential leaves any float behind.
        far = z if support == "positive_ordered" else 15 * z
        both = jnp.concatenate([z, far])
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(target.log_density)))(both)
        assert np.isfinite(gradients).all()
        plain = jax.vmap(lambda z: total(target.way.constrain(z)) + target.log_jacobian(z))(both)
        np.testing.assert_allclose(values, plain, rtol=1e-4)


def test_a_density_integrates_to_one_in_unconstrained_space():
    def log_density(x):
        return dist.Beta(2.0, 3.0).log_prob(x)

    with jax.numpy_dtype_promotion("standard"):
        target = as_target(log_density, example=(), supports="unit_interval")
        z = jnp.linspace(-20, 20, 4001)[:, None]
        mass = jnp.exp(jax.vmap(target.log_density)(z)).sum() * 0.01
    assert float(mass) == pytest.approx(1, abs=1e-4)


class Pair(NamedTuple):
    mean: object
    scale: object


def test_trees_of_values():
    example = {"b": np.zeros((2, 2), np.float32), "a": Pair((), 3), "c": [0.5, jnp.ones(2)]}
    supports = {"a": Pair("real", "positive"), "c": "unit_interval"}
    target = as_target(total, example=example, supports=supports)
    assert target.names[:4] == ("a.mean", "a.scale[0]", "a.scale[1]", "a.scale[2]")
    assert target.names[4:] == ("b[0,0]", "b[0,1]", "b[1,0]", "b[1,1]", "c.0", "c.1[0]", "c.1[1]")
    assert target.dim == 11
    z = target.start(KEY, 6).reshape(2, 3, 11)
    values = target.constrain(z)
    assert isinstance(values["a"], Pair)
    assert values["a"].scale.shape == (2, 3, 3)
    assert (values["a"].scale > 0).all()
    assert (values["c"][1] < 1).all()
    np.testing.assert_allclose(target.unconstrain(values), z, atol=1e-5)
    assert set(target.named(values)) == {"a.mean", "a.scale", "b", "c.0", "c.1"}
    assert target.deterministics(z) == {}
    assert target.check(KEY) == ()
    one = target.constrain(z[0, 0])
    assert target.unconstrain(one).shape == (11,)


def test_a_bare_array_and_further_arguments():
    def log_density(x, scale, *, shift):
        return -jnp.sum(jnp.square((x - shift) / scale))

    target = as_target(log_density, 2.0, example=2, shift=1.0)
    assert target.names == ("x[0]", "x[1]")
    assert float(target.log_density(jnp.array([3.0, 1.0]))) == -1
    assert as_target(target) is target
    assert isinstance(target, Target)
    with pytest.raises(InputError, match="ready-made"):
        as_target(target, 2.0)
    assert jax.jit(lambda z: jax.vmap(target.log_density)(z))(jnp.ones((4, 2))).shape == (4,)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"example": {"a": 2}, "supports": {"b": "real"}}, "names 'b', but the example has 'a'"),
        ({"example": 2, "supports": "positiv"}, "'positiv' is no support"),
        ({"example": 2, "supports": ("interval", 1.0, 0.0)}, "finite and ascending"),
        ({"example": 2, "supports": ("interval", 1.0)}, "is no support"),
        ({"example": (), "supports": "simplex"}, "too few axes"),
        ({"example": 1, "supports": "simplex"}, "leaves nothing to infer"),
        ({"example": (3, 2), "supports": "correlation"}, "does not fit"),
        ({"example": 3, "supports": dist.constraints.sphere}, "no smooth bijection"),
        ({"example": 3, "supports": dist.constraints.nonnegative_integer}, "discrete support"),
        ({"example": [2, 3], "supports": ["real"]}, "has 1 parts, the example 2"),
        ({"example": {"a": 2}, "supports": ["real"]}, "no prefix of the example"),
        ({"example": jnp.arange(3)}, "x has dtype int32"),
        ({"example": {"a": "three"}}, "a is 'three'"),
        ({"example": {}}, "holds no array"),
        ({"example": 0}, "no parameter"),
        ({"example": 2, "dtype": jnp.float16}, "float16 is not supported"),
        ({"example": 2, "dtype": jnp.float64}, "jax_enable_x64"),
        ({"example": 2, "dtype": "wide"}, "is no dtype"),
        ({"supports": "real"}, "example= must describe"),
    ],
)
def test_structures_that_do_not_fit(given, match):
    with pytest.raises(InputError, match=match):
        as_target(total, **given)


def decide(x):
    return -(x[0] ** 2) if x[0] > 0 else -(x[0] ** 4)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: -x * x, r"returns shape \(2,\)"),
        (lambda x: jnp.sum(x > 0), "dtype int32"),
        (lambda x: jax.lax.complex(x[0], x[1]), "dtype complex64"),
        (lambda x: None, "not NoneType"),
        (lambda x: {"a": jnp.sum(x)}, "not dict"),
        (decide, "decides in Python"),
        (lambda x: np.sum(np.asarray(x)), "calls NumPy"),
    ],
)
def test_what_is_no_log_density(function, match):
    with pytest.raises(InputError, match=match):
        as_target(function, example=2)
    if "shape" in match:
        with pytest.raises(ShapeError):
            as_target(function, example=2)


def loop(x):
    return -jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + s[1] ** 2, s[1]), (0.0, x[0]))[
        0
    ]


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: -jnp.sum(jnp.sqrt(x)), r"NaN at \d+ of 64 starting points, as at x = \["),
        (lambda x: jnp.sum(jnp.where(x < 1, jnp.inf, x)), r"\+∞ at"),
        (lambda x: jnp.sum(x) - jnp.inf, "−∞ at all 64"),
        (lambda x: -jnp.sum(jnp.sqrt(0 * x[0])) - x[1] ** 2, r"gradient is not at 64 .* in x\[0\]"),
        (lambda x: -(x[1] ** 2), r"does not change with x\[0\]"),
        (lambda x: -jnp.sum(jnp.floor(x) ** 2), r"does not change with x\[0\], x\[1\]"),
        (loop, "cannot be differentiated"),
    ],
)
def test_check_names_what_fails(function, match):
    target = as_target(function, example=2)
    with pytest.raises(InputError, match=match):
        target.check(KEY)


def test_check_notes_what_can_be_lived_with():
    target = as_target(lambda x: jnp.where(x[0] > 1, -(x[0] ** 2), -jnp.inf), example=1)
    (note,) = target.check(KEY)
    assert "−∞ at" in note


# Models


def schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        effect = numpyro.deterministic("effect", mu + tau * theta)
        numpyro.sample("y", dist.Normal(effect, sigma), obs=y)


Y, SIGMA = np.array([28.0, 8.0, -3.0], np.float32), np.array([15.0, 10.0, 16.0], np.float32)


def test_a_model_is_its_log_joint():
    target = as_target(schools, Y, sigma=SIGMA)
    assert target.names == ("mu", "tau", "theta[0]", "theta[1]", "theta[2]")
    assert (target.model, target.args[0] is Y, set(target.kwargs)) == (schools, True, {"sigma"})
    assert target.check(KEY) == ()
    z = target.start(KEY, 4)
    values = target.constrain(z)
    assert set(values) == {"mu", "tau", "theta"}
    effect = target.deterministics(z)["effect"]
    np.testing.assert_allclose(
        effect, values["mu"][:, None] + values["tau"][:, None] * values["theta"], rtol=1e-5
    )
    np.testing.assert_allclose(target.unconstrain({**values, "effect": effect}), z, atol=1e-5)
    with jax.numpy_rank_promotion("allow"):
        for i in range(2):
            mu, tau, theta = (values[name][i] for name in ("mu", "tau", "theta"))
            expected = (
                dist.Normal(0.0, 5.0).log_prob(mu)
                + dist.HalfCauchy(5.0).log_prob(tau)
                + jnp.log(tau)
                + dist.Normal(0.0, 1.0).log_prob(theta).sum()
                + dist.Normal(mu + tau * theta, SIGMA).log_prob(Y).sum()
            )
            assert float(target.log_density(z[i])) == pytest.approx(float(expected), rel=1e-5)
            assert float(target.log_jacobian(z[i])) == pytest.approx(float(z[i, 1]), rel=1e-5)


def test_a_model_in_double_precision():
    with jax.enable_x64(True):
        target = as_target(schools, Y.astype(float), SIGMA.astype(float))
        z = target.start(KEY, 2)
        assert z.dtype == jax.vmap(target.log_density)(z).dtype == jnp.float64
        assert target.constrain(z)["tau"].dtype == jnp.float64
        np.testing.assert_allclose(target.unconstrain(target.constrain(z)), z, atol=1e-12)


def moving():
    low = numpyro.sample("low", dist.Uniform(0.0, 1.0))
    numpyro.sample("high", dist.Uniform(low, 1.0))
    numpyro.sample("free", dist.ImproperUniform(dist.constraints.positive, (), (2,)))
    numpyro.factor("weight", 2 * jnp.log(low))


def test_supports_that_depend_on_other_sites():
    target = as_target(moving)
    assert target.names == ("low", "high", "free[0]", "free[1]")
    z = target.start(KEY, 50)
    values = target.constrain(z)
    assert (values["high"] > values["low"]).all()
    np.testing.assert_allclose(target.unconstrain(values), z, atol=1e-4)

    def flat(z):
        return jnp.concatenate([jnp.ravel(v) for v in target.way.constrain(z).values()])

    for one in z[:1]:
        expected = np.linalg.slogdet(np.asarray(jax.jacobian(flat)(one), float))[1]
        assert float(target.log_jacobian(one)) == pytest.approx(expected, rel=1e-4)
        low = target.constrain(one)["low"]
        joint = 2 * jnp.log(low) - jnp.log1p(-low) + target.log_jacobian(one)
        assert float(target.log_density(one)) == pytest.approx(float(joint), rel=1e-4)


def walk(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def step(last, y):
        x = numpyro.sample("x", dist.Normal(last, scale))
        gain = numpyro.sample("gain", dist.LogNormal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x * gain, 1.0), obs=y)
        return x, None

    scan(step, jnp.zeros(()), y)


def test_a_model_with_a_scan():
    target = as_target(walk, jnp.array([0.5, 1.0, -1.0]))
    assert target.dim == 7
    z = target.start(KEY, 3)
    values = target.constrain(z)
    np.testing.assert_allclose(target.unconstrain(values), z, atol=1e-5)
    for i in range(1):
        x, gain, scale = (values[k][i] for k in ("x", "gain", "scale"))
        last = jnp.concatenate([jnp.zeros(1), x[:-1]])
        with jax.numpy_rank_promotion("allow"):
            joint = (
                dist.HalfNormal(1.0).log_prob(scale)
                + dist.Normal(last, scale).log_prob(x).sum()
                + dist.LogNormal(0.0, 1.0).log_prob(gain).sum()
                + dist.Normal(x * gain, 1.0).log_prob(jnp.array([0.5, 1.0, -1.0])).sum()
            )
        jacobian = jnp.log(scale) + jnp.log(gain).sum()
        assert float(target.log_jacobian(z[i])) == pytest.approx(float(jacobian), rel=1e-4)
        assert float(target.log_density(z[i])) == pytest.approx(float(joint + jacobian), rel=1e-4)


def with_discrete():
    z = numpyro.sample("cluster", dist.Bernoulli(0.5))
    k = numpyro.sample("count", dist.Poisson(2.0))
    numpyro.sample("y", dist.Normal(z + k, 1.0), obs=0.3)


def with_subsample(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 10, subsample_size=4) as at:
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[at])


def with_delta():
    numpyro.sample("fixed", dist.Delta(1.0))


def with_param():
    scale = numpyro.param("scale", 1.0)
    numpyro.sample("x", dist.Normal(0.0, scale))


def with_no_latent():
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=1.0)


def with_changes():
    for i in range(1 + next(CHANGES)):
        numpyro.sample(f"x{i}", dist.Normal(0.0, 1.0))


def with_choice():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    if x > 10:
        numpyro.sample("y", dist.Normal(0.0, 1.0))


def with_argument(y):
    numpyro.sample("x", dist.Normal(0.0, 1.0))


CHANGES = iter(range(9))


@pytest.mark.parametrize(
    ("model", "args", "match"),
    [
        (with_discrete, (), "with_discrete has discrete latent sites cluster, count"),
        (with_subsample, (jnp.ones(10),), "plates rows that take subsamples"),
        (with_delta, (), "sites fixed with a delta"),
        (with_param, (), "param sites scale"),
        (with_no_latent, (), "no unobserved sample site"),
        (with_changes, (), "sites x1 that are not there"),
        (with_choice, (), "decides in Python"),
        (with_argument, (), "with_argument cannot be run .* missing 1 required"),
        (lambda: None, (), "no unobserved sample site"),
        (3, (), "not int"),
    ],
)
def test_models_that_are_refused(model, args, match):
    with pytest.raises(InputError, match=match):
        as_target(model, *args)


def with_bad_site():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("bad", jnp.log(x))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)


def with_bad_data():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.HalfNormal(jnp.exp(x)), obs=jnp.nan)


@pytest.mark.filterwarnings("ignore:Out-of-support values:UserWarning")
def test_check_names_the_site():
    with pytest.raises(InputError, match=r"NaN at .* because of bad, as at x = "):
        as_target(with_bad_site).check(KEY)
    with pytest.raises(InputError, match=r"at .* starting points because of y"):
        as_target(with_bad_data).check(KEY)


def test_vectors_and_values_that_do_not_fit():
    target = as_target(schools, Y, SIGMA)
    with pytest.raises(ShapeError, match=r"takes vectors \(…, 5\)"):
        target.constrain(jnp.zeros(4))
    with pytest.raises(InputError, match="lack the model's sites theta"):
        target.unconstrain({"mu": 0.0, "tau": 1.0})
    with pytest.raises(ShapeError, match="theta has shape"):
        target.unconstrain({"mu": 0.0, "tau": 1.0, "theta": jnp.zeros(2)})
    with pytest.raises(ShapeError, match="batch axes"):
        target.unconstrain({"mu": 0.0, "tau": 1.0, "theta": jnp.zeros((2, 3))})


def test_numpyro_is_loaded_late_and_its_absence_named(tmp_path):
    (tmp_path / "numpyro.py").write_text("raise ImportError('not here')\n")
    code = (
        "import laminar.inference, sys; assert 'numpyro' not in sys.modules\n"
        "from laminar.inference import as_target\n"
        "assert 'numpyro' not in sys.modules\n"
        "try: as_target(lambda x: -x @ x, example=2)\n"
        "except laminar.MissingExtraError as e: print(e)\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import laminar\n" + code
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert "laminar[inference]" in run.stdout
