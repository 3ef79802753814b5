"""Invertible linear maps of vectors, and the data-dependent affine map ActNorm.

All of them act from the left on features-major arrays ``(D, *batch)``: one product or one
triangular solve with the whole batch as right-hand sides. Products ask for full precision, because
a map and its inverse must agree to rounding. Every map starts as the identity; `LU` may start as
a permutation, `Matrix` as a rotation, and `DCT`, which is not trained, is what it is.
"""

import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.scipy.fft import dct, idct
from jax.scipy.linalg import lu_factor, lu_solve, solve_triangular

from laminar._errors import InputError, ShapeError
from laminar._params import expand, positive
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractBijection


class Triangular(AbstractBijection):
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
    in_shape: Shape = eqx.field(static=True)
    lower: bool = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(self, dim: int, *, lower: bool = True, bias: bool = True):
        _check_dim("Triangular", dim)
        self.raw = jnp.zeros((dim, dim))
        self.shift = jnp.zeros((dim,)) if bias else None
        self.in_shape = (dim,)
        self.lower = lower
        self.cond_shape = None

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

    @property
    def matrix(self) -> Array:
        """T, of shape (D, D)."""
        strict = jnp.tril(self.raw, -1) if self.lower else jnp.triu(self.raw, 1)
        return strict + jnp.diag(positive(jnp.diagonal(self.raw)))

    def forward(self, x, condition=None, *, key=None):
        """``(T x + b, Σ ln T_ii)``."""
        y = _add(_product(self.matrix, x), self.shift)
        return y, _fill(jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(T⁻¹ (y − b), −Σ ln T_ii)``."""
        x = _solve(self.matrix, _subtract(y, self.shift), lower=self.lower)
        return x, _fill(-jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), y)


class LU(AbstractBijection):
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
    in_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(self, dim: int, *, key: PRNGKeyArray | None = None, bias: bool = True):
        _check_dim("LU", dim)
        self.raw = jnp.zeros((dim, dim))
        self.shift = jnp.zeros((dim,)) if bias else None
        index = jnp.arange(dim) if key is None else jr.permutation(key, dim)
        self.index = index.astype(jnp.int32)
        self.back = jnp.argsort(index).astype(jnp.int32)
        self.in_shape = (dim,)
        self.cond_shape = None

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

    def _factors(self) -> tuple[Array, Array]:
        return _lu_factors(self.raw)

    @property
    def matrix(self) -> Array:
        """P L U, of shape (D, D)."""
        lower, upper = self._factors()
        return _product(lower, upper)[self.index]

    def forward(self, x, condition=None, *, key=None):
        """``(P L U x + b, Σ ln U_ii)``."""
        lower, upper = self._factors()
        y = _take(_product(lower, _product(upper, x)), self.index)
        return _add(y, self.shift), _fill(jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(U⁻¹ L⁻¹ Pᵀ (y − b), −Σ ln U_ii)``."""
        lower, upper = self._factors()
        x = _take(_subtract(y, self.shift), self.back)
        x = _solve(lower, x, lower=True, unit=True)
        x = _solve(upper, x, lower=False)
        return x, _fill(-jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), y)


