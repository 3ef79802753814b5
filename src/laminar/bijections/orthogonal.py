r"""Linear maps made of orthogonal ones, and the matrix exponential.

They act like those of `laminar.bijections.linear`: from the left on ``(D, *batch)``, in full
precision, with one log-det for all events. All start as the identity.
"""

import abc

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax.scipy.linalg import expm

from laminar._checks import check_sizes
from laminar._params import partition
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections._matrices import add, fill, product, subtract
from laminar.bijections.base import AbstractBijection
from laminar.bijections.compose import Chain
from laminar.bijections.elementwise import Affine
from laminar.bijections.frames import (
    AbstractSameShape,
    AbstractTwoWay,
    AbstractUnconditional,
    AbstractVectorMap,
)
from laminar.bijections.linear import Householder, Triangular


class AbstractFactored(AbstractSameShape, AbstractTwoWay, AbstractUnconditional, AbstractBijection):
    """A linear map kept as factors that are linear maps themselves."""

    @property
    @abc.abstractmethod
    def factors(self) -> tuple[AbstractBijection, ...]:
        """The factors, first applied first."""

    @property
    def in_shape(self) -> Shape:
        """``(D,)``."""
        return self.factors[0].in_shape

    @property
    def matrix(self) -> Array:
        """The matrix, of shape (D, D)."""
        dtype = jnp.result_type(*jtu.tree_leaves(partition(self)[0]))
        eye = jnp.eye(self.in_shape[0], dtype=dtype)
        # The derivative, not a difference of images, which a large shift would round.
        return jax.jvp(lambda x: self.forward(x)[0], (jnp.zeros_like(eye),), (eye,))[1]

    def _run(self, direction, x, condition, key):
        return getattr(Chain(self.factors), direction)(x)


class SVD(AbstractFactored):
    r"""y = U (S V x + b), by its singular values: two products of reflections and a scale.

        log_det = Σ_i ln s_i

    U and V are `Householder` products, S = diag(s) with s_i = softplus(raw_i + ln(e − 1)) > 0, so
    how much the map stretches can be read and bounded. (Zhang et al. 2018, "Stabilizing Gradients
    for Deep Neural Networks via Efficient SVD Parameterization".) Both directions cost about four
    thin products of K reflections.

    Args:
        dim: D.
        reflections: K of each orthogonal factor, by default D rounded up to an even number.
        key: Draws the reflections.

    Raises:
        InputError: If a size is not positive.
    """

    left: Householder
    scale: Affine
    right: Householder

    def __init__(self, dim: int, reflections: int | None = None, *, key: PRNGKeyArray):
        check_sizes("SVD", dim=dim)
        left_key, right_key = jr.split(key)
        self.left = Householder(dim, reflections, key=left_key)
        self.scale = Affine(shape=(dim,))
        self.right = Householder(dim, reflections, key=right_key)

    @property
    def factors(self):
        """V, then S with the shift, then U."""
        return self.right, self.scale, self.left


class QR(AbstractFactored):
    r"""y = Q (R x + b) with an orthogonal Q and an upper triangular R of positive diagonal.

        log_det = Σ_i ln R_ii

    Q is a `Householder` product, R a `Triangular`. With K ≥ D − 1 every invertible matrix whose
    determinant has the sign (−1)^K is reached, without the fixed permutation that `LU` needs
    (Hoogeboom et al. 2019, "Emerging Convolutions for Generative Normalizing Flows").

    Args:
        dim: D.
        reflections: K, by default D rounded up to an even number.
        key: Draws the reflections.
        bias: Whether there is a shift b.

    Raises:
        InputError: If a size is not positive.
    """

    orthogonal: Householder
    triangular: Triangular

    def __init__(
        self, dim: int, reflections: int | None = None, *, key: PRNGKeyArray, bias: bool = True
    ):
        check_sizes("QR", dim=dim)
        self.orthogonal = Householder(dim, reflections, key=key)
        self.triangular = Triangular(dim, lower=False, bias=bias)

    @property
    def factors(self):
        """R with the shift, then Q."""
        return self.triangular, self.orthogonal


