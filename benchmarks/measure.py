"""Times, memory and the machine's limits (copy bandwidth, matrix products), on a CPU or a GPU."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.recording import commit, processor

MIN_TIMING_SECONDS = 0.02  # of one timing of a short function on a GPU, longer than a launch


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device: torch.device) -> str:
    """Return which clock is used: on one CPU thread the process's own time, which other programs hardly affect."""
    return "process" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def timed(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return milliseconds a call, including the device's work."""
    clock = time.process_time if clock_of(device) == "process" else time.perf_counter
    wait(device)
    start = clock()
    for _ in range(repeats):
        run()
    wait(device)
    return 1e3 * (clock() - start) / repeats


def by_turns(runs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return median and quartiles in milliseconds of each function.

    The functions take turns, so that other load on the machine affects all of them.

    Every function has been called before.
    """
    repeats = dict.fromkeys(runs, 1)
    if device.type == "cuda":  # starting a short function takes as long as the function
        repeats = {
            name: max(1, round(1e3 * MIN_TIMING_SECONDS / max(1e-3, timed(run, device)))) for name, run in runs.items()
        }
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run, device, repeats[name]))
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median_ms": round(middle, 4), "low_ms": round(low, 4), "high_ms": round(high, 4)}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of a call beyond what was allocated before it."""
    gc.collect()
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def copy_bandwidth(device: torch.device, megabytes: int, rounds: int) -> float:
    """Return GB/s of a copy between two tensors of this size, counting bytes read and bytes written."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    copy = lambda: target.copy_(source)  # noqa: E731
    copy()
    return 2 * source.nbytes / 1e6 / by_turns({"copy": copy}, rounds, device)["copy"]["median_ms"]


def matrix_rate(device: torch.device, side: int, dtype: torch.dtype, rounds: int) -> float:
    """Return TFLOP/s of the product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    multiply = lambda: a @ b  # noqa: E731
    multiply()
    return 2 * side**3 / 1e9 / by_turns({"product": multiply}, rounds, device)["product"]["median_ms"]


def machine(device: torch.device) -> dict[str, object]:
    """Return a description of the machine that was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "logical_cores": os.cpu_count(),
        "clock": clock_of(device),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "commit": commit(),
    }
