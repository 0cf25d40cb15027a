"""The field's box holds the object, or an alarm goes off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from factorkit.data.procedural.scene import make_procedural_views, make_scene_field
from factorkit.nerfdiff.box import CUT_SCALE, box_checks, find_foreground
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.scene import Scene, open_scene
from factorkit.nerfdiff.train import estimate, list_notes
from factorkit.utils.errors import ConfigError

CPU = torch.device("cpu")


def fitted_field(scene: Scene):
    """The procedural scene, at whose cameras' distance 4 it fits into a box with sides of 2, inside of the box only."""
    scale = 4.0 / scene.distance

    def field(positions, directions):
        density, color = make_scene_field()(positions * scale, directions)
        return density * scale, color

    return field


def box_side(scene: Scene) -> float:
    return 2 * 4.0 / scene.distance


@pytest.mark.parametrize("fov", [40, 55])
def test_open_scene_object_within_the_images_has_a_box_of_the_frame(fov):
    views = make_procedural_views(12, 24, seed=1, fov=fov)
    scene = open_scene(views, 24, CPU)
    assert scene.distance == pytest.approx(2 * scene.camera.intrinsics[0, 0].item() / 0.9)
    assert "90% of the image" in scene.note


def test_open_scene_images_that_cut_the_object_have_a_larger_box():
    views = make_procedural_views(12, 24, seed=1, fov=16)
    scene = open_scene(views, 24, CPU)
    frame = 2 * scene.camera.intrinsics[0, 0].item() / 0.9
    assert scene.distance == pytest.approx(frame / CUT_SCALE)
    assert box_side(scene) == pytest.approx(2.02, abs=0.05)
    without_masks = open_scene(replace(views, masks=None), 24, CPU)  # the background's colour shows the same
    assert without_masks.distance == scene.distance


def test_open_scene_unknown_foreground_keeps_the_frame():
    views = replace(make_procedural_views(12, 24, seed=1, fov=16), masks=None, background=None)
    assert box_side(open_scene(views, 24, CPU)) == pytest.approx(1.01, abs=0.02)


def test_open_scene_distant_views_of_a_large_object_enlarge_the_box():
    """Half of the cameras are three times as far away, where the same image shows more than the box."""
    views = make_procedural_views(12, 24, seed=1, fov=16)
    poses = views.poses.clone()
    poses[::2, :3, 3] *= 3
    images, masks = views.images.clone(), torch.zeros_like(views.masks)
    masks[::2, :, 2:22, 2:22], masks[1::2, :, 7:17, 7:17] = 1, 1
    scene = open_scene(replace(views, poses=poses, images=images, masks=masks), 24, CPU)
    assert "the foreground of the views" in scene.note
    assert scene.foreground.share_outside(scene.poses) <= 0.01


def project(points, pose):
    local = (points - pose[:, :3, 3]) @ pose[0, :3, :3]
    return local[:, :2] / local[:, 2:]


@pytest.mark.parametrize("turn", [False, True])
def test_open_scene_sparse_points_enlarge_the_box_unless_they_are_behind_the_cameras(turn):
    views = make_procedural_views(12, 24, seed=1, fov=16)
    views = replace(views, masks=None, background=None)
    poses = views.poses.clone()
    points = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    points = torch.cat([1.2 * points, 9 * points])
    if turn:  # y up, and elsewhere
        rotation = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
        poses[:, :3] = rotation @ poses[:, :3]
        poses[:, :3, 3] += 5
        points = points @ rotation.T + 5
    scene = open_scene(replace(views, poses=poses, points=points), 24, CPU)
    assert box_side(scene) == pytest.approx(2.4, abs=0.05)
    assert "the sparse points" in scene.note
    pixels = [project(points[:9], poses[:1]), project(scene.points[:9], scene.poses[:1])]
    torch.testing.assert_close(*pixels, rtol=1e-3, atol=1e-3)  # the points moved as the poses did


def test_open_scene_given_box_is_in_the_units_of_the_poses():
    views = make_procedural_views(12, 24, seed=1)
    assert box_side(open_scene(views, 24, CPU, box=3.0)) == pytest.approx(3.0, abs=0.05)
    poses = views.poses.clone()
    poses[:, :3, 3] *= 1000
    assert box_side(open_scene(replace(views, poses=poses), 24, CPU, box=3000.0)) == pytest.approx(3.0, abs=0.05)
    with pytest.raises(ConfigError, match="units of known poses around an object"):
        open_scene(views, 24, CPU, known_poses=False, box=3.0)
    with pytest.raises(ConfigError, match="length above 0"):
        open_scene(views, 24, CPU, box=0.0)


@pytest.mark.parametrize(("side", "cut"), [(None, False), (3.0, False), (1.1, True), (0.8, True)])
def test_box_checks_fire_only_if_the_box_cuts_the_scene(side, cut):
    scene = open_scene(make_procedural_views(12, 24, seed=1), 24, CPU, box=side)
    checks = box_checks(fitted_field(scene), scene.foreground, scene.poses, "object")
    assert [check.status for check in checks] == (["failed"] * 2 if cut else ["passed"] * 2)
    assert all("--box" in text for check in checks for text in check.failures)


def test_box_checks_of_unknown_foreground_say_that_they_did_not_run():
    views = replace(make_procedural_views(4, 8), masks=None, background=None)
    assert find_foreground(views) is None
    for layout in ("object", "forward"):
        assert [c.status for c in box_checks(None, None, views.poses, layout)] == ["not run"] * 2


def test_estimate_names_the_box(tiny, scene_views):
    settings = {k: v for k, v in tiny.items() if k != "progress"} | {"poses": "known", "box": 3.0}
    assert estimate(scene_views, **settings)["notes"] == [
        "The field's box has sides of 3 units of the poses: as given."
    ]


@pytest.mark.parametrize(("background", "named"), [("given", True), ("learned", False)])
def test_list_notes_unknown_background_is_named(background, named):
    views = replace(make_procedural_views(4, 8), masks=None, background=None)
    notes = list_notes(views, open_scene(views, 8, CPU), preset_config("fast", background=background))
    assert any("taken for black" in note for note in notes) == named
