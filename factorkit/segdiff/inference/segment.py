"""Segmentation of one image of any size: read it, resize it for the network, predict masks, return to full size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from factorkit.diffusion.schedule import Schedule
from factorkit.metrics.segmentation import MAX_REGIONS
from factorkit.nn.guided_filter import apply_guided_filter, fit_guided_filter, resize_rows
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.masks.objects import ObjectMasks
from factorkit.segdiff.network import FactorizedDenoiser
from factorkit.utils.errors import ConfigError, OutOfMemoryError, is_out_of_memory
from factorkit.utils.images import pixels_to_images, pixels_to_signed
from factorkit.utils.rng import derived_seed

Labels = TypeVar("Labels", Tensor, np.ndarray)
UPSAMPLINGS = ("guided", "bilinear")
QUALITIES = ("fast", "best")
TILE_SIDE, TILE_OVERLAP = 4, 1  # in training resolutions; neighbouring tiles share the overlap
MAX_ASPECT = 64  # longer images are squeezed to this ratio of sides before the network
# The guided filter works on a grid of twice the network's; its windows reach an eighth of the short side to each side.
# Chosen on Flowers-17 at 128 px from masks at 32 and 64 px, of radii from 1/32 to 1/4 and eps from 1e-4 to 1e-2.
GUIDE_SCALE, GUIDE_REACH, GUIDE_EPS = 2, 1 / 8, 1e-3
ALIGNED_GUIDE_EPS = 1e-4  # of object masks, which EM has aligned: chosen on validation horses of 128 px, +.008 IoU
MASK_BATCH_SIZE = 32  # images of the training resolution that are segmented at once
PIXELS_PER_BAND = 1 << 18  # of full-size masks at a time
REDUCING_GAP = 3.0  # Pillow's fast reduction stops at so many times the target size; its good filter does the rest


class Segmentation(NamedTuple):
    """Regions of real images at their own sizes.

    Attributes:
        labels: the most probable region of each pixel, int64 [B, H, W]; a list of [H, W] if sizes differ.
        masks: soft masks, fp32 [B, K, H, W], summing to 1 over K; a list of [K, H, W] if sizes differ.
        names: the origin of each image.
        nesting: numbers of regions that each level of a hierarchy splits into; labels and masks are of the deepest.
        unlike: whether each image looks unlike the training set, so that its regions may mean nothing
            (:func:`is_unlike`).
    """

    labels: Tensor | list[Tensor]
    masks: Tensor | list[Tensor]
    names: list[str]
    nesting: tuple[int, ...] = ()
    unlike: tuple[bool, ...] = ()

    def level(self, level: int) -> Segmentation:
        """Return the regions of one level of a hierarchy, 1 the coarsest; ConfigError if there is no such level."""
        nesting = self.nesting or (len(self.masks[0]),)
        masks: Any = [level_masks(masks, nesting, level) for masks in self.masks]
        labels: Any = [level_labels(labels, nesting, level) for labels in self.labels]
        if isinstance(self.masks, Tensor):
            masks, labels = torch.stack(masks), torch.stack(labels)
        return Segmentation(labels, masks, self.names, nesting[:level], self.unlike)


class PreparedImage(NamedTuple):
    """An image and its smaller copies.

    Attributes:
        image: RGB, full size.
        small: uint8 [h, w, 3], the input of the network.
        guide: uint8 [h', w', 3], what the guided filter is fitted on; None where masks are interpolated bilinearly.
        radius: of the filter's windows on that grid.
        eps: of the filter.
    """

    image: Image.Image
    small: np.ndarray
    guide: np.ndarray | None
    radius: int
    eps: float


def check_segment_settings(config: ResolvedSegdiffConfig, size: int | None, upsample: str) -> int:
    """Return the short side of the network's input in pixels.

    Raises:
        ConfigError: a plain DDPM, a size below 1, an unknown way of upsampling.
    """
    if config.num_leaf_regions == 1:
        raise ConfigError("this run was trained with regions=1, the plain DDPM: it has no regions to segment with")
    if upsample not in UPSAMPLINGS:
        raise ConfigError(f"upsample={upsample!r} is unknown; choose one of {', '.join(UPSAMPLINGS)}")
    size = config.resolution if size is None else size
    if size < 1:
        raise ConfigError(f"size={size}: give pixels of the short side, at least 1 (trained at {config.resolution})")
    return size


def segment_image(
    config: ResolvedSegdiffConfig,
    image: Image.Image,
    predict: Callable[[Tensor], Tensor],
    judge: Callable[[np.ndarray, Tensor], bool],
    size: int,
    upsample: str,
) -> tuple[Tensor, bool]:
    """Return masks [K, H, W] of an image at its own size, and what ``judge`` returns of its small copy and masks.

    ``predict`` is as for :func:`predict_tiled`, ``judge`` as :func:`is_unlike`.

    Raises:
        OutOfMemoryError: the image is too large for the machine.
    """
    try:
        prepared = prepare_image(image, config, size, upsample)
        masks = predict_tiled(predict, prepared.small[None], config)
        full = torch.cat([band for _, band in upsample_masks(masks[0], prepared)], 1)
        return full, judge(prepared.small, masks[0])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(describe_out_of_memory(image, size)) from error


def prepare_image(image: Image.Image, config: ResolvedSegdiffConfig, size: int, upsample: str) -> PreparedImage:
    """Resize an image for the network and the guided filter; thread-safe.

    The short side becomes ``size`` pixels and the long one follows in proportion, both rounded to multiples of what the
    network can divide. An image with no more pixels than that needs no guide.
    """
    step = config.size_multiple
    width, height = image.size
    new_width, new_height = (
        max(step, round(min(side / min(width, height), MAX_ASPECT) * size / step) * step) for side in (width, height)
    )
    small = _resize(image, (new_width, new_height), Image.Resampling.LANCZOS)
    if upsample == "bilinear" or (width <= new_width and height <= new_height):
        return PreparedImage(image, small, None, 0, 0.0)
    grid = (min(width, GUIDE_SCALE * new_width), min(height, GUIDE_SCALE * new_height))
    radius = max(1, round(GUIDE_REACH * size * max(grid[0] / new_width, grid[1] / new_height)))
    eps = ALIGNED_GUIDE_EPS if config.masks == "auto" else GUIDE_EPS
    return PreparedImage(image, small, _resize(image, grid, Image.Resampling.BOX), radius, eps)


def predict_tiled(predict: Callable[[Tensor], Tensor], small: np.ndarray, config: ResolvedSegdiffConfig) -> Tensor:
    """Predict masks [N, K, h, w] of resized images, uint8 [N, h, w, 3], whole or in overlapping tiles.

    A tile is at most four training resolutions wide and high. Where tiles overlap their masks are averaged with weights
    that fall towards the edge of a tile; they still sum to 1. Masks other than the network's are never tiled,
    because their positions and colours refer to whole images.

    Args:
        predict: maps images [N, 3, h, w] in [-1, 1] to masks [N, K, h, w].
    """
    images = pixels_to_signed(torch.from_numpy(small))
    height, width = images.shape[2:]
    tile, overlap = TILE_SIDE * config.resolution, TILE_OVERLAP * config.resolution
    if max(height, width) <= tile or config.masks != "network":
        return predict(images)
    weight = _tent(min(height, tile), overlap)[:, None] * _tent(min(width, tile), overlap)
    total, weights = torch.zeros(()), torch.zeros(height, width)
    for top in _tile_starts(height, tile, overlap):
        for left in _tile_starts(width, tile, overlap):
            place = (..., slice(top, top + tile), slice(left, left + tile))
            masks = predict(images[place])
            total = total if total.dim() else masks.new_zeros(*masks.shape[:2], height, width)
            total[place] += weight * masks
            weights[place] += weight
    return total / weights


def upsample_masks(masks: Tensor, prepared: PreparedImage) -> Iterator[tuple[slice, Tensor]]:
    """Yield masks [K, h, w] at full size in bands of rows, top first: the rows and fp32 [K, rows, W].

    Values are at least 0 and sum to 1 over K.
    """
    width, height = prepared.image.size
    fitted = None
    if prepared.guide is not None:
        on_grid = F.interpolate(masks[None], prepared.guide.shape[:2], mode="bilinear", align_corners=False)
        fitted = fit_guided_filter(pixels_to_images(prepared.guide)[None], on_grid, prepared.radius, prepared.eps)
    step = max(1, PIXELS_PER_BAND // width)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        if fitted is None:
            band = resize_rows(masks[None], height, rows, width)[0]
        else:
            colours = pixels_to_images(np.asarray(prepared.image.crop((0, rows.start, width, rows.stop))))[None]
            band = apply_guided_filter(fitted, colours, rows, height)[0].clamp_min(0)
            band = band / band.sum(0)  # at least 1: they summed to 1 before the clamp
        yield rows, band


def describe_out_of_memory(image: Image.Image, size: int) -> str:
    """Return the error message for an image that does not fit into memory."""
    cure = "scale it down" + (f", or give less than size={size}" if size > 16 else "")
    return f"out of memory for {image.width} x {image.height} pixels; {cure}, or use another device"


def _resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    return np.array(image.resize(size, resample, reducing_gap=REDUCING_GAP))


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return the starts of tiles along one side, evenly from 0 to length - tile."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


def _tent(length: int, overlap: int) -> Tensor:
    """Return weights that fall linearly within ``overlap`` of either end."""
    centre = torch.arange(length) + 0.5
    return torch.minimum(centre, length - centre).clamp_max(overlap) / overlap


def add_noise(images: Tensor, t: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return ``images`` [B, 3, H, W] at time step t, and t as [B]; the noise depends on t and their shape alone."""
    generator = torch.Generator().manual_seed(derived_seed("segment", t))
    # The same noise for all images: the masks of an image must not depend on its place in the batch.
    eps = torch.randn(images.shape[1:], generator=generator).to(images.device).expand_as(images)
    times = torch.full((len(images),), t, dtype=torch.int64, device=images.device)
    return schedule.noise(images, eps, times), times


