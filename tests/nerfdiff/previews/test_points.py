from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.procedural.scene import make_procedural_views, make_scene_field
from factorkit.nerfdiff.export.shapes import Shape
from factorkit.nerfdiff.fields.kinds import GridField
from factorkit.nerfdiff.previews.views import (
    POINT_ELEVATION,
    POINT_SIDE,
    _project_points,
    _viewer_axes,
    draw_points,
    save_points,
)
from factorkit.nerfdiff.scene import open_scene
from factorkit.report.image_grid import PAPER_COLOR

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def cloud(*points):
    return Shape(np.array([p for p, _ in points], np.float32), np.array([c for _, c in points], np.uint8))


def where(drawing, color):
    """Mean column and row of a colour."""
    rows, columns = np.nonzero((drawing == color).all(-1))
    return columns.mean(), rows.mean()


def test_draw_points_nearer_point_hides_the_other():
    scene = cloud(
        ((0, 1, 0), RED),
        ((0, -1, 0), GREEN),
        ((0, 0, 1), BLUE),
        ((0, 0, -1), RED),
        ((-1, 0, 0), RED),
        ((1, 0, 0), GREEN),
    )
    ahead = _project_points(scene, _viewer_axes(0.0, 0.0))  # an eye on +x: y is to the right
    middle = ahead[POINT_SIDE // 2, POINT_SIDE // 2]
    assert tuple(middle) == GREEN  # x = 1 before x = -1, although the farther one comes first in the list too
    assert where(ahead, BLUE)[1] < POINT_SIDE / 3
    assert (ahead[:, -POINT_SIDE // 3 :] == RED).all(-1).any() and not (ahead[:, -POINT_SIDE // 3 :] == GREEN).all(
        -1
    ).any()
    behind = _project_points(scene, _viewer_axes(np.pi, 0.0))
    assert tuple(behind[POINT_SIDE // 2, POINT_SIDE // 2]) == RED
    assert (behind[:, : POINT_SIDE // 3] == RED).all(-1).any()
    above = _project_points(scene, _viewer_axes(0.0, np.pi / 2))
    assert tuple(above[POINT_SIDE // 2, POINT_SIDE // 2]) == BLUE


def test_draw_points_order_of_points_does_not_matter():
    for points in ([((1, 0, 0), RED), ((-1, 0, 0), BLUE)], [((-1, 0, 0), BLUE), ((1, 0, 0), RED)]):
        corners = [((0, y, z), GREEN) for y in (-1, 1) for z in (-1, 1)]
        drawing = _project_points(cloud(*points, *corners), _viewer_axes(0.0, 0.0))
        assert tuple(drawing[POINT_SIDE // 2, POINT_SIDE // 2]) == RED and not (drawing == BLUE).all(-1).any()


def test_draw_points_outlier_does_not_shrink_the_scene():
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (2000, 3)).astype(np.float32)
    points[0] = (300, 300, 300)
    drawing = _project_points(
        Shape(points, np.zeros((2000, 3), np.uint8)), _viewer_axes(0.3, np.radians(POINT_ELEVATION))
    )
    assert (drawing != PAPER_COLOR).any(-1).mean() > 0.1


@pytest.mark.parametrize(("forward", "viewpoints"), [(False, 4), (True, 2)])
def test_point_grid_has_every_viewpoint(forward, viewpoints):
    scene = cloud(((0.5, 0.2, -2), RED), ((-0.5, 0.1, -4), RED), ((0.1, -0.6, -3), RED))
    image_grid = draw_points(scene, forward)
    assert image_grid.width > viewpoints * POINT_SIDE and image_grid.width < (viewpoints + 1) * POINT_SIDE
    each = np.split(np.asarray(image_grid)[:, 2 : 2 + viewpoints * (POINT_SIDE + 2)], viewpoints, axis=1)
    assert all((part == RED).all(-1).any() for part in each)
    if forward:  # the farther, the higher up when seen from above
        assert (each[1] == RED).all(-1).any()


@pytest.mark.slow
def test_point_preview_of_a_run_shows_the_scene(tmp_path):
    scene = open_scene(make_procedural_views(12, 24), 24, torch.device("cpu"))
    save_points(tmp_path / "s" / "points.png", make_scene_field(), scene, scene.poses)
    with Image.open(tmp_path / "s" / "points.png") as image_grid:
        assert (np.asarray(image_grid)[20:] != PAPER_COLOR).any(-1).mean() > 0.02
    empty = GridField(4)
    empty.values.data[..., 0] = -10
    save_points(tmp_path / "e" / "points.png", empty, scene, scene.poses)
    assert not (tmp_path / "e").exists()
