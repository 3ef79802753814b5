"""Variational posteriors against reference draws, beside NumPyro's guides and NUTS, in one run.

Sixteen posteriors of posteriordb. laminar runs `fit_posterior` as it is; every guide runs the same
settings on all of them. Compared with the reference draws are the mean, in standard deviations, and
the standard deviation of every named quantity: the worst one counts. Seconds include compilation.

    python benchmarks/posteriordb.py [--budget 3600] [--resume]
    python benchmarks/posteriordb.py --verify
"""

import json
import time
import warnings
from pathlib import Path

import _common
import jax
import jax.random as jr
import numpy as np
import numpyro
import optax
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, autoguide

import laminar
from laminar._errors import LaminarError
from laminar.inference import as_target, fit_posterior

GUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoBNAFNormal": autoguide.AutoBNAFNormal,
}
METHODS = ("laminar", *GUIDES, "NUTS")
DRAWS = 10_000
CHAINS = 4

# What counts as having found the posterior.
MOST_K, MOST_MEAN, MOST_SD = 0.7, 0.05, 0.05
SAME = ("svi_steps", "svi_particles", "svi_rate", "warmup", "samples", "chains", "precision")


def compare(columns, reference, names, weights=None) -> dict:
    """The worst mean, in reference standard deviations, and the extreme ratios of deviations."""
    columns = np.asarray(columns, float).reshape(-1, len(names))
    reference = reference.reshape(-1, len(names))
    if weights is None:
        weights = np.full(len(columns), 1 / len(columns))
    with np.errstate(invalid="ignore", over="ignore"):
        mean = weights @ columns
        sd = np.sqrt(weights @ np.square(columns - mean))
    centre, spread = reference.mean(0), reference.std(0)
    error, ratio = np.abs(mean - centre) / spread, sd / spread
    if not (np.isfinite(error).all() and np.isfinite(ratio).all()):
        raise ArithmeticError("the draws are not finite")
    return {
        "mean_error": float(error.max()),
        "worst": names[int(error.argmax())],
        "sd_low": float(ratio.min()),
        "sd_high": float(ratio.max()),
    }


def met(found: dict) -> bool:
    """Whether means and deviations are close enough."""
    close = abs(found["sd_low"] - 1) < MOST_SD and abs(found["sd_high"] - 1) < MOST_SD
    return found["mean_error"] < MOST_MEAN and close


# The cells: draws of one posterior by one method, and how long they took.


def laminar_cell(case, key, reference, names, args) -> dict:
    begun = time.perf_counter()
    posterior = fit_posterior(key, case.model, *case.args)
    columns = case.to_reference({k: np.asarray(v) for k, v in posterior.draws.items()})
    seconds = time.perf_counter() - begun
    weighted = posterior.weights.sum() > 0
    own = posterior.target.constrain(posterior.own.z)
    own = case.to_reference({k: np.asarray(v) for k, v in own.items()})
    raw = compare(own, reference, names)
    return {
        "seconds": seconds,
        "k_hat": posterior.k_hat,
        "k_hat_own": posterior.own.k_hat,
        "ess": posterior.ess,
        "draws": len(posterior.weights),
        "verdict": posterior.verdict.grade,
        "reasons": list(posterior.verdict.reasons),
        "raw": raw,
        **(compare(columns, reference, names, posterior.weights) if weighted else raw),
    }


def guide_cell(case, key, reference, names, args, guide_class) -> dict:
    begun = time.perf_counter()
    guide = guide_class(case.model)
    rate = optax.cosine_decay_schedule(args.svi_rate, args.svi_steps)
    elbo = Trace_ELBO(num_particles=args.svi_particles)
    svi = SVI(case.model, guide, optax.adam(rate), elbo)
    fit_key, draw_key = jr.split(key)
    result = svi.run(fit_key, args.svi_steps, *case.args, progress_bar=False)
    values = guide.sample_posterior(draw_key, result.params, sample_shape=(DRAWS,))
    columns = case.to_reference({k: np.asarray(v) for k, v in values.items()})
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, **compare(columns, reference, names)}


