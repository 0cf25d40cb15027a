"""Ops and training step of segdiff: textbook PyTorch, the same under torch.compile, and factorkit, in one run.

    python -m benchmarks.segdiff                       # the demo's size on a CPU, flowers64 on a GPU
    python -m benchmarks.segdiff --preset fast64 --batch 8 --rounds 5
    python -m benchmarks.segdiff --show                # prints the tables of what was measured before

textbook   K decoders in a loop, each skip multiplied by its mask and concatenated (benchmarks/textbook.py)
folded     the same with all branches as one batch, channels last
compiled   folded under torch.compile
factorkit  this package, on a GPU with its step as a CUDA graph

All see the same images, weights, noise and precision. Answers and gradients are compared with those in fp32 before
anything is timed; a contender of PyTorch's that is off is left out, with its error in its place. Times are medians with
quartiles of functions that take turns, on one CPU thread of the process's own time. Rates are of the bytes that
factorkit's kernels have to move (benchmarks/traffic.py), as a share of what a copy reaches in the same run, and of the
step's matrix products, as a share of what a large one reaches. Memory is the most a step holds beyond what lay there
before it.
Results are stored in benchmarks/results/segdiff.json, one entry a device.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.contenders import IMAGES, OpCase, OurStep, gradients, make_task, op_cases, step_contenders
from benchmarks.measure import by_turns, copy_bandwidth, machine, matrix_rate, peak_bytes
from benchmarks.segdiff_table import tables
from benchmarks.traffic import step_traffic
from factorkit.engine.config import resolve_device
from factorkit.engine.cuda_graph import WARM_UP
from factorkit.segdiff.config import SegdiffConfig, preset_config

RESULTS = Path(__file__).with_name("results") / "segdiff.json"
AGREE = {"bf16": 0.05, "fp32": 1e-3}  # greatest relative error of outputs and gradients against fp32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="demo on a CPU and flowers64 on a GPU, if left out")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other settings, VALUE in JSON")
    parser.add_argument("--batch", type=int, help="images a step; the preset's if left out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.show:
        device = resolve_device(args.device)
        changes = {k: json.loads(v) for k, v in (entry.split("=", 1) for entry in args.set)}
        preset = args.preset or ("demo" if device.type == "cpu" else "flowers64")
        config = preset_config(preset, **changes, **({"batch_size": args.batch} if args.batch else {})).resolved()
        if config.threads:
            torch.set_num_threads(config.threads)
        result = measure(config, device, args.rounds, args.compiler)
        result["settings"] = {"preset": preset, **changes, "batch": config.batch_size, "precision": config.precision}
        records = json.loads(args.out.read_text()) if args.out.exists() else {}
        records[result["machine"]["device"]] = result
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(records, indent=1) + "\n")
    print(tables(json.loads(args.out.read_text())))


def measure(config: SegdiffConfig, device: torch.device, rounds: int, compiler: str) -> dict:
    """Everything, as it is written to the file."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    large = device.type == "cuda"
    roofs = {
        "copy_gb_s": round(copy_bandwidth(device, 1024 if large else 64, rounds), 2),
        "matrix_tflop_s": round(matrix_rate(device, 8192 if large else 512, dtype, rounds), 4),
    }
    result = {"machine": machine(device), "roofs": roofs, "ops": {}}
    for name, case in op_cases(config, config.batch_size, device, dtype).items():
        result["ops"][name] = measure_op(case, device, rounds, compiler, AGREE[config.precision])
    result["step"] = measure_steps(config, device, rounds, compiler)
    result["scaling"] = measure_scaling(config, device, rounds)
    result["segment"] = measure_segment(config, device, rounds)
    return result


