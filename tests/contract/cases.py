"""Every bijection is one line in CASES, at random parameters of order one.

A zero-initialised map is the identity and would pass anything, so `make(key)` must return a
bijection whose trained leaves are random: `randomise(bijection, key)` does that.
"""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from case import Case, affine, randomise
from scalar_cases import CIRCLE, ELEMENTWISE, ENDS, NUMERICAL, QUANTILE, SPLINES

from laminar._registry import register
from laminar.bijections import compose, elementwise
from laminar.bijections import linear as L
from laminar.bijections import orthogonal as O
from laminar.bijections.amortized import amortized
from laminar.bijections.attention import transformer_autoregressive
from laminar.bijections.autoregressive import masked_autoregressive
from laminar.bijections.base import Identity, Invert
from laminar.bijections.block import BlockAutoregressive
from laminar.bijections.circle import CircleMoebius
from laminar.bijections.conjugate import Conjugate
from laminar.bijections.continuous import Continuous, VelocityField
from laminar.bijections.coupling import coupling
from laminar.bijections.dynamics import Leapfrog
from laminar.bijections.image import (
    Haar,
    PeriodicConv,
    Positionwise,
    Squeeze,
    conv1x1,
    multiscale,
)
from laminar.bijections.manifolds import (
    Cylindrical,
    ExponentialMap,
    Projective,
    SphereMoebius,
)
from laminar.bijections.masks import checkerboard_mask, conv_coupling
from laminar.bijections.monotone import (
    Bernstein,
    DeepSigmoidal,
    MixtureCDF,
    SumOfSquares,
    TailTransform,
    UnconstrainedMonotone,
)
from laminar.bijections.rank_one import Planar, Radial, Sylvester
from laminar.bijections.residual import Residual
from laminar.bijections.rotations import QuaternionMap, RotationCoupling
from laminar.bijections.simplex import Softmax, StickBreaking
from laminar.bijections.splines import RationalQuadratic
from laminar.nn.lipschitz import LipschitzConv, LipschitzMLP
from laminar.nn.potential import PotentialField

E, C = elementwise, compose
PERM = np.array([2, 0, 1])

COMPOSED = [
    Case("identity", lambda key: Identity((3,))),
    Case("invert", lambda key: Invert(randomise(E.Affine(shape=(3,)), key))),
    Case("chain", lambda key: randomise(C.Chain([E.Affine(shape=(3,)), C.reverse(3)]), key)),
    Case("chain_bounded", lambda key: C.Chain([affine((2,))(key), E.Tanh((2,))]), image=(-1, 1)),
    Case("repeat", lambda key: C.repeat(_layer, 3, key=key)),
    Case("independent", lambda key: C.Independent(affine((2,))(key), 3)),
    Case(
        "independent_stacked",
        lambda key: C.Independent(eqx.filter_vmap(affine((2,)))(jr.split(key, 3)), 3, True),
    ),
    Case(
        "stack",
        lambda key: randomise(C.Stack([E.Affine(), RationalQuadratic(4), E.SinhArcsinh()]), key),
        slow=True,
    ),
    Case("reshape", lambda key: C.Reshape((2, 3), (6,))),
    Case("permute", lambda key: C.Permute(PERM)),
    Case("permute_rows", lambda key: C.Permute(PERM, (3, 2))),
    Case("indexed", lambda key: C.Indexed(affine((2,))(key), [0, 2], 4)),
    Case("conjugate", lambda key: _conjugate(key)),
]


def _layer(key):
    """One layer with a permutation of its own."""
    affine_key, perm_key = jr.split(key)
    return C.Chain([affine((3,))(affine_key), C.random_permutation(3, key=perm_key)])


def _conjugate(key):
    """A coupling in the coordinates of a conditioned map, which changes the shape too."""
    turn = C.Chain([C.Reshape((2, 2), (4,)), randomise(L.LU(4, key=key), key, 0.5)])
    return Conjugate(turn, _coupling(E.Affine(max_log_scale=1.0), key, cond_dim=2))


