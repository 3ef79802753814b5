"""The incremental inverse against D full passes, and the autoregressive structure itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from cases import randomise

from laminar._errors import InputError, ShapeError
from laminar.bijections.autoregressive import MaskedAutoregressive, masked_autoregressive
from laminar.bijections.compose import Chain, repeat
from laminar.bijections.elementwise import Affine, SinhArcsinh
from laminar.bijections.splines import RationalQuadratic
from laminar.nn.masked import MaskedMLP, degrees

SIZES = [
    # dim, width, cond_dim, residual: fewer units than inputs, one and two inputs, conditions.
    (1, 8, 0, False),
    (1, 8, 2, True),
    (2, 8, 0, True),
    (2, 1, 0, False),
    (3, 16, 2, False),
    (9, 4, 0, False),
    (9, 3, 1, True),
    (9, 64, 0, True),
    (20, 31, 3, False),
]


def _layer(dim, width, cond_dim, residual, template=None):
    order_key, net_key, random_key = jr.split(jr.key(dim + width), 3)
    layer = masked_autoregressive(
        dim,
        template or Affine(max_log_scale=1.0),
        width=width,
        depth=2,
        cond_dim=cond_dim,
        residual=residual,
        order=jr.permutation(order_key, dim),
        key=net_key,
    )
    return randomise(layer, random_key, scale=0.3)


def _inputs(layer, batch):
    x_key, c_key = jr.split(jr.key(7))
    x = jr.normal(x_key, (*layer.in_shape, *batch))
    condition = None
    if layer.cond_shape:
        condition = jr.normal(c_key, (*layer.cond_shape, *batch))
    return x, condition


@eqx.filter_jit
def _full_passes(layer, x, condition):
    """The usual inversion: as many dense passes as there are dimensions."""
    template, y = layer.template, jnp.zeros_like(x)
    for _ in range(x.shape[0]):
        theta = layer.net(y, condition)
        theta = theta + template.params.reshape(-1, *[1] * x.ndim)
        y, log_det = template.forward_kernel(theta, x)
    return y, log_det.sum(0)


@pytest.mark.parametrize(("dim", "width", "cond_dim", "residual"), SIZES)
def test_the_incremental_pass_equals_full_passes(dim, width, cond_dim, residual):
    layer = _layer(dim, width, cond_dim, residual)
    x, condition = _inputs(layer, (5,))
    y, log_det = eqx.filter_jit(layer.forward)(x, condition)
    want, want_log_det = _full_passes(layer, x, condition)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(log_det, want_log_det, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("dim", "width", "cond_dim", "residual"), SIZES)
def test_each_parameter_sees_earlier_inputs_only(dim, width, cond_dim, residual):
    layer = _layer(dim, width, cond_dim, residual)
    x, condition = _inputs(layer, ())
    jacobian = np.abs(jax.jacfwd(lambda x: layer.net(x, condition))(x)).sum(0)
    order = np.asarray(layer.net.order)
    earlier = order[None, :] < order[:, None]
    assert (jacobian[~earlier] == 0).all()
    if dim > 1 and width >= 2 * dim and not residual:
        assert (jacobian[earlier] > 0).mean() > 0.9


def test_gradients_through_the_incremental_pass_are_those_of_full_passes():
    layer = _layer(5, 12, 2, True, RationalQuadratic(4))
    x, condition = _inputs(layer, (3,))
    cotangent = jr.normal(jr.key(1), x.shape)

    def loss(run, at):
        layer, x, condition = at
        y, log_det = run(layer, x, condition)
        return (y * cotangent).sum() + (log_det**2).sum()

    at = (layer, x, condition)
    got = eqx.filter_jit(eqx.filter_grad(lambda at: loss(lambda f, *a: f.forward(*a), at)))(at)
    want = eqx.filter_jit(eqx.filter_grad(lambda at: loss(_full_passes, at)))(at)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-4)


def test_a_shared_condition_equals_a_repeated_one():
    layer = _layer(4, 16, 3, False)
    x, condition = _inputs(layer, (6,))
    one = condition[:, 0]
    for direction in (layer.forward, layer.inverse):
        shared = direction(x, one)
        repeated = direction(x, jnp.broadcast_to(one[:, None], (3, 6)))
        for a, b in zip(shared, repeated, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_any_scalar_bijection_serves_as_template():
    template = Chain([SinhArcsinh(), Affine()])
    layer = _layer(4, 16, 0, False, template)
    x, _ = _inputs(layer, (6,))
    y, log_det = layer.forward(x)
    back, back_log_det = layer.inverse(y)
    np.testing.assert_allclose(back, x, atol=1e-4)
    np.testing.assert_allclose(log_det, -back_log_det, atol=1e-4)


def test_a_new_layer_is_its_template():
    layer = masked_autoregressive(3, RationalQuadratic(8), width=8, depth=1, key=jr.key(0))
    x = jnp.linspace(-4, 4, 3)
    np.testing.assert_allclose(layer.inverse(x)[0], x, atol=1e-6)


def test_multiply_adds_are_those_of_about_one_dense_pass():
    dim, width, n = 32, 128, 10
    layer = _layer(dim, width, 0, False)
    x = jnp.zeros((dim, n))

    def flops(run):
        return _multiply_adds(jax.make_jaxpr(run)(x).jaxpr)

    dense = flops(layer.inverse)
    # Blocks are padded to one size: 31 degrees share 128 units in blocks of at most 5.
    assert dense <= flops(layer.forward) <= 1.4 * dense


def test_the_splines_of_stacked_layers_look_nothing_up():
    """Or else the compiler could not vectorise them: see `laminar.nn.mlp.affine`."""

    def layer(key):
        return masked_autoregressive(6, RationalQuadratic(8), width=16, depth=2, key=key)

    flow = repeat(layer, 3, key=jr.key(0))
    arrays, static = eqx.partition(flow, eqx.is_array)

    def run(arrays, x):
        return eqx.combine(arrays, static).inverse(x)

    text = jax.jit(run).lower(arrays, jnp.zeros((6, 64))).compile().as_text()
    parts = [part for part in text.split("\n\n") if "log-plus-one(" in part]
    assert parts
    assert not any("dynamic-slice(" in part for part in parts)


def test_gradients_that_compute_the_parameters_again_are_those_that_keep_them(monkeypatch):
    layer = _layer(9, 4, 0, False)
    y = jr.normal(jr.key(2), (9, 5))

    def gradient():
        def total(layer, y):
            x, log_det = layer.inverse(y)
            return jnp.sin(x).sum() + log_det.sum()

        grads = eqx.filter_grad(total)(layer, y)
        text = str(eqx.filter_make_jaxpr(eqx.filter_grad(total))(layer, y)[0])
        return jtu.tree_leaves(eqx.filter(grads, eqx.is_inexact_array)), "remat" in text

    again, twice = gradient()
    monkeypatch.setattr("laminar.bijections.autoregressive._LARGE", 1_000)
    kept, once = gradient()
    assert (twice, once) == (True, False)
    for a, b in zip(again, kept, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _multiply_adds(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for param in eqn.params.values():
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                total += trips * _multiply_adds(inner)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += int(np.prod(eqn.outvars[0].aval.shape)) * int(
                np.prod([left[i] for i in contracted])
            )
    return total


def test_layers_of_different_order_are_scanned():
    def make(at):
        order, key = at
        return masked_autoregressive(4, Affine(), width=8, depth=1, order=order, key=key)

    orders = jnp.stack([jr.permutation(k, 4) for k in jr.split(jr.key(0), 3)])
    stack = randomise(repeat(make, 3, over=(orders, jr.split(jr.key(1), 3))), jr.key(2), 0.3)
    x = jr.normal(jr.key(3), (4, 6))
    back, _ = stack.inverse(stack.forward(x)[0])
    np.testing.assert_allclose(back, x, atol=1e-4)


DIAMOND = ((1, 2), (3,), (3,), ())
WIDE = np.zeros((9, 9), int)  # a root with four children, each with a child of its own
WIDE[1:5, 0] = WIDE[range(5, 9), range(1, 5)] = 1
GRAPHS = {
    "diamond": (DIAMOND, 3),
    "wide": (WIDE, 3),
    "chain": ([range(i) for i in range(6)], 6),
    "pairs": ([(), (0,), (), (2,), (), (4,)], 2),
    "none": ([()] * 4, 1),
    "late": ([(), (0,), (1,), ()], 3),  # two columns in the first step, then one at a time
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("cond_dim", "residual"), [(0, False), (2, True)])
def test_a_graph_decides_who_depends_on_whom(name, cond_dim, residual):
    graph, steps = GRAPHS[name]
    parents = [np.flatnonzero(row) for row in graph] if isinstance(graph, np.ndarray) else graph
    dim = len(parents)
    layer = masked_autoregressive(
        dim,
        RationalQuadratic(4),
        width=48,
        depth=2,
        cond_dim=cond_dim,
        residual=residual,
        graph=graph,
        key=jr.key(0),
    )
    layer = randomise(layer, jr.key(1), 0.1)
    x, condition = _inputs(layer, (5,))
    y, log_det = eqx.filter_jit(layer.forward)(x, condition)
    want, want_log_det = _full_passes(layer, x, condition)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(log_det, want_log_det, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(layer.inverse(y, condition)[0], x, atol=1e-4)

    one, condition = _inputs(layer, ())
    jacobian = np.abs(jax.jacfwd(lambda x: layer.net(x, condition))(one)).sum(0)
    allowed = np.zeros((dim, dim), bool)
    for i, row in enumerate(parents):
        allowed[i, list(row)] = True
    assert (jacobian[~allowed] == 0).all()
    assert (jacobian[allowed] > 0).all()
    text = str(eqx.filter_make_jaxpr(lambda x: layer.forward(x, condition))(one)[0])
    assert f"length={steps - (cond_dim == 0 and steps > 1)}" in text


@pytest.mark.slow
def test_the_steps_of_a_graph_learn():
    layer = masked_autoregressive(4, Affine(), width=12, depth=2, graph=DIAMOND, key=jr.key(0))
    layer = randomise(layer, jr.key(1), 0.5)
    x, _ = _inputs(layer, (6,))

    def loss(run, layer):
        y, log_det = run(layer, x, None)
        return jnp.sin(y).sum() + (log_det**2).sum()

    got = eqx.filter_grad(lambda at: loss(lambda f, *a: f.forward(*a), at))(layer)
    want = eqx.filter_grad(lambda at: loss(_full_passes, at))(layer)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-4)


def test_bad_graphs_are_refused():
    def build(graph, width=8, **options):
        return MaskedMLP(3, 2, width=width, depth=1, graph=graph, key=jr.key(0), **options)

    cycle = "column 0 depends on 2, which depends on 1, which depends on 0"
    with pytest.raises(InputError, match=f"has a cycle: {cycle}"):
        build([[2], [0], [1]])
    with pytest.raises(InputError, match="column 1 depends on 1"):
        build(np.diag([0, 1, 0]))
    with pytest.raises(InputError, match="parents"):
        build([[], [3], []])
    with pytest.raises(InputError, match="2 different sets of parents"):
        build([[], [0], [0, 1]], width=1)
    with pytest.raises(InputError, match="either an order or a graph"):
        build([[], [0], [0, 1]], order=jnp.arange(3))
    with pytest.raises(ShapeError, match=r"\(2, 3\), not \(3, 3\)"):
        build(np.zeros((2, 3)))
    with pytest.raises(ShapeError, match="parents of 2 columns, not of 3"):
        build([[], [0]])


def test_degrees_are_sorted_and_spread():
    np.testing.assert_array_equal(degrees(4, 6, False), [1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(degrees(3, 6, True), [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(degrees(1, 2, False), [0, 0])
    assert set(degrees(9, 3, False)) < set(range(1, 9))


def test_misfits_are_named():
    net = MaskedMLP(3, 5, width=8, depth=1, key=jr.key(0))
    with pytest.raises(ShapeError, match="takes 2 parameters, the network gives 5"):
        MaskedAutoregressive(Affine(), net)
    with pytest.raises(ShapeError, match="scalar map"):
        MaskedAutoregressive(Affine(shape=(3,)), net)
