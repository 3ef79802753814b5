r"""Which rows of a table are strange, how surely, and because of which columns.

A `Detector` is a model and a `Calibration`: scores of rows that neither the model nor anything else
in the detector has seen. So a row's p-value is exact in finite samples, whatever the model: see
`laminar.scores.conformal`. (`fit_table` looks at all rows to see what the columns are, the rows it
calibrates on among them, so that those of its models are exact but for that; `fit_detector` looks
at none.) That is why the model of a detector is not the one that `fit_table` fits last, to all rows
of a small table: a model scores rows that it was fitted to too well, and a new row would look
stranger than it is. The alternative, cross-conformal p-values from several models that each leave
out a part, needs as many fits and bounds the error only by twice the level.

Where rows are strange only by a default score it is because log-densities alone are known to fail:
see `Calibration.score`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np

from laminar._errors import InputError
from laminar.scores import (
    benjamini_hochberg,
    conditional_p_values,
    contrast,
    null_share,
    typicality,
)
from laminar.tables.calibration import Calibration, calibrate, some_rows
from laminar.tables.explain import NODES, Conditionals, Reason, conditionals, reasons
from laminar.tables.flow import check_weights, fit_table, split
from laminar.tables.latent import latent_log_tail
from laminar.tables.model import TableFlow
from laminar.tables.table import Table

_EVALUATIONS = 400_000  # rows scored for the ranks of contributions, at most
_MOST_RANKED, _LEAST_RANKED = 200, 20


class RowScores(NamedTuple):
    """Scores of rows, each float64 (N,) and low where a row is strange.

    Attributes:
        log_density: ln p(x), in nats and the user's units.
        typicality: −|ln p(x) − E ln p|.
        latent_radius: ln of the probability of lying further out in the latent space, a mean over
            the parts of a mixture; NaN where the model has no latent space with a normal base.
        contrast: ln p(x) − ln p₀(x), p₀ a Gaussian of twice the table's width; NaN where
            columns are given.
        neighbours: Minus the distance to the nearest training row, in a metric in which all columns
            weigh the same; NaN where columns are given.
        score: The default; see `Calibration.score`. NaN where a row has gaps in columns that had
            none in the fit: nothing says how usual that is.
        p_value: The conformal p-value of the default score.
    """

    log_density: np.ndarray
    typicality: np.ndarray
    latent_radius: np.ndarray
    contrast: np.ndarray
    neighbours: np.ndarray
    score: np.ndarray
    p_value: np.ndarray


class Scored(NamedTuple):
    """The scores of rows that a verdict is made of, each (N,); see `RowScores`."""

    log_density: np.ndarray
    score: np.ndarray
    p_value: np.ndarray


@dataclass(frozen=True, eq=False)
class Detection:
    """The rows that `Detector.detect` lists.

    Attributes:
        rows: The number of every row in its table, (N,).
        scores: Log-densities, scores and p-values of every row.
        adjusted: Adjusted p-values of every row, (N,).
        listed: Whether a row is on the list, (N,) of bool.
        level: The bound on the expected share of normal rows in the list.
        null_share: The share of normal rows that the adjusted p-values count on; 1 by default.
        least_p_value: The smallest p-value that the calibration rows allow, 1 / (n + 1).
    """

    rows: np.ndarray
    scores: Scored
    adjusted: np.ndarray
    listed: np.ndarray
    level: float
    null_share: float
    least_p_value: float

    @property
    def order(self) -> np.ndarray:
        """Positions of the listed rows, the strangest first."""
        listed = np.flatnonzero(self.listed)
        keys = (self.scores.score[listed], self.scores.p_value[listed])
        return listed[np.lexsort(keys)]

    @property
    def least_together(self) -> int:
        """How many rows must be as strange as can be, so that any is listed."""
        tests = self.null_share * int((~np.isnan(self.scores.p_value)).sum())
        return int(np.ceil(self.least_p_value * tests / self.level - 1e-9))


class Detector(eqx.Module):
    """A model of a table, and what is needed to say how strange a row is; saved like any model.

    Args:
        model: The density. It has not seen the calibration rows.
        calibration: Scores of rows it has not seen, and more; see `Calibration`.
    """

    model: TableFlow
    calibration: Calibration

    @classmethod
    def of(cls, model: Any, name: str = "The model") -> "Detector":
        """The detector that a fitted model carries, or the detector itself.

        Raises:
            InputError: If the model was fitted without a calibration.
        """
        if isinstance(model, Detector):
            return model
        calibration = getattr(model, "calibration", None)
        if not isinstance(model, TableFlow) or calibration is None:
            raise InputError(
                f"{name} has no calibration scores of rows that were held out; fit it again with "
                "this version of laminar, or with fit_detector."
            )
        flow = calibration.flow if calibration.flow is not None else model.flow
        return cls(TableFlow(flow, model.schema), calibration)

    def score(self, rows: Table) -> Scored:
        """The log-density, the default score and its conservative p-value of each row."""
        known = self.calibration
        log_p = self.model.log_prob(rows)
        rows = rows.select(known.names).align(dict(zip(known.names, known.cells, strict=True)))
        score = self._told(rows, known.score(log_p, known.distance(rows)))
        return Scored(log_p, score, known.p_values(score))

    def scores(self, rows: Table, *, rng: np.random.Generator | None = None) -> RowScores:
        """Score rows in all ways there are.

        Args:
            rows: A table with the columns of the model, given ones included.
            rng: Breaks ties between scores at random, so that p-values are uniform exactly;
                without it tied scores count against strangeness.

        Returns:
            Scores and p-values; NaN where the model fails numerically.

        Raises:
            InputError: When a column is missing or cannot be read.
        """
        model, known = self.model, self.calibration
        log_p = model.log_prob(rows)
        rows = rows.select(known.names).align(dict(zip(known.names, known.cells, strict=True)))
        distance, background = known.distance(rows), known.background_log_prob(rows)
        score = self._told(rows, known.score(log_p, distance))
        return RowScores(
            log_p,
            typicality(log_p, known.log_p),
            latent_log_tail(model.flow, *model.batch(rows)),
            contrast(log_p, background),
            -distance,
            score,
            known.p_values(score, rng=rng),
        )

    def _told(self, rows: Table, score: np.ndarray) -> np.ndarray:
        """The scores, NaN where a row's log-density is that of a part of its cells alone.

        It cannot be ranked among those of whole rows; `TableFlow.impute` fills such rows in.
        """
        return np.where(self.model.schema.new_gaps(rows), np.nan, score)

    def detect(
        self,
        rows: Table,
        level: float = 0.05,
        *,
        storey: bool = False,
        confidence: float | None = None,
    ) -> Detection:
        """List strange rows so that of the list at most a share `level` is expected to be normal.

        Benjamini–Hochberg on conformal p-values. The guarantee is for the expected share, over
        calibration sets and tables, if the normal rows of the table come from the distribution of
        the rows that the detector was fitted to. With weights p-values are those of the weighted
        law, and the bound on the list is not proven.

        Args:
            rows: The rows.
            level: Of the false-discovery rate, in (0, 1).
            storey: Estimate the share of normal rows, to find more where many are strange.
            confidence: With it p-values are enlarged to hold given the calibration set, with
                this confidence; fewer rows are found.

        Raises:
            InputError: When the level is out of range, the rows do not fit, or a confidence is
                asked of a detector with weights.
        """
        if not 0 < level < 1:
            raise InputError(f"The false-discovery rate must lie between 0 and 1, not {level:g}.")
        scores = self.score(rows)
        count = len(self.calibration.scores)
        p, least = scores.p_value, self.calibration.least_p_value
        if confidence is not None:
            if self.calibration.weights is not None:
                raise InputError(
                    "The detector was fitted with weights, and p-values that hold with a given "
                    "confidence are known for rows of equal weight only; leave confidence out."
                )
            p = conditional_p_values(p, count, confidence)
            least = float(conditional_p_values(np.array([least]), count, confidence)[0])
        share = null_share(p) if storey else 1.0
        adjusted = benjamini_hochberg(p, share)
        return Detection(rows.rows, scores, adjusted, adjusted <= level, level, share, least)

    def explain(self, rows: Table, top: int = 3) -> list[list[Reason]]:
        """The columns that make each row strange, the worst first.

        A column counts by how rarely calibration rows have a cell that is as improbable given the
        rest of its row, and among equals by how many nats it lies below their median. A row that is
        strange as a whole, and in no cell given the others, has no small p-value.

        Args:
            rows: The rows; about 80 densities are evaluated for each cell.
            top: At most so many columns for each row.

        Returns:
            For each row its columns, only those with a positive excess.
        """
        known = self.calibration
        if not len(rows):
            return []
        found = conditionals(self.model, rows, known.table)
        return reasons(found, self._usual(len(found.names)), top)

    def _usual(self, columns: int) -> Conditionals:
        """Conditional log-densities of some calibration rows."""
        known = self.calibration.table
        count = int(np.clip(_EVALUATIONS // (NODES * columns), _LEAST_RANKED, _MOST_RANKED))
        # Drawn, as tables are often sorted; and the same ones at every call.
        chosen = some_rows(len(known), count, np.random.default_rng(count))
        return conditionals(self.model, known.take(chosen), known)


def fit_detector(
    table: Table,
    *,
    given: Sequence[str] = (),
    weights: str | None = None,
    seed: int = 0,
    calibration: float = 0.1,
    **options: Any,
) -> tuple[Detector, dict[str, Any]]:
    """Fit a model to a part of a table and calibrate it on the rest.

    Nothing about the calibration rows is known to the model: neither values, nor which columns
    and categories there are. Columns that are given make a detector of conditional anomalies: rows
    whose other columns are strange beside these.

    Args:
        table: At least 30 rows, taken to be normal; a few strange ones among them cost power.
        given: Columns to condition on.
        weights: The column of the rows' weights; rows of weight zero are left out.
        seed: Of all draws.
        calibration: The share of rows to calibrate on; a fifth at least below 1,000 rows.
        **options: Passed on to `fit_table`.

    Returns:
        The detector, and the report of `fit_table` with ``calibration_rows``.

    Raises:
        InputError: When rows or columns cannot be used.
        TrainingError: When training stays non-finite.
    """
    if weights is not None:
        check_weights(table, weights, given)
        table = table.take(np.flatnonzero(table.column(weights) > 0))
    if len(table) < 30:
        raise InputError(
            f"{table.source} has {len(table)} rows, and a detector needs at least 30: some to fit "
            "and some to calibrate."
        )
    kept, held = split(len(table), calibration, np.random.default_rng([seed, 3]))
    train = table.take(kept)
    model, report = fit_table(train, given=given, weights=weights, seed=seed, **options)
    model, rows = TableFlow(model.flow, model.schema), table.take(held)
    own = None if weights is None else rows.column(weights)
    found = calibrate(model, train, rows, weights=own, seed=seed)
    return Detector(model, found), {**report, "calibration_rows": len(found.scores)}
