"""Densities that are hard for variational inference, with exact draws and known normalisation.

Those without the mark *planted* are to be approximated well, or the verdict must say that they are
not. In the planted ones something is wrong on purpose; where that makes the fit fail, the verdict
must not trust it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

_LOG_ROOT = 0.5 * math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Hard:
    """One density.

    Attributes:
        name: What the table calls it.
        dim: Number of coordinates.
        log_density: ln p̃ of one vector.
        log_evidence: ln ∫ p̃, or None where that is infinite.
        draw: ``(generator, n) -> (n, dim)`` exact draws, or None where there are none.
        view: What is compared with the exact draws, ``(n, dim) -> (n, P)``; coordinates by default.
            Moments of the tails of a funnel do not exist for practical purposes.
        labels: Names of what is compared.
        options: What `fit_posterior` is told besides.
        planted: Whether something is wrong on purpose: unless the fit is right all the same, the
            verdict must not trust it.
        says: The density in words.
    """

    name: str
    dim: int
    log_density: Callable
    log_evidence: float | None
    draw: Callable | None
    says: str
    view: Callable = lambda x: x
    labels: tuple[str, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    planted: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what is compared."""
        return self.labels or tuple(f"x[{i}]" for i in range(self.dim))


# The funnel of Neal (2003): the scale of nine coordinates is e^{v/2}, v ~ N(0, 3²).


def _funnel(x):
    v, rest = x[0], x[1:]
    return norm.logpdf(v, 0.0, 3.0) + jnp.sum(norm.logpdf(rest * jnp.exp(-v / 2)) - v / 2)


def _draw_funnel(rng, n):
    v = 3 * rng.normal(size=(n, 1))
    return np.concatenate([v, np.exp(v / 2) * rng.normal(size=(n, 9))], 1)


def _view_funnel(x):
    return np.concatenate([x[:, :1], x[:, 1:] * np.exp(-x[:, :1] / 2)], 1)


# The banana of Haario et al. (1999): a normal of deviations 10 and 1, bent by a parabola.

_BEND = 0.03


def _banana(x):
    bent = x[1] + _BEND * (x[0] ** 2 - 100)
    return norm.logpdf(x[0], 0.0, 10.0) + norm.logpdf(bent)


def _draw_banana(rng, n):
    first, second = 10 * rng.normal(size=n), rng.normal(size=n)
    return np.stack([first, second - _BEND * (first**2 - 100)], 1)


# Mixtures of spherical normals.


def _mixture(weights, means, scales):
    log_w, means, scales = np.log(weights), np.asarray(means, float), np.asarray(scales, float)
    count, dim = means.shape

    def log_density(x):
        # Constants take the dtype of the point.
        z = (x - means.astype(x.dtype)) / scales.astype(x.dtype)[:, None]
        parts = -0.5 * jnp.sum(z * z, 1) + (log_w - dim * (np.log(scales) + _LOG_ROOT)).astype(
            x.dtype
        )
        return jax.nn.logsumexp(parts)

    def draw(rng, n):
        at = rng.choice(count, n, p=weights)
        return means[at] + scales[at, None] * rng.normal(size=(n, dim))

    return log_density, draw


def _pair(first: float, second: float, weight: float = 0.5, dim: int = 2):
    """Two unit normals on the first axis."""
    means = np.zeros((2, dim))
    means[:, 0] = first, second
    return _mixture([weight, 1 - weight], means, [1.0, 1.0])


def _improper(x):
    """A tail of x^{-1/2} in the first coordinate, which has infinite mass."""
    return -0.25 * jnp.log1p(jnp.square(x[0])) - 0.5 * jnp.square(x[1] - x[0] / 4)


# What climbs of normal laws find hard: an edge that nobody declared, and skew in many dimensions.


def _at_edge(x):
    near = jnp.where(x[0] > 0, math.log(0.95) - x[0], -jnp.inf)
    return jnp.logaddexp(near, math.log(0.05) + norm.logpdf(x[0], 30.0))


def _draw_at_edge(rng, n):
    near = rng.random(n) < 0.95
    return np.where(near, rng.exponential(size=n), 30 + rng.normal(size=n))[:, None]


_CUT = 1.5


def _cut(x):
    inside = x[0] < 0.01 * _CUT
    return jnp.where(inside, norm.logpdf(x, 0.0, 0.01).sum(), -jnp.inf)


def _draw_cut(rng, n):
    x = rng.normal(size=(4 * n, 5))
    return 0.01 * x[x[:, 0] < _CUT][:n]


def _skewed(x):
    gamma = (x - jnp.exp(x)).sum()
    return jnp.logaddexp(gamma, norm.logpdf(x, -40.0).sum()) - math.log(2)


