"""Masks of objects: a network trained on noised images, and in a clean image a mixture of colours with its prior.

The network is distilled from a spatial mixture with a cue for objects (:mod:`factorkit.segdiff.masks.distil`). It
serves at every noise level, so that generation, editing and the branches use the same regions. In a clean image its
answer, corrected by the shapes of the set, is the prior of a mixture that finds the exact border.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.nn.guided_filter import apply_guided_filter, fit_guided_filter
from factorkit.nn.unet import ResBlock, TimeEmbedding
from factorkit.segdiff.masks.proposal import Encoding, MaskProposal, MaskProposer
from factorkit.segdiff.masks.shape import ShapeDenoiser
from factorkit.segdiff.masks.spatial_mixture import fit_mixture, share_uniformly
from factorkit.utils.images import signed_to_lab

GRID_SIDE = 16  # cells along the short side of what the network sees
MAX_PATCH = 4  # pixels along a side of a cell
CHANNELS, EMBED, NORM_GROUPS = (32, 64, 96), 128, 8  # of the network's levels, at 16, 8 and 4 cells
LAB_SCALE, LAB_OFFSET = (50.0, 30.0, 30.0), (1.0, 0.0, 0.0)  # bring Lab colours to about [-1, 1]
MIN_VARIANCE = 0.01  # of a region's colours in this scale; .02 costs .01 IoU on validation horses
EM_ROUNDS = 3
GUIDE_RADIUS, GUIDE_EPS = 2, 0.01  # of the guided filter within EM
MIN_PROBABILITY = 1e-4


class MaskNetwork(nn.Module):
    """A small U-Net over patches of the noised image: K logits at 2 x 2 per patch, at every noise level.

    Args:
        regions: K.
        resolution: side of the training images; images of other sizes are resized to it first.
    """

    def __init__(self, regions: int, resolution: int):
        super().__init__()
        self.patch = min(MAX_PATCH, max(1, resolution // GRID_SIDE))
        first, *others = CHANNELS
        pairs = [(first, first), *zip(CHANNELS, others, strict=False)]

        def block(channels: int, out_channels: int) -> ResBlock:
            return ResBlock(channels, out_channels, EMBED, norm_groups=NORM_GROUPS)

        self.time = TimeEmbedding(EMBED // 4)
        self.conv_in = nn.Conv2d(3 * self.patch**2 + 2, first, 3, padding=1)
        self.down = nn.ModuleList(block(a, b) for a, b in pairs)
        self.middle = block(CHANNELS[-1], CHANNELS[-1])
        self.project = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs[1:])
        self.up = nn.ModuleList(block(a, a) for a, _ in pairs[1:])
        self.norm_out = nn.GroupNorm(NORM_GROUPS, first)
        self.conv_out = nn.Conv2d(first, 4 * regions, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(cast(Tensor, self.conv_out.bias))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return fp32 logits [B, K, H, W] of images [B, 3, H, W] of any size at time steps [B]."""
        height, width = x_t.shape[2:]
        cells = [max(1, round(GRID_SIDE * side / min(height, width) / 4)) * 4 for side in (height, width)]
        logits = self.at_grid(resize(x_t, cells[0] * self.patch, cells[1] * self.patch), t)
        return resize(logits, height, width)

    def at_grid(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return fp32 logits [B, K, 2 h / patch, 2 w / patch] of images whose sides h and w are 4 patches or more."""
        embedding = self.time(t)
        cells = F.pixel_unshuffle(x_t, self.patch)
        place = [torch.linspace(-1, 1, side, device=x_t.device, dtype=x_t.dtype) for side in cells.shape[2:]]
        grid = torch.stack(torch.meshgrid(*place, indexing="ij")).expand(len(x_t), -1, -1, -1)
        h = self.conv_in(torch.cat([cells, grid], 1))
        skips = []
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if i else h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for i in reversed(range(len(self.up))):
            h = self.up[i](skips[i] + F.interpolate(self.project[i](h), scale_factor=2.0), embedding)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))).float(), 2)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Resize [B, C, h, w]: averaged over areas where it becomes smaller, bilinear otherwise."""
    if x.shape[2:] == (height, width):
        return x
    if height <= x.shape[2] and width <= x.shape[3]:
        return F.adaptive_avg_pool2d(x, (height, width))
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
