"""Pieces that all sections of the report are made of."""

from collections.abc import Iterable, Sequence

import numpy as np

from laminar.report.markup import Markup, tag
from laminar.report.scene import Panel, to_svg


def section(identity: str, heading: str, *children: object) -> Markup:
    """A section with a heading that the navigation leads to."""
    return tag(
        "section",
        tag("h2", heading, id=f"{identity}-heading"),
        *children,
        id=identity,
        aria_labelledby=f"{identity}-heading",
    )


def figure(panel: Panel, caption: object = None) -> Markup:
    """A picture with the words below it."""
    return tag("figure", to_svg(panel), None if caption is None else tag("figcaption", caption))


def grid(
    name: str,
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Sequence[int] = (),
) -> Markup:
    """A table, its first column naming the rows; the columns in `right` hold numbers.

    It scrolls by itself where it is too wide, and then can be reached by keyboard under its name.
    """

    def cell(k: int, content: object) -> Markup:
        style = "n" if k in right else None
        if k == 0:
            return tag("th", content, scope="row", class_=style)
        return tag("td", content, class_=style)

    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag(
                "thead",
                tag(
                    "tr",
                    *(
                        tag("th", head, scope="col", class_="n" if k in right else None)
                        for k, head in enumerate(heads)
                    ),
                ),
            ),
            tag("tbody", *(tag("tr", *(cell(k, c) for k, c in enumerate(row))) for row in rows)),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=name,
    )


def legend(*entries: tuple[str, str]) -> Markup:
    """What the colours stand for: pairs of a role and its meaning."""

    def swatch(role: str) -> Markup:
        return tag(
            "svg",
            tag("path", class_=f"f {role}", d="M0 0H24V12H0Z"),
            viewBox="0 0 24 12",
            aria_hidden="true",
        )

    return tag("ul", *(tag("li", swatch(role), text) for role, text in entries), class_="key")


def verdict(clear: list[str], count: int, what: str) -> str:
    """Which of many differences are larger than chance gives, in words."""
    if not clear:
        return f"No difference is larger than chance would give among {count} {what}."
    names = ", ".join(clear[:4]) + (f" and {len(clear) - 4} more" if len(clear) > 4 else "")
    return f"Chance alone would hardly give the differences in {names}."


def p_text(p: float) -> str:
    """A p-value with sensible digits."""
    if np.isnan(p):
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
