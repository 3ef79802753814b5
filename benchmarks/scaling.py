"""What laminar's time, memory and compilation cost as rows, dimensions and layers grow.

An autoregressive neural spline flow, hidden 128 × 2, 8 bins; 5 layers and 8 dimensions unless these
are swept. Every point is measured in a process of its own.

- rows: log_prob of ever more rows in one call, which cuts them into chunks itself; and training
  from a file that the process never holds. The system still holds it, as far as it can, since it
  was written a moment ago: no disk is waited for.
- dimensions and layers: log_prob, sampling, and a training step on 512 rows.

Time is per row, and of a training step per row of its batch. Memory is the most that the process
comes to hold beyond what it held once the program was compiled; the rows and the result are in it
(in training what `fit` makes of the rows), pages of mapped files are not. MB are millions of bytes.
Compilation is tracing and compiling.

    python benchmarks/scaling.py [--quick] [--budget 120] [--resume] [--picture scaling.png]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import _common

from laminar._files import atomic_write
from laminar._version import __version__

HERE = Path(__file__).parent
WIDTH, LAYERS, DIM = 128, 5, 8
FULL = {
    "rows": (10**3, 10**4, 10**5, 10**6, 10**7),
    "dim": (2, 8, 32, 128, 512),
    "layers": (1, 2, 4, 8, 16, 32, 64),
}
QUICK = {"rows": (10**3, 10**5), "dim": (2, 8, 32), "layers": (1, 16)}
TASKS = {"rows": ("log_prob", "stream"), "dim": ("log_prob", "step", "sample")}
TASKS["layers"] = TASKS["dim"]
WORDS = {
    "log_prob": "log_prob",
    "sample": "sampling",
    "step": "training step",
    "stream": "training from a file",
}
TITLES = {"rows": "rows", "dim": "dimensions", "layers": "layers"}
MOST_SCALARS = 10_000 * 128
"""Rows times dimensions of log_prob and sampling where rows are not swept."""


class Point(NamedTuple):
    """What is measured: a task at one size."""

    sweep: str
    task: str
    value: int

    @property
    def words(self) -> str:
        return f"{WORDS[self.task]}, {self.value:,} {TITLES[self.sweep]}"

    def spec(self, args) -> dict:
        """What the process of the point is told."""
        sizes = {"dim": DIM, "layers": LAYERS, "rows": 10_000, self.sweep: self.value}
        if self.sweep != "rows":
            sizes["rows"] = min(sizes["rows"], MOST_SCALARS // sizes["dim"])
        return sizes | {
            "task": self.task,
            "width": WIDTH,
            "seconds": args.seconds,
            "most_steps": args.most_steps,
            "folder": str(args.folder),
        }


def points(args) -> list[Point]:
    """All points, small sizes of each sweep first: a short budget leaves a whole picture."""
    sizes = QUICK if args.quick else FULL
    ordered = [
        (place / len(values), Point(sweep, task, value))
        for sweep, values in sizes.items()
        for place, value in enumerate(values)
        for task in TASKS[sweep]
    ]
    return [point for _, point in sorted(ordered, key=lambda pair: pair[0])]


def measure(point: Point, args) -> dict:
    """The record of a point, or what went wrong with it."""
    spec = point.spec(args)
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, str(HERE / "_scaling_point.py"), json.dumps(spec)]
    record = {**point._asdict(), "dim": spec["dim"], "layers": spec["layers"], "rows": spec["rows"]}
    record |= {"laminar": __version__, "quick": args.quick, "machine": _common.machine()}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=args.timeout
        )
    except subprocess.TimeoutExpired:
        return record | {"error": f"did not end within {args.timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return record | {"error": f"ended with status {done.returncode}: {lines[-1]}"}
    return record | json.loads(done.stdout.strip().splitlines()[-1])


def report(records: list[dict]) -> str:
    """The tables for people."""
    good = [r for r in records if "error" not in r]
    if not records:
        return "There are no results."
    parts = []
    if good:
        last = good[-1]
        parts.append(
            f"laminar {last['laminar']}, jax {last['jax']}, {last['platform']}; autoregressive "
            f"spline flow, hidden {WIDTH} × 2, 8 bins, {LAYERS} layers and {DIM} dimensions unless "
            "swept"
        )
    for sweep in TASKS:
        chosen = [r for r in good if r["sweep"] == sweep]
        if chosen:
            parts.append(table(sweep, chosen))
    failed = [
        f"{Point(r['sweep'], r['task'], r['value']).words}: {r['error']}"
        for r in records
        if "error" in r
    ]
    return "\n\n".join([*parts, *failed])


def table(sweep: str, records: list[dict]) -> str:
    """Time of a row, the same by the unit swept, memory and compilation, for each task."""
    tasks = [t for t in TASKS[sweep] if any(r["task"] == t for r in records)]
    per = "" if sweep == "rows" else f" (and by {TITLES[sweep][:-1]})"
    lines = [
        f"{TITLES[sweep]}: µs a row{per}, MB, s to compile",
        f"{'':>10}" + "".join(f"{WORDS[t]:^36}" for t in tasks),
    ]
    for value in sorted({r["value"] for r in records}):
        cells = []
        for task in tasks:
            found = [r for r in records if r["task"] == task and r["value"] == value]
            cells.append(cell(sweep, found[-1]) if found else f"{'–':^36}")
        lines.append(f"{value:>10,}" + "".join(cells))
    if any(r.get("whole_pass") is False for r in records):
        lines.append("Files of which fewer steps than a pass were taken are marked *.")
    return "\n".join(lines)


def cell(sweep: str, record: dict) -> str:
    time_of_row = 1e6 * record["unit_s"]
    mark = "*" if record.get("whole_pass") is False else " "
    per = "" if sweep == "rows" else f"({time_of_row / record['value']:.3g})"
    return f"{time_of_row:11.3g}{mark}{per:>8}{record['peak'] / 1e6:8.0f}{record['compile_s']:8.2f}"


def picture(records: list[dict], path: Path) -> None:
    """Time, memory and compile time against rows, dimensions and layers, logarithmic throughout."""
    import _pictures

    style = {
        "log_prob": (_pictures.BLUE, "o-"),
        "sample": (_pictures.GREEN, "^-."),
        "step": (_pictures.ORANGE, "s--"),
        "stream": (_pictures.ORANGE, "D:"),
    }
    good = [r for r in records if "error" not in r]
    sweeps = [s for s in TASKS if any(r["sweep"] == s for r in good)]
    if not sweeps:
        return
    figure, panels = _pictures.figure("scaling.py", 3, len(sweeps), 4.0, 2.7)
    for column, sweep in enumerate(sweeps):
        unit = "µs a row" if sweep == "rows" else f"µs a row and {TITLES[sweep][:-1]}"
        for row, label in enumerate((unit, "MB beyond compiling", "seconds to compile")):
            axes = panels[row, column]
            for task in TASKS[sweep]:
                colour, dash = style[task]
                chosen = [r for r in good if (r["sweep"], r["task"]) == (sweep, task)]
                chosen.sort(key=lambda r: r["value"])
                # A logarithmic axis has no place for what rounds to nothing.
                values = [max(quantities(r)[row], 1e-3) for r in chosen]
                sizes = [r["value"] for r in chosen]
                axes.plot(sizes, values, dash, color=colour, ms=3.5, lw=1.3, label=WORDS[task])
            if (sweep, label) == ("rows", "MB beyond compiling"):
                sizes = sorted({r["value"] for r in good if r["sweep"] == sweep})
                size_of = [4 * DIM * n / 1e6 for n in sizes]
                axes.plot(sizes, size_of, color=_pictures.GREY, lw=0.9, label="the rows alone")
            head = f"against {TITLES[sweep]}" if row == 0 else ""
            _pictures.dress(axes, head, TITLES[sweep], label, log_y=True)
    _pictures.legend(figure, panels)
    _pictures.write(figure, path)


def quantities(record: dict) -> tuple[float, float, float]:
    """Microseconds a row and unit of the sweep, megabytes, and seconds to compile."""
    units = 1 if record["sweep"] == "rows" else record["value"]
    return 1e6 * record["unit_s"] / units, record["peak"] / 1e6, record["compile_s"]


def options():
    parser = _common.parser(
        "What laminar costs as rows, dimensions and layers grow.",
        budget="seconds after which no other point begins (%(default)s)",
        out=Path("runs/scaling.jsonl"),
        default=3600,
    )
    parser.add_argument("--quick", action="store_true", help="few and small sizes")
    parser.add_argument("--seconds", type=float, default=2.0, help="for which calls are repeated")
    parser.add_argument(
        "--most-steps", type=int, default=20_000, help="of training from a file (%(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one point")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="of the files read"
    )
    parser.add_argument("--picture", type=Path, help="where the picture goes, as PNG")
    parser.add_argument("--report", action="store_true", help="only print what is in --out")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.most_steps = min(args.seconds, 0.3), min(args.most_steps, 200)
    return args


def main():
    args = options()
    begun = time.monotonic()
    if not args.report:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        _common.guard([args.out], args)
    records = _common.read_lines(args.out)
    left = []
    if not args.report:
        asked = {"quick": args.quick}
        records, left = _common.left_over(
            args, records, asked, points(args), lambda r: (r["sweep"], r["task"], r["value"])
        )
    while left and time.monotonic() - begun <= args.budget:
        point = left.pop(0)
        print(f"{time.monotonic() - begun:5.0f} s  {point.words}", file=sys.stderr, flush=True)
        records.append(measure(point, args))
        atomic_write(args.out, "".join(json.dumps(r) + "\n" for r in records).encode())
    print(report(records))
    if left:
        print(f"\nNot begun within {args.budget:.0f} s: {'; '.join(p.words for p in left)}.")
    if args.picture is not None:
        picture(records, args.picture)


if __name__ == "__main__":
    main()
