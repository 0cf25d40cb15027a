"""The pose of a picture in a known scene: the best of some guesses, and down the photometric error from there
(Yen-Chen et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from factorkit.data.views.views import resize_area, target_size
from factorkit.nerfdiff.cameras.poses import FreePoses, OrbitPoses, orbit_poses
from factorkit.nerfdiff.network import NerfdiffModel
from factorkit.nerfdiff.rays import render_pixels, render_views
from factorkit.nerfdiff.scene import picked
from factorkit.nerfdiff.stages.dictionary import directions_of
from factorkit.utils.rng import derived_seed

RAYS = 512  # of each picture a step
NEAR = 0.03  # in entries of a rotation, and of the distance
RATE = 0.01  # in radians, or in units of the distance
# a glance at all guesses, a look at the best few: pixels along the longer side, and how many go on from there
GLANCE, FEW, LOOK = 16, 4, 32


@torch.no_grad()
def checked(model: NerfdiffModel, images: Tensor, poses: Tensor) -> Tensor:
    """The poses [B, 4, 4] from which the scene looks most like images [B, 3, H, W], among [B, N, 4, 4].

    Around an object each guess turned half about z is one more: the other side of a scene that nearly looks alike from
    both is where an encoder errs.
    """
    if not model.forward_facing:
        half = poses.new_tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
        poses = torch.cat([poses, half * poses], dim=1)
    for side, keep in ((GLANCE, FEW), (LOOK, 1)):
        size = target_size(min(side, max(images.shape[2:])), *images.shape[2:])
        seen = render_views(model.field, poses, model.optics, size, model.samples).color
        errors = (seen - resize_area(images, *size).movedim(1, -1)[:, None]).square().mean((2, 3, 4))
        best = errors.topk(min(keep, errors.shape[1]), dim=1, largest=False).indices
        poses = poses.gather(1, best[:, :, None, None].expand(-1, -1, 4, 4))
    return poses[:, 0]


def in_orbit(poses: Tensor) -> bool:
    """Whether cameras [V, 4, 4] look at the origin from one distance, upright, but for a degree or two."""
    way, distance = directions_of(poses), poses[:, :3, 3].norm(dim=1).mean()
    if (way[:, :2].norm(dim=1) < 1e-4).any():  # at the zenith nothing is upright
        return False
    off = (orbit_poses(way, distance) - poses).abs()
    return bool((off[:, :3, :3] < NEAR).all() and (off[:, :3, 3] < NEAR * distance).all())


def refined(model: NerfdiffModel, images: Tensor, poses: Tensor, steps: int, distance: float) -> Tensor:
    """Poses [B, 4, 4] of images [B, 3, H, W] in [0, 1], moved by so many steps of Adam; the model is not touched.

    Where the training's cameras all look at an object's middle from one distance, upright, so do these, from
    ``distance``; else they are free.
    """
    if not model.forward_facing and in_orbit(model.views):
        free: nn.Module = OrbitPoses(directions_of(poses), distance)
    else:
        free = FreePoses(poses)
    free = free.to(images.device)
    optimizer = torch.optim.Adam(free.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(derived_seed("localise", steps))
    height, width = images.shape[2:]
    for _ in range(steps):
        pixels = torch.randint(height * width, (min(RAYS, height * width),), generator=generator).to(images.device)
        pixels = pixels.expand(len(images), -1)
        seen = render_pixels(model.field, free(), model.optics, pixels, (height, width), model.samples)
        error = (seen.color - picked(images, pixels)).square().mean((1, 2)).sum()
        numbers = list(free.parameters())
        for number, slope in zip(numbers, torch.autograd.grad(error, numbers), strict=True):
            number.grad = slope
        optimizer.step()
        schedule.step()
    return free().detach()
