"""Parameters from a network: each row has its own map, whichever way it is computed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import randomise

from laminar._errors import InputError, ShapeError
from laminar.bijections.amortized import (
    Amortized,
    amortized,
    count_parameters,
    takes_batched_parameters,
)
from laminar.bijections.base import Invert, call
from laminar.bijections.compose import Chain, Permute, Stack, repeat, reverse
from laminar.bijections.coupling import coupling
from laminar.bijections.elementwise import Affine, Exp, SinhArcsinh
from laminar.bijections.linear import LU
from laminar.bijections.rank_one import Planar, Radial, Sylvester
from laminar.bijections.splines import RationalQuadratic
from laminar.distributions import ConditionalNormal
from laminar.flow import Flow
from laminar.nn.mlp import MLP, Dense

TEMPLATES = {
    "planar": lambda key: repeat(lambda key: Planar(3, key=key), 5, key=key),
    "radial": lambda key: repeat(lambda key: Radial(3, key=key), 2, key=key),
    "orthogonal": lambda key: Sylvester(3, 2, key=key),
    "triangular": lambda key: Sylvester(3, kind="triangular", order=jnp.array([2, 0, 1]), key=key),
    "composed": lambda key: Chain([Invert(Planar(3, key=key)), reverse(3), Affine(shape=(3,))]),
    "spline": lambda key: RationalQuadratic(4, (3,)),
    "linear": lambda key: LU(3, key=key),
}


def _random(template, key, cond_dim=2):
    made = amortized(template, cond_dim, key=key, width=8, depth=1)
    return randomise(made, key, 0.3)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_row_has_the_map_of_its_own_parameters(name):
    template_key, key, x_key, c_key = jr.split(jr.key(0), 4)
    transform = _random(TEMPLATES[name](template_key), key)
    x, c = jr.normal(x_key, (3, 4)), jr.normal(c_key, (2, 4))
    for direction in ("forward", "inverse"):
        run = eqx.filter_jit(lambda x, c, direction=direction: call(transform, direction, x, c))
        y, log_det = run(x, c)
        for i in range(4):
            single, single_log_det = run(x[:, i], c[:, i])
            np.testing.assert_allclose(y[:, i], single, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(log_det[i], single_log_det, rtol=1e-4, atol=1e-5)


def test_which_maps_take_their_parameters_with_the_batch():
    key = jr.key(0)
    batched = {name for name, make in TEMPLATES.items() if takes_batched_parameters(make(key))}
    assert batched == set(TEMPLATES) - {"linear"}
    assert takes_batched_parameters(Chain([Exp((2,)), Permute([1, 0])]))
    assert not takes_batched_parameters(coupling(2, Affine(), key=key))


def test_it_starts_at_its_template_and_the_network_learns():
    template = TEMPLATES["planar"](jr.key(0))
    for width in (None, 8):
        transform = amortized(template, 2, key=jr.key(1), width=width)
        x, c = jr.normal(jr.key(2), (3, 4)), jr.normal(jr.key(3), (2, 4))
        np.testing.assert_allclose(transform.forward(x, c)[0], template.forward(x)[0])

        def loss(net, transform=transform, x=x, c=c):
            moved = eqx.tree_at(lambda t: t.net, transform, net)
            return (moved.forward(x, c)[0] ** 3).sum()

        grads = eqx.filter_grad(loss)(transform.net)
        assert sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(grads)) > 0.1


def test_the_path_of_an_amortised_flow_counts_the_layers_of_its_template():
    key = jr.key(0)
    inner = Chain([TEMPLATES["planar"](key), Sylvester(3, 2, key=key), reverse(3)])
    flow = Flow(ConditionalNormal(Dense(2, 6, key=key), (3,), (2,)), _random(inner, jr.key(1)))
    z, c = jr.normal(jr.key(2), (4, 3)), jr.normal(jr.key(3), (4, 2))
    path = flow.path(z, c)
    assert len(path.points) == 8
    assert path.names[0] == "Amortized(Planar)"
    assert path.names[-1] == "Permute"
    np.testing.assert_allclose(path.points[-1], flow.to_data(z, c), atol=1e-5)
    np.testing.assert_allclose(path.log_probs[-1], flow.log_prob(path.points[-1], c), rtol=1e-4)
    for k in (0, 3, 6):
        np.testing.assert_allclose(
            path.log_probs[k], flow.upto(k).log_prob(path.points[k], c), rtol=1e-4, atol=1e-4
        )


def test_a_template_with_a_condition_gets_the_same_one():
    template = coupling(3, Affine(max_log_scale=1.0), cond_dim=2, width=8, depth=1, key=jr.key(0))
    transform = _random(template, jr.key(1))
    x = jr.normal(jr.key(2), (3, 5))
    c = jr.normal(jr.key(3), (2, 5))
    y, log_det = transform.forward(x, c)
    back, minus = transform.inverse(y, c)
    np.testing.assert_allclose(back, x, atol=1e-5)
    np.testing.assert_allclose(minus, -log_det, atol=1e-5)


def test_misuse_is_named():
    key = jr.key(0)
    planar = Planar(3, key=key)
    assert count_parameters(planar) == 7
    with pytest.raises(ShapeError, match=r"must give 7 numbers.*gives \(6,\)"):
        Amortized(planar, MLP(2, 6, key=key), 2)
    with pytest.raises(ShapeError, match="cannot take a condition"):
        Amortized(planar, MLP(3, 7, key=key), 2)
    with pytest.raises(InputError, match="no trained numbers"):
        amortized(reverse(3), 2, key=key)
    with pytest.raises(InputError, match="cond_dim must be at least 1"):
        amortized(planar, 0, key=key)
    with pytest.raises(ShapeError, match="takes one of shape"):
        amortized(coupling(3, Affine(), cond_dim=4, key=key), 2, key=key)
    with pytest.raises(ShapeError, match="got none"):
        amortized(planar, 2, key=key).forward(jnp.zeros((3,)))


def test_a_stack_of_unlike_maps_takes_a_row_of_parameters_each():
    stack = Stack([Affine(), SinhArcsinh()])
    assert takes_batched_parameters(stack)
    transform = randomise(amortized(stack, 2, key=jr.key(0)), jr.key(1), 0.5)
    x, condition = jr.normal(jr.key(2), (2, 5)), jr.normal(jr.key(3), (2, 5))
    y, log_det = transform.forward(x, condition)
    for i in range(5):
        one, one_log_det = transform.forward(x[:, i], condition[:, i])
        np.testing.assert_allclose(y[:, i], one, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(log_det[i], one_log_det, rtol=1e-5, atol=1e-6)
