"""Dots where cameras are, and grids whose cells hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factorkit.nerfdiff.previews.cameras import SIDE, draw_sphere
from factorkit.nerfdiff.previews.views import disparity_pixels, draw_denoising_grid, draw_view_grid
from factorkit.rendering import look_at, orbit
from factorkit.report.image_grid import palette

BLUE, ORANGE = palette(2).astype(int)
LINE = 18  # height of a line of captions


def at(*eye):
    return look_at(torch.tensor(eye, dtype=torch.float32), torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]))[None]


def position(drawing, color, tolerance=40):
    """Mean pixel (right, down) of a colour in each half of a sphere image."""
    pixels = np.asarray(drawing).astype(int)
    result = []
    for half in (pixels[:, :SIDE], pixels[:, SIDE:]):
        down, right = np.nonzero(np.abs(half - color).max(axis=2) < tolerance)
        result.append((right.mean(), down.mean()) if len(right) else None)
    return result


def test_draw_sphere_camera_is_a_dot_in_its_direction():
    middle, radius = SIDE / 2, 0.45 * SIDE
    front = 4 * np.array([0.0, -np.cos(np.radians(25)), np.sin(np.radians(25))])
    (right, down), (_, above) = position(draw_sphere(at(*front)), BLUE)
    np.testing.assert_allclose([right, down], middle, atol=1)
    np.testing.assert_allclose(above, middle + radius * np.cos(np.radians(25)), atol=1)
    (right, down), (from_above, _) = position(draw_sphere(at(5.0, 0.0, 0.001)), BLUE)
    np.testing.assert_allclose([right, from_above], middle + radius, atol=2)
    np.testing.assert_allclose(down, middle, atol=1)


def test_draw_sphere_dots_behind_are_pale():
    behind, before = position(draw_sphere(at(0.3, 3.0, 0.2)), BLUE)
    assert behind is None and before is not None


def test_draw_sphere_true_cameras_are_rings_joined_to_predictions():
    selected, true = at(-2.0, -2.0, 1.0), at(2.0, -2.0, 1.0)
    alone = draw_sphere(selected)
    both = np.asarray(draw_sphere(selected, None, true)).astype(int)
    assert position(alone, ORANGE)[0] is None
    orange = np.abs(both[:, :SIDE] - ORANGE).max(axis=2) < 60
    columns = np.nonzero(orange.any(0))[0]
    assert columns.max() - columns.min() > 0.5 * SIDE


def test_draw_sphere_candidates_are_small_and_grey():
    selected, candidates = at(0.0, -3.0, 1.0), orbit(12, 3.0, 20.0)
    drawings = draw_sphere(selected), draw_sphere(selected, candidates.reshape(3, 4, 4, 4))
    without, within = (np.asarray(drawing).astype(int) for drawing in drawings)
    changed = np.abs(without - within).max(axis=2) > 30
    assert 12 * 3 < changed.sum() < 2 * 12 * 20
    assert np.ptp(within[changed].mean(0)) < 6


@pytest.mark.slow
def test_disparity_pixels_near_is_bright_and_empty_is_black():
    depth = torch.tensor([[[1.0, 2.0, 4.0, 0.1]]]) * torch.tensor([1.0, 1.0, 0.8, 0.0])
    opacity = torch.tensor([[[1.0, 1.0, 0.8, 0.2]]])
    near, middle, far, nothing = disparity_pixels(depth, opacity)[0, 0].tolist()
    assert near > 250 and nothing == 0 and 30 <= far < middle < near
    # Disparity, not depth: half as near is a third of the way from a quarter to all.
    assert abs((middle - far) / (near - far) - 1 / 3) < 0.03
    assert not disparity_pixels(depth, opacity * 0).any()
    many = torch.rand(1, 4100, 4100) + 1  # more than torch takes quantiles of
    assert disparity_pixels(many, torch.ones_like(many)).max() == 255


def test_draw_view_grid_has_images_renders_and_differences():
    generator = torch.Generator().manual_seed(0)
    images, renders = (torch.rand(2, 3, 96, 96, generator=generator) for _ in range(2))
    image_grid = draw_view_grid(images, renders, torch.ones(2, 96, 96), torch.ones(2, 96, 96), ["a", "b"])
    pixels = np.asarray(image_grid).astype(int)
    left = image_grid.width - 2 * 98
    cells = [[pixels[LINE + 2 + 98 * i :, left + 98 * j :][:96, :96] for j in range(2)] for i in range(4)]
    for j in range(2):
        image, render = (255 * x[j].permute(1, 2, 0).numpy() for x in (images, renders))
        np.testing.assert_allclose(cells[0][j], image, atol=0.51)
        np.testing.assert_allclose(cells[1][j], render, atol=0.51)
        np.testing.assert_allclose(cells[2][j], (2 * np.abs(image - render)).clip(0, 255), atol=0.51)


def test_draw_denoising_grid_has_a_row_for_each_kind():
    frames = [torch.rand(2, 3, 8, 8) for _ in range(3)]
    cameras = [orbit(2, 3.0, 10.0 * (i + 1)) for i in range(3)]
    small = draw_denoising_grid(frames, cameras, [99, 50, 0])
    tall = draw_denoising_grid(frames, cameras, [99, 50, 0], frames)
    assert tall.height - LINE == (small.height - LINE - 2) * 6 // 4 + 2
