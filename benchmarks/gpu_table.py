"""The results of benchmarks/gpu_box.py as Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable

Row = dict[str, object]
OP_NAME = re.compile(r"test_\w+_op\[\w+-(?P<op>.+)-(?P<way>\w+)-(?P<direction>forward|both)\]")


def tables(results: dict[str, dict]) -> str:
    """Return one section for each device and sources; how to read them is in docs/gpu.md."""
    return "\n\n".join(section(record) for record in results.values()) or "nothing was measured yet"


def section(record: dict) -> str:
    machine = record["machine"]
    rows = [row for stage in record["stages"].values() for row in stage["rows"]]
    ceilings = next((row for row in rows if row["name"] == "ceilings"), {})
    head = ", ".join([machine["device"], machine.get("versions", ""), f"commit {machine['commit']}"])
    if ceilings:
        head += (
            f"; copy {ceilings['copy_gb_s']} GB/s, matrix product {ceilings['matrix_tflop_s']} TFLOP/s, "
            f"convolution {ceilings['convolution_tflop_s']} TFLOP/s"
        )
    parts = [head, stage_table(record["stages"]), step_table(rows), op_table(rows, ceilings.get("copy_gb_s"))]
    parts += [camera_line(row) for row in rows if "scores" in row]
    parts += [profile_line(row) for row in rows if "gaps_ms" in row]
    return "\n\n".join(part for part in parts if part)


def stage_table(stages: dict[str, dict]) -> str:
    in_order = sorted(stages.items(), key=lambda item: item[1]["started"])
    return markdown(("stage", "result", "seconds"), ((n, s["status"], s["seconds"]) for n, s in in_order))


def step_table(rows: Iterable[Row]) -> str:
    """Return the steps, and how many times longer they take than ours as a CUDA graph (eager where there is none)."""
    steps = {row["name"]: row for row in rows if "images" in row or str(row.get("group", "")).startswith("nerfdiff")}
    cells = []
    for name, row in steps.items():
        ours = [re.sub(r"-\w+\]$", f"-{way}]", name) for way in ("graph", "ours")]
        base = next((steps[name] for name in ours if name in steps), row)
        ratio = f"{row['median_ms'] / base['median_ms']:.2f}x"
        rate = f"{1e3 * row['images'] / row['median_ms']:.1f}" if "images" in row else "-"
        peak = f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "-"
        cells.append((name.removeprefix("test_"), milliseconds(row), rate, peak, ratio))
    return markdown(("step", "time", "images/s", "peak GB", "of ours"), cells)


def op_table(rows: Iterable[Row], copy_gb_s: float | None) -> str:
    """Return a line for each op and direction: our time and rate, and how many times longer the others take."""
    by_op: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if match := OP_NAME.fullmatch(str(row["name"])):
            by_op.setdefault((match["op"], match["direction"]), {})[match["way"]] = row
    cells = []
    for (op, direction), ways in by_op.items():
        if "ours" not in ways:
            continue
        ours = ways["ours"]
        rate = ours["bytes"] / 1e6 / ours["median_ms"] if "bytes" in ours else None
        share = f"{100 * rate / copy_gb_s:.0f}%" if rate and copy_gb_s else "-"
        others = {way: f"{row['median_ms'] / ours['median_ms']:.2f}x" for way, row in ways.items()}
        usual = [others.pop(way, "-") for way in ("ours", "reference", "compiled")]
        known = (*usual[1:], ", ".join(f"{way} {ratio}" for way, ratio in others.items()) or "-")
        cells.append((op, direction, milliseconds(ours), f"{rate:.0f}" if rate else "-", share, *known))
    return markdown(("op", "pass", "ours", "GB/s", "of the copy", "reference", "compiled", "peers"), cells)


def camera_line(row: Row) -> str:
    scores, stages = row["scores"], ", ".join(f"{name} {seconds} s" for name, seconds in row["stage_seconds"].items())
    degrees = f", {scores['rotation_median_deg']:.2f} degrees" if "rotation_median_deg" in scores else ""
    return f"{row['name']}: {row['seconds']} s ({stages}), {scores['psnr']:.2f} dB{degrees}"


def profile_line(row: Row) -> str:
    longest = "; ".join(f"{kernel['name'][:60]} {kernel['ms']} ms" for kernel in row["kernels"][:5])
    counts = f"{row['launches']} launches, {row['waits']} waits"
    return f"{row['name']}: busy {row['busy_ms']} ms, gaps {row['gaps_ms']} ms, {counts}; longest: {longest}"


def milliseconds(row: Row) -> str:
    return f"{row['median_ms']:.3g} ms ({row['q1_ms']:.3g} to {row['q3_ms']:.3g})"


def markdown(head: tuple[str, ...], cells: Iterable[tuple]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in cells]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines]) if lines else ""
