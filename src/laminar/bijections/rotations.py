"""Bijections of the rotations SO(3), kept as 3 × 3 matrices, with respect to the Haar measure."""

import equinox as eqx
import jax
import jax.numpy as jnp

from laminar._errors import ShapeError
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractTransform, call
from laminar.bijections.frames import needed
from laminar.bijections.manifolds import AbstractWithin, Projective, bare, moebius
from laminar.nn.mlp import MLP, Activation
from laminar.spaces import Rotations, Sphere, from_quaternion, to_quaternion


class AbstractOnRotations(AbstractWithin):
    """A bijection of rotations, 3 × 3 matrices, with respect to the Haar measure."""

    @property
    def in_space(self):
        """The rotations."""
        return Rotations()


class RotationCoupling(AbstractOnRotations):
    r"""One column of a rotation sets a Möbius map of the circle of the next (Liu et al. 2023).

    The first column c_1 in the order passes. The second lies on the circle of unit vectors across
    c_1, which is turned by an angle α and drawn away from a point of the plane, ω, where P takes
    away what lies along c_1:

        ω = P r / (1 + √(1 + |P r|²))

        c_2′ = h_ω(turn_α c_2),    h_ω(z) = (1 − |ω|²) / |z − ω|² (z − ω) − ω,    c_3′ = c_1 × c_2′
        log_det = ln((1 − |ω|²) / |turn_α c_2 − ω|²),    (r, α) = net(c_1, condition)

    No frame of the plane is chosen, so the map is as smooth as the network. A network that gives
    zero leaves the identity. Let the columns take turns as the first.

    Args:
        first: Which column passes, 0, 1 or 2.
        width: Hidden units of the network.
        depth: Residual blocks of the network.
        cond_dim: Length of the condition; 0 for none.
        activation: A function of `jax.nn` or its name; a smooth one gives a smooth density.
        key: Draws the network.

    Raises:
        InputError: If a size has no meaning.
    """

    net: MLP
    first: Array
    cond_shape: Shape | None = eqx.field(static=True)

    def __init__(
        self,
        first: int | Array = 0,
        *,
        width: int = 64,
        depth: int = 2,
        cond_dim: int = 0,
        activation: str | Activation = jax.nn.silu,
        key: PRNGKeyArray,
    ):
        self.first = jnp.asarray(first, jnp.int32)
        self.net = MLP(
            3, 4, key=key, width=width, depth=depth, cond_dim=cond_dim, activation=activation
        )
        self.cond_shape = (cond_dim,) if cond_dim else None

    def _columns(self, x: Array) -> tuple[Array, Array]:
        """The first two columns in the order."""
        return tuple(jnp.take(x, (self.first + k) % 3, axis=1) for k in (0, 1))  # pyright: ignore

    def _rebuilt(self, first: Array, second: Array) -> Array:
        columns = jnp.stack([first, second, jnp.cross(first, second, axis=0)], 1)
        return jnp.take(columns, (jnp.arange(3, dtype=jnp.int32) - self.first) % 3, axis=1)

    def _theta(self, first: Array, condition: Array | None) -> tuple[Array, Array]:
        theta = self.net(first, needed(self, condition))
        return theta[:3] - jnp.sum(theta[:3] * first, 0)[None] * first, theta[3]

    def _forward(self, x, condition):
        first, second = self._columns(x)
        raw, angle = self._theta(first, condition)
        image, log_det = moebius(raw, _turn(first, second, angle))
        return self._rebuilt(first, image), log_det

    def _inverse(self, y, condition):
        first, second = self._columns(y)
        raw, angle = self._theta(first, condition)
        image, log_det = moebius(-raw, second)
        return self._rebuilt(first, _turn(first, image, -angle)), log_det


def _turn(axis: Array, x: Array, angle: Array) -> Array:
    """Vectors across an axis turned about it."""
    return jnp.cos(angle)[None] * x + jnp.sin(angle)[None] * jnp.cross(axis, x, axis=0)


class QuaternionMap(AbstractOnRotations):
    r"""A map of rotations through their quaternions, unit vectors ±q of S³ (Liu et al. 2023).

    A bijection of S³ that gives opposite points opposite images is one of the rotations, with the
    same log-det: S³ covers SO(3) twice, and its surface measure is the Haar measure up to a factor.

    Args:
        bijection: `Projective` maps, `ExponentialMap` with ``symmetric=True``, inverses and chains
            of these, on S³.

    Raises:
        ShapeError: If it is not one of these.
    """

    bijection: AbstractTransform

    def __check_init__(self):
        steps = [bare(step) for step in self.bijection.steps()]
        odd = all(isinstance(s, Projective) or getattr(s, "symmetric", False) for s in steps)
        if not odd or self.bijection.in_space != Sphere(3):
            raise ShapeError(
                f"QuaternionMap takes bijections of S³ that give opposite points opposite images: "
                f"Projective, or ExponentialMap(3, symmetric=True); not {self.bijection.name}."
            )

    @property
    def cond_shape(self) -> Shape | None:
        """The condition of the bijection."""
        return self.bijection.cond_shape

    def _apply(self, direction, x, condition):
        q, log_det = call(self.bijection, direction, to_quaternion(x), condition)
        return from_quaternion(q), log_det

    def _forward(self, x, condition):
        return self._apply("forward", x, condition)

    def _inverse(self, y, condition):
        return self._apply("inverse", y, condition)

    @property
    def name(self) -> str:
        """The class with the name of the bijection."""
        return f"QuaternionMap({self.bijection.name})"
