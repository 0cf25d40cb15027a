"""Random numbers as a function of the seed and the number of images trained on.

Resuming needs no stored generator state and is exact. Every process draws the numbers of the whole batch and keeps its
rows, so that a run is the same on any number of processes.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is a hash of ``parts``, the same on every platform."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed("order", seed, epoch))
    return torch.randperm(size, generator=generator)


def image_order(seed: int, images_seen: int, count: int, size: int) -> Tensor:
    """Return the indices of the ``count`` images after ``images_seen``; every epoch shuffles all ``size`` images."""
    parts, end = [], images_seen + count
    while images_seen < end:
        epoch, position = divmod(images_seen, size)
        parts.append(_permutation(seed, epoch, size)[position : position + end - images_seen])
        images_seen += len(parts[-1])
    return torch.cat(parts)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the generator that dropout on a device draws from.

    On a CPU that one alone: ``torch.manual_seed`` takes a millisecond for those of devices that no one uses.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class BatchDraw:
    """The random numbers of one step, restricted to the rows of one process's micro-batch.

    Args:
        seed: seed of the run.
        images_seen: number of images trained on before this step.
        batch: number of images in the whole batch.
        rows: slice of the batch to return.
        device: device that draws the numbers; CPU and GPU draw different ones.
    """

    def __init__(self, seed: int, images_seen: int, batch: int, rows: slice, device: torch.device):
        self.seed, self.batch, self.rows, self.device = seed, batch, rows, device
        self.generator = torch.Generator(device)
        self.restart(images_seen)

    def restart(self, images_seen: int) -> None:
        """Start the numbers of another step with the same generator object."""
        self.generator.manual_seed(derived_seed("draw", self.seed, images_seen))

    def fresh(self) -> BatchDraw:
        """Return a copy with a new generator; call :meth:`restart` before use."""
        return BatchDraw(self.seed, 0, self.batch, self.rows, self.device)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers [rows, *shape]."""
        return torch.randn(self.batch, *shape, generator=self.generator, device=self.device)[self.rows]

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1), [rows, *shape]."""
        return torch.rand(self.batch, *shape, generator=self.generator, device=self.device)[self.rows]

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw integers in [low, high), [rows, *shape]."""
        size = (self.batch, *shape)
        return torch.randint(low, high, size, generator=self.generator, device=self.device)[self.rows]
