"""Flows and baselines side by side, on rows that none of them has seen."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from laminar._errors import InputError
from laminar.tables.baselines import Rows, gaussian, independent, mixture
from laminar.tables.flow import MIN_ROWS, fit_table, split, weighted_mean
from laminar.tables.schema import Schema, learn_schema
from laminar.tables.table import Table

TEST_SHARE = 0.2
"""Fraction of the rows set aside."""


def compare_table(
    table: Table,
    flows: Sequence[str],
    *,
    given: Sequence[str] = (),
    kinds: Mapping[str, str] | None = None,
    seed: int = 0,
    notify: Callable[[str], None] = lambda note: None,
    **options: Any,
) -> dict[str, Any]:
    """Score several flows and baselines on the same rows.

    Baselines are a Gaussian and a Gaussian mixture; for mixed tables independent columns.

    A fifth of the rows, drawn by the seed, is set aside. The others are what every density has:
    flows hold out some of these again, to stop by; the number of components of the mixture is
    chosen on such, and then it is fitted to all of them, like the Gaussian. All have the same
    columns, dequantised alike, and densities in the units of the table.

    Args:
        table: The rows; NaN where a cell is missing.
        flows: Names of flows, as `fit_table` takes them.
        given: Columns to condition on.
        kinds: What some columns are, as `fit_table` takes it.
        seed: Of every draw.
        notify: Called with what a user should know about the columns, and with each name as its
            turn comes.
        **options: Passed on to `fit_table`.

    Returns:
        A report that JSON can express. ``results`` is sorted, best first; ``behind`` is by how much
        a mean lies below the best one, with the standard error of that paired difference.

    Raises:
        InputError: When rows or columns cannot be used.
    """
    if len(table) < 2 * MIN_ROWS:
        raise InputError(
            f"{table.source} has {len(table)} rows, and a comparison needs at least {2 * MIN_ROWS}."
        )
    table.positions(given)
    train_rows, test_rows = split(len(table), TEST_SHARE, np.random.default_rng([seed, 1]))
    train, test = table.take(train_rows), table.take(test_rows)
    fitted, _ = split(len(train), 0.1, np.random.default_rng(seed))
    schema = learn_schema(train, given, fitted, kinds)
    if schema.mixed and any(name != "auto" for name in flows):
        notify("note: the table has columns that only auto can hold; the other flows are left out")
        flows = ["auto"]
    log_p: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    notes: list[str] = []
    for name in flows:
        notify(f"fitting {name}")
        begun = time.monotonic()
        model, report = fit_table(train, given=given, kinds=kinds, flow=name, seed=seed, **options)
        log_p[name] = model.log_prob(test)
        seconds[name] = time.monotonic() - begun
        notes = report["notes"]
    for name, fit in _baselines(schema.mixed, seed).items():
        notify(f"fitting {name}")
        begun = time.monotonic()
        log_p[name] = _baseline(fit, schema, train, test, given, seed)
        seconds[name] = time.monotonic() - begun
    for note in notes:
        notify(f"note: {note}")
    return {
        "table": table.source,
        "train_rows": len(train),
        "test_rows": len(test),
        "given": list(given),
        "seed": seed,
        "results": _ranked(log_p, seconds),
        "notes": notes,
    }


def _baselines(mixed: bool, seed: int) -> dict[str, Callable]:
    """Functions of (fitted, held-out, test rows, laws): the log-densities of test rows."""
    if mixed:
        return {
            "independent columns": lambda a, b, test, laws: independent(_both(a, b), test, laws)
        }
    return {
        "Gaussian": lambda a, b, test, laws: gaussian(_both(a, b)).log_prob(test),
        "Gaussian mixture": lambda a, b, test, laws: mixture(a, b, seed).log_prob(test),
    }


def _both(a: Rows, b: Rows) -> Rows:
    condition = None
    if a.condition is not None and b.condition is not None:
        condition = np.concatenate([a.condition, b.condition])
    return Rows(np.concatenate([a.x, b.x]), condition)


def _baseline(
    fit: Callable, schema: Schema, train: Table, test: Table, given: Sequence[str], seed: int
) -> np.ndarray:
    """Log-densities of the test rows in the units of the table."""
    rng = np.random.default_rng(seed)
    fitted, held_out = split(len(train), 0.1, rng)

    def rows(part: Table, noisy: bool) -> tuple[Rows, np.ndarray]:
        z, terms = schema.encode(part.select(schema.names).values)
        if noisy and not schema.mixed:
            z = z + schema.noise * rng.uniform(-0.5, 0.5, z.shape)
        condition = schema.condition(part.select(given).values) if given else None
        return Rows(z, condition), terms

    own, stopping = (rows(train.take(part), True)[0] for part in (fitted, held_out))
    scored, terms = rows(test, False)
    with np.errstate(invalid="ignore"):
        log_p = fit(own, stopping, scored, schema.laws if schema.mixed else ())
    return np.where(np.isneginf(terms), -np.inf, log_p + terms)


def _ranked(log_p: dict[str, np.ndarray], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """One entry for each density, best first, with paired differences from the best."""
    scores = {name: weighted_mean(values) for name, values in log_p.items()}

    def height(name: str) -> float:
        mean = scores[name]["log_density"]
        return -math.inf if mean is None else mean

    names = sorted(log_p, key=height, reverse=True)
    entries = []
    for name in names:
        with np.errstate(invalid="ignore"):
            difference = weighted_mean(log_p[names[0]] - log_p[name])
        entries.append(
            {
                "name": name,
                **scores[name],
                "behind": difference["log_density"],
                "behind_error": difference["error"],
                "seconds": round(seconds[name], 3),
            }
        )
    return entries
