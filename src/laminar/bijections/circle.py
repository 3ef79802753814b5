"""Monotone maps of the circle, an angle in [−π, π), as templates for layers on a torus.

`laminar.bijections.splines.RationalQuadratic` with ``tails="circular"`` is another. A torus is a
vector of angles, with the measure of its box.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from laminar._checks import check_sizes
from laminar._params import clip, positive
from laminar._typing import Array, Shape
from laminar.bijections.elementwise import AbstractElementwise
from laminar.bijections.numerical import invert_kernel

_TURN = 2 * math.pi


class CircleMoebius(AbstractElementwise):
    r"""Möbius maps of the circle of angles, or the mean of several (Rezende et al. 2020).

    With u = θ − φ in [−π, π), one map is

        g(u) = 2 arctan(a tan(u/2) + b),    g′(u) = a / ((a sin(u/2) + b cos(u/2))² + cos²(u/2))

    and leaves the angle opposite to φ. With a shift, the last parameter, these are all
    Möbius maps h_ω(z) = (1 − |ω|²) / |z − ω|² (z − ω) − ω of the circle and its turns; uniform
    angles become wrapped Cauchy ones. The mean of K of them,

        θ′ = θ + Σ_k w_k (g_k(u_k) − u_k) + shift

    with angles φ_k spread evenly, is monotone again and has K peaks; its inverse is solved for.
    Parameters are K of a (softplus), K of b, K weights (softmax; none if K = 1) and the shift; zero
    gives the identity. Outside [−π, π] the log-det is −inf.

    Args:
        components: K.
        shape: Event shape.

    Raises:
        InputError: If `components` is not positive.
    """

    params: Array
    in_shape: Shape = eqx.field(static=True)
    components: int = eqx.field(static=True)

    def __init__(self, components: int = 1, shape: Shape = ()):
        check_sizes("CircleMoebius", components=components)
        self.components, self.in_shape = components, tuple(shape)
        self.params = jnp.zeros((2 * components + components * (components > 1) + 1, *shape))

    def _lift(self, params: Array, theta: Array) -> tuple[Array, Array]:
        """The image on the line, before it is wrapped, and the logarithm of the slope."""
        count = self.components
        axes = (count,) + (1,) * theta.ndim
        pins = jnp.asarray(_TURN * np.arange(count) / count, theta.dtype).reshape(axes)
        a, b = positive(params[:count]), params[count : 2 * count]
        u = wrap(theta[None] - pins)
        s, c = jnp.sin(0.5 * u), jnp.maximum(jnp.cos(0.5 * u), 0)
        top = a * s + b * c
        moves, slopes = 2 * jnp.arctan2(top, c) - u, a / (top * top + c * c)
        if count == 1:
            return theta + moves[0] + params[-1], jnp.log(slopes[0])
        weights = jax.nn.softmax(params[2 * count : 3 * count], 0)
        image = theta + jnp.sum(weights * moves, 0) + params[-1]
        return image, jnp.log(jnp.sum(weights * slopes, 0))

    def forward_kernel(self, params, x):
        """The image in [−π, π] and the logarithm of the slope; −inf outside."""
        inside = clip(x, -math.pi, math.pi)
        y, log_slope = self._lift(params, inside)
        return _held(wrap(y)), jnp.where(jnp.abs(x) > math.pi, -jnp.inf, log_slope)

    def inverse_kernel(self, params, y):
        """The angle with this image, and minus the logarithm of the slope there; −inf outside."""
        inside = clip(y, -math.pi, math.pi)
        if self.components == 1:
            # The inverse is of the same kind, with 1/a and −b/a, after the shift is taken back.
            a, b = positive(params[0]), params[1]
            v = wrap(inside - params[2])
            s, c = jnp.sin(0.5 * v), jnp.maximum(jnp.cos(0.5 * v), 0)
            top = s - b * c
            x = wrap(2 * jnp.arctan2(top, a * c))
            log_slope = jnp.log(a) - jnp.log(top * top + (a * c) ** 2)
        else:
            still = params.at[-1].set(0)
            root, log_slope = invert_kernel(
                self._lift, still, wrap(inside - params[-1]), bracket=(-2 * _TURN, 2 * _TURN)
            )
            x = wrap(root)
        return _held(x), jnp.where(jnp.abs(y) > math.pi, -jnp.inf, log_slope)


def wrap(angle: Array) -> Array:
    """An angle moved by whole turns into [−π, π)."""
    return angle - _TURN * jnp.floor((angle + math.pi) / _TURN)


def _held(angle: Array) -> Array:
    """What rounding has put beyond an end is that end."""
    return clip(angle, -math.pi, math.pi)
