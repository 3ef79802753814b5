"""Type aliases used throughout the library."""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

Shape = tuple[int, ...]
Direction = Literal["forward", "inverse"]
Condition = Any
"""What a transform is conditioned on: an array of shape ``cond_shape``, or None."""

__all__ = [
    "Array",
    "ArrayLike",
    "Callable",
    "Condition",
    "Direction",
    "PRNGKeyArray",
    "PyTree",
    "Shape",
]
