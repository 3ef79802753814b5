"""Residual multi-layer perceptrons that keep the batch last, and a door for any other network.

Every network here maps features-major arrays: an input ``(in_dim, *batch)`` and a condition
``(cond_dim, *batch)`` (or ``(cond_dim,)``, shared by all) to ``out_shape + batch``. Weights act
from the left, so no array is ever transposed.
"""

import functools
import math
from collections.abc import Callable
from typing import ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import eval_context

from laminar._errors import InputError, ShapeError
from laminar._params import expand
from laminar._typing import Array, PRNGKeyArray, Shape

Activation = Callable[[Array], Array]


def resolve_activation(activation: str | Activation) -> Activation:
    """The function in `jax.nn` of this name, or the function given.

    Only functions of `jax.nn` (and others with an importable name) can be written to a model file.

    Raises:
        InputError: If `jax.nn` has no such function.
    """
    if not isinstance(activation, str):
        return activation
    if not callable(getattr(jax.nn, activation, None)):
        raise InputError(
            f"There is no activation {activation!r} in jax.nn; use 'relu', 'silu', 'gelu', 'tanh' "
            "or another function of that module."
        )
    return getattr(jax.nn, activation)


@functools.lru_cache(maxsize=64)
def activation_gain(activation: Activation) -> float:
    """The factor g = E[a(z)²]^(−1/2), z ~ N(0, 1), that keeps activations at unit scale.

    It is √2 for ReLU, which is the initialisation of He et al. (2015), and near 1.6 for tanh.
    """
    z = np.linspace(-8.0, 8.0, 2049)
    weight = np.exp(-0.5 * z**2)
    with eval_context():
        value = np.asarray(activation(jnp.asarray(z, jnp.float32)), np.float64)
    moment = float(np.sum(weight * value**2) / np.sum(weight))
    return 1.0 / math.sqrt(moment) if moment > 0 else 1.0


def matmul(weight: Array, h: Array) -> Array:
    """W h as a product of two matrices: ``(*out, n)`` times ``(n, *batch)`` is ``(*out, *batch)``.

    With more than two axes the transpose of the product, which training runs, would be compiled to
    one that first copies the cotangent in another order.
    """
    out, batch, n = weight.shape[:-1], h.shape[1:], h.shape[0]
    flat = weight.reshape((math.prod(out), n)) @ h.reshape((n, math.prod(batch)))
    return flat.reshape(out + batch)


def folds_bias() -> bool:
    """Whether a bias goes into the product: on a CPU. Elsewhere products may round to TF32."""
    return jax.default_backend() == "cpu"


def affine(weight: Array, bias: Array, h: Array) -> Array:
    """W h + b; on a CPU as one product, with b as a last column of W and a row of ones below h.

    A sum of product and bias would be formed again by each of its readers, of which a spline has
    dozens, and inside a loop over stacked layers each of these would look the bias up by number;
    such readers are too intricate for the compiler to vectorise.

    Args:
        weight: ``(*out, n)``.
        bias: ``(*out)``.
        h: ``(n, *batch)``.

    Returns:
        ``(*out, *batch)``.
    """
    if not folds_bias():
        product = matmul(weight, h)
        return product + expand(bias, product.ndim)
    ones = jnp.ones((1, *h.shape[1:]), h.dtype)
    weight = jnp.concatenate([weight, bias[..., None]], -1)
    return matmul(weight, jnp.concatenate([h, ones]))