def nuts_cell(case, key, reference, names, args) -> dict:
    begun = time.perf_counter()
    mcmc = MCMC(
        NUTS(case.model),
        num_warmup=args.warmup,
        num_samples=args.samples,
        num_chains=CHAINS,
        chain_method=args.chains,
        progress_bar=False,
    )
    mcmc.run(key, *case.args, extra_fields=("diverging",))
    values = {k: np.asarray(v) for k, v in mcmc.get_samples().items()}
    columns = case.to_reference(values)
    seconds = time.perf_counter() - begun
    divergent = int(np.asarray(mcmc.get_extra_fields()["diverging"]).sum())
    return {"seconds": seconds, "divergent": divergent, **compare(columns, reference, names)}


def cell(case, method: str, arrays, args) -> dict:
    """One method on one posterior; what it raises is its result."""
    import _posteriors

    reference, names = _posteriors.reference(arrays, case.name)
    key = jr.fold_in(jr.key(args.seed), sorted(METHODS).index(method))
    jax.clear_caches()
    begun, worked = time.perf_counter(), time.process_time()
    given = (case, key, reference, names, args)
    try:
        if method == "laminar":
            found = laminar_cell(*given)
        elif method == "NUTS":
            found = nuts_cell(*given)
        else:
            found = guide_cell(*given, GUIDES[method])
    except (LaminarError, ArithmeticError, RuntimeError, ValueError, TypeError) as error:
        first = str(error).strip().split("\n")[0]
        found = {"failed": f"{type(error).__name__}: {first[:300]}"}
        found["seconds"] = time.perf_counter() - begun
    found["cpu_seconds"] = time.process_time() - worked
    return {"posterior": case.name, "method": method, **found}


# The report


def _figures(found: dict) -> str:
    return f"{found['mean_error']:9.3f}  {found['sd_low']:5.2f}–{found['sd_high']:<5.2f}"


def _line(record: dict) -> str:
    head = f"  {record['method']:<24}"
    if "failed" in record:
        return f"{head}failed after {record['seconds']:.1f} s: {record['failed']}"
    times = f"{record['seconds']:8.1f} s {record['cpu_seconds']:8.1f} s"
    text = f"{head}{_figures(record)} {times}"
    if record["method"] == "laminar":
        text += (
            f"   k̂ {record['k_hat']:5.2f}, {record['ess'] / record['draws']:4.0%} effective, "
            f"{record['verdict']}; unweighted {_figures(record['raw']).strip()}"
        )
    if record.get("divergent"):
        text += f"   {record['divergent']} divergent"
    return text + ("" if met(record) else "   missed")


def report(records: list[dict]) -> str:
    """The table, and what became of the targets."""
    by_cell = {(r["posterior"], r["method"]): r for r in records}
    names = sorted({r["posterior"] for r in records})
    lines = ["  method                  |mean|/sd     sd ratio       wall        cpu"]
    for name in names:
        lines.append(name)
        lines += [_line(by_cell[name, m]) for m in METHODS if (name, m) in by_cell]
    lines.append("")
    for method in METHODS:
        tried = [by_cell[n, method] for n in names if (n, method) in by_cell]
        good = [r["posterior"] for r in tried if "failed" not in r and met(r)]
        if tried:
            lines.append(f"{method}: mean and sd within limits on {len(good)} of {len(tried)}.")
    mine = {n: by_cell[n, "laminar"] for n in names if (n, "laminar") in by_cell}
    for name, record in mine.items():
        sure = "failed" not in record and record["verdict"] != "do not trust"
        if "failed" in record:
            lines.append(f"  {name}: failed.")
        elif sure and not met(record):
            lines.append(f"  {name}: limits missed, and the verdict is {record['verdict']!r}.")
        elif not sure:
            kept = "though the limits are kept" if met(record) else "and the limits are missed"
            lines.append(f"  {name}: the verdict is 'do not trust', {kept}.")
        elif record["k_hat"] >= MOST_K:
            lines.append(f"  {name}: k̂ is {record['k_hat']:.2f}.")
    both = [(mine[n], by_cell[n, "NUTS"]) for n in mine if (n, "NUTS") in by_cell]
    pairs = [(a["seconds"], b["seconds"]) for a, b in both if "failed" not in {**a, **b}]
    if pairs:
        faster = sum(a < b for a, b in pairs)
        ratio = float(np.median([b / a for a, b in pairs]))
        lines.append(
            f"laminar is faster than NUTS on {faster} of {len(pairs)}; median ratio {ratio:.1f}."
        )
    return "\n".join(lines)


