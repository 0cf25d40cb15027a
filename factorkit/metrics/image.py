"""How alike two pictures are: PSNR, SSIM and, where its weights lie on this machine, LPIPS.

Pictures are float [V, 3, H, W] in [0, 1]; every measure is taken of each picture by itself, [V].
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from factorkit.utils.errors import DataError

WINDOW, DEVIATION = 11, 1.5  # of SSIM's Gaussian, in pixels
STABILISERS = (0.01**2, 0.03**2)
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"  # torchvision's file name in torch's hub folder


def psnr(found: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio -10 log10 of the mean squared error, in dB, [V]; infinite where pictures are equal.

    Raises:
        DataError: shapes that differ or are not [V, 3, H, W].
    """
    _check(found, true)
    return -10 * (found - true).double().square().mean((1, 2, 3)).log10()


def ssim(found: Tensor, true: Tensor) -> Tensor:
    """Structural similarity, [V] in [-1, 1] (Wang et al. 2004, eq. 13): means, variances and covariance under a
    Gaussian of 11 x 11 pixels and deviation 1.5, at the places where it lies inside the picture, averaged over places
    and channels.

    Raises:
        DataError: shapes that differ or are not [V, 3, H, W], or a side below 11 pixels.
    """
    _check(found, true)
    if min(found.shape[2:]) < WINDOW:
        raise DataError(f"pictures of {found.shape[3]} x {found.shape[2]} pixels: SSIM needs {WINDOW} a side")
    x, y = found.double(), true.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = STABILISERS
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def lpips(found: Tensor, true: Tensor) -> Tensor | None:
    """Learned perceptual distance, [V] (Zhang et al. 2018, AlexNet), by torchmetrics; None where torchmetrics,
    torchvision or AlexNet's weights are not on this machine. Nothing is downloaded.

    Raises:
        DataError: shapes that differ or are not [V, 3, H, W].
    """
    _check(found, true)
    network = _lpips_network()
    if network is None:
        return None
    with torch.no_grad():
        pairs = zip(found.float().cpu(), true.float().cpu(), strict=True)
        return torch.stack([network(x[None], y[None]) for x, y in pairs])


def _blur(x: Tensor) -> Tensor:
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * DEVIATION**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, WINDOW)
    along = torch.nn.functional.conv2d(x, weights, groups=x.shape[1])
    return torch.nn.functional.conv2d(along, weights.mT, groups=x.shape[1])


@lru_cache
def _lpips_network():
    weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
    if not weights.is_file() or not all(importlib.util.find_spec(name) for name in ("torchmetrics", "torchvision")):
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()


def _check(found: Tensor, true: Tensor) -> None:
    if found.shape != true.shape or found.dim() != 4 or found.shape[1] != 3 or found.numel() == 0:
        raise DataError(
            f"pictures {tuple(found.shape)} and {tuple(true.shape)}: give two tensors [V, 3, H, W] of one shape"
        )
