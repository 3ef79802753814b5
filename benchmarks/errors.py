"""Rounding errors of every bijection: round trips and log-dets, by depth, precision and place.

The bijections are the cases of the contract suite. A cell is one of them, at one depth; the results
are kept cell by cell, and ``--page docs/numerics.md`` writes their tables into the page.

    python benchmarks/errors.py --budget 1800 --page docs/numerics.md
"""

import dataclasses
import inspect
import json
import math
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from _common import end_last_line, guard, machine, names_of, numbers, parser, read_lines

from laminar._errors import ShapeError
from laminar._params import Frozen, partition
from laminar.bijections.base import AbstractTransform, call
from laminar.bijections.compose import Chain, Repeat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "contract"))
CASES = {case.name: case for case in __import__("cases").CASES}

ROWS = 256
PLACES = ("ordinary", "tails")
DTYPES = ("float32", "float64")
OPTIONS = {
    "compiler_options": {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,  # half the time of compiling
    }
}
MARKS = ("<!-- tables: begin -->", "<!-- tables: end -->")


def layers(case, depth):
    """`depth` layers with parameters of order one over the square root of the depth, or None."""
    keys = jr.split(jr.key(0), depth)
    parts = [tamed(case.make(key), 1 / math.sqrt(depth)) for key in keys]
    first = parts[0]
    if depth == 1:
        return first
    if first.in_shape != first.out_shape or case.domain != case.image:
        return None
    try:
        return Repeat(parts)
    except ShapeError:
        return Chain(parts)


def tamed(bijection, factor):
    trained, rest = partition(bijection)
    return eqx.combine(jtu.tree_map(lambda x: factor * x, trained), rest)


def noise(key, shape):
    """Normal numbers for ordinary points and for as many in the tails, with the batch last."""
    return np.asarray(jr.normal(key, (*shape, 2 * ROWS)), np.float32)


def points(u, interval, space, dtype):
    """Points of an interval, the second half in its tails; or of a manifold, all alike."""
    if space is not None:
        return space.place(jnp.asarray(u, dtype))
    (lo, hi), u = interval, u.astype(np.float64)
    far = np.arange(2 * ROWS) >= ROWS
    if math.isfinite(lo) and math.isfinite(hi):
        x = lo + (hi - lo) / (1 + np.exp(-np.where(far, 8, 1) * u))
    elif math.isfinite(lo):
        x = lo + np.exp(np.where(far, 8, 1) * u)
    elif math.isfinite(hi):
        x = hi - np.exp(np.where(far, 8, 1) * u)
    else:
        x = np.where(far, 1000, 1.5) * u
    # Rounded in both precisions, so that they are the same points, but not onto the ends.
    ends = (np.nextafter(np.float32(end), np.float32(0.5 * (lo + hi))) for end in (lo, hi))
    x = x.astype(np.float32)
    return jnp.asarray(x if math.isinf(hi - lo) else np.clip(x, *ends), dtype)


def there_and_back(transform, x, y, condition):
    """Both round trips with their log-dets."""
    up, log_up = call(transform, "forward", x, condition)
    back, log_back = call(transform, "inverse", up, condition)
    down, log_down = call(transform, "inverse", y, condition)
    again, log_again = call(transform, "forward", down, condition)
    return (x, back, log_up, log_back), (y, again, log_down, log_again)


def measure(case, depth):
    """The errors of one cell, by precision and place."""
    made = layers(case, depth)
    shapes = [made.in_shape, made.out_shape]
    for i, space in enumerate((made.in_space, made.out_space)):
        shapes[i] = shapes[i] if space is None else (space.noise,)
    keys = jr.split(jr.key(1), 3)
    drawn = [
        noise(key, shape) for key, shape in zip(keys, (*shapes, made.cond_shape or ()), strict=True)
    ]
    found = {}
    for dtype in DTYPES:
        with jax.enable_x64(dtype == "float64"):
            transform = jtu.tree_map(
                lambda a, dtype=dtype: jnp.asarray(a, dtype) if eqx.is_inexact_array(a) else a,
                made,
            )
            x = points(drawn[0], case.domain, made.in_space, dtype)
            y = points(drawn[1], case.image, made.out_space, dtype)
            c = np.concatenate([drawn[2][..., :ROWS]] * 2, -1)
            condition = None if made.cond_shape is None else jnp.asarray(c, dtype)
            run = eqx.filter_jit(there_and_back, **OPTIONS)
            out = run(transform, x, y, condition)
            found[dtype] = jtu.tree_map(lambda a: np.asarray(a, np.float64), out)
    size = max(1, math.prod(made.in_shape))
    errors = {}
    for place, rows in zip(PLACES, (slice(0, ROWS), slice(ROWS, None)), strict=True):
        for dtype in DTYPES:
            trips, log_dets = [], []
            for single, double in zip(found[dtype], found["float64"], strict=True):
                start, back, log_one, log_two = (a[..., rows] for a in single)
                trips.append(np.abs(back - start) / (1 + np.abs(start)))
                # Float32 has the truth beside it; float64 has only the way back.
                truth = double[2][..., rows] if dtype == "float32" else -log_two
                with np.errstate(invalid="ignore"):
                    gap = np.where(log_one == truth, 0, np.abs(log_one - truth)) / size
                log_dets.append(gap)
            errors[f"{place} {dtype}"] = [worst(trips), worst(log_dets)]
    return errors


