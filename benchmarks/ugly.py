"""Ugly tables: each is fitted, or refused in one sentence that says what to do.

Every table is written to a file as its user would have it, read, fitted for a few steps, scored and
sampled. A crash, a warning of NumPy's, a density that is not finite where it should be, or an error
of more than one sentence counts as a failure.

    python benchmarks/ugly.py [--only NAME] [--budget 1200] [--resume]
"""

import json
import tempfile
import time
import warnings
from pathlib import Path

import _common
import jax
import jax.random as jr
import numpy as np

import laminar
from laminar._errors import InputError
from laminar.tables.flow import fit_table
from laminar.tables.read import read_table, write_table


def _text(names, rows, encoding="utf-8", newline="\n"):
    lines = [",".join(names), *(",".join(map(str, row)) for row in rows)]
    return (newline.join(lines) + newline).encode(encoding)


def _numbers(rows=200, columns=3, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


def tables() -> dict[str, tuple[str, object]]:
    """Name → file suffix, and its bytes or its columns; some names end in ``(refused)``."""
    rng = np.random.default_rng(0)
    x = _numbers()
    huge = x.copy()
    huge[17] *= 1e6
    names = ["a", "b", "c"]
    letters = rng.choice(list("xyz"), 200)
    stamps = 1_700_000_000_000_000_000 + rng.integers(0, 10**15, 200)
    awkward = ['say "hi"', "naïve, café", "🌊 flow", " spaced ", "line\nbreak", "</script>"]
    gaps = x.astype(object)
    gaps[rng.random(x.shape) < 0.3] = ""
    return {
        "a constant column": (".csv", _text(names, np.column_stack([x[:, :2], np.full(200, 7.5)]))),
        "every row twice": (".csv", _text(names, np.repeat(x[:100], 2, axis=0))),
        "all rows the same (refused)": (".csv", _text(names, np.repeat(x[:1], 200, axis=0))),
        "one category": (".csv", _text([*names, "kind"], [[*row, "only"] for row in x])),
        "two equal columns": (".csv", _text(names, np.column_stack([x[:, :2], x[:, 0]]))),
        "one row a million times larger": (".csv", _text(names, huge)),
        "an empty column": (".csv", _text([*names, "empty"], [[*row, ""] for row in x])),
        "nothing but gaps (refused)": (".csv", _text(names, [["", "", ""]] * 200)),
        "gaps everywhere": (".csv", _text(names, gaps)),
        "5,000 columns": (".npy", _numbers(300, 5_000)),
        "12 rows (refused)": (".csv", _text(names, x[:12])),
        "no rows (refused)": (".csv", _text(names, [])),
        "an empty file (refused)": (".csv", b""),
        "timestamps in nanoseconds": (
            ".parquet",
            {"when": stamps.astype("datetime64[ns]"), "x": x[:, 0]},
        ),
        "nanoseconds as whole numbers (refused)": (
            ".parquet",
            {"when": stamps, "x": x[:, 0]},
        ),
        "emoji, quotes and line breaks in names": (
            ".parquet",
            {name: _numbers(200, 6)[:, i] for i, name in enumerate(awkward)},
        ),
        "emoji and quotes in cells": (
            ".parquet",
            {"note": np.array(awkward, object)[rng.integers(0, 6, 200)], "x": x[:, 0]},
        ),
        "Latin-1": (".csv", _text(["größe", "süß"], x[:, :2], "latin-1")),
        "UTF-16": (".csv", _text(["größe", "süß"], x[:, :2], "utf-16")),
        "Windows line ends and a byte-order mark": (".csv", _text(names, x, "utf-8-sig", "\r\n")),
        "mixed encodings (refused)": (
            ".csv",
            "größe,süß\n".encode() + _text(["é", "1"], x[:, :2], "latin-1"),
        ),
        "numbers and words in one column": (
            ".csv",
            _text(["a", "b"], [[v if i % 2 else "n/a?", w] for i, (v, w) in enumerate(x[:, :2])]),
        ),
        "a typing error among numbers (refused)": (
            ".csv",
            _text(["a", "b"], [["1.2.3" if i == 50 else v, i] for i, v in enumerate(x[:, 0])]),
        ),
        "infinities (refused)": (
            ".csv",
            _text(["a", "b"], [[v, "inf" if i == 3 else v] for i, v in enumerate(x[:, 0])]),
        ),
        "row numbers": (
            ".csv",
            _text(["id", "a"], [[1_000 + i, v] for i, v in enumerate(x[:, 0])]),
        ),
        "an identifier": (
            ".csv",
            _text(["id", "a"], [[f"user-{i:05d}", v] for i, v in enumerate(x[:, 0])]),
        ),
        "5,000 categories": (
            ".parquet",
            {
                "k": np.array([f"c{i}" for i in rng.zipf(1.3, 4000) % 5000], object),
                "x": _numbers(4000, 1)[:, 0],
            },
        ),
        "zeros in nine of ten rows": (
            ".csv",
            _text(
                ["a", "b"], np.column_stack([np.where(rng.random(200) < 0.9, 0, x[:, 0]), x[:, 1]])
            ),
        ),
        "Cauchy tails": (".csv", _text(["a", "b"], rng.standard_cauchy((400, 2)))),
        "true and false": (".csv", _text(["a", "yes"], [[v, v > 0] for v in x[:, 0]])),
        "dates and letters": (
            ".csv",
            _text(
                ["day", "letter"],
                [
                    [np.datetime64("2024-01-01") + int(d), k]
                    for d, k in zip(rng.integers(0, 400, 200), letters, strict=True)
                ],
            ),
        ),
        "1e300 and 1e-300": (".csv", _text(["a", "b"], x[:, :2] * [1e140, 1e-300])),
        "beyond float64's squares (refused)": (".csv", _text(["a", "b"], x[:, :2] * [1e200, 1])),
        "two columns of one name (refused)": (".csv", _text(["a", "a"], x[:, :2])),
        "a ragged row (refused)": (".csv", _text(["a", "b"], x[:, :2]) + b"1,2,3\n"),
        "not a table (refused)": (".parquet", b"PAR1 this is no parquet file"),
    }


def attempt(suffix: str, content: object, folder: Path) -> dict:
    """What becomes of a table: fitted, with the mean log-density, or refused, with the sentence."""
    path = folder / f"table{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif suffix == ".npy":
        np.save(path, content)
    else:
        write_table(path, content)
    notes: list[str] = []
    begun = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = read_table(path)
            model, _ = fit_table(table, steps=50, time_limit=60, notify=notes.append)
            log_p = model.log_prob(table)
            drawn = model.sample(jr.key(0), 50)
            write_table(folder / f"drawn{suffix}", drawn)
            again = model.log_prob(read_table(folder / f"drawn{suffix}"))
    except InputError as error:
        return {"outcome": "refused", "said": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever else happens is what this looks for
        return {"outcome": "failed", "said": f"{type(error).__name__}: {error}".splitlines()[0]}
    fine = bool(np.isfinite(log_p).all() and not np.isnan(again).any())
    return {
        "outcome": "fitted" if fine else "failed",
        "said": notes[0] if notes else "",
        "log_density": float(log_p.mean()),
        "seconds": time.perf_counter() - begun,
    }


def right(name: str, record: dict) -> bool:
    """Whether the outcome is the one wanted, and a refusal one sentence."""
    if name.endswith("(refused)"):
        said = record["said"].strip()
        return record["outcome"] == "refused" and "\n" not in said and said.endswith(".")
    return record["outcome"] == "fitted"


def report(records: list[dict]) -> str:
    """A line each, and what went wrong."""
    lines = [f"laminar {laminar.__version__}, jax {jax.__version__}"]
    for r in records:
        mark = " " if right(r["name"], r) else "!"
        time_ = f"{r['seconds']:5.0f} s" if "seconds" in r else "       "
        lines.append(f"{mark} {r['name']:<52} {r['outcome']:<8} {time_}  {r['said'][:150]}")
    wrong = [r["name"] for r in records if not right(r["name"], r)]
    lines.append(f"{len(records) - len(wrong)} of {len(records)} as they should be")
    return "\n".join(lines)


def main() -> None:
    options = _common.parser(
        __doc__.splitlines()[0],
        budget="seconds after which no other table begins (%(default)s)",
        out=Path("runs/ugly.jsonl"),
        default=1200,
    )
    options.add_argument("--only", default="", help="tables whose names contain this")
    args = options.parse_args()
    _common.guard([args.out], args)
    chosen = {name: what for name, what in tables().items() if args.only in name}
    records, left = _common.left_over(
        args, _common.read_lines(args.out), {}, chosen, lambda record: record["name"]
    )
    begun = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _common.end_last_line(args.out)
    for name in left:
        if time.monotonic() - begun > args.budget:
            print(f"Not begun within {args.budget:g} s: {name} and what follows.")
            break
        with tempfile.TemporaryDirectory() as folder:
            found = attempt(*chosen[name], Path(folder))
        records.append({"name": name, **found, "machine": _common.machine()})
        print(f"{time.monotonic() - begun:6.0f} s  {name}: {found['outcome']}", flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
    print(report(records))


if __name__ == "__main__":
    main()
