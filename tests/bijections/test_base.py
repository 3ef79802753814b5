"""The contract's helpers: dispatch over trailing axes, inversion, identity, steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar._errors import InputError, ShapeError
from laminar.bijections.base import AbstractBijection, AbstractTransform, Identity, Invert, call
from laminar.bijections.compose import Chain, Repeat, Reshape, Stack
from laminar.bijections.conjugate import Conjugate
from laminar.bijections.coupling import coupling
from laminar.bijections.elementwise import AbstractElementwise, Affine, Exp, Tanh
from laminar.bijections.path import first_steps


class Single(AbstractBijection):
    """Knows single events only: y = x + c, and remembers the key's draw in its log-det."""

    in_shape: tuple = eqx.field(static=True, default=(2,))
    out_shape: tuple = eqx.field(static=True, default=(2,))
    cond_shape: tuple = eqx.field(static=True, default=(2,))

    def forward(self, x, condition=None, *, key=None):
        assert x.shape == condition.shape == (2,)
        return x + condition, jnp.zeros(()) if key is None else jr.normal(key)

    def inverse(self, y, condition=None, *, key=None):
        return y - condition, jnp.zeros(())


class Bound(AbstractTransform):
    """Declares a bound."""

    in_shape: tuple = eqx.field(static=True, default=())
    out_shape: tuple = eqx.field(static=True, default=())
    cond_shape: None = eqx.field(static=True, default=None)
    exactness: str = eqx.field(static=True, default="bound")

    def forward(self, x, condition=None, *, key=None):
        return x, jnp.zeros_like(x)

    inverse = forward


@pytest.mark.parametrize("batch", [(), (3,), (3, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_call_maps_single_events_over_trailing_axes(batch, shared):
    x = jr.normal(jr.key(0), (2, *batch))
    condition = jr.normal(jr.key(1), (2,) if shared else (2, *batch))
    y, log_det = call(Single(), "forward", x, condition)
    expected = x + condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim))
    np.testing.assert_allclose(y, expected)
    assert log_det.shape == batch


def test_call_gives_every_event_a_key_of_its_own():
    _, log_det = call(Single(), "forward", jnp.zeros((2, 3, 4)), jnp.zeros(2), key=jr.key(0))
    assert len(np.unique(log_det)) == 12


def test_a_map_without_condition_ignores_one():
    y, _ = call(Identity((2,)), "forward", jnp.ones((2, 3)), jnp.ones(7))
    np.testing.assert_array_equal(y, jnp.ones((2, 3)))


def test_invert_swaps_everything():
    inner = Chain([Reshape((4,), (2, 2)), Exp((2, 2))])
    outer = Invert(inner)
    assert (outer.in_shape, outer.out_shape) == ((2, 2), (4,))
    x = jr.normal(jr.key(0), (4, 5))
    y, log_det = inner.forward(x)
    back, log_det_back = outer.forward(y)
    np.testing.assert_allclose(back, x, rtol=1e-5)
    np.testing.assert_allclose(log_det_back, -log_det, rtol=1e-5)
    assert [s.name for s in outer.steps()] == ["Invert(Exp)", "Invert(Reshape)"]


def test_invert_refuses_bounds():
    with pytest.raises(ShapeError, match="Bound"):
        Invert(Bound())


def test_first_steps_of_a_single_step():
    affine = Affine(shape=(2,))
    assert first_steps(affine, 1) is affine
    assert isinstance(first_steps(affine, 0), Identity)
    with pytest.raises(ShapeError, match="Affine has 1 steps"):
        first_steps(affine, 2)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_rows_in_front_are_refused_with_the_way_out(direction):
    chain = Chain([Affine(shape=(3,)), Tanh((3,))])
    message = r"takes \(3,\) with batch axes behind, and got \(100, 3\); put the batch last"
    with pytest.raises(ShapeError, match=message):
        call(chain, direction, jnp.zeros((100, 3)))
    with pytest.raises(ShapeError, match=r"and got \(4, 100\)\.$"):
        call(chain, direction, jnp.zeros((4, 100)))


MAKERS = {
    "Chain": lambda part: Chain([part]),
    "Invert": Invert,
    "Repeat": lambda part: Repeat([part]),
    "Conjugate": lambda part: Conjugate(part, part),
    "Stack": lambda part: Stack([part]),
    "Coupling": lambda part: coupling(4, part, key=jr.key(0)),
}


@pytest.mark.parametrize(("owner", "make"), MAKERS.items())
def test_what_is_no_transform_is_named(owner, make):
    with pytest.raises(InputError, match=f"{owner} got the class Affine; call it to make"):
        make(Affine)
    with pytest.raises(InputError, match=f"{owner} is made of transforms, and got a float"):
        make(3.0)


class WrongImage(Single):
    """Forgets an entry of the image."""

    def forward(self, x, condition=None, *, key=None):
        return x[:1], jnp.zeros(())


class Summed(AbstractElementwise):
    """A kernel that sums its log-det."""

    params: jax.Array = eqx.field(default_factory=lambda: jnp.zeros((0, 3)))
    in_shape: tuple = eqx.field(static=True, default=(3,))

    def forward_kernel(self, params, x):
        return x, jnp.zeros_like(x).sum()

    def inverse_kernel(self, params, y):
        return y[:1], jnp.zeros_like(y)


def test_an_image_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"WrongImage: forward gave an image of shape \(1,\)"):
        call(WrongImage(), "forward", jnp.zeros((2, 5)), jnp.zeros(2))


def test_kernels_that_sum_or_lose_entries_are_named():
    with pytest.raises(ShapeError, match=r"forward_kernel gave a log-det of shape \(\) for points"):
        Summed().forward(jnp.zeros(3))
    with pytest.raises(ShapeError, match=r"inverse_kernel gave an image of shape \(1,\)"):
        Summed().inverse(jnp.zeros(3))


@pytest.mark.parametrize("make", [Affine, Exp, lambda shape: coupling(3, Affine(), key=jr.key(0))])
def test_layers_called_by_hand_refuse_rows_in_front(make):
    with pytest.raises(ShapeError, match=r"takes \(3,\) with batch axes behind, and got \(5, 3\)"):
        make(shape=(3,)).forward(jnp.zeros((5, 3)))