def _draw_skewed(rng, n):
    first = rng.random((n, 1)) < 0.5
    gamma = np.log(rng.exponential(size=(n, 100)))
    return np.where(first, gamma, -40 + rng.normal(size=(n, 100)))


def hard_targets() -> dict[str, Hard]:
    """All densities, by name."""
    even, skew = _pair(-4, 4), _pair(-4, 4, 0.8)
    beside, far = _pair(0, 8), _pair(0, 40)
    ten, thirty_two = _pair(0, 40, dim=10), _pair(0, 40, dim=32)
    spread = _pair(-4, 4, dim=32)
    spike = _mixture([0.5, 0.5], np.zeros((2, 3)), [1e-3, 1.0])
    narrow = _mixture([1 / 3, 2 / 3], [[1.0] * 6, [-1.0] * 6], [0.1, 0.05])
    funnel = {"view": _view_funnel, "labels": ("v", *(f"x[{i}] e^(−v/2)" for i in range(1, 10)))}
    made = [
        Hard(
            "funnel",
            10,
            _funnel,
            0.0,
            _draw_funnel,
            "v ~ N(0, 3²), x_1…x_9 ~ N(0, e^v)",
            **funnel,
        ),
        Hard(
            "banana",
            2,
            _banana,
            0.0,
            _draw_banana,
            "x_0 ~ N(0, 10²), x_1 ~ N(−0.03 (x_0² − 100), 1)",
        ),
        Hard("two modes", 2, even[0], 0.0, even[1], "½ N((−4, 0), I) + ½ N((4, 0), I)"),
        Hard("two modes, 4 to 1", 2, skew[0], 0.0, skew[1], "0.8 N((−4, 0), I) + 0.2 N((4, 0), I)"),
        Hard(
            "Neal's mixture",
            6,
            narrow[0],
            0.0,
            narrow[1],
            "⅓ N(1, 0.1² I) + ⅔ N(−1, 0.05² I) in six dimensions (in the manner of Neal 2001)",
        ),
        Hard(
            "two modes in 32 dimensions",
            32,
            spread[0],
            0.0,
            spread[1],
            "½ N(−4 e_0, I) + ½ N(4 e_0, I)",
        ),
        Hard(
            "spike and slab",
            3,
            spike[0],
            0.0,
            spike[1],
            "½ N(0, 10⁻⁶ I) + ½ N(0, I) in three dimensions",
        ),
        Hard(
            "at an edge",
            1,
            _at_edge,
            0.0,
            _draw_at_edge,
            "0.95 Exp(1) + 0.05 N(30, 1), the edge not declared",
        ),
        Hard(
            "cut",
            5,
            _cut,
            math.log(norm.cdf(_CUT)),
            _draw_cut,
            "N(0, 0.01² I) in five dimensions where x_0 < 0.015, the edge not declared",
        ),
        Hard(
            "skewed in 100 dimensions",
            100,
            _skewed,
            0.0,
            _draw_skewed,
            "½ Π ln Gamma(1) + ½ N(−40, I)",
        ),
        Hard(
            "funnel, too small a flow",
            10,
            _funnel,
            0.0,
            _draw_funnel,
            "the funnel by a normal law",
            options={"flow": "normal"},
            planted=True,
            **funnel,
        ),
        Hard(
            "banana, too small a flow",
            2,
            _banana,
            0.0,
            _draw_banana,
            "the banana by a normal law",
            options={"flow": "normal"},
            planted=True,
        ),
        Hard(
            "two modes, one flow",
            2,
            even[0],
            0.0,
            even[1],
            "as above, with a single flow and no mixture",
            options={"modes": 1},
            planted=True,
        ),
        Hard(
            "two modes, one lost",
            2,
            even[0],
            0.0,
            even[1],
            "as above, with a single normal law",
            options={"modes": 1, "flow": "normal"},
            planted=True,
        ),
        Hard(
            "two modes, one beside",
            2,
            beside[0],
            0.0,
            beside[1],
            "½ N(0, I) + ½ N((8, 0), I), most starts nearer the first",
            planted=True,
        ),
        *(
            Hard(
                f"two modes, one far off ({dim})",
                dim,
                pair[0],
                0.0,
                pair[1],
                f"½ N(0, I) + ½ N(40 e_0, I) in {dim} dimensions, most starts nearer the first",
                planted=True,
            )
            for dim, pair in ((2, far), (10, ten), (32, thirty_two))
        ),
        Hard(
            "improper",
            2,
            _improper,
            None,
            None,
            "a tail of |x_0|^(−½), which has infinite mass",
            planted=True,
        ),
    ]
    return {target.name: target for target in made}
