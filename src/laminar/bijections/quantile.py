"""A monotone spline through given knots, one for each column: quantiles to quantiles."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer

from laminar._errors import InputError, ShapeError
from laminar._params import expand
from laminar._typing import Array, ArrayLike, Shape
from laminar.bijections.base import AbstractBijection


class QuantileMap(AbstractBijection):
    r"""A rational-quadratic spline through knots (z_k, x_k) with slopes s_k, column by column.

    Between two knots, with t = (z − z_k) / (z_{k+1} − z_k) and secant σ_k
    (Gregory & Delbourgo 1982),

        x = x_k + (x_{k+1} − x_k) (σ t² + s_k t (1−t)) / (σ + (s_k + s_{k+1} − 2σ) t (1−t))

    and beyond the outermost knots the map is linear with their slopes, so it is a bijection of ℝ.
    When the z_k are normal quantiles and the x_k those of a table, the inverse makes every column
    nearly normal, whatever its tails, skew and lumps.

    Args:
        z: Latent knots (K, D), increasing along the first axis.
        x: Data knots (K, D), increasing.
        slope: dx/dz at the knots (K, D), positive.

    Raises:
        ShapeError: If the three differ in shape or there are fewer than two knots.
        InputError: If knots do not increase or a slope is not positive.
    """

    z: Array
    x: Array
    slope: Array
    in_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(self, z: ArrayLike, x: ArrayLike, slope: ArrayLike):
        self.z, self.x, self.slope = (jnp.asarray(v) for v in (z, x, slope))
        if not (self.z.shape == self.x.shape == self.slope.shape) or self.z.ndim != 2:
            raise ShapeError(
                f"QuantileMap: z {self.z.shape}, x {self.x.shape} and slope {self.slope.shape} "
                "must have one shape (knots, columns)."
            )
        if self.z.shape[0] < 2:
            raise ShapeError(f"QuantileMap needs at least two knots, not {self.z.shape[0]}.")
        self._check_values()
        self.in_shape, self.cond_shape = self.z.shape[1:], None

    def _check_values(self):
        if any(isinstance(v, Tracer) for v in (self.z, self.x, self.slope)):
            return
        if not bool((jnp.diff(self.z, axis=0) > 0).all() & (jnp.diff(self.x, axis=0) > 0).all()):
            raise InputError("QuantileMap: knots must increase along the first axis.")
        if not bool((self.slope > 0).all()):
            raise InputError("QuantileMap: every slope must be positive.")

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

    def forward(self, x, condition=None, *, key=None):
        """Latent to data, with the summed ln dx/dz."""
        left, right, t, secant, s_left, s_right, beyond = _bin(self.z, self.x, self.slope, x)
        bottom = secant + (s_left + s_right - 2 * secant) * t * (1 - t)
        y = left + (right - left) * (secant * t * t + s_left * t * (1 - t)) / bottom
        log_det = _log_slope(t, secant, s_left, s_right, bottom)
        return y + beyond, log_det.sum(0)

    def inverse(self, y, condition=None, *, key=None):
        """Data to latent, with the summed ln dz/dx: the cancellation-free root of a quadratic."""
        left, right, r, secant, s_left, s_right, beyond = _bin(self.x, self.z, self.slope, y, True)
        # With r = (x − x_k) / (x_{k+1} − x_k) the forward formula is a t² + b t + c = 0.
        bend = s_left + s_right - 2 * secant
        a = secant - s_left + r * bend
        b = s_left - r * bend
        c = -secant * r
        root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, 0))
        denominator = b + root
        safe = jnp.where(denominator > 0, denominator, 1)
        t = jnp.clip(jnp.where(denominator > 0, -2 * c / safe, 0), 0, 1)
        bottom = secant + bend * t * (1 - t)
        log_det = _log_slope(t, secant, s_left, s_right, bottom)
        return left + (right - left) * t + beyond, -log_det.sum(0)


def _log_slope(t, secant, s_left, s_right, bottom):
    top = s_right * t * t + 2 * secant * t * (1 - t) + s_left * (1 - t) ** 2
    return jnp.log(top) + 2 * jnp.log(secant) - 2 * jnp.log(bottom)


def _bin(source, target, slope, value, inverse=False):
    """The bin of each value, its place in it, and what the linear tails add.

    Returns:
        Target knots on both sides, the place in [0, 1], secant and slopes dx/dz (whichever way the
        map is read), and the part of the result that lies beyond the outermost knots.
    """
    shape = value.shape
    flat = value.reshape((shape[0], -1))
    inner = source[1:-1]
    index = (flat[None] >= inner[:, :, None]).sum(0, dtype=jnp.int32)

    def at(table, offset):
        return jnp.take_along_axis(table.T, index + offset, axis=1).reshape(shape)

    low, high = at(source, 0), at(source, 1)
    left, right = at(target, 0), at(target, 1)
    secant = (high - low) / (right - left) if inverse else (right - left) / (high - low)
    place = jnp.clip((value - low) / (high - low), 0, 1)
    first, last = (expand(v, value.ndim) for v in (source[0], source[-1]))
    s_first, s_last = (expand(v, value.ndim) for v in (slope[0], slope[-1]))
    if inverse:
        s_first, s_last = 1 / s_first, 1 / s_last
    below, above = jnp.minimum(value - first, 0), jnp.maximum(value - last, 0)
    return left, right, place, secant, at(slope, 0), at(slope, 1), below * s_first + above * s_last
