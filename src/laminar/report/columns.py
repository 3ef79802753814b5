"""The sections of columns and pairs: rows of the table beside samples of the model."""

import numpy as np

from laminar.report import charts
from laminar.report.axes import short_number
from laminar.report.calibration import CONFIDENCE
from laminar.report.markup import Markup, join, tag
from laminar.report.parts import figure, grid, legend, p_text, section, verdict
from laminar.report.scene import Panel, Role, to_svg
from laminar.report.study import Study
from laminar.report.views import View, percent
from laminar.scores.conformal import holm

_MOST_MARGINALS = 24
_MOST_POINTS = 1500


def marginals(study: Study) -> Markup:
    """Every column by itself."""
    views = study.views
    tests = [view.test() for view in views]
    p = holm(np.array([test.p_value for test in tests])) if views else np.zeros(0)
    differences = np.array([view.difference() for view in views])
    shown = list(range(len(views)))
    note = ""
    if len(views) > _MOST_MARGINALS:
        shown = sorted(np.argsort(-np.nan_to_num(differences), kind="stable")[:_MOST_MARGINALS])
        note = f" Of {len(views)} columns those {_MOST_MARGINALS} are drawn that differ most."
    clear = [views[k].name for k in range(len(views)) if p[k] < 1 - CONFIDENCE]
    rows = [
        (v.name, v.kind, v.middle(v.data), v.middle(v.drawn), percent(d), p_text(q))
        for v, d, q in zip(views, differences, p, strict=True)
    ]
    return section(
        "columns",
        "Columns",
        tag(
            "p",
            f"Each column of {len(study.rows):,} rows beside {len(study.drawn):,} samples.{note} ",
            verdict(clear, len(views), "columns"),
        ),
        legend(("data", "rows of the table"), ("flow", "samples of the model")),
        tag("div", *(figure(marginal(views[k]), _below(views[k])) for k in shown), class_="charts"),
        tag(
            "details",
            tag("summary", "All columns in numbers"),
            grid(
                "All columns",
                "The difference is the largest one between the probabilities of any interval from "
                "below (of any set of names, for categories); p says how often chance gives as "
                "much, adjusted for the number of columns.",
                ("column", "kind", "rows", "samples", "difference", "p"),
                rows,
                right=(4, 5),
            ),
        ),
    )


def marginal(view: View) -> Panel:
    """The picture of one column."""
    title = view.name
    summary = f"Rows: {view.middle(view.data)}. Samples: {view.middle(view.drawn)}. {view.gaps()}"
    summary = summary.strip()
    if view.categorical:
        names = [view.text(code) for code in view.codes]
        shares = (view.frequencies(view.data), view.frequencies(view.drawn))
        return charts.category_bars(title, summary, names, *shares)
    data, drawn = (values[np.isfinite(values)] for values in (view.data, view.drawn))
    levels = view.levels
    if len(levels):
        shares = (
            np.array([(values == level).mean() if len(values) else 0.0 for level in levels])
            for values in (data, drawn)
        )
        return charts.columns_of_counts(title, summary, view.count_axis(), levels, *shares)
    return charts.histogram(title, summary, view.bare_axis(), data, drawn, view.step)


def _below(view: View) -> str:
    parts = [f"Largest difference in probability {percent(view.difference())}."]
    if view.gaps():
        parts.append(view.gaps())
    if not view.categorical and not len(view.levels):
        share = view.axis.share(view.data[np.isfinite(view.data)])
        outside = float((~((share >= 0) & (share <= 1))).mean()) if len(share) else 0.0
        if outside > 0.001:
            parts.append(f"{percent(outside)} of the rows lie outside the picture.")
    return " ".join(parts)


def pairs(study: Study) -> Markup | None:
    """The columns that depend on each other most, two by two."""
    if not study.pairs:
        return None
    pictures = []
    for a, b, strength in study.pairs:
        left, right = pair(study, a, b)
        caption = (
            f"{a} and {b}: mutual information about {short_number(strength, 2)} nats. Left, in "
            "blue: rows of the table. Right, in orange: samples."
        )
        both = join(to_svg(left), to_svg(right), tag("figcaption", caption))
        pictures.append(tag("figure", both, class_="pair"))
    return section(
        "pairs",
        "Pairs",
        tag(
            "p",
            "The columns that depend on each other most, as points: rows of the table beside as "
            "many samples, in one window.",
        ),
        tag("div", *pictures, class_="charts one"),
    )


def pair(study: Study, a: str, b: str) -> tuple[Panel, Panel]:
    """Two columns, of rows and of samples."""
    rng = np.random.default_rng(0)
    x, y = study.view(a), study.view(b)
    count = min(len(x.data), len(x.drawn), _MOST_POINTS)
    panels = []
    kinds: tuple[tuple[str, Role], ...] = (("rows", "data"), ("samples", "flow"))
    for what, role in kinds:
        own = [v.data if role == "data" else v.drawn for v in (x, y)]
        chosen = rng.choice(len(own[0]), count, replace=False)
        both = [
            v.axis.share(v.spread(values[chosen], rng))
            for v, values in zip((x, y), own, strict=True)
        ]
        summary = f"{count} {what} of {a} and {b}"
        if not (x.categorical or y.categorical):
            summary += f"; their rank correlation: {_correlation(*own):.2f}"
        summary += "."
        panels.append(charts.cloud(what, summary, (x.axis, y.axis), np.stack(both, 1), role))
    return panels[0], panels[1]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, with mean ranks of ties."""
    from scipy.stats import rankdata

    there = np.isfinite(a) & np.isfinite(b)
    if there.sum() < 3:
        return float("nan")
    ranks = [rankdata(v[there]) for v in (a, b)]
    deviations = [r - r.mean() for r in ranks]
    norm = np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum())
    return float((deviations[0] * deviations[1]).sum() / norm) if norm > 0 else 0.0
