"""Per-view colour transforms, for image collections with varying exposure or lighting."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Appearance(nn.Module):
    """A learned code for each training view, mapped to an affine colour transform.

    Codes follow Martin-Brualla et al. 2021 (section 4.1), affine maps Rematas et al. 2022 (section 4.2). Codes are
    centred, so the mean code is the identity; novel views use it. The transform is linear in the colour, so it can be
    applied to the rendered colour, and the density does not depend on it.

    Args:
        views: number of training views.
        dim: size of each code, at least 1.
        seed: of the map from codes to affine transforms.
    """

    LEARNING_RATE = 0.01  # independent of the field's

    def __init__(self, views: int, dim: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.codes = nn.Parameter(torch.zeros(views, dim))
        self.map = nn.Parameter(torch.randn(dim, 12, generator=generator) / dim**0.5)

    def forward(self, views: Tensor, color: Tensor, opacity: Tensor | float) -> Tensor:
        """Return colours [B, ..., 3] with the appearance of training views [B].

        Args:
            views: indices of training views, [B].
            color: [B, ..., 3].
            opacity: [B, ...] or one number; scales the shift of the transform.
        """
        transform = ((self.codes - self.codes.mean(0))[views] @ self.map).unflatten(1, (4, 3))
        matrix, shift = transform[:, :3], transform[:, 3].reshape(-1, *[1] * (color.dim() - 2), 3)
        change = (color.flatten(1, -2) @ matrix).reshape(color.shape)
        return color + change + shift * (opacity[..., None] if isinstance(opacity, Tensor) else opacity)
