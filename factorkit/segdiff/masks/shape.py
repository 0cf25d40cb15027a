"""The shapes that the regions of a set of images have: a linear denoiser of masks.

Coarse masks of the set are modelled as a Gaussian: their mean, and their main directions of variation with their
variances. A mask with errors is this shape plus independent noise, as strong as the first direction left out. The
denoised mask is the posterior mean, which is linear (probabilistic PCA, Tipping and Bishop 1999).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE_SIDE = 16  # sides of the coarse masks in cells
COMPONENTS = 8  # directions of variation; on validation horses 4 to 16 differ by .003 IoU
MIN_SHARE = 0.01  # of a region at any pixel of a denoised mask


class ShapeDenoiser(nn.Module):
    """Denoise masks by the shapes of a set; before :meth:`fit` it returns uniform masks.

    Args:
        regions: K.
    """

    mean: Tensor
    directions: Tensor
    gain: Tensor

    def __init__(self, regions: int):
        super().__init__()
        self.regions, length = regions, regions * SHAPE_SIDE**2
        self.register_buffer("mean", torch.full((length,), 1 / regions))
        self.register_buffer("directions", torch.zeros(COMPONENTS, length))
        self.register_buffer("gain", torch.zeros(COMPONENTS))

    @torch.no_grad()
    def fit(self, masks: Tensor) -> ShapeDenoiser:
        """Fit the Gaussian to coarse masks [N, K, 16, 16] of :func:`to_coarse`; return the denoiser.

        Few masks have fewer directions: half of what they span, so that the rest measures the noise.
        """
        rows = masks.double().flatten(1)
        mean = rows.mean(0)
        variances, vectors = torch.linalg.eigh((rows - mean).mT @ (rows - mean) / len(rows))
        variances, vectors = variances.flip(0).clamp_min(0), vectors.flip(1)
        # A direction and its negative mean the same, and rounding would choose: take the one along a fixed vector.
        fixed = torch.arange(1, len(vectors) + 1).to(vectors).sin()
        vectors = torch.where(fixed @ vectors < 0, -vectors, vectors)
        count = min(COMPONENTS, (len(rows) - 1) // 2)
        self.mean.copy_(mean)
        self.directions.zero_()[:count] = vectors[:, :count].mT.float()
        self.gain.zero_()[:count] = (
            variances[:count] / (variances[:count] + variances[count]).clamp_min(1e-12)
        ).float()
        return self

    def forward(self, masks: Tensor) -> Tensor:
        """Return the denoised masks of [B, K, H, W], of the same shape and at least MIN_SHARE everywhere."""
        away = to_coarse(masks).flatten(1) - self.mean
        denoised = self.mean + (away @ self.directions.mT * self.gain) @ self.directions
        coarse = denoised.unflatten(1, (self.regions, SHAPE_SIDE, SHAPE_SIDE))
        shape = F.interpolate(coarse, size=masks.shape[2:], mode="bilinear", align_corners=False)
        shape = shape.clamp_min(MIN_SHARE)
        return shape / shape.sum(1, keepdim=True)


def to_coarse(masks: Tensor) -> Tensor:
    """Average masks [B, K, H, W] over the cells of the coarse grid: [B, K, 16, 16]."""
    return F.adaptive_avg_pool2d(masks.float(), SHAPE_SIDE)
