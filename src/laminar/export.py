"""Write a flow as compiled functions that run with JAX alone, without laminar or Equinox.

`export` makes a folder:

    export.json   what it is: versions, event and condition shapes, dtype, `meta`, and the SHA-256
                  of the other files; written last, so that where it is the export is whole
    log_prob.bin  jax.export's serialisation of  log_prob(x[, condition])
    sample.bin    likewise of                    sample(key_data, rows_or_condition)
    README.md     how to call them

The number of rows n is symbolic, so one file serves every n:

    log_prob(x)                x (n, *shape) → (n,)
    log_prob(x, condition)     condition (n, *cond_shape)
    sample(key_data, rows)     key_data uint32[2], rows uint8[n] (only its length counts)
    sample(key_data, condition)  one event for each condition

Row i of a sample depends on the key and on i only, so a longer sample begins with the shorter one.
The parameters are constants in the files; a flow in float64 needs JAX in 64 bits to be called.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import export as jax_export

from laminar._errors import InputError, LaminarError, MissingExtraError
from laminar._files import PathLike, atomic_write, check_writable, temporary_name
from laminar._version import __version__
from laminar.density import AbstractDistribution, is_shape

FORMAT_VERSION = 1
_FILES = ("log_prob.bin", "sample.bin", "README.md", "table.py", "export.json")

_README = """# A normalizing flow as compiled functions

These files need JAX {jax} or newer (and flatbuffers), and nothing else.

```python
import pathlib
import jax
import jax.numpy as jnp
import jax.export
{x64}
folder = pathlib.Path("{folder}")
log_prob = jax.export.deserialize(bytearray((folder / "log_prob.bin").read_bytes())).call
sample = jax.export.deserialize(bytearray((folder / "sample.bin").read_bytes())).call

key_data = jnp.array([0, 42], jnp.uint32)  # the second word is the seed
{call}
```

x has shape (n, {shape}), log_density has shape (n,), in nats; the dtype is {dtype}.{note}
Row i of a sample depends only on the key and on i. Compile with jax.jit for speed.
"""


def export(
    flow: AbstractDistribution,
    path: PathLike,
    *,
    platforms: Sequence[str] = ("cpu",),
    vjp_order: int = 0,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Write `log_prob` and `sample` of a flow for use without laminar.

    Args:
        flow: The flow, or any distribution with an exact density.
        path: The folder to make; its parent must exist. An earlier export there is replaced.
        platforms: Where the functions may run, from ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``.
        vjp_order: How often the functions may be differentiated by their callers.
        meta: Anything JSON can express, kept in ``export.json``.

    Returns:
        The folder.

    Raises:
        InputError: If the folder cannot be used, or the flow holds something that cannot be
            exported.
        MissingExtraError: If flatbuffers, which jax.export needs, is not installed.

    Example:
        ```python
        export(flow, "exported")
        # Elsewhere, without laminar:
        data = bytearray(open("exported/log_prob.bin", "rb").read())
        log_density = jax.export.deserialize(data).call(x)
        ```
    """
    return write_export(flow, path, platforms, vjp_order, meta, {})


