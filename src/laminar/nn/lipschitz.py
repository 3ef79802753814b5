"""Networks whose Lipschitz constant is bounded by construction, for residual flows."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from laminar._checks import check_sizes
from laminar._errors import InputError, ShapeError
from laminar._params import expand, positive
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.nn.mlp import matmul

_SQUARINGS = 6


def spectral_bound(weight: Array) -> Array:
    r"""An upper bound on the largest singular value of a matrix, tight and differentiable.

        σ_max(W) ≤ ‖(WᵀW)^p‖_F^{1/2p},    p = 64

    by six squarings of the smaller Gram matrix (Delattre et al. 2023, "Efficient Bound of Lipschitz
    Constant by Gram Iteration"). It is exact where one singular value dominates, and at most a
    factor n^{1/256} above: 1.6 % for n = 64 equal ones. Power iteration, which is usual, bounds
    only from below and needs a state.

    Args:
        weight: ``(m, n)``; zero gives zero, with a gradient of zero.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(weight)))
    none = largest == 0
    w = weight / jnp.where(none, 1, largest)
    with jax.default_matmul_precision("highest"):
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        gram = jnp.where(none, jnp.eye(len(gram), dtype=gram.dtype), gram)
        log_square, power = jnp.zeros((), gram.dtype), 1
        for _ in range(_SQUARINGS):
            size = jnp.sqrt(jnp.sum(gram**2))
            log_square, gram = log_square + jnp.log(size) / power, gram / size
            gram, power = gram @ gram, 2 * power
    log_square = log_square + 0.5 * jnp.log(jnp.sum(gram**2)) / power
    return largest * jnp.exp(0.5 * log_square)


class Contraction(eqx.Module):
    """A network at given weights and condition, x ↦ g(x): what ``at`` of a network returns.

    Events are flat. A weight of two axes is a matrix, for each position alone where there is a
    `space`; one of more is the kernel of a circular convolution of ``(channels, *space)``.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    slopes: tuple[Array, ...]
    space: Shape = eqx.field(static=True, default=())

    def __call__(self, x: Array) -> Array:
        """The network, ``(D, *batch) -> (D, *batch)``."""
        return self._pass(x)[0]

    def _pass(self, x: Array) -> tuple[Array, list[Array]]:
        """The image, and the slopes of the activations of each hidden layer."""
        h, slopes = x, []
        with jax.default_matmul_precision("highest"):
            for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                if i:
                    # LipSwish: the derivative of s σ(βs) never exceeds 1.1.
                    scaled = self.slopes[i - 1] * h
                    gate = jax.nn.sigmoid(scaled)
                    slopes.append(gate * (1 + scaled * (1 - gate)) / 1.1)
                    h = h * gate / 1.1
                h = _product(weight, h, self.space) + expand(bias, h.ndim)
        return h, slopes

    def linear(self, x: Array) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        """Products with the Jacobian J at x: v ↦ J v and u ↦ Jᵀ u, for ``(D, M, *batch)``.

        Many vectors at a time by hand: their axis then stands beside the batch in plain matrix
        products, whose gradients take a tenth of the time of those of a mapped `jax.jvp`.
        """
        _, slopes = self._pass(x)
        first, *rest = self.weights

        def push(v: Array) -> Array:
            with jax.default_matmul_precision("highest"):
                v = _product(first, v, self.space)
                for weight, slope in zip(rest, slopes, strict=True):
                    v = _product(weight, v * slope[:, None], self.space)
            return v

        def pull(u: Array) -> Array:
            with jax.default_matmul_precision("highest"):
                for weight, slope in zip(rest[::-1], slopes[::-1], strict=True):
                    u = _product(_transposed(weight), u, self.space) * slope[:, None]
                return _product(_transposed(first), u, self.space)

        return push, pull


class AbstractLipschitz(eqx.Module):
    """A network g of events to the like with |g(x) − g(x′)| ≤ L |x − x′| at any parameters.

    Attributes:
        shape: Shape of an event, ``(D,)`` or ``(C, *space)``.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    raw_slopes: tuple[Array, ...]
    cond: Array | None
    cond_dim: int = eqx.field(static=True)
    lipschitz: float = eqx.field(static=True)
    if TYPE_CHECKING:
        # A type checker would take an abstract variable for an argument of the constructor.
        shape: Shape = eqx.field(init=False)
    else:
        shape: eqx.AbstractVar[Shape]
    batch_last: ClassVar[bool] = True

    def _start(
        self,
        sizes: list[int],
        kernels: list[Shape],
        cond_dim: int,
        lipschitz: float,
        key: PRNGKeyArray,
    ) -> None:
        """Draw layers between these sizes, each with the lengths of its kernel."""
        if cond_dim < 0 or not 0 < lipschitz < 1:
            raise InputError(
                f"{type(self).__name__}: cond_dim must be 0 or more and lipschitz in (0, 1), not "
                f"{cond_dim} and {lipschitz}."
            )
        cond_key, key = jr.split(key)
        depth = len(kernels) - 1
        weights = [
            jr.normal(k, (out, into, *kernel)) / math.sqrt(into * math.prod(kernel))
            for k, into, out, kernel in zip(
                jr.split(key, depth), sizes[:-2], sizes[1:-1], kernels[:-1], strict=True
            )
        ]
        self.weights = (*weights, jnp.zeros((*sizes[:-3:-1], *kernels[-1])))
        self.biases = tuple(jnp.zeros(size) for size in sizes[1:])
        self.raw_slopes = tuple(jnp.zeros(()) for _ in range(depth))
        self.cond = None
        if cond_dim:
            self.cond = jr.normal(cond_key, (sizes[1], cond_dim)) / math.sqrt(cond_dim)
        self.cond_dim, self.lipschitz = cond_dim, float(lipschitz)

    @property
    def cond_shape(self) -> Shape | None:
        """``(cond_dim,)``, or None without a condition."""
        return (self.cond_dim,) if self.cond_dim else None

    def at(self, condition: Array | None = None) -> Contraction:
        """The network of flat events with weights made to keep the bound, once for many calls.

        Args:
            condition: ``(cond_dim,)`` or ``(cond_dim, *batch)``.
        """
        kappa, space = self.lipschitz ** (1 / len(self.weights)), self.shape[1:]
        first, *rest = self.biases
        if self.cond is not None:
            if condition is None:
                owner = type(self).__name__
                raise InputError(f"{owner} needs a condition ({self.cond_dim},), got none.")
            term = matmul(self.cond, condition)
            first = expand(first, term.ndim) + term
        weights = tuple(_bounded(w, kappa, space) for w in self.weights)
        biases = tuple(jnp.repeat(b, math.prod(space), axis=0) for b in (first, *rest))
        return Contraction(weights, biases, tuple(positive(raw) for raw in self.raw_slopes), space)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """The network, ``shape + batch`` to the same."""
        flat = x.reshape((math.prod(self.shape), *x.shape[len(self.shape) :]))
        return self.at(condition)(flat).reshape(x.shape)


class LipschitzMLP(AbstractLipschitz):
    r"""A network g of (D,) to (D,) with |g(x) − g(x′)| ≤ L |x − x′| at any parameters.

        g = W_n a(W_{n−1} … a(W_1 x + V c + b_1) …) + b_n,    a(s) = s σ(βs) / 1.1

    Each W is used as W · min(1, κ / b(W)), where b is `spectral_bound` and κⁿ = L, and LipSwish a
    (Chen et al. 2019) has slopes of at most one and a bounded second derivative. The last layer
    starts at zero. A condition c may enter in any strength, as the bound is in x alone.

    Args:
        dim: D.
        key: Draws the weights.
        width: Hidden units.
        depth: Hidden layers.
        cond_dim: Length of the condition, or 0 for none.
        lipschitz: L, in (0, 1).

    Raises:
        InputError: If a size or L is out of range.
    """

    dim: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        *,
        key: PRNGKeyArray,
        width: int = 128,
        depth: int = 2,
        cond_dim: int = 0,
        lipschitz: float = 0.9,
    ):
        check_sizes("LipschitzMLP", dim=dim, width=width, depth=depth)
        self.dim = dim
        sizes = [dim, *[width] * depth, dim]
        self._start(sizes, [()] * (depth + 1), cond_dim, lipschitz, key)

    @property
    def shape(self) -> Shape:
        """``(dim,)``."""
        return (self.dim,)


