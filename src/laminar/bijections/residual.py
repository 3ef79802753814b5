r"""Residual flows: y = x + g(x) with a contraction g, a free-form Jacobian and three log-dets.

ln det(I + J) of the Jacobian J of g is computed, or estimated from products of J with vectors
(Behrmann et al. 2019; Chen et al. 2019):

    ln det(I + J) = Σ_{k ≥ 1} (−1)^{k+1} tr(J^k) / k,    tr A = E[vᵀ A v] for v of random signs

The gradient of an estimate is an estimate too, of the Neumann series

    ∂ ln det(I + J) = E[uᵀ ∂J v],    u = Σ_{k ≥ 0} (−Jᵀ)^k v

so only the last u is kept: memory does not grow with the number of terms.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax

from laminar._errors import InputError
from laminar._params import expand
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.base import Exactness
from laminar.bijections.frames import AbstractSameShape
from laminar.nn.lipschitz import Contraction, LipschitzConv, LipschitzMLP

LogDet = Literal["exact", "power_series", "roulette"]
T = TypeVar("T")

_EXACTNESS: dict[str, Exactness] = {
    "exact": "exact",
    "power_series": "biased",
    "roulette": "unbiased",
}
_SPARE_STEPS = 10


class Residual(AbstractSameShape):
    r"""y = x + g(x; c) with |g(x) − g(x′)| ≤ L |x − x′|, L < 1 (Behrmann et al. 2019).

        log_det = ln det(I + ∂g/∂x)

    ``forward`` is explicit. ``inverse`` iterates x ← y − g(x), which shrinks the error by L each
    time, until an iteration moves no event by more than four roundings; the error left is then at
    most L/(1 − L) times that. Its derivatives, in both modes, are those of the implicit function.
    For density estimation, where the way from data to latent should be the explicit one, take
    ``Invert`` of it.

    Args:
        net: g, a `LipschitzMLP` or, for images, a `LipschitzConv`; it has the bound L and starts at
            zero, so the map starts as the identity.
        log_det: ``"exact"``: by the Jacobian, D products and D³ for an event, for few dimensions.
            ``"roulette"``: an unbiased estimate (Chen et al. 2019); the series goes on after
            `terms` with a probability of max(½, L) each time, and what follows is weighted by the
            reciprocal, which keeps the variance finite. ``"power_series"``: the first `terms` of
            the series, an estimate with a bias of at most D L^{n+1} / ((n + 1) (1 − L)). The
            estimates need a key.
        terms: n; how many terms are always computed.
        probes: How many vectors v are averaged over.

    Raises:
        InputError: If an option has no meaning, or a key is missing.
    """

    net: LipschitzMLP | LipschitzConv
    log_det: LogDet = eqx.field(static=True, default="exact")
    terms: int = eqx.field(static=True, default=8)
    probes: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if self.log_det not in get_args(LogDet):
            raise InputError(
                f"Residual: log_det must be 'exact', 'power_series' or 'roulette', not "
                f"{self.log_det!r}."
            )
        if self.terms < 1 or self.probes < 1:
            raise InputError(
                f"Residual: terms and probes must be at least 1, not {self.terms} and "
                f"{self.probes}."
            )

    @property
    def in_shape(self) -> Shape:
        """The shape of the network's events."""
        return self.net.shape

    @property
    def cond_shape(self) -> Shape | None:
        """What the network takes."""
        return self.net.cond_shape

    @property
    def exactness(self) -> Exactness:
        """That of the log-det: ``"exact"``, ``"biased"`` or ``"unbiased"``."""
        return _EXACTNESS[self.log_det]

    def row_cost(self, direction):
        """The hidden units, and their derivatives along every vector."""
        vectors = math.prod(self.net.shape) if self.log_det == "exact" else 4 * self.probes
        units = sum(bias.shape[0] for bias in self.net.biases)
        return (1 + vectors) * units * math.prod(self.net.shape[1:])

    def _flat(self, x: Array) -> Array:
        return x.reshape((math.prod(self.net.shape), *x.shape[len(self.net.shape) :]))

    def _log_det(self, g: Contraction, x: Array, key: PRNGKeyArray | None) -> Array:
        if self.log_det == "exact":
            return _exact(g, x)
        if key is None:
            raise InputError(
                f"{self.name}: with log_det={self.log_det!r} the log-det is an estimate and needs "
                "a random key; give key=…, or take log_det='exact'."
            )
        signs_key, count_key = jr.split(key)
        signs = jr.rademacher(signs_key, (x.shape[0], self.probes, *x.shape[1:]), x.dtype)
        if self.log_det == "power_series":
            return _estimate(g, x, signs, jnp.asarray(self.terms), self.terms, None)
        go_on = max(0.5, self.net.lipschitz)
        u = jr.uniform(count_key, (), minval=float(jnp.finfo(jnp.float32).tiny))
        extra = jnp.floor(jnp.log(u) / math.log(go_on)).astype(jnp.int32)
        return _estimate(g, x, signs, self.terms + extra, self.terms, go_on)

    def forward(self, x, condition=None, *, key=None):
        """``(x + g(x), ln det(I + ∂g/∂x))``."""
        y, log_det = _explicit(self, self._flat(x), condition, key)
        return y.reshape(x.shape), log_det

    def inverse(self, y, condition=None, *, key=None):
        """``(x, −ln det(I + ∂g/∂x))`` at the fixed point of x = y − g(x)."""
        g = self.net.at(condition)
        x = _fixed_point(g, self._flat(y), self.net.lipschitz)
        return x.reshape(y.shape), -self._log_det(g, x, key)

    def points(self, direction, x, condition=None, *, key=None):
        """The image alone, which needs no key."""
        g = self.net.at(condition)
        h = self._flat(x)
        h = h + g(h) if direction == "forward" else _fixed_point(g, h, self.net.lipschitz)
        return h.reshape(x.shape)


