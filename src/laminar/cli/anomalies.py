"""The commands that look for what is unusual or missing: detect, drift and impute."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laminar._errors import InputError
from laminar.cli.common import (
    JsonOption,
    ModelArgument,
    NoCacheOption,
    SeedOption,
    TableArgument,
    at_least,
    check_seed,
    emit_json,
    jax_session,
    load_detector,
    load_model,
    model_precision,
    output_table,
    print_table,
    read_for,
    say_seen,
)

if TYPE_CHECKING:
    import numpy as np

    from laminar.tables.drift import DriftReport
    from laminar.tables.explain import Reason

_FEW_DRAWS = 10  # draws that count, below which what is filled in is rough
_SHOWN = 10  # rows and tests that are printed

TopOption = Annotated[
    int, typer.Option("--top", help="Explain so many rows, the strangest ones; 0 for none.")
]


def detect(
    model: ModelArgument,
    table: TableArgument,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Table of the listed rows to write.")
    ] = None,
    fdr: Annotated[
        float, typer.Option("--fdr", help="Share of the list that may be normal rows, expected.")
    ] = 0.05,
    storey: Annotated[
        bool, typer.Option("--storey", help="Find more where many rows of TABLE are strange.")
    ] = False,
    confidence: Annotated[
        float | None,
        typer.Option("--confidence", help="P-values that hold given the calibration rows."),
    ] = None,
    top: TopOption = 20,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the rows of TABLE that are strange.

    Of the list at most the share --fdr is expected to be normal rows. Each row comes with its
    p-value and the three columns that make it strange.
    """
    if not 0 < fdr < 1:
        raise InputError(f"--fdr must lie between 0 and 1, not {fdr:g}.")
    if confidence is not None and not 0 < confidence < 1:
        raise InputError(f"--confidence must lie between 0 and 1, not {confidence:g}.")
    at_least("--top", top, 0)
    if out is not None:
        output_table(out, model, table)
    with jax_session(model_precision(model), no_cache, "looking for strange rows"):
        from laminar.tables.read import write_table

        detector = load_detector(model)
        rows = read_for(detector.model, model, table)
        say_seen(detector, rows)
        found = detector.detect(rows, fdr, storey=storey, confidence=confidence)
        order = found.order
        reasons = detector.explain(rows.take(order[:top])) if top and len(order) else []
        columns: dict[str, Any] = {
            "row": found.rows[order],
            "log_density": found.scores.log_density[order],
            "score": found.scores.score[order],
            "p_value": found.scores.p_value[order],
            "adjusted_p_value": found.adjusted[order],
        }
        if out is not None:
            write_table(out, columns | (reason_columns(reasons, len(order)) if top else {}))
    if as_json:
        listed = [
            {name: values[i] for name, values in columns.items()}
            | ({"columns": [reason._asdict() for reason in reasons[i]]} if i < len(reasons) else {})
            for i in range(len(order))
        ]
        emit_json(
            {
                "model": model,
                "table": table,
                "out": out,
                "rows": len(rows),
                "fdr": fdr,
                "calibration_rows": len(detector.calibration.scores),
                "least_p_value": found.least_p_value,
                "least_together": found.least_together,
                "listed": listed,
            }
        )
        return
    _print_detection(table, found, columns, reasons)
    if out is not None:
        print(f"written to {out}")


def _print_detection(table: str, found: Any, columns: dict[str, Any], reasons: list) -> None:
    count, rows = len(columns["row"]), len(found.rows)
    share = f"at a false-discovery rate of {found.level:g}"
    if not count:
        print(f"none of {rows:,} rows of {table} is listed {share}")
        if found.least_together > 1:
            print(
                f"(no p-value can be below {found.least_p_value:.2g}, so that "
                f"{found.least_together:,} rows would have to be as strange as any; a model fitted "
                "to more rows can tell fewer)"
            )
        return
    lines = [
        (
            f"{columns['row'][i]:,}",
            f"{columns['log_density'][i]:.3f}",
            f"{columns['p_value'][i]:.2g}",
            f"{columns['adjusted_p_value'][i]:.2g}",
            ", ".join(f"{r.column} ({r.excess:.1f})" for r in reasons[i])
            if i < len(reasons)
            else "",
        )
        for i in range(min(count, _SHOWN))
    ]
    print_table(
        f"{count:,} of {rows:,} rows of {table} are listed {share}",
        ("row", "log-density", "p", "adjusted p", "because of (nats below usual)"),
        lines,
    )
    if count > _SHOWN:
        print(f"and {count - _SHOWN:,} more")


