"""A dense voxel grid."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops
from factorkit.nerfdiff.fields.base import Field

MIN_BLUR_CELLS = 0.3  # a Gaussian narrower than this many cells changes nothing visible


class GridField(Field):
    """Raw values at the vertices of a dense grid, interpolated trilinearly.

    Args:
        resolution: vertices along each side.
        seed: of the random initial values.
        blur: standard deviation of the blur at full coarseness, in units of the box's half side.
    """

    RAW_SCALE = 3.0  # from stored to raw values; it multiplies the effective learning rate

    def __init__(self, resolution: int, seed: int = 0, blur: float = 0.27):
        super().__init__()
        self.resolution, self.blur = resolution, blur
        generator = torch.Generator().manual_seed(seed)
        shape = (resolution, resolution, resolution, 4)
        self.values = nn.Parameter(0.1 * torch.randn(shape, generator=generator))

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return interpolated raw values [M, 4]; see :class:`Field`."""
        table = self.blurred_values().flatten(0, 2)
        rows = 1 << (len(table) - 1).bit_length()
        table = F.pad(table, (0, 0, 0, rows - len(table)))
        return self.RAW_SCALE * ops.hash_grid((positions + 1) / 2, table[None], [self.resolution - 1])

    def blurred_values(self) -> Tensor:
        """Return the values [R, R, R, 4] after a Gaussian blur along each axis."""
        sigma = self.coarseness * self.blur * (self.resolution - 1) / 2
        if sigma < MIN_BLUR_CELLS:
            return self.values
        index = torch.arange(self.resolution, device=self.values.device)
        weights = torch.exp(-((index[:, None] - index) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        values: Tensor = self.values
        for _ in range(3):  # each pass blurs the first axis and moves it behind the other two
            values = torch.tensordot(values, weights, dims=([0], [1])).permute(0, 1, 3, 2)
        return values

    def total_variation(self) -> Tensor:
        """Return the mean squared difference of neighbouring values, summed over the axes."""
        v = self.values
        differences = (v[1:] - v[:-1], v[:, 1:] - v[:, :-1], v[:, :, 1:] - v[:, :, :-1])
        return torch.stack([difference.square().mean() for difference in differences]).sum()

    def resampled(self, resolution: int) -> GridField:
        """Return the same field on a grid of another resolution."""
        field = GridField(resolution, blur=self.blur)
        values = self.values.detach().permute(3, 0, 1, 2)[None]
        values = F.interpolate(values, size=(resolution,) * 3, mode="trilinear", align_corners=True)
        field.values.data = values[0].permute(1, 2, 3, 0).contiguous()
        field.background, field.appearance = copy.deepcopy(self.background), copy.deepcopy(self.appearance)
        return field
