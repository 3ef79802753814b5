"""Monotone splines: rational-quadratic and linear.

Speed is the point of this file. The bin axis comes first and the K bins are unrolled, so that
softmax, cumulative edges, search and selection fuse into one pass over the points, without gather,
scatter or sort. The search has a derivative rule of its own, linear in the tangents, whose
transpose is one such pass too; what follows on the selected scalars is ordinary differentiation.
"""

import functools
import itertools
import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from laminar._errors import InputError
from laminar._params import SOFTPLUS_ONE, clip
from laminar._typing import Array, Shape
from laminar.bijections.elementwise import AbstractParametric

Tails = Literal["identity", "linear", "circular"]

_LOGIT_LIMIT = 40.0
_STEPS = 3.0  # bins are numbered in steps of 1/3, so that a quotient stands last (see below)
_HALF_STEP = 0.5 / _STEPS  # the compiler may round such a quotient in two ways


class AbstractSpline(AbstractParametric):
    """A spline of free bins that maps an interval onto itself."""

    bins: int = eqx.field(static=True)
    interval: tuple[float, float] = eqx.field(static=True)
    tails: Tails | None = eqx.field(static=True)
    min_width: float = eqx.field(static=True)
    min_height: float = eqx.field(static=True)

    def _start(
        self,
        count: int,
        bins: int,
        shape: Shape,
        interval: tuple[float, float],
        tails: Tails | None,
        least: tuple[float, float],
        *,
        circular: bool = False,
    ) -> None:
        """Take the options, and `count` zeros as parameters; it may be `circular`."""
        _check_options(type(self).__name__, bins, interval, tails, *least, circular)
        self.in_shape, self.bins, self.tails = tuple(shape), bins, tails
        self.interval = (float(interval[0]), float(interval[1]))
        self.min_width, self.min_height = least
        self.params = jnp.zeros((count, *self.in_shape))

    def _found(self, ones: bool | None, search_y: bool, point: Array, params: Array):
        """What `_search` finds with these options."""
        least = self.min_width, self.min_height
        return _search(_Layout(self.bins, ones), self.interval, least, search_y, point, params)


