"""The way of samples through a flow, from the base to the table, packed for a page.

A plain table has a flow of layers: its samples are followed through z_0, …, z_K, and then into the
table's units. Of a mixture the heaviest part with more than one step is followed. In a mixed table
each column is a map of one logistic variable given the columns before it (see `laminar.mixed`): its
samples are followed from these variables to the rows.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.random as jr
import numpy as np

from laminar._params import Frozen
from laminar._typing import PRNGKeyArray
from laminar.bijections.base import Identity
from laminar.bijections.compose import Chain
from laminar.bijections.path import step_names
from laminar.flow import Flow
from laminar.mixed import AutoregressiveDistribution
from laminar.mixtures import Mixture
from laminar.report.axes import Axis, lowered, number_axis, short_number
from laminar.report.calibration import latent_uniforms
from laminar.report.charts import cloud
from laminar.report.markup import packed
from laminar.report.scene import Panel
from laminar.report.views import View, limits
from laminar.tables.model import TableFlow

SCALE = 10_000
"""One length of an axis in the whole numbers that a page holds."""

_MOST_STEPS = 16
_BUDGET = 600_000  # numbers in a page
_COUNTS = (1500, 1000, 600)
_MOST_ROWS = 600
_BOUNDS = (-1.0, 2.0)  # what is farther out lies there


@dataclass(frozen=True)
class Motion:
    """Samples at every step.

    Attributes:
        views: The columns that are shown, at least two.
        names: Of the K + 1 steps: the base, and what leads to each of the others.
        axes: For each step those of the columns.
        points: Positions on these axes as shares of their length, (K + 1, C, n).
        log_q: ln q_k at each point, (K + 1, n), in nats.
        share: The weight of the part that is followed in a mixture, or None.
        left_out: How many columns of the table are not shown.
    """

    views: list[View]
    names: list[str]
    axes: list[list[Axis]]
    points: np.ndarray
    log_q: np.ndarray
    share: float | None
    left_out: int

    def foremost(self, pairs: Sequence[tuple[str, str]]) -> tuple[int, int]:
        """The two columns to begin with: the first of the pairs that is shown."""
        names = [view.name for view in self.views]
        for a, b in pairs:
            if a in names and b in names:
                return names.index(a), names.index(b)
        return 0, 1

    def spread(self, frames: int) -> list[int]:
        """Up to `frames` of the steps, evenly spaced, both ends among them."""
        return sorted({round(k) for k in np.linspace(0, len(self.names) - 1, max(frames, 2))})

    def frame(self, step: int, i: int, j: int) -> Panel:
        """The points of two columns at a step."""
        x, y = (dataclasses.replace(self.axes[step][d], label=self.views[d].name) for d in (i, j))
        shares = np.stack([self.points[step, i], self.points[step, j]], axis=1)
        return cloud(self.head(step), self.about(step), (x, y), shares, "flow")

    def to_page(self) -> dict[str, Any]:
        """What the script of the page reads."""
        rng = np.random.default_rng(0)
        last = len(self.names) - 1
        colours = [_colours(values) for values in self.log_q]
        heights = [
            (values - a) / (b - a) for values, (a, b) in zip(self.log_q, colours, strict=True)
        ]
        rows = [view.spread(view.data[:_MOST_ROWS], rng) for view in self.views]
        shares = [axis.share(x) for axis, x in zip(self.axes[last], rows, strict=True)]
        return {
            "scale": SCALE,
            "count": self.points.shape[2],
            "columns": [view.name for view in self.views],
            "names": self.names,
            "points": packed(_whole(self.points)),
            "heights": packed(_whole(np.stack(heights))),
            "data": packed(_whole(np.stack(shares))),
            "ticks": [
                [
                    [[round(float(axis.share(v)), 4), text] for v, text in axis.ticks]
                    for axis in step
                ]
                for step in self.axes
            ],
            "ramp": [[short_number(v, 3) for v in ends] for ends in colours],
            "texts": [[self.head(k), self.about(k)] for k in range(last + 1)],
        }

    def head(self, step: int) -> str:
        """The name of a step in a few words."""
        symbol = "x" if step == len(self.names) - 1 else f"z{lowered(step)}"
        return f"{symbol}: {self.names[step]}"

    def about(self, step: int) -> str:
        """What there is to say of a step."""
        values = self.log_q[step]
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, [0.05, 0.95]) if len(values) else (np.nan, np.nan)
        mean = float(values.mean()) if len(values) else np.nan
        return (
            f"ln q{lowered(step)} of the points: mean {short_number(mean, 3)} nats, nine in ten "
            f"between {short_number(float(low), 3)} and {short_number(float(high), 3)}."
        )


def follow(
    model: TableFlow,
    views: Sequence[View],
    conditions: np.ndarray | None,
    key: PRNGKeyArray,
    order: Sequence[str] = (),
) -> Motion | None:
    """Follow samples of a model to the rows.

    Args:
        model: The model.
        views: All modelled columns, in the schema's order.
        conditions: Conditions of rows, (N, c), to be drawn under, or None.
        key: Draws the samples.
        order: Names of columns that are to be kept first where not all find room.

    Returns:
        The motion, or None where fewer than two columns vary or steps of the flow are no vectors
        of as many entries.
    """
    columns = model.schema.modelled
    if len(columns) < 2:
        return None
    draw_key, rng = key, np.random.default_rng(0)
    dist, share = followed(model.flow)
    steps = 3 if model.schema.mixed else min(len(step_names(dist._map)) + 2, _MOST_STEPS)
    count, kept = _room(len(columns), steps, [c.name for c in columns], order)
    given = None
    if conditions is not None:
        chosen = rng.integers(0, len(conditions), count)
        given = np.asarray(conditions)[chosen].astype(model.flow.dtype)
    walk = _mixed if model.schema.mixed else _plain
    walked = walk(model, dist, draw_key, count, given)
    if walked is None:
        return None
    names, stages, log_q, values = walked
    shown = [views[d] for d in kept]
    axes, points = [], []
    ends = [v.axis.share(v.spread(values[v.name], rng)) for v in shown]
    for k, stage in enumerate(stages):
        # Names have no other units: they are where they will be as soon as they are drawn.
        named = [model.schema.mixed and k > 0 and view.categorical for view in shown]
        own = [number_axis(*limits(stage[:, d], stage[:, d])) for d in kept]
        shares = [axis.share(stage[:, d]) for axis, d in zip(own, kept, strict=True)]
        axes.append([v.axis if n else a for v, n, a in zip(shown, named, own, strict=True)])
        points.append([e if n else s for e, n, s in zip(ends, named, shares, strict=True)])
    axes.append([view.axis for view in shown])
    points.append(ends)
    return Motion(
        shown, names, axes, np.array(points), np.array(log_q), share, len(columns) - len(kept)
    )


def _room(
    width: int, steps: int, names: Sequence[str], order: Sequence[str]
) -> tuple[int, list[int]]:
    """How many points and which columns a page has room for."""
    count = next((n for n in _COUNTS if n * steps * width <= _BUDGET), _COUNTS[-1])
    most = max(2, _BUDGET // (count * steps))
    ranked = sorted(
        range(width), key=lambda d: order.index(names[d]) if names[d] in order else width
    )
    return count, sorted(ranked[:most])


def _plain(model: TableFlow, dist: Flow, key: PRNGKeyArray, count: int, given: Any):
    """Names, positions of all but the last step, densities of all, and the values of columns."""
    z = dist.upto(0).sample(key, (count,) if given is None else (), given)
    path = dist.path(z, given)
    points = [np.asarray(p, np.float64) for p in path.points]
    if any(p.shape != points[-1].shape for p in points):
        return None
    kept = sorted({round(k) for k in np.linspace(0, len(points) - 1, min(len(points), 15))})
    names = [f"the base, {_name_of_base(dist._base)}", *(f"after {name}" for name in path.names)]
    log_q = np.asarray(path.log_probs, np.float64)
    rows = model.schema.decode(points[-1])
    _, terms = model.schema.encode(rows)
    values = dict(zip(model.schema.names, rows.T, strict=True))
    return (
        [*(names[k] for k in kept), "the rows, in the table's units"],
        [points[k] for k in kept],
        [*(log_q[k] for k in kept), log_q[-1] + terms],
        values,
    )


def _mixed(model: TableFlow, dist: Any, key: PRNGKeyArray, count: int, given: Any):
    """The same for rows of mixed columns."""
    base = dist._base
    if not isinstance(base, AutoregressiveDistribution):
        return None
    drawn = base.sample(key, (count,) if given is None else (), given)
    events = np.asarray(drawn, np.float64)
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    u = np.clip(latent_uniforms(base, drawn, given, rng), 1e-6, 1 - 1e-6)
    noise = np.log(u) - np.log1p(-u)
    log_q = np.asarray(base.log_prob(drawn, given), np.float64)
    rows = model.schema.decode(events)
    _, terms = model.schema.encode(rows)
    values = dict(zip(model.schema.names, rows.T, strict=True))
    at = [column.standardise(values[column.name]) for column in model.schema.modelled]
    return (
        [
            "the base, a logistic variable a column",
            "each column given those before it",
            "the rows, in the table's units",
        ],
        [noise, np.stack(at, axis=1)],
        [(-noise - 2 * np.log1p(np.exp(-noise))).sum(1), log_q, log_q + terms],
        values,
    )


def followed(flow: Any) -> tuple[Flow, float | None]:
    """The flow whose path is shown, and its share if it is a part of a mixture.

    A flow whose base is a flow becomes one flow of all steps; of a mixture the heaviest of the
    parts with more than one step is followed.
    """
    share = None
    maps, base = [], flow
    while True:
        if isinstance(base, Flow) and (base.embed is None or base is flow):
            maps.insert(0, _bare(base.bijection))
            base = _bare(base.base)
        elif isinstance(base, Mixture) and isinstance(base.components, tuple):
            parts = [_bare(part) for part in base.components]
            weights = np.asarray(base.weights)
            best = max(range(len(parts)), key=lambda n: (_steps(parts[n]) > 1, weights[n]))
            share = float(weights[best]) * (1.0 if share is None else share)
            base = parts[best]
        else:
            break
    whole = isinstance(flow, Flow)
    embed, shape = (flow.embed, flow.cond_shape) if whole else (None, flow.cond_shape)
    return Flow(base, Chain(maps or [Identity(flow.shape)]), embed, shape), share


def _steps(part: Any) -> int:
    """How many steps a part has, those of a base that is a flow included."""
    if not isinstance(part, Flow):
        return 0
    return len(step_names(_bare(part.bijection))) + _steps(_bare(part.base))


def _bare(part: Any) -> Any:
    return part.value if isinstance(part, Frozen) else part


def _name_of_base(base: Any) -> str:
    known = {
        "Normal": "independent standard normal variables",
        "StudentT": "independent Student-t variables",
        "Logistic": "independent logistic variables",
        "Uniform": "independent uniform variables",
        "GaussianMixture": "a mixture of normal laws",
        "IsotropicMixture": "a mixture of round normal laws",
        "ConditionalMixture": "a mixture of normal laws",
    }
    return known.get(base.name, str(base.name))


def _colours(log_q: np.ndarray) -> tuple[float, float]:
    """The densities at the ends of the scale of colours."""
    finite = log_q[np.isfinite(log_q)]
    if not len(finite):
        return 0.0, 1.0
    low, high = np.quantile(finite, [0.03, 0.97])
    return float(low), float(high) if high > low else float(low) + 1.0


def _whole(shares: np.ndarray) -> np.ndarray:
    """Shares of an axis as whole numbers of 16 bits; what is not there lies beyond its start."""
    held = np.clip(np.where(np.isnan(shares), _BOUNDS[0], shares), *_BOUNDS)
    return np.round(held * SCALE).astype(np.int16)