LINEAR = [
    Case("triangular_lower", lambda key: randomise(L.Triangular(3), key)),
    Case("triangular_upper", lambda key: randomise(L.Triangular(3, lower=False, bias=False), key)),
    Case("lu", lambda key: randomise(L.LU(4, key=key), key)),
    Case("lu_repeat", lambda key: C.repeat(_lu, 3, key=key)),
    Case("householder", lambda key: randomise(L.Householder(4, key=key), key)),
    Case("householder_odd", lambda key: randomise(L.Householder(4, 3, key=key), key)),
    Case("low_rank", lambda key: randomise(L.LowRank(4, 2, key=key), key)),
    Case("svd", lambda key: randomise(O.SVD(3, 3, key=key), key, 0.7)),
    Case("qr", lambda key: randomise(O.QR(3, key=key), key)),
    Case("cayley", lambda key: randomise(O.Cayley(4), key)),
    Case("matrix_exponential", lambda key: randomise(O.MatrixExponential(3), key, 0.5)),
    Case("matrix", lambda key: _matrix(key)),
    Case("dct", lambda key: L.DCT((3, 4), axis=0)),
    Case("act_norm", lambda key: randomise(L.ActNorm(3), key)),
    Case("act_norm_channels", lambda key: randomise(L.ActNorm((2, 2, 2), per_channel=True), key)),
]

COUPLED = [
    Case("coupling_additive", lambda key: _coupling(E.Shift(), key)),
    Case("coupling_affine", lambda key: _coupling(E.Affine(max_log_scale=2.0), key, cond_dim=2)),
    Case(
        "coupling_film",
        lambda key: _coupling(E.Affine(max_log_scale=1.0), key, cond_dim=2, film=True),
    ),
    Case("coupling_volume", lambda key: _gin(key)),
    Case("coupling_spline", lambda key: _coupling(RationalQuadratic(4), key)),
    Case(
        "coupling_one",
        lambda key: _coupling(RationalQuadratic(4), key, dim=1, cond_dim=2),
        slow=True,
    ),
    Case(
        "coupling_any_map",
        lambda key: _coupling(
            C.Chain([E.Affine(max_log_scale=1.0), E.LeakyTanh(bound=1.0), E.Shift()]), key
        ),
    ),
    Case(
        "coupling_marginal",
        lambda key: _coupling(
            E.Affine(max_log_scale=2.0), key, marginal=RationalQuadratic(4, (2,)), activation="silu"
        ),
        slow=True,
    ),
    Case("coupling_repeat", lambda key: C.repeat(_coupled_layer, 3, key=key)),
]


def _lu(key):
    """Tame enough that three in a row keep their digits."""
    return randomise(L.LU(4, key=key), key, 0.5)


def _coupling(template, key, dim=4, **options):
    """A layer whose small network gives parameters of order one."""
    layer = coupling(dim, template, key=key, width=8, depth=1, **options)
    return randomise(layer, key, 0.25)


def _gin(key):
    return _coupling(E.Affine(max_log_scale=2.0), key, cond_dim=2, dim=5, keep_volume=True)


def _matrix(key):
    """Far enough from singular, with a negative determinant."""
    layer = randomise(L.Matrix(3), key, 0.3)
    return eqx.tree_at(lambda m: m.matrix, layer, layer.matrix + jnp.diag(jnp.array([1.0, 1, -1])))


def _coupled_layer(key):
    """A coupling layer and a permutation of its own."""
    layer_key, perm_key = jr.split(key)
    layer = _coupling(E.Affine(max_log_scale=1.0), layer_key)
    return C.Chain([layer, C.random_permutation(4, key=perm_key)])


def _autoregressive(dim, template, cond_dim=0, residual=False, width=16, graph=None):
    """A masked autoregressive layer in a random order or a graph, at random parameters."""

    def make(key):
        order_key, net_key, draw_key = jr.split(key, 3)
        layer = masked_autoregressive(
            dim,
            template,
            width=width,
            depth=2,
            cond_dim=cond_dim,
            residual=residual,
            order=None if graph else jr.permutation(order_key, dim),
            graph=graph,
            key=net_key,
        )
        return randomise(layer, draw_key, 0.3)

    return make


