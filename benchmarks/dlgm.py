"""The deep latent Gaussian model of Rezende & Mohamed (2015, §6.2) with flow posteriors.

For each posterior the same model (deterministic layers of maxout units, latent normals, Bernoulli
pixels) is trained by the annealed free energy, and measured on the test images: the bound −ELBO and
−ln p(x) by importance sampling, in nats. Rows are held out of the training images to choose the
parameters that are measured; the test images are looked at once, at the end.

Two protocols differ in the target and cannot be compared with one another. ``fixed``: every pixel
of training and test images is drawn as a bit once, from a fixed seed, as in the paper. ``dynamic``:
training images are drawn anew at every use; the test images are those of ``fixed``. With
``--decoder flow`` pixels are not binarised but dequantised, and bits for each dimension are told.

    LAMINAR_DATA=… python benchmarks/dlgm.py --budget 36000 --resume
    python benchmarks/dlgm.py --data digits --budget 300

What has been trained is kept in checkpoints beside --out, and a run that was cut, by its budget or
otherwise, goes on with the same bits. Posteriors that are not finished are measured as they are.
"""

import argparse
import contextlib
import json
import math
import re
import signal
import sys
import time
from pathlib import Path

import _common
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

import laminar
from laminar._files import atomic_write
from laminar._params import partition
from laminar.objectives import Batch, linear_annealing
from laminar.tasks.vae import LAYERS, UniformDequantisation, binarise, free_energy, vae
from laminar.train import Checkpoint
from laminar.train.checkpoint import load_checkpoint
from laminar.train.state import Recipe, init

ORDER = ("diagonal", "planar-10", "planar-80", "iaf", "sylvester")
PUBLISHED = {
    "diagonal": 89.9,
    "planar-10": 87.5,
    "planar-20": 86.5,
    "planar-40": 85.7,
    "planar-80": 85.1,
    "nice-10": 88.6,
    "nice-80": 87.2,
}
"""Figure 4 and table 2 of the paper: −ln p by 200 importance samples, fixed binarisation."""
PAPER_UPDATES = 500_000

SIZES = {
    "mnist": {
        "steps": 200_000,
        "annealing": 10_000,
        "latent": 40,
        "width": 400,
        "flow_width": 200,
        "held_out": 2_000,
        "test_rows": 10_000,
    },
    "digits": {
        "steps": 4_000,
        "annealing": 1_000,
        "latent": 8,
        "width": 64,
        "flow_width": 32,
        "held_out": 150,
        "test_rows": 297,
    },
}
LEVELS = {"mnist": 256, "digits": 17}
# What may differ when a run goes on.
FREE = ("budget", "resume", "restart", "out", "optional", "posterior", "picture", "report")


class Spent(Exception):
    """The budget is spent."""


