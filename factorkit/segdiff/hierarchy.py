"""Regions within regions (thesis 2.5.1): each level is a factorized U-Net that runs inside every region of the last.

    O_l(x) = sum_i m_i (h_i + O_{l+1}(m_i x)) / 2      and at the deepest level      O_L(x) = sum_j m_j h_j

with m_i and h_i the masks and branches that level l finds in its input x; the model answers O_1(x_t). For two levels
this is the text's sum_i m_i (h_i + sum_j h_ij m_ij) / 2; for more, a nested level takes the place of the sum over j, so
that each further level counts half as much as the one before (1/2, 1/4, ..., and the two deepest alike).

A level is one network for all regions of the last, folded into the batch, as the branches of a decoder share theirs.
Multiplied out, a region of the deepest level has the mask M = m_i m_ij ... and the branch
H = (h_i + (h_ij + ...) / 2) / 2, and O_1 = sum M H: seen from outside, a hierarchy is a factorized model of as many
regions as it has leaves, and whatever reads masks and branches reads these. The masks of a coarser level are sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factorkit.diffusion.denoiser import Denoised, Denoiser
from factorkit.metrics.segmentation import MAX_REGIONS
from factorkit.segdiff.network import FactorizedUNet, Regions
from factorkit.utils.errors import ConfigError


class HierarchicalUNet(Denoiser):
    """Factorized U-Nets, one for each level, of any number of levels.

    Args:
        regions: into how many regions each level splits a region of the last, the coarsest first; two levels at least.
        settings: of every level's :class:`~factorkit.segdiff.network.FactorizedUNet`.

    Raises:
        ConfigError: as :func:`check_nesting` and FactorizedUNet do.
    """

    def __init__(self, regions: Sequence[int], **settings: Any):
        super().__init__()
        self.nesting = tuple(regions)
        check_nesting(self.nesting, settings.get("decoding", "masked_skips"), settings.get("masks", "network"))
        self.regions, self.resolution = math.prod(self.nesting), settings["resolution"]
        self.levels = nn.ModuleList(FactorizedUNet(regions=count, **settings) for count in self.nesting)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        """Prediction [B, C, H, W] and the :class:`~factorkit.segdiff.network.Regions` of the deepest level.

        These are numbered with the deepest level fastest: of (3, 2) regions, number 2 i + j is part j of region i.
        cond: labels int64 [B], -1 where there is none; None is no label for all.
        """
        return self._denoise(0, x_t, t, cond, None)

    def _denoise(self, level: int, x: Tensor, t: Tensor, cond: Tensor | None, within: Tensor | None) -> Denoised:
        out = self.levels[level](x, t, cond, within)
        if level == len(self.levels) - 1:
            return out
        masks, branches = out.bottleneck.masks, out.bottleneck.branches
        inner = self._denoise(level + 1, *_inside(x, masks, t, cond, within))
        parts = inner.bottleneck
        nested = inner.prediction[:, None] if parts.levels is None else parts.levels
        levels = torch.cat([out.prediction[:, None], _within(masks, nested)], 1)
        # sum_i m_i h_i is what the level predicts by itself
        prediction = (out.prediction + _within(masks, inner.prediction)) / 2
        painted = (branches[:, :, None] + parts.branches.unflatten(0, masks.shape[:2])) / 2
        return Denoised(prediction, Regions(_joined(masks, parts.masks), painted.flatten(1, 2), levels=levels))

    def segment(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The masks of the deepest level alone, [B, prod(nesting), H, W]; no decoder is run."""
        return self._segment(0, x_t, t, cond, None)

    def _segment(self, level: int, x: Tensor, t: Tensor, cond: Tensor | None, within: Tensor | None) -> Tensor:
        masks = self.levels[level].segment(x, t, cond, within)
        if level == len(self.levels) - 1:
            return masks
        return _joined(masks, self._segment(level + 1, *_inside(x, masks, t, cond, within)))

    def mask_parameters(self) -> list[nn.Parameter]:
        """What the masks alone are made by."""
        return [p for level in self.levels for p in level.mask_parameters()]


