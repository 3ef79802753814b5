"""What the estimators share: rows checked as scikit-learn does, weights, seeds, and copies."""

from typing import Any, ClassVar, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state, validation
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from laminar import io
from laminar._errors import InputError

LEAST_ROWS = 8
"""Fewer rows than this are not fitted."""


class Packed(NamedTuple):
    """A model as the bytes of its file, in the state that copies between processes are made of."""

    data: bytes


class FlowEstimator(BaseEstimator):
    """Base of the estimators: parameters in the constructor, what is learned in names with ``_``.

    A model holds functions of JAX that cannot be copied as they are, so the state of an estimator
    has it as the bytes of a laminar file, which is complete, checked, and runs no code.
    """

    _models: ClassVar[tuple[str, ...]] = ("model_",)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {**super().__getstate__()}  # pyright: ignore[reportGeneralTypeIssues]
        for name in self._models:
            if name in state:
                state[name] = Packed(io.to_bytes(state[name]))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpacked = {
            name: io.from_bytes(value.data) if isinstance(value, Packed) else value
            for name, value in state.items()
        }
        super().__setstate__(unpacked)


def validate_data(estimator: BaseEstimator, *data: Any, **options: Any) -> Any:
    """scikit-learn's function of this name, whose result has as many arrays as were given."""
    return validation.validate_data(estimator, *data, **options)


def seed_of(random_state: Any) -> int:
    """A seed from what scikit-learn calls a random state; an integer always gives the same."""
    return int(check_random_state(random_state).randint(2**31 - 1))


def weights_of(sample_weight: Any, X: np.ndarray) -> np.ndarray | None:
    """Weights (N,), non-negative and not all zero, or None where none are given."""
    if sample_weight is None:
        return None
    return _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)


def kept(weights: np.ndarray | None, rows: int, owner: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rows with a weight, and their weights, of mean one.

    Raises:
        InputError: When too few are left.
    """
    w = np.ones(rows) if weights is None else weights
    index = np.flatnonzero(w > 0)
    if len(index) < LEAST_ROWS:
        raise InputError(
            f"{owner}: only n_samples={len(index)} rows have a positive weight, and fitting needs "
            f"at least {LEAST_ROWS}; give more rows."
        )
    return index, w[index] / w[index].mean()


def average(log_p: np.ndarray, weights: Any) -> float:
    """The weighted mean of log-densities; rows of weight zero do not count, whatever theirs is."""
    if weights is None:
        return float(np.mean(log_p))
    w = _check_sample_weight(weights, log_p[:, None], dtype=np.float64, ensure_non_negative=True)
    return float(np.where(w > 0, w * log_p, 0.0).sum() / w.sum())


__all__ = [
    "LEAST_ROWS",
    "FlowEstimator",
    "Packed",
    "average",
    "check_is_fitted",
    "kept",
    "seed_of",
    "validate_data",
    "weights_of",
]
