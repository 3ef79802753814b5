"""The commands that show: report and plot."""

from typing import Annotated

import typer

from laminar._errors import InputError
from laminar.cli.common import (
    JsonOption,
    ModelArgument,
    NoCacheOption,
    SeedOption,
    TableArgument,
    check_seed,
    emit_json,
    jax_session,
    load_model,
    model_precision,
    output_file,
    read_for,
    same_file,
)


def report(
    model: ModelArgument,
    table: TableArgument,
    out: Annotated[str, typer.Option("--out", "-o", help="Page to write, as report.html.")],
    title: Annotated[
        str | None, typer.Option("--title", help="Heading; by default the table's name.")
    ] = None,
    seed: SeedOption = 0,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a page about MODEL and TABLE.

    How the fit went, columns and pairs beside samples, calibration, the strangest rows, and the
    flow itself to be walked through. The page is one file and works offline. Given the table that
    MODEL was fitted to, calibration is judged by the rows that were held out.
    """
    check_seed(seed)
    output_file(out, model, table)
    if not out.lower().endswith((".html", ".htm")):
        raise InputError(f"{out}: a report is a page; give a name that ends in .html.")
    with jax_session(model_precision(model), no_cache, "writing the report"):
        import jax.random as jr

        from laminar.io import read_header
        from laminar.report.page import write_report

        flow = load_model(model)
        rows = read_for(flow, model, table)
        meta = read_header(model).meta
        numbers = write_report(flow, rows, out, key=jr.key(seed), meta=meta, title=title)
    if as_json:
        emit_json({"model": model, "table": table, "out": out, "seed": seed, **numbers})
        return
    which = "held out from the fit" if numbers["held_out"] else "of the table"
    print(
        f"{out} written, {numbers['bytes'] / 1e6:.1f} MB: {numbers['rows_shown']:,} rows beside "
        f"{numbers['samples']:,} samples, judged by {numbers['rows_judged']:,} rows {which}"
    )


def plot(
    model: ModelArgument,
    table: TableArgument,
    out: Annotated[
        str, typer.Option("--out", "-o", help="A .png or .svg file, or a folder for all kinds.")
    ],
    kind: Annotated[
        str | None, typer.Option("--kind", help="marginals, pairs, pit, path or fit.")
    ] = None,
    seed: SeedOption = 0,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw pictures of MODEL and TABLE.

    Columns and pairs beside samples, calibration, the path from base to rows, and the fit, as PNG
    or SVG files.
    """
    check_seed(seed)
    for other in (model, table):
        if same_file(out, other):
            raise InputError(f"--out {out} is the input itself; choose another file.")
    with jax_session(model_precision(model), no_cache, "drawing"):
        import jax.random as jr

        from laminar.io import read_header
        from laminar.report.pictures import check_kind, check_out, write_pictures

        chosen = check_kind(kind)
        check_out(out, chosen)
        flow = load_model(model)
        rows = read_for(flow, model, table)
        meta = read_header(model).meta
        files = write_pictures(flow, rows, out, key=jr.key(seed), meta=meta, kind=chosen)
    if as_json:
        emit_json({"model": model, "table": table, "files": files, "seed": seed})
        return
    print(f"{', '.join(files)} written")
