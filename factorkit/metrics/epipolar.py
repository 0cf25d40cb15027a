"""Geometry of two views: essential and fundamental matrices, distances to epipolar lines, triangulation.

Cameras follow :mod:`factorkit.rendering.cameras`: OpenGL camera-to-world poses, pixels right and down from the upper
left corner. Sources: Hartley and Zisserman, Multiple View Geometry (2004), chapters 9, 11 and 12; Hartley, In defense
of the eight-point algorithm (1997). Everything is differentiable, except where singular values coincide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.utils.errors import DataError

MIN_MATCHES = 8  # that the eight-point algorithm needs
TINY = 1e-12


def projection_matrix(pose: Tensor, intrinsics: Tensor) -> Tensor:
    """Return P = K [R | t], which maps world points to pixels up to scale, [..., 3, 4].

    Args:
        pose: camera-to-world [..., 4, 4].
        intrinsics: K [..., 3, 3] in pixels.
    """
    rotation = pose[..., :3, :3] * pose.new_tensor([1.0, -1, -1])  # the axes: right, down, forward
    rotation = rotation.mT
    return intrinsics @ torch.cat([rotation, -rotation @ pose[..., :3, 3:]], dim=-1)


def essential_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Return E = [t]_x R with y^T E x = 0 for the same point at K^-1 pixels x and y of two cameras (equation 9.12).

    Args:
        first: camera-to-world poses [..., 4, 4].
        second: the other cameras' [..., 4, 4].

    Returns:
        [..., 3, 3]; 0 for two cameras in one place, which have no epipolar lines.
    """
    axes = first.new_tensor([1.0, -1, -1])
    first_axes, second_axes = first[..., :3, :3] * axes, second[..., :3, :3] * axes
    rotation = second_axes.mT @ first_axes
    translation = (second_axes.mT @ (first[..., :3, 3:] - second[..., :3, 3:])).squeeze(-1)
    return torch.linalg.cross(translation[..., :, None].expand_as(rotation), rotation, dim=-2)


def fundamental_matrix(first: Tensor, first_intrinsics: Tensor, second: Tensor, second_intrinsics: Tensor) -> Tensor:
    """Return F with y^T F x = 0 for the same point at pixels x and y of two cameras, [..., 3, 3].

    Args:
        first: camera-to-world poses [..., 4, 4].
        first_intrinsics: [..., 3, 3] in pixels.
        second: the other cameras' poses [..., 4, 4].
        second_intrinsics: [..., 3, 3] in pixels.
    """
    essential = essential_matrix(first, second)
    return torch.linalg.inv(second_intrinsics).mT @ essential @ torch.linalg.inv(first_intrinsics)


def epipolar_lines(fundamental: Tensor, points: Tensor) -> Tensor:
    """Return the lines (a, b, c) with a x + b y + c = 0 in the second view of points [..., P, 2] of the first."""
    return F.pad(points, (0, 1), value=1.0) @ fundamental.mT


def epipolar_distance(fundamental: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the distances of matched points to each other's epipolar lines, averaged over both views, in pixels.

    Args:
        fundamental: [..., 3, 3].
        first: points [..., P, 2] in the first view.
        second: the matched points [..., P, 2] in the second view.

    Returns:
        [..., P]; infinite where a point has no epipolar line.
    """
    residual, line, other = _residuals(fundamental, first, second)
    distances = [residual.abs() / n.norm(dim=-1).clamp_min(TINY) for n in (line, other)]
    return torch.where(_has_line(line, other), sum(distances) / 2, torch.inf)


def sampson_distance(fundamental: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the first-order distance of matches to the nearest exact match, in pixels (the root of equation 11.9).

    Args:
        fundamental: [..., 3, 3].
        first: points [..., P, 2] in the first view.
        second: the matched points [..., P, 2] in the second view.

    Returns:
        [..., P]; infinite where a point has no epipolar line.
    """
    residual, line, other = _residuals(fundamental, first, second)
    slope = torch.cat([line, other], dim=-1).norm(dim=-1)
    return torch.where(_has_line(line, other), residual.abs() / slope.clamp_min(TINY), torch.inf)


def _residuals(fundamental: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y^T F x [..., P] and the normals [..., P, 2] of both lines, of F scaled to the norm 1."""
    fundamental = fundamental / fundamental.flatten(-2).norm(dim=-1).clamp_min(TINY)[..., None, None]
    line, other = epipolar_lines(fundamental, first), epipolar_lines(fundamental.mT, second)
    residual = (line * F.pad(second, (0, 1), value=1.0)).sum(-1)
    return residual, line[..., :2], other[..., :2]


def _has_line(line: Tensor, other: Tensor) -> Tensor:
    return (line.norm(dim=-1) > TINY) & (other.norm(dim=-1) > TINY)


def fit_fundamental(first: Tensor, second: Tensor) -> Tensor:
    """Fit F to matched points by the normalised eight-point algorithm (Hartley 1997).

    Args:
        first: points [..., P, 2] in the first view, P at least 8.
        second: the matched points [..., P, 2] in the second view.

    Returns:
        [..., 3, 3] of rank 2 and norm 1; its sign is arbitrary.

    Raises:
        DataError: fewer than 8 matches, or two lists of different lengths.
    """
    if first.shape != second.shape or first.shape[-1] != 2 or first.shape[-2] < MIN_MATCHES:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise DataError(f"points {shapes}: give two tensors [..., P, 2] of the same P matches, P at least 8")
    x, to_x = _normalise(first)
    y, to_y = _normalise(second)
    equations = (y[..., :, None] * x[..., None, :]).flatten(-2)
    fundamental = torch.linalg.svd(equations)[2][..., -1, :].unflatten(-1, (3, 3))
    u, scales, v = torch.linalg.svd(fundamental)
    fundamental = (u * (scales * scales.new_tensor([1.0, 1, 0]))[..., None, :]) @ v
    fundamental = to_y.mT @ fundamental @ to_x
    return fundamental / fundamental.flatten(-2).norm(dim=-1)[..., None, None]


def _normalise(points: Tensor) -> tuple[Tensor, Tensor]:
    """Move points to mean 0 and mean distance sqrt(2): homogeneous points [..., P, 3], and the map [..., 3, 3]."""
    centre = points.mean(-2)
    spread = (points - centre[..., None, :]).norm(dim=-1).mean(-1).clamp_min(TINY)
    scale = (2**0.5 / spread)[..., None]
    transform = torch.diag_embed(torch.cat([scale, scale, torch.ones_like(scale)], dim=-1))
    transform = transform + F.pad((-scale * centre)[..., None], (2, 0, 0, 1))
    return F.pad(points, (0, 1), value=1.0) @ transform.mT, transform


def triangulate(projections: Tensor, points: Tensor) -> Tensor:
    """Return the world points [..., 3] that V cameras see at given pixels, by the linear method (section 12.2).

    Args:
        projections: :func:`projection_matrix` of V cameras [..., V, 3, 4], V at least 2.
        points: pixels [..., V, 2].

    Returns:
        [..., 3]; not finite for points at infinity.
    """
    equations = points[..., None] * projections[..., 2:, :] - projections[..., :2, :]
    equations = equations / equations.norm(dim=-1, keepdim=True).clamp_min(TINY)
    solution = torch.linalg.svd(equations.flatten(-3, -2))[2][..., -1, :]
    return solution[..., :3] / solution[..., 3:]
