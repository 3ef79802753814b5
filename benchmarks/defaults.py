"""The preset with fit's defaults against everything a data scientist would try first.

For each table, number of training rows and split: held-out log-likelihood (nats a row, in units of
the training rows' standard deviations) of laminar's preset, a full-covariance Gaussian, Gaussian
mixtures (components chosen on validation, up to 50), scikit-learn's KDE (bandwidth chosen on
validation) and a FlowJAX spline flow with its defaults. Results are appended to a file of JSON
lines as they come, so the run can be interrupted and continued with --resume.

A line's verdict is "best", "within" one standard error of the best, or "behind", twice: against the
standard error of the best's mean, and, stricter, against that of the mean difference on the same
rows, which leaves out what makes a row hard for every method.

    LAMINAR_DATA=… python benchmarks/defaults.py --budget 3600 [--resume]
"""

import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import _common
import _continuous

SIZES = ("200", "1000", "full")
METHODS = ("gaussian", "mixture", "kde", "flowjax", "laminar")
RIVALS = {"flowjax": "flowjax"}  # method: the package it needs beyond those of laminar
COMPONENTS = (1, 2, 3, 5, 8, 12, 20, 30, 50)
SPLITS = range(100)


# --- the methods: (train, test, seed) -> log density of every test row -------------------------


def gaussian(train, test, seed):
    """Maximum-likelihood Gaussian with a full covariance."""
    from sklearn.mixture import GaussianMixture

    return GaussianMixture(1, reg_covar=1e-6).fit(train).score_samples(test)


