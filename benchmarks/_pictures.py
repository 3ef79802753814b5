"""Pictures of benchmarks, in the style of laminar's own: light, few lines, readable in print."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laminar.report import canvas
from laminar.report.canvas import DATA, FAINT, FLOW, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE, BLUE, GREEN, GREY = FLOW, DATA, "#009E73", FAINT
"""Three colours of Okabe and Ito's palette, and what stands back."""


def figure(caller: str, rows: int, columns: int, width: float = 4.2, height: float = 3.2):
    """A figure and its panels, an array of (rows, columns)."""
    made = canvas.figure_class(caller)(
        figsize=(width * columns, height * rows), dpi=144, layout="constrained"
    )
    return made, made.subplots(rows, columns, squeeze=False)


def dress(axes: "Axes", head: str, x: str, y: str, *, log_y: bool = False) -> None:
    """A panel with a logarithmic x axis; called last, when its lines are drawn."""
    canvas.dress(axes, head, x=x, y=y)
    axes.set_xscale("log")
    _plain(axes.xaxis, axes.get_xlim())
    if log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 10 * low:
            # At least a decade, or noise would look like growth.
            middle = np.sqrt(low * high)
            axes.set_ylim(middle / np.sqrt(10), middle * np.sqrt(10))
        _plain(axes.yaxis, axes.get_ylim())
    axes.grid(visible=True, color=FAINT, alpha=0.25, lw=0.5)


def note(axes: "Axes", text: str, y: float) -> None:
    """A thin line across a panel, with its name at the right end."""
    axes.axhline(y, color=FAINT, lw=0.8)
    where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
    axes.annotate(text, (1, y), fontsize=8, color=INK, **where)


def legend(made, panels) -> None:
    """One legend for all panels, below them."""
    handles = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    place = {"loc": "outside lower center", "ncols": len(handles), "frameon": False}
    made.legend(handles.values(), handles.keys(), fontsize=9, **place)


def write(made, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.finish(made, path)


def _plain(axis, limits) -> None:
    """Ticks at powers of ten, and between them at 2 and 5 where there are few; plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = np.log10(limits[1] / limits[0]) if limits[0] > 0 else 9
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axis.set_major_formatter(FuncFormatter(_number))
    axis.set_minor_formatter(NullFormatter())


def _number(value: float, _=None) -> str:
    """A tick's label: plain up to 10,000, then by its power."""
    if value >= 1e5:
        digits, power = f"{value:.0e}".split("e")
        factor = "" if digits == "1" else f"{digits}·"
        return f"${factor}10^{{{int(power)}}}$"
    return f"{value:g}"
