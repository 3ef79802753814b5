"""Inversion of monotone scalar maps by bracketed root finding, with implicit gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from laminar._errors import InputError
from laminar._typing import Array
from laminar.bijections.elementwise import AbstractParametric

_GROWTH = 4.0
_MAX_GROWTHS = 60
_NEWTON_STEPS = 3


def monotone_root(
    f: Callable[[Array, Array], Array],
    params: Array,
    y: Array,
    *,
    bracket: tuple[float, float] = (-1.0, 1.0),
    domain: tuple[float, float] = (-math.inf, math.inf),
) -> Array:
    """Solve f(params, x) = y for x, element by element, for increasing f.

    A bracket is checked at both ends and moved outwards by powers of four until it holds the root;
    bisection follows, and three guarded Newton steps polish the result.
    Derivatives, of any order and in both modes, are those of the implicit function:
    dx = (dy − ∂f/∂params · dparams) / f′(x).

    Args:
        f: Takes parameters ``(P,)`` and one scalar x and returns a scalar; a function, or a module
            whose arrays are differentiated too.
        params: ``(P, *s)``, where axes of size one are broadcast.
        y: ``(*s)``.
        bracket: Where to look first.
        domain: Closed interval on which f may be evaluated; the bracket stays within it.

    Returns:
        x of the shape and dtype of `y`; NaN wherever no bracket was found, as when y is not in the
        range of f.

    Raises:
        InputError: If the bracket is not an increasing finite interval within the domain.
    """
    x, outside = clamped_root(f, params, y, bracket, domain)
    return jnp.where(outside, jnp.nan, x)


def clamped_root(
    f: Callable[[Array, Array], Array],
    params: Array,
    y: Array,
    bracket: tuple[float, float] = (-1.0, 1.0),
    domain: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[Array, Array]:
    """As `monotone_root`, but with whether y is out of reach in place of NaN there.

    Out of reach the root is the end of the domain, or of the search, on that side, with derivative
    zero. It is NaN where f or y is NaN.
    """
    lo, hi = bracket
    if not (-math.inf < lo < hi < math.inf and domain[0] <= lo and hi <= domain[1]):
        raise InputError(
            f"monotone_root: the bracket {bracket} must be finite, increasing and within the "
            f"domain {domain}."
        )

    def one(params, y):
        # The search is outside the derivative rule, so nothing in it may carry a derivative.
        still_f, still_params, still_y = jax.tree_util.tree_map(
            lambda v: lax.stop_gradient(v) if eqx.is_inexact_array(v) else v, (f, params, y)
        )
        search = _find_bracket(still_f, still_params, still_y, bracket, domain)
        return _root(f, params, y, search), search.outside

    for _ in range(y.ndim):
        one = jax.vmap(one, in_axes=-1, out_axes=-1)
    return one(jnp.broadcast_to(params, (params.shape[0], *y.shape)), y)


class _Search(NamedTuple):
    """What the search for a bracket found.

    Attributes:
        lower: Where f is at most y, if `held`.
        upper: Where f is at least y, if `held`.
        held: Whether the root lies between the two.
        outside: Whether y is beyond what f reaches.
        end: The clamped point for a y outside.
        centre: A point of the domain where f may always be evaluated.
    """

    lower: Array
    upper: Array
    held: Array
    outside: Array
    end: Array
    centre: Array


@eqx.filter_custom_jvp
def _root(f, params, y, search):
    # Each mention of f is compiled, so it stands once in each loop.
    eps, tiny = float(jnp.finfo(y.dtype).eps), float(jnp.finfo(y.dtype).tiny)
    most = 8 - int(math.log2(eps))

    def apart(state):
        count, lower, upper = state
        wide = upper - lower > tiny + eps * jnp.maximum(jnp.abs(lower), jnp.abs(upper))
        return (count < most) & wide

    def halve(state):
        count, lower, upper = state
        middle = 0.5 * lower + 0.5 * upper
        low = f(params, middle) < y
        return count + 1, jnp.where(low, middle, lower), jnp.where(low, upper, middle)

    start = (jnp.asarray(0), search.lower, search.upper)
    _, lower, upper = lax.while_loop(apart, halve, start)
    middle = 0.5 * lower + 0.5 * upper

    def polish(_, state):
        # Each point is judged when it is tried, and the best one so far goes on.
        best, size, x = state
        value, slope = jax.jvp(lambda x: f(params, x) - y, (x,), (jnp.ones_like(x),))
        better = jnp.abs(value) <= size
        best, size = jnp.where(better, x, best), jnp.where(better, jnp.abs(value), size)
        step = x - value / slope
        inside = better & (step >= search.lower) & (step <= search.upper)
        return best, size, jnp.where(inside, step, best)

    worst = jnp.full_like(y, jnp.inf)
    x, _, _ = lax.fori_loop(0, _NEWTON_STEPS + 1, polish, (middle, worst, middle))
    return jnp.where(search.held, x, jnp.where(search.outside, search.end, jnp.nan))


@_root.def_jvp
def _root_jvp(primals, tangents):
    f, params, y, search = primals
    f_dot, params_dot, y_dot, _ = tangents
    x = _root(f, params, y, search)
    # At a clamped point f may have no finite derivative; what is computed there is not used.
    point = jnp.where(search.outside, search.centre, x)

    def at_root(f, params):
        return f(params, point)

    _, value_dot = eqx.filter_jvp(at_root, (f, params), (f_dot, params_dot))
    _, slope = jax.jvp(lambda x: f(params, x), (point,), (jnp.ones_like(x),))
    change = jnp.zeros_like(x)
    if y_dot is not None:
        change = change + y_dot
    if value_dot is not None:
        change = change - value_dot
    # Flat to rounding, as where a bounded map reaches its limit: no derivative can be told.
    still = search.outside | (slope <= 0)
    return x, jnp.where(still, 0.0, change / jnp.where(still, 1.0, slope))


def _find_bracket(f, params, y, bracket, domain) -> _Search:
    """Move an interval outwards until it holds the root, each time leaving the part searched."""
    dtype = y.dtype
    lowest = max(domain[0], -0.5 * float(jnp.finfo(dtype).max))
    highest = min(domain[1], 0.5 * float(jnp.finfo(dtype).max))
    lower, upper = jnp.asarray(bracket[0], dtype), jnp.asarray(bracket[1], dtype)

    def ends(lower, upper):
        """The images of both ends."""
        low, high = jax.vmap(lambda x: f(params, x))(jnp.stack([lower, upper]))
        return low, high

    def unsettled(state):
        count, lower, upper, _, (low, high) = state
        room = ((low > y) & (lower > lowest)) | ((high < y) & (upper < highest))
        return (count < _MAX_GROWTHS) & room

    def grow(state):
        count, lower, upper, step, (low, high) = state
        too_high, too_low = low > y, high < y
        new_lower = jnp.where(too_high, lower - step, jnp.where(too_low, upper, lower))
        new_upper = jnp.where(too_low, upper + step, jnp.where(too_high, lower, upper))
        lower, upper = jnp.maximum(new_lower, lowest), jnp.minimum(new_upper, highest)
        return count + 1, lower, upper, _GROWTH * step, ends(lower, upper)

    centre = 0.5 * lower + 0.5 * upper
    start = (jnp.asarray(0), lower, upper, upper - lower, ends(lower, upper))
    _, lower, upper, _, (low, high) = lax.while_loop(unsettled, grow, start)
    below, above = (low > y) | (y == -jnp.inf), (high < y) | (y == jnp.inf)
    outside = below | above
    held = (low <= y) & (high >= y) & ~outside
    return _Search(lower, upper, held, outside, jnp.where(below, lower, upper), centre)


class NumericalInverse(AbstractParametric):
    """A scalar map known only by its forward kernel, inverted by `monotone_root`.

    ``forward`` is the kernel; ``inverse`` solves for x and returns minus the kernel's log-slope
    there. Both are differentiable, in the point and in the parameters.

    Args:
        kernel: ``kernel(params, x) -> (y, ln dy/dx)`` for params ``(P, *s)`` and points ``(*s)``,
            increasing in x: a function, or a module with ``__call__``.
        params: Unconstrained parameters, ``(P, *shape)``.
        bracket: Where to look for a root first; it grows as needed.
        domain: Closed interval on which the kernel may be evaluated.

    A y that the kernel does not reach gives the end of the domain (or of the search) on that side,
    and an x outside the domain the image of its end, both with a log-det of −inf.
    """

    kernel: Callable
    bracket: tuple[float, float] = eqx.field(static=True)
    domain: tuple[float, float] = eqx.field(static=True)

    def __init__(
        self,
        kernel: Callable,
        params: Array,
        *,
        bracket: tuple[float, float] = (-1.0, 1.0),
        domain: tuple[float, float] = (-math.inf, math.inf),
    ):
        self.kernel, self.params = kernel, params
        self.in_shape = params.shape[1:]
        self.bracket, self.domain = bracket, domain

    def forward_kernel(self, params, x):
        """``kernel(params, x)``; −inf outside the domain."""
        lo, hi = self.domain
        inside = jnp.where(x < lo, lo, jnp.where(x > hi, hi, x))
        y, log_slope = self.kernel(params, inside)
        return y, jnp.where(inside == x, log_slope, jnp.where(jnp.isnan(x), x, -jnp.inf))

    def inverse_kernel(self, params, y):
        """The root of kernel(params, x) = y, and minus the log-slope there; −inf out of reach."""
        return invert_kernel(self.kernel, params, y, bracket=self.bracket, domain=self.domain)


def invert_kernel(
    kernel: Callable,
    params: Array,
    y: Array,
    *,
    bracket: tuple[float, float] = (-1.0, 1.0),
    domain: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[Array, Array]:
    """The inverse of a kernel ``(params, x) -> (y, ln dy/dx)`` as one that is solved for.

    Arguments are those of `NumericalInverse`, with params ``(P, *s)`` and points ``(*s)``.

    Returns:
        The root, and minus the kernel's log-slope there; out of reach the end of the domain (or of
        the search) and −inf.
    """
    x, outside = clamped_root(_First(kernel), params, y, bracket, domain)
    centre = 0.5 * bracket[0] + 0.5 * bracket[1]
    _, log_slope = kernel(params, jnp.where(outside, centre, x))
    return x, jnp.where(outside, -jnp.inf, -log_slope)


class _First(eqx.Module):
    """A kernel without its log-slope."""

    kernel: Callable

    def __call__(self, params, x):
        return self.kernel(params, x)[0]