def worst(parts):
    """The largest entry, NaN counted as infinite."""
    value = max(float(np.where(np.isnan(part), np.inf, part).max(initial=0)) for part in parts)
    return value if math.isfinite(value) else "inf"


def shown(record, place, dtype, kind):
    if record is None:
        return "…"
    if "errors" not in record:
        return "–"
    value = float(record["errors"][f"{place} {dtype}"][kind])
    return "0" if value == 0 else "∞" if math.isinf(value) else f"{value:.0e}"


def tables(records, depths):
    """Markdown: one table for ordinary points, one for the tails."""
    at = {(r["case"], r["depth"]): r for r in records if "case" in r}
    text = []
    for place, title in zip(PLACES, ("Ordinary points", "Far in the tails"), strict=True):
        heads = [f"{what}, {dtype}" for dtype in DTYPES for what in ("round trip", "log-det")]
        text += [f"### {title}", "", f"| case | {' | '.join(heads)} |"]
        text.append("|---" * (1 + len(heads)) + "|")
        for name in CASES:
            cells = [
                " · ".join(shown(at.get((name, d)), place, dtype, kind) for d in depths)
                for dtype in DTYPES
                for kind in (0, 1)
            ]
            text.append(f"| `{name}` | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def described(thing):
    """A case's classes, each with its parts and those of its options that are not the default.

    An option is known where a field has the name of an argument of the constructor.
    """
    thing = thing.tree if isinstance(thing, Frozen) else thing
    if isinstance(thing, tuple | list):
        return f"[{', '.join(map(described, thing))}]"
    kind = type(thing)
    if not isinstance(thing, AbstractTransform):
        return kind.__name__
    arguments = inspect.signature(kind).parameters
    parts, chosen = [], []
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        value = value.tree if isinstance(value, Frozen) else value
        first = value[0] if isinstance(value, tuple | list) and value else value
        option = is_plain(value) and field.name in arguments and not field.name.endswith("shape")
        if isinstance(first, eqx.Module):
            parts.append(described(value))
        elif option and arguments[field.name].default != value:
            chosen.append(f"{field.name}={written(value)}")
    inside = ", ".join(parts + chosen)
    return f"{kind.__name__}({inside})" if inside else kind.__name__


def is_plain(value):
    return value is None or isinstance(value, bool | int | float | str | tuple)


def written(value):
    if isinstance(value, tuple):
        inside = ", ".join(map(written, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def key_to_cases():
    """Markdown: of each case its classes and shapes."""
    text = ["### The cases", "", "| case | made of | event | condition |", "|---|---|---|---|"]
    for name, case in CASES.items():
        made = case.make(jr.key(0))
        event = written(made.in_shape)
        if made.out_shape != made.in_shape:
            event += f" → {written(made.out_shape)}"
        condition = "–" if made.cond_shape is None else written(made.cond_shape)
        text.append(f"| `{name}` | `{described(made)}` | {event} | {condition} |")
    return "\n".join([*text, ""])


def options():
    made = parser(
        __doc__.splitlines()[0],
        budget="seconds after which no cell begins",
        out=Path("runs/errors.jsonl"),
        default=1800,
    )
    made.add_argument("--cases", type=names_of(CASES), help="some cases only")
    made.add_argument("--depths", type=numbers, default=(1, 8, 32))
    made.add_argument("--page", type=Path, help="write the tables into this page")
    made.add_argument("--report", action="store_true", help="only print what is there")
    return made.parse_args()


def main():
    args = options()
    begun = time.monotonic()
    if not args.report:
        guard([args.out], args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
    records = read_lines(args.out)
    done = {(r["case"], r["depth"]) for r in records if "case" in r}
    chosen = args.cases or [name for name, case in CASES.items() if not case.slow]
    left = [(c, d) for d in args.depths for c in chosen if (c, d) not in done]
    if left and not args.report:
        end_last_line(args.out)
        with args.out.open("a") as file:
            for name, depth in left:
                if time.monotonic() - begun > args.budget:
                    print(f"The budget is spent; go on with --resume: {len(left)} cells were left.")
                    break
                start = time.monotonic()
                record = {"case": name, "depth": depth, **machine()}
                if layers(CASES[name], depth) is not None:
                    record["errors"] = measure(CASES[name], depth)
                record["seconds"] = round(time.monotonic() - start, 2)
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                jax.clear_caches()
        records = read_lines(args.out)
    text = tables(records, args.depths)
    print(text)
    if args.page is not None:
        page = args.page.read_text()
        head, rest = page.split(MARKS[0])
        tail = rest.split(MARKS[1])[1]
        tail = f"{key_to_cases()}\n{MARKS[1]}{tail}"
        args.page.write_text(f"{head}{MARKS[0]}\n\n{text}\n{tail}")


if __name__ == "__main__":
    main()
