"""Progress of training on standard error: a Rich bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

_LINE_SECONDS = 5.0


class Progress:
    """Shows how far training is; used as a context.

    Args:
        show: True, False, or None to show it on a terminal only.
        steps: Budget of steps, or None.
        seconds: Budget of seconds, or None.
    """

    def __init__(self, show: bool | None, steps: int | None, seconds: float | None):
        self._terminal = sys.stderr.isatty()
        self.shown = self._terminal if show is None else show
        self._steps, self._seconds = steps, seconds
        self._bar: Any = None
        self._task: Any = None
        self._begun = time.monotonic()
        self._printed = self._begun

    def __enter__(self) -> "Progress":
        """Open the bar where there is a terminal."""
        if self.shown and self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("compiling", total=1.0)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, elapsed: float, loss: float, best: float | None) -> None:
        """Show the step, the latest training loss and the best held-out loss."""
        if not self.shown:
            return
        text = f"step {step:,}  loss {loss:.4f}"
        if best is not None:
            text += f"  best held out {best:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done(step, elapsed), description=text)
        elif time.monotonic() - self._printed >= _LINE_SECONDS:
            self._printed = time.monotonic()
            print(f"{text}  {elapsed:.0f} s", file=sys.stderr, flush=True)

    def finish(self, text: str) -> None:
        """Say in one line how it ended."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def _done(self, step: int, elapsed: float) -> float:
        parts = [step / self._steps] if self._steps else []
        parts += [elapsed / self._seconds] if self._seconds else []
        return min(max(parts, default=0.0), 1.0)
