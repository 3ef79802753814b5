r"""Transforms of images and sequences: squeezing, mixing channels, masks, and many scales.

Events are channels-first, ``(C, *space)``: ``(C, H, W)`` for images, ``(C, T)`` for sequences, and
batches come last as everywhere. Batch-first images of a data set are ``(N, C, H, W)``.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax

from laminar._errors import InputError, ShapeError
from laminar._params import expand
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.base import (
    AbstractBijection,
    AbstractTransform,
    Exactness,
    call,
    check_flat,
)
from laminar.bijections.compose import Chain, Reshape
from laminar.bijections.frames import (
    AbstractOfOne,
    AbstractSameShape,
    AbstractShaped,
    AbstractTwoWay,
)
from laminar.bijections.linear import LU


class Squeeze(AbstractBijection):
    r"""Space to depth: blocks of fⁿ positions become channels; log-det zero (Dinh et al. 2017).

        (C, s_1, …, s_n) → (fⁿ C, s_1 / f, …, s_n / f)

    The channel of an entry is its old one times fⁿ plus its place in the block in row-major order.
    ``forward`` squeezes; data that are to be squeezed on their way to the latent take ``Invert``.

    Args:
        in_shape: ``(C, *space)``.
        factor: f.

    Raises:
        ShapeError: If a length of space is not a multiple of f.
    """

    in_shape: Shape = eqx.field(static=True)
    factor: int = eqx.field(static=True, default=2)
    cond_shape: None = eqx.field(static=True, default=None)
    batch_last: ClassVar[bool] = True

    def __check_init__(self):
        _check_space("Squeeze", self.in_shape, self.factor)

    @property
    def out_shape(self) -> Shape:
        """``(fⁿ C, *space / f)``."""
        return _squeezed(self.in_shape, self.factor)

    def forward(self, x, condition=None, *, key=None):
        """Blocks of positions as channels."""
        batch = x.shape[len(self.in_shape) :]
        y = _to_depth(x, len(self.in_shape) - 1, self.factor)
        return y.reshape(self.out_shape + batch), jnp.zeros(batch, x.dtype)

    def inverse(self, y, condition=None, *, key=None):
        """Channels back in their places."""
        rank = len(self.in_shape) - 1
        x = y.reshape((self.in_shape[0], *(self.factor,) * rank, *y.shape[1:]))
        return _to_space(x, rank, self.factor), jnp.zeros(y.shape[rank + 1 :], y.dtype)


class Haar(AbstractBijection):
    r"""The Haar wavelet transform of one level: averages and differences of neighbours.

    Along each of the n axes of space (a, b) ↦ ((a + b), (a − b)) / √2, an orthogonal map, so
    log_det = 0. ``forward`` analyses: (C, *space) → (2ⁿ C, *space / 2), and the first C channels
    are the image at half the resolution (times 2^{n/2}), those after it the details. With
    `multiscale` the details of each level leave early (Yu et al. 2020, "Wavelet Flow").

    Args:
        in_shape: ``(C, *space)``, with even lengths of space.

    Raises:
        ShapeError: If a length of space is odd.
    """

    in_shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True, default=None)
    batch_last: ClassVar[bool] = True

    def __check_init__(self):
        _check_space("Haar", self.in_shape, 2)

    @property
    def out_shape(self) -> Shape:
        """``(2ⁿ C, *space / 2)``."""
        return _squeezed(self.in_shape, 2)

    def forward(self, x, condition=None, *, key=None):
        """Averages, then details."""
        rank, batch = len(self.in_shape) - 1, x.shape[len(self.in_shape) :]
        y = jnp.moveaxis(_butterfly(_to_depth(x, rank, 2), rank), 0, rank)
        return y.reshape(self.out_shape + batch), jnp.zeros(batch, x.dtype)

    def inverse(self, y, condition=None, *, key=None):
        """The image from averages and details."""
        rank = len(self.in_shape) - 1
        x = y.reshape((*(2,) * rank, self.in_shape[0], *y.shape[1:]))
        x = _to_space(_butterfly(jnp.moveaxis(x, rank, 0), rank), rank, 2)
        return x, jnp.zeros(y.shape[rank + 1 :], y.dtype)


class Positionwise(AbstractOfOne):
    """One bijection at every position: events ``(*bijection.in_shape, *space)``.

    The log-dets are summed over the positions. All share the parameters and the condition.

    Args:
        bijection: The map at one position, exact; of ``(C,)`` for images of C channels.
        space: Shape of the axes that are mapped over.

    Raises:
        ShapeError: If the bijection is not exact, or one of a manifold.
    """

    space: Shape = eqx.field(static=True)

    def __check_init__(self):
        check_flat("Positionwise", self.bijection)

    @property
    def in_shape(self) -> Shape:
        """``(*bijection.in_shape, *space)``."""
        return self.bijection.in_shape + self.space

    @property
    def out_shape(self) -> Shape:
        """``(*bijection.out_shape, *space)``."""
        return self.bijection.out_shape + self.space

    @property
    def name(self) -> str:
        """The class with the name of the bijection."""
        return f"Positionwise({self.bijection.name})"

    def row_cost(self, direction):
        """That of all positions together."""
        return math.prod(self.space) * self.bijection.row_cost(direction)

    def _at_positions(self, condition):
        """A condition that varies over the batch, repeated at every position."""
        event = self.cond_shape
        if event is None or condition is None or condition.ndim == len(event):
            return condition
        batch = condition.shape[len(event) :]
        condition = condition.reshape((*event, *(1,) * len(self.space), *batch))
        return jnp.broadcast_to(condition, (*event, *self.space, *batch))

    def _run(self, direction, x, condition, key):
        # Positions are a batch to the bijection.
        y, log_det = call(self.bijection, direction, x, self._at_positions(condition))
        return y, log_det.sum(tuple(range(len(self.space))))

    def init_from_data(self, data, condition=None, side="out"):
        """Initialise the bijection from all positions together."""
        condition = self._at_positions(condition)
        event = self.bijection.out_shape if side == "out" else self.bijection.in_shape
        data = data.reshape((*event, -1))
        if condition is not None and condition.ndim > len(self.cond_shape or ()):
            condition = condition.reshape((*(self.cond_shape or ()), -1))
        return Positionwise(self.bijection.init_from_data(data, condition, side), self.space)


def conv1x1(shape: Shape, *, key: PRNGKeyArray | None = None, bias: bool = False) -> Positionwise:
    """The invertible 1×1 convolution of Glow (Kingma & Dhariwal 2018): one `LU` at all positions.

        log_det = (number of positions) · Σ_i ln U_ii

    Args:
        shape: ``(C, *space)``.
        key: Draws the permutation of the channels; without a key, there is none.
        bias: Whether there is a shift.
    """
    return Positionwise(LU(shape[0], key=key, bias=bias), tuple(shape[1:]))


class PeriodicConv(AbstractShaped, AbstractBijection):
    r"""A convolution with the edges joined, inverted in Fourier space (Hoogeboom et al. 2019).

        y[o, p] = b[o] + Σ_{i, q} W[o, i, q] x[i, (p + q) mod space],   ŷ(k) = Ŵ(k) x̂(k)
        log_det = Σ_k ln |det Ŵ(k)|

    over the frequencies k, where each Ŵ(k) is a C × C matrix. Both directions are Fourier
    transforms around small products or solutions. W is the identity plus ``raw``, so zero means the
    identity. Kernels with a singular Ŵ(k) have no inverse; they are a set of measure zero, which
    training for likelihood keeps away from, as the log-det falls to −∞ there.

    Args:
        shape: ``(C, *space)``, with one to three axes of space.
        kernel: Odd length of the kernel along every axis, or one for each.
        bias: Whether there is a shift b.

    Raises:
        InputError: If a length of the kernel is even or longer than space.
        ShapeError: If there are no axes of space, or more than three.
    """

    raw: Array
    shift: Array | None

    def __init__(self, shape: Shape, kernel: int | Shape = 3, *, bias: bool = True):
        shape = tuple(shape)
        if not 2 <= len(shape) <= 4:
            raise ShapeError(f"PeriodicConv takes (C, *space) with one to three axes, not {shape}.")
        kernel = (kernel,) * (len(shape) - 1) if isinstance(kernel, int) else tuple(kernel)
        if len(kernel) != len(shape) - 1 or any(
            k < 1 or k % 2 == 0 or k > s for k, s in zip(kernel, shape[1:], strict=False)
        ):
            raise InputError(
                f"PeriodicConv: the kernel needs an odd length for each axis of {shape[1:]}, at "
                f"most that long, and is {kernel}."
            )
        self.raw = jnp.zeros((shape[0], shape[0], *kernel))
        self.shift = jnp.zeros(shape[:1]) if bias else None
        super().__init__(shape)

    @property
    def weight(self) -> Array:
        """W, of shape (C, C, *kernel), with offset zero in the middle."""
        kernel = self.raw.shape[2:]
        middle = tuple(k // 2 for k in kernel)
        identity = jnp.eye(self.raw.shape[0], dtype=self.raw.dtype)
        return self.raw.at[(slice(None), slice(None), *middle)].add(identity)

    def _spectrum(self) -> Array:
        """All Ŵ(k) of half the spectrum, ``(frequencies, C, C)``."""
        space, kernel = self.in_shape[1:], self.raw.shape[2:]
        axes = tuple(range(2, 2 + len(space)))
        pad = [(0, 0), (0, 0), *((0, s - k) for s, k in zip(space, kernel, strict=True))]
        weight = jnp.roll(jnp.pad(self.weight, pad), [-(k // 2) for k in kernel], axes)
        spectrum = jnp.conj(jnp.fft.rfftn(weight, axes=axes))
        return jnp.moveaxis(spectrum.reshape((*spectrum.shape[:2], -1)), -1, 0)

    def _log_det(self, spectrum: Array, like: Array) -> Array:
        # A real signal has each frequency twice in its whole spectrum, but for the ends of the
        # axis that the half spectrum halves.
        last = self.in_shape[-1]
        times = np.full(last // 2 + 1, 2.0)
        times[0] = 1.0
        if last % 2 == 0:
            times[-1] = 1.0
        times = np.tile(times, spectrum.shape[0] // times.size)
        log_dets = jnp.linalg.slogdet(spectrum)[1]
        total = (jnp.asarray(times, log_dets.dtype) * log_dets).sum()
        return jnp.broadcast_to(total, like.shape[len(self.in_shape) :])

    def _through(self, x: Array, at_frequencies: Callable[[Array], Array]) -> Array:
        """Apply a map of (frequencies, C, columns) between the two Fourier transforms."""
        space, axes = self.in_shape[1:], tuple(range(1, len(self.in_shape)))
        x_hat = jnp.fft.rfftn(x, axes=axes)
        columns = x_hat.reshape((x_hat.shape[0], math.prod(x_hat.shape[1 : len(axes) + 1]), -1))
        y_hat = jnp.moveaxis(at_frequencies(jnp.moveaxis(columns, 1, 0)), 0, 1)
        return jnp.fft.irfftn(y_hat.reshape(x_hat.shape), s=space, axes=axes).astype(x.dtype)

    def forward(self, x, condition=None, *, key=None):
        """``(W ∗ x + b, Σ_k ln |det Ŵ(k)|)``."""
        spectrum = self._spectrum()
        y = self._through(
            x, lambda x_hat: jnp.matmul(spectrum, x_hat, precision=lax.Precision.HIGHEST)
        )
        shifted = y if self.shift is None else y + expand(self.shift, y.ndim)
        return shifted, self._log_det(spectrum, x)

    def inverse(self, y, condition=None, *, key=None):
        """``(W⁻¹ ∗ (y − b), −Σ_k ln |det Ŵ(k)|)``."""
        spectrum = self._spectrum()
        y = y if self.shift is None else y - expand(self.shift, y.ndim)
        x = self._through(y, lambda y_hat: jnp.linalg.solve(spectrum, y_hat))
        return x, -self._log_det(spectrum, y)


class Leading(AbstractSameShape, AbstractTwoWay):
    """A transform of the first entries of a vector, taken in its own shape; the others pass.

    Args:
        transform: A map between shapes of equal size, at most `dim`.
        dim: Length of the vector.

    Raises:
        ShapeError: If the sizes do not fit, or the transform is one of a manifold.
    """

    transform: AbstractTransform
    dim: int = eqx.field(static=True)

    def __check_init__(self):
        check_flat("Leading", self.transform, exact=False)
        sizes = [math.prod(s) for s in (self.transform.in_shape, self.transform.out_shape)]
        if sizes[0] != sizes[1] or sizes[0] > self.dim:
            raise ShapeError(
                f"Leading: {self.transform.name} maps {self.transform.in_shape} to "
                f"{self.transform.out_shape}, which does not fit into ({self.dim},)."
            )

    @property
    def in_shape(self) -> Shape:
        """``(dim,)``."""
        return (self.dim,)

    @property
    def cond_shape(self) -> Shape | None:
        """The condition of the transform."""
        return self.transform.cond_shape

    @property
    def exactness(self) -> Exactness:
        """That of the transform."""
        return self.transform.exactness

    @property
    def name(self) -> str:
        """The name of the transform."""
        return self.transform.name

    def row_cost(self, direction):
        """That of the transform, beside the whole vector."""
        return max(super().row_cost(direction), self.transform.row_cost(direction))

    def _run(self, direction, x, condition, key):
        shape = self.transform.in_shape if direction == "forward" else self.transform.out_shape
        n, batch = math.prod(shape), x.shape[1:]
        y, log_det = call(
            self.transform, direction, x[:n].reshape(shape + batch), condition, key=key
        )
        return jnp.concatenate([y.reshape((n, *batch)), x[n:]]), log_det

    def init_from_data(self, data, condition=None, side="out"):
        """Pass the first entries on."""
        shape = self.transform.out_shape if side == "out" else self.transform.in_shape
        own = data[: math.prod(shape)].reshape(shape + data.shape[1:])
        return Leading(self.transform.init_from_data(own, condition, side), self.dim)


def multiscale(levels: Sequence[AbstractTransform]) -> Chain:
    """Several resolutions over one flat latent: half-way channels leave early (Dinh et al. 2017).

    Levels stand in the order of ``forward``, the coarsest first. Each takes the channels that the
    one before gives, followed by fresh ones from the latent: a level of shape (C, *space) after one
    that gives (C′, *space) draws C − C′ channels. Data thus lose, level by level, the last channels
    of what remains to the latent, whose length is the size of the data. A coupling layer at the
    start of a level, with ``n_identity`` = C′, makes the law of what leaves depend on what stays.

    Args:
        levels: Transforms of ``(C, *space)``; all but the last give fewer channels, at the same
            positions, than the next takes, as after ``Invert(Squeeze(…))``.

    Returns:
        A transform from ``(D,)`` to the shape that the last level gives.

    Raises:
        ShapeError: If a level does not fit the next.
    """
    if not levels:
        raise ShapeError("multiscale needs at least one level.")
    for i, (level, after) in enumerate(itertools.pairwise(levels)):
        given, taken = level.out_shape, after.in_shape
        if given[1:] != taken[1:] or given[0] >= taken[0]:
            raise ShapeError(
                f"multiscale: level {i} ({level.name}) gives {given}, and level {i + 1} "
                f"({after.name}) takes {taken}; it must take more channels at the same positions."
            )
    dim = math.prod(levels[-1].in_shape)
    return Chain(
        [*(Leading(level, dim) for level in levels), Reshape((dim,), levels[-1].out_shape)]
    )


def _check_space(owner: str, shape: Shape, factor: int) -> None:
    if factor < 1 or len(shape) < 2 or any(s % factor for s in shape[1:]):
        raise ShapeError(
            f"{owner}: an event is (channels, *space) with lengths of space that {factor} divides, "
            f"and {shape} is not."
        )


def _squeezed(shape: Shape, factor: int) -> Shape:
    return (shape[0] * factor ** (len(shape) - 1), *(s // factor for s in shape[1:]))


def _to_depth(x: Array, rank: int, factor: int) -> Array:
    """``(C, *space, *batch)`` as ``(C, f, …, f, *space / f, *batch)``."""
    split = [n for s in x.shape[1 : rank + 1] for n in (s // factor, factor)]
    x = x.reshape((x.shape[0], *split, *x.shape[rank + 1 :]))
    places = range(1, 2 * rank + 1)
    return x.transpose((0, *places[1::2], *places[::2], *range(2 * rank + 1, x.ndim)))


def _to_space(x: Array, rank: int, factor: int) -> Array:
    """The inverse of `_to_depth`."""
    inner = [i for axis in range(1, rank + 1) for i in (axis + rank, axis)]
    y = x.transpose((0, *inner, *range(2 * rank + 1, x.ndim)))
    space = [s * factor for s in x.shape[rank + 1 : 2 * rank + 1]]
    return y.reshape((x.shape[0], *space, *x.shape[2 * rank + 1 :]))


def _butterfly(x: Array, rank: int) -> Array:
    """Sums and differences along axes 1, …, rank of length two, scaled to be orthogonal."""
    for axis in range(1, rank + 1):
        a, b = (lax.index_in_dim(x, i, axis) for i in (0, 1))
        x = jnp.concatenate([a + b, a - b], axis)
    return 0.5 ** (rank / 2) * x
