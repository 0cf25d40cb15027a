from __future__ import annotations

import numpy as np
import pytest

from factorkit.segdiff.previews import (
    draw_generation_grid,
    draw_image_grid,
    draw_segmentation_grid,
    draw_trajectory_grid,
    make_label_image,
    make_mask_image,
    overlay_regions,
    palette,
)

RED, GREEN, BLUE = (np.full((32, 32, 3), color, np.uint8) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
LINE = 18  # height of a line of captions


def halves(n: int = 1, size: int = 32) -> np.ndarray:
    """Masks [n, 2, size, size] of the left and the right half."""
    left = np.zeros((n, size, size))
    left[:, :, : size // 2] = 1
    return np.stack([left, 1 - left], axis=1)


def test_colours_are_distinct_and_do_not_depend_on_their_number():
    colors = palette(256)
    assert colors.shape == (256, 3) and colors.dtype == np.uint8
    assert len({tuple(c) for c in colors}) == 256
    apart = np.abs(colors[:24, None].astype(int) - colors[None, :24]).sum(-1) + 999 * np.eye(24, dtype=int)
    assert apart.min() > 50
    for k in (0, 1, 3, 7, 8, 20):
        assert np.array_equal(palette(k), colors[:k])


def test_the_first_colours_differ_in_lightness_too():
    grey = palette(3) @ np.array([0.299, 0.587, 0.114])
    assert abs(grey[0] - grey[1]) > 60 and abs(grey[1] - grey[2]) > 40


def test_a_label_image_keeps_the_labels_and_shows_their_colours():
    labels = np.arange(256).reshape(16, 16)
    picture = make_label_image(labels)
    assert picture.mode == "P" and np.array_equal(np.asarray(picture), labels)
    assert np.array_equal(np.asarray(picture.convert("RGB")), palette(256)[labels])


@pytest.mark.parametrize("label", [-1, 256])
def test_a_label_image_refuses_what_it_would_wrap_around(label):
    with pytest.raises(ValueError, match=str(label)):
        make_label_image(np.array([[0, label]]))


def test_a_mask_image_rounds_and_clips():
    picture = make_mask_image(np.array([[0.0, 0.5, 1.0], [-0.2, 1.3, 0.999]], np.float32))
    assert picture.mode == "L"
    assert np.asarray(picture).tolist() == [[0, 128, 255], [0, 255, 255]]


def test_an_overlay_tints_regions_and_draws_white_lines_between_them():
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


def test_one_region_has_no_lines():
    image = np.zeros((4, 4, 3), np.uint8)
    assert np.array_equal(overlay_regions(image, np.zeros((4, 4), int), alpha=0), image)


def test_a_grid_enlarges_by_a_whole_factor_and_puts_each_picture_in_its_place():
    checks = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    sheet = np.asarray(draw_image_grid([[RED, GREEN], [BLUE, None], [checks]], gap=2))
    assert sheet.shape == (3 * 96 + 4 * 2, 2 * 96 + 3 * 2, 3)
    assert (sheet[2:98, 2:98] == (255, 0, 0)).all()
    assert (sheet[2:98, 100:196] == (0, 255, 0)).all()
    assert (sheet[100:196, 2:98] == (0, 0, 255)).all()
    paper = sheet[0, 0]
    assert (sheet[100:196, 100:196] == paper).all() and (sheet[198:294, 100:196] == paper).all()
    assert np.array_equal(sheet[198:294, 2:98, 0], checks.repeat(3, 0).repeat(3, 1))


def test_captions_take_room_of_their_own_and_stay_in_their_cell():
    swatch = (10, 200, 30)
    plain = np.asarray(draw_image_grid([[RED, GREEN]]))
    captions = ["", ("a caption far too long for its cell " * 3, swatch)]
    sheet = np.asarray(draw_image_grid([[RED, GREEN]], captions))
    assert np.array_equal(sheet[LINE:], plain)
    written = (sheet[:LINE] != sheet[0, 0]).any(axis=(0, 2))
    assert not written[:100].any() and written[100:196].any() and not written[196:].any()
    assert (sheet[:LINE] == swatch).all(-1).sum() > 40

    sheet = np.asarray(draw_image_grid([[RED], [GREEN]], row_captions=["first", "the second"]))
    left = sheet.shape[1] - 100
    assert left > 40 and (sheet[2:98, left + 2 : left + 98] == (255, 0, 0)).all()
    assert (sheet[:, :left] < 100).all(-1).sum() > 20


def test_large_images_are_shrunk_to_the_cell_and_centred_in_it():
    wide = np.full((300, 900, 3), 7, np.uint8)
    assert draw_image_grid([[wide]], gap=0).size == (256, 85)
    sheet = np.asarray(draw_image_grid([[wide, RED]], cell=64, gap=0))
    assert sheet.shape == (64, 128, 3)
    assert (sheet[22:42, :64] == 7).all() and (sheet[:20, :64] != 7).all()
    assert (sheet[:, 64:] == (255, 0, 0)).all()


def test_an_empty_grid_is_a_picture_too():
    assert draw_image_grid([]).size == (2, 2)


def test_a_segmentation_sheet_shows_image_regions_truth_masks_and_branches_in_this_order():
    images = np.stack([RED, GREEN])
    masks = halves(2)
    branches = np.zeros((2, 2, 32, 32, 3))
    branches[:, 1] = (0, 0, 1)
    truth = np.zeros((2, 32, 32), bool)
    truth[1] = True
    sheet = np.asarray(draw_segmentation_grid(images, masks, branches, truth))
    assert sheet.shape == (LINE + 2 + 2 * 98, 2 + 7 * 98, 3)

    def cell(row: int, column: int) -> np.ndarray:
        y, x = LINE + 2 + row * 98, 2 + column * 98
        return sheet[y : y + 96, x : x + 96]

    assert (cell(0, 0) == (255, 0, 0)).all() and (cell(1, 0) == (0, 255, 0)).all()
    lines = (cell(0, 1) == 255).all(-1)
    assert lines[:, 47].all() and lines.sum() == 96  # one screen pixel wide, not one enlarged pixel
    assert (cell(0, 2) == 0).all() and (cell(1, 2) == 255).all()
    assert (cell(0, 3)[:, :48] == 255).all() and (cell(0, 3)[:, 48:] == 0).all()
    assert (cell(1, 4)[:, :48] == 0).all() and (cell(1, 4)[:, 48:] == 255).all()
    assert (cell(0, 5) == 0).all() and (cell(1, 6) == (0, 0, 255)).all()


def test_a_segmentation_sheet_without_branches_and_truth_is_narrower():
    assert draw_segmentation_grid(RED[None], halves()).size == (2 + 4 * 98, LINE + 2 + 98)


def test_a_single_region_makes_a_sheet():
    assert draw_segmentation_grid(RED[None], np.ones((1, 1, 32, 32))).size == (2 + 3 * 98, LINE + 2 + 98)


def test_a_generation_sheet_breaks_into_lines():
    images = np.stack([RED, GREEN, BLUE])
    sheet = np.asarray(draw_generation_grid(images, halves(3), per_line=2))
    left = sheet.shape[1] - (2 + 2 * 98)
    assert sheet.shape[0] == 2 + 2 * 4 * 98 and left > 0
    assert (sheet[2:98, left + 100 : left + 196] == (0, 255, 0)).all()
    below = 2 + 4 * 98
    assert (sheet[below : below + 96, left + 2 : left + 98] == (0, 0, 255)).all()
    mask = sheet[2 + 2 * 98 : 98 + 2 * 98, left + 2 : left + 98]
    assert (mask[:, :48] == 255).all() and (mask[:, 48:] == 0).all()


def test_a_generation_sheet_takes_the_labels_it_is_given():
    with_lines = np.asarray(draw_generation_grid(RED[None], halves()))
    without = np.asarray(draw_generation_grid(RED[None], halves(), labels=np.zeros((1, 32, 32), int)))
    white = [(sheet[100:196, -98:-2] == 255).all(-1).sum() for sheet in (with_lines, without)]
    assert white == [96, 0]


def test_a_trajectory_has_samples_in_rows_and_steps_in_columns():
    frames = [np.stack([RED, GREEN]), np.stack([BLUE, BLUE]), np.stack([RED, RED])]
    labels = [np.full((2, 32, 32), step) for step in range(3)]
    sheet = np.asarray(draw_trajectory_grid(frames, labels, times=[900, 500, 0]))
    left = sheet.shape[1] - (2 + 3 * 98)
    assert sheet.shape[0] == LINE + 2 + 4 * 98

    def center(row: int, column: int) -> tuple[int, ...]:
        return tuple(sheet[LINE + 2 + row * 98 + 48, left + 2 + column * 98 + 48])

    assert center(0, 0) == (255, 0, 0) and center(2, 0) == (0, 255, 0) and center(0, 1) == (0, 0, 255)
    for step in range(3):
        assert center(1, step) == center(3, step) == tuple(palette(3)[step])
    assert draw_trajectory_grid(frames).size == (left + 2 + 3 * 98, 2 + 2 * 98)
