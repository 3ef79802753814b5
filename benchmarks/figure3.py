"""The four energies of Rezende & Mohamed (2015), figure 3: how close flows come, as layers grow.

Planar flows and NICE with random permutations or orthogonal mixing, K = 2, 8, 32 as in the paper;
radial, Sylvester, inverse autoregressive and coupling spline flows beside them. Every flow starts
as a normal base with trained means and scales, and is trained by `laminar.fit` on the annealed free
energy of the paper, β_t = min(1, 0.01 + t / T) with T half the steps. Everything else is alike, but
for the peak learning rate: 0.01 where layers have no networks, 0.005 where they have, and 0.002 for
NICE, whose 32 layers stayed far from their limit at the higher ones.

- KL(q ‖ p) is the mean of ln q − ln p̃ over draws from q, with its standard error, plus ln ∫ p̃
  by quadrature. KL(p ‖ q) is by quadrature altogether: it shows what q leaves out.
- Beside NICE stands the least KL(q ‖ p) that any number of volume-preserving layers can reach.
- The targets, with the wall that makes them proper, are stated in `_energies.py`.

    python benchmarks/figure3.py [--budget 900] [--resume] [--picture figure3.png]
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import _common
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _energies import HALF_WIDTH, NAMES, Energy, grid, log_normaliser
from scipy.optimize import minimize_scalar

import laminar
from laminar import zoo
from laminar._files import atomic_write
from laminar.objectives import linear_annealing, reverse_kl

NET = {"width": 32, "depth": 1}
FLOWS = {
    "base alone": (
        (0,),
        1e-2,
        lambda key, k: laminar.Flow(laminar.Normal(2), laminar.Identity((2,))),
    ),
    "planar": ((2, 8, 32), 1e-2, lambda key, k: zoo.planar(2, key=key, layers=k)),
    "radial": ((2, 8, 32), 1e-2, lambda key, k: zoo.radial(2, key=key, layers=k)),
    "Sylvester": ((2, 8, 32), 1e-2, lambda key, k: zoo.sylvester(2, key=key, layers=k, columns=2)),
    "NICE-permutation": (
        (2, 8, 32),
        2e-3,
        lambda key, k: zoo.nice(2, key=key, layers=k, mixing="permutation", **NET),
    ),
    "NICE-orthogonal": (
        (2, 8, 32),
        2e-3,
        lambda key, k: zoo.nice(2, key=key, layers=k, mixing="orthogonal", **NET),
    ),
    "IAF": ((2, 8), 5e-3, lambda key, k: zoo.iaf(2, key=key, layers=k, **NET)),
    "coupling spline": (
        (2, 8),
        5e-3,
        lambda key, k: zoo.nsf(2, key=key, layers=k, coupling=True, **NET),
    ),
}
"""Numbers of layers, learning rate, and builder of each flow."""
GRID = 401
PATH = ("planar", 32, "U4")
"""The flow whose path is drawn."""
DRAWN = {
    "planar": (2, 8, 32),
    "NICE-permutation": (2, 8, 32),
    "NICE-orthogonal": (32,),
    "radial": (32,),
    "Sylvester": (32,),
    "IAF": (8,),
    "coupling spline": (8,),
}
"""What the picture shows of each flow."""


class Cell(NamedTuple):
    """One training run."""

    seed: int
    flow: str
    layers: int
    target: str

    @classmethod
    def of(cls, record: dict) -> "Cell":
        return cls(*(record[name] for name in cls._fields))

    @property
    def words(self) -> str:
        return f"{self.target}, {label(self.flow, self.layers)}, seed {self.seed}"

    def model(self, args) -> Path:
        name = self.flow.replace(" ", "-")
        return args.models / f"{self.target}-{name}-{self.layers}-{self.seed}.laminar"


def label(flow: str, layers: int) -> str:
    return f"{flow} {layers}" if layers else flow


def cells(args) -> list[Cell]:
    """All runs, one seed after the other: a short budget leaves whole seeds."""
    return [
        Cell(seed, flow, layers, target)
        for seed in range(args.seeds)
        for flow in args.flows
        for layers in FLOWS[flow][0]
        for target in args.targets
    ]


def run(cell: Cell, args, anneal, log_z: dict[str, float]) -> dict:
    """Train one flow and measure it."""
    _, rate, build = FLOWS[cell.flow]
    flow_key, fit_key, test_key = jr.split(jr.key(cell.seed), 3)
    energy = Energy(cell.target)
    record = {**cell._asdict(), "steps": args.steps, "samples": args.samples}
    record |= {"laminar": laminar.__version__, "jax": jax.__version__}
    begun = time.perf_counter()
    try:
        flow, _ = laminar.fit(
            fit_key,
            build(flow_key, cell.layers),
            None,
            objective=reverse_kl(energy, args.samples, anneal=anneal),
            steps=args.steps,
            learning_rate=rate,
            validation=None,
            progress=False,
        )
    except laminar.TrainingError as error:
        return record | {"error": str(error), "machine": _common.machine()}
    record["seconds"] = time.perf_counter() - begun
    args.models.mkdir(parents=True, exist_ok=True)
    laminar.save(cell.model(args), flow)
    found = measure(flow, energy, log_z[cell.target], test_key, args.draws)
    return record | found | {"machine": _common.machine()}


def measure(flow, energy: Energy, log_z: float, key, draws: int) -> dict:
    """Both divergences, and how much of q lies on the grid."""
    x, log_q = flow.sample_and_log_prob(key, (draws,))
    ratio = np.asarray(log_q, np.float64) - np.asarray(jax.vmap(energy)(x), np.float64)
    points = jnp.asarray(grid(GRID), x.dtype)
    log_p = np.asarray(jax.vmap(jax.vmap(energy))(points), np.float64) - log_z
    log_q = np.asarray(flow.log_prob(points), np.float64)
    area = (2 * HALF_WIDTH / (GRID - 1)) ** 2
    p = np.exp(log_p)
    # Where p is zero nothing counts, whatever ln q is there.
    forward = np.where(p > 0, p * (log_p - log_q), 0).sum() * area
    return {
        "kl": float(ratio.mean() + log_z),
        "kl_error": float(ratio.std() / np.sqrt(draws)),
        "kl_forward": float(forward),
        "mass_on_grid": float(np.exp(log_q).sum() * area),
    }


def report(records: list[dict]) -> str:
    """The tables for people."""
    good = [r for r in records if "error" not in r]
    failed = [f"{Cell.of(r).words}: {r['error']}" for r in records if "error" in r]
    if not good:
        return "\n".join(["There are no results.", *failed])
    first = good[-1]
    parts = [
        f"laminar {first['laminar']}, jax {first['jax']}; {first['steps']:,} steps of "
        f"{first['samples']} draws",
        normalisers(sorted({r["target"] for r in good})),
        table(good, "kl", "KL(q ‖ p) in nats, median (best) over seeds", limits=True),
        table(good, "kl_forward", "KL(p ‖ q) in nats by quadrature, median (best) over seeds"),
        f"Largest standard error of KL(q ‖ p): {max(r['kl_error'] for r in good):.4f}",
        growth(good),
    ]
    return "\n\n".join([*parts, *failed])


def normalisers(targets: list[str]) -> str:
    lines = [f"ln ∫ p̃ by the trapezoidal rule on 801² points of [−{HALF_WIDTH:g}, {HALF_WIDTH:g}]²"]
    for target in targets:
        fine, coarse = log_normaliser(target), log_normaliser(target, 401)
        lines.append(f"{target}  {fine:.9f}  (401² points differ by {abs(fine - coarse):.0e})")
    return "\n".join(lines)


def table(records: list[dict], quantity: str, head: str, limits: bool = False) -> str:
    targets = sorted({r["target"] for r in records})
    lines = [head, f"{'':<22}" + "".join(f"{t:^18}" for t in targets) + "  seeds  s a run"]
    for flow, (numbers, *_) in FLOWS.items():
        for layers in numbers:
            own = [r for r in records if (r["flow"], r["layers"]) == (flow, layers)]
            if not own:
                continue
            row = f"{label(flow, layers):<22}"
            for target in targets:
                values = [r[quantity] for r in own if r["target"] == target]
                text = f"{statistics.median(values):.4f} ({min(values):.4f})" if values else "–"
                row += f"{text:^18}"
            seeds = len({r["seed"] for r in own})
            seconds = statistics.median(r["seconds"] for r in own)
            lines.append(f"{row}{seeds:7}{seconds:9.1f}")
    if limits:
        found = "".join(f"{volume_preserving_limit(target):^18.4f}" for target in targets)
        lines.append(f"{'NICE, the limit':<22}{found}")
    return "\n".join(lines)


def volume_preserving_limit(target: str) -> float:
    """The least KL(q ‖ p) of all images of a normal base under maps of constant volume change.

    Such a map moves the base's values of the density about without changing them, so E_q ln q is
    that of the base, and E_q ln p is largest when the largest values of both meet (the
    rearrangement inequality). A normal density of the plane falls as e^{−v/c} / c with the area v
    within its level sets, c = 2πσ²; p's values on the grid are sorted; what is left is one search
    for c.
    """
    points = jnp.asarray(grid(2 * GRID - 1))
    log_p = np.asarray(jax.vmap(jax.vmap(Energy(target)))(points), np.float64)
    log_p = np.sort(log_p.ravel())[::-1] - log_normaliser(target)
    area = (2 * HALF_WIDTH / (2 * GRID - 2)) ** 2
    edges = area * np.arange(len(log_p) + 1)

    def divergence(log_c: float) -> float:
        mass = np.diff(-np.expm1(-edges / np.exp(log_c)))
        return -log_c - 1 - (mass * log_p).sum()

    return minimize_scalar(divergence, bounds=(-2, 5), method="bounded").fun


def growth(records: list[dict]) -> str:
    """Whether more layers were better, by the median over seeds, for each flow and target."""
    worse = []
    for flow, (numbers, *_) in FLOWS.items():
        for target in sorted({r["target"] for r in records}):
            medians = []
            for layers in numbers:
                values = [
                    r["kl"]
                    for r in records
                    if (r["flow"], r["layers"], r["target"]) == (flow, layers, target)
                ]
                if values:
                    medians.append((layers, statistics.median(values)))
            worse += [
                f"{flow} {b[0]} after {a[0]} on {target} ({b[1]:.4f} after {a[1]:.4f})"
                for a, b in itertools.pairwise(medians)
                if b[1] >= a[1]
            ]
    if not worse:
        return "More layers are better for every flow on every target, by the median of KL(q ‖ p)."
    return "More layers are better by the median of KL(q ‖ p), except: " + "; ".join(worse) + "."


def picture(records: list[dict], args) -> None:
    """Targets, flows (the seed with the lowest KL(q ‖ p) of each), and the path of one of them."""
    import _pictures

    from laminar.report import canvas

    good = [r for r in records if "error" not in r]
    columns = [
        (flow, layers)
        for flow, numbers in DRAWN.items()
        for layers in numbers
        if any((r["flow"], r["layers"]) == (flow, layers) for r in good)
    ]
    targets = [t for t in NAMES if any(r["target"] == t for r in good)]
    if not columns:
        return
    points = jnp.asarray(grid(201, 4.5), jnp.float32)
    figure, panels = _pictures.figure(
        "figure3.py", len(targets) + 1, len(columns) + 1, width=1.15, height=1.2
    )

    def draw(axes, density, head: str, side: str = "") -> None:
        axes.imshow(np.asarray(density).T, origin="lower", cmap="magma", aspect="equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(head, fontsize=7, color=canvas.INK)
        axes.set_ylabel(side, fontsize=9, color=canvas.INK)

    for row, target in enumerate(targets):
        energy = jax.vmap(jax.vmap(Energy(target)))(points)
        draw(panels[row, 0], jnp.exp(energy - energy.max()), "target" if row == 0 else "", target)
        for column, (flow, layers) in enumerate(columns, 1):
            cell = best(good, flow, layers, target)
            axes = panels[row, column]
            if cell is None or not cell.model(args).exists():
                axes.set_axis_off()
                continue
            head = label(flow, layers).replace("-", "\n") if row == 0 else ""
            draw(axes, jnp.exp(laminar.load(cell.model(args)).log_prob(points)), head)
    last = panels[-1]
    cell = best(good, *PATH)
    steps = np.unique(np.linspace(0, PATH[1], len(last)).astype(int))
    for axes in last:
        axes.set_axis_off()
    if cell is not None and cell.model(args).exists():
        flow = laminar.load(cell.model(args))
        for axes, k in zip(last, steps, strict=False):
            axes.set_axis_on()
            density = jnp.exp(flow.upto(int(k)).log_prob(points))
            side = f"path of\n{label(*PATH[:2])}, {PATH[2]}" if k == 0 else ""
            draw(axes, density, f"$q_{{{k}}}$", side)
    _pictures.write(figure, args.picture)


def best(records: list[dict], flow: str, layers: int, target: str) -> Cell | None:
    own = [r for r in records if (r["flow"], r["layers"], r["target"]) == (flow, layers, target)]
    if not own:
        return None
    chosen = min(own, key=lambda r: r["kl"])
    return Cell.of(chosen)


def options():
    parser = _common.parser(
        "How close flows come to the four energies of Rezende & Mohamed (2015).",
        budget="seconds after which no other run begins (%(default)s)",
        out=Path("runs/figure3.jsonl"),
        default=900,
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each flow (%(default)s)")
    parser.add_argument("--steps", type=int, default=10_000, help="of training (%(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="draws a step (%(default)s)")
    parser.add_argument("--draws", type=int, default=100_000, help="to measure by (%(default)s)")
    parser.add_argument("--flows", type=_common.names_of(FLOWS), default=tuple(FLOWS))
    parser.add_argument("--targets", type=_common.names_of(NAMES), default=NAMES)
    parser.add_argument("--picture", type=Path, help="where the picture goes, as PNG")
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
        asked = {"steps": args.steps, "samples": args.samples}
        records, left = _common.left_over(args, records, asked, cells(args), Cell.of)
    log_z = {target: log_normaliser(target) for target in args.targets}
    # One schedule for all, so that a program is compiled once for each flow.
    anneal = linear_annealing(0.01, max(args.steps // 2, 1))
    while left and time.monotonic() - begun <= args.budget:
        cell = left.pop(0)
        print(f"{time.monotonic() - begun:5.0f} s  {cell.words}", file=sys.stderr, flush=True)
        records.append(run(cell, args, anneal, log_z))
        atomic_write(args.out, "".join(json.dumps(r) + "\n" for r in records).encode())
    print(report(records))
    if left:
        print(f"\nNot begun within {args.budget:.0f} s: {'; '.join(c.words for c in left)}.")
    if args.picture is not None:
        picture(records, args)


if __name__ == "__main__":
    main()
