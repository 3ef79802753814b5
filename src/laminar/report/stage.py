"""The section of the flow itself, which the script of the page moves."""

import numpy as np

from laminar.report.axes import short_number
from laminar.report.markup import Markup, tag
from laminar.report.motion import Motion
from laminar.report.parts import grid, section
from laminar.report.views import percent


def motion(found: Motion | None, first: tuple[int, int]) -> Markup:
    """The flow itself, to be moved by hand."""
    if found is None:
        return section(
            "flow",
            "The flow",
            tag("p", "This model has no path of two columns or more to be shown."),
        )
    last = len(found.names) - 1
    part = (
        ""
        if found.share is None
        else f" The model is a mixture; this is the part of it with {percent(found.share)} of its "
        "weight that has most to show."
    )
    rest = f" {found.left_out} columns found no room." if found.left_out else ""
    steps = [
        (found.head(k).split(":")[0], found.names[k], short_number(_mean(found.log_q[k]), 4))
        for k in range(last + 1)
    ]
    return section(
        "flow",
        "The flow",
        tag(
            "p",
            f"{found.points.shape[2]:,} draws from the base, and what each of {last} steps makes "
            f"of them until they are rows. The window follows the points.{part}{rest}",
        ),
        tag("noscript", tag("p", "The moving picture needs JavaScript; the table below does not.")),
        _stage(found, first, last),
        tag(
            "details",
            tag("summary", "The steps in numbers"),
            grid(
                "The steps",
                "Mean log density of the points under q_k, the law at each step, in nats.",
                ("step", "what it is", "mean ln q"),
                steps,
                right=(2,),
            ),
        ),
    )


def _stage(found: Motion, first: tuple[int, int], last: int) -> Markup:
    def choice(identity: str, text: str, chosen: int) -> Markup:
        options = (
            tag("option", view.name, value=k, selected=k == chosen)
            for k, view in enumerate(found.views)
        )
        label = tag("label", text, for_=identity)
        # Browsers would keep the choice of an earlier visit, and not the picture.
        return tag("div", label, tag("select", *options, id=identity, autocomplete="off"))

    controls = tag(
        "div",
        tag(
            "div",
            tag("label", "From base to rows", for_="motion-slider"),
            tag(
                "input",
                type="range",
                id="motion-slider",
                min="0",
                max=last,
                step="0.01",
                value="0",
                autocomplete="off",
                aria_describedby="motion-now",
            ),
        ),
        tag(
            "div",
            tag("button", "Play", id="motion-play", type="button", class_="play"),
            tag("button", "‹ Step", id="motion-back", type="button", aria_label="One step back"),
            tag("button", "Step ›", id="motion-on", type="button", aria_label="One step on"),
            class_="buttons",
        ),
        tag("p", id="motion-now", class_="now", aria_live="polite"),
        tag(
            "div",
            tag("span", id="ramp-low"),
            tag("i", aria_hidden="true"),
            tag("span", id="ramp-high"),
            tag("span", "ln q, nats"),
            class_="ramp",
        ),
        tag(
            "div",
            choice("motion-x", "Across", first[0]),
            choice("motion-y", "Upward", first[1]),
            class_="choices",
        ),
        tag(
            "label",
            tag("input", type="checkbox", id="motion-rows", checked=True, autocomplete="off"),
            "Rows of the table behind the last step",
            class_="check",
        ),
        id="motion-controls",
        class_="controls",
        hidden=True,
    )
    canvas = tag("canvas", id="motion", role="img", aria_label="Points on their way")
    return tag("div", tag("div", canvas, class_="stage"), controls, class_="motion")


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