def _inside(
    x: Tensor, masks: Tensor, t: Tensor, cond: Tensor | None, within: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What the next level is given: each region's own part of x [B, C, H, W], folded to [B*K, ...]."""
    count = masks.shape[1]
    parts = (masks[:, :, None] * x[:, None]).to(x.dtype).flatten(0, 1)
    area = masks if within is None else masks * within
    again = lambda values: None if values is None else values.repeat_interleave(count)  # noqa: E731
    return parts, again(t), again(cond), area.flatten(0, 1)[:, None]


def _within(masks: Tensor, found: Tensor) -> Tensor:
    """sum_i m_i f_i [B, ..., H, W] of what was found in each region, [B*K, ..., H, W], with masks [B, K, H, W]."""
    return torch.einsum("bkhw,bk...hw->b...hw", masks, found.unflatten(0, masks.shape[:2]))


def _joined(masks: Tensor, parts: Tensor) -> Tensor:
    """Masks [B, K, H, W] times those within each of them, [B*K, J, H, W]: [B, K*J, H, W]."""
    return (masks[:, :, None] * parts.unflatten(0, masks.shape[:2])).flatten(1, 2)


def check_nesting(regions: Sequence[int], decoding: str, masks: str) -> None:
    """Raise ConfigError where regions within regions cannot be had."""
    if len(regions) < 2 or min(regions) < 2:
        raise ConfigError(
            f"regions={tuple(regions)}: each level of a hierarchy splits into at least 2 regions; give one number for "
            "a single level"
        )
    if decoding == "concat":
        raise ConfigError("decoding='concat' has a single branch, so nothing to nest in it; give one number of regions")
    if masks == "mixture":
        raise ConfigError("masks='mixture' measures whole pictures, not parts of them; give one number of regions")


def nesting_of(regions: int | Sequence[int]) -> tuple[int, ...]:
    """The number of regions of each level, the coarsest first."""
    return (regions,) if isinstance(regions, int) else tuple(regions)


def level_masks(masks: Tensor, regions: int | Sequence[int], level: int) -> Tensor:
    """Masks [..., K, H, W] of the deepest level summed to those of ``level`` (1 is the coarsest).

    Raises:
        ConfigError: there is no such level.
    """
    nesting = nesting_of(regions)
    if not 1 <= level <= len(nesting):
        raise ConfigError(f"level={level}: this model has levels 1 to {len(nesting)}")
    return masks.unflatten(-3, (math.prod(nesting[:level]), -1)).sum(-3)


def hard_labels(masks: Tensor, regions: int | Sequence[int]) -> Tensor:
    """The region of each pixel, int64 [..., H, W], of masks [..., K, H, W] of the deepest level.

    Level by level: first the most probable coarse region, then the most probable of its parts, so that a pixel's
    label divided by the number of parts is its coarser label. For one level this is the argmax.
    """
    nesting = nesting_of(regions)
    found = torch.zeros_like(masks.select(-3, 0), dtype=torch.int64)
    for level, count in enumerate(nesting, start=1):
        families = level_masks(masks, nesting, level).unflatten(-3, (-1, count))
        best = families.argmax(-3)  # of each family [..., families, H, W]
        found = found * count + best.gather(-3, found.unsqueeze(-3)).squeeze(-3)
    return found


def scored_level(regions: int | Sequence[int]) -> tuple[int, int]:
    """The deepest level whose regions can be mapped to foreground, and how many it has; level 1 where none can.

    All subsets of them are tried, so that :data:`~factorkit.metrics.segmentation.MAX_REGIONS` are the most.
    """
    nesting = nesting_of(regions)
    fitting = [n for n in range(1, len(nesting) + 1) if math.prod(nesting[:n]) <= MAX_REGIONS]
    level = max(fitting, default=1)
    return level, math.prod(nesting[:level])


def level_labels(labels: Tensor, regions: int | Sequence[int], level: int) -> Tensor:
    """Labels of the deepest level as those of ``level`` (1 is the coarsest); same shape."""
    return labels // math.prod(nesting_of(regions)[level:])
