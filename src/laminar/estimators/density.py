"""FlowDensity: the density of rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import DensityMixin, TransformerMixin

from laminar.estimators.common import average, check_is_fitted, seed_of
from laminar.estimators.model import RowModel


class FlowDensity(TransformerMixin, DensityMixin, RowModel):
    """The density of rows, exact and in their own units (see `laminar.fit_table`).

    By default it is a weighted mixture of Gaussian mixtures, kernels and, with enough rows, neural
    spline flows, chosen on rows held out. An array or a frame of numbers is a table of real
    columns; constant columns are left out of the density, and ties are dequantised. A frame of
    pandas, Polars or Arrow may hold texts, dates, booleans and missing cells; log-densities are
    then densities in some columns and probabilities in others.

    As a transformer it gives one column, the log-density of each row: a feature for what follows.

    Args:
        flow: ``"auto"``, or a name in `laminar.zoo.BUILDERS`.
        kinds: What some columns of a frame are, where it is not to be inferred, as in `fit_table`.
        steps: Steps of training for each flow, or None for what suits the rows.
        time_limit: Seconds in all, roughly, or None.
        validation: Share of the rows held out.
        random_state: An integer makes the fit repeatable.

    Attributes:
        model_: The `TableFlow`, which `laminar.save` takes.
        report_: What `fit_table` says of the fit, the held-out log-density among it.
        n_features_in_: Number of columns.
        feature_names_in_: Their names, where the rows of `fit` had names.

    Notes:
        Weights are honoured as the share that a row has in the likelihood. A fit with weights
        differs from one with repeated rows, because the rows held out are drawn at random and
        copies of a row may fall on both sides.

    Examples:
        ``FlowDensity(random_state=0).fit(X).score(X_test)`` is the mean log-density of test rows.
    """

    def __init__(
        self,
        *,
        flow: str = "auto",
        kinds: Mapping[str, str] | None = None,
        steps: int | None = None,
        time_limit: float | None = None,
        validation: float = 0.1,
        random_state: Any = None,
    ):
        self.flow = flow
        self.kinds = kinds
        self.steps = steps
        self.time_limit = time_limit
        self.validation = validation
        self.random_state = random_state

    def __sklearn_tags__(self):
        """A transformer to float64."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "FlowDensity":
        """Fit the density of the rows.

        Args:
            X: Rows (N, D): an array, or a frame of pandas, Polars or Arrow; at least 8 rows.
            y: Ignored.
            sample_weight: Non-negative weights (N,).

        Raises:
            InputError: If rows or columns cannot be used; the message says which and why.
            TrainingError: If training stays non-finite.
        """
        table, weights = self._weighted_rows(X, sample_weight)
        self.model_, self.report_ = self._density(table, weights, seed_of(self.random_state))
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """The log-density of each row in nats, float64 (N,); −inf outside the support."""
        check_is_fitted(self)
        return self.model_.log_prob(self._read(X)[0])

    def score(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, X: Any, y: Any = None, sample_weight: Any = None
    ) -> float:
        """The mean (not the sum) of the rows' log-densities, in nats; higher is better."""
        return average(self.score_samples(X), sample_weight)

    def transform(self, X: Any) -> np.ndarray:
        """The log-density of each row as a column, (N, 1)."""
        return self.score_samples(X)[:, None]

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """The name of the one column that `transform` gives."""
        check_is_fitted(self)
        return np.asarray(["log_density"], dtype=object)

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Any:
        """Draw rows: an array (n_samples, D), or a frame of the kind and types that `fit` had."""
        check_is_fitted(self)
        return self._draw(n_samples, seed_of(random_state))
