"""The pose of a picture in a known scene, from a guess down the photometric error (Yen-Chen et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.engine.streams import derived_seed
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.model import NerfdiffModel
from factorkit.nerfdiff.poses import FreePoses, OrbitPoses
from factorkit.nerfdiff.rays import render_pixels
from factorkit.nerfdiff.scene import picked
from factorkit.nerfdiff.search import directions_of

RAYS = 512  # of each picture a step
RATE = 0.01  # in radians, or in units of the distance


def refined(model: NerfdiffModel, images: Tensor, poses: Tensor, steps: int, config: NerfdiffConfig) -> Tensor:
    """Poses [B, 4, 4] of images [B, 3, H, W] in [0, 1], moved by so many steps of Adam; the model is not touched.

    Cameras around an object keep to the freedoms they were trained with.
    """
    if model.forward_facing:
        free = FreePoses(poses)
    else:
        distance = float(poses[:, :3, 3].norm(dim=1).mean())
        free = OrbitPoses(directions_of(poses), distance, config.pose_freedom)
    free = free.to(images.device)
    optimizer = torch.optim.Adam(free.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(derived_seed("localise", steps))
    height, width = images.shape[2:]
    for _ in range(steps):
        pixels = torch.randint(height * width, (min(RAYS, height * width),), generator=generator).to(images.device)
        pixels = pixels.expand(len(images), -1)
        seen = render_pixels(model.field, free(), model.optics, pixels, (height, width), model.samples)
        error = (seen - picked(images, pixels)).square().mean((1, 2)).sum()
        numbers = list(free.parameters())
        for number, slope in zip(numbers, torch.autograd.grad(error, numbers), strict=True):
            number.grad = slope
        optimizer.step()
        schedule.step()
    return free().detach()
