"""Compositing and marching on a GPU, against copy bandwidth, nerfacc and the PyTorch reference.

    python -m benchmarks.rendering_gpu           # runs, writes benchmarks/results/rendering_gpu.json, prints the table
    python -m benchmarks.rendering_gpu --show    # prints the table of the stored results

Forward and backward of packed rays of 128 samples, three channels, fp32, with gradients for density and colour, at 2^18
and 2^24 samples. A sample must move 64 bytes: density, colour and both edges are read by each pass (24 B), two
gradients are written (16 B). The bandwidth is that of copying 1 GiB, read and write both counted. nerfacc (pip install
nerfacc) compiles at first use; where it cannot be imported, its column is empty. The last line counts the kernel
launches, and the waits for the device, of a training step of marching (capacity form) and compositing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.recording import commit
from benchmarks.rendering import nerfacc
from factorkit import ops
from factorkit.ops import reference
from factorkit.ops.dispatch import has_extension

RESULTS = Path(__file__).with_name("results") / "rendering_gpu.json"
PER_RAY, CHANNELS, BYTES = 128, 3, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if not args.show:
        if not (torch.cuda.is_available() and has_extension("cuda")):
            raise SystemExit("this needs a CUDA device and factorkit installed with FACTORKIT_CUDA=1")
        bandwidth = copy_bandwidth(args.rounds)
        results = {f"2^{power}": composite_case(2**power, bandwidth, args.rounds) for power in (18, 24)}
        results["step"] = step_counts()
        results["machine"] = {
            "device": torch.cuda.get_device_name(),
            "copy_gb_s": round(bandwidth / 1e9, 1),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": commit(),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second, read and written, of copying 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), rounds)


def composite_case(samples: int, bandwidth: float, rounds: int) -> dict:
    torch.manual_seed(0)
    rays = samples // PER_RAY
    t_start = torch.rand(rays, PER_RAY, device="cuda").cumsum(1).flatten() * (4 / PER_RAY)
    t_end = t_start + 4 / PER_RAY
    sigma = (torch.rand(samples, device="cuda") * 2).requires_grad_()
    rgb = torch.rand(samples, CHANNELS, device="cuda").requires_grad_()
    offsets = torch.arange(0, samples + 1, PER_RAY, device="cuda")
    ray = torch.arange(rays, device="cuda").repeat_interleave(PER_RAY)
    upstream = torch.randn(rays, CHANNELS, device="cuda"), torch.randn(rays, device="cuda")

    def gradients(color, opacity):
        return torch.autograd.grad((color, opacity.reshape(rays)), (sigma, rgb), upstream)

    def ours():
        out = ops.composite(sigma, rgb, t_start, t_end, offsets)
        return gradients(out.color, out.opacity)

    def plain():
        color, _, opacity, *_ = reference.composite(sigma, rgb, t_start, t_end, offsets, None, 0.0)
        return gradients(color, opacity)

    def peer():
        weights = nerfacc.render_weight_from_density(t_start, t_end, sigma, ray_indices=ray, n_rays=rays)[0]
        color = nerfacc.accumulate_along_rays(weights, rgb, ray_indices=ray, n_rays=rays)
        return gradients(color, nerfacc.accumulate_along_rays(weights, None, ray_indices=ray, n_rays=rays))

    seconds = timed(ours, rounds)
    result = {"ms": 1e3 * seconds, "share_of_copy": BYTES * samples / seconds / bandwidth}
    for name, run in (("nerfacc", peer if nerfacc is not None else None), ("reference", plain)):
        if run is None:
            continue
        for a, b in zip(ours(), run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
        result[f"{name}_ratio"] = timed(run, rounds) / seconds
    return {name: round(value, 4) for name, value in result.items()}


def step_counts() -> dict:
    """Kernel launches and waits for the device of one step at 2^18 samples' capacity."""
    occupancy = torch.full((1, 128**3 // 8), 255, dtype=torch.uint8, device="cuda")
    origins = torch.randn(4096, 3, device="cuda") * 0.1
    directions = torch.nn.functional.normalize(torch.randn(4096, 3, device="cuda"), dim=1)
    near, far = torch.zeros(4096, device="cuda"), torch.full((4096,), 4.0, device="cuda")
    box = ([-1.0] * 3, [1.0] * 3)

    def step():
        s = ops.march_rays(origins, directions, near, far, occupancy, *box, step=0.01, seed=1, capacity=2**18)
        sigma = torch.ones_like(s.t_start).requires_grad_()
        rgb = torch.ones(2**18, CHANNELS, device="cuda").requires_grad_()
        ops.composite(sigma, rgb, s.t_start, s.t_end, s.ray_offsets).color.sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    launched = [event for event in seen.events() if event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))]
    return {"launches": len(launched), "waits": sum("synchroniz" in str(warning.message) for warning in caught)}


def timed(run, rounds: int) -> float:
    """Median seconds on the device, after a warm-up."""
    for _ in range(5):
        run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def table(results: dict) -> str:
    lines = ["| samples | forward + backward, ms | share of copy bandwidth | to nerfacc | to the reference |"]
    lines.append("|---|---|---|---|---|")
    for name, r in results.items():
        if "ms" in r:
            peer = f"{r['nerfacc_ratio']:.2f}x" if "nerfacc_ratio" in r else ""
            lines.append(f"| {name} | {r['ms']} | {r['share_of_copy']:.0%} | {peer} | {r['reference_ratio']:.2f}x |")
    m, step = results["machine"], results["step"]
    lines.append(f"a step of marching and compositing: {step['launches']} launches, {step['waits']} waits")
    lines.append(
        f"{m['device']}, copies at {m['copy_gb_s']} GB/s, torch {m['torch']}, CUDA {m['cuda']}, commit {m['commit']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
