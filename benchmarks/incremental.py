"""Inverting masked autoregressive flows: one incremental pass against D full passes.

For every D the same random flow (5 spline layers, hidden 128 × 2, 8 bins by default) maps the same
noise to data, once by laminar's incremental pass and once as every other library does it, by D
dense passes of each layer. Compared are the values, the time of a run, and the time to compile.

    python benchmarks/incremental.py [--budget 600] [--resume]
"""

import json
import time
from pathlib import Path

import _common
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax

import laminar
from laminar import zoo
from laminar._files import atomic_write
from laminar._params import partition

DIMS = (2, 8, 43, 128, 512)


def random_flow(dim: int, args):
    """A spline flow whose weights are random enough that it is far from the identity."""
    flow = zoo.nsf(dim, key=jr.key(0), layers=args.layers, width=args.width, depth=2, bins=8)
    trained, rest = partition(flow)
    leaves, treedef = jtu.tree_flatten(trained)
    keys = jr.split(jr.key(1), len(leaves))
    leaves = [
        leaf + 0.3 * jr.normal(k, leaf.shape) / np.sqrt(max(leaf.shape[-1], 1))
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return eqx.combine(jtu.tree_unflatten(treedef, leaves), rest)


def incremental(flow, z):
    return flow.bijection.forward(z)[0]


def full_passes(flow, z):
    """D dense passes for each layer, in the leanest form: a loop of passes in a scan of layers."""
    dynamic, static = eqx.partition(flow.bijection.layers, eqx.is_array)

    def layer_forward(z, part):
        layer = eqx.combine(part, static)

        def one_pass(_, x):
            theta = layer.net(x) + layer.template.params[:, None, None]
            return layer.template.forward_kernel(theta, z)[0]

        return lax.fori_loop(0, z.shape[0], one_pass, jnp.zeros_like(z)), None

    return lax.scan(layer_forward, z, dynamic)[0]


def log_prob(flow, x):
    return flow._log_prob(x)


def measure(function, flow, x, rounds: int):
    """Seconds to compile, median seconds of a run, and the value."""
    begun = time.perf_counter()
    compiled = eqx.filter_jit(function).lower(flow, x).compile()
    compiling = time.perf_counter() - begun
    value = jax.block_until_ready(compiled(flow, x))
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(flow, x))
        times.append(time.perf_counter() - begun)
    return compiling, float(np.median(times)), np.asarray(value)


def rows_for(dim: int, args) -> int:
    """Full passes cost D times more, so large D gets fewer rows; both methods get the same."""
    return min(args.rows, max(256, args.rows * 43 // dim))


def cell(dim: int, args) -> dict:
    flow = random_flow(dim, args)
    rows = rows_for(dim, args)
    z = jr.normal(jr.key(2), (dim, rows))
    rounds = 3 if dim > 128 else 5
    new = measure(incremental, flow, z, rounds)
    old = measure(full_passes, flow, z, 1 if dim > 43 else 3)
    dense = measure(log_prob, flow, jnp.asarray(new[2]), rounds)
    scale = np.maximum(np.abs(old[2]), 1)
    return {
        "dim": dim,
        "rows": rows,
        "incremental_s": new[1],
        "full_passes_s": old[1],
        "log_prob_s": dense[1],
        "speed_up": old[1] / new[1],
        "over_log_prob": new[1] / dense[1],
        "compile_incremental_s": new[0],
        "compile_full_s": old[0],
        "largest_difference": float((np.abs(new[2] - old[2]) / scale).max()),
        "layers": args.layers,
        "width": args.width,
    }


def main():
    parser = _common.parser(
        __doc__.splitlines()[0],
        budget="seconds after which no other D begins",
        out=Path("runs/incremental.jsonl"),
        default=600,
    )
    parser.add_argument("--dims", type=_common.numbers, default=DIMS)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    _common.guard([args.out], args)
    results = _common.read_lines(args.out)
    for result in results:
        asked = {"rows": rows_for(result["dim"], args), "layers": args.layers, "width": args.width}
        _common.refuse_change(args.out, result, asked)
    begun = time.monotonic()
    for dim in args.dims:
        if any(r["dim"] == dim for r in results) or time.monotonic() - begun > args.budget:
            continue
        results.append(cell(dim, args))
        results.sort(key=lambda r: r["dim"])
        atomic_write(args.out, "".join(json.dumps(r) + "\n" for r in results).encode())
    print(f"laminar {laminar.__version__}, jax {jax.__version__}, {jax.devices()[0].platform}")
    print(
        f"{args.layers} spline layers, hidden {args.width} × 2, 8 bins\n"
        "   D    rows  incremental  D passes   ratio  / log_prob  compile (D passes)  difference"
    )
    for r in results:
        print(
            f"{r['dim']:4d} {r['rows']:7d} {r['incremental_s']:10.3f} s {r['full_passes_s']:8.3f} s"
            f" {r['speed_up']:6.1f}× {r['over_log_prob']:10.2f}×"
            f" {r['compile_incremental_s']:7.1f} s ({r['compile_full_s']:.1f} s)"
            f"     {r['largest_difference']:.1e}"
        )


if __name__ == "__main__":
    main()
