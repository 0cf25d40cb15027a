"""The results of benchmarks/segdiff.py as tables."""

from __future__ import annotations


def tables(results: dict[str, dict]) -> str:
    """Markdown, one section a device."""
    return "\n\n".join(section(result) for result in results.values())


def section(result: dict) -> str:
    machine, settings, roofs = result["machine"], result["settings"], result["roofs"]
    cells = ", ".join(f"{name}={value}" for name, value in settings.items())
    head = (
        f"{machine['device']}, {machine['threads']} threads, {machine['clock']} time, load {machine['load']}, "
        f"torch {machine['torch']}, commit {machine['commit']}; {cells}; copy {roofs['copy_gb_s']} GB/s, matrices "
        f"{roofs['matrix_tflop_s']} TFLOP/s"
    )
    return "\n\n".join([head, ops_table(result), step_table(result), rest(result)])


def ops_table(result: dict) -> str:
    lines = [
        "| op | pass | textbook | compiled | factorkit | against textbook | against compiled | share of copy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, op in result["ops"].items():
        for kind in ("forward", "both"):
            times = op[kind]
            ours = times["factorkit"]["median_ms"]
            others = ("textbook", "compiled")
            ratios = [f"{times[o]['median_ms'] / ours:.2f}x" if o in times else "-" for o in others]
            share = op["bytes"][kind] / 1e6 / ours / result["roofs"]["copy_gb_s"]
            cells = [milliseconds(times[o]) if o in times else off(op["errors"][o]) for o in (*others, "factorkit")]
            lines.append("| " + " | ".join([name, kind, *cells, *ratios, f"{100 * share:.0f}%"]) + " |")
    return "\n".join(lines)


def step_table(result: dict) -> str:
    runs, flops = result["step"]["contenders"], result["step"]["flops"]
    first, batch = runs["textbook"], result["settings"]["batch"]
    lines = [
        "| training step | time | faster | images/s | peak memory | of textbook | share of matrix rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        if "median_ms" not in run:
            lines.append(f"| {name} | {off(run['errors'])} | - | - | - | - | - |")
            continue
        ms, peak = run["median_ms"], run["peak_bytes"]
        share = flops / 1e9 / ms / result["roofs"]["matrix_tflop_s"]
        lines.append(
            f"| {name} | {milliseconds(run)} | {first['median_ms'] / ms:.2f}x | {1e3 * batch / ms:.1f} | "
            f"{peak / 1e6:.0f} MB | {peak / first['peak_bytes']:.2f}x | {100 * share:.0f}% |"
        )
    return "\n".join(lines)


def rest(result: dict) -> str:
    scaling, segment = result["scaling"], result["segment"]
    lines = ["| regions | factorkit's step | of one region (plain DDPM) |", "|---|---|---|"]
    for regions, run in scaling.items():
        lines.append(f"| {regions} | {milliseconds(run)} | {run['median_ms'] / scaling['1']['median_ms']:.2f}x |")
    rate = 1e3 * segment["images"] / segment["median_ms"]
    return "\n".join(lines) + f"\n\nsegment(): {rate:.1f} images/s, in batches of {segment['images']}"


def milliseconds(times: dict) -> str:
    return f"{times['median_ms']:.3g} ms ({times['low_ms']:.3g} to {times['high_ms']:.3g})"


def off(errors: list[float]) -> str:
    return f"off by {max(errors):.2g}, not timed"
