"""What a training run leaves behind."""

import dataclasses
import math
from typing import Any

import numpy as np


def _empty(dtype: Any = np.float32):
    return dataclasses.field(default_factory=lambda: np.zeros(0, dtype))


@dataclasses.dataclass
class History:
    """The course of a training run.

    Attributes:
        loss: Training loss of every step, on its own batch, ``(steps,)``. Non-finite where a step
            was taken back.
        rate: Learning rate of every step.
        validation: Held-out loss at every validation, ``(k,)``.
        validation_ema: The same of the averaged parameters; NaN without averaging.
        validation_steps: After how many steps each validation took place.
        validation_seconds: And after how many seconds.
        best_step: After how many steps the returned parameters were reached.
        best_loss: Their held-out loss; NaN when nothing finite was held out.
        rollbacks: Steps that were not finite and were taken back.
        seconds: Wall-clock time in all, compilation included, resumed parts added up.
        stop_reason: ``"steps"``, ``"patience"``, ``"time limit"``, or empty while running.
    """

    loss: np.ndarray = _empty()
    rate: np.ndarray = _empty()
    validation: np.ndarray = _empty()
    validation_ema: np.ndarray = _empty()
    validation_steps: np.ndarray = _empty(np.int64)
    validation_seconds: np.ndarray = _empty(np.float64)
    best_step: int = 0
    best_loss: float = math.nan
    rollbacks: int = 0
    seconds: float = 0.0
    stop_reason: str = ""

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.loss)

    def __repr__(self) -> str:
        """One line: the arrays are for plots."""
        ended = f", ended by {self.stop_reason}" if self.stop_reason else ""
        undone = f", {self.rollbacks} taken back" if self.rollbacks else ""
        return (
            f"History({self.steps} steps in {self.seconds:.1f} s{undone}{ended}; held-out loss "
            f"{self.best_loss:.5g} after {self.best_step})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as lists and numbers that JSON can hold; what is not finite becomes None."""

        def plain(value):
            if isinstance(value, np.ndarray):
                return [plain(v) for v in value.tolist()]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {
            "steps": self.steps,
            **{f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }
