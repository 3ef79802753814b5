"""The picture of a posterior: its marginals, raw and weighted, and the tail of the weights."""

import math
from typing import TYPE_CHECKING

import numpy as np

from laminar._files import PathLike
from laminar.inference.posterior import Posterior
from laminar.report.canvas import DATA, DPI, FAINT, FLOW, INK, dress, figure_class, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PANELS = 11
_BINS = 40


def plot_posterior(posterior: Posterior, path: PathLike | None = None) -> "Figure":
    """Draw the marginals of the draws as they are and with their weights, and the weights.

    Orange is the flow, blue the draws weighted by p̃ / q: where the two differ, the weights correct
    the flow. The last panel shows the ordered weights times their number, 1 for a perfect
    flow. At most 11 scalars are shown, the first ones.

    Args:
        posterior: What `fit_posterior` gave.
        path: Where to write the picture as PNG; None only returns the figure.

    Returns:
        The figure.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    made = figure_class("plot_posterior")
    columns = posterior.columns()[:, :_MOST_PANELS]
    own = posterior.columns(weighted=False)
    across = min(4, columns.shape[1] + 1)
    down = math.ceil((columns.shape[1] + 1) / across)
    figure = made(figsize=(2.5 * across, 2.1 * down + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).reshape(-1)
    weights = posterior.weights
    for i, name in enumerate(posterior.target.names[: columns.shape[1]]):
        _marginal(panels[i], name, own[:, i], columns[:, i], weights)
    _weights(panels[columns.shape[1]], posterior)
    for axes in panels[columns.shape[1] + 1 :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside upper right", ncols=2)
    head = f"{posterior.verdict.grade}   k̂ {posterior.k_hat:.2f}"
    figure.suptitle(head, fontsize=10, color=INK, x=0.01, ha="left")
    return finish(figure, path)


def _marginal(axes, name: str, own: np.ndarray, column: np.ndarray, weights: np.ndarray) -> None:
    kept = np.isfinite(column)
    own, column, weights = own[np.isfinite(own)], column[kept], weights[kept]
    if not len(own):
        dress(axes, f"{name}: nothing finite")
        return
    low, high = np.quantile(own, [0.001, 0.999])
    edges = np.linspace(low, high, _BINS + 1) if high > low else _BINS
    axes.hist(own, edges, density=True, color=FLOW, alpha=0.35, label="the flow's draws")
    if weights.sum() > 0:
        style = {"color": DATA, "histtype": "step", "lw": 1.3}
        axes.hist(column, edges, density=True, weights=weights, label="weighted", **style)
    dress(axes, name)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _weights(axes, posterior: Posterior) -> None:
    scaled = np.sort(posterior.weights)[::-1] * len(posterior.weights)
    rank = np.arange(1, len(scaled) + 1)
    alive = scaled > 0
    axes.plot(rank[alive], scaled[alive], color=DATA, lw=1.4)
    axes.axhline(1.0, color=FAINT, lw=0.8, ls=":")
    dress(axes, "weights", x="draw, heaviest first", y="weight × draws")
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Draws of next to no weight say nothing, and equal ones need some room about them.
    largest = max(float(scaled.max(initial=1.0)), 1.0)
    axes.set_ylim(min(max(float(scaled[alive].min(initial=1.0)), 1e-4), 0.5) / 1.5, 2 * largest)
    axes.minorticks_off()
