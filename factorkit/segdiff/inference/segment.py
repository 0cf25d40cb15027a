"""Masks of one real picture of any size: what the network sees of it, in tiles where that is much, and the way back to
the picture's own pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from factorkit.data.decode import to_rgb
from factorkit.data.open import open_source
from factorkit.data.sources import CHANNEL_COUNTS, Source
from factorkit.diffusion.schedule import Schedule
from factorkit.nn.guided_filter import apply_guided_filter, fit_guided_filter, resize_rows
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.task import predict_masks
from factorkit.utils.errors import ConfigError, DataError, OutOfMemory, is_out_of_memory
from factorkit.utils.images import pixels_to_images, pixels_to_signed

UPSAMPLINGS = ("guided", "bilinear")
QUALITIES = ("fast", "best")
TILE, OVERLAP = 4, 1  # sides of a tile and of what neighbours share, in training resolutions
LONGEST = 64  # short sides in a long one: a picture still longer is squeezed to that before the network sees it
# The guided filter, on a grid of twice the network's: windows reach an eighth of the short side to each side. Chosen on
# Flowers-17 at 128 px from masks at 32 and 64 px, of radii from a 32nd to a quarter and eps from 1e-4 to 1e-2.
GRID, REACH, EPS = 2, 1 / 8, 1e-3
BAND = 1 << 18  # pixels made at a time
GAP = 3.0  # how much larger than the target a picture may be when Pillow's good filter takes over from its fast one


class Seen(NamedTuple):
    """A picture and its smaller copies.

    Attributes:
        picture: RGB.
        small: uint8 [h, w, 3], what the network sees.
        guide: uint8 [h', w', 3], what the guided filter is fitted on; None where masks are interpolated bilinearly.
        radius: of the filter's windows on that grid.
    """

    picture: Image.Image
    small: np.ndarray
    guide: np.ndarray | None
    radius: int


def see(picture: Image.Image, config: ResolvedSegdiffConfig, size: int, upsample: str) -> Seen:
    """The copies a picture is segmented by; for any thread.

    Its short side is brought to ``size`` pixels, the long one in proportion, both to multiples of what the U-Net can
    halve. A picture that has no more pixels than that needs no guide.
    """
    step = 2 ** max(len(config.channel_mult) - 1, int(config.half_resolution_masks))
    width, height = picture.size
    short = min(width, height)
    fit = lambda side: max(step, round(min(side / short, LONGEST) * size / step) * step)  # noqa: E731
    seen = (fit(width), fit(height))
    small = _resized(picture, seen, Image.Resampling.LANCZOS)
    if upsample == "bilinear" or (width <= seen[0] and height <= seen[1]):
        return Seen(picture, small, None, 0)
    grid = (min(width, GRID * seen[0]), min(height, GRID * seen[1]))
    radius = max(1, round(REACH * size * max(grid[0] / seen[0], grid[1] / seen[1])))
    return Seen(picture, small, _resized(picture, grid, Image.Resampling.BOX), radius)


def small_masks(predict: Callable[[Tensor], Tensor], small: np.ndarray, config: ResolvedSegdiffConfig) -> Tensor:
    """Masks [N, K, h, w] of what the network sees, uint8 [N, h, w, 3]: at once, or in overlapping tiles.

    A tile is at most four times as wide and high as the pictures of the training. Where tiles share pixels their masks
    are averaged, each weighed less towards its own edge; they still sum to 1. Regions that compete are never looked at
    in tiles: their places and colours are those of whole pictures.

    Args:
        predict: images [N, 3, h, w] in [-1, 1] to masks [N, K, h, w].
    """
    images = pixels_to_signed(torch.from_numpy(small))
    (height, width), tile, overlap = images.shape[2:], TILE * config.resolution, OVERLAP * config.resolution
    if max(height, width) <= tile or config.masks == "mixture":
        return predict(images)
    weight = _tent(min(height, tile), overlap)[:, None] * _tent(min(width, tile), overlap)
    total, weights = torch.zeros(()), torch.zeros(height, width)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            place = (..., slice(top, top + tile), slice(left, left + tile))
            masks = predict(images[place])
            total = total if total.dim() else masks.new_zeros(*masks.shape[:2], height, width)
            total[place] += weight * masks
            weights[place] += weight
    return total / weights


def own_pixels(masks: Tensor, seen: Seen) -> Iterator[tuple[slice, Tensor]]:
    """The masks [K, h, w] brought to the picture's own pixels: bands of rows, top first, each fp32 [K, rows, W],
    at least 0 and summing to 1 over K."""
    width, height = seen.picture.size
    guidance = None
    if seen.guide is not None:
        on_grid = F.interpolate(masks[None], seen.guide.shape[:2], mode="bilinear", align_corners=False)
        guidance = fit_guided_filter(_colours(seen.guide), on_grid, seen.radius, EPS)
    step = max(1, BAND // width)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        if guidance is None:
            band = resize_rows(masks[None], height, rows, width)[0]
        else:
            colours = _colours(np.asarray(seen.picture.crop((0, rows.start, width, rows.stop))))
            band = apply_guided_filter(guidance, colours, rows, height)[0].clamp_min(0)
            band = band / band.sum(0)  # at least 1: before, all of them summed to 1
        yield rows, band


def check_segmenting(config: ResolvedSegdiffConfig, size: int | None, upsample: str) -> int:
    """The short side at which the network is to look.

    Raises:
        ConfigError: a plain DDPM, a size below the training's levels, an unknown way of upsampling.
    """
    if config.num_leaf_regions == 1:
        raise ConfigError("this run was trained with regions=1, the plain DDPM: it has no regions to segment with")
    if upsample not in UPSAMPLINGS:
        raise ConfigError(f"upsample={upsample!r} is unknown; choose one of {', '.join(UPSAMPLINGS)}")
    size = config.resolution if size is None else size
    if size < 1:
        raise ConfigError(f"size={size}: give pixels of the short side, at least 1 (trained at {config.resolution})")
    return size


def no_room(picture: Image.Image, size: int) -> str:
    """What to say of a picture that does not fit into memory."""
    cure = "scale it down" + (f", or give less than size={size}" if size > 16 else "")
    return f"out of memory for {picture.width} x {picture.height} pixels; {cure}, or use another device="


def _resized(picture: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    return np.array(picture.resize(size, filter, reducing_gap=GAP))


def _colours(pixels: np.ndarray) -> Tensor:
    """uint8 [h, w, 3] to fp32 [1, 3, h, w] in [0, 1]."""
    return pixels_to_images(pixels)[None]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side: evenly, from 0 to length - tile."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


def _tent(length: int, overlap: int) -> Tensor:
    """Weights that fall along a line within ``overlap`` of either end."""
    at = torch.arange(length) + 0.5
    return torch.minimum(at, length - at).clamp_max(overlap) / overlap


def masks_of(
    config: ResolvedSegdiffConfig, picture: Image.Image, predict: Callable[[Tensor], Tensor], size: int, upsample: str
) -> Tensor:
    """Masks [K, H, W] of a picture, in its own pixels; ``predict`` as :func:`small_masks` takes it.

    Raises:
        OutOfMemory: the picture is too large for the machine.
    """
    try:
        seen = see(picture, config, size, upsample)
        masks = small_masks(predict, seen.small[None], config)
        return torch.cat([band for _, band in own_pixels(masks[0], seen)], 1)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(no_room(picture, size)) from error


def average_masks(
    model: nn.Module, images: Tensor, t: int, schedule: Schedule, flip: bool, label: int | None = None
) -> Tensor:
    """Masks [N, K, H, W] (fp32, CPU) of ``images`` [N, 3, H, W] in [-1, 1] at time step t.

    Args:
        model: the network.
        images: of any size that it can halve.
        t: time step of the noise.
        schedule: of the noise.
        flip: average them with those of the mirrored images.
        label: the class the model is conditioned on; None: no class.
    """
    masks = predict_masks(model, images, t, schedule, label)
    if not flip:
        return masks
    return (masks + predict_masks(model, images.flip(3), t, schedule, label).flip(3)) / 2


def as_pictures(images: Any) -> tuple[list[Image.Image], list[str]]:
    """Whatever a user has, as upright RGB pictures at their own sizes, with names.

    Alpha is composited over white, an array's as a file's.

    Raises:
        DataError: an array or tensor that is no picture, or nothing to read.
    """
    if isinstance(images, (list, tuple)) and images and all(isinstance(i, (Tensor, np.ndarray)) for i in images):
        pictures = [picture for image in images for picture in as_pictures(image)[0]]
        return pictures, [f"{i:06d}" for i in range(len(pictures))]
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = images.float() if images.is_floating_point() else images  # numpy has no bfloat16
        if images.dim() == 3:
            images = images[None]
        if images.dim() != 4 or images.shape[1] not in CHANNEL_COUNTS:
            raise DataError(
                f"a tensor of images is [B, C, H, W] or [C, H, W], C being 1, 3 or 4; this one is {tuple(images.shape)}"
            )
        images = images.permute(0, 2, 3, 1).numpy()
    elif isinstance(images, Image.Image):
        return [to_rgb(images)], ["image"]
    elif isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[-1] in CHANNEL_COUNTS:
        images = images[None]
    source = images if isinstance(images, Source) else open_source(images)
    return [source.read(i) for i in range(len(source))], list(source.names)
