"""Sheets of pictures taken apart and put together again. Images are uint8, masks and weights float in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from factorkit.report.image_grid import PAPER_COLOR, Caption, draw_image_grid
from factorkit.segdiff.previews import build_sequence_rows, overlay_enlarged, palette
from factorkit.utils.images import unit_to_uint8


def interpolation_sheet(
    a: np.ndarray, b: np.ndarray, images: np.ndarray, labels: np.ndarray | None, shares: Sequence[float]
) -> Image.Image:
    """The way from one picture to another (the dissertation's figure 2.12): a row for each pair, then its regions.

    a, b: [n, H, W, 3], the pictures; images: [n, frames, H, W, 3], between them; labels: integers [n, frames, H, W];
    shares: [frames], of the second picture.
    """
    rows, names = build_sequence_rows(images, labels, "pair")
    each = len(rows) // len(images)
    rows = [[a[i // each], *row, b[i // each]] if i % each == 0 else [None, *row] for i, row in enumerate(rows)]
    return draw_image_grid(rows, ["a", *(f"{share:.0%}" for share in shares), "b"], names)


def branches_sheet(noisy: np.ndarray, images: np.ndarray, masks: np.ndarray, branches: np.ndarray) -> Image.Image:
    """What each branch makes of pictures (the dissertation's figure 2.9), a row for each.

    noisy, images: [n, H, W, 3], what the model saw and what it guesses; masks: [n, K, H, W]; branches: [n, K, H, W, 3].
    Of every region: its mask, what its branch paints everywhere, and what of that is used.
    """
    colors, areas = palette(masks.shape[1]), masks.mean(axis=(0, 2, 3))
    captions: list[Caption] = ["noisy", "estimate", "regions"]
    rows = [[noisy[n], images[n], overlay_enlarged(images[n], masks[n].argmax(0))] for n in range(len(images))]
    for k, color in enumerate(colors):
        captions += [(f"mask {k}: {areas[k]:.0%}", color), (f"branch {k}", color), (f"part {k}", color)]
        for n, row in enumerate(rows):
            share = masks[n, k][..., None]
            used = np.round(share * branches[n, k] + (1 - share) * np.array(PAPER_COLOR)).astype(np.uint8)
            row += [unit_to_uint8(masks[n, k]), branches[n, k], used]
    return draw_image_grid(rows, captions)


def recomposition_sheet(
    originals: np.ndarray, sources: np.ndarray | None, kept: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> Image.Image:
    """Edited pictures, a row for each: the original, where its region comes from, what was kept, and the result.

    originals, sources, images: [n, H, W, 3]; kept: [n, H, W]; labels: integers [n, H, W], the result's regions.
    """
    captions = ["original", *([] if sources is None else ["from"]), "kept", "recomposed", "regions"]
    rows = []
    for n, image in enumerate(images):
        brought = [] if sources is None else [sources[n]]
        share = kept[n][..., None]
        left = np.round(share * originals[n] + (1 - share) * np.array(PAPER_COLOR)).astype(np.uint8)
        rows.append([originals[n], *brought, left, image, overlay_enlarged(image, labels[n])])
    return draw_image_grid(rows, captions)
