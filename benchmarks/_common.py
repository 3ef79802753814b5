"""What the benchmarks share: their options, the public arrays, and results that are not lost."""

import argparse
import datetime
import json
import os
import platform
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np

from laminar._version import __version__

_SAME = {"laminar": "laminar", "cpu": "", "cores": "cores:", "python": "Python", "system": ""}
"""What results of one file must share, with the word before each in a sentence."""


def parser(
    description: str, *, budget: str, out: Path, default: float = 3600
) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--budget", type=float, default=default, help=budget)
    old = made.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true", help="go on from the results already there")
    old.add_argument("--restart", action="store_true", help="replace the results already there")
    made.add_argument("--out", type=Path, default=out, help="where results go: %(default)s")
    made.add_argument(
        "--optional", action="store_true", help="skip, with success, if the data are not there"
    )
    return made


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas, as an option's type."""
    return tuple(map(int, text.split(",")))


numbers.__name__ = "numbers between commas"  # what argparse calls the type when it complains


def names_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A type of options: names with commas between them, each one that is known."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise ValueError(name)
        return names

    # The name stands in the message about a wrong value.
    parse.__name__ = f"list of {', '.join(known)}"
    return parse


def cores() -> int:
    """Cores that this process may use, or all where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict:
    """What figures hold for."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "laminar": __version__,
        "cpu": name,
        "cores": cores(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def missing(what: str, optional: bool) -> NoReturn:
    """Stop with one sentence: with success where the benchmark is one of several."""
    if optional:
        print(f"Skipped: {what}")
        raise SystemExit(0)
    raise SystemExit(what)


class Arrays:
    """The arrays of one file of the folder LAMINAR_DATA, read as they are asked for."""

    def __init__(self, name: str, optional: bool = False):
        folder = os.environ.get("LAMINAR_DATA", "")
        self.path, self.optional = Path(folder) / name, optional
        if not folder or not self.path.is_file():
            missing(
                f"{name} is not there: set LAMINAR_DATA to a folder that holds it "
                "(benchmarks/README.md says how to make it).",
                optional,
            )

    def __getitem__(self, key: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                if key in archive:
                    return archive[key]
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            missing(f"{self.path} cannot be read: {error}.", optional=False)
        missing(
            f"{self.path} has no array {key!r}; benchmarks/README.md names what it must hold.",
            self.optional,
        )


def guard(paths: list[Path], args: argparse.Namespace) -> None:
    """Refuse to replace results unless that was asked for; --restart removes them."""
    present = [path for path in paths if path.exists()]
    if args.restart:
        for path in present:
            path.unlink()
    elif present and not args.resume:
        raise SystemExit(
            f"{present[0]} exists: go on with --resume, replace it with --restart, or give "
            "another --out."
        )


def refuse_change(where: Path, written: dict, here: dict) -> None:
    """Refuse to go on with other options than those that the results were made with."""
    for name, value in here.items():
        if written.get(name) != value:
            option = "--" + name.replace("_", "-")
            raise SystemExit(
                f"{where} was made with {option} {written.get(name)}, not {value}: give the same "
                "options to resume, or --restart."
            )


def refuse_elsewhere(where: Path, written: dict, here: dict) -> None:
    """Refuse to go on with the results of another machine or another laminar (see `machine`)."""
    for name, word in _SAME.items():
        if written.get(name) != here[name]:
            old, new = (f"{word} {found.get(name)}".strip() for found in (written, here))
            raise SystemExit(
                f"{where} was made with {old}, not {new}: figures of one file must be comparable; "
                "give another --out, or --restart."
            )


def left_over(
    args: argparse.Namespace,
    records: list[dict],
    asked: dict,
    cells: Iterable,
    cell_of: Callable[[dict], object],
    failed: str = "error",
) -> tuple[list[dict], list]:
    """What stands of earlier records, and the cells that are not among them.

    Records of other options, or of another machine, are refused; what failed is tried again.
    """
    for record in records:
        refuse_change(args.out, record, asked)
        refuse_elsewhere(args.out, record.get("machine", {}), machine())
    records = [record for record in records if failed not in record]
    done = {cell_of(record) for record in records}
    return records, [cell for cell in cells if cell not in done]


def read_lines(path: Path) -> list[dict]:
    """The records of a file of JSON lines; what a killed run left half-written is skipped."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a record")
        except ValueError:
            print(f"{path}, line {number}: not a whole record; skipped.")
            continue
        records.append(record)
    return records


def end_last_line(path: Path) -> None:
    """Give a half-written last line its end, so that what is appended stands on its own."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
