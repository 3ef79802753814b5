"""Anomaly detection on the 22 ADBench tables: laminar's default score beside PyOD's detectors.

Semi-supervised: half of the normal rows train, the others and all anomalies are the test, z-scored
by the training rows. Everybody has the same rows: at most --most-rows of them, and --most-quadratic
where the time of a detector grows with their square. No label is seen before the final score, and
laminar has one setting for all tables.

    LAMINAR_DATA=… python benchmarks/adbench.py --budget 3600 [--resume]

Beside AUROC and AUPR (average precision) the report has the mean rank, the seconds of fitting and
scoring, and for laminar the false-discovery proportion of the rows it lists at 0.05 and 0.1, and
the share of the anomalies among them.
"""

import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import _common

TABLES = (
    "45_wine",
    "39_vertebral",
    "14_glass",
    "37_Stamps",
    "18_Ionosphere",
    "43_WDBC",
    "4_breastw",
    "47_yeast",
    "20_letter",
    "6_cardio",
    "41_Waveform",
    "30_satellite",
    "28_pendigits",
    "26_optdigits",
    "24_mnist",
    "22_magic.gamma",
    "32_shuttle",
    "34_smtp",
    "1_ALOI",
    "16_http",
    "8_celeba",
    "11_donors",
)
"""Names in the file of arrays, small tables first."""

LOOKED_AT = (
    "11_donors",
    "16_http",
    "1_ALOI",
    "22_magic.gamma",
    "26_optdigits",
    "30_satellite",
    "34_smtp",
    "39_vertebral",
    "43_WDBC",
    "47_yeast",
    "6_cardio",
)
"""Those by whose labels laminar's default score was chosen; means are told without them too."""

LEVELS = (0.05, 0.1)
"""False-discovery rates that lists are made for."""

COMPONENTS = (1, 2, 3, 5, 8, 12, 20, 30, 50)


class Found(NamedTuple):
    """Scores of the test rows, high where they are strange, and p-values where there are some."""

    scores: np.ndarray
    p_values: np.ndarray | None = None


# --- the detectors: (train, test, seed, args) -> Found --------------------------------------------


def laminar(train, test, seed, args) -> Found:
    """The default: `fit_detector`, its score, and its conformal p-values."""
    import jax

    from laminar.tables.anomaly import fit_detector
    from laminar.tables.table import array_table

    options = {} if args.time_limit is None else {"time_limit": args.time_limit}
    detector, _ = fit_detector(array_table(train), seed=seed, progress=False, **options)
    found = detector.score(array_table(test))
    jax.clear_caches()
    return Found(-found.score, found.p_value)


def mahalanobis(train, test, seed, args) -> Found:
    """Distance from the mean under the training rows' covariance."""
    precision = np.linalg.pinv(np.atleast_2d(np.cov(train.T)) + 1e-6 * np.eye(train.shape[1]))
    centred = test - train.mean(0)
    return Found(np.einsum("ni,ij,nj->n", centred, precision, centred))