def measure_op(case: OpCase, device: torch.device, rounds: int, compiler: str, agree: float) -> dict:
    """Forward alone, and with the gradients for all inputs."""
    compiled = torch.compile(case.textbook, backend=compiler, dynamic=False)
    runs = {"textbook": case.textbook, "compiled": compiled, "factorkit": case.factorkit}
    outputs = {name: run(*case.inputs) for name, run in runs.items()}
    upstream = torch.randn_like(outputs["textbook"])
    errors = {}
    exact = [x.detach().float().requires_grad_() for x in case.inputs]
    out = case.textbook(*exact)
    wanted = [out.detach(), *torch.autograd.grad(out, exact, upstream.float())]
    for name, output in outputs.items():
        got = [output.detach(), *torch.autograd.grad(output, case.inputs, upstream)]
        errors[name] = [relative(g, w) for g, w in zip(got, wanted, strict=True)]
        if not agrees(name, errors[name], agree):
            del runs[name]
    del outputs, out, wanted

    def forward(run):
        with torch.no_grad():
            return run(*case.inputs)

    def both(run):
        return torch.autograd.grad(run(*case.inputs), case.inputs, upstream)

    result = {"bytes": case.bytes(), "errors": {name: rounded(values) for name, values in errors.items()}}
    for kind, way in (("forward", forward), ("both", both)):
        calls = {name: lambda run=run, way=way: way(run) for name, run in runs.items()}
        for call in calls.values():
            call()
        result[kind] = by_turns(calls, rounds, device)
    return result


def agrees(name: str, errors: list[float], allowed: float) -> bool:
    """Whether a contender may be timed; there is nothing to compare where ours may not."""
    if max(errors) > allowed and name == "factorkit":
        raise SystemExit(f"{name} is off by {max(errors):.1e}, allowed {allowed:.0e}: nothing is timed")
    return max(errors) <= allowed


def rounded(errors: list[float]) -> list[float]:
    return [float(f"{error:.2g}") for error in errors]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-12)).item()


def measure_steps(config: SegdiffConfig, device: torch.device, rounds: int, compiler: str) -> dict:
    """The whole training step of each contender."""
    config_fp32 = preset_config(None, **{**config.to_dict(), "precision": "fp32"}).resolved()
    wanted = gradients(make_task(config_fp32, device).model, config_fp32, device)
    steps, result = {}, {}
    for name, make in step_contenders(config, device, compiler).items():
        step, net = make()
        errors = [relative(g, w) for g, w in zip(gradients(net, config, device), wanted, strict=True)]
        result[name] = {"errors": rounded(errors)}
        if not agrees(name, errors, AGREE[config.precision]):
            continue
        steps[name] = step
        step()  # whatever is made once
        result[name]["peak_bytes"] = peak_bytes(step, device)
        for _ in range(WARM_UP):
            step()
    for name, times in by_turns(steps, rounds, device).items():
        result[name].update(times)
    return {"flops": traffic_flops(config), "contenders": result}


def traffic_flops(config: SegdiffConfig) -> int:
    parts = step_traffic(None, config.batch_size, config.precision == "bf16", **config.to_dict())["fused"]
    return sum(part.flops for part in parts.values())


def measure_scaling(config: SegdiffConfig, device: torch.device, rounds: int) -> dict:
    """Factorkit's step by the number of regions; one is the plain DDPM."""
    steps = {}
    for regions in (1, config.regions, 2 * config.regions):
        changed = preset_config(None, **{**config.to_dict(), "regions": regions}).resolved()
        steps[str(regions)] = OurStep(make_task(changed, device), changed, device)
        for _ in range(WARM_UP + 2):
            steps[str(regions)]()
    return by_turns(steps, rounds, device)


def measure_segment(config: SegdiffConfig, device: torch.device, rounds: int) -> dict:
    """``segment()`` on batches of images that lie on the device."""
    task = make_task(config, device)
    model = task.model.eval()
    batch = min(IMAGES, 4 * config.batch_size)
    x = torch.randn(batch, config.resolution, config.resolution, 3, device=device).permute(0, 3, 1, 2)
    t = torch.full((batch,), config.segment_t, device=device)

    @torch.no_grad()
    def segment():
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return model.segment(x, t)

    segment()
    return {"images": batch, **by_turns({"segment": segment}, rounds, device)["segment"]}


if __name__ == "__main__":
    main()
