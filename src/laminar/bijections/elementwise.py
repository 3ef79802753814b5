"""Scalar maps: one monotone function applied to every element.

Every map here is a *kernel* plus its parameters. The kernel takes the parameters as an array with
the parameter axis first, ``(P, *s)``, and points ``(*s)``; it works element by element on any shape
and sums nothing. That form is what coupling and autoregressive layers call with parameters from a
network, and it is fast because it fuses into a single pass.

Outside its support a map gives a clamped finite point and a log-det of −inf; NaN stays NaN;
arguments are clipped before the arithmetic, so gradients are finite everywhere.
"""

import abc
import math
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from laminar._errors import InputError, ShapeError
from laminar._floats import (
    clamped_exp,
    clamped_sinh,
    clip_positive,
    epsneg,
    finite,
    largest,
    log_cosh,
    log_sech2,
    log_tiny,
    not_positive,
    tiny,
    unless,
)
from laminar._params import bounded, expand, positive, positive_inverse, reciprocal
from laminar._typing import Array, ArrayLike, Direction, Shape
from laminar.bijections.base import AbstractBijection, Invert, check_events
from laminar.bijections.frames import AbstractSameShape, AbstractUnconditional


class AbstractElementwise(AbstractSameShape, AbstractUnconditional, AbstractBijection):
    """A monotone increasing scalar map, applied to every element of the event.

    It takes no condition: scalar maps are conditioned by computing their parameters.

    Attributes:
        params: Unconstrained parameters, ``(P, *in_shape)``: the parameter axis comes first, and P
            may be zero.
        in_shape: Shape of one event; ``()`` for the template of a coupling layer.
    """

    if TYPE_CHECKING:
        params: Array = eqx.field(init=False)
    else:
        params: eqx.AbstractVar[Array]

    def row_cost(self, direction):
        """That of the parameters, which a batch may carry, and of what a kernel computes."""
        return (self.params.shape[0] + 8) * max(math.prod(self.in_shape), 1)

    @abc.abstractmethod
    def forward_kernel(self, params: Array, x: Array) -> tuple[Array, Array]:
        """``(y, ln dy/dx)`` for each element.

        Args:
            params: ``(P, *s)``, where axes of size one are broadcast.
            x: ``(*s)``.

        Returns:
            Two arrays of shape ``(*s)``.
        """

    @abc.abstractmethod
    def inverse_kernel(self, params: Array, y: Array) -> tuple[Array, Array]:
        """``(x, ln dx/dy)`` for each element; shapes as in `forward_kernel`."""

    def _apply(self, direction: Direction, x: Array) -> tuple[Array, Array]:
        check_events(self, direction, x)
        kernel = f"{direction}_kernel"
        out, log_det = getattr(self, kernel)(expand(self.params, x.ndim + 1), x)
        for what, value in (("an image", out), ("a log-det", log_det)):
            if value.shape != x.shape:
                raise ShapeError(
                    f"{self.name}: {kernel} gave {what} of shape {value.shape} for points of shape "
                    f"{x.shape}, and it should be the same: kernels work element by element and "
                    "sum nothing."
                )
        return out, log_det.sum(axis=tuple(range(len(self.in_shape))))

    def forward(self, x, condition=None, *, key=None):
        """The map of every element, with the log-derivatives summed over the event."""
        return self._apply("forward", x)

    def inverse(self, y, condition=None, *, key=None):
        """The inverse of every element, with the log-derivatives summed over the event."""
        return self._apply("inverse", y)


class AbstractParametric(AbstractElementwise):
    """A scalar map that keeps its parameters as one array, as all do but those that compute it."""

    params: Array
    in_shape: Shape = eqx.field(static=True)


class AbstractFixed(AbstractParametric):
    """A scalar map without parameters.

    Args:
        shape: Event shape.
    """

    def __init__(self, shape: Shape = ()):
        self.params, self.in_shape = jnp.zeros((0, *shape)), tuple(shape)


