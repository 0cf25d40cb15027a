"""Alignment of true poses with a trained scene: the poses give a first similarity, the training images refine it.

An error of a fraction of a degree at every camera leaves the scene's position, scale and orientation uncertain by more
than a pixel; the training images determine them far more precisely.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.fields.base import ImageField
from factorkit.nerfdiff.network import NerfdiffModel
from factorkit.nerfdiff.rays import render_pixels
from factorkit.nerfdiff.stages.localise import TargetImages, minimise
from factorkit.utils.rng import derived_seed

STEPS = 150
LEARNING_RATE = 2e-3  # in radians, units of the mean distance and log scale; a tenth of the errors to correct
VIEWS_PER_STEP, RAYS_PER_VIEW = 32, 128
IMAGES_PER_STEP = 4  # of fields that draw whole images, all of whose pixels count


def register_scene(model: NerfdiffModel, start: Similarity, poses: Tensor, target: TargetImages) -> Similarity:
    """Refine a similarity so that the scene agrees best with images.

    Args:
        model: the trained model, which stays fixed.
        start: from the poses' coordinates to the model's.
        poses: of the images, [V, 4, 4].
        target: images of the training data; held-out images would make their own scores too good.
    """
    import roma

    device = model.camera.intrinsics.device
    base, target = start.apply(poses.double()).float().to(device), target.to(device)
    mean_distance = base[:, :3, 3].norm(dim=1).mean()
    rotvec, shift, log_scale = (torch.zeros(n, device=device, requires_grad=True) for n in (3, 3, 1))
    generator = torch.Generator().manual_seed(derived_seed("registration", len(poses)))
    height, width = target.size
    draws_images = isinstance(model.field, ImageField)
    views = IMAGES_PER_STEP if draws_images else VIEWS_PER_STEP

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(base), (views,), generator=generator).to(device)
        pixels = torch.arange(height * width).expand(views, -1)
        if not draws_images:
            pixels = torch.randint(height * width, (views, RAYS_PER_VIEW), generator=generator)
        pixels = pixels.to(device)
        rotation = roma.rotvec_to_rotmat(rotvec)
        turned = rotation @ base[rows, :3, :3]
        position = log_scale.exp() * base[rows, :3, 3] @ rotation.T + shift * mean_distance
        moved = torch.cat([torch.cat([turned, position[..., None]], -1), base[rows, 3:]], 1)
        size, samples, own = (height, width), model.samples_per_ray, target.select(rows)
        color = render_pixels(
            model.field, moved, model.camera, pixels, size, samples, step, intrinsics=own.intrinsics
        ).color
        return own.pixel_error(color, pixels, (0, 1, 2))

    minimise(loss, [rotvec, shift, log_scale], STEPS, LEARNING_RATE)
    rotation = roma.rotvec_to_rotmat(rotvec.detach()).double().cpu()
    scale = log_scale.detach().double().exp().cpu()[0]
    translation = scale * rotation @ start.translation + (shift * mean_distance).detach().double().cpu()
    return Similarity(rotation @ start.rotation, translation, scale * start.scale)
