"""laminar's part of a race: `laminar.train.fit` as a user calls it.

Without --limit nothing is given but the flow and the rows: optimiser, rate, schedule, batch and
patience are what `fit` does by default, and batch and rate are noted beside the curve. With --limit
the budget is given as `time_limit`, which the schedule of the rate then fills. The history has the
times, which count from the call; it is read as it grows, so that the budget can end a fit.
"""

import importlib
import inspect

import jax.random as jr
from _race_fit import Curve, OutOfTime, arguments, read

import laminar
from laminar.train import fit
from laminar.train.source import as_batch
from laminar.zoo import nsf

DEFAULTS = {name: given.default for name, given in inspect.signature(fit).parameters.items()}
BATCH, RATE = DEFAULTS["batch_size"], DEFAULTS["learning_rate"]


def follow(curve: Curve, rows: int, stops: bool) -> None:
    """Have every validation that the history notes added to the curve.

    The one before the first step is left out: the rivals have none.
    """
    books = importlib.import_module("laminar.train.fit")._Books
    note = books.add_assessment

    def noted(self, step, elapsed, assessment):
        note(self, step, elapsed, assessment)
        if step == 0:
            return
        point = {"epoch": step * BATCH / rows, "seconds": elapsed}
        try:
            curve.add(-float(assessment.loss), **point)
        except OutOfTime:
            if stops:
                raise

    books.add_assessment = noted


def main():
    args = arguments("laminar's part of a race.")
    rows = read(args.data)
    curve = Curve(args)
    follow(curve, len(rows.train), stops=not args.limit)
    flow_key, fit_key = jr.split(jr.key(args.seed))
    flow = nsf(
        rows.train.shape[1],
        key=flow_key,
        layers=args.layers,
        width=args.width,
        depth=2,
        bins=args.bins,
    )
    limit = {"time_limit": args.budget} if args.limit else {}
    curve.write(versions={"laminar": laminar.__version__}, batch_size=BATCH, rate=RATE)
    curve.begin()
    reason = "budget"
    try:
        held_out = as_batch(rows.validation)
        _, history = fit(fit_key, flow, rows.train, validation=held_out, progress=False, **limit)
        reason = history.stop_reason
    except OutOfTime:
        pass
    curve.end(reason)


if __name__ == "__main__":
    main()
