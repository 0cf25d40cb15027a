"""Polygons of an image's regions in the formats of COCO, labelme and YOLO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from factorkit.segdiff.inference.coco_rle import make_annotations
from factorkit.segdiff.inference.polygons import Polygon, join_holes

LABELME_VERSION = "5.5.0"  # of its format


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
