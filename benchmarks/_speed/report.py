"""The tables for people, made from the records alone."""

import math
import statistics

from _speed.cells import ARCHITECTURES, LIBRARIES, NOT_BEGUN, OPS

_RATIOS = ("flowjax", "zuko", "zuko_compiled")
_BUSY = 0.1
_SHORT = {"step": "step", "log_prob": "log_prob", "sample": "sample"}


def report(records: list[dict]) -> str:
    """All tables."""
    if not records:
        return "There are no results."
    parts = [_header(records)]
    for arch, title in ARCHITECTURES.items():
        chosen = sorted((r for r in records if r["arch"] == arch), key=lambda r: r["dim"])
        if chosen:
            parts += [f"{title}\n{'=' * len(title)}", *_block(chosen)]
    parts += _warnings(records)
    failures = list(dict.fromkeys(f for r in records for f in _failures(r)))
    if failures:
        parts.append("Failed or left out\n" + "\n".join(f"  {line}" for line in failures))
    return "\n\n".join(parts)


def _found(record, name, op) -> dict:
    """What is known of an operation, if only an error; nothing where it was never begun."""
    return record["libraries"].get(name, {}).get("ops", {}).get(op, {})


def seconds_of(record: dict, library: str, op: str) -> float | None:
    """The median over the rounds."""
    found = _found(record, library, op)
    times = found.get("seconds")
    return statistics.median(times) if times and "error" not in found else None


def best_rival(record: dict, op: str) -> tuple[str, float] | None:
    """The fastest library besides laminar."""
    names = (n for n in record["libraries"] if n != "laminar")
    times = [(s, n) for n in names if (s := seconds_of(record, n, op)) is not None]
    return (min(times)[1], min(times)[0]) if times else None


def _header(records: list[dict]) -> str:
    last = records[-1]
    versions, devices = {}, {}
    for record in records:
        for found in record["libraries"].values():
            versions |= found.get("versions", {})
            if "device" in found:
                devices[found["device"]] = None
    machine, options = last["machine"], last["options"]
    threads = {f["threads"] for f in last["libraries"].values() if "threads" in f}
    of = ", ".join(f"{n} {v}" for n, v in versions.items()) or "nothing that could be started"
    device = "" if set(devices) <= {"cpu"} else f"; device {', '.join(devices)}"
    return (
        f"{of}; Python {machine['python']}\n"
        f"{machine['cpu']}, {machine['cores']} cores, threads of each library "
        f"{'/'.join(map(str, sorted(threads))) or '–'}{device}; {machine['date']}\n"
        f"{options['layers']} layers, hidden {options['width']} × 2, {options['bins']} bins; "
        f"training step on {options['batch']} rows; medians of "
        f"{min(r['rounds'] for r in records)} interleaved rounds; ±: half the range of the "
        "rounds over the median, for the library where it is widest"
    )


def _warnings(records: list[dict]) -> list[str]:
    """A busy machine, which slows libraries unequally."""
    held = max(r["machine"].get("held_by_others", 0.0) for r in records)
    if held < _BUSY:
        return []
    return [
        f"Warning: other work held up to {100 * held:.0f} % of the cores. It slows PyTorch, whose "
        "threads wait for one another,\nmuch more than JAX: measure again on a quiet machine."
    ]


def _block(records: list[dict]) -> list[str]:
    present = [n for n in LIBRARIES if any(n in r["libraries"] for r in records)]
    calls = ("First call: trace and compilation, without the run", "s")
    memory = ("Peak memory of a call, beyond what was held before it", "MB")
    return [
        _times(records, present),
        _by_library(*calls, records, present, _first_call),
        _by_library(*memory, records, present, _memory),
        _own(records),
        _floor(records),
    ]


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as what is in them, all but the second flush right."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([caption, *lines])


def _times(records, present) -> str:
    """Times, and laminar's ratio to the rivals."""
    ratios = [n for n in _RATIOS if n in present]
    head = ["D", "ms", "rows", *(LIBRARIES[n].title for n in present), "±", "/ best", "", ""]
    head += [f"/ {LIBRARIES[n].title}" for n in ratios]
    rows = []
    for record in records:
        for op in OPS:
            ours, best = seconds_of(record, "laminar", op), best_rival(record, op)
            row = [str(record["dim"]), _SHORT[op], f"{_rows(record, op):,}"]
            row += [_cell(record, n, op) for n in present]
            row.append(_spread(record, present, op))
            if ours is None or best is None:
                row += ["–", "", ""]
            else:
                ratio = ours / best[1]
                row += [f"{ratio:.2f}", "✓" if ratio <= 1 else "✗", f"({LIBRARIES[best[0]].title})"]
            row += [_over(ours, seconds_of(record, n, op)) for n in ratios]
            rows.append(row)
    caption = "Time of a call, and laminar's over that of others (✗: slower than the best rival)"
    return _table(caption, head, rows)


def _cell(record, name, op) -> str:
    found = _found(record, name, op)
    if not found or found.get("error") == NOT_BEGUN:
        return "–"
    seconds = seconds_of(record, name, op)
    return "failed" if seconds is None else _digits(1e3 * seconds)


def _rows(record, op) -> int:
    return next(f["ops"][op]["rows"] for f in record["libraries"].values() if op in f["ops"])


def _spread(record, present, op) -> str:
    widest = 0.0
    for name in present:
        median = seconds_of(record, name, op)
        if median:
            times = record["libraries"][name]["ops"][op]["seconds"]
            widest = max(widest, (max(times) - min(times)) / 2 / median)
    return f"{100 * widest:.0f} %"


