"""Where a segdiff step's time goes: its 30 longest kernels, the gaps between kernels, launches and waits of the host.

python -m benchmarks.step_profile --device cuda
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import PRESETS, make_step
from benchmarks.recording import append_row
from factorkit.engine.cuda_graph import WARM_UP
from factorkit.segdiff.config import preset_config

LONGEST = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--output", type=Path, help="takes the results, lines of JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    changes = {"masks": "network"} | ({"batch_size": args.batch} if args.batch else {})
    config = preset_config(args.preset or PRESETS[device.type], **changes).resolved()
    for way in ("ours", "graph") if device.type == "cuda" else ("ours",):
        step, _ = make_step(way, config, device)
        for _ in range(WARM_UP + 2):
            step()
        row = {"name": f"profile {way}", **profile_call(step, device), "waits": count_waits(step, device)}
        print(
            *(f"{kernel['ms']:9.3f} ms {kernel['calls']:5} x {kernel['name']}" for kernel in row["kernels"]), sep="\n"
        )
        if args.output:
            append_row(args.output, row)
        del step


def profile_call(run: Callable[[], object], device: torch.device) -> dict[str, object]:
    """Return the longest kernels of a call, and how long the device was busy and idle between them."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    # on a GPU the kernels; on a CPU the operations that no other operation contains
    events = [e for e in profiled.events() if e.device_type == wanted and (on_gpu or e.cpu_parent is None)]
    launches = sum(e.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for e in profiled.events())
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
    return {**summarise(spans), "launches": launches}


def summarise(spans: Iterable[tuple[str, float, float]]) -> dict[str, object]:
    """Return the names that take longest and the time covered by none, from (name, start, end) in microseconds."""
    total, calls = defaultdict(float), defaultdict(int)
    busy, idle, reached = 0.0, 0.0, None
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        total[name] += end - start
        calls[name] += 1
        idle += 0.0 if reached is None else max(0.0, start - reached)
        busy += max(0.0, end - (start if reached is None else max(start, reached)))
        reached = end if reached is None else max(reached, end)
    longest = sorted(total, key=lambda name: -total[name])[:LONGEST]
    kernels = [{"name": name, "ms": round(total[name] / 1e3, 4), "calls": calls[name]} for name in longest]
    return {"kernels": kernels, "busy_ms": round(busy / 1e3, 4), "gaps_ms": round(idle / 1e3, 4)}


def count_waits(run: Callable[[], object], device: torch.device) -> int | None:
    """Return how often the host waits for the GPU in a call; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


if __name__ == "__main__":
    main()
