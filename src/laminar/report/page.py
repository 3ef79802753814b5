"""The report: one page that needs nothing but itself.

Style, script and data are in the page, and its content security policy admits these by their hashes
and nothing else, so that no browser will ask any server for anything.
"""

from importlib.resources import files
from typing import Any

import jax.random as jr
import numpy as np

from laminar._files import PathLike, atomic_write
from laminar._typing import PRNGKeyArray
from laminar._version import __version__
from laminar.report import anomalies, charts, columns, reliability, stage
from laminar.report.axes import minus, short_number
from laminar.report.charts import Curve, Interval
from laminar.report.markup import Markup, content_hash, data_element, raw_element, tag
from laminar.report.motion import Motion
from laminar.report.origin import mixture_score
from laminar.report.parts import figure, section
from laminar.report.strange import find_anomalies
from laminar.report.study import Study, study
from laminar.tables.model import TableFlow
from laminar.tables.table import Table

STRANGEST = 12
"""Rows in the section of anomalies."""


def write_report(
    model: TableFlow,
    table: Table,
    path: PathLike,
    *,
    key: PRNGKeyArray,
    meta: dict[str, Any] | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """Write a page about a model and a table, to be opened in any browser.

    It shows how the fit went and how well it scores; every column of the table beside samples; the
    columns that depend on each other most; whether the density is calibrated; the strangest rows
    and the cells that make them so; and the flow itself, whose steps can be walked through by hand.

    Args:
        model: The model.
        table: Rows with the model's columns. Best the table that it was fitted to: the rows held
            out from the fit are then found again and shown.
        path: Where to write the page, whole or not at all.
        key: Draws the samples.
        meta: What the model's file says of the fit, `laminar.read_header(path).meta`.
        title: A heading, by default the name of the table.

    Returns:
        What the page says in numbers, as JSON can hold it.

    Raises:
        InputError: If the table does not fit the model or the page cannot be written.
    """
    study_key, path_key = jr.split(key)
    found = study(model, table, study_key, meta)
    motion = found.motion(path_key)
    first = motion.foremost([pair[:2] for pair in found.pairs]) if motion else (0, 1)
    latent = found.latent()
    strange = find_anomalies(model, found.table, STRANGEST, new=found.origin is None)
    parts = [
        ("summary", "Summary", summary(found)),
        ("flow", "Flow", stage.motion(motion, first)),
        ("columns", "Columns", columns.marginals(found)),
        ("pairs", "Pairs", columns.pairs(found)),
        ("calibration", "Calibration", reliability.calibration(found, latent)),
        ("anomalies", "Strangest rows", anomalies.anomalies(found, strange)),
    ]
    heading = title or f"A density of {table.source}"
    text = page(heading, [part for part in parts if part[2] is not None], motion)
    atomic_write(path, text.encode())
    regions = found.regions()
    return {
        "rows": len(found.table),
        "rows_shown": len(found.rows),
        "rows_judged": len(found.judged),
        "held_out": found.unseen,
        "samples": len(found.drawn),
        "region_distance": None if regions is None else regions.distance,
        "strangest": [entry.row for entry in strange.rows],
        "bytes": len(text.encode()),
    }


def page(heading: str, parts: list[tuple[str, str, Any]], motion: Motion | None) -> str:
    """The whole page, of parts (id, short name, content)."""
    css, script = (_asset(name) for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; style-src {content_hash(css)}; script-src {content_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"laminar {__version__}"),
        tag("title", heading),
        raw_element("style", css),
    )
    navigation = tag(
        "div",
        tag(
            "div",
            tag(
                "nav",
                tag("ul", *(tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in parts)),
                aria_label="Sections",
            ),
            tag("button", "Dark", id="theme", type="button", aria_pressed="false", hidden=True),
        ),
        class_="top",
    )
    body = tag(
        "body",
        tag("a", "To the content", href="#content", class_="skip"),
        navigation,
        tag(
            "main",
            tag("header", tag("h1", heading), class_="title"),
            *(p[2] for p in parts),
            id="content",
        ),
        tag("footer", f"Made by laminar {__version__}. This page loads nothing from elsewhere."),
        None if motion is None else data_element("motion-data", motion.to_page()),
        raw_element("script", script),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return files("laminar.report").joinpath("assets", name).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------- summary


def summary(found: Study) -> Markup:
    """What there is to say first, and how the fit went."""
    meta, schema = found.meta, found.model.schema
    kinds: dict[str, int] = {}
    for column in schema.columns:
        kinds[column.kind] = kinds.get(column.kind, 0) + 1
    listed = ", ".join(
        f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda e: -e[1])
    )
    fitted = meta.get("table")
    lead = [
        f"{_flow_words(meta)} of {len(schema.columns)} column{'s' * (len(schema.columns) != 1)} "
        f"({listed})",
        f" given {', '.join(schema.given_names)}" if schema.given else "",
        f", fitted to {meta['rows']:,} rows of {fitted}." if _is_count(meta, "rows") else ".",
    ]
    scores = scores_of(found)
    return section(
        "summary",
        "Summary",
        tag("p", "".join(lead), class_="lead"),
        _score_words(scores),
        _facts(found),
        tag("div", *_fit_charts(found, scores), class_="charts"),
        _notes(meta),
    )


def _is_count(meta: dict[str, Any], name: str) -> bool:
    return isinstance(meta.get(name), int) and isinstance(meta.get("table"), str)


def _flow_words(meta: dict[str, Any]) -> str:
    flow = meta.get("flow")
    if meta.get("mixed"):
        return "An exact density and probability"
    if not isinstance(flow, str) or flow == "auto":
        return "An exact joint density"
    return f"An exact joint density ({flow})"


def scores_of(found: Study) -> list[tuple[str, dict[str, Any]]]:
    """Held-out scores: the model's, the baseline's, and that of a mixture where rows are known."""
    meta = found.meta
    scores = []
    for name, key in (("this model", "held_out"), ("", "baseline")):
        entry = meta.get(key)
        if isinstance(entry, dict) and isinstance(entry.get("log_density"), float):
            scores.append((name or str(entry.get("name", "a baseline")), entry))
    if scores and found.origin is not None:
        other = mixture_score(found.model, found.table, found.origin, int(meta["seed"]))
        if other is not None and other["log_density"] is not None:
            scores.append(("a Gaussian mixture", other))
    return scores


def _score_words(scores: list[tuple[str, dict[str, Any]]]) -> Markup | None:
    if not scores:
        return None
    own = scores[0][1]
    text = (
        f"Rows held out from the fit ({own['rows']:,} of them) have a mean log density of "
        f"{_score(own)} nats in the table's units"
    )
    others = [
        f"{short_number(own['log_density'] - entry['log_density'], 2)} "
        f"{'more' if own['log_density'] >= entry['log_density'] else 'less'} than {name}"
        for name, entry in scores[1:]
    ]
    others = [words.removeprefix("−") for words in others]
    tail = f": {' and '.join(others)}." if others else "."
    return tag("p", text + tail)


def _score(entry: dict[str, Any]) -> str:
    """A mean with its standard error, to the digits that the error leaves."""
    error = entry["error"]
    digits = 3 if not error else int(np.clip(1 - np.floor(np.log10(error)), 0, 4))
    return minus(f"{entry['log_density']:,.{digits}f}\u00a0±\u00a0{error:.{digits}f}")


def _facts(found: Study) -> Markup:
    meta = found.meta
    shown = "all shown" if len(found.rows) == len(found.table) else f"{len(found.rows):,} shown"
    facts: list[tuple[str, str, str | None]] = [
        ("Rows here", f"{len(found.table):,}", shown),
        ("Columns", f"{len(found.model.schema.columns)}", _left_out(found)),
    ]
    held = meta.get("held_out")
    if isinstance(held, dict) and isinstance(held.get("log_density"), float):
        mean, error = _score(held).split("\u00a0±\u00a0")
        facts.append(("Held-out log density", mean, f"± {error} nats a row"))
    if isinstance(meta.get("seconds"), float):
        facts.append(("Time to fit", f"{meta['seconds']:,.1f} s", None))
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", value, tag("small", note) if note else None))
            for name, value, note in facts
        ),
        class_="facts",
    )


