"""A table as `fit_density` needs it: checked, standardised, split, on the host."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._errors import InputError, ShapeError
from laminar._params import Frozen
from laminar._typing import ArrayLike, PRNGKeyArray
from laminar.conditional import Standardise

_LEAST_ROWS = 8
_MOST_HELD_OUT = 20_000


@dataclasses.dataclass
class Table:
    """Standardised rows on the host, and how to go back.

    Attributes:
        x: Rows (N, D), float64; those of weight zero are left out.
        condition: Conditions (N, C), or None.
        weights: Positive weights (N,), or None.
        loc, scale: Of each column, before.
        rows: The number that each row has in the data given.
        fit, held: Which rows to train on, and which are held out.
        embed: What standardises conditions.
    """

    x: np.ndarray
    condition: np.ndarray | None
    weights: np.ndarray | None
    loc: np.ndarray
    scale: np.ndarray
    rows: np.ndarray
    fit: np.ndarray
    held: np.ndarray
    embed: Standardise | None = None

    @property
    def given(self) -> int:
        """Columns of the condition."""
        return 0 if self.condition is None else self.condition.shape[1]

    @property
    def joint(self) -> np.ndarray:
        """Conditions and rows side by side."""
        if self.condition is None:
            return self.x
        return np.concatenate([self.condition, self.x], axis=1)

    def at(self, name: str, rows: np.ndarray) -> Any:
        """Some rows of a field that may be absent."""
        array = getattr(self, name)
        return None if array is None else array[rows]


def make_table(
    key: PRNGKeyArray,
    data: ArrayLike,
    condition: ArrayLike | None,
    weights: ArrayLike | None,
    validation: float,
) -> Table:
    """Check and standardise what `fit_density` was given, and draw the rows to hold out.

    Raises:
        InputError, ShapeError: As `fit_density` says.
    """
    x = _numbers(data, "data")
    if x.ndim != 2 or x.shape[1] < 1:
        raise ShapeError(f"fit_density: data must be rows (N, D), and has shape {x.shape}.")
    c = None if condition is None else _numbers(condition, "condition")
    if c is not None and (c.ndim != 2 or len(c) != len(x)):
        raise ShapeError(
            f"fit_density: condition must be (N, C) with {len(x)} rows, and has shape {c.shape}."
        )
    if not 0 < validation < 1:
        raise InputError(f"fit_density: validation is {validation}; give a share between 0 and 1.")
    w = _check_weights(weights, len(x))
    rows = np.arange(len(x))
    if w is not None and not w.all():
        # A row of weight zero counts as absent, and its logarithm as a kernel would be infinite.
        rows = np.flatnonzero(w)
        x, w = x[rows], w[rows]
        c = None if c is None else c[rows]
    if len(x) < _LEAST_ROWS:
        what = "rows" if weights is None else "rows of positive weight"
        raise InputError(f"fit_density needs at least {_LEAST_ROWS} {what}, not {len(x)}.")
    for what, array in (("data", x), ("condition", c)):
        if array is not None and not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0]
            raise InputError(
                f"fit_density: {what} is not finite at row {rows[row]}, column {column}."
            )
    constant = np.flatnonzero(x.min(0) == x.max(0))
    if len(constant):
        raise InputError(
            f"fit_density: column {constant[0]} is constant, so it has no density; drop it."
        )
    order = np.random.default_rng(host_seed(key)).permutation(len(x))
    held = min(max(round(validation * len(x)), 2), _MOST_HELD_OUT)
    loc, scale = np.average(x, 0, w), x.std(0)
    table = Table((x - loc) / scale, None, w, loc, scale, rows, order[held:], order[:held])
    if c is not None:
        middle, spread = c.mean(0), c.std(0)
        spread = np.where(spread > 0, spread, 1.0)
        table.condition = (c - middle) / spread
        dtype = jax.dtypes.canonicalize_dtype(np.float64)
        arrays = (Frozen(jnp.asarray(v, dtype)) for v in (middle, spread))
        table.embed = Standardise(*arrays, in_shape=(c.shape[1],))
    return table


def _numbers(value: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"fit_density: {what} must be an array of numbers, and not {type(value).__name__}."
        ) from error


def _check_weights(weights: ArrayLike | None, rows: int) -> np.ndarray | None:
    if weights is None:
        return None
    w = _numbers(weights, "weights")
    if w.shape != (rows,):
        raise ShapeError(f"fit_density: weights must be ({rows},), and have shape {w.shape}.")
    if not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise InputError("fit_density: weights must be finite and non-negative, not all zero.")
    return w


def host_seed(key: PRNGKeyArray) -> int:
    """A seed for NumPy from a key."""
    return int(jr.bits(key, (), jnp.uint32)) % 2**31
