r"""Maps that bend space along one direction, around one point, or within one subspace.

They are the flows of Rezende & Mohamed (2015) and their heirs: an event costs a few products with
vectors or thin matrices, and the log-det is exact by the matrix determinant lemma. ``forward`` is
closed and ``inverse`` needs at most equations in one unknown, s + (p − 1) tanh s = r, which
`tanh_root` solves with implicit gradients. So both directions work and can be differentiated.

Each map stays invertible through a slope p > 0, the smallest (or largest) slope it may have along
its direction. It comes from an unconstrained number a by

    p = a + √(1 + a²)

which is smooth, has p(0) = p′(0) = 1, and so leaves a map that is far from its limit as it is. All
maps start as the identity, at a point from which gradients lead away.

Parameters may carry trailing batch axes of their own, the same as the points', as networks give
them: every product is then one multiplication and sum with the batch last.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from laminar._errors import InputError, ShapeError
from laminar._params import expand, positive, positive_inverse
from laminar._typing import Array, PRNGKeyArray
from laminar.bijections._matrices import product
from laminar.bijections.compose import Permute
from laminar.bijections.frames import AbstractVectorMap

SylvesterKind = Literal["orthogonal", "householder", "triangular"]

_MOST_STEPS = 60
_HIGHEST = lax.Precision.HIGHEST


class Planar(AbstractVectorMap):
    r"""y = x + û tanh(wᵀx + b): a bend along w (Rezende & Mohamed 2015, eq. 10).

        log_det = ln(1 + wᵀû · (1 − tanh²(wᵀx + b)))

    It is invertible when wᵀû > −1 (their appendix A.1). With a = wᵀu that is kept by

        û = u + (√(1 + a²) − 1) w / |w|²,    so that 1 + wᵀû = a + √(1 + a²) > 0

    The correction vanishes with w and with u, so û is continuous at w = 0 and u = 0 is the
    identity. ``inverse`` finds s = wᵀx + b from s + wᵀû tanh s = wᵀy + b, one equation for an event
    however many dimensions it has. Both directions cost O(D).

    Args:
        dim: D.
        key: Draws w from N(0, 1/D), so that wᵀx is of order one; u and b start at zero.

    Raises:
        InputError: If `dim` is not positive.
    """

    u: Array
    w: Array
    b: Array
    batched_parameters: ClassVar[bool] = True

    def __init__(self, dim: int, *, key: PRNGKeyArray):
        super().__init__(dim)
        self.w = jr.normal(key, (dim,)) / math.sqrt(dim)
        self.u = jnp.zeros((dim,))
        self.b = jnp.zeros(())

    def _bend(self) -> tuple[Array, Array]:
        """û, and the slope 1 + wᵀû."""
        a = jnp.sum(self.w * self.u, 0)
        # a² / |w|² = (w₁ᵀu)² / |w₁|² for any multiple w₁ of w, so the largest entry is divided
        # out, and no gradient is lost by stopping it there: tiny and huge w keep their digits.
        largest = lax.stop_gradient(jnp.max(jnp.abs(self.w), 0))
        none = largest < jnp.finfo(self.w.dtype).tiny
        unit = self.w / jnp.where(none, 1, largest)[None]
        along = jnp.sum(unit * self.u, 0)
        square = along * along / jnp.where(none, 1, jnp.sum(unit * unit, 0))
        return self.u + self.w * (square / (1 + jnp.sqrt(1 + a * a)))[None], _slope(a)

    def forward(self, x, condition=None, *, key=None):
        """``(x + û tanh(wᵀx + b), ln(1 + wᵀû (1 − tanh²)))``."""
        u, slope = self._bend()
        w, u = expand(self.w, x.ndim), expand(u, x.ndim)
        t = jnp.tanh(jnp.sum(w * x, 0) + expand(self.b, x.ndim - 1))
        return x + u * t[None], jnp.log(_tanh_slope(expand(slope, t.ndim), t))

    def inverse(self, y, condition=None, *, key=None):
        """``(y − û tanh s, −ln(1 + wᵀû (1 − tanh² s)))`` at the root s."""
        u, slope = self._bend()
        w, u = expand(self.w, y.ndim), expand(u, y.ndim)
        slope = expand(slope, y.ndim - 1)
        s = tanh_root(slope, jnp.sum(w * y, 0) + expand(self.b, y.ndim - 1))
        t = jnp.tanh(s)
        return y - u * t[None], -jnp.log(_tanh_slope(slope, t))


class Radial(AbstractVectorMap):
    r"""y = x + β (x − x_0) / (α + r), r = |x − x_0|: a push from a point or a pull towards it.

    (Rezende & Mohamed 2015, eq. 14.) With ρ = r/α and β = α (p − 1), p > 0, which keeps their
    appendix's β > −α,

        log_det = (D − 1) ln((ρ + p) / (1 + ρ)) + ln(1 + (p − 1) / (1 + ρ)²)

    p is the slope at the centre and comes from one number by p = a + √(1 + a²); zero means the
    identity. The radius of the image is ρ (ρ + p) / (1 + ρ), and ``inverse`` is the positive root
    of that quadratic, so both directions are closed and cost O(D).

    Args:
        dim: D.
        key: Draws the centre x_0 from a standard normal.
        alpha: The radius α within which the map acts, > 0.

    Raises:
        InputError: If `dim` or `alpha` is not positive.
    """

    centre: Array
    raw_alpha: Array
    raw_slope: Array
    batched_parameters: ClassVar[bool] = True

    def __init__(self, dim: int, *, key: PRNGKeyArray, alpha: float = 1.0):
        super().__init__(dim)
        if not (math.isfinite(alpha) and alpha > 0):
            raise InputError(f"Radial: alpha must be positive, not {alpha}.")
        self.centre = jr.normal(key, (dim,))
        self.raw_alpha = positive_inverse(jnp.asarray(alpha, self.centre.dtype))
        self.raw_slope = jnp.zeros((), self.centre.dtype)

    def _measure(self, x: Array) -> tuple[Array, Array, Array]:
        """The offset x − x_0, the relative radius ρ, and p."""
        offset = x - expand(self.centre, x.ndim)
        alpha = expand(positive(self.raw_alpha), x.ndim - 1)
        return offset, _norm(offset) / alpha, expand(_slope(self.raw_slope), x.ndim - 1)

    def _log_det(self, rho: Array, p: Array) -> Array:
        # Sums of positive terms, with no square of ρ that could overflow.
        near, far = 1 / (1 + rho), rho / (1 + rho)
        across, along = near * p + far, near * near * p + far * (1 + near)
        return (self.in_shape[0] - 1) * jnp.log(across) + jnp.log(along)

    def forward(self, x, condition=None, *, key=None):
        """``(x_0 + (x − x_0) (ρ + p) / (1 + ρ), log_det)``."""
        offset, rho, p = self._measure(x)
        return x + offset * ((p - 1) / (1 + rho))[None], self._log_det(rho, p)

    def inverse(self, y, condition=None, *, key=None):
        """``(x_0 + (y − x_0) (1 + ρ) / (ρ + p), −log_det)`` at the root ρ."""
        offset, image, p = self._measure(y)
        gap = image - p
        # The root of ρ² = gap ρ + image, by the form that subtracts nothing. Both numbers are
        # divided by the larger one, so that no square overflows.
        size = lax.stop_gradient(jnp.maximum(jnp.abs(gap), 1) + jnp.sqrt(image))
        root = size * jnp.sqrt((gap / size) ** 2 + 4 * (image / size) / size)
        low = gap < 0
        rho = jnp.where(low, 2 * image / jnp.where(low, root - gap, 1), 0.5 * (root + gap))
        shrink = (1 - p) / (rho + p)
        return y + offset * shrink[None], -self._log_det(rho, p)


class Sylvester(AbstractVectorMap):
    r"""y = x + Q R tanh(R̃ Qᵀx + b): M bends at once in a subspace (van den Berg et al. 2018).

        log_det = Σ_i ln(1 + R_ii R̃_ii (1 − tanh² s_i)),    s = R̃ Qᵀx + b

    Q has D rows and M orthonormal columns, R and R̃ are upper triangular of size M, and
    R_ii R̃_ii > −1 keeps the map invertible. With a = r_i r̃_i of the two unconstrained diagonals,

        R̃_ii = r̃_i,    R_ii = r_i (1 + a / (1 + √(1 + a²))),    1 + R_ii R̃_ii = a + √(1 + a²)

    ``inverse`` solves for one coordinate of Qᵀx after the other, last first, each from one equation
    of one unknown; it costs about as much as ``forward``, but in M steps.

    One array ``matrix`` of shape (M, M) holds both triangles: its strict upper one is that of R,
    its strict lower one, transposed, that of R̃, and its diagonal is r. R starts at zero, so the map
    starts as the identity, and R̃ as the unit matrix.

    Args:
        dim: D.
        columns: M. For ``"orthogonal"`` from 1 to D, by default half of D, rounded up; the others
            have M = D.
        kind: Where Q comes from. ``"orthogonal"``: the first M columns of a product of M
            reflections, which reaches every Q up to signs and is orthonormal to rounding at any
            parameters. ``"householder"``: a square product of `reflections` reflections.
            ``"triangular"``: a permutation, by default the identity; give every other layer the
            reversed order.
        reflections: How many for ``"householder"``, by default D, at most 8.
        order: A permutation of 0, …, D−1 for ``"triangular"``; an array, so that stacked layers may
            differ.
        key: Draws the reflections.

    Raises:
        InputError: If a size or `kind` has no meaning, or an option belongs to another kind.
        ShapeError: If `order` has another length.
    """

    vectors: Array | None
    order: Permute | None
    matrix: Array
    scale: Array
    b: Array
    batched_parameters: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        columns: int | None = None,
        *,
        key: PRNGKeyArray,
        kind: SylvesterKind = "orthogonal",
        reflections: int | None = None,
        order: Array | None = None,
    ):
        super().__init__(dim)
        size, count = _check_sylvester(dim, columns, kind, reflections, order)
        self.vectors = self.order = None
        if kind == "triangular":
            self.order = Permute(jnp.arange(dim) if order is None else order)
        else:
            self.vectors = jr.normal(key, (dim, count))
        self.matrix = jnp.zeros((size, size))
        self.scale = jnp.ones((size,))
        self.b = jnp.zeros((size,))

    def row_cost(self, direction):
        """That of the event; ``inverse`` of a gradient keeps what its M steps left."""
        size = self.b.shape[0]
        return super().row_cost(direction) + (2 * size * size if direction == "inverse" else 0)

    def _diagonals(self) -> tuple[Array, Array]:
        """R_ii, and the slopes 1 + R_ii R̃_ii."""
        places = jnp.arange(self.b.shape[0])
        r = self.matrix[places, places]
        a = r * self.scale
        return r * (1 + a / (1 + jnp.sqrt(1 + a * a))), _slope(a)

    def _lift(self, values: Array) -> Array:
        """Q times M values, ``(D, *batch)``."""
        if self.vectors is None:
            return values if self.order is None else self.order.forward(values)[0]
        rest = self.in_shape[0] - values.shape[0]
        padding = jnp.zeros((rest, *values.shape[1:]), values.dtype)
        return _reflect(self.vectors, jnp.concatenate([values, padding]), backwards=True)

    def _project(self, x: Array) -> Array:
        """Qᵀx, ``(M, *batch)``."""
        if self.vectors is None:
            return x if self.order is None else self.order.inverse(x)[0]
        return _reflect(self.vectors, x)[: self.b.shape[0]]

    def _pre_activation(self, v: Array) -> Array:
        """The s of a projected point v = Qᵀx: R̃ v + b."""
        lower = _masked(self.matrix, jnp.tril, -1)
        inner = product(jnp.swapaxes(lower, 0, 1), v)
        return inner + expand(self.scale, v.ndim) * v + expand(self.b, v.ndim)

    def _bend(self, diagonal: Array, t: Array) -> Array:
        """The move of a point in the subspace, R t."""
        return product(_masked(self.matrix, jnp.triu, 1), t) + expand(diagonal, t.ndim) * t

    def forward(self, x, condition=None, *, key=None):
        """``(x + Q R tanh s, Σ ln(1 + R_ii R̃_ii (1 − tanh² s_i)))``."""
        diagonal, slope = self._diagonals()
        t = jnp.tanh(self._pre_activation(self._project(x)))
        log_det = jnp.log(_tanh_slope(expand(slope, x.ndim), t)).sum(0)
        return x + self._lift(self._bend(diagonal, t)), log_det

    def inverse(self, y, condition=None, *, key=None):
        """``(y − Q R tanh s, −Σ ln(1 + R_ii R̃_ii (1 − tanh² s_i)))`` at the roots s."""
        diagonal, slope = self._diagonals()
        image = self._project(y)

        def solve(known, row):
            # Coordinates not found yet are zero, so the triangles need no masks.
            v, t = known
            i, outer, inner, diagonal_i, slope_i, scale_i, b_i, image_i = row
            rest = image_i - jnp.sum(expand(outer, t.ndim) * t, 0)
            shift = jnp.sum(expand(inner, v.ndim) * v, 0) + expand(b_i, rest.ndim)
            s = tanh_root(expand(slope_i, rest.ndim), expand(scale_i, rest.ndim) * rest + shift)
            t_i = jnp.tanh(s)
            v_i = rest - expand(diagonal_i, rest.ndim) * t_i
            return (v.at[i].set(v_i), t.at[i].set(t_i)), None

        columns = jnp.swapaxes(self.matrix, 0, 1)
        places = jnp.arange(image.shape[0])
        rows = (places, self.matrix, columns, diagonal, slope, self.scale, self.b, image)
        zeros = jnp.zeros_like(image)
        (_, t), _ = lax.scan(solve, (zeros, zeros), rows, reverse=True)
        log_det = -jnp.log(_tanh_slope(expand(slope, y.ndim), t)).sum(0)
        return y - self._lift(self._bend(diagonal, t)), log_det


@jax.custom_jvp
def tanh_root(slope: Array, r: Array) -> Array:
    r"""Solve s + (p − 1) tanh s = r for s, element by element.

    The left side is odd, increasing for p > 0, and for s > 0 concave (p ≥ 1) or convex (p ≤ 1). So
    Newton's method from the bound on the right side of the root approaches it from that side alone,
    without a bracket, and stops when it no longer moves.

    Derivatives, of any order and in both modes, are those of the implicit function,
    ds = (dr − tanh s · dp) / (tanh² s + p (1 − tanh² s)).

    Args:
        slope: p > 0, the slope at zero.
        r: The right side; it broadcasts with `slope`.

    Returns:
        s of the broadcast shape; NaN where an argument is NaN.
    """
    slope, r = jnp.broadcast_arrays(slope, r)
    m, size = slope - 1, jnp.abs(r)
    steep, shallow = size / slope, size - m
    start = jnp.where(m >= 0, jnp.maximum(steep, shallow), jnp.minimum(steep, shallow))
    eps = float(jnp.finfo(r.dtype).eps)

    def step(state):
        count, s, _ = state
        t = jnp.tanh(s)
        new = s - (_less_tanh(s, t) + slope * t - size) / _tanh_slope(slope, t)
        # An infinite r is its own root, where the difference has no value.
        new = jnp.where(jnp.isnan(new), s, jnp.maximum(new, 0))
        return count + 1, new, jnp.any(jnp.abs(new - s) > 2 * eps * s)

    def unsettled(state):
        count, _, moved = state
        return moved & (count < _MOST_STEPS)

    first = (jnp.zeros((), jnp.int32), start, jnp.asarray(True))
    _, s, _ = lax.while_loop(unsettled, step, first)
    return jnp.copysign(s, r)


@tanh_root.defjvp
def _tanh_root_jvp(primals, tangents):
    slope, r = primals
    slope_dot, r_dot = tangents
    s = tanh_root(slope, r)
    t = jnp.tanh(s)
    return s, (r_dot - t * slope_dot) / _tanh_slope(slope, t)


def _slope(a: Array) -> Array:
    """The slope a + √(1 + a²), which is e^{arsinh a}, without cancellation for negative a."""
    root = jnp.sqrt(1 + a * a) + jnp.abs(a)
    return jnp.where(a < 0, 1 / root, root)


def _tanh_slope(slope: Array, t: Array) -> Array:
    """1 + (p − 1)(1 − t²) as a sum of positive terms."""
    return t * t + slope * (1 - t) * (1 + t)


def _less_tanh(s: Array, t: Array) -> Array:
    """The difference s − t for s ≥ 0 and t = tanh s, by its series where it would lose digits."""
    square = s * s
    series = jnp.zeros_like(s)
    for term in (-21844 / 6081075, 1382 / 155925, -62 / 2835, 17 / 315, -2 / 15, 1 / 3):
        series = square * series + term
    return jnp.where(s < 0.1, s * square * series, s - t)


def _norm(x: Array) -> Array:
    """The length of vectors ``(D, *batch)``, with a gradient of zero at the origin."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), 0))
    none = largest == 0
    largest = jnp.where(none, 1, largest)
    square = jnp.sum((x / largest[None]) ** 2, 0)
    return jnp.where(none, 0, largest * jnp.sqrt(jnp.where(none, 1, square)))


