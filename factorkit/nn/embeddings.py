"""The time step as a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, channels: int) -> Tensor:
    """Cosines and sines of ``t`` [B] at geometrically spaced frequencies (Vaswani et al. 2017): [B, C], C even."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Sequential):
    """sinusoid C → Linear 4C → SiLU → Linear 4C. Input t [B], output [B, 4C]."""

    def __init__(self, channels: int):
        super().__init__(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels))
        self.channels = channels

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(sinusoid(t, self.channels).to(self[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """A vector for each class, and one for "no label", which unlabelled and dropped labels share."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes + 1, channels)
        nn.init.normal_(self.table.weight, std=0.02)  # next to nothing beside the time: labels begin as a hint

    def forward(self, labels: Tensor) -> Tensor:
        """labels [B], int64, below 0 where there is none; [B, channels]."""
        return self.table(torch.where(labels < 0, self.classes, labels))
