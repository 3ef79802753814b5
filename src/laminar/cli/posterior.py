"""The command posterior: a model of the user's own file, fitted, judged and drawn."""

import contextlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from laminar._errors import InputError, LaminarError
from laminar.cli.common import (
    JsonOption,
    NoCacheOption,
    Precision,
    PrecisionOption,
    SeedOption,
    at_least,
    check_seed,
    emit_json,
    jax_session,
    positive,
    print_table,
    say,
)

_PICTURES = 1  # sets the keys of pictures apart from those of the fit


def posterior(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL.py:NAME",
            help="A Python file, which is run, and in it a NumPyro model or a Target.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", help="A JSON object of the model's arguments by name."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="A folder for the flow, the draws, the summary and pictures."),
    ] = None,
    flow: Annotated[
        str,
        typer.Option(
            "--flow", help="auto, normal, nsf, coupling, iaf, realnvp, planar, radial or sylvester."
        ),
    ] = "auto",
    steps: Annotated[int, typer.Option("--steps", help="Most steps of training.")] = 3_000,
    draws: Annotated[int, typer.Option("--draws", help="Draws for the verdict.")] = 10_000,
    starts: Annotated[int, typer.Option("--starts", help="Climbs from dispersed points.")] = 16,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", help="Seconds after which no stage begins.")
    ] = None,
    seed: SeedOption = 0,
    precision: PrecisionOption = "float32",
    as_json: JsonOption = False,
    no_cache: NoCacheOption = False,
) -> None:
    """Fit a flow to a posterior, and say whether it can be trusted.

    The file is run as Python, so use only your own.
    """
    check_seed(seed)
    at_least("--steps", steps, 6)
    at_least("--draws", draws, 400)
    at_least("--starts", starts, 1)
    positive("--time-limit", time_limit)
    file, name = _split(model)
    arguments = {} if data is None else _read_arguments(data)
    if out is not None:
        _check_folder(out)
    from laminar.inference.posterior import COLUMNS

    with jax_session(precision, no_cache), _importable(file.resolve().parent):
        found = _fit(
            _load(file, name),
            name,
            arguments,
            {
                "flow": flow,
                "steps": steps,
                "draws": draws,
                "starts": starts,
                "time_limit": time_limit,
            },
            seed,
            file,
        )
        written = [] if out is None else _write(found, Path(out), model, seed, precision)
    if as_json:
        emit_json({"model": model, **found.to_dict(), "files": written})
        return
    rows = [(row["name"], *(f"{row[c]:.4g}" for c in COLUMNS)) for row in found.summary()]
    print_table(model, ("", *COLUMNS), rows)
    for line in found.figures(), str(found.verdict), *found.remarks:
        print(line)
    if written:
        print(f"Written to {out}: {', '.join(written)}.")


def _split(model: str) -> tuple[Path, str]:
    file, colon, name = model.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise InputError(f"{model} names no function; give FILE.py:NAME, as model.py:model.")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"There is no file {file}.")
    return path, name


def _read_arguments(data: str) -> dict[str, Any]:
    """The arguments of a JSON file; lists become arrays."""
    import numpy as np

    try:
        found = json.loads(Path(data).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{data} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{data} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{data} must hold one JSON object, arguments by name.")

    def convert(name: str, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise InputError(f"{data}: {name} has rows of different lengths.") from error
        if array.dtype.kind not in "biuf":
            raise InputError(f"{data}: {name} must hold numbers.")
        return array

    return {name: convert(name, value) for name, value in found.items()}


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours, as a script can, also while its functions run."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _load(file: Path, name: str) -> Any:
    """The object of this name in the user's file, which is run."""
    spec = importlib.util.spec_from_file_location(f"_laminar_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and annotations look things up
    try:
        spec.loader.exec_module(module)
    except LaminarError:
        raise
    except Exception as error:
        raise InputError(_where(file, error)) from error
    if not hasattr(module, name):
        own = [
            n
            for n, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__ and n[0] != "_"
        ]
        listed = f"; it has {', '.join(own[:8])}" if own else ""
        raise InputError(f"{file} has no {name}{listed}.")
    return getattr(module, name)


def _fit(model: Any, name: str, arguments: dict, options: dict, seed: int, file: Path) -> Any:
    import jax.random as jr

    from laminar.inference import Target, as_target, fit_posterior

    if isinstance(model, Target):
        if arguments:
            raise InputError(f"{name} is a ready target, so --data has no use.")
        target = model
    else:
        if not callable(model):
            raise InputError(f"{name} in {file} is neither a function nor a Target.")
        _check_arguments(model, name, arguments)
        try:
            target = as_target(model, **arguments)
        except LaminarError:
            raise
        except Exception as error:
            raise InputError(_where(file, error)) from error
    return fit_posterior(jr.key(seed), target, **options)


def _check_arguments(model: Any, name: str, arguments: dict[str, Any]) -> None:
    try:
        inspect.signature(model).bind(**arguments)
    except TypeError as error:
        raise InputError(
            f"{name} does not fit the data given: {error}; a log density is given as a Target, by "
            "as_target(function, example=…)."
        ) from error


def _where(file: Path, error: BaseException) -> str:
    """An error in one sentence, with the last line of the user's file that led to it."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == file.resolve()
    ]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    at = f", line {lines[-1]}" if lines else ""
    words = str(error).strip().splitlines()
    return f"{file}{at}: {type(error).__name__}: {words[0] if words else ''}"


def _check_folder(out: str) -> None:
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {out} is a file; give a folder.")
    # It is made when there is something to put in it.
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--out {out} cannot be made: {above} cannot be written to.")


def _write(found: Any, out: Path, model: str, seed: int, precision: Precision) -> list[str]:
    """Write everything into the folder, each file whole or not at all; the names of the files."""
    import jax.random as jr

    from laminar import io
    from laminar._errors import MissingExtraError
    from laminar._files import atomic_write
    from laminar.tables.read import write_table

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error.strerror}.") from error
    about = {"model": model, "seed": seed, "precision": precision}
    text = json.dumps({**about, **found.to_dict()}, ensure_ascii=False, indent=1)
    atomic_write(out / "summary.json", (text + "\n").encode())
    io.save(out / "flow.lam", found.flow, meta=about)
    table = dict(zip(found.target.names, found.columns().T, strict=True))
    write_table(out / "draws.csv", {**table, "weight": found.weights})
    names = ["summary.json", "flow.lam", "draws.csv"]
    try:
        from laminar.flow import Flow
        from laminar.report.plots import plot_path
        from laminar.report.posterior import plot_posterior

        plot_posterior(found, out / "posterior.png")
        names.append("posterior.png")
        if isinstance(found.flow, Flow) and found.target.dim > 1 and found.weights.sum() > 0:
            draw_key, plot_key = jr.split(jr.fold_in(jr.key(seed), _PICTURES))
            data, names_of = found.unconstrained(draw_key, 2_000), found.target.coordinates
            head = "weighted draws (as data) and the flow's own, unconstrained"
            plot_path(found.flow, data, out / "path.png", key=plot_key, names=names_of, title=head)
            names.append("path.png")
    except MissingExtraError as error:
        say(f"No pictures: {error}")
    return names
