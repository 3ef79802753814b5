"""Block neural autoregressive flow: one network that is itself the bijection."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from laminar._checks import check_sizes
from laminar._errors import InputError
from laminar._params import expand, positive
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractBijection
from laminar.bijections.frames import AbstractSameShape, needed
from laminar.bijections.numerical import clamped_root
from laminar.nn.masked import as_order
from laminar.nn.mlp import matmul

_PIVOT = 2.0  # outermost of the fixed biases that tell the units of a block apart
_BENT = -3.0  # raw p of a start that bends


class BlockAutoregressive(AbstractSameShape, AbstractBijection):
    r"""A network whose d-th output increases in x_d and sees x_1, …, x_d (De Cao et al. 2019).

        h_l = α(W_l h_{l−1} + b_l),   h_0 = x,   y = W_L h_{L−1} + b_L

    Hidden layers have A units for each entry. W_l is block lower triangular; its diagonal blocks
    are positive, softplus(n raw + ln(e − 1)) / n for n units summed over, its lower blocks free:
    so a step of training moves it as far as the weights of an ordinary network. The activation,
    each unit with a p > 0 of its own,

        α(u) = tanh u + p (u − tanh u),    α′(u) = 1 − tanh² u + p tanh² u

    reaches all of ℝ, where plain tanh would bound the image, and is linear at p = 1. So the map is
    onto ℝ^D, and zero parameters give the identity up to rounding; fixed biases then tell the units
    of a block apart. The log-det is Σ_d ln ∂y_d/∂x_d, each a product of diagonal blocks and
    activation slopes whose logarithm is carried from layer to layer by logsumexp.

    ``forward`` is one dense pass. ``inverse`` solves for one entry after the other, in D steps that
    read every weight once, each by bisection and Newton steps on the entry's own block. It looks as
    far as the root of the largest number, 2e19 in float32; beyond are a clamped point and a log-det
    of −inf. Use `Invert` for a flow whose density is the dense pass.

    Args:
        dim: D.
        units: A, units for each entry in a hidden layer.
        depth: Hidden layers, ≥ 1.
        cond_dim: Length of a condition c, which enters all units of the first layer by V c; 0 for
            none.
        order: The position 0, …, D−1 of each entry in the autoregressive order, by default the
            natural one; an array, so that stacked layers may differ.
        key: Draws a start that bends: weights of order 1/n, and p near 0.1. By default all
            parameters are zero.

    Raises:
        InputError: If a size is not positive, or `order` is not a permutation.
        ShapeError: If `order` has another length, or a condition is missing.
    """

    order: Array
    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    slopes: tuple[Array, ...]
    cond: Array | None
    in_shape: Shape = eqx.field(static=True)
    cond_shape: Shape | None = eqx.field(static=True)
    units: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        *,
        units: int = 8,
        depth: int = 2,
        cond_dim: int = 0,
        order: Array | None = None,
        key: PRNGKeyArray | None = None,
    ):
        check_sizes("BlockAutoregressive", dim=dim, units=units, depth=depth)
        if cond_dim < 0:
            raise InputError(f"BlockAutoregressive: cond_dim must be 0 or more, not {cond_dim}.")
        self.order = as_order("BlockAutoregressive", dim, order)
        sizes = [1, *[units] * depth, 1]
        pairs = list(zip(sizes[1:], sizes[:-1], strict=True))

        def start(at: int, out: int, into: int) -> Array:
            shape = (out * dim, into * dim)
            if key is None:
                return jnp.zeros(shape)
            return jr.normal(jr.fold_in(key, at), shape) / into

        self.weights = tuple(start(at, *pair) for at, pair in enumerate(pairs))
        self.biases = tuple(jnp.zeros((out * dim,)) for out, _ in pairs)
        bend = 0.0 if key is None else _BENT
        self.slopes = tuple(jnp.full((units * dim,), bend) for _ in range(depth))
        self.cond = jnp.zeros((units * dim, cond_dim)) if cond_dim else None
        self.in_shape, self.units = (dim,), units
        self.cond_shape = (cond_dim,) if cond_dim else None

    def row_cost(self, direction):
        """All units, with their log-slopes; ``inverse`` of a gradient keeps them at every step."""
        cost = 4 * self.in_shape[0] * self.units
        return cost * (self.in_shape[0] if direction == "inverse" else len(self.weights))

    def _layer(self, index: int) -> tuple[Array, Array]:
        """The weights below the diagonal blocks, and the diagonal blocks ``(D, out, in)``."""
        (dim,), raw = self.in_shape, self.weights[index]
        out, into = raw.shape[0] // dim, raw.shape[1] // dim
        places = jnp.arange(dim)
        blocks = raw.reshape((dim, out, dim, into))[places, :, places, :]
        lower = np.kron(np.tri(dim, k=-1, dtype=bool), np.ones((out, into), bool))
        return jnp.where(lower, raw, 0), positive(into * blocks) / into

    def _offsets(self, condition: Array | None, ndim: int) -> list[Array]:
        """What is added to each layer's products, ``(units, 1, …)`` or with the batch last."""
        offsets = list(self.biases)
        pivots = np.linspace(-_PIVOT, _PIVOT, self.units) if self.units > 1 else np.zeros(1)
        pivots = np.tile(pivots, self.in_shape[0])
        offsets[:-1] = [b + jnp.asarray(pivots, b.dtype) for b in offsets[:-1]]
        offsets = [expand(b, ndim) for b in offsets]
        condition = needed(self, condition)
        if self.cond is not None and condition is not None:
            offsets[0] = offsets[0] + expand(_product(self.cond, condition), ndim)
        return offsets

    def forward(self, x, condition=None, *, key=None):
        """``(y, Σ_d ln ∂y_d/∂x_d)`` by one dense pass."""
        return _dense(self, x, condition)

    def inverse(self, y, condition=None, *, key=None):
        """``(x, −Σ_d ln ∂y_d/∂x_d)``, entry by entry."""
        dim, batch = self.in_shape[0], y.shape[1:]
        place = jnp.argsort(self.order)
        offsets = self._offsets(condition, y.ndim)
        layers = [self._layer(index) for index in range(len(offsets))]

        def rows(values):
            return values.reshape((dim, -1, *values.shape[1:]))

        # Farther out, products with entries found before would overflow.
        reach = math.sqrt(float(jnp.finfo(y.dtype).max))

        def solve(state, row):
            known, outside = state
            d, image, lower, blocks, offset, slopes = row
            # Units of entries not found yet are zero.
            pieces = [
                _product(w, h) + jnp.broadcast_to(b, (b.shape[0], *batch))
                for w, h, b in zip(lower, known, offset, strict=True)
            ]
            column = _Column(tuple(blocks), tuple(slopes))
            x_d, beyond = clamped_root(
                column, jnp.concatenate(pieces), image, domain=(-reach, reach)
            )
            found = [x_d[None], *column.units(pieces, x_d)[:-1]]
            known = [
                lax.dynamic_update_slice_in_dim(store, new, d * new.shape[0], 0)
                for store, new in zip(known, found, strict=True)
            ]
            return (known, outside | beyond), None

        inputs = (
            jnp.arange(dim),
            y[place],
            [rows(lower) for lower, _ in layers],
            [blocks for _, blocks in layers],
            [rows(offset) for offset in offsets],
            [rows(positive(p)) for p in self.slopes],
        )
        sizes = [weight.shape[1] for weight in self.weights]
        start = [jnp.zeros((size, *batch), y.dtype) for size in sizes]
        (known, outside), _ = lax.scan(solve, (start, jnp.zeros(batch, bool)), inputs)
        x = known[0][self.order]
        log_det = -self.forward(x, condition)[1]
        return x, jnp.where(outside & ~jnp.isnan(log_det), -jnp.inf, log_det)


