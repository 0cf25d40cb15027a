"""Pictures of masks: single label and mask images, overlays, and the sheets a run shows its state with.

Images are uint8 [H, W, 3] in RGB, masks float in [0, 1], labels integers from 0. A region has the same colour in every
picture, and in the curves of the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from factorkit.report.image_grid import MIN_CELL_SIZE, Caption, draw_image_grid, enlarge, palette
from factorkit.utils.images import unit_to_uint8

__all__ = [
    "draw_image_grid",
    "generation_sheet",
    "label_image",
    "mask_image",
    "outlined",
    "overlay",
    "palette",
    "segmentation_sheet",
    "strip_rows",
    "trajectory_sheet",
]


def label_image(labels: np.ndarray) -> Image.Image:
    """Labels, integers [H, W] in 0..255, as a palette image: the pixels are the labels, the palette their colours."""
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() <= 255:
        raise ValueError(f"a palette image holds labels 0..255, these run from {labels.min()} to {labels.max()}")
    picture = Image.fromarray(labels.astype(np.uint8)).convert("P")
    picture.putpalette(palette(256).tobytes())
    return picture


def mask_image(mask: np.ndarray) -> Image.Image:
    """A soft mask, float [H, W] in [0, 1], as a grey image ("L"): 0 is black, 1 is white."""
    return Image.fromarray(unit_to_uint8(mask))


def overlay(image: np.ndarray, labels: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """The image tinted by region, with white lines, one pixel wide, where regions meet.

    image: uint8 [H, W, 3]; labels: integers [H, W]; alpha in [0, 1] is the share of the tint. Returns uint8 [H, W, 3].
    A pixel is on the line when its right or its lower neighbour belongs to another region.
    """
    image, labels = np.asarray(image), np.asarray(labels)
    tinted = np.round((1 - alpha) * image + alpha * _colored(labels)).astype(np.uint8)
    line = np.zeros(labels.shape, dtype=bool)
    line[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    line[:-1] |= labels[:-1] != labels[1:]
    tinted[line] = 255
    return tinted


def segmentation_sheet(
    images: np.ndarray,
    masks: np.ndarray,
    branches: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    levels: Sequence[np.ndarray] = (),
) -> Image.Image:
    """How images are taken apart: a row for each image; in columns the image, its regions, masks and branches.

    images: uint8 [N, H, W, 3]; masks: float [N, K, H, W] in [0, 1]; branches: float [N, K, H, W, 3] in [0, 1], what
    each branch paints; truth: bool [N, H, W]; levels: of a hierarchy the labels of each level, integers [N, H, W], the
    coarsest first; else the argmax of the masks is shown. The captions tell each region's colour and its mean share of
    the area.
    """
    images, masks = np.asarray(images), np.asarray(masks)
    colors, areas = palette(masks.shape[1]), masks.mean(axis=(0, 2, 3))
    captions: list[Caption] = ["image", *([f"level {n + 1}" for n in range(len(levels))] or ["regions"])]
    levels = levels or [masks.argmax(axis=1)]
    captions += [] if truth is None else ["truth"]
    captions += [(f"mask {k}: {areas[k]:.0%}", colors[k]) for k in range(len(colors))]
    captions += [] if branches is None else [(f"branch {k}", colors[k]) for k in range(len(colors))]
    rows = []
    for n, image in enumerate(images):
        row = [image, *(outlined(image, labels[n]) for labels in levels)]
        row += [] if truth is None else [unit_to_uint8(truth[n])]
        row += [unit_to_uint8(mask) for mask in masks[n]]
        row += [] if branches is None else [unit_to_uint8(painted) for painted in branches[n]]
        rows.append(row)
    return draw_image_grid(rows, captions)


def generation_sheet(
    images: np.ndarray, masks: np.ndarray, labels: np.ndarray | None = None, per_line: int = 8
) -> Image.Image:
    """Generated images with the regions they were made of: a column for each sample, `per_line` samples side by side.

    images: uint8 [N, H, W, 3]; masks: float [N, K, H, W] in [0, 1]; labels: integers [N, H, W], by default the argmax
    of the masks.
    """
    images, masks = np.asarray(images), np.asarray(masks)
    labels = masks.argmax(axis=1) if labels is None else np.asarray(labels)
    colors = palette(masks.shape[1])
    rows: list[list[np.ndarray]] = []
    captions: list[Caption] = []
    for start in range(0, len(images), per_line):
        line = range(start, min(start + per_line, len(images)))
        rows += [[images[n] for n in line], [outlined(images[n], labels[n]) for n in line]]
        rows += [[unit_to_uint8(masks[n, k]) for n in line] for k in range(len(colors))]
        captions += ["image", "regions", *((f"mask {k}", colors[k]) for k in range(len(colors)))]
    return draw_image_grid(rows, row_captions=captions)


def trajectory_sheet(
    frames: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None = None, times: Sequence[int] | None = None
) -> Image.Image:
    """Images, and their regions, as they take shape while noise is removed (the dissertation's figure 2.10).

    frames: S arrays uint8 [N, H, W, 3], from noise to image; labels: S arrays of integers [N, H, W]; times: the S time
    steps. Samples in rows, each followed by its regions when given; denoising steps in columns.
    """
    by_sample = np.stack([np.asarray(frame) for frame in frames], axis=1)
    regions = None if labels is None else np.stack([np.asarray(label) for label in labels], axis=1)
    rows, row_captions = strip_rows(by_sample, regions, "sample")
    captions = None if times is None else [f"t = {t}" for t in times]
    return draw_image_grid(rows, captions, row_captions)


def strip_rows(
    images: np.ndarray, labels: np.ndarray | None, name: str
) -> tuple[list[list[np.ndarray]], list[Caption]]:
    """Rows and their captions of strips of pictures, uint8 [n, S, H, W, 3], each strip followed by its regions."""
    rows: list[list[np.ndarray]] = []
    captions: list[Caption] = []
    for n, strip in enumerate(images):
        rows.append(list(strip))
        captions.append(f"{name} {n}")
        if labels is not None:
            rows.append([_colored(label) for label in labels[n]])
            captions.append("regions")
    return rows, captions


def _colored(labels: np.ndarray) -> np.ndarray:
    """Labels [H, W] in their colours, uint8 [H, W, 3]."""
    return palette(int(labels.max(initial=0)) + 1)[labels]


def outlined(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """An overlay for a sheet: small images are enlarged first, so that the lines stay thin beside their pixels."""
    factor = -(-MIN_CELL_SIZE // max(labels.shape))
    return overlay(enlarge(image, factor), enlarge(labels, factor), alpha=0.45)
