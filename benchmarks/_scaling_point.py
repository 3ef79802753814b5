"""One point of `scaling.py`, in a process of its own, so that memory and compile time are its own.

    python benchmarks/_scaling_point.py '{"task": "log_prob", "dim": 8, "layers": 5, "rows": 1000}'

The last line of its output is the record as JSON.
"""

import contextlib
import ctypes
import gc
import json
import resource
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from incremental import random_flow

from laminar.train import MappedSource, fit
from laminar.zoo import nsf

BATCH = 512
PIECE = 2**18
STATUS = Path("/proc/self/status")


class Memory:
    """Bytes that this process has come to hold since the beginning of a measurement.

    Linux counts pages of mapped files into the peak, though it takes them back when memory is
    short. What streams from a file is therefore sampled without them. Other systems cannot forget a
    peak: there what stays below that of the compiler reads as nothing.
    """

    def __init__(self):
        self._stop, self._lock = threading.Event(), threading.Lock()
        self.begin()

    def begin(self) -> None:
        """Count from here: what imports and the compiler needed for a moment is given back."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            # What the allocator keeps for later would hide what is taken from it.
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        with self._lock:
            self._peak, self._own = self._read("VmHWM"), self._read("RssAnon")
            self._most = self._own

    def peak(self) -> int:
        """Growth of the peak, in bytes."""
        return self._read("VmHWM") - self._peak

    @contextlib.contextmanager
    def sampled(self) -> Iterator[Callable[[], int]]:
        """Gives a function for the growth without mapped files; sampled every 10 ms."""

        def watch():
            while not self._stop.wait(0.01):
                with self._lock:
                    self._most = max(self._most, self._read("RssAnon"))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield lambda: self._most - self._own
        finally:
            self._stop.set()
            watcher.join()

    @staticmethod
    def _read(name: str) -> int:
        if not STATUS.exists():
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        lines = STATUS.read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def flow_of(point: dict) -> Any:
    """Far from the identity, so that no shortcut of a fresh flow is measured."""
    return random_flow(point["dim"], Namespace(layers=point["layers"], width=point["width"]))


def compiled(function: Callable, *args) -> tuple[Callable, float]:
    """A compiled function of these arguments, and the seconds to trace and compile it."""
    begun = time.perf_counter()
    jitted: Any = eqx.filter_jit(function)
    made = jitted.lower(*args).compile()
    return made, time.perf_counter() - begun


def repeated(call: Callable[[], Any], seconds: float, least: int = 3) -> list[float]:
    """Times of calls, for so many seconds and at least so often; the first is not counted."""
    jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < 1000):
        if times and sum(times) > 10 * seconds:
            break
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return times


def log_prob(point: dict, memory: Memory) -> dict:
    """The public door on all rows at once; it cuts them into chunks itself."""
    flow = flow_of(point)
    shape = (point["rows"], point["dim"])
    # Compiled on other rows, so that those that are scored count.
    run, compiling = compiled(lambda flow, x: flow.log_prob(x), flow, jnp.zeros(shape))
    memory.begin()
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    times = repeated(lambda: run(flow, x), point["seconds"])
    return {"unit_s": np.median(times) / shape[0], "compile_s": compiling, "peak": memory.peak()}


def sample(point: dict, memory: Memory) -> dict:
    """So many draws at once."""
    flow, rows = flow_of(point), point["rows"]
    run, compiling = compiled(lambda flow, key: flow.sample(key, (rows,)), flow, jr.key(0))
    memory.begin()
    times = repeated(lambda: run(flow, jr.key(1)), point["seconds"])
    return {"unit_s": np.median(times) / rows, "compile_s": compiling, "peak": memory.peak()}


def trained(point: dict, data: Any, steps: Callable[[float], int], memory: Memory) -> dict:
    """Time of a row in training, and of compiling.

    `fit` is called for a few steps, twice, and once for more: what the first call takes beyond the
    second is compilation, what the third takes beyond it are the further steps. Memory is counted
    from the second on.
    """
    flow = nsf(point["dim"], key=jr.key(0), layers=point["layers"], width=point["width"])

    def call(count: int) -> float:
        begun = time.perf_counter()
        options = {"batch_size": BATCH, "validation": None, "progress": False}
        fit(jr.key(1), flow, data, steps=count, **options)
        return time.perf_counter() - begun

    few = 12
    first = call(few)
    memory.begin()
    again = call(few)
    more = steps(again / few)
    unit = (call(few + more) - again) / more / BATCH
    return {"unit_s": unit, "compile_s": first - again, "steps": more}


def step(point: dict, memory: Memory) -> dict:
    """Training steps on rows that are held in memory."""
    shape = (16 * BATCH, point["dim"])
    data = np.random.default_rng(0).standard_normal(shape, np.float32)

    def count(pace: float) -> int:
        return int(np.clip(point["seconds"] / pace, 5, 500))

    found = trained(point, data, count, memory)
    return found | {"peak": memory.peak()}


def stream(point: dict, memory: Memory) -> dict:
    """Training from a file, each row once where there are as many steps as batches.

    The file was written a moment ago, so its pages are still in memory and no disk is waited for.
    """
    rows, dim = point["rows"], point["dim"]
    with tempfile.TemporaryDirectory(dir=point["folder"]) as folder:
        path = Path(folder) / "rows.npy"
        write_rows(path, rows, dim)
        with memory.sampled() as held:
            source = MappedSource(np.load(path, mmap_mode="r"))
            once = max(rows // BATCH, 100)
            found = trained(point, source, lambda _: min(once, point["most_steps"]), memory)
            return found | {"peak": held(), "whole_pass": found["steps"] >= rows // BATCH}


def write_rows(path: Path, rows: int, dim: int) -> None:
    """A table of noise, written a piece at a time, so that it is never held."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, PIECE):
            piece = rng.standard_normal((min(PIECE, rows - start), dim), np.float32)
            file.write(piece.tobytes())


TASKS = {"log_prob": log_prob, "sample": sample, "step": step, "stream": stream}


def main():
    point = json.loads(sys.argv[1])
    # The runtime is started before memory is counted.
    jax.block_until_ready(jnp.zeros(8) + 1)
    found = TASKS[point["task"]](point, Memory())
    print(json.dumps(found | {"platform": jax.devices()[0].platform, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
