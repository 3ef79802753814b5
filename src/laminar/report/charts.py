"""The charts of the report: each takes numbers and gives a `Panel`.

Blue, filled, is the data; orange, a line, is what the model says; grey is what chance would give.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from laminar.report.axes import Axis, cut, number_axis, text_width
from laminar.report.scene import Dots, Fill, Label, Panel, Role, Stroke

_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 28.0, 40.0
_MOST_BARS = 10
_MOST_PARTS = 6


class Interval(NamedTuple):
    """A value with its standard error, to be compared with others."""

    name: str
    value: float
    error: float
    role: Role


class Frame:
    """The rectangle of a panel in which values are drawn.

    Args:
        panel: Where it is drawn; the axes are drawn at once.
        x: The horizontal axis.
        y: The vertical axis; without ticks it is not drawn.
        left: Pixels to its left.
        top: Pixels above it.
    """

    def __init__(self, panel: Panel, x: Axis, y: Axis, left: float = _LEFT, top: float = _TOP):
        self.panel, self.x, self.y = panel, x, y
        self.left, self.right = left, panel.width - _RIGHT
        self.top, self.bottom = top, panel.height - (_BOTTOM if x.label else 22.0)
        panel.add(Label(0, 14, cut(panel.title, 42), "start", size=13.5, bold=True))
        self._ground()
        if y.ticks:
            self._side()

    def place(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Values as points in pixels, (n, 2)."""
        return self.inside(np.stack(np.broadcast_arrays(self.x.share(x), self.y.share(y)), axis=-1))

    def inside(self, shares: np.ndarray) -> np.ndarray:
        """Shares of the lengths of both axes, (n, 2), as points in pixels."""
        across = self.left + shares[:, 0] * (self.right - self.left)
        up = self.bottom - shares[:, 1] * (self.bottom - self.top)
        return np.stack([across, up], axis=1)

    def box(self, x0: Any, x1: Any, y0: Any, y1: Any) -> np.ndarray:
        """The corners of a rectangle of values, in pixels."""
        return self.place(np.array([x0, x1, x1, x0]), np.array([y0, y0, y1, y1]))

    def _ground(self) -> None:
        panel = self.panel
        ends = np.array([[self.left, self.bottom], [self.right, self.bottom]])
        panel.add(Stroke(ends, "faint", 1.0))
        free = -np.inf
        for value, text in self.x.ticks:
            at = self.left + float(self.x.share(value)) * (self.right - self.left)
            half = text_width(text, 12) / 2
            if at - half < free:
                continue
            free = at + half + 4
            panel.add(Stroke(np.array([[at, self.bottom], [at, self.bottom + 3]]), "faint", 1.0))
            # The last one may stand at the edge, and must not be cut off there.
            panel.add(Label(min(at, panel.width - half - 1), self.bottom + 17, text))
        if self.x.label:
            label = cut(self.x.label, 44)
            panel.add(Label((self.left + self.right) / 2, panel.height - 4, label, role="faint"))

    def _side(self) -> None:
        panel = self.panel
        for value, text in self.y.ticks:
            at = self.bottom - float(self.y.share(value)) * (self.bottom - self.top)
            panel.add(Stroke(np.array([[self.left - 3, at], [self.left, at]]), "faint", 1.0))
            panel.add(Label(self.left - 6, at + 4, text, "end"))
        ends = np.array([[self.left, self.top], [self.left, self.bottom]])
        panel.add(Stroke(ends, "faint", 1.0))


def _plain(high: float, low: float = 0.0) -> Axis:
    """A vertical axis without ticks, for densities."""
    return Axis(low, high if high > low else low + 1.0, ())


# ------------------------------------------------------------------------------------- marginals


def histogram(
    title: str, summary: str, axis: Axis, data: np.ndarray, drawn: np.ndarray, step: float = 0.0
) -> Panel:
    """Densities of one column on an axis: the data's filled, the samples' a line.

    Where values lie on a grid of some step, every interval holds as many of its points.
    """
    panel = Panel(title, summary)
    edges = axis.edges(_bins(axis, data))
    if step > 0 and not axis.log and len(data):
        width = step * max(1.0, np.ceil((edges[1] - edges[0]) / step))
        first = float(data[0]) - step / 2
        low, high = (np.floor((end - first) / width) for end in (axis.low, axis.high))
        edges = first + width * np.arange(low, high + 2)
        axis = dataclasses.replace(axis, low=float(edges[0]), high=float(edges[-1]))
    heights = [_density(axis, values, edges) for values in (data, drawn)]
    frame = Frame(panel, axis, _plain(1.08 * max(h.max() for h in heights)), left=8.0)
    (blue, orange), corners = heights, np.repeat(edges, 2)
    outline = np.concatenate([[0.0], np.repeat(blue, 2), [0.0]])
    panel.add(Fill(frame.place(corners, outline), "data", 0.45))
    outline = np.concatenate([[0.0], np.repeat(orange, 2), [0.0]])
    panel.add(Stroke(frame.place(corners, outline), "flow", 1.6))
    return panel


