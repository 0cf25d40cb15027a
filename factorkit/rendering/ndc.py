"""Normalised device coordinates: maps the frustum of forward-facing cameras, out to infinity, to the box [-1, 1]^3.

Source: Mildenhall et al. 2020, appendix C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.rendering.cameras import Rays

MAX_DIRECTION_Z = -1e-3  # of a unit direction; flatter rays do not lead into the frustum


def ndc_rays(rays: Rays, intrinsics: Tensor, height: int, width: int, near: float = 1.0) -> Rays:
    """Convert rays [..., 3] to normalised device coordinates; t = 0 is the plane z = -near, t = 1 is infinity (z = 1).

    The frustum is that of a camera at the world's origin that looks along -z, where :func:`factorkit.data.open_views`
    puts the mean camera of an LLFF scene. Directions are not unit vectors: sample within the box [-1, 1]^3, or over t
    from 0 to 1. Differentiable in the rays and the focal lengths. Rays that do not lead forward are turned until they
    do.

    Args:
        rays: in world coordinates.
        intrinsics: [..., 3, 3] of the cameras, for their focal lengths; broadcasts with the rays.
        height: of the images, in pixels.
        width: of the images, in pixels.
        near: distance of the near plane, above 0.

    Raises:
        ValueError: near is not above 0.
    """
    scale_x, scale_y = _scale(intrinsics, height, width, near).unbind(-1)
    x, y, z = rays.origins.unbind(-1)
    dx, dy, dz = rays.directions.unbind(-1)
    dz = dz.clamp_max(MAX_DIRECTION_Z)
    shift = -(near + z) / dz  # from the camera to the near plane
    x, y, z = x + shift * dx, y + shift * dy, torch.full_like(z, -near)
    origins = torch.stack([-scale_x * x / z, -scale_y * y / z, 1 + 2 * near / z], dim=-1)
    slope_x, slope_y = dx / dz - x / z, dy / dz - y / z
    directions = torch.stack([-scale_x * slope_x, -scale_y * slope_y, -2 * near / z], dim=-1)
    return Rays(origins, directions)


def from_ndc(points: Tensor, intrinsics: Tensor, height: int, width: int, near: float = 1.0) -> Tensor:
    """Convert points [..., 3] in normalised device coordinates, z below 1, to the world; see :func:`ndc_rays`."""
    scale_x, scale_y = _scale(intrinsics, height, width, near).unbind(-1)
    x, y, z = points.unbind(-1)
    depth = 2 * near / (1 - z)
    return torch.stack([x * depth / scale_x, y * depth / scale_y, -depth], dim=-1)


def _scale(intrinsics: Tensor, height: int, width: int, near: float) -> Tensor:
    """Return twice the focal lengths in units of the image's sides, [..., 2]."""
    if not near > 0:
        raise ValueError(f"near={near}; the near plane is in front of the cameras, give a distance above 0")
    return 2 * intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2] / intrinsics.new_tensor([width, height])
