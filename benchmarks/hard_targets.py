"""Hard densities: what `fit_posterior` gets of them, and whether its verdict is right.

A funnel, a banana, mixtures with distant modes, and planted failures. Normalisation and exact draws
are known, so the evidence, KL(q ‖ p) = ln Z − ELBO and moments are compared with the truth.

    python benchmarks/hard_targets.py [--budget 1800] [--resume]
"""

import json
import time
from pathlib import Path

import _common
import jax
import jax.random as jr
import numpy as np
from _hard_targets import hard_targets

import laminar
from laminar._errors import LaminarError
from laminar.inference import fit_posterior

EXACT = 200_000
MOST_MEAN, MOST_SD, MOST_EVIDENCE = 0.05, 0.05, 0.05
"""How far means (in deviations), deviations (as a ratio) and ln Z (in nats) may be off."""


def moments(columns, weights, exact) -> dict:
    """The worst mean in exact deviations, the extreme ratios of deviations, and their noise.

    The noise is the largest standard error that so many independent exact draws would have.
    """
    mean = weights @ columns
    sd = np.sqrt(weights @ np.square(columns - mean))
    centred = (exact - exact.mean(0)) / exact.std(0)
    ratio, count = sd / exact.std(0), 1 / np.square(weights).sum()
    fourth = float((centred**4).mean(0).max())
    return {
        "mean_error": float((np.abs(mean - exact.mean(0)) / exact.std(0)).max()),
        "sd_low": float(ratio.min()),
        "sd_high": float(ratio.max()),
        "mean_noise": float(1 / np.sqrt(count)),
        "sd_noise": float(np.sqrt((fourth - 1) / (4 * count))),
    }


def cell(target, seed: int) -> dict:
    """The fit of one density, beside the truth."""
    jax.clear_caches()
    begun, worked = time.perf_counter(), time.process_time()
    try:
        posterior = fit_posterior(
            jr.key(seed), target.log_density, example=target.dim, **target.options
        )
    except LaminarError as error:
        # To refuse a target is a verdict too.
        return {
            "target": target.name,
            "planted": target.planted,
            "verdict": "refused",
            "reasons": [str(error)],
            "seconds": time.perf_counter() - begun,
            "cpu_seconds": time.process_time() - worked,
        }
    found = {
        "target": target.name,
        "planted": target.planted,
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - worked,
        "verdict": posterior.verdict.grade,
        "reasons": list(posterior.verdict.reasons),
        "k_hat": float(posterior.k_hat),
        "ess": float(posterior.ess),
        "draws": len(posterior.weights),
        "elbo": float(posterior.elbo.value),
        "log_evidence": float(posterior.log_evidence.value),
        "log_evidence_error": float(posterior.log_evidence.error),
        "truth": target.log_evidence,
    }
    if target.draw is not None and posterior.weights.sum() > 0:
        exact = target.view(target.draw(np.random.default_rng(1), EXACT))
        columns = target.view(np.asarray(posterior.draws, float))
        equal = np.full(len(columns), 1 / len(columns))
        found["raw"] = moments(columns, equal, exact)
        found.update(moments(columns, np.asarray(posterior.weights), exact))
    return found


def right(record: dict) -> bool:
    """Whether the numbers are those of the truth, within the limits or three standard errors."""
    if record.get("truth") is None or "mean_error" not in record:
        return False
    sd_error = max(abs(record["sd_low"] - 1), abs(record["sd_high"] - 1))
    close = sd_error < max(MOST_SD, 3 * record["sd_noise"])
    near = record["mean_error"] < max(MOST_MEAN, 3 * record["mean_noise"])
    gap = abs(record["log_evidence"] - record["truth"])
    error = record["log_evidence_error"]
    fair = gap < max(MOST_EVIDENCE, 3 * error) if np.isfinite(error) else False
    return near and close and fair


def judged(record: dict) -> str:
    """Whether the verdict agrees with the truth."""
    trusted = record["verdict"] in ("good", "usable after reweighting")
    if record["planted"] and not right(record):
        return "called what it is" if not trusted else "WRONG: a planted failure was trusted"
    if record["planted"] and trusted:
        return "right: it did not fail"
    if trusted:
        return "right" if right(record) else "WRONG: trusted, and off the truth"
    return "distrusted, though it is right" if right(record) else "distrusted, and it is off"


