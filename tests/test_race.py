"""The race of fits and the sizes: levels, targets, tables and pictures. Nothing is fitted."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
OWN = ("race", "scaling", "_common", "_pictures", "_race_flowjax", "_race_fit")


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield __import__
    for name in [n for n in sys.modules if n in OWN or n.partition(".")[0] == "_speed"]:
        del sys.modules[name]


def fitted(library, curve, number=0, **more):
    record = {
        "data": "magic.gamma",
        "round": number,
        "library": library,
        "rows": [900, 100, 3],
        "options": {"budget": 10, "layers": 5, "width": 128, "bins": 8},
        "machine": {"date": "today", "cpu": "one", "cores": 2},
        "curve": curve,
        "reason": "patience",
    }
    return (
        record | ({"error": "gone"} if "error" in more else {"batch_size": 64, "cores": 1}) | more
    )


def test_a_level_is_reached_between_the_points_around_it(load):
    race = load("race")
    curve = [[1.0, -3.0, 1], [2.0, -1.0, 2], [3.0, -2.0, 3], [4.0, 0.0, 4]]
    assert race.reached(curve, -5.0) == 1.0
    assert race.reached(curve, -2.0) == pytest.approx(1.5)
    assert race.reached(curve, -0.5) == pytest.approx(3.75)
    assert race.reached(curve, 1.0) is None
    assert race.reached([], 0.0) is None


def test_the_target_is_what_every_sound_fit_reaches_within_its_budget(load):
    race = load("race")
    records = [
        fitted("laminar", [[1.0, -3.0, 1], [5.0, -1.0, 2], [11.0, 9.0, 3]]),
        fitted("flowjax", [[2.0, -2.0, 1], [4.0, float("nan"), 2]]),
        fitted("zuko", [[1.0, -8.0, 1]], error="killed"),
    ]
    found = race.Round.of(records)
    assert found.target == pytest.approx(-2.0 - race.MARGIN)
    assert found.curves["laminar"][-1][0] == 5.0
    assert found.time("laminar") == pytest.approx(1 + 4 * (1 - race.MARGIN) / 2)
    assert found.time("flowjax") == 2.0
    assert found.time("zuko") is None
    assert race.Round.of([fitted("zuko", [], error="killed")]).target is None
    pair = race.ratio([found], "laminar", "flowjax")
    assert pair == pytest.approx(found.time("laminar") / 2)


def test_the_report_stands_a_round_that_ended_early(load):
    race = load("race")
    early = {k: v for k, v in fitted("zuko", [], error="no environment").items() if k != "reason"}
    del early["curve"]
    records = [
        fitted("laminar", [[1.0, -2.0, 1]]),
        early,
        fitted("laminar", [[1.0, -2.0, 1]], number=1),
        fitted("zuko", [[2.0, -1.0, 8]], number=1),
        fitted("flowjax", [], error="killed"),
    ]
    text = race.report(records)
    assert "zuko" in text
    assert "failure, patience" in text
    assert "zuko: no environment" in text
    assert "FlowJAX         no value within the budget" in text
    assert "zuko after the 8 epochs of its tutorial: -1.000" in text


def test_a_picture_names_each_library_once_and_needs_a_point_within_the_budget(
    load, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    race, pictures = load("race"), load("_pictures")
    path = tmp_path / "race.png"
    race.picture([fitted("laminar", [[11.0, -2.0, 1]])], path)
    assert not path.exists()
    made = []
    monkeypatch.setattr(pictures, "write", lambda figure, path: made.append(figure))
    curve = [[1.0, -2.0, 1], [2.0, -1.0, 2]]
    first = [fitted("laminar", curve), fitted("zuko", [], error="killed")]
    race.picture([*first, fitted("laminar", curve, 1), fitted("zuko", curve, 1)], path)
    labels = made[0].axes[0].get_legend_handles_labels()[1]
    assert labels == ["laminar", "zuko"]


def point(task, sweep, value, **more):
    sizes = {"sweep": sweep, "task": task, "value": value, "dim": 8, "layers": 5, "rows": 100}
    measured = {"unit_s": 4e-6, "compile_s": 1.5, "peak": 12_000_000}
    return sizes | measured | {"laminar": "1", "jax": "1", "platform": "cpu"} | more


def test_a_cell_has_time_memory_and_compilation(load):
    scaling = load("scaling")
    assert scaling.cell("layers", point("step", "layers", 2)).split() == ["4", "(2)", "12", "1.50"]
    part = point("stream", "rows", 1000, whole_pass=False)
    assert scaling.cell("rows", part).split() == ["4*", "12", "1.50"]
    assert scaling.quantities(point("step", "layers", 2)) == (2.0, 12.0, 1.5)


def test_the_table_of_sizes_marks_what_is_missing_and_names_what_failed(load):
    scaling = load("scaling")
    records = [
        point("log_prob", "rows", 1000),
        point("stream", "rows", 10_000, whole_pass=False),
        point("step", "dim", 8, error="did not end within 3 s"),
    ]
    lines = scaling.table("rows", records[:2]).splitlines()
    assert lines[2].split() == ["1,000", "4", "12", "1.50", "–"]
    assert lines[3].split() == ["10,000", "–", "4*", "12", "1.50"]
    assert lines[4].endswith("marked *.")
    assert "training step, 8 dimensions: did not end within 3 s" in scaling.report(records)
    assert scaling.report([]) == "There are no results."


def test_small_sizes_come_first(load):
    scaling = load("scaling")
    ordered = scaling.points(argparse.Namespace(quick=False))
    assert len(set(ordered)) == len(ordered)
    assert {(p.sweep, p.value) for p in ordered[:8]} == {("rows", 1000), ("dim", 2), ("layers", 1)}
    args = argparse.Namespace(seconds=1, most_steps=2, folder="here")
    assert scaling.Point("dim", "log_prob", 512).spec(args)["rows"] == 2500


def test_ticks_are_plain_numbers_up_to_ten_thousand(load):
    pytest.importorskip("matplotlib")
    pictures = load("_pictures")
    assert [pictures._number(v) for v in (0.01, 5, 10_000)] == ["0.01", "5", "10000"]
    assert [pictures._number(v) for v in (1e6, 2e5)] == ["$10^{6}$", r"$2·10^{5}$"]


def test_flowjax_must_split_into_the_rows_of_the_others(load):
    pytest.importorskip("flowjax")
    import jax.numpy as jnp
    import jax.random as jr
    from flowjax.train.train_utils import train_val_split

    flowjax, shared = load("_race_flowjax"), load("_race_fit")
    values = np.arange(40, dtype=np.float32).reshape(20, 2)
    rows = shared.Rows(values[:17], values[17:])
    pauses = []
    curve = argparse.Namespace(pause=pauses.append)
    laid, share = flowjax.laid_out(rows, jr.key(3))
    data = jnp.asarray(laid)
    # As `fit_to_data` draws the key of its split.
    key = jr.split(jr.key(3))[1]

    split = flowjax.Split(train_val_split, rows, curve)
    with pytest.raises(SystemExit, match="no longer splits"):
        split.insist()
    split(key, (data,), val_prop=share)
    split.insist()
    assert len(pauses) == 1
    with pytest.raises(SystemExit, match="splits otherwise"):
        split(jr.key(9), (data,), val_prop=share)
