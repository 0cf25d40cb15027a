"""Pictures of masks: single label and mask images, overlays, and the sheets a run shows its state with.

Images are uint8 [H, W, 3] in RGB, masks float in [0, 1], labels integers from 0. A region has the same colour in every
picture, and in the curves of the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from factorkit.engine.colors import palette

__all__ = [
    "contact_sheet",
    "generation_sheet",
    "label_image",
    "mask_image",
    "overlay",
    "palette",
    "segmentation_sheet",
    "trajectory_sheet",
]

# A caption is a text, or a text with the colour of a swatch drawn before it.
Caption = str | tuple[str, Sequence[int]]

_CELL = 96  # sides shorter than this are hard to judge on a screen
_LARGEST_CELL = 256  # without a `cell` of the caller, larger images are shrunk to this
_FONT_SIZE = 12
_LINE = 18  # height of a line of captions
_PAPER = (246, 246, 244)  # neither black nor white: the edges of a mask's cell stay visible
_INK = (40, 40, 40)


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
    return Image.fromarray(_grey(mask))


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


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    captions: Sequence[Caption] | None = None,
    row_captions: Sequence[Caption] | None = None,
    cell: int | None = None,
    gap: int = 2,
) -> Image.Image:
    """A grid of pictures, with optional captions over the columns and left of the rows.

    rows: lists of uint8 images [H, W, 3] or [H, W], of any sizes; None, and the end of a row shorter than others, stay
    empty. cell: longest side of a cell in pixels, by default the largest image enlarged by a whole factor to at least
    96 (at most 256). Images are enlarged by whole factors without smoothing, so that a pixel stays a square; only those
    larger than a cell are resampled. gap: pixels between cells and around the grid.

    Row i and column j of the grid begin at `gap + i * (cell height + gap)` below the captions, and alike to the right.
    """
    present = [picture for row in rows for picture in row if picture is not None]
    if cell is None:
        largest = max((max(picture.shape[:2]) for picture in present), default=_CELL)
        cell = min(largest * -(-_CELL // largest), _LARGEST_CELL)
    fitted = [[None if picture is None else _fit(np.asarray(picture), cell) for picture in row] for row in rows]
    sizes = [picture.size for row in fitted for picture in row if picture is not None]
    width = max((w for w, _ in sizes), default=cell)
    height = max((h for _, h in sizes), default=cell)
    columns = max((len(row) for row in rows), default=0)

    font = ImageFont.load_default(_FONT_SIZE)
    left = max((_caption_width(c, font) for c in row_captions), default=0) + 6 if row_captions else 0
    top = _LINE if captions else 0
    sheet = Image.new(
        "RGB", (left + gap + columns * (width + gap), top + gap + len(rows) * (height + gap)), color=_PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for j, caption in enumerate(captions or ()):
        _write(draw, caption, left + gap + j * (width + gap), 0, width, _LINE, font)
    for i, caption in enumerate(row_captions or ()):
        _write(draw, caption, 3, top + gap + i * (height + gap), left - 6, height, font)
    for i, row in enumerate(fitted):
        for j, picture in enumerate(row):
            if picture is not None:
                x = left + gap + j * (width + gap) + (width - picture.width) // 2
                y = top + gap + i * (height + gap) + (height - picture.height) // 2
                sheet.paste(picture, (x, y))
    return sheet


def segmentation_sheet(
    images: np.ndarray,
    masks: np.ndarray,
    branches: np.ndarray | None = None,
    truth: np.ndarray | None = None,
) -> Image.Image:
    """How images are taken apart: a row for each image; in columns the image, its regions, masks and branches.

    images: uint8 [N, H, W, 3]; masks: float [N, K, H, W] in [0, 1]; branches: float [N, K, H, W, 3] in [0, 1], what
    each branch paints; truth: bool [N, H, W]. The captions tell each region's colour and its mean share of the area.
    """
    images, masks = np.asarray(images), np.asarray(masks)
    colors, areas = palette(masks.shape[1]), masks.mean(axis=(0, 2, 3))
    captions: list[Caption] = ["image", "regions"]
    captions += [] if truth is None else ["truth"]
    captions += [(f"mask {k}: {areas[k]:.0%}", colors[k]) for k in range(len(colors))]
    captions += [] if branches is None else [(f"branch {k}", colors[k]) for k in range(len(colors))]
    rows = []
    for n, image in enumerate(images):
        row = [image, _outlined(image, masks[n].argmax(axis=0))]
        row += [] if truth is None else [_grey(truth[n])]
        row += [_grey(mask) for mask in masks[n]]
        row += [] if branches is None else [_grey(painted) for painted in branches[n]]
        rows.append(row)
    return contact_sheet(rows, captions)


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
        rows += [[images[n] for n in line], [_outlined(images[n], labels[n]) for n in line]]
        rows += [[_grey(masks[n, k]) for n in line] for k in range(len(colors))]
        captions += ["image", "regions", *((f"mask {k}", colors[k]) for k in range(len(colors)))]
    return contact_sheet(rows, row_captions=captions)


def trajectory_sheet(
    frames: Sequence[np.ndarray],
    labels: Sequence[np.ndarray] | None = None,
    times: Sequence[int] | None = None,
) -> Image.Image:
    """Images, and their regions, as they take shape while noise is removed (the dissertation's figure 2.10).

    frames: S arrays uint8 [N, H, W, 3], from noise to image; labels: S arrays of integers [N, H, W]; times: the S time
    steps. Samples in rows, each followed by its regions when given; denoising steps in columns.
    """
    rows, row_captions = [], []
    for n in range(len(frames[0])):
        rows.append([np.asarray(frame[n]) for frame in frames])
        row_captions.append(f"sample {n}")
        if labels is not None:
            rows.append([_colored(np.asarray(label[n])) for label in labels])
            row_captions.append("regions")
    captions = None if times is None else [f"t = {t}" for t in times]
    return contact_sheet(rows, captions, row_captions)


def _grey(values: np.ndarray) -> np.ndarray:
    """Numbers or booleans in [0, 1] as uint8 of the same shape; what lies outside is clipped."""
    return np.round(255 * np.clip(np.asarray(values, dtype=np.float32), 0, 1)).astype(np.uint8)


def _colored(labels: np.ndarray) -> np.ndarray:
    """Labels [H, W] in their colours, uint8 [H, W, 3]."""
    return palette(int(labels.max(initial=0)) + 1)[labels]


def _outlined(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """An overlay for a sheet: small images are enlarged first, so that the lines stay thin beside their pixels."""
    factor = -(-_CELL // max(labels.shape))
    return overlay(_enlarge(image, factor), _enlarge(labels, factor), alpha=0.45)


def _enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _fit(pixels: np.ndarray, cell: int) -> Image.Image:
    """The picture as large as a cell allows: by a whole factor where it is smaller, resampled where it is larger."""
    picture = Image.fromarray(_enlarge(pixels, max(1, cell // max(pixels.shape[:2])))).convert("RGB")
    picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return picture


def _split(caption: Caption) -> tuple[str, Sequence[int] | None]:
    return (caption, None) if isinstance(caption, str) else caption


def _caption_width(caption: Caption, font: ImageFont.FreeTypeFont) -> int:
    text, color = _split(caption)
    return round(font.getlength(text)) + (0 if color is None else _FONT_SIZE)


def _write(
    draw: ImageDraw.ImageDraw, caption: Caption, x: int, y: int, width: int, height: int, font: ImageFont.FreeTypeFont
) -> None:
    """Write a caption into a box, cut short where it would leave it."""
    text, color = _split(caption)
    middle = y + height // 2
    if color is not None:
        draw.rectangle((x, middle - 4, x + 8, middle + 4), fill=tuple(int(c) for c in color))
        x, width = x + _FONT_SIZE, width - _FONT_SIZE
    while text and font.getlength(text) > width:
        text = text[:-1]
    draw.text((x, middle), text, fill=_INK, font=font, anchor="lm")