def _bins(axis: Axis, values: np.ndarray) -> int:
    """The rule of Freedman and Diaconis on the axis, within reason."""
    share = axis.share(values)
    share = share[(share >= 0) & (share <= 1)]
    if len(share) < 2:
        return 10
    q25, q75 = np.quantile(share, [0.25, 0.75])
    width = 2 * (q75 - q25) / len(share) ** (1 / 3)
    return int(np.clip(1 / width if width > 0 else 60, 12, 48))


def _density(axis: Axis, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of all values in each bin; those outside the axis count in the whole."""
    counts, _ = np.histogram(values, edges)
    return counts / max(len(values), 1)


def columns_of_counts(
    title: str, summary: str, axis: Axis, levels: np.ndarray, data: np.ndarray, drawn: np.ndarray
) -> Panel:
    """Shares of a number's few values, (L,) each: bars of the data, ticks of the samples."""
    panel = Panel(title, summary)
    frame = Frame(panel, axis, _plain(1.08 * max(data.max(), drawn.max())), left=8.0)
    half = 0.36 * (np.diff(levels).min() if len(levels) > 1 else 1.0)
    for level, blue, orange in zip(levels, data, drawn, strict=True):
        panel.add(Fill(frame.box(level - half, level + half, 0, blue), "data", 0.45))
        ends = np.array([level - 1.2 * half, level + 1.2 * half])
        panel.add(Stroke(frame.place(ends, np.full(2, orange)), "flow", 2.2))
    return panel


def category_bars(
    title: str, summary: str, names: Sequence[str], data: np.ndarray, drawn: np.ndarray
) -> Panel:
    """Shares of categories, lying bars: the data's filled, the samples' below in orange."""
    order = [int(k) for k in np.argsort(-data, kind="stable")]
    rest = order[_MOST_BARS - 1 :] if len(names) > _MOST_BARS else []
    shown = [(names[k], float(data[k]), float(drawn[k])) for k in order if k not in rest]
    if rest:
        others = f"{len(rest)} others"
        shown.append((others, float(data[rest].sum()), float(drawn[rest].sum())))
    top = 1.05 * max(max(a, b) for _, a, b in shown)
    panel = Panel(title, summary, height=max(130.0, _TOP + _BOTTOM + 24.0 * len(shown)))
    left = 8 + min(118.0, max(text_width(cut(name, 17), 12) for name, _, _ in shown))
    percent = number_axis(0.0, 100 * top, "per cent of rows", 4)
    frame = Frame(panel, percent, _plain(float(len(shown))), left=left)
    for k, (name, blue, orange) in enumerate(shown):
        y = len(shown) - k - 0.5
        at = frame.place(np.zeros(1), np.array([y]))[0]
        panel.add(Label(left - 6, at[1] + 4, cut(name, 17), "end"))
        panel.add(Fill(frame.box(0, 100 * blue, y + 0.02, y + 0.34), "data", 0.7))
        panel.add(Fill(frame.box(0, 100 * orange, y - 0.34, y - 0.02), "flow", 0.85))
    return panel


# ----------------------------------------------------------------------------------------- pairs


def cloud(
    title: str, summary: str, axes: tuple[Axis, Axis], shares: np.ndarray, role: Role
) -> Panel:
    """Points of two columns, (n, 2), as shares of the lengths of their axes."""
    panel = Panel(title, summary, height=280.0)
    x, y = axes
    widest = max((text_width(text, 12) for _, text in y.ticks), default=0.0)
    frame = Frame(panel, x, y, left=min(max(34.0, widest + 12), 96.0), top=46.0)
    panel.add(Label(0, 34, cut(f"↑ {y.label}", 46), "start", "faint"))
    inside = ((shares >= 0) & (shares <= 1)).all(axis=1)
    kept = shares[inside]
    radius = float(np.clip(45.0 / np.sqrt(max(len(kept), 1)), 1.1, 2.4))
    opacity = float(np.clip(600.0 / max(len(kept), 1), 0.5, 0.85))
    panel.add(Dots(frame.inside(kept), role, radius, opacity))
    return panel


# ----------------------------------------------------------------------------------- calibration


def uniform_histogram(
    title: str, summary: str, u: np.ndarray, bins: int, band: tuple[float, float]
) -> Panel:
    """Counts of probability integral transforms, over what a right model would give.

    Args:
        title: Which they are.
        summary: What there is to see.
        u: Transforms (n,) in [0, 1].
        bins: Number of bins.
        band: Least and most count in a bin by chance.
    """
    counts, edges = np.histogram(u, bins, (0.0, 1.0))
    expected = len(u) / bins
    top = 1.1 * max(float(counts.max()), band[1], 1.6 * expected) / expected
    panel = Panel(title, summary, height=170.0)
    axis = Axis(0.0, 1.0, ((0.0, "0"), (0.5, "0.5"), (1.0, "1")))
    frame = Frame(panel, axis, number_axis(0.0, top, count=3), left=32.0)
    panel.add(Fill(frame.box(0, 1, band[0] / expected, band[1] / expected), "band", 0.8))
    panel.add(Stroke(frame.place(np.array([0.0, 1.0]), np.ones(2)), "faint", 1.0, True))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        gap = 0.06 * (high - low)
        corners = frame.box(low + gap, high - gap, 0, count / expected)
        panel.add(Fill(corners, "data", 0.55))
    return panel


def coverage(title: str, summary: str, nominal: np.ndarray, share: np.ndarray, band: float):
    """The share of rows within regions that should hold a nominal share, against the diagonal."""
    panel = Panel(title, summary, height=290.0)
    ticks = tuple((v / 100, str(v)) for v in (0, 25, 50, 75, 100))
    frame = Frame(
        panel,
        Axis(0.0, 1.0, ticks, "per cent the model says lie inside"),
        Axis(0.0, 1.0, ticks),
        left=36.0,
        top=46.0,
    )
    ends = np.array([0.0, 1.0])
    upper, lower = np.clip(ends + band, 0, 1), np.clip(ends - band, 0, 1)
    edge = np.array([0.0, 1.0 - band, 1.0, 1.0, band, 0.0])
    height = np.array([upper[0], 1.0, 1.0, lower[1], 0.0, 0.0])
    panel.add(Fill(frame.place(edge, height), "band", 0.8))
    panel.add(Stroke(frame.place(ends, ends), "faint", 1.0, True))
    panel.add(Stroke(frame.place(nominal, share), "data", 2.0))
    panel.add(Label(0, 34, "↑ per cent of the rows that do", "start", "faint"))
    return panel


# --------------------------------------------------------------------------------------- fitting


def intervals(title: str, summary: str, values: Sequence[Interval], label: str) -> Panel:
    """Values with bars of two standard errors, each below its name."""
    low = min(v.value - 2.2 * v.error for v in values)
    high = max(v.value + 2.2 * v.error for v in values)
    margin = 0.06 * (high - low) or 0.5
    panel = Panel(title, summary, height=_TOP + _BOTTOM + 44.0 * len(values))
    axis = number_axis(low - margin, high + margin, label, 4)
    frame = Frame(panel, axis, _plain(float(len(values))), left=8.0)
    for k, entry in enumerate(values):
        y = len(values) - k - 0.7
        reach = np.array([-2.0, 2.0]) * entry.error + entry.value
        panel.add(Stroke(frame.place(reach, np.full(2, y)), entry.role, 2.5))
        at = frame.place(np.array([entry.value]), np.array([y]))
        panel.add(Dots(at, entry.role, 4.5, 1.0))
        panel.add(Label(8, at[0, 1] - 13, cut(entry.name, 46), "start"))
    return panel


class Curve(NamedTuple):
    """A course of training.

    Attributes:
        name: Which.
        steps: After how many steps, (k,).
        values: Held-out losses, (k,).
        dashed: Whether the line is.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    dashed: bool = False


def curves(title: str, summary: str, lines: Sequence[Curve], best: tuple[int, float]) -> Panel:
    """Held-out losses over the steps of training, and where the returned parameters were reached.

    The axis shows all of the low side and leaves out the steep start.
    """
    seen = np.concatenate([line.values for line in lines])
    seen = np.append(seen[np.isfinite(seen)], best[1] if np.isfinite(best[1]) else [])
    low, high = (float(seen.min()), float(np.quantile(seen, 0.95))) if len(seen) else (0.0, 1.0)
    margin = 0.1 * (high - low) or 0.5
    last = max(float(line.steps.max()) for line in lines)
    panel = Panel(title, summary, height=240.0)
    y = number_axis(low - margin, high + margin)
    widest = max((text_width(text, 12) for _, text in y.ticks), default=0.0)
    steps = number_axis(0.0, last, "steps of training", 4)
    frame = Frame(panel, steps, y, left=widest + 12, top=46.0)
    panel.add(Label(0, 34, "↑ minus the mean log density of rows set aside", "start", "faint"))
    for line in lines:
        values = np.where(line.values <= y.high, line.values, np.nan)
        panel.add(Stroke(frame.place(line.steps, values), "flow", 1.8, line.dashed))
    if np.isfinite(best[1]):
        at = frame.place(np.array([best[0]]), np.array([best[1]]))
        panel.add(Dots(at, "ink", 4.0, 1.0))
    return panel


def shares(title: str, summary: str, names: Sequence[str], weights: np.ndarray) -> Panel:
    """What a mixture consists of, heaviest first: lying bars, each below its name."""
    order = [int(k) for k in np.argsort(-weights, kind="stable")[:_MOST_PARTS]]
    panel = Panel(title, summary, height=_TOP + _BOTTOM + 36.0 * len(order))
    axis = number_axis(0.0, 105 * float(weights.max()), "per cent of the weight", 4)
    frame = Frame(panel, axis, _plain(float(len(order))), left=8.0)
    for place, k in enumerate(order):
        y = len(order) - place - 0.75
        corners = frame.box(0, 100 * weights[k], y - 0.14, y + 0.14)
        panel.add(Fill(corners, "flow", 0.85))
        panel.add(Label(8, corners[:, 1].min() - 5, cut(names[k], 46), "start"))
    return panel
