"""Image grids that show the state of a run: its regions, generated images, branches and edits.

Images are uint8 [H, W, 3] in RGB, masks float in [0, 1], labels integers from 0. A region has the same colour in every
image, and in the curves of the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from factorkit.report.image_grid import PAPER_COLOR, Caption, color_labels, draw_image_grid, overlay_enlarged, palette
from factorkit.utils.images import unit_to_uint8

IMAGES_PER_CLASS = 6  # in a grid of classes


def draw_segmentation_grid(
    images: np.ndarray,
    masks: np.ndarray,
    branches: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    levels: Sequence[np.ndarray] = (),
) -> Image.Image:
    """Draw a row for each image: the image, its regions, masks and branches.

    The captions give each region's colour and its mean share of the area.

    Args:
        images: uint8 [N, H, W, 3].
        masks: float [N, K, H, W] in [0, 1].
        branches: float [N, K, H, W, 3] in [0, 1], the output of each branch.
        truth: bool [N, H, W].
        levels: labels of each level of a hierarchy, integers [N, H, W], the coarsest first; without them the argmax of
            the masks is shown.
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
        row = [image, *(overlay_enlarged(image, labels[n]) for labels in levels)]
        row += [] if truth is None else [unit_to_uint8(truth[n])]
        row += [unit_to_uint8(mask) for mask in masks[n]]
        row += [] if branches is None else [unit_to_uint8(branch) for branch in branches[n]]
        rows.append(row)
    return draw_image_grid(rows, captions)


def draw_generation_grid(
    images: np.ndarray, masks: np.ndarray, labels: np.ndarray | None = None, per_line: int = 8
) -> Image.Image:
    """Draw generated images above their regions and masks: a column for each sample.

    Args:
        images: uint8 [N, H, W, 3].
        masks: float [N, K, H, W] in [0, 1].
        labels: integers [N, H, W]; None: the argmax of the masks.
    """
    images, masks = np.asarray(images), np.asarray(masks)
    labels = masks.argmax(axis=1) if labels is None else np.asarray(labels)
    colors = palette(masks.shape[1])
    rows: list[list[np.ndarray]] = []
    captions: list[Caption] = []
    for start in range(0, len(images), per_line):
        line = range(start, min(start + per_line, len(images)))
        rows += [[images[n] for n in line], [overlay_enlarged(images[n], labels[n]) for n in line]]
        rows += [[unit_to_uint8(masks[n, k]) for n in line] for k in range(len(colors))]
        captions += ["image", "regions", *((f"mask {k}", colors[k]) for k in range(len(colors)))]
    return draw_image_grid(rows, row_captions=captions)


def draw_class_grid(images: np.ndarray, masks: np.ndarray, classes: Sequence[str | None]) -> Image.Image:
    """Draw a row for each class: its first images, each beside its regions if there are several.

    Args:
        images: uint8 [N, H, W, 3].
        masks: float [N, K, H, W] in [0, 1].
    """
    rows = []
    for name in dict.fromkeys(classes):
        row = []
        for n in [i for i, other in enumerate(classes) if other == name][:IMAGES_PER_CLASS]:
            row.append(images[n])
            if masks.shape[1] > 1:
                row.append(overlay_enlarged(images[n], masks[n].argmax(axis=0)))
        rows.append(row)
    return draw_image_grid(rows, row_captions=[name or "any" for name in dict.fromkeys(classes)])


def draw_trajectory_grid(
    frames: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None = None, times: Sequence[int] | None = None
) -> Image.Image:
    """Draw images, and their regions, while noise is removed (thesis, fig. 2.10): samples in rows, steps in columns.

    Args:
        frames: S arrays uint8 [N, H, W, 3], from noise to image.
        labels: S arrays of integers [N, H, W]; None: no rows of regions.
    """
    by_sample = np.stack([np.asarray(frame) for frame in frames], axis=1)
    regions = None if labels is None else np.stack([np.asarray(label) for label in labels], axis=1)
    rows, row_captions = build_sequence_rows(by_sample, regions, "sample")
    captions = None if times is None else [f"t = {t}" for t in times]
    return draw_image_grid(rows, captions, row_captions)


