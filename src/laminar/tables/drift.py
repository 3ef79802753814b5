"""Whether a table has drifted away from another, or from what a model was fitted to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from laminar._errors import InputError
from laminar.scores import (
    TwoSample,
    batch_typicality,
    category_test,
    holm,
    ks_test,
    mmd_test,
    uniform_test,
)
from laminar.tables.anomaly import Detector
from laminar.tables.calibration import some_rows
from laminar.tables.explain import conditionals
from laminar.tables.infer import looks_like_identifier
from laminar.tables.metric import learn_metric
from laminar.tables.table import Table, listing, unknown_column

_LEAST_ROWS = 5
_FEW_VALUES = 10  # numbers of so few values are compared as categories, for KS would hold back
_TRANSFORMED = 300  # rows whose cells are put through the conditional distribution functions


@dataclass(frozen=True)
class Comparison:
    """One comparison.

    Attributes:
        what: The column, or what of the rows is compared.
        test: The test: ``"KS"``, ``"chi-square"``, ``"MMD"``, ``"PIT"`` or ``"typicality"``.
        statistic: How large the difference is, in the test's own terms: the largest difference of
            distribution functions, the total variation, the discrepancy, or nats.
        p_value: How often chance alone gives as much.
        adjusted: The same by Holm's method, for all tests of the report together.
    """

    what: str
    test: str
    statistic: float
    p_value: float
    adjusted: float = float("nan")


@dataclass(frozen=True)
class DriftReport:
    """What `drift` and `drift_from` found.

    Attributes:
        known: What the rows are compared with.
        new: The table.
        known_rows: How many rows.
        new_rows: How many rows.
        level: The chance of naming any difference where there is none.
        columns: The tests of single columns, with the largest differences first.
        rows: The tests of rows as a whole.
    """

    known: str
    new: str
    known_rows: int
    new_rows: int
    level: float
    columns: tuple[Comparison, ...]
    rows: tuple[Comparison, ...]

    @property
    def found(self) -> bool:
        """Whether any difference is beyond chance."""
        return any(test.adjusted <= self.level for test in (*self.columns, *self.rows))

    @property
    def drifted(self) -> list[str]:
        """The columns that differ beyond chance."""
        return list(dict.fromkeys(t.what for t in self.columns if t.adjusted <= self.level))

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        if not self.found:
            return (
                f"No drift is found: no difference between {self.new} and {self.known} is beyond "
                f"chance at level {self.level:g}."
            )
        names, whole = self.drifted, [t.what for t in self.rows if t.adjusted <= self.level]
        total = len({test.what for test in self.columns})
        parts = []
        if names:
            verb = "differs" if len(names) == 1 else "differ"
            parts.append(f"{len(names)} of {total} columns {verb} ({listing(names, 6)})")
        if whole:
            verb = "differs" if len(whole) == 1 else "differ"
            parts.append(f"of whole rows {' and '.join(whole)} {verb}")
        return (
            f"{self.new} has drifted from {self.known}: {'; '.join(parts)}; beyond chance at level "
            f"{self.level:g}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers and texts that JSON can hold, with the verdict."""
        found = {"drift": self.found, "drifted": self.drifted, "verdict": self.verdict}
        return {**asdict(self), **found}


def drift(
    known: Table, new: Table, *, level: float = 0.05, seed: int = 0, permutations: int = 499
) -> DriftReport:
    """Compare two tables, column by column and as a whole.

    Columns of numbers are compared by Kolmogorov–Smirnov, categories without an order and whatever
    takes ten values or fewer by χ²; where cells are missing their share is compared too, and the
    column's p-value covers both. The kernel two-sample test (MMD) compares whole rows, so that a
    change of dependence shows. Identifiers and free text are left out.

    Args:
        known: The rows to compare with.
        new: A table with the same columns, in any order; others are ignored.
        level: The chance of naming any difference where there is none.
        seed: Of permutations, and of the rows taken where there are many.
        permutations: Of the kernel test.

    Raises:
        InputError: When a column is missing, a table has fewer than 5 rows, or the level is out of
            range.
    """
    _check(known, new, level)
    for name in known.names:
        if name not in new.names:
            raise unknown_column(name, new.names, new.source)
    kept = [name for name in known.names if not _identifies(known, new, name)]
    if not kept:
        raise InputError(
            f"{known.source} has no column but identifiers or free text, which always differ; add "
            "columns that can be compared."
        )
    known = known.select(kept)
    cells = dict(zip(known.names, known.cells, strict=True))
    new = new.select(known.names).align(cells)
    columns = [_compare(known, new, name) for name in known.names]
    rows = [_whole(known, new, seed, permutations)]
    return _report(known.source, len(known), new, level, columns, rows)


def _identifies(known: Table, new: Table, name: str) -> bool:
    """Whether a column holds identifiers or free text, which differ between any two tables."""
    return all(
        looks_like_identifier(table.cells[table.names.index(name)], table.column(name))
        for table in (known, new)
    )