class Householder(AbstractBijection):
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
    in_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(self, dim: int, reflections: int | None = None, *, key: PRNGKeyArray):
        _check_dim("Householder", dim)
        count = dim + dim % 2 if reflections is None else reflections
        if count < 1:
            raise InputError(f"Householder needs at least one reflection, not {count}.")
        half = jr.normal(key, (dim, (count + 1) // 2))
        self.vectors = jnp.repeat(half, 2, axis=1)[:, :count]
        self.in_shape = (dim,)
        self.cond_shape = None

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

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
        s = jnp.triu(_product(v.T, v), 1) + 0.5 * jnp.eye(v.shape[1], dtype=v.dtype)
        return v, s

    @property
    def matrix(self) -> Array:
        """Q, of shape (D, D)."""
        return self.forward(jnp.eye(self.in_shape[0], dtype=self.vectors.dtype))[0]

    def forward(self, x, condition=None, *, key=None):
        """``(x − V S⁻¹ Vᵀ x, 0)``."""
        v, s = self._factors()
        u = _solve(s, _product(v.T, x), lower=False)
        return x - _product(v, u), _fill(jnp.zeros((), x.dtype), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(y − V S⁻ᵀ Vᵀ y, 0)``: the transpose."""
        v, s = self._factors()
        u = _solve(s.T, _product(v.T, y), lower=True)
        return y - _product(v, u), _fill(jnp.zeros((), y.dtype), y)


class LowRank(AbstractBijection):
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
    in_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(self, dim: int, rank: int, *, key: PRNGKeyArray, bias: bool = True):
        _check_dim("LowRank", dim)
        if not 1 <= rank <= dim:
            raise InputError(f"LowRank: the rank must lie between 1 and {dim}, not {rank}.")
        self.basis = jr.normal(key, (dim, rank))
        self.outer = jnp.zeros((dim, rank))
        self.raw = jnp.zeros((rank, rank))
        self.shift = jnp.zeros((dim,)) if bias else None
        self.in_shape = (dim,)
        self.cond_shape = None

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

    def _factors(self) -> tuple[Array, Array]:
        """U and V."""
        v, r = jnp.linalg.qr(self.basis)
        # The factorisation is unique, hence smooth in the basis, once the diagonal is positive.
        v = v * jnp.where(jnp.diag(r) < 0, -1.0, 1.0).astype(v.dtype)[None]
        lower, upper = _lu_factors(self.raw)
        c = _product(lower, upper) - jnp.eye(self.raw.shape[0], dtype=v.dtype)
        return _product(v, c - _product(v.T, self.outer)) + self.outer, v

    @property
    def matrix(self) -> Array:
        """I + U Vᵀ, of shape (D, D)."""
        u, v = self._factors()
        return jnp.eye(self.in_shape[0], dtype=u.dtype) + _product(u, v.T)

    def forward(self, x, condition=None, *, key=None):
        """``(x + U Vᵀ x + b, ln det C)``."""
        u, v = self._factors()
        y = _add(x + _product(u, _product(v.T, x)), self.shift)
        return y, _fill(jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(x − U C⁻¹ Vᵀ x, −ln det C)`` at x = y − b."""
        u, v = self._factors()
        lower, upper = _lu_factors(self.raw)
        x = _subtract(y, self.shift)
        w = _solve(lower, _product(v.T, x), lower=True, unit=True)
        w = _solve(upper, w, lower=False)
        return x - _product(u, w), _fill(-jnp.sum(jnp.log(positive(jnp.diagonal(self.raw)))), y)


class Matrix(AbstractBijection):
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
    in_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(self, dim: int, *, key: PRNGKeyArray | None = None, bias: bool = True):
        _check_dim("Matrix", dim)
        self.matrix = jnp.eye(dim) if key is None else jr.orthogonal(key, dim)
        self.shift = jnp.zeros((dim,)) if bias else None
        self.in_shape, self.cond_shape = (dim,), None

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

    def forward(self, x, condition=None, *, key=None):
        """``(W x + b, ln |det W|)``."""
        log_det = _fill(jnp.linalg.slogdet(self.matrix)[1], x)
        return _add(_product(self.matrix, x), self.shift), log_det

    def inverse(self, y, condition=None, *, key=None):
        """``(W⁻¹ (y − b), −ln |det W|)``."""
        columns = _subtract(y, self.shift).reshape(y.shape[0], math.prod(y.shape[1:]))
        factors = lu_factor(self.matrix)
        x = lu_solve(factors, columns).reshape(y.shape)
        return x, _fill(-jnp.log(jnp.abs(jnp.diagonal(factors[0]))).sum(), y)


class DCT(AbstractBijection):
    r"""The orthonormal discrete cosine transform (of type II) along one axis; log-det zero.

        y_k = c_k Σ_n x_n cos(π k (2n + 1) / 2N),    c_0 = √(1/N),  c_k = √(2/N)

    It has no parameters: it mixes all positions, and parts slow changes from fast ones.

    Args:
        shape: Event shape, or a length.
        axis: An axis of the event; negative ones count from its end.

    Raises:
        ShapeError: If the event has no such axis, or nothing along it.
    """

    in_shape: Shape = eqx.field(static=True)
    axis: int = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(self, shape: int | Shape, *, axis: int = -1):
        self.in_shape = (shape,) if isinstance(shape, int) else tuple(shape)
        ndim = len(self.in_shape)
        if not -ndim <= axis < ndim or self.in_shape[axis] < 1:
            raise ShapeError(f"DCT: there is nothing along axis {axis} of {self.in_shape}.")
        self.axis = axis % ndim  # from the front, since batch axes follow
        self.cond_shape = None

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

    def _run(self, transform, x):
        y = transform(x, axis=self.axis, norm="ortho")
        return y, jnp.zeros(x.shape[len(self.in_shape) :], x.dtype)

    def forward(self, x, condition=None, *, key=None):
        """The coefficients, from slow to fast."""
        return self._run(dct, x)

    def inverse(self, y, condition=None, *, key=None):
        """The sum of cosines with these coefficients."""
        return self._run(idct, y)


class ActNorm(AbstractBijection):
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
    in_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)
    per_channel: bool = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(self, shape: int | Shape, *, per_channel: bool = False):
        self.in_shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if per_channel and not self.in_shape:
            raise ShapeError("ActNorm: per_channel needs an event with a channel axis, not ().")
        self.cond_shape = None
        self.per_channel = per_channel
        held = self.in_shape[:1] if per_channel else self.in_shape
        self.log_scale = jnp.zeros(held)
        self.shift = jnp.zeros(held)

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

    def _log_det(self, x: Array) -> Array:
        copies = math.prod(self.in_shape[1:]) if self.per_channel else 1
        return _fill(jnp.sum(self.log_scale) * copies, x, len(self.in_shape))

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


def _check_dim(owner: str, dim: int) -> None:
    if dim < 1:
        raise InputError(f"{owner}: the dimension must be at least 1, not {dim}.")


def _lu_factors(raw: Array) -> tuple[Array, Array]:
    """L with unit diagonal and U with positive diagonal, from one square array."""
    lower = jnp.tril(raw, -1) + jnp.eye(raw.shape[0], dtype=raw.dtype)
    return lower, jnp.triu(raw, 1) + jnp.diag(positive(jnp.diagonal(raw)))


def _product(matrix: Array, x: Array) -> Array:
    """The product W x of (M, N) with (N, *batch), at full precision on every device."""
    return jnp.tensordot(matrix, x, axes=1, precision=lax.Precision.HIGHEST)


def _solve(matrix: Array, y: Array, *, lower: bool, unit: bool = False) -> Array:
    """The solution of a triangular system with the batch, flattened, as right-hand sides."""
    columns = y.reshape(y.shape[0], math.prod(y.shape[1:]))
    x = solve_triangular(matrix, columns, lower=lower, unit_diagonal=unit)
    return x.reshape(y.shape)


def _take(x: Array, index: Array) -> Array:
    return jnp.take(x, index, axis=0, unique_indices=True, mode="clip")


def _add(x: Array, shift: Array | None) -> Array:
    return x if shift is None else x + expand(shift, x.ndim)


def _subtract(y: Array, shift: Array | None) -> Array:
    return y if shift is None else y - expand(shift, y.ndim)


def _fill(log_det: Array, x: Array, event_ndim: int = 1) -> Array:
    """One log-det for all events of a batch."""
    return jnp.broadcast_to(log_det, x.shape[event_ndim:])
