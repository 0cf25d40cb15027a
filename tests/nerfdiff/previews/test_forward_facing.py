"""Forward-facing scenes on the screen: the viewer's renders and points, and cameras drawn in their plane."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factorkit.nerfdiff import viewer
from factorkit.nerfdiff.cameras.poses import forward_facing_poses
from factorkit.nerfdiff.fields.base import occupied_sampling
from factorkit.nerfdiff.previews.cameras import SIDE, draw_plane
from factorkit.nerfdiff.previews.views import draw_denoising_grid
from factorkit.nerfdiff.viewer import Viewer, ViewerScene, fov_and_aspect, from_viser, render_viewpoint
from factorkit.report.image_grid import palette
from tests.nerfdiff.forward import CENTRE, RADIUS, WALL, ball_and_wall, forward_views

BLUE = palette(1)[0].astype(int)


@pytest.fixture(scope="module")
def contents():
    views = forward_views(size=(18, 24), columns=3, rows=2)
    return ViewerScene(3, ball_and_wall, views, views.background, true=views.poses)


@pytest.fixture(scope="module")
def sampling():
    return occupied_sampling(ball_and_wall, (-1.0,) * 3, (1.0,) * 3)


def test_render_viewpoint_equals_the_image_of_that_camera(contents, sampling):
    views = contents.views
    fov, _ = fov_and_aspect(views.intrinsics[0], *views.size)
    for i in (0, 5):
        drawing = render_viewpoint(contents, sampling, views.poses[i], fov, *views.size)
        difference = (torch.from_numpy(drawing).permute(2, 0, 1) / 255 - views.images[i]).abs()
        assert difference.mean() < 0.06
    assert (views.images[0] - views.images[5]).abs().mean() > 0.1


def test_forward_preview_behind_the_cameras_is_empty(contents, sampling):
    back = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0]))  # looks along +z
    drawing = render_viewpoint(contents, sampling, back, 0.8, 6, 8)
    assert (drawing == np.array([0, 0, 255])).all()
    assert (render_viewpoint(contents, sampling, torch.eye(4), 0.8, 6, 8)[..., 0] > 20).all()


def test_forward_preview_points_and_frusta_are_in_camera_space(contents, monkeypatch):
    monkeypatch.setattr(viewer, "MAX_POINTS", 600)
    with Viewer(contents, port=18100) as opened:
        scene = opened.server.scene
        points = scene.get_handle_by_name("/points/cloud").points
        off = np.minimum(np.abs(np.linalg.norm(points - CENTRE.numpy(), axis=1) - RADIUS), np.abs(-points[:, 2] - WALL))
        assert len(points) > 300 and np.median(off) < 0.3
        handle = scene.get_handle_by_name("/predicted/0004")
        torch.testing.assert_close(from_viser(handle.wxyz, handle.position), contents.views.poses[4], atol=1e-5, rtol=0)
        assert handle.scale == pytest.approx(0.06)


def spots(drawing, color=BLUE, tolerance=40):
    """Pixels (right, down) of a colour in each half, [N, 2] each."""
    pixels = np.asarray(drawing).astype(int)
    halves = pixels[:, :SIDE], pixels[:, SIDE:]
    return [np.argwhere(np.abs(half - color).max(axis=2) < tolerance)[:, ::-1] for half in halves]


def test_draw_plane_places_cameras_as_they_see_it():
    poses = forward_facing_poses(torch.tensor([[-0.5, 0.0, 0.0], [0.5, 0.25, 0.0], [0.0, -0.25, 0.0]]))
    behind, above = spots(draw_plane(poses))
    for x, y in ((-0.5, 0.0), (0.5, 0.25), (0.0, -0.25)):  # the widest side fills 0.8 of the half
        expected = SIDE * np.array([0.5 + 0.8 * x, 0.5 - 0.8 * y])
        assert np.linalg.norm(behind - expected, axis=1).min() < 1.5
    assert above[:, 1].min() < SIDE / 2 - 20 and above[:, 1].max() < SIDE / 2 + 4  # they look ahead, which is upwards
    turned = poses.clone()
    turned[:, :3, :3] = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])  # all look to the right
    _, above = spots(draw_plane(turned))
    assert above[:, 0].max() > SIDE * 0.9 + 20 and above[:, 1].min() > SIDE / 2 - 5


def test_draw_plane_candidates_are_grey():
    poses = forward_facing_poses(torch.tensor([[-0.1, 0.0, 0.0], [0.1, 0.0, 0.0]]))
    candidates = forward_facing_poses(torch.tensor([[-0.4, 0.4, 0.0], [0.4, -0.4, 0.0]]))
    alone, among = (np.asarray(draw_plane(poses, c)).astype(int) for c in (None, candidates[None]))
    assert np.ptp(spots(alone)[0][:, 0]) > 2 * np.ptp(spots(among)[0][:, 0])
    grey = spots(among, np.array([150, 150, 150]), 20)[0]
    assert len(grey) >= 4 and grey[:, 0].min() == pytest.approx(0.1 * SIDE, abs=3)
    assert np.asarray(draw_plane(poses[:1])).shape == (SIDE, 2 * SIDE, 3)  # one place alone has no extent


def test_denoising_grid_forward_facing_draws_the_plane():
    frames = [torch.rand(2, 3, 8, 8) for _ in range(3)]
    cameras = [forward_facing_poses(torch.tensor([[0.1 * i, 0.2, 0.0], [-0.3, 0.0, 0.0]])) for i in range(3)]
    grids = [np.asarray(draw_denoising_grid(frames, cameras, [9, 5, 0], layout=x)) for x in ("object", "forward")]
    assert grids[0].shape == grids[1].shape and (grids[0] != grids[1]).any()