class RationalQuadratic(AbstractSpline):
    r"""Monotone rational-quadratic spline (Durkan et al. 2019, eqs. 4–8).

    With θ = (x − x_k) / w_k in bin k, s = h_k / w_k and knot slopes d_k:

        y  = y_k + h_k (s θ² + d_k θ(1−θ)) / (s + (d_k + d_{k+1} − 2s) θ(1−θ))
        dy/dx = s² (d_{k+1} θ² + 2s θ(1−θ) + d_k (1−θ)²) / (s + (d_k + d_{k+1} − 2s) θ(1−θ))²

    The unconstrained parameters are K widths, K heights (softmax of each, above a minimum) and the
    knot slopes (softplus, above a minimum); zero parameters give the identity up to rounding.

    Args:
        bins: K ≥ 2.
        shape: Event shape.
        interval: ``(lo, hi)``, which the spline maps onto itself.
        tails: ``"identity"``: y = x outside the interval, and the end slopes are one, so P = 3K−1.
            ``"linear"``: lines outside, with the learned end slopes, P = 3K+1. None: the domain
            is the interval and outside it the log-det is −inf, P = 3K+1. ``"circular"``: as None,
            for the interval as a circle (Rezende et al. 2020): both ends have one slope, so the
            density closes smoothly, and a shift around the circle, the last parameter, follows,
            P = 3K+1; give it an interval such as ``(-math.pi, math.pi)``.
        min_width: Least bin width, as a fraction of the interval.
        min_height: Least bin height, likewise.
        min_slope: Least slope at a knot.

    Raises:
        InputError: If an option has no meaning.
    """

    min_slope: float = eqx.field(static=True)

    def __init__(
        self,
        bins: int = 8,
        shape: Shape = (),
        *,
        interval: tuple[float, float] = (-5.0, 5.0),
        tails: Tails | None = "identity",
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_slope: float = 1e-3,
    ):
        count = 3 * bins + (-1 if tails == "identity" else 1)
        least = (min_width, min_height)
        self._start(count, bins, shape, interval, tails, least, circular=True)
        if not 0 < min_slope < 1:
            raise InputError(f"RationalQuadratic: min_slope must be in (0, 1), not {min_slope}.")
        self.min_slope = min_slope

    def _bin(self, params: Array, point: Array, search_y: bool):
        """The bin a point is in: left knot, sizes, end slopes, and slopes of the outer knots."""
        if self.tails == "circular":
            # The last knot is the first one again; the shift that stands there is not a slope.
            params = jnp.concatenate([params[:-1], params[2 * self.bins : 2 * self.bins + 1]])
        found = self._found(self.tails == "identity", search_y, point, params)
        x_left, width, y_left, height, raw_left, raw_right = found
        return x_left, width, y_left, height, self._slope(raw_left), self._slope(raw_right)

    def _slope(self, raw: Array) -> Array:
        return self.min_slope + (1 - self.min_slope) * _slope(raw)

    def forward_kernel(self, params, x):
        """The spline and its log-derivative at each x."""
        inside = clip(x, *self.interval)
        x_left, width, y_left, height, left, right = self._bin(params, inside, False)
        theta = clip((inside - x_left) / width, 0.0, 1.0)
        share, log_slope = rational_share(theta, 1 - theta, height / width, left, right)
        image = y_left + height * share
        if self.tails == "circular":
            image = self._turn(image, params[-1])
        return self._finish(x, inside, image, log_slope, left, right, 1.0)

    def inverse_kernel(self, params, y):
        """The root of the quadratic that each y makes with its bin, and its log-derivative."""
        inside = clip(y, *self.interval)
        place = self._turn(inside, -params[-1]) if self.tails == "circular" else inside
        x_left, width, y_left, height, left, right = self._bin(params, place, True)
        eta = clip((place - y_left) / height, 0.0, 1.0)
        theta, log_slope = rational_place(eta, 1 - eta, height / width, left, right)
        return self._finish(y, inside, x_left + theta * width, -log_slope, left, right, -1.0)

    def _turn(self, point, angle):
        """A point of the interval moved around the circle."""
        lo, hi = self.interval
        length = hi - lo
        moved = point + (angle - length * jnp.round(angle / length))
        moved = jnp.where(moved < lo, moved + length, jnp.where(moved >= hi, moved - length, moved))
        # What rounding has put beyond an end is that end.
        return clip(moved, lo, hi)

    def _finish(self, point, inside, image, log_det, left, right, sign):
        """Put the tails on; `sign` is −1 for the inverse, whose outer slopes are reciprocal."""
        below, above = point < self.interval[0], point > self.interval[1]
        if self.tails in (None, "circular"):
            return image, jnp.where(below | above, -jnp.inf, log_det)
        if self.tails == "identity":
            return image + (point - inside), jnp.where(below | above, 0.0, log_det)
        # Clipped points are in the outer bins, so the slopes found there are the outer slopes.
        outer = jnp.where(below, left, right)
        slope = outer if sign > 0 else 1 / outer
        log_outer = sign * jnp.log(outer)
        beyond = jnp.where(below | above, slope, 0.0) * (point - inside)
        return image + beyond, jnp.where(below | above, log_outer, log_det)


def rational_share(theta: Array, rest: Array, secant: Array, left: Array, right: Array):
    """The rational-quadratic piece of one bin, read forwards.

    Only sums and products of terms that are not negative, so no digits cancel.

    Args:
        theta: Place in the bin's width, in [0, 1].
        rest: 1 − θ, which the caller may know to more digits.
        secant: Height over width, s.
        left: Slope at the left knot, positive.
        right: Slope at the right knot, positive.

    Returns:
        The share of the height in [0, 1], and ln dy/dx.
    """
    bottom = secant * (theta * theta + rest * rest) + (left + right) * (theta * rest)
    share = theta * (secant * theta + left * rest) / bottom
    return share, _log_slope(theta, rest, secant, left, right, bottom)


