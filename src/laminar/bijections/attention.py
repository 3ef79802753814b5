"""Autoregressive flows over tokens with a transformer as conditioner, sampled with a KV cache."""

import math

from laminar._errors import ShapeError
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.autoregressive import AbstractAutoregressive
from laminar.bijections.base import AbstractTransform
from laminar.bijections.templates import as_elementwise, as_template
from laminar.nn.attention import CausalTransformer
from laminar.nn.mlp import Activation


class TransformerAutoregressive(AbstractAutoregressive):
    r"""A scalar map of every entry of a token, whose parameters depend on the tokens before it.

        x_t = τ(z_t; θ_t(x_1, …, x_{t−1}, c)),     ln |det| = Σ_t Σ_i ln τ′(z_{t,i}; θ_{t,i})

    Events are (F, T): T tokens of F entries, such as patches of an image (`laminar.tarflow`).
    ``inverse`` (data → latent, for ``log_prob``) is one dense pass. ``forward`` (sampling) is one
    scan over the tokens that keeps keys and values, and does about the work of one dense pass.
    With ``Affine`` it is the layer of TarFlow (Zhai et al. 2024, "Normalizing Flows are Capable
    Generative Models"), but for a learned start token: the first token is transformed as well.

    Args:
        template: The transformer τ, a scalar bijection of shape (); zero network output gives
            exactly this map.
        net: A network from ``(F, T)`` and a condition to ``(P, F, T)`` that sees earlier tokens
            only, with a ``sequential`` method; see `transformer_autoregressive` for building both.

    Raises:
        ShapeError: If the template is not scalar, or the network's parameter count does not fit it.
    """

    net: CausalTransformer

    def __init__(self, template: AbstractTransform, net: CausalTransformer):
        self.template = as_template("TransformerAutoregressive", template, net.params)
        self.net = net

    @property
    def in_shape(self) -> Shape:
        """``(F, T)``."""
        return self.net.in_shape

    def row_cost(self, direction):
        """Parameters and hidden units of all tokens, or the keys and values of all layers."""
        net, length = self.net, self.in_shape[1]
        held = 2 * net.depth if direction == "forward" else 8
        scores = 0 if direction == "forward" else net.blocks.heads * length**2
        return net.params * math.prod(self.in_shape) + held * net.width * length + scores

    def inverse(self, y, condition=None, *, key=None):
        """Data → latent, by one dense pass."""
        theta = self.net(y, condition, self.template.params)
        x, log_det = self.template.inverse_kernel(theta, y)
        return x, log_det.sum((0, 1))

    @property
    def name(self) -> str:
        """The class with the name of its template."""
        return f"TransformerAutoregressive({self.template.name})"


def transformer_autoregressive(
    shape: Shape,
    template: AbstractTransform,
    *,
    key: PRNGKeyArray,
    width: int = 128,
    depth: int = 2,
    heads: int = 4,
    cond_dim: int = 0,
    activation: str | Activation = "gelu",
    order: Array | None = None,
) -> TransformerAutoregressive:
    """Build a `TransformerAutoregressive` layer with a network that fits the template.

    Args:
        shape: ``(F, T)``: the length of a token and the number of tokens.
        template: Scalar bijection of shape ().
        key: Draws the network's weights.
        width: Features inside the transformer.
        depth: Its blocks.
        heads: Heads of attention, a divisor of the width.
        cond_dim: Length of the condition; 0 for none.
        activation: A function of `jax.nn` or its name.
        order: The position of each token in the autoregressive order, by default the natural one.

    Raises:
        InputError: If a size has no meaning.
        ShapeError: If the template is not scalar, or a shape does not fit.
    """
    if len(shape) != 2:
        raise ShapeError(
            f"transformer_autoregressive: events are (entries of a token, tokens), not {shape}."
        )
    template = as_elementwise(template)
    net = CausalTransformer(
        shape[0],
        shape[1],
        template.params.shape[0],
        key=key,
        width=width,
        depth=depth,
        heads=heads,
        cond_dim=cond_dim,
        activation=activation,
        order=order,
    )
    return TransformerAutoregressive(template, net)