TREE = ((3,), (0, 3), (3,), (), (1, 2))  # levels of 1, 2, 1 and 1 columns

AUTOREGRESSIVE = [
    Case("maf", _autoregressive(5, elementwise.Affine(max_log_scale=2.0))),
    Case(
        "maf_conditional",
        _autoregressive(4, elementwise.Affine(max_log_scale=2.0), 3, True),
        slow=True,
    ),
    Case("maf_single", _autoregressive(1, elementwise.Affine(max_log_scale=2.0), 2)),
    Case(
        "maf_few_units",
        _autoregressive(6, elementwise.Affine(max_log_scale=2.0), width=3),
        slow=True,
    ),
    Case(
        "maf_graph",
        _autoregressive(5, elementwise.Affine(max_log_scale=2.0), 2, graph=TREE),
    ),
    Case("nsf", _autoregressive(4, RationalQuadratic(6), residual=True)),
    Case("nsf_conditional", _autoregressive(3, RationalQuadratic(6, tails="linear"), 2), slow=True),
    Case("iaf", lambda key: Invert(_autoregressive(4, RationalQuadratic(6))(key))),
    Case(
        "nsf_affine",
        _autoregressive(4, C.Chain([RationalQuadratic(6), elementwise.Affine(max_log_scale=2.0)])),
        slow=True,
    ),
]


RANK_ONE = [
    Case("planar", lambda key: randomise(Planar(4, key=key), key)),
    Case("planar_scalar", lambda key: randomise(Planar(1, key=key), key)),
    Case("planar_repeat", lambda key: C.repeat(_planar, 5, key=key)),
    Case("radial", lambda key: randomise(Radial(4, key=key), key)),
    Case("radial_scalar", lambda key: randomise(Radial(1, key=key), key)),
    Case("sylvester_orthogonal", lambda key: randomise(Sylvester(5, 3, key=key), key)),
    Case(
        "sylvester_householder",
        lambda key: randomise(Sylvester(4, kind="householder", reflections=3, key=key), key),
        slow=True,
    ),
    Case(
        "sylvester_triangular",
        lambda key: randomise(Sylvester(3, kind="triangular", order=PERM, key=key), key),
    ),
    Case("sylvester_repeat", lambda key: C.repeat(_sylvester, 3, key=key), slow=True),
]


def _planar(key):
    """Tame enough that five in a row keep their digits."""
    return randomise(Planar(3, key=key), key, 0.7)


def _sylvester(key):
    """Triangular layers, each in an order of its own."""
    order_key, draw_key = jr.split(key)
    order = jr.permutation(order_key, 4)
    return randomise(Sylvester(4, kind="triangular", order=order, key=key), draw_key, 0.5)


AMORTIZED = [
    Case("amortized_planar", lambda key: _amortized(C.repeat(_planar, 4, key=key), key), slow=True),
    Case("amortized_radial", lambda key: _amortized(Radial(3, key=key), key, 1.0)),
    Case(
        "amortized_sylvester",
        lambda key: _amortized(Sylvester(3, kind="triangular", key=key), key),
        slow=True,
    ),
    Case(
        "amortized_mapped",
        lambda key: _amortized(_coupling(E.Shift(), key, cond_dim=2), key),
        slow=True,
    ),
]


def _amortized(bijection, key, scale=0.3, **options):
    """A template and a network at random parameters."""
    return randomise(amortized(bijection, 2, key=key, **options), key, scale)


@register("test_contract_valley")
def _valley(z, condition=None):
    """A log-density with linear tails, whose coordinates depend on each other."""
    shift = 0 if condition is None else condition.sum()
    return -jnp.logaddexp(z - shift, -z).sum() - 0.5 * jnp.tanh(z[0]) * jnp.tanh(z[1])


DYNAMICS = [
    Case("leapfrog", lambda key: _leapfrog(key)),
    Case("leapfrog_tempered", lambda key: _leapfrog(key, tempering=0.9, cond_dim=2), slow=True),
]


def _leapfrog(key, **options):
    """Steps that stay within the accuracy of the integrator."""
    return randomise(Leapfrog(_valley, 2, steps=3, step_size=0.3, **options), key, 0.5)