@contextlib.contextmanager
def cut_after(seconds: float):
    """Raise `Spent` in the block when so many seconds have passed."""

    def ring(*_):
        raise Spent

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def images(args) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images as rows of numbers from 0 to 1."""
    if args.data == "mnist":
        arrays = _common.Arrays("mnist.npz", args.optional)
        train, test = (arrays[f"x_{part}"].reshape(-1, 784) for part in ("train", "test"))
        return (train / 255).astype(np.float32), (test / 255).astype(np.float32)
    from sklearn.datasets import load_digits

    pixels = (load_digits().data / 16).astype(np.float32)
    return pixels[:1500], pixels[1500:]


def observed(args, grey: np.ndarray, key) -> np.ndarray:
    """Rows as the model sees them, drawn once."""
    draw = UniformDequantisation(LEVELS[args.data]) if args.decoder == "flow" else binarise
    return np.concatenate(
        [
            np.asarray(draw(jr.fold_in(key, start), jnp.asarray(grey[start : start + 5000])))
            for start in range(0, len(grey), 5000)
        ]
    )


class Cell:
    """One posterior: its model, its data, and how far it has come."""

    def __init__(self, name: str, args, machine: dict):
        self.name, self.args, self.machine = name, args, machine
        self.checkpoint = args.out.with_suffix(f".{name}.ckpt")
        kind, _, layers = name.partition("-")
        self.layers = int(layers) if layers else LAYERS[kind]
        data_key, model_key, self.fit_key, self.test_key = jr.split(jr.key(args.seed), 4)
        train_key, held_key, test_key = jr.split(data_key, 3)
        train, test = images(args)
        rows = np.random.default_rng(args.seed).permutation(len(train))
        held, rows = np.sort(rows[: args.held_out]), np.sort(rows[args.held_out :])
        dynamic = args.protocol == "dynamic" or args.decoder == "flow"
        self.train = train[rows] if dynamic else observed(args, train[rows], train_key)
        self.held_out = observed(args, train[held], held_key)
        self.test = observed(args, test[: args.test_rows], test_key)
        self.sample = observed(args, train[rows][: len(self.test)], train_key)
        self.model = vae(
            train.shape[1],
            args.latent,
            posterior=kind,
            layers=self.layers or None,
            prior=args.prior,
            decoder=args.decoder,
            width=args.width,
            depth=args.depth,
            window=args.window,
            flow_width=args.flow_width,
            mean=self.train.mean(0),
            key=model_key,
        )
        self.observe = None
        if dynamic:
            self.observe = (
                UniformDequantisation(LEVELS[args.data]) if args.decoder == "flow" else binarise
            )

    @property
    def options(self) -> dict:
        """What decides how training goes."""
        args = self.args
        return {
            "objective": free_energy(linear_annealing(over=args.annealing), observe=self.observe),
            "steps": args.steps,
            "learning_rate": args.learning_rate,
            "schedule": "cosine",
            "weight_decay": args.weight_decay,
            "ema": args.ema or None,
        }

    def train_until(self, seconds: float) -> bool:
        """Train, from the checkpoint if there is one; whether it was finished in time."""
        every = min(60.0, max(1.0, seconds / 20))
        try:
            with cut_after(seconds):
                laminar.fit(
                    self.fit_key,
                    self.model,
                    self.train,
                    # The held-out rows are the same bits in both protocols.
                    validation=Batch(self.held_out),
                    batch_size=self.args.batch_size,
                    validate_every=max(self.args.steps // 100, 1),
                    patience=None,
                    checkpoint=Checkpoint(self.checkpoint, seconds=every),
                    resume=True,
                    **self.options,
                )
        except Spent:
            return False
        return True

    def measure(self) -> dict | None:
        """The record of what the checkpoint holds, or None if there is none yet."""
        if not self.checkpoint.exists():
            return None
        recipe = Recipe(self.model, **self.options)
        template = init(jr.key(0), self.model, recipe)
        state, history, _ = load_checkpoint(self.checkpoint, template, {})
        params = state.best if np.isfinite(history.best_loss) else partition(state.model)[0]
        model = eqx.combine(params, partition(self.model, recipe.spec)[1])
        args = self.args
        begun = time.monotonic()
        test = model.log_likelihood(self.test_key, self.test, args.draws)
        seen = model.log_likelihood(self.test_key, self.sample, min(args.draws, 20))
        return {
            "posterior": self.name,
            "layers": self.layers,
            "parameters": sum(leaf.size for leaf in jtu.tree_leaves(partition(self.model)[0])),
            "steps_done": history.steps,
            "best_step": history.best_step,
            "epochs": history.steps * args.batch_size / len(self.train),
            "rollbacks": history.rollbacks,
            "seconds": history.seconds,
            "curve_steps": history.validation_steps.tolist(),
            # Of the parameters or their average, whichever is better.
            "curve_bound": [_plain(v) for v in np.fmin(history.validation, history.validation_ema)],
            "bound": _plain(-test.elbo.mean()),
            "bound_error": _error(test.elbo),
            "nll": _plain(-test.log_prob.mean()),
            "nll_error": _error(test.log_prob),
            "draws_error": _plain(jnp.sqrt((test.error**2).sum()) / len(test.error)),
            "ess": _plain(jnp.median(test.ess)),
            "train_bound": _plain(-seen.elbo.mean()),
            "measuring_s": time.monotonic() - begun,
            "options": {k: _json(v) for k, v in vars(args).items() if k not in FREE},
            "machine": self.machine,
        }


def _plain(value) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _error(values) -> float | None:
    """The standard error of a mean over images."""
    return _plain(values.std(ddof=1) / math.sqrt(values.size))


def _json(value):
    return str(value) if isinstance(value, Path) else value


def report(records: list[dict]) -> str:
    """The table, and in words how far each run is from its end."""
    if not records:
        return "No results yet."
    o, machine = records[0]["options"], records[0]["machine"]
    words = "dequantised pixels" if o["decoder"] == "flow" else f"{o['protocol']} binarisation"
    lines = [
        f"laminar {machine['laminar']}, jax {jax.__version__}; {machine['device']}, "
        f"{machine['cores']} cores; {machine['date']}",
        f"{o['data']}, {words}: {o['latent']} latents, {o['depth']} × {o['width']} maxout units of "
        f"{o['window']}, {o['prior']} prior; batch {o['batch_size']}, {o['steps']:,} steps of "
        f"AdamW, rate {o['learning_rate']:g} with cosine decay, weight decay "
        f"{o['weight_decay']:g}, EMA {o['ema']:g}",
        f"nats on {o['test_rows']:,} test images, ± standard error over images; "
        f"−ln p by {o['draws']} importance samples",
        "",
        "posterior    layers  parameters   steps  epochs    min     −ELBO           −ln p"
        "          ± draws  median ESS  −ELBO train  paper",
    ]
    fixed = o["data"] == "mnist" and o["protocol"] == "fixed" and o["decoder"] != "flow"
    for r in records:
        paper = PUBLISHED.get(r["posterior"]) if fixed else None
        mark = "*" if r["steps_done"] < o["steps"] else " "
        lines.append(
            f"{r['posterior']:<12}{r['layers']:>7}{r['parameters']:>12,}{r['steps_done']:>8,}{mark}"
            f"{r['epochs']:>7.1f}{r['seconds'] / 60:>7.1f}  {pair(r, 'bound')}  {pair(r, 'nll')}"
            f"{number(r['draws_error'], 3):>10}{number(r['ess'], 1):>12}"
            f"{number(r['train_bound']):>13}{'–' if paper is None else paper:>7}"
        )
    if o["decoder"] == "flow":
        d = 784 if o["data"] == "mnist" else 64
        bits = [
            f"{r['posterior']} {r['nll'] / d / math.log(2) + math.log2(LEVELS[o['data']]):.3f}"
            for r in records
            if r["nll"] is not None
        ]
        lines += ["", f"Bits for each dimension: {', '.join(bits)}."]
    if any(r["steps_done"] < o["steps"] for r in records):
        lines.append("* cut by the budget before the learning rate had fallen; --resume goes on.")
    lines += ["", *(convergence(r) for r in records)]
    return "\n".join(lines)


def number(value: float | None, digits: int = 2) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def pair(record: dict, name: str) -> str:
    return f"{number(record[name]):>7} ± {number(record[f'{name}_error']):<5}"


def convergence(record: dict) -> str:
    """How far a run is from its end, in words."""
    o = record["options"]
    text = (
        f"{record['posterior']}: {record['steps_done']:,} of {o['steps']:,} steps; the paper made "
        f"{PAPER_UPDATES:,} updates."
    )
    steps = np.array(record["curve_steps"])
    bound = np.array([np.nan if v is None else v for v in record["curve_bound"]])
    late = steps >= 0.9 * record["steps_done"]
    early = steps < 0.9 * record["steps_done"]
    if late.any() and early.any() and np.isfinite(bound).any():
        gained = np.nanmin(bound[early]) - np.nanmin(bound[late])
        way = "lowered" if gained >= 0 else "raised"
        text += (
            f" The last tenth {way} the held-out bound by {abs(gained):.2f} nats; the best was "
            f"reached after {record['best_step']:,} steps."
        )
    if record["rollbacks"]:
        text += f" {record['rollbacks']} non-finite steps were taken back."
    if record["bound"] is not None and record["train_bound"] is not None:
        ahead = record["bound"] - record["train_bound"]
        text += f" The bound is {ahead:.2f} nats lower on training images."
    return text


def picture(records: list[dict], path: Path) -> None:
    """The held-out bound against steps, and −ln p beside the paper's."""
    import _pictures

    from laminar.report.canvas import dress

    records = [r for r in records if r["nll"] is not None]
    if not records:
        return
    figure, panels = _pictures.figure("dlgm.py", 1, 2, 4.6, 3.4)
    left, right = panels[0]
    colours = ("#000000", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
    o = records[0]["options"]
    lows, highs = [], []
    for i, r in enumerate(records):
        steps = np.array(r["curve_steps"])
        bound = np.array([np.nan if v is None else v for v in r["curve_bound"]])
        shown = steps >= o["annealing"]
        colour = colours[i % len(colours)]
        left.plot(steps[shown], bound[shown], color=colour, lw=1.3, label=r["posterior"])
        lows.append(np.nanmin(bound))
        highs.append(np.nanmedian(bound[shown]) if shown.any() else np.nanmax(bound))
        right.errorbar(
            r["nll"], i, xerr=r["nll_error"], color=colour, marker="o", ms=4, lw=1.3, capsize=2
        )
        paper = PUBLISHED.get(r["posterior"])
        if paper is not None and o["data"] == "mnist" and o["protocol"] == "fixed":
            named = {} if "paper" in right.get_legend_handles_labels()[1] else {"label": "paper"}
            right.plot(paper, i, "x", color=_pictures.GREY, ms=5, **named)
    dress(left, "held out", x="steps", y="−ELBO, nats")
    if np.isfinite(lows + highs).all():
        span = max(max(highs) - min(lows), 1)
        left.set_ylim(min(lows) - 0.05 * span, max(highs) + 0.5 * span)
    dress(right, "test images", x="−ln p(x), nats")
    right.set_yticks(range(len(records)), [r["posterior"] for r in records])
    right.invert_yaxis()
    _pictures.legend(figure, panels)
    _pictures.write(figure, path)


def posterior_names(text: str) -> tuple[str, ...]:
    """Kinds of posterior between commas, each with a number of layers or without."""
    names = tuple(text.split(","))
    for name in names:
        match = re.fullmatch(r"([a-z]+)(-[1-9]\d*)?", name)
        if match is None or match[1] not in LAYERS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is none of {', '.join(LAYERS)}, as in planar-80"
            )
    return names


