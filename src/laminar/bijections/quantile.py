"""A monotone spline through given knots, one for each column: quantiles to quantiles."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.core import Tracer

from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, expand
from laminar._typing import Array, ArrayLike
from laminar.bijections.base import AbstractBijection
from laminar.bijections.frames import AbstractShaped
from laminar.bijections.splines import rational_place, rational_share


class QuantileMap(AbstractShaped, AbstractBijection):
    r"""A rational-quadratic spline through knots (z_k, x_k) with slopes s_k, column by column.

    Between two knots, with t = (z − z_k) / (z_{k+1} − z_k) and secant σ_k
    (Gregory & Delbourgo 1982),

        x = x_k + (x_{k+1} − x_k) (σ t² + s_k t (1−t)) / (σ + (s_k + s_{k+1} − 2σ) t (1−t))

    and beyond the outermost knots the map is linear with their slopes, so it is a bijection of ℝ.
    When the z_k are normal quantiles and the x_k those of a table, the inverse makes every column
    nearly normal, whatever its tails, skew and lumps.

    The knots are held `Frozen`, since training could make them cross.

    Args:
        z: Latent knots (K, D), increasing along the first axis.
        x: Data knots (K, D), increasing.
        slope: dx/dz at the knots (K, D), positive.

    Raises:
        ShapeError: If the three differ in shape or there are fewer than two knots.
        InputError: If knots do not increase or a slope is not positive.
    """

    z: Frozen[Array]
    x: Frozen[Array]
    slope: Frozen[Array]

    def __init__(self, z: ArrayLike, x: ArrayLike, slope: ArrayLike):
        z, x, slope = (jnp.asarray(v) for v in (z, x, slope))
        if not (z.shape == x.shape == slope.shape) or z.ndim != 2:
            raise ShapeError(
                f"QuantileMap: z {z.shape}, x {x.shape} and slope {slope.shape} "
                "must have one shape (knots, columns)."
            )
        if z.shape[0] < 2:
            raise ShapeError(f"QuantileMap needs at least two knots, not {z.shape[0]}.")
        _check_values(z, x, slope)
        self.z, self.x, self.slope = Frozen(z), Frozen(x), Frozen(slope)
        super().__init__(z.shape[1:])

    def forward(self, x, condition=None, *, key=None):
        """Latent to data, with the summed ln dx/dz."""
        found = _bin(self.z.value, self.x.value, self.slope.value, x)
        share, log_slope = rational_share(
            found.place, found.rest, jnp.ones_like(x), found.s_left, found.s_right
        )
        return found.image(share), (log_slope + found.log_secant).sum(0)

    def inverse(self, y, condition=None, *, key=None):
        """Data to latent, with the summed ln dz/dx."""
        found = _bin(self.x.value, self.z.value, self.slope.value, y, True)
        place, log_slope = rational_place(
            found.place, found.rest, jnp.ones_like(y), found.s_left, found.s_right
        )
        return found.image(place), -(log_slope + found.log_secant).sum(0)


def _check_values(z, x, slope):
    if any(isinstance(v, Tracer) for v in (z, x, slope)):
        return
    if not bool((jnp.diff(z, axis=0) > 0).all() & (jnp.diff(x, axis=0) > 0).all()):
        raise InputError("QuantileMap: knots must increase along the first axis.")
    if not bool((slope > 0).all()):
        raise InputError("QuantileMap: every slope must be positive.")


class _Bin(NamedTuple):
    """The bin of each value.

    Attributes:
        place: Where in the bin the value is, in [0, 1].
        rest: 1 − place, from the distance to the far knot, hence with all its digits.
        log_secant: Ln of the bin's secant dx/dz.
        s_left: Slope dx/dz at the left knot over the secant, so that units do not matter.
        s_right: Likewise at the right knot.
        low: Target knot on the left.
        size: Distance to the target knot on the right.
        beyond: What the linear tails add to the result.
    """

    place: Array
    rest: Array
    log_secant: Array
    s_left: Array
    s_right: Array
    low: Array
    size: Array
    beyond: Array

    def image(self, share: Array) -> Array:
        """The point at this share of the target bin, and what lies beyond the last knots."""
        return self.low + self.size * share + self.beyond


def _bin(source, target, slope, value, inverse=False):
    """Find the bin of each value; `slope` is dx/dz whichever way the map is read."""
    shape = value.shape
    flat = value.reshape((shape[0], -1))
    inner = source[1:-1]
    index = (flat[None] >= inner[:, :, None]).sum(0, dtype=jnp.int32)

    def at(table, offset):
        return jnp.take_along_axis(table.T, index + offset, axis=1).reshape(shape)

    low, high = at(source, 0), at(source, 1)
    left, right = at(target, 0), at(target, 1)
    secant = (high - low) / (right - left) if inverse else (right - left) / (high - low)
    first, last = (expand(v, value.ndim) for v in (source[0], source[-1]))
    s_first, s_last = (expand(v, value.ndim) for v in (slope[0], slope[-1]))
    if inverse:
        s_first, s_last = 1 / s_first, 1 / s_last
    below, above = jnp.minimum(value - first, 0), jnp.maximum(value - last, 0)
    width = high - low
    return _Bin(
        place=_fraction(value - low, width),
        rest=_fraction(high - value, width),
        log_secant=jnp.log(secant),
        s_left=at(slope, 0) / secant,
        s_right=at(slope, 1) / secant,
        low=left,
        size=right - left,
        beyond=below * s_first + above * s_last,
    )


def _fraction(part: Array, whole: Array) -> Array:
    """Share of the whole, held in [0, 1], with derivative 1 / whole at both ends."""
    share = part / whole
    return jnp.where(share < 0, 0.0, jnp.where(share > 1, 1.0, share))
