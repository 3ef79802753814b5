"""Coupling layers: one part of an event passes, and sets the scalar map of every other entry."""

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from laminar._errors import InputError, ShapeError
from laminar._params import expand
from laminar._typing import Array, Direction, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractBijection, AbstractTransform, call, check_flat
from laminar.bijections.elementwise import AbstractElementwise, Affine
from laminar.bijections.frames import AbstractSameShape, AbstractTwoWay, as_shape, needed
from laminar.bijections.templates import as_template
from laminar.nn.conv import ConvNet
from laminar.nn.mlp import MLP, Activation, Periodic, apply_network

_USUAL_WIDTH = 128


class AbstractCoupling(AbstractSameShape, AbstractTwoWay, AbstractBijection):
    """Scalar maps of entries whose parameters a network finds from other entries.

    Attributes:
        template: The scalar map, with the parameters of a network that gives zero.
        net: The network.
    """

    template: AbstractElementwise
    net: Callable
    in_shape: Shape = eqx.field(static=True)
    cond_shape: Shape | None = eqx.field(static=True)

    @property
    @abc.abstractmethod
    def _head_shape(self) -> Shape:
        """Shape of the parameters, ``(P, …)``."""

    def _theta(self, passed: Array, condition: Array | None) -> Array:
        """The parameters, ``(P, …, *batch)``."""
        ndim, cond_ndim = len(self.in_shape), len(self.cond_shape or ())
        condition = needed(self, condition)
        head = apply_network(self.net, passed, condition, ndim=ndim, cond_ndim=cond_ndim)
        head = head.reshape(self._head_shape + passed.shape[ndim:])
        return expand(self.template.params, head.ndim) + head

    @property
    def name(self) -> str:
        """The class with the name of its template."""
        return f"{type(self).__name__}({self.template.name})"


