"""Rasterisation of Gaussians with one thread and with more: project and rasterise, forward and backward, on the CPU.

    python -m benchmarks.gaussians --threads 2 --repeats 500

On a machine with other work only the least wall time of many repeats says what the threads do. Those with one and with
several threads take turns, and the two passes are timed apart: both cores are rarely free for long. The result is a
record in benchmarks/results/gaussians.json. benchmarks/test_ops.py compares with plain PyTorch, benchmarks/nerfdiff.py
has the quality of whole runs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.recording import commit, machine, write_result
from benchmarks.rendering_cases import GAUSSIANS_PER_RAY, SPLAT_SIZE, rendering_op

RESULTS = Path(__file__).with_name("results") / "gaussians.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=500, help="of each number of threads")
    parser.add_argument("--gaussians", type=int, default=10_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    case = rendering_op("rasterize_gaussians", args.gaussians // GAUSSIANS_PER_RAY, torch.device("cpu"))
    upstream = [torch.randn_like(x) for x in case.ours(*case.inputs)]
    best = {threads: {"forward": float("inf"), "backward": float("inf")} for threads in (1, args.threads)}
    for _ in range(args.repeats):
        for threads, least in best.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            outputs = case.ours(*case.inputs)
            middle = time.perf_counter()
            torch.autograd.grad(outputs, case.differentiable(), upstream)
            least["forward"] = min(least["forward"], middle - start)
            least["backward"] = min(least["backward"], time.perf_counter() - middle)
    totals = {threads: sum(least.values()) for threads, least in best.items()}
    record = {
        "gaussians": args.gaussians,
        "side": SPLAT_SIZE["cpu"],
        "repeats": args.repeats,
        "least_wall_ms": {str(n): {k: round(1e3 * x, 2) for k, x in least.items()} for n, least in best.items()},
        "speedup": round(totals[1] / totals[args.threads], 2),
        "machine": machine(args.threads),
        "commit": commit(),
    }
    write_result(RESULTS, f"{args.gaussians} Gaussians, {args.threads} threads", record)
    print(record)


if __name__ == "__main__":
    main()
