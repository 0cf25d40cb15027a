"""The viewer serves a page, places cameras and points where they are, and renders what a visitor looks at."""

from __future__ import annotations

import math
import sys
import threading
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from factorkit.data import make_procedural_views
from factorkit.nerfdiff import viewer
from factorkit.nerfdiff.fields.base import occupied_sampling
from factorkit.nerfdiff.viewer import (
    RenderThread,
    Viewer,
    ViewerScene,
    fov_and_aspect,
    from_viser,
    render_viewpoint,
    to_viser,
)
from factorkit.utils.errors import ConfigError

BOX = (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)
WAIT = 60  # seconds that no test takes unless something hangs


def ball(positions, directions):
    """A solid ball of radius 0.6, coloured by place."""
    return 200 * (positions.norm(dim=1) < 0.6).float(), (positions + 1) / 2


@pytest.fixture(scope="module")
def contents():
    views = make_procedural_views(4, 12, seed=1)
    return ViewerScene(7, ball, views, torch.tensor([0.0, 0.0, 1.0]), true=views.poses)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(viewer, "MAX_POINTS", 300)
    monkeypatch.setattr(viewer, "RENDER_SIDES", (8, 16))


def test_to_viser_from_viser_round_trip(contents):
    for pose in contents.views.poses:
        wxyz, position = to_viser(pose)
        torch.testing.assert_close(from_viser(wxyz, position), pose, atol=1e-5, rtol=0)
        torch.testing.assert_close(from_viser(-3 * wxyz, position), pose, atol=1e-5, rtol=0)
    # viser's own camera without any turn looks along z with y down.
    looking = from_viser(np.array([1.0, 0, 0, 0]), np.zeros(3))
    assert (-looking[:3, 2]).tolist() == [0, 0, 1] and looking[:3, 1].tolist() == [0, -1, 0]


def test_fov_and_aspect_match_the_intrinsics():
    fov, aspect = fov_and_aspect(torch.tensor([[20.0, 0, 8], [0, 10.0, 5], [0, 0, 1]]), 10, 16)
    assert fov == pytest.approx(2 * math.atan(0.5)) and aspect == pytest.approx((16 / 20) / (10 / 10))


@pytest.mark.slow
def test_render_viewpoint_equals_the_image_of_that_camera():
    from factorkit.data.procedural.scene import make_scene_field

    views, field = make_procedural_views(2, 24, seed=1), make_scene_field()
    contents = ViewerScene(0, field, views, torch.ones(3))
    fov, _ = fov_and_aspect(views.intrinsics[0], 24, 24)
    drawing = render_viewpoint(contents, occupied_sampling(field, *BOX), views.poses[1], fov, 24, 24)
    difference = (torch.from_numpy(drawing).permute(2, 0, 1) / 255 - views.images[1]).abs()
    assert difference.mean() < 0.02
    wide = render_viewpoint(contents, occupied_sampling(field, *BOX), views.poses[1], fov, 24, 40)
    assert wide.shape == (24, 40, 3)
    np.testing.assert_allclose(wide[:, 8:32].astype(int), drawing, atol=3)


def test_render_viewpoint_outdated_request_stops(contents, monkeypatch):
    monkeypatch.setattr(viewer, "RAYS_PER_CHUNK", 32)
    calls = []

    def stop():
        calls.append(None)
        return len(calls) == 3

    sampling = occupied_sampling(ball, *BOX)
    assert render_viewpoint(contents, sampling, contents.views.poses[0], 0.6, 16, 16, stop) is None
    assert len(calls) == 3


class Client:
    """What the painter needs of a viser client."""

    def __init__(self, number, pose, aspect=1.0):
        wxyz, position = to_viser(pose)
        self.client_id = number
        self.camera = SimpleNamespace(wxyz=wxyz, position=position, fov=0.6, aspect=aspect)
        self.scene = self
        self.images, self.came = [], threading.Semaphore(0)

    def set_background_image(self, drawing, format="auto"):
        self.images.append(drawing)
        self.came.release()

    def wait(self, count):
        assert all(self.came.acquire(timeout=WAIT) for _ in range(count))


def test_render_thread_sends_growing_images_to_each_client(contents, small):
    render_thread = RenderThread()
    try:
        clients = [Client(0, contents.views.poses[0]), Client(1, contents.views.poses[1], aspect=0.5)]
        render_thread.request(clients[0])  # before there is anything to show: nothing is lost
        render_thread.set_scene(contents)
        render_thread.request(clients[0])
        clients[0].wait(2)
        render_thread.request(clients[1])
        clients[1].wait(2)
    finally:
        render_thread.close()
    assert [drawing.shape for drawing in clients[0].images[-2:]] == [(8, 8, 3), (16, 16, 3)]
    assert [drawing.shape for drawing in clients[1].images] == [(8, 4, 3), (16, 8, 3)]
    middle, corner = clients[0].images[-1][8, 8], clients[0].images[-1][0, 0]
    assert corner.tolist() == [0, 0, 255]
    eye = contents.views.poses[0, :3, 3]
    rendered = (0.6 * eye / eye.norm() + 1) / 2 * 255
    np.testing.assert_allclose(middle, rendered, atol=12)


def test_viewer_serves_cameras_and_points(contents, small):
    with Viewer(contents, port=18080) as opened:
        assert b"viser" in urllib.request.urlopen(opened.url, timeout=WAIT).read()
        scene = opened.server.scene
        for i in range(4):
            for name in ("/predicted", "/true"):
                handle = scene.get_handle_by_name(f"{name}/{i:04d}")
                pose = from_viser(handle.wxyz, handle.position)
                torch.testing.assert_close(pose, contents.views.poses[i], atol=1e-5, rtol=0)
        points = scene.get_handle_by_name("/points/cloud").points
        assert len(points) > 50 and np.abs(np.linalg.norm(points, axis=1) - 0.6).max() < 0.05
        assert "Step 7" in opened._step.content
        box = opened._boxes["/true"]
        box.value = False
        opened._set_visible("/true")
        assert scene.get_handle_by_name("/true").visible is False
        from dataclasses import replace

        opened.show(replace(contents, step=9, true=None, views=contents.views.select([2])))
        assert opened._boxes["/true"].visible is False  # no true camera is known
        assert "Step 9" in opened._step.content and scene.get_handle_by_name("/true").visible is False
        gone = [scene.get_handle_by_name(name) for name in ("/true/0000", "/predicted/0001")]
        assert gone == [None, None] and scene.get_handle_by_name("/predicted/0000") is not None


def test_viewer_empty_scene_has_no_points(contents, small):
    from dataclasses import replace

    def empty(positions, directions):
        return torch.zeros(len(positions)), torch.zeros(len(positions), 3)

    with Viewer(replace(contents, field=empty), port=18090) as opened:
        assert opened.server.scene.get_handle_by_name("/points/cloud") is None
        assert opened.server.scene.get_handle_by_name("/predicted/0000") is not None


def test_viewer_without_viser_names_the_extra(contents, monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(ConfigError, match=r"factorkit\[viewer\]"):
        Viewer(contents)
