"""Every builder: identity at the start, exact both ways, conditioned, and honest about misuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import randomise

from laminar import zoo
from laminar._errors import InputError
from laminar.bijections.base import Invert
from laminar.bijections.splines import RationalQuadratic
from laminar.distributions import StudentT
from laminar.nn.masked import MaskedMLP
from laminar.zoo import stacks

SMALL = {"layers": 3, "width": 16, "depth": 1}


def _both_ways(flow, x, condition=None):
    """In one program, to keep the suite quick: z and x again, and ln q from both sides."""

    @eqx.filter_jit
    def run(flow, x, condition):
        z = flow.to_latent(x, condition)
        samples, log_q = flow.sample_and_log_prob(jr.key(4), x.shape[:1], condition)
        return flow.to_data(z, condition), log_q, flow.log_prob(samples, condition)

    return run(flow, x, condition)


SHORT = ("nsf", "realnvp", "residual", "planar")
"""Those that every run tries: masks, couplings, fixed points and roots. The long run tries all."""
BUILDERS = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in SHORT))
    for name in sorted(zoo.BUILDERS)
]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("dim", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_flow_starts_as_its_base_and_inverts_at_random_parameters(name, dim):
    flow = zoo.BUILDERS[name](dim, key=jr.key(0), cond_dim=2, **SMALL)
    x = jr.normal(jr.key(1), (7, dim))
    condition = jr.normal(jr.key(2), (2,))
    np.testing.assert_allclose(
        flow.log_prob(x, condition), flow.base.log_prob(x), rtol=1e-4, atol=1e-4
    )
    flow = eqx.tree_at(lambda f: f.bijection, flow, randomise(flow.bijection, jr.key(3), 0.3))
    back, log_q, again = _both_ways(flow, x, condition)
    np.testing.assert_allclose(back, x, atol=2e-3)
    np.testing.assert_allclose(log_q, again, rtol=1e-3, atol=5e-3)


@pytest.mark.slow
def test_spline_flow_options():
    x = jr.normal(jr.key(1), (7, 3))
    for options in (
        {"coupling": True, "affine": True},
        {"fast": "sample", "base": StudentT((3,))},
        {"residual": True, "linear": True},
    ):
        flow = zoo.nsf(3, key=jr.key(0), **SMALL, **options)
        flow = eqx.tree_at(lambda f: f.bijection, flow, randomise(flow.bijection, jr.key(3), 0.3))
        np.testing.assert_allclose(_both_ways(flow, x)[0], x, atol=2e-3)


@pytest.mark.parametrize("name", ["iaf", "maf", "nice", "nsf", "realnvp"])
def test_one_column_gets_splines_not_a_silent_gaussian(name):
    flow = zoo.BUILDERS[name](1, key=jr.key(0), **SMALL)
    layer = flow.bijection.steps()[0]
    layer = layer.bijection if isinstance(layer, Invert) else layer
    assert isinstance(layer.template, RationalQuadratic)


@pytest.mark.parametrize("mixing", ["permutation", "orthogonal"])
def test_nice_mixes_at_random_and_keeps_volume(mixing):
    flow = zoo.nice(4, key=jr.key(0), mixing=mixing, base=StudentT((4,)), **SMALL)
    x = jr.normal(jr.key(1), (7, 4))
    np.testing.assert_allclose(flow.log_prob(x), flow.base.log_prob(x), rtol=1e-4, atol=1e-4)
    flow = eqx.tree_at(lambda f: f.bijection, flow, randomise(flow.bijection, jr.key(3), 0.3))
    couplings = flow.bijection.parts[0]
    log_det = couplings.forward(x.T)[1]
    np.testing.assert_allclose(log_det, 0, atol=1e-5)
    np.testing.assert_allclose(_both_ways(flow, x)[0], x, atol=2e-3)
    moves = [np.asarray(step.parts[0].forward(jnp.eye(4))[0]) for step in couplings.steps()]
    assert not all(np.allclose(move, moves[0]) for move in moves)
    for move in moves:
        np.testing.assert_allclose(move @ move.T, np.eye(4), atol=1e-5)


@pytest.mark.parametrize("dim", [2, 5])
def test_random_permutations_never_let_the_same_half_pass_twice(dim):
    for seed in range(5):
        orders = np.asarray(stacks.random_orders(dim, 9, jr.key(seed)))
        assert (np.sort(orders, axis=1) == np.arange(dim)).all()
        halves = orders < dim // 2
        assert (halves[1:] != halves[:-1]).any(axis=1).all()


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester"])
def test_flows_without_networks_can_have_either_direction_closed(name):
    x = jr.normal(jr.key(1), (7, 3))
    for fast in ("sample", "log_prob"):
        flow = zoo.BUILDERS[name](3, key=jr.key(0), layers=4, fast=fast)
        assert isinstance(flow.bijection.layers, Invert) == (fast == "log_prob")
        flow = eqx.tree_at(lambda f: f.bijection, flow, randomise(flow.bijection, jr.key(3), 0.5))
        np.testing.assert_allclose(_both_ways(flow, x)[0], x, atol=2e-3)


def test_triangular_sylvester_layers_take_turns_in_their_order():
    flow = zoo.sylvester(3, key=jr.key(0), layers=3, kind="triangular")
    np.testing.assert_array_equal(
        flow.bijection.layers.order.index, [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
    )
    assert zoo.sylvester(5, key=jr.key(0), columns=2).bijection.layers.b.shape == (8, 2)


def test_orders_come_in_opposite_pairs():
    orders = np.asarray(stacks.paired_orders(6, 5, jr.key(0)))
    assert orders.shape == (5, 6)
    np.testing.assert_array_equal(orders[0], np.arange(6))
    np.testing.assert_array_equal(orders[0::2][:2] + orders[1::2], np.full((2, 6), 5))
    assert (np.sort(orders, axis=1) == np.arange(6)).all()


def test_a_pair_of_coupling_layers_moves_every_column():
    flow = zoo.realnvp(6, key=jr.key(0), layers=8, width=8, depth=1)
    flow = eqx.tree_at(lambda f: f.bijection, flow, randomise(flow.bijection, jr.key(1), 0.3))
    x = jr.normal(jr.key(2), (6,))
    moved = [np.asarray(step.forward(x)[0] != x) for step in flow.bijection.steps()]
    for first, second in zip(moved[::2], moved[1::2], strict=True):
        assert first.sum() == second.sum() == 3
        assert (first | second).all()


def test_a_graph_is_kept_by_every_layer():
    parents = [[1], [], [0], []]
    for name in ("nsf", "maf"):
        flow = zoo.BUILDERS[name](4, key=jr.key(0), graph=parents, **SMALL)
        flow = eqx.tree_at(lambda f: f.bijection, flow, randomise(flow.bijection, jr.key(3), 0.3))
        x = jr.normal(jr.key(1), (7, 4))
        np.testing.assert_allclose(_both_ways(flow, x)[0], x, atol=2e-3)
        moves = jax.jacfwd(lambda x: flow.bijection.inverse(x)[0])(x[0]) != 0
        ancestors = np.eye(4, dtype=bool)
        ancestors[0, 1] = ancestors[2, 0] = ancestors[2, 1] = True
        np.testing.assert_array_equal(moves, ancestors)
    with pytest.raises(InputError, match="do not keep to a graph"):
        zoo.nsf(4, key=jr.key(0), graph=parents, coupling=True)


@pytest.mark.parametrize(
    ("name", "options"), [("gaussianization", {}), ("residual", {"log_det": "roulette"})]
)
def test_layers_are_set_from_data(name, options):
    flow = zoo.BUILDERS[name](3, key=jr.key(0), **SMALL, **options)
    x = 7 + jnp.diag(jnp.asarray([1.0, 20.0, 0.1])) @ jr.normal(jr.key(1), (3, 200))
    z = flow.bijection.init_from_data(x).points("inverse", x)
    np.testing.assert_allclose(z.mean(1), 0.0, atol=1e-2)
    np.testing.assert_allclose((z**2).mean(), 1.0, atol=0.1)


def test_realnvp_can_keep_its_volume():
    flow = zoo.realnvp(5, key=jr.key(0), keep_volume=True, **SMALL)
    flow = eqx.tree_at(lambda f: f.bijection, flow, randomise(flow.bijection, jr.key(3), 0.3))
    x = jr.normal(jr.key(1), (7, 5))
    np.testing.assert_allclose(_both_ways(flow, x)[0], x, atol=1e-4)
    assert not flow.bijection.forward(x.T)[1].any()
    with pytest.raises(InputError, match="keep_volume takes two columns"):
        zoo.realnvp(1, key=jr.key(0), keep_volume=True)


def test_misuse_is_named():
    with pytest.raises(InputError, match="layers must be at least 1"):
        zoo.nsf(3, key=jr.key(0), layers=0)
    with pytest.raises(InputError, match="each position"):
        MaskedMLP(3, 2, width=4, depth=1, order=[0, 0, 7], key=jr.key(0))
    with pytest.raises(InputError, match="fast must be"):
        zoo.nsf(3, key=jr.key(0), fast="both")
    with pytest.raises(InputError, match="planar: fast must be"):
        zoo.planar(3, key=jr.key(0), fast="both")
    with pytest.raises(InputError, match="radial: layers must be at least 1"):
        zoo.radial(3, key=jr.key(0), layers=0)
    with pytest.raises(InputError, match="mixing must be"):
        zoo.nice(3, key=jr.key(0), mixing="none")
    with pytest.raises(InputError, match="cond_dim"):
        zoo.maf(3, key=jr.key(0), cond_dim=-1)


def test_depth_costs_no_structure():
    shallow = zoo.nsf(3, key=jr.key(0), **{**SMALL, "layers": 2})
    deep = zoo.nsf(3, key=jr.key(0), **{**SMALL, "layers": 32})
    assert len(deep.bijection.steps()) == 32
    count = [
        len(str(eqx.filter_make_jaxpr(f.log_prob)(jnp.zeros((2, 3)))[0])) for f in (shallow, deep)
    ]
    assert count[1] < 1.05 * count[0]
