"""The shape denoiser: the posterior mean of its Gaussian, and what few masks do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factorkit.segdiff.masks import shape as module
from factorkit.segdiff.masks.shape import COMPONENTS, MIN_SHARE, SHAPE_SIDE, ShapeDenoiser, to_coarse


def draw_masks(count, regions=2):
    """Draw smooth soft masks [count, K, 16, 16] that vary in a few directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.interpolate(torch.randn(12, regions, 3, 3, generator=generator), size=SHAPE_SIDE)
    weights = torch.randn(count, 12, generator=generator) / torch.arange(1, 13)
    return torch.einsum("nd,dkhw->nkhw", weights, directions).softmax(1)


def test_shape_denoiser_equals_posterior_mean(monkeypatch):
    monkeypatch.setattr(module, "MIN_SHARE", -10.0)
    masks = draw_masks(60)
    denoiser = ShapeDenoiser(2).fit(masks)
    rows = masks.flatten(1).double().numpy()
    mean, covariance = rows.mean(0), np.cov(rows.T, bias=True)
    variances, vectors = np.linalg.eigh(covariance)
    variances, vectors = variances[::-1], vectors[:, ::-1]
    shapes = vectors[:, :COMPONENTS] * variances[:COMPONENTS] @ vectors[:, :COMPONENTS].T
    noise = variances[COMPONENTS] * np.eye(len(mean))
    seen = draw_masks(70)[60:]
    away = seen.flatten(1).double().numpy() - mean
    expected = mean + away @ np.linalg.inv(shapes + noise) @ shapes  # the mean of s given s + e, s ~ N(mean, shapes)
    expected = torch.from_numpy(expected).unflatten(1, seen.shape[1:]).float()
    torch.testing.assert_close(denoiser(seen), expected / expected.sum(1, keepdim=True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_shape_denoiser_of_few_masks_keeps_fewer_directions(count):
    masks = draw_masks(count)
    denoiser = ShapeDenoiser(2).fit(masks)
    assert int((denoiser.gain > 0).sum()) == min(COMPONENTS, (count - 1) // 2)
    denoised = denoiser(masks)
    assert denoised.isfinite().all() and denoised.min() >= 0.9 * MIN_SHARE
    torch.testing.assert_close(denoised.sum(1), torch.ones(count, 16, 16))
    if count <= 2:
        torch.testing.assert_close(denoised, masks.mean(0, keepdim=True).expand_as(masks), atol=1e-4, rtol=1e-3)


def test_shape_denoiser_removes_noise_of_any_size():
    masks = draw_masks(80)
    denoiser = ShapeDenoiser(2).fit(masks[:60])
    noisy = (masks[60:] + 0.3 * torch.randn(20, 2, 16, 16, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    large = torch.nn.functional.interpolate(noisy, size=(48, 32), mode="nearest")
    assert (denoiser(noisy) - masks[60:]).square().mean() < 0.5 * (noisy - masks[60:]).square().mean()
    assert denoiser(large).shape == large.shape


def test_shape_denoiser_before_fit_is_uniform_and_equal_masks_stay():
    torch.testing.assert_close(ShapeDenoiser(4)(torch.rand(2, 4, 20, 20)), torch.full((2, 4, 20, 20), 0.25))
    same = draw_masks(1).expand(5, -1, -1, -1)
    torch.testing.assert_close(ShapeDenoiser(2).fit(same)(same), same, atol=1e-4, rtol=1e-2)


def test_shape_denoiser_has_the_same_directions_whatever_signs_the_solver_chooses(monkeypatch):
    expected, eigh = ShapeDenoiser(2).fit(draw_masks(60)), torch.linalg.eigh

    def negate(matrix):
        variances, vectors = eigh(matrix)
        return variances, -vectors

    monkeypatch.setattr(torch.linalg, "eigh", negate)
    torch.testing.assert_close(ShapeDenoiser(2).fit(draw_masks(60)).directions, expected.directions, rtol=0, atol=0)


def test_to_coarse_averages_cells():
    masks = torch.rand(1, 2, 32, 64)
    expected = torch.nn.functional.avg_pool2d(masks, (2, 4))
    torch.testing.assert_close(to_coarse(masks), expected)