def rational_place(eta: Array, rest: Array, secant: Array, left: Array, right: Array):
    """The same piece read backwards: which place in the width has the share η of the height.

    The quadratic in θ has the discriminant u² + 4 s² η (1 − η) with u = l (1 − η) − r η, a sum of
    terms that are not negative and never zero, so the root and its derivative are finite; and both
    θ and 1 − θ are quotients of such sums.

    Args:
        eta: Share of the height, in [0, 1].
        rest: 1 − η.
        secant: Height over width.
        left: Slope dy/dx at the left knot, positive.
        right: Slope at the right knot, positive.

    Returns:
        The place θ in [0, 1], and ln dy/dx (not dx/dy) there.
    """
    u = left * rest - right * eta
    up = u >= 0
    # Not jnp.abs, whose derivative at zero would be that of neither branch.
    t = jnp.sqrt(u * u + 4 * secant * secant * eta * rest) + jnp.where(up, u, -u)
    far = 2 * secant * jnp.where(up, eta, rest)
    # θ : 1 − θ is far : t, or t : far when u < 0. The smaller one is a quotient, whose sign bit
    # tells which it is, so that the compiler stores one array; the other is its complement.
    below = far <= t
    small = jnp.where(below, far, t)
    small = jnp.where(up == below, small, -small) / (t + far)
    first = ~jnp.signbit(small)
    theta = jnp.where(first, small, 1 + small)
    rest = jnp.where(first, 1 - small, -small)
    bottom = secant * (theta * theta + rest * rest) + (left + right) * (theta * rest)
    return theta, _log_slope(theta, rest, secant, left, right, bottom)


def _log_slope(theta, rest, secant, left, right, bottom):
    top = right * theta * theta + 2 * secant * theta * rest + left * rest * rest
    return 2 * jnp.log(secant) + jnp.log(top) - 2 * jnp.log(bottom)


@jax.custom_jvp
def _slope(raw: Array) -> Array:
    """`positive` of a clipped argument; its derivative reads its value alone: 1 − e^{−p}.

    On purpose that is the derivative without the clip, as in `_exp`: a raw slope that has strayed
    beyond the limit is still drawn back.
    """
    return jnp.log1p(jnp.exp(jnp.clip(raw, -_LOGIT_LIMIT, _LOGIT_LIMIT) + SOFTPLUS_ONE))


@_slope.defjvp
def _slope_jvp(primals, tangents):
    value = _slope(primals[0])
    # Written as a quotient for the reason given in `_search_and_keep`.
    return value, tangents[0] / (-1 / jnp.expm1(-value))


class Linear(AbstractSpline):
    """Monotone piecewise-linear spline (Müller et al. 2019, with free widths).

    K widths and K heights, P = 2K; zero parameters give the identity up to rounding. The density
    it makes is a histogram: discontinuous at the knots, where the right-hand slope is taken.

    Args:
        bins: K ≥ 2.
        shape: Event shape.
        interval: ``(lo, hi)``, which the spline maps onto itself.
        tails: ``"identity"``: y = x outside; ``"linear"``: lines with the slope of the outer bins;
            None: −inf outside.
        min_width: Least bin width, as a fraction of the interval.
        min_height: Least bin height, likewise.

    Raises:
        InputError: If an option has no meaning.
    """

    def __init__(
        self,
        bins: int = 8,
        shape: Shape = (),
        *,
        interval: tuple[float, float] = (-5.0, 5.0),
        tails: Literal["identity", "linear"] | None = "identity",
        min_width: float = 1e-3,
        min_height: float = 1e-3,
    ):
        self._start(2 * bins, bins, shape, interval, tails, (min_width, min_height))

    def _run(self, params, point, search_y):
        inside = clip(point, *self.interval)
        x_left, width, y_left, height = self._found(None, search_y, inside, params)
        if search_y:
            x_left, width, y_left, height = y_left, height, x_left, width
        theta = (inside - x_left) / width
        image = y_left + clip(theta, 0.0, 1.0) * height
        slope, log_det = height / width, jnp.log(height) - jnp.log(width)
        outside = (point < self.interval[0]) | (point > self.interval[1])
        if self.tails is None:
            return image, jnp.where(outside, -jnp.inf, log_det)
        if self.tails == "identity":
            return image + (point - inside), jnp.where(outside, 0.0, log_det)
        return image + jnp.where(outside, slope, 0.0) * (point - inside), log_det

    def forward_kernel(self, params, x):
        """The spline and its log-derivative at each x."""
        return self._run(params, x, False)

    def inverse_kernel(self, params, y):
        """The inverse spline and its log-derivative at each y."""
        return self._run(params, y, True)