def draw_interpolation_grid(
    a: np.ndarray, b: np.ndarray, images: np.ndarray, labels: np.ndarray | None, shares: Sequence[float]
) -> Image.Image:
    """Draw interpolated images (thesis, fig. 2.12): a row for each pair, followed by its regions.

    Args:
        a: first images, [n, H, W, 3].
        b: last images, [n, H, W, 3].
        images: the frames between them, [n, frames, H, W, 3].
        labels: integers [n, frames, H, W]; None: no rows of regions.
        shares: [frames], of the last image.
    """
    rows: list[list[np.ndarray | None]]
    frame_rows, captions = build_sequence_rows(images, labels, "pair")
    step = len(frame_rows) // len(images)
    rows = [[a[i // step], *row, b[i // step]] if i % step == 0 else [None, *row] for i, row in enumerate(frame_rows)]
    return draw_image_grid(rows, ["a", *(f"{share:.0%}" for share in shares), "b"], captions)


def draw_branch_grid(noisy: np.ndarray, images: np.ndarray, masks: np.ndarray, branches: np.ndarray) -> Image.Image:
    """Draw decomposed images (thesis, fig. 2.9), a row for each; for every region its mask, branch and used part.

    Args:
        noisy: input of the model, [n, H, W, 3].
        images: its estimate, [n, H, W, 3].
        masks: [n, K, H, W].
        branches: [n, K, H, W, 3].
    """
    colors, areas = palette(masks.shape[1]), masks.mean(axis=(0, 2, 3))
    captions: list[Caption] = ["noisy", "estimate", "regions"]
    rows = [[noisy[n], images[n], overlay_enlarged(images[n], masks[n].argmax(0))] for n in range(len(images))]
    for k, color in enumerate(colors):
        captions += [(f"mask {k}: {areas[k]:.0%}", color), (f"branch {k}", color), (f"part {k}", color)]
        for n, row in enumerate(rows):
            row += [unit_to_uint8(masks[n, k]), branches[n, k], _on_paper(branches[n, k], masks[n, k])]
    return draw_image_grid(rows, captions)


def draw_recomposition_grid(
    originals: np.ndarray, sources: np.ndarray | None, kept: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> Image.Image:
    """Draw edited images, a row for each: the original, the source of its region, the kept part, and the result.

    Args:
        originals: [n, H, W, 3].
        sources: [n, H, W, 3]; None: the region was regenerated or removed.
        kept: share of each original pixel, [n, H, W].
        images: the results, [n, H, W, 3].
        labels: their regions, integers [n, H, W].
    """
    captions = ["original", *([] if sources is None else ["from"]), "kept", "recomposed", "regions"]
    rows = []
    for n, image in enumerate(images):
        source = [] if sources is None else [sources[n]]
        rows.append(
            [originals[n], *source, _on_paper(originals[n], kept[n]), image, overlay_enlarged(image, labels[n])]
        )
    return draw_image_grid(rows, captions)


def build_sequence_rows(
    images: np.ndarray, labels: np.ndarray | None, name: str
) -> tuple[list[list[np.ndarray]], list[Caption]]:
    """Build rows and their captions of sequences of images, uint8 [n, S, H, W, 3], each followed by its regions."""
    rows: list[list[np.ndarray]] = []
    captions: list[Caption] = []
    for n, sequence in enumerate(images):
        rows.append(list(sequence))
        captions.append(f"{name} {n}")
        if labels is not None:
            rows.append([color_labels(label) for label in labels[n]])
            captions.append("regions")
    return rows, captions


def _on_paper(image: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    return np.round(opacity[..., None] * image + (1 - opacity[..., None]) * np.array(PAPER_COLOR)).astype(np.uint8)
