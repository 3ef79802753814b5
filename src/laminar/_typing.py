"""Type aliases used throughout the library."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

Shape = tuple[int, ...]
Condition = Any
"""What a transform is conditioned on: an array of shape ``cond_shape``, or None."""

__all__ = ["Array", "ArrayLike", "Callable", "Condition", "PRNGKeyArray", "PyTree", "Shape"]
