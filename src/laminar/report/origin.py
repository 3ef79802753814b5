"""Which rows of a table a model was fitted to and scored on, found again from its file.

A file names the seed of the split, not the rows. The split is drawn again, and believed only if the
baseline, fitted to its training rows, gives the held-out rows the very score that the file has.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from laminar.tables.baselines import Rows, gaussian, independent, mixture
from laminar.tables.flow import split, weighted_mean
from laminar.tables.model import TableFlow
from laminar.tables.table import Table

_AGREES = 1e-6  # relative to the score, of a computation in double precision
_AGREES_SINGLE = 1e-3
_MOST_CELLS = 1_000_000  # of a table that a mixture is fitted to for comparison


@dataclass(frozen=True)
class Origin:
    """The split that a fit made of a table.

    Attributes:
        train: Positions of the rows that were trained on.
        held: Positions of those that were scored.
        unseen: Whether the model has not been fitted to these since.
    """

    train: np.ndarray
    held: np.ndarray
    unseen: bool


def find_origin(model: TableFlow, table: Table, meta: dict[str, Any]) -> Origin | None:
    """The split of a fit, or None if this is not the table or the file does not say.

    Args:
        model: The model.
        table: All rows, in the model's own numbers.
        meta: What the model's file says of the fit.
    """
    score, baseline, seed = (meta.get(name) for name in ("held_out", "baseline", "seed"))
    if not isinstance(score, dict) or not isinstance(baseline, dict) or not isinstance(seed, int):
        return None
    if meta.get("rows") != len(table) or meta.get("weights") is not None:
        return None
    rng = np.random.default_rng(seed)
    share = meta.get("validation", 0.1)
    if not isinstance(share, float) or not 0 < share < 1:
        return None
    train, held = split(len(table), share, rng)
    expected = baseline.get("log_density")
    if len(held) != score.get("rows") or not isinstance(expected, float):
        return None
    fitted, tested, terms = _rows(model, table, train, held, rng)
    if model.schema.mixed:
        log_p = independent(fitted, tested, model.schema.laws)
    else:
        log_p = gaussian(fitted).log_prob(tested)
    found = float((log_p + terms).mean())
    if not abs(found - expected) <= _AGREES * max(1.0, abs(expected)):
        return None
    own = score.get("log_density")
    mean = float(model.log_prob(table.take(held)).mean())
    unseen = isinstance(own, float) and abs(mean - own) <= _AGREES_SINGLE * max(1.0, abs(own))
    return Origin(train, held, unseen)


def mixture_score(
    model: TableFlow, table: Table, origin: Origin, seed: int
) -> dict[str, Any] | None:
    """The held-out score of scikit-learn's Gaussian mixture, its components chosen on other rows.

    None where the table is mixed, or so large that the fit would take long.
    """
    if model.schema.mixed or table.values.size > _MOST_CELLS:
        return None
    rng = np.random.default_rng(seed)
    fitted, tested, terms = _rows(model, table, origin.train, origin.held, rng)
    kept, stop = split(len(fitted.x), 0.1, rng)
    log_p = mixture(fitted.take(kept), fitted.take(stop), seed).log_prob(tested) + terms
    return weighted_mean(log_p)


def _rows(
    model: TableFlow, table: Table, train: np.ndarray, held: np.ndarray, rng: np.random.Generator
) -> tuple[Rows, Rows, np.ndarray]:
    """Training rows with their noise on ties, held-out rows, and the terms of their units."""
    schema = model.schema
    z, terms = schema.encode(table.select(schema.names).values)
    noisy = z if schema.mixed else z + schema.noise * rng.uniform(-0.5, 0.5, z.shape)
    given = table.select(schema.given_names).values if schema.given else None
    condition = None if given is None else schema.condition(given)
    return Rows(noisy, condition).take(train), Rows(z, condition).take(held), terms[held]
