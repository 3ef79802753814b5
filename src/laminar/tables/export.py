"""Export a table's flow: the compiled density and sampler, and a script that knows the units."""

import dataclasses
from pathlib import Path
from typing import Any

from laminar._errors import InputError
from laminar._files import PathLike
from laminar.export import write_export
from laminar.tables.flow import TableFlow

_SCRIPT = '''"""The density of rows, and new rows, in the units of the table; needs JAX and NumPy.

    import table
    table.log_density(rows)             # rows (N, D) with the columns table.COLUMNS -> (N,), nats
    table.sample(1000, seed=0)          # -> (1000, D)

A model with given columns takes them as (N, C), with the columns table.GIVEN:

    table.log_density(rows, given)
    table.sample(given=given, seed=0)   # one row for each
"""

import functools
import hashlib
import json
import pathlib

import numpy as np
import jax
import jax.export
import jax.numpy as jnp

_FOLDER = pathlib.Path(__file__).parent
_ABOUT = json.loads((_FOLDER / "export.json").read_text())
_DTYPE = _ABOUT["dtype"]
if _DTYPE == "float64":
    jax.config.update("jax_enable_x64", True)
_ALL, _ALL_GIVEN = _ABOUT["meta"]["columns"], _ABOUT["meta"]["given"]
COLUMNS = [column["name"] for column in _ALL]
GIVEN = [column["name"] for column in _ALL_GIVEN]


@functools.cache
def _load(name):
    data = (_FOLDER / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != _ABOUT["checksums"][name]:
        raise ValueError(f"{_FOLDER / name} is damaged, or of another export; export anew.")
    return jax.jit(jax.export.deserialize(bytearray(data)).call)


def _modelled(column):
    return column["kind"] not in ("constant", "ignored")


def _transformed(column, x):
    """A positive column's logarithm or a bounded one's logit, and the log of its slope."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low = column["low"] or 0.0
        above = np.where(x > low, x - low, np.nan)
        if column["kind"] == "positive":
            return np.log(above), -np.log(above)
        if column["kind"] == "bounded":
            below = np.where(x < column["high"], column["high"] - x, np.nan)
            width = column["high"] - column["low"]
            return np.log(above) - np.log(below), np.log(width) - np.log(above) - np.log(below)
    # A whole number or a date on a fine grid counts with the probability of its cell.
    cell = column["step"] > 0 and column["kind"] != "real"
    return x, np.full(x.shape, np.log(column["step"]) if cell else 0.0)


def _standardise(rows, columns):
    rows = np.asarray(rows, float)
    parts = [
        (_transformed(column, x)[0] - column["location"]) / column["scale"]
        for column, x in zip(columns, rows.T)
        if _modelled(column)
    ]
    with np.errstate(over="ignore"):
        return jnp.asarray(np.stack(parts, axis=1).astype(_DTYPE))


def _conditions(given):
    """None, or the standardised conditions in a tuple of arguments."""
    if not any(map(_modelled, _ALL_GIVEN)):
        return ()
    return (_standardise(given, _ALL_GIVEN),)


def _onto_grid(x, origin, step):
    """The nearest points origin + k * step, as short decimals where the grid has them."""
    points = origin + np.round((x - origin) / step) * step
    for digits in range(13):
        if round(step, digits) == step and round(origin, digits) == origin:
            return np.round(points, digits)
    return points


def _restore(column, z):
    """Back to the table's units, onto the values that a column of ties can take."""
    x = column["location"] + column["scale"] * np.asarray(z, float)
    if column["kind"] == "positive":
        x = (column["low"] or 0.0) + np.exp(x)
    if column["kind"] == "bounded":
        x = column["low"] + (column["high"] - column["low"]) / (1 + np.exp(-x))
    if column["step"] > 0:
        x = _onto_grid(x, column["origin"], column["step"])
    if column["levels"] and column["kind"] == "real":
        levels = np.array(column["levels"])
        nearest = levels[np.abs(x[:, None] - levels).argmin(axis=1)]
        near = np.abs(x - nearest) <= column["resolution"] / 2
        x = np.where(near | column["discrete"], nearest, x)
    return x


def log_density(rows, given=None):
    """The log-density of rows in nats; -inf where a constant column has another value."""
    rows = np.asarray(rows, float)
    log_p = _load("log_prob.bin")(_standardise(rows, _ALL), *_conditions(given))
    log_p = np.asarray(log_p, float)
    for column, cells in zip(_ALL, rows.T):
        if column["kind"] == "constant":
            log_p = np.where((cells == column["location"]) | np.isnan(cells), log_p, -np.inf)
        elif _modelled(column):
            # Outside the support the transformed value is NaN, and so is the log of its slope.
            slope = _transformed(column, cells)[1] - np.log(column["scale"])
            outside = np.isnan(slope) & ~np.isnan(cells)
            log_p = np.where(outside, -np.inf, log_p + slope)
    return log_p


def sample(n=None, seed=0, given=None):
    """New rows: n of them, or one for each row of given."""
    rows = _conditions(given) if given is not None else ()
    rows = rows or (jnp.zeros(len(given) if n is None else n, jnp.uint8),)
    z = np.asarray(_load("sample.bin")(jnp.array([0, seed], jnp.uint32), *rows))
    parts, position = [], 0
    for column in _ALL:
        if not _modelled(column):
            value = column["location"] if column["kind"] == "constant" else np.nan
            parts.append(np.full(len(z), value))
        else:
            parts.append(_restore(column, z[:, position]))
            position += 1
    return np.stack(parts, axis=1)
'''


def export_table(model: TableFlow, path: PathLike) -> Path:
    """Write a table's flow for use without laminar.

    The folder is that of `laminar.export.export` (standardised rows), with the columns in
    ``export.json`` and a script ``table.py`` that scores and draws rows in the table's units.

    Args:
        model: The flow.
        path: The folder to make; its parent must exist.

    Returns:
        The folder.

    Raises:
        InputError: If the folder cannot be used, the flow cannot be exported, or the columns are
            not all numbers without gaps.
        MissingExtraError: If flatbuffers is not installed.
    """
    schema = model.schema
    if schema.mixed or any(column.states_only or column.missing for column in schema.given):
        raise InputError(
            "Only models of numbers without gaps can be exported; this one has categories, counts "
            "or missing cells. Save it with laminar.save, and score with laminar."
        )
    meta: dict[str, Any] = {
        "columns": [dataclasses.asdict(column) for column in schema.columns],
        "given": [dataclasses.asdict(column) for column in schema.given],
    }
    return write_export(model.flow, path, ("cpu",), 0, meta, {"table.py": _SCRIPT.encode()})
