"""Every family of flows on the same rows for the same time, and what each looks like.

Three parts, chosen by --parts:

- ``tables``: held-out log-likelihood after --budget seconds of `laminar.fit` (compilation included)
  on BSDS300 patches and four tables. Every family is what its builder makes by default, with a
  normal base, and is trained alike: batches of 512, rate 3e-3, an average of the parameters.
  Continuous flows are trained by flow matching, residual flows beyond 12 columns by an unbiased
  log-det; both are evaluated exactly. Tables are scaled to deviation one. Patches are whitened,
  which every family gets for nothing, and their figures are in the units of the published ones.
- ``planes``: the same families on eight densities of the plane for --steps steps, with a picture
  for each family of data, draws, and the path of draws from base to data.
- ``compile``: seconds of first calls, and of later ones.

    LAMINAR_DATA=… python benchmarks/catalogue.py --budget 120 --resume --pictures runs/catalogue
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import _common
import _continuous
import _planes
import jax
import jax.random as jr
import numpy as np
from _families import COMPILED, FAMILIES, Family
from bsds300 import HELD_OUT_IMAGES, Patches

import laminar
from laminar._files import atomic_write
from laminar.objectives import Batch

PARTS = ("tables", "planes", "compile")
PATCHES = "BSDS300"
DATA = (PATCHES, "magic.gamma", "shuttle", "ALOI", "protein")
BATCH = 512
TEST_ROWS = 5_000
VALIDATION_ROWS = 5_000
PATCH_ROWS = 300_000
PLANE_ROWS = 50_000
COMPILED_DIM, COMPILED_ROWS = 8, 1_000
GAUSSIAN = "full-covariance Gaussian"


class Cell(NamedTuple):
    """One family on one set."""

    part: str
    family: str
    data: str

    @classmethod
    def of(cls, record: dict) -> "Cell":
        return cls(*(record[name] for name in cls._fields))

    @property
    def words(self) -> str:
        return ", ".join(filter(None, self))


class Rows(NamedTuple):
    """Standardised rows, and what ln |det| of the standardisation adds to a log-density."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    log_det: float


def cells(args) -> list[Cell]:
    """What is asked for, all families of one set after another."""
    found = []
    if "tables" in args.parts:
        found += [Cell("tables", f, data) for data in args.data for f in args.families]
    if "planes" in args.parts:
        found += [Cell("planes", f, plane) for f in args.families for plane in _planes.PLANES]
    if "compile" in args.parts:
        found += [Cell("compile", f, "") for f in COMPILED]
    return found


def patches(seed: int) -> Rows:
    """Patches as `bsds300.py` cuts them, whitened by the moments of the training patches."""
    arrays = _common.Arrays("bsds300_gray.npz")
    images, test_images = arrays["train"], arrays["test"]
    order = np.random.default_rng(seed).permutation(len(images))
    kept, held = images[order[HELD_OUT_IMAGES:]], images[order[:HELD_OUT_IMAGES]]
    train = Patches(kept, BATCH, 1, seed).take(PATCH_ROWS).astype(np.float64)
    validation = Patches(held, VALIDATION_ROWS, 1, seed + 1).take(VALIDATION_ROWS)
    test = Patches(test_images, TEST_ROWS, 1, seed + 2).take(TEST_ROWS)
    mean = train.mean(0)
    inverse = np.linalg.inv(np.linalg.cholesky(np.cov(train.T)))
    white = [((x - mean) @ inverse.T).astype(np.float32) for x in (train, validation, test)]
    return Rows(*white, float(np.log(np.diag(inverse)).sum()))


