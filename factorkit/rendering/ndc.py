"""Normalised device coordinates: the space before forward-facing cameras, out to infinity, bent into the box from -1
to 1 (Mildenhall et al. 2020, appendix C)."""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.rendering.cameras import Rays

SIDEWAYS = -1e-3  # the flattest z of a unit direction that still leads anywhere


def ndc_rays(rays: Rays, intrinsics: Tensor, height: int, width: int, near: float = 1.0) -> Rays:
    """Rays [..., 3] in normalised device coordinates; t = 0 is the plane z = -near, t = 1 infinity (z = 1 there).

    The frustum is that of a camera at the world's origin that looks along -z, which is where
    :func:`factorkit.data.open_views` puts the mean camera of an LLFF scene. Directions are not of length one: use the
    box from -1 to 1, or steps over t from 0 to 1. Gradients reach the rays and the focal lengths. Rays that do not lead
    forward are turned until they barely do.

    Args:
        rays: in world coordinates.
        intrinsics: [..., 3, 3] of the cameras, for their focal lengths; broadcasts with the rays.
        height, width: of their pictures, in pixels.
        near: distance of the nearest plane, above 0.

    Raises:
        ValueError: near not above 0.
    """
    scale = _scale(intrinsics, height, width, near)
    x, y, z = rays.origins.unbind(-1)
    dx, dy, dz = rays.directions.unbind(-1)
    dz = dz.clamp_max(SIDEWAYS)
    shift = -(near + z) / dz  # from the camera to the near plane
    x, y, z = x + shift * dx, y + shift * dy, torch.full_like(z, -near)
    scale_x, scale_y = scale.unbind(-1)
    origins = torch.stack([-scale_x * x / z, -scale_y * y / z, 1 + 2 * near / z], dim=-1)
    slope_x, slope_y = dx / dz - x / z, dy / dz - y / z
    directions = torch.stack([-scale_x * slope_x, -scale_y * slope_y, -2 * near / z], dim=-1)
    return Rays(origins, directions)


def from_ndc(points: Tensor, intrinsics: Tensor, height: int, width: int, near: float = 1.0) -> Tensor:
    """World coordinates [..., 3] of points in normalised device coordinates, z below 1; settings as :func:`ndc_rays`.

    Raises:
        ValueError: near not above 0.
    """
    scale_x, scale_y = _scale(intrinsics, height, width, near).unbind(-1)
    x, y, z = points.unbind(-1)
    depth = 2 * near / (1 - z)
    return torch.stack([x * depth / scale_x, y * depth / scale_y, -depth], dim=-1)


def _scale(intrinsics: Tensor, height: int, width: int, near: float) -> Tensor:
    """Twice the focal lengths in units of the picture's sides, [..., 2]."""
    if not near > 0:
        raise ValueError(f"near={near}; the near plane lies before the cameras, give a distance above 0")
    return 2 * intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2] / intrinsics.new_tensor([width, height])