MONOTONE = [
    Case("mixture_cdf", lambda key: randomise(MixtureCDF(4, (2,)), key), long=True),
    Case(
        "mixture_cdf_normal",
        lambda key: randomise(MixtureCDF(3, (2,), law="normal"), key),
        slow=True,
    ),
    Case("mixture_cdf_coupled", lambda key: _coupling(MixtureCDF(3), key, cond_dim=2), slow=True),
    Case("deep_sigmoidal", lambda key: randomise(DeepSigmoidal(4, shape=(2,)), key), slow=True),
    Case("deep_sigmoidal_two", lambda key: randomise(DeepSigmoidal(3, 2, (2,)), key), slow=True),
    Case("naf", _autoregressive(3, Invert(DeepSigmoidal(3)), 2), slow=True),
    Case(
        "unconstrained_monotone",
        lambda key: randomise(UnconstrainedMonotone(4, (2,)), key),
        edges=ENDS,
        slow=True,
    ),
    Case(
        "sum_of_squares",
        lambda key: randomise(SumOfSquares(shape=(2,)), key),
        edges=ENDS,
        slow=True,
    ),
    Case("bernstein", lambda key: randomise(Bernstein(6, (2,)), key), edges=ENDS, slow=True),
    Case("tail_transform", lambda key: randomise(TailTransform(shape=(3,)), key)),
]

BLOCK = [
    Case("bnaf", lambda key: randomise(BlockAutoregressive(3, units=3, order=PERM), key)),
    Case(
        "bnaf_conditional",
        lambda key: randomise(BlockAutoregressive(2, units=3, depth=1, cond_dim=2), key),
        slow=True,
    ),
]

RESIDUAL = [
    Case("residual", lambda key: _residual(3, key, cond_dim=2), long=True),
    Case("residual_conv", lambda key: _residual((1, 3, 4), key, cond_dim=2), long=True),
    Case(
        "residual_repeat",
        lambda key: C.repeat(lambda k: Invert(_residual(2, k)), 2, key=key),
        slow=True,
    ),
]


def _residual(event, key, lipschitz=0.6, **options):
    """Weights large enough that the bound has to scale them."""
    kind = LipschitzMLP if isinstance(event, int) else LipschitzConv
    net = kind(event, width=6, depth=1, lipschitz=lipschitz, key=key, **options)
    return randomise(Residual(net), key)


# Fixed steps of order 8, enough that the log-det of the computed map is the integral of the
# divergence to rounding; adaptive ones are in tests/bijections/test_continuous.py.
CONTINUOUS = [
    Case("continuous", lambda key: _continuous(key, **STEPS), long=True),
    Case("continuous_conv", lambda key: _continuous(key, (2, 3), 3, **FINE), slow=True),
    Case("continuous_potential", lambda key: _potential(key), long=True),
]
STEPS = {"fixed_steps": 24, "solver": "dopri8"}
FINE = {**STEPS, "fixed_steps": 40}
FIELD = {"width": 8, "depth": 1, "cond_dim": 2, "frequencies": 2, "activation": "tanh"}


def _continuous(key, shape=(2,), kernel=None, **options):
    """A small field of order one that depends on time and condition."""
    field = VelocityField(shape, key=key, kernel=kernel, **FIELD)
    return randomise(Continuous(field, shape, (2,), times=1, **options), key, 0.4)


def _potential(key):
    field = PotentialField(2, key=key, width=8, cond_dim=2)
    return randomise(Continuous(field, (2,), (2,), times=1, **STEPS), key, 0.4)


