"""Axes of small pictures: where ticks stand, what they say, and how values become pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_WIDE = 0.56  # of the font's size: an average character

# Seconds, and how a date is written at such a step.
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_CLOCK = (
    *(1, 5, 15, 30),
    *(n * _MINUTE for n in (1, 5, 15, 30)),
    *(n * _HOUR for n in (1, 3, 6, 12)),
    *(n * _DAY for n in (1, 2, 7, 14)),
)
_MONTHS = (1, 3, 6)


@dataclass(frozen=True)
class Axis:
    """An interval of values, its ticks, and what it is called.

    Attributes:
        low: The value at its start.
        high: The value at its end, greater than `low`.
        ticks: Pairs of a value and its text.
        label: The name of the column, or what else is measured.
        log: Whether equal ratios have equal lengths; then `low` is positive.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str = ""
    log: bool = False

    def share(self, values: np.ndarray | float) -> np.ndarray:
        """Where values lie between the start, 0, and the end, 1."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return (self._scaled(values) - low) / (high - low)

    def edges(self, bins: int) -> np.ndarray:
        """The borders of intervals of equal length on the axis, (bins + 1,)."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        edges = np.linspace(low, high, bins + 1)
        return np.exp(edges) if self.log else edges

    def _scaled(self, values: np.ndarray | float) -> np.ndarray:
        values = np.asarray(values, np.float64)
        if not self.log:
            return values
        # What is not positive lies left of the axis.
        return np.log(np.where(values > 0, values, np.nan))


def number_axis(
    low: float, high: float, label: str = "", count: int = 5, whole: bool = False
) -> Axis:
    """An axis of numbers, with about `count` round ticks, at whole numbers only where wanted."""
    if not high > low:
        middle = (low + high) / 2
        low, high = middle - (abs(middle) * 0.05 or 0.5), middle + (abs(middle) * 0.05 or 0.5)
    step = _round_step((high - low) / max(count, 1))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.ceil(low / step - 1e-9)
    values = [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, tuple((v, tick_text(v, step)) for v in values), label)


def log_axis(low: float, high: float, label: str = "") -> Axis:
    """An axis of positive numbers over decades."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first) / 5))
    values = [10.0**k for k in range(first, last + 1, stride)]
    return Axis(low, high, tuple((v, tick_text(v, v)) for v in values), label, log=True)


def level_axis(levels: Sequence[str], label: str = "") -> Axis:
    """An axis of categories: level k at k, with a name where there is room for one."""
    stride = max(1, math.ceil(len(levels) / 8))
    ticks = tuple((float(k), cut(levels[k], 9)) for k in range(0, len(levels), stride))
    return Axis(-0.6, len(levels) - 0.4, ticks, label)


def date_axis(low: float, high: float, unit: str, origin: int, label: str = "") -> Axis:
    """An axis of dates.

    Args:
        low: Units since the origin.
        high: Likewise.
        unit: ``"D"``, ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``.
        origin: Units since 1970.
        label: What it is called.
    """
    if not high > low:
        low, high = low - 1, high + 1
    seconds = {"D": 86_400.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[unit]
    start, end = ((origin + value) * seconds for value in (low, high))
    ticks = tuple((t / seconds - origin, text) for t, text in _date_ticks(start, end))
    if len(ticks) < 2:
        ticks = number_axis(low, high).ticks
        label = f"{label} ({unit} from the first)"
    return Axis(low, high, ticks, label)


def _date_ticks(start: float, end: float, most: int = 5) -> list[tuple[float, str]]:
    """Seconds since 1970 of round moments, with their texts."""
    span = end - start
    for step in _CLOCK:
        if span / step <= most:
            first = math.ceil(start / step) * step
            moments = np.arange(first, end, step)
            return [(float(t), _moment(float(t), step)) for t in moments]
    first = int(np.datetime64(math.floor(start), "s").astype("datetime64[M]").astype(int))
    last = int(np.datetime64(math.floor(end), "s").astype("datetime64[M]").astype(int))
    strides = [*_MONTHS, *(12 * n * 10**e for e in range(5) for n in (1, 2, 5))]
    stride = next(s for s in strides if (last - first) / s <= most)
    months = range(-(-first // stride) * stride, last + 1, stride)
    texts = []
    for month in months:
        moment = np.datetime64(month, "M")
        t = float(moment.astype("datetime64[s]").astype(np.int64))
        if start <= t <= end:
            texts.append((t, str(moment)[:4] if stride % 12 == 0 else str(moment)))
    return texts


def _moment(t: float, step: int) -> str:
    text = str(np.datetime64(round(t), "s"))
    if step >= _DAY:
        return text[:10]
    return text[11:16] if step >= _MINUTE else text[11:19]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(s for s in _STEPS if s * power >= rough * (1 - 1e-9))


# --------------------------------------------------------------------------------------- numbers


def tick_text(value: float, step: float) -> str:
    """A tick with as many digits as its step needs."""
    if abs(value) < 1e-9 * step:
        return "0"
    size = max(abs(value), step)
    if size >= 1e13 or step < 1e-4:
        return short_number(value, 3)
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if step >= 10.0**power / 100 and size >= 10.0 ** (power + (power == 3)):
            return _fixed(value / 10.0**power, step / 10.0**power) + letter
    return _fixed(value, step)


def _fixed(value: float, step: float) -> str:
    digits = 0
    while digits < 6 and abs(round(step, digits) - step) > 1e-6 * step:
        digits += 1
    return minus(f"{value:,.{digits}f}")


def short_number(value: float, digits: int = 4) -> str:
    """A number to so many significant digits, as one writes it in text."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < max(digits, 7):
        decimals = max(0, digits - 1 - exponent)
        text = f"{value:,.{decimals}f}"
        return minus(text.rstrip("0").rstrip(".") if "." in text else text)
    mantissa, power = f"{value:.{max(digits - 2, 1)}e}".split("e")
    return f"{minus(mantissa.rstrip('0').rstrip('.'))}×10{_raised(int(power))}"


def lowered(number: int) -> str:
    """A number as a subscript."""
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def minus(text: str) -> str:
    """A number with the sign that is as wide as a plus."""
    return text.replace("-", "−")


def cut(text: str, length: int) -> str:
    """A text of at most so many characters."""
    text = " ".join(text.split()) or "␣"
    return text if len(text) <= length else text[: length - 1] + "…"


def text_width(text: str, size: float) -> float:
    """About how many pixels a text takes."""
    return _WIDE * size * len(text)