@torch.no_grad()
def predict_masks(
    model: nn.Module,
    images: Tensor,
    t: int,
    schedule: Schedule,
    label: int | None = None,
    latents: Tensor | None = None,
) -> Tensor:
    """Return the masks [N, K, H, W] (fp32, CPU) of ``images`` [N, 3, H, W] in [-1, 1]; no decoder is run.

    Args:
        model: a :class:`~factorkit.segdiff.network.FactorizedDenoiser` or a hierarchy of them.
        images: of any size that the model can divide. Masks of latents are lifted to their pixels.
        label: the class the model is conditioned on; None: no class.
        latents: of the images [N, C, h, w], which may then be smaller copies; None: they are encoded.
    """
    network = cast(FactorizedDenoiser, model)
    height, width = images.shape[2:]
    batch = max(1, MASK_BATCH_SIZE * network.resolution**2 // (height * width))
    parts = []
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        part = images[rows].to(schedule.device)
        x0 = network.space.encode(part) if latents is None else latents[rows].to(schedule.device)
        x_t, times = add_noise(x0, t, schedule)
        labels = () if label is None else (torch.full_like(times, label),)
        images_of_latents = {} if x0 is part else {"images": part}
        parts.append(lift_masks(network.segment(x_t, times, *labels, **images_of_latents).float(), part).cpu())
    return torch.cat(parts)


def lift_masks(masks: Tensor, images: Tensor) -> Tensor:
    """Return masks [B, K, h, w] at the pixels of images [B, 3, H, W] in [-1, 1], by the guided filter where h < H."""
    if masks.shape[2:] == images.shape[2:]:
        return masks
    images, (height, width) = (images.float() + 1) / 2, images.shape[2:]
    grid = (min(height, GUIDE_SCALE * masks.shape[2]), min(width, GUIDE_SCALE * masks.shape[3]))
    on_grid = F.interpolate(masks, grid, mode="bilinear", align_corners=False)
    radius = max(1, round(GUIDE_REACH * min(grid)))
    fitted = fit_guided_filter(F.adaptive_avg_pool2d(images, grid), on_grid, radius, GUIDE_EPS)
    lifted = apply_guided_filter(fitted, images).clamp_min(0)
    return lifted / lifted.sum(1, keepdim=True)  # at least 1: they summed to 1 before the clamp


@torch.no_grad()
def is_unlike(model: nn.Module, t: int, small: np.ndarray, masks: Tensor) -> bool:
    """Return whether an image looks unlike the training set; known for object masks at t = 0 alone, else False.

    Args:
        model: that segmented it.
        t: time step of the segmentation.
        small: the image as the network saw it, uint8 [h, w, 3].
        masks: of it [K, h, w].
    """
    proposer = getattr(model, "masks", None)
    if t or not isinstance(proposer, ObjectMasks):
        return False
    device = proposer.cue_weight.device
    image = pixels_to_signed(torch.from_numpy(small[None])).to(device).contiguous()
    return bool(
        proposer.find_unlike(image, cast(FactorizedDenoiser, model).space.encode(image), masks[None].to(device))
    )


def level_masks(masks: Tensor, nesting: Sequence[int], level: int) -> Tensor:
    """Sum masks [..., K, H, W] of the deepest level to those of ``level`` (1 is the coarsest).

    Raises:
        ConfigError: there is no such level.
    """
    if not 1 <= level <= len(nesting):
        raise ConfigError(f"level={level}: this model has levels 1 to {len(nesting)}")
    return masks.unflatten(-3, (math.prod(nesting[:level]), -1)).sum(-3)


def hard_labels(masks: Tensor, nesting: Sequence[int]) -> Tensor:
    """Return the region of each pixel, int64 [..., H, W], of masks [..., K, H, W] of the deepest level.

    Level by level: first the most probable coarse region, then the most probable of its parts, so that a pixel's
    label divided by the number of parts is its coarser label. For one level this is the argmax.
    """
    labels = torch.zeros_like(masks.select(-3, 0), dtype=torch.int64)
    for level, count in enumerate(nesting, start=1):
        families = level_masks(masks, nesting, level).unflatten(-3, (-1, count))
        best = families.max(-3).indices  # of each family [..., families, H, W]; argmax took 14 times as long
        labels = labels * count + best.gather(-3, labels.unsqueeze(-3)).squeeze(-3)
    return labels


def scored_level(nesting: Sequence[int]) -> tuple[int, int]:
    """Return the deepest level whose regions can be mapped to foreground, and their number; level 1 if none can.

    All subsets of them are tried, so :data:`~factorkit.metrics.segmentation.MAX_REGIONS` is the limit.
    """
    fitting = [n for n in range(1, len(nesting) + 1) if math.prod(nesting[:n]) <= MAX_REGIONS]
    level = max(fitting, default=1)
    return level, math.prod(nesting[:level])


def level_labels(labels: Labels, nesting: Sequence[int], level: int) -> Labels:
    """Convert labels of the deepest level to those of ``level`` (1 is the coarsest); same shape."""
    return labels // math.prod(nesting[level:])
