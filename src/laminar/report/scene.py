"""Small pictures as plain marks, written as SVG into a page, or as an SVG or PNG file.

A `Panel` is a list of marks in pixels, the origin in the upper left corner. Marks have a role, not
a colour: a page gives roles the colours of its theme, a file those of `PALETTE`. Blue is always the
data, orange always the flow, as in `laminar.report.canvas`.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from laminar._errors import InputError
from laminar._files import PathLike, atomic_write
from laminar.report.canvas import DATA, DPI, FAINT, FLOW, INK, figure_class
from laminar.report.markup import Markup, join, raw_element, tag

Role = Literal["data", "flow", "ink", "faint", "band", "paper"]

PALETTE: dict[str, str] = {
    "data": DATA,
    "flow": FLOW,
    "ink": INK,
    "faint": FAINT,
    "band": "#D9D9D9",
    "paper": "#FFFFFF",
}
"""The colours of roles in files."""

GAP = 18  # pixels between the panels of a sheet
_FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"


@dataclass(frozen=True)
class Stroke:
    """A line through points, (n, 2).

    Attributes:
        points: Corners in pixels; where one is NaN the line is broken.
        role: Whose colour.
        width: In pixels.
        dashed: Whether it is.
    """

    points: np.ndarray
    role: Role
    width: float = 1.5
    dashed: bool = False


@dataclass(frozen=True)
class Fill:
    """A polygon with corners (n, 2), filled."""

    points: np.ndarray
    role: Role
    opacity: float = 1.0


@dataclass(frozen=True)
class Dots:
    """Equal discs at points (n, 2)."""

    points: np.ndarray
    role: Role
    radius: float = 1.2
    opacity: float = 0.6


@dataclass(frozen=True)
class Label:
    """A line of text; `y` is its baseline."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "middle"
    role: Role = "ink"
    size: float = 12.0
    bold: bool = False


Mark = Stroke | Fill | Dots | Label


@dataclass(frozen=True)
class Panel:
    """A picture.

    Attributes:
        title: What it shows, in a few words.
        summary: What there is to see, for those who cannot see it.
        width: In pixels.
        height: In pixels.
        marks: From back to front.
    """

    title: str
    summary: str
    width: float = 340.0
    height: float = 215.0
    marks: list[Mark] = field(default_factory=list)

    def add(self, *marks: Mark) -> None:
        """Draw on top of what is there."""
        self.marks.extend(marks)


# ------------------------------------------------------------------------------------------- SVG


def to_svg(panel: Panel) -> Markup:
    """A panel as an element of a page, in classes that its style sheet colours."""
    return tag(
        "svg",
        *(_svg_mark(mark) for mark in panel.marks),
        class_="chart",
        viewBox=f"0 0 {panel.width:g} {panel.height:g}",
        role="img",
        aria_label=f"{panel.title}. {panel.summary}",
    )


def style(palette: dict[str, str]) -> str:
    """The rules that give the classes of marks the colours of a palette."""
    rules = [
        ".k{fill:none;stroke-linejoin:round}",
        ".d{fill:none;stroke-linecap:round}",
        f"text{{font-family:{_FONT}}}",
    ]
    for role, colour in palette.items():
        rules.append(f".k.{role},.d.{role}{{stroke:{colour}}}")
        rules.append(f".f.{role},text.{role}{{fill:{colour}}}")
    return "".join(rules)


def _svg_mark(mark: Mark) -> Markup:
    if isinstance(mark, Label):
        return tag(
            "text",
            mark.text,
            class_=mark.role,
            x=_short(mark.x),
            y=_short(mark.y),
            text_anchor=mark.anchor if mark.anchor != "start" else None,
            font_size=f"{mark.size:g}",
            font_weight="600" if mark.bold else None,
        )
    if isinstance(mark, Stroke):
        return tag(
            "path",
            class_=f"k {mark.role}",
            d=_outline(mark.points),
            stroke_width=f"{mark.width:g}",
            stroke_dasharray="3 3" if mark.dashed else None,
        )
    if isinstance(mark, Fill):
        opacity = None if mark.opacity == 1 else f"{mark.opacity:g}"
        return tag("path", class_=f"f {mark.role}", d=_outline(mark.points) + "Z", opacity=opacity)
    # A line of no length with a round end is a disc, in far fewer characters than a circle.
    path = "".join(f"M{_short(x)} {_short(y)}h0" for x, y in _finite(mark.points))
    return tag(
        "path",
        class_=f"d {mark.role}",
        d=path,
        stroke_width=f"{2 * mark.radius:g}",
        opacity=f"{mark.opacity:g}",
    )


