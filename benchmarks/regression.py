"""FlowRegressor against what gives a law of a number: log score and coverage on seven tables.

For each table, split and method, on the same rows: the mean log-density of test responses (nats, in
units of the training responses' deviation), the share of them in the central 90% interval, the root
mean squared error of the mean, and seconds. Rivals are a network with a Gaussian likelihood
(laminar's own, stopped on held-out rows), NGBoost at its defaults with early stopping, and
scikit-learn's boosting of 21 quantiles, joined to a density. Every method has one setting for all
tables. Responses with ties are dequantised once, before any method sees them: a density of ties
would measure only how narrow a spike a method dares to put on them.

    LAMINAR_DATA=… python benchmarks/regression.py --budget 7200 [--resume]
"""

import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import _common
from _continuous import noise_width

TABLES = ("yacht", "housing", "pol", "elevators", "bike", "protein", "keggdirected")
METHODS = ("gaussian network", "quantile boosting", "ngboost", "laminar")
RIVALS = {"ngboost": "ngboost"}  # method: the package it needs beyond those of laminar
COVERAGE = 0.9
MANY = 10_000  # rows; larger tables have three splits
LEVELS = np.array([0.01, *np.arange(0.05, 0.951, 0.05), 0.99])


class Split(NamedTuple):
    """Rows for training and for the score; y in units of the training responses' deviation."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Law(NamedTuple):
    """What a method says of test rows: log-densities, the 90% interval, and the mean."""

    log_density: np.ndarray
    interval: np.ndarray
    mean: np.ndarray


def load(arrays: "_common.Arrays", name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows with the response last, dequantised, and the masks of test rows."""
    rows = arrays[f"{name}__xy"].astype(np.float64)
    width = noise_width(rows[:, -1])
    rng = np.random.default_rng(20150521)
    rows[:, -1] += width * (rng.random(len(rows)) - 0.5)
    return rows, arrays[f"{name}__test_mask"].astype(bool)


def split(rows: np.ndarray, masks: np.ndarray, number: int) -> Split:
    """One split of the table's own."""
    train, test = rows[~masks[:, number]], rows[masks[:, number]]
    middle, scale = train[:, -1].mean(), train[:, -1].std()
    return Split(
        train[:, :-1], (train[:, -1] - middle) / scale, test[:, :-1], (test[:, -1] - middle) / scale
    )


