"""Fitting to the same validation log-likelihood: wall clock of laminar, FlowJAX and zuko.

Each library fits the same architecture (an autoregressive neural spline flow of 5 layers, hidden
128 × 2, 8 bins) to the same standardised rows, with its own defaults for everything else: the
optimiser, the batch, the schedule, when to stop. The clock begins at the call of the fit, so
compilation counts; imports and building the flow do not.

- laminar: `fit(key, flow, rows)`. Once more as "laminar, limit", where `fit` is given the budget as
  `time_limit`.
- FlowJAX: `fit_to_data`, whose validation counts too.
- zuko: the loop of its tutorial "Train from data", Adam at 1e-3, batches of 64, without end; the
  tutorial takes 8 epochs and never validates, so the time of validation does not count.

Every fit ends at the budget at the latest. The target is the lowest of the best values that the
libraries reach, less 0.01 nat, so that all reach it. The time to a level is that of a curve's first
crossing, linear between its points, the first of which is a validation after training has begun. A
fit that failed sets no target. "cores" says how many a fit had on average: on a machine that
does nothing else, about as many as it can use.

    LAMINAR_DATA=… python benchmarks/race.py --budget 600 [--resume] [--picture race.png]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import _common
import numpy as np
from _speed.envs import interpreters
from _speed.measure import variables

from laminar._files import atomic_write

HERE = Path(__file__).parent
GAPS = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Nats below the target at which times are given too."""
MARGIN = 0.01
TUTORIAL_EPOCHS = 8
START_SECONDS = 300
"""Beyond the budget: imports, building, and the last steps before a fit looks at the clock."""
KEPT = ("budget", "layers", "width", "bins", "patches", "seed")


class Entrant(NamedTuple):
    """A library in the race: its environment, None for this one, its script, its colour."""

    title: str
    environment: str | None
    script: str
    extra: tuple[str, ...]
    colour: str
    dash: str


ENTRANTS = {
    "laminar": Entrant("laminar", None, "_race_laminar.py", (), "#D55E00", "-"),
    "laminar_limit": Entrant(
        "laminar, limit", None, "_race_laminar.py", ("--limit",), "#D55E00", ":"
    ),
    "flowjax": Entrant("FlowJAX", "jax", "_race_flowjax.py", (), "#0072B2", "--"),
    "zuko": Entrant("zuko", "torch", "_race_zuko.py", (), "#009E73", "-."),
}
RIVALS = ("flowjax", "zuko")


def magic(args) -> tuple[np.ndarray, np.ndarray]:
    """The table of `defaults.py`: normal rows, without ties."""
    import _continuous

    rows = _continuous.load("magic.gamma", args.optional)
    split = _continuous.split(rows, None, args.seed, most=len(rows), most_test=2000)
    return split.train, split.test


