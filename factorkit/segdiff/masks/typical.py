"""Which images are unlike those of a training set.

Each image has figures of four kinds: how far the network's masks lie from the segmentation, how uncertain they are,
statistics of its colours and gradients, and its thumbnail. Of statistics and thumbnails the figure is the Mahalanobis
distance from the training images, by a covariance that is shrunk towards a diagonal one. An image is unlike the
training set if one figure is beyond its limit. Limits come from training images alone: each half is measured by the
Gaussians of the other half.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 32  # pixels of the centred square that statistics are measured on
THUMBNAIL_SIDE = 8
NUM_STATISTICS = 12
SHRINKAGE = {NUM_STATISTICS: 0.1, 3 * THUMBNAIL_SIDE**2: 0.3}  # of the covariance of so many values
MIN_SPREAD, MIN_GRADIENT = 0.02, 0.01  # added before the logarithm; images of one colour have neither
EACH_QUANTILE, ALL_QUANTILE = 0.99, 0.98  # of training images within the limit of one figure, then of all of them
MIN_IMAGES = 20  # that give a quantile


def measure_statistics(colors: Tensor) -> Tensor:
    """Return mean, log spread and log mean gradient along x and y of colours [B, 3, S, S]: [B, 12]."""
    across = (colors[..., 1:] - colors[..., :-1]).abs().mean((2, 3))
    down = (colors[..., 1:, :] - colors[..., :-1, :]).abs().mean((2, 3))
    spread = colors.flatten(2).std(2)
    logs = [(spread + MIN_SPREAD).log(), (across + MIN_GRADIENT).log(), (down + MIN_GRADIENT).log()]
    return torch.cat([colors.mean((2, 3)), *logs], 1)


def crop_to_side(images: Tensor) -> Tensor:
    """Return the centred squares of images [B, C, H, W], resized to [B, C, 32, 32]."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    if side >= SIDE:
        return F.adaptive_avg_pool2d(square, SIDE)
    return F.interpolate(square, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def measure_appearance(colors: Tensor) -> Tensor:
    """Return the statistics and the thumbnail of colours [B, 3, H, W]: [B, 12 + 192]."""
    square = crop_to_side(colors)
    return torch.cat([measure_statistics(square), F.adaptive_avg_pool2d(square, THUMBNAIL_SIDE).flatten(1)], 1)


class Gaussian(nn.Module):
    """Squared Mahalanobis distances from values [N, D]; before :meth:`fit` they are 0."""

    mean: Tensor
    spread: Tensor
    precision: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.register_buffer("precision", torch.zeros(size, size))

    def fit(self, values: Tensor) -> Gaussian:
        """Fit mean and shrunk covariance to values [N, D]; return the Gaussian."""
        values = values.double()
        mean, spread = values.mean(0), values.std(0).clamp_min(1e-6)
        if len(mean) != NUM_STATISTICS:  # pixels of a thumbnail have one unit
            spread = torch.full_like(spread, float(spread.square().mean().sqrt()))
        standard = (values - mean) / spread
        shrinkage = SHRINKAGE[len(mean)]
        covariance = (1 - shrinkage) * standard.mT @ standard / len(values)
        covariance.diagonal().add_(shrinkage)
        self.mean.copy_(mean)
        self.spread.copy_(spread)
        self.precision.copy_(torch.linalg.inv(covariance))
        return self

    def forward(self, values: Tensor) -> Tensor:
        """Return the distances [B] of values [B, D]."""
        away = (values - self.mean) / self.spread
        return (away @ self.precision * away).sum(1)


class TypicalImages(nn.Module):
    """The figures of the images of a training set, and their limits; there are none before :meth:`fit`."""

    limits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gaussians = nn.ModuleList(Gaussian(size) for size in SHRINKAGE)
        self.register_buffer("limits", torch.full((4,), torch.inf))

    def fit(self, doubts: Tensor, appearance: Tensor) -> None:
        """Set Gaussians and limits from doubts [N, 2] and :func:`measure_appearance` [N, D] of training images.

        Fewer than MIN_IMAGES give no limits.
        """
        if len(doubts) < MIN_IMAGES:
            return
        doubts, appearance = doubts.to(self.limits.device), appearance.to(self.limits.device)
        halves, distances = (slice(0, None, 2), slice(1, None, 2)), torch.empty_like(doubts)
        for own, other in (halves, halves[::-1]):
            self._fit_gaussians(appearance[other])
            distances[own] = self._measure_distances(appearance[own])
        self._fit_gaussians(appearance)
        figures = torch.cat([doubts, distances], 1)
        limits = figures.quantile(EACH_QUANTILE, dim=0).clamp_min(1e-6)
        self.limits.copy_(limits * (figures / limits).amax(1).quantile(ALL_QUANTILE))

    def find_unlike(self, doubts: Tensor, appearance: Tensor) -> Tensor:
        """Return which images are unlike the training set, bool [B]. Arguments as of :meth:`fit`."""
        return (torch.cat([doubts, self._measure_distances(appearance)], 1) > self.limits).any(1)

    def _fit_gaussians(self, appearance: Tensor) -> None:
        for gaussian, values in zip(self.gaussians, appearance.split(list(SHRINKAGE), 1), strict=True):
            cast(Gaussian, gaussian).fit(values)

    def _measure_distances(self, appearance: Tensor) -> Tensor:
        parts = zip(self.gaussians, appearance.split(list(SHRINKAGE), 1), strict=True)
        return torch.stack([gaussian(values) for gaussian, values in parts], 1)
