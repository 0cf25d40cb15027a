"""Compositing and marching on the CPU, as ratios to the PyTorch reference and to other implementations.

    python -m benchmarks.rendering            # runs, writes benchmarks/results/rendering.json, prints the table
    python -m benchmarks.rendering --show     # prints the table of the stored results

The reference is factorkit.ops.reference in fp32, the plain vectorised PyTorch a user would write. Also
measured: torch.compile of the reference, nerfacc's own PyTorch path (where nerfacc is importable; it has none for
marching or packed samples), and marching as TensoRF does it, which looks up every step of every ray with grid_sample.
All functions take turns in one process; ratios are those of medians.

Two threads are compared with one on more rays, 16384 and 65536, where the work is long compared with waking a
thread. The machine's load before and during the run is recorded: on a busy machine ratios hold better than times, and
the gain of a second thread means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.recording import commit, processor
from factorkit import ops
from factorkit.ops import reference

try:
    import nerfacc
except ImportError:
    nerfacc = None

RESULTS = Path(__file__).with_name("results") / "rendering.json"
SAMPLES = 128


class Case(NamedTuple):
    """What does the same in several ways."""

    ours: Callable[[], object]
    plain: Callable[[], object]  # the reference
    others: dict[str, Callable[[], object]]
    facts: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if not args.show:
        load = os.getloadavg()[0]
        results = {}
        for name, case, usual, large in (("composite", composite_case, 4096, 16384), ("march", march_case, 64, 256)):
            result = case(usual)
            results[name] = {
                **result.facts,
                **compare(result.ours, result.plain, result.others, args.rounds),
                "scaling_2_threads": gain_of_a_thread(case(large).ours, args.rounds),
            }
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


def composite_case(rays: int) -> Case:
    """Forward and backward with gradients for all inputs from colour, depth and opacity together."""
    torch.manual_seed(0)
    edges = torch.rand(rays, SAMPLES + 1).cumsum(1) * (4 / SAMPLES)
    t_start, t_end = (x.contiguous().requires_grad_() for x in (edges[:, :-1], edges[:, 1:]))
    sigma = (torch.rand(rays, SAMPLES) * 4).requires_grad_()
    rgb = torch.rand(rays, SAMPLES, 3).requires_grad_()
    background = torch.rand(3).requires_grad_()
    inputs = (sigma, rgb, t_start, t_end, background)
    upstream = (torch.randn(rays, 3), torch.randn(rays), torch.randn(rays))

    def ours():
        out = ops.composite(sigma, rgb, t_start, t_end, background=background)
        torch.autograd.grad(out[:3], inputs, upstream)

    def plain():
        out = reference.composite(sigma, rgb, t_start, t_end, None, background, 0.0)
        torch.autograd.grad(out[:3], inputs, upstream)

    fused = torch.compile(reference.composite)

    def compiled():
        out = fused(sigma, rgb, t_start, t_end, None, background, 0.0)
        torch.autograd.grad(out[:3], inputs, upstream)

    others = {"torch.compile of the reference": compiled}
    if nerfacc is not None:

        def peer():
            weights = nerfacc.render_weight_from_density(t_start, t_end, sigma)[0]
            opacity = nerfacc.accumulate_along_rays(weights, None)
            color = nerfacc.accumulate_along_rays(weights, rgb) + (1 - opacity) * background
            depth = nerfacc.accumulate_along_rays(weights, ((t_start + t_end) / 2)[..., None])
            torch.autograd.grad((color, depth[:, 0], opacity[:, 0]), inputs, upstream)

        others[f"nerfacc {nerfacc.__version__}"] = peer
    return Case(ours, plain, others, {"rays": rays, "samples": SAMPLES, "channels": 3})


def march_case(side: int) -> Case:
    """An image's rays through a 128^3 grid that holds a shell, about 5 percent of its cells, with jitter."""
    torch.manual_seed(0)
    line = (torch.arange(128) + 0.5) / 64 - 1
    radius = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).norm(dim=0)
    occupied = ((radius - 0.6).abs() < 0.045).reshape(-1, 8)
    occupancy = (occupied * 2 ** torch.arange(8)).sum(1).to(torch.uint8)[None]
    grid = torch.stack(
        torch.meshgrid(torch.linspace(-0.5, 0.5, side), torch.linspace(-0.5, 0.5, side), indexing="ij"), -1
    )
    directions = torch.nn.functional.normalize(torch.cat([grid, -torch.ones(side, side, 1)], -1).reshape(-1, 3), dim=1)
    origins = torch.tensor([0.1, -0.05, 3.0]).expand_as(directions).contiguous()
    box = ([-1.0] * 3, [1.0] * 3)
    near, far = ops.intersect_box(origins, directions, *box)
    step = 2 * 3**0.5 / 1024

    def ours():
        return ops.march_rays(origins, directions, near, far, occupancy, *box, step=step, seed=1)

    def plain():
        return reference.march_rays(origins, directions, near, far, occupancy, *box, step, float("inf"), 0.0, 1)

    volume = occupied.reshape(1, 1, 128, 128, 128).float()

    def looked_up():
        steps = torch.arange(int((far - near).max() / step) + 1)
        t = near[:, None] + (steps + torch.rand(len(near), 1)) * step
        points = origins[:, None] + t[..., None] * directions[:, None]
        places = points.flip(-1)[None, :, :, None]
        result = torch.nn.functional.grid_sample(volume, places, "nearest", align_corners=False)
        kept = (result[0, 0, :, :, 0] > 0.5) & (t < far[:, None])
        return t[kept], kept.nonzero()[:, 0], kept.sum(1).cumsum(0)

    samples = int(ours().wanted)
    assert abs(len(looked_up()[0]) / samples - 1) < 0.02
    facts = {"rays": len(origins), "step": step, "occupied": occupied.float().mean().item(), "samples": samples}
    return Case(ours, plain, {"all steps through grid_sample": looked_up}, facts)


def compare(ours, plain, others: dict, rounds: int) -> dict:
    """Medians in milliseconds on one thread, taking turns; how many times longer the reference and the others take."""
    torch.set_num_threads(1)
    runs = {"ours": ours, "reference": plain, **others}
    times = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            run()  # so that each finds the caches and the heap as it leaves them, as in a training
            times[name].append(timed(run))
    median = {name: statistics.median(values[2:]) for name, values in times.items()}
    return {
        **{f"{name}_ms": round(1e3 * median[name], 3) for name in ("ours", "reference")},
        "ratio": round(median["reference"] / median["ours"], 2),
        "others": {name: round(median[name] / median["ours"], 2) for name in others},
    }


def gain_of_a_thread(run, rounds: int) -> float:
    """How many times as fast two threads are as one, in medians."""
    taken = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        taken.append(statistics.median([timed(run) for _ in range(rounds + 2)][2:]))
    torch.set_num_threads(1)
    return round(taken[0] / taken[1], 2)


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(results: dict) -> str:
    head = "| op | ours, ms | reference, ms | ratio | ratio to others | 2 threads |"
    rows = [
        f"| {name} | {r['ours_ms']} | {r['reference_ms']} | {r['ratio']}x "
        f"| {', '.join(f'{other} {ratio}x' for other, ratio in r['others'].items())} "
        f"| {r['scaling_2_threads']}x |"
        for name, r in results.items()
        if "ratio" in r
    ]
    m = results["machine"]
    note = f"{m['processor']}, 1 thread, torch {m['torch']}, commit {m['commit']}, load {m['load_before']}"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows, note])


if __name__ == "__main__":
    main()
