"""Who depends on whom: directed acyclic graphs of columns, and hidden units that keep to them.

A graph is kept as the parents of each column. The *level* of a column is the length of the longest
path that leads to it, so columns of one level do not depend on each other, and all of them are
known once the levels before are.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from laminar._errors import InputError, ShapeError
from laminar._typing import ArrayLike

Graph = tuple[tuple[int, ...], ...]


def parents_of(graph: ArrayLike | Sequence[Sequence[int]], dim: int) -> Graph:
    """The parents of each column.

    Args:
        graph: An array (dim, dim) whose entry [i, j] is not zero where column i depends on column
            j, or a list of the parents of each column.
        dim: Number of columns D.

    Raises:
        ShapeError: If the graph is not one of `dim` columns.
        InputError: If a parent is no column, or the graph has a cycle; the message names one.
    """
    if hasattr(graph, "shape"):
        matrix = np.asarray(graph)
        if matrix.shape != (dim, dim):
            raise ShapeError(f"The graph has shape {matrix.shape}, not ({dim}, {dim}).")
        rows = [np.flatnonzero(row).tolist() for row in matrix]
    else:
        rows = list(graph)  # pyright: ignore[reportArgumentType]
        if len(rows) != dim:
            raise ShapeError(f"The graph lists the parents of {len(rows)} columns, not of {dim}.")
    parents = tuple(tuple(sorted({int(j) for j in row})) for row in rows)
    for i, row in enumerate(parents):
        if row and not 0 <= row[0] <= row[-1] < dim:
            raise InputError(f"The graph gives column {i} the parents {row}, of 0…{dim - 1}.")
    levels(parents)
    return parents


@functools.lru_cache(maxsize=64)
def levels(parents: Graph) -> tuple[int, ...]:
    """The level of each column, from 0.

    Raises:
        InputError: If there is a cycle.
    """
    level = [-1] * len(parents)
    waiting, current = list(range(len(parents))), 0
    while waiting:
        ready = [i for i in waiting if all(level[j] >= 0 for j in parents[i])]
        if not ready:
            raise InputError(f"The graph has a cycle: {_cycle(parents, level)}.")
        for i in ready:
            level[i] = current
        waiting, current = [i for i in waiting if level[i] < 0], current + 1
    return tuple(level)


def _cycle(parents: Graph, level: Sequence[int]) -> str:
    """A cycle among the columns without a level, in words."""
    path = [level.index(-1)]
    while path[-1] not in path[:-1]:
        path.append(next(j for j in parents[path[-1]] if level[j] < 0))
    path = path[path.index(path[-1]) :]
    return f"column {path[0]} depends on " + ", which depends on ".join(map(str, path[1:]))


class Units(NamedTuple):
    """Hidden units that keep to a graph, sorted by level.

    Attributes:
        sees: Which inputs each unit sees, (width, D).
        hidden: Which units (second axis) each unit sees: those that see no input it does not.
        head: Which units the parameters of each column see: those that see only its parents.
        level: From which level on each unit is final, one more than that of the last input it sees.
    """

    sees: np.ndarray
    hidden: np.ndarray
    head: np.ndarray
    level: np.ndarray


@functools.lru_cache(maxsize=64)
def units_of(parents: Graph, width: int, conditional: bool) -> Units:
    """Spread `width` units evenly over the sets of parents that occur.

    A unit that sees no input would be a constant, so there is none unless with a condition, or
    where there is nothing else.

    Raises:
        InputError: If there are fewer units than sets.
    """
    level = np.asarray(levels(parents))
    final = {row: 1 + max((int(level[j]) for j in row), default=-1) for row in parents}
    sets = sorted(final, key=lambda row: (final[row], row))
    if not conditional and len(sets) > 1:
        sets = [row for row in sets if row]
    if width < len(sets):
        raise InputError(
            f"The graph has {len(sets)} different sets of parents, and each needs a hidden unit of "
            f"its own; the width is {width}."
        )
    held = [sets[i * len(sets) // width] for i in range(width)]
    sees = np.zeros((width, len(parents)), bool)
    for unit, row in enumerate(held):
        sees[unit, list(row)] = True
    allowed = np.zeros((len(parents), len(parents)), bool)
    for i, row in enumerate(parents):
        allowed[i, list(row)] = True
    return Units(
        sees,
        _within(sees, sees),
        _within(sees, allowed),
        np.asarray([final[row] for row in held], np.int32),
    )


def _within(small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """Whether each row of `small` (second axis) is a subset of each row of `large` (first)."""
    return (~large).astype(np.float32) @ small.astype(np.float32).T == 0