def drift_from(
    detector: Detector,
    new: Table,
    *,
    level: float = 0.05,
    seed: int = 0,
    permutations: int = 499,
    name: str = "the model's table",
) -> DriftReport:
    """Compare a table with the rows that a detector was calibrated on, and through its model.

    Beside the tests of `drift`, on the calibration rows that the detector keeps: whether
    log-densities differ (KS), whether the table is typical as a whole, and for each column the
    probability integral transforms F(x_d | x_−d) under the model (PIT). Those of the calibration
    rows stand for what is uniform only if the model is right: a column is named where its
    transforms differ from these, not because the model fits it badly.

    Args:
        detector: The model with its calibration.
        new: A table with the model's columns.
        level: The chance of naming any difference where there is none.
        seed: Of all draws.
        permutations: Of the kernel test.
        name: What to call the detector's rows in the report.

    Raises:
        InputError: As `drift`.
    """
    known = detector.calibration.table
    _check(known, new, level)
    model, rng = detector.model, np.random.default_rng(seed)
    log_p = model.log_prob(new)
    new = new.select(known.names).align(dict(zip(known.names, known.cells, strict=True)))
    columns = [_compare(known, new, column) for column in known.names]
    few = [t.take(some_rows(len(t), _TRANSFORMED, rng)) for t in (known, new)]
    known_u, new_u = (conditionals(model, t, known).transforms(rng) for t in few)
    for d, column in enumerate(model.schema.columns):
        if column.modelled:
            columns.append(_test(column.name, "PIT", ks_test(known_u[:, d], new_u[:, d])))
    calibration = detector.calibration.log_p
    typical = batch_typicality(log_p, calibration, rng)
    rows = [
        _whole(known, new, seed, permutations),
        _test("log-densities", "KS", ks_test(calibration, log_p)),
        Comparison("the mean log-density", "typicality", typical.statistic, typical.p_value),
    ]
    return _report(name, len(calibration), new, level, columns, rows)


def model_fit(detector: Detector, seed: int = 0) -> list[Comparison]:
    """Whether the model's conditional laws are right, on rows it has not seen.

    For each column the probability integral transforms of the calibration rows against the uniform
    law, Holm-adjusted. With many rows small faults of a good model show.

    Args:
        detector: The model with its calibration.
        seed: Of the draws where a distribution function jumps.
    """
    rng = np.random.default_rng(seed)
    known = detector.calibration.table
    few = known.take(some_rows(len(known), _TRANSFORMED, rng))
    u = conditionals(detector.model, few, known).transforms(rng)
    tests = [
        _test(column.name, "PIT", uniform_test(u[:, d]))
        for d, column in enumerate(detector.model.schema.columns)
        if column.modelled
    ]
    return _adjusted(tests)


def _check(known: Table, new: Table, level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"The level must lie between 0 and 1, not {level:g}.")
    for table in (known, new):
        if len(table) < _LEAST_ROWS:
            raise InputError(
                f"{table.source} has {len(table)} rows, and a comparison needs at least "
                f"{_LEAST_ROWS}."
            )


def _compare(known: Table, new: Table, name: str) -> Comparison:
    """One column: its values, and the share of missing cells where there are any."""
    a, b = known.column(name), new.column(name)
    cells = known.cells[known.names.index(name)]
    few = len(np.unique(np.concatenate([a, b]))) <= _FEW_VALUES
    if few or (cells.kind == "text" and not cells.ordered):
        return _test(name, "chi-square", category_test(a, b))
    found, gaps = ks_test(a, b), (np.isnan(a), np.isnan(b))
    if not (gaps[0].any() or gaps[1].any()):
        return _test(name, "KS", found)
    missing = category_test(*(g.astype(np.float64) for g in gaps))
    p = missing.p_value if np.isnan(found.p_value) else min(found.p_value, missing.p_value)
    worse = missing if not missing.p_value > found.p_value else found
    return Comparison(name, "KS", worse.statistic, min(2 * p, 1.0))


def _whole(known: Table, new: Table, seed: int, permutations: int) -> Comparison:
    """The kernel two-sample test, in a metric that is the same whichever rows are exchanged."""
    both = Table(
        known.names,
        np.concatenate([known.values, new.values]),
        cells=known.cells,
        rows=np.arange(1, len(known) + len(new) + 1),
    )
    points = learn_metric(both)(both)
    found = mmd_test(
        points[: len(known)],
        points[len(known) :],
        np.random.default_rng(seed),
        permutations=permutations,
    )
    return _test("the joint distribution", "MMD", found)


def _test(what: str, test: str, found: TwoSample) -> Comparison:
    return Comparison(what, test, found.statistic, found.p_value)


def _adjusted(tests: Sequence[Comparison]) -> list[Comparison]:
    adjusted = holm(np.array([test.p_value for test in tests]))
    both = zip(tests, adjusted, strict=True)
    return [Comparison(t.what, t.test, t.statistic, t.p_value, float(q)) for t, q in both]


def _report(
    known: str,
    known_rows: int,
    new: Table,
    level: float,
    columns: list[Comparison],
    rows: list[Comparison],
) -> DriftReport:
    tests = _adjusted([*columns, *rows])
    ordered = sorted(tests[: len(columns)], key=lambda t: (np.isnan(t.p_value), t.p_value))
    rest = tuple(tests[len(columns) :])
    return DriftReport(known, new.source, known_rows, len(new), level, tuple(ordered), rest)
