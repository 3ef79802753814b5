"""Ticks are round, few, inside the axis, and say what they stand for."""

import numpy as np
import pytest

from laminar.report.axes import cut, date_axis, level_axis, log_axis, number_axis, short_number

DAY = 86_400


def texts(axis):
    return [text for _, text in axis.ticks]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-3.2, 4.1, ["−2", "0", "2", "4"]),
        (-12_000, 30_000, ["−10k", "0", "10k", "20k", "30k"]),
        (1e6, 9e6, ["2M", "4M", "6M", "8M"]),
        (2e-6, 9e-6, ["2×10⁻⁶", "4×10⁻⁶", "6×10⁻⁶", "8×10⁻⁶"]),
        (0.123, 0.1239, ["0.1230", "0.1232", "0.1234", "0.1236", "0.1238"]),
    ],
)
def test_numbers_have_round_ticks(low, high, expected):
    assert texts(number_axis(low, high)) == expected


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1.0, 1e9, 1e200])
def test_ticks_lie_within_the_axis_at_every_scale(scale):
    axis = number_axis(-1.3 * scale, 2.9 * scale)
    values = np.array([value for value, _ in axis.ticks])
    assert 3 <= len(values) <= 7
    assert (axis.low <= values).all()
    assert (values <= axis.high).all()
    assert len(set(texts(axis))) == len(values)


def test_one_value_has_room_on_both_sides():
    for value in (0.0, 5.0, -1e9):
        axis = number_axis(value, value)
        assert 0.4 < float(axis.share(value)) < 0.6


def test_ratios_have_equal_lengths():
    axis = log_axis(0.1, 1000.0)
    assert texts(axis) == ["0.1", "1", "10", "100", "1,000"]
    np.testing.assert_allclose(axis.share(np.array([0.1, 10.0, 1000.0])), [0, 0.5, 1])
    assert np.isnan(axis.share(0.0))
    np.testing.assert_allclose(axis.edges(4), [0.1, 1, 10, 100, 1000])


@pytest.mark.parametrize(
    ("days", "first", "expected"),
    [
        (20, "2016-07-18", ["2016-07-21", "2016-07-28", "2016-08-04"]),
        (300, "2016-07-18", ["2016-10", "2017-01", "2017-04"]),
        (4000, "2016-07-18", ["2020", "2025"]),
        (60_000, "2016-07-18", ["2020", "2070", "2120", "2170"]),
    ],
)
def test_dates_have_ticks_of_the_calendar(days, first, expected):
    origin = int(np.datetime64(first, "D").astype(int))
    assert texts(date_axis(0, days, "D", origin)) == expected


def test_times_of_day_in_any_unit():
    start = int(np.datetime64("2024-02-29T06:00", "s").astype(int))
    for unit, per in (("s", 1), ("ms", 1000), ("us", 10**6), ("ns", 10**9)):
        axis = date_axis(0, 12 * 3600 * per, unit, start * per)
        assert texts(axis) == ["06:00", "09:00", "12:00", "15:00"]
        np.testing.assert_allclose(axis.share(axis.ticks[2][0]), 0.5)


def test_too_many_names_are_thinned_out():
    axis = level_axis([f"category {k}" for k in range(40)])
    assert len(axis.ticks) == 8
    assert axis.low < 0
    assert axis.high > 39


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5678, "1,235"),
        (-0.000012, "−1.2×10⁻⁵"),
        (123456789.0, "1.23×10⁸"),
        (-21.345, "−21.34"),
        (0.0, "0"),
        (float("nan"), "–"),
        (float("-inf"), "−∞"),
    ],
)
def test_numbers_in_text(value, text):
    assert short_number(value) == text


def test_long_texts_are_cut_and_empty_ones_seen():
    assert cut("a" * 30, 10) == "aaaaaaaaa…"
    assert cut("  ", 10) == "␣"
    assert cut("a\nb", 10) == "a b"
