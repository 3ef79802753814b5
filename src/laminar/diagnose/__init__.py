"""Check a flow: `check` returns a `CheckReport`, a number and a budget for every claim."""

from laminar.diagnose.checks import check as check
from laminar.diagnose.report import CheckReport as CheckReport
from laminar.diagnose.report import Line as Line

__all__ = ["CheckReport", "Line", "check"]
