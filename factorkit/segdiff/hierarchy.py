"""A hierarchy of regions (thesis 2.5.1): each level is a factorized denoiser that runs inside every region of the last.

    O_l(x) = sum_i m_i (h_i + O_{l+1}(m_i x)) / 2      and at the deepest level      O_L(x) = sum_j m_j h_j

with m_i and h_i the masks and branches that level l computes from its input x; the model's output is O_1(x_t). For two
levels this is sum_i m_i (h_i + sum_j h_ij m_ij) / 2 of the thesis; for more, a nested level replaces the sum over j, so
that each further level counts half as much as the one before (1/2, 1/4, ..., and the two deepest alike).

A level is one network for all regions of the last, folded into the batch, as the branches of a decoder share weights.
Multiplied out, a region of the deepest level has the mask M = m_i m_ij ... and the branch
H = (h_i + (h_ij + ...) / 2) / 2, and O_1 = sum M H: a hierarchy is a factorized model with as many regions as it has
leaves, and its bottleneck holds these. The masks of a coarser level are sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from factorkit.diffusion.denoiser import Denoised, Denoiser
from factorkit.segdiff.backbones import Backbone
from factorkit.segdiff.network import FactorizedDenoiser, PixelSpace, Regions
from factorkit.utils.errors import ConfigError


class HierarchicalDenoiser(Denoiser):
    """Factorized denoisers, one for each level, of any number of levels.

    Args:
        backbone: of every level.
        regions: number of regions into which each level splits a region of the last, the coarsest first; at least two.
        settings: of every level's :class:`~factorkit.segdiff.network.FactorizedDenoiser`.

    Raises:
        ConfigError: as :func:`check_nesting` and FactorizedDenoiser do.
    """

    def __init__(self, backbone: Backbone, regions: Sequence[int], **settings: Any):
        super().__init__()
        self.nesting = tuple(regions)
        check_nesting(self.nesting, settings.get("decoding", "masked_skips"), settings.get("masks", "network"))
        self.regions, self.resolution = math.prod(self.nesting), backbone.resolution
        self.space = PixelSpace()
        self.levels = nn.ModuleList(FactorizedDenoiser(backbone, regions=count, **settings) for count in self.nesting)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        """Denoise; the bottleneck is the :class:`~factorkit.segdiff.network.Regions` of the deepest level.

        These are numbered with the deepest level fastest: of (3, 2) regions, number 2 i + j is part j of region i.
        ``cond`` holds labels int64 [B], -1 where there is none; None: no labels.
        """
        return self._denoise(0, x_t, t, cond, None)

    def _denoise(self, level: int, x: Tensor, t: Tensor, cond: Tensor | None, within: Tensor | None) -> Denoised:
        out = self._network(level)(x, t, cond, within)
        if level == len(self.levels) - 1:
            return out
        masks, branches = out.bottleneck.masks, out.bottleneck.branches
        inner = self._denoise(level + 1, *_split(x, masks, t, cond, within))
        parts = inner.bottleneck
        nested = inner.prediction[:, None] if parts.levels is None else parts.levels
        levels = torch.cat([out.prediction[:, None], _sum_regions(masks, nested)], 1)
        # out.prediction = sum_i m_i h_i, the prediction of the level by itself
        prediction = (out.prediction + _sum_regions(masks, inner.prediction)) / 2
        means = (branches[:, :, None] + parts.branches.unflatten(0, masks.shape[:2])) / 2
        return Denoised(prediction, Regions(_multiply(masks, parts.masks), means.flatten(1, 2), levels=levels))

    def segment(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, images: Tensor | None = None) -> Tensor:
        """Return the masks of the deepest level alone, [B, prod(nesting), H, W]; no decoder is run.

        ``images``, those of the latents x_t, are not used: no level has masks that follow pixels.
        """
        return self._segment(0, x_t, t, cond, None)

    def _segment(self, level: int, x: Tensor, t: Tensor, cond: Tensor | None, within: Tensor | None) -> Tensor:
        masks = self._network(level).segment(x, t, cond, within)
        if level == len(self.levels) - 1:
            return masks
        return _multiply(masks, self._segment(level + 1, *_split(x, masks, t, cond, within)))

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that learn at ``mask_learning_rate``."""
        return [p for level in range(len(self.levels)) for p in self._network(level).mask_parameters()]

    def _network(self, level: int) -> FactorizedDenoiser:
        return cast(FactorizedDenoiser, self.levels[level])


SegdiffModel = FactorizedDenoiser | HierarchicalDenoiser


def _split(
    x: Tensor, masks: Tensor, t: Tensor, cond: Tensor | None, within: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the inputs of the next level: each region's part of x [B, C, H, W], folded to [B*K, ...]."""
    count = masks.shape[1]
    parts = (masks[:, :, None] * x[:, None]).to(x.dtype).flatten(0, 1)
    area = masks if within is None else masks * within
    labels = None if cond is None else cond.repeat_interleave(count)
    return parts, t.repeat_interleave(count), labels, area.flatten(0, 1)[:, None]


def _sum_regions(masks: Tensor, values: Tensor) -> Tensor:
    """Return sum_i m_i v_i [B, ..., H, W] of values [B*K, ..., H, W] of the regions with masks [B, K, H, W]."""
    return torch.einsum("bkhw,bk...hw->b...hw", masks, values.unflatten(0, masks.shape[:2]))


def _multiply(masks: Tensor, parts: Tensor) -> Tensor:
    """Multiply masks [B, K, H, W] by those within each of them, [B*K, J, H, W]: [B, K*J, H, W]."""
    return (masks[:, :, None] * parts.unflatten(0, masks.shape[:2])).flatten(1, 2)


def check_nesting(regions: Sequence[int], decoding: str, masks: str) -> None:
    """Raise ConfigError for a hierarchy that cannot be built."""
    if len(regions) < 2 or min(regions) < 2:
        raise ConfigError(
            f"regions={tuple(regions)}: each level of a hierarchy splits into at least 2 regions; give one number for "
            "a single level"
        )
    if decoding == "concat":
        raise ConfigError("decoding='concat' has a single branch to nest in; give one number of regions")
    if masks != "network":
        raise ConfigError(f"masks={masks!r} measures whole images, not parts of them; give one number of regions")
