"""Processes of one run: torchrun starts them, torch.distributed joins them, nothing of our own in between."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from factorkit.errors import ConfigError


def join(device: torch.device) -> None:
    """Join the processes torchrun started, if it did (NCCL on GPUs, gloo on CPUs)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL's collectives run on the current one
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def rank() -> int:
    """This process's number; 0 is the one that writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_batch(batch_size: int) -> None:
    """Raise ConfigError where the processes of the run cannot share a batch equally."""
    if batch_size % world_size():
        less, more = batch_size // world_size() * world_size(), -(-batch_size // world_size()) * world_size()
        near = f"{less} or {more}" if less else str(more)
        raise ConfigError(
            f"batch_size={batch_size} cannot be shared equally by {world_size()} processes; give a multiple of their "
            f"number, such as batch_size={near} (micro_batch_size is each one's own and need divide nothing)"
        )


def average(values: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def greatest(number: int, device: torch.device) -> int:
    """The greatest of the processes' numbers, for decisions that all of them must take alike."""
    if world_size() > 1:
        values = torch.tensor(number, device=device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        number = int(values)
    return number


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process on its machine (torchrun's LOCAL_RANK)."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
