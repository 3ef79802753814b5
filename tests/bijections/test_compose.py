"""Composition: order, conditions, stacking, moves of elements, and errors that name the part."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laminar._errors import InputError, ShapeError
from laminar.bijections.autoregressive import masked_autoregressive
from laminar.bijections.base import AbstractTransform, Identity, Invert
from laminar.bijections.compose import (
    Chain,
    Independent,
    Indexed,
    Permute,
    Repeat,
    Reshape,
    Stack,
    random_permutation,
    repeat,
    reverse,
)
from laminar.bijections.conjugate import Conjugate
from laminar.bijections.coupling import coupling
from laminar.bijections.elementwise import Affine, Exp, Shift
from laminar.bijections.linear import ActNorm
from laminar.bijections.monotone import UnconstrainedMonotone
from laminar.bijections.path import first_steps
from laminar.bijections.splines import RationalQuadratic


class Conditioned(AbstractTransform):
    """y = x + c · ones."""

    size: int = eqx.field(static=True)
    exactness: str = eqx.field(static=True, default="exact")

    @property
    def in_shape(self):
        return (2,)

    @property
    def out_shape(self):
        return (2,)

    @property
    def cond_shape(self):
        return (self.size,)

    def forward(self, x, condition=None, *, key=None):
        return x + condition.sum(), jnp.zeros(())

    def inverse(self, y, condition=None, *, key=None):
        return y - condition.sum(), jnp.zeros(())


def _layer(key):
    affine_key, perm_key = jr.split(key)
    affine = Affine(jr.normal(affine_key, (3,)), 2.0)
    return Chain([affine, random_permutation(3, key=perm_key)])


def test_chain_applies_the_first_part_first():
    y, log_det = Chain([Shift(1.0), Affine(0.0, 3.0)]).forward(jnp.float32(1.0))
    np.testing.assert_allclose(y, 6.0, rtol=1e-6)
    np.testing.assert_allclose(log_det, np.log(3.0), rtol=1e-6)


def test_chain_names_the_parts_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"part 0 \(Affine\) gives \(3,\), part 1 \(Exp\)"):
        Chain([Affine(shape=(3,)), Exp((4,))])
    with pytest.raises(ShapeError, match="at least one"):
        Chain([])


def test_chain_shares_one_condition_with_those_who_take_one():
    chain = Chain([Conditioned(3), Shift(shape=(2,)), Conditioned(3)])
    assert chain.cond_shape == (3,)
    y, _ = chain.forward(jnp.zeros((2, 4)), jnp.ones((3, 4)))
    np.testing.assert_allclose(y, 6.0)
    with pytest.raises(ShapeError, match=r"\(3,\).*\(2,\)"):
        Chain([Conditioned(3), Conditioned(2)])


def test_chain_is_as_exact_as_its_weakest_part():
    assert Chain([Conditioned(1), Conditioned(1, "unbiased")]).exactness == "unbiased"
    assert Chain([Conditioned(1, "bound"), Conditioned(1, "unbiased")]).exactness == "bound"


def test_first_steps_give_the_points_of_the_path():
    chain = Chain([Affine(shape=(3,)), repeat(_layer, 3, key=jr.key(0)), Exp((3,))])
    x = jr.normal(jr.key(1), (3,))
    assert len(chain.steps()) == 5
    z, total = x, 0.0
    for k, step in enumerate(chain.steps(), start=1):
        z, log_det = step.forward(z)
        total = total + log_det
        y, summed = first_steps(chain, k).forward(x)
        np.testing.assert_allclose(y, z, rtol=1e-5)
        np.testing.assert_allclose(summed, total, rtol=1e-5)
        turned = first_steps(Invert(chain), k)
        assert [s.name for s in turned.steps()] == [s.name for s in Invert(chain).steps()[:k]]
    assert isinstance(first_steps(chain, 0), Identity)
    for k in (-1, 6):
        with pytest.raises(ShapeError, match="5 steps"):
            first_steps(chain, k)


def test_repeat_is_the_chain_of_its_layers():
    layers = [_layer(key) for key in jr.split(jr.key(0), 4)]
    scanned, unrolled = Repeat(layers), Chain(layers)
    x = jr.normal(jr.key(1), (3, 5))
    for direction in ("forward", "inverse"):
        for a, b in zip(
            getattr(scanned, direction)(x), getattr(unrolled, direction)(x), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert scanned.name == "Repeat(Chain × 4)"


def test_repeat_does_not_grow_the_program_with_depth():
    def lines(depth):
        stack = repeat(_layer, depth, key=jr.key(0))
        return len(jax.jit(lambda x: stack.forward(x)).lower(jnp.zeros(3)).as_text().split("\n"))

    assert lines(2) == lines(20)


def test_layers_that_draw_draw_apart_when_they_learn_from_data():
    class Noisy(AbstractTransform):
        mean: jax.Array
        in_shape = out_shape = ()
        cond_shape = None
        exactness = "bound"
        batch_last = True

        def forward(self, x, condition=None, *, key=None):
            return x + jr.normal(key, x.shape), jnp.zeros_like(x)

        inverse = forward

        def init_from_data(self, data, condition=None, side="out"):
            return Noisy(data.mean())

    means = Repeat([Noisy(jnp.zeros(()))] * 3).init_from_data(jnp.zeros(1), side="in").layers.mean
    assert abs(means[2] - 2 * means[1]) > 1e-3  # two equal draws would add up to twice one


def test_repeat_refuses_what_cannot_be_stacked():
    with pytest.raises(ShapeError, match="layer 1"):
        Repeat([Affine(shape=(3,)), Exp((3,))])
    with pytest.raises(ShapeError, match="cannot follow itself"):
        Repeat([Chain([Affine(shape=(4,)), Reshape((4,), (2, 2))])] * 2)
    with pytest.raises(ShapeError):
        Repeat([])


def test_independent_sums_over_slices():
    shared = Independent(Affine(0.5, jnp.array([1.0, 2.0])), 3)
    y, log_det = shared.forward(jnp.ones((3, 2, 4)))
    assert y.shape == (3, 2, 4)
    np.testing.assert_allclose(log_det, 3 * np.log(2.0), rtol=1e-6)
    stacked = eqx.filter_vmap(lambda s: Affine(jnp.zeros(2), s))(jnp.array([1.0, 2.0, 4.0]))
    y, log_det = Independent(stacked, 3, stacked=True).forward(jnp.ones((3, 2)))
    np.testing.assert_allclose(y[:, 0], [1, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(log_det, 2 * np.log(8.0), rtol=1e-6)


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_event_and_batch_shape(shape, batch):
    size = int(np.prod(shape))
    chain = Chain([Affine(0.1, 2.0, shape=shape), Reshape(shape, (size,)), reverse(size)])
    x = jnp.arange(float(size * int(np.prod(batch)))).reshape(shape + batch)
    y, log_det = chain.forward(x)
    assert (y.shape, log_det.shape) == ((size, *batch), batch)
    np.testing.assert_allclose(log_det, size * np.log(2.0), rtol=1e-5)
    back, _ = chain.inverse(y)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_permute_moves_rows_and_back():
    permute = Permute([2, 0, 1], (3, 2))
    x = jnp.arange(6.0).reshape(3, 2)
    y, _ = permute.forward(x)
    np.testing.assert_array_equal(y, x[np.array([2, 0, 1])])
    np.testing.assert_array_equal(permute.inverse(y)[0], x)


@pytest.mark.parametrize("index", [[0, 0, 1], [1, 2, 3], [-1, 0, 1]])
def test_permute_refuses_what_is_no_permutation(index):
    with pytest.raises(InputError, match="permutation"):
        Permute(index)


def test_reshape_keeps_the_size():
    with pytest.raises(ShapeError, match="differ in size"):
        Reshape((2, 3), (5,))


def test_indexed_leaves_the_others_alone():
    indexed = Indexed(Affine(jnp.array([1.0, 2.0]), 3.0), [3, 1], 4)
    y, log_det = indexed.forward(jnp.zeros(4))
    np.testing.assert_allclose(y, [0, 2, 0, 1])
    np.testing.assert_allclose(log_det, 2 * np.log(3.0), rtol=1e-6)


@pytest.mark.parametrize("index", [[0, 0], [0, 4], [-1, 0]])
def test_indexed_refuses_bad_positions(index):
    with pytest.raises(InputError, match="distinct"):
        Indexed(Affine(shape=(2,)), index, 4)
    with pytest.raises(ShapeError, match="Indexed"):
        Indexed(Affine(shape=(3,)), [0, 1], 4)


def test_independent_learns_from_data_for_each_slice_or_for_all():
    data = 3 + 2 * jr.normal(jr.key(0), (3, 2, 500)) * jnp.arange(1.0, 4.0)[:, None, None]
    shared = Independent(ActNorm((2,)), 3).init_from_data(data)
    own = eqx.filter_vmap(lambda _: ActNorm((2,)))(jnp.arange(3))
    stacked = Independent(own, 3, True).init_from_data(data)
    np.testing.assert_allclose(shared.inverse(data)[0].std((0, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(stacked.inverse(data)[0].std(2), 1, rtol=1e-4)
    with pytest.raises(ShapeError, match="leading axis of 4"):
        Independent(own, 4, True)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("make", [coupling, masked_autoregressive])
def test_a_stack_costs_what_a_layer_does(make, direction):
    def layer(key):
        options = {"width": 16, "depth": 1, "key": key}
        if make is coupling:
            return coupling(43, RationalQuadratic(8), **options)
        return masked_autoregressive(43, RationalQuadratic(8), **options)

    stack = repeat(layer, 3, key=jr.key(0))
    assert stack.row_cost(direction) == stack.layer(0).row_cost(direction)
    assert Chain([stack, Invert(stack)]).row_cost(direction) >= 23 * 21


@pytest.mark.parametrize("make", [coupling, masked_autoregressive])
def test_a_layer_costs_what_its_template_does(make):
    small, large = (
        make(8, UnconstrainedMonotone(4, nodes=n), width=4, depth=1, key=jr.key(0)) for n in (4, 48)
    )
    entries = 4 if make is coupling else 8
    more = large.row_cost("inverse") - small.row_cost("inverse")
    assert more == entries * 4 * (48 - 4)


def test_the_incremental_inverse_holds_less_than_the_dense_pass():
    layer = masked_autoregressive(43, RationalQuadratic(8), width=16, depth=1, key=jr.key(0))
    assert layer.row_cost("forward") < layer.row_cost("inverse") / 3
    assert Invert(layer).row_cost("inverse") == layer.row_cost("forward")


def test_a_stack_gives_each_slice_a_map_of_its_own():
    parts = [Affine(2.0, 3.0), Exp(), RationalQuadratic(4)]
    x = jr.normal(jr.key(0), (3, 5))
    y, log_det = Stack(parts).forward(x)
    each = [part.forward(x[i]) for i, part in enumerate(parts)]
    np.testing.assert_array_equal(y, jnp.stack([value for value, _ in each]))
    np.testing.assert_allclose(log_det, sum(value for _, value in each), rtol=1e-6)
    rows = Stack([ActNorm(2), Invert(ActNorm(2))]).init_from_data(
        7 + 3 * jr.normal(jr.key(2), (2, 2, 99))
    )
    z, _ = rows.inverse(7 + 3 * jr.normal(jr.key(2), (2, 2, 99)))
    np.testing.assert_allclose(z.std(-1), 1.0, atol=1e-4)
    layer = coupling(4, Affine(), marginal=Stack([Affine(), Affine()]), key=jr.key(1))
    assert layer.forward(jnp.zeros(4))[0].shape == (4,)


def test_a_conjugate_holds_its_outer_map_once_and_sets_it_from_data():
    inner = Affine(jnp.ones(3), 2.0)
    b = Conjugate(ActNorm(3), inner)
    data = 5 + 3 * jr.normal(jr.key(0), (3, 200))
    for side in ("out", "in"):
        moved = b.init_from_data(data, side=side).outer.points("forward", data)
        np.testing.assert_allclose(moved.mean(1), 0, atol=1e-5)
        np.testing.assert_allclose(moved.std(1), 1, rtol=1e-5)
    b = b.init_from_data(data)
    expected = Chain([b.outer, b.inner, Invert(b.outer)]).forward(data)
    for got, wanted in zip(b.forward(data), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert len(jax.tree_util.tree_leaves(b)) == 3
    assert len(b.steps()) == 3
    with pytest.raises(ShapeError, match="Conjugate: part 0"):
        Conjugate(ActNorm(3), Affine(shape=(2,)))


def test_a_stack_names_what_does_not_fit():
    with pytest.raises(ShapeError, match="at least one"):
        Stack([])
    with pytest.raises(ShapeError, match=r"part 1 \(Exp\) maps \(2,\)"):
        Stack([Affine(), Exp((2,))])