class Cayley(AbstractVectorMap):
    r"""y = (I + A)⁻¹ (I − A) x, a rotation by the Cayley transform of A = −Aᵀ; log-det zero.

    A is the strict lower triangle of ``raw`` less its transpose, so any numbers will do and zero
    means the identity. Every rotation without the eigenvalue −1 is reached, by one smooth chart,
    whereas a `Householder` product has many parameters for each. The singular values of I + A lie
    between 1 and 1 + |A|, so the one solve, y = 2 (I + A)⁻¹ x − x, never fails, and the rotation is
    exact to about |A| roundings. It costs D³ once and D² for each event.

    Args:
        dim: D.

    Raises:
        InputError: If `dim` is not positive.
    """

    raw: Array

    def __init__(self, dim: int):
        super().__init__(dim)
        self.raw = jnp.zeros((dim, dim))

    @property
    def matrix(self) -> Array:
        """Q, of shape (D, D)."""
        return self.forward(jnp.eye(self.in_shape[0], dtype=self.raw.dtype))[0]

    def _turn(self, x: Array, sign: int) -> Array:
        lower = jnp.tril(self.raw, -1)
        system = jnp.eye(len(lower), dtype=lower.dtype) + sign * (lower - lower.T)
        columns = x.reshape((x.shape[0], -1)) if x.size else x.reshape((x.shape[0], 0))
        with jax.default_matmul_precision("highest"):
            half = jnp.linalg.solve(system, columns)
        return 2 * half.reshape(x.shape) - x

    def forward(self, x, condition=None, *, key=None):
        """``(2 (I + A)⁻¹ x − x, 0)``."""
        return self._turn(x, 1), fill(jnp.zeros((), x.dtype), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(2 (I − A)⁻¹ y − y, 0)``: the transpose."""
        return self._turn(y, -1), fill(jnp.zeros((), y.dtype), y)


class MatrixExponential(AbstractVectorMap):
    r"""y = exp(A) x + b for any square matrix A (Xiao & Liu 2020; Hoogeboom et al. 2020).

        log_det = tr A,        inverse: x = exp(−A) (y − b)

    The only factorisation-free linear map whose log-det costs nothing. With τ = tr A / D it is
    computed as e^τ exp(A − τ I), by scaling and squaring with Padé approximants, so that a common
    scale needs no squarings and costs no digits; D³ once, D² for each event. Every matrix that is
    an exponential is reached: those of positive determinant near the identity, all rotations.

    Args:
        dim: D.
        bias: Whether there is a shift b.

    Raises:
        InputError: If `dim` is not positive.
    """

    raw: Array
    shift: Array | None

    def __init__(self, dim: int, *, bias: bool = True):
        super().__init__(dim)
        self.raw = jnp.zeros((dim, dim))
        self.shift = jnp.zeros((dim,)) if bias else None

    def _exp(self, sign: int) -> Array:
        common = jnp.trace(self.raw) / len(self.raw)
        rest = self.raw - common * jnp.eye(len(self.raw), dtype=self.raw.dtype)
        with jax.default_matmul_precision("highest"):
            return jnp.exp(sign * common) * expm(sign * rest)

    @property
    def matrix(self) -> Array:
        """The matrix exp A, of shape (D, D)."""
        return self._exp(1)

    def forward(self, x, condition=None, *, key=None):
        """``(exp(A) x + b, tr A)``."""
        y = add(product(self._exp(1), x), self.shift)
        return y, fill(jnp.trace(self.raw), x)

    def inverse(self, y, condition=None, *, key=None):
        """``(exp(−A) (y − b), −tr A)``."""
        x = product(self._exp(-1), subtract(y, self.shift))
        return x, fill(-jnp.trace(self.raw), y)
