"""Density of natural image patches (BSDS300), the field's standard test of expressive flows.

8×8 grey patches, (x + U[0, 1)) / 256, minus the patch mean, without the last pixel: 63 columns
(Zoran & Weiss 2011; Uria et al. 2013). Patches are cut on the fly: batch i of epoch e is a function
of (seed, e, i). Validation patches come from training images that are held out whole, test patches
from the public test images. Because few images are at hand, and images differ much, the figure
reported is the gain over a full-covariance Gaussian fitted to the same training patches, with a
standard error over test images.

The flow is an autoregressive neural spline flow that starts as the identity over a Gaussian mixture
fitted by EM (--components 0: over a standard normal), behind a linear map that whitens.

--budget bounds everything up to the trained flow: cutting patches, the whitening, EM, compilation
and training, over all resumed parts of a run; the evaluation comes on top. A small budget takes
fewer rows for the covariance and for EM.

    LAMINAR_DATA=… python benchmarks/bsds300.py --budget 3600 [--resume]
"""

import json
import time
from pathlib import Path

import _common
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import laminar
from laminar import zoo
from laminar._files import atomic_write
from laminar._params import positive_inverse
from laminar.bijections.base import Invert
from laminar.bijections.compose import Chain
from laminar.bijections.linear import Triangular
from laminar.flow import Flow
from laminar.io import load, save
from laminar.mixtures import GaussianMixture
from laminar.objectives import Batch
from laminar.train import fit
from laminar.train.checkpoint import Checkpoint
from laminar.train.mixtures import fit_components

SIDE = 8
HELD_OUT_IMAGES = 20
HELD_OUT_ROWS = 10_000
MOMENT_ROWS = (20_000, 500_000)  # for the covariance: at least, at most; 1,000 for each second
FEWEST_EM_ROWS = 1000
EM_SHARE = 0.3  # of the budget
# What may differ when a run goes on: where, how long, and what comes after training.
FREE = ("budget", "resume", "restart", "out", "optional", "test_rows")
PUBLISHED = "MAF 58.3-60.3, RQ-NSF 60.9, TAN 63.1 (gain over a full-covariance Gaussian, nats)"