def write_export(
    flow: AbstractDistribution,
    path: PathLike,
    platforms: Sequence[str],
    vjp_order: int,
    meta: Mapping[str, Any] | None,
    more: Mapping[str, bytes],
) -> Path:
    """What `export` does, with more files that belong to the export, from `_FILES`."""
    _check(flow)
    folder = _usable_folder(path)
    try:
        text = json.dumps(dict(meta or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"meta must be what JSON can express: {error}.") from error
    files = {
        "log_prob.bin": _serialise(flow, _log_prob, "log_prob", platforms, vjp_order),
        "sample.bin": _serialise(flow, _sample, "sample", platforms, vjp_order),
        "README.md": _readme(flow, folder).encode(),
        **more,
    }
    description = {
        "format": "laminar export",
        "version": FORMAT_VERSION,
        "laminar": __version__,
        "jax": jax.__version__,
        "name": flow.name,
        "shape": flow.shape,
        "cond_shape": flow.cond_shape,
        "dtype": jnp.dtype(flow.dtype).name,
        "platforms": list(platforms),
        "vjp_order": vjp_order,
        "checksums": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "meta": json.loads(text),
    }
    folder.mkdir(exist_ok=True)
    # An earlier export ends here: no mixture of the two must pass for one.
    for name in ("export.json", "table.py"):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        atomic_write(folder / name, data)
    atomic_write(folder / "export.json", (json.dumps(description, indent=2) + "\n").encode())
    return folder


def _check(flow: Any) -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("flatbuffers", "export", "Exporting a flow") from error
    if not isinstance(flow, AbstractDistribution):
        raise InputError(
            f"export takes a flow or another distribution, not {type(flow).__name__}; of a "
            "TableFlow give its .flow."
        )
    if flow.exactness != "exact":
        raise InputError(f"{flow.name}: only exact densities can be exported.")


def _usable_folder(path: PathLike) -> Path:
    folder = Path(path)
    try:
        there = {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return check_writable(folder)
    except NotADirectoryError as error:
        raise InputError(f"{path} is a file; export writes a folder.") from error
    except OSError as error:
        return _unusable(path, error)
    if there and "export.json" not in there and not _cut_short(there):
        raise InputError(f"The folder {path} is not empty and not an earlier export.")
    for name in _FILES:
        check_writable(folder / name)
    return folder


def _unusable(path: PathLike, error: OSError) -> NoReturn:
    raise InputError(
        f"{os.fspath(path)[:200]} cannot be written: {error.strerror or error}."
    ) from error


def _cut_short(there: set[str]) -> bool:
    """Whether a folder holds what an export leaves when it is killed, and nothing else."""
    first = {"log_prob.bin", temporary_name("log_prob.bin")}
    ours = {*_FILES, *map(temporary_name, _FILES)}
    return bool(there & first) and there <= ours


def _log_prob(flow: AbstractDistribution) -> tuple[Callable, tuple]:
    """The function of rows and its symbolic arguments."""

    def log_prob(x, condition=None):
        # One event at a time: transforms are written for events, and the batch may be symbolic.
        def one(x, condition):
            finite = jnp.isfinite(x)
            log_p = flow._log_prob(jnp.where(finite, x, 0), condition)
            log_p = jnp.where(finite.all(), log_p, -jnp.inf)
            return jnp.where(jnp.isnan(x).any(), jnp.nan, log_p)

        return jax.vmap(one, in_axes=(0, None if condition is None else 0))(x, condition)

    (n,) = jax_export.symbolic_shape("n")
    arguments = [jax.ShapeDtypeStruct((n, *flow.shape), flow.dtype)]
    if flow.cond_shape is not None:
        arguments.append(_condition(flow, n))
    return log_prob, tuple(arguments)


def _sample(flow: AbstractDistribution) -> tuple[Callable, tuple]:
    """The sampler and its symbolic arguments."""

    def sample(key_data, rows):
        key = jr.wrap_key_data(key_data, impl="threefry2x32")
        condition = None if flow.cond_shape is None else rows
        count = jtu.tree_leaves(rows)[0].shape[0]

        def one(i, condition):
            return flow._sample(jr.fold_in(key, i), (), condition)

        index = jnp.arange(count, dtype=jnp.uint32)
        return jax.vmap(one, in_axes=(0, None if condition is None else 0))(index, condition)

    (n,) = jax_export.symbolic_shape("n")
    rows = jax.ShapeDtypeStruct((n,), jnp.uint8)
    if flow.cond_shape is not None:
        rows = _condition(flow, n)
    return sample, (jax.ShapeDtypeStruct((2,), jnp.uint32), rows)


def _condition(flow: AbstractDistribution, n: Any) -> Any:
    """Symbolic conditions: floating-point arrays in the tree of their shapes."""
    return jtu.tree_map(
        lambda shape: jax.ShapeDtypeStruct((n, *shape), flow.dtype),
        flow.cond_shape,
        is_leaf=is_shape,
    )


def _serialise(
    flow: AbstractDistribution,
    make: Callable[[AbstractDistribution], tuple[Callable, tuple]],
    name: str,
    platforms: Sequence[str],
    vjp_order: int,
) -> bytes:
    function, arguments = make(eqx.nn.inference_mode(flow))
    try:
        exported = jax_export.export(jax.jit(function), platforms=list(platforms))(*arguments)
        return bytes(exported.serialize(vjp_order=vjp_order))
    except LaminarError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()
        raise InputError(
            f"{flow.name}: {name} cannot be exported: {first[0] if first else error!r}"
        ) from error


def _readme(flow: AbstractDistribution, folder: Path) -> str:
    rows, extra, note = "jnp.zeros(1000, jnp.uint8)", "", ""
    if flow.cond_shape is not None:
        rows, extra = "condition", ", condition"
        note = f"\nThe condition has shape (n, …) with … as in {flow.cond_shape}."
    call = f"x = sample(key_data, {rows})\nlog_density = log_prob(x{extra})"
    double = jnp.dtype(flow.dtype).itemsize == 8
    return _README.format(
        jax=jax.__version__,
        x64='\njax.config.update("jax_enable_x64", True)' if double else "",
        folder=folder.name,
        call=call,
        shape=", ".join(map(str, flow.shape)),
        dtype=jnp.dtype(flow.dtype).name,
        note=note,
    )
