"""Causal transformers over sequences of tokens, whose step-by-step pass costs about a dense one.

Tokens are features-major with the batch last, ``(features, T, *batch)``. The sequential pass
computes one token after the other and keeps the keys and values of those before (the KV cache), so
no token is computed twice.
"""

import functools
import math
from typing import ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from laminar._checks import check_sizes
from laminar._errors import InputError
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.nn.masked import Step, as_order
from laminar.nn.mlp import Activation, Dense, activation_gain, affine, resolve_activation, taken

_EXPANSION = 4
_SMALL = 1e-5


class AttentionBlock(eqx.Module):
    """Pre-norm causal self-attention and a two-layer network, both added to the stream.

        h ← h + W_o attention(norm(h)),    h ← h + W₂ a(W₁ norm(h))

    Vaswani et al. (2017); norms as in Xiong et al. (2020), without scale and shift, which the
    products that follow contain.

    Args:
        width: Number of features.
        heads: Number of heads, a divisor of the width.
        key: Draws the weights.
        activation: a, elementwise.
        gain: Scale of each branch at the start, relative to the stream it is added to.
    """

    qkv: Dense
    out: Dense
    inner: Dense
    outer: Dense
    heads: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key: PRNGKeyArray,
        activation: Activation = jax.nn.gelu,
        gain: float = 1.0,
    ):
        qkv_key, out_key, inner_key, outer_key = jr.split(key, 4)
        self.heads, self.activation = heads, activation
        self.qkv = Dense(width, 3 * width, key=qkv_key, use_bias=False)
        self.out = Dense(width, width, key=out_key, gain=gain)
        self.inner = Dense(width, _EXPANSION * width, key=inner_key)
        outer_gain = activation_gain(activation) * gain
        self.outer = Dense(_EXPANSION * width, width, key=outer_key, gain=outer_gain)

    def _heads(self, h: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each ``(heads, features of one, …)``."""
        qkv = self.qkv(_normalise(h))
        q, k, v = qkv.reshape((3, self.heads, -1, *h.shape[1:]))
        return q / math.sqrt(q.shape[1]), k, v

    def _finish(self, h: Array, attended: Array) -> Array:
        h = h + self.out(attended.reshape(h.shape))
        return h + self.outer(self.activation(self.inner(_normalise(h))))

    def __call__(self, h: Array) -> Array:
        """All tokens at once, ``(width, T, B) -> (width, T, B)``."""
        q, k, v = self._heads(h)
        # In full precision, as the steps are, or the two passes would differ on a GPU.
        exact = lax.Precision.HIGHEST
        scores = jnp.einsum("hdtb,hdsb->hbts", q, k, precision=exact)
        earlier = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        weights = jax.nn.softmax(jnp.where(earlier, scores, -jnp.inf), axis=-1)
        return self._finish(h, jnp.einsum("hbts,hdsb->hdtb", weights, v, precision=exact))

    def step(self, h: Array, cache: Array, layer: Array, t: Array) -> tuple[Array, Array]:
        """The token at t alone.

        Args:
            h: ``(width, B)``.
            cache: Keys and values of every layer and token, ``(L, 2, heads, features, T, B)``;
                zero where they are not known yet.
            layer: The number of this layer.
            t: The position of the token.

        Returns:
            The new stream ``(width, B)``, and the cache with this token's keys and values.
        """
        q, k, v = self._heads(h)
        now = jnp.stack([k, v])[None, :, :, :, None]
        zero = jnp.zeros((), t.dtype)
        cache = lax.dynamic_update_slice(cache, now, (layer, zero, zero, zero, t, zero))
        keys, values = lax.dynamic_index_in_dim(cache, layer, keepdims=False)
        # Sums of products, not matrix products: those would copy the cache into another order.
        scores = (q[:, :, None] * keys).sum(1)
        known = (jnp.arange(keys.shape[2], dtype=t.dtype) <= t)[None, :, None]
        weights = jax.nn.softmax(jnp.where(known, scores, -jnp.inf), axis=1)
        return self._finish(h, (weights[:, None] * values).sum(2)), cache


class CausalTransformer(eqx.Module):
    r"""A network from tokens (F, T) to parameters (P, F, T); those of a token see earlier ones.

    The sequence is shifted by one: a learned start token stands in the first place, so the first
    parameters depend on the condition alone. Positions are learned, a condition is added to every
    token after a linear map, and the head starts at zero, so that a layer starts at its template.
    Layers are scanned: compile time does not grow with depth.

    Args:
        features: Length F of a token.
        length: Number T of tokens.
        params: Number P of parameters for each entry of a token.
        key: Draws the weights.
        width: Features inside.
        depth: Number of blocks (`AttentionBlock`).
        heads: Number of heads, a divisor of the width.
        cond_dim: Length of the condition, or 0 for none.
        activation: A function of `jax.nn` or its name.
        order: The position 0, …, T−1 of each token in the autoregressive order, by default the
            natural one; an integer array, so that stacked layers can differ in it.

    Raises:
        InputError: If a size is not positive, `heads` does not divide the width, or `order` is not
            a permutation.
        ShapeError: If `order` has another length.
    """

    order: Array
    start: Array
    position: Array
    first: Dense
    condition_first: Dense | None
    blocks: AttentionBlock
    head: Array
    head_bias: Array
    in_shape: Shape = eqx.field(static=True)
    params: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    cond_dim: int = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        features: int,
        length: int,
        params: int,
        *,
        key: PRNGKeyArray,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        cond_dim: int = 0,
        activation: str | Activation = jax.nn.gelu,
        order: Array | None = None,
    ):
        sizes = {"features": features, "length": length, "params": params, "width": width}
        check_sizes("CausalTransformer", **sizes, depth=depth, heads=heads)
        if width % heads or cond_dim < 0:
            raise InputError(
                f"CausalTransformer: heads must divide the width and cond_dim be 0 or more; got "
                f"heads={heads}, width={width}, cond_dim={cond_dim}."
            )
        start_key, position_key, first_key, condition_key, key = jr.split(key, 5)
        self.order = as_order("CausalTransformer", length, order)
        self.start = jr.normal(start_key, (width,))
        self.position = jr.normal(position_key, (width, length))
        self.first = Dense(features, width, key=first_key)
        self.condition_first = (
            Dense(cond_dim, width, key=condition_key, use_bias=False) if cond_dim else None
        )
        make = functools.partial(
            AttentionBlock,
            width,
            heads,
            activation=resolve_activation(activation),
            gain=1 / math.sqrt(2 * depth),
        )
        self.blocks = eqx.filter_vmap(lambda k: make(key=k))(jr.split(key, depth))
        self.head = jnp.zeros((params, features, width))
        self.head_bias = jnp.zeros((params, features))
        self.in_shape, self.params = (features, length), params
        self.width, self.depth, self.cond_dim = width, depth, cond_dim

    @property
    def cond_shape(self) -> Shape | None:
        """``(cond_dim,)``, or None without a condition."""
        return (self.cond_dim,) if self.cond_dim else None

    def _condition_term(self, condition: Array | None, dtype) -> Array:
        """What is added to every token, ``(width, B)`` or ``(width, 1)``."""
        if self.condition_first is None:
            return jnp.zeros((self.width, 1), dtype)
        condition = cast(Array, taken("CausalTransformer", condition, self.cond_shape))
        return self.condition_first(condition).reshape((self.width, -1))

    def _parameters(self, h: Array, offset: Array | None) -> Array:
        bias = self.head_bias if offset is None else self.head_bias + offset[:, None]
        return affine(self.head, bias, _normalise(h))

    def __call__(
        self, x: Array, condition: Array | None = None, offset: Array | None = None
    ) -> Array:
        """The dense pass.

        Args:
            x: ``(F, T, *batch)``.
            condition: ``(cond_dim,)`` or ``(cond_dim, *batch)``.
            offset: ``(P,)``, added to the parameters of every entry.

        Returns:
            Parameters ``(P, F, T, *batch)``.
        """
        tokens = _take(x, jnp.argsort(self.order), 1).reshape((*x.shape[:2], -1))
        start = jnp.broadcast_to(self.start[:, None, None], (self.width, 1, tokens.shape[2]))
        h = jnp.concatenate([start, self.first(tokens[:, :-1])], 1)
        h = h + self.position[:, :, None] + self._condition_term(condition, x.dtype)[:, None]
        dynamic, static = eqx.partition(self.blocks, eqx.is_array)
        h = lax.scan(lambda h, part: (eqx.combine(part, static)(h), None), h, dynamic)[0]
        theta = _take(self._parameters(h, offset), self.order, 2)
        return theta.reshape((*theta.shape[:3], *x.shape[2:]))

    def sequential(
        self,
        step: Step,
        x: Array,
        condition: Array | None = None,
        offset: Array | None = None,
    ) -> tuple[Array, Array]:
        """Solve y_t = step(θ_t(y_1, …, y_{t−1}), x_t) token by token, by one scan with a cache.

        The values equal those of T dense passes up to rounding, and the work that of about one.

        Args:
            step: Maps parameters ``(P, *s)`` and x ``(*s)`` to y and log-derivatives ``(*s)``,
                element by element.
            x: ``(F, T, *batch)``.
            condition: ``(cond_dim,)`` or ``(cond_dim, *batch)``.
            offset: ``(P,)``, added to the parameters of every entry.

        Returns:
            y of shape ``(F, T, *batch)`` and the summed log-dets ``(*batch)``.
        """
        tokens = _take(x, jnp.argsort(self.order), 1).reshape((*x.shape[:2], -1))
        length, batch = tokens.shape[1:]
        dynamic, static = eqx.partition(self.blocks, eqx.is_array)
        term = self._condition_term(condition, x.dtype)
        layers = jnp.arange(self.depth, dtype=jnp.int32)

        def body(carry, at):
            token, cache, log_det = carry
            t, position, x_now = at

            def through(carry, at):
                part, layer = at
                return eqx.combine(part, static).step(*carry, layer, t), None

            h = token + position[:, None] + term
            (h, cache), _ = lax.scan(through, (h, cache), (dynamic, layers))
            y_now, log_det_now = step(self._parameters(h, offset), x_now)
            return (self.first(y_now), cache, log_det + log_det_now.sum(0)), y_now

        heads = self.blocks.heads
        cache = (self.depth, 2, heads, self.width // heads, length, batch)
        start = (
            jnp.broadcast_to(self.start[:, None], (self.width, batch)),
            jnp.zeros(cache, x.dtype),
            jnp.zeros((batch,), x.dtype),
        )
        xs = (jnp.arange(length, dtype=jnp.int32), self.position.T, jnp.moveaxis(tokens, 1, 0))
        (_, _, log_det), y = lax.scan(body, start, xs)
        y = _take(jnp.moveaxis(y, 0, 1), self.order, 1)
        return y.reshape(x.shape), log_det.reshape(x.shape[2:])


def _normalise(h: Array) -> Array:
    """Mean zero and variance one over the features."""
    h = h - h.mean(0, keepdims=True)
    return h * lax.rsqrt((h * h).mean(0, keepdims=True) + _SMALL)


def _take(x: Array, index: Array, axis: int) -> Array:
    return jnp.take(x, index, axis=axis, unique_indices=True, mode="clip")