def held_apart(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to fit and to stop or choose by: a tenth is held out."""
    order = np.random.default_rng(seed).permutation(rows)
    held = max(rows // 10, 2)
    return order[held:], order[:held]


# --- the methods: (split, seed) -> Law -----------------------------------------------------------


def gaussian_network(part: Split, seed: int) -> Law:
    """A residual network of mean and log-scale, by maximum likelihood with early stopping."""
    import jax.random as jr
    from scipy.stats import norm
    from sklearn.preprocessing import StandardScaler

    import laminar

    scaler = StandardScaler().fit(part.x)
    x, x_test = (scaler.transform(v).astype(np.float32) for v in (part.x, part.x_test))
    net_key, fit_key = jr.split(jr.key(seed))
    net = laminar.MLP(x.shape[1], (2,), key=net_key, width=128, depth=2)
    model = laminar.ConditionalNormal(net, (1,), (x.shape[1],))
    fit, stop = held_apart(len(x), seed)
    y = part.y[:, None].astype(np.float32)
    model, _ = laminar.fit(
        fit_key,
        model,
        y[fit],
        condition=x[fit],
        validation=laminar.Batch(y[stop], x[stop]),
        steps=int(np.clip(50 * len(fit) // 256, 2_000, 8_000)),
        learning_rate=1e-3,
        progress=False,
    )
    loc, log_scale = (np.asarray(v, np.float64)[0] for v in model._moments(x_test.T, 2))
    scale = np.exp(log_scale)
    return Law(norm.logpdf(part.y_test, loc, scale), *_normal_interval(loc, scale))


def _normal_interval(loc, scale):
    from scipy.stats import norm

    reach = norm.ppf(0.5 + COVERAGE / 2) * scale
    return np.stack([loc - reach, loc + reach], 1), loc


def quantile_boosting(part: Split, seed: int) -> Law:
    """Gradient boosting of each quantile, and the density that is constant between them.

    Quantiles are sorted; beyond the outer ones the density falls exponentially, continuously. The
    least distance between quantiles, and a share of the marginal normal law that keeps the score
    finite, are chosen on held-out rows.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    fit, stop = held_apart(len(part.x), seed)

    def predict(level):
        model = HistGradientBoostingRegressor(
            loss="quantile", quantile=level, early_stopping=True, random_state=seed
        ).fit(part.x[fit], part.y[fit])
        return model.predict(part.x[stop]), model.predict(part.x_test)

    both = [predict(level) for level in LEVELS]
    stopped, tested = (np.sort(np.stack([b[i] for b in both], 1), axis=1) for i in (0, 1))
    grid = [(width, share) for width in (1e-4, 1e-3, 3e-3, 1e-2, 3e-2) for share in (0.01, 0.05)]
    scores = [stepwise(stopped, part.y[stop], *options).mean() for options in grid]
    log_p = stepwise(tested, part.y_test, *grid[int(np.argmax(scores))])
    low, high = (int(np.abs(LEVELS - u).argmin()) for u in (0.05, 0.95))
    middle = 0.5 * (tested[:, 1:] + tested[:, :-1])
    mean = (middle * np.diff(LEVELS)).sum(1) / np.diff(LEVELS).sum()
    return Law(log_p, tested[:, [low, high]], mean)


def stepwise(quantiles: np.ndarray, y: np.ndarray, width: float, share: float) -> np.ndarray:
    """The log-density at y of the law with these quantiles (N, Q), mixed with a normal law."""
    from scipy.stats import norm

    knots = quantiles.copy()
    for i in range(1, knots.shape[1]):
        knots[:, i] = np.maximum(knots[:, i], knots[:, i - 1] + width)
    height = np.diff(LEVELS) / np.diff(knots, axis=1)
    bin_of = (y[:, None] >= knots).sum(1)
    inner = np.take_along_axis(height, np.clip(bin_of - 1, 0, height.shape[1] - 1)[:, None], 1)[
        :, 0
    ]
    below = height[:, 0] * np.exp(np.minimum((y - knots[:, 0]) * height[:, 0] / LEVELS[0], 0))
    above = height[:, -1] * np.exp(
        np.minimum((knots[:, -1] - y) * height[:, -1] / (1 - LEVELS[-1]), 0)
    )
    density = np.where(bin_of == 0, below, np.where(bin_of == knots.shape[1], above, inner))
    return np.log((1 - share) * density + share * norm.pdf(y))


def ngboost(part: Split, seed: int) -> Law:
    """NGBoost (Duan et al. 2020) with a normal law, its defaults, and early stopping."""
    from ngboost import NGBRegressor

    fit, stop = held_apart(len(part.x), seed)
    model = NGBRegressor(verbose=False, random_state=seed)
    model.fit(
        part.x[fit], part.y[fit], X_val=part.x[stop], Y_val=part.y[stop], early_stopping_rounds=50
    )
    law = model.pred_dist(part.x_test)
    loc, scale = law.params["loc"], law.params["scale"]
    return Law(law.logpdf(part.y_test), *_normal_interval(loc, scale))


def laminar(part: Split, seed: int) -> Law:
    """FlowRegressor as it is."""
    from laminar import FlowRegressor

    model = FlowRegressor(random_state=seed).fit(part.x, part.y)
    return Law(
        model.log_prob(part.x_test, part.y_test),
        model.predict_interval(part.x_test, COVERAGE),
        model.predict(part.x_test),
    )


# --- the run -------------------------------------------------------------------------------------


def measure(part: Split, method: str, seed: int) -> dict:
    """One cell: a method on a split."""
    import jax

    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        law = globals()[method.replace(" ", "_")](part, seed)
    seconds = time.perf_counter() - begun
    jax.clear_caches()
    y, (low, high) = part.y_test, law.interval.T
    return {
        "train_rows": len(part.y),
        "test_rows": len(y),
        "columns": part.x.shape[1],
        "log_score": float(law.log_density.mean()),
        "standard_error": float(law.log_density.std(ddof=1) / np.sqrt(len(y))),
        "coverage": float(((y >= low) & (y <= high)).mean()),
        "width": float(np.median(high - low)),
        "rmse": float(np.sqrt(np.mean((law.mean - y) ** 2))),
        "seconds": round(seconds, 1),
    }


def cells(args, masks):
    """Every (table, split, method): the first split of all tables before the second of any."""
    for number in range(args.splits):
        for table in args.tables:
            few = min(args.splits, 3 if len(masks[table]) > MANY else masks[table].shape[1])
            if number < few:
                yield from ((table, number, method) for method in args.methods)


def installed(methods):
    """The methods whose packages are there; says which are left out."""
    absent = [m for m in methods if m in RIVALS and importlib.util.find_spec(RIVALS[m]) is None]
    for method in absent:
        print(
            f"{method} is left out, as {RIVALS[method]} is not installed; "
            "pip install -r benchmarks/requirements.txt adds it.",
            flush=True,
        )
    return tuple(m for m in methods if m not in absent)


def summary(records: list[dict], methods) -> str:
    """The means over splits, the ranks in log score, and the coverage."""
    done = {(r["table"], r["split"], r["method"]): r for r in records}
    present = [m for m in methods if any(key[2] == m for key in done)]
    lines = [f"{'':<14}{'rows':>7}{'cols':>5}{'splits':>7}" + "".join(f"{m:>21}" for m in present)]
    whole = {t for t, _, _ in done}
    ranks, coverages = {m: [] for m in present}, {m: [] for m in present}
    tables = [table for table in TABLES if table in whole]
    for table in tables:
        numbers = sorted({s for t, s, _ in done if t == table})
        numbers = [s for s in numbers if all((table, s, m) in done for m in present)]
        if not numbers:
            continue
        found = {m: [done[table, s, m] for s in numbers] for m in present}
        scores = {m: np.mean([r["log_score"] for r in found[m]]) for m in present}
        order = sorted(present, key=lambda m: -scores[m])
        first = found[present[0]][0]
        line = f"{table:<14}{first['train_rows']:>7}{first['columns']:>5}{len(numbers):>7}"
        for m in present:
            coverage = float(np.mean([r["coverage"] for r in found[m]]))
            ranks[m].append(order.index(m) + 1)
            coverages[m].append(coverage)
            line += f"{scores[m]:>11.3f}{'*' if order[0] == m else ' '} {100 * coverage:5.1f}%  "
        lines.append(line)
    if not any(ranks.values()):
        return "No table has all methods yet."
    for title, show in (
        ("mean rank", lambda m: f"{np.mean(ranks[m]):.2f}"),
        ("mean coverage", lambda m: f"{100 * np.mean(coverages[m]):.1f}%"),
        ("tables within 88–92%", lambda m: str(sum(0.88 <= c <= 0.92 for c in coverages[m]))),
    ):
        lines.append(f"{title:<33}" + "".join(f"{show(m):>19}  " for m in present))
    for title, name in (("mean RMSE", "rmse"), ("seconds in all", "seconds")):
        total = {m: [r[name] for r in records if r["method"] == m] for m in present}
        values = {m: np.mean(v) if name == "rmse" else np.sum(v) for m, v in total.items()}
        lines.append(f"{title:<33}" + "".join(f"{values[m]:>19.3f}  " for m in present))
    lines.append("Log score in nats (higher is better, * the best), and coverage of 90% intervals.")
    return "\n".join(lines)


def options():
    parser = _common.parser(
        (__doc__ or "").splitlines()[0],
        budget="seconds after which no other fit begins; 0 prints the report alone (%(default)s)",
        out=Path("runs/regression.jsonl"),
    )
    parser.add_argument(
        "--tables", type=_common.names_of(TABLES), default=TABLES, help=", ".join(TABLES)
    )
    parser.add_argument("--methods", type=_common.names_of(METHODS), default=METHODS)
    parser.add_argument(
        "--splits", type=int, default=10, help="at most, and three of large tables (%(default)s)"
    )
    return parser.parse_args()


def main():
    args = options()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    if args.budget > 0:
        arrays = _common.Arrays("uci_regression.npz", args.optional)
        data = {table: load(arrays, table) for table in args.tables}
        _common.guard([args.out], args)
        machine = _common.machine()
        masks = {table: mask for table, (_, mask) in data.items()}
        args.methods = installed(args.methods)
        wanted = list(cells(args, masks))
    else:
        machine, data, wanted = _common.machine(), {}, []
    asked = {"level": COVERAGE}
    records, missing = _common.left_over(
        args,
        _common.read_lines(args.out),
        asked,
        wanted,
        lambda record: (record["table"], record["split"], record["method"]),
    )
    _common.end_last_line(args.out)
    begun = time.monotonic()
    for table, number, method in missing:
        if time.monotonic() - begun > args.budget:
            print("The budget is spent; continue with --resume.")
            break
        found = measure(split(*data[table], number), method, number)
        record = {"table": table, "split": number, "method": method, **found, **asked}
        record["machine"] = machine
        print(
            f"{table:<13} split {number}  {method:<18} {found['log_score']:8.3f} nats  "
            f"{100 * found['coverage']:5.1f}%  rmse {found['rmse']:.4f}  {found['seconds']:7.1f} s",
            flush=True,
        )
        records.append(record)
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    print("\n" + summary(records, args.methods))


if __name__ == "__main__":
    main()
