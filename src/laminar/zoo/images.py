"""Builders of flows of images and sequences; `laminar.zoo` has them too."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import jax.random as jr

from laminar._checks import check_sizes
from laminar._errors import ShapeError
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.attention import transformer_autoregressive
from laminar.bijections.base import AbstractTransform, Invert
from laminar.bijections.compose import Chain, Reshape, repeat
from laminar.bijections.dequantise import Dequantise, dequantisation_noise
from laminar.bijections.elementwise import Affine, Sigmoid
from laminar.bijections.image import Squeeze, conv1x1, multiscale
from laminar.bijections.linear import ActNorm
from laminar.bijections.masks import conv_coupling
from laminar.density import AbstractDistribution
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.zoo.stacks import MAX_LOG_SCALE


def glow(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    scales: int = 2,
    layers: int = 8,
    width: int = 64,
    depth: int = 2,
    cond_dim: int = 0,
    template: AbstractTransform | None = None,
    levels: int | None = None,
    variational: bool = False,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Multiscale flow of images or sequences (Dinh et al. 2017; Glow, Kingma & Dhariwal 2018).

    Each scale squeezes space into channels, runs `layers` steps of `ActNorm`, invertible 1×1
    convolution and coupling with a convolutional network, and lets half of the channels go to the
    latent, which is flat. The coupling nearest to the latent reads what stays and moves what goes,
    so what leaves early has a law that depends on the rest. Both directions cost the same.

    Args:
        shape: ``(C, *space)``; every length of space is a multiple of 2^scales.
        key: Draws the weights and the permutations of channels.
        scales: Number of scales.
        layers: Steps of each scale.
        width: Channels of a network.
        depth: Its gated residual blocks.
        cond_dim: Length of the condition, which modulates every block; 0 for none.
        template: The scalar map of the couplings, by default affine with bounded scale; a
            `RationalQuadratic`, say, for splines.
        levels: For data of whole numbers 0, …, levels − 1, such as 256 for 8-bit pixels: the flow
            then ends with a sigmoid and `Dequantise`, and its log-density is a bound. None for
            continuous data.
        variational: Whether the noise within the cells is a flow too, instead of uniform.
        base: Base distribution of ``(prod(shape),)``, by default a standard normal.

    Raises:
        InputError: If a size has no meaning.
        ShapeError: If the lengths of space are not multiples of 2^scales.
    """
    check_sizes("glow", cond_dim, scales=scales, layers=layers, width=width, depth=depth)
    shape = tuple(shape)
    if len(shape) < 2 or any(s % 2**scales for s in shape[1:]):
        raise ShapeError(
            f"glow: an event is (channels, *space) with lengths of space that are multiples of "
            f"{2**scales} for {scales} scales, and {shape} is not."
        )
    template = Affine(max_log_scale=MAX_LOG_SCALE) if template is None else template
    noise_key, *keys = jr.split(key, scales + 1)

    def level(whole: Shape, key: PRNGKeyArray) -> Chain:
        squeeze = Squeeze(whole)
        event = squeeze.out_shape

        def make(key: PRNGKeyArray) -> Chain:
            net_key, mix_key = jr.split(key)
            coupling = conv_coupling(
                event,
                template,
                key=net_key,
                width=width,
                depth=depth,
                cond_shape=(cond_dim,) if cond_dim else None,
            )
            return Chain([coupling, conv1x1(event, key=mix_key), ActNorm(event, per_channel=True)])

        return Chain([repeat(make, layers, key=key), Invert(squeeze)])

    whole, parts = shape, []
    for level_key in keys:
        parts.insert(0, level(whole, level_key))
        channels, *space = parts[0].in_shape
        whole = (channels // 2, *space)
    noise = None
    if levels is not None and variational:
        noise = dequantisation_noise(shape, key=noise_key, width=width, depth=depth)
    return _flow([multiscale(parts)], shape, levels, noise, base)


def tarflow(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    patch: int = 2,
    layers: int = 4,
    width: int = 128,
    depth: int = 2,
    heads: int = 4,
    cond_dim: int = 0,
    template: AbstractTransform | None = None,
    levels: int | None = None,
    base: AbstractDistribution | None = None,
) -> Flow:
    """Transformer autoregressive flow over patches (TarFlow, Zhai et al. 2024).

    The image is cut into patches, which each layer takes in an order and the next in its reverse.
    ``log_prob`` is one dense pass for each layer; sampling is one scan over the patches for each,
    with keys and values kept, and does about the same work.

    Args:
        shape: ``(C, *space)``; `patch` divides every length of space.
        key: Draws the weights.
        patch: Side of a patch.
        layers: Number of flow layers.
        width: Features inside a transformer.
        depth: Its blocks of attention.
        heads: Its heads, a divisor of `width`.
        cond_dim: Length of the condition, such as the embedding of a class; 0 for none.
        template: The scalar map of every entry, by default affine with bounded scale.
        levels: As in `glow`.
        base: Base distribution of shape (entries of a patch, patches), by default a standard
            normal.

    Raises:
        InputError: If a size has no meaning.
        ShapeError: If `patch` does not divide the lengths of space.
    """
    check_sizes("tarflow", cond_dim, patch=patch, layers=layers, width=width, depth=depth)
    shape = tuple(shape)
    squeeze = Squeeze(shape, factor=patch)
    entries, *grid = squeeze.out_shape
    tokens = (entries, math.prod(grid))
    template = Affine(max_log_scale=MAX_LOG_SCALE) if template is None else template

    def make(at: tuple[Array, PRNGKeyArray]) -> AbstractTransform:
        order, net_key = at
        return transformer_autoregressive(
            tokens,
            template,
            key=net_key,
            width=width,
            depth=depth,
            heads=heads,
            cond_dim=cond_dim,
            order=order,
        )

    natural = jnp.arange(tokens[1], dtype=jnp.int32)
    orders = jnp.stack([natural[::-1] if i % 2 else natural for i in range(layers)])
    stack = repeat(make, layers, over=(orders, jr.split(key, layers)))
    parts = [stack, Reshape(tokens, squeeze.out_shape), Invert(squeeze)]
    return _flow(parts, shape, levels, None, base)


def _flow(
    parts: Sequence[AbstractTransform],
    shape: Shape,
    levels: int | None,
    noise: AbstractTransform | None,
    base: AbstractDistribution | None,
) -> Flow:
    """The flow of a chain, which for discrete data ends with their cells."""
    tail = [] if levels is None else [Sigmoid(shape), Dequantise(shape, levels, noise)]
    base = Normal(parts[0].in_shape) if base is None else base
    return Flow(base, Chain([*parts, *tail]))
