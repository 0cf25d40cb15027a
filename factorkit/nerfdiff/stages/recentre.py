"""Recentre the views of an object by their masks, so that a search over cameras that look at the origin applies.

The search compares recentred images. What it finds is turned into cameras of the original images, which every later
stage uses: the offset of each view's foreground becomes the start of its camera's "aim".
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.nerfdiff.box import Foreground, mask_centroids
from factorkit.nerfdiff.cameras.poses import azimuth_degrees, direction_vectors
from factorkit.nerfdiff.scene import Scene

MAX_CENTRED_SPREAD = 0.05  # of the image's side: centred objects have .02 to .045, shifted by up to 5% .055 and more
MAX_SIZE_SPREAD = 0.1  # Lego at one distance has .07, a distance that varies by 20% .13


def foreground_offsets(foreground: Foreground) -> Tensor:
    """Return the centroids [V, 2] of the foreground from the principal point, right and down in focal lengths.

    The centroid of a view that cuts the object is drawn to the median of all views, wholly where the cut is as long as
    the visible part is wide; that of an empty view is the median.
    """
    masks = foreground.masks & foreground.scored
    counts = masks.sum((1, 2))
    offsets = (mask_centroids(masks) - foreground.intrinsics[:, :2, 2]) / foreground.intrinsics.diagonal(
        dim1=1, dim2=2
    )[:, :2]
    cut = masks[:, [0, -1]].sum((1, 2)) + masks[:, :, [0, -1]].sum((1, 2))
    trust = (1 - cut / counts.clamp_min(1).sqrt()).clamp_min(0) * (counts > 0)
    if not trust.any():
        return torch.zeros_like(offsets)
    median = offsets[trust > trust.median() - 1e-6].median(0).values
    return median + trust[:, None] * (offsets - median)


def is_unevenly_framed(scene: Scene) -> bool:
    """Return whether an object's foreground is known, and often off the middle of the images or of changing size."""
    if scene.layout != "object" or scene.foreground is None:
        return False
    offsets = foreground_offsets(scene.foreground)
    off_centre = offset_spread(offsets, scene.camera.intrinsics) > MAX_CENTRED_SPREAD
    return off_centre or size_spread(scene.foreground) > MAX_SIZE_SPREAD


def size_spread(foreground: Foreground) -> float:
    """Return the relative spread of the size of an object in the images: the root of the area of its masks."""
    areas = (foreground.masks & foreground.scored).sum((1, 2))
    sizes = areas[areas > 0].float().sqrt().log()
    if not len(sizes):
        return 0.0
    high, low = sizes.quantile(sizes.new_tensor([0.84, 0.16]))  # one standard deviation, few wrong masks aside
    return float(high - low) / 2


def offset_spread(offsets: Tensor, intrinsics: Tensor) -> float:
    """Return how far offsets [V, 2] are from those of an object at the centre, in units of the image's side.

    The mean height does not count: an object may lie below the middle of its box.

    Args:
        offsets: in focal lengths.
        intrinsics: [3, 3] in units of the image's width and height.
    """
    x, y = (offsets * intrinsics.diagonal()[:2]).unbind(1)
    return float((x.square().mean() + y.var(correction=0)).sqrt())


def recentre_scene(scene: Scene, offsets: Tensor) -> Scene:
    """Return the scene with images moved by offsets [V, 2] in focal lengths; beyond their borders is background."""
    focal = scene.camera.intrinsics.diagonal()[:2]
    own = scene.camera.of_views()
    focal = focal if own is None else own.diagonal(dim1=1, dim2=2)[:, :2]
    shift = 2 * offsets * focal  # in the coordinates of affine_grid: -1 to 1 over the image
    transform = torch.eye(2, 3, device=shift.device).repeat(len(shift), 1, 1)
    transform[:, :, 2] = shift

    def move(images: Tensor) -> Tensor:
        grid = F.affine_grid(transform, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    background = scene.camera.background[:, None, None]
    scored = None if scene.loss_masks is None else (move(scene.loss_masks) > 0.5).float()
    masks = None if scene.masks is None else move(scene.masks)
    return replace(scene, images=move(scene.images - background) + background, loss_masks=scored, masks=masks)


def aim_from_offsets(offsets: Tensor) -> Tensor:
    """Return the "aim" [V, 2] of cameras that see the origin at offsets [V, 2]: the camera moves the other way."""
    return torch.stack([-offsets[:, 0], offsets[:, 1]], 1)


def directions_with_aim(position: Tensor, aim: Tensor) -> Tensor:
    """Return the directions [V, 3] for ``orbit_poses`` whose cameras, moved by ``aim`` [V, 2], are at positions.

    Args:
        position: unit vectors [V, 3] from the origin to the cameras.
        aim: in units of the distance.
    """
    x, y = aim.unbind(1)
    # in the camera's axes (right, up, back) it is at (x, y, 1) and the vertical is (0, cos, sin) of its elevation
    height = position[:, 2] * ((1 + x**2 + y**2) / (1 + y**2)).sqrt()
    elevation = height.clamp(-1, 1).asin() - y.atan()
    turn = torch.atan2(x, elevation.cos() - y * elevation.sin())
    return direction_vectors(azimuth_degrees(position) - turn.rad2deg(), elevation.rad2deg())
