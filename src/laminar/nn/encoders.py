"""Networks that turn a set, a sequence or an image into the vector that a flow is conditioned on.

Give one to a flow as ``Flow(base, bijection, embed=encoder)``: it says by `in_shape` what one raw
condition looks like, runs once for each condition, and is trained with the flow. Inputs keep the
batch last, as everywhere inside the library.
"""

import math
from typing import Any, ClassVar, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from laminar._checks import check_sizes
from laminar._errors import InputError
from laminar._params import expand
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.nn.mlp import MLP, Activation, Dense, activation_gain, resolve_activation

Pool = Literal["mean_max", "attention"]


class SetEncoder(eqx.Module):
    r"""Encodes a set of vectors, whatever their order (Zaheer et al. 2017).

        out = MLP(pool_i φ(x_i), ln(1 + n))

    φ is a network applied to every element, and n counts the elements, which no mean would tell: a
    posterior narrows with it. The pool is the mean and the maximum over the set, or for every
    head a mean whose weights are a softmax of learned scores (Lee et al. 2019).

    Args:
        dim: Length of an element.
        out_dim: Length of the code.
        size: The most elements that a set has; smaller ones are padded.
        key: Draws the weights.
        masked: Whether sets differ in size. One raw condition is then the dictionary
            ``{"mask": (size,), "values": (size, dim)}`` with True where there is an element; what
            stands elsewhere does not matter, NaN included. Otherwise it is the array (size, dim).
        width: Hidden units.
        depth: Residual blocks of either network.
        pool: ``"mean_max"`` or ``"attention"``.
        heads: How many means ``"attention"`` takes; it must divide the width.
        activation: A function of `jax.nn` or its name.

    The code of an empty set is a constant.

    Raises:
        InputError: If a size is not positive or an option unknown.
    """

    each: MLP
    scores: Dense | None
    out: MLP
    dim: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    masked: bool = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        size: int,
        key: PRNGKeyArray,
        masked: bool = False,
        width: int = 64,
        depth: int = 1,
        pool: Pool = "mean_max",
        heads: int = 4,
        activation: str | Activation = "silu",
    ):
        if pool not in get_args(Pool):
            raise InputError(f"SetEncoder: pool must be 'mean_max' or 'attention', not {pool!r}.")
        check_sizes("SetEncoder", dim=dim, out_dim=out_dim, size=size, width=width, heads=heads)
        if pool == "attention" and width % heads:
            raise InputError(f"SetEncoder: {heads} heads do not divide a width of {width}.")
        each_key, score_key, out_key = jr.split(key, 3)
        options: dict[str, Any] = {"width": width, "depth": depth, "activation": activation}
        self.each = MLP(dim, width, key=each_key, zero_head=False, **options)
        self.scores = Dense(width, heads, key=score_key) if pool == "attention" else None
        pooled = width if pool == "attention" else 2 * width
        self.out = MLP(pooled + 1, out_dim, key=out_key, zero_head=False, **options)
        self.dim, self.size, self.masked = dim, size, masked

    @property
    def in_shape(self) -> Any:
        """``(size, dim)``, or with masks a dictionary of shapes."""
        values = (self.size, self.dim)
        return {"mask": (self.size,), "values": values} if self.masked else values

    def __call__(self, condition: Any) -> Array:
        """A set ``(size, dim, *batch)``, or a dictionary with its mask, to ``(out, *batch)``."""
        values, mask = condition, None
        if self.masked:
            values, mask = condition["values"], condition["mask"].astype(bool)
            values = jnp.where(mask[:, None], values, 0)
        else:
            mask = jnp.ones((values.shape[0], *values.shape[2:]), bool)
        h = self.each(jnp.moveaxis(values, 1, 0))  # (width, size, *batch)
        count = mask.sum(0).astype(h.dtype)
        some = jnp.maximum(count, 1)
        if self.scores is None:
            mean = jnp.where(mask[None], h, 0).sum(1) / some[None]
            most = jnp.where(mask[None], h, -jnp.inf).max(1)
            pooled = jnp.concatenate([mean, jnp.where(count[None] > 0, most, 0)])
        else:
            scores = jnp.where(mask[None], self.scores(h), -jnp.inf)
            # Of an empty set no score is finite; its weights are then zeros.
            top = jnp.where(count[None] > 0, scores.max(1), 0)
            weights = jnp.where(mask[None], jnp.exp(scores - lax.stop_gradient(top)[:, None]), 0)
            weights = weights / jnp.where(count[None] > 0, weights.sum(1), 1)[:, None]
            heads = h.reshape((weights.shape[0], -1, *h.shape[1:]))
            pooled = (weights[:, None] * heads).sum(2).reshape((h.shape[0], *h.shape[2:]))
        return self.out(jnp.concatenate([pooled, jnp.log1p(count)[None]]))