def _by_library(title, unit, records, present, show) -> str:
    """A line for each operation of each cell, with ``show(record, name, op)`` of each library."""
    head = ["D", unit, *(LIBRARIES[n].title for n in present)]
    rows = [
        [str(record["dim"]), _SHORT[op], *(show(record, name, op) for name in present)]
        for record in records
        for op in OPS
    ]
    return _table(title, head, rows)


def _first_call(record, name, op) -> str:
    """The first call less the run itself."""
    found, run = _found(record, name, op), seconds_of(record, name, op)
    if run is None or "first_s" not in found:
        return "–"
    return f"{max(found['first_s'] - run, 0):.2f}"


def _memory(record, name, op) -> str:
    used = _found(record, name, op).get("memory_bytes")
    return "–" if used is None else _digits(used / 1e6)


def _own(records) -> str:
    """Sampling against laminar's own log_prob, on as many rows."""
    rows = []
    for record in records:
        found = record["libraries"].get("laminar", {}).get("ops", {})
        op = "sample_own" if "sample_own" in found else "sample"
        drawn, scored = (seconds_of(record, "laminar", o) for o in (op, "log_prob"))
        words = "–" if drawn is None else _digits(1e3 * drawn)
        count = f"{found[op]['rows']:,}" if op in found else "–"
        rows.append([str(record["dim"]), "sample", count, words, _over(drawn, scored)])
    return _table(
        "laminar's sampling over its own log_prob",
        ["D", "ms", "rows", "laminar", "/ log_prob"],
        rows,
    )


def _floor(records) -> str:
    """What the products alone take, and how far the machine is used."""
    head = ["D", "ms", "laminar", "dense", "×", "masked", "×"]
    head += ["GFLOP/s", "of peak", "XLA flops / products", "XLA bytes / least", "GB/s", "of peak"]
    rows = []
    for record in records:
        peak_flops, peak_bytes = _peak(record, "flops"), _peak(record, "bytes")
        for op in ("step", "log_prob"):
            ours = seconds_of(record, "laminar", op)
            row = [str(record["dim"]), op, "–" if ours is None else _digits(1e3 * ours)]
            for kind in ("", "_masked"):
                alone = _median(record["floor"].get(f"floor_{op}{kind}", {}))
                row += ["–" if alone is None else _digits(1e3 * alone), _over(ours, alone)]
            counted = record["xla"].get(op, {})
            flops = record["floor"].get(f"floor_{op}", {}).get("flops")
            rate = flops / ours if flops and ours else None
            moved = counted["bytes"] / ours if counted and ours else None
            row += ["–" if rate is None else _digits(rate / 1e9), _percent(rate, peak_flops)]
            row += [_over(counted.get("flops"), flops)]
            row += [_over(counted.get("bytes"), least_bytes(record, op))]
            row += ["–" if moved is None else _digits(moved / 1e9), _percent(moved, peak_bytes)]
            rows.append(row)
    caption = (
        "The floor: the matrix products alone. GFLOP/s counts the dense products only; GB/s the "
        "bytes\nthat XLA's programs access, all layers and all chunks of rows together, against "
        "parameters, inputs and\noutputs once (least). "
        f"Peaks: {_peaks(records)}"
    )
    return _table(caption, head, rows)


def least_bytes(record: dict, op: str) -> float | None:
    """Parameters, inputs and outputs, once: float32.

    A step reads and writes the parameters and both moments of Adam.
    """
    parameters = record["libraries"].get("laminar", {}).get("parameters")
    if parameters is None:
        return None
    rows, dim = _rows(record, op), record["dim"]
    if op == "step":
        return 4.0 * (6 * parameters + rows * dim)
    return 4.0 * (parameters + rows * dim + rows)


def _peak(record, kind) -> float | None:
    found = record["floor"].get(f"peak_{kind}", {})
    return found[kind] / min(found["seconds"]) if found.get("seconds") else None


def _peaks(records) -> str:
    flops = [p for r in records if (p := _peak(r, "flops"))]
    moved = [p for r in records if (p := _peak(r, "bytes"))]
    if not flops or not moved:
        return "not measured"
    return f"{max(flops) / 1e9:,.0f} GFLOP/s (a product), {max(moved) / 1e9:,.0f} GB/s (a copy)"


def _failures(record) -> list[str]:
    lines = []
    for name, found in record["libraries"].items():
        title = LIBRARIES[name].title
        if "error" in found:
            lines.append(f"{title}: {found['error']}")
        for op, kept in found["ops"].items():
            where = f"{title}, {ARCHITECTURES[record['arch']]}, D={record['dim']}, {op}"
            if "error" in kept:
                lines.append(f"{where}: {kept['error']}")
            elif not kept.get("finite", True):
                lines.append(f"{where}: measured, but not all it gave is finite")
    for op, kept in record["floor"].items():
        if "error" in kept:
            lines.append(f"{op}, D={record['dim']}: {kept['error']}")
    if "error" in record["xla"]:
        lines.append(f"XLA's analysis, D={record['dim']}: {record['xla']['error']}")
    return lines


def _median(found: dict) -> float | None:
    return statistics.median(found["seconds"]) if found.get("seconds") else None


def _over(ours, theirs) -> str:
    return "–" if not ours or not theirs else f"{ours / theirs:.2f}"


def _percent(value, whole) -> str:
    return "–" if not value or not whole else f"{100 * value / whole:.0f} %"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"
