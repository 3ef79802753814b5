"""What the commands share: options, output, checks of values, and how JAX is set up."""

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from laminar._errors import InputError

if TYPE_CHECKING:
    from laminar.tables.anomaly import Detector
    from laminar.tables.flow import TableFlow
    from laminar.tables.table import Table

Precision = Literal["float32", "float64"]

_MOST_STEPS = 2**31 - 2  # as in `laminar.train.state`, which loads JAX
FLOWS = (
    "auto",
    "nsf",
    "maf",
    "iaf",
    "realnvp",
    "residual",
    "gaussianization",
    "triangular_spline",
    "nice",
    "naf",
    "bnaf",
    "planar",
    "radial",
    "sylvester",
)
"""What --flow takes: ``auto`` and the names of `laminar.zoo.BUILDERS`, without loading those."""

_CACHE_LIMIT = 2**30

TableArgument = Annotated[
    str, typer.Argument(metavar="TABLE", help="A table file, or builtin:NAME.", show_default=False)
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A file written by fit.", show_default=False)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Neither read nor keep compiled programs.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="From 0 to 4294967295.")]
GivenOption = Annotated[
    str | None, typer.Option("--given", help="Columns to condition on, separated by commas.")
]
ColumnsOption = Annotated[
    str | None,
    typer.Option("--columns", help="Columns to model, separated by commas; all when absent."),
]
KindOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        help="NAME=KIND where it is not to be inferred: real, positive, bounded:LOW:HIGH, integer, "
        "ordinal, boolean, categorical, datetime or ignored.",
    ),
]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Steps of gradient descent.")]
TimeOption = Annotated[
    float | None, typer.Option("--time-limit", help="Seconds to train for, in all.")
]
BatchOption = Annotated[int | None, typer.Option("--batch-size", help="Rows in one step.")]
RateOption = Annotated[float | None, typer.Option("--learning-rate", help="Its highest value.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Of all computation.")]


# ---------------------------------------------------------------------------------------- output


def fail(message: str, as_json: bool = False) -> int:
    """Print an error as one line on standard error (and as JSON on stdout); the status is 2."""
    line = " ".join(message.split())
    if as_json:
        print(json.dumps({"error": line}, ensure_ascii=False))
    print(f"laminar: {line}", file=sys.stderr)
    return 2


def say(message: str) -> None:
    """Print a remark on standard error."""
    print(message, file=sys.stderr, flush=True)


def emit_json(result: Mapping[str, Any]) -> None:
    """Print a result as one JSON object; numbers that JSON lacks become null."""
    print(json.dumps(_plain(result), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; columns after the first whose cells are numbers stand right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    grid = RichTable(box=box.SIMPLE)
    for position, head in enumerate(heads):
        cells = [row[position] for row in rows]
        right = position > 0 and all(not cell or cell[0] in "-+.0123456789±" for cell in cells)
        grid.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    # Where the output is no terminal there is no width to fit into.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(title, style="bold", soft_wrap=True)
    console.print(grid)


def with_error(score: Mapping[str, Any]) -> str:
    """A mean log-density with its standard error, as text."""
    if score["log_density"] is None:
        return "not finite"
    return f"{score['log_density']:.3f} ± {score['error']:.3f}"


# -------------------------------------------------------------------------------- values of options


def at_least(name: str, value: float | None, least: float) -> None:
    """Refuse an option that is below its least value or not finite."""
    if value is not None and not (math.isfinite(value) and value >= least):
        raise InputError(f"{name} must be at least {least:g}, not {value:g}.")


def positive(name: str, value: float | None) -> None:
    """Refuse an option that is not a positive finite number."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be a positive number, not {value:g}.")


def check_seed(seed: int) -> None:
    """Refuse a seed that is no 32-bit number."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must lie between 0 and {2**32 - 1}, not {seed}.")


def check_training(
    steps: int | None, seconds: float | None, batch_size: int | None, rate: float | None
) -> dict[str, Any]:
    """The options of training that were given, checked."""
    at_least("--steps", steps, 1)
    if steps is not None and steps > _MOST_STEPS:
        raise InputError(f"--steps must be at most {_MOST_STEPS}, not {steps}.")
    positive("--time-limit", seconds)
    at_least("--batch-size", batch_size, 1)
    positive("--learning-rate", rate)
    if rate is not None and rate > 10:
        raise InputError(f"--learning-rate must be at most 10, not {rate:g}; try 0.001.")
    options = {
        "steps": steps,
        "time_limit": seconds,
        "batch_size": batch_size,
        "learning_rate": rate,
    }
    return {name: value for name, value in options.items() if value is not None}


def check_flow(name: str) -> None:
    """Refuse a flow that there is none of, before JAX is loaded."""
    if name not in FLOWS:
        import difflib

        near = difflib.get_close_matches(name, FLOWS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(FLOWS)}."
        raise InputError(f"There is no flow named {name!r}; {hint}")


def names_of(option: str, text: str | None) -> list[str] | None:
    """Names separated by commas; a name that holds a comma is put in double quotes."""
    if text is None:
        return None
    import csv

    names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]
    if not names or not all(names):
        raise InputError(f"{option} needs names separated by commas, as in {option} a,b.")
    return names


