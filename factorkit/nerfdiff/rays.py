"""Rays of a scene's cameras and what they see; every picture and every loss of nerfdiff is made here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from factorkit.nerfdiff.fields import Field
from factorkit.rendering import EvenSampling, Rendered, image_rays, pixel_rays, render

PIECE = 1 << 15  # rays rendered at once without gradient


@dataclass(frozen=True)
class Optics:
    """What all cameras of a scene share.

    Attributes:
        intrinsics: [3, 3] in units of the image's width and height.
        background: [3], the colour behind everything.
    """

    intrinsics: Tensor
    background: Tensor

    def pixels(self, height: int, width: int) -> Tensor:
        """The intrinsics in pixels of pictures of this size."""
        return self.intrinsics * self.intrinsics.new_tensor([width, height, 1.0])[:, None]


def sampling(samples: int) -> EvenSampling:
    """So many steps through the box."""
    return EvenSampling((-1.0,) * 3, (1.0,) * 3, samples)


def render_pixels(
    field: Field, poses: Tensor, optics: Optics, pixels: Tensor, size: tuple[int, int], samples: int,
    seed: int | None = None,
) -> Tensor:  # fmt: skip
    """Colours [B, R, 3] of pixels [B, R] (numbered row by row) of pictures of ``size`` from poses [B, 4, 4]."""
    height, width = size
    place = torch.stack([pixels % width, pixels // width], dim=-1) + 0.5
    rays = pixel_rays(poses, optics.pixels(height, width), place.to(poses.dtype))
    return render(field, rays, sampling(samples), background=optics.background, seed=seed).color


@torch.no_grad()
def render_views(field: Field, poses: Tensor, optics: Optics, size: tuple[int, int], samples: int) -> Rendered:
    """Pictures from poses [..., 4, 4] without gradient: colour [..., H, W, 3], depth, opacity [..., H, W]."""
    rays = image_rays(poses, optics.pixels(*size), *size)
    return render(field, rays, sampling(samples), background=optics.background, chunk=PIECE)