class Affine(AbstractParametric):
    r"""Shift and scale: y = scale · x + loc, with log-det ln scale.

    Two parameters, ``(loc, raw)``. By default scale = softplus(raw + ln(e − 1)), which grows only
    linearly in `raw`. With `max_log_scale` = m it is scale = exp(m · tanh(raw / m)): a smooth bound
    e^{−m} < scale < e^m with slope one at zero, which keeps deep stacks from overflowing.

    Args:
        loc: Shift.
        scale: Scale, > 0; broadcast against `loc`.
        shape: Event shape, by default that of the two broadcast together.
        max_log_scale: The bound m, or None.

    Raises:
        InputError: If a scale is not positive or not within the bound.
        ShapeError: If the shapes cannot be broadcast.
    """

    max_log_scale: float | None = eqx.field(static=True)

    def __init__(
        self,
        loc: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        *,
        shape: Shape | None = None,
        max_log_scale: float | None = None,
    ):
        loc, scale = as_float(loc), as_float(scale)
        shape = event_shape("Affine", shape, loc=loc, scale=scale)
        if max_log_scale is not None and not max_log_scale > 0:
            raise InputError(f"Affine: max_log_scale must be positive, not {max_log_scale}.")
        if not isinstance(scale, Tracer):
            if not bool((scale > 0).all()):
                raise InputError("Affine: every scale must be greater than zero.")
            if max_log_scale is not None and not bool(
                (jnp.abs(jnp.log(scale)) < max_log_scale).all()
            ):
                raise InputError(
                    f"Affine: every scale must lie between exp(−{max_log_scale}) and "
                    f"exp({max_log_scale}); give a larger max_log_scale."
                )
        if max_log_scale is None:
            raw = positive_inverse(scale)
        else:
            raw = max_log_scale * jnp.arctanh(jnp.log(scale) / max_log_scale)
        # The inverse of softplus rounds 1 to about 1e-8; the default must be exactly zero.
        raw = jnp.where(scale == 1, jnp.zeros_like(raw), raw)
        dtype = loc.dtype if loc.dtype == scale.dtype else jnp.promote_types(loc.dtype, scale.dtype)
        self.params = jnp.stack(
            [jnp.broadcast_to(v.astype(dtype), shape) for v in (loc, raw)], axis=0
        )
        self.in_shape = shape
        self.max_log_scale = max_log_scale

    def _log_scale(self, raw: Array) -> Array:
        if self.max_log_scale is None:
            return jnp.log(positive(raw))
        return bounded(raw, self.max_log_scale)

    def forward_kernel(self, params, x):
        """``(scale · x + loc, ln scale)``."""
        loc, raw = params
        log_scale = self._log_scale(raw)
        scale = positive(raw) if self.max_log_scale is None else jnp.exp(log_scale)
        return scale * x + loc, jnp.broadcast_to(log_scale, x.shape)

    def inverse_kernel(self, params, y):
        """``((y − loc) / scale, −ln scale)``."""
        loc, raw = params
        log_scale = self._log_scale(raw)
        if self.max_log_scale is None:
            x = (y - loc) * reciprocal(raw)
        else:
            x = (y - loc) * jnp.exp(-log_scale)
        return x, jnp.broadcast_to(-log_scale, y.shape)


class Shift(AbstractParametric):
    """y = x + loc, with log-det zero: the additive map of NICE (Dinh et al. 2014).

    Args:
        loc: Shift.
        shape: Event shape, by default that of `loc`.
    """

    def __init__(self, loc: ArrayLike = 0.0, *, shape: Shape | None = None):
        loc = as_float(loc)
        self.in_shape = event_shape("Shift", shape, loc=loc)
        self.params = jnp.broadcast_to(loc, self.in_shape)[None]

    def forward_kernel(self, params, x):
        """``(x + loc, 0)``."""
        return x + params[0], jnp.zeros_like(x)

    def inverse_kernel(self, params, y):
        """``(y − loc, 0)``."""
        return y - params[0], jnp.zeros_like(y)


class Exp(AbstractFixed):
    """y = exp x, from ℝ to (0, ∞), with log-det x.

    Values that would underflow or overflow are clamped to the smallest and largest normal number.
    """

    # A type checker knows no constructor that is inherited.
    def __init__(self, shape: Shape = ()):
        super().__init__(shape)

    def forward_kernel(self, params, x):
        """``(exp x, x)``."""
        return clamped_exp(x), unless(jnp.isinf(x), x)

    def inverse_kernel(self, params, y):
        """``(ln y, −ln y)``; −inf for y ≤ 0."""
        x = jnp.log(clip_positive(y))
        return x, unless(not_positive(y), -x)


