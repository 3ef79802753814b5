"""The physical floor: the matrix products of a flow alone, and what the machine reaches at most.

The products of all layers run one after the other in a scan, with nothing between them. The step
has the forward product and the two backward ones, for the inputs and for the weights.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

OPS = (
    "floor_log_prob",
    "floor_log_prob_masked",
    "floor_step",
    "floor_step_masked",
    "peak_flops",
    "peak_bytes",
)


@jax.jit
def forward(weights, masks, x):
    """The products of a pass."""

    def layer(x, at):
        h = x
        for w in masked(*at):
            h = w @ h
        return following(h, x), None

    return lax.scan(layer, x, (weights, masks))[0]


@jax.jit
def forward_and_back(weights, masks, x):
    """The products of a gradient; the last outputs stand for the gradient that comes back."""

    def layer(x, at):
        at = masked(*at)
        inputs = [x]
        for w in at:
            inputs.append(w @ inputs[-1])
        back, grads = lax.optimization_barrier(inputs[-1]), []
        for w, h in zip(reversed(at), reversed(inputs[:-1]), strict=True):
            grads.append(back @ h.T)
            back = w.T @ back
        return following(back, x), grads

    return lax.scan(layer, x, (weights, masks))


def masked(weights, masks):
    """Weights with forbidden connections set to zero, where there are masks."""
    if masks is None:
        return weights
    return [jnp.where(m, w, 0) for w, m in zip(weights, masks, strict=True)]


def following(h, x):
    """The next layer's input, which needs the whole of h: the barrier keeps the compiler from
    computing only the rows that are looked at."""
    return x + 1e-6 * lax.optimization_barrier(h)[: x.shape[0]]


@jax.jit
def product(a, b):
    return a @ b


@functools.partial(jax.jit, donate_argnums=0)
def touch(x):
    """Read and write every number once, in place."""
    return x + 1.0


class Floor:
    """Floor programs of one cell.

    Args:
        spec: What the libraries build; its `products` are the (outputs, inputs) of a layer.
    """

    def __init__(self, spec):
        self.spec, self.sizes = spec, spec["products"]
        keys = jr.split(jr.key(6), len(self.sizes))
        layers = spec["layers"]
        self.weights = [
            jr.normal(key, (layers, out, into)) / np.sqrt(max(into, out))
            for key, (out, into) in zip(keys, self.sizes, strict=True)
        ]
        self.masks = None
        if spec["arch"] != "nsf_coupling":
            # Half of the connections, as an autoregressive order leaves.
            self.masks = [
                jnp.broadcast_to(
                    jnp.arange(out)[:, None] / out >= jnp.arange(into)[None] / into, w.shape
                )
                for w, (out, into) in zip(self.weights, self.sizes, strict=True)
            ]
        self.inputs = {}
        on_cpu = jax.devices()[0].platform == "cpu"
        self.side = 2048 if on_cpu else 8192
        self.length = 2**26 if on_cpu else 2**29
        self.square = self.line = None

    def call(self, op, rows, count):
        """Run one of `OPS`."""
        if op == "peak_flops":
            if self.square is None:
                self.square = jr.normal(jr.key(0), (self.side, self.side))
            return product(self.square, self.square)
        if op == "peak_bytes":
            if self.line is None:
                self.line = jnp.zeros(self.length)
            self.line = touch(self.line)
            return self.line
        masks = self.masks if op.endswith("_masked") else None
        function = forward_and_back if "step" in op else forward
        return function(self.weights, masks, self._input(rows))

    def work(self, op, rows):
        """Operations or bytes of one call."""
        if op == "peak_flops":
            return {"flops": 2.0 * self.side**3}
        if op == "peak_bytes":
            return {"bytes": 8.0 * self.length}
        if op in OPS:
            passes = 3 if "step" in op else 1
            one = sum(out * into for out, into in self.sizes)
            return {"flops": 2.0 * passes * self.spec["layers"] * one * rows}
        return {}

    def _input(self, rows):
        into = self.sizes[0][1]
        if rows not in self.inputs:
            self.inputs[rows] = jr.normal(jr.key(7), (into, rows))
        return self.inputs[rows]
