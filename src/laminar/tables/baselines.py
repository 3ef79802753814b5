"""Densities that a flow has to beat: a full-covariance Gaussian and scikit-learn's mixture.

Both see the standardised rows that a flow is trained on, and are scored in the same units. Where
there is a condition c they are fitted to rows and conditions together, and give
ln p(z | c) = ln p(z, c) − ln p(c), which for a Gaussian mixture is exact.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from laminar.mixed import LINEAR, ColumnLaw

COMPONENTS = (1, 2, 3, 5, 8, 12, 20, 30, 50)
"""Numbers of components that a mixture is tried with."""


class Rows(NamedTuple):
    """Standardised rows on the host, float64.

    Attributes:
        x: Events (N, d).
        condition: Conditions (N, c), or None.
        weights: Non-negative weights (N,), or None.
    """

    x: np.ndarray
    condition: np.ndarray | None = None
    weights: np.ndarray | None = None

    def take(self, index: np.ndarray) -> "Rows":
        """Some of the rows."""
        x, condition, weights = (None if part is None else part[index] for part in self)
        return Rows(x, condition, weights)  # type: ignore[arg-type]

    @property
    def joint(self) -> np.ndarray:
        """Events and conditions side by side, (N, d + c)."""
        parts = [self.x] if self.condition is None else [self.x, self.condition]
        return np.concatenate(parts, axis=1)


class Mixture(NamedTuple):
    """A Gaussian mixture: weights (K,), means (K, D), covariances (K, D, D)."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    def log_prob(self, rows: Rows) -> np.ndarray:
        """The log-density ln p(x | condition) of each row, float64 of shape (N,)."""
        if rows.condition is None:
            return self._log_prob(rows.x)
        d = rows.x.shape[1]
        marginal = Mixture(self.weights, self.means[:, d:], self.covariances[:, d:, d:])
        return self._log_prob(rows.joint) - marginal._log_prob(rows.condition)

    def _log_prob(self, x: np.ndarray) -> np.ndarray:
        from scipy.special import logsumexp
        from scipy.stats import multivariate_normal

        parts = [
            np.log(w) + np.atleast_1d(multivariate_normal.logpdf(x, m, s, allow_singular=True))
            for w, m, s in zip(self.weights, self.means, self.covariances, strict=True)
        ]
        return np.asarray(logsumexp(parts, axis=0))


def gaussian(train: Rows) -> Mixture:
    """The maximum-likelihood Gaussian with full covariance, and 1e-6 added to its diagonal."""
    joint = train.joint
    w = np.ones(len(joint)) if train.weights is None else train.weights
    mean = np.average(joint, axis=0, weights=w)
    covariance = np.atleast_2d(np.cov(joint.T, ddof=0, aweights=w))
    return Mixture(np.ones(1), mean[None], (covariance + 1e-6 * np.eye(len(mean)))[None])


def mixture(train: Rows, held_out: Rows, seed: int = 0) -> Mixture:
    """scikit-learn's Gaussian mixture: its number of components chosen on held-out rows.

    It is then fitted again to both, as flows without networks are. Weights of rows are not used,
    since scikit-learn's mixture takes none.
    """
    best, best_score, falls = COMPONENTS[0], -math.inf, 0
    for components in COMPONENTS:
        if components > 1 and components * 5 > len(train.x):
            break
        score = float(np.mean(_mixture(train.joint, components, seed).log_prob(held_out)))
        if score > best_score:
            best, best_score, falls = components, score, 0
        else:
            falls += 1
        if falls == 2:
            break
    return _mixture(np.concatenate([train.joint, held_out.joint]), best, seed)


def _mixture(joint: np.ndarray, components: int, seed: int) -> Mixture:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = GaussianMixture(components, random_state=seed, reg_covar=1e-6).fit(joint)
    parts = (model.weights_, model.means_, model.covariances_)
    return Mixture(*(np.asarray(part) for part in parts))


def independent(train: Rows, held_out: Rows, laws: Sequence[ColumnLaw]) -> np.ndarray:
    """The log-density of mixed rows if their columns were independent, float64 of shape (N,).

    States have their shares among the training rows, each counted half a time more; values a
    logistic law of their median and their spread, of their logarithm far out where tails are heavy.
    """
    total = np.zeros(len(held_out.x))
    w = np.ones(len(train.x)) if train.weights is None else train.weights
    for i, law in enumerate(laws):
        value, state = held_out.x[:, 0, i], held_out.x[:, 1, i]
        seen = train.x[:, 1, i]
        counts = np.bincount(np.maximum(seen, 0).astype(int), w * (seen >= 0), law.states) + 0.5
        log_share = np.log(counts / counts.sum())
        total += np.where(state >= 0, log_share[np.maximum(state, 0).astype(int)], 0.0)
        if law.value is None:
            continue
        own = train.x[seen == 0, 0, i]
        own, _ = _softened(own if len(own) else np.zeros(1), law.heavy)
        middle = float(np.median(own))
        scale = max(float(np.std(own)) * math.sqrt(3) / math.pi, 1e-3)
        scale = scale if law.heavy else max(scale, law.width)
        total += np.where(state == 0, _logistic(value, law, middle, scale), 0.0)
    return total


def _softened(value: np.ndarray, heavy: float) -> tuple[np.ndarray, np.ndarray]:
    """Values as the template of a law with heavy tails sees them, and the slope's logarithm."""
    if not heavy:
        return value, np.zeros_like(value)
    near = value / heavy
    beyond = np.maximum(np.abs(near) - LINEAR, 0.0)
    soft = np.where(beyond > 0, np.sign(near) * (LINEAR + np.log1p(beyond)), near)
    return soft, -np.log1p(beyond) - math.log(heavy)


def _logistic(value: np.ndarray, law: ColumnLaw, middle: float, scale: float) -> np.ndarray:
    from scipy.special import expit
    from scipy.stats import logistic

    if law.value == "density":
        near, slope = _softened(value, law.heavy)
        return np.asarray(logistic.logpdf(near, middle, scale)) + slope
    half = law.width / 2
    above = np.where(
        value + half > (np.inf if law.high is None else law.high), np.inf, value + half
    )
    below = np.where(
        value - half < (-np.inf if law.low is None else law.low), -np.inf, value - half
    )
    below, above = (_softened(ends, law.heavy)[0] for ends in (below, above))
    a, b = (below - middle) / scale, (above - middle) / scale
    # The cell on the side where the distribution function is small keeps its digits.
    mass = np.where(a > 0, expit(-a) - expit(-b), expit(b) - expit(a))
    return np.log(np.maximum(mass, 5e-324))
