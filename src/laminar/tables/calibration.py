r"""What a detector knows of a table beside the density: neighbours, a background, and calibration.

Nothing here is more than rows and numbers made of them. It keeps some of the rows it was made from,
as points and as they are: who hands a detector on hands these on with it.
"""

from typing import Protocol

import equinox as eqx
import numpy as np

from laminar.density import AbstractDistribution
from laminar.scores import conformal_p_values, nearest_distances
from laminar.tables.cells import Cells
from laminar.tables.metric import Metric, learn_metric
from laminar.tables.schema import Schema
from laminar.tables.table import Table
from laminar.train.mixtures import pooled_covariance

MOST_POINTS = 10_000
"""Training rows that distances are measured to, at most."""

MOST_SCORES = 10_000
"""Calibration rows that are scored, at most."""

MOST_ROWS = 1_000
"""Calibration rows that are kept as they are, at most."""

_MOST_NUMBERS = 2_000_000  # that either of these holds: wide tables keep fewer rows
_LEAST_ROWS = 200
_WIDE = 256  # columns from which on the background is taken to be independent in them
_OPINIONS = (0.25, 0.75)  # what the log-density and the distance weigh in the default score
_WIDER = 2.0  # how many times as wide as the table the background is


class Scorer(Protocol):
    """What a calibration needs of a model."""

    schema: Schema

    def log_prob(self, rows: Table) -> np.ndarray:
        """Log-densities of rows, (N,)."""
        ...


class Background(eqx.Module):
    """A Gaussian of the points of a metric, some times as wide as they are.

    Args:
        mean: (F,).
        whiten: The inverse of the lower Cholesky factor of its covariance, (F, F), or the
            inverse deviations of independent columns, (F,).
    """

    mean: np.ndarray
    whiten: np.ndarray

    def log_prob(self, points: np.ndarray) -> np.ndarray:
        """Log-densities of points (N, F)."""
        centred, full = points - self.mean, self.whiten.ndim == 2
        z = centred @ self.whiten.T if full else centred * self.whiten
        diagonal = np.diag(self.whiten) if full else self.whiten
        constant = np.log(diagonal).sum() - 0.5 * len(self.mean) * np.log(2 * np.pi)
        return constant - 0.5 * np.square(z).sum(axis=1)


class Calibration(eqx.Module):
    """Rows that a model has not seen, with their scores, and what else a score is made of.

    Args:
        flow: The flow that has not seen the calibration rows, where the model that carries this
            has been fitted to them since; None where the model's own has not.
        metric: Distances between rows; None where columns are given.
        points: Training rows as points of it, (R, F), float32.
        background: A broad Gaussian of the points; None where columns are given.
        scale: What the default score is measured in: location and spread of the log-density, and
            of the distance; (4,).
        log_p: Log-densities of the calibration rows, (n,).
        scores: Their default scores, (n,); −inf where the model failed on one, which enlarges all
            p-values.
        rows: Some calibration rows in the user's numbers, (M, D), given columns included.
        names: The columns of these.
        cells: How their numbers stand for cells.
        weights: Of the calibration rows, (n,), of mean one; None where all count alike.
    """

    flow: AbstractDistribution | None
    metric: Metric | None
    points: np.ndarray
    background: Background | None
    scale: np.ndarray
    log_p: np.ndarray
    scores: np.ndarray
    rows: np.ndarray
    names: tuple[str, ...] = eqx.field(static=True)
    cells: tuple[Cells, ...] = eqx.field(static=True)
    weights: np.ndarray | None = None

    def p_values(self, scores: np.ndarray, *, rng: np.random.Generator | None = None) -> np.ndarray:
        """The conformal p-values of scores, (N,); see `laminar.scores.conformal_p_values`.

        Of weighted rows the law that they stand for is that of the weights. What a new row itself
        weighs is not known, and the most that a calibration row does errs on the safe side.

        Args:
            scores: From `score`, (N,).
            rng: Breaks ties at random; without it they count against strangeness.
        """
        new = None if self.weights is None else np.full(len(scores), self.weights.max())
        return conformal_p_values(
            scores,
            self.scores,
            weights=new,
            calibration_weights=self.weights,
            ties="conservative" if rng is None else "random",
            rng=rng,
        )

    @property
    def least_p_value(self) -> float:
        """The smallest p-value that there can be, 1 / (n + 1) of n rows that count alike."""
        w = np.ones(len(self.scores)) if self.weights is None else self.weights
        return float(w.max() / (w.sum() + w.max()))

    @property
    def table(self) -> Table:
        """The calibration rows that are kept."""
        return Table(self.names, self.rows, "the calibration rows", cells=self.cells)

    def distance(self, rows: Table) -> np.ndarray:
        """The distance of rows to the training rows, (N,); NaN where columns are given."""
        if self.metric is None:
            return np.full(len(rows), np.nan)
        return _distance(self.metric, self.points, rows)

    def seen(self, rows: Table) -> np.ndarray:
        """Whether rows equal training rows that are kept, (N,); all False where none are."""
        if self.metric is None:
            return np.zeros(len(rows), dtype=bool)
        return nearest_distances(self.metric(rows).astype(self.points.dtype), self.points) == 0

    def background_log_prob(self, rows: Table) -> np.ndarray:
        """Log-densities under the background, per unit of the metric; NaN without one."""
        if self.metric is None or self.background is None:
            return np.full(len(rows), np.nan)
        return self.background.log_prob(self.metric(rows))

    def score(self, log_p: np.ndarray, distance: np.ndarray) -> np.ndarray:
        r"""The default score, low where a row is strange.

            S(x) = ¼ (ln p(x) − m_p) / s_p − ¾ (δ(x) − m_δ) / s_δ

        δ is the distance to the nearest training row, m and s are the median and the spread (by
        quartiles) of either over training rows, each of which leaves itself out of δ. The two
        fail in different places. A density knows the shape of the whole table, and is misled by
        ties, by columns without information and by few rows; the nearest row needs none of that,
        and is lost where density varies along the table or most of many columns are noise. The
        weights are those that did best on one half of the tables of `benchmarks/adbench.py`. Where
        columns are given there is no distance, and the score is ln p alone.

        Args:
            log_p: Log-densities (N,).
            distance: From `distance`, (N,).

        Returns:
            (N,); −inf where ln p is −inf, NaN where it is NaN.
        """
        return combine(log_p, distance, self.scale)


