"""Builders of whole flows on tori, spheres and rotations, in the manner of `laminar.zoo`.

Events are angles in [−π, π), unit vectors or 3 × 3 matrices, and densities refer to the measures
that `laminar.spaces` states. All start as the identity over a uniform base. For proportions, which
sum to one, put `laminar.bijections.simplex.Softmax` behind any flow of D − 1 numbers.
"""

import math
from typing import Any

import jax.numpy as jnp
import jax.random as jr

from laminar._checks import check_sizes
from laminar._typing import Array, PRNGKeyArray, Shape
from laminar.bijections.amortized import amortized
from laminar.bijections.autoregressive import masked_autoregressive
from laminar.bijections.base import AbstractTransform, Invert
from laminar.bijections.compose import Chain, repeat
from laminar.bijections.coupling import coupling as coupling_layer
from laminar.bijections.linear import LU
from laminar.bijections.manifolds import Cylindrical, Projective
from laminar.bijections.rotations import QuaternionMap, RotationCoupling
from laminar.bijections.splines import RationalQuadratic
from laminar.density import AbstractDistribution
from laminar.directional import UniformOn
from laminar.distributions import Uniform
from laminar.flow import Flow
from laminar.spaces import Rotations, Sphere
from laminar.zoo.stacks import conditioned, random_rotation

_CIRCLE = (-math.pi, math.pi)


def torus(
    dim: int,
    *,
    key: PRNGKeyArray,
    layers: int = 6,
    width: int = 128,
    depth: int = 2,
    bins: int = 8,
    cond_dim: int = 0,
    coupling: bool = True,
    base: AbstractDistribution | None = None,
) -> Flow:
    """A flow of angles: circular splines, coupled or autoregressive (Rezende et al. 2020).

    Networks see the cosines and sines of angles, so the density is continuous on the torus. Both
    directions of a coupling layer are one network pass.

    Args:
        dim: Number of angles D.
        key: Draws the weights and the orders.
        layers: Number of layers K.
        width: Hidden units of a conditioner.
        depth: Residual blocks of a conditioner.
        bins: Bins of a spline.
        cond_dim: Length of the condition; 0 for none.
        coupling: Use coupling layers; otherwise autoregressive ones, of which ``log_prob`` is one
            dense pass.
        base: Base distribution, by default uniform on [−π, π]^D.

    Raises:
        InputError: If a size has no meaning.
    """
    stack = conditioned(
        "torus",
        dim,
        RationalQuadratic(bins, interval=_CIRCLE, tails="circular"),
        key=key,
        layers=layers,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        coupled=coupling,
        periodic=True,
    )
    return Flow(Uniform(dim, *_CIRCLE) if base is None else base, stack)


def sphere(
    n: int,
    *,
    key: PRNGKeyArray,
    layers: int = 4,
    width: int = 128,
    depth: int = 2,
    bins: int = 8,
    cond_dim: int = 0,
    base: AbstractDistribution | None = None,
) -> Flow:
    """A flow of the sphere S^n of unit vectors: recursive spline flows (Rezende et al. 2020).

    Each layer turns the sphere, bends the heights of its cylindrical coordinates one given the
    others and the angle given all of them, and turns back; the axes are random and trained from
    there. ``log_prob`` is one dense pass, and sampling costs about as much.

    Args:
        n: Dimension of the sphere; events have n + 1 entries. n = 1 is the circle in the plane.
        key: Draws the weights and the axes.
        layers: Number of layers K.
        width: Hidden units of a conditioner.
        depth: Hidden layers of a conditioner.
        bins: Bins of a spline.
        cond_dim: Length of the condition; 0 for none.
        base: Base distribution, by default uniform on the sphere.

    Raises:
        InputError: If a size has no meaning.
    """
    check_sizes("sphere", cond_dim, n=n, layers=layers, width=width, depth=depth)
    sizes: dict[str, Any] = {"width": width, "depth": depth, "cond_dim": cond_dim}

    def circle(shape: Shape = ()) -> RationalQuadratic:
        return RationalQuadratic(bins, shape, interval=_CIRCLE, tails="circular")

    def height(shape: Shape = ()) -> RationalQuadratic:
        return RationalQuadratic(bins, shape, interval=(-1.0, 1.0), tails=None)

    def alone(bend: AbstractTransform, net_key: PRNGKeyArray) -> AbstractTransform:
        if not cond_dim:
            return bend
        return amortized(bend, cond_dim, width=width, depth=depth, key=net_key)

    def make(layer_key: PRNGKeyArray) -> AbstractTransform:
        turn_key, height_key, angle_key = jr.split(layer_key, 3)
        if n == 1:
            bend = alone(circle((1,)), angle_key)
        else:
            heights = (
                alone(height((1,)), height_key)
                if n == 2
                else masked_autoregressive(n - 1, height(), key=height_key, **sizes)
            )
            bend = coupling_layer(
                n, circle(), n_identity=n - 1, marginal=heights, key=angle_key, **sizes
            )
        turn = Projective(random_rotation(n + 1, key=turn_key))
        cylinder = Cylindrical(n)
        return Chain([Invert(turn), Invert(cylinder), bend, cylinder, turn])

    stack = repeat(make, layers, key=key)
    return Flow(UniformOn(Sphere(n)) if base is None else base, stack)


def rotations(
    *,
    key: PRNGKeyArray,
    layers: int = 6,
    width: int = 128,
    depth: int = 2,
    cond_dim: int = 0,
    base: AbstractDistribution | None = None,
) -> Flow:
    """A flow of the rotations SO(3) as 3 × 3 matrices (Liu et al. 2023).

    Each layer is a Möbius coupling of two columns, which take turns, and a linear map of the
    quaternion; both directions are closed and one network pass. The density is smooth and refers to
    the Haar measure of total one.

    Args:
        key: Draws the weights.
        layers: Number of layers K.
        width: Hidden units of a conditioner.
        depth: Residual blocks of a conditioner.
        cond_dim: Length of the condition; 0 for none.
        base: Base distribution, by default uniform.

    Raises:
        InputError: If a size has no meaning.
    """
    check_sizes("rotations", cond_dim, layers=layers, width=width, depth=depth)

    def make(at: tuple[Array, PRNGKeyArray]) -> AbstractTransform:
        first, net_key = at
        bend = RotationCoupling(first, width=width, depth=depth, cond_dim=cond_dim, key=net_key)
        return Chain([bend, QuaternionMap(Projective(LU(4, bias=False)))])

    firsts = (jnp.arange(layers) % 3).astype(jnp.int32)
    stack = repeat(make, layers, over=(firsts, jr.split(key, layers)))
    return Flow(UniformOn(Rotations()) if base is None else base, stack)
