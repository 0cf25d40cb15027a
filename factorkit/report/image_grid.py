"""Sheets of pictures: grids with captions, that a run shows its state with."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# A caption is a text, or a text with the colour of a swatch drawn before it.
Caption = str | tuple[str, Sequence[int]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELL = 96  # sides shorter than this are hard to judge on a screen
_LARGEST_CELL = 256  # without a `cell` of the caller, larger images are shrunk to this
_FONT_SIZE = 12
_LINE = 18  # height of a line of captions
PAPER = (246, 246, 244)  # neither black nor white: the edges of a mask's cell stay visible
INK = (40, 40, 40)


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
        largest = max((max(picture.shape[:2]) for picture in present), default=CELL)
        cell = min(largest * -(-CELL // largest), _LARGEST_CELL)
    fitted = [[None if picture is None else _fit(np.asarray(picture), cell) for picture in row] for row in rows]
    sizes = [picture.size for row in fitted for picture in row if picture is not None]
    width = max((w for w, _ in sizes), default=cell)
    height = max((h for _, h in sizes), default=cell)
    columns = max((len(row) for row in rows), default=0)

    font = ImageFont.load_default(_FONT_SIZE)
    left = max((_caption_width(c, font) for c in row_captions), default=0) + 6 if row_captions else 0
    top = _LINE if captions else 0
    sheet = Image.new(
        "RGB", (left + gap + columns * (width + gap), top + gap + len(rows) * (height + gap)), color=PAPER
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


def grey(values: np.ndarray) -> np.ndarray:
    """Numbers or booleans in [0, 1] as uint8 of the same shape; what lies outside is clipped."""
    return np.round(255 * np.clip(np.asarray(values, dtype=np.float32), 0, 1)).astype(np.uint8)


def enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Pixels [H, W, ...], each as a square of `factor` x `factor`."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _fit(pixels: np.ndarray, cell: int) -> Image.Image:
    """The picture as large as a cell allows: by a whole factor where it is smaller, resampled where it is larger."""
    picture = Image.fromarray(enlarge(pixels, max(1, cell // max(pixels.shape[:2])))).convert("RGB")
    picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return picture


def _split(caption: Caption) -> tuple[str, Sequence[int] | None]:
    return (caption, None) if isinstance(caption, str) else caption


def _caption_width(caption: Caption, font: Font) -> int:
    text, color = _split(caption)
    return round(font.getlength(text)) + (0 if color is None else _FONT_SIZE)


def _write(draw: ImageDraw.ImageDraw, caption: Caption, x: int, y: int, width: int, height: int, font: Font) -> None:
    """Write a caption into a box, cut short where it would leave it."""
    text, color = _split(caption)
    middle = y + height // 2
    if color is not None:
        draw.rectangle((x, middle - 4, x + 8, middle + 4), fill=tuple(int(c) for c in color))
        x, width = x + _FONT_SIZE, width - _FONT_SIZE
    while text and font.getlength(text) > width:
        text = text[:-1]
    draw.text((x, middle), text, fill=INK, font=font, anchor="lm")


# Okabe and Ito, "Color Universal Design" (2008), their order changed so that the first few differ most in lightness
# too. Their black is left out: it cannot be told from a dark photograph or from the ink of a plot.
_OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def palette(k: int) -> np.ndarray:
    """Colours of regions 0..k-1, uint8 [k, 3]: distinct, and told apart with the common colour-blindnesses up to k = 7.

    A region keeps its colour whatever k is: `palette(3)` is the beginning of `palette(9)`.
    """
    colors = [tuple(bytes.fromhex(code[1:])) for code in _OKABE_ITO[:k]]
    for i in range(len(colors), k):
        # Turning the hue by the golden ratio never returns to a hue; three lightnesses keep close hues apart.
        r, g, b = colorsys.hls_to_rgb(i * 0.618034 % 1.0, (0.35, 0.55, 0.75)[i % 3], 0.6)
        colors.append((round(255 * r), round(255 * g), round(255 * b)))
    return np.array(colors, dtype=np.uint8).reshape(k, 3)
