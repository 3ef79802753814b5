"""Cases of scalar maps: elementwise, splines, inverted numerically, quantiles."""

import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from case import INF, Case, randomise

from laminar._registry import register
from laminar.bijections import compose, elementwise
from laminar.bijections.base import Identity
from laminar.bijections.numerical import NumericalInverse
from laminar.bijections.quantile import QuantileMap
from laminar.bijections.splines import Linear, RationalQuadratic
from laminar.bijections.squashing import CDF, LogTanh, Softclip
from laminar.bijections.templates import as_elementwise

E = elementwise
ELEMENTWISE = [
    Case("affine", lambda key: randomise(E.Affine(shape=(3,)), key)),
    Case("affine_scalar", lambda key: randomise(E.Affine(), key)),
    Case("affine_bounded", lambda key: randomise(E.Affine(shape=(3,), max_log_scale=2.0), key)),
    Case("shift", lambda key: randomise(E.Shift(shape=(2, 2)), key)),
    Case("exp", lambda key: E.Exp((3,)), image=(0, INF)),
    Case("softplus", lambda key: E.Softplus((3,)), image=(0, INF)),
    Case("sigmoid", lambda key: E.Sigmoid((3,)), image=(0, 1)),
    Case("logit", lambda key: E.logit((3,)), domain=(0, 1)),
    Case("tanh", lambda key: E.Tanh((3,)), image=(-1, 1)),
    Case("leaky_tanh", lambda key: E.LeakyTanh((3,), bound=1.0)),
    Case("power", lambda key: randomise(E.Power(shape=(3,)), key), domain=(0, INF), image=(0, INF)),
    Case("signed_power", lambda key: randomise(E.SignedPower(shape=(3,)), key)),
    Case("leaky_relu", lambda key: randomise(E.LeakyReLU(shape=(3,)), key)),
    Case("softclip", lambda key: Softclip((3,), bound=2.0), image=(-2, 2), edges=(1.99,)),
    Case("log_tanh", lambda key: LogTanh((3,)), edges=(1.0, -1.0, math.tanh(1.0))),
    Case("cdf_normal", lambda key: CDF("normal", (3,)), image=(0, 1)),
    Case("cdf_cauchy", lambda key: CDF("cauchy", (3,)), image=(0, 1)),
    Case("cdf_gumbel", lambda key: CDF("gumbel", (3,)), image=(0, 1)),
    Case("sinh_arcsinh", lambda key: randomise(E.SinhArcsinh(shape=(3,)), key)),
    Case(
        "adapted_chain",
        lambda key: randomise(
            as_elementwise(compose.Chain([E.Affine(), Identity(()), E.SinhArcsinh(), E.Shift()])),
            key,
        ),
    ),
    Case(
        "composed",
        lambda key: randomise(
            as_elementwise(compose.Chain([E.Affine(), E.SinhArcsinh(), E.Shift()])), key
        ),
    ),
]


@register("test_contract_cubic")
def _cubic(params, x):
    """y = e^a x³ + x + b, which has no simple inverse."""
    slope = jnp.exp(params[0])
    return slope * x**3 + x + params[1], jnp.log1p(3 * slope * x * x)


RQ = RationalQuadratic
UNIT = {"interval": (0.0, 1.0), "tails": None}
ENDS = (-5.0, 5.0)
CIRCLE = (-math.pi, math.pi)
KNOTS = (-5.0, -2.5, 2.5, 5.0)


def _even_knots(key):
    """Knots at −5, −2.5, 0, 2.5 and 5 in x and y alike, with random slopes."""
    spline = RQ(4, (2,), tails="linear")
    return eqx.tree_at(lambda s: s.params, spline, randomise(spline, key).params.at[:8].set(0))


def _even_widths(key):
    """Knots at the same x, with random heights."""
    spline = Linear(4, (2,), tails="linear")
    return eqx.tree_at(lambda s: s.params, spline, randomise(spline, key).params.at[:4].set(0))


SPLINES = [
    Case("rational_quadratic", lambda key: randomise(RQ(8, (3,)), key), edges=ENDS),
    Case("rational_quadratic_lines", _even_knots, edges=KNOTS, slow=True),
    Case(
        "rational_quadratic_circle",
        lambda key: randomise(RQ(4, (2,), interval=CIRCLE, tails="circular"), key),
        CIRCLE,
        CIRCLE,
        slow=True,
    ),
    Case(
        "rational_quadratic_unit",
        lambda key: randomise(RQ(4, **UNIT), key),
        (0, 1),
        (0, 1),
        slow=True,
    ),
    Case("linear_spline", lambda key: randomise(Linear(5, (3,)), key), edges=ENDS),
    Case("linear_spline_lines", _even_widths, edges=KNOTS, slow=True),
    Case(
        "linear_spline_unit",
        lambda key: randomise(Linear(4, **UNIT), key),
        (0, 1),
        (0, 1),
        slow=True,
    ),
]


@register("test_contract_moebius")
def _moebius(params, x):
    """y = c x / (1 + (c − 1) x) with c = e^a, of (0, 1) onto itself."""
    bottom = 1 + jnp.expm1(params[0]) * x
    return jnp.exp(params[0]) * x / bottom, params[0] - 2 * jnp.log(bottom)


def _bounded_inverse(key):
    return NumericalInverse(_moebius, jr.normal(key, (1, 2)), bracket=(0.0, 1.0), domain=(0.0, 1.0))


NUMERICAL = [
    Case(
        "numerical_inverse", lambda key: NumericalInverse(_cubic, jr.normal(key, (2, 2))), long=True
    ),
    Case("numerical_bounded", _bounded_inverse, (0, 1), (0, 1), slow=True),
]


def _quantile_map(key):
    z_key, x_key, slope_key = jr.split(key, 3)
    z, x = (jnp.cumsum(jnp.exp(0.5 * jr.normal(k, (6, 3))), axis=0) - 3.0 for k in (z_key, x_key))
    z, x = (v.at[:, 0].set(jnp.arange(-2.0, 4.0)) for v in (z, x))  # knots that edges can name
    return QuantileMap(z, x, jnp.exp(0.5 * jr.normal(slope_key, (6, 3))))


QUANTILE = [Case("quantile_map", _quantile_map, edges=(-2.0, -1.0, 1.0, 2.0, 3.0), slow=True)]
