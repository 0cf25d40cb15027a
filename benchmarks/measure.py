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


def clock(device: torch.device) -> Callable[[], float]:
    """Return a function that waits for the device and reads the clock, in seconds."""
    read = time.process_time if clock_of(device) == "process" else time.perf_counter

    def wait_and_read() -> float:
        wait(device)
        return read()

    return wait_and_read if device.type == "cuda" else read


def time_call(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return seconds a call, including the device's work."""
    read = clock(device)
    start = read()
    for _ in range(repeats):
        run()
    return (read() - start) / repeats


def repeats_of(seconds: float, device: torch.device) -> int:
    """Return how often a function is called in one timing: on a GPU starting a short one takes as long as it."""
    return max(1, round(MIN_TIMING_SECONDS / max(1e-6, seconds))) if device.type == "cuda" else 1


def median_seconds(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    run()
    repeats = repeats_of(time_call(run, device), device)
    return statistics.median(time_call(run, device, repeats) for _ in range(rounds))


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
    return 2 * source.nbytes / 1e9 / median_seconds(lambda: target.copy_(source), rounds, device)


def matrix_rate(device: torch.device, side: int, dtype: torch.dtype, rounds: int) -> float:
    """Return TFLOP/s of the product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / 1e12 / median_seconds(lambda: a @ b, rounds, device)


def convolution_rate(x: torch.Tensor, rounds: int) -> float:
    """Return TFLOP/s of a 3x3 convolution that keeps the channels of images [N, C, H, W], channels last."""
    x, channels = x.contiguous(memory_format=torch.channels_last), x.shape[1]
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(x.device, x.dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        seconds = median_seconds(lambda: layer(x), rounds, x.device)
    return 2 * 9 * channels * x.numel() / 1e12 / seconds


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
