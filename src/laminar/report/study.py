"""What a report is made from: rows of the table, samples of the model, and what they say."""

from dataclasses import dataclass
from typing import Any

import jax.random as jr
import numpy as np

from laminar._errors import InputError
from laminar._typing import PRNGKeyArray
from laminar.report.calibration import (
    NoLatentError,
    Regions,
    Transforms,
    latent_uniforms,
    regions,
    transforms,
)
from laminar.report.dependence import dependent_pairs
from laminar.report.motion import Motion, follow
from laminar.report.origin import Origin, find_origin
from laminar.report.views import View, look
from laminar.tables.columns import Column
from laminar.tables.model import TableFlow, cast
from laminar.tables.table import Table

MOST_ROWS = 10_000
"""Rows that pictures and tests use, drawn by the key where there are more."""

MOST_SAMPLES = 10_000
_PAIRS = 4


@dataclass(frozen=True)
class Study:
    """A model beside a table.

    Attributes:
        model: The model.
        meta: What its file says of how it was fitted.
        table: The whole table.
        origin: The split that the fit made of the table, where it is found.
        rows: The rows that are shown, at most `MOST_ROWS`.
        judged: The rows that calibration is judged by: those held out from the fit where they are
            known, or else `rows`.
        drawn: Samples, under the conditions of rows where the model has given columns.
        log_p: Log-densities of the rows that are judged by, (N,).
        drawn_log_p: Log-densities of the samples, (M,).
        views: The modelled columns.
        given: The given columns.
        pairs: Names of the columns that depend on each other most, and their mutual information.
    """

    model: TableFlow
    meta: dict[str, Any]
    table: Table
    origin: Origin | None
    rows: Table
    judged: Table
    drawn: Table
    log_p: np.ndarray
    drawn_log_p: np.ndarray
    views: list[View]
    given: list[View]
    pairs: list[tuple[str, str, float]]

    @property
    def unseen(self) -> bool:
        """Whether the rows that are judged by were held out from the fit."""
        return self.origin is not None and self.origin.unseen

    def view(self, name: str) -> View:
        """The view of a column."""
        return next(view for view in (*self.views, *self.given) if view.name == name)

    def regions(self) -> Regions | None:
        """How often rows lie in the model's regions of highest density; None without any row."""
        own, drawn = (p[~np.isnan(p)] for p in (self.log_p, self.drawn_log_p))
        return regions(own, drawn) if len(own) > 1 and len(drawn) > 1 else None

    def latent(self, seed: int = 0) -> Transforms | None:
        """The latent transforms of the rows; None where the model has no such latent."""
        rng = np.random.default_rng(seed)
        keep = np.flatnonzero(np.isfinite(self.log_p))[:MOST_ROWS]
        if len(keep) < 2:
            return None
        events, condition = self.model.batch(self.judged.take(keep))
        x = np.asarray(events, np.float64)
        schema = self.model.schema
        if schema.noise.any():
            x = x + schema.noise * rng.uniform(-0.5, 0.5, x.shape)
        try:
            u = latent_uniforms(self.model.flow, cast(x, self.model.flow), condition, rng)
        except NoLatentError:
            return None
        # In a mixed table each variable is that of a column given those before it.
        return transforms(u, [c.name for c in schema.modelled] if schema.mixed else None)

    def motion(self, key: PRNGKeyArray) -> Motion | None:
        """Samples on their way through the flow."""
        _, condition = self.model.batch(self.rows)
        conditions = None if condition is None else np.asarray(condition)
        order = list(dict.fromkeys(name for pair in self.pairs for name in pair[:2]))
        return follow(self.model, self.views, conditions, key, order)


def study(
    model: TableFlow, table: Table, key: PRNGKeyArray, meta: dict[str, Any] | None = None
) -> Study:
    """Look at a model beside a table.

    Args:
        model: The model.
        table: Rows with the model's columns, by name.
        key: Draws the rows and the samples.
        meta: What the model's file says of the fit.

    Raises:
        InputError: If the table has fewer than two rows, or a column is missing.
    """
    meta = dict(meta or {})
    if len(table) < 2:
        raise InputError(f"{table.source} has {len(table)} row, and a report needs two or more.")
    schema = model.schema
    table = aligned(model, table)
    row_key, sample_key, given_key = jr.split(key, 3)
    origin = find_origin(model, table, meta)
    rows = judged = _some(row_key, table)
    if origin is not None and origin.unseen:
        judged = _some(row_key, table.take(origin.held))
    count = min(MOST_SAMPLES, max(4 * len(rows), 2_000))
    if schema.given:
        picked = np.asarray(jr.randint(given_key, (count,), 0, len(rows)))
        drawn = model.sample(sample_key, 1, rows.take(picked).select(schema.given_names))
    else:
        drawn = model.sample(sample_key, count)

    def views(columns: tuple[Column, ...]) -> list[View]:
        return [look(c, rows.column(c.name), drawn.column(c.name)) for c in columns]

    shown = {column.name for column in (*schema.modelled, *schema.given)}
    names = [name for name in schema.order if name in shown]
    rng = np.random.default_rng(np.asarray(jr.key_data(row_key)))
    found = dependent_pairs(rows.select(names).values, _PAIRS, rng) if len(names) > 1 else []
    return Study(
        model=model,
        meta=meta,
        table=table,
        origin=origin,
        rows=rows,
        judged=judged,
        drawn=drawn,
        log_p=model.log_prob(judged),
        drawn_log_p=model.log_prob(drawn),
        views=views(schema.modelled),
        given=views(schema.given),
        pairs=[(names[i], names[j], strength) for i, j, strength in found],
    )


def _some(key: PRNGKeyArray, table: Table) -> Table:
    """At most `MOST_ROWS` rows, in the table's order."""
    if len(table) <= MOST_ROWS:
        return table
    picked = np.asarray(jr.choice(key, len(table), (MOST_ROWS,), replace=False))
    return table.take(np.sort(picked))


def aligned(model: TableFlow, table: Table) -> Table:
    """The columns of the model, as its own numbers; by position where they have no names."""
    schema = model.schema
    order = schema.order
    if (
        not table.named
        and not set(order) <= set(table.names)
        and table.values.shape[1] == len(order)
    ):
        table = Table(order, table.values, table.source, rows=table.rows, cells=table.cells)
    return table.select(order).align(schema.cells)
