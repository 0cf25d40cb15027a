from __future__ import annotations

import numpy as np
import pytest

from factorkit.report.image_grid import make_label_image, make_mask_image, overlay_regions, palette
from factorkit.segdiff.previews import draw_generation_grid, draw_segmentation_grid, draw_trajectory_grid

RED, GREEN, BLUE = (np.full((32, 32, 3), color, np.uint8) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
LINE = 18  # height of a line of captions


def make_halves(n: int = 1, size: int = 32) -> np.ndarray:
    """Masks [n, 2, size, size] of the left and the right half."""
    left = np.zeros((n, size, size))
    left[:, :, : size // 2] = 1
    return np.stack([left, 1 - left], axis=1)


def test_label_image_keeps_labels_and_shows_colours():
    labels = np.arange(256).reshape(16, 16)
    image = make_label_image(labels)
    assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
    assert np.array_equal(np.asarray(image.convert("RGB")), palette(256)[labels])


@pytest.mark.parametrize("label", [-1, 256])
def test_label_image_label_out_of_range_raises(label):
    with pytest.raises(ValueError, match=str(label)):
        make_label_image(np.array([[0, label]]))


def test_mask_image_rounds_and_clips():
    image = make_mask_image(np.array([[0.0, 0.5, 1.0], [-0.2, 1.3, 0.999]], np.float32))
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 128, 255], [0, 255, 255]]


def test_overlay_tints_regions_and_draws_white_borders():
    labels = np.zeros((6, 6), int)
    labels[:, 3:] = 1
    labels[4:] = 2
    image = np.full((6, 6, 3), 100, np.uint8)
    tinted = overlay_regions(image, labels, alpha=0.25)
    line = np.zeros((6, 6), bool)
    line[:4, 2] = True  # left of the border between 0 and 1
    line[3] = True  # above region 2
    assert tinted.dtype == np.uint8
    assert (tinted[line] == 255).all()
    expected = np.round(75 + 0.25 * palette(3)[labels])
    assert np.array_equal(tinted[~line], expected[~line])
    assert (image == 100).all()


def test_overlay_one_region_has_no_borders():
    image = np.zeros((4, 4, 3), np.uint8)
    assert np.array_equal(overlay_regions(image, np.zeros((4, 4), int), alpha=0), image)


def test_segmentation_grid_columns_are_image_regions_truth_masks_branches():
    images = np.stack([RED, GREEN])
    masks = make_halves(2)
    branches = np.zeros((2, 2, 32, 32, 3))
    branches[:, 1] = (0, 0, 1)
    truth = np.zeros((2, 32, 32), bool)
    truth[1] = True
    grid = np.asarray(draw_segmentation_grid(images, masks, branches, truth))
    assert grid.shape == (LINE + 2 + 2 * 98, 2 + 7 * 98, 3)

    def cell(row: int, column: int) -> np.ndarray:
        y, x = LINE + 2 + row * 98, 2 + column * 98
        return grid[y : y + 96, x : x + 96]

    assert (cell(0, 0) == (255, 0, 0)).all() and (cell(1, 0) == (0, 255, 0)).all()
    lines = (cell(0, 1) == 255).all(-1)
    assert lines[:, 47].all() and lines.sum() == 96  # one screen pixel wide, not one enlarged pixel
    assert (cell(0, 2) == 0).all() and (cell(1, 2) == 255).all()
    assert (cell(0, 3)[:, :48] == 255).all() and (cell(0, 3)[:, 48:] == 0).all()
    assert (cell(1, 4)[:, :48] == 0).all() and (cell(1, 4)[:, 48:] == 255).all()
    assert (cell(0, 5) == 0).all() and (cell(1, 6) == (0, 0, 255)).all()


def test_segmentation_grid_without_branches_and_truth_is_narrower():
    assert draw_segmentation_grid(RED[None], make_halves()).size == (2 + 4 * 98, LINE + 2 + 98)


def test_segmentation_grid_single_region_works():
    assert draw_segmentation_grid(RED[None], np.ones((1, 1, 32, 32))).size == (2 + 3 * 98, LINE + 2 + 98)


def test_generation_grid_wraps_lines():
    images = np.stack([RED, GREEN, BLUE])
    grid = np.asarray(draw_generation_grid(images, make_halves(3), per_line=2))
    left = grid.shape[1] - (2 + 2 * 98)
    assert grid.shape[0] == 2 + 2 * 4 * 98 and left > 0
    assert (grid[2:98, left + 100 : left + 196] == (0, 255, 0)).all()
    below = 2 + 4 * 98
    assert (grid[below : below + 96, left + 2 : left + 98] == (0, 0, 255)).all()
    mask = grid[2 + 2 * 98 : 98 + 2 * 98, left + 2 : left + 98]
    assert (mask[:, :48] == 255).all() and (mask[:, 48:] == 0).all()


def test_generation_grid_uses_given_labels():
    with_lines = np.asarray(draw_generation_grid(RED[None], make_halves()))
    without = np.asarray(draw_generation_grid(RED[None], make_halves(), labels=np.zeros((1, 32, 32), int)))
    white = [(grid[100:196, -98:-2] == 255).all(-1).sum() for grid in (with_lines, without)]
    assert white == [96, 0]


def test_trajectory_grid_has_samples_in_rows_and_steps_in_columns():
    frames = [np.stack([RED, GREEN]), np.stack([BLUE, BLUE]), np.stack([RED, RED])]
    labels = [np.full((2, 32, 32), step) for step in range(3)]
    grid = np.asarray(draw_trajectory_grid(frames, labels, times=[900, 500, 0]))
    left = grid.shape[1] - (2 + 3 * 98)
    assert grid.shape[0] == LINE + 2 + 4 * 98

    def center(row: int, column: int) -> tuple[int, ...]:
        return tuple(grid[LINE + 2 + row * 98 + 48, left + 2 + column * 98 + 48])

    assert center(0, 0) == (255, 0, 0) and center(2, 0) == (0, 255, 0) and center(0, 1) == (0, 0, 255)
    for step in range(3):
        assert center(1, step) == center(3, step) == tuple(palette(3)[step])
    assert draw_trajectory_grid(frames).size == (left + 2 + 3 * 98, 2 + 2 * 98)
