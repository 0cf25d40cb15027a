"""What lies behind a scene where the trainer was not told: one colour, or a colour for every direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from factorkit import ops
from factorkit.utils.errors import ConfigError

BACKGROUNDS = ("given", "learned", "field")


class ConstantBackground(nn.Module):
    """One colour, mid-grey at first."""

    RATE = 0.03  # Adam's, of these numbers, whatever the field's

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(3))

    def forward(self, directions: Tensor) -> Tensor:
        """Colours [..., 3] in [0, 1] along viewing directions [..., 3] of length one."""
        return self.raw.sigmoid().expand_as(directions)


class DirectionalBackground(nn.Module):
    """A colour for every viewing direction, as of things infinitely far away: a small network on the direction in
    octaves; mid-grey at first."""

    RATE = 5e-3
    BANDS = 3

    def __init__(self, seed: int = 0, hidden: int = 64):
        super().__init__()
        sizes = [3 + 6 * self.BANDS, hidden, hidden]
        generator = torch.Generator().manual_seed(seed)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        for layer in self.hidden:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        self.last = nn.Linear(hidden, 3)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, directions: Tensor) -> Tensor:
        """Colours [..., 3] in [0, 1] along viewing directions [..., 3] of length one."""
        way = directions.reshape(-1, 3)
        h = torch.cat([way, ops.frequency(way, self.BANDS)], dim=1)
        for layer in self.hidden:
            h = layer(h).relu()
        return self.last(h).sigmoid().reshape(directions.shape)


def build_background(kind: str, seed: int) -> ConstantBackground | DirectionalBackground | None:
    """A fresh background, one of :data:`BACKGROUNDS`; None for the colour that comes with the views.

    Raises:
        ConfigError: a kind there is not.
    """
    if kind not in BACKGROUNDS:
        raise ConfigError(f"background={kind!r} is unknown; choose one of {', '.join(BACKGROUNDS)}")
    if kind == "given":
        return None
    return ConstantBackground() if kind == "learned" else DirectionalBackground(seed)
