"""The commands that use a model: score, sample and check."""

import os
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
    pairs_of,
    read_for,
    say,
    say_seen,
    with_error,
)

if TYPE_CHECKING:
    from laminar.tables.anomaly import Detector
    from laminar.tables.flow import TableFlow
    from laminar.tables.table import Table


def score(
    model: ModelArgument,
    table: TableArgument,
    out: Annotated[
        str, typer.Option("--out", "-o", help="Table to write: columns row and log_density.")
    ],
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Add p-values, and the columns that make rows strange."),
    ] = False,
    top: Annotated[
        int, typer.Option("--top", help="With --explain: explain so many rows, the strangest ones.")
    ] = 20,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every row of TABLE.

    Writes the log-density of each row, in nats and in the units of the columns. With --explain also
    the default anomaly score, its conformal p-value, and for the strangest rows the three columns
    whose cells are least probable beside the others.
    """
    import numpy as np

    at_least("--top", top, 0)
    output_table(out, model, table)
    with jax_session(model_precision(model), no_cache, "scoring"):
        from laminar.tables.flow import weighted_mean
        from laminar.tables.read import write_table

        flow = load_model(model)
        rows = read_for(flow, model, table)
        log_p = flow.log_prob(rows)
        _ignored_conditions(flow, rows)
        gaps = int(flow.schema.new_gaps(rows).sum()) if rows.named else 0
        if gaps and not explain:
            say(
                f"note: {gaps:,} of {len(rows):,} rows have gaps in columns that had none in the "
                "fit: their log-density is that of the other cells alone."
            )
        columns = {"row": rows.rows, "log_density": log_p}
        if explain:
            detector = load_detector(model)
            say_seen(detector, rows)
            columns |= _explained(detector, rows, top)
        write_table(out, columns)
        outside = int(np.isneginf(log_p).sum())
        mean = weighted_mean(log_p)
    if as_json:
        emit_json({"model": model, "table": table, "out": out, **mean, "outside_support": outside})
        return
    known = mean["log_density"] is not None
    score = f", mean log-density {with_error(mean)} nats" if known else ""
    print(f"{len(rows):,} rows scored{score}; written to {out}")
    if outside:
        verb = "row lies" if outside == 1 else "rows lie"
        print(f"{outside:,} {verb} outside the support, with a log-density of -inf")


def _explained(detector: "Detector", rows: "Table", top: int) -> dict[str, Any]:
    """The columns that --explain adds; reasons are empty but for the strangest rows."""
    import numpy as np

    from laminar.cli.anomalies import reason_columns

    found = detector.score(rows)
    at = np.lexsort((found.score, found.p_value))[:top]
    reasons = detector.explain(rows.take(at)) if len(at) else []
    own = {"score": found.score, "p_value": found.p_value}
    return own | reason_columns(reasons, len(rows), at)


def sample(
    model: ModelArgument,
    n: Annotated[int, typer.Option("-n", help="Rows to draw, for each given row.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Table to write.")],
    given: Annotated[
        list[str] | None,
        typer.Option("--given", help="NAME=VALUE for each given column, or a table of given rows."),
    ] = None,
    fix: Annotated[
        list[str] | None,
        typer.Option("--fix", help="NAME=VALUE that all rows shall have: the others follow."),
    ] = None,
    seed: SeedOption = 0,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw new rows.

    Writes a table with the columns of the one that MODEL was fitted to.
    """
    if n < 1:
        raise InputError(f"-n must be at least 1, not {n}.")
    check_seed(seed)
    output_table(out, model, *(g for g in given or () if "=" not in g))
    with jax_session(model_precision(model), no_cache, "sampling"):
        import jax.random as jr

        from laminar.tables.read import write_table

        flow = load_model(model)
        conditions = _conditions(flow, model, given or [])
        count = n * (len(conditions) if conditions is not None and not _is_map(conditions) else 1)
        _refuse_too_many(count, len(flow.schema.names))
        fixed = pairs_of("--fix", fix, "VALUE") if fix else None
        drawn = flow.sample(jr.key(seed), n, conditions, fixed=fixed)
        write_table(out, drawn)
    if as_json:
        emit_json(
            {"model": model, "out": out, "rows": len(drawn), "columns": drawn.names, "seed": seed}
        )
        return
    print(f"{len(drawn):,} rows of {len(drawn.names)} columns written to {out}")


def _is_map(given: Any) -> bool:
    return isinstance(given, dict)


def _conditions(flow: "TableFlow", model: str, given: list[str]) -> Any:
    """Name → value, or a table, or None."""
    if not given:
        return None
    if len(given) == 1 and ("=" not in given[0] or os.path.exists(given[0])):
        if not flow.schema.given:
            raise InputError(f"{model} takes no condition; sample without --given.")
        return read_for(flow, model, given[0], given=False)
    return pairs_of("--given", given, "VALUE")


def _refuse_too_many(rows: int, columns: int) -> None:
    """Refuse more rows than memory holds, twice over for standardised and own units."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return
    most = memory // (32 * columns)
    if rows > most:
        raise InputError(
            f"{rows:,} rows of {columns} columns do not fit into memory; draw at most {most:,}."
        )


def _ignored_conditions(flow: "TableFlow", rows: Any) -> None:
    for column in flow.schema.given:
        if column.kind == "constant" and column.name in rows.names:
            others = int((rows.column(column.name) != column.location).sum())
            if others:
                say(
                    f"note: {others:,} rows differ from the only value of {column.name!r} that the "
                    f"model has seen ({column.location:g}), which is ignored as a condition."
                )


def check(
    model: ModelArgument,
    table: Annotated[
        str | None,
        typer.Argument(metavar="[TABLE]", help="Rows to check at; samples when absent."),
    ] = None,
    seed: SeedOption = 0,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check the mathematics of a model.

    Does it invert, is the log-determinant the Jacobian's, does the density integrate to one? At
    samples, and at rows of TABLE if one is given; without it a conditional model is checked at the
    medians of its given columns. The exit status is 1 when a check fails.
    """
    check_seed(seed)
    with jax_session(model_precision(model), no_cache, "checking"):
        import jax.numpy as jnp
        import jax.random as jr

        from laminar.diagnose import check as check_flow

        flow = load_model(model)
        rows, condition = None, None
        if table is not None:
            rows, condition = flow.batch(read_for(flow, model, table))
        elif flow.flow.cond_shape is not None:
            condition = jnp.zeros(flow.flow.cond_shape, flow.flow.dtype)
        report = check_flow(flow.flow, key=jr.key(seed), data=rows, condition=condition)
    if as_json:
        emit_json({"model": model, "table": table, **report.to_dict()})
    else:
        print(report)
    if not report.passed:
        raise typer.Exit(1)
