"""A velocity with its divergence in closed form, for `laminar.bijections.continuous`."""

import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from laminar._errors import InputError, ShapeError
from laminar._params import expand
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.nn.mlp import joined, matmul


class PotentialField(eqx.Module):
    r"""The velocity v = −∇Φ of a potential, and its divergence −ΔΦ (OT-Flow, Onken et al. 2021).

        Φ(s) = wᵀ u_n + ½ |A s|² + b·z,    s = [z, t, c]
        u_1 = a(K_1 s + b_1),    u_i = u_{i−1} + h a(K_i u_{i−1} + b_i),    a(x) = ln(2 cosh x)

    With the slopes tanh of a, the adjoints p_i = ∂Φ/∂u_i, h_1 = 1 and h_i = h for the others,

        ΔΦ = Σ_i h_i Σ_j p_ij (1 − tanh² x_ij) |∇_z x_ij|² + |A_z|²,    x_i = K_i u_{i−1} + b_i

    so one hidden layer takes the time of v alone, and each further one products with D vectors.
    Optimal transport by a quadratic cost has such a velocity; train it by
    `laminar.matching.flow_matching`, or by likelihood. The constant of Φ is left out. A starts
    small and w at zero, so that a flow of it starts near the identity.

    Args:
        shape: Shape of one event; z is the event as a vector.
        key: Draws the weights.
        width: Hidden units.
        depth: n, hidden layers.
        rank: Rows of A, by default 10 or, if smaller, the length of s.
        cond_dim: Length of the condition c, or 0 for none.

    Raises:
        InputError: If a size is out of range.
        ShapeError: If a condition is missing.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    head: Array
    root: Array
    drift: Array
    shape: Shape = eqx.field(static=True)
    cond_dim: int = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        shape: Shape | int,
        *,
        key: PRNGKeyArray,
        width: int = 128,
        depth: int = 2,
        rank: int | None = None,
        cond_dim: int = 0,
    ):
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.cond_dim = cond_dim
        dim = math.prod(self.shape)
        size = dim + 1 + cond_dim
        rank = min(10, size) if rank is None else rank
        for name, value in {"dim": dim, "width": width, "depth": depth, "rank": rank}.items():
            if value < 1 or cond_dim < 0:
                raise InputError(
                    f"PotentialField: {name} must be at least 1 and cond_dim at least 0; got "
                    f"{name}={value} and cond_dim={cond_dim}."
                )
        root_key, *keys = jr.split(key, 1 + depth)
        self.weights = tuple(
            jr.normal(k, (width, width if i else size)) / math.sqrt(width if i else size)
            for i, k in enumerate(keys)
        )
        self.biases = tuple(jnp.zeros(width) for _ in keys)
        self.head, self.drift = jnp.zeros(width), jnp.zeros(dim)
        # At A = 0 its gradient would be zero too.
        self.root = 0.1 / math.sqrt(size) * jr.normal(root_key, (rank, size))

    def __call__(self, t: Array, z: Array, condition: Array | None = None) -> Array:
        """The velocity, ``shape + batch``; arguments as in `VelocityField`."""
        return self._velocity(t, z, condition, False)[0]

    def with_divergence(
        self, t: Array, z: Array, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """The velocity, and tr ∂v/∂z, ``batch``."""
        return self._velocity(t, z, condition, True)

    def _velocity(self, t, z, condition, trace: bool) -> tuple[Array, Array]:
        s, dim = self._joined(t, z, condition), math.prod(self.shape)
        step = 1 / max(1, len(self.weights) - 1)
        h, gradients = s, jnp.zeros((), s.dtype)
        tanhs, squares = [], []
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = matmul(weight, h) + expand(bias, s.ndim)
            tanh, scale = jnp.tanh(x), step if i else 1
            tanhs.append(tanh)
            h = (h if i else 0) + scale * jnp.logaddexp(x, -x)
            if trace:  # ∇_z x_i and ∇_z u_i, (units, D, *batch), the first x's without the batch
                inner = matmul(weight, gradients) if i else expand(weight[:, :dim], s.ndim + 1)
                squares.append((inner * inner).sum(1))
                gradients = gradients + scale * tanh[:, None] * inner
        adjoint, laplacian = expand(self.head, s.ndim), (self.root[:, :dim] ** 2).sum()
        for i in reversed(range(len(self.weights))):
            moved = (step if i else 1) * adjoint
            if trace:
                laplacian = laplacian + (moved * (1 - tanhs[i] ** 2) * squares[i]).sum(0)
            weight = self.weights[i] if i else self.weights[0][:, :dim]
            pulled = matmul(weight.T, moved * tanhs[i])
            adjoint = adjoint + pulled if i else pulled
        slope = adjoint + matmul(self.root[:, :dim].T, matmul(self.root, s))
        slope = slope + expand(self.drift, s.ndim)
        return -slope.reshape(z.shape), jnp.broadcast_to(-laplacian, s.shape[1:])

    def _joined(self, t: Array, z: Array, condition: Array | None) -> Array:
        """The vectors [z, t, c], with the batch last."""
        flat = z.reshape((math.prod(self.shape), *z.shape[len(self.shape) :]))
        parts = [flat, jnp.asarray(t, z.dtype)[None]]
        if self.cond_dim:
            if condition is None:
                raise ShapeError(
                    f"PotentialField needs a condition of shape ({self.cond_dim},); got none."
                )
            parts.append(condition)
        return joined(*parts)
