"""Pictures of flows: the path from base to data, marginals and pairs, and training curves.

Blue is always the data, orange always the flow (see `laminar.report.canvas`). Where points are
followed, their colours run from dark blue to light orange, ordered in grey too.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.random as jr
import numpy as np

from laminar._errors import InputError, ShapeError
from laminar._files import PathLike
from laminar._typing import ArrayLike, PRNGKeyArray
from laminar.report.canvas import DATA, DPI, FLOW, INK, dress, figure_class, finish
from laminar.report.motion import followed as part_followed
from laminar.report.views import limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from laminar.density import AbstractDistribution
    from laminar.tables.flow import TableFlow
    from laminar.tables.table import Table

SHADE = "Greys"
HUES = "plasma"


def plot_path(
    model: "AbstractDistribution | TableFlow",
    data: "ArrayLike | Table",
    path: PathLike | None = None,
    *,
    key: PRNGKeyArray,
    columns: tuple[int | str, int | str] | None = None,
    names: Sequence[str] | None = None,
    condition: Any = None,
    frames: int = 5,
    count: int = 2000,
    title: str | None = None,
) -> "Figure":
    """Draw data, samples, and the way that samples take from the base to the data.

    The upper row shows rows of the data and as many samples in one window, in the data's units. The
    lower row shows draws from the base at `frames` of the steps z_0, …, z_K, evenly spaced, in the
    units of the flow; a point keeps its colour, which is its position along the horizontal axis in
    the base. With two dimensions the density q_k is shaded behind the points.

    Where the model is a mixture, as `fit_density` gives, the lower row follows the heaviest of the
    parts that have more than one step, and says which share of the mixture it has.

    Args:
        model: A flow of vectors, or a `TableFlow`.
        data: ``(rows, D)``; a `Table` for a `TableFlow`.
        path: Where to write the picture as PNG; None only returns the figure.
        key: Draws the rows and the samples.
        columns: Which two columns to show, by position or name; by default the most strongly
            correlated pair.
        names: Names of all D columns.
        condition: One condition, shared by all samples; for a `TableFlow` name → value.
        frames: How many steps of the path to show.
        count: Up to how many points to draw in a panel.
        title: A line above the picture.

    Returns:
        The figure.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        InputError: If the data have fewer than two columns or rows, or the columns do not exist.
        ShapeError: If data and flow do not fit, or steps of the flow are not vectors of D entries.
    """
    made = figure_class("plot_path")
    row_key, sample_key, path_key = jr.split(key, 3)
    subject = _subject(model, data, names, condition)
    flow, rows, labels = subject.flow, subject.rows, subject.names
    i, j = _choose_pair(rows, labels, columns)
    shown = rows[np.asarray(jr.permutation(row_key, len(rows)))[:count]]
    samples = np.asarray(flow.sample(sample_key, (len(shown),), subject.condition), np.float64)
    followed, share = part_followed(flow)
    points = _path(followed, path_key, len(shown), subject.condition)
    picked = _spread(len(points), frames)

    figure = made(figsize=(2.3 * max(len(picked), 4), 6.6), dpi=DPI, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.32, 1))
    left, right = upper.subplots(1, 2, sharex=True, sharey=True)
    own, drawn = (subject.restore(values, (i, j)) for values in (shown, samples))
    window = _window(np.concatenate([own, drawn]), own)
    for axes, values, colour, head in (
        (left, own, DATA, f"data ({len(own):,} rows)"),
        (right, drawn, FLOW, f"samples ({len(drawn):,})"),
    ):
        axes.scatter(*values.T, color=colour, **_dots(len(values)))
        dress(axes, head, window, labels[i], labels[j])
    right.set_ylabel("")
    hue = _ranks(points[0][:, i])
    panels = np.atleast_1d(lower.subplots(1, len(picked)))
    for axes, k in zip(panels, picked, strict=True):
        at = points[k][:, [i, j]]
        window = _window(at, at)
        if rows.shape[1] == 2:
            _shade(axes, followed.upto(k), window, subject.condition, flip=(i, j) == (1, 0))
        axes.scatter(*at.T, c=hue, cmap=HUES, vmin=0, vmax=1.2, **_dots(len(at), small=True))
        dress(axes, _frame_title(k, len(points) - 1), window)
    part = "" if share is None else f" (a part of weight {share:.2f} in the mixture)"
    head = f"the path from base to data{part}; a point keeps its colour"
    lower.suptitle(head, fontsize=10, color=INK)
    if title:
        figure.suptitle(title, fontsize=12, color=INK)
    return finish(figure, path)


def plot_pairs(
    data: ArrayLike,
    samples: ArrayLike,
    path: PathLike | None = None,
    *,
    names: Sequence[str] | None = None,
    columns: Sequence[int] | None = None,
    bins: int = 40,
    count: int = 1500,
) -> "Figure":
    """Draw the marginals and the pairs of columns, data against samples.

    Args:
        data: ``(rows, D)``.
        samples: ``(rows', D)``.
        path: Where to write the picture as PNG; None only returns the figure.
        names: Names of all D columns.
        columns: Which columns to show, up to eight; by default the first six.
        bins: Bins of the histograms on the diagonal.
        count: Up to how many points of each kind to draw in a panel.

    Returns:
        The figure: histograms on the diagonal, the data below it, the samples above it. A panel and
        its mirror image show the same two columns on axes changed over.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        ShapeError: If data and samples differ in their columns.
        InputError: If the columns asked for do not exist or are more than eight.
    """
    made = figure_class("plot_pairs")
    a, b = _table(data), _table(samples)
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"plot_pairs: data of shape {a.shape} against samples of {b.shape}.")
    picked = tuple(range(min(a.shape[1], 6))) if columns is None else tuple(columns)
    if not 1 <= len(picked) <= 8 or not all(0 <= c < a.shape[1] for c in picked):
        raise InputError(
            f"plot_pairs shows one to eight of the {a.shape[1]} columns, numbered from 0, "
            f"not {list(picked)}."
        )
    labels = _names(names, a.shape[1])
    size = len(picked)
    figure = made(figsize=(1.2 + 1.75 * size,) * 2, dpi=DPI, layout="constrained")
    grid = figure.subplots(size, size, squeeze=False)
    count = min(count, len(a), len(b))
    a_shown, b_shown = a[:: max(1, len(a) // count)][:count], b[:: max(1, len(b) // count)][:count]
    ranges = {c: limits(np.concatenate([a[:, c], b[:, c]]), a[:, c]) for c in picked}
    for r, row in enumerate(picked):
        for c, column in enumerate(picked):
            axes = grid[r, c]
            dress(axes)
            axes.set_xlim(ranges[column])
            if c == r:
                _histograms(axes, a[:, column], b[:, column], ranges[column], bins)
            else:
                shown, colour = (a_shown, DATA) if c < r else (b_shown, FLOW)
                axes.scatter(shown[:, column], shown[:, row], color=colour, **_dots(count))
                axes.set_ylim(ranges[row])
            if c == 0:
                axes.set_ylabel(labels[row], fontsize=8, color=INK)
            axes.set_xlabel(labels[column] if r == size - 1 else "", fontsize=8, color=INK)
            axes.tick_params(labelbottom=r == size - 1, labelleft=c == 0)
    _legend(figure, grid[0, 0], size)
    return finish(figure, path)


def plot_history(
    history: Any, path: PathLike | None = None, *, title: str | None = None
) -> "Figure":
    """Draw the training curves: loss on the training batches and on the held-out rows.

    Args:
        history: What `fit` returns.
        path: Where to write the picture as PNG; None only returns the figure.
        title: A line above the picture.

    Returns:
        The figure.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    made = figure_class("plot_history")
    loss = np.asarray(history.loss, np.float64)
    if not len(loss):
        raise InputError("plot_history: no step was taken, so there is nothing to draw.")
    figure = made(figsize=(7.2, 4.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    dress(axes, title or "", x="step", y="loss (nats per row)")
    steps = np.arange(1, len(loss) + 1)
    width = max(1, len(loss) // 100)
    centres, means = _running_mean(steps, loss, width)
    axes.plot(steps, loss, color=DATA, alpha=0.2, lw=0.6, rasterized=True)
    label = "training" if width == 1 else f"training (means of {width})"
    axes.plot(centres, means, color=DATA, lw=1.4, label=label)
    finite = loss[np.isfinite(loss)]
    low = np.quantile(finite, [0.01]) if len(finite) else finite
    seen = [means, low]
    for values, style, label in (
        (history.validation, "-", "held out"),
        (history.validation_ema, ":", "held out, averaged parameters"),
    ):
        values = np.asarray(values, np.float64)
        if np.isfinite(values).any():
            axes.plot(history.validation_steps, values, style, color=FLOW, lw=1.6, label=label)
            seen.append(values)
    if np.isfinite(history.best_loss):
        label = f"returned: {history.best_loss:.3f}"
        axes.plot(history.best_step, history.best_loss, "o", color=INK, ms=5, label=label)
        seen.append(np.array([history.best_loss]))
    axes.set_xlim(0, len(loss))
    axes.set_ylim(_curve_limits(np.concatenate(seen)))
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    return finish(figure, path)


def _running_mean(steps: np.ndarray, loss: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over whole windows of `width` steps, what is not finite left out, and their centres."""
    whole = len(loss) // width * width
    windows = loss[:whole].reshape(-1, width)
    good = np.isfinite(windows)
    total = np.where(good, windows, 0.0).sum(1)
    means = np.where(good.any(1), total / np.maximum(good.sum(1), 1), np.nan)
    return steps[:whole].reshape(-1, width).mean(1), means


def _curve_limits(values: np.ndarray) -> tuple[float, float]:
    """Limits that show all of the low side and leave out the steep start."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    margin = 0.12 * (high - low) or 0.5
    return low - margin, high + margin


class _Subject(NamedTuple):
    """What `plot_path` draws.

    Attributes:
        flow: The flow, in its own units.
        rows: The data in the flow's units, (rows, D).
        names: Of the D columns.
        condition: As the flow takes it.
        restore: ``(rows in the flow's units, columns) -> those columns in the data's units``.
    """

    flow: Any
    rows: np.ndarray
    names: list[str]
    condition: Any
    restore: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _subject(model: Any, data: Any, names: Sequence[str] | None, condition: Any) -> _Subject:
    from laminar.tables.flow import TableFlow

    if not isinstance(model, TableFlow):
        rows = _table(data)
        if model.shape != rows.shape[1:]:
            raise ShapeError(
                f"plot_path: the rows have shape {rows.shape[1:]} and the flow has events of shape "
                f"{model.shape}."
            )
        labels = _names(names, rows.shape[1])
        return _Subject(model, rows, labels, condition, lambda x, columns: x[:, list(columns)])
    schema = model.schema
    if schema.mixed:
        raise InputError(
            "plot_path follows flows of real columns, and this table has others; "
            "laminar.report.pictures.write_pictures draws it."
        )
    given = None
    if condition is not None:
        values = np.array([[float(condition[name]) for name in schema.given_names]])
        given = schema.condition(values)
        given = None if given is None else given[0].astype(model.flow.dtype)
    table = data.select(schema.names).align({name: schema.cells[name] for name in schema.names})
    rows = _table(schema.encode(table.values)[0])

    def restore(z: np.ndarray, columns: tuple[int, ...]) -> np.ndarray:
        return np.stack([schema.modelled[c].restore(z[:, c]) for c in columns], axis=1)

    labels = _names(names or [column.name for column in schema.modelled], rows.shape[1])
    return _Subject(model.flow, rows, labels, given, restore)


def _path(flow: Any, key: PRNGKeyArray, count: int, condition: Any) -> list[np.ndarray]:
    """Draws from the base at every step, each (count, D)."""
    z = flow.upto(0).sample(key, (count,), condition)
    points = [np.asarray(z, np.float64) for z in flow.path(z, condition).points]
    if any(p.ndim != 2 or p.shape != points[-1].shape for p in points):
        raise ShapeError(
            f"plot_path draws flows whose every step is a vector of {points[-1].shape[-1]} "
            f"entries; the steps of this one are {[p.shape[1:] for p in points]}."
        )
    return points


def _table(data: ArrayLike) -> np.ndarray:
    rows = np.asarray(data, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise InputError(f"A picture needs a table of two rows or more, not shape {rows.shape}.")
    return rows


def _choose_pair(
    rows: np.ndarray, names: Sequence[str], columns: tuple[int | str, int | str] | None
) -> tuple[int, int]:
    """The two columns to draw: those given, or the most strongly correlated two (by rank)."""
    dim = rows.shape[1]
    if dim < 2:
        raise InputError("plot_path needs two columns or more; use plot_pairs for a single one.")
    if columns is not None:
        i, j = (names.index(c) if isinstance(c, str) and c in names else c for c in columns)
        if not (i in range(dim) and j in range(dim) and i != j):
            raise InputError(f"plot_path: {columns} are not two different columns of {dim}.")
        return int(i), int(j)
    ranks = np.stack([_ranks(column) for column in rows.T])
    # A constant column has no rank; the small number keeps it at correlation zero.
    ranks = (ranks - ranks.mean(1, keepdims=True)) / (ranks.std(1, keepdims=True) + 1e-12)
    strength = np.triu(np.abs(ranks @ ranks.T), 1)
    i, j = np.unravel_index(int(np.argmax(strength)), strength.shape)
    return (int(i), int(j)) if i != j else (0, 1)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks scaled to [0, 1], ties sharing the lowest."""
    return np.searchsorted(np.sort(values), values) / max(len(values) - 1, 1)


def _spread(length: int, frames: int) -> list[int]:
    """Up to `frames` of the positions 0…length − 1, evenly spaced, both ends among them."""
    return sorted({round(k) for k in np.linspace(0, length - 1, max(frames, 2))})


def _window(points: np.ndarray, reference: np.ndarray) -> tuple[tuple[float, float], ...]:
    return tuple(limits(points[:, d], reference[:, d]) for d in range(2))


def _names(names: Sequence[str] | None, dim: int) -> list[str]:
    if names is None:
        return [f"column {d}" for d in range(dim)]
    if len(names) != dim:
        raise InputError(f"{len(names)} names were given for {dim} columns.")
    return [name if len(name) <= 28 else name[:27] + "…" for name in map(str, names)]


def _dots(count: int, small: bool = False) -> dict[str, Any]:
    """Size and opacity that keep a cloud of `count` points readable."""
    size = float(np.clip((3000 if small else 9000) / max(count, 1), 2.0, 8.0 if small else 10.0))
    opacity = float(np.clip(500 / max(count, 1), 0.35, 0.8))
    return {"s": size, "alpha": opacity, "linewidths": 0, "rasterized": True}


def _frame_title(k: int, last: int) -> str:
    if k == 0:
        return "$z_0$: base"
    return f"$z_{{{k}}}$: data" if k == last else f"$z_{{{k}}}$"


def _shade(axes, density_of, window, condition, flip, size: int = 90) -> None:
    """Shade a density of the plane."""
    xs, ys = (np.linspace(limits[0], limits[1], size) for limits in window)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    points = grid[:, ::-1] if flip else grid
    density = np.exp(np.asarray(density_of.log_prob(points, condition), np.float64))
    density = np.nan_to_num(density, nan=0.0, posinf=0.0).reshape(size, size)
    # The quantile keeps a peak of few pixels from hiding everything else.
    top = float(np.quantile(density, 0.995)) or 1.0
    axes.imshow(
        np.sqrt(density / top),
        extent=(*window[0], *window[1]),
        origin="lower",
        aspect="auto",
        cmap=SHADE,
        vmin=0,
        vmax=3,
        interpolation="bilinear",
    )


def _histograms(axes, a, b, limits, bins) -> None:
    edges = np.linspace(limits[0], limits[1], bins + 1)
    for values, label, style in (
        (a, "data", {"color": DATA, "alpha": 0.35}),
        (b, "samples", {"color": FLOW, "histtype": "step", "lw": 1.4}),
    ):
        inside = values[(values >= edges[0]) & (values <= edges[-1])]
        # Without a value there is no density, but there is still a line in the legend.
        axes.hist(inside, edges, density=len(inside) > 0, label=label, **style)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _legend(figure, axes, size) -> None:
    handles, (data, samples) = axes.get_legend_handles_labels()
    if size > 1:
        data, samples = f"{data} (below the diagonal)", f"{samples} (above)"
    figure.legend(
        handles, [data, samples], frameon=False, fontsize=10, loc="outside upper center", ncols=2
    )