class Coupling(AbstractCoupling):
    r"""Scalar maps of the last entries whose parameters come from the first ones.

        y_a = x_a,    y_b = τ(x_b; θ),    θ = template + net(y_a, c),    log_det = Σ_b ln τ′

    with a the first `n_identity` entries and b the rest. Both directions are one pass of the
    network. The template decides the kind of layer: ``Shift()`` is NICE (Dinh et al. 2014),
    ``Affine(max_log_scale=…)`` is RealNVP (Dinh et al. 2017) with a smooth bound on the scales, and
    ``RationalQuadratic(…)`` the coupling spline flow (Durkan et al. 2019). A network that gives
    zero leaves the template, by default the identity.

    The parts are always the first and the last entries: put a `Permute` or a linear map between
    layers, which in a `Repeat` may differ from layer to layer. Of an image (C, H, W), or any event
    with more axes, they are the first and the last channels; for convolutional networks and for
    masks see `laminar.bijections.masks`.

    Args:
        template: A bijection of shape ``()``: an elementwise map, or any scalar bijection, whose
            trained leaves are then the parameters (`as_elementwise`).
        net: A network ``net(y_a)``, or ``net(y_a, c)`` with a condition, that gives (P, D_b), or as
            many numbers in one vector; (P, D_b, H, W) for images. With an attribute
            ``batch_last = True`` it must take trailing batch axes; otherwise it is taken as a
            function of single events and mapped.
        dim: Length D of the vector, or the shape (D, …) of the event.
        n_identity: Length of the part that passes, by default ⌊D/2⌋. It may be 0 with a condition.
        cond_dim: Length of the condition, or its shape, or 0 for none.
        marginal: A bijection of shape ``(n_identity, …)`` for the part that passes, so that one
            layer moves every entry: y_a = marginal(x_a).
        keep_volume: With an `Affine` template, take the mean off the log-scales, so that the map of
            y_b keeps its volume exactly (GIN, Sorrenson et al. 2020).

    Raises:
        InputError: If the volume cannot be kept, since the template is not affine.
        ShapeError: If the parts do not fit: there is nothing to condition on, or the network or
            `marginal` gives another shape.
    """

    marginal: AbstractTransform | None
    n_identity: int = eqx.field(static=True)
    keep_volume: bool = eqx.field(static=True, default=False)  # of older files

    def __init__(
        self,
        template: AbstractTransform,
        net: Callable,
        dim: int | Shape,
        *,
        n_identity: int | None = None,
        cond_dim: int | Shape = 0,
        marginal: AbstractTransform | None = None,
        keep_volume: bool = False,
    ):
        shape = as_shape(dim)
        if not isinstance(cond_dim, int):
            self.cond_shape = tuple(cond_dim)
        else:
            self.cond_shape = (cond_dim,) if cond_dim else None
        n = _check_split(shape, n_identity, cond_dim)
        self.template = check_template("Coupling", template)
        if keep_volume and not isinstance(self.template, Affine):
            raise InputError(
                f"Coupling: keep_volume needs an Affine template, not {self.template.name}."
            )
        self.net = net
        self.marginal = marginal
        self.keep_volume = keep_volume
        self.n_identity = n
        self.in_shape = shape
        passed = (n, *shape[1:])
        if marginal is not None:
            _check_marginal(marginal, passed, self.cond_shape)
        check_network("Coupling", net, passed, self.cond_shape, self._head_shape, self.template)

    @property
    def _head_shape(self) -> Shape:
        return (
            self.template.params.shape[0],
            self.in_shape[0] - self.n_identity,
            *self.in_shape[1:],
        )

    def row_cost(self, direction):
        """The template of all entries, beside two layers of the network."""
        net = self.net
        width = net.first.weight.shape[0] if isinstance(net, MLP | ConvNet) else _USUAL_WIDTH
        hidden = 2 * width * math.prod(self.in_shape[1:])
        each = self.template.row_cost(direction)
        return max(super().row_cost(direction), math.prod(self._head_shape[1:]) * each + hidden)

    def _theta(self, passed: Array, condition: Array | None) -> Array:
        if isinstance(self.net, MLP) and self.net.out_shape == self._head_shape:
            return self.net(passed, needed(self, condition), self.template.params)
        return super()._theta(passed, condition)

    def _move(self, direction: Direction, theta: Array, x: Array) -> tuple[Array, Array]:
        """The template of every entry, over the geometric mean of the scales to keep volume."""
        kernel = getattr(self.template, f"{direction}_kernel")
        if not self.keep_volume:
            return kernel(theta, x)
        # The log-slope of an affine map is the same at all points.
        axes = tuple(range(len(self.in_shape)))
        undo = jnp.exp(-kernel(theta, x)[1].mean(axes, keepdims=True))
        if direction == "forward":
            return kernel(theta, x)[0] * undo, jnp.zeros_like(x)
        return kernel(theta, x * undo)[0], jnp.zeros_like(x)

    def _run(self, direction, x, condition, key):
        passed, moved = x[: self.n_identity], x[self.n_identity :]
        moved_on, marginal = passed, None
        if self.marginal is not None:
            moved_on, marginal = call(self.marginal, direction, passed, condition)
        # The network sees data in either direction.
        theta = self._theta(moved_on if direction == "forward" else passed, condition)
        moved, log_det = self._move(direction, theta, moved)
        total = log_det.sum(tuple(range(len(self.in_shape))))
        return jnp.concatenate([moved_on, moved]), total if marginal is None else total + marginal

    def init_from_data(self, data, condition=None, side="out"):
        """Pass the first entries on to `marginal`."""
        if self.marginal is None:
            return self
        marginal = self.marginal.init_from_data(data[: self.n_identity], condition, side)
        return eqx.tree_at(lambda s: s.marginal, self, marginal)


