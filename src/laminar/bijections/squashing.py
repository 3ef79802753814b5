"""Scalar maps that squash: into an interval, by a distribution function, or to logarithms.

They have no parameters: put `Affine` before and after them, as in
``Chain([Affine(), CDF("cauchy")])``. Outside their image they behave as the maps of
`laminar.bijections.elementwise` do.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtr, ndtri

from laminar._errors import InputError
from laminar._floats import epsneg, finite, largest, log_sech2, tiny, unless
from laminar._typing import Array, Shape
from laminar.bijections.elementwise import AbstractFixed

Law = Literal["normal", "cauchy", "gumbel"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_LOG_PI = math.log(math.pi)
_MOST_LOG_TANH = 2.0


class Softclip(AbstractFixed):
    """y = x / (1 + |x|/b), from ℝ to (−b, b), with log-det −2 ln(1 + |x|/b).

    Its tails approach the bound like 1/|x|, so that the inverse keeps far more of them than that of
    `Tanh`. Zero maps to zero with slope one. The second derivative jumps there.

    Args:
        shape: Event shape.
        bound: b > 0.

    Raises:
        InputError: If the bound is not positive and finite.
    """

    bound: float = eqx.field(static=True)

    def __init__(self, shape: Shape = (), *, bound: float = 1.0):
        if not 0 < bound < math.inf:
            raise InputError(f"Softclip: bound must be positive and finite, not {bound}.")
        super().__init__(shape)
        self.bound = float(bound)

    def _edge(self, x: Array) -> float:
        """Inside the bound however the product is rounded."""
        return self.bound * (1 - 2 * epsneg(x))

    def forward_kernel(self, params, x):
        """``(x / (1 + |x|/b), −2 ln(1 + |x|/b))``."""
        u = finite(x / self.bound)
        y = jnp.clip(self.bound * (u / (1 + jnp.abs(u))), -self._edge(x), self._edge(x))
        return y, unless(jnp.isinf(x), -2 * jnp.log1p(jnp.abs(u)))

    def inverse_kernel(self, params, y):
        """``(y / (1 − |y|/b), −2 ln(1 − |y|/b))``; −inf outside (−b, b)."""
        safe = jnp.clip(y, -self._edge(y), self._edge(y))
        rest = 1 - jnp.abs(safe) / self.bound
        return safe / rest, unless(jnp.abs(y) >= self.bound, -2 * jnp.log(rest))


class LogTanh(AbstractFixed):
    """tanh within ±c and a logarithm beyond: ℝ to ℝ, continuous with its derivative.

        y = ±(tanh c + c (1 − tanh² c) ln(|x|/c)),    log_det = ln(1 − tanh² c) − ln(|x|/c)

    for |x| > c. It draws far outliers near, and its inverse, which grows exponentially, gives tails
    heavier than any power. Where that would overflow it is clamped.

    Args:
        shape: Event shape.
        bound: c, where the logarithms take over, in (0, 2]; further out they would be so flat that
            the inverse overflows within a few units.

    Raises:
        InputError: If the bound is not in (0, 2].
    """

    bound: float = eqx.field(static=True)

    def __init__(self, shape: Shape = (), *, bound: float = 1.0):
        if not 0 < bound <= _MOST_LOG_TANH:
            raise InputError(f"LogTanh: bound must lie in (0, {_MOST_LOG_TANH:g}], not {bound}.")
        super().__init__(shape)
        self.bound = float(bound)

    @property
    def _factor(self) -> float:
        return self.bound / math.cosh(self.bound) ** 2

    def forward_kernel(self, params, x):
        """``(tanh c ± factor · ln(|x|/c), ln(1 − tanh² c) − ln(|x|/c))`` beyond ±c."""
        near = jnp.clip(x, -self.bound, self.bound)
        far = jnp.log(jnp.clip(jnp.abs(x) / self.bound, 1.0, largest(x)))
        y = jnp.tanh(near) + jnp.where(x < 0, -far, far) * self._factor
        return y, unless(jnp.isinf(x), log_sech2(near) - far)

    def inverse_kernel(self, params, y):
        """The inverse of the same two pieces."""
        edge = math.tanh(self.bound)
        near = jnp.clip(y, -edge, edge)
        left, right = jnp.log1p(near), jnp.log1p(-near)
        far = jnp.maximum(jnp.abs(y) - edge, 0) / self._factor
        size = self.bound * jnp.expm1(jnp.minimum(far, math.log(largest(y)) - 2))
        x = 0.5 * (left - right) + jnp.where(y < 0, -size, size)
        return x, unless(jnp.isinf(y), far - left - right)


class CDF(AbstractFixed):
    r"""The distribution function of a law, from ℝ to (0, 1); the inverse is its quantile function.

        y = F(x),    log_det = ln p(x)

    ``"normal"``: Φ(x), ``"cauchy"``: ½ + arctan(x)/π, and ``"gumbel"``: exp(−e^{−x}); that of the
    logistic law is `Sigmoid`, and ``Chain([Invert(Affine(loc, scale)), CDF(law)])`` is that of the
    law moved and scaled. The log-det keeps its digits in both tails, and y in the lower one, down
    to the smallest normal number; the last number before one is 1 − 6e-8 in float32, where y is
    clamped. Quantiles of a Cauchy law beyond about 7e17 in float32 have a gradient of zero, since
    their slope would overflow.

    Args:
        law: Whose distribution function.
        shape: Event shape.

    Raises:
        InputError: If there is no such law.
    """

    law: Law = eqx.field(static=True)

    def __init__(self, law: Law = "normal", shape: Shape = ()):
        if law not in get_args(Law):
            raise InputError(f"CDF: law must be one of {', '.join(get_args(Law))}, not {law!r}.")
        super().__init__(shape)
        self.law = law

    def forward_kernel(self, params, x):
        """``(F(x), ln p(x))``."""
        y, log_p = _LAWS[self.law][0](finite(x))
        return jnp.clip(y, tiny(x), 1 - epsneg(x)), unless(jnp.isinf(x), log_p)

    def inverse_kernel(self, params, y):
        """``(F⁻¹(y), −ln p(F⁻¹(y)))``; −inf outside (0, 1)."""
        x, log_det = _LAWS[self.law][1](jnp.clip(y, tiny(y), 1 - epsneg(y)))
        return x, unless((y <= 0) | (y >= 1), log_det)

    @property
    def name(self) -> str:
        """The class with the name of the law."""
        return f"CDF({self.law})"


def _normal(x: Array) -> tuple[Array, Array]:
    return ndtr(x), -0.5 * x * x - _HALF_LOG_TWO_PI


def _normal_quantile(y: Array) -> tuple[Array, Array]:
    x = ndtri(y)
    return x, 0.5 * x * x + _HALF_LOG_TWO_PI


def _cauchy(x: Array) -> tuple[Array, Array]:
    # The angle from the other axis keeps the digits of the lower tail, and the length of (x, 1)
    # does not overflow.
    return jnp.arctan2(1.0, -x) / math.pi, -_LOG_PI - 2 * jnp.log(jnp.hypot(x, 1.0))


def _cauchy_quantile(y: Array) -> tuple[Array, Array]:
    rest = jnp.where(y > 0.5, 1 - y, y)
    # The derivative of x is 1 / (π rest²), which must not overflow: it is that of a clipped y, and
    # zero beyond, while x itself goes on.
    bent = 1 / jnp.tan(math.pi * jnp.maximum(rest, 4 * math.sqrt(tiny(y))))
    size = lax.stop_gradient(1 / jnp.tan(math.pi * rest) - bent) + bent
    return jnp.where(y > 0.5, size, -size), _LOG_PI - 2 * jnp.log(jnp.sin(math.pi * rest))


def _gumbel(x: Array) -> tuple[Array, Array]:
    x = jnp.maximum(x, 1 - math.log(largest(x)))  # where the rate would overflow
    rate = jnp.exp(-x)
    return jnp.exp(-rate), -x - rate


def _gumbel_quantile(y: Array) -> tuple[Array, Array]:
    rate = -jnp.log(y)
    return -jnp.log(rate), rate - jnp.log(rate)


_Kernel = Callable[[Array], tuple[Array, Array]]
_LAWS: dict[str, tuple[_Kernel, _Kernel]] = {
    "normal": (_normal, _normal_quantile),
    "cauchy": (_cauchy, _cauchy_quantile),
    "gumbel": (_gumbel, _gumbel_quantile),
}