def _left_out(found: Study) -> str:
    schema = found.model.schema
    left = len(schema.columns) - len(schema.modelled)
    return f"{left} of them constant or left out" if left else "all modelled"


def _notes(meta: dict[str, Any]) -> Markup | None:
    notes = [note for note in meta.get("notes") or () if isinstance(note, str)]
    if not notes:
        return None
    return tag(
        "details",
        tag("summary", f"What to know about the columns ({len(notes)})"),
        tag("ul", *(tag("li", note) for note in notes), class_="notes"),
    )


# --------------------------------------------------------------------------------------- the fit


def _fit_charts(found: Study, scores: list[tuple[str, dict[str, Any]]]) -> list[Markup]:
    panels = fit_panels(found.meta, scores)
    return [figure(panel, caption) for panel, caption in panels]


def fit_panels(
    meta: dict[str, Any], scores: list[tuple[str, dict[str, Any]]]
) -> list[tuple[charts.Panel, str]]:
    """How the fit went: scores, what a mixture consists of, and the course of training."""
    panels = []
    if scores:
        entries = [
            Interval(name, entry["log_density"], entry["error"], "flow" if k == 0 else "ink")
            for k, (name, entry) in enumerate(scores)
        ]
        summary = "; ".join(f"{name} {_score(entry)}" for name, entry in scores) + " nats a row."
        panel = charts.intervals(
            "Held-out log density", summary, entries, "mean nats a row, with two standard errors"
        )
        panels.append((panel, "Farther right is better. All are scored on the same rows."))
    training = meta.get("training")
    if not isinstance(training, dict):
        return panels
    parts = [p for p in training.get("parts") or () if isinstance(p, dict)]
    if len(parts) > 1:
        names, weights = [str(p["name"]) for p in parts], np.array([p["weight"] for p in parts])
        heaviest = np.argsort(-weights)[:3]
        summary = ", ".join(f"{names[k]} {100 * weights[k]:.0f}%" for k in heaviest) + "."
        panel = charts.shares("What the density consists of", summary, names, weights)
        panels.append((panel, "A mixture, weighted on held-out rows."))
    courses = training.get("flows")
    if not isinstance(courses, dict):
        courses = {"training": training}
    for name, course in courses.items():
        panel = _course(name, course)
        if panel is not None:
            panels.append(
                (panel, "Lower is better. Dotted: averaged parameters. The point: what was kept.")
            )
    return panels


def _course(name: str, course: Any) -> charts.Panel | None:
    if not isinstance(course, dict) or not course.get("validation_steps"):
        return None
    steps = np.array(course["validation_steps"], np.float64)
    lines = []
    for key, dashed in (("validation", False), ("validation_ema", True)):
        values = np.array([np.nan if v is None else v for v in course.get(key) or ()], np.float64)
        if len(values) == len(steps) and np.isfinite(values).any():
            lines.append(Curve(key, steps, values, dashed))
    if not lines:
        return None
    best = course.get("best_loss")
    best = np.nan if best is None else float(best)
    summary = (
        f"{int(steps[-1]):,} steps; kept after {int(course['best_step']):,}, at "
        f"{short_number(best, 4)} nats a row in standardised units."
    )
    head = f"Training: {name}" if name != "training" else "Training"
    return charts.curves(head, summary, lines, (int(course["best_step"]), best))
