"""NeRF's network (Mildenhall et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit import ops
from factorkit.nerfdiff.fields.base import Field, linear_layers

MIN_BAND_SHARE = 0.2  # share of the frequency bands that even the coarsest field uses


class FrequencyField(Field):
    """NeRF's network (Mildenhall et al. 2020, fig. 7).

    Encoded positions pass through 8 layers of 256 units with a skip connection; the encoded direction only affects the
    colour.

    Args:
        seed: of the weights.
        width: units in each layer.
        depth: number of layers.
        skip_at: number of layers before the encoded position is concatenated again.
    """

    BANDS, DIRECTION_BANDS = 10, 4

    def __init__(self, seed: int = 0, *, width: int = 256, depth: int = 8, skip_at: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        position_size, direction_size = 3 + 6 * self.BANDS, 3 + 6 * self.DIRECTION_BANDS
        self.first = linear_layers([position_size, *[width] * skip_at], generator, True)
        self.second = linear_layers([width + position_size, *[width] * (depth - skip_at)], generator, True)
        self.density = linear_layers([width, 1], generator)
        self.feature = linear_layers([width, width], generator)
        self.color = linear_layers([width + direction_size, width // 2, 3], generator)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return raw values [M, 4] of the network on encoded positions; see :class:`Field`."""
        weights = ops.annealing_weights(self.BANDS, max(MIN_BAND_SHARE, 1 - self.coarseness)).to(positions)
        encoded = torch.cat([positions, ops.frequency(positions, self.BANDS, weights)], dim=1)
        h = self.second(torch.cat([self.first(encoded), encoded], dim=1))
        direction = torch.cat([directions, ops.frequency(directions, self.DIRECTION_BANDS)], dim=1)
        return torch.cat([self.density(h), self.color(torch.cat([self.feature(h), direction], dim=1))], dim=1)
