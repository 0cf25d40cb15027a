"""The stage that trains the mask network: from a noised and changed image, the teacher's masks of the clean one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.diffusion.schedule import Schedule
from factorkit.engine.config import EngineConfig
from factorkit.engine.step import StepLoss
from factorkit.ops.dispatch import is_readable
from factorkit.segdiff.masks.objects import MaskNetwork
from factorkit.utils.images import pixels_to_signed, uint8_to_unit
from factorkit.utils.rng import BatchDraw

LOW_NOISE_TIME, LOW_NOISE_SHARE = 150, 0.75  # so many samples are below this step of the linear schedule of 1000
MIN_CROP, MAX_STRETCH, STRETCH = 0.8, 1.25, 0.15  # of the image's side; bound and deviation of the log aspect ratio
HUE, GAIN, SHIFT, GREY_SHARE = 0.15, 0.075, 0.075, 0.06  # deviations of the change of colours, share without colour


class DistilTask:
    """Train a mask network by cross-entropy at every noise level.

    Args:
        config: of the stage.
        network: to train.
        images: uint8 [N, R, R, 3], or fp16 latents [N, V, C, h, w], of which those of the first view are used.
        teach: returns the teacher's masks, uint8 [N, K, LOGITS_SIDE, LOGITS_SIDE], 255 is 1; called when the first step
            needs them.
        random_flip: also train on mirror images.
        schedule: of the noise, on the device of the training.
    """

    capturable = True

    def __init__(
        self,
        config: EngineConfig,
        network: MaskNetwork,
        images: np.ndarray,
        teach: Callable[[], Tensor],
        random_flip: bool,
        schedule: Schedule,
    ):
        device = schedule.device
        self.config, self.images = config, torch.from_numpy(np.array(images)).to(device)
        self.teach = cache(lambda: teach().to(device))
        self.model: nn.Module = network
        self.size, self.random_flip, self.schedule = len(images), random_flip, schedule
        self.low_noise_time = max(1, schedule.find_matching_time(LOW_NOISE_TIME, Schedule()))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return all parameters at the learning rate."""
        return [{"params": list(self.model.parameters()), "scale": 1.0}]

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Return the cross-entropy of the network's masks of the images ``indices``."""
        at = indices.to(self.images.device)
        rows, masks = self.images[at], uint8_to_unit(self.teach()[at])
        images = pixels_to_signed(rows) if rows.dtype == torch.uint8 else rows[:, 0].float()
        images, masks = augment(images, masks, draw, self.random_flip)
        low = draw.uniform() < LOW_NOISE_SHARE
        t = torch.where(low, draw.integers(0, self.low_noise_time), draw.integers(0, self.schedule.steps))
        x_t = self.schedule.noise(images, draw.normal(*images.shape[1:]), t)
        log_masks = cast(MaskNetwork, self.model).coarse_logits(x_t, t).log_softmax(1)
        error = -(masks * log_masks).sum(1).mean((1, 2))
        metrics = {"areas": log_masks.detach().exp().mean((0, 2, 3))}
        return StepLoss(error, error.detach(), t / self.schedule.steps, metrics)

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        """Return nothing: the run that uses the masks has sample grids and alarms."""
        return {}


def augment(images: Tensor, masks: Tensor, draw: BatchDraw, random_flip: bool) -> tuple[Tensor, Tensor]:
    """Crop, stretch and mirror images or latents [B, C, R, R] together with their masks, and change their colours."""
    (count, channels), device = images.shape[:2], images.device
    scale = MIN_CROP + (1 - MIN_CROP) * draw.uniform()
    shift = (1 - scale)[:, None] * (2 * draw.uniform(2) - 1)
    sign = torch.where(draw.uniform() < 0.5, -1.0, 1.0) if random_flip else torch.ones(count, device=device)
    aspect = torch.exp(STRETCH * draw.normal()).clamp(1 / MAX_STRETCH, MAX_STRETCH)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = scale * sign * aspect.clamp(max=1), scale / aspect.clamp(min=1)
    theta[:, :, 2] = shift
    images, masks = (_transform(values, theta) for values in (images, masks))
    # A rotation of the colours that is near the identity.
    turned = orthogonalise(torch.eye(channels, device=device) + HUE * draw.normal(channels, channels))
    mean = images.mean((2, 3), keepdim=True)
    away = torch.einsum("bij,bjhw->bihw", turned, images - mean)
    away = away * torch.exp(GAIN * draw.normal(1, 1, 1))
    away = torch.where(draw.uniform(1, 1, 1) < GREY_SHARE, away.mean(1, keepdim=True).expand_as(away), away)
    return away + mean + SHIFT * draw.normal(channels, 1, 1), masks


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return Q [B, C, C] of matrices = QR whose R has a positive diagonal."""
    if is_readable(matrices):
        turned, upper = torch.linalg.qr(matrices)
        return turned * torch.sign(torch.diagonal(upper, dim1=1, dim2=2))[:, None]
    columns: list[Tensor] = []  # by Gram and Schmidt: torch's QR waits for a GPU, so that no graph can record it
    for column in matrices.unbind(2):
        for other in columns:
            column = column - (other * column).sum(1, keepdim=True) * other
        columns.append(F.normalize(column, dim=1))
    return torch.stack(columns, 2)


def _transform(values: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta, [len(values), 1, *values.shape[2:]], align_corners=False)
    return F.grid_sample(values, grid, padding_mode="reflection", align_corners=False)
