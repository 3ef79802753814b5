"""The strangest rows of a table, and the cells that make them so."""

from dataclasses import dataclass

import numpy as np

from laminar.report.views import cell_text
from laminar.tables.anomaly import Detector
from laminar.tables.explain import NODES, Conditionals, Reason, conditionals, reasons
from laminar.tables.model import TableFlow
from laminar.tables.table import Table

_CAUSES = 3
_EVALUATIONS = 200_000  # rows scored to explain others, at most
_MOST_KNOWN = 2_000


@dataclass(frozen=True)
class Cause:
    """A cell of a row.

    Attributes:
        column: Its column.
        text: What stands in it.
        surprise: By how many nats it is less probable, given the rest of the row, than the median
            cell of its column.
    """

    column: str
    text: str
    surprise: float


@dataclass(frozen=True)
class Strange:
    """A row that the model finds strange.

    Attributes:
        row: Its number in the table, counted from 1.
        log_density: Its log-density, in nats.
        p_value: How often a row as strange turns up among rows that were held out, or None.
        causes: The cells that make it strange, the worst first.
    """

    row: int
    log_density: float
    p_value: float | None
    causes: list[Cause]


@dataclass(frozen=True)
class Anomalies:
    """The strangest rows of a table.

    Attributes:
        rows: The strangest first.
        p_values: Of all rows of the table, (N,); None where there is no calibration for them.
        listed: How many rows a list has of which at most 5% are expected to be normal, or None.
        outside: How many rows lie outside the support of the model.
        failed: How many rows the model could not score: NaN.
    """

    rows: list[Strange]
    p_values: np.ndarray | None
    listed: int | None
    outside: int
    failed: int


def find_anomalies(model: TableFlow, table: Table, count: int, *, new: bool = True) -> Anomalies:
    """The strangest rows of a table.

    Among new rows, where the model has a calibration, they are those of the lowest default score
    (`laminar.tables.anomaly`), with conformal p-values. That score knows the rows of the fit, and
    would find strange whichever were held out of it: in the table of the fit, and without a
    calibration, they are the rows of the lowest log-density.

    Args:
        model: The model.
        table: The rows, in the model's own numbers.
        count: How many.
        new: Whether the model was fitted to other rows.
    """
    if model.calibration is None or not new:
        log_p = model.log_prob(table)
        order = _lowest(log_p, count)
        why = _reasons(model, table, order)
        p = np.full(len(order), np.nan)
        p_values = listed = None
    else:
        detector = Detector.of(model)
        found = detector.detect(table)
        log_p, p_values, listed = found.scores.log_density, found.scores.p_value, found.listed.sum()
        order = _lowest(found.scores.score, count)
        why = detector.explain(table.take(order), _CAUSES)
        p = p_values[order]
    # The detector's own model may be an earlier fit; what is shown is what the model says.
    shown = model.log_prob(table.take(order)) if len(order) else log_p[order]
    rows = [
        Strange(
            int(table.rows[at]),
            float(own),
            None if np.isnan(q) else float(q),
            [Cause(r.column, _text(table, at, r.column), r.excess) for r in each],
        )
        for at, own, q, each in zip(order, shown, p, why, strict=True)
    ]
    return Anomalies(
        rows,
        p_values,
        None if listed is None else int(listed),
        int(np.isneginf(log_p).sum()),
        int(np.isnan(log_p).sum()),
    )


def _lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the lowest scores, the lowest first; what is NaN is left out."""
    there = np.flatnonzero(~np.isnan(scores))
    return there[np.argsort(scores[there], kind="stable")[:count]]


def _reasons(model: TableFlow, table: Table, strange: np.ndarray) -> list[list[Reason]]:
    """The cells that make rows at some positions strange beside others of their table."""
    rng = np.random.default_rng(0)
    most = int(np.clip(_EVALUATIONS // (NODES * len(model.schema.columns)), 20, 200))
    known = rng.permutation(len(table))[:_MOST_KNOWN]
    # One call for both, so that what it compiles serves both.
    chosen = np.concatenate([strange, known[:most]])
    found = conditionals(model, table.take(chosen), table.take(known))
    parts = (slice(len(strange)), slice(len(strange), None))
    own, usual = (Conditionals(found.names, *(a[part] for a in found[1:])) for part in parts)
    return reasons(own, usual, _CAUSES)


def _text(rows: Table, row: int, column: str) -> str:
    place = rows.names.index(column)
    return cell_text(rows.cells[place], float(rows.values[row, place]))
