"""Checks without labels of masks of one object in all views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.procedural.flowers import draw_flowers
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff.mask_checks import check_object_masks, measure_shared_colors, shrink
from factorkit.segdiff.alarms import cluster_colors
from factorkit.utils.images import images_to_pixels, pixels_to_signed

COUNT, SIDE = 24, 32


@pytest.fixture(scope="module")
def views():
    return make_procedural_views(COUNT, SIDE, seed=1)


@pytest.fixture(scope="module")
def true_masks(views) -> np.ndarray:
    return views.masks[:, 0].numpy() > 0.5


def put_before(views, backgrounds: np.ndarray) -> np.ndarray:
    """Return the views, uint8 [V, H, W, 3], before backgrounds of the same shape or of one view."""
    opacity = views.masks.movedim(1, -1).numpy()
    return (images_to_pixels(views.images) * opacity + backgrounds * (1 - opacity)).astype(np.uint8)


def divide_by_colors(images: np.ndarray) -> np.ndarray:
    """Return masks bool [V, H, W] of the one of two colour clusters of each image that touches its border least."""
    first = cluster_colors(pixels_to_signed(torch.from_numpy(images)))[:, 0].numpy() > 0.5
    border = np.ones(first.shape[1:], bool)
    border[1:-1, 1:-1] = False
    return np.stack([mask if mask[border].mean() < 0.5 else ~mask for mask in first])


@pytest.mark.parametrize("behind", ["flowers", "one flower", "white"])
def test_check_object_masks_true_masks_before_any_background_pass(views, true_masks, behind):
    backgrounds = {"flowers": draw_flowers(COUNT, SIDE)[0], "one flower": draw_flowers(1, SIDE)[0], "white": 255}
    checks = check_object_masks(put_before(views, np.asarray(backgrounds[behind])), true_masks)
    assert [check.status for check in checks] == ["passed", "passed"]


def test_check_object_masks_of_each_images_own_colours_before_changing_backgrounds_fail(views, true_masks):
    images = put_before(views, draw_flowers(COUNT, SIDE)[0])
    shared, _ = check_object_masks(images, divide_by_colors(images))
    assert shared.status == "failed" and "masks follow the background" in shared.failures[0]


def test_measure_shared_colors_of_wrong_masks_before_one_background_is_about_one(views):
    """What the check cannot see: a background that is the same behind all views."""
    images = put_before(views, draw_flowers(1, SIDE)[0])
    wrong = np.zeros(images.shape[:3], bool)
    wrong[:, 4:28, 4:28] = True
    assert measure_shared_colors(images, wrong) == pytest.approx(1, abs=0.03)


def test_check_object_masks_of_a_part_of_the_scene_reach_the_border(views):
    part = np.zeros((COUNT, SIDE, SIDE), bool)
    part[:, :20] = True
    _, border = check_object_masks(images_to_pixels(views.images), part)
    assert border.value == 1 and "in 100% > 50% of the views they reach the border" in border.failures[0]


def test_check_object_masks_of_few_views_do_not_run(views, true_masks):
    checks = check_object_masks(images_to_pixels(views.images)[:7], true_masks[:7])
    assert [check.status for check in checks] == ["not run", "not run"]


def test_shrink_wide_view_keeps_its_shape_and_its_mask():
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 100:] = 255
    small, inside = shrink(Image.new("RGB", (200, 100), (9, 8, 7)), Image.fromarray(mask))
    assert small.shape == (32, 64, 3) and (small == (9, 8, 7)).all()
    assert inside.shape == (32, 64) and inside[:, 32:].all() and not inside[:, :32].any()
