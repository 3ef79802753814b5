"""The commands that look and hand over: info, data and export."""

import math
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
    # The rows that the calibration keeps are no parameters.
    size = sum(
        math.prod(shape)
        for name, (_, shape) in header.arrays.items()
        if not name.startswith("calibration.")
    )
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
                "parameters": size,
                "columns": columns,
                "fit": meta,
            }
        )
        return
    print(f"{model}: written {header.created} by laminar {header.laminar} (JAX {header.jax})")
    for line in _history(meta, size):
        print(line)
    lines = [
        (
            column["name"],
            column["role"],
            column["kind"],
            column["range"],
            "missing" if column["missing"] else "",
            f"{column['resolution']:.6g}" if column["resolution"] else "",
        )
        for column in columns
    ]
    print_table("columns", ("name", "role", "kind", "about", "gaps", "resolution"), lines)


def _history(meta: dict[str, Any], parameters: int) -> list[str]:
    """How a model was fitted, as far as its file says: a model saved from Python says what it will.

    A report of `fit` has all of it, and a file without any of it gives only the parameters.
    """
    parts = []
    if isinstance(meta.get("table"), str):
        flow = meta.get("flow")
        parts.append(f"{flow if isinstance(flow, str) else 'a flow'} fitted to {meta['table']}")
    if isinstance(meta.get("rows"), int):
        parts.append(f"{meta['rows']:,} rows")
    parts += [f"seed {meta['seed']}"] if isinstance(meta.get("seed"), int) else []
    parts += [meta["precision"]] if isinstance(meta.get("precision"), str) else []
    lines = [", ".join([*parts, f"{parameters:,} parameters"])]
    baseline = meta.get("baseline")
    other = str(baseline.get("name")) if isinstance(baseline, dict) else ""
    shown = [
        f"{what} {with_error(meta[name])}"
        for what, name in (("held-out log-density", "held_out"), (other, "baseline"))
        if _is_score(meta.get(name))
    ]
    if shown:
        lines.append(f"{', '.join(shown)} nats a row")
    return lines


def _is_score(value: Any) -> bool:
    if not isinstance(value, dict) or not {"log_density", "error"} <= set(value):
        return False
    numbers = [value["log_density"], value["error"]]
    return numbers[0] is None or all(isinstance(number, int | float) for number in numbers)


def _column(column: Any, role: str) -> dict[str, Any]:
    import numpy as np

    return {
        "name": column.name,
        "role": role,
        "kind": column.kind,
        "range": _range(column),
        "location": column.location,
        "scale": column.scale,
        "resolution": column.resolution,
        "missing": column.missing,
        "categories": [str(cell) for cell in column.cells.decode(np.asarray(column.codes))],
    }


def _range(column: Any) -> str:
    """A column's values in a few words: its categories, or where the middle of them lies."""
    import numpy as np

    from laminar.tables.table import listing

    if column.states_only:
        cells = column.cells.decode(np.asarray([*column.codes, *column.rare]))
        return listing([str(cell) for cell in cells], 4)
    if column.kind == "ignored":
        return ""
    if column.kind == "constant":
        return "empty" if np.isnan(column.location) else _shown(column, column.location)
    middle = column.unstandardise(np.zeros(1))[0]
    spread = column.unstandardise(np.array([-1.0, 1.0]))
    if column.on_grid and (column.low, column.high) != (None, None):
        spread = np.clip(spread, column.low, column.high)
    if column.cells.kind == "datetime":
        return " to ".join(_shown(column, x) for x in spread)
    return f"{middle:.4g}, mostly {spread[0]:.4g} to {spread[1]:.4g}"


def _shown(column: Any, x: float) -> str:
    import numpy as np

    if column.cells.kind == "integer":
        return f"{x:g}"
    cell = column.cells.decode(np.asarray([x]))[0]
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


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
    with jax_session(model_precision(model), no_cache, "exporting"):
        from laminar.tables.export import export_table

        folder = export_table(load_model(model), out)
        files = sorted(path.name for path in folder.iterdir())
    if as_json:
        emit_json({"model": model, "out": out, "files": files})
        return
    print(f"{', '.join(files)} written to {out}")
