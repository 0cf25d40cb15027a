"""Camera pose of an image in a known scene, by minimising the photometric error (Yen-Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from factorkit.data.views.views import resize_area, target_size
from factorkit.nerfdiff.cameras.poses import FreePoses, OrbitPoses, camera_directions, orbit_poses
from factorkit.nerfdiff.network import NerfdiffModel
from factorkit.nerfdiff.rays import render_pixels, render_views
from factorkit.nerfdiff.scene import gather_pixels, mean_squared_error
from factorkit.utils.rng import derived_seed

RAYS_PER_IMAGE = 512  # in each step
ORBIT_TOLERANCE = 0.03  # in entries of a rotation matrix, and relative to the distance
LEARNING_RATE = 0.01  # in radians, and in units of the distance
# Two rounds of comparing candidates: longer side of the renders in pixels, and how many candidates remain.
COMPARISON_ROUNDS = ((16, 4), (32, 1))


class TargetImages(NamedTuple):
    """Images with which renders are compared.

    Attributes:
        images: [B, 3, H, W] in [0, 1].
        intrinsics: [B, 3, 3] in units of width and height; None: those of the model.
        loss_masks: [B, 1, H, W], 0 at pixels that do not count; None: all count.
    """

    images: Tensor
    intrinsics: Tensor | None = None
    loss_masks: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def select(self, rows: Tensor | slice) -> TargetImages:
        """Return some of the images."""
        return TargetImages(*(None if value is None else value[rows] for value in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> TargetImages:
        """Return the images on a device."""
        return TargetImages(*(None if value is None else value.to(device) for value in self))  # type: ignore[arg-type]

    def pixel_error(self, color: Tensor, pixels: Tensor, dims: tuple[int, ...] = (1, 2)) -> Tensor:
        """Return the mean squared error, over ``dims``, of colours [B, R, 3] at pixel indices [B, R]."""
        weights = None if self.loss_masks is None else gather_pixels(self.loss_masks, pixels)
        return mean_squared_error(color, gather_pixels(self.images, pixels), dims, weights)


@torch.no_grad()
def select_best_poses(model: NerfdiffModel, target: TargetImages, poses: Tensor) -> Tensor:
    """Return the poses [B, 4, 4] with the lowest photometric error for images, among [B, N, 4, 4].

    Around an object, each candidate rotated by 180 degrees about z is tried too: nearly symmetric scenes mislead the
    encoder that way.
    """
    if not model.forward_facing:
        half_turn = poses.new_tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
        poses = torch.cat([poses, half_turn * poses], dim=1)
    for side, keep in COMPARISON_ROUNDS:
        size = target_size(min(side, max(target.size)), *target.size)
        own = None if target.intrinsics is None else target.intrinsics[:, None]
        color = render_views(model.field, poses, model.camera, size, model.samples_per_ray, intrinsics=own).color
        images, weights = resize_area(target.images, *size).movedim(1, -1)[:, None], None
        if target.loss_masks is not None:
            weights = resize_area(target.loss_masks, *size).movedim(1, -1)[:, None]
        errors = mean_squared_error(color, images, (2, 3, 4), weights)
        best = errors.topk(min(keep, errors.shape[1]), dim=1, largest=False).indices
        poses = poses.gather(1, best[:, :, None, None].expand(-1, -1, 4, 4))
    return poses[:, 0]


def is_orbit(poses: Tensor) -> bool:
    """Return whether cameras [V, 4, 4] are upright and look at the origin from one distance, within 2 degrees or so."""
    direction, distance = camera_directions(poses), poses[:, :3, 3].norm(dim=1).mean()
    if (direction[:, :2].norm(dim=1) < 1e-4).any():  # "upright" is undefined at the zenith
        return False
    difference = (orbit_poses(direction, distance) - poses).abs()
    rotation, translation = difference[:, :3, :3], difference[:, :3, 3]
    return bool((rotation < ORBIT_TOLERANCE).all() and (translation < ORBIT_TOLERANCE * distance).all())


def refine_poses(model: NerfdiffModel, target: TargetImages, poses: Tensor, steps: int, distance: float) -> Tensor:
    """Refine poses [B, 4, 4] of images by steps of Adam; the model stays fixed.

    If the training cameras are upright and look at the origin from one distance, so do the refined ones, from
    ``distance``; otherwise all six degrees of freedom are refined.
    """
    free: nn.Module = FreePoses(poses)
    if not model.forward_facing and is_orbit(model.views):
        free = OrbitPoses(camera_directions(poses), distance)
    free = free.to(target.images.device)
    generator = torch.Generator().manual_seed(derived_seed("localise", steps))
    height, width = target.size

    def loss(step: int) -> Tensor:
        count = min(RAYS_PER_IMAGE, height * width)
        pixels = torch.randint(height * width, (count,), generator=generator).to(target.images.device)
        pixels = pixels.expand(len(target.images), -1)
        size, samples, own = (height, width), model.samples_per_ray, target.intrinsics
        color = render_pixels(model.field, free(), model.camera, pixels, size, samples, intrinsics=own).color
        return target.pixel_error(color, pixels).sum()

    minimise(loss, free.parameters(), steps, LEARNING_RATE)
    refined: Tensor = free().detach()
    return refined


def minimise(loss: Callable[[int], Tensor], parameters: Iterable[Tensor], steps: int, learning_rate: float) -> None:
    """Minimise ``loss(step)`` over ``parameters`` by Adam with a cosine schedule; no other gradients are computed."""
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss(step), parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
