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


def _clipped(column, x):
    low, high = column["low"], column["high"]
    return x if low is None and high is None else np.clip(x, low, high)


def _on_grid(column):
    """Whether it counts with the probabilities of its values: whole numbers and dates."""
    return column["cell"] and column["step"] > 0


def _supports(column, x):
    """Whether values can occur, missing ones included."""
    low, high, step = column["low"], column["high"], column["step"]
    keep = np.ones(x.shape, bool)
    with np.errstate(invalid="ignore"):
        if column["kind"] in ("positive", "bounded"):
            keep = x > (low or 0.0)
            keep = keep if high is None else keep & (x < high)
        elif column["kind"] in ("integer", "datetime", "ordinal") and _on_grid(column):
            units = x - column["origin"]
            whole = np.abs(units - np.round(units)) <= 1e-6 * np.maximum(1, np.abs(units))
            keep = whole | (column["kind"] == "datetime")
            keep = keep if low is None else keep & (x >= low - step / 2)
            keep = keep if high is None else keep & (x <= high + step / 2)
    return keep | np.isnan(x)


def _transformed(column, x):
    """The logarithm of the distance from the lower end, or the logit between both."""
    low, high = column["ends"]
    if low is None:
        return x
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.log(np.maximum(x - low, 0.0))
        return t if high is None else t - np.log(np.maximum(high - x, 0.0))


def _log_slope(column, x):
    """The logarithm of the slope of the standardised value."""
    low, high = column["ends"]
    slope = np.full(x.shape, -np.log(column["scale"]))
    with np.errstate(divide="ignore", invalid="ignore"):
        if low is not None:
            slope = slope - np.log(x - low)
        if low is not None and high is not None:
            slope = slope - np.log(high - x) + np.log(high - low)
    return slope


def _placed(column, x):
    """Standardised values, and what their units bring to the log-density; -inf outside."""
    keep, gone = _supports(column, x), np.isnan(x)
    if _on_grid(column):
        step, unseen = column["step"], column["unseen"]
        near = _clipped(column, _onto_grid(x, column["origin"], step))
        term = _log_slope(column, near) + np.log(step)
        if unseen > 0:
            off = np.abs(x - near) > 1e-6 * np.maximum(step, np.abs(x))
            term += np.where(off, np.log(unseen) - np.log(step - 1), np.log1p(-unseen))
        x = np.where(keep, near, x)
    else:
        term = _log_slope(column, np.where(keep, x, np.nan))
    inside = np.where(keep, x, np.nan)
    z = (_transformed(column, inside) - column["location"]) / column["scale"]
    z = np.where(gone, np.nan, np.where(keep, z, 0.0))
    return z, np.where(keep, np.where(gone, 0.0, term), -np.inf)


def _standardise(rows, columns):
    """Standardised rows for the flow, and what the units bring to their log-densities."""
    placed = [_placed(c, x) for c, x in zip(columns, np.asarray(rows, float).T) if _modelled(c)]
    with np.errstate(over="ignore"):
        z = jnp.asarray(np.stack([z for z, _ in placed], axis=1).astype(_DTYPE))
    return z, sum(term for _, term in placed)


def _conditions(given):
    """None, or the standardised conditions in a tuple of arguments."""
    if not any(map(_modelled, _ALL_GIVEN)):
        return ()
    return _standardise(given, _ALL_GIVEN)[:1]


def _onto_grid(x, origin, step):
    """The nearest points origin + k * step, as short decimals where the grid has them."""
    points = origin + np.round((x - origin) / step) * step
    for digits in range(13):
        if round(step, digits) == step and round(origin, digits) == origin:
            return np.round(points, digits)
    return points


def _back(column, t):
    """The inverse of the logarithm or logit; what would reach an end stays inside."""
    low, high = column["ends"]
    if low is None:
        return t
    if high is None:
        with np.errstate(over="ignore"):
            return low + np.clip(np.exp(t), 5e-324, 1.7e308)
    rest = (high - low) * np.exp(-np.abs(t)) / (1.0 + np.exp(-np.abs(t)))
    inside = np.where(t > 0, high - rest, low + rest)
    return np.clip(inside, np.nextafter(low, np.inf), np.nextafter(high, -np.inf))


def _restore(column, z):
    """Back to the table's units, onto the values that a column of ties can take."""
    x = _back(column, column["location"] + column["scale"] * np.asarray(z, float))
    if column["step"] > 0:
        x = _onto_grid(x, column["origin"], column["step"])
    if _on_grid(column):
        x = _clipped(column, x)
    if column["step"] > 0 and column["kind"] in ("positive", "bounded"):
        x = np.maximum(x, (column["low"] or 0.0) + column["step"])
        x = x if column["high"] is None else np.minimum(x, column["high"] - column["step"])
    if column["levels"] and column["kind"] == "real":
        levels = np.array(column["levels"])
        nearest = levels[np.abs(x[:, None] - levels).argmin(axis=1)]
        near = np.abs(x - nearest) <= column["resolution"] / 2
        x = np.where(near | column["discrete"], nearest, x)
    return x


def log_density(rows, given=None):
    """The log-density of rows in nats; -inf where a constant column has another value."""
    rows = np.asarray(rows, float)
    z, terms = _standardise(rows, _ALL)
    log_p = np.asarray(_load("log_prob.bin")(z, *_conditions(given)), float)
    for column, cells in zip(_ALL, rows.T):
        if column["kind"] == "constant":
            same = (cells == column["location"]) | np.isnan(cells)
            terms = np.where(same, terms, -np.inf)
    # Rows outside the support were moved inside it, so what the flow says of them is finite.
    return np.where(np.isneginf(terms), -np.inf, log_p + terms)


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
        "columns": [dataclasses.asdict(c) | {"ends": c.ends} for c in schema.columns],
        "given": [dataclasses.asdict(c) | {"ends": c.ends} for c in schema.given],
    }
    return write_export(model.flow, path, ("cpu",), 0, meta, {"table.py": _SCRIPT.encode()})
