"""Checks without labels of masks that shall be of one object in all views of it.

The colours of an object do not depend on what is behind it. Masks that divide each image by its own colours, before
backgrounds that change, hold parts of them: then a mask has fewer colours in common with the rest of its own image
than with the rest of the other views. And an object ends within most of the images, which a part of a scene does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from factorkit.report.content import Check
from factorkit.utils.images import pixels_to_signed, signed_to_lab

COMPARED_SIDE = 64  # pixels of the longer side at which images and masks are compared
MAX_COMPARED_VIEWS = 128
LIGHTNESS_STEP, COLOR_STEP, COLOR_RANGE = 20, 16, 112  # of the bins of CIELAB colours, and the largest |a| and |b|
MIN_COMMON = 0.02  # share of colours added to both sides, so that rare ones decide nothing
MIN_SHARED_COLORS = 0.94
BORDER_SHARE = 0.05  # of the image's border, in the mask from which on the mask reaches the border
MAX_CUT_VIEWS = 0.5
MIN_CHECKED_VIEWS = 8
HELP = "Look at the masks, and give others (--masks DIR), or none"


def shrink(image: Image.Image, mask: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return a view uint8 [h, w, 3] and its mask bool [h, w] at the size at which they are compared."""
    scale = min(1.0, COMPARED_SIDE / max(image.size))
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    small, inside = (i.resize(size, Image.Resampling.BOX) for i in (image.convert("RGB"), mask.convert("L")))
    return np.asarray(small), np.asarray(inside) > 127


def measure_shared_colors(images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """Return how much a mask's colours have in common with the rest of its own image, over that of other views.

    What two sets of colours have in common is the intersection of their histograms. About 1 if the masks do not depend
    on the background, or if this is the same in all views.

    Args:
        images: uint8 [h, w, 3] each.
        masks: bool [h, w] each.
    """
    inside, outside = (
        torch.stack([_histogram(i, m) for i, m in zip(images, p, strict=True)]) for p in (masks, [~m for m in masks])
    )
    common = torch.stack([torch.minimum(colors, outside).sum(1) for colors in inside])
    own = common.diagonal().mean()
    others = (common.sum() - common.diagonal().sum()) / (common.numel() - len(common))
    return float((own + MIN_COMMON) / (others + MIN_COMMON))


def _histogram(image: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """Return the shares of the CIELAB colours of an image uint8 [h, w, 3] where a mask [h, w] is True."""
    lab = signed_to_lab(pixels_to_signed(torch.from_numpy(image.copy())[None]))[0]
    steps = int(2 * COLOR_RANGE / COLOR_STEP)
    lightness = (lab[0] / LIGHTNESS_STEP).long().clamp(0, 100 // LIGHTNESS_STEP)
    a, b = ((channel + COLOR_RANGE).div(COLOR_STEP).long().clamp(0, steps) for channel in lab[1:])
    bins = (lightness * (steps + 1) + a) * (steps + 1) + b
    count = torch.bincount(bins[torch.from_numpy(mask)], minlength=(100 // LIGHTNESS_STEP + 1) * (steps + 1) ** 2)
    return count / count.sum().clamp_min(1)


def measure_cut_views(masks: Sequence[np.ndarray]) -> float:
    """Return the share of the masks, bool [h, w], that reach the border of their image."""
    borders = (np.concatenate([m[0], m[-1], m[1:-1, 0], m[1:-1, -1]]) for m in masks)
    return float(np.mean([border.mean() > BORDER_SHARE for border in borders]))


def check_object_masks(images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[Check]:
    """Return the checks of the masks, bool [h, w], of views, uint8 [h, w, 3]."""
    names = ("colours that masks share with their background", "views whose mask reaches the border")
    if len(images) < MIN_CHECKED_VIEWS:
        return [Check(name, not_run=f"since there are fewer than {MIN_CHECKED_VIEWS} views") for name in names]
    rows = np.unique(np.linspace(0, len(images) - 1, MAX_COMPARED_VIEWS).round().astype(int))
    shared, cut = measure_shared_colors([images[i] for i in rows], [masks[i] for i in rows]), measure_cut_views(masks)
    texts = (
        f"masks follow the background: they have {shared:.2f} < {MIN_SHARED_COLORS:g} times as many colours in common "
        "with the rest of their own view as with that of other views, as where the background changes from view to "
        "view (walk around the object without masks, or keep the background still)",
        f"masks are not of an object within the images: in {cut:.0%} > {MAX_CUT_VIEWS:.0%} of the views they reach the "
        "border (a scene without an object needs no masks)",
    )
    failed = shared < MIN_SHARED_COLORS, cut > MAX_CUT_VIEWS
    failures = [(text,) if fails else () for text, fails in zip(texts, failed, strict=True)]
    return [
        Check(names[0], shared, low=MIN_SHARED_COLORS, failures=failures[0]),
        Check(names[1], cut, high=MAX_CUT_VIEWS, failures=failures[1]),
    ]