def _times(record: dict) -> str:
    return f"{record['seconds']:7.1f} s {record['cpu_seconds']:7.1f} s"


def _line(record: dict) -> str:
    head = f"{record['target']:<26}"
    tail = f"{record['verdict']} ({judged(record)})"
    if "k_hat" not in record:
        blank = " ".join(f"{'–':>{width}}" for width in (8, 17, 7, 9, 11))
        return f"{head}{blank} {_times(record)}  {tail}"
    truth = record["truth"]
    if truth is None:
        evidence, gap = f"{record['log_evidence']:8.2f} (∞)", f"{'–':>8}"
    else:
        error = f"{record['log_evidence'] - truth:+8.3f} ± {record['log_evidence_error']:.3f}"
        evidence, gap = error, f"{truth - record['elbo']:8.3f}"
    text = f"{head}{gap} {evidence:>17} {record['k_hat']:7.2f}"
    if "mean_error" in record:
        text += f" {record['mean_error']:9.3f} {record['sd_low']:5.2f}–{record['sd_high']:<5.2f}"
    else:
        text += f" {'–':>9} {'–':>11}"
    return f"{text} {_times(record)}  {tail}"


def report(records: list[dict]) -> str:
    """The table, what the densities are, and what went wrong."""
    lines = [
        f"{'':<26}{'KL':>8} {'ln Z − truth':>17} {'k̂':>7} {'|mean|/sd':>9} {'sd ratio':>11} "
        f"{'wall':>9} {'cpu':>9}  verdict"
    ]
    lines += [_line(record) for record in records]
    wrong = [record["target"] for record in records if judged(record).startswith("WRONG")]
    lines.append("")
    lines.append(f"Wrong verdicts: {', '.join(wrong) or 'none'} (of {len(records)}).")
    off = [r["target"] for r in records if not r["planted"] and not right(r)]
    lines.append(f"Not planted, and off the truth: {', '.join(off) or 'none'}.")
    lines += [f"{t.name}: {t.says}" for t in hard_targets().values()]
    return "\n".join(lines)


def options():
    parser = _common.parser(
        (__doc__ or "").splitlines()[0],
        budget="seconds after which no other fit begins (%(default)s)",
        out=Path("runs/hard_targets.jsonl"),
        default=1800,
    )
    known = hard_targets()
    parser.add_argument(
        "--targets", default="", help=f"between semicolons, of {'; '.join(known)} (all)"
    )
    parser.add_argument("--precision", type=int, choices=(32, 64), default=32, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="print what is in --out, and stop")
    return parser.parse_args()


def main():
    args = options()
    if args.report:
        print(report(_common.read_lines(args.out)))
        return
    jax.config.update("jax_enable_x64", args.precision == 64)
    known = hard_targets()
    chosen = args.targets.split(";") if args.targets else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"Unknown targets {'; '.join(unknown)}; there are {'; '.join(known)}.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _common.guard([args.out], args)
    machine = _common.machine()
    asked = {"precision": args.precision, "seed": args.seed}
    records = _common.read_lines(args.out)
    for record in records:
        _common.refuse_change(args.out, record["options"], asked)
        _common.refuse_elsewhere(args.out, record["machine"], machine)
    _common.end_last_line(args.out)
    begun, left = time.monotonic(), []
    for name in chosen:
        if any(record["target"] == name for record in records):
            continue
        if time.monotonic() - begun > args.budget:
            left.append(name)
            continue
        record = {**cell(known[name], args.seed), "options": asked, "machine": machine}
        print(_line(record), flush=True)
        records.append(record)
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    print(
        f"\nlaminar {laminar.__version__}, jax {jax.__version__}, {jax.devices()[0].platform}, "
        f"{args.precision} bits, seed {args.seed}"
    )
    print(report(records))
    if left:
        print(f"Left out when the budget was spent: {'; '.join(left)}.")


if __name__ == "__main__":
    main()
