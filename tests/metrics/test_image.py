"""PSNR by hand, SSIM against scikit-image, LPIPS without its weights and with a stand-in for them."""

from __future__ import annotations

import math

import pytest
import torch
from skimage.metrics import structural_similarity

from factorkit.metrics import image
from factorkit.metrics.image import lpips, psnr, ssim
from factorkit.utils.errors import DataError


def pair(shape=(3, 3, 21, 34), seed=0):
    generator = torch.Generator().manual_seed(seed)
    true = torch.rand(shape, generator=generator)
    return (true + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1), true


def test_psnr_known_errors_gives_decibels_per_image():
    true = torch.full((2, 3, 4, 5), 0.5)
    found = true + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(found, true), torch.tensor([20.0, 40.0]).double(), atol=1e-4, rtol=0)
    assert psnr(true, true).tolist() == [math.inf, math.inf]


def test_ssim_equals_scikit_image():
    found, true = pair()
    for ours, other, value in zip(found.double(), true.double(), ssim(found, true), strict=True):
        expected = structural_similarity(
            ours.numpy(),
            other.numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert value.item() == pytest.approx(expected, abs=1e-9)
    assert ssim(true, true).min() > 1 - 1e-12


def test_ssim_side_below_window_raises():
    assert ssim(*pair((1, 3, 11, 11))).shape == (1,)
    with pytest.raises(DataError, match="11 a side"):
        ssim(*pair((1, 3, 10, 30)))


def test_lpips_without_weights_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    image._lpips_network.cache_clear()
    assert lpips(*pair()) is None
    image._lpips_network.cache_clear()


def test_lpips_is_computed_per_image(monkeypatch):
    monkeypatch.setattr(image, "_lpips_network", lambda: lambda x, y: (x - y).abs().mean())
    found, true = pair()
    torch.testing.assert_close(lpips(found, true), (found - true).abs().mean((1, 2, 3)))


@pytest.mark.parametrize("measure", [psnr, ssim, lpips])
def test_metrics_different_shapes_raise(measure):
    found, true = pair()
    with pytest.raises(DataError, match=r"\[V, 3, H, W\]"):
        measure(found, true[:2])