def reason_columns(
    reasons: "list[list[Reason]]", rows: int, at: "np.ndarray | None" = None
) -> dict[str, Any]:
    """Columns of a table for the reasons of some rows: names, nats and p-values.

    Args:
        reasons: For each explained row its columns, at most three.
        rows: How many rows the table has.
        at: Where the explained rows stand in it; first when absent.
    """
    import numpy as np

    at = np.arange(len(reasons)) if at is None else at
    columns: dict[str, Any] = {}
    for place in range(3):
        names = np.full(rows, None, dtype=object)
        numbers = np.full((2, rows), np.nan)
        for row, found in zip(at, reasons, strict=True):
            if place < len(found):
                names[row] = found[place].column
                numbers[:, row] = found[place].excess, found[place].p_value
        columns[f"column_{place + 1}"] = names
        columns[f"excess_{place + 1}"] = numbers[0]
        columns[f"p_value_{place + 1}"] = numbers[1]
    return columns


def drift(
    known: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A table, or a model with its calibration rows.", show_default=False
        ),
    ],
    new: Annotated[
        str, typer.Argument(metavar="B", help="The table to compare.", show_default=False)
    ],
    level: Annotated[
        float, typer.Option("--level", help="Chance of naming any difference where none is.")
    ] = 0.05,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Table of all tests to write.")
    ] = None,
    seed: SeedOption = 0,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say whether table B has drifted away from A.

    Column by column, and as a whole; with a model in the place of A also by what the model says of
    each cell given its row. The exit status is 0 whatever the verdict.
    """
    if not 0 < level < 1:
        raise InputError(f"--level must lie between 0 and 1, not {level:g}.")
    check_seed(seed)
    if out is not None:
        output_table(out, known, new)
    report = _drift(known, new, level, seed, no_cache)
    tests = (*report.columns, *report.rows)
    if out is not None:
        import numpy as np

        from laminar.tables.read import write_table

        texts = {
            "what": np.array([t.what for t in tests], dtype=object),
            "test": np.array([t.test for t in tests], dtype=object),
        }
        numbers = ("statistic", "p_value", "adjusted")
        write_table(
            out, texts | {name: np.array([getattr(t, name) for t in tests]) for name in numbers}
        )
    if as_json:
        emit_json({**report.to_dict(), "out": out})
        return
    shown = (*report.columns[:_SHOWN], *report.rows)
    print_table(
        f"{new} ({report.new_rows:,} rows) beside {known} ({report.known_rows:,} rows)",
        ("what", "test", "difference", "p", "adjusted p"),
        [
            (t.what, t.test, f"{t.statistic:.3g}", f"{t.p_value:.2g}", f"{t.adjusted:.2g}")
            for t in shown
        ],
    )
    if len(report.columns) > _SHOWN:
        print(f"and {len(report.columns) - _SHOWN:,} more columns, none of which differs more")
    print(report.verdict)
    if out is not None:
        print(f"all tests written to {out}")


def _drift(known: str, new: str, level: float, seed: int, no_cache: bool) -> "DriftReport":
    if _is_table(known):
        from laminar.tables.drift import drift as compare
        from laminar.tables.read import read_table

        table = read_table(known)
        return compare(table, read_table(new, columns=table.names), level=level, seed=seed)
    with jax_session(model_precision(known), no_cache, "comparing"):
        from laminar.tables.drift import drift_from

        detector = load_detector(known)
        rows = read_for(detector.model, known, new)
        return drift_from(detector, rows, level=level, seed=seed, name=f"the table of {known}")


def _is_table(spec: str) -> bool:
    """Whether a name is that of a table, which its suffix tells, and not of a model."""
    from laminar.tables.read import split_key, table_suffix

    if spec.startswith("builtin:"):
        return True
    try:
        table_suffix(split_key(spec)[0])
    except InputError:
        return False
    return True


def impute(
    model: ModelArgument,
    table: TableArgument,
    out: Annotated[str, typer.Option("--out", "-o", help="Table to write.")],
    draws: Annotated[
        int, typer.Option("--draws", help="How many times each row is filled in.")
    ] = 1,
    seed: SeedOption = 0,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fill in the missing cells of TABLE.

    Each is drawn from its law given the cells of the row that are there. Cells are taken to be
    missing at random.
    """
    at_least("--draws", draws, 1)
    check_seed(seed)
    output_table(out, model, table)
    with jax_session(model_precision(model), no_cache, "imputing"):
        import jax.random as jr
        import numpy as np

        from laminar.tables.read import write_table

        flow = load_model(model)
        rows = read_for(flow, model, table)
        filled, effective = flow.impute(jr.key(seed), rows, draws)
        gaps = int(np.isnan(rows.select(flow.schema.names).values).sum())
        write_table(out, filled)
    least = float(np.min(effective)) if len(effective) else 0.0
    if as_json:
        emit_json(
            {
                "model": model,
                "table": table,
                "out": out,
                "rows": len(filled),
                "missing_cells": gaps,
                "draws": draws,
                "seed": seed,
                "least_effective_particles": least,
            }
        )
        return
    print(f"{gaps:,} missing cells of {len(rows):,} rows filled in; written to {out}")
    few = int((effective < _FEW_DRAWS).sum())
    if few:
        print(
            f"{few:,} rows hold cells that are improbable together, so that few draws count beside "
            f"them (the fewest: {least:.1f}); what is filled in there is rough"
        )
