"""Known poses in the model's coordinates: around the origin with z up, or near the origin and looking along -z.

Poses that already are there stay unchanged. Fields, cameras and exports use these coordinates, which are the given ones
up to a similarity.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.arrangement import compute_mean_pose
from factorkit.utils.errors import DataError

MIN_UP_COSINE = math.cos(math.radians(30))  # a hand-held camera's tilt; beyond it another up axis is assumed
MIN_AGREEMENT = 0.2  # length of a mean axis below which cameras share no such axis
UP_WEIGHT = 0.05  # of the up axes beside the right axes, which leave the horizon open if all cameras look one way
RELATIVE_ROUNDING = 1e-5  # of the positions' size: a smaller spread is none
MIN_FORWARD_COSINE = math.cos(math.radians(15))  # of the mean viewing axis to -z, for normalised forward-facing poses
NEAR_DEPTH, MAX_NEAR_DEPTH = 1.2, 2.0  # depth where LLFF's scenes start, and the largest that wastes little of the box
DEFAULT_SPREAD = 0.3  # of positions if the near depth is unknown, as in the pose search; LLFF's fern has 0.27
NORMALISED_SPREADS = (0.03, 1.5)  # of poses that are taken to be in near-plane depths already


def center_poses(poses: Tensor, distance: float) -> Tensor:
    """Translate and scale poses [V, 4, 4] so that they look at the origin from ``distance`` on average.

    Raises:
        DataError: all cameras have one position, which gives no depth.
    """
    eye, axis = poses[:, :3, 3], poses[:, :3, 2]
    if rms_spread(eye) <= RELATIVE_ROUNDING * float(eye.abs().max()):
        raise DataError(
            "the poses put all cameras at one position (a tripod?), which gives no depth. Give poses of cameras "
            'around an object, or poses="predicted"'
        )
    across = torch.eye(3).to(poses) - axis[:, :, None] * axis[:, None]
    # Least-squares intersection of the viewing axes; a small weight on the mean position settles parallel axes.
    weight = 1e-6 * torch.eye(3).to(poses) * len(poses)
    matrix, right = across.sum(0) + weight, (across @ eye[..., None]).sum(0) + weight @ eye.mean(0)[:, None]
    target = torch.linalg.solve(matrix, right)[:, 0]
    centered = poses.clone()
    centered[:, :3, 3] = (eye - target) * (distance / (eye - target).norm(dim=1).mean())
    return centered


def align_up_axis(poses: Tensor) -> Tensor:
    """Rotate poses [V, 4, 4] so that the cameras' common up axis is z, unless it is within 30 degrees.

    The mean up axis alone is biased for cameras high above one side, so up is also what the right axes are
    perpendicular to.
    """
    import roma

    right, up = poses[:, :3, 0].double().cpu(), poses[:, :3, 1].double().cpu().mean(0)
    axis = torch.linalg.eigh(right.T @ right / len(right) - UP_WEIGHT * torch.outer(up, up))[1][:, 0]
    axis = axis if axis @ up >= 0 else -axis
    if up[2] >= MIN_UP_COSINE * up.norm() or axis[2] >= MIN_UP_COSINE or axis @ up < MIN_AGREEMENT:
        return poses
    z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    normal = torch.linalg.cross(axis, z)
    normal = normal / normal.norm() if normal.norm() > 1e-6 else torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    rotation = torch.eye(4, dtype=torch.float64)
    rotation[:3, :3] = roma.rotvec_to_rotmat(normal * axis[2].clamp(-1, 1).acos())
    return (rotation @ poses.double().cpu()).to(poses)


def align_forward(poses: Tensor, near: float | None) -> Tensor:
    """Move forward-facing poses [V, 4, 4] so that their mean is at the origin and looks along -z, in near-plane depths.

    Args:
        poses: camera-to-world.
        near: depth of the nearest content in the poses' units; None: unknown. Then poses that are normalised already
            keep their scale, and others are scaled to a spread of 0.3, which fits LLFF's scenes.

    Raises:
        DataError: the cameras share no viewing direction.
    """
    matrices = poses.double().cpu().numpy()
    if np.linalg.norm(matrices[:, :3, 2].mean(0)) < MIN_AGREEMENT:
        raise DataError('the cameras of this forward-facing scene look all ways; open the views with layout="object"')
    mean = compute_mean_pose(matrices)
    center, spread = mean[:3, 3], rms_spread(poses[:, :3, 3])
    normalised = mean[2, 2] >= MIN_FORWARD_COSINE and np.linalg.norm(center) <= max(0.5, 2 * spread)
    one_position = spread <= RELATIVE_ROUNDING * float(poses[:, :3, 3].abs().max())  # no depth, so any scale will do
    if near:
        scale = 1.0 if 1 <= near <= MAX_NEAR_DEPTH else NEAR_DEPTH / near
    else:
        scaled = normalised and NORMALISED_SPREADS[0] <= spread <= NORMALISED_SPREADS[1]
        scale = 1.0 if one_position or scaled else DEFAULT_SPREAD / spread
    if normalised and scale == 1:
        return poses
    aligned = np.linalg.inv(mean) @ matrices
    aligned[:, :3, 3] *= scale
    return torch.from_numpy(aligned).to(poses)


def rms_spread(positions: Tensor) -> float:
    """Return the root mean square distance of positions [V, 3] from their mean."""
    return float((positions - positions.mean(0)).square().sum(1).mean().sqrt())
