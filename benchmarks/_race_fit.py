"""What the fits of a race share: their arguments, the rows, and the curve they leave.

Every library fits in a process of its own, in an environment that need not have the others, so this
file needs NumPy alone. A curve is written line by line as it grows, and what a killed fit has
reached is kept.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Standardised rows, the same for all libraries."""

    train: np.ndarray
    validation: np.ndarray


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", type=Path, help="an .npz with train and validation")
    parser.add_argument("out", type=Path, help="where the curve goes, as JSON lines")
    parser.add_argument("--budget", type=float, required=True, help="seconds for the fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--limit", action="store_true", help="give laminar the budget as its limit")
    return parser.parse_args()


def read(path: Path) -> Rows:
    with np.load(path, allow_pickle=False) as archive:
        return Rows(archive["train"], archive["validation"])


class OutOfTime(BaseException):
    """Raised inside a library's loop when the budget is spent; no library catches it."""


class Curve:
    """Seconds since the call of the fit began, and the validation log-likelihood reached then."""

    def __init__(self, args: argparse.Namespace):
        self._file = args.out.open("w", buffering=1)
        self._budget = args.budget
        self._begun = time.perf_counter()
        self._paused = 0.0
        self._cpu = time.process_time()

    def write(self, **record) -> None:
        self._file.write(json.dumps(record) + "\n")

    def begin(self) -> None:
        """Start the clock; what was imported, read and built before does not count."""
        self._begun, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        return time.perf_counter() - self._begun - self._paused

    def add(self, value: float, *, epoch: int, seconds: float | None = None) -> None:
        """One point, in nats a row; ends the fit when the budget is spent."""
        seconds = self.seconds() if seconds is None else seconds
        self.write(seconds=seconds, value=float(value), epoch=epoch)
        if seconds > self._budget:
            raise OutOfTime

    def spent(self) -> bool:
        """Whether the budget is spent."""
        return self.seconds() > self._budget

    def pause(self, since: float) -> None:
        """Take the time since a reading of `time.perf_counter` out of the clock."""
        self._paused += time.perf_counter() - since

    def end(self, reason: str) -> None:
        """The last line; CPU seconds far below those of the others tell of a busy machine."""
        wall = time.perf_counter() - self._begun
        cpu = time.process_time() - self._cpu
        self.write(reason=reason, total=self.seconds(), cores=cpu / wall)
        self._file.close()