def combine(log_p: np.ndarray, distance: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`Calibration.score` with location and spread of both, (4,); without distances, ln p."""
    if np.isnan(distance).all():
        return log_p
    ours, theirs = _OPINIONS
    density, near = (log_p - scale[0]) / scale[1], (distance - scale[2]) / scale[3]
    return ours * density - theirs * near


def calibrate(
    model: Scorer,
    train: Table,
    held: Table,
    *,
    weights: np.ndarray | None = None,
    seed: int = 0,
) -> Calibration:
    """Make the calibration of a model.

    Args:
        model: The model, fitted to rows of `train` alone.
        train: Rows that it was fitted to.
        held: The calibration rows, which it has not seen.
        weights: Their weights, or None; what is unusual is unusual among rows so weighted.
        seed: Of the choice of the rows that are kept.

    Returns:
        The calibration.
    """
    schema, rng = model.schema, np.random.default_rng([seed, 5])
    kept = tuple(column.name for column in schema.columns if column.kind != "ignored")
    names = (*kept, *schema.given_names)
    cells = {name: schema.cells[name] for name in names}
    train, held = (table.select(names).align(cells) for table in (train, held))
    chosen = some_rows(len(held), MOST_SCORES, rng)
    held = held.take(chosen)
    metric, background, points = None, None, np.zeros((0, 0), np.float32)
    log_p, distance = model.log_prob(held), np.full(len(held), np.nan)
    found = learn_metric(train, kept)
    some = train.take(some_rows(len(train), _most(MOST_POINTS, found.width), rng))
    fitted = model.log_prob(some)
    own = np.full(len(some), np.nan)
    if not schema.given:
        metric = found
        points = metric(some).astype(np.float32)
        background = _background(points.astype(np.float64))
        own = nearest_distances(points, points, own=True)
        distance = _distance(metric, points, held)
    scale = np.array([*_middle(fitted), *_middle(own)])
    scores = combine(log_p, distance, scale)
    return Calibration(
        None,
        metric,
        points,
        background,
        scale,
        log_p,
        np.where(np.isnan(scores), -np.inf, scores),
        held.values[some_rows(len(held), _most(MOST_ROWS, len(names)), rng)],
        names,
        held.cells,
        None if weights is None else weights[chosen] / weights[chosen].mean(),
    )


def _distance(metric: Metric, points: np.ndarray, rows: Table) -> np.ndarray:
    # In the precision of the points kept, so that equal rows are at distance zero.
    own = metric(rows).astype(points.dtype)
    found = nearest_distances(own, points)
    same = found == 0
    if same.any() and len(points) > 1:
        # A row that is one of them is not its own neighbour; rows that were not seen in the fit
        # are told alike, so that their ranks stay fair.
        found[same] = nearest_distances(own[same], points, k=2)
    return found


def _background(points: np.ndarray) -> Background:
    mean = points.mean(axis=0)
    if points.shape[1] > _WIDE:
        return Background(mean, 1 / (_WIDER * np.maximum(points.std(axis=0), 1e-3)))
    covariance = pooled_covariance(points) + 1e-6 * np.eye(points.shape[1])
    factor = np.linalg.cholesky(covariance)
    return Background(mean, np.linalg.inv(_WIDER * factor))


def _middle(values: np.ndarray) -> tuple[float, float]:
    """The median, and the range of the middle half as a deviation."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    spread = (high - low) / 1.349
    return float(middle), float(spread if spread > 0 else np.std(values) or 1.0)


def _most(rows: int, width: int) -> int:
    """So many rows, or fewer where a row is long."""
    return min(rows, max(_MOST_NUMBERS // width, _LEAST_ROWS))


def some_rows(rows: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of all rows, or of so many drawn at random, in order."""
    return np.arange(rows) if rows <= most else np.sort(rng.choice(rows, most, replace=False))