def patches(args) -> tuple[np.ndarray, np.ndarray]:
    """The patches of `bsds300.py`, each column standardised; validation from images held out."""
    import bsds300

    images = _common.Arrays("bsds300_gray.npz", args.optional)["train"]
    order = np.random.default_rng(args.seed).permutation(len(images))
    parts = []
    for chosen, rows, seed in (
        (order[bsds300.HELD_OUT_IMAGES :], args.patches, args.seed),
        (order[: bsds300.HELD_OUT_IMAGES], max(args.patches // 10 // 100, 1) * 100, args.seed + 1),
    ):
        source = bsds300.Patches(images[chosen], min(rows, 10_000), 1, seed)
        parts.append(source.take(rows))
    mean, deviation = parts[0].mean(0), parts[0].std(0)
    train, validation = ((part - mean) / deviation for part in parts)
    return train, validation


DATA = {"magic.gamma": magic, "bsds300": patches}


def fit(entrant: Entrant, python: Path | str, data: Path, args, seed: int) -> dict:
    """One library's curve, or why there is none."""
    if isinstance(python, str):
        return {"error": python}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "curve.jsonl"
        command = [str(python), str(HERE / entrant.script), str(data), str(out), *entrant.extra]
        for name in ("budget", "layers", "width", "bins"):
            command += [f"--{name}", str(getattr(args, name))]
        environment = os.environ | variables(False, args.envs)
        reason = None
        try:
            done = subprocess.run(
                [*command, "--seed", str(seed)],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=args.budget + START_SECONDS,
            )
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["no message"]
                reason = f"ended with status {done.returncode}: {said[-1]}"
        except subprocess.TimeoutExpired:
            reason = f"did not end within {args.budget + START_SECONDS:.0f} s"
        record: dict = {"curve": [], "reason": ""}
        for line in _common.read_lines(out):
            if "value" in line:
                record["curve"].append([line["seconds"], line["value"], line["epoch"]])
            else:
                record |= line
    if reason is not None:
        record["error"] = reason
    return record


def within(record: dict, budget: float) -> list[list[float]]:
    """The points of a curve up to the budget, without what is not finite."""
    return [p for p in record.get("curve", []) if p[0] <= budget and np.isfinite(p[1])]


def best(curve: list[list[float]]) -> list[float] | None:
    return max(curve, key=lambda p: p[1], default=None)


def reached(curve: list[list[float]], level: float) -> float | None:
    """When a curve first crosses a level, linear between its points."""
    before = None
    for point in curve:
        if point[1] >= level:
            if before is None:
                return point[0]
            part = (level - before[1]) / (point[1] - before[1])
            return before[0] + part * (point[0] - before[0])
        before = point
    return None


class Round(NamedTuple):
    """One round on one data set: the curves, and the target that follows from them."""

    curves: dict[str, list[list[float]]]
    target: float | None

    @classmethod
    def of(cls, records: list[dict]) -> "Round":
        curves = {r["library"]: within(r, r["options"]["budget"]) for r in records}
        sound = [curves[r["library"]] for r in records if "error" not in r]
        tops = [top[1] for curve in sound if (top := best(curve)) is not None]
        return cls(curves, min(tops) - MARGIN if tops else None)

    def time(self, library: str, gap: float = 0.0) -> float | None:
        if self.target is None:
            return None
        return reached(self.curves.get(library, []), self.target - gap)


def median(values) -> float | None:
    """The median of what is known."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def ratio(rounds: list[Round], ours: str, rival: str) -> float | None:
    pairs = [(r.time(ours), r.time(rival)) for r in rounds]
    return median(a / b if a is not None and b else None for a, b in pairs)


def rounds_of(records: list[dict], data: str) -> list[Round]:
    chosen = [r for r in records if r["data"] == data]
    numbers = sorted({r["round"] for r in chosen})
    return [Round.of([r for r in chosen if r["round"] == number]) for number in numbers]


def shown(value: float | None, form: str, width: int) -> str:
    return ("–" if value is None else format(value, form)).rjust(width)


def table(records: list[dict], data: str) -> str:
    """The times of one data set."""
    chosen = [r for r in records if r["data"] == data]
    rounds = rounds_of(records, data)
    (train, validation, columns), budget = chosen[0]["rows"], chosen[0]["options"]["budget"]
    lines = [
        f"{data}: {train:,} rows of {columns} columns, {validation:,} for validation; at most "
        f"{budget:g} s a fit, medians of {len(rounds)} round(s)\n"
        "log-likelihood in nats a row; seconds to the target "
        f"({shown(median(r.target for r in rounds), '.3f', 0)}) and to levels below it\n",
        f"{'':16}{'best':>9}{'at':>8}{'target':>10}"
        + "".join(f"{-gap:>8g}" for gap in GAPS[1:])
        + "   batch  cores  ended by",
    ]
    for library, entrant in ENTRANTS.items():
        own = [r for r in chosen if r["library"] == library]
        tops = [top for r in rounds if (top := best(r.curves.get(library, []))) is not None]
        if not own:
            continue
        # Of a fit that ended early nothing may be known but why.
        sound = [r for r in own if "error" not in r]
        if not tops:
            lines.append(f"{entrant.title:16}no value within the budget")
            continue
        times = [median(r.time(library, gap) for r in rounds) for gap in GAPS]
        lines.append(
            f"{entrant.title:16}{median(t[1] for t in tops):9.3f}{median(t[0] for t in tops):8.1f}"
            + shown(times[0], ".1f", 10)
            + "".join(shown(t, ".1f", 8) for t in times[1:])
            + shown(median(r["batch_size"] for r in sound), ".0f", 8)
            + shown(median(r["cores"] for r in sound), ".1f", 7)
            + "  "
            + ", ".join(dict.fromkeys("failure" if "error" in r else r["reason"] for r in own))
        )
    for ours in ("laminar", "laminar_limit"):
        found = [(rival, ratio(rounds, ours, rival)) for rival in RIVALS]
        words = [f"{ENTRANTS[n].title} {value:.2f}" for n, value in found if value is not None]
        if words:
            lines.append(f"Time to the target, {ENTRANTS[ours].title} / {', / '.join(words)}")
    return "\n".join([*lines, *remarks(chosen)])


def remarks(records: list[dict]) -> list[str]:
    """What zuko had after its tutorial's epochs, and what failed."""
    lines = [
        f"zuko after the {TUTORIAL_EPOCHS} epochs of its tutorial: {point[1]:.3f} at "
        f"{point[0]:.1f} s (round {record['round'] + 1})"
        for record in records
        if record["library"] == "zuko"
        for point in record.get("curve", [])
        if point[2] == TUTORIAL_EPOCHS
    ]
    failed = {ENTRANTS[r["library"]].title: r["error"] for r in records if "error" in r}
    return [*lines, *(f"{name}: {reason}" for name, reason in failed.items())]


def report(records: list[dict]) -> str:
    if not records:
        return "There are no results."
    versions: dict[str, str] = {}
    for record in records:
        versions |= record.get("versions", {})
    last = records[-1]
    head = (
        f"{', '.join(f'{n} {v}' for n, v in versions.items())}; {last['machine']['cpu']}, "
        f"{last['machine']['cores']} cores; {last['machine']['date']}\n"
        f"Autoregressive spline flow, {last['options']['layers']} layers, hidden "
        f"{last['options']['width']} × 2, {last['options']['bins']} bins"
    )
    names = [name for name in DATA if any(r["data"] == name for r in records)]
    return "\n\n".join([head, *(table(records, name) for name in names)])


def picture(records: list[dict], path: Path) -> None:
    """The curves, one panel for each data set, with the target as a thin line."""
    import _pictures

    rounds_by_name = {name: rounds_of(records, name) for name in DATA}
    names = [
        n for n, rounds in rounds_by_name.items() if any(any(r.curves.values()) for r in rounds)
    ]
    if not names:
        print("There is nothing to draw: no fit has a value within the budget.")
        return
    made, panels = _pictures.figure("race.py", 1, len(names), 5.2, 3.9)
    for axes, name in zip(panels[0], names, strict=True):
        rounds, values, labelled = rounds_by_name[name], [], set()
        for found in rounds:
            for library, curve in found.curves.items():
                if not curve:
                    continue
                entrant = ENTRANTS[library]
                x, y = (np.asarray([point[i] for point in curve]) for i in (0, 1))
                label = None if library in labelled else entrant.title
                labelled.add(library)
                axes.plot(x, y, entrant.dash, color=entrant.colour, lw=1.4, label=label)
                values.append(y)
        everything = np.concatenate(values)
        low, high = np.quantile(everything, 0.05), everything.max()
        axes.set_ylim(low, high + 0.08 * (high - low))
        target = median(r.target for r in rounds)
        if target is not None:
            _pictures.note(axes, f"target {target:.2f}", target)
        labels = ("seconds since the call", "validation log-likelihood (nats a row)")
        _pictures.dress(axes, name, *labels)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    _pictures.write(made, path)


def options():
    parser = _common.parser(
        "Fitting to the same validation log-likelihood: laminar, FlowJAX and zuko.",
        budget="seconds for one fit, of each library on each data set (%(default)s)",
        out=Path("runs/race.jsonl"),
        default=600,
    )
    parser.add_argument("--data", type=_common.names_of(DATA), default=tuple(DATA))
    parser.add_argument("--libraries", type=_common.names_of(ENTRANTS), default=tuple(ENTRANTS))
    parser.add_argument("--rounds", type=int, default=1, help="each with a seed of its own")
    parser.add_argument("--patches", type=int, default=100_000, help="rows of bsds300")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of rows and split")
    parser.add_argument("--picture", type=Path, help="where the curves go, as PNG")
    parser.add_argument("--envs", type=Path, default=Path("build/bench/envs"))
    parser.add_argument("--report", action="store_true", help="only print what is in --out")
    return parser.parse_args()


def run(args, records: list[dict]) -> None:
    """Fit whatever is missing; the results are written after every fit."""
    done = {(r["data"], r["round"], r["library"]) for r in records}
    environments = {name: ENTRANTS[name].environment for name in args.libraries}
    pythons = interpreters(environments, args.envs)
    for number in range(args.rounds):
        for name in args.data:
            left = [lib for lib in args.libraries if (name, number, lib) not in done]
            if not left:
                continue
            train, validation = DATA[name](args)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "rows.npz"
                np.savez(path, train=train, validation=validation)
                for library in left:
                    print(f"{name}, round {number + 1}: {library}", file=sys.stderr, flush=True)
                    entrant = ENTRANTS[library]
                    found = fit(entrant, pythons[library], path, args, args.seed + number)
                    records.append(
                        {"data": name, "round": number, "library": library}
                        | {"rows": [len(train), len(validation), train.shape[1]]}
                        | {
                            "options": {n: getattr(args, n) for n in KEPT},
                            "machine": _common.machine(),
                        }
                        | found
                    )
                    lines = "".join(json.dumps(r) + "\n" for r in records)
                    atomic_write(args.out, lines.encode())


def main():
    args = options()
    if not args.report:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        _common.guard([args.out], args)
    records = _common.read_lines(args.out)
    if not args.report:
        for record in records:
            asked = {name: getattr(args, name) for name in KEPT}
            _common.refuse_change(args.out, record["options"], asked)
            _common.refuse_elsewhere(args.out, record["machine"], _common.machine())
        # What failed is tried again.
        records = [r for r in records if "error" not in r]
        run(args, records)
    print(report(records))
    if args.picture is not None:
        picture(records, args.picture)


if __name__ == "__main__":
    main()