class Softplus(AbstractFixed):
    """y = ln(1 + exp x), from ℝ to (0, ∞), with log-det ln σ(x)."""

    def __init__(self, shape: Shape = ()):
        super().__init__(shape)

    def forward_kernel(self, params, x):
        """``(softplus x, ln σ(x))``."""
        y = jax.nn.softplus(jnp.clip(x, log_tiny(x), largest(x)))
        return jnp.maximum(y, tiny(x)), unless(jnp.isinf(x), -jax.nn.softplus(-finite(x)))

    def inverse_kernel(self, params, y):
        """``(y + ln(1 − e^{−y}), −ln(1 − e^{−y}))``; −inf for y ≤ 0."""
        safe = clip_positive(y)
        log_slope = jnp.log(-jnp.expm1(-safe))
        return safe + log_slope, unless(not_positive(y), -log_slope)


class Sigmoid(AbstractFixed):
    """y = 1 / (1 + e^{−x}), from ℝ to (0, 1), with log-det ln σ(x) + ln σ(−x).

    Where y would round to 0 or 1 it is clamped to the nearest number inside. For another interval,
    follow it by `Affine`; for the map from (0, 1) to ℝ use `logit`.
    """

    def __init__(self, shape: Shape = ()):
        super().__init__(shape)

    def forward_kernel(self, params, x):
        """``(σ(x), ln σ(x) + ln σ(−x))``."""
        safe = finite(x)
        y = jnp.clip(jax.nn.sigmoid(safe), tiny(x), 1 - epsneg(x))
        log_det = -jax.nn.softplus(safe) - jax.nn.softplus(-safe)
        return y, unless(jnp.isinf(x), log_det)

    def inverse_kernel(self, params, y):
        """``(ln y − ln(1 − y), −ln y − ln(1 − y))``; −inf outside (0, 1)."""
        safe = jnp.clip(y, tiny(y), 1 - epsneg(y))
        left, right = jnp.log(safe), jnp.log1p(-safe)
        return left - right, unless((y <= 0) | (y >= 1), -left - right)


def logit(shape: Shape = ()) -> Invert:
    """The map from (0, 1) to ℝ, ln y − ln(1 − y): the inverse of `Sigmoid` as a bijection."""
    return Invert(Sigmoid(shape))


class Tanh(AbstractFixed):
    """y = tanh x, from ℝ to (−1, 1), with log-det 2 (ln 2 − x − softplus(−2x))."""

    def __init__(self, shape: Shape = ()):
        super().__init__(shape)

    def forward_kernel(self, params, x):
        """``(tanh x, ln(1 − tanh² x))``."""
        edge = 1 - epsneg(x)
        return jnp.clip(jnp.tanh(x), -edge, edge), unless(jnp.isinf(x), log_sech2(finite(x)))

    def inverse_kernel(self, params, y):
        """``(artanh y, −ln(1 − y²))``; −inf outside (−1, 1)."""
        edge = 1 - epsneg(y)
        safe = jnp.clip(y, -edge, edge)
        left, right = jnp.log1p(safe), jnp.log1p(-safe)
        return 0.5 * (left - right), unless(jnp.abs(y) >= 1, -left - right)


class LeakyTanh(AbstractFixed):
    """tanh within ±bound and its tangent line beyond: ℝ to ℝ, continuous with its derivative.

    A squashing map whose inverse never saturates. It has no parameters; zero maps to zero with
    slope one.

    Args:
        shape: Event shape.
        bound: Where the lines take over, in (0, 4]; further out tanh is too close to ±1 for
            its inverse to mean anything in float32.

    Raises:
        InputError: If the bound is not in (0, 4].
    """

    bound: float = eqx.field(static=True)

    def __init__(self, shape: Shape = (), *, bound: float = 3.0):
        if not 0 < bound <= 4:
            raise InputError(f"LeakyTanh: bound must lie in (0, 4], not {bound}.")
        super().__init__(shape)
        self.bound = float(bound)

    def forward_kernel(self, params, x):
        """``(tanh c + slope · (x − c), ln(1 − tanh² c))`` with c = x clipped to ±bound."""
        near = jnp.clip(x, -self.bound, self.bound)
        slope = 1 / math.cosh(self.bound) ** 2
        return jnp.tanh(near) + slope * (x - near), log_sech2(near)

    def inverse_kernel(self, params, y):
        """The inverse of the same two pieces."""
        edge, steepness = math.tanh(self.bound), math.cosh(self.bound) ** 2
        near = jnp.clip(y, -edge, edge)
        left, right = jnp.log1p(near), jnp.log1p(-near)
        return 0.5 * (left - right) + steepness * (y - near), -left - right


