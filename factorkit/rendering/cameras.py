"""Pinhole cameras in plain torch, so that gradients reach poses and intrinsics.

Conventions (OpenGL, Blender): ``camera_to_world`` [..., 4, 4] (or its upper [..., 3, 4]) holds in its columns the
camera's right (x), up (y) and backward (z) axes and its centre; the camera looks along -z. Image coordinates are in
pixels, right and down from the upper left corner of the image; the centre of the first pixel is (0.5, 0.5).
``intrinsics`` [..., 3, 3] is the matrix K = [[f_x, 0, c_x], [0, f_y, c_y], [0, 0, 1]] in pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops.dispatch import is_readable


class Rays(NamedTuple):
    """Half-lines o + t d, t >= 0."""

    origins: Tensor  #: [..., 3]
    directions: Tensor  #: [..., 3], unit vectors, so that t is the distance from the camera


def pixel_rays(camera_to_world: Tensor, intrinsics: Tensor, pixels: Tensor) -> Rays:
    """Compute the rays through image points; differentiable in the pose, the intrinsics and the points.

    Args:
        camera_to_world: [..., 4, 4] or [..., 3, 4].
        intrinsics: [..., 3, 3].
        pixels: [..., P, 2], image coordinates (right, down).

    Returns:
        Rays [..., P, 3] in world coordinates; the leading dimensions broadcast.

    Raises:
        ValueError: matrices or points of another shape.
    """
    _check("camera_to_world", camera_to_world, (3, 4), (4, 4))
    _check("intrinsics", intrinsics, (3, 3))
    if pixels.dim() < 2 or pixels.shape[-1] != 2:
        raise ValueError(f"pixels has shape {tuple(pixels.shape)}; give image coordinates [..., P, 2]")
    focal = intrinsics.diagonal(dim1=-2, dim2=-1)[..., None, :2]
    x, y = ((pixels - intrinsics[..., None, :2, 2]) / focal).unbind(-1)
    local = torch.nn.functional.normalize(torch.stack([x, -y, -torch.ones_like(x)], dim=-1), dim=-1)
    # Not a matrix product, which may round to tf32 on a GPU: directions need full precision.
    directions = (camera_to_world[..., None, :3, :3] * local[..., None, :]).sum(-1)
    return Rays(camera_to_world[..., None, :3, 3].expand_as(directions), directions)


def image_rays(camera_to_world: Tensor, intrinsics: Tensor, height: int, width: int) -> Rays:
    """Compute the rays through the centres of all pixels, [..., height, width, 3]; see :func:`pixel_rays`."""
    dtype, device = camera_to_world.dtype, camera_to_world.device
    down, right = (torch.arange(side, dtype=dtype, device=device) for side in (height, width))
    down, right = torch.meshgrid(down, right, indexing="ij")
    rays = pixel_rays(camera_to_world, intrinsics, torch.stack([right, down], dim=-1).reshape(-1, 2) + 0.5)
    return Rays(*(x.unflatten(-2, (height, width)) for x in rays))


def intrinsics_from_fov(fov: float, height: int, width: int) -> Tensor:
    """Return K [3, 3] of a centred camera with square pixels that spans ``fov`` degrees on its longer side."""
    focal = max(height, width) / (2 * math.tan(math.radians(fov) / 2))
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def look_at(eye: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """Return the pose [..., 4, 4] of a camera at ``eye`` [..., 3] that looks at ``target``; differentiable.

    Its y axis is on the side of ``up``.

    Raises:
        ValueError: the camera would look along ``up``, or at its own centre (checked on the CPU only).
    """
    eye, target, up = torch.broadcast_tensors(eye, target, up)
    back = torch.nn.functional.normalize(eye - target, dim=-1)
    side = torch.linalg.cross(up, back)
    if is_readable(side) and (side.norm(dim=-1) < 1e-6).any():
        raise ValueError("the camera would look along `up` or at its own centre; give another `up` or target")
    right = torch.nn.functional.normalize(side, dim=-1)
    pose = torch.stack([right, torch.linalg.cross(back, right), back, eye], dim=-1)
    last = F.pad(torch.ones_like(pose[..., :1, :1]), (3, 0))
    return torch.cat([pose, last], dim=-2)


def orbit(count: int, radius: float, elevation: float) -> Tensor:
    """Return poses [count, 4, 4] on a circle about the z axis, at ``elevation`` degrees, looking at the origin."""
    azimuth = torch.arange(count) * (2 * math.pi / count)
    e = math.radians(elevation)
    eye = torch.stack([azimuth.cos() * math.cos(e), azimuth.sin() * math.cos(e), azimuth * 0 + math.sin(e)], dim=1)
    return look_at(radius * eye, torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]))


def _check(name: str, matrix: Tensor, *shapes: tuple[int, int]) -> None:
    if matrix.shape[-2:] not in shapes:
        valid = " or ".join(f"[..., {rows}, {columns}]" for rows, columns in shapes)
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}; give {valid}")


# Normalised device coordinates (Mildenhall et al. 2020, appendix C) map the frustum of forward-facing cameras, out to
# infinity, to the box [-1, 1]^3.
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


# Contraction (Barron et al. 2022, eq. 10, with the maximum norm, whose unit ball is a cube as the field's box is) maps
# all of space to the box [-1, 1]^3: the cube [-1, 1]^3 to its middle, at half the scale, and the rest around that.
MAX_CONTRACTED = 1 - 1e-6  # of a coordinate, beyond which a position counts as this far away


def contract(positions: Tensor) -> Tensor:
    """Map positions [..., 3] anywhere to the box [-1, 1]^3; differentiable."""
    size = positions.abs().amax(-1, keepdim=True).clamp_min(1)
    return positions * ((2 - 1 / size) / (2 * size))


def uncontract(positions: Tensor) -> Tensor:
    """Return the positions [..., 3] that :func:`contract` maps to these of the box; its faces are at infinity."""
    size = 2 * positions.abs().amax(-1, keepdim=True).clamp(0.5, MAX_CONTRACTED)
    return positions * (2 / (size * (2 - size)))


def _scale(intrinsics: Tensor, height: int, width: int, near: float) -> Tensor:
    """Return twice the focal lengths in units of the image's sides, [..., 2]."""
    if not near > 0:
        raise ValueError(f"near={near}; the near plane is in front of the cameras, give a distance above 0")
    x, y = intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2].unbind(-1)
    return torch.stack([2 * x / width, 2 * y / height], -1)  # a tensor of both sides would be copied from the host
