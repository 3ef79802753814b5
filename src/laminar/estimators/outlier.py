"""FlowOutlier: which rows are strange, and how surely."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from sklearn.base import OutlierMixin

from laminar._errors import InputError
from laminar.estimators.common import check_is_fitted, seed_of
from laminar.estimators.model import RowModel
from laminar.estimators.rows import with_weights
from laminar.tables.anomaly import Detector, fit_detector
from laminar.tables.table import Table

_AUTO = 0.01
_LEAST_CALIBRATED = 30


class FlowOutlier(OutlierMixin, RowModel):
    """Outliers of tables of any kind, by a density of the rows (see `FlowDensity`).

    A row is an outlier (−1) when its score is below `offset_`, the quantile `contamination` of the
    training rows' scores. The score is the default one of `laminar.tables.anomaly`, which corrects
    the log-density where that alone is known to fail; with fewer than 30 rows it is the
    log-density. A part of the rows is held out of the density to calibrate scores: `p_values` are
    exact for new rows of the same kind.

    Args:
        contamination: The share of the training rows that are to be outliers, in (0, 0.5];
            ``"auto"`` is 0.01.
        flow: As in `FlowDensity`, like all that follow.
        kinds: What some columns are.
        steps: Steps of training.
        time_limit: Seconds in all.
        validation: Share of the rows held out.
        random_state: An integer makes the fit repeatable.

    Attributes:
        detector_: The `laminar.tables.anomaly.Detector`, which explains rows and controls the rate
            of false discoveries; None with fewer than 30 rows.
        model_: The `TableFlow`.
        report_: What `fit_table` says of the fit.
        offset_: The score below which a row is an outlier.
        n_features_in_: Number of columns.
        feature_names_in_: Their names, where the rows of `fit` had names.

    Notes:
        A fit with weights differs from one with repeated rows, as in `FlowDensity`. Weights count
        in the density, in `offset_` and in p-values, which are then those of the weighted law.

    References:
        Bates et al. (2023), "Testing for outliers with conformal p-values".
    """

    _models = ("model_", "detector_")

    def __init__(
        self,
        *,
        contamination: float | Literal["auto"] = "auto",
        flow: str = "auto",
        kinds: Mapping[str, str] | None = None,
        steps: int | None = None,
        time_limit: float | None = None,
        validation: float = 0.1,
        random_state: Any = None,
    ):
        self.contamination = contamination
        self.flow = flow
        self.kinds = kinds
        self.steps = steps
        self.time_limit = time_limit
        self.validation = validation
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "FlowOutlier":
        """Fit the density of the rows, and the threshold.

        Args:
            X: Rows (N, D): an array, or a frame of pandas, Polars or Arrow; at least 8 rows.
            y: Ignored.
            sample_weight: Non-negative weights (N,).

        Raises:
            InputError: If rows, columns or the contamination cannot be used.
            TrainingError: If training stays non-finite.
        """
        share = _AUTO if self.contamination == "auto" else self.contamination
        if isinstance(share, str) or share is None or not 0 < share <= 0.5:
            raise InputError(
                f"FlowOutlier: contamination is {self.contamination!r}; give a share above 0 and "
                "up to 0.5, or 'auto'."
            )
        table, weights = self._weighted_rows(X, sample_weight)
        seed = seed_of(self.random_state)
        self.detector_: Detector | None = None
        if len(table) < _LEAST_CALIBRATED:
            self.model_, self.report_ = self._density(table, weights, seed)
        else:
            both, name = with_weights(table, weights)
            self.detector_, self.report_ = fit_detector(both, weights=name, **self._options(seed))
            self.model_ = self.detector_.model
        own = {} if weights is None else {"weights": weights, "method": "inverted_cdf"}
        self.offset_ = float(np.quantile(self._scores(table), share, **own))
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """The score of each row, (N,): higher for normal rows."""
        check_is_fitted(self)
        return self._scores(self._read(X)[0])

    def decision_function(self, X: Any) -> np.ndarray:
        """The score less `offset_`, (N,): negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """−1 for outliers and 1 for the other rows, (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X: Any) -> np.ndarray:
        """The conformal p-value of each row, in (0, 1], (N,).

        The chance that a row of the kind that `fit` was given, and new to the model, has a score
        as low.

        Raises:
            InputError: If `fit` had too few rows to hold any out.
        """
        check_is_fitted(self)
        if self.detector_ is None:
            raise InputError(
                f"FlowOutlier: p-values need at least {_LEAST_CALIBRATED} rows in fit, to hold "
                "some out."
            )
        return self.detector_.score(self._read(X)[0]).p_value

    def log_prob(self, X: Any) -> np.ndarray:
        """The log-density of each row in nats, (N,)."""
        check_is_fitted(self)
        return self.model_.log_prob(self._read(X)[0])

    def _scores(self, table: Table) -> np.ndarray:
        if self.detector_ is None:
            return self.model_.log_prob(table)
        return self.detector_.score(table).score