class AbstractPower(AbstractParametric):
    """A power a > 0, whose inverse is the power 1/a."""

    @abc.abstractmethod
    def _run(self, exponent: Array, log_exponent: Array, x: Array) -> tuple[Array, Array]:
        """The power of each element, and its log-derivative."""

    def forward_kernel(self, params, x):
        """The power a, and its log-derivative."""
        exponent = positive(params[0])
        return self._run(exponent, jnp.log(exponent), x)

    def inverse_kernel(self, params, y):
        """The power 1/a, and its log-derivative."""
        return self._run(reciprocal(params[0]), -jnp.log(positive(params[0])), y)


class Power(AbstractPower):
    """y = x^a, from (0, ∞) to (0, ∞), with log-det ln a + (a − 1) ln x, and −inf for x ≤ 0.

    One parameter; a = softplus(raw + ln(e − 1)), so zero means a = 1, the identity.

    Args:
        exponent: a > 0.
        shape: Event shape, by default that of `exponent`.

    Raises:
        InputError: If an exponent is not positive.
        ShapeError: If shapes cannot be broadcast.
    """

    def __init__(self, exponent: ArrayLike = 1.0, *, shape: Shape | None = None):
        self.params, self.in_shape = _one_positive("Power", shape, exponent=exponent)

    def _run(self, exponent, log_exponent, x):
        return _power(exponent, log_exponent, x)


class SignedPower(AbstractPower):
    """y = sign(x) |x|^a, from ℝ to ℝ, with log-det ln a + (a − 1) ln |x|.

    One parameter as in `Power`; zero means the identity. At zero itself the derivative is 0 for
    a > 1 and ∞ for a < 1, and the log-det says so: it is infinite there.

    Args:
        exponent: a > 0.
        shape: Event shape, by default that of `exponent`.

    Raises:
        InputError: If an exponent is not positive.
        ShapeError: If shapes cannot be broadcast.
    """

    def __init__(self, exponent: ArrayLike = 1.0, *, shape: Shape | None = None):
        self.params, self.in_shape = _one_positive("SignedPower", shape, exponent=exponent)

    def _run(self, exponent, log_exponent, x):
        size, log_det = _power(exponent, log_exponent, jnp.abs(x))
        at_zero = jnp.where(exponent == 1, 0.0, jnp.where(exponent > 1, -jnp.inf, jnp.inf))
        # At zero too the identity has a slope of one; the others' are 0, and ∞ without a gradient.
        y = jnp.where((x == 0) & (exponent == 1), x, jnp.sign(x) * size)
        return y, jnp.where(x == 0, at_zero.astype(x.dtype), log_det)


class LeakyReLU(AbstractParametric):
    """y = x above zero and a · x below, with log-det ln a below zero (He et al. 2015).

    One parameter; a = softplus(raw + ln(e − 1)), so zero means a = 1, the identity. At zero itself
    the derivative is that of the right side.

    Args:
        slope: a > 0.
        shape: Event shape, by default that of `slope`.

    Raises:
        InputError: If a slope is not positive.
        ShapeError: If shapes cannot be broadcast.
    """

    def __init__(self, slope: ArrayLike = 0.1, *, shape: Shape | None = None):
        self.params, self.in_shape = _one_positive("LeakyReLU", shape, slope=slope)

    def forward_kernel(self, params, x):
        """``(x, 0)``, and ``(a x, ln a)`` below zero."""
        slope = positive(params[0])
        return jnp.where(x < 0, slope * x, x), jnp.where(x < 0, jnp.log(slope), 0.0)

    def inverse_kernel(self, params, y):
        """``(y, 0)``, and ``(y / a, −ln a)`` below zero."""
        log_slope = jnp.log(positive(params[0]))
        return jnp.where(y < 0, y * reciprocal(params[0]), y), jnp.where(y < 0, -log_slope, 0.0)


