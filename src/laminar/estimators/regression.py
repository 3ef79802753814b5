"""FlowRegressor: the whole law of a number given a row, and not its mean alone."""

import dataclasses
import warnings
from typing import Any, Literal

import jax.random as jr
import numpy as np
from sklearn.base import RegressorMixin

from laminar._errors import InputError
from laminar.estimators import law as laws
from laminar.estimators.common import average, check_is_fitted, kept, seed_of, weights_of
from laminar.estimators.features import Features
from laminar.estimators.location import Around, fit_trees
from laminar.estimators.response import Sizes, fit_law, pad_condition, sizes_for
from laminar.estimators.rows import RowReader
from laminar.tables.columns import Column
from laminar.tables.infer import learn_column, location_scale
from laminar.tables.table import listing

_FAR = 10.0
_WILD = 4.0  # residuals beyond so many scales do not say how much averaging helps
_LEAST_SHARE = 0.4
_SHARED = 0.05  # of the responses, on one value


class FlowRegressor(RegressorMixin, RowReader):
    r"""Conditional density of a number y given a row x, by an ensemble of spline flows.

        p(y | x) = (1 − ε)/M Σ_m φ(z_m) |dz_m/dy| + ε t₂(z) |dz/dy|,
        z = g⁻¹((y − a(x)) / s(x)),    z_m = f_m⁻¹(z; x),    f_m = affine ∘ spline

    φ is the normal density and t₂ Student's with two degrees of freedom. The location a(x) and the
    scale s(x) are those of boosted trees predicted out of fold, and g is the map from normal
    quantiles to those of the residuals, so that training begins at the law that they have together.
    The networks that set the parameters of f_m see x, a(x) and s(x): the law may have any width,
    skew or number of modes that x asks for. Member m does
    not train on the m-th fold of rows, which decides when it stops (cross-validated ensembling;
    Krogh & Vedelsby 1995). Mean, quantiles and probabilities come from the law itself, without
    draws.

    A response of ties (counts, rounded values) is dequantised: its density is that of the value
    plus uniform noise as wide as the spacing of the values, and draws are rounded back. A single
    value that many rows share, such as a claim of zero, has no density and is not drawn as often as
    it should be, of which `fit` warns: fit whether it occurs apart, by a classifier.

    Args:
        members: Flows in the ensemble, and folds of the rows; at least 2.
        location: ``"trees"``, or None to leave everything to the flow.
        width: Hidden units of the networks; None takes what suits the number of rows, here and
            below.
        depth: Residual blocks of the networks.
        bins: Bins of the splines.
        steps: Steps of gradient descent, at most: training ends when held-out rows say so.
        batch_size: Rows of one step.
        learning_rate: Its peak.
        weight_decay: Decay of the networks' matrices.
        random_state: An integer makes the fit repeatable.

    Attributes:
        law_: The law of the residual (y − a(x)) / s(x), a `laminar.Flow` that `laminar.save` takes.
        scale_: The factor on the trees' scales in s(x), without trees s itself.
        log_score_: Mean log-density of the training rows out of fold, in nats and the units of y.
            A little too good with few rows, as each fold also says when its own member stops: by
            0.1 nats at 80 rows.
        losses_: Held-out losses in the course of training, (members, validations).
        n_features_in_: Number of columns.
        feature_names_in_: Their names, where the rows of `fit` had names.

    Notes:
        Missing values (NaN) in x are allowed; the networks see that a value is missing. Weights are
        honoured in trees, training and validation. A fit with weights differs from one with
        repeated rows, because folds are drawn at random.

    References:
        Durkan et al. (2019), "Neural spline flows"; Rezende & Mohamed (2015), "Variational
        inference with normalizing flows".
    """

    _models = ("law_",)

    def __init__(
        self,
        *,
        members: int = 5,
        location: Literal["trees"] | None = "trees",
        width: int | None = None,
        depth: int | None = None,
        bins: int | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        random_state: Any = None,
    ):
        self.members = members
        self.location = location
        self.width = width
        self.depth = depth
        self.bins = bins
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "FlowRegressor":
        """Fit the law of y given the rows.

        Args:
            X: Rows (N, C): an array, NaN where missing, or a frame, of texts and dates too.
            y: The response (N,), finite.
            sample_weight: Non-negative weights (N,).

        Raises:
            InputError: If y does not vary, rows are too few, or an option has no meaning.
            TrainingError: If no finite held-out loss is found.
        """
        if y is None:
            raise InputError("FlowRegressor requires y to be passed, but the target y is None.")
        _refuse_texts(y)
        table, y = self._read(X, y, reset=True, y_numeric=True)
        index, w = kept(weights_of(sample_weight, table.values), len(table), "FlowRegressor")
        X, y = table.values[index], np.asarray(y, np.float64)[index]
        sizes = self._sizes(len(X))
        if y.min() == y.max():
            raise InputError(
                f"FlowRegressor: every y is {y[0]:.6g}, and what does not vary has no density."
            )
        seed = seed_of(self.random_state)
        rng = np.random.default_rng(seed)
        folds = rng.permutation(len(X)) % min(self.members, len(X) // 2)
        self._column = learn_column("y", y)
        _say_shared(self._column, y)
        names = [j for j, cells in enumerate(table.cells) if cells.kind == "text"]
        self._features = Features.learn(X, names)
        self._middle, self._spread = location_scale(y)
        self._spread = self._spread or float(y.std())
        self._trees, around = None, self._nothing(len(y))
        if self.location is not None:
            self._trees, around = fit_trees(X, y, w, folds, seed)
        middle, scale = location_scale((y - around.location) * np.exp(-around.log_scale))
        self._shift, self.scale_ = middle, scale or 1.0
        r = (y - around.location) * np.exp(-around.log_scale) - middle
        self._mean_square = float(np.average(np.clip(r / self.scale_, -_WILD, _WILD) ** 2))
        condition, centre, size = self._told(X, around)
        noisy = y + self._column.resolution * rng.uniform(-0.5, 0.5, len(y))
        fitted = fit_law(seed, (noisy - centre) / size, condition, w, folds, sizes)
        self.law_ = fitted.law
        self.losses_ = fitted.losses
        self.log_score_ = average(fitted.held_out - np.log(size), w)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The conditional mean E[y | x] of each row, (N,)."""
        condition, centre, size = self._given(X)
        return centre + size * laws.mean(self.law_, condition)

    def predict_quantile(self, X: Any, quantiles: Any = 0.5) -> np.ndarray:
        """Quantiles of y given each row.

        Args:
            X: Rows (N, C).
            quantiles: A probability between 0 and 1, or Q of them.

        Returns:
            (N,) for one probability, (N, Q) for several.

        Raises:
            InputError: If a probability is not between 0 and 1.
        """
        levels = np.atleast_1d(np.asarray(quantiles, np.float64))
        if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
            raise InputError("FlowRegressor: quantiles must lie between 0 and 1, ends excluded.")
        condition, centre, size = self._given(X)
        values = centre[:, None] + size[:, None] * laws.quantile(self.law_, levels, condition)
        return values[:, 0] if np.ndim(quantiles) == 0 else values

    def predict_interval(self, X: Any, coverage: float = 0.9) -> np.ndarray:
        """The central interval that holds y with the probability `coverage`, (N, 2)."""
        if not 0 < coverage < 1:
            raise InputError(
                f"FlowRegressor: coverage is {coverage}; give a share between 0 and 1."
            )
        return self.predict_quantile(X, [0.5 - coverage / 2, 0.5 + coverage / 2])

    def cdf(self, X: Any, y: Any) -> np.ndarray:
        """The probability P(Y ≤ y | x) of each pair, (N,): uniform where the law is right."""
        condition, r, _ = self._pairs(X, y)
        return laws.probability(self.law_, r, condition)

    def log_prob(self, X: Any, y: Any) -> np.ndarray:
        """The log-density ln p(y | x) of each pair, in nats and the units of y, (N,)."""
        condition, r, size = self._pairs(X, y)
        return laws.log_density(self.law_, r, condition) - np.log(size)

    def log_score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The mean log-density of pairs, in nats; higher is better. The `score` is R²."""
        return average(self.log_prob(X, y), sample_weight)

    def sample(self, X: Any, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw responses for each row, (N, n_samples); `random_state` makes them repeatable."""
        condition, centre, size = self._given(X)
        drawn = laws.draw(self.law_, jr.key(seed_of(random_state)), n_samples, condition)
        values = centre[:, None] + size[:, None] * drawn
        column = self._column
        return column.restore((values - column.location) / column.scale)

    def _sizes(self, rows: int) -> Sizes:
        """The sizes for so many rows, with those that were given."""
        if self.members < 2:
            raise InputError(f"FlowRegressor: members is {self.members}; give at least 2.")
        if self.location not in ("trees", None):
            raise InputError(f"FlowRegressor: location is {self.location!r}; use 'trees' or None.")
        sizes = sizes_for(rows)
        fields = [field.name for field in dataclasses.fields(Sizes)]
        given = {name: getattr(self, name) for name in fields if hasattr(self, name)}
        return dataclasses.replace(sizes, **{k: v for k, v in given.items() if v is not None})

    def _nothing(self, rows: int) -> Around:
        """What is said of rows without trees: nothing."""
        zero = np.zeros(rows)
        return Around(np.empty((rows, 0)), np.full(rows, self._middle), zero, zero)

    def _told(self, X: np.ndarray, around: Around) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Conditions for the networks, and the location and scale of the law, of each row."""
        least = max(1e-6 * self._spread, self._column.resolution)
        size = np.maximum(self.scale_ * np.exp(around.log_scale), least)
        parts = [self._features.transform(X)]
        if around.kinds.shape[1]:
            places = np.concatenate([around.kinds, around.location[:, None]], axis=1)
            places = np.clip((places - self._middle) / self._spread, -_FAR, _FAR)
            parts += [places, np.clip(np.log(size / self._spread)[:, None] / 2, -_FAR, _FAR)]
        # The mean over folds errs less than one fold's trees, by their variance exactly (Krogh &
        # Vedelsby 1995), and the law was learned from the residuals of one fold's.
        spread = np.maximum(self._mean_square * size**2, np.finfo(float).tiny)
        share = 1 - around.variance / spread
        size = np.maximum(size * np.sqrt(np.clip(share, _LEAST_SHARE, 1.0)), least)
        condition = pad_condition(np.concatenate(parts, axis=1))
        return condition, around.location + self._shift * np.exp(around.log_scale), size

    def _given(self, X: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Conditions, and the law's location and scale, of rows as the user has them."""
        check_is_fitted(self)
        X = self._read(X)[0].values
        return self._told(X, self._nothing(len(X)) if self._trees is None else self._trees(X))

    def _pairs(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Conditions, responses in the units of the law, and these units."""
        condition, centre, size = self._given(X)
        y = np.asarray(y, np.float64)
        if y.shape != centre.shape:
            raise InputError(
                f"FlowRegressor: there are {len(centre)} rows and y has shape {y.shape}; give one "
                "number for each row."
            )
        return condition, (y - centre) / size, size


def _refuse_texts(y: Any) -> None:
    if np.asarray(y).dtype.kind not in "OUST":
        return
    try:
        np.asarray(y, np.float64)
    except (TypeError, ValueError):
        raise InputError(
            "FlowRegressor: y holds something other than numbers; for classes use FlowClassifier."
        ) from None


def _say_shared(column: Column, y: np.ndarray) -> None:
    """Warn of single values that many rows share, beside others that have a density."""
    shared = [value for value in column.spikes if (y == value).mean() > _SHARED]
    if shared:
        share = float(np.isin(y, shared).mean())
        values = listing([f"{value:g}" for value in shared], 4)
        warnings.warn(
            f"FlowRegressor: {share:.0%} of y are exactly {values}, which a density "
            "cannot hold: its intervals and draws are rough there; fit whether y takes such a "
            "value apart, by FlowClassifier, and this to the other rows.",
            stacklevel=3,
        )