IMAGE = [
    Case("squeeze", lambda key: Squeeze((1, 4, 2)), slow=True),
    Case("haar", lambda key: Haar((1, 2, 4)), slow=True),
    Case("conv1x1", lambda key: randomise(conv1x1((2, 2, 2), key=key), key, 0.5)),
    Case("periodic_conv", lambda key: randomise(PeriodicConv((2, 4, 3)), key, 0.15), long=True),
    Case("coupling_channels", lambda key: _conv_coupling(key, (2, 3), cond_shape=(2,)), slow=True),
    Case(
        "coupling_checkerboard",
        lambda key: C.repeat(_checkered, 2, over=(jnp.arange(2) == 1, jr.split(key))),
        slow=True,
    ),
    Case("positionwise", lambda key: Positionwise(_coupling(E.Shift(), key, 2, cond_dim=2), (2,))),
    Case(
        "multiscale",
        lambda key: randomise(
            multiscale(
                [C.Chain([E.Affine(shape=(4, 1)), Invert(Squeeze((2, 2)))]), E.Affine(shape=(4, 2))]
            ),
            key,
        ),
        slow=True,
    ),
]


def _conv_coupling(key, shape, **options):
    """A layer whose small convolutional network gives parameters of order one."""
    layer = conv_coupling(
        shape, E.Affine(max_log_scale=1.0), key=key, width=4, depth=1, activation="tanh", **options
    )
    return randomise(layer, key, 0.4)


def _checkered(at):
    """Layers of both halves of a checkerboard."""
    flip, key = at
    return _conv_coupling(key, (1, 2, 2), mask=checkerboard_mask((1, 2, 2), flip))


ATTENTION = [
    Case("transformer", lambda key: _transformer(key), slow=True),
]


def _transformer(key):
    """Tokens in an order of their own."""
    order_key, draw_key = jr.split(key)
    layer = transformer_autoregressive(
        (2, 3),
        E.Affine(max_log_scale=1.0),
        key=key,
        width=4,
        depth=2,
        heads=2,
        cond_dim=2,
        order=jr.permutation(order_key, 3),
    )
    return randomise(layer, draw_key, 0.4)


MANIFOLDS = [
    Case("circle_moebius", lambda key: randomise(CircleMoebius(1, (2,)), key), CIRCLE, CIRCLE),
    Case(
        "circle_moebius_mean",
        lambda key: randomise(CircleMoebius(3, (2,)), key),
        CIRCLE,
        CIRCLE,
        slow=True,
    ),
    Case(
        "torus_coupling",
        lambda key: _coupling(
            CircleMoebius(), key, 2, cond_dim=2, periodic=True, marginal=CircleMoebius(1, (1,))
        ),
        CIRCLE,
        CIRCLE,
        slow=True,
    ),
    Case("sphere_moebius", lambda key: randomise(SphereMoebius(2), key)),
    Case("sphere_amortized", lambda key: _amortized(SphereMoebius(1), key, 0.7), slow=True),
    Case("projective", lambda key: randomise(Projective(L.LU(3, bias=False)), key, 0.5), slow=True),
    Case("exponential_map", lambda key: _exponential(2, key), slow=True),
    Case("exponential_map_symmetric", lambda key: _exponential(3, key, symmetric=True), slow=True),
    Case("cylindrical", lambda key: Cylindrical(3), domain=(-1, 1), slow=True),
    Case("stick_breaking", lambda key: StickBreaking(4)),
    Case("softmax", lambda key: Softmax(4)),
    Case(
        "rotation_coupling",
        lambda key: randomise(RotationCoupling(1, width=8, depth=1, cond_dim=2, key=key), key, 0.4),
        slow=True,
    ),
    Case("quaternion_map", lambda key: QuaternionMap(_turned(key)), slow=True),
]


def _exponential(n, key, **options):
    return randomise(ExponentialMap(n, 3, key=key, **options), key)


def _turned(key):
    """Tame enough that quaternions keep their digits."""
    return randomise(Projective(L.LU(4, bias=False)), key, 0.5)


# Other tiers append their lists here.
CASES: list[Case] = [
    *ELEMENTWISE,
    *SPLINES,
    *NUMERICAL,
    *COMPOSED,
    *LINEAR,
    *COUPLED,
    *AUTOREGRESSIVE,
    *QUANTILE,
    *RANK_ONE,
    *AMORTIZED,
    *DYNAMICS,
    *CONTINUOUS,
    *RESIDUAL,
    *MONOTONE,
    *BLOCK,
    *MANIFOLDS,
    *IMAGE,
    *ATTENTION,
]