def _outline(points: np.ndarray) -> str:
    steps, pen = [], "M"
    for x, y in points:
        if np.isfinite(x) and np.isfinite(y):
            steps.append(f"{pen}{_short(x)} {_short(y)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(steps)


def _finite(points: np.ndarray) -> np.ndarray:
    return points[np.isfinite(points).all(axis=1)]


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


# ----------------------------------------------------------------------------------------- files


def write_sheet(
    panels: Sequence[Panel], path: PathLike, *, title: str = "", across: int | None = None
) -> None:
    """Write panels side by side as one picture, whole or not at all.

    Args:
        panels: At least one.
        path: A file that ends in .svg or .png.
        title: A line above them.
        across: How many stand in a row; by default about as many as there are rows.

    Raises:
        InputError: If the file ends otherwise, or cannot be written.
        MissingExtraError: If it is a PNG and matplotlib is not installed.
    """
    kind = picture_kind(path)
    across = across or min(len(panels), max(1, round((1.6 * len(panels)) ** 0.5)))
    sheet = _sheet(panels, title, across)
    atomic_write(path, _svg_file(sheet) if kind == ".svg" else _png_file(sheet))


def picture_kind(path: PathLike) -> str:
    """The suffix of a picture's file, ``".svg"`` or ``".png"``."""
    name = str(path).lower()
    for kind in (".svg", ".png"):
        if name.endswith(kind):
            return kind
    raise InputError(f"{path} is no name of a picture; let it end in .png or .svg.")


def _sheet(panels: Sequence[Panel], title: str, across: int) -> Panel:
    """All panels as one, in rows of equal heights."""
    rows = [panels[i : i + across] for i in range(0, len(panels), across)]
    top = 40.0 if title else GAP
    width = max(sum(panel.width + GAP for panel in row) for row in rows) + GAP
    height = top + sum(max(panel.height for panel in row) + GAP for row in rows)
    summary = " ".join(f"{panel.title}: {panel.summary}" for panel in panels)
    whole = Panel(title or panels[0].title, summary, width, height)
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    whole.add(Fill(corners, "paper"))
    if title:
        whole.add(Label(GAP, 26, title, "start", size=14, bold=True))
    y = top
    for row in rows:
        x = float(GAP)
        for panel in row:
            whole.add(*(_moved(mark, x, y) for mark in panel.marks))
            x += panel.width + GAP
        y += max(panel.height for panel in row) + GAP
    return whole


def _moved(mark: Mark, x: float, y: float) -> Mark:
    if isinstance(mark, Label):
        return Label(**{**vars(mark), "x": mark.x + x, "y": mark.y + y})
    return type(mark)(**{**vars(mark), "points": mark.points + np.array([x, y])})


def _svg_file(panel: Panel) -> bytes:
    size = {"width": f"{panel.width:g}", "height": f"{panel.height:g}"}
    svg = tag(
        "svg",
        tag("title", panel.title),
        tag("desc", panel.summary),
        raw_element("style", style(PALETTE)),
        join(*(_svg_mark(mark) for mark in panel.marks)),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {panel.width:g} {panel.height:g}",
        **size,
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{svg}\n'.encode()


def _png_file(panel: Panel) -> bytes:
    """The same marks drawn by matplotlib, at two pixels of the file for one of the panel."""
    made = figure_class("A PNG")
    inch = DPI / 2.0
    figure = made(figsize=(panel.width / inch, panel.height / inch), dpi=DPI)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, panel.width)
    axes.set_ylim(panel.height, 0)
    axes.set_axis_off()
    for order, mark in enumerate(panel.marks):
        _png_mark(axes, mark, order, 72.0 / inch)
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # A name may hold characters that no font here has; each is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(drawn, format="png", dpi=DPI)
    return drawn.getvalue()


def _png_mark(axes: Any, mark: Mark, order: int, point: float) -> None:
    """Draw a mark; `point` is the number of points in a pixel."""
    colour = PALETTE[mark.role]
    if isinstance(mark, Label):
        # A dollar sign would start a formula.
        axes.text(
            mark.x,
            mark.y,
            mark.text.replace("$", r"\$"),
            color=colour,
            fontsize=mark.size * point,
            fontweight="bold" if mark.bold else "normal",
            ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
            va="baseline",
            zorder=order,
        )
    elif isinstance(mark, Stroke):
        axes.plot(
            *mark.points.T,
            color=colour,
            lw=mark.width * point,
            ls=(0, (3, 3)) if mark.dashed else "-",
            zorder=order,
        )
    elif isinstance(mark, Fill):
        axes.fill(*mark.points.T, color=colour, alpha=mark.opacity, lw=0, zorder=order)
    else:
        axes.scatter(
            *_finite(mark.points).T,
            s=(2 * mark.radius * point) ** 2,
            color=colour,
            alpha=mark.opacity,
            linewidths=0,
            zorder=order,
        )
