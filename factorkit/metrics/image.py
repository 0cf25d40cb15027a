"""Similarity of two images: PSNR, SSIM and, where its weights are installed, LPIPS.

Images and their references are float [V, 3, H, W] in [0, 1]; each metric returns one value per image, [V]. All raise
DataError for shapes that differ or are not [V, 3, H, W].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from factorkit.utils.errors import DataError

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Gaussian of Wang et al. 2004, in pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # stabilisers of the same paper, for a dynamic range of 1
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"  # torchvision's file name in torch's hub folder


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio, -10 log10 of the mean squared error, in dB; infinite for equal images."""
    _check(images, references)
    return -10 * (images - references).double().square().mean((1, 2, 3)).log10()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Compute the structural similarity in [-1, 1] (Wang et al. 2004, eq. 13).

    Means, variances and covariance are taken under a Gaussian of 11 x 11 pixels and deviation 1.5 where it lies inside
    the image, then averaged over positions and channels.

    Raises:
        DataError: also for a side below 11 pixels.
    """
    _check(images, references)
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise DataError(f"images of {images.shape[3]} x {images.shape[2]} pixels: SSIM needs {SSIM_WINDOW} a side")
    x, y = images.double(), references.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    return (numerator / ((mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2))).mean((1, 2, 3))


def lpips(images: Tensor, references: Tensor) -> Tensor | None:
    """Compute the learned perceptual distance (Zhang et al. 2018, AlexNet) by torchmetrics. Downloads nothing.

    Returns None where torchmetrics, torchvision or AlexNet's weights are not on this machine.
    """
    _check(images, references)
    network = _lpips_network()
    if network is None:
        return None
    with torch.no_grad():
        pairs = zip(images.float().cpu(), references.float().cpu(), strict=True)
        return torch.stack([network(x[None], y[None]) for x, y in pairs])


def _blur(x: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, SSIM_WINDOW)
    rows = torch.nn.functional.conv2d(x, weights, groups=x.shape[1])
    return torch.nn.functional.conv2d(rows, weights.mT, groups=x.shape[1])


@lru_cache
def _lpips_network() -> Callable[[Tensor, Tensor], Tensor] | None:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
    if not weights.is_file() or not all(importlib.util.find_spec(name) for name in ("torchmetrics", "torchvision")):
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()


def _check(images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape or images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        shapes = f"{tuple(images.shape)} and {tuple(references.shape)}"
        raise DataError(f"images {shapes}: give two tensors [V, 3, H, W] of one shape")
