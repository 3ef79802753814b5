r"""How probable each cell of a row is, given the other cells of the row.

    ln p(x_d | x_−d) = ln p(x) − ln [ Σ_atoms p(x_−d, a) + ∫ p(x_−d, t) dt ]

Only log-densities of altered rows are asked for, so it holds for every kind of model. The sum runs
over what a column can be without a density: its categories, the points of its grid, values that
many rows share, the missing cell. The integral is quadrature, from nodes at the column's quantiles
and far into both tails, refined where the mass is found to lie; between nodes the log-density is
taken as a cubic. On smooth densities the error is below 0.02 nats; a conditional density that is
narrower than a thousandth of the column's spread may be missed between nodes unless the cell itself
lies in it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from laminar._errors import InputError
from laminar._lengths import bucket
from laminar.scores import conformal_p_values
from laminar.tables.columns import Column
from laminar.tables.flow import TableFlow
from laminar.tables.frames import from_frame, is_frame
from laminar.tables.table import Table, unknown_column

_QUANTILES = 17
# In spreads: beyond the outermost values, and beside the cell itself.
_TAILS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 512.0)
_BESIDE = (1e-3, 1e-2, 0.1)
_ROUNDS, _EACH = 7, 6  # of refinement, and nodes that each adds
_MOST_POINTS = 64  # of a grid that is enumerated
_LEAST_BUCKET = 256
_GAUSS = np.polynomial.legendre.leggauss(6)
_STEEP = 12.0  # nats between nodes
_NODES = (0.5 + 0.5 * _GAUSS[0], 0.5 * _GAUSS[1])  # on (0, 1)
_BLOCK = 4_000_000  # cells of altered rows that are held at a time

NODES = _QUANTILES + 2 * len(_TAILS) + 2 * len(_BESIDE) + 1 + _ROUNDS * _EACH
"""Rows that are scored for one cell of a column with a density, at most."""


class Conditionals(NamedTuple):
    """What the model says of each cell given the rest of its row.

    Attributes:
        names: The columns, constants among them.
        log_p: ln p(x_d | x_−d), (N, D), in the user's units: a density where the column has one. It
            is −inf for a cell that is impossible beside the others, and NaN where the model was
            told nothing (a gap in a column without gaps) or where the other cells are impossible
            by themselves.
        below: P(X_d < x_d | x_−d), (N, D), and
        at: P(X_d = x_d | x_−d), zero where the column has a density; categories are in the order of
            their numbers, and a missing cell comes last.
    """

    names: tuple[str, ...]
    log_p: np.ndarray
    below: np.ndarray
    at: np.ndarray

    def transforms(self, rng: np.random.Generator) -> np.ndarray:
        """Probability integral transforms (N, D), uniform if the model is right (jumps drawn)."""
        u = self.below + rng.random(self.at.shape) * self.at
        return np.clip(u, 0.0, 1.0)


class Reason(NamedTuple):
    """Why a row is strange, for one of its columns.

    Attributes:
        column: Its name.
        log_p: ln p(x_d | x_−d): of the cell given the others of the row.
        excess: How many nats less that is than for the median of usual rows.
        p_value: The rank of `log_p` among the usual rows, as a p-value: the probability of a
            number and that of a category are comparable only so.
    """

    column: str
    log_p: float
    excess: float
    p_value: float


def reasons(found: Conditionals, usual: Conditionals, top: int) -> list[list[Reason]]:
    """The columns that make rows strange beside usual ones, the worst first.

    Args:
        found: Of the rows.
        usual: Of rows like those that the model was fitted to, the more the better.
        top: At most so many columns for each row.

    Returns:
        For each row its columns by p-value, then by excess; only those with a positive excess.
    """
    known = [own[~np.isnan(own)] for own in usual.log_p.T]
    medians = np.array([np.median(own) if len(own) else np.nan for own in known])
    with np.errstate(invalid="ignore"):
        excess = medians - found.log_p
    p = [
        # Where nothing is usual, nothing is stranger than that.
        conformal_p_values(own, among if len(among) else np.array([-np.inf]))
        for own, among in zip(found.log_p.T, known, strict=True)
    ]
    result = []
    for row, nats in enumerate(excess):
        ranks = np.array([own[row] for own in p])
        order = np.lexsort((-np.nan_to_num(nats, nan=-np.inf, posinf=1e300), ranks))
        result.append(
            [
                Reason(
                    found.names[d], *(float(v) for v in (found.log_p[row, d], nats[d], p[d][row]))
                )
                for d in order
                if nats[d] > 0
            ][:top]
        )
    return result


def conditionals(model: TableFlow, rows: Any, known: Any) -> Conditionals:
    """The conditional law of each cell given the others, at the cells of some rows.

    A cell costs about `NODES` evaluations of the density, so that N rows of D columns cost some
    80 N D.

    Args:
        model: The model.
        rows: The rows, with the model's given columns if it has any.
        known: Rows that the columns' quantiles are taken from.

    Returns:
        The conditional log-densities and distribution functions.
    """
    schema = model.schema
    rows, known, evaluate = _prepared(model, rows, known)
    count = len(schema.columns)
    shape = (len(rows), count)
    log_p, below, at = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape)
    whole = evaluate(rows.values) if len(rows) else np.zeros(0)
    for d, column in enumerate(schema.columns):
        if not column.modelled:
            log_p[:, d] = np.where(column.supports(rows.values[:, d]), 0.0, -np.inf)
            below[:, d], at[:, d] = 0.0, 1.0
            continue
        plan = _Plan(column, known.values[:, d])
        step = max(_BLOCK // (plan.cells_each * len(rows.names)), 1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            found = _column(plan, d, rows.values[part], whole[part], evaluate)
            log_p[part, d], below[part, d], at[part, d] = found
    return Conditionals(schema.names, log_p, below, at)


def quantiles(
    model: TableFlow, rows: Any, known: Any, column: str, levels: Sequence[float]
) -> np.ndarray:
    """Quantiles of one column given the other cells of each row.

    What is in the column itself is not looked at, and may be missing. Probabilities beyond a value
    are `Conditionals.below` and `Conditionals.at` of rows that hold the value.

    Args:
        model: The model.
        rows: The rows, with the model's given columns if it has any: a table, or a frame.
        known: Rows that the column's nodes are taken from, such as those of the fitted table.
        column: Its name: a column of numbers, dates or categories with an order.
        levels: Probabilities between 0 and 1.

    Returns:
        The least cells that are not exceeded with these probabilities, given that the cell is not
        missing, (N, Q), as the user writes them: numbers, moments (datetime64) or categories;
        missing ones (NaN, NaT or None) where the other cells are impossible.

    Raises:
        InputError: If there is no such column, it has no order, or a level is no probability.
    """
    schema = model.schema
    if column not in schema.names:
        raise unknown_column(column, schema.names, "The model")
    d = schema.names.index(column)
    what = schema.columns[d]
    wanted = np.atleast_1d(np.asarray(levels, dtype=np.float64))
    if not ((wanted > 0) & (wanted < 1)).all():
        raise InputError(
            f"Levels of quantiles lie between 0 and 1, without these; got {wanted.tolist()}."
        )
    if not what.modelled or (what.states_only and what.kind == "categorical"):
        raise InputError(f"Column {column!r} is {what.kind} and has no quantiles.")
    rows, known, evaluate = _prepared(model, rows, known)
    plan = _Plan(what, known.values[:, d])
    found = np.full((len(rows), len(wanted)), np.nan)
    step = max(_BLOCK // (plan.cells_each * len(rows.names)), 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        found[part] = _inverted(plan, d, rows.values[part], evaluate, wanted)
    return schema.cells[column].decode(found.reshape(-1)).reshape(found.shape)


def _prepared(
    model: TableFlow, rows: Any, known: Any
) -> tuple[Table, Table, Callable[[np.ndarray], np.ndarray]]:
    """Both tables as the model reads them, and the log-density of altered rows."""
    schema = model.schema
    rows, known = (from_frame(t) if is_frame(t) else t for t in (rows, known))
    order = (*schema.names, *schema.given_names)
    rows, known = (
        schema.completed(table).select(order).align(schema.cells) for table in (rows, known)
    )

    def evaluate(values: np.ndarray) -> np.ndarray:
        # A program is compiled for every number of rows; so there are few such numbers.
        size = bucket(len(values), _LEAST_BUCKET, factor=4)
        padded = np.concatenate([values, np.repeat(values[:1], size - len(values), axis=0)])
        table = Table(order, padded, rows.source, cells=rows.cells)
        return model.log_prob(table)[: len(values)]

    return rows, known, evaluate


def _scorer(
    d: int, rows: np.ndarray, evaluate: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    """The log-density of rows with cells (N, G) in column d, (N, G)."""

    def score(cells: np.ndarray) -> np.ndarray:
        altered = np.repeat(rows, cells.shape[1], axis=0)
        altered[:, d] = cells.reshape(-1)
        return evaluate(altered).reshape(cells.shape)

    return score


class _Plan:
    """What a column can be besides the cell that is there: atoms, and nodes of a density."""

    def __init__(self, column: Column, known: np.ndarray):
        self.column = column
        # A fine grid is as good as a density.
        self.gridded = column.on_grid and not column.fine
        present = known[np.isfinite(known)]
        if not len(present):
            present = column.unstandardise(np.zeros(1))
        atoms: list[float] = []
        self.dense = True
        if column.states_only:
            atoms, self.dense = [*column.codes, *column.rare], False
        elif self.gridded:
            points = self._grid(present)
            if len(points) <= _MOST_POINTS:
                atoms, self.dense = list(points), False
        elif not column.resolution:
            atoms = list(column.spikes)
        if column.missing:
            atoms.append(np.nan)
        self.atoms = np.unique(np.asarray(atoms, dtype=np.float64))
        self._share(column)
        z = column.standardise(present)
        z = z[np.isfinite(z)]
        inner = np.quantile(z if len(z) else np.zeros(1), np.linspace(0, 1, _QUANTILES))
        self.spread = max(float(np.std(z)) if len(z) else 1.0, 0.05)
        tails = self.spread * np.asarray(_TAILS)
        self.nodes = np.concatenate([inner[0] - tails[::-1], inner, inner[-1] + tails])
        if column.resolution and column.spikes:
            # A shared value that is smoothed is a narrow peak of the density, which is found so.
            beside = column.resolution * np.linspace(-0.5, 0.5, 5)
            peaks = column.standardise(np.add.outer(np.asarray(column.spikes), beside).reshape(-1))
            self.nodes = np.sort(np.concatenate([self.nodes, peaks]))

    def _share(self, column: Column) -> None:
        """Which atoms are asked for: rare categories are alike but for their shares."""
        rare = np.isin(self.atoms, column.rare)
        self._asked = np.concatenate([self.atoms[~rare], self.atoms[rare][:1]])
        self._place = np.where(rare, len(self._asked) - 1, np.cumsum(~rare) - 1)
        self._offset = np.zeros(len(self.atoms))
        if rare.any():
            share = dict(zip(column.rare, np.log(column.shares), strict=True))
            logs = np.array([share[atom] for atom in self.atoms[rare]])
            self._offset[rare] = logs - logs[0]

    @property
    def cells_each(self) -> int:
        """How many rows are scored for one row."""
        refined = (len(self.nodes) + NODES) if self.dense else 0
        return max(refined + len(self._asked), 1)

    def log_atoms(self, rows: int, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The log-probability of each atom in each of so many rows, (rows, A)."""
        if not len(self.atoms):
            return np.zeros((rows, 0))
        asked = score(np.broadcast_to(self._asked, (rows, len(self._asked))))
        return asked[:, self._place] + self._offset

    def _grid(self, present: np.ndarray) -> np.ndarray:
        """The points of a grid between the outermost values and a little beyond."""
        column = self.column
        low = column.low if column.low is not None else float(present.min())
        high = column.high if column.high is not None else float(present.max())
        margin = 0.25 * (high - low) + 4 * column.step
        low = low if column.low is not None else low - margin
        high = high if column.high is not None else high + margin
        first = np.ceil((low - column.origin) / column.step - 1e-6)
        last = np.floor((high - column.origin) / column.step + 1e-6)
        if last - first > _MOST_POINTS:
            return np.zeros(_MOST_POINTS + 1)
        return np.round(column.origin + column.step * np.arange(first, last + 1), 12)

    def start(self, own: np.ndarray) -> np.ndarray:
        """Nodes in standardised units for each row, (N, G), with its own cell among them."""
        beside = self.spread * np.asarray(_BESIDE)
        around = np.concatenate([-beside[::-1], [0.0], beside])
        # A cell that is an atom, or outside the support, needs no nodes around it.
        centre = np.where(np.isfinite(own), own, 0.0)[:, None]
        nodes = np.broadcast_to(self.nodes, (len(own), len(self.nodes)))
        return np.sort(self.placed(np.concatenate([nodes, centre + around], axis=1)), axis=1)

    def placed(self, z: np.ndarray) -> np.ndarray:
        """Nodes moved onto the grid, where there is one."""
        column = self.column
        if not self.gridded:
            return z
        x = column.location + column.scale * z
        steps = np.round((x - column.origin) / column.step)
        x = np.clip(column.origin + steps * column.step, column.low, column.high)
        return column.standardise(x)

    def cells(self, z: np.ndarray) -> np.ndarray:
        """Nodes in the user's units."""
        column = self.column
        x = column.unstandardise(z)
        if not column.on_grid:
            return x
        # Back and forth has moved the points by a last digit.
        x = column.origin + np.round((x - column.origin) / column.step) * column.step
        # A single value with a probability of its own is no point of the density.
        return np.where(np.isin(x, column.spikes), x + column.step, x)


