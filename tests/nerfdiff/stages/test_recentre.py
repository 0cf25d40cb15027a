from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from factorkit.data.procedural.scene import make_procedural_views, make_scene_field
from factorkit.nerfdiff import config as nerfdiff_config
from factorkit.nerfdiff.box import Foreground
from factorkit.nerfdiff.cameras.poses import OrbitPoses, direction_vectors, orbit_poses
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.scene import Scene, open_scene
from factorkit.nerfdiff.stages.recentre import (
    MAX_SIZE_SPREAD,
    aim_from_offsets,
    directions_with_aim,
    foreground_offsets,
    is_unevenly_framed,
    offset_spread,
    recentre_scene,
    size_spread,
)
from factorkit.nerfdiff.train import choose_capture_settings, list_notes

CPU = torch.device("cpu")
INTRINSICS = torch.tensor([[48.0, 0, 24], [0, 48, 24], [0, 0, 1]])  # pixels of masks of 48 x 48


def make_masks(*boxes: tuple[int, int, int, int]) -> Foreground:
    masks = torch.zeros(len(boxes), 48, 48, dtype=torch.bool)
    for mask, (top, bottom, left, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return Foreground(masks, torch.ones_like(masks), INTRINSICS.expand(len(boxes), 3, 3))


@pytest.fixture(scope="module")
def shifted() -> Scene:
    """Views of 24 pixels moved by up to 3 pixels each way."""
    views = make_procedural_views(12, 24, seed=0)
    shifts = torch.randint(-3, 4, (12, 2), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = zip(views.images, shifts, strict=True)
    rolled = [F.pad(image - 1, (4, 4, 4, 4))[:, 4 - y : 28 - y, 4 - x : 28 - x] + 1 for image, (x, y) in pairs]
    return open_scene(replace(views, images=torch.stack(rolled), masks=None), 24, CPU, False)


def test_foreground_offsets_are_centroids_in_focal_lengths():
    offsets = foreground_offsets(make_masks((10, 20, 20, 40), (30, 40, 4, 24)))
    assert torch.allclose(offsets, torch.tensor([[6.0, -9], [-10, 11]]) / 48)


def test_foreground_offsets_of_cut_and_empty_views_are_drawn_to_the_median():
    boxes = [(20, 30, 20, 30)] * 5 + [(0, 48, 0, 20), (36, 48, 30, 38), (0, 0, 0, 0)]
    offsets = foreground_offsets(make_masks(*boxes))
    median = torch.tensor([1.0, 1.0]) / 48
    assert torch.allclose(offsets[[5, 7]], median.expand(2, 2)), "cut from border to border, and empty"
    assert (offsets[6] > median).all() and (offsets[6] <= torch.tensor([10.0, 18.0]) / 48).all()
    assert torch.equal(foreground_offsets(make_masks((0, 0, 0, 0), (0, 48, 0, 48))), torch.zeros(2, 2))


def test_offset_spread_ignores_one_height_of_all_views():
    relative = INTRINSICS / torch.tensor([48.0, 48, 1])[:, None]
    assert offset_spread(torch.tensor([[0.0, 0.3], [0.0, 0.3]]), relative) == 0
    assert offset_spread(torch.tensor([[0.1, 0.0], [0.1, 0.2]]), relative) == pytest.approx(0.02**0.5)


def test_recentre_scene_undoes_shifts_of_the_images(shifted):
    centred = open_scene(make_procedural_views(12, 24, seed=0), 24, CPU, False)
    moved = recentre_scene(shifted, foreground_offsets(shifted.foreground))
    straight = recentre_scene(centred, foreground_offsets(centred.foreground))
    assert (moved.images - straight.images).square().mean() < 0.1 * (shifted.images - centred.images).square().mean()
    assert moved.poses is shifted.poses and moved.camera is shifted.camera


def test_recentre_scene_moves_loss_masks_with_the_images(shifted):
    scored = torch.ones(12, 1, 24, 24)
    moved = recentre_scene(replace(shifted, loss_masks=scored), torch.full((12, 2), 0.25)).loss_masks
    assert moved[:, :, 0, 0].all() and not moved[:, :, -1].any() and not moved[:, :, :, -1].any()


def test_directions_with_aim_keep_position_and_show_the_origin_at_the_offset():
    positions = direction_vectors(torch.tensor([10.0, 200, 300]), torch.tensor([5.0, 40, 70]))
    offsets = torch.tensor([[0.2, 0.1], [-0.15, 0.2], [0.0, -0.25]])
    aim = aim_from_offsets(offsets)
    poses = orbit_poses(directions_with_aim(positions, aim), 3.0, {"aim": aim})
    assert torch.allclose(F.normalize(poses[:, :3, 3], dim=1), positions, atol=1e-5)
    local = (-poses[:, None, :3, 3] @ poses[:, :3, :3])[:, 0]  # the origin, y up and looking along -z
    assert torch.allclose(local[:, :2] / -local[:, 2:] * torch.tensor([1, -1]), offsets, atol=1e-5)


def test_recentred_view_is_like_that_of_a_camera_that_looks_at_the_origin():
    scene = open_scene(make_procedural_views(4, 32, seed=0), 32, CPU, False)
    positions = direction_vectors(torch.tensor([10.0, 100, 200, 300]), torch.tensor([5.0, 20, 40, 60]))
    offsets = torch.tensor([[0.1, 0.1], [-0.1, 0.1], [0.1, 0.0], [0.0, -0.1]])
    aim = aim_from_offsets(offsets)
    poses = OrbitPoses(directions_with_aim(positions, aim), scene.distance, ["aim"])
    poses.freedom["aim"].data.copy_(aim)
    field = make_scene_field()
    seen = render_views(field, poses().detach(), scene.camera, (32, 32), 48).color.movedim(-1, 1)
    centred = render_views(field, orbit_poses(positions, scene.distance), scene.camera, (32, 32), 48).color
    moved = recentre_scene(replace(scene, images=seen), offsets).images
    difference = (moved - centred.movedim(-1, 1)).square().mean()
    assert difference < 0.2 * (seen - centred.movedim(-1, 1)).square().mean()


def test_size_spread_is_that_of_distances_and_a_few_wrong_masks_do_not_count():
    boxes = [(24 - r, 24 + r, 24 - r, 24 + r) for r in (8, 10, 12, 14, 16)]
    assert size_spread(make_masks(*boxes)) == pytest.approx(0.2, abs=0.06) and MAX_SIZE_SPREAD < 0.14
    assert size_spread(make_masks(*[boxes[2]] * 18, (0, 0, 0, 0), (12, 36, 12, 24))) == 0
    assert size_spread(make_masks((0, 0, 0, 0))) == 0


def test_choose_capture_settings_views_of_changing_size_get_distance():
    views = make_procedural_views(12, 24, seed=0)
    zoomed = make_masks(*[(24 - r, 24 + r, 24 - r, 24 + r) for r in range(8, 20)])
    scene = replace(open_scene(views, 24, CPU, False), foreground=zoomed)
    assert choose_capture_settings(preset_config("fast"), scene).optimize_camera == ("aim", "distance", "roll")


def test_choose_capture_settings_off_centre_views_get_aim(shifted):
    centred = open_scene(make_procedural_views(12, 24, seed=0), 24, CPU, False)
    config = preset_config("fast")
    assert (
        is_unevenly_framed(shifted)
        and not is_unevenly_framed(centred)
        and not is_unevenly_framed(replace(shifted, foreground=None))
    )
    assert choose_capture_settings(config, shifted).optimize_camera == ("aim", "distance", "roll")
    assert choose_capture_settings(config, centred).optimize_camera == ()
    for changes in ({"optimize_camera": ("roll",)}, {"search": "joint"}, {"poses": "known"}):
        chosen = choose_capture_settings(preset_config("fast", **changes), shifted)
        assert chosen.optimize_camera == changes.get("optimize_camera", ())


def test_choose_capture_settings_views_of_a_capture_are_drawn_often_enough_unless_steps_are_given(shifted, monkeypatch):
    centred = open_scene(make_procedural_views(12, 24, seed=0), 24, CPU, False)
    config = preset_config("fast")
    usual, by_sfm = config.field_steps, {"search": "sfm", "optimize_camera": ("focal",)}
    assert choose_capture_settings(config, shifted).field_steps == usual
    monkeypatch.setattr(nerfdiff_config, "VIEW_DRAWS", 1001)
    chosen = choose_capture_settings(config, shifted)
    assert chosen.field_steps == 751 > usual  # 12 views, 16 of them in each step
    assert choose_capture_settings(preset_config("fast", ordered="yes"), centred).field_steps == 751
    assert choose_capture_settings(preset_config("fast", views_per_step=4), shifted).field_steps == 3003
    assert choose_capture_settings(preset_config("fast", field_steps=300), shifted).field_steps == 300
    for unchanged, scene in (({}, centred), ({"poses": "known"}, shifted), (by_sfm, shifted)):
        assert choose_capture_settings(preset_config("fast", **unchanged), scene).field_steps == usual
    stored = {"scene": {}, "field": "grid", "field_steps": usual}
    assert choose_capture_settings(config, shifted, stored).field_steps == usual
    assert choose_capture_settings(config, shifted, stored | {"field_steps": 777}).field_steps == 777
    views = make_procedural_views(2, 4)
    assert f"field_steps=751, more than {usual}" in " ".join(list_notes(views, shifted, chosen, config))
    assert "field_steps" not in " ".join(list_notes(views, shifted, config, config))
