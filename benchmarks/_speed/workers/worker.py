"""One library at work: answers requests, one JSON line each, until its input ends.

    build   spec                → versions, device, threads, parameters
    first   op rows             → seconds of the first call, tracing and compilation included
    run     op rows seconds     → seconds of single calls, for about so long
    memory  op rows             → most bytes held beyond those at the start of a call, and whether
                                  all that it gave is finite; comes last
    analyse rows                → what the compiler says of its programs, where there is one

An adapter module has a class `Adapter(name)` with `build(spec)`, `info()`, `call(op, rows, count)`,
which returns only when the device is done, and `analyse(rows)`. Nothing runs between requests, so
workers of other libraries can be timed meanwhile.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import re
import sys
import time

_MOST_CALLS = 1000

# Options of glibc's mallopt, and the size from which a block counts as large.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_BLOCK = 2**16


class Worker:
    """Times the calls of an adapter."""

    def __init__(self, adapter):
        self.adapter = adapter
        self.seconds = {}

    def build(self, spec):
        self.adapter.build(spec)
        return self.adapter.info()

    def first(self, op, rows):
        seconds = self._time(op, rows, 1)
        return {"seconds": seconds}

    def memory(self, op, rows):
        """Peak beyond the start.

        What the allocator keeps of earlier calls would hide what this one needs. So it is told,
        for good, to give large blocks back at once, and one call makes it let go of the old ones;
        times measured afterwards would not be those of a user.
        """
        device = self.adapter.device_memory()
        if device is not None:
            value = self.adapter.call(op, rows, 1)
            used = self.adapter.device_memory()[1] - device[0]
            return {"bytes": used, "finite": self.adapter.finite(value)}
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK)
            libc.mallopt(_M_TRIM_THRESHOLD, _BLOCK)
            self.adapter.call(op, rows, 1)
            # Working arrays may be freed a moment after the result is there.
            time.sleep(0.05)
            gc.collect()
            libc.malloc_trim(0)
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        start = _status("VmRSS")
        value = self.adapter.call(op, rows, 1)
        peak = _status("VmHWM")
        used = None if start is None or peak is None else max(peak - start, 0)
        return {"bytes": used, "finite": self.adapter.finite(value)}

    def run(self, op, rows, seconds):
        """Calls for about so many seconds, at least one, after one that warms caches.

        Many steps are one call, as in training; each pass over rows is one of its own.
        """
        known = self.seconds.get((op, rows))
        if known is None or known < seconds:
            known = self._time(op, rows, 1)
        count = max(1, min(_MOST_CALLS, int(seconds / max(known, 1e-9))))
        together = op == "step"
        times = [self._time(op, rows, count if together else 1) for _ in range(together or count)]
        self.seconds[op, rows] = min(times)
        return {"seconds": times, "calls": count, **self.adapter.work(op, rows)}

    def analyse(self, rows):
        return self.adapter.analyse(rows)

    def _time(self, op, rows, count):
        begun = time.perf_counter()
        self.adapter.call(op, rows, count)
        return (time.perf_counter() - begun) / count


def _status(name):
    """A figure of this process in bytes, or None where the system does not tell."""
    try:
        with open("/proc/self/status") as file:
            found = re.search(rf"{name}:\s+(\d+)", file.read())
    except OSError:
        return None
    return 1024 * int(found.group(1)) if found else None


def main():
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(importlib.import_module(sys.argv[1]).Adapter(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001  (a library may fail in any way it likes)
            words = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {words[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