def table(name: str, seed: int) -> Rows:
    """A table split in three, in units of the training rows' deviation."""
    rows = _continuous.load(name)
    split = _continuous.split(rows, None, seed, most=len(rows), most_test=TEST_ROWS)
    held = min(VALIDATION_ROWS, len(split.train) // 10)
    return Rows(split.train[held:], split.train[:held], split.test, 0.0)


def load(name: str, seed: int) -> Rows:
    return patches(seed) if name == PATCHES else table(name, seed)


def trained(family: Family, key, rows: Rows, **budget):
    """The flow after its time or steps, with its exact log-det, and the course of its training."""
    build_key, fit_key = jr.split(key)
    flow, history = laminar.fit(
        fit_key,
        family.build(rows.train.shape[1], key=build_key),
        rows.train,
        validation=Batch(rows.validation),
        objective=family.objective,
        learning_rate=3e-3,
        batch_size=BATCH,
        ema=0.999,
        patience=None,
        progress=False,
        **budget,
    )
    return family.exact(flow), history


def held_out(flow, rows: Rows) -> dict:
    """Mean log-density of the test rows, its standard error, and how many are not finite."""
    begun = time.perf_counter()
    log_p = np.asarray(flow.log_prob(rows.test), np.float64) + rows.log_det
    return {
        "log_prob": float(log_p.mean()),
        "error": float(log_p.std() / np.sqrt(len(log_p))),
        "not_finite": int((~np.isfinite(log_p)).sum()),
        "score_s": time.perf_counter() - begun,
    }


def gaussian(rows: Rows) -> dict:
    """The same of a Gaussian with the moments of the training rows."""
    x, test = rows.train.astype(np.float64), rows.test.astype(np.float64)
    factor = np.linalg.cholesky(np.cov(x.T))
    z = np.linalg.solve(factor, (test - x.mean(0)).T)
    log_p = -0.5 * (z**2).sum(0) - np.log(np.diag(factor)).sum() + rows.log_det
    log_p -= 0.5 * x.shape[1] * np.log(2 * np.pi)
    return {"log_prob": float(log_p.mean()), "error": float(log_p.std() / np.sqrt(len(log_p)))}


def on_table(cell: Cell, args, rows: Rows) -> dict:
    flow, history = trained(
        FAMILIES[cell.family], jr.key(args.seed), rows, time_limit=float(args.budget)
    )
    seconds = history.validation_seconds
    return {
        **held_out(flow, rows),
        "steps": history.steps,
        "best_step": history.best_step,
        "seconds": history.seconds,
        "rollbacks": history.rollbacks,
        "first_validation_s": float(seconds[0]) if len(seconds) else None,
        "columns": rows.train.shape[1],
    }


def on_plane(cell: Cell, args) -> dict:
    x = _planes.rows(cell.data, PLANE_ROWS, args.seed)
    rows = Rows(x[10_000:], x[5_000:10_000], x[:5_000], 0.0)
    flow, history = trained(FAMILIES[cell.family], jr.key(args.seed), rows, steps=args.steps)
    args.models.mkdir(parents=True, exist_ok=True)
    laminar.save(model_path(cell, args), flow)
    return {**held_out(flow, rows), "seconds": history.seconds, "steps": history.steps}


def model_path(cell: Cell, args) -> Path:
    return args.models / f"{cell.family}-{cell.data}.laminar".replace(" ", "-")


def compiled(cell: Cell) -> dict:
    """Seconds of the first call and of the median of three later ones."""
    family = COMPILED[cell.family]
    flow = family.build(COMPILED_DIM, key=jr.key(0))
    x = jr.normal(jr.key(1), (COMPILED_ROWS, COMPILED_DIM))
    doors = {
        "log_prob": lambda: family.exact(flow).log_prob(x),
        "sample": lambda: flow.sample(jr.key(2), (COMPILED_ROWS,)),
        "fit": lambda: (
            laminar.fit(
                jr.key(3),
                flow,
                np.asarray(x),
                objective=family.objective,
                steps=1,
                validation=None,
                progress=False,
            )[0].base
        ),
    }
    return {name: {"first": _timed(door), **_later(name, door)} for name, door in doors.items()}


def _later(name: str, door) -> dict:
    # A second call of `fit` compiles nothing, but is no measure of a step either.
    return {} if name == "fit" else {"later": float(np.median([_timed(door) for _ in range(3)]))}


def _timed(door) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(door())
    return time.perf_counter() - begun


def settings(args) -> dict:
    """The options that all results of one file share."""
    return {"budget": args.budget, "steps_asked": args.steps, "seed": args.seed}


def begun_record(cell: Cell, args) -> dict:
    """A record with everything but what is found."""
    here = {"jax": jax.__version__, "machine": _common.machine()}
    return {**cell._asdict(), **settings(args), **here}


def run(cell: Cell, args, rows: Rows | None) -> dict:
    record = begun_record(cell, args)
    try:
        if cell.part == "tables":
            assert rows is not None
            return record | on_table(cell, args, rows)
        return record | (on_plane(cell, args) if cell.part == "planes" else compiled(cell))
    except laminar.TrainingError as error:
        return record | {"failed": str(error)}


def report(records: list[dict]) -> str:
    """The tables for people."""
    if not records:
        return "There are no results."
    good = [r for r in records if "failed" not in r]
    first = records[-1]
    parts = [
        f"laminar {first['machine']['laminar']}, jax {first['jax']}; {first['machine']['cpu']}, "
        f"cores used {first['machine']['cores']}"
    ]
    parts += [t for t in (likelihoods(good), planes(good), first_calls(good)) if t]
    parts += [f"{Cell.of(r).words}: {r['failed']}" for r in records if "failed" in r]
    return "\n\n".join(parts)


def likelihoods(records: list[dict]) -> str:
    own = [r for r in records if r["part"] == "tables"]
    if not own:
        return ""
    names = [d for d in DATA if any(r["data"] == d for r in own)]
    lines = [
        "Mean log-density of held-out rows in nats ± its standard error, after "
        f"{own[0]['budget']:g} s of training each; below it the steps taken",
        f"{'':<26}" + "".join(f"{_head(own, name):>20}" for name in names),
    ]
    best = {n: max(r["log_prob"] for r in own if r["data"] == n) for n in names}
    for family in (GAUSSIAN, *FAMILIES):
        row, below = f"{family:<26}", " " * 26
        for name in names:
            found = next((r for r in own if (r["family"], r["data"]) == (family, name)), None)
            mark = "" if found is None else " *" if found["log_prob"] == best[name] else "  "
            text = "–" if found is None else f"{found['log_prob']:.2f} ± {found['error']:.2f}{mark}"
            steps = "" if found is None or "steps" not in found else f"{found['steps']:,} steps  "
            row, below = row + f"{text:>20}", below + f"{steps:>20}"
        lines += [row] + ([below] if family in FAMILIES else [])
    odd = [f"{r['family']} on {r['data']}: {r['not_finite']}" for r in own if r.get("not_finite")]
    return "\n".join(lines + ([f"Rows without a finite density: {'; '.join(odd)}"] if odd else []))


def _head(records: list[dict], name: str) -> str:
    columns = next((r["columns"] for r in records if r["data"] == name and "columns" in r), "?")
    return f"{name} ({columns})"


def planes(records: list[dict]) -> str:
    own = [r for r in records if r["part"] == "planes"]
    if not own:
        return ""
    lines = [
        f"Mean log-density of 5,000 held-out points of the plane after {own[0]['steps']:,} steps",
        f"{'':<18}" + "".join(f"{name:>15}" for name in _planes.PLANES) + f"{'s a run':>10}",
    ]
    for family in FAMILIES:
        found = {r["data"]: r for r in own if r["family"] == family}
        if found:
            row = "".join(
                f"{found[n]['log_prob']:>15.3f}" if n in found else f"{'–':>15}"
                for n in _planes.PLANES
            )
            seconds = np.median([r["seconds"] for r in found.values()])
            lines.append(f"{family:<18}{row}{seconds:>10.1f}")
    return "\n".join(lines)


def first_calls(records: list[dict]) -> str:
    own = [r for r in records if r["part"] == "compile"]
    if not own:
        return ""
    lines = [
        f"Seconds at D = {COMPILED_DIM}, {COMPILED_ROWS:,} rows: trace and compilation (a call)",
        f"{'':<18}{'log_prob':>18}{'sample':>18}{'fit, first step':>18}",
    ]
    for r in own:
        parts = [
            f"{r[n]['first'] - r[n]['later']:.2f} ({r[n]['later']:.3f})"
            for n in ("log_prob", "sample")
        ]
        parts.append(f"{r['fit']['first']:.2f}")
        lines.append(f"{r['family']:<18}" + "".join(f"{t:>18}" for t in parts))
    return "\n".join(lines)


def pictures(records: list[dict], args) -> None:
    """For each family: data, draws, and the path of the draws."""
    for family in FAMILIES:
        own = [r for r in records if r["part"] == "planes" and r["family"] == family]
        found = [Cell("planes", family, r["data"]) for r in own if "failed" not in r]
        found = [cell for cell in found if model_path(cell, args).exists()]
        if found:
            picture(found, args)


def picture(found: list[Cell], args) -> None:
    """One row for each set, one column for each point of the path, coloured by its beginning."""
    import _pictures

    from laminar.report import canvas

    paths = []
    for cell in found:
        flow = laminar.load(model_path(cell, args))
        path = flow.path(flow.base.sample(jr.key(args.seed), (3000,)))
        paths.append(np.stack([np.asarray(p) for p in path.points]))
    steps = np.unique(np.linspace(0, len(paths[0]) - 1, 5).round().astype(int))
    figure, panels = _pictures.figure(
        "catalogue.py", len(found), 2 + len(steps), width=1.05, height=1.05
    )
    for line, (row, cell, z) in enumerate(zip(panels, found, paths, strict=True)):
        x = _planes.rows(cell.data, 3000, args.seed + 1)
        colour = np.arctan2(z[0, :, 1], z[0, :, 0])
        for number, axes in enumerate(row):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlim(-4, 4)
            axes.set_ylim(-4, 4)
            axes.set_aspect("equal")
            dots = {"s": 0.5, "lw": 0, "rasterized": True}
            if number < 2:
                points, side = (x, canvas.DATA) if number == 0 else (z[-1], canvas.FLOW)
                axes.scatter(*points.T, color=side, **dots)
                head = ("data", "draws")[number]
            else:
                k = steps[number - 2]
                axes.scatter(*z[k].T, c=colour, cmap="twilight", **dots)
                head = f"$z_{{{k}}}$"
            if line == 0:
                axes.set_title(head, fontsize=8, color=canvas.INK)
            if number == 0:
                axes.set_ylabel(cell.data, fontsize=7, color=canvas.INK)
    _pictures.write(figure, args.pictures / f"{found[0].family.replace(' ', '-')}.png")


def options():
    parser = _common.parser(
        "Every family of flows on the same rows for the same time.",
        budget="seconds of training for each cell of the tables (%(default)s)",
        out=Path("runs/catalogue.jsonl"),
        default=120,
    )
    parser.add_argument("--parts", type=_common.names_of(PARTS), default=PARTS)
    parser.add_argument("--families", type=_common.names_of(FAMILIES), default=tuple(FAMILIES))
    parser.add_argument("--data", type=_common.names_of(DATA), default=DATA)
    parser.add_argument("--steps", type=int, default=2_000, help="on the plane (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, help="seconds after which no other cell begins")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of the plane, as PNG")
    parser.add_argument("--report", action="store_true", help="only print what is in --out")
    args = parser.parse_args()
    args.models = args.out.with_suffix("")
    return args


def main():
    args = options()
    begun = time.monotonic()
    if not args.report:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        _common.guard([args.out], args)
    records = _common.read_lines(args.out)
    left: list[Cell] = []
    if not args.report:
        records, left = _common.left_over(
            args, records, settings(args), cells(args), Cell.of, failed="failed"
        )
    name, rows = "", None
    while left and (args.limit is None or time.monotonic() - begun <= args.limit):
        cell = left.pop(0)
        print(f"{time.monotonic() - begun:5.0f} s  {cell.words}", file=sys.stderr, flush=True)
        if cell.part == "tables" and cell.data != name:
            name, rows = cell.data, load(cell.data, args.seed)
            own = Cell("tables", GAUSSIAN, name)
            if own not in map(Cell.of, records):
                records.append(begun_record(own, args) | gaussian(rows))
        records.append(run(cell, args, rows))
        atomic_write(args.out, "".join(json.dumps(r) + "\n" for r in records).encode())
        # Every compiled program holds memory maps, of which a process may have only so many.
        jax.clear_caches()
        gc.collect()
    print(report(records))
    if left:
        print(f"\nNot begun within {args.limit:.0f} s: {'; '.join(c.words for c in left)}.")
    if args.pictures is not None:
        pictures(records, args)


if __name__ == "__main__":
    main()
