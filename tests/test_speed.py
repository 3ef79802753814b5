"""The comparison of speed: its cells, its workers, its report. No time is asserted."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield __import__("speed")
    for name in [n for n in sys.modules if n in ("speed", "_common") or n.startswith("_speed")]:
        del sys.modules[name]


def record(**seconds):
    libraries = {
        name: {
            "ops": {
                op: {"rows": 512 if op == "step" else 100, "seconds": [s, s], "first_s": 3 * s}
                for op in ("step", "log_prob", "sample")
            },
            "parameters": 10,
            "threads": 2,
            "versions": {name: "1.0"},
        }
        for name, s in seconds.items()
    }
    options = {
        "rows": 100,
        "batch": 512,
        "layers": 5,
        "width": 128,
        "bins": 8,
        "gpu": False,
        "rounds": 2,
    }
    machine = {"date": "today", "cpu": "one", "cores": 2, "python": "3", "system": "any"}
    kept = {"options": options, "machine": machine, "rounds": 2, "floor": {}, "xla": {}}
    return {"arch": "maf", "dim": 3, "libraries": libraries, **kept}


def test_the_report_marks_what_is_slower_and_names_what_failed(speed):
    from _speed.report import report

    slower = report([record(laminar=0.2, flowjax=0.1, zuko=0.4)])
    assert "2.00  ✗  (FlowJAX)" in slower
    assert "0.50" in slower
    made = record(laminar=0.1, flowjax=0.2, zuko=0.4)
    made["libraries"]["zuko"]["ops"]["sample"]["error"] = "out of memory"
    made["libraries"]["nflows"] = {"ops": {}, "error": "no environment"}
    faster = report([made])
    assert "✗  (" not in faster
    assert "0.50  ✓  (FlowJAX)" in faster
    assert "zuko, MAF, affine, D=3, sample: out of memory" in faster
    assert "nflows: no environment" in faster


def test_only_slow_sampling_gets_fewer_rows(speed):
    from _speed.cells import Cell, cells, ops_of, rows_of

    assert rows_of("sample", Cell("nsf_ar", 8), 10_000, 512) == 10_000
    assert rows_of("sample", Cell("nsf_ar", 43), 10_000, 512) == 1_081
    assert rows_of("sample", Cell("nsf_coupling", 128), 10_000, 512) == 10_000
    assert rows_of("log_prob", Cell("maf", 128), 10_000, 512) == 10_000
    assert len(set(cells(("nsf_ar", "maf"), (2, 8, 43, 128)))) == 8
    assert ops_of("zuko_compiled", Cell("maf", 8), "some") == ()
    assert ops_of("zuko_compiled", Cell("nsf_ar", 8), "some") == ("step", "log_prob")


ADAPTER = """
import os, time

class Adapter:
    def __init__(self, name):
        pass
    def build(self, spec):
        print("a library's own words")
    def info(self):
        return {"platform": "cpu"}
    def call(self, op, rows, count):
        if op == "slow":
            time.sleep(60)
        if op == "crash":
            print("gone", flush=True)
            os._exit(3)
        if op == "fail":
            raise ValueError("no such thing")
    def work(self, op, rows):
        return {"flops": rows}