def verify(made: dict, arrays, chosen) -> None:
    """Print how far the reference draws are from Stein's identities for every density."""
    import _posteriors

    print("Largest deviation from Stein's identities over coordinates, in standard errors:")
    for name in chosen:
        case = made[name]
        if case.from_reference is None:
            print(f"  {name}: its draws do not determine the parameters; compare with NUTS.")
            continue
        draws, _ = _posteriors.reference(arrays, name)
        scores, products = _posteriors.stein(
            as_target(case.model, *case.args), draws, case.from_reference
        )
        print(f"  {name}: score {np.abs(scores).max():.1f}, product {np.abs(products).max():.1f}")


def options():
    parser = _common.parser(
        (__doc__ or "").splitlines()[0],
        budget="seconds after which no other cell begins (%(default)s)",
        out=Path("runs/posteriordb.jsonl"),
        default=7200,
    )
    parser.add_argument("--posteriors", default="", help="between commas (all)")
    parser.add_argument("--methods", type=_common.names_of(METHODS), default=METHODS)
    parser.add_argument("--precision", type=int, choices=(32, 64), default=64, help="%(default)s")
    parser.add_argument("--svi-steps", type=int, default=10_000, help="of a guide, %(default)s")
    parser.add_argument("--svi-particles", type=int, default=8, help="draws a step, %(default)s")
    parser.add_argument("--svi-rate", type=float, default=0.01, help="of Adam, to 0 by a cosine")
    parser.add_argument("--warmup", type=int, default=1000, help="of a chain of NUTS, %(default)s")
    parser.add_argument("--samples", type=int, default=1000, help="of a chain, %(default)s")
    parser.add_argument("--chains", choices=("vectorized", "sequential"), default="vectorized")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verify", action="store_true", help="check the densities, and stop")
    parser.add_argument("--report", action="store_true", help="print what is in --out, and stop")
    return parser.parse_args()


def main():
    args = options()
    if args.report:
        print(report(_common.read_lines(args.out)))
        return
    jax.config.update("jax_enable_x64", args.precision == 64)
    # Imported once the precision is known, since it makes arrays.
    import _posteriors

    arrays = _common.Arrays("posteriordb.npz", args.optional)
    made = _posteriors.cases(arrays)
    chosen = args.posteriors.split(",") if args.posteriors else list(made)
    if unknown := [name for name in chosen if name not in made]:
        raise SystemExit(f"Unknown posteriors {', '.join(unknown)}; there are {', '.join(made)}.")
    if args.precision == 32:
        for case in (made[name] for name in chosen if made[name].double):
            print(f"{case.name} cannot be held in 32 bits; expect failures.")
    if args.verify:
        verify(made, arrays, chosen)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _common.guard([args.out], args)
    machine = _common.machine()
    asked = {name: getattr(args, name) for name in (*SAME, "seed")}
    records = _common.read_lines(args.out)
    for record in records:
        _common.refuse_change(args.out, record["options"], asked)
        _common.refuse_elsewhere(args.out, record["machine"], machine)
    _common.end_last_line(args.out)
    done = {(r["posterior"], r["method"]) for r in records if "failed" not in r}
    begun = time.monotonic()
    left = []
    for name in chosen:
        for method in args.methods:
            if (name, method) in done:
                continue
            if time.monotonic() - begun > args.budget:
                left.append(f"{name} by {method}")
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = cell(made[name], method, arrays, args)
            record = {**found, "options": asked, "machine": machine}
            record["versions"] = {"jax": jax.__version__, "numpyro": numpyro.__version__}
            print(name + "\n" + _line(record), flush=True)
            records.append(record)
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    print(
        f"\nlaminar {laminar.__version__}, jax {jax.__version__}, numpyro {numpyro.__version__}, "
        f"{jax.devices()[0].platform}, {args.precision} bits; guides: {args.svi_steps} steps of "
        f"{args.svi_particles} draws, Adam from {args.svi_rate}; NUTS: {CHAINS} {args.chains} "
        f"chains of {args.warmup} + {args.samples}."
    )
    print(report(records))
    if left:
        print(f"Left out when the budget was spent: {', '.join(left)}.")


if __name__ == "__main__":
    main()
