"""Invertible linear maps of vectors, and the data-dependent affine map ActNorm.

All of them act from the left on features-major arrays ``(D, *batch)``: one product or one
triangular solve with the whole batch as right-hand sides. Products ask for full precision, because
a map and its inverse must agree to rounding. Every map starts as the identity; `LU` may start as
a permutation, `Matrix` as a rotation, and `DCT`, which is not trained, is what it is.
"""

import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.scipy.fft import dct, idct
from jax.scipy.linalg import lu_factor, lu_solve

from laminar._errors import InputError, ShapeError
from laminar._params import expand, positive
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections._matrices import add, fill, product, solve, subtract, take
from laminar.bijections.base import AbstractBijection
from laminar.bijections.frames import AbstractShaped, AbstractTwoWay, AbstractVectorMap


class Triangular(AbstractVectorMap):
    r"""y = T x + b with a triangular matrix T of positive diagonal.

        log_det = Σ_i ln T_ii

    One array ``raw`` of shape (D, D) holds the parameters: its strict triangle is that of T, and
    its diagonal gives T_ii = softplus(raw_ii + ln(e − 1)), so zero means the identity. ``forward``
    is a product, ``inverse`` a triangular solve; both cost D² per event.

    Args:
        dim: D.
        lower: Whether T is lower triangular (otherwise upper).
        bias: Whether there is a shift b.
    """

    raw: Array
    shift: Array | None
    lower: bool = eqx.field(static=True)

    def __init__(self, dim: int, *, lower: bool = True, bias: bool = True):
        super().__init__(dim)
        self.raw = jnp.zeros((dim, dim))
        self.shift = jnp.zeros((dim,)) if bias else None
        self.lower = lower

    @property
    def matrix(self) -> Array:
        """T, of shape (D, D)."""
        strict = jnp.tril(self.raw, -1) if self.lower else jnp.triu(self.raw, 1)
        return strict + jnp.diag(positive(jnp.diagonal(self.raw)))

    def forward(self, x, condition=None, *, key=None):
        """``(T x + b, Σ ln T_ii)``."""
        y = add(product(self.matrix, x), self.shift)
        return y, fill(jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(T⁻¹ (y − b), −Σ ln T_ii)``."""
        x = solve(self.matrix, subtract(y, self.shift), lower=self.lower)
        return x, fill(-jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), y)


class LU(AbstractVectorMap):
    r"""y = P L U x + b: any invertible matrix up to the signs of its pivots.

    L is lower triangular with unit diagonal, U upper triangular with positive diagonal, and P a
    fixed permutation (Kingma & Dhariwal 2018, §3.2; Oliva et al. 2018):

        log_det = Σ_i ln U_ii

    One array ``raw`` of shape (D, D) holds both factors: the strict lower triangle is that of L,
    the strict upper one that of U, and U_ii = softplus(raw_ii + ln(e − 1)). Zero means y = P x.
    ``inverse`` makes two triangular solves and costs 2 D² per event, as does ``forward``.

    Args:
        dim: D.
        key: Draws the permutation; without a key, P is the identity.
        bias: Whether there is a shift b.
    """

    raw: Array
    shift: Array | None
    index: Array
    back: Array

    def __init__(self, dim: int, *, key: PRNGKeyArray | None = None, bias: bool = True):
        super().__init__(dim)
        self.raw = jnp.zeros((dim, dim))
        self.shift = jnp.zeros((dim,)) if bias else None
        index = jnp.arange(dim) if key is None else jr.permutation(key, dim)
        self.index = index.astype(jnp.int32)
        self.back = jnp.argsort(index).astype(jnp.int32)

    def _factors(self) -> tuple[Array, Array]:
        return _lu_factors(self.raw)

    @property
    def matrix(self) -> Array:
        """P L U, of shape (D, D)."""
        lower, upper = self._factors()
        return product(lower, upper)[self.index]

    def forward(self, x, condition=None, *, key=None):
        """``(P L U x + b, Σ ln U_ii)``."""
        lower, upper = self._factors()
        y = take(product(lower, product(upper, x)), self.index)
        return add(y, self.shift), fill(jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(U⁻¹ L⁻¹ Pᵀ (y − b), −Σ ln U_ii)``."""
        lower, upper = self._factors()
        x = take(subtract(y, self.shift), self.back)
        x = solve(lower, x, lower=True, unit=True)
        x = solve(upper, x, lower=False)
        return x, fill(-jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), y)


