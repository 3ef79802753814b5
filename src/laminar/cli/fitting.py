"""The commands that train: fit and compare."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laminar._errors import InputError
from laminar.cli.common import (
    FLOWS,
    BatchOption,
    ColumnsOption,
    GivenOption,
    JsonOption,
    KindOption,
    NoCacheOption,
    Precision,
    PrecisionOption,
    RateOption,
    SeedOption,
    StepsOption,
    TableArgument,
    TimeOption,
    check_flow,
    check_seed,
    check_training,
    emit_json,
    jax_session,
    names_of,
    output_file,
    pairs_of,
    print_table,
    same_file,
    say,
    with_error,
)

if TYPE_CHECKING:
    from laminar.tables.table import Table
    from laminar.train.checkpoint import Checkpoint


def fit(
    table: TableArgument,
    out: Annotated[str, typer.Option("--out", "-o", help="Where to write the model.")],
    columns: ColumnsOption = None,
    given: GivenOption = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Column of the rows' weights.")
    ] = None,
    kind: KindOption = None,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial", help="Let any columns be missing, held fixed or filled in later."
        ),
    ] = False,
    flow: Annotated[
        str, typer.Option("--flow", help=f"{', '.join(FLOWS[:-1])} or {FLOWS[-1]}.")
    ] = "auto",
    validation: Annotated[
        float,
        typer.Option(
            "--validation",
            help="Share of the rows held out, by which scores and strange rows are judged.",
        ),
    ] = 0.1,
    steps: StepsOption = None,
    time_limit: TimeOption = None,
    batch_size: BatchOption = None,
    learning_rate: RateOption = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            help="File that keeps the state of training until it ends; by default OUT.ckpt.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of a run that was cut.")
    ] = False,
    seed: SeedOption = 0,
    precision: PrecisionOption = "float32",
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fit a flow to the rows of TABLE and save it.

    A part of the rows is held out; the mean log-density of these is printed beside that of a
    Gaussian, in nats and in the units of the table.
    """
    options = check_training(steps, time_limit, batch_size, learning_rate)
    check_seed(seed)
    check_flow(flow)
    if not 0 < validation < 1:
        raise InputError(f"--validation must lie between 0 and 1, not {validation:g}.")
    checkpoint = checkpoint or f"{out}.ckpt"
    _check_outputs(table, out, checkpoint)
    rows = _read(table, columns, given, weights)
    options |= {"given": names_of("--given", given) or (), "weights": weights}
    options |= {"flow": flow, "seed": seed, "partial": partial, "validation": validation}
    options |= {"kinds": pairs_of("--kind", kind or [], "KIND")}
    with jax_session(precision, no_cache):
        report = _fit_and_save(rows, out, checkpoint, resume, precision, options)
    if as_json:
        emit_json(report)
    else:
        _print_fit(table, out, report)


def _check_outputs(table: str, out: str, checkpoint: str) -> None:
    """Refuse files that would overwrite each other: a checkpoint is deleted in the end."""
    output_file(out, table)
    output_file(checkpoint, table, option="--checkpoint")
    if same_file(out, checkpoint):
        raise InputError(f"--checkpoint {checkpoint} is the same file as --out; choose another.")
    # Flows that are trained in turn keep a file each beside it.
    for option, path in (("--out", out), ("TABLE", table)):
        folder, name = os.path.split(os.path.realpath(path))
        at, stem = os.path.split(os.path.realpath(checkpoint))
        if folder == at and name.startswith(f"{stem}.flow-"):
            raise InputError(
                f"{option} {path} has a name that --checkpoint {checkpoint} may take; choose "
                "another."
            )


