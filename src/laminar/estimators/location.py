"""Where the response of a row lies roughly, and how far it strays: boosted trees, out of fold.

The law of the response is modelled around this location, in units of this scale, and given both; so
the flow need not learn by gradient descent what trees learn better, and trees need no likelihood.
What is said of a row comes from trees that have not seen it: the law of the residuals is then that
of new rows.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

_SMALL = 2_000  # rows; fewer get several kinds of trees
_ONE_THREAD = 20_000  # rows up to which threads wait for one another longer than they work
_FLOOR = 0.1  # of the residuals' size, in medians of it: logarithms of less say nothing
_SHRINK = 20.0  # rows that the common scale is worth, beside the trees'


class Around(NamedTuple):
    """What trees say of rows, each (N,) but `kinds`, (N, K).

    Attributes:
        kinds: The location by each kind of trees.
        location: Their combination.
        log_scale: The logarithm of the size of the residual of one fold's trees.
        variance: Of the location, over folds; zero out of fold, where there are one fold's trees.
    """

    kinds: np.ndarray
    location: np.ndarray
    log_scale: np.ndarray
    variance: np.ndarray


class Trees(NamedTuple):
    """Fitted models, one of each kind for each fold, and how much each kind counts.

    Attributes:
        kinds: kinds[k][m]: the location by kind k, without the rows of fold m.
        shares: Weights of the kinds, of sum one, (K,).
        scales: The logarithm of the scale, without the rows of fold m.
    """

    kinds: tuple[tuple[Any, ...], ...]
    shares: np.ndarray
    scales: tuple[Any, ...]

    def __call__(self, x: np.ndarray) -> Around:
        """What is said of new rows: the mean over folds."""
        with _threads(len(x)):
            each = np.array([[model.predict(x) for model in fitted] for fitted in self.kinds])
            log_scale = np.mean([model.predict(x) for model in self.scales], axis=0)
        kinds = each.mean(axis=1).T
        variance = np.tensordot(self.shares, each, 1).var(axis=0)
        return Around(kinds, kinds @ self.shares, log_scale, variance)


def fit_trees(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, folds: np.ndarray, seed: int
) -> tuple[Trees, Around]:
    """Fit trees to all folds but one, in turn: to the response, then to the size of residuals.

    Args:
        x: Rows (N, C), NaN where missing.
        y: The response (N,).
        weights: Positive weights (N,).
        folds: The fold of each row, 0, …, M − 1.
        seed: Of the trees.

    Returns:
        The models, and what they say out of fold of every row.
    """
    makers = _makers(len(x), seed)
    fitted, held = zip(*(_out_of_fold(make, x, y, weights, folds) for make in makers), strict=True)
    kinds = np.stack(held, axis=1)
    shares = _shares(kinds, y, weights)
    residual = np.abs(y - kinds @ shares)
    size = np.log(np.maximum(residual, _FLOOR * np.median(residual)) + np.finfo(float).tiny)
    scales, log_scale = _out_of_fold(_scale_maker(len(x), seed), x, size, weights, folds)
    around = Around(kinds, kinds @ shares, log_scale, np.zeros(len(x)))
    return Trees(fitted, shares, scales), around


def _out_of_fold(make, x, y, weights, folds) -> tuple[tuple[Any, ...], np.ndarray]:
    """A model for each fold, without its rows, and what it says of them."""
    models, held = [], np.empty(len(x))
    with _threads(len(x)):
        for fold in range(int(folds.max()) + 1):
            mine = folds == fold
            model = make().fit(x[~mine], y[~mine], sample_weight=weights[~mine])
            held[mine] = model.predict(x[mine])
            models.append(model)
    return tuple(models), held


@functools.cache
def _controller() -> ThreadpoolController:
    from sklearn.ensemble import _hist_gradient_boosting  # noqa: F401  (loads the threads' library)

    return ThreadpoolController()


def _threads(rows: int) -> AbstractContextManager:
    """Keeps trees of few rows to one thread: several spin while others use the cores."""
    if rows > _ONE_THREAD:
        return nullcontext()
    return _controller().limit(limits=1, user_api="openmp")


def _makers(rows: int, seed: int) -> list:
    """Functions that make an unfitted model of each kind, as suits the number of rows."""
    from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor

    small = rows < _SMALL

    def boosting():
        return HistGradientBoostingRegressor(
            learning_rate=0.06,
            max_iter=250 if rows > 100 else 100,
            max_leaf_nodes=12,
            min_samples_leaf=max(2, min(20, rows // 60)),
            l2_regularization=1.0,
            early_stopping=False,  # pyright: ignore[reportArgumentType]
            random_state=seed,
        )

    def larger_boosting():
        return HistGradientBoostingRegressor(
            learning_rate=0.08,
            max_iter=500,
            max_leaf_nodes=48,
            early_stopping=True,  # pyright: ignore[reportArgumentType]
            n_iter_no_change=20,
            random_state=seed,
        )

    def extra_trees():
        return ExtraTreesRegressor(
            60, min_samples_leaf=2 if rows > 50 else 1, random_state=seed, n_jobs=1
        )

    return [boosting, extra_trees] if small else [larger_boosting]


def _scale_maker(rows: int, seed: int):
    """A function that makes the model of the scale: few and shallow trees, since noise is all."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    def make():
        return HistGradientBoostingRegressor(
            learning_rate=0.05,
            max_iter=40 if rows < _SMALL else 150,
            max_leaf_nodes=4 if rows < _SMALL else 16,
            min_samples_leaf=max(5, min(40, rows // 20)),
            l2_regularization=_SHRINK,
            early_stopping=False,  # pyright: ignore[reportArgumentType]
            random_state=seed,
        )

    return make


def _shares(held: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of a convex combination of the kinds with the least squared error out of fold."""
    from scipy.optimize import nnls

    if held.shape[1] == 1:
        return np.ones(1)
    root = np.sqrt(weights)
    scale = max(float(np.abs(y).max()), 1e-300)
    shares, _ = nnls(root[:, None] * held / scale, root * y / scale)
    total = shares.sum()
    return shares / total if total > 0 else np.full(len(shares), 1 / len(shares))