def mixture(train, test, seed):
    """EM mixtures of full covariance; components and regularisation chosen on a fifth, refitted.

    Beyond 5,000 rows fewer than ten components, and the coarsest regularisation, never win and are
    left out.
    """
    from sklearn.mixture import GaussianMixture

    train, test = train.astype(np.float64), test.astype(np.float64)
    order = np.random.default_rng(seed).permutation(len(train))
    held, kept = np.split(order, [len(train) // 5])

    def fit(rows, k, ridge):
        return GaussianMixture(k, reg_covar=ridge, random_state=seed).fit(rows)

    large = len(train) > 5000
    best = (-np.inf, 1, 1e-6)
    for ridge in (1e-6, 1e-3) if large else (1e-6, 1e-3, 1e-2):
        for k in (10, 20, 30, 50) if large else COMPONENTS:
            if k > len(kept) // 4:
                break
            score = fit(train[kept], k, ridge).score(train[held])
            best = max(best, (score, k, ridge))
            if score < best[0] - 2.0 and k > best[1]:
                break
    return fit(train, *best[1:]).score_samples(test)


def kde(train, test, seed):
    """scikit-learn's Gaussian KDE, bandwidth chosen by five-fold cross-validation."""
    from sklearn.model_selection import KFold
    from sklearn.neighbors import KernelDensity

    rng = np.random.default_rng(seed)
    few = train[rng.permutation(len(train))[:4000]]
    widths = np.geomspace(0.02, 1.5, 25)
    scores = np.zeros(len(widths))
    for kept, held in KFold(5, shuffle=True, random_state=seed).split(few):
        scores += [_kernel_scores(few[kept], few[held], h).mean() for h in widths]
    # Rows left out make the chosen width too large for the full table: Scott's rate mends that.
    width = widths[scores.argmax()]
    rates = (1.0, (0.8 * len(few) / len(train)) ** (1 / (train.shape[1] + 4)))
    held = rng.permutation(len(train))[: len(train) // 10]
    kept = np.setdiff1d(np.arange(len(train)), held)
    rate = max(
        rates, key=lambda r: _kernel_scores(train[kept], train[held][:1000], r * width).mean()
    )
    if len(train) <= 1000:
        return KernelDensity(bandwidth=float(rate * width)).fit(train).score_samples(test)
    return np.concatenate([_kernel_scores(train, t, rate * width) for t in np.split(test, [2500])])


def _kernel_scores(train, test, width):
    """What KernelDensity.score_samples gives, by one matrix product instead of a tree."""
    from scipy.special import logsumexp

    train, test = train.astype(np.float64) / width, test.astype(np.float64) / width
    squares = (test**2).sum(1)[:, None] + (train**2).sum(1)[None] - 2 * test @ train.T
    normaliser = train.shape[1] * np.log(width * np.sqrt(2 * np.pi)) + np.log(len(train))
    return logsumexp(-0.5 * np.maximum(squares, 0), axis=1) - normaliser


def flowjax(train, test, seed):
    """FlowJAX: masked autoregressive flow, rational-quadratic splines, fit_to_data's defaults."""
    import jax.numpy as jnp
    import jax.random as jr
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_data

    flow_key, fit_key = jr.split(jr.key(seed))
    flow = masked_autoregressive_flow(
        flow_key,
        base_dist=Normal(jnp.zeros(train.shape[1])),
        transformer=RationalQuadraticSpline(knots=8, interval=4),
    )
    flow, _ = fit_to_data(fit_key, flow, jnp.asarray(train), show_progress=False)
    return np.asarray(flow.log_prob(jnp.asarray(test)))


def laminar(train, test, seed):
    """laminar.zoo.preset with fit's defaults."""
    import jax.random as jr

    from laminar.train import fit
    from laminar.zoo import preset

    flow, _ = fit(jr.key(seed), preset(*train.shape), train)
    return np.asarray(flow.log_prob(test))


# --- the run -----------------------------------------------------------------------------------


def cells(args):
    """Every (table, size, split) asked for: cheap sizes first, all tables before a second split."""
    for size in args.sizes:
        for number in range(args.splits):
            for table in args.tables:
                yield table, size, number


def _installed(methods):
    """The methods whose packages are there; says which are left out."""
    absent = [m for m in methods if m in RIVALS and importlib.util.find_spec(RIVALS[m]) is None]
    for method in absent:
        print(
            f"{method} is left out, as {RIVALS[method]} is not installed; "
            "pip install -r benchmarks/requirements.txt adds it.",
            flush=True,
        )
    return [m for m in methods if m not in absent]


def run(args, rows, done):
    """Fill in what is missing, one line of the file per cell and method, within the budget."""
    import jax

    start = time.monotonic()
    methods = _installed(args.methods)
    _common.end_last_line(args.out)
    with args.out.open("a") as file:
        for table, size, number in cells(args):
            count = None if size == "full" else int(size)
            available = len(rows[table]) - len(rows[table]) // 5
            if count is not None and count > available:
                continue
            part = _continuous.split(
                rows[table], count, number, most=args.most_rows, most_test=args.most_test
            )
            for method in methods:
                if (table, size, number, method) in done:
                    continue
                if time.monotonic() - start > args.budget:
                    print("Budget spent; continue with --resume.", flush=True)
                    return
                began = time.monotonic()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    values = np.asarray(globals()[method](*part, number), np.float64)
                jax.clear_caches()
                record = {
                    "table": table,
                    "size": size,
                    "split": number,
                    "method": method,
                    "train_rows": len(part.train),
                    "columns": part.train.shape[1],
                    "most_rows": args.most_rows,
                    "most_test": args.most_test,
                    "seconds": round(time.monotonic() - began, 1),
                    "log_density": [round(float(v), 3) for v in values],
                }
                done[table, size, number, method] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(
                    f"{table:12s} {size:>5s} split {number} {method:9s} "
                    f"{values.mean():9.3f}  {record['seconds']:.1f} s",
                    flush=True,
                )


# --- the report --------------------------------------------------------------------------------


def _pooled(records):
    """Mean over splits of the mean over rows, and its standard error over rows."""
    means = [np.mean(r["log_density"]) for r in records]
    errors = [np.std(r["log_density"]) / np.sqrt(len(r["log_density"])) for r in records]
    return float(np.mean(means)), float(np.sqrt(np.sum(np.square(errors))) / len(errors))


def _paired(best, mine):
    """Mean over splits and rows of how far the best is ahead, and the standard error of it."""
    gaps = [
        np.subtract(a["log_density"], b["log_density"]) for a, b in zip(best, mine, strict=True)
    ]
    errors = [gap.std() / np.sqrt(len(gap)) for gap in gaps]
    mean = np.mean([gap.mean() for gap in gaps])
    return float(mean), float(np.sqrt(np.sum(np.square(errors))) / len(errors))


def report(args, done):
    """Print one line per table and size, and how many of them laminar wins."""
    print(
        f"Held-out log-likelihood, nats a row, mean over up to {args.splits} splits ± standard "
        f"error over test rows\n(at most {args.most_rows} training rows under 'full' and "
        f"{args.most_test} test rows; * best of the line).\n"
        "Verdicts by the standard error of the best's mean, and of the paired difference.\n"
    )
    head = "".join(f"{m:>20s}" for m in args.methods)
    print(
        f"{'table':12s} {'size':>5s} {'rows':>6s} {'cols':>4s} {'splits':>6s}{head}  verdict paired"
    )
    verdicts = []
    for size in args.sizes:
        for table in args.tables:
            # A method that was not run on this line is left blank; the others share their splits.
            ran = [m for m in args.methods if any((table, size, s, m) in done for s in SPLITS)]
            numbers = [
                s for s in SPLITS[: args.splits] if all((table, size, s, m) in done for m in ran)
            ]
            if not numbers or "laminar" not in ran or len(ran) < 2:
                continue
            records = {m: [done[table, size, s, m] for s in numbers] for m in ran}
            pooled = {m: _pooled(records[m]) for m in ran}
            best = max(ran, key=lambda m: pooled[m][0])
            first = records[best][0]
            line = f"{table:12s} {size:>5s} {first['train_rows']:6d} {first['columns']:4d}"
            line += f" {len(numbers):6d}"
            for m in args.methods:
                if m not in ran:
                    line += f"{'–':>20s}"
                    continue
                mark = "*" if m == best else " "
                line += f"{pooled[m][0]:11.2f} ±{pooled[m][1]:6.2f}{mark}"
            gap = pooled[best][0] - pooled["laminar"][0]
            plain = _verdict(best, gap, pooled[best][1])
            paired = _verdict(best, *_paired(records[best], records["laminar"]))
            verdicts.append((plain, paired))
            print(f"{line}  {plain:8s}{paired}")
    _summarise(verdicts)


def _summarise(verdicts):
    """The number of cells of each verdict, by either standard error."""
    if not verdicts:
        return
    print(f"\n{len(verdicts)} cells. laminar is")
    errors = ("the best's", "the paired")
    for error, column in zip(errors, zip(*verdicts, strict=True), strict=True):
        counts = {v: column.count(v) for v in ("best", "within", "behind")}
        print(
            f"- by {error} standard error: best in {counts['best']}, within one of the best in "
            f"{counts['within']}, behind in {counts['behind']}."
        )


def _verdict(best, gap, error):
    if best == "laminar":
        return "best"
    return "within" if gap <= error else "behind"


def _read(args):
    """What was found before, by cell and method."""
    done = {}
    for record in _common.read_lines(args.out):
        # Records of before these were written down have none of them.
        limits = {k: record.get(k, getattr(args, k)) for k in ("most_rows", "most_test")}
        _common.refuse_change(args.out, limits, {k: getattr(args, k) for k in limits})
        done[tuple(record[k] for k in ("table", "size", "split", "method"))] = record
    return done


def main():
    parser = _common.parser(
        __doc__.splitlines()[0],
        budget="seconds after which no other cell begins; 0 prints the report alone",
        out=Path("runs/defaults.jsonl"),
    )
    parser.add_argument("--tables", nargs="+", default=_continuous.TABLES)
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--most-rows", type=int, default=10_000)
    parser.add_argument("--most-test", type=int, default=5_000)
    args = parser.parse_args()
    # Read before anything is replaced: the data may be missing.
    wanted = args.tables if args.budget > 0 else ()
    rows = {name: _continuous.load(name, args.optional) for name in wanted}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _common.guard([args.out], args)
    done = _read(args)
    if rows:
        run(args, rows, done)
    report(args, done)


if __name__ == "__main__":
    main()
