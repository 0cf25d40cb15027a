"""What a run tells about itself between two lines of the log."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from factorkit.engine import distributed

if TYPE_CHECKING:
    from factorkit.engine.step import StepLoss


class Meter:
    """Sums over the steps between two lines of the log, kept on the device and read once.

    They are added to in place, so that a CUDA graph may do it.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=device)  # loss, samples; by quarters of the level
        self.watch: dict[str, Tensor] = {}
        self._restart()

    def _restart(self) -> None:
        self.pause, self.since = 0.0, time.perf_counter()

    def add(self, found: StepLoss) -> None:
        quarter = (found.level * 4).long().clamp(0, 3)
        loss = found.loss.detach().double()
        self.sums[0].index_add_(0, quarter, loss)
        self.sums[1].index_add_(0, quarter, torch.ones_like(loss))
        for name, value in found.watch.items():
            value = value.detach().float() * len(loss)
            if name not in self.watch:
                self.watch[name] = torch.zeros_like(value)
            self.watch[name].add_(value)

    @contextmanager
    def paused(self):
        """Time spent on sheets and checkpoints is no training time."""
        start = time.perf_counter()
        yield
        self.pause += time.perf_counter() - start

    def read(self) -> dict[str, Any]:
        """Means since the last reading, over all processes."""
        sums = distributed.average(self.sums).cpu()  # waits for the device, so the clock is read after it
        seconds = time.perf_counter() - self.since - self.pause
        rows = sums[1].sum().item()  # of each process
        by_quarter = [s / n if n else None for s, n in zip(*sums.tolist(), strict=True)]
        line = {
            "loss": sums[0].sum().item() / max(rows, 1),
            "loss_by_quarter": by_quarter,
            "images_per_second": rows * distributed.world_size() / max(seconds, 1e-9),
            "seconds": seconds,
        }
        for name, total in self.watch.items():
            line[name] = distributed.average(total / rows).tolist()
        for total in (self.sums, *self.watch.values()):
            total.zero_()
        self._restart()
        return line
