"""Masked autoregressive flows with any scalar transformer, invertible at the cost of one pass."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax

from laminar._typing import Array, ArrayLike, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractBijection, AbstractTransform
from laminar.bijections.elementwise import AbstractElementwise
from laminar.bijections.frames import AbstractSameShape
from laminar.bijections.templates import as_elementwise, as_template
from laminar.nn.masked import MaskedMLP

_LARGE = 4  # of 184, 989 and 2,944 parameters on 128 units, the two latter gain (on a CPU)


class AbstractAutoregressive(AbstractSameShape, AbstractBijection):
    """A scalar map of every entry, whose parameters a network finds from entries before it.

    Attributes:
        template: The transformer, whose parameters are those of a network that gives zero.
        net: The network, with a dense and a ``sequential`` pass.
    """

    template: AbstractElementwise
    net: Any

    @property
    def cond_shape(self) -> Shape | None:
        """What the network takes."""
        return self.net.cond_shape

    def forward(self, x, condition=None, *, key=None):
        """Latent → data, by the incremental pass."""
        step = self.template.forward_kernel
        return self.net.sequential(step, x, condition, self.template.params)


class MaskedAutoregressive(AbstractAutoregressive):
    r"""A scalar map of every entry whose parameters depend on the entries before it.

        x_d = τ(z_d; θ_d(x_1, …, x_{d−1}, c)),     ln |det| = Σ_d ln τ′(z_d; θ_d)

    ``inverse`` (data → latent, for ``log_prob``) is one dense pass of the masked network.
    ``forward`` (sampling) is sequential, but incremental: all D steps together cost about one pass
    (see `laminar.nn.masked`). ``Invert`` of this layer is the inverse autoregressive flow.

    Papamakarios et al. (2017), "Masked Autoregressive Flow"; Kingma et al. (2016), "Improving
    Variational Inference with Inverse Autoregressive Flow"; Durkan et al. (2019), "Neural Spline
    Flows".

    Args:
        template: The transformer τ, a scalar bijection of shape (); zero network output gives
            exactly this map.
        net: A network from ``(D,)`` and a condition to ``(P, D)`` with the autoregressive property
            and a ``sequential`` method; see `masked_autoregressive` for building both.

    Raises:
        ShapeError: If the template is not scalar, or the network's parameter count does not fit it.
    """

    net: MaskedMLP

    def __init__(self, template: AbstractTransform, net: MaskedMLP):
        self.template = as_template("MaskedAutoregressive", template, net.params)
        self.net = net

    @property
    def in_shape(self) -> Shape:
        """``(D,)``."""
        return (self.net.dim,)

    def row_cost(self, direction):
        """The template of all entries in the dense pass, of one in the incremental one."""
        net, each = self.net, self.template.row_cost(direction)
        if direction == "forward":
            return each + 4 * net.dim + net.width * (len(net.hidden) + 1)
        return each * net.dim + 2 * net.width

    def inverse(self, y, condition=None, *, key=None):
        """Data → latent, by one dense pass."""
        h = self.net.units(y, condition)
        # The gradient keeps h and, where they are much larger, not the parameters of all entries:
        # to compute them again is then faster than to write and read them.
        large = self.net.params * self.net.dim > _LARGE * self.net.width
        transform = eqx.filter_checkpoint(_transform) if large else _transform
        return transform(self.template, self.net, h, y)


def _transform(template: AbstractElementwise, net: MaskedMLP, h: Array, y: Array):
    x, log_det = template.inverse_kernel(net.parameters(h, template.params), y)
    return x, log_det.sum(0)


def masked_autoregressive(
    dim: int,
    template: AbstractTransform,
    *,
    width: int,
    depth: int,
    cond_dim: int = 0,
    residual: bool = False,
    activation: Callable[[Array], Array] = jax.nn.relu,
    order: Array | None = None,
    graph: ArrayLike | Sequence[Sequence[int]] | None = None,
    periodic: bool = False,
    key: PRNGKeyArray,
) -> MaskedAutoregressive:
    """Build a `MaskedAutoregressive` layer with a network that fits the template.

    Args:
        dim: Number of entries D.
        template: Scalar bijection of shape ().
        width: Hidden units in a layer.
        depth: Hidden layers, or residual blocks if `residual`.
        cond_dim: Length of the condition; 0 for none.
        residual: Use residual blocks.
        activation: Elementwise activation.
        order: The position of each entry in the autoregressive order, by default the natural one.
        graph: Instead of an order, a directed acyclic graph of the entries: an array (D, D) whose
            entry [i, j] is not zero where entry i depends on entry j, or a list of the parents of
            each entry. Then θ_i depends on the parents of i alone, and ``forward`` takes as many
            steps as the longest path of the graph has entries (Wehenkel & Louppe 2021, "Graphical
            Normalizing Flows"). In a stack of layers an entry depends on its ancestors, as far
            back as there are layers.
        periodic: Whether entries are angles; see `laminar.nn.masked.MaskedMLP`.
        key: Draws the network's weights.

    Raises:
        InputError: If an argument has no meaning, or the graph has a cycle.
        ShapeError: If the template is not scalar, or `order` or `graph` does not fit.
    """
    template = as_elementwise(template)
    net = MaskedMLP(
        dim,
        template.params.shape[0],
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        residual=residual,
        activation=activation,
        order=order,
        graph=graph,
        periodic=periodic,
        key=key,
    )
    return MaskedAutoregressive(template, net)
