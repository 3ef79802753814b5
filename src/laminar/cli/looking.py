"""The commands that look and hand over: info, data and export."""

from typing import Annotated, Any

import typer

from laminar.cli.common import (
    JsonOption,
    ModelArgument,
    NoCacheOption,
    emit_json,
    jax_session,
    load_model,
    model_precision,
    print_table,
    with_error,
)


def info(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Say what a model is.

    Its columns, how it was fitted, and what wrote it.
    """
    with jax_session(model_precision(model), no_cache=True):
        from laminar.io import read_header

        header = read_header(model)
        flow = load_model(model)
    meta = header.meta
    columns = [_column(column, "modelled") for column in flow.schema.columns]
    columns += [_column(column, "given") for column in flow.schema.given]
    if as_json:
        emit_json(
            {
                "model": model,
                "laminar": header.laminar,
                "jax": header.jax,
                "equinox": header.equinox,
                "format_version": header.format_version,
                "created": header.created,
                "parameters": header.size,
                "columns": columns,
                "fit": meta,
            }
        )
        return
    print(f"{model}: written {header.created} by laminar {header.laminar} (JAX {header.jax})")
    if "table" in meta:
        print(
            f"{meta['flow']} fitted to {meta['table']}, {meta['rows']:,} rows, seed "
            f"{meta['seed']}, {meta['precision']}, {header.size:,} parameters"
        )
        print(
            f"held-out log-density {with_error(meta['held_out'])}, a Gaussian's "
            f"{with_error(meta['gaussian'])} nats a row"
        )
    lines = [
        (
            column["name"],
            column["role"],
            column["kind"],
            f"{column['location']:.6g}",
            "" if column["kind"] == "constant" else f"{column['scale']:.6g}",
            f"{column['resolution']:.6g}" if column["resolution"] else "",
        )
        for column in columns
    ]
    print_table("columns", ("name", "role", "kind", "location", "scale", "resolution"), lines)


def _column(column: Any, role: str) -> dict[str, Any]:
    return {
        "name": column.name,
        "role": role,
        "kind": column.kind,
        "location": column.location,
        "scale": column.scale,
        "resolution": column.resolution,
    }


def data(as_json: JsonOption = False) -> None:
    """List the built-in tables, to be named as builtin:NAME."""
    from laminar.tables.builtin import BUILTIN

    if as_json:
        emit_json(
            {
                "tables": [
                    {
                        "name": f"builtin:{name}",
                        "rows": table.rows,
                        "columns": table.columns,
                        "extra_column": table.extra,
                        "about": table.about,
                    }
                    for name, table in BUILTIN.items()
                ]
            }
        )
        return
    lines = [
        (f"builtin:{name}", f"{table.rows:,}", str(table.columns), table.about)
        for name, table in BUILTIN.items()
    ]
    print_table("built-in tables", ("name", "rows", "columns", "what"), lines)
    print(
        "The real ones also have a column target, which is read only when named (--given target)."
    )


def export(
    model: ModelArgument,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write to.")],
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model for use without laminar.

    The density and the sampler become programs that run on JAX alone, and table.py calls them in
    the units of the table.
    """
    with jax_session(model_precision(model), no_cache):
        from laminar.tables.export import export_table

        folder = export_table(load_model(model), out)
        files = sorted(path.name for path in folder.iterdir())
    if as_json:
        emit_json({"model": model, "out": out, "files": files})
        return
    print(f"{', '.join(files)} written to {out}")
