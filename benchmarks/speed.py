"""Speed: laminar, FlowJAX, zuko, nflows and normflows side by side, on the same work in one run.

For every architecture and D each library builds the same flow in a process of its own. Measured are
a training step, log_prob and sampling, the first call of each, and their peak memory; beside them
stand the matrix products alone. Calls are interleaved in rounds, all others idle meanwhile.

    python benchmarks/speed.py [--budget 900] [--resume] [--compile all]
    python benchmarks/speed.py --report --out build/bench/speed.jsonl
"""

import json
import sys
import time
from pathlib import Path

import _common
from _speed.cells import ARCHITECTURES, COMPILED, DIMS, LIBRARIES, Cell, cells
from _speed.envs import interpreters
from _speed.measure import CellRun, failed, kept_options
from _speed.report import report

from laminar._files import atomic_write


def options():
    parser = _common.parser(
        (__doc__ or "").splitlines()[0],
        budget="seconds, environments included, after which nothing else begins (%(default)s)",
        out=Path("runs/speed.jsonl"),
        default=3600,
    )
    parser.add_argument(
        "--archs",
        type=_common.names_of(ARCHITECTURES),
        default=tuple(ARCHITECTURES),
        help=f"architectures, between commas: {', '.join(ARCHITECTURES)} (all)",
    )
    parser.add_argument(
        "--dims", type=_common.numbers, default=DIMS, help="D, between commas: %(default)s"
    )
    parser.add_argument(
        "--libraries",
        type=_common.names_of(LIBRARIES),
        default=tuple(LIBRARIES),
        help=f"between commas: {', '.join(LIBRARIES)} (all)",
    )
    parser.add_argument(
        "--compile",
        choices=("none", "some", "all"),
        default="some",
        help="where torch.compile is measured; some: step and log_prob of one cell (%(default)s)",
    )
    parser.add_argument("--rows", type=int, default=10_000, help="to score and to draw")
    parser.add_argument("--batch", type=int, default=512, help="rows of a training step")
    parser.add_argument("--layers", type=int, default=5, help="%(default)s")
    parser.add_argument("--width", type=int, default=128, help="hidden units, %(default)s")
    parser.add_argument("--bins", type=int, default=8, help="of a spline, %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="of a library's turn, unless one call is longer"
    )
    parser.add_argument(
        "--timeout", type=float, default=180, help="seconds that an answer may take"
    )
    parser.add_argument("--gpu", action="store_true", help="on a GPU, in environments made for it")
    parser.add_argument("--envs", type=Path, default=Path("build/bench/envs"), help="%(default)s")
    parser.add_argument("--report", action="store_true", help="only print what is in --out")
    args = parser.parse_args()
    if min(args.dims) < 2:
        parser.error("--dims must be at least 2: a single column has nothing to depend on.")
    return args


def to_measure(wanted: list[Cell], records: list[dict]) -> list[Cell]:
    """Cells without results, and after them those of which something failed."""
    done = {Cell(r["arch"], r["dim"]): failed(r) for r in records}
    again = [cell for cell in wanted if done.get(cell)]
    return [cell for cell in wanted if cell not in done] + again


def main():
    args = options()
    if args.report:
        print(report(_common.read_lines(args.out)))
        return
    begun = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _common.guard([args.out], args)
    records = _common.read_lines(args.out)
    for record in records:
        _common.refuse_change(args.out, record["options"], kept_options(args))
        _common.refuse_elsewhere(args.out, record["machine"], _common.machine())
    environments = {
        name: LIBRARIES[name].environment
        for name in args.libraries
        if name != COMPILED or args.compile != "none"
    }
    pythons = interpreters(environments, args.envs, args.gpu)
    left = to_measure(cells(args.archs, args.dims), records)
    while left and time.monotonic() - begun <= args.budget:
        cell = left.pop(0)
        print(f"{time.monotonic() - begun:5.0f} s  {cell.words}", file=sys.stderr, flush=True)
        found = CellRun(cell, pythons, args, begun + args.budget).measure()
        records = [r for r in records if (r["arch"], r["dim"]) != cell] + [found]
        atomic_write(args.out, "".join(json.dumps(r) + "\n" for r in records).encode())
    print(report(records))
    if left:
        names = "; ".join(cell.words for cell in left)
        print(f"\nNot begun within {args.budget:.0f} s, or not again: {names}.")


if __name__ == "__main__":
    main()
