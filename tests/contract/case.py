"""What a case of the contract suite is, and parameters that differ from the start."""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu

from laminar._params import partition
from laminar.bijections import elementwise
from laminar.bijections.base import AbstractTransform

INF = math.inf


class Case(NamedTuple):
    """One bijection of the contract suite.

    Attributes:
        name: Unique; the test's name.
        make: ``make(key)`` gives the bijection at random order-one parameters.
        domain: The interval on which every input of `forward` is valid.
        image: The interval on which every input of `inverse` is valid.
        slack: Factor on the error budgets, for maps that amplify rounding; say why where it is
            not one.
        edges: Further values at which gradients must be finite, such as knots.
        slow: Whether another case says nearly as much in less time.
        long: Whether compiling it takes so long that float64 is left to the long run.
    """

    name: str
    make: Callable[..., AbstractTransform]
    domain: tuple[float, float] = (-INF, INF)
    image: tuple[float, float] = (-INF, INF)
    slack: float = 1.0
    edges: tuple[float, ...] = ()
    slow: bool = False
    long: bool = False


def randomise(bijection, key, scale: float = 1.0):
    """Replace every trained leaf by normal draws of standard deviation `scale`."""
    trained, rest = partition(bijection)
    leaves, treedef = jtu.tree_flatten(trained)
    keys = jr.split(key, max(len(leaves), 1))
    drawn = [
        scale * jr.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=False)
    ]
    return eqx.combine(jtu.tree_unflatten(treedef, drawn), rest)


def affine(shape):
    """A maker of affine maps of a shape."""
    return lambda key: randomise(elementwise.Affine(shape=shape), key)
