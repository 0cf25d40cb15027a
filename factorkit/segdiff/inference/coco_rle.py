"""COCO's run lengths: how a region is written into annotations, and read by every tool of the field.

Pixels are counted column by column, beginning with those outside: "size": [H, W], "counts": a string in which each
length takes as many characters as it needs (the compressed form of pycocotools' `encode`).
"""

from typing import Any

import numpy as np


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask, bool [H, W], as {"size": [H, W], "counts": text}."""
    return {"size": [int(side) for side in mask.shape], "counts": _text(_runs(mask.ravel(order="F")))}


def annotations(labels: np.ndarray, regions: int) -> list[dict[str, Any]]:
    """One annotation for each region there is in ``labels``, integers [H, W]: region (0 to regions-1), segmentation,
    area in pixels, and bbox as [left, top, width, height]."""
    found = []
    for region in range(regions):
        mask = labels == region
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
        found.append({"region": region, "segmentation": encode(mask), "area": int(mask.sum()), "bbox": box})
    return found


def _runs(pixels: np.ndarray) -> np.ndarray:
    """Lengths of the runs of booleans [N], the first of False (perhaps 0)."""
    ends = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate([[0], ends, [len(pixels)]]))
    return np.concatenate([[0], runs]) if len(pixels) and pixels[0] else runs


def _text(runs: np.ndarray) -> str:
    """Each number, from the fourth on less the one two before it, in groups of 5 bits, least first, each a character
    from "0" on; the sixth bit says that more follow, the last group's highest bit is the sign."""
    numbers = runs.astype(np.int64)
    numbers[3:] -= runs[1:-2]
    groups = []
    going = np.ones(len(numbers), bool)
    while going.any():
        low = numbers & 31
        numbers >>= 5
        more = going & (numbers != np.where(low & 16, -1, 0))
        groups.append(np.where(going, low + 32 * more + 48, 0))
        going = more
    characters = np.stack(groups, 1).ravel() if groups else np.zeros(0, np.int64)
    return characters[characters > 0].astype(np.uint8).tobytes().decode("ascii")