class Dense(eqx.Module):
    """The affine layer y = W x + b with the batch last: ``(in_dim, *batch) -> (out_dim, *batch)``.

    Args:
        in_dim: Length of the input.
        out_dim: Length of the output.
        key: Draws the weights.
        gain: Weights are N(0, gain² / fan_in), biases zero (LeCun et al. 1998 at gain 1).
        fan_in: How many numbers are added up in one output, by default `in_dim`.
        use_bias: Whether there is a bias b.
    """

    weight: Array
    bias: Array | None
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        key: PRNGKeyArray,
        gain: float = 1.0,
        fan_in: int | None = None,
        use_bias: bool = True,
    ):
        scale = gain / math.sqrt(max(1, in_dim if fan_in is None else fan_in))
        self.weight = scale * jr.normal(key, (out_dim, in_dim))
        self.bias = jnp.zeros((out_dim,)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        """W x + b."""
        y = matmul(self.weight, x)
        return y if self.bias is None else y + expand(self.bias, y.ndim)


def shaped(layer: Dense, out_shape: Shape, h: Array, offset: Array | None = None) -> Array:
    """What a layer with a bias gives, as ``out_shape + batch``.

    Args:
        layer: The layer.
        out_shape: Shape of its output.
        h: ``(n, *batch)``.
        offset: Added to the output; its axes are the first ones of `out_shape`.
    """
    bias = cast(Array, layer.bias).reshape(out_shape)
    if offset is not None:
        bias = bias + expand(offset, bias.ndim)
    return affine(layer.weight.reshape((*out_shape, layer.weight.shape[1])), bias, h)


def film_layer(cond_dim: int, width: int, *, key: PRNGKeyArray) -> Dense:
    """The affine layer from a condition to scales γ and shifts β of so many units, in this order.

    The scale half starts at γ = 0, the shift half at the size of the units it moves.
    """
    film = Dense(cond_dim, 2 * width, key=key)
    return eqx.tree_at(lambda layer: layer.weight, film, film.weight.at[:width].set(0.0))


class ResidualBlock(eqx.Module):
    """h + W₂ a(W₁ a(h)), the pre-activation block of He et al. (2016), with optional FiLM.

    With a condition c the inner units are modulated feature by feature before the second
    activation, u ↦ (1 + γ(c)) u + β(c), as in Perez et al. (2018).

    Args:
        width: Number of units.
        key: Draws the weights.
        activation: a, elementwise.
        film_dim: Length of the condition that modulates, or 0 for none.
        gain: Scale of the branch at the start, relative to the stream it is added to.
    """

    inner: Dense
    outer: Dense
    film: Dense | None
    activation: Activation = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        *,
        key: PRNGKeyArray,
        activation: Activation = jax.nn.relu,
        film_dim: int = 0,
        gain: float = 1.0,
    ):
        inner_key, outer_key, film_key = jr.split(key, 3)
        self.activation = activation
        a = activation_gain(activation)
        self.inner = Dense(width, width, key=inner_key, gain=a)
        self.outer = Dense(width, width, key=outer_key, gain=a * gain)
        self.film = film_layer(film_dim, width, key=film_key) if film_dim else None

    def __call__(self, h: Array, condition: Array | None = None) -> Array:
        """``(width, *batch) -> (width, *batch)``."""
        u = self.inner(self.activation(h))
        if self.film is not None:
            if condition is None:
                raise ShapeError("ResidualBlock: it is modulated by a condition, and got none.")
            gamma, beta = jnp.split(expand(self.film(condition), u.ndim), 2)
            u = (1.0 + gamma) * u + beta
        return h + self.outer(self.activation(u))


