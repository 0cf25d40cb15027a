"""Annotations of an image's regions: run lengths for COCO as pycocotools writes them, and polygons.

Run lengths count pixels column by column, beginning with those outside: "size": [H, W], "counts": a string with a
variable number of characters per run length. Polygons are in the formats of COCO, labelme and YOLO.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from factorkit.segdiff.inference.polygons import Polygon, join_holes

LABELME_VERSION = "5.5.0"  # of its format


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask, bool [H, W], as {"size": [H, W], "counts": text}."""
    return {"size": [int(side) for side in mask.shape], "counts": _encode_runs(_run_lengths(mask.ravel(order="F")))}


def make_annotations(labels: np.ndarray, num_regions: int) -> list[dict[str, Any]]:
    """Make one annotation for each region present in ``labels``, integers [H, W].

    Keys: region (0 to K-1), segmentation, area in pixels, and bbox as [left, top, width, height].
    """
    annotations = []
    for region in range(num_regions):
        mask = labels == region
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
        annotations.append({"region": region, "segmentation": encode(mask), "area": int(mask.sum()), "bbox": box})
    return annotations


def _run_lengths(pixels: np.ndarray) -> np.ndarray:
    """Return the lengths of the runs of booleans [N], the first of False (perhaps 0)."""
    ends = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate([[0], ends, [len(pixels)]]))
    return np.concatenate([[0], runs]) if len(pixels) and pixels[0] else runs


def _encode_runs(runs: np.ndarray) -> str:
    """Encode run lengths: from the fourth on, each minus the one two before it, in groups of 5 bits, lowest first.

    A group is a character from "0" on; its sixth bit says that more follow, the last group's highest bit is the sign.
    """
    numbers = runs.astype(np.int64)
    numbers[3:] -= runs[1:-2]
    groups = []
    unfinished = np.ones(len(numbers), bool)
    while unfinished.any():
        low = numbers & 31
        numbers >>= 5
        more = unfinished & (numbers != np.where(low & 16, -1, 0))
        groups.append(np.where(unfinished, low + 32 * more + 48, 0))
        unfinished = more
    characters = np.stack(groups, 1).ravel() if groups else np.zeros(0, np.int64)
    return characters[characters > 0].astype(np.uint8).tobytes().decode("ascii")


def make_polygon_annotations(labels: np.ndarray, polygons: Sequence[Sequence[Polygon]]) -> list[dict[str, Any]]:
    """Make COCO annotations as :func:`make_annotations` does, with polygons for the regions without holes.

    COCO's polygons have no holes: a region with holes keeps its run lengths.
    """
    annotations = make_annotations(labels, len(polygons))
    for annotation in annotations:
        parts = polygons[annotation["region"]]
        if not any(part.holes for part in parts):
            annotation["segmentation"] = [part.outer.ravel().tolist() for part in parts]
    return annotations


def make_labelme(polygons: Sequence[Sequence[Polygon]], size: tuple[int, int], image_path: str) -> str:
    """Return labelme's JSON; components of one region share a group, and cuts without width lead to holes."""
    shapes = [
        {
            "label": f"region {k}",
            "points": join_holes(part).tolist(),
            "group_id": k if len(parts) > 1 else None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
        for k, parts in enumerate(polygons)
        for part in parts
    ]
    return json.dumps(
        {
            "version": LABELME_VERSION,
            "flags": {},
            "shapes": shapes,
            "imagePath": image_path,
            "imageData": None,  # labelme reads the file
            "imageHeight": size[1],
            "imageWidth": size[0],
        }
    )


def make_yolo(polygons: Sequence[Sequence[Polygon]], size: tuple[int, int]) -> str:
    """Return YOLO's lines, one a component: region, then x and y of each corner in widths and heights of the image."""
    lines = []
    for k, parts in enumerate(polygons):
        for part in parts:
            corners = join_holes(part) / size
            lines.append(" ".join([str(k), *(f"{value:.6f}" for value in corners.ravel())]))
    return "".join(f"{line}\n" for line in lines)