def coupling(
    dim: int,
    template: AbstractTransform,
    *,
    key: PRNGKeyArray,
    n_identity: int | None = None,
    cond_dim: int = 0,
    width: int = 128,
    depth: int = 2,
    activation: str | Activation = jax.nn.relu,
    film: bool = False,
    periodic: bool = False,
    marginal: AbstractTransform | None = None,
    keep_volume: bool = False,
) -> Coupling:
    """Build a `Coupling` layer with a residual network that fits it and starts at the template.

    Args:
        dim: Length of the vector.
        template: A scalar bijection; see `Coupling`.
        key: Draws the network.
        n_identity: Length of the part that passes, by default half.
        cond_dim: Length of the condition, or 0 for none.
        width: Hidden units of the network.
        depth: Residual blocks of the network.
        activation: A function of `jax.nn` or its name.
        film: Whether the condition modulates every block; see `laminar.nn.mlp.MLP`.
        periodic: Whether entries are angles; the network then sees their cosines and sines, so that
            the map is continuous on the torus.
        marginal: A bijection of the part that passes; see `Coupling`.
        keep_volume: Whether affine maps keep the volume; see `Coupling`.

    Raises:
        InputError: If the volume cannot be kept, since the template is not affine.
        ShapeError: If the parts do not fit.
    """
    n = _check_split((dim,), n_identity, cond_dim)
    scalar = check_template("Coupling", template)
    net = MLP(
        2 * n if periodic else n,
        (scalar.params.shape[0], dim - n),
        key=key,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        activation=activation,
        film=film,
    )
    net = Periodic(net) if periodic else net
    return Coupling(
        scalar,
        net,
        dim,
        n_identity=n,
        cond_dim=cond_dim,
        marginal=marginal,
        keep_volume=keep_volume,
    )


def _check_split(shape: Shape, n_identity: int | None, cond_dim: int | Shape) -> int:
    dim = shape[0]
    n = dim // 2 if n_identity is None else n_identity
    if dim < 1 or (isinstance(cond_dim, int) and cond_dim < 0) or not 0 <= n < dim:
        raise ShapeError(
            f"Coupling: {n} of {dim} entries pass; at least one must be left to transform, and "
            f"cond_dim must be 0 or more (it is {cond_dim})."
        )
    if n == 0 and not cond_dim:
        raise ShapeError(
            f"Coupling: no entry of the event {shape} passes and there is no condition, so there "
            "is nothing to couple with; use the scalar map itself, or give cond_dim."
        )
    return n


def check_template(owner: str, template: AbstractTransform) -> AbstractElementwise:
    """The template of a coupling layer as an elementwise map; errors say why it cannot be one."""
    scalar = as_template(owner, template)
    if scalar.params.shape[0] == 0:
        raise InputError(
            f"{owner}: {template.name} has no parameters that a network could set; take a map "
            "such as Affine() or RationalQuadratic()."
        )
    return scalar


def _check_marginal(marginal: AbstractTransform, passed: Shape, cond_shape: Shape | None) -> None:
    check_flat("Coupling", marginal, exact=False)
    if marginal.in_shape != passed or marginal.out_shape != passed:
        raise ShapeError(
            f"Coupling: the part that passes has shape {passed}, and marginal ({marginal.name}) "
            f"maps {marginal.in_shape} to {marginal.out_shape}."
        )
    drawn = any(step.draws for step in marginal.steps())
    if drawn or marginal.exactness != "exact" or marginal.cond_shape not in (None, cond_shape):
        raise ShapeError(
            f"Coupling: marginal must be exact and take no condition but one of shape {cond_shape};"
            f" {marginal.name} is {marginal.exactness!r} and takes {marginal.cond_shape}."
        )


def check_network(
    owner: str,
    net: Callable,
    passed: Shape,
    cond_shape: Shape | None,
    wanted: Shape,
    template: AbstractElementwise,
) -> None:
    """Evaluate the shape of the network's output on one event, without running it."""
    dtype = template.params.dtype
    x = jax.ShapeDtypeStruct(passed, dtype)
    condition = jax.ShapeDtypeStruct(cond_shape, dtype) if cond_shape else None
    takes = f"an input of shape {passed}" + (
        f" and a condition of shape {cond_shape}" if cond_shape else ""
    )

    def run(x, c):
        return apply_network(net, x, c, ndim=len(passed), cond_ndim=len(cond_shape or ()))

    try:
        out = jax.eval_shape(run, x, condition)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{owner}: the network cannot take {takes}: {error}") from error
    got = getattr(out, "shape", None)
    if got not in (wanted, (math.prod(wanted),)):
        raise ShapeError(
            f"{owner}: the network must give {wanted} (parameters of {template.name}, transformed "
            f"entries) for {takes}, and gives {got}."
        )
