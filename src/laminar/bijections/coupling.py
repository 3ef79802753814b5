"""Coupling layers: one part of a vector passes, and sets the scalar map of every other entry."""

import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from laminar._errors import InputError, ShapeError
from laminar._params import expand
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractBijection, AbstractTransform, call
from laminar.bijections.elementwise import AbstractElementwise
from laminar.bijections.templates import as_elementwise
from laminar.nn.mlp import MLP, Activation, apply_network

_USUAL_WIDTH = 128


class Coupling(AbstractBijection):
    r"""Scalar maps of the last entries whose parameters come from the first ones.

        y_a = x_a,    y_b = τ(x_b; θ),    θ = template + net(y_a, c),    log_det = Σ_b ln τ′

    with a the first `n_identity` entries and b the rest. Both directions are one pass of the
    network. The template decides the kind of layer: ``Shift()`` is NICE (Dinh et al. 2014),
    ``Affine(max_log_scale=…)`` is RealNVP (Dinh et al. 2017) with a smooth bound on the scales, and
    ``RationalQuadratic(…)`` the coupling spline flow (Durkan et al. 2019). A network that gives
    zero leaves the template, by default the identity.

    The parts are always the first and the last entries: put a `Permute` or a linear map between
    layers, which in a `Repeat` may differ from layer to layer.

    Args:
        template: A bijection of shape ``()``: an elementwise map, or any scalar bijection, whose
            trained leaves are then the parameters (`as_elementwise`).
        net: A network ``net(y_a)``, or ``net(y_a, c)`` with a condition, that gives (P, D_b), or as
            many numbers in one vector. With an attribute ``batch_last = True`` it must take
            trailing batch axes; otherwise it is taken as a function of single events and mapped.
        dim: Length D of the vector.
        n_identity: Length of the part that passes, by default ⌊D/2⌋. It may be 0 with a condition.
        cond_dim: Length of the condition, or 0 for none.
        marginal: A bijection of shape ``(n_identity,)`` for the part that passes, so that a single
            layer moves every entry: y_a = marginal(x_a).

    Raises:
        ShapeError: If the parts do not fit: there is nothing to condition on, or the network or
            `marginal` gives another shape.
    """

    template: AbstractElementwise
    net: Callable
    marginal: AbstractTransform | None
    n_identity: int = eqx.field(static=True)
    in_shape: Shape = eqx.field(static=True)
    cond_shape: Shape | None = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        template: AbstractTransform,
        net: Callable,
        dim: int,
        *,
        n_identity: int | None = None,
        cond_dim: int = 0,
        marginal: AbstractTransform | None = None,
    ):
        n = _check_split(dim, n_identity, cond_dim)
        self.template = _check_template(template)
        self.net = net
        self.marginal = marginal
        self.n_identity = n
        self.in_shape = (dim,)
        self.cond_shape = (cond_dim,) if cond_dim else None
        if marginal is not None:
            _check_marginal(marginal, n, self.cond_shape)
        _check_network(net, n, cond_dim, self._head_shape, self.template)

    @property
    def out_shape(self) -> Shape:
        """Equal to ``in_shape``."""
        return self.in_shape

    @property
    def _head_shape(self) -> Shape:
        return (self.template.params.shape[0], self.in_shape[0] - self.n_identity)

    def row_cost(self, direction):
        """The parameters of all entries, beside two layers of the network."""
        width = self.net.first.weight.shape[0] if isinstance(self.net, MLP) else _USUAL_WIDTH
        return max(super().row_cost(direction), math.prod(self._head_shape) + 2 * width)

    def _theta(self, passed: Array, condition: Array | None) -> Array:
        """The parameters, ``(P, D_b, *batch)``."""
        if self.cond_shape is None:
            condition = None
        elif condition is None:
            raise ShapeError(f"Coupling needs a condition of shape {self.cond_shape}; got none.")
        if isinstance(self.net, MLP) and self.net.out_shape == self._head_shape:
            return self.net(passed, condition, self.template.params)
        head = apply_network(self.net, passed, condition)
        head = head.reshape(self._head_shape + passed.shape[1:])
        return expand(self.template.params, head.ndim) + head

    def forward(self, x, condition=None, *, key=None):
        """``([marginal(x_a), τ(x_b; θ)], Σ ln τ′)``."""
        passed, moved = x[: self.n_identity], x[self.n_identity :]
        marginal = None
        if self.marginal is not None:
            passed, marginal = call(self.marginal, "forward", passed, condition)
        moved, log_det = self.template.forward_kernel(self._theta(passed, condition), moved)
        return jnp.concatenate([passed, moved]), _total(log_det, marginal)

    def inverse(self, y, condition=None, *, key=None):
        """``([marginal⁻¹(y_a), τ⁻¹(y_b; θ)], −Σ ln τ′)``."""
        passed, moved = y[: self.n_identity], y[self.n_identity :]
        moved, log_det = self.template.inverse_kernel(self._theta(passed, condition), moved)
        marginal = None
        if self.marginal is not None:
            passed, marginal = call(self.marginal, "inverse", passed, condition)
        return jnp.concatenate([passed, moved]), _total(log_det, marginal)

    def init_from_data(self, data, condition=None, side="out"):
        """Pass the first entries on to `marginal`."""
        if self.marginal is None:
            return self
        marginal = self.marginal.init_from_data(data[: self.n_identity], condition, side)
        return eqx.tree_at(lambda s: s.marginal, self, marginal)

    @property
    def name(self) -> str:
        """The class with the name of its template."""
        return f"Coupling({self.template.name})"


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
    marginal: AbstractTransform | None = None,
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
        marginal: A bijection of the part that passes; see `Coupling`.

    Raises:
        ShapeError: If the parts do not fit.
    """
    n = _check_split(dim, n_identity, cond_dim)
    scalar = _check_template(template)
    net = MLP(
        n,
        (scalar.params.shape[0], dim - n),
        key=key,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        activation=activation,
        film=film,
    )
    return Coupling(scalar, net, dim, n_identity=n, cond_dim=cond_dim, marginal=marginal)


def _total(log_det: Array, marginal: Array | None) -> Array:
    total = log_det.sum(0)
    return total if marginal is None else total + marginal


def _check_split(dim: int, n_identity: int | None, cond_dim: int) -> int:
    n = dim // 2 if n_identity is None else n_identity
    if dim < 1 or cond_dim < 0 or not 0 <= n < dim:
        raise ShapeError(
            f"Coupling: {n} of {dim} entries pass; at least one must be left to transform, and "
            f"cond_dim must be 0 or more (it is {cond_dim})."
        )
    if n == 0 and cond_dim == 0:
        raise ShapeError(
            f"Coupling: no entry of the event ({dim},) passes and there is no condition, so there "
            "is nothing to couple with; use the scalar map itself, or give cond_dim."
        )
    return n


def _check_template(template: AbstractTransform) -> AbstractElementwise:
    if template.in_shape != () or template.out_shape != ():
        raise ShapeError(
            f"Coupling: the template must be a scalar map of shape (), and {template.name} maps "
            f"{template.in_shape} to {template.out_shape}."
        )
    scalar = as_elementwise(template)
    if scalar.params.shape[0] == 0:
        raise InputError(
            f"Coupling: {template.name} has no parameters that a network could set; take a map "
            "such as Affine() or RationalQuadratic()."
        )
    return scalar


def _check_marginal(marginal: AbstractTransform, n: int, cond_shape: Shape | None) -> None:
    if marginal.in_shape != (n,) or marginal.out_shape != (n,):
        raise ShapeError(
            f"Coupling: the part that passes has shape ({n},), and marginal ({marginal.name}) maps "
            f"{marginal.in_shape} to {marginal.out_shape}."
        )
    if marginal.exactness != "exact" or marginal.cond_shape not in (None, cond_shape):
        raise ShapeError(
            f"Coupling: marginal must be exact and take no condition but one of shape {cond_shape};"
            f" {marginal.name} is {marginal.exactness!r} and takes {marginal.cond_shape}."
        )


def _check_network(
    net: Callable, n: int, cond_dim: int, wanted: Shape, template: AbstractElementwise
) -> None:
    """Evaluate the shape of the network's output on one event, without running it."""
    dtype = template.params.dtype
    x = jax.ShapeDtypeStruct((n,), dtype)
    condition = jax.ShapeDtypeStruct((cond_dim,), dtype) if cond_dim else None
    takes = f"an input of shape ({n},)" + (
        f" and a condition of shape ({cond_dim},)" if cond_dim else ""
    )
    try:
        out = jax.eval_shape(lambda x, c: apply_network(net, x, c), x, condition)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"Coupling: the network cannot take {takes}: {error}") from error
    got = getattr(out, "shape", None)
    if got not in (wanted, (wanted[0] * wanted[1],)):
        raise ShapeError(
            f"Coupling: the network must give {wanted} (parameters of {template.name}, transformed "
            f"entries) for {takes}, and gives {got}."
        )
