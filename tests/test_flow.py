"""Flows: both forms of the change of variables, the path, embedded conditions, the doors."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats as st

from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, trainable
from laminar._typing import Shape
from laminar.bijections.base import AbstractBijection, AbstractTransform, Identity, Invert
from laminar.bijections.compose import Chain, Permute, Repeat, Reshape, repeat
from laminar.bijections.path import first_steps, step_names, walk
from laminar.distributions import ConditionalNormal, Mixture, Normal, Uniform
from laminar.flow import Flow, Path
from laminar.train.fit import fit
from laminar.zoo import nsf

RNG = np.random.default_rng(0)


class Bend(AbstractBijection):
    """y = sinh(w asinh(x) + b + c) on vectors, with w > 0."""

    raw: jax.Array
    shift: jax.Array
    in_shape: Shape = eqx.field(static=True, default=(2,))
    cond_shape: Shape | None = eqx.field(static=True, default=None)
    batch_last: ClassVar[bool] = True

    @property
    def out_shape(self):
        return self.in_shape

    def _parts(self, x, condition):
        def grow(v):
            return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))

        c = jnp.zeros((1,), x.dtype) if condition is None else condition[:1]
        return grow(jnp.exp(self.raw)), grow(self.shift) + 0.3 * grow(c)

    def forward(self, x, condition=None, *, key=None):
        w, b = self._parts(x, condition)
        u = w * jnp.arcsinh(x) + b
        return jnp.sinh(u), (jnp.log(w) + jnp.log(jnp.cosh(u)) - 0.5 * jnp.log1p(x * x)).sum(0)

    def inverse(self, y, condition=None, *, key=None):
        w, b = self._parts(y, condition)
        x = jnp.sinh((jnp.arcsinh(y) - b) / w)
        return x, -self.forward(x, condition)[1]


def bend(key, cond_shape=None):
    a, b = jr.split(key)
    return Bend(0.1 * jr.normal(a, (2,)), 0.3 * jr.normal(b, (2,)), (2,), cond_shape)


def layer(key):
    a, b = jr.split(key)
    return Chain([bend(a), Permute(jr.permutation(b, 2))])


def chain(key, cond_shape=None):
    """Three single steps, four repeated ones."""
    a, b, c = jr.split(key, 3)
    return Chain([bend(a, cond_shape), repeat(layer, 4, key=b), bend(c), Permute([1, 0])])


FLOWS = {
    "chain": lambda: Flow(Normal((2,), 0.5, 2.0), chain(jr.key(0))),
    "inverted": lambda: Flow(Normal((2,)), Invert(chain(jr.key(1)))),
    "repeat": lambda: Flow(Frozen(Uniform((2,), -3, 3)), repeat(layer, 5, key=jr.key(2))),
    "nested": lambda: Flow(
        Normal((2,)), Chain([Invert(chain(jr.key(3))), Invert(Invert(chain(jr.key(4))))])
    ),
    "single": lambda: Flow(Normal((2,)), bend(jr.key(5))),
    "flow on flow": lambda: Flow(Flow(Normal((2,)), bend(jr.key(6))), chain(jr.key(7))),
}


@pytest.mark.parametrize(
    ("name", "x64"), [*((name, False) for name in FLOWS), ("chain", True), ("nested", True)]
)
def test_both_forms_of_the_change_of_variables_agree(name, x64):
    tolerance = 1e-9 if x64 else 2e-4
    with jax.enable_x64(x64):
        flow = FLOWS[name]()
        x, log_q = flow.sample_and_log_prob(jr.key(0), (20, 3))
        assert x.dtype == log_q.dtype == (np.float64 if x64 else np.float32)
        np.testing.assert_allclose(flow.log_prob(x), log_q, rtol=tolerance, atol=tolerance)
        z = flow.to_latent(x)
        np.testing.assert_allclose(flow.to_data(z), x, rtol=tolerance, atol=tolerance)


def test_density_integrates_to_one():
    flow = FLOWS["chain"]()
    # Even steps in asinh(x) reach far into the tails.
    axis = np.linspace(-8, 8, 801)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    log_p = np.asarray(flow.log_prob(np.sinh(grid)), np.float64)
    mass = np.exp(log_p + np.log(np.cosh(grid)).sum(-1)).sum() * (axis[1] - axis[0]) ** 2
    assert mass == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["chain", "inverted", "repeat", "nested"])
def test_path_is_the_densities_of_the_first_steps(name):
    flow = FLOWS[name]()
    z = flow._base.sample(jr.key(0), (7,))
    up = flow.path(z)
    assert isinstance(up, Path)
    count = len(flow.bijection.steps())
    assert len(up.points) == count + 1 == len(up.names) + 1
    assert up.names == tuple(step.name for step in flow.bijection.steps())
    assert up.log_probs.shape == (count + 1, 7)
    np.testing.assert_allclose(up.points[-1], flow.to_data(z), rtol=1e-5, atol=1e-5)
    for k in {0, count // 3, count - 1}:
        q = flow.upto(k)
        assert len(q.bijection.steps()) == max(k, 1)
        log_q = q.log_prob(up.points[k])
        np.testing.assert_allclose(log_q, up.log_probs[k], rtol=1e-3, atol=1e-3)
    down = flow.path(x=up.points[-1])
    for a, b in zip(down.points, up.points, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(down.log_probs, up.log_probs, rtol=1e-3, atol=1e-3)


def test_first_steps_stay_scanned():
    inverse = first_steps(Invert(repeat(layer, 64, key=jr.key(0))), 10)
    assert isinstance(inverse, Chain)
    (part,) = inverse.parts
    assert isinstance(part, Invert)
    assert isinstance(part.bijection, Repeat)
    assert part.bijection.length == 10
    ends = first_steps(chain(jr.key(0)), 3)
    assert [type(p) for p in ends.parts] == [Bend, Repeat]
    assert step_names(ends) == ("Bend", *[step.name for step in ends.steps()[1:]])
    with pytest.raises(ShapeError, match="7 steps, so it has no first 8"):
        first_steps(chain(jr.key(0)), 8)
    with pytest.raises(ShapeError, match="no first -1"):
        first_steps(chain(jr.key(0)), -1)


def test_walk_compiles_once_for_any_depth():
    def size(depth):
        layers = repeat(layer, depth, key=jr.key(0))
        jaxpr = jax.make_jaxpr(lambda x: walk(layers, "inverse", x)[0][-1])(jnp.zeros((2, 3)))
        return sum(e.primitive.name == "scan" for e in jaxpr.eqns)

    assert size(3) == size(30) == 1


def test_path_through_shapes_that_differ():
    flow = Flow(Normal((4,)), Chain([Reshape((4,), (2, 2)), Reshape((2, 2), (1, 4))]))
    path = flow.path(np.zeros((3, 5, 4)))
    assert [p.shape for p in path.points] == [(3, 5, 4), (3, 5, 2, 2), (3, 5, 1, 4)]
    assert path.log_probs.shape == (3, 3, 5)


def test_conditions_meet_events_by_the_table():
    flow = Flow(Normal((2,)), chain(jr.key(0), (3,)))
    assert flow.cond_shape == (3,)
    c = RNG.normal(size=(4, 3))
    x, log_q = flow.sample_and_log_prob(jr.key(0), (6,), c)
    assert x.shape == (6, 4, 2)
    np.testing.assert_allclose(flow.log_prob(x, c), log_q, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(flow.log_prob(x, c, batch_size=5), log_q, rtol=1e-4, atol=1e-4)
    shared = flow.log_prob(x[:, 1], c[1])
    np.testing.assert_allclose(shared, log_q[:, 1], rtol=1e-4, atol=1e-4)
    one_event = flow.log_prob(x[0, 0], c)
    assert one_event.shape == (4,)
    assert one_event[0] == pytest.approx(float(log_q[0, 0]), rel=1e-4)
    path = flow.path(x=x, condition=c)
    np.testing.assert_allclose(path.log_probs[-1], log_q, rtol=1e-4, atol=1e-4)
    for k in (0, 3):
        log_k = flow.upto(k).log_prob(path.points[k], c)
        np.testing.assert_allclose(log_k, path.log_probs[k], rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="needs a condition"):
        flow.sample(jr.key(0), (3,))


class Sum(eqx.Module):
    """Embeds a tree of an image and a label, and counts the conditions it is given."""

    weight: jax.Array
    seen: ClassVar[list] = []

    def __call__(self, c):
        jax.debug.callback(lambda _: self.seen.append(1), c["label"])
        return self.weight * c["image"].sum() + self.weight[c["label"]]


def test_a_tree_of_conditions_is_embedded_once():
    embed = Sum(jnp.array([0.5, -0.5, 1.0]))
    shapes = {"image": (2, 2), "label": ()}
    flow = Flow(Normal((2,)), chain(jr.key(0), (3,)), embed, shapes)
    plain = Flow(Normal((2,)), chain(jr.key(0), (3,)))
    assert flow.cond_shape == shapes
    c = {"image": RNG.normal(size=(5, 2, 2)), "label": np.array([0, 1, 2, 1, 0])}
    encoded = np.stack(
        [
            embed({"image": c["image"][i].astype(np.float32), "label": c["label"][i]})
            for i in range(5)
        ]
    )
    Sum.seen.clear()
    x = flow.sample(jr.key(0), (100,), c, batch_size=64)
    jax.effects_barrier()
    assert x.shape == (100, 5, 2)
    assert len(Sum.seen) <= 64
    np.testing.assert_allclose(
        flow.log_prob(x, c), plain.log_prob(x, encoded), rtol=1e-4, atol=1e-4
    )
    last = {"image": jnp.moveaxis(jnp.asarray(c["image"], float), 0, -1), "label": c["label"]}
    private = flow._log_prob(jnp.moveaxis(x[0], 0, -1), last)
    np.testing.assert_allclose(private, plain.log_prob(x[0], encoded), rtol=1e-4, atol=1e-4)
    assert flow.upto(0).log_prob(x, c).shape == (100, 5)
    with pytest.raises(ShapeError, match="not a tree of arrays"):
        flow.log_prob(x, c["image"])
    with pytest.raises(ShapeError, match=r"\(5, 2\), but one condition has shape \(2, 2\)"):
        flow.log_prob(x, {**c, "image": c["image"][..., 0]})
    wide = Flow(Normal((2,)), chain(jr.key(0), (3,)), lambda c: jnp.ones((4,)), (2,))
    with pytest.raises(ShapeError, match=r"gives \(7, 4\).*\(3,\)"):
        wide.log_prob(np.zeros((7, 2)), np.zeros((7, 2)))


def test_gradients_reach_every_part_and_agree_with_differences():
    with jax.enable_x64(True):
        c = jnp.array([[0.3], [-0.2], [1.0]])
        embed = eqx.nn.Linear(1, 3, key=jr.key(9))
        flow = Flow(Normal((2,)), Chain([bend(jr.key(0), (3,)), bend(jr.key(1))]), embed, (1,))
        params, static = eqx.partition(flow, trainable(flow))

        def loss(params):
            x = eqx.combine(params, static).sample(jr.key(1), (4,), c)
            return (x**2).mean()

        grads = jax.grad(loss)(params)
        assert all(np.abs(g).sum() > 0 for g in jax.tree_util.tree_leaves(grads.bijection))
        direction = jax.tree_util.tree_map(jnp.ones_like, params)

        def moved(t):
            return loss(jax.tree_util.tree_map(lambda p, d: p + t * d, params, direction))

        numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
        exact = sum(g.sum() for g in jax.tree_util.tree_leaves(grads))
        assert float(exact) == pytest.approx(float(numeric), rel=1e-6)


def test_frozen_parts_are_not_trained():
    flow = Flow(Frozen(Normal((2,), 1.0, 3.0)), bend(jr.key(0)))
    trained = eqx.filter(flow, trainable(flow))
    assert jax.tree_util.tree_leaves(trained.base) == []
    assert len(jax.tree_util.tree_leaves(trained.bijection)) == 2
    fixed = Flow(Normal((2,)), Frozen(chain(jr.key(0))))
    assert jax.tree_util.tree_leaves(eqx.filter(fixed, trainable(fixed)).bijection) == []
    assert isinstance(fixed.upto(2).bijection, Frozen)
    assert fixed.log_prob(np.zeros((3, 2))).shape == (3,)


def test_ensembles_are_mixtures_of_stacked_flows():
    def make(key):
        return Flow(Normal((2,)), chain(key))

    keys = jr.split(jr.key(0), 3)
    stacked = Mixture(eqx.filter_vmap(make)(keys))
    listed = Mixture([make(k) for k in keys])
    x = RNG.normal(size=(9, 2))
    np.testing.assert_allclose(stacked.log_prob(x), listed.log_prob(x), rtol=1e-4)
    assert stacked.shape == (2,)
    assert stacked.sample(jr.key(0), (4, 5)).shape == (4, 5, 2)


def test_outside_the_support_of_the_base():
    flow = Flow(Uniform((2,)), Identity((2,)))
    x = jnp.array([[0.5, 0.5], [1.5, 0.5], [jnp.inf, 0.5], [jnp.nan, 0.5]])
    np.testing.assert_array_equal(flow.log_prob(x), [0, -np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(flow.path(x=x[:2]).log_probs, [[0, -np.inf]] * 2)


class Noisy(AbstractTransform):
    """A transform whose log-det is an estimate, which draws."""

    in_shape: Shape = (2,)
    out_shape: Shape = (2,)
    cond_shape: None = None
    exactness: str = eqx.field(static=True, default="unbiased")

    def forward(self, x, condition=None, *, key=None):
        return x, 0.1 * jr.normal(key, ())

    def inverse(self, y, condition=None, *, key=None):
        return y, 0.1 * jr.normal(key, ())


def test_estimated_densities_need_a_key():
    flow = Flow(Normal((2,)), Noisy())
    assert flow.exactness == "unbiased"
    assert Mixture([flow, Normal((2,))]).exactness == "bound"
    with pytest.raises(InputError, match=r"unbiased estimate.*log_prob\(…, key=key\)"):
        flow.log_prob(np.zeros(2))
    with pytest.raises(InputError, match="path needs a random key"):
        flow.path(np.zeros(2))
    log_p = flow.log_prob(np.zeros((2000, 2)), key=jr.key(0), batch_size=500)
    assert np.std(log_p) == pytest.approx(0.1, rel=0.1)
    assert np.mean(log_p) == pytest.approx(-np.log(2 * np.pi), abs=0.02)
    assert flow.sample_and_log_prob(jr.key(0), (5,))[1].shape == (5,)
    assert flow.path(np.zeros((3, 2)), key=jr.key(0)).log_probs.shape == (2, 3)


def test_entropy_of_a_flow():
    flow = Flow(Normal((2,)), Identity((2,)))
    value, error = flow.entropy(jr.key(0), 5000)
    assert abs(value - (1 + np.log(2 * np.pi))) < 4 * error
    value, error = flow.kl(Normal((2,), 1.0), jr.key(0), 5000)
    assert abs(value - 1.0) < 4 * error


def test_conditional_base_and_conditional_map_share_a_condition():
    base = ConditionalNormal(lambda c: jnp.stack([c[:2], jnp.zeros(2)]), 2, 3)
    flow = Flow(base, Identity((2,)))
    x, c = RNG.normal(size=(5, 2)), RNG.normal(size=(5, 3))
    np.testing.assert_allclose(
        flow.log_prob(x, c), st.norm(c[:, :2], 1).logpdf(x).sum(-1), rtol=1e-5
    )
    assert Flow(base, chain(jr.key(0), (3,))).log_prob(x, c).shape == (5,)


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (
            lambda: Flow(Normal((3,)), bend(jr.key(0))),
            ShapeError,
            r"base \(Normal\).*\(3,\).*\(Bend\) takes \(2,\)",
        ),
        (
            lambda: Flow(ConditionalNormal(lambda c: c, 2, 4), bend(jr.key(0), (3,))),
            ShapeError,
            r"condition of shape \(4,\).*\(3,\)",
        ),
        (
            lambda: Flow(Normal((2,)), bend(jr.key(0), (3,)), lambda c: c),
            ShapeError,
            "give the shape of one raw condition",
        ),
        (
            lambda: Flow(Normal((2,)), bend(jr.key(0), (3,)), cond_shape=(2,)),
            ShapeError,
            r"cond_shape \(2,\).*\(3,\)",
        ),
        (
            lambda: Flow(
                Flow(Normal((2,)), bend(jr.key(0), (3,)), lambda c: c["a"], {"a": (3,)}),
                bend(jr.key(1)),
            ),
            ShapeError,
            "outermost flow",
        ),
        (lambda: FLOWS["chain"]().path(), InputError, "either latent points"),
        (lambda: FLOWS["chain"]().path(np.zeros(2), x=np.zeros(2)), InputError, "either"),
        (lambda: FLOWS["chain"]().upto(9), ShapeError, "no first 9"),
        (lambda: FLOWS["chain"]().to_data(np.zeros(3)), ShapeError, r"z has shape \(3,\)"),
        (lambda: FLOWS["chain"]().to_latent(np.zeros(3)), ShapeError, r"x has shape \(3,\)"),
    ],
)
def test_errors_name_the_part_and_say_what_to_do(act, error, match):
    with pytest.raises(error, match=match):
        act()


def test_what_is_no_key_is_said_to_be_none():
    flow = nsf(2, key=jr.key(0), layers=1, width=8)
    with pytest.raises(InputError, match=r"sample: the first argument is a random key, .* not int"):
        flow.sample(10)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"fit: the first argument is a random key, .* not Flow"):
        fit(flow, jr.key(0), np.zeros((10, 2)))


class Unsummed(AbstractBijection):
    """Doubles, with a log-det for each entry, as is easily written."""

    in_shape = (2,)
    out_shape = (2,)
    cond_shape = None

    def forward(self, x, condition=None, *, key=None):
        return 2 * x, jnp.full(2, jnp.log(2.0))

    def inverse(self, y, condition=None, *, key=None):
        return y / 2, -jnp.full(2, jnp.log(2.0))


def test_a_log_det_that_is_not_summed_is_refused():
    flow = Flow(Normal(2), Chain([Unsummed()]))
    with pytest.raises(ShapeError, match="Unsummed: inverse gave a log-det of shape"):
        flow.log_prob(jnp.ones((5, 2)))
    with pytest.raises(ShapeError, match="Unsummed: forward"):
        flow.sample_and_log_prob(jr.key(0), (3,))


def test_parts_in_the_wrong_places_are_named():
    with pytest.raises(InputError, match="where the distribution belongs it got Unsummed"):
        Flow(Unsummed(), Normal(2))
    with pytest.raises(InputError, match="where the transform belongs it got list"):
        Flow(Normal(2), [Unsummed()])
    with pytest.raises(InputError, match="Flow got the class Unsummed; call it to make one"):
        Flow(Normal(2), Unsummed)
    with pytest.raises(InputError, match="Flow got the class Normal; call it"):
        Flow(Normal, Unsummed())
