"""The hash grid on the CPU against its PyTorch reference: both in one process, by turns, as ratios of medians.

    python -m benchmarks.encoding            # runs, writes benchmarks/results/encoding.json, prints the table
    python -m benchmarks.encoding --show     # prints the table of the stored results

Forward and backward with gradients for table and coordinates. The reference is factorkit.ops.reference in
fp32, the plain vectorised PyTorch a user would write; torch.compile of it is measured too (tiny-cuda-nn and others have
no CPU path). Points lie along rays, as marching produces them. The machine's load is recorded with the numbers: on a
busy machine ratios hold better than times, and the gain of a second thread means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from benchmarks.recording import commit, processor
from benchmarks.rendering import compare, gain_of_a_thread, table
from factorkit import ops
from factorkit.ops import reference

RESULTS = Path(__file__).with_name("results") / "encoding.json"
CASES = {  # log2 of the table's rows, interpolation
    "hash grid, linear, 2^16 rows": (16, "linear"),
    "hash grid, quintic, 2^16 rows": (16, "quintic"),
    "hash grid, linear, 2^19 rows": (19, "linear"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if not args.show:
        load = os.getloadavg()[0]
        results = {name: hash_grid_case(*case, args.rounds) for name, case in CASES.items()}
        results["machine"] = {
            "processor": processor(),
            "logical_cores": os.cpu_count(),
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "torch": torch.__version__,
            "commit": commit(),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


def hash_grid_case(log2_rows: int, interpolation: str, rounds: int, rays: int = 512, samples: int = 128) -> dict:
    """16 levels of 2 features from 16 to 512 cells, on 2^16 points of short rays."""
    torch.manual_seed(0)
    origins, directions = torch.rand(rays, 1, 3), torch.nn.functional.normalize(torch.randn(rays, 1, 3), dim=2)
    t = torch.linspace(0, 0.5, samples)[:, None]
    x = (origins + t * directions).clamp(0, 1).reshape(-1, 3).requires_grad_()
    resolutions = ops.growing_resolutions(16, 512, 16)
    table_ = (torch.rand(16, 2**log2_rows, 2) * 2e-4 - 1e-4).requires_grad_()
    upstream = torch.randn(len(x), 32)

    def ours():
        torch.autograd.grad(ops.hash_grid(x, table_, resolutions, interpolation=interpolation), (x, table_), upstream)

    def plain():
        out = reference.hash_grid(x, table_, torch.ones(16), resolutions, interpolation == "quintic")
        torch.autograd.grad(out, (x, table_), upstream)

    fused = torch.compile(reference.hash_grid)

    def compiled():
        out = fused(x, table_, torch.ones(16), resolutions, interpolation == "quintic")
        torch.autograd.grad(out, (x, table_), upstream)

    others = {"torch.compile of the reference": compiled}
    result = {"points": len(x), "levels": 16, "features": 2, **compare(ours, plain, others, rounds)}
    return {**result, "scaling_2_threads": gain_of_a_thread(ours, rounds)}


if __name__ == "__main__":
    main()
