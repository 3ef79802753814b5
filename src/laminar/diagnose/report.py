"""What a check found: lines of a number and its budget, printed as a table."""

import dataclasses
import math
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One check: its value, the budget that it must not exceed, and whether it does not.

    `passed` is None where the check could not be made; `detail` says why, or where the worst was.
    """

    name: str
    value: float
    budget: float
    passed: bool | None
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What `check` found; ``print(report)`` shows it as a table.

    Attributes:
        subject: What was checked.
        lines: The checks in order.
    """

    subject: str
    lines: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(line.passed is not False for line in self.lines)

    def __getitem__(self, name: str) -> Line:
        """The line of a name."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(name)

    def __str__(self):
        width = max(len(line.name) for line in self.lines)
        rows = [self.subject]
        for line in self.lines:
            if line.passed is None:
                numbers, verdict = " " * 22, "----"
            else:
                numbers = f"{line.value:10.2e} ≤ {line.budget:7.1e}  "
                verdict = "pass" if line.passed else "FAIL"
            row = f"  {line.name:<{width}}  {numbers}{verdict}"
            rows.append(f"{row}  {line.detail}".rstrip())
        failed = sum(line.passed is False for line in self.lines)
        rows.append("PASS" if self.passed else f"FAIL: {failed} of {len(self.lines)} checks failed")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it; numbers that are not finite become strings."""

        def plain(value: float) -> float | str:
            return value if math.isfinite(value) else str(value)

        lines = [
            {**line._asdict(), "value": plain(line.value), "budget": plain(line.budget)}
            for line in self.lines
        ]
        return {"subject": self.subject, "passed": self.passed, "lines": lines}
