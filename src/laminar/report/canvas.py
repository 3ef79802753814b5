"""What all pictures share: the figure, its colours and quiet axes, and how it is written.

Matplotlib is imported inside the functions and drawn on with the Agg backend through its object
interface: no window is opened and no global setting is touched. Blue is always the data, orange
always the flow: two colours of Okabe and Ito's palette, told apart by every kind of colour vision.
"""

import io
from typing import TYPE_CHECKING, Any

from laminar._errors import MissingExtraError
from laminar._files import PathLike, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DATA = "#0072B2"
FLOW = "#D55E00"
INK = "#222222"
FAINT = "#8A8A8A"
DPI = 144


def figure_class(caller: str) -> Any:
    """The `Figure` class, which draws with Agg when no window asks otherwise."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", caller) from error
    return Figure


def dress(
    axes: "Axes",
    head: str = "",
    window: tuple[tuple[float, float], ...] | None = None,
    x: str = "",
    y: str = "",
) -> None:
    """Quiet axes: two thin spines, few ticks, small labels."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.locator_params(nbins=4)
    axes.tick_params(labelsize=7, color=FAINT, labelcolor=INK, length=2.5)
    axes.set_title(head, fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    if window is not None:
        axes.set_xlim(window[0])
        axes.set_ylim(window[1])


def finish(figure: Any, path: PathLike | None) -> Any:
    """Write the figure whole or not at all, if it is to be written."""
    if path is not None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        FigureCanvasAgg(figure)
        drawn, picture = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
        # A palette of 256 colours looks the same and takes less than half the space.
        palette = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT)
        palette.save(picture, "PNG", optimize=True)
        atomic_write(path, picture.getvalue())
    return figure