class Patches:
    """A stream of batches of patches, each a function of (seed, epoch, index) alone."""

    def __init__(self, images: np.ndarray, size: int, batches: int, seed: int):
        self.windows = sliding_window_view(images, (SIDE, SIDE), axis=(1, 2))
        self.size, self.batches, self.seed = size, batches, seed

    def __len__(self) -> int:
        return self.batches

    def batch(self, epoch: int, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, epoch, index))
        count, height, width = self.windows.shape[:3]
        image = rng.integers(0, count, self.size)
        row = rng.integers(0, height, self.size)
        column = rng.integers(0, width, self.size)
        return Batch(prepare(self.windows[image, row, column], rng))

    def take(self, rows: int) -> np.ndarray:
        """So many patches, from epochs that training does not reach."""
        batches = -(-rows // self.size)
        parts = [self.batch(2**31 + i, 0).x for i in range(batches)]
        return np.concatenate(parts)[:rows]


def prepare(patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dequantise, take the mean of each patch off, drop the last pixel."""
    x = (patches.reshape(len(patches), -1) + rng.random((len(patches), SIDE * SIDE))) / 256
    return (x - x.mean(1, keepdims=True))[:, :-1].astype(np.float32)


def whitening(mean: np.ndarray, inverse: np.ndarray) -> Invert:
    """The linear map that takes white noise to patches; its inverse is one product, L⁻¹ (x − m)."""
    dim = len(mean)
    raw = np.tril(inverse, -1) + np.diag(np.asarray(positive_inverse(jnp.diag(inverse))))
    white = eqx.tree_at(
        lambda t: (t.raw, t.shift),
        Triangular(dim),
        (jnp.asarray(raw, jnp.float32), jnp.asarray(-inverse @ mean, jnp.float32)),
    )
    return Invert(white)


def mixture(args, source: Patches, mean: np.ndarray, inverse: np.ndarray):
    """A mixture fitted by EM to whitened patches, and the number of rows it has seen.

    EM is tried on ever more rows, up to --em-rows, as long as the next trial, which takes four
    times the last one, fits into its share of the budget.
    """
    begun = time.monotonic()
    z = (source.take(args.em_rows) - mean) @ inverse.T
    for part in (64, 16, 4, 1):
        rows = min(max(len(z) // part, 20 * args.components, FEWEST_EM_ROWS), len(z))
        tried = time.monotonic()
        found = fit_components(z[:rows], args.components, 50.0, seed=args.seed, iterations=40)
        now = time.monotonic()
        if now - begun + 4 * (now - tried) > EM_SHARE * args.budget:
            break
    factors = found.factors
    return GaussianMixture(found.weights, found.means, factors @ factors.transpose(0, 2, 1)), rows


def build(args, source: Patches):
    """The flow before training, the Gaussian it is compared with, and the rows of EM.

    With a mixture as its base the flow starts at the mixture's density.
    """
    fewest, most = MOMENT_ROWS
    sample = source.take(int(np.clip(1000 * args.budget, fewest, most))).astype(np.float64)
    mean, covariance = sample.mean(0), np.cov(sample.T)
    inverse = np.linalg.inv(np.linalg.cholesky(covariance))
    base, em_rows = mixture(args, source, mean, inverse) if args.components else (None, 0)
    stack = zoo.nsf(
        len(mean),
        key=jr.key(args.seed),
        layers=args.layers,
        width=args.width,
        depth=args.depth,
        bins=args.bins,
        residual=args.residual,
        affine=True,
        base=base,
    )
    flow = Flow(stack.base, Chain([stack.bijection, whitening(mean, inverse)]))
    return flow, GaussianMixture([1.0], mean[None], covariance[None]), em_rows


def prepared(args, source: Patches, begun: float):
    """The flow and the Gaussian, built or read again, and the seconds that this took in all."""
    run, start, reference = (
        args.out / name for name in ("run.json", "start.laminar", "gaussian.laminar")
    )
    options = {k: v for k, v in vars(args).items() if k not in FREE}
    written = {"em_rows_used": 0, "setup_seconds": 0.0}
    if run.exists():
        written = json.loads(run.read_text())
        _common.refuse_change(args.out, written["options"], options)
        flow, gaussian = load(start), load(reference)
    else:
        flow, gaussian, written["em_rows_used"] = build(args, source)
        save(start, flow)
        save(reference, gaussian)
    written["options"] = options
    written["setup_seconds"] += time.monotonic() - begun
    # Last, so that its presence means that the others are whole.
    atomic_write(run, json.dumps(written, indent=1).encode())
    return flow, gaussian, written


def evaluate(flow: Flow, gaussian: GaussianMixture, images: np.ndarray, rows: int, seed: int):
    """Mean log-likelihoods per test image, of the flow and of the Gaussian."""
    score = eqx.filter_jit(lambda d, x: d.log_prob(x))
    out = []
    for i, image in enumerate(images):
        x = Patches(image[None], rows, 1, seed + i).batch(0, 0).x
        out.append((float(score(flow, x).mean()), float(score(gaussian, x).mean())))
    return np.asarray(out)


def arguments():
    parser = _common.parser(
        __doc__.splitlines()[0],
        budget="seconds for set-up and training, in all",
        out=Path("runs/bsds300"),
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--residual", action="store_true")
    parser.add_argument("--components", type=int, default=50)
    parser.add_argument("--em-rows", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--test-rows", type=int, default=250_000)
    return parser.parse_args()


def main():
    args = arguments()
    begun = time.monotonic()
    arrays = _common.Arrays("bsds300_gray.npz", args.optional)
    images, test = arrays["train"], arrays["test"]
    args.out.mkdir(parents=True, exist_ok=True)
    names = ("run.json", "start.laminar", "gaussian.laminar", "flow.laminar", "result.json")
    checkpoint = Checkpoint(args.out / "checkpoint.safetensors", seconds=300)
    _common.guard([*(args.out / name for name in names), Path(checkpoint.path)], args)

    order = np.random.default_rng(args.seed).permutation(len(images))
    train = Patches(images[order[HELD_OUT_IMAGES:]], args.batch_size, 1000, args.seed)
    held_out = Patches(images[order[:HELD_OUT_IMAGES]], HELD_OUT_ROWS, 1, args.seed + 1)
    validation = Batch(held_out.take(HELD_OUT_ROWS))
    flow, gaussian, written = prepared(args, train, begun)
    setup = written["setup_seconds"]
    print(f"set-up (cutting, whitening, EM): {setup:.0f} s", flush=True)
    flow, history = fit(
        jr.key(args.seed + 2),
        flow,
        train,
        validation=validation,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        # Where set-up has taken all, training is compiled and takes a step or two.
        time_limit=max(args.budget - setup, 1.0),
        patience=None,
        ema=0.999,
        checkpoint=checkpoint,
        resume=args.resume,
        progress=True,
    )
    save(args.out / "flow.laminar", flow)

    per_image = evaluate(flow, gaussian, test, args.test_rows // len(test), args.seed + 100)
    gain = per_image[:, 0] - per_image[:, 1]
    result = {
        "laminar": laminar.__version__,
        "jax": jax.__version__,
        "gain": gain.mean(),
        "gain_standard_error": gain.std(ddof=1) / np.sqrt(len(gain)),
        "flow": per_image[:, 0].mean(),
        "gaussian": per_image[:, 1].mean(),
        "flow_standard_error": per_image[:, 0].std(ddof=1) / np.sqrt(len(gain)),
        "steps": history.steps,
        "best_step": history.best_step,
        "seconds": history.seconds + setup,
        "em_rows_used": written["em_rows_used"],
        "options": {k: str(v) for k, v in vars(args).items()},
    }
    atomic_write(args.out / "result.json", json.dumps(result, indent=1).encode())
    print(json.dumps(result, indent=1))
    print(
        f"\nfull-covariance Gaussian {result['gaussian']:.2f} nats, laminar {result['flow']:.2f}: "
        f"gain {result['gain']:.2f} ± {result['gain_standard_error']:.2f} over {len(gain)} test "
        f"images, after {history.steps} steps in {result['seconds']:.0f} s\n{PUBLISHED}"
    )


if __name__ == "__main__":
    main()