def _check_options(owner, bins, interval, tails, min_width, min_height, circles=False):
    if bins < 2:
        raise InputError(f"{owner}: bins must be at least 2, not {bins}.")
    lo, hi = interval
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise InputError(f"{owner}: interval must be finite and increasing, not ({lo}, {hi}).")
    if tails not in (("identity", "linear", None) + (("circular",) if circles else ())):
        known = "'identity', 'linear', 'circular'" if circles else "'identity', 'linear'"
        raise InputError(f"{owner}: tails must be {known} or None, not {tails!r}.")
    for name, value in (("min_width", min_width), ("min_height", min_height)):
        if not 0 < value * bins < 1:
            raise InputError(
                f"{owner}: {name} must be positive and less than 1/bins = {1 / bins:.3g}, "
                f"not {value}."
            )


class _Layout(NamedTuple):
    """How the raw parameters of a spline are laid out along their first axis.

    Attributes:
        bins: K.
        ones: Whether the end slopes are one, hence absent; None when no knot has a slope.
    """

    bins: int
    ones: bool | None

    @property
    def size(self) -> int:
        """P."""
        slopes = 0 if self.ones is None else self.bins + (-1 if self.ones else 1)
        return 2 * self.bins + slopes


def _rows(raw: Array, start: int, stop: int) -> list[Array]:
    """Rows of the parameter axis as separate arrays, by static slices."""
    return [lax.index_in_dim(raw, i, axis=0, keepdims=False) for i in range(start, stop)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _search(layout, interval, least, search_y, point, raw):
    """Find the bin of each point and select what belongs to it.

    Args:
        layout: A `_Layout`.
        interval: ``(lo, hi)``.
        least: Least width and height, as fractions.
        search_y: Whether the point is compared with the knots' y, not x.
        point: ``(*s)``, within the interval.
        raw: ``(P, *s)``, where axes of size one are broadcast.

    Returns:
        x_k, width, y_k, height, and the raw slopes at both ends where the spline has them.
    """
    return _search_and_keep(layout, interval, least, search_y, point, raw)[0]


def _search_and_keep(layout, interval, least, search_y, point, raw):
    """`_search`, and per point what its derivative needs: the bin and the softmax's constants.

    A quotient stands last wherever a result has several readers, because XLA stores a quotient
    and would repeat a chain of selections in every reader.
    """
    bins, (lo, _) = layout.bins, interval
    shape = jnp.broadcast_shapes(point.shape, raw.shape[1:])
    sides = []
    weights = _exp(lax.slice_in_dim(raw, 0, 2 * bins))
    for axis in range(2):
        exps = _rows(weights, axis * bins, (axis + 1) * bins)
        sides.append((exps, list(itertools.accumulate(exps, jnp.add))))
    _, cumulative = sides[search_y]
    floor, free = _spans(layout, interval, least[search_y])
    # One flag for each inner knot; the number of flags that are up is the bin.
    passed = [
        (point - (lo + (k + 1) * floor)) * cumulative[-1] >= free * cumulative[k]
        for k in range(bins - 1)
    ]
    count = functools.reduce(jnp.add, [flag.astype(raw.dtype) for flag in passed])
    index = count / _STEPS
    found, kept = [], []
    for (exps, cumulative), least_size in zip(sides, least, strict=True):
        floor, free = _spans(layout, interval, least_size)
        total = cumulative[-1]
        before = _pick(passed, [jnp.zeros_like(total), *cumulative[:-1]]) / total
        size = _pick(passed, exps) / total
        found += [lo + floor * count + free * before, floor + free * size]
        kept.append((total, before, size))
    if layout.ones is not None:
        slopes = _rows(raw, 2 * bins, layout.size)
        if layout.ones:
            one = jnp.zeros_like(slopes[0])
            slopes = [one, *slopes, one]
        found += [_pick(passed, slopes[:-1]), _pick(passed, slopes[1:])]
    return tuple(jnp.broadcast_to(f, shape) for f in found), (index, kept)


def _exp(raw: Array) -> Array:
    """Softmax weights not yet divided by their sum; the clip stands in for a maximum.

    `_tangents` passes straight through the clip on purpose: the value no longer changes beyond it,
    but raw parameters that have strayed there are still drawn back by their gradient.
    """
    return jnp.exp(jnp.clip(raw, -_LOGIT_LIMIT, _LOGIT_LIMIT))


def _spans(layout, interval, least):
    """What every bin has at least, and what the softmax shares out."""
    length = interval[1] - interval[0]
    return length * least, length * (1 - layout.bins * least)


def _pick(passed: list[Array], values: list) -> Array:
    """values[number of flags up], as a chain of selections."""
    picked = values[0]
    for flag, value in zip(passed, values[1:], strict=True):
        picked = jnp.where(flag, value, picked)
    return picked


@_search.defjvp
def _search_jvp(layout, interval, least, search_y, primals, tangents):
    """Derivative at a fixed bin: linear in the parameters' tangents, and blind to the point's."""
    point, raw = primals
    found, kept = _search_and_keep(layout, interval, least, search_y, point, raw)
    # With a checkpoint the coefficients of all bins are recomputed, fused with their use, and not
    # stored between the passes.
    linear = jax.checkpoint(functools.partial(_tangents, layout, interval, least))
    return found, linear(kept, raw, tangents[1])


def _tangents(layout, interval, least, kept, raw, tangent):
    """Tangents of the selected quantities, by sums over the bin axis.

    With σ = softmax p and C_k the sum of its first k entries:
    dC_k = Σ_j σ_j (1[j<k] − C_k) dp_j and dσ_k = Σ_j σ_j (1[j=k] − σ_k) dp_j.
    Transposed, each sum is one elementwise pass over the parameters.
    """
    bins = layout.bins
    index, sides = kept
    sizes = [bins, bins] + ([] if layout.ones is None else [layout.size - 2 * bins])
    raws, tangents = lax.split(raw, sizes, axis=0), lax.split(tangent, sizes, axis=0)

    def bin_numbers(count, start):
        shape = (count, *index.shape)
        return (lax.broadcasted_iota(raw.dtype, shape, 0) + start) / _STEPS

    k = index[None]
    out = []
    for axis, (total, before, size) in enumerate(sides):
        _, free = _spans(layout, interval, least[axis])
        j = bin_numbers(bins, 0)
        weighted = free * _exp(raws[axis]) * tangents[axis]
        out.append(
            (((j < k - _HALF_STEP).astype(raw.dtype) - before[None]) * weighted).sum(0) / total
        )
        out.append(
            (((jnp.abs(j - k) < _HALF_STEP).astype(raw.dtype) - size[None]) * weighted).sum(0)
            / total
        )
    if layout.ones is not None:
        for end in (0, 1):
            j = bin_numbers(sizes[2], (1 if layout.ones else 0) - end)
            out.append(((jnp.abs(j - k) < _HALF_STEP).astype(raw.dtype) * tangents[2]).sum(0))
    return tuple(out)