class SequenceEncoder(eqx.Module):
    r"""Encodes a sequence of vectors by a gated recurrent unit (Cho et al. 2014).

        r, u = σ(W [x_t, h]),   n = tanh(W_x x_t + r ⊙ (W_h h)),   h ← u ⊙ h + (1 − u) ⊙ n

    The code is a network of the last state and of the mean over all states. The steps are one scan.

    Args:
        dim: Length of an element.
        out_dim: Length of the code.
        length: The most elements that a sequence has.
        key: Draws the weights.
        padded: Whether sequences differ in length. One raw condition is then the dictionary
            ``{"length": (), "values": (length, dim)}``; what stands after its length does not
            matter, NaN included. Otherwise it is the array (length, dim).
        width: Number of states.
        depth: Residual blocks of the last network.
        activation: Of the last network: a function of `jax.nn` or its name.

    Raises:
        InputError: If a size is not positive.
    """

    inward: Dense
    across: Dense
    out: MLP
    dim: int = eqx.field(static=True)
    length: int = eqx.field(static=True)
    padded: bool = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        length: int,
        key: PRNGKeyArray,
        padded: bool = False,
        width: int = 64,
        depth: int = 1,
        activation: str | Activation = "silu",
    ):
        check_sizes("SequenceEncoder", dim=dim, out_dim=out_dim, length=length, width=width)
        in_key, across_key, out_key = jr.split(key, 3)
        self.inward = Dense(dim, 3 * width, key=in_key)
        self.across = Dense(width, 3 * width, key=across_key)
        self.out = MLP(
            2 * width,
            out_dim,
            key=out_key,
            width=width,
            depth=depth,
            activation=activation,
            zero_head=False,
        )
        self.dim, self.length, self.padded = dim, length, padded

    @property
    def in_shape(self) -> Any:
        """``(length, dim)``, or with lengths a dictionary of shapes."""
        values = (self.length, self.dim)
        return {"length": (), "values": values} if self.padded else values

    def __call__(self, condition: Any) -> Array:
        """A sequence ``(length, dim, *batch)``, or a dictionary, to ``(out, *batch)``."""
        values = condition["values"] if self.padded else condition
        batch, dtype = values.shape[2:], values.dtype
        count = condition["length"] if self.padded else jnp.asarray(values.shape[0])
        times = expand(jnp.arange(values.shape[0], dtype=count.dtype), 1 + count.ndim)
        live = jnp.broadcast_to(expand(times < count[None], 1 + len(batch)), (len(times), *batch))
        driven = self.inward(jnp.moveaxis(jnp.where(live[:, None], values, 0), 1, 0))

        def step(state, now):
            h, total = state
            inward, live = now
            reset, update, new = jnp.split(inward, 3)
            reset_h, update_h, new_h = jnp.split(self.across(h), 3)
            gate = jax.nn.sigmoid(update + update_h)
            new = jnp.tanh(new + jax.nn.sigmoid(reset + reset_h) * new_h)
            h = jnp.where(live, gate * h + (1 - gate) * new, h)
            return (h, total + jnp.where(live, h, 0)), None

        start = jnp.zeros((self.across.weight.shape[1], *batch), dtype)
        (last, total), _ = lax.scan(step, (start, start), (jnp.moveaxis(driven, 1, 0), live))
        mean = total / jnp.maximum(live.sum(0).astype(dtype), 1)[None]
        return self.out(jnp.concatenate([last, mean]))


class ImageEncoder(eqx.Module):
    r"""Encodes an image, or a signal on any grid, by residual convolutions.

    Stages halve the grid by a convolution of stride two and add h + conv(a(conv(a(h)))); the code
    is a network of the mean over the positions that remain, and of their maximum.

    Args:
        shape: Shape of one image, channels last: (H, W, C), or (L, C), or with more axes.
        out_dim: Length of the code.
        key: Draws the weights.
        channels: Channels of the stages, whose number it sets.
        kernel: Width of the kernels.
        activation: A function of `jax.nn` or its name.

    Raises:
        InputError: If there is no grid, or a size is not positive.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    out: MLP
    in_shape: Shape = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        shape: Shape,
        out_dim: int,
        *,
        key: PRNGKeyArray,
        channels: tuple[int, ...] = (32, 64),
        kernel: int = 3,
        activation: str | Activation = "silu",
    ):
        if len(shape) < 2 or not channels:
            raise InputError(
                f"ImageEncoder: images have a grid and channels, and {shape} is their shape; there "
                f"must be stages, and their channels are {channels}."
            )
        check_sizes("ImageEncoder", out_dim=out_dim, kernel=kernel, size=min(*shape, *channels))
        self.in_shape, self.activation = tuple(shape), resolve_activation(activation)
        gain, grid = activation_gain(self.activation), (kernel,) * (len(shape) - 1)
        *keys, out_key = jr.split(key, 3 * len(channels) + 1)
        weights = []
        for before, after in zip((shape[-1], *channels[:-1]), channels, strict=True):
            for fan_in, scale in ((before, 1.0), (after, gain), (after, gain)):
                draw = jr.normal(keys[len(weights)], (*grid, fan_in, after))
                weights.append(draw * scale / math.sqrt(fan_in * math.prod(grid)))
        self.weights = tuple(weights)
        self.biases = tuple(jnp.zeros(w.shape[-1]) for w in weights)
        self.out = MLP(
            2 * channels[-1],
            out_dim,
            key=out_key,
            width=channels[-1],
            depth=1,
            activation=activation,
            zero_head=False,
        )

    def __call__(self, image: Array) -> Array:
        """Images ``(H, W, C, *batch)`` to ``(out, *batch)``."""
        rank, batch = len(self.in_shape), image.shape[len(self.in_shape) :]
        # Compilers are best at convolutions with the batch in front.
        h = jnp.moveaxis(image.reshape((*self.in_shape, -1)), -1, 0)
        letters = "XYZUVW"[: rank - 1]
        layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

        def convolved(i: int, h: Array, stride: int) -> Array:
            steps = (stride,) * (rank - 1)
            out = lax.conv_general_dilated(
                h, self.weights[i], steps, "SAME", dimension_numbers=layout
            )
            return out + self.biases[i].reshape((1,) * rank + (-1,))

        for stage in range(0, len(self.weights), 3):
            h = convolved(stage, h, 2)
            branch = convolved(stage + 1, self.activation(h), 1)
            h = h + convolved(stage + 2, self.activation(branch), 1)
        positions = tuple(range(1, rank))
        pooled = jnp.concatenate([h.mean(positions), h.max(positions)], axis=-1)
        return self.out(pooled.T.reshape((-1, *batch)))