"""


def test_a_worker_that_fails_hangs_or_ends_is_reported_and_goes_on(speed, tmp_path):
    from _speed.client import Worker, WorkerError

    (tmp_path / "with_nothing.py").write_text(ADAPTER)
    variables = {"PYTHONPATH": str(tmp_path)}
    worker = Worker("one", "with_nothing", Path(sys.executable), variables, {}, timeout=20)
    try:
        worker.start()
        assert worker.finish_start() == {"platform": "cpu"}
        answer = worker.ask(do="run", op="fast", rows=7, seconds=0.001)
        assert answer["flops"] == 7
        assert len(answer["seconds"]) == answer["calls"]
        with pytest.raises(WorkerError, match="ValueError: no such thing"):
            worker.ask(do="first", op="fail", rows=1)
        with pytest.raises(WorkerError, match="ended with status 3: gone"):
            worker.ask(do="first", op="crash", rows=1)
        assert worker.ask(do="first", op="fast", rows=1)["seconds"] >= 0
        worker.timeout = 0.2
        with pytest.raises(WorkerError, match="no answer to 'first slow 1'"):
            worker.ask(do="first", op="slow", rows=1)
        worker.timeout = 20
        assert worker.ask(do="first", op="fast", rows=1)["seconds"] >= 0
    finally:
        worker.end()


def test_a_worker_that_ends_after_its_answer_costs_one_request(speed, tmp_path):
    from _speed.client import Worker, WorkerError

    leaving = ADAPTER.replace(
        'if op == "slow"', 'threading.Timer(0.1, os._exit, [4]).start()\n        if op == "slow"'
    )
    (tmp_path / "with_nothing.py").write_text(leaving.replace("import os", "import threading, os"))
    variables = {"PYTHONPATH": str(tmp_path)}
    worker = Worker("one", "with_nothing", Path(sys.executable), variables, {}, timeout=20)
    try:
        worker.start()
        worker.finish_start()
        worker.ask(do="first", op="fast", rows=1)
        worker._process.wait(10)
        with pytest.raises(WorkerError, match="ended with status 4"):
            worker.ask(do="first", op="fast", rows=1)
        worker.ask(do="first", op="fast", rows=1)
        worker._process.wait(10)
        # What was asked meanwhile waits to be sent when the pipe is closed.
        worker._send(worker._process, {"do": "first"})
    finally:
        worker.end()
    with pytest.raises(WorkerError, match="cannot be started"):
        Worker("one", "with_nothing", tmp_path / "none", {}, {}, timeout=1).start()


def test_what_failed_or_was_not_begun_is_measured_again(speed):
    from _speed.cells import NOT_BEGUN, Cell
    from _speed.measure import failed
    from _speed.report import report

    wanted = [Cell("maf", 3), Cell("maf", 4)]
    whole = record(laminar=0.1, zuko=0.2)
    assert failed(whole)  # Memory is missing.
    for found in whole["libraries"].values():
        for kept in found["ops"].values():
            kept["memory_bytes"] = None
    assert not failed(whole)
    assert speed.to_measure(wanted, [whole]) == [Cell("maf", 4)]
    assert failed(whole | {"rounds": 1})
    assert failed(whole | {"floor": {"peak_flops": {"error": "no"}}})
    whole["libraries"]["zuko"]["ops"]["step"] = {"rows": 512, "error": NOT_BEGUN}
    assert speed.to_measure(wanted, [whole]) == [Cell("maf", 4), Cell("maf", 3)]
    text = report([whole])
    assert f"zuko, MAF, affine, D=3, step: {NOT_BEGUN}" in text
    assert "failed" not in text.split("Failed or left out")[0]


def test_results_of_another_machine_or_version_are_refused(speed, tmp_path):
    import _common

    here = _common.machine()
    _common.refuse_elsewhere(tmp_path, {**here, "date": "another"}, here)
    with pytest.raises(SystemExit, match=r"was made with laminar 0\.0, not laminar"):
        _common.refuse_elsewhere(tmp_path, {**here, "laminar": "0.0"}, here)
    with pytest.raises(SystemExit, match="was made with cores: 1000, not"):
        _common.refuse_elsewhere(tmp_path, {**here, "cores": 1000}, here)


def test_a_floor_that_failed_is_not_asked_again(speed):
    import argparse
    import time

    from _speed.cells import Cell
    from _speed.client import WorkerError
    from _speed.measure import CellRun

    asked = []

    class Failing:
        def ask(self, **request):
            asked.append(request["op"])
            if request["op"] == "peak_flops":
                raise WorkerError("no memory")
            return {"seconds": [1.0]}

    given = {"layers": 1, "width": 4, "bins": 3, "batch": 2, "rows": 5, "gpu": False}
    args = argparse.Namespace(**given, envs=FOLDER, compile="none", seconds=0.1)
    run = CellRun(Cell("nsf_coupling", 4), {}, args, time.monotonic() - 1)
    run.workers = {"laminar": Failing()}
    kept: dict = {"rows": 2}
    run.results = {"laminar": {"ops": {"step": kept}}}
    run._floor_round()
    run._floor_round()
    assert asked.count("peak_flops") == 1
    assert asked.count("peak_bytes") == 2
    run._first("laminar", "step")
    assert "budget" in kept["error"]
    assert "step" not in asked


def test_an_environment_that_cannot_be_made_takes_one_sentence(speed, tmp_path, monkeypatch):
    from _speed import envs

    monkeypatch.setattr(envs, "_FOLDER", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (tmp_path / "requirements-any.txt").write_text("no-such-project==0.0\n")
    with pytest.raises(envs.NoEnvironmentError, match="'any' cannot be made: ERROR"):
        envs.python_of("any", tmp_path / "envs", gpu=False)
