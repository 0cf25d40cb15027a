"""A network with sine activations (Sitzmann et al. 2020)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from factorkit.nerfdiff.fields.base import Field, linear_layers


class SirenField(Field):
    """A network with sine activations, initialised as in Sitzmann et al. 2020, section 3.2."""

    OMEGA = 30.0  # factor inside every sine, the paper's value

    def __init__(self, seed: int = 0, *, width: int = 256, depth: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [3, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        for i, layer in enumerate(self.layers):
            bound = 1 / 3 if i == 0 else math.sqrt(6 / width) / self.OMEGA
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.last = linear_layers([width, 4], generator)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return raw values [M, 4] of the network; see :class:`Field`."""
        h = positions
        for layer in self.layers:
            h = torch.sin(self.OMEGA * layer(h))
        raw: Tensor = self.last(h)
        return raw