def _column(
    plan: _Plan,
    d: int,
    rows: np.ndarray,
    whole: np.ndarray,
    evaluate: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The log of p(x_d | x_−d), the probability below and that of the cell itself, each (N,)."""
    own = rows[:, d]
    score = _scorer(d, rows, evaluate)
    atoms, log_atoms = plan.atoms, plan.log_atoms(len(rows), score)
    same = (own[:, None] == atoms) | (np.isnan(own)[:, None] & np.isnan(atoms))
    is_atom = same.any(axis=1)
    if not plan.dense and not is_atom.all():
        # A category that was not there is one more atom of its row.
        log_atoms = np.concatenate([log_atoms, np.where(is_atom, -np.inf, whole)[:, None]], axis=1)
        atoms = np.append(atoms, np.inf)
    top = np.max(log_atoms, axis=1, initial=-np.inf)
    z = log_f = np.zeros((len(rows), 0))
    if plan.dense:
        z, log_f = _refined(plan, plan.column.standardise(own), score)
        top = np.maximum(top, log_f.max(axis=1))
    safe = np.where(np.isfinite(top), top, 0.0)
    mass = np.exp(log_atoms - safe[:, None])
    total = mass.sum(axis=1)
    position = np.where(np.isnan(own), np.inf, own)[:, None]
    before = (mass * (np.where(np.isnan(atoms), np.inf, atoms) < position)).sum(axis=1)
    if plan.dense:
        pieces = _pieces(plan, z, log_f - safe[:, None])
        total = total + pieces.sum(axis=1)
        inside = z[:, 1:] <= plan.column.standardise(own)[:, None]
        before = before + np.where(np.isnan(own)[:, None] | inside, pieces, 0.0).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = whole - (np.log(total) + safe)
        share = np.exp(whole - safe) / total
        below = before / total
        if plan.dense and plan.gridded:
            # The piece up to a point of a grid has half of the point's own probability.
            below = below - np.where(is_atom, 0.0, 0.5 * share)
    discrete = is_atom | ~np.full(len(rows), plan.dense) | plan.column.on_grid
    told = ~np.isnan(own) | plan.column.missing
    possible = told & (total > 0)
    return (
        np.where(possible, np.minimum(log_p, 0.0) if not plan.dense else log_p, np.nan),
        np.where(possible, np.clip(below, 0, 1), np.nan),
        np.where(possible, np.where(discrete, np.clip(share, 0, 1), 0.0), np.nan),
    )


def _refined(
    plan: _Plan, own: np.ndarray, score: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted nodes z (N, G) and the log-density at them, per unit of z (per point of a grid)."""
    z = plan.start(own)
    log_f = _per_unit(plan, z, score)
    for _ in range(_ROUNDS):
        width = np.diff(z, axis=1)
        higher = np.maximum(log_f[:, 1:], log_f[:, :-1])
        least = 1.5 * plan.column.step / plan.column.scale if plan.gridded else 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            bound = np.where(width > least, np.log(width) + higher, -np.inf)
        bound = np.where(np.isnan(bound), -np.inf, bound)
        chosen = np.argpartition(-bound, _EACH - 1, axis=1)[:, :_EACH]
        left = np.take_along_axis(z, chosen, axis=1)
        middle = plan.placed(left + 0.5 * np.take_along_axis(width, chosen, axis=1))
        z = np.concatenate([z, middle], axis=1)
        log_f = np.concatenate([log_f, _per_unit(plan, middle, score)], axis=1)
        order = np.argsort(z, axis=1, kind="stable")
        z, log_f = (np.take_along_axis(a, order, axis=1) for a in (z, log_f))
    return z, log_f


def _per_unit(plan: _Plan, z: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    column = plan.column
    x = plan.cells(z)
    log_p = score(x)
    if plan.gridded:
        return log_p
    if column.fine:
        log_p = log_p - math.log(column.step)
    with np.errstate(invalid="ignore"):
        log_f = log_p - column.log_slope(column.unstandardise(z))
    # Where the map to the user's units runs out of digits there is nothing left to count.
    return np.where(np.isnan(log_f), -np.inf, log_f)


def _pieces(plan: _Plan, z: np.ndarray, log_f: np.ndarray) -> np.ndarray:
    """The mass between neighbouring nodes, (N, G − 1), of a log-density that is cubic there."""
    left, right = log_f[:, :-1], log_f[:, 1:]
    width = np.diff(z, axis=1)
    high, low = np.maximum(left, right), np.minimum(left, right)
    with np.errstate(invalid="ignore", over="ignore"):
        fall = np.where(np.isfinite(high), high - low, 0.0)
        bend = _bent(z, log_f)
        if not plan.gridded:
            # (1 − e^{−t}) / t, which is the mean of e^{−ts} over s in (0, 1)
            mean = np.where(fall > 1e-8, -np.expm1(-fall) / np.where(fall > 0, fall, 1.0), 1.0)
            return width * np.exp(high) * np.where(np.isinf(fall), 0.0, mean) * bend
    steps = np.round(width * plan.column.scale / plan.column.step)
    pieces = np.exp(high) * _points(steps, fall) * np.where(steps > 1, bend, 1.0)
    # A sum over points, not an integral: both outermost points have their other halves.
    pieces[:, 0] += 0.5 * np.exp(left[:, 0])
    pieces[:, -1] += 0.5 * np.exp(right[:, -1])
    return pieces


def _bent(z: np.ndarray, log_f: np.ndarray) -> np.ndarray:
    """By what factor the mass between nodes differs from that of a log-linear density, (N, G − 1).

    The log-density is a cubic between nodes, with the slopes of Fritsch and Butland (1984), which
    never overshoot. Both masses are by the same Gauss rule, so that its error cancels.
    """
    width = np.diff(z, axis=1)
    rise = np.diff(np.where(np.isfinite(log_f), log_f, 0.0), axis=1)
    # Where it falls steeply next to no mass lies away from one end, and the rule sees none of it.
    known = np.isfinite(log_f[:, 1:]) & np.isfinite(log_f[:, :-1]) & (np.abs(rise) < _STEEP)
    known &= width > 0
    h, rise = np.where(known, width, 1.0), np.where(known, rise, 0.0)
    slope = rise / h
    before, after = slope[:, :-1], slope[:, 1:]
    both = known[:, :-1] & known[:, 1:]
    same = both & (before * after > 0)
    weight = (1 + h[:, 1:] / (h[:, :-1] + h[:, 1:])) / 3
    safe = np.where(same, weight * after + (1 - weight) * before, 1.0)
    inner = np.where(same, before * after / safe, 0.0)
    # Beside a piece of which nothing is known the density goes on as it is.
    left = np.concatenate([slope[:, :1], np.where(both, inner, after)], axis=1)
    right = np.concatenate([np.where(both, inner, before), slope[:, -1:]], axis=1)
    t = _NODES[0]
    line = rise[..., None] * (t - np.where(rise > 0, 1.0, 0.0)[..., None])
    a, b = (left * h - rise)[..., None], (right * h - rise)[..., None]
    bow = t * (1 - t) * (a * (1 - t) - b * t)
    straight = np.exp(line) @ _NODES[1]
    return np.where(known, (np.exp(line + bow) @ _NODES[1]) / straight, 1.0)


def _points(steps: np.ndarray, fall: np.ndarray) -> np.ndarray:
    """The sum of e^{−fall · i / steps} over i = 0, …, steps, both ends by half; 0 of no steps."""
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(steps > 0, fall / steps, 0.0)
        whole = np.where(each > 1e-8, np.expm1(-(fall + each)) / np.expm1(-each), steps + 1.0)
    whole = np.where(np.isinf(fall), 1.0, whole)
    return np.where(steps > 0, whole - 0.5 * (1.0 + np.exp(-fall)), 0.0)


def _inverted(
    plan: _Plan,
    d: int,
    rows: np.ndarray,
    evaluate: Callable[[np.ndarray], np.ndarray],
    wanted: np.ndarray,
) -> np.ndarray:
    """Where the conditional distribution functions of rows reach levels, (N, Q)."""
    score = _scorer(d, rows, evaluate)
    count = len(rows)
    there = ~np.isnan(plan.atoms)
    atoms, log_atoms = plan.atoms[there], plan.log_atoms(count, score)[:, there]
    z, log_f = np.zeros((count, 2)), np.full((count, 2), -np.inf)
    if plan.dense:
        z, log_f = _refined(plan, np.full(count, np.nan), score)
    top = np.maximum(log_f.max(axis=1), log_atoms.max(axis=1, initial=-np.inf))
    safe = np.where(np.isfinite(top), top, 0.0)[:, None]
    pieces = _pieces(plan, z, log_f - safe) if plan.dense else np.zeros((count, 1))
    heaped = np.concatenate([np.zeros((count, 1)), np.cumsum(pieces, axis=1)], axis=1)
    mass = np.exp(log_atoms - safe)
    places = plan.column.standardise(atoms)
    found = np.full((count, len(wanted)), np.nan)
    for i in np.flatnonzero(np.isfinite(top)):
        # The distribution function jumps at the atoms, and rises with the pieces between them.
        before = np.interp(places, z[i], heaped[i]) if plan.dense else np.zeros(len(atoms))
        jumps = np.concatenate([[0.0], np.cumsum(mass[i])])
        for q, level in enumerate(wanted * (heaped[i, -1] + jumps[-1])):
            k = int(np.searchsorted(before + jumps[1:], level))
            if k < len(atoms) and level > before[k] + jumps[k]:
                found[i, q] = atoms[k]
            elif plan.dense:
                at = _within(z[i], log_f[i], heaped[i], level - jumps[k])
                found[i, q] = plan.column.restore(np.array([at]))[0]
            else:
                found[i, q] = atoms[min(k, len(atoms) - 1)]
    return found


def _within(z: np.ndarray, log_f: np.ndarray, heaped: np.ndarray, level: float) -> float:
    """Where the mass heaped up to the nodes z of a density reaches a level."""
    k = int(np.clip(np.searchsorted(heaped, level) - 1, 0, len(z) - 2))
    share = (level - heaped[k]) / max(heaped[k + 1] - heaped[k], np.finfo(float).tiny)
    with np.errstate(invalid="ignore"):
        rise = float(np.clip(np.nan_to_num(log_f[k + 1] - log_f[k]), -500, 500))
    if abs(rise) > 1e-6:  # the density is log-linear between nodes
        share = np.log1p(share * np.expm1(rise)) / rise
    return float(z[k] + np.clip(share, 0, 1) * (z[k + 1] - z[k]))
