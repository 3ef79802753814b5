"""The section of the strangest rows."""

from typing import Any

import numpy as np

from laminar.report import charts
from laminar.report.axes import short_number
from laminar.report.calibration import chance_band, histogram_bins
from laminar.report.markup import Markup, tag
from laminar.report.parts import figure, grid, p_text, section
from laminar.report.strange import Anomalies, Strange
from laminar.report.study import Study
from laminar.report.views import percent

_WIDTH = 80.0  # of the bars in the table


def anomalies(study: Study, found: Anomalies) -> Markup:
    """The rows that the model finds strangest, and why."""
    p_values = found.p_values
    scored = p_values is not None
    finite = [c.surprise for entry in found.rows for c in entry.causes if np.isfinite(c.surprise)]
    largest = max(finite, default=1.0)
    heads = ["row", "log density", *(["p"] if scored else []), "what makes it strange"]
    rows = []
    for entry in found.rows:
        cells: list[object] = [f"{entry.row:,}", short_number(entry.log_density, 4)]
        if scored:
            cells.append("–" if entry.p_value is None else p_text(entry.p_value))
        rows.append([*cells, _causes(entry, largest)])
    return section(
        "anomalies",
        "Strangest rows",
        tag("p", *(f"{sentence} " for sentence in _anomaly_words(study, found))),
        None if p_values is None else tag("div", _p_values(p_values), class_="charts"),
        grid(
            "Strangest rows",
            "Rows are counted from 1, without a header line. A bar shows by how many nats a cell "
            "is less probable, given the other cells of its row, than the median cell of its "
            "column.",
            heads,
            rows,
            right=(0, 1, 2) if scored else (0, 1),
        ),
    )


def _anomaly_words(study: Study, found: Anomalies) -> list[str]:
    total = f"{len(study.table):,}"
    if found.p_values is None:
        words = [
            f"The {len(found.rows)} rows of the lowest log density among {total}, and the cells "
            "that make them so."
        ]
        if study.origin is not None and study.model.calibration is not None:
            words.append("Rows that a model was fitted to have no p-values; new rows have.")
    else:
        words = [
            f"The {len(found.rows)} strangest of {total} rows, and the cells that make them so. "
            "p is the share of rows, held out from the fit, that are as strange.",
            f"A list of which at most 5% are expected to be false has {found.listed:,} rows.",
        ]
    if found.outside:
        words.append(
            f"{found.outside:,} rows lie outside the support of the model: it holds them to be "
            "impossible."
        )
    if found.failed:
        words.append(f"{found.failed:,} rows could not be scored: the computation gave NaN.")
    return words


def _p_values(p: np.ndarray) -> Markup:
    there = p[~np.isnan(p)]
    bins = histogram_bins(len(there))
    low = float((there <= 0.05).mean()) if len(there) else 0.0
    summary = f"{percent(low)} of the rows have a p-value of at most 0.05."
    panel = charts.uniform_histogram(
        "p-values of all rows", summary, there, bins, chance_band(len(there), bins)
    )
    return figure(panel, f"{summary} Of normal rows 5% would; many more at the left are anomalies.")


def _causes(entry: Strange, largest: float) -> Markup:
    def cause(c: Any) -> Markup:
        width = _WIDTH * min(max(c.surprise / largest, 0.0), 1.0) if largest > 0 else 0.0
        bar = tag(
            "svg",
            tag("path", class_="f flow", d=f"M0 1H{width:.1f}V11H0Z"),
            viewBox=f"0 0 {_WIDTH:g} 12",
            preserveAspectRatio="none",
            role="img",
            aria_label=f"{short_number(c.surprise, 2)} nats",
        )
        return tag("li", tag("span", f"{c.column} ", tag("b", c.text)), bar)

    return tag("ul", *(cause(c) for c in entry.causes), class_="why")
