"""Mixed tables: how far the fitted log-probability is from the truth, and whether it sums to one.

A table with columns of every kind and a fifth of its cells missing is drawn from a known law, whose
density of any observed part is a sum over eight groups. `fit_table` is given ever more rows; on
rows it has not seen the mean of ln p − ln q is KL(p ‖ q). Then fitted models of a few columns are
summed and integrated over everything that a row can be.

    python benchmarks/mixed.py [--rows 1000,5000,20000] [--budget 1800] [--resume]
"""

import json
import time
from pathlib import Path

import _common
import jax
import jax.random as jr
import numpy as np
from _mixed_table import CELLS, KINDS, draw, law

import laminar
from laminar.tables.flow import fit_table
from laminar.tables.table import Table

TEST_ROWS = 10_000
SUMS = (
    "region,member,grade",
    "member,visits,region",
    "spend,member",
    "share,grade",
    "temperature,region",
)


def accuracy(rows: int, seed: int) -> dict:
    """KL from the truth of a model fitted to so many rows, and that of independent columns."""
    table, test = draw(rows, seed), draw(TEST_ROWS, 1000 + seed)
    begun = time.perf_counter()
    model, report = fit_table(table, kinds=KINDS, seed=seed)
    seconds = time.perf_counter() - begun
    truth, found = law().log_prob(test.values), model.log_prob(test)
    gap = truth - found
    gone = np.isnan(test.values).sum(axis=1)
    drawn = model.sample(jr.key(seed), TEST_ROWS)
    back = law().log_prob(drawn.values) - model.log_prob(drawn)
    return {
        "cell": f"{rows} rows, seed {seed}",
        "rows": rows,
        "seconds": seconds,
        "kl": float(gap.mean()),
        "kl_error": float(gap.std() / np.sqrt(len(gap))),
        "rms": float(np.sqrt(np.mean(gap**2))),
        "kl_whole": float(gap[gone == 0].mean()),
        "kl_gaps": float(gap[gone >= 3].mean()),
        "reverse_kl": float(-back.mean()),
        "independent": float(truth.mean() - report["baseline"]["log_density"]),
        "steps": report["training"]["steps"],
    }


def total(names: str, seed: int) -> dict:
    """The sum and integral of a fitted law of some columns over all rows there can be."""
    chosen = names.split(",")
    table = draw(2_000, seed).select(chosen)
    kinds = {name: kind for name, kind in KINDS.items() if name in chosen}
    model, _ = fit_table(table, kinds=kinds, seed=seed, steps=500)
    points, weights = np.zeros((1, 0)), np.ones(1)
    for column in model.schema.columns:
        x, w = _points(column)
        points = np.concatenate(
            [np.repeat(points, len(x), axis=0), np.tile(x, len(points))[:, None]], axis=1
        )
        weights = np.repeat(weights, len(x)) * np.tile(w, len(weights))
    rows = Table(model.schema.names, points, cells=tuple(CELLS[name] for name in chosen))
    return {
        "cell": f"sum over {names}",
        "columns": names,
        "points": len(points),
        "mass": float((weights * np.exp(model.log_prob(rows))).sum()),
        # What an unseen category would have, and what lies beyond the grids.
        "beyond": float(sum(column.unseen for column in model.schema.columns)),
    }


def _points(column) -> tuple[np.ndarray, np.ndarray]:
    """What a column can be, with the weights of a sum, or of Simpson's rule in its own units."""
    atoms = [*column.spikes, *([np.nan] if column.missing else [])]
    if column.states_only:
        x = np.array([*column.codes, *column.rare])
    elif column.on_grid:
        high = column.high if column.high is not None else column.location + 40 * column.scale
        low = column.low if column.low is not None else column.location - 40 * column.scale
        x = np.arange(low, high + column.step / 2, column.step)
    else:
        z, h = np.linspace(-40, 40, 8001, retstep=True)
        x = column.unstandardise(z)
        w = np.full(len(z), 2.0)
        w[1::2], w[0], w[-1] = 4.0, 1.0, 1.0
        inside = column.supports(x) & np.isfinite(x)
        w = w * h / 3 * np.exp(-column.log_slope(x))
        x, w = x[inside], w[inside]
        return np.array([*x, *atoms]), np.array([*w, *np.ones(len(atoms))])
    return np.array([*x, *atoms]), np.ones(len(x) + len(atoms))


def report(records: list[dict]) -> str:
    """The two tables."""
    head = (
        f"laminar {laminar.__version__}, jax {jax.__version__}; {len(CELLS)} columns, a fifth of "
        f"the cells missing; nats a row on {TEST_ROWS:,} unseen rows\n"
        "   rows           KL(p‖q)     rms  whole rows  3 gaps or more  KL(q‖p)  independent     s"
    )
    fits = [
        f"{r['rows']:>7,}  {r['kl']:.4f} ± {r['kl_error']:.4f} {r['rms']:7.3f} "
        f"{r['kl_whole']:11.4f} {r['kl_gaps']:15.4f} {r['reverse_kl']:8.4f} "
        f"{r['independent']:12.3f} {r['seconds']:5.0f}"
        for r in records
        if "kl" in r
    ]
    between = "\ncolumns                       points    sum and integral − 1   an unseen category"
    sums = [
        f"{r['columns']:<26} {r['points']:9,} {r['mass'] - 1:22.2e} {r['beyond']:20.1e}"
        for r in records
        if "mass" in r
    ]
    lines = [head, *fits, between, *sums]
    return "\n".join(lines)


def main() -> None:
    options = _common.parser(
        __doc__.splitlines()[0],
        budget="seconds after which no other cell begins (%(default)s)",
        out=Path("runs/mixed.jsonl"),
        default=1800,
    )
    options.add_argument("--rows", type=_common.numbers, default=(1000, 5000, 20_000))
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    _common.guard([args.out], args)
    asked = {"seed": args.seed}
    jobs = {f"{n} rows, seed {args.seed}": (accuracy, n) for n in args.rows}
    jobs |= {f"sum over {names}": (total, names) for names in SUMS}
    records, left = _common.left_over(
        args, _common.read_lines(args.out), asked, jobs, lambda record: record["cell"]
    )
    begun = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _common.end_last_line(args.out)
    skipped = []
    for name in left:
        if time.monotonic() - begun > args.budget:
            skipped.append(name)
            continue
        task, what = jobs[name]
        print(f"{time.monotonic() - begun:6.0f} s  {name}", flush=True)
        records.append({**task(what, args.seed), **asked, "machine": _common.machine()})
        with args.out.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
    print(report(records))
    if skipped:
        print(f"Not begun within {args.budget:g} s: {', '.join(skipped)}.")


if __name__ == "__main__":
    main()
