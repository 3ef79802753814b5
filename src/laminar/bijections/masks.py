"""Coupling layers of images and sequences: masks, and convolutional networks as conditioners.

Events are channels-first, ``(C, *space)``, as in `laminar.bijections.image`.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from laminar._errors import ShapeError
from laminar._params import expand
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractTransform
from laminar.bijections.coupling import AbstractCoupling, Coupling, check_network, check_template
from laminar.nn.conv import ConvNet
from laminar.nn.mlp import Activation


def checkerboard_mask(shape: Shape, flip: bool | Array = False) -> Array:
    """Every other position, in all channels: booleans of `shape`, true where indices sum to even.

    Args:
        shape: ``(C, *space)``.
        flip: Whether to take the others.
    """
    odd = np.indices(shape[1:]).sum(0) % 2 == 1
    return jnp.broadcast_to(jnp.asarray(odd)[None], shape) == jnp.asarray(flip)


def channel_mask(shape: Shape, flip: bool | Array = False) -> Array:
    """The first ⌊C/2⌋ channels: booleans of `shape`; arguments as in `checkerboard_mask`."""
    first = np.arange(shape[0]) < shape[0] // 2
    return expand(jnp.asarray(first), len(shape)) & jnp.ones(shape, bool) != jnp.asarray(flip)


class MaskedCoupling(AbstractCoupling):
    r"""Scalar maps where a mask is false, with parameters from the entries where it is true.

        y = m ⊙ x + (1 − m) ⊙ τ(x; θ),    θ = template + net(m ⊙ x, c)

    as in RealNVP (Dinh et al. 2017) with a checkerboard. The network computes parameters at all
    entries; for halves of the channels `laminar.Coupling` does half of that work.

    Args:
        template: A bijection of shape ``()``; see `laminar.Coupling`.
        net: A network ``net(x)``, or ``net(x, c)``, that gives ``(P, *shape)``; with an attribute
            ``batch_last = True`` it must take trailing batch axes.
        mask: Booleans of the event's shape, true where entries pass. An array that is not trained,
            so that stacked layers can differ in it.
        cond_shape: Shape of the condition, or None.

    Raises:
        ShapeError: If the template is not scalar or the network gives another shape.
    """

    mask: Array

    def __init__(
        self,
        template: AbstractTransform,
        net: Callable,
        mask: Array,
        *,
        cond_shape: Shape | None = None,
    ):
        self.template = check_template("MaskedCoupling", template)
        self.net, self.mask = net, jnp.asarray(mask, bool)
        self.in_shape, self.cond_shape = self.mask.shape, cond_shape
        check_network(
            "MaskedCoupling", net, self.in_shape, cond_shape, self._head_shape, self.template
        )

    @property
    def _head_shape(self) -> Shape:
        return (self.template.params.shape[0], *self.in_shape)

    def row_cost(self, direction):
        """The parameters of all entries, beside the channels of a convolutional network."""
        width = self.net.head.weight.shape[1] if isinstance(self.net, ConvNet) else 0
        return math.prod(self._head_shape) + 4 * width * math.prod(self.in_shape[1:])

    def _run(self, direction, x, condition, key):
        kernel, mask = getattr(self.template, f"{direction}_kernel"), expand(self.mask, x.ndim)
        y, log_det = kernel(self._theta(jnp.where(mask, x, 0), condition), x)
        log_det = jnp.where(mask, 0, log_det)
        return jnp.where(mask, x, y), log_det.sum(tuple(range(len(self.in_shape))))


def conv_coupling(
    shape: Shape,
    template: AbstractTransform,
    *,
    key: PRNGKeyArray,
    mask: Array | None = None,
    n_identity: int | None = None,
    width: int = 64,
    depth: int = 2,
    kernel: int = 3,
    cond_shape: Shape | None = None,
    activation: str | Activation = "relu",
) -> Coupling | MaskedCoupling:
    """A coupling layer with a convolutional network that fits it and starts at the template.

    Args:
        shape: ``(C, *space)``.
        template: A scalar bijection; see `laminar.Coupling`.
        key: Draws the network.
        mask: What passes, such as a `checkerboard_mask`; without one, the first channels do.
        n_identity: How many channels pass, by default half.
        width: Channels of the network.
        depth: Its blocks.
        kernel: Length of its kernels.
        cond_shape: Shape of the condition: a vector ``(n,)``, or ``(channels, *space)``.
        activation: A function of `jax.nn` or its name.

    Raises:
        ShapeError: If the parts do not fit.
    """
    scalar, shape = check_template("conv_coupling", template), tuple(shape)
    passed = shape[0]
    if mask is None:
        passed = shape[0] // 2 if n_identity is None else n_identity
        if not 0 < passed < shape[0]:
            raise ShapeError(
                f"conv_coupling: {passed} of {shape[0]} channels pass; some must, and some not."
            )
    net = ConvNet(
        (passed, *shape[1:]),
        (scalar.params.shape[0], shape[0] - passed if mask is None else passed),
        key=key,
        width=width,
        depth=depth,
        kernel=kernel,
        cond_shape=cond_shape,
        activation=activation,
    )
    if mask is None:
        return Coupling(scalar, net, shape, n_identity=passed, cond_dim=cond_shape or 0)
    return MaskedCoupling(scalar, net, mask, cond_shape=cond_shape)