def pairs_of(option: str, texts: Sequence[str], what: str) -> dict[str, str]:
    """Name → value, from NAME=VALUE, also where several stand in one option with commas between."""
    found: dict[str, str] = {}
    for text in texts:
        parts = text.split(",")
        for pair in parts if all("=" in part for part in parts) else [text]:
            name, mark, value = pair.rpartition("=")
            name, value = name.strip(), value.strip()
            if not mark or not name or not value:
                raise InputError(
                    f"{option} {pair!r} is not NAME={what}; write for instance "
                    f"{option} {name or 'a'}={_EXAMPLES[what]}."
                )
            if name in found:
                raise InputError(f"{option} names {name!r} twice; give one value.")
            found[name] = value
    return found


_EXAMPLES = {"VALUE": "1.5", "KIND": "categorical"}


def output_file(path: str, *inputs: str, option: str = "--out") -> None:
    """Refuse an output that cannot be written or that is one of the inputs, before any work."""
    from laminar._files import check_writable

    check_writable(path)
    for other in inputs:
        if same_file(path, other):
            raise InputError(f"{option} {path} is the input itself; choose another file.")


def same_file(a: str, b: str) -> bool:
    """Whether two paths, or names of tables, lead to one file, which need not exist."""
    from laminar.tables.read import split_key

    paths = [os.path.realpath(split_key(path)[0]) for path in (a, b)]
    if paths[0] == paths[1]:
        return True
    # Two links to one file; and on some disks A and a.
    return os.path.exists(paths[0]) and os.path.exists(paths[1]) and os.path.samefile(*paths)


def output_table(path: str, *inputs: str) -> None:
    """The same for a table, whose suffix must be one that can be written."""
    from laminar.tables.read import table_suffix

    table_suffix(path)
    output_file(path, *inputs)


# -------------------------------------------------------------------------------------------- JAX


@contextlib.contextmanager
def jax_session(
    precision: Precision, no_cache: bool = False, doing: str | None = None
) -> Iterator[None]:
    """Set the precision, and keep compiled programs for the next run; all settings are put back.

    Args:
        precision: Of all computation.
        no_cache: Whether to neither read nor keep compiled programs.
        doing: What a terminal shows meanwhile; nothing where the command shows its own progress.
    """
    import jax

    with contextlib.ExitStack() as stack:
        directory = None if no_cache else _cache_directory()
        if directory is not None:
            stack.enter_context(_compilation_cache(directory))
        stack.enter_context(jax.enable_x64(precision == "float64"))
        if doing is not None:
            stack.enter_context(_working(doing))
        stack.enter_context(_warnings_as_notes())
        yield


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """What the library warns of is a remark here, without the lines of code it came from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module=r"laminar\.")
        warnings.showwarning = lambda message, *_, **__: say(f"note: {message}")
        yield


@contextlib.contextmanager
def _working(doing: str) -> Iterator[None]:
    """A line on standard error that moves, where that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    shown = Spinner("dots", f"{doing} …")
    # What is printed on standard output must not be turned to standard error.
    with Live(shown, console=Console(stderr=True), transient=True, redirect_stdout=False):
        yield