def _unit(x: Array) -> Array:
    """Vectors ``(D, *batch)`` at length one; a vector of zeros stands for the first axis."""
    length = _norm(x)
    none = length == 0
    axis = expand((jnp.arange(x.shape[0]) == 0).astype(x.dtype), x.ndim)
    return jnp.where(none[None], axis, x / jnp.where(none, 1, length)[None])


def _masked(matrix: Array, triangle: Callable[..., Array], offset: int) -> Array:
    """A triangle of matrices ``(M, M, *batch)``."""
    mask = triangle(jnp.ones(matrix.shape[:2], matrix.dtype), offset)
    return matrix * expand(mask, matrix.ndim)


def _reflect(vectors: Array, x: Array, backwards: bool = False) -> Array:
    """Reflect points ``(D, *batch)`` at each column of ``(D, K)``, the last one first if backwards.

    With vectors for each point the reflections run one by one. Otherwise they are applied at once,
    as I − V T Vᵀ with T upper triangular (Schreiber & Van Loan 1989), by two thin products.
    """
    v = _unit(vectors)
    if v.ndim > 2:

        def turn(x, v):
            return x - v * (2 * jnp.sum(v * x, 0))[None], None

        return lax.scan(turn, x, jnp.moveaxis(v, 1, 0), reverse=backwards)[0]
    gram = product(v.T, v)

    def extend(factor, column):
        i, products = column
        new = -2 * jnp.matmul(factor, products, precision=_HIGHEST)
        return factor.at[:, i].set(new.at[i].set(2)), None

    # Columns still to come are zero, so each product sees only the earlier ones.
    start = jnp.zeros_like(gram)
    factor, _ = lax.scan(extend, start, (jnp.arange(v.shape[1]), gram))
    # H_1 … H_K is I − V T Vᵀ, and takes the last one first; its transpose the first one first.
    factor = factor if backwards else factor.T
    return x - product(v, product(factor, product(v.T, x)))