class MLP(eqx.Module):
    r"""Residual network from a vector and a condition to an array of any shape, batch last.

        h_0 = W x + W_c c + b,    h_k = h_{k−1} + block_k(h_{k−1}),    out = W_o a(h_K) + b_o

    The head (W_o, b_o) starts at zero, so a layer whose parameters are ``template + MLP(x)`` starts
    at its template. Other weights are normal with the variance that keeps activations at unit
    scale (`activation_gain`; He et al. 2015 for ReLU), and each block starts at 1/√depth of it, so
    that the stream stays of order one at any depth.

    Args:
        in_dim: Length of the input; 0 makes a function of the condition alone.
        out_shape: Shape of the output, such as (parameters, dimensions).
        key: Draws the weights.
        width: Hidden units.
        depth: Number of residual blocks, each with two layers.
        cond_dim: Length of the condition, or 0 for none.
        activation: A function of `jax.nn` or its name. ReLU is the fastest on a CPU; take a smooth
            one ("silu", "gelu", "tanh") where derivatives of the flow matter.
        film: Whether the condition modulates every block, instead of entering once beside the
            input (which equals concatenation).
        zero_head: Whether the head starts at zero.

    Raises:
        InputError: For sizes that are not positive, or an unknown activation.
    """

    first: Dense
    condition_first: Dense | None
    blocks: tuple[ResidualBlock, ...]
    head: Dense
    in_dim: int = eqx.field(static=True)
    out_shape: Shape = eqx.field(static=True)
    cond_dim: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        in_dim: int,
        out_shape: Shape | int,
        *,
        key: PRNGKeyArray,
        width: int = 128,
        depth: int = 2,
        cond_dim: int = 0,
        activation: str | Activation = jax.nn.relu,
        film: bool = False,
        zero_head: bool = True,
    ):
        if width < 1 or depth < 0 or in_dim < 0 or cond_dim < 0:
            raise InputError(
                f"MLP: width must be at least 1 and depth, in_dim and cond_dim at least 0; got "
                f"width={width}, depth={depth}, in_dim={in_dim}, cond_dim={cond_dim}."
            )
        if film and not cond_dim:
            raise InputError("MLP: film=True needs a condition; give cond_dim.")
        first_key, condition_key, head_key, blocks_key = jr.split(key, 4)
        self.in_dim = in_dim
        self.out_shape = (out_shape,) if isinstance(out_shape, int) else tuple(out_shape)
        self.cond_dim = cond_dim
        self.activation = resolve_activation(activation)
        fan_in = in_dim if film else in_dim + cond_dim
        self.first = Dense(in_dim, width, key=first_key, fan_in=fan_in)
        self.condition_first = (
            Dense(cond_dim, width, key=condition_key, fan_in=fan_in, use_bias=False)
            if cond_dim and not film
            else None
        )
        self.blocks = tuple(
            ResidualBlock(
                width,
                key=block_key,
                activation=self.activation,
                film_dim=cond_dim if film else 0,
                gain=1.0 / math.sqrt(max(1, depth)),
            )
            for block_key in jr.split(blocks_key, depth)
        )
        gain = 0.0 if zero_head else activation_gain(self.activation)
        self.head = Dense(width, math.prod(self.out_shape), key=head_key, gain=gain)

    def __call__(
        self, x: Array, condition: Array | None = None, offset: Array | None = None
    ) -> Array:
        """Evaluate the network.

        Args:
            x: ``(in_dim, *batch)``.
            condition: ``(cond_dim, *batch)`` or ``(cond_dim,)``; ignored when `cond_dim` is 0.
            offset: Added to the output; its axes are the first ones of `out_shape`.

        Returns:
            ``out_shape + batch``.

        Raises:
            ShapeError: If the input or the condition has another length.
        """
        if x.ndim < 1 or x.shape[0] != self.in_dim:
            raise ShapeError(f"MLP takes an input ({self.in_dim}, *batch) and got {x.shape}.")
        condition = taken("MLP", condition, (self.cond_dim,) if self.cond_dim else None)
        h = self.first(x)
        if self.condition_first is not None and condition is not None:
            h = h + expand(self.condition_first(condition), h.ndim)
        for block in self.blocks:
            h = block(h, condition)
        return shaped(self.head, self.out_shape, self.activation(h), offset)


class Concatenated(eqx.Module):
    """Gives a network of one vector a condition by joining the two: ``net([x, condition])``.

    Use it to make a conditioner of a network such as ``equinox.nn.MLP``.

    Args:
        net: Any callable of one vector, or of ``(n, *batch)`` if it has ``batch_last = True``.
    """

    net: Callable

    @property
    def batch_last(self) -> bool:
        """Whether the wrapped network takes trailing batch axes."""
        return getattr(self.net, "batch_last", False)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """``net([x, condition])``; ``net(x)`` without a condition."""
        if condition is None:
            return self.net(x)
        return self.net(joined(x, condition))