class LipschitzConv(AbstractLipschitz):
    r"""A convolutional g of (C, *space) to itself with |g(x) − g(x′)| ≤ L |x − x′|.

    A `LipschitzMLP` of channels, whose first and last W are convolutions while those between act at
    each position alone (i-ResNet, Behrmann et al. 2019; Chen et al. 2019). Here the edges of space
    are joined: in Fourier space a convolution then is a product with a small matrix at each
    frequency k, so its norm is exactly

        ‖W‖ = max_k σ_max(Ŵ(k)),    Ŵ(k) = Σ_q W[:, :, q] exp(2πi Σ_a k_a q_a / space_a)

    and is bounded by `spectral_bound` of every Ŵ(k) (Delattre et al. 2023). Their Gram matrices
    have C rows, so `width` costs little there. A condition is a vector, the same at all positions.

    Args:
        shape: ``(C, *space)``, with one axis of space or more.
        key: Draws the weights.
        width: Hidden channels.
        depth: Hidden layers.
        kernel: Odd length of the kernels along every axis of space, at most the space's own.
        cond_dim: Length of the condition, or 0 for none.
        lipschitz: L, in (0, 1).

    Raises:
        InputError: If a size or L is out of range.
        ShapeError: If there is no axis of space.
    """

    shape: Shape = eqx.field(static=True)

    def __init__(
        self,
        shape: Shape,
        *,
        key: PRNGKeyArray,
        width: int = 64,
        depth: int = 2,
        kernel: int = 3,
        cond_dim: int = 0,
        lipschitz: float = 0.9,
    ):
        channels, *space = self.shape = tuple(shape)
        if not space:
            raise ShapeError(f"LipschitzConv takes events (C, *space), not {self.shape}.")
        check_sizes("LipschitzConv", channels=channels, width=width, depth=depth)
        if kernel < 1 or kernel % 2 == 0 or kernel > min(space):
            raise InputError(
                f"LipschitzConv: the kernel needs an odd length of at most {min(space)}, the "
                f"shortest axis of space, and has {kernel}."
            )
        window = (kernel,) * len(space)
        kernels = [window, *[()] * (depth - 1), window]
        self._start([channels, *[width] * depth, channels], kernels, cond_dim, lipschitz, key)


def _bounded(weight: Array, kappa: float, space: Shape) -> Array:
    size = _norm(weight, space)
    large = size > kappa
    return weight * jnp.where(large, kappa / jnp.where(large, size, 1), 1)


def _norm(weight: Array, space: Shape) -> Array:
    """An upper bound on the norm of W, or of W ∗ with the edges of space joined."""
    out, into, *kernel = weight.shape
    if not kernel:
        return spectral_bound(weight)
    # That of −k is the conjugate, with the same singular values: half the spectrum will do.
    half = (*space[:-1], space[-1] // 2 + 1)
    k, q = (np.indices(lengths).reshape((len(kernel), -1)) for lengths in (half, kernel))
    angle = 2 * np.pi * (k.T / np.asarray(space)) @ q
    flat = jnp.moveaxis(weight.reshape((out, into, -1)), -1, 0)
    with jax.default_matmul_precision("highest"):
        real, imag = (
            jnp.tensordot(jnp.asarray(wave(angle), weight.dtype), flat, 1)
            for wave in (np.cos, np.sin)
        )
    # As real matrices of twice the size, which have the same singular values twice.
    rows = jnp.concatenate([real, -imag], -1), jnp.concatenate([imag, real], -1)
    return jnp.max(jax.vmap(spectral_bound)(jnp.concatenate(rows, -2)))


def _product(weight: Array, h: Array, space: Shape) -> Array:
    """W h, or W ∗ h with the edges of space joined: ``(in · positions, *batch)`` to the like."""
    out, into, *kernel = weight.shape
    batch, rank = h.shape[1:], len(kernel)
    image = (out * math.prod(space), *batch)
    if not kernel:
        return matmul(weight, h.reshape((into, math.prod(space), *batch))).reshape(image)
    h = h.reshape((into, *space, math.prod(batch)))
    wings = [(k // 2, k // 2) for k in kernel]
    h = jnp.pad(h, [(0, 0), *wings, (0, 0)], mode="wrap")
    placed = (rank + 1, 0, *range(1, rank + 1))
    numbers = lax.ConvDimensionNumbers(placed, tuple(range(rank + 2)), placed)
    y = lax.conv_general_dilated(h, weight, (1,) * rank, "VALID", dimension_numbers=numbers)
    return y.reshape(image)


def _transposed(weight: Array) -> Array:
    """The weight of the transposed map: of a kernel, with its offsets turned round."""
    return jnp.flip(weight.swapaxes(0, 1), range(2, weight.ndim))
