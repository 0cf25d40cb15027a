"""Grids of images with captions, and images of regions: label images and overlays.

A region has the same colour in every image, and in the curves of the report.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from factorkit.utils.images import unit_to_uint8

# A text, or a text and the colour of a swatch drawn before it.
Caption = str | tuple[str, Sequence[int]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MIN_CELL_SIZE = 96  # pixels; smaller images are hard to judge on a screen
_MAX_CELL_SIZE = 256  # pixels; larger images are shrunk to this unless the caller gives a size
_FONT_SIZE = 12
_LINE_HEIGHT = 18  # pixels, of a line of captions
PAPER_COLOR = (246, 246, 244)  # neither black nor white, so that the edges of masks stay visible
INK_COLOR = (40, 40, 40)


def draw_image_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    captions: Sequence[Caption] | None = None,
    row_captions: Sequence[Caption] | None = None,
    cell: int | None = None,
    gap: int = 2,
) -> Image.Image:
    """Draw a grid of images.

    Images are enlarged by whole factors without smoothing, so that pixels stay squares; only images larger than a cell
    are resampled. Row i and column j begin at ``gap + i * (cell height + gap)`` below the captions, and likewise to the
    right of the row captions.

    Args:
        rows: uint8 images [H, W, 3] or [H, W] of any sizes. None leaves a cell empty, as does a short row.
        captions: texts above the columns.
        row_captions: texts to the left of the rows.
        cell: longest side of a cell in pixels. None enlarges the largest image by a whole factor to at least 96 pixels
            and at most 256.
        gap: pixels between cells and around the grid.
    """
    present = [image for row in rows for image in row if image is not None]
    if cell is None:
        largest = max((max(image.shape[:2]) for image in present), default=MIN_CELL_SIZE)
        cell = min(largest * -(-MIN_CELL_SIZE // largest), _MAX_CELL_SIZE)
    fitted = [[None if image is None else _fit(np.asarray(image), cell) for image in row] for row in rows]
    sizes = [image.size for row in fitted for image in row if image is not None]
    width = max((w for w, _ in sizes), default=cell)
    height = max((h for _, h in sizes), default=cell)
    columns = max((len(row) for row in rows), default=0)

    font = ImageFont.load_default(_FONT_SIZE)
    left = max((_caption_width(c, font) for c in row_captions), default=0) + 6 if row_captions else 0
    top = _LINE_HEIGHT if captions else 0
    grid = Image.new(
        "RGB", (left + gap + columns * (width + gap), top + gap + len(rows) * (height + gap)), color=PAPER_COLOR
    )
    draw = ImageDraw.Draw(grid)
    for j, caption in enumerate(captions or ()):
        _write(draw, caption, left + gap + j * (width + gap), 0, width, _LINE_HEIGHT, font)
    for i, caption in enumerate(row_captions or ()):
        _write(draw, caption, 3, top + gap + i * (height + gap), left - 6, height, font)
    for i, row in enumerate(fitted):
        for j, image in enumerate(row):
            if image is not None:
                x = left + gap + j * (width + gap) + (width - image.width) // 2
                y = top + gap + i * (height + gap) + (height - image.height) // 2
                grid.paste(image, (x, y))
    return grid


def enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each of the pixels [H, W, ...] as a square of ``factor`` x ``factor``."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _fit(pixels: np.ndarray, cell: int) -> Image.Image:
    """Enlarge a small image by a whole factor; resample a large one."""
    image = Image.fromarray(enlarge(pixels, max(1, cell // max(pixels.shape[:2])))).convert("RGB")
    image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return image


def _split(caption: Caption) -> tuple[str, Sequence[int] | None]:
    return (caption, None) if isinstance(caption, str) else caption


def _caption_width(caption: Caption, font: Font) -> int:
    text, color = _split(caption)
    return round(font.getlength(text)) + (0 if color is None else _FONT_SIZE)


def _write(draw: ImageDraw.ImageDraw, caption: Caption, x: int, y: int, width: int, height: int, font: Font) -> None:
    """Write a caption into a box, truncated to its width."""
    text, color = _split(caption)
    middle = y + height // 2
    if color is not None:
        draw.rectangle((x, middle - 4, x + 8, middle + 4), fill=tuple(int(c) for c in color))
        x, width = x + _FONT_SIZE, width - _FONT_SIZE
    while text and font.getlength(text) > width:
        text = text[:-1]
    draw.text((x, middle), text, fill=INK_COLOR, font=font, anchor="lm")


# Okabe and Ito, "Color Universal Design" (2008), their order changed so that the first few differ most in lightness
# too. Their black is omitted: it looks like dark image content and like the ink of a plot.
_OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def palette(k: int) -> np.ndarray:
    """Return the colours of regions 0..k-1, uint8 [k, 3]: distinct with the common colour blindnesses up to k = 7.

    A region has the same colour for every k: ``palette(3)`` is the beginning of ``palette(9)``.
    """
    colors = [tuple(bytes.fromhex(code[1:])) for code in _OKABE_ITO[:k]]
    for i in range(len(colors), k):
        # Steps of the golden ratio never repeat a hue; three lightnesses separate similar hues.
        r, g, b = colorsys.hls_to_rgb(i * 0.618034 % 1.0, (0.35, 0.55, 0.75)[i % 3], 0.6)
        colors.append((round(255 * r), round(255 * g), round(255 * b)))
    return np.array(colors, dtype=np.uint8).reshape(k, 3)


def make_label_image(labels: np.ndarray) -> Image.Image:
    """Make a palette image whose pixels are the labels, integers [H, W] in 0..255."""
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() <= 255:
        raise ValueError(f"a palette image holds labels 0..255, these run from {labels.min()} to {labels.max()}")
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image.putpalette(palette(256).tobytes())
    return image


def make_mask_image(mask: np.ndarray) -> Image.Image:
    """Make a grey image ("L") of a soft mask, float [H, W] in [0, 1]: 0 is black, 1 is white."""
    return Image.fromarray(unit_to_uint8(mask))


def overlay_regions(image: np.ndarray, labels: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Tint an image by region, with white lines, one pixel wide, where regions meet.

    A pixel is on a line if its right or its lower neighbour belongs to another region.

    Args:
        image: uint8 [H, W, 3].
        labels: integers [H, W].
        alpha: opacity of the tint, in [0, 1].

    Returns:
        uint8 [H, W, 3].
    """
    image, labels = np.asarray(image), np.asarray(labels)
    tinted = np.round((1 - alpha) * image + alpha * color_labels(labels)).astype(np.uint8)
    line = np.zeros(labels.shape, dtype=bool)
    line[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    line[:-1] |= labels[:-1] != labels[1:]
    tinted[line] = 255
    return tinted


def overlay_enlarged(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Overlay for a grid: small images are enlarged first, so that the lines are thin compared with their pixels."""
    factor = -(-MIN_CELL_SIZE // max(labels.shape))
    return overlay_regions(enlarge(image, factor), enlarge(labels, factor), alpha=0.45)


def color_labels(labels: np.ndarray) -> np.ndarray:
    """Return the colours of labels, integers from 0: uint8 [..., 3]."""
    return palette(int(labels.max(initial=0)) + 1)[labels]
