"""Colours of regions, and grids of images with captions."""

from __future__ import annotations

import numpy as np

from factorkit.report.image_grid import draw_image_grid, palette

RED, GREEN, BLUE = (np.full((32, 32, 3), color, np.uint8) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
LINE = 18  # height of a line of captions


def test_palette_colours_are_distinct_and_independent_of_count():
    colors = palette(256)
    assert colors.shape == (256, 3) and colors.dtype == np.uint8
    assert len({tuple(c) for c in colors}) == 256
    apart = np.abs(colors[:24, None].astype(int) - colors[None, :24]).sum(-1) + 999 * np.eye(24, dtype=int)
    assert apart.min() > 50
    for k in (0, 1, 3, 7, 8, 20):
        assert np.array_equal(palette(k), colors[:k])


def test_palette_first_colours_differ_in_lightness():
    grey = palette(3) @ np.array([0.299, 0.587, 0.114])
    assert abs(grey[0] - grey[1]) > 60 and abs(grey[1] - grey[2]) > 40


def test_image_grid_small_images_are_enlarged_in_order():
    checks = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    grid = np.asarray(draw_image_grid([[RED, GREEN], [BLUE, None], [checks]], gap=2))
    assert grid.shape == (3 * 96 + 4 * 2, 2 * 96 + 3 * 2, 3)
    assert (grid[2:98, 2:98] == (255, 0, 0)).all()
    assert (grid[2:98, 100:196] == (0, 255, 0)).all()
    assert (grid[100:196, 2:98] == (0, 0, 255)).all()
    paper = grid[0, 0]
    assert (grid[100:196, 100:196] == paper).all() and (grid[198:294, 100:196] == paper).all()
    assert np.array_equal(grid[198:294, 2:98, 0], checks.repeat(3, 0).repeat(3, 1))


def test_image_grid_captions_have_their_own_space():
    swatch = (10, 200, 30)
    plain = np.asarray(draw_image_grid([[RED, GREEN]]))
    captions = ["", ("a caption far too long for its cell " * 3, swatch)]
    grid = np.asarray(draw_image_grid([[RED, GREEN]], captions))
    assert np.array_equal(grid[LINE:], plain)
    written = (grid[:LINE] != grid[0, 0]).any(axis=(0, 2))
    assert not written[:100].any() and written[100:196].any() and not written[196:].any()
    assert (grid[:LINE] == swatch).all(-1).sum() > 40

    grid = np.asarray(draw_image_grid([[RED], [GREEN]], row_captions=["first", "the second"]))
    left = grid.shape[1] - 100
    assert left > 40 and (grid[2:98, left + 2 : left + 98] == (255, 0, 0)).all()
    assert (grid[:, :left] < 100).all(-1).sum() > 20


def test_image_grid_large_images_are_shrunk_and_centred():
    wide = np.full((300, 900, 3), 7, np.uint8)
    assert draw_image_grid([[wide]], gap=0).size == (256, 85)
    grid = np.asarray(draw_image_grid([[wide, RED]], cell=64, gap=0))
    assert grid.shape == (64, 128, 3)
    assert (grid[22:42, :64] == 7).all() and (grid[:20, :64] != 7).all()
    assert (grid[:, 64:] == (255, 0, 0)).all()


def test_image_grid_empty_is_an_image():
    assert draw_image_grid([]).size == (2, 2)
