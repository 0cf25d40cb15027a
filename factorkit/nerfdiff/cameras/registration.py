"""True cameras brought into a found scene: what the poses leave open of one similarity, the pictures settle.

A fraction of a degree at every found camera leaves the scene's place, scale and orientation uncertain by more than a
pixel is wide; the training pictures tell them far more sharply than the cameras' centres do.
"""

from __future__ import annotations

import roma
import torch
from torch import Tensor

from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.network import NerfdiffModel
from factorkit.nerfdiff.rays import render_pixels
from factorkit.nerfdiff.scene import picked
from factorkit.utils.rng import derived_seed

STEPS = 150
RATE = 2e-3  # in radians, shares of the cameras' mean distance and of the scale; ten times what is to be mended
VIEWS, RAYS = 32, 128  # of a step


def registered(model: NerfdiffModel, start: Similarity, poses: Tensor, images: Tensor) -> Similarity:
    """The similarity near ``start`` under which the scene agrees best with pictures.

    Args:
        start: from the poses' coordinates to the model's.
        poses: of the pictures, [V, 4, 4].
        images: [V, 3, H, W] in [0, 1], which the scene may have been trained on; held-out ones would make scores of
            those too good.
    """
    device = model.optics.intrinsics.device
    base, images = start.apply(poses.double()).float().to(device), images.to(device)
    reach = base[:, :3, 3].norm(dim=1).mean()
    turn, shift, zoom = (torch.zeros(n, device=device, requires_grad=True) for n in (3, 3, 1))
    optimizer = torch.optim.Adam([turn, shift, zoom], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(derived_seed("registration", len(poses)))
    height, width = images.shape[2:]
    for step in range(STEPS):
        rows = torch.randint(len(base), (VIEWS,), generator=generator).to(device)
        pixels = torch.randint(height * width, (VIEWS, RAYS), generator=generator).to(device)
        moved = _moved(base[rows], roma.rotvec_to_rotmat(turn), shift * reach, zoom.exp())
        seen = render_pixels(model.field, moved, model.optics, pixels, (height, width), model.samples, step)
        error = (seen.color - picked(images[rows], pixels)).square().mean()
        numbers = [turn, shift, zoom]
        for number, slope in zip(numbers, torch.autograd.grad(error, numbers), strict=True):
            number.grad = slope
        optimizer.step()
        schedule.step()
    rotation = roma.rotvec_to_rotmat(turn.detach()).double().cpu()
    scale = zoom.detach().double().exp().cpu()[0]
    place = scale * rotation @ start.translation + (shift * reach).detach().double().cpu()
    return Similarity(rotation @ start.rotation, place, scale * start.scale)


def _moved(poses: Tensor, rotation: Tensor, translation: Tensor, scale: Tensor) -> Tensor:
    """Poses [B, 4, 4] under a similarity, with gradient."""
    turned = rotation @ poses[:, :3, :3]
    place = scale * poses[:, :3, 3] @ rotation.T + translation
    return torch.cat([torch.cat([turned, place[..., None]], -1), poses[:, 3:]], 1)
