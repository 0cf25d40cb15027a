"""Smooth masks against pixel loops, and what they do at edges, in specks and in images of few pixels."""

from __future__ import annotations

import pytest
import torch

from factorkit.segdiff.masks.smoothness import ROUNDS, STRENGTH, smooth_masks


def smooth_by_loops(masks, colors):
    """Compute mean field of one image [H, W, K] with colours [H, W, 3] pixel by pixel."""
    height, width = masks.shape[:2]
    weights = {}
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        pixels = [(y, x) for y in range(height - dy) for x in range(width) if 0 <= x + dx < width]
        contrasts = [(colors[y, x] - colors[y + dy, x + dx]).square().sum() for y, x in pixels]
        usual = sum(contrasts) / len(contrasts)
        for (y, x), contrast in zip(pixels, contrasts, strict=True):
            weight = torch.exp(-contrast / (2 * usual + 1e-6)) / (dy * dy + dx * dx) ** 0.5
            weights[(y, x), (y + dy, x + dx)] = weights[(y + dy, x + dx), (y, x)] = weight
    start = masks.log()
    for _ in range(ROUNDS):
        support = torch.zeros_like(masks)
        for (pixel, neighbour), weight in weights.items():
            support[pixel] += weight * masks[neighbour]
        masks = (start + STRENGTH * support).softmax(2)
    return masks


def test_smooth_masks_of_random_images_equal_pixel_loops():
    torch.manual_seed(0)
    masks, colors = torch.randn(2, 3, 5, 4).softmax(1), torch.randn(2, 3, 5, 4)
    smooth = smooth_masks(masks, colors).permute(0, 2, 3, 1)
    for i in range(2):
        expected = smooth_by_loops(masks[i].permute(1, 2, 0), colors[i].permute(1, 2, 0))
        torch.testing.assert_close(smooth[i], expected)


def test_smooth_masks_of_two_colours_lose_a_speck_and_keep_the_edge():
    colors = torch.zeros(1, 3, 12, 12)
    colors[..., 6:] = 1
    object_ = torch.full((1, 1, 12, 12), 0.1)
    object_[..., 6:] = 0.9
    object_[0, 0, 5, 2] = 0.8  # in the ground
    smooth = smooth_masks(torch.cat([object_, 1 - object_], 1), colors)[0, 0] > 0.5
    assert torch.equal(smooth, colors[0, 0] > 0.5)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_smooth_masks_of_few_pixels_sum_to_one(size):
    masks = smooth_masks(torch.rand(1, 3, *size).softmax(1), torch.rand(1, 3, *size))
    torch.testing.assert_close(masks.sum(1), torch.ones(1, *size))