@eqx.filter_checkpoint
def _dense(layer: BlockAutoregressive, x: Array, condition: Array | None):
    # Units and log-slopes are faster computed again for the gradient than written and read.
    dim = layer.in_shape[0]
    offsets = layer._offsets(condition, x.ndim)
    h, log_slope = x[jnp.argsort(layer.order)], jnp.zeros_like(x)[:, None]
    for index, offset in enumerate(offsets):
        lower, blocks = layer._layer(index)
        h = _product(lower, h) + _block_product(blocks, h) + offset
        log_slope = _log_product(blocks, log_slope)
        if index < len(layer.slopes):
            p = expand(positive(layer.slopes[index]), h.ndim)
            h, log_bend = _bend(h, p)
            log_slope = log_slope + log_bend.reshape((dim, layer.units, *x.shape[1:]))
    return h[layer.order], log_slope.sum((0, 1))


class _Column(eqx.Module):
    """One output as a function of its own input, given what earlier entries add to its units."""

    blocks: tuple[Array, ...]
    slopes: tuple[Array, ...]

    def units(self, pieces: list[Array], x: Array) -> list[Array]:
        """The entry's units of every layer, the output last."""
        found, h = [], x[None]
        for index, (block, piece) in enumerate(zip(self.blocks, pieces, strict=True)):
            h = _product(block, h) + piece
            if index < len(self.slopes):
                h = _bend(h, expand(self.slopes[index], h.ndim))[0]
            found.append(h)
        return found

    def __call__(self, params: Array, x: Array) -> Array:
        cuts = np.cumsum([block.shape[0] for block in self.blocks])[:-1]
        return self.units(jnp.split(params, cuts), x)[-1][0]


def _bend(u: Array, p: Array) -> tuple[Array, Array]:
    """The activation and its log-slope."""
    t = jnp.tanh(u)
    # 1 − tanh² u by what keeps its digits where it is small.
    e = jnp.exp(2 * jnp.where(u < 0, u, -u))
    return t + p * (u - t), jnp.log(4 * e / (1 + e) ** 2 + p * t * t)


def _product(weight: Array, h: Array) -> Array:
    """As `matmul`, and not rounded to TF32, which forward and inverse would do differently."""
    with jax.default_matmul_precision("highest"):
        return matmul(weight, h)


def _block_product(blocks: Array, h: Array) -> Array:
    """Each block times its own entry's units: ``(D, out, in)`` by ``(D in, *batch)``."""
    dim, out, into = blocks.shape
    product = jnp.matmul(blocks, h.reshape((dim, into, -1)), precision=lax.Precision.HIGHEST)
    return product.reshape((dim * out, *h.shape[1:]))


def _log_product(blocks: Array, log_slope: Array) -> Array:
    """Ln of blocks times exp of log-slopes ``(D, in, *batch)``, without overflow."""
    dim, out, into = blocks.shape
    flat = log_slope.reshape((dim, into, -1))
    top = lax.stop_gradient(flat.max(1, keepdims=True))
    product = jnp.matmul(blocks, jnp.exp(flat - top), precision=lax.Precision.HIGHEST)
    return (jnp.log(product) + top).reshape((dim, out, *log_slope.shape[2:]))
