"""FlowJAX's part of a race: `fit_to_data` with its defaults.

Adam at 5e-4, batches of 100, at most 100 epochs, patience of 5 epochs. The loop reports to its
progress bar after every epoch; a bar of our own notes the time and the validation loss instead.
`fit_to_data` splits the rows itself; they are laid out so that its split is that of the others, and
what the split gives is compared with them.
"""

import importlib
import time
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _race_fit import Curve, OutOfTime, arguments, read
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import fit_to_data


class Bar:
    """Stands in for tqdm: passes the epochs on, and notes what the loop reports after each."""

    postfix = ""
    curve: Curve
    split: "Split"

    def __init__(self, epochs, **_):
        self._epochs, self._done = epochs, 0

    def __iter__(self):
        self.split.insist()
        return iter(self._epochs)

    def set_postfix(self, losses):
        self._done += 1
        self.curve.add(-losses["val"], epoch=self._done)

    def set_postfix_str(self, text):
        self.postfix = text


class Split:
    """FlowJAX's split, which ends the fit if its parts are not ours: no row may be in both uses.

    Comparing takes no time of the fit.
    """

    def __init__(self, split, rows, curve):
        self._split, self._rows, self._curve, self._seen = split, rows, curve, False

    def __call__(self, *args, **options):
        parts = self._split(*args, **options)
        since = time.perf_counter()
        for (part,), ours in zip(parts, self._rows, strict=True):
            if not np.array_equal(np.asarray(part), ours):
                raise SystemExit("FlowJAX splits otherwise than this script expects.")
        self._seen = True
        self._curve.pause(since)
        return parts

    def insist(self):
        """End the fit if the rows were not split by this function."""
        if not self._seen:
            raise SystemExit("FlowJAX no longer splits by the function that this script checks.")


def laid_out(rows, key):
    """All rows in the order that the split of `fit_to_data` with this key turns into ours."""
    ordered = np.concatenate([rows.train, rows.validation])
    _, split_key = jr.split(key)
    laid = np.empty_like(ordered)
    laid[np.asarray(jr.permutation(split_key, len(ordered)))] = ordered
    return laid, len(rows.validation) / len(ordered)


def main():
    args = arguments("FlowJAX's part of a race.")
    rows = read(args.data)
    curve = Bar.curve = Curve(args)
    loops: Any = importlib.import_module("flowjax.train.loops")
    loops.tqdm = Bar
    loops.train_val_split = Bar.split = Split(loops.train_val_split, rows, curve)
    flow_key, fit_key = jr.split(jr.key(args.seed))
    data, share = laid_out(rows, fit_key)
    flow = masked_autoregressive_flow(
        flow_key,
        base_dist=Normal(jnp.zeros(data.shape[1])),
        # It counts inner knots, one fewer than bins.
        transformer=RationalQuadraticSpline(knots=args.bins - 1, interval=5),
        flow_layers=args.layers,
        nn_width=args.width,
        nn_depth=2,
    )
    # Nothing compiled here may serve the fit.
    jax.clear_caches()
    curve.write(versions={"FlowJAX": version("flowjax")}, batch_size=100)
    curve.begin()
    reason = "100 epochs"
    try:
        _, losses = fit_to_data(fit_key, flow, data, val_prop=share)
        if len(losses["val"]) < 100:
            reason = "patience"
    except OutOfTime:
        reason = "budget"
    curve.end(reason)


if __name__ == "__main__":
    main()