def gmm5(train, test, seed, args) -> Found:
    """Five full Gaussians."""
    return Found(-_mixture(train, min(5, len(train) // 2), seed).score_samples(test))


def gmm(train, test, seed, args) -> Found:
    """Full Gaussians, their number chosen on a fifth of the training rows, fitted again to all."""
    order = np.random.default_rng(seed).permutation(len(train))
    held, kept = np.split(train[order], [len(train) // 5])
    scores = {}
    for count in COMPONENTS:
        if scores and count > len(kept) // 5:
            break
        scores[count] = _mixture(kept, count, seed).score(held)
        if scores[count] < max(scores.values()) - 1:
            break
    return Found(-_mixture(train, max(scores, key=scores.__getitem__), seed).score_samples(test))


def _mixture(rows, count, seed):
    from sklearn.mixture import GaussianMixture

    return GaussianMixture(count, reg_covar=1e-6, random_state=seed).fit(rows)


def _pyod(module: str, name: str, quadratic: bool = False, **options) -> Callable:
    """A detector of PyOD at its defaults, but for the options that are named in the report."""

    def run(train, test, seed, args) -> Found:
        model = getattr(importlib.import_module(f"pyod.models.{module}"), name)
        own = dict(options)
        if own.pop("seeded", False):
            own["random_state"] = seed
        rows = train[: args.most_quadratic] if quadratic else train
        # Its threshold plays no part: no share of the training rows is taken for anomalies.
        return Found(model(**own).fit(rows).decision_function(test))

    return run


METHODS: dict[str, Callable] = {
    "laminar": laminar,
    "kNN": _pyod("knn", "KNN", quadratic=True, n_neighbors=5),
    "iForest": _pyod("iforest", "IForest", seeded=True),
    "Mahalanobis": mahalanobis,
    "GMM(5)": gmm5,
    "GMM": gmm,
    "OCSVM": _pyod("ocsvm", "OCSVM", quadratic=True),
    "LOF": _pyod("lof", "LOF", quadratic=True),
    "ECOD": _pyod("ecod", "ECOD"),
    "COPOD": _pyod("copod", "COPOD"),
}
PYOD = ("kNN", "iForest", "OCSVM", "LOF", "ECOD", "COPOD")


# --- rows -----------------------------------------------------------------------------------------


def rows_of(x, y, seed: int, args):
    """Training rows, test rows and the test labels, z-scored by the training rows."""
    rng = np.random.default_rng([11, seed])
    normal, strange = (rng.permutation(np.flatnonzero(y == label)) for label in (0, 1))
    half = len(normal) // 2
    train = x[normal[:half][: args.most_rows]].astype(np.float64)
    chosen = np.concatenate([normal[half:], strange])
    # The shares of normal and strange rows stay as they are.
    chosen = rng.permutation(chosen)[: args.most_test]
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return (train - mean) / deviation, (x[chosen] - mean) / deviation, y[chosen]


def measure(method: str, train, test, labels, seed: int, args) -> dict:
    """One cell: a detector on one split."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = METHODS[method](train, test, seed, args)
    seconds = time.monotonic() - begun
    failed = int(np.isnan(found.scores).sum())
    # −inf log-densities are the strangest there are; a score that failed says nothing.
    scores = np.nan_to_num(found.scores, nan=np.nanmin(found.scores), posinf=1e300, neginf=-1e300)
    record = {
        "auroc": float(roc_auc_score(labels, scores)),
        "aupr": float(average_precision_score(labels, scores)),
        "seconds": round(seconds, 2),
        "failed_scores": failed,
    }
    if found.p_values is not None:
        from laminar.scores import benjamini_hochberg

        adjusted = benjamini_hochberg(found.p_values)
        for level in LEVELS:
            listed = adjusted <= level
            false = int((listed & (labels == 0)).sum())
            record[f"listed@{level}"] = int(listed.sum())
            record[f"fdp@{level}"] = false / max(int(listed.sum()), 1)
            record[f"power@{level}"] = float(listed[labels == 1].mean())
    return record


# --- the report -----------------------------------------------------------------------------------


def report(records: list[dict], methods, out=print) -> None:
    """Means over seeds by table, and over tables that all methods have finished."""
    cells: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        if "error" not in record:
            cells.setdefault((record["table"], record["method"]), []).append(record)
    methods = [m for m in methods if any((t, m) in cells for t in TABLES)]
    tables = [t for t in TABLES if all((t, m) in cells for m in methods)]
    if not tables:
        out("No table is finished by all methods yet.")
        return
    for key, name in (("auroc", "AUROC"), ("aupr", "AUPR"), ("seconds", "seconds")):
        table = np.array(
            [[np.mean([r[key] for r in cells[t, m]]) for m in methods] for t in tables]
        )
        out(f"\n{name}, mean over seeds")
        out(f"{'':16s}{'seeds':>6s}" + "".join(f"{m:>12s}" for m in methods))
        for t, values in zip(tables, table, strict=True):
            seeds = min(len(cells[t, m]) for m in methods)
            out(f"{t:16s}{seeds:6d}" + "".join(f"{v:12.3f}" for v in values))
        blind = [i for i, t in enumerate(tables) if t not in LOOKED_AT]
        parts = {"": list(range(len(tables))), ", others": blind}
        for name, rows in parts.items():
            if not rows:
                continue
            some = table[rows]
            out(f"{f'mean{name}':22s}" + "".join(f"{v:12.4f}" for v in some.mean(0)))
            if key != "seconds":
                ranks = _ranks(some).mean(0)
                out(f"{f'mean rank{name}':22s}" + "".join(f"{v:12.2f}" for v in ranks))
    failed = sum(r["failed_scores"] > 0 for rows in cells.values() for r in rows)
    out(f"\n{failed} cells have scores that are NaN; these count as the least strange.")
    ours = [r for (_, m), rows in cells.items() for r in rows if m == "laminar"]
    for level in LEVELS:
        shares = np.array([r[f"fdp@{level}"] for r in ours])
        power = np.mean([r[f"power@{level}"] for r in ours])
        error = shares.std() / max(np.sqrt(len(shares)), 1)
        out(
            f"laminar's lists at a false-discovery rate of {level}: mean false-discovery "
            f"proportion {shares.mean():.3f} ± {error:.3f} over {len(shares)} splits, of the "
            f"anomalies listed {power:.1%}."
        )


def _ranks(table: np.ndarray) -> np.ndarray:
    """Rank of every method on each table, 1 for the best, ties shared."""
    from scipy.stats import rankdata

    return np.stack([rankdata(-row) for row in np.round(table, 6)])


# --- the run --------------------------------------------------------------------------------------


def options():
    parser = _common.parser(
        (__doc__ or "").splitlines()[0],
        budget="seconds after which no other cell begins; 0 prints the report alone (%(default)s)",
        out=Path("runs/adbench.jsonl"),
    )
    parser.add_argument("--tables", type=_common.names_of(TABLES), default=TABLES)
    parser.add_argument("--methods", type=_common.names_of(METHODS), default=tuple(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="number of splits (%(default)s)")
    parser.add_argument("--most-rows", type=int, default=50_000, help="to train on (%(default)s)")
    parser.add_argument("--most-quadratic", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--most-test", type=int, default=400_000, help="test rows (%(default)s)")
    parser.add_argument(
        "--time-limit", type=float, default=None, help="seconds for laminar's training in a cell"
    )
    return parser.parse_args()


def _installed(methods):
    """The methods whose package is there; says which are left out."""
    if importlib.util.find_spec("pyod") is None and any(m in PYOD for m in methods):
        absent = [m for m in methods if m in PYOD]
        print(
            f"{', '.join(absent)} are left out, as pyod is not installed; "
            "pip install -r benchmarks/requirements.txt adds it.",
            flush=True,
        )
        return [m for m in methods if m not in absent]
    return list(methods)


def _cell_of(record):
    return record["table"], record["seed"], record["method"]


def main():
    args = options()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _common.guard([args.out], args)
    names = ("most_rows", "most_quadratic", "most_test", "time_limit")
    asked = {name: getattr(args, name) for name in names}
    methods = _installed(args.methods)
    cells = [(t, s, m) for s in range(args.seeds) for t in args.tables for m in methods]
    done = _common.read_lines(args.out)
    records, left = _common.left_over(args, done, asked, cells, _cell_of)
    start, machine = time.monotonic(), _common.machine()
    arrays = _common.Arrays("adbench.npz", args.optional) if left and args.budget > 0 else None
    _common.end_last_line(args.out)
    held: tuple = ()
    with args.out.open("a") as file:
        for table, seed, method in left:
            if arrays is None or time.monotonic() - start > args.budget:
                print("Budget spent; continue with --resume.", flush=True)
                break
            if held[:2] != (table, seed):
                x, y = arrays[f"{table}__X"], arrays[f"{table}__y"]
                held = (table, seed, *rows_of(x, y, seed, args))
            record = {"table": table, "seed": seed, "method": method, "train": len(held[2])}
            record |= {"test": len(held[3]), "columns": held[2].shape[1]}
            try:
                record |= measure(method, *held[2:], seed, args)
            except (ValueError, RuntimeError, MemoryError, np.linalg.LinAlgError) as error:
                record["error"] = f"{type(error).__name__}: {error}"
            record |= asked | {"machine": machine}
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            shown = record.get("error") or f"{record['auroc']:.3f}  {record['seconds']:.1f} s"
            print(f"{table:16s} seed {seed} {method:12s} {shown}", flush=True)
    report(records, args.methods)


if __name__ == "__main__":
    main()
