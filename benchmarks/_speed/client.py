"""A worker seen from the script that orders its work: one process, JSON lines both ways."""

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path

_WORKER = Path(__file__).parent / "workers" / "worker.py"


class WorkerError(Exception):
    """What a library could not do, in a few words."""


class Worker:
    """A library at work in a process of its own environment.

    A worker that is too slow is ended. It is started and built again when it is next asked
    for something, so one operation that hangs does not take the others with it.

    Args:
        name: Name of the library.
        adapter: Module of the worker's folder that speaks to it.
        python: Interpreter of its environment.
        variables: Environment variables.
        spec: What it builds.
        timeout: Seconds that an answer may take.
    """

    def __init__(
        self,
        name: str,
        adapter: str,
        python: Path,
        variables: dict[str, str],
        spec: dict,
        timeout: float,
    ):
        self.name, self.spec, self.timeout = name, spec, timeout
        self._command = [str(python), str(_WORKER), adapter, name]
        self._variables = variables
        self._process: subprocess.Popen | None = None
        self._left = b""

    def start(self) -> None:
        """Start the process and let it build; `finish_start` waits for it.

        Raises:
            WorkerError: If there is no such interpreter, or it cannot be started.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (the process writes to it)
        self._left = b""
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=os.environ | self._variables,
            )
        except OSError as error:
            self._log.close()
            raise WorkerError(f"it cannot be started: {error}") from error
        self._send(self._process, {"do": "build", "spec": self.spec})

    def finish_start(self) -> dict:
        """What the worker says of itself once it has built."""
        return self._receive("build")

    def ask(self, **request) -> dict:
        """The answer to a request.

        Raises:
            WorkerError: If the library fails, is too slow, or its process ends.
        """
        if self._process is None:
            self.start()
            self.finish_start()
        self._send(self._process, request)
        return self._receive(" ".join(str(v) for v in request.values()))

    def end(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout):
                # Closing sends what was written to a process that is no more, and fails.
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
            process.wait()
            self._log.close()

    @staticmethod
    def _send(process: subprocess.Popen | None, request: dict) -> None:
        # That a process has ended is reported by `_receive`, with the reason.
        with contextlib.suppress(OSError):
            if process is not None and process.stdin is not None:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()

    def _receive(self, asked: str) -> dict:
        deadline = time.monotonic() + self.timeout
        process = self._process
        if process is None or process.stdout is None:
            raise WorkerError("its process is not there")
        stream = process.stdout.fileno()
        while b"\n" not in self._left:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                self.end()
                raise WorkerError(f"no answer to {asked!r} within {self.timeout:.0f} s")
            piece = os.read(stream, 2**16)
            if not piece:
                raise WorkerError(self._last_words(process))
            self._left += piece
        line, self._left = self._left.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self, process: subprocess.Popen) -> str:
        status = process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.end()
        return f"its process ended with status {status}: {lines[-1] if lines else 'no message'}"