class SinhArcsinh(AbstractParametric):
    """y = sinh(t · (arsinh x + s)): skewness s and tail weight t (Jones & Pewsey 2009).

    Two parameters, ``(s, raw)`` with t = softplus(raw + ln(e − 1)) > 0; heavier tails for t > 1.
    The log-det is ln t + ln cosh u − ln cosh(arsinh x), with u the argument of sinh.

    Args:
        skew: s.
        tail: t > 0; broadcast against `skew`.
        shape: Event shape, by default that of the two broadcast together.

    Raises:
        InputError: If a tail weight is not positive.
        ShapeError: If shapes cannot be broadcast.
    """

    def __init__(self, skew: ArrayLike = 0.0, tail: ArrayLike = 1.0, *, shape: Shape | None = None):
        skew, tail = as_float(skew), as_float(tail)
        if not isinstance(tail, Tracer) and not bool((tail > 0).all()):
            raise InputError("SinhArcsinh: every tail weight must be greater than zero.")
        raw = jnp.where(tail == 1, jnp.zeros_like(tail), positive_inverse(tail))
        shape = event_shape("SinhArcsinh", shape, skew=skew, tail=tail)
        self.in_shape = shape
        self.params = jnp.stack([jnp.broadcast_to(v, shape) for v in (skew, raw)])

    def forward_kernel(self, params, x):
        """``(sinh u, ln t + ln cosh u − ln cosh v)`` with v = arsinh x and u = t · (v + s)."""
        skew, tail = params[0], positive(params[1])
        v = jnp.arcsinh(finite(x))
        u = tail * (v + skew)
        return clamped_sinh(u), unless(jnp.isinf(x), jnp.log(tail) + log_cosh(u) - log_cosh(v))

    def inverse_kernel(self, params, y):
        """``(sinh u, −ln t + ln cosh u − ln cosh v)`` with v = arsinh y and u = v / t − s."""
        skew, tail = params[0], positive(params[1])
        v = jnp.arcsinh(finite(y))
        u = v * reciprocal(params[1]) - skew
        return clamped_sinh(u), unless(jnp.isinf(y), log_cosh(u) - log_cosh(v) - jnp.log(tail))


def _power(exponent: Array, log_exponent: Array, x: Array) -> tuple[Array, Array]:
    """The power of positive numbers and its log-derivative; −inf for others."""
    log_x = jnp.log(clip_positive(x))
    log_det = log_exponent + (exponent - 1) * log_x
    return clamped_exp(exponent * log_x), unless(not_positive(x), log_det)


def as_float(value: ArrayLike) -> Array:
    """Numbers as an array of a floating type that is not weak."""
    value = jnp.asarray(value)
    # The type is given too, as that of a Python number would be weak.
    return value.astype(value.dtype if jnp.issubdtype(value.dtype, jnp.inexact) else float)


def _one_positive(owner: str, shape: Shape | None, **given: ArrayLike) -> tuple[Array, Shape]:
    """The parameters and the event shape of a map with one positive number."""
    ((name, value),) = given.items()
    value = as_float(value)
    if not isinstance(value, Tracer) and not bool((value > 0).all()):
        raise InputError(f"{owner}: every {name} must be greater than zero.")
    raw = jnp.where(value == 1, jnp.zeros_like(value), positive_inverse(value))
    shape = event_shape(owner, shape, **{name: value})
    return jnp.broadcast_to(raw, shape)[None], shape


def event_shape(owner: str, shape: Shape | None, **values: Array) -> Shape:
    """The event shape asked for, or that of the arguments broadcast together."""
    shapes = {name: value.shape for name, value in values.items()}
    try:
        joint = np.broadcast_shapes(*shapes.values(), *(() if shape is None else (tuple(shape),)))
    except ValueError:
        joint = None
    if joint is None or (shape is not None and joint != tuple(shape)):
        given = " and ".join(f"{name} of shape {s}" for name, s in shapes.items())
        event = "" if shape is None else f" to the event shape {tuple(shape)}"
        raise ShapeError(f"{owner}: {given} cannot be broadcast{event or ' together'}.")
    return joint
