"""zuko, nflows and normflows: eager, or compiled, with the training loop of their tutorials."""

import contextlib
import copy
import functools
import importlib.metadata
import os

import numpy as np
import torch
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Plain(nn.Module):
    """A multi-layer perceptron of two hidden layers that takes, and ignores, a context.

    The couplings of nflows and normflows take any such network; their own are residual. They read
    `hidden_features` to scale what goes into the softmax.
    """

    def __init__(self, inputs, outputs, width):
        super().__init__()
        self.hidden_features = width
        self.layers = nn.Sequential(
            nn.Linear(inputs, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, outputs),
        )

    def forward(self, inputs, context=None):
        return self.layers(inputs)


def alternating(dim, i):
    """A mask of every other column."""
    return (torch.arange(dim) + i) % 2


def build_zuko(spec):
    """Splines act on [−5, 5], which cannot be chosen by its `NSF`."""
    import zuko

    dim, bins = spec["dim"], spec["bins"]
    shared = {"transforms": spec["layers"], "hidden_features": (spec["width"],) * 2}
    if spec["arch"] == "nsf_ar":
        flow = zuko.flows.NSF(dim, bins=bins, **shared)
    elif spec["arch"] == "nsf_coupling":
        shapes = [(bins,), (bins,), (bins - 1,)]
        spline = zuko.transforms.MonotonicRQSTransform
        flow = zuko.flows.RealNVP(dim, univariate=spline, shapes=shapes, **shared)
    else:
        flow = zuko.flows.MAF(dim, **shared)
    return flow, lambda flow, x: flow().log_prob(x), lambda flow, n: flow().sample((n,))


def shared_options(spec) -> tuple[dict, dict]:
    """Of a spline and of a masked network, in the words of nflows, which normflows took over."""
    spline = {"num_bins": spec["bins"], "tails": "linear", "tail_bound": spec["interval"]}
    made = {"hidden_features": spec["width"], "num_blocks": 1, "use_residual_blocks": False}
    return spline, made


def build_nflows(spec):
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import (
        CompositeTransform,
        MaskedAffineAutoregressiveTransform,
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        PiecewiseRationalQuadraticCouplingTransform,
        ReversePermutation,
    )

    dim, width = spec["dim"], spec["width"]
    spline, made = shared_options(spec)

    def layer(i):
        if spec["arch"] == "nsf_ar":
            kind = MaskedPiecewiseRationalQuadraticAutoregressiveTransform
            return [ReversePermutation(dim), kind(dim, **made, **spline)]
        if spec["arch"] == "maf":
            return [ReversePermutation(dim), MaskedAffineAutoregressiveTransform(dim, **made)]
        net = functools.partial(Plain, width=width)
        return [PiecewiseRationalQuadraticCouplingTransform(alternating(dim, i), net, **spline)]

    layers = [part for i in range(spec["layers"]) for part in layer(i)]
    flow = Flow(CompositeTransform(layers), StandardNormal([dim]))
    return flow, lambda flow, x: flow.log_prob(x), lambda flow, n: flow.sample(n)


def build_normflows(spec):
    import normflows as nf
    from normflows.flows.neural_spline.autoregressive import (
        MaskedPiecewiseRationalQuadraticAutoregressive,
    )
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    dim, width = spec["dim"], spec["width"]
    spline, made = shared_options(spec)

    def layer(i):
        # In these classes forward is from data to latent, the other way round than in a model.
        if spec["arch"] == "nsf_ar":
            masked = MaskedPiecewiseRationalQuadraticAutoregressive(dim, **made, **spline)
        elif spec["arch"] == "maf":
            masked = nf.flows.MaskedAffineAutoregressive(dim, **made)
        else:
            net = functools.partial(Plain, width=width)
            masked = PiecewiseRationalQuadraticCoupling(alternating(dim, i), net, **spline)
            return [nf.flows.Reverse(masked)]
        return [nf.flows.Permute(dim), nf.flows.Reverse(masked)]

    layers = [part for i in range(spec["layers"]) for part in layer(i)]
    base = nf.distributions.DiagGaussian(dim, trainable=False)
    flow = nf.NormalizingFlow(base, layers)
    return flow, lambda flow, x: flow.log_prob(x), lambda flow, n: flow.sample(n)[0]


BUILDERS = {"zuko": build_zuko, "nflows": build_nflows, "normflows": build_normflows}


class Adapter:
    def __init__(self, name):
        self.name = name
        self.library = name.removesuffix("_compiled")
        self.compiled = name.endswith("_compiled")
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if DEVICE.type == "cuda":
            # What JAX does by default: products in TF32.
            torch.set_float32_matmul_precision("high")

    def build(self, spec):
        self.spec, rng = spec, np.random.default_rng(0)
        torch.manual_seed(0)
        flow, score, draw = BUILDERS[self.library](spec)
        with torch.no_grad():
            for p in flow.parameters():
                p += 0.1 * torch.randn_like(p) / np.sqrt(max(p.shape[-1:] or (1,)))
        self.flow = flow.to(DEVICE)
        self.trained = copy.deepcopy(self.flow)
        self.optimizer = torch.optim.Adam(self.trained.parameters(), lr=spec["rate"])
        data = rng.standard_normal((spec["rows"], spec["dim"])).astype(np.float32)
        count = spec["batch"] * spec["train_batches"]
        train = rng.standard_normal((count, spec["dim"])).astype(np.float32)
        self.data = torch.from_numpy(data).to(DEVICE)
        self.batches = torch.from_numpy(train).to(DEVICE).split(spec["batch"])
        wrap = torch.compile if self.compiled else lambda function: function
        self.score = wrap(lambda x: score(self.flow, x))
        self.loss = wrap(lambda x: -score(self.trained, x).mean())
        self.draws = functools.cache(lambda rows: wrap(lambda: draw(self.flow, rows)))
        self.done = 0

    def call(self, op, rows, count):
        with contextlib.nullcontext() if op == "step" else torch.no_grad():
            value = getattr(self, op)(rows, count)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return value

    def finite(self, value):
        """Whether every number is finite."""
        return bool(torch.isfinite(value).all())

    def step(self, rows, count):
        loss = torch.zeros(())
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = self.loss(self.batches[self.done % len(self.batches)])
            loss.backward()
            self.optimizer.step()
            self.done += 1
        return loss.detach()

    def log_prob(self, rows, count):
        return self.score(self.data[:rows])

    def sample(self, rows, count):
        return self.draws(rows)()

    def info(self):
        name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
        parameters = [p for p in self.flow.parameters() if p.requires_grad]
        return {
            "parameters": sum(p.numel() for p in parameters),
            "versions": {n: importlib.metadata.version(n) for n in (self.library, "torch")},
            "platform": "gpu" if DEVICE.type == "cuda" else "cpu",
            "device": name,
            "threads": torch.get_num_threads(),
        }

    def device_memory(self):
        """Bytes in use and their peak since the last look, or None on a CPU."""
        if DEVICE.type != "cuda":
            return None
        found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def work(self, op, rows):
        return {}

    def analyse(self, rows):
        return {}
