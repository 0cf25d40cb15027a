"""Known poses brought into the space a model works in: around the origin with z up, or near it and looking along -z.

Nothing is moved that is there already. Fields, cameras and exports are then of that space, which is the given one up to
a similarity.
"""

from __future__ import annotations

import math

import numpy as np
import roma
import torch
from torch import Tensor

from factorkit.data.views.cameras import compute_mean_pose
from factorkit.utils.errors import DataError

TILT = math.cos(math.radians(30))  # of cameras' up from z: what a hand does; beyond it another axis is meant
AGREED = 0.2  # the least mean of the cameras' ups along their common one; else they agree on none
UPS = 0.05  # weight of the ups beside the sideways axes, which tell what is level unless all cameras look one way
ROUNDING = 1e-5  # of the places' size: a spread below it is none
AHEAD = math.cos(math.radians(15))  # how far from -z the mean of cameras looks that face forward already
NEAR, FARTHEST = 1.2, 2.0  # the depth from which on LLFF's scenes begin, and the most that wastes little of the box
SPREAD = 0.3  # of places, where nothing tells the nearest depth, as of those a search begins with; LLFF's fern has 0.27
SPREADS = (0.03, 1.5)  # of poses that are taken to be in units of the nearest plane's depth already


def centred(poses: Tensor, distance: float) -> Tensor:
    """Poses [V, 4, 4] moved and scaled so that the point they look at is the origin, at ``distance`` on average.

    Raises:
        DataError: all cameras stand in one place, from where nothing can be seen in depth.
    """
    eye, axis = poses[:, :3, 3], poses[:, :3, 2]
    if spread(eye) <= ROUNDING * float(eye.abs().max()):
        raise DataError(
            "the poses put all cameras in one place (a tripod?), from where nothing is seen in depth. Give "
            'poses with the places of cameras around an object, or poses="predicted"'
        )
    across = torch.eye(3).to(poses) - axis[:, :, None] * axis[:, None]
    # nearest to all viewing axes in the least squares; a little weight on the cameras' mean where they are parallel
    weight = 1e-6 * torch.eye(3).to(poses) * len(poses)
    matrix, side = across.sum(0) + weight, (across @ eye[..., None]).sum(0) + weight @ eye.mean(0)[:, None]
    point = torch.linalg.solve(matrix, side)[:, 0]
    found = poses.clone()
    found[:, :3, 3] = (eye - point) * (distance / (eye - point).norm(dim=1).mean())
    return found


def upright(poses: Tensor) -> Tensor:
    """Poses [V, 4, 4] turned so that what their cameras hold for up is z, unless it is within 30 degrees.

    Cameras high above one side lean over together, so their mean up alone is not trusted: up is also what their
    sideways axes are level with.
    """
    right, up = poses[:, :3, 0].double().cpu(), poses[:, :3, 1].double().cpu().mean(0)
    axis = torch.linalg.eigh(right.T @ right / len(right) - UPS * torch.outer(up, up))[1][:, 0]
    axis = axis if axis @ up >= 0 else -axis
    if up[2] >= TILT * up.norm() or axis[2] >= TILT or axis @ up < AGREED:
        return poses
    z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    way = torch.linalg.cross(axis, z)
    way = way / way.norm() if way.norm() > 1e-6 else torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = roma.rotvec_to_rotmat(way * axis[2].clamp(-1, 1).acos())
    return (turn @ poses.double().cpu()).to(poses)


def ahead(poses: Tensor, near: float | None) -> Tensor:
    """Forward-facing poses [V, 4, 4] with their mean at the origin, looking along -z, in units in which the nearest
    plane of normalised device coordinates, at depth 1, leaves nothing out.

    Args:
        near: depth from which on everything lies, in the poses' units; None: unknown. Then poses that are there already
            keep their scale, and others are scaled to a spread of 0.3, which fits LLFF's scenes.

    Raises:
        DataError: cameras that look all ways.
    """
    given = poses.double().cpu().numpy()
    if np.linalg.norm(given[:, :3, 2].mean(0)) < AGREED:
        raise DataError('the cameras of this forward-facing scene look all ways; open the views with layout="object"')
    mean = compute_mean_pose(given)
    place, reach = mean[:3, 3], spread(poses[:, :3, 3])
    there = mean[2, 2] >= AHEAD and np.linalg.norm(place) <= max(0.5, 2 * reach)
    one_place = reach <= ROUNDING * float(poses[:, :3, 3].abs().max())  # nothing has depth, so no scale is wrong
    if near:
        scale = 1.0 if 1 <= near <= FARTHEST else NEAR / near
    else:
        scale = 1.0 if one_place or (there and SPREADS[0] <= reach <= SPREADS[1]) else SPREAD / reach
    if there and scale == 1:
        return poses
    found = np.linalg.inv(mean) @ given
    found[:, :3, 3] *= scale
    return torch.from_numpy(found).to(poses)


def spread(places: Tensor) -> float:
    """Root mean square distance of places [V, 3] from their mean."""
    return float((places - places.mean(0)).square().sum(1).mean().sqrt())
