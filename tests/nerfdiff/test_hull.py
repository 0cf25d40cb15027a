"""Whether silhouettes fit one object at the cameras found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff.hull import carve_hull, hull_check, render_silhouette
from factorkit.nerfdiff.scene import open_scene


@pytest.fixture(scope="module")
def scene():
    return open_scene(make_procedural_views(24, 24, seed=1), 24, torch.device("cpu"))


def test_hull_check_true_masks_and_cameras_pass(scene):
    check = hull_check(scene.foreground, scene.poses)
    assert check.status == "passed" and check.value > 0.85


def test_hull_check_cameras_of_other_views_fail(scene):
    check = hull_check(scene.foreground, scene.poses.roll(7, 0))
    assert check.status == "failed" and "silhouettes do not fit one object" in check.failures[0]


def test_hull_check_masks_with_parts_of_a_background_fail(scene):
    masks, generator = scene.foreground.masks.clone(), torch.Generator().manual_seed(0)
    for mask in masks:  # another block of background in each view, and another part of the object missing
        top, left, lost = torch.randint(1, 10, (3,), generator=generator).tolist()
        mask[:, lost + 4 : lost + 10] = False
        mask[top : top + 13, left : left + 13] = True
    check = hull_check(replace(scene.foreground, masks=masks), scene.poses)
    assert check.status == "failed" and check.value < 0.75


def test_hull_check_few_wrong_masks_pass(scene):
    masks = scene.foreground.masks.clone()
    masks[0, :, :12] = False
    assert hull_check(replace(scene.foreground, masks=masks), scene.poses).status == "passed"


def test_hull_check_pixels_that_are_not_scored_decide_nothing(scene):
    masks, scored = scene.foreground.masks.clone(), scene.foreground.scored.clone()
    scored[:12, :, :12] = masks[:12, :, :12] = False  # of half of the views, so that the hull goes on there
    check = hull_check(replace(scene.foreground, masks=masks, scored=scored), scene.poses)
    assert check.value == pytest.approx(hull_check(scene.foreground, scene.poses).value, abs=0.03)


@pytest.mark.parametrize("case", ["no foreground", "unbounded", "few views", "cut by the images"])
def test_hull_check_where_it_cannot_judge_is_not_run(scene, case):
    foreground = None if case == "no foreground" else scene.foreground
    if case == "cut by the images":
        foreground = replace(scene.foreground, masks=torch.ones_like(scene.foreground.masks))
    poses = scene.poses[:7] if case == "few views" else scene.poses
    check = hull_check(foreground, poses, unbounded=case == "unbounded")
    assert check.status == "not run" and check.not_run.startswith("since ")


def test_render_silhouette_of_a_whole_hull_covers_what_the_box_does(scene):
    foreground = replace(scene.foreground, masks=torch.ones_like(scene.foreground.masks))
    hull = carve_hull(foreground, scene.poses)
    assert hull.float().mean() > 0.6  # but for corners that few views see
    silhouette = render_silhouette(hull, scene.poses[0], foreground.intrinsics[0], 24, 24)
    assert silhouette[12, 12] and silhouette.float().mean() > 0.6
