"""Learned backgrounds: one colour, or a colour for each viewing direction."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from factorkit import ops
from factorkit.utils.errors import ConfigError

BACKGROUNDS = ("given", "learned", "field")


class ConstantBackground(nn.Module):
    """One colour, initially mid-grey."""

    LEARNING_RATE = 0.03  # independent of the field's

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(3))

    def forward(self, directions: Tensor) -> Tensor:
        """Return colours [..., 3] in [0, 1] for unit viewing directions [..., 3]."""
        return self.raw.sigmoid().expand_as(directions)


class DirectionalBackground(nn.Module):
    """A small network from the encoded viewing direction to a colour, initially mid-grey."""

    LEARNING_RATE = 5e-3  # independent of the field's
    BANDS = 3

    def __init__(self, seed: int = 0, hidden: int = 64):
        super().__init__()
        sizes = [3 + 6 * self.BANDS, hidden, hidden]
        generator = torch.Generator().manual_seed(seed)
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        self.hidden = nn.ModuleList(layers)
        self.last = nn.Linear(hidden, 3)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, directions: Tensor) -> Tensor:
        """Return colours [..., 3] in [0, 1] for unit viewing directions [..., 3]."""
        flat = directions.reshape(-1, 3)
        h = torch.cat([flat, ops.frequency(flat, self.BANDS)], dim=1)
        for layer in self.hidden:
            h = layer(h).relu()
        return self.last(h).sigmoid().reshape(directions.shape)


Background = ConstantBackground | DirectionalBackground


def build_background(kind: str, seed: int) -> Background | None:
    """Build a background of a kind in :data:`BACKGROUNDS`; None for "given", the colour stored with the views.

    Raises:
        ConfigError: unknown kind.
    """
    if kind not in BACKGROUNDS:
        raise ConfigError(f"background={kind!r} is unknown; choose one of {', '.join(BACKGROUNDS)}")
    if kind == "given":
        return None
    return ConstantBackground() if kind == "learned" else DirectionalBackground(seed)
