"""FlowClassifier: a density for each class, and Bayes' rule."""

from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from laminar._errors import InputError
from laminar.density import AbstractDistribution
from laminar.distributions import MultivariateNormal
from laminar.estimators.common import average, check_is_fitted, seed_of, weights_of
from laminar.estimators.rows import RowReader
from laminar.tables.baselines import Rows
from laminar.tables.flow import MIN_ROWS, fit_mixed
from laminar.tables.frames import to_frame
from laminar.tables.model import cast, padded, padded_length
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table, refuse_non_finite
from laminar.train.density import DensityHistory, fit_density, refit
from laminar.train.mixtures import log_sum, pooled_covariance

_STOPPING = 0.1  # of the rows of a law of mixed rows, to stop its training by
_FEW = 20  # rows; classes with fewer get a normal law
_COOLEST, _HOTTEST = -1.5, 5.0  # bounds of the logarithm of the temperature
_PRIOR_ROWS = 5.0  # that the penalty on the temperature is worth


class FlowClassifier(ClassifierMixin, RowReader):
    r"""Class-conditional densities and Bayes' rule, with calibrated probabilities.

        P(k | x) ∝ (π_k p(x | k))^{1/T}

    Each p(x | k) is what `laminar.fit_density` finds best for the rows of the class: mixtures,
    kernels and, with enough rows, neural spline flows. A class of fewer than 20 rows gets a normal
    law, whose covariance leans on that within all classes. Densities are never quite right, and
    log-ratios of wrong ones are too sure of themselves, the more so with many columns; the
    temperature T mends that. It is fitted to rows held out of the densities (Guo et al. 2017), and
    leaves the prediction, the most probable class, as it is. The densities are then fitted again
    to all rows, where that takes no training of networks.

    Rows with texts or gaps have one law of mixed columns for all classes, conditional on the class
    (`laminar.mixed`): exact probabilities of names, and missing cells that count with the
    probability that they are missing.

    Args:
        priors: The probabilities π of the classes, in the order of `classes_`; None takes their
            weight in the training rows.
        time_limit: Seconds for each density, roughly, or None.
        validation: Share of each class's rows that the temperature is fitted to.
        random_state: An integer makes the fit repeatable.

    Attributes:
        classes_: The classes, (K,).
        priors_: Their probabilities, (K,).
        densities_: The density of each class, of standardised rows.
        model_: In their place, of mixed rows, their density given indicators of the classes.
        temperature_: T.
        n_features_in_: Number of columns.
        feature_names_in_: Their names, where the rows of `fit` had names.

    Notes:
        Columns with ties are dequantised, and the same for all classes, so that a value which one
        class never takes is improbable in it and not impossible. Constant columns tell nothing and
        are left out. A fit with weights differs from one with repeated rows, because the rows held
        out are drawn at random.

    References:
        Guo et al. (2017), "On calibration of modern neural networks".
    """

    _models = ("densities_", "model_")

    def __init__(
        self,
        *,
        priors: Any = None,
        time_limit: float | None = None,
        validation: float = 0.2,
        random_state: Any = None,
    ):
        self.priors = priors
        self.time_limit = time_limit
        self.validation = validation
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "FlowClassifier":
        """Fit the densities and the temperature.

        Args:
            X: Rows (N, C): an array, or a frame, of texts and dates too; NaN where a cell is
                missing.
            y: Classes (N,).
            sample_weight: Non-negative weights (N,); classes without weight are left out.

        Raises:
            InputError: If columns, priors or options cannot be used.
            TrainingError: If training stays non-finite.
        """
        if y is None:
            raise InputError("FlowClassifier requires y to be passed, but the target y is None.")
        table, y = self._read(X, y, reset=True, least=2)
        check_classification_targets(y)
        w = weights_of(sample_weight, table.values)
        w = np.ones(len(table)) if w is None else w
        index = np.flatnonzero(w > 0)
        table, y, w = table.take(index), y[index], w[index] / w[index].mean()
        self.classes_, code = np.unique(y, return_inverse=True)
        self.priors_ = self._checked_priors(np.bincount(code, weights=w))
        if not 0 < self.validation < 1:
            raise InputError(
                f"FlowClassifier: validation is {self.validation}; give a share between 0 and 1."
            )
        seed = seed_of(self.random_state)
        rng = np.random.default_rng([seed, 1])
        held = np.zeros(len(table), dtype=bool)
        for k in range(len(self.classes_)):
            mine = rng.permutation(np.flatnonzero(code == k))
            held[mine[: int(self.validation * len(mine))] if len(mine) >= _FEW else []] = True
        for name in self._models:
            vars(self).pop(name, None)
        self.temperature_ = 1.0
        self._schema = learn_schema(table)
        z, _ = self._schema.encode(table.values)
        fit = self._fit_together if self._schema.mixed else self._fit_apart
        fit(z, code, w, held, seed)
        return self

    def _fit_apart(self, z: np.ndarray, code, w, held, seed: int) -> None:
        """A density for each class, and the temperature."""
        noise = np.random.default_rng(seed).uniform(-0.5, 0.5, z.shape)
        z = z + self._schema.noise * noise
        pooled, several = _within(z, code, w), range(len(self.classes_))
        first = [self._density(k, z, code, w, ~held, pooled, seed) for k in several]
        self.densities_ = tuple(density for density, _ in first)
        self._cool(z[held], code[held], w[held])
        everything = np.ones(len(z), dtype=bool)
        again = []
        for k, (density, history) in enumerate(first):
            mine = code == k
            if history is None:
                density, _ = self._density(k, z, code, w, everything, pooled, seed)
            elif not history.flows:
                density = refit(history, z[mine], weights=w[mine])
            again.append(density)
        self.densities_ = tuple(again)

    def _fit_together(self, z: np.ndarray, code, w, held, seed: int) -> None:
        """The law of mixed rows given the class, and the temperature."""
        kept = int((~held).sum())
        if kept < MIN_ROWS:
            raise InputError(
                f"FlowClassifier: of n_samples={len(z)} rows with texts or gaps {kept} are left to "
                f"fit, and fitting needs at least {MIN_ROWS}; give more rows or less validation."
            )
        weights = None if (w == w[0]).all() else w[~held] / w[~held].mean()
        rows = Rows(z[~held], np.eye(len(self.classes_))[code[~held]], weights)
        options = {"noise": self._schema.noise, "validation": _STOPPING, "progress": False}
        trained = fit_mixed(self._schema)(seed, rows, time_limit=self.time_limit, **options)
        self.model_ = trained.flow
        self._cool(z[held], code[held], w[held])

    def _cool(self, z: np.ndarray, code: np.ndarray, w: np.ndarray) -> None:
        """Fit the temperature to rows held out, where there are any."""
        if len(code) and len(self.classes_) > 1:
            self.temperature_ = best_temperature(
                self._class_log_prob(z) + np.log(self.priors_), code, w
            )

    def class_log_prob(self, X: Any) -> np.ndarray:
        """The log-density of each row under each class, ln p(x | k), in nats, (N, K).

        In the units of the columns; constant columns are left out, and a row in which one has
        another value scores −inf.
        """
        return np.add(*self._each(X))

    def score_samples(self, X: Any) -> np.ndarray:
        """The log-density of each row whatever its class, ln Σ_k π_k p(x | k), (N,)."""
        return log_sum(self.class_log_prob(X) + np.log(self.priors_))

    def decision_function(self, X: Any) -> np.ndarray:
        """Calibrated log-probabilities, (N, K); of two classes ln P(1 | x) − ln P(0 | x), (N,)."""
        log_p = self.predict_log_proba(X)
        return log_p[:, 1] - log_p[:, 0] if len(self.classes_) == 2 else log_p

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The calibrated ln P(k | x), (N, K)."""
        logits = (self._each(X)[0] + np.log(self.priors_)) / self.temperature_
        # Where a row is impossible under every class, nothing but the prior is known of it.
        lost = np.isneginf(logits).all(axis=1)
        logits[lost] = np.log(self.priors_)
        return logits - log_sum(logits)[:, None]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The calibrated P(k | x), (N, K)."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, (N,).

        Raises:
            InputError: If a row has no probabilities, because the densities fail on it numerically.
        """
        log_p = self.predict_log_proba(X)
        lost = np.isnan(log_p).any(axis=1)
        if lost.any():
            raise InputError(
                f"FlowClassifier: row {int(lost.argmax()) + 1} has the probabilities NaN, since "
                "the densities fail on it numerically; look for values far outside the others."
            )
        return self.classes_[log_p.argmax(axis=1)]

    def log_score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The mean log-probability of the classes that are, in nats; higher is better.

        Raises:
            InputError: If y has a class that the training rows had not.
        """
        y = np.asarray(y)
        log_p = self.predict_log_proba(X)
        unknown = y[~np.isin(y, self.classes_)]
        if len(unknown):
            raise InputError(
                f"FlowClassifier: y has the class {unknown.tolist()[0]!r}, which is not known."
            )
        code = np.searchsorted(self.classes_, y)
        return average(log_p[np.arange(len(y)), code], sample_weight)

    def sample(
        self, n_samples: int = 1, label: Any = None, random_state: Any = None
    ) -> tuple[Any, np.ndarray]:
        """Draw rows and their classes.

        Args:
            n_samples: How many.
            label: The class of all of them, or None to draw classes by their priors.
            random_state: An integer makes the draws repeatable.

        Returns:
            Rows (n_samples, C), a frame if `fit` had one, and classes (n_samples,).

        Raises:
            InputError: If there is no such class.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise InputError(f"n_samples must be at least 1, not {n_samples}.")
        seed = seed_of(random_state)
        rng = np.random.default_rng(seed)
        if label is None:
            code = rng.choice(len(self.classes_), n_samples, p=self.priors_)
        else:
            found = np.flatnonzero(self.classes_ == label)
            if not len(found):
                raise InputError(f"FlowClassifier has no class {label!r}.")
            code = np.full(n_samples, found[0])
        cells = tuple(column.cells for column in self._schema.columns)
        drawn = Table(self._schema.names, self._draw(code, seed), "the samples", cells=cells)
        rows = drawn.values if self._like is None else to_frame(drawn, self._like)
        return rows, self.classes_[code]

    # ------------------------------------------------------------------------------------ inside

    def _checked_priors(self, totals: np.ndarray) -> np.ndarray:
        if self.priors is None:
            return totals / totals.sum()
        priors = np.asarray(self.priors, np.float64)
        if priors.shape != totals.shape or not (priors > 0).all() or abs(priors.sum() - 1) > 1e-6:
            raise InputError(
                f"FlowClassifier: priors must be {len(totals)} positive numbers of sum one, for "
                f"the classes {', '.join(map(str, self.classes_))}."
            )
        return priors / priors.sum()

    def _each(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """The ln p(x | k) of rows (N, K), and what their units bring to all alike (N, 1)."""
        check_is_fitted(self)
        table, _ = self._read(X)
        whole = [c.name for c in self._schema.columns if c.modelled and not c.missing]
        refuse_non_finite(table.select(whole))
        z, terms = self._schema.encode(table.values)
        return self._class_log_prob(z), terms[:, None]

    @property
    def _laws(self) -> list[tuple[AbstractDistribution, Any]]:
        """For each class a density, and the condition that it takes."""
        if not self._schema.mixed:
            return [(density, None) for density in self.densities_]
        return [(self.model_, own) for own in cast(np.eye(len(self.classes_)), self.model_)]

    def _draw(self, code: np.ndarray, seed: int) -> np.ndarray:
        """Rows (N, C) of some classes."""
        z = np.empty((len(code), *self._schema.shape))
        keys = jr.split(jr.key(seed), len(self.classes_))
        for k, (key, (density, own)) in enumerate(zip(keys, self._laws, strict=True)):
            mine = np.flatnonzero(code == k)
            if len(mine):
                drawn = density.sample(key, (padded_length(len(mine)),), own)
                z[mine] = np.asarray(drawn)[: len(mine)]
        return self._schema.decode(z, seed=seed)

    def _density(
        self, k: int, z, code, w, use, pooled, seed
    ) -> tuple[AbstractDistribution, DensityHistory | None]:
        """The density of a class fitted to some rows, and its history where it has one."""
        mine = (code == k) & use
        rows, weights = z[mine], w[mine]
        if len(rows) < _FEW or (rows.min(0) == rows.max(0)).any():
            return _normal(rows, weights, pooled), None
        return fit_density(
            jr.key(seed + k),
            rows,
            weights=None if (weights == weights[0]).all() else weights,
            time_limit=self.time_limit,
            progress=False,
        )

    def _class_log_prob(self, z: np.ndarray) -> np.ndarray:
        """The ln p(z | k) of standardised rows, (N, K)."""
        rows = padded(z)
        each = [density.log_prob(cast(rows, density), own) for density, own in self._laws]
        return np.stack([np.asarray(log_p, np.float64)[: len(z)] for log_p in each], axis=1)


def best_temperature(logits: np.ndarray, code: np.ndarray, weights: np.ndarray) -> float:
    """The T that gives classes the greatest likelihood under softmax(logits / T).

    A penalty worth a few rows keeps it near one where rows held out are few.

    Args:
        logits: ln π_k + ln p(x | k) of rows held out, (N, K).
        code: Their classes, 0, …, K − 1.
        weights: Their weights, (N,).
    """
    from scipy.optimize import minimize_scalar

    possible = np.isfinite(logits).all(axis=1)
    logits, code, weights = logits[possible], code[possible], weights[possible]
    if not len(logits):
        return 1.0
    rows = np.arange(len(logits))

    def loss(log_t: float) -> float:
        scaled = logits * np.exp(-log_t)
        log_p = scaled[rows, code] - log_sum(scaled)
        return float(-(weights * log_p).sum() + 0.5 * _PRIOR_ROWS * log_t**2)

    found = minimize_scalar(loss, bounds=(_COOLEST, _HOTTEST), method="bounded")
    return float(np.exp(found.x))


def _within(z: np.ndarray, code: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The covariance of rows about the mean of their class, positive definite."""
    centred = z.copy()
    for k in np.unique(code):
        mine = code == k
        centred[mine] -= w[mine] @ z[mine] / w[mine].sum()
    covariance = pooled_covariance(centred, w)
    # Where every class is constant in a column, the column still has the scale of the whole table.
    floor = 1e-3 * np.maximum(z.var(axis=0), 1e-3)
    return covariance + np.diag(floor)


def _normal(rows: np.ndarray, weights: np.ndarray, pooled: np.ndarray) -> MultivariateNormal:
    """The normal law of few rows, its covariance the posterior mode under that of all classes."""
    share = weights / weights.sum()
    mean = share @ rows
    centred = rows - mean
    own = (weights[:, None] * centred).T @ centred
    prior = rows.shape[1] + 2.0
    covariance = (own + prior * pooled) / (weights.sum() + prior)
    # A mean of few rows is uncertain itself: the predictive law is wider by their number.
    return MultivariateNormal(
        jnp.asarray(mean, jnp.result_type(float)),
        jnp.asarray(covariance * (1 + 1 / weights.sum()), jnp.result_type(float)),
    )
