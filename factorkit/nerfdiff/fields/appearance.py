"""How each picture differs in tone from the others, for collections that many cameras or hours have a part in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Appearance(nn.Module):
    """A code for each of V views, which becomes an affine map of colours (Martin-Brualla et al. 2021, section 4.1, with
    the affine maps of Rematas et al. 2022, section 4.2).

    Codes count from their mean, so that the mean code changes nothing: so pictures from new places look. The map is
    linear in the colour, so mapping what a ray sees is mapping the radiance at each of its samples: densities cannot
    know of it.

    Args:
        views: V.
        width: numbers of a code, at least 1.
        seed: of the map from codes to affine maps.
    """

    RATE = 0.01  # Adam's, of these numbers, whatever the field's

    def __init__(self, views: int, width: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.codes = nn.Parameter(torch.zeros(views, width))
        self.map = nn.Parameter(torch.randn(width, 12, generator=generator) / width**0.5)

    def forward(self, views: Tensor, color: Tensor, opacity: Tensor | float) -> Tensor:
        """Colours [B, ..., 3] in the tone of views [B].

        Args:
            opacity: how much of each colour is there, [B, ...] or one number: the map's shift counts by so much.
        """
        tone = ((self.codes - self.codes.mean(0))[views] @ self.map).unflatten(1, (4, 3))
        inner = (-1, *[1] * (color.dim() - 2), 3)
        matrix, shift = tone[:, :3], tone[:, 3].reshape(inner)
        turned = (color.flatten(1, -2) @ matrix).reshape(color.shape)
        return color + turned + shift * (opacity[..., None] if isinstance(opacity, Tensor) else opacity)
