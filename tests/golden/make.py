"""Make the golden file of this version: ``python tests/golden/make.py``.

It holds a small flow of every kind of part and, beside it in JSON, log-densities it gave when it
was saved. Files of released versions are never made again: they must load for ever.
"""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from laminar import _registry
from laminar._params import Frozen, trainable
from laminar._version import __version__
from laminar.bijections.autoregressive import masked_autoregressive
from laminar.bijections.base import Invert
from laminar.bijections.compose import Chain, Permute, repeat
from laminar.bijections.coupling import coupling
from laminar.bijections.elementwise import Affine, SinhArcsinh
from laminar.bijections.linear import LU, ActNorm
from laminar.bijections.splines import RationalQuadratic
from laminar.flow import Flow
from laminar.io import save
from laminar.mixtures import GaussianMixture

FOLDER = Path(__file__).parent
DIM, COND = 3, 2


def shake(tree, key):
    """Parameters of order one tenth around the identity."""
    dynamic, static = eqx.partition(tree, trainable(tree))
    leaves, structure = jtu.tree_flatten(dynamic)
    keys = jr.split(key, len(leaves))
    moved = [x + 0.1 * jr.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jtu.tree_unflatten(structure, moved), static)


def make_flow() -> Flow:
    """A conditional flow with one part of every kind."""
    sizes = {"width": 6, "depth": 1, "cond_dim": COND}
    spline = RationalQuadratic(3)

    def layer(key):
        return masked_autoregressive(DIM, spline, key=key, **sizes)

    parts = [
        ActNorm((DIM,)),
        LU(DIM),
        repeat(layer, 2, key=jr.key(0)),
        Permute([2, 0, 1]),
        Invert(coupling(DIM, spline, key=jr.key(1), **sizes)),
        coupling(DIM, Affine(max_log_scale=3.0), key=jr.key(2), **sizes),
        SinhArcsinh(shape=(DIM,)),
    ]
    base = GaussianMixture(np.array([0.3, 0.7]), np.array([[1.0, 0, 0], [0, -1, 0]]))
    return Flow(Frozen(base), shake(Chain(parts), jr.key(3)))


def main() -> None:
    """Write the model, its log-densities and the names of the registry."""
    flow = make_flow()
    x = jr.normal(jr.key(4), (8, DIM), jnp.float32) * 2
    condition = jr.normal(jr.key(5), (8, COND), jnp.float32)
    path = FOLDER / f"v{__version__}.lam"
    if path.exists():
        raise SystemExit(f"{path} exists; golden files are never made again.")
    save(path, flow, {"note": "golden"})
    expected = {
        "x": np.asarray(x, np.float64).tolist(),
        "condition": np.asarray(condition, np.float64).tolist(),
        "log_prob": np.asarray(flow.log_prob(x, condition), np.float64).tolist(),
        "names": sorted(n for n in _registry._own().things if "." not in n),
    }
    (FOLDER / f"v{__version__}.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    main()