def options():
    parser = _common.parser(
        __doc__.splitlines()[0],
        budget="seconds of this run after which training is cut; measuring comes on top",
        out=Path("runs/dlgm.jsonl"),
        default=3600,
    )
    parser.add_argument("--data", choices=tuple(SIZES), default="mnist")
    parser.add_argument("--protocol", choices=("fixed", "dynamic"), default="fixed")
    parser.add_argument(
        "--posterior",
        type=posterior_names,
        default=ORDER,
        help=f"kinds with layers, in the order to train them: {','.join(ORDER)}",
    )
    parser.add_argument("--prior", choices=("normal", "flow"), default="normal")
    parser.add_argument("--decoder", choices=("bernoulli", "flow"), default="bernoulli")
    for name in SIZES["mnist"]:
        usual = ", ".join(f"{data} {sizes[name]}" for data, sizes in SIZES.items())
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"by default {usual}")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--window", type=int, default=4, help="of maxout; 1 is ReLU")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--ema", type=float, default=0.999, help="0 does not average")
    parser.add_argument("--draws", type=int, default=200, help="importance samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="where the picture goes, as PNG")
    parser.add_argument("--report", action="store_true", help="only print what is in --out")
    args = parser.parse_args()
    for name, usual in SIZES[args.data].items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    return args


def main():
    args = options()
    begun = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {**_common.machine(), "device": jax.devices()[0].device_kind}
    if not args.report:
        left = args.out.parent.glob(f"{args.out.stem}.*.ckpt")
        _common.guard([args.out, *sorted(left)], args)
    records = {r["posterior"]: r for r in _common.read_lines(args.out)}
    names = () if args.report else args.posterior
    here = {k: _json(v) for k, v in vars(args).items() if k not in FREE}
    waiting = []
    for name in names:
        seconds = args.budget - (time.monotonic() - begun)
        done = records.get(name)
        for record in records.values():
            _common.refuse_change(args.out, record["options"], here)
        if done is not None and done["steps_done"] >= args.steps:
            continue
        if seconds <= 0:
            waiting.append(name)
            continue
        print(f"{time.monotonic() - begun:6.0f} s  {name}", file=sys.stderr, flush=True)
        cell = Cell(name, args, machine)
        if not cell.train_until(args.budget - (time.monotonic() - begun)):
            print(f"{name}: the budget is spent.", file=sys.stderr, flush=True)
        found = cell.measure()
        if found is None:
            waiting.append(name)
            continue
        records[name] = found
        atomic_write(args.out, "".join(json.dumps(r) + "\n" for r in records.values()).encode())
    print(report(list(records.values())))
    if waiting:
        print(f"\nNot begun within {args.budget:.0f} s: {', '.join(waiting)}.")
    if args.picture is not None:
        picture(list(records.values()), args.picture)


if __name__ == "__main__":
    main()