def with_log_det(tree: T, log_det: LogDet, **options: int) -> T:
    """The same transform or flow with another log-det in every `Residual` in it.

    Train with ``"roulette"``, say, and evaluate with ``"exact"``.

    Args:
        tree: A transform, a flow, or any tree that holds some.
        log_det: See `Residual`.
        **options: ``terms`` and ``probes``, kept where not given.
    """

    def change(part):
        if not isinstance(part, Residual):
            return part
        return dataclasses.replace(part, log_det=log_det, **options)

    return jtu.tree_map(change, tree, is_leaf=lambda part: isinstance(part, Residual))


@eqx.filter_checkpoint
def _explicit(layer: Residual, x: Array, condition: Array | None, key: PRNGKeyArray | None):
    # The gradient keeps the input alone: to compute the slopes of all units, along every vector,
    # again is faster than to write and read them, and memory grows with depth by (D,) for an event.
    g = layer.net.at(condition)
    return x + g(x), layer._log_det(g, x, key)


def _exact(g: Contraction, x: Array) -> Array:
    """The log-det of I + J by the whole Jacobian, ``(*batch)`` for ``(D, *batch)``."""
    dim, batch = x.shape[0], x.shape[1:]
    eye = jnp.broadcast_to(expand(jnp.eye(dim, dtype=x.dtype), 1 + x.ndim), (dim, dim, *batch))
    jacobian = jnp.moveaxis(eye + g.linear(x)[0](eye), (0, 1), (-2, -1))
    return jnp.linalg.slogdet(jacobian)[1]


def _estimate(
    g: Contraction, x: Array, signs: Array, count: Array, always: int, go_on: float | None
) -> Array:
    """The series up to the term `count`, with the Neumann series as its gradient.

    Args:
        g: The network.
        x: ``(D, *batch)``.
        signs: The vectors v, ``(D, probes, *batch)``.
        count: How many terms are computed.
        always: How many are computed in any case.
        go_on: With which probability each further term is; None if there are none.
    """
    still_g, still_x = jtu.tree_map(lax.stop_gradient, (g, x))
    _, pull = still_g.linear(still_x)

    def step(state):
        k, w, value, u = state
        w = -pull(w)
        late = jnp.maximum(k - always, 0).astype(x.dtype)
        weight = jnp.ones((), x.dtype) if go_on is None else jnp.exp(-math.log(go_on) * late)
        value = value - weight / k.astype(x.dtype) * jnp.sum(w * signs, 0)
        # The derivative of a truncated series has a term less.
        used = weight if go_on is not None else jnp.where(k < count, weight, 0)
        return k + 1, w, value, u + used * w

    start = (jnp.ones((), count.dtype), signs, jnp.zeros_like(signs[0]), signs)
    _, _, value, u = lax.while_loop(lambda state: state[0] <= count, step, start)
    carrier = jnp.sum(u * g.linear(x)[0](signs), 0)
    return jnp.mean(value + (carrier - lax.stop_gradient(carrier)), 0)


def _fixed_point(g: Callable, y: Array, lipschitz: float) -> Array:
    """Solve x + g(x) = y, with implicit derivatives."""
    most = math.ceil(math.log(jnp.finfo(y.dtype).eps) / math.log(lipschitz)) + _SPARE_STEPS

    def residual(x):
        return x + g(x) - y

    def solve(f, start):
        return _iterate(lambda x: x - f(x), start, most)

    def neumann(product, b):
        return _iterate(lambda v: v + (b - product(v)), b, most)

    def solve_tangent(product, b):
        return lax.custom_linear_solve(product, b, neumann, neumann)

    return lax.custom_root(residual, y, solve, solve_tangent)


def _iterate(step: Callable[[Array], Array], start: Array, most: int) -> Array:
    """Repeat until no event moves by more than rounding."""
    eps = float(jnp.finfo(start.dtype).eps)

    def moving(state):
        count, x, change = state
        moved = jnp.max(jnp.abs(change), 0) > 4 * eps * jnp.max(jnp.abs(x), 0)
        return (count < most) & jnp.any(moved)

    def body(state):
        count, x, _ = state
        new = step(x)
        return count + 1, new, new - x

    first = step(start)
    return lax.while_loop(moving, body, (jnp.zeros((), jnp.int32), first, first - start))[1]
