"""The section of calibration: regions of highest density and latent variables."""

import numpy as np

from laminar.report import charts
from laminar.report.calibration import CONFIDENCE, Regions, Transforms, chance_band, histogram_bins
from laminar.report.markup import Markup, tag
from laminar.report.parts import figure, grid, legend, p_text, section, verdict
from laminar.report.scene import Panel
from laminar.report.study import Study
from laminar.report.views import percent

_MOST_LATENTS = 12


def calibration(study: Study, latent: Transforms | None) -> Markup:
    """Whether the density as a whole, and each latent, is right."""
    found = study.regions()
    children: list[object] = []
    if found is not None:
        children += [
            tag("h3", "All columns together"),
            tag("div", figure(region_chart(found)), _region_words(found), class_="charts"),
        ]
    children += _latents(latent)
    seen = (
        ""
        if study.unseen
        else (
            " The model may have been fitted to these rows, and so fits them a little better than "
            "rows to come."
        )
    )
    which = " that were held out from the fit" if study.unseen else ""
    return section(
        "calibration",
        "Calibration",
        tag(
            "p",
            f"Whether what the model holds for probable happens as often as it says, in "
            f"{len(study.judged):,} rows{which}.{seen}",
        ),
        *children,
    )


def region_chart(found: Regions) -> Panel:
    """The share of rows within each region of highest density."""
    nominal = np.linspace(0.0, 1.0, 101)
    share = np.array([found.inside(level) for level in nominal])
    half, ninety = found.inside(0.5), found.inside(0.9)
    summary = (
        f"Of the region that should hold 50% of the rows, {percent(half)} lie inside; of that for "
        f"90%, {percent(ninety)}."
    )
    return charts.coverage("Rows in the densest regions", summary, nominal, share, found.band)


def _region_words(found: Regions) -> Markup:
    inside = found.p_value >= 1 - CONFIDENCE
    return tag(
        "div",
        tag(
            "p",
            f"The densest region that should hold 50% of the rows holds "
            f"{percent(found.inside(0.5))}; the one for 90% holds {percent(found.inside(0.9))}. "
            f"The largest difference is {percent(found.distance)} (p = {p_text(found.p_value)}), "
            + ("no more than chance gives." if inside else "more than chance gives."),
        ),
        tag(
            "p",
            "A line above the diagonal: the model spreads its probability wider than the rows "
            "are. Below: rows lie where the model hardly expects any. The grey band is where the "
            "line of a right model stays, 95 times in 100.",
            class_="soft",
        ),
    )


def _latents(latent: Transforms | None) -> list[object]:
    heading = tag("h3", "Latent variables")
    if latent is None:
        return [
            heading,
            tag("p", "The base of this model has no independent variables to be looked at."),
        ]
    count = latent.u.shape[1]
    order = np.sort(np.argsort(-latent.distance, kind="stable")[:_MOST_LATENTS])
    clear = [latent.names[d] for d in range(count) if latent.p_value[d] < 1 - CONFIDENCE]
    which = "" if count <= _MOST_LATENTS else f" The {_MOST_LATENTS} farthest from it are drawn."
    return [
        heading,
        tag(
            "p",
            f"The flow takes each row to {count} variables that are uniform and independent if the "
            f"model is right (probability integral transforms).{which} ",
            verdict(clear, count, "latent variables"),
        ),
        legend(("data", "rows, relative to their expected number"), ("band", "what chance gives")),
        tag("div", *(_latent(latent, int(d)) for d in order), class_="charts"),
        tag(
            "details",
            tag("summary", "All latent variables in numbers"),
            grid(
                "All latent variables",
                "Kolmogorov–Smirnov distance from the uniform law; p is adjusted for the number of "
                "variables.",
                ("variable", "distance", "p"),
                [
                    (latent.names[d], f"{latent.distance[d]:.3f}", p_text(latent.p_value[d]))
                    for d in range(count)
                ],
                right=(1, 2),
            ),
        ),
    ]


def _latent(latent: Transforms, d: int) -> Markup:
    words = f"Distance from uniform {latent.distance[d]:.3f}, p = {p_text(latent.p_value[d])}."
    return figure(latent_chart(latent, d), words)


def latent_chart(latent: Transforms, d: int) -> Panel:
    """The histogram of one latent transform."""
    u = latent.u[:, d]
    bins = histogram_bins(len(u))
    summary = (
        f"Kolmogorov–Smirnov distance from uniform {latent.distance[d]:.3f}, p = "
        f"{p_text(latent.p_value[d])}."
    )
    return charts.uniform_histogram(latent.names[d], summary, u, bins, chance_band(len(u), bins))
