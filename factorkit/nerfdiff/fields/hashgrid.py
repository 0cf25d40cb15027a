"""A multiresolution hash grid (Müller et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from factorkit import ops
from factorkit.nerfdiff.fields.base import Field, linear_layers

MIN_LEVEL_SHARE = 0.2  # share of the levels that even the coarsest field shows


class HashField(Field):
    """A multiresolution hash grid and a small network; finer levels fade in as coarseness falls.

    Args:
        resolution: cells of the finest level along each side.
        seed: of table and network.
        levels: number of resolutions.
        rows: entries of each level's table, a power of two.
        features: numbers in each entry.
        hidden: units in each hidden layer.
    """

    def __init__(
        self,
        resolution: int,
        seed: int = 0,
        *,
        levels: int = 8,
        rows: int = 1 << 15,
        features: int = 2,
        hidden: int = 64,
    ):
        super().__init__()
        self.resolutions = ops.growing_resolutions(min(8, resolution), resolution, levels)
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(1e-2 * torch.randn(levels, rows, features, generator=generator))
        self.network = linear_layers([levels * features, hidden, hidden, 4], generator)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return raw values [M, 4] of the network on hash grid features; see :class:`Field`."""
        shown = max(MIN_LEVEL_SHARE, 1 - self.coarseness)
        weights = ops.annealing_weights(len(self.resolutions), shown).to(positions)
        raw: Tensor = self.network(ops.hash_grid((positions + 1) / 2, self.table, self.resolutions, weights))
        return raw
