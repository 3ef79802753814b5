"""One cell: a worker for each library, first calls alone, then all in turn, round after round.

Memory comes last, since measuring it changes how the allocator works.
"""

import statistics
import sys
import time
from pathlib import Path

from _common import cores, machine

from _speed.cells import (
    INTERVAL,
    LIBRARIES,
    NOT_BEGUN,
    OPS,
    TRAIN_BATCHES,
    Cell,
    ops_of,
    products,
    rows_of,
)
from _speed.client import Worker, WorkerError

RATE = 1e-4
"""Learning rate, low enough that hundreds of steps on noise leave every flow sound."""

_FLOOR = {"floor_log_prob": "log_prob", "floor_step": "step"}
_PEAKS = ("peak_flops", "peak_bytes")


def variables(gpu: bool, folder: Path) -> dict[str, str]:
    """Environment variables that make the libraries comparable.

    All cores for everyone, one device, and no compiled program kept from an earlier run, since the
    first call is measured.
    """
    threads = str(cores())
    shared = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder.absolute() / "inductor"),
        "PYTHONNOUSERSITE": "1",
        "PYTHONPATH": "",
    }
    if gpu:
        # Two JAX processes and those of PyTorch share the memory.
        return shared | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}
    return shared | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def held_by_others(seconds: float = 0.5) -> float | None:
    """The share of all cores that is at work while this script does nothing."""

    def look():
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        times = [int(field) for field in fields]
        return sum(times), times[3] + times[4]

    try:
        before = look()
        time.sleep(seconds)
        total, idle = (b - a for a, b in zip(before, look(), strict=True))
    except (OSError, ValueError, IndexError):
        return None
    return 1 - idle / total if total else None


