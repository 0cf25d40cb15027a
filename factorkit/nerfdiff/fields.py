"""Radiance fields over the box [-1, 1]^3: positions and directions to density and colour."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops
from factorkit.errors import ConfigError

DENSITY = 13.0  # density where a field's raw answer is about 1: opaque within a sixth of the box's half side
BIAS = -2.0  # of the raw density at the beginning: a thin fog, which every ray sees and every gradient can thicken


class Field(nn.Module):
    """What :func:`factorkit.render` takes. A subclass answers raw numbers; here they become density and colour.

    ``coarseness`` in [0, 1] blurs the field for training from coarse to fine: 1 shows only its large shapes.
    """

    coarseness: float = 0.0

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """[M, 4]: density's and colour's raw numbers at positions [M, 3] in [-1, 1]."""
        raise NotImplementedError

    def roughness(self) -> Tensor:
        """A penalty on detail that no view asks for."""
        return torch.zeros((), device=next(self.parameters()).device)

    def forward(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Density [M] per unit of length, none outside the box, and colour [M, 3] in [0, 1].

        Fog outside the box would be seen by every camera that passes it, and by no other: it must be nothing.
        """
        raw = self.raw(positions, directions).float()
        inside = (positions.detach().abs().amax(-1) <= 1).to(raw.dtype)
        return DENSITY * inside * F.softplus(raw[:, 0] + BIAS), raw[:, 1:].sigmoid()


class GridField(Field):
    """Numbers at the vertices of a lattice, interpolated linearly; blurred at first.

    Args:
        resolution: vertices along each side.
        seed: of the faint noise it begins with.
        blur: standard deviation at full coarseness, in units of the box's half side.
    """

    SCALE = 3.0  # from the stored numbers to the raw ones: they move faster so

    def __init__(self, resolution: int, seed: int = 0, blur: float = 0.27):
        super().__init__()
        self.resolution, self.blur = resolution, blur
        generator = torch.Generator().manual_seed(seed)
        shape = (resolution, resolution, resolution, 4)
        self.values = nn.Parameter(0.1 * torch.randn(shape, generator=generator))

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        table = self.blurred().flatten(0, 2)
        rows = 1 << (len(table) - 1).bit_length()
        table = F.pad(table, (0, 0, 0, rows - len(table)))
        return self.SCALE * ops.hash_grid((positions + 1) / 2, table[None], [self.resolution - 1])

    def blurred(self) -> Tensor:
        """The numbers [R, R, R, 4] after blurring along each axis."""
        sigma = self.coarseness * self.blur * (self.resolution - 1) / 2
        if sigma < 0.3:
            return self.values
        place = torch.arange(self.resolution, device=self.values.device)
        weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        values = self.values
        for _ in range(3):  # each turn blurs the first axis and moves it behind the other two
            values = torch.tensordot(values, weights, dims=([0], [1])).permute(0, 1, 3, 2)
        return values

    def roughness(self) -> Tensor:
        """Mean squared difference of neighbours, summed over the axes."""
        v = self.values
        steps = (v[1:] - v[:-1], v[:, 1:] - v[:, :-1], v[:, :, 1:] - v[:, :, :-1])
        return sum(step.square().mean() for step in steps)

    def refined(self, resolution: int) -> GridField:
        """The same field on a lattice of another resolution."""
        finer = GridField(resolution, blur=self.blur)
        values = self.values.detach().permute(3, 0, 1, 2)[None]
        values = F.interpolate(values, size=(resolution,) * 3, mode="trilinear", align_corners=True)
        finer.values.data = values[0].permute(1, 2, 3, 0).contiguous()
        return finer


def build_field(kind: str, resolution: int, seed: int) -> Field:
    """A fresh field of a kind. Raises ConfigError for one there is not."""
    if kind == "grid":
        return GridField(resolution, seed)
    raise ConfigError(f"field={kind!r} is unknown; choose grid")