def _check_sylvester(
    dim: int, columns: int | None, kind: str, reflections: int | None, order: Array | None
) -> tuple[int, int]:
    """M, and how many reflections make Q."""
    if kind not in get_args(SylvesterKind):
        raise InputError(
            f"Sylvester: kind must be 'orthogonal', 'householder' or 'triangular', not {kind!r}."
        )
    if reflections is not None and kind != "householder":
        raise InputError(f"Sylvester: reflections belong to kind='householder', not {kind!r}.")
    if reflections is not None and reflections < 1:
        raise InputError(f"Sylvester: reflections must be at least 1, not {reflections}.")
    if order is not None and kind != "triangular":
        raise InputError(f"Sylvester: an order belongs to kind='triangular', not {kind!r}.")
    if order is not None and jnp.shape(order) != (dim,):
        raise ShapeError(f"Sylvester: an order of shape {jnp.shape(order)} for events ({dim},).")
    if columns is None:
        columns = (dim + 1) // 2 if kind == "orthogonal" else dim
    if not 1 <= columns <= dim or (kind != "orthogonal" and columns != dim):
        allowed = f"from 1 to {dim}" if kind == "orthogonal" else str(dim)
        raise InputError(f"Sylvester: kind={kind!r} has {allowed} columns, not {columns}.")
    if kind == "orthogonal":
        return columns, columns
    return columns, min(dim, 8) if reflections is None else reflections