@contextlib.contextmanager
def _compilation_cache(directory: str) -> Iterator[None]:
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    settings = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
        "jax_raise_persistent_cache_errors": False,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        reset_cache()  # which may have been opened elsewhere
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def _cache_directory() -> str | None:
    """A folder that can be written, or None.

    ``LAMINAR_CACHE_DIR`` names it, or turns the cache off when empty or "off".
    """
    chosen = os.environ.get("LAMINAR_CACHE_DIR")
    if chosen is not None and chosen.strip().lower() in ("", "off", "none", "0"):
        return None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(chosen) if chosen else Path(home) / "laminar"
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        _trim(directory)
    except (OSError, RuntimeError):
        return None
    return str(directory)


def _trim(directory: Path) -> None:
    """Delete the programs that were not used for longest when they take more than a gigabyte."""
    entries = []
    for entry in os.scandir(directory):
        if entry.is_file():
            stat = entry.stat()
            entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, entry.path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= _CACHE_LIMIT:
            return
        os.unlink(path)
        total -= size


# ------------------------------------------------------------------------------- models and tables


def model_precision(path: str) -> Precision:
    """The precision a model was fitted in; a file that is no model is an error here already."""
    from laminar.io import read_header

    # What a calibration keeps of a table is in float64 whatever the model computes in.
    arrays = read_header(path).arrays.items()
    double = any(d == "float64" for name, (d, _) in arrays if not name.startswith("calibration."))
    return "float64" if double else "float32"


def load_model(path: str) -> "TableFlow":
    """A model that `fit` wrote."""
    from laminar import io
    from laminar.tables.anomaly import Detector
    from laminar.tables.flow import TableFlow

    model = io.load(path)
    model = model.model if isinstance(model, Detector) else model
    if not isinstance(model, TableFlow):
        raise InputError(
            f"{path} holds a {type(model).__name__} and not a table's flow; load it in Python with "
            f"laminar.load."
        )
    return model


def load_detector(path: str) -> "Detector":
    """A model that `fit` wrote, with the calibration it carries."""
    from laminar import io
    from laminar.tables.anomaly import Detector

    return Detector.of(io.load(path), path)


def say_seen(detector: "Detector", rows: "Table") -> None:
    """Remark on rows whose p-values mean little, or that have none."""
    unscored = int(detector.model.schema.new_gaps(rows).sum())
    if unscored:
        say(
            f"note: {unscored:,} of {len(rows):,} rows have gaps in columns that had none in the "
            "fit, and so no score and no p-value; fill them in first, as laminar impute does."
        )
    seen = int(detector.calibration.seen(rows).sum())
    if 2 * seen > len(rows):
        say(
            f"note: {seen:,} of {len(rows):,} rows are among those that the model was fitted to; "
            "p-values are for new rows, and these look less strange than they are."
        )


def read_for(model: "TableFlow", path: str, spec: str, given: bool = True) -> "Table":
    """The columns of a table that a model needs."""
    from laminar.tables.read import read_table, split_key, table_suffix
    from laminar.tables.table import UnknownColumnError, listing

    schema = model.schema
    needed = schema.order if given else schema.given_names
    if not given:
        what = f"{path} is conditioned on {listing(needed)}"
    else:
        what = f"{path} needs {listing(needed)}"
    if not spec.startswith("builtin:"):
        file, _ = split_key(spec)
        if not os.path.isfile(file) or table_suffix(file) in (".npy", ".npz"):
            return read_table(spec)  # its columns may have no names to be chosen by
    unused = {column.name for column in schema.columns if column.kind == "ignored"}
    try:
        try:
            return read_table(spec, columns=needed)
        except UnknownColumnError:
            if not unused:
                raise
            # An identifier is kept where it is there, and not needed.
            return read_table(spec, columns=[name for name in needed if name not in unused])
    except UnknownColumnError as error:
        raise InputError(f"{error} The model {what}.") from None
