"""Estimate of the cost of training on many GPUs: bytes a step, their overlap with the backward pass, efficiency.

Nothing is timed here: the step time is measured elsewhere, and link speeds are assumptions.

    python -m benchmarks.scaling --preset flowers64 --step-seconds 0.5
    python -m benchmarks.scaling --preset lego --step-seconds 0.1 --gpus 8 64 512 --network 12.5

The step time is that of one GPU on its own share of the batch (factorkit train ... --dry-run on the machine in
question, or the run's log), so the batch grows with the GPUs. The model, all of whose assumptions are printed:

- DistributedDataParallel averages fp32 gradients by ring all-reduce (Patarasuk & Yuan 2009): every GPU sends and
  receives 2 (N-1)/N times their bytes. Between machines one ring's worth crosses each machine's link, which then is
  the narrowest place.
- A step of the ring costs its bytes over the speed of the narrowest link it uses, and a latency; each bucket of 25 MiB
  takes 2 (N-1) of them.
- Buckets are sent during the backward pass, except the last one, which fills when the pass ends.
- With shard=True (FSDP2) every GPU gathers the others' shards of the weights in the forward and again in the backward
  pass, and the gradients are reduce-scattered: 3 (N-1)/N times their bytes, half as much again. The part
  that is not hidden is not modelled.
- A checkpoint stops the training only while the state is copied from the GPU to main memory.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

BUCKET = 25 * 2**20  # DistributedDataParallel's default, bytes
BACKWARD = 2 / 3  # of a step's arithmetic
STATE = 4  # copies of the weights in a checkpoint: weights, average, two moments


@dataclass(frozen=True)
class Links:
    """Assumed speeds: bytes a second of links within a machine, between machines and to main memory.

    Also the seconds before a message arrives, and the GPUs in a machine.
    """

    inside: float
    network: float
    host: float
    latency: float
    machine: int


def volume(gradient_bytes: int, gpus: int) -> float:
    """Bytes that every GPU sends in a step, and receives."""
    return 2 * (gpus - 1) / gpus * gradient_bytes


def sharded_volume(gradient_bytes: int, gpus: int) -> float:
    """The same with weights, gradients and moments in shards."""
    return 3 * (gpus - 1) / gpus * gradient_bytes


def all_reduce_seconds(size: float, gpus: int, links: Links) -> float:
    """Of one message of ``size`` bytes by a ring through all GPUs."""
    speed = links.inside if gpus <= links.machine else min(links.inside, links.network)
    return 2 * (gpus - 1) * (size / gpus / speed + links.latency)


def exposed_seconds(gradient_bytes: int, step_seconds: float, gpus: int, links: Links) -> float:
    """What a step takes longer than alone: what the backward pass cannot hide, and the last bucket."""
    if gpus == 1:
        return 0.0
    whole, rest = divmod(gradient_bytes, BUCKET)
    sizes = [BUCKET] * whole + [rest] * bool(rest)
    seconds = [all_reduce_seconds(size, gpus, links) for size in sizes]
    return max(0.0, sum(seconds[:-1]) - BACKWARD * step_seconds) + seconds[-1]


def efficiency(parameters: int, step_seconds: float, gpus: int, links: Links, checkpoint_every: int) -> float:
    """Samples a second and GPU, relative to one GPU on its own that writes no checkpoints."""
    saving = STATE * 4 * parameters / links.host / checkpoint_every
    return step_seconds / (step_seconds + exposed_seconds(4 * parameters, step_seconds, gpus, links) + saving)


def trained_parameters(preset: str) -> int:
    """How many numbers of a preset's model have a gradient that is sent."""
    from factorkit.nerfdiff import config as nerfdiff
    from factorkit.segdiff import config as segdiff
    from factorkit.segdiff.presets import PRESETS

    if preset in nerfdiff.PRESETS and preset not in PRESETS:
        return _nerfdiff_parameters(nerfdiff.preset_config(preset))
    with torch.device("meta"):
        model = segdiff.preset_config(preset).resolved().build()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _nerfdiff_parameters(config) -> int:
    from factorkit.nerfdiff.build import build_model
    from factorkit.nerfdiff.fields.kinds import build_field
    from factorkit.nerfdiff.rays import CameraModel

    layout = "forward" if config.candidate_type == "single" else "object"
    scene = {"layout": layout, "distance": 3.0, "size": [config.resolution] * 2}
    field, camera = build_field(config.field, config.grid_resolution, 0), CameraModel(torch.eye(3), torch.zeros(3))
    model = build_model(config, scene, camera, field, torch.eye(4)[None])
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="flowers64", help="of either model")
    parser.add_argument("--step-seconds", type=float, required=True, help="measured, of one GPU on its share")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--machine", type=int, default=8, help="GPUs in a machine")
    parser.add_argument("--inside", type=float, default=200.0, help="GB/s of a GPU's link within a machine")
    parser.add_argument("--network", type=float, default=25.0, help="GB/s of a machine's link to the others")
    parser.add_argument("--host", type=float, default=10.0, help="GB/s from a GPU to main memory")
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds before a message arrives")
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="steps")
    flags = parser.parse_args()
    links = Links(flags.inside * 1e9, flags.network * 1e9, flags.host * 1e9, flags.latency * 1e-6, flags.machine)
    parameters = trained_parameters(flags.preset)
    gradient, seconds = 4 * parameters, flags.step_seconds
    print(f"{flags.preset}: {parameters / 1e6:.1f} M parameters, {gradient / 1e6:.0f} MB of gradients a step (counted)")
    print(f"given: {seconds:g} s a step on one GPU")
    print(
        f"assumed: {links.machine} GPUs a machine; {flags.inside:g} GB/s within it, {flags.network:g} GB/s between "
        f"machines, {flags.host:g} GB/s to main memory; {flags.latency:g} us a message; buckets of {BUCKET >> 20} MiB; "
        f"{BACKWARD:.0%} of a step is its backward pass; a checkpoint every {flags.checkpoint_every} steps"
    )
    print("\n  GPUs   sent and received   in shards   all-reduce   not hidden   predicted efficiency")
    for gpus in flags.gpus:
        count = -(-gradient // BUCKET)
        reduce = count * all_reduce_seconds(gradient / count, gpus, links)
        left = exposed_seconds(gradient, seconds, gpus, links)
        share = efficiency(parameters, seconds, gpus, links, flags.checkpoint_every)
        sent, in_shards = volume(gradient, gpus) / 1e6, sharded_volume(gradient, gpus) / 1e6
        times = f"{1e3 * reduce:7.1f} ms   {1e3 * left:7.1f} ms"
        print(f"  {gpus:4}   {sent:14.0f} MB   {in_shards:6.0f} MB   {times}   {share:20.1%}")


if __name__ == "__main__":
    main()