def taken(owner: str, condition: Array | None, shape: Shape | None) -> Array | None:
    """The condition of a network, of ``shape + batch``; None where it takes none.

    Raises:
        ShapeError: If there is none, or one of another shape.
    """
    if shape is None:
        return None
    if condition is None or condition.shape[: len(shape)] != shape:
        got = "none" if condition is None else str(condition.shape)
        wanted = ", ".join(map(str, shape))
        raise ShapeError(f"{owner} takes a condition ({wanted}, *batch) and got {got}.")
    return condition


def joined(*parts: Array, batch: Shape | None = None) -> Array:
    """Arrays end to end along the first axis, each shared by the `batch`: that of the first array.

    Such as vectors ``(n, *batch)`` and a condition ``(c,)``, to ``(n + c, *batch)``.
    """
    rest = parts[0].shape[1:] if batch is None else batch
    parts = tuple(expand(part, 1 + len(rest)) for part in parts)
    return jnp.concatenate([jnp.broadcast_to(part, (len(part), *rest)) for part in parts])


class Periodic(eqx.Module):
    """A network of angles that is continuous on the torus: ``net([cos x, sin x], condition)``.

    Args:
        net: A network of vectors twice as long, batch last.
    """

    net: MLP
    batch_last: ClassVar[bool] = True

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """What the network gives for the points of the circles."""
        return self.net(circular_features(x), condition)


def circular_features(x: Array) -> Array:
    """The cosines and sines of angles ``(n, *batch)``, as ``(2 n, *batch)``."""
    x = jnp.where(jnp.isinf(x), 0, x)  # no angle, and its own map says so
    return jnp.concatenate([jnp.cos(x), jnp.sin(x)])


def apply_network(
    net: Callable, x: Array, condition: Array | None = None, *, ndim: int = 1, cond_ndim: int = 1
) -> Array:
    """Apply any network to events, by default vectors, with trailing batch axes.

    A network with an attribute ``batch_last = True`` (as all of this package) takes the batch
    itself. Any other callable is taken as a function of single events, ``net(x)`` or, when there
    is a condition, ``net(x, condition)``, and is mapped over the trailing axes.

    Args:
        net: The network.
        x: ``(in_dim, *batch)``.
        condition: ``(cond_dim, *batch)``, or ``(cond_dim,)`` to share one, or None.
        ndim: Number of axes of one event.
        cond_ndim: Number of axes of one condition.

    Returns:
        What the network gives for one event, followed by the batch axes.
    """
    if x.ndim == ndim or getattr(net, "batch_last", False):
        return net(x) if condition is None else net(x, condition)
    cond_axis = None if condition is None or condition.ndim == cond_ndim else -1
    one = functools.partial(apply_network, net, ndim=ndim, cond_ndim=cond_ndim)
    return jax.vmap(one, in_axes=(-1, cond_axis), out_axes=-1)(x, condition)


def time_features(t: Array, count: int, highest: float = 32.0) -> Array:
    r"""Fourier features of a scalar such as the time of a continuous flow (Tancik et al. 2020).

        cos(π f_k t), sin(π f_k t),    f_k = highest^{k/(count−1)},  k = 0, …, count−1

    The lowest frequency makes half a turn on [0, 1], so the features tell all times apart.

    Args:
        t: ``batch``, of any shape.
        count: Number of frequencies.
        highest: The highest frequency in half turns per unit of t.

    Returns:
        ``(2 count, *batch)``.

    Raises:
        InputError: If `count` is not positive.
    """
    if count < 1:
        raise InputError(f"time_features needs at least one frequency, not {count}.")
    frequencies = np.pi * highest ** (np.arange(count) / max(1, count - 1))
    angle = expand(jnp.asarray(frequencies, t.dtype), t.ndim + 1) * t[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])
