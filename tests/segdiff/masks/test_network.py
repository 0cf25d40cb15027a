"""The normalisation of region logits, over the batch and within a region."""

from __future__ import annotations

import pytest
import torch

from factorkit.segdiff.masks.network import RegionLogitNorm


@pytest.fixture(autouse=True)
def set_seed():
    torch.manual_seed(0)


def test_logit_norm_in_training_normalises_each_region_over_the_batch():
    norm = RegionLogitNorm(3).train()
    logits = torch.randn(8, 3, 6, 6) * torch.tensor([1.0, 3.0, 7.0])[:, None, None]
    logits[:3, 0] += 50.0
    out = norm(logits)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), unbiased=False), torch.full((3,), 1.5), atol=1e-3, rtol=0)
    with torch.no_grad():
        norm.gain.fill_(4.0)
    torch.testing.assert_close(norm(logits), out * (4.0 / 1.5))


def test_logit_norm_shift_of_all_regions_is_ignored():
    norm, logits = RegionLogitNorm(3).train(), torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(norm(logits), norm(logits + 9 * torch.randn(4, 1, 6, 6)), atol=1e-4, rtol=1e-4)


def test_logit_norm_in_training_updates_running_averages():
    norm = RegionLogitNorm(2, momentum=0.25).train()
    logits = torch.randn(4, 2, 5, 5) + torch.tensor([3.0, -1.0])[:, None, None]
    centred = logits - logits.mean(1, keepdim=True)
    norm(logits)
    mean, variance = centred.mean((0, 2, 3)), centred.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(norm.mean, 0.25 * mean)
    torch.testing.assert_close(norm.variance, 0.75 + 0.25 * variance)


def test_logit_norm_within_a_region_ignores_pixels_outside():
    norm = RegionLogitNorm(2).train()
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 8, 8)
    within = torch.zeros(4, 1, 8, 8)
    within[..., :4] = 1
    inside = norm(logits, within)[..., :4]
    within[..., 4] = 0.4  # the soft edge of the region
    logits[..., 4:] *= 100  # outside the region
    torch.testing.assert_close(norm(logits, within)[..., :4], inside)
    torch.testing.assert_close(inside.mean((2, 3)), torch.zeros(4, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.std((2, 3), unbiased=False), torch.full((4, 2), 1.5), atol=1e-3, rtol=0)


def test_logit_norm_within_regions_has_separate_statistics():
    # Otherwise the region's index or the noise level could act as a split of unit variance.
    norm = RegionLogitNorm(2).train()
    torch.manual_seed(0)
    logits, within = torch.randn(6, 2, 8, 8), torch.rand(6, 1, 8, 8)
    logits[1::3, 0] += 40
    logits[2::3] *= 0.1
    together = norm(logits, within)
    for row in range(6):
        torch.testing.assert_close(together[row], norm(logits[row : row + 1], within[row : row + 1])[0])
    torch.testing.assert_close(together[2], norm(10 * logits, within)[2], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(norm.eval()(logits, within), together)
    assert norm(logits, torch.zeros_like(within)).isfinite().all(), "a region may be absent from an image"


def test_logit_norm_of_an_uncertain_region_uses_all_pixels():
    """Each of nine uncertain regions has a ninth of every pixel, so its statistics need all pixels."""
    logits = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    result = RegionLogitNorm(2).train()(logits, torch.full((6, 1, 8, 8), 1 / 9))
    torch.testing.assert_close(result, RegionLogitNorm(2)(logits, torch.ones(6, 1, 8, 8)), atol=1e-4, rtol=0)