class CellRun:
    """Measures one cell.

    Args:
        cell: The cell.
        pythons: For each library the interpreter of its environment, or why there is none.
        args: Options of the script.
        deadline: The time, by ``time.monotonic()``, after which no first call, no other round and
            no look at memory begins. One round is done of what was called before.
    """

    def __init__(self, cell: Cell, pythons: dict[str, Path | str], args, deadline: float):
        self.cell, self.args, self.deadline = cell, args, deadline
        self.workers: dict[str, Worker] = {}
        self.results: dict[str, dict] = {}
        self.floor: dict[str, dict] = {}
        spec = cell._asdict() | {
            "layers": args.layers,
            "width": args.width,
            "bins": args.bins,
            "interval": INTERVAL,
            "batch": args.batch,
            "rows": args.rows,
            "train_batches": TRAIN_BATCHES,
            "rate": RATE,
            "products": products(cell, args.width, args.bins),
        }
        environment = variables(args.gpu, args.envs)
        for name, python in pythons.items():
            ops = ops_of(name, cell, args.compile)
            if not ops:
                continue
            self.results[name] = {"ops": {op: {"rows": self._rows(op)} for op in ops}}
            if isinstance(python, str):
                self.results[name]["error"] = python
                continue
            adapter = LIBRARIES[name].adapter
            given = (name, adapter, python, environment, spec, args.timeout)
            self.workers[name] = Worker(*given)

    def measure(self) -> dict:
        """The record of the cell."""
        others = [held_by_others()]
        try:
            self._start()
            for op in (*OPS, "sample_own"):
                for name in list(self.workers):
                    self._first(name, op)
            rounds = 0
            while rounds < self.args.rounds and not (rounds and self._late()):
                self._round(rounds)
                rounds += 1
            for op in OPS:
                for name in list(self.workers):
                    if not self._late():
                        self._memory(name, op)
            analysis = self._analysis()
        finally:
            for worker in self.workers.values():
                worker.end()
        others.append(held_by_others())
        return {
            **self.cell._asdict(),
            "options": kept_options(self.args),
            "rounds": rounds,
            "machine": machine() | {"held_by_others": max(o or 0.0 for o in others)},
            "libraries": self.results,
            "floor": self.floor,
            "xla": analysis,
        }

    def _rows(self, op: str) -> int:
        if op == "sample_own":
            return self.args.rows
        return rows_of(op, self.cell, self.args.rows, self.args.batch)

    def _start(self) -> None:
        """Start all at once, as importing takes longest; then hear each."""
        for name, worker in list(self.workers.items()):
            try:
                worker.start()
            except WorkerError as error:
                self._drop(name, error)
        for name, worker in list(self.workers.items()):
            try:
                found = worker.finish_start()
                ours = self.results.get("laminar", {}).get("platform", found["platform"])
                if found["platform"] != ours:
                    raise WorkerError(f"it runs on {found['platform']}, laminar on {ours}")
                self.results[name] |= found
            except WorkerError as error:
                self._drop(name, error)
        ours = self.results.get("laminar", {}).get("ops", {})
        if "laminar" in self.workers and self._rows("sample") < self.args.rows:
            ours["sample_own"] = {"rows": self.args.rows}

    def _drop(self, name: str, error: WorkerError) -> None:
        """Leave a library out of the cell, with the reason."""
        self.results[name]["error"] = str(error)
        print(f"  {LIBRARIES[name].title}: {error}.", file=sys.stderr, flush=True)
        self.workers.pop(name).end()

    def _late(self) -> bool:
        return time.monotonic() >= self.deadline

    def _ask(self, name: str, op: str, **request) -> dict | None:
        """An answer, or None where this operation of this library has failed, now or before."""
        kept = self.results[name]["ops"].get(op)
        if kept is None or "error" in kept:
            return None
        try:
            does = "sample" if op == "sample_own" else op
            return self.workers[name].ask(op=does, rows=kept["rows"], **request)
        except WorkerError as error:
            kept["error"] = str(error)
            where = f"{LIBRARIES[name].title}, {OPS.get(op, op)}"
            print(f"  {where}: {error}.", file=sys.stderr, flush=True)
            return None

    def _first(self, name: str, op: str) -> None:
        kept = self.results[name]["ops"].get(op)
        if kept is not None and self._late():
            kept["error"] = NOT_BEGUN
            return
        answer = self._ask(name, op, do="first")
        if answer is not None:
            self.results[name]["ops"][op]["first_s"] = answer["seconds"]

    def _memory(self, name: str, op: str) -> None:
        answer = self._ask(name, op, do="memory")
        if answer is not None:
            found = {"memory_bytes": answer["bytes"], "finite": answer["finite"]}
            self.results[name]["ops"][op] |= found

    def _round(self, number: int) -> None:
        """Each library once for each operation, in another order each time; the floor too."""
        names = list(self.workers)
        turn = number % max(len(names), 1)
        for op in (*OPS, "sample_own"):
            for name in names[turn:] + names[:turn]:
                answer = self._ask(name, op, do="run", seconds=self.args.seconds)
                if answer is not None:
                    kept = self.results[name]["ops"][op]
                    kept.setdefault("seconds", []).append(statistics.median(answer["seconds"]))
        if "laminar" in self.workers:
            self._floor_round()

    def _floor_round(self) -> None:
        masked = [f"{op}_masked" for op in _FLOOR] if self.cell.arch != "nsf_coupling" else []
        for op in (*_FLOOR, *masked, *_PEAKS):
            if "error" in self.floor.get(op, {}):
                continue
            rows = self._rows(_FLOOR.get(op.removesuffix("_masked"), "log_prob"))
            request = {"do": "run", "op": op, "rows": rows, "seconds": self.args.seconds}
            try:
                answer = self.workers["laminar"].ask(**request)
            except WorkerError as error:
                self.floor[op] = {"error": str(error)}
                continue
            kept = self.floor.setdefault(op, {"rows": rows, "seconds": []})
            kept |= {k: answer[k] for k in ("flops", "bytes") if k in answer}
            # Of a limit the best that was reached counts.
            chosen = min if op in _PEAKS else statistics.median
            kept.setdefault("seconds", []).append(chosen(answer["seconds"]))

    def _analysis(self) -> dict:
        if "laminar" not in self.workers:
            return {}
        try:
            return self.workers["laminar"].ask(do="analyse", rows=self._rows("log_prob"))
        except WorkerError as error:
            return {"error": str(error)}


def failed(record: dict) -> bool:
    """Whether something of a cell failed, or was not begun, and is to be tried again."""
    parts = [*record["libraries"].values(), *record["floor"].values(), record["xla"]]
    ops = [
        (op, kept) for found in record["libraries"].values() for op, kept in found["ops"].items()
    ]
    unseen = any(op in OPS and "memory_bytes" not in kept for op, kept in ops)
    errors = any("error" in part for part in (*parts, *(kept for _, kept in ops)))
    return errors or unseen or record["rounds"] < record["options"]["rounds"]


def kept_options(args) -> dict:
    """The options that results must share to stand in one table."""
    names = ("rows", "batch", "layers", "width", "bins", "gpu", "rounds", "seconds", "compile")
    # Lists, as they come back from the file of results.
    return {name: getattr(args, name) for name in names} | {"libraries": sorted(args.libraries)}