def _fit_and_save(
    rows: "Table",
    out: str,
    checkpoint: str,
    resume: bool,
    precision: Precision,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Train, save the model, and delete the checkpoint; the report of `fit_table` and where."""
    from laminar import io
    from laminar.tables.flow import fit_table
    from laminar.train.checkpoint import Checkpoint

    state = Checkpoint(checkpoint, seconds=_CHECKPOINT_SECONDS)
    if state.files() and not resume:
        raise InputError(
            f"A run that was cut left the checkpoint {state.files()[0]}; add --resume to go on "
            "from it, or delete it."
        )
    if resume and not state.files():
        say(f"note: there is no checkpoint {checkpoint} to resume; training starts anew")
    options |= {"checkpoint": state, "resume": resume, "progress": True}
    try:
        model, report = fit_table(rows, notify=lambda note: say(f"note: {note}"), **options)
    except KeyboardInterrupt:
        _interrupted(state)
        raise typer.Exit(130) from None
    io.save(out, model, {"precision": precision, **report})
    for file in state.files():
        file.unlink()
    return {"model": out, "precision": precision, **report}


def _print_fit(table: str, out: str, report: dict[str, Any]) -> None:
    kept, all_columns = report["dimensions"], len(report["columns"])
    print(
        f"{report['flow']} fitted to {table}: {report['rows']:,} rows, {kept} of {all_columns} "
        f"columns, {report['seconds']:.1f} s"
    )
    print(f"held-out log-density   {with_error(report['held_out'])}")
    kinds = list(report["kinds"].values())
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"columns: {counted} (laminar info has each; --kind says it otherwise)")
    name = report["baseline"]["name"]
    print(f"{name:<22} {with_error(report['baseline'])}")
    print(f"({report['held_out_rows']:,} rows held out; nats a row, in the table's units)")
    parts = sorted(report["training"].get("parts", ()), key=lambda e: -e["weight"])
    for entry in parts[:4]:
        print(f"{entry['weight']:7.1%}  {entry['name']}")
    if parts[4:]:
        print(f"{sum(entry['weight'] for entry in parts[4:]):7.1%}  {len(parts) - 4} others")
    if report["training"].get("stop_reason") == "time limit":
        print("the time limit ended the training; more time may give a better density")
    print(f"saved to {out}")


def compare(
    table: TableArgument,
    flows: Annotated[
        str, typer.Option("--flows", help="Flows to compare, separated by commas.")
    ] = "auto,nsf,maf,realnvp",
    columns: ColumnsOption = None,
    given: GivenOption = None,
    kind: KindOption = None,
    steps: StepsOption = None,
    time_limit: TimeOption = None,
    batch_size: BatchOption = None,
    learning_rate: RateOption = None,
    seed: SeedOption = 0,
    precision: PrecisionOption = "float32",
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare flows with each other and baselines.

    A fifth of the rows is set aside; every density is fitted to the others and scored on these.
    Baselines are a Gaussian and scikit-learn's Gaussian mixture. Steps and time hold for each flow.
    """
    options = check_training(steps, time_limit, batch_size, learning_rate)
    check_seed(seed)
    names = names_of("--flows", flows) or []
    for name in names:
        check_flow(name)
    rows = _read(table, columns, given, None)
    with jax_session(precision, no_cache):
        from laminar.tables.compare import compare_table

        report = compare_table(
            rows,
            list(dict.fromkeys(names)),
            given=names_of("--given", given) or (),
            kinds=pairs_of("--kind", kind or [], "KIND"),
            seed=seed,
            notify=say,
            progress=True,
            **options,
        )
    if as_json:
        emit_json(report)
        return
    lines = []
    for entry in report["results"]:
        behind = ""
        if lines and entry["behind"] is not None:
            behind = f"{entry['behind']:.3f} ± {entry['behind_error']:.3f}"
        lines.append((entry["name"], with_error(entry), behind, f"{entry['seconds']:.1f}"))
    print_table(
        f"{table}: mean log-density of {report['test_rows']:,} rows set aside "
        f"({report['train_rows']:,} to learn from)",
        ("density", "nats a row", "behind the best", "seconds"),
        lines,
    )


_CHECKPOINT_SECONDS = 10.0


def _read(spec: str, columns: str | None, given: str | None, weights: str | None) -> "Table":
    """The columns to model and those named besides."""
    from laminar.tables.read import read_table

    extra = [*(names_of("--given", given) or []), *([weights] if weights else [])]
    return read_table(spec, names_of("--columns", columns), extra)


def _interrupted(state: "Checkpoint") -> None:
    if state.files():
        say(
            f"Interrupted; the checkpoint {state.files()[0]} is kept: run the same command with "
            "--resume to go on."
        )
    else:
        say("Interrupted before the first checkpoint; nothing was written.")
