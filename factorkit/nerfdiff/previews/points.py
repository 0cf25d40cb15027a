"""A picture of a point cloud, for who has no viewer at hand."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from factorkit.nerfdiff.export.mesh import Shape
from factorkit.report.image_grid import PAPER_COLOR, draw_image_grid

SIDE = 240  # pixels of each look
DOT = 2  # pixels a point is wide
RISE = 25.0  # degrees above the horizon from which an object is looked at
TURNS = (0, 90, 180, 270)  # and from which sides
WHOLE = 0.98  # share of the points that a look shows along each direction: strays should not make the rest small


def points_picture(cloud: Shape, forward: bool) -> Image.Image:
    """Coloured points, the nearer ones before the others, without perspective.

    Args:
        cloud: of an object with z up, seen from four sides and from a little above; or of a forward-facing scene, seen
            as the cameras see it and from above.
        forward: which of them.
    """
    if forward:
        looks = {"ahead": np.eye(3), "from above": np.array([[1.0, 0, 0], [0, 0, -1.0], [0, 1.0, 0]])}
    else:
        looks = {f"from {turn} degrees": _side(math.radians(turn), math.radians(RISE)) for turn in TURNS}
    return draw_image_grid([[_look(cloud, axes) for axes in looks.values()]], list(looks), cell=SIDE)


def _side(turn: float, rise: float) -> np.ndarray:
    """Right, up and towards the eye, as rows, of one who looks at the origin from an azimuth and an elevation."""
    towards = np.array([math.cos(rise) * math.cos(turn), math.cos(rise) * math.sin(turn), math.sin(rise)])
    right = np.array([-math.sin(turn), math.cos(turn), 0.0])
    return np.stack([right, np.cross(towards, right), towards])


def _look(cloud: Shape, axes: np.ndarray) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3] with the points on paper, the one with most of the last axis on top."""
    right, up, near = axes @ cloud.points.T
    low, high = np.quantile([right, up], [(1 - WHOLE) / 2, (1 + WHOLE) / 2], axis=1)
    scale = 0.9 * SIDE / max(*(high - low), 1e-9)
    column, row = (
        np.round(SIDE / 2 + sign * scale * (values - middle)).astype(int)
        for sign, values, middle in zip((1, -1), (right, up), (low + high) / 2, strict=True)
    )
    picture = np.full((SIDE + DOT, SIDE + DOT, 3), PAPER_COLOR, np.uint8)
    seen = (column >= 0) & (column < SIDE) & (row >= 0) & (row < SIDE)
    order = np.flatnonzero(seen)[np.argsort(near[seen], kind="stable")]  # where a pixel is set twice the last one stays
    for down in range(DOT):
        for across in range(DOT):
            picture[row[order] + down, column[order] + across] = cloud.colors[order]
    return picture[:SIDE, :SIDE]
