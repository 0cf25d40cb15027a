"""The pose predictor: the first half of a U-Net that reads a noisy view and answers raw numbers for each candidate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.nn import Encoder, TimeEmbedding
from factorkit.nn.blocks import Norm


def wide(x: Tensor) -> Tensor:
    """At least 32 bits: a pose has to be told more finely than half precision can."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PoseEncoder(nn.Module):
    """U-Net encoder, norm and SiLU, the last features whole or averaged, and two linear heads (thesis, fig. 3.12).

    Args:
        size: height and width of what it reads; views of another size are averaged down to it.
        width, multipliers, blocks: of the U-Net.
        candidates: N.
        numbers: raw ones for each candidate.
        pooling: "average" over the last features (fig. 3.12) loses where things are, which small networks need: "whole"
            takes them all.
    """

    def __init__(
        self, size: tuple[int, int], width: int, multipliers: Sequence[int], blocks: int, candidates: int, numbers: int,
        *, groups: int = 32, pooling: str = "whole",
    ):  # fmt: skip
        super().__init__()
        self.size, self.pooling = tuple(size), pooling
        self.shape = (candidates, numbers)
        self.time = TimeEmbedding(width)
        self.encoder = Encoder(3, width, multipliers, blocks, (), max(size), 4 * width, groups=groups)
        channels = self.encoder.out_channels
        self.norm = Norm(channels, groups)
        if pooling == "whole":
            for _ in multipliers[1:]:
                size = tuple((side + 1) // 2 for side in size)
            hidden = 128
            self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], hidden), nn.SiLU())
        else:
            hidden = channels
            self.hidden = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.numbers = nn.Linear(hidden, candidates * numbers)
        self.scores = nn.Linear(hidden, candidates)
        for head in (self.numbers, self.scores):  # the first cameras are the anchors, but not exactly
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Raw numbers [B, N, numbers] and scores [B, N] of views [B, 3, H, W] in [-1, 1] plus noise at times t [B]."""
        if tuple(x_t.shape[2:]) != self.size:
            x_t = F.interpolate(x_t, size=self.size, mode="area")
        last = self.encoder(x_t, self.time(t))[-1]
        h = self.hidden(self.norm(last))
        numbers, scores = (wide(head(h)) for head in (self.numbers, self.scores))
        return numbers.unflatten(1, self.shape), scores