class Householder(AbstractVectorMap):
    r"""y = H_1 H_2 … H_K x, an orthogonal map as a product of reflections; log-det zero.

    H_k = I − 2 v_k v_kᵀ / |v_k|² (Tomczak & Welling 2016). D reflections reach every orthogonal
    matrix of determinant (−1)^D. The product is applied at once in its compact form

        Q = I − V S⁻¹ Vᵀ,    S = ½ diag(VᵀV) + strict upper triangle of VᵀV

    with V = [v_1 … v_K] (Joffrain et al. 2006), so an event costs two thin products and a
    triangular solve of size K, however many reflections there are.

    Args:
        dim: D.
        reflections: K, by default D rounded up to an even number. The vectors start in equal
            pairs, so an even K starts at the identity and an odd one at a single reflection.
        key: Draws the vectors.
    """

    vectors: Array

    def __init__(self, dim: int, reflections: int | None = None, *, key: PRNGKeyArray):
        super().__init__(dim)
        count = dim + dim % 2 if reflections is None else reflections
        if count < 1:
            raise InputError(f"Householder needs at least one reflection, not {count}.")
        half = jr.normal(key, (dim, (count + 1) // 2))
        self.vectors = jnp.repeat(half, 2, axis=1)[:, :count]

    def _factors(self) -> tuple[Array, Array]:
        """V with columns of unit length, and S."""
        v = self.vectors
        # Divide by the largest entry first: neither huge nor tiny vectors lose their direction,
        # and a column of zeros stands for the first axis. The direction does not depend on the
        # divisor, so no gradient is lost by stopping it there.
        largest = lax.stop_gradient(jnp.max(jnp.abs(v), axis=0, keepdims=True))
        axis = (jnp.arange(v.shape[0]) == 0).astype(v.dtype)[:, None]
        zero = largest == 0
        v = jnp.where(zero, axis, v / jnp.where(zero, jnp.ones_like(largest), largest))
        v = v / jnp.sqrt(jnp.sum(v**2, axis=0, keepdims=True))
        s = jnp.triu(product(v.T, v), 1) + 0.5 * jnp.eye(v.shape[1], dtype=v.dtype)
        return v, s

    @property
    def matrix(self) -> Array:
        """Q, of shape (D, D)."""
        return self.forward(jnp.eye(self.in_shape[0], dtype=self.vectors.dtype))[0]

    def forward(self, x, condition=None, *, key=None):
        """``(x − V S⁻¹ Vᵀ x, 0)``."""
        v, s = self._factors()
        u = solve(s, product(v.T, x), lower=False)
        return x - product(v, u), fill(jnp.zeros((), x.dtype), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(y − V S⁻ᵀ Vᵀ y, 0)``: the transpose."""
        v, s = self._factors()
        u = solve(s.T, product(v.T, y), lower=True)
        return y - product(v, u), fill(jnp.zeros((), y.dtype), y)


class LowRank(AbstractVectorMap):
    r"""y = (I + U Vᵀ) x + b with U and V of shape (D, R): cheap mixing of many dimensions.

    By the matrix determinant lemma and Woodbury's identity, with C = I + VᵀU,

        log_det = ln det C,        (I + U Vᵀ)⁻¹ = I − U C⁻¹ Vᵀ

    so an event costs D R. The map is invertible at all parameters, because C is a parameter: V is
    the orthonormal factor of ``basis``, and

        U = V (C − I) + (I − V Vᵀ) ``outer``

    which has VᵀU = C − I. C = L·T is a product of a lower triangular matrix of unit diagonal and
    an upper one of positive diagonal, kept in one array as in `LU`. The map starts at the identity.

    Args:
        dim: D.
        rank: R, between 1 and D.
        key: Draws the basis.
        bias: Whether there is a shift b.
    """

    basis: Array
    outer: Array
    raw: Array
    shift: Array | None

    def __init__(self, dim: int, rank: int, *, key: PRNGKeyArray, bias: bool = True):
        super().__init__(dim)
        if not 1 <= rank <= dim:
            raise InputError(f"LowRank: the rank must lie between 1 and {dim}, not {rank}.")
        self.basis = jr.normal(key, (dim, rank))
        self.outer = jnp.zeros((dim, rank))
        self.raw = jnp.zeros((rank, rank))
        self.shift = jnp.zeros((dim,)) if bias else None

    def _factors(self) -> tuple[Array, Array]:
        """U and V."""
        v, r = jnp.linalg.qr(self.basis)
        # The factorisation is unique, hence smooth in the basis, once the diagonal is positive.
        v = v * jnp.where(jnp.diag(r) < 0, -1.0, 1.0).astype(v.dtype)[None]
        lower, upper = _lu_factors(self.raw)
        c = product(lower, upper) - jnp.eye(self.raw.shape[0], dtype=v.dtype)
        return product(v, c - product(v.T, self.outer)) + self.outer, v

    @property
    def matrix(self) -> Array:
        """I + U Vᵀ, of shape (D, D)."""
        u, v = self._factors()
        return jnp.eye(self.in_shape[0], dtype=u.dtype) + product(u, v.T)

    def forward(self, x, condition=None, *, key=None):
        """``(x + U Vᵀ x + b, ln det C)``."""
        u, v = self._factors()
        y = add(x + product(u, product(v.T, x)), self.shift)
        return y, fill(jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(x − U C⁻¹ Vᵀ x, −ln det C)`` at x = y − b."""
        u, v = self._factors()
        lower, upper = _lu_factors(self.raw)
        x = subtract(y, self.shift)
        w = solve(lower, product(v.T, x), lower=True, unit=True)
        w = solve(upper, w, lower=False)
        return x - product(u, w), fill(-jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), y)


class Matrix(AbstractVectorMap):
    r"""y = W x + b with any square matrix W (Kingma & Dhariwal 2018, §3.2).

        log_det = ln |det W|

    Nothing holds W away from singular matrices but the log-det itself; where it is singular the
    inverse is not finite. The determinant and the solution cost D³, once for a batch; see `LU` for
    a form that is invertible at all parameters.

    Args:
        dim: D.
        key: Draws a random rotation to start from; without a key, W is the identity.
        bias: Whether there is a shift b.
    """

    matrix: Array
    shift: Array | None

    def __init__(self, dim: int, *, key: PRNGKeyArray | None = None, bias: bool = True):
        super().__init__(dim)
        self.matrix = jnp.eye(dim) if key is None else jr.orthogonal(key, dim)
        self.shift = jnp.zeros((dim,)) if bias else None

    def forward(self, x, condition=None, *, key=None):
        """``(W x + b, ln |det W|)``."""
        log_det = fill(jnp.linalg.slogdet(self.matrix)[1], x)
        return add(product(self.matrix, x), self.shift), log_det

    def inverse(self, y, condition=None, *, key=None):
        """``(W⁻¹ (y − b), −ln |det W|)``."""
        columns = subtract(y, self.shift).reshape(y.shape[0], math.prod(y.shape[1:]))
        factors = lu_factor(self.matrix)
        x = lu_solve(factors, columns).reshape(y.shape)
        return x, fill(-jnp.log(jnp.abs(jnp.diagonal(factors[0]))).sum(), y)


class DCT(AbstractShaped, AbstractTwoWay, AbstractBijection):
    r"""The orthonormal discrete cosine transform (of type II) along one axis; log-det zero.

        y_k = c_k Σ_n x_n cos(π k (2n + 1) / 2N),    c_0 = √(1/N),  c_k = √(2/N)

    It has no parameters: it mixes all positions, and parts slow changes from fast ones.

    Args:
        shape: Event shape, or a length.
        axis: An axis of the event; negative ones count from its end.

    Raises:
        ShapeError: If the event has no such axis, or nothing along it.
    """

    axis: int = eqx.field(static=True)

    def __init__(self, shape: int | Shape, *, axis: int = -1):
        super().__init__(shape)
        ndim = len(self.in_shape)
        if not -ndim <= axis < ndim or self.in_shape[axis] < 1:
            raise ShapeError(f"DCT: there is nothing along axis {axis} of {self.in_shape}.")
        self.axis = axis % ndim  # from the front, since batch axes follow

    def _run(self, direction, x, condition, key):
        y = (dct if direction == "forward" else idct)(x, axis=self.axis, norm="ortho")
        return y, jnp.zeros(x.shape[len(self.in_shape) :], x.dtype)


class ActNorm(AbstractShaped, AbstractBijection):
    r"""y = exp(log_scale) · x + shift, set from a first batch (Kingma & Dhariwal 2018, §3.1).

        log_det = Σ log_scale

    `init_from_data` chooses the parameters so that the batch leaves with mean zero and standard
    deviation one in every feature; afterwards they train like any others.

    Args:
        shape: Event shape, or a length.
        per_channel: Whether all positions along the later axes share the parameters of their
            channel, the first axis, as for images of shape (C, H, W).
    """

    log_scale: Array
    shift: Array
    per_channel: bool = eqx.field(static=True)

    def __init__(self, shape: int | Shape, *, per_channel: bool = False):
        super().__init__(shape)
        if per_channel and not self.in_shape:
            raise ShapeError("ActNorm: per_channel needs an event with a channel axis, not ().")
        self.per_channel = per_channel
        held = self.in_shape[:1] if per_channel else self.in_shape
        self.log_scale = jnp.zeros(held)
        self.shift = jnp.zeros(held)

    def _log_det(self, x: Array) -> Array:
        copies = math.prod(self.in_shape[1:]) if self.per_channel else 1
        return fill(jnp.sum(self.log_scale) * copies, x, len(self.in_shape))

    def forward(self, x, condition=None, *, key=None):
        """``(exp(log_scale) x + shift, Σ log_scale)``."""
        scale, shift = expand(jnp.exp(self.log_scale), x.ndim), expand(self.shift, x.ndim)
        return scale * x + shift, self._log_det(x)

    def inverse(self, y, condition=None, *, key=None):
        """``((y − shift) exp(−log_scale), −Σ log_scale)``."""
        scale, shift = expand(jnp.exp(-self.log_scale), y.ndim), expand(self.shift, y.ndim)
        return (y - shift) * scale, -self._log_det(y)

    def init_from_data(self, data, condition=None, side="out"):
        """Standardise a batch.

        With ``side="out"`` the inverse of the data gets mean 0 and standard deviation 1, with
        ``side="in"`` their forward image does. A feature that is constant up to rounding is only
        centred: its scale stays 1.
        """
        axes = tuple(range(self.log_scale.ndim, data.ndim))
        if math.prod(data.shape[i] for i in axes) == 0:
            return self
        mean = jnp.mean(data, axis=axes, keepdims=True)
        sd = jnp.sqrt(jnp.mean((data - mean) ** 2, axis=axes))
        mean = mean.reshape(sd.shape)
        noise = 8 * float(jnp.finfo(data.dtype).eps) * jnp.max(jnp.abs(data), axis=axes)
        log_sd = jnp.log(jnp.where((sd > noise) & jnp.isfinite(sd), sd, jnp.ones_like(sd)))
        if side == "out":
            log_scale, shift = log_sd, mean
        else:
            log_scale, shift = -log_sd, -mean * jnp.exp(-log_sd)
        dtype = self.log_scale.dtype
        return eqx.tree_at(
            lambda s: (s.log_scale, s.shift), self, (log_scale.astype(dtype), shift.astype(dtype))
        )


def _lu_factors(raw: Array) -> tuple[Array, Array]:
    """L with unit diagonal and U with positive diagonal, from one square array."""
    lower = jnp.tril(raw, -1) + jnp.eye(raw.shape[0], dtype=raw.dtype)
    return lower, jnp.triu(raw, 1) + jnp.diag(positive(jnp.diagonal(raw)))
