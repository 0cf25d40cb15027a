"""The flip test: fit a fresh field to half of the views, and let the other half choose their poses by it.

Views on the wrong side of a nearly symmetric scene agree with a field that was fitted to them, since it grows a second
front for them. A held-out field does not have that bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.data.views.views import resize_area, target_size
from factorkit.nerfdiff.cameras.poses import OrbitPoses, orbit_poses, rotate_poses_about_z
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.scene import Scene, mean_squared_error
from factorkit.nerfdiff.stages.dictionary import COMPARISON_SIDE, candidate_errors
from factorkit.nerfdiff.stages.recentre import directions_with_aim
from factorkit.utils import distributed

OUTLIER_RATIO = 0.8  # a dictionary position must have less than this share of the refined pose's error
ROTATION_SIDE = 32  # longer side in pixels of the images that are compared after rotations
ROTATIONS = (0.0, 90.0, 180.0, 270.0)  # degrees about z


def split_in_halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two random halves of the indices below ``count``, each sorted."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


@torch.no_grad()
def best_rotations(field: Field, scene: Scene, poses: Tensor, views: Tensor, samples: int) -> Tensor:
    """Return the rotation in degrees, one of :data:`ROTATIONS`, with the lowest error for each of some views.

    Args:
        field: fitted to other views.
        poses: of all views, [V, 4, 4].
        views: indices of the views that choose.
    """
    size = target_size(min(ROTATION_SIDE, max(scene.size)), *scene.size)
    images = resize_area(scene.images[views], *size).movedim(1, -1)
    masks = None if scene.loss_masks is None else resize_area(scene.loss_masks[views], *size).movedim(1, -1)

    def errors(rows: slice) -> Tensor:
        columns = []
        for degrees in ROTATIONS:
            rotated = rotate_poses_about_z(poses[views[rows]], degrees)
            own = scene.camera.of_views(views[rows])
            color = render_views(field, rotated, scene.camera, size, samples, intrinsics=own).color
            columns.append(mean_squared_error(color, images[rows], (1, 2, 3), None if masks is None else masks[rows]))
        return torch.stack(columns, 1)

    best = distributed.map_shares(errors, len(views)).argmin(1)
    return torch.tensor(ROTATIONS).to(poses)[best]


@torch.no_grad()
def reassign_outliers(
    field: Field,
    scene: Scene,
    poses: OrbitPoses,
    views: Tensor,
    directions: Tensor,
    samples: int,
    centred: Scene | None = None,
) -> Tensor:
    """Return the directions [B, 3] of some views, those of outliers replaced by one of the dictionary.

    A refined direction agrees better with the field than the nearest direction of the dictionary, unless it is far off.

    Args:
        field: fitted to other views.
        poses: of all views.
        views: indices of the views to check, [B].
        directions: the dictionary, [D, 3].
        centred: the scene with recentred views, which are compared with the dictionary; None: they are centred.
    """
    images, compared = scene.images[views], centred or scene
    masks, compared_masks = (None if x.loss_masks is None else x.loss_masks[views] for x in (scene, compared))
    size = target_size(min(COMPARISON_SIDE, max(scene.size)), *scene.size)
    candidates = orbit_poses(directions, scene.distance)

    def own_errors(rows: slice) -> Tensor:
        own = scene.camera.of_views(views[rows])
        color = render_views(field, poses(views[rows]), scene.camera, size, samples, intrinsics=own).color
        weights = None if masks is None else resize_area(masks[rows], *size)
        return mean_squared_error(color.movedim(-1, 1), resize_area(images[rows], *size), (1, 2, 3), weights)

    def errors_from(rows: slice) -> Tensor:
        own = scene.camera.of_views(views)
        return candidate_errors(
            field,
            candidates[rows],
            scene.camera,
            compared.images[views],
            samples,
            loss_masks=compared_masks,
            intrinsics=own,
        ).T

    own = distributed.map_shares(own_errors, len(views))
    least, index = distributed.map_shares(errors_from, len(candidates)).T.min(1)
    nearest = directions[index]
    if "aim" in poses.freedom:
        nearest = directions_with_aim(nearest, poses.freedom["aim"][views])
    return torch.where((least < OUTLIER_RATIO * own)[:, None], nearest, poses.direction[views])
