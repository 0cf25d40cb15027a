"""Encoder and field trained together from scratch, by denoising alone (thesis, algorithms 3 and 4).

    L = min_i |render_i - x0|^2 + lambda cross_entropy(scores, argmin_i)                            (3.4)

Candidates are compared without gradient on small renders; only the best is rendered with gradient, on random rays. With
``balance_candidates``, in the first half of training every candidate gets an equal share of each batch, at a falling
temperature; the plain minimum collapses to one candidate.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.data.views.views import resize_area, target_size
from factorkit.diffusion.schedule import Schedule
from factorkit.engine.step import StepLoss
from factorkit.nerfdiff.alarms import scene_alarms
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.base import update_occupancy
from factorkit.nerfdiff.network import NerfdiffModel, predict_clean, to_signal
from factorkit.nerfdiff.previews.views import save_model_previews
from factorkit.nerfdiff.rays import render_pixels, render_views
from factorkit.nerfdiff.scene import Scene, gather_pixels, mean_squared_error
from factorkit.nerfdiff.stages.assignment import balanced_assignment, sample_assignment, standardise_errors
from factorkit.nerfdiff.stages.dictionary import TEMPERATURE
from factorkit.nerfdiff.stages.refine import field_parameter_groups, regularisation
from factorkit.utils import distributed
from factorkit.utils.rng import BatchDraw

BALANCED_SHARE = 0.5  # of the steps, in which candidates are balanced
INITIAL_COARSENESS = 0.4  # of the field
COMPARISON_SIDE = 10  # longer side in pixels of the renders that are compared


def add_noise(x0: Tensor, schedule: Schedule, config: NerfdiffConfig, draw: BatchDraw) -> tuple[Tensor, Tensor]:
    """Return the encoder's training input: views x0 [B, 3, H, W] with random noise levels, and those levels [B].

    Levels are T u^timestep_power with u uniform. With ``noise=False``, the views themselves at level 0.
    """
    if not config.noise:
        return x0, torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    t = (draw.uniform() ** config.timestep_power * config.timesteps).long()
    return schedule.noise(x0, draw.normal(*x0.shape[1:]), t), t


class JointTask:
    """Train encoder and field together, or the encoder alone if the field is fixed.

    Args:
        model: encoder, candidates and field.
        poses: of the views, [V, 4, 4], that the trained model keeps; None: the model's own predictions.
        duplication: see :func:`factorkit.nerfdiff.alarms.pose_alarms`.
    """

    takes_device_indices = True

    def __init__(
        self,
        config: NerfdiffConfig,
        scene: Scene,
        model: NerfdiffModel,
        poses: Tensor | None = None,
        duplication: float | None = None,
    ):
        self.config, self.scene, self.model, self.size = config, scene, model, len(scene.images)
        self.poses, self.duplication = poses, duplication
        self.schedule = Schedule(config.timesteps, device=scene.images.device)
        self.capturable = model.field.capturable
        self.temperature = torch.zeros((), device=scene.images.device)  # of the balanced assignment
        self.is_balanced = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the encoder at the learning rate, and the field at its own."""
        rate, base_rate = self.config.field_learning_rate, self.config.learning_rate
        groups: list[dict[str, Any]] = [{"params": list(self.model.encoder.parameters()), "scale": 1.0}]
        return groups + field_parameter_groups(self.model.field, rate, base_rate)

    def prepare(self, step: int) -> Hashable:
        """Set blur and temperature of a step, and update the occupancy; see :class:`factorkit.engine.step.Task`."""
        config, field, (low, high) = self.config, self.model.field, TEMPERATURE
        share = max(0.0, 1 - step / (BALANCED_SHARE * config.steps))
        field.coarseness = INITIAL_COARSENESS * share
        if self.poses is None:
            update_occupancy(field, step)
        self.temperature.fill_(low + (high - low) * share)
        self.is_balanced = config.balance_candidates and share > 0
        return self.is_balanced, field.is_blurred

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Return the photometric loss of the selected candidates and the classification loss (eq. 3.4)."""
        config, field, scene = self.config, self.model.field, self.scene
        indices = indices.to(scene.images.device)
        images = scene.images[indices]
        x_t, t = add_noise(to_signal(scene.encoder_images[indices]), self.schedule, config, draw)
        cameras = self.model.predict_cameras(x_t, t)
        rows = torch.arange(len(images), device=images.device)
        temperature = self.temperature if self.is_balanced else None
        best = self.select_candidates(cameras.poses, images, temperature, draw.uniform(), indices)
        pixels = draw.integers(0, images.shape[2] * images.shape[3], config.rays_per_view)
        rendered = render_pixels(
            field,
            cameras.poses[rows, best],
            scene.camera,
            pixels,
            scene.size,
            config.samples_per_ray,
            step,
            indices,
            draw.rows.start * config.rays_per_view,
            scene.camera.of_views(indices),
        )
        weights = None if scene.loss_masks is None else gather_pixels(scene.loss_masks[indices], pixels)
        error = mean_squared_error(rendered.color, gather_pixels(images, pixels), (1, 2), weights)
        classification = F.cross_entropy(cameras.scores, best, reduction="none")
        objective = error + config.classification_weight * classification
        objective = objective + regularisation(config, scene, field, rendered)
        numbers = torch.arange(cameras.scores.shape[1], device=best.device)  # torch.bincount would wait for the device
        use = (best[:, None] == numbers).sum(0) / len(best)
        correct = (cameras.best_index == best).float().mean()
        return StepLoss(objective, error, t / config.timesteps, {"candidate_use": use, "classified": correct})

    @torch.no_grad()
    def select_candidates(
        self,
        poses: Tensor,
        images: Tensor,
        temperature: Tensor | float | None,
        uniform: Tensor,
        views: Tensor | None = None,
    ) -> Tensor:
        """Return the candidate [B] from which each image is rendered.

        Args:
            poses: of the candidates, [B, N, 4, 4].
            images: [B, 3, H, W].
            temperature: of the balanced assignment; None selects the lowest error.
            uniform: random numbers [B] in [0, 1).
            views: indices [B] of the images, for their appearance.
        """
        size = target_size(min(COMPARISON_SIDE, max(images.shape[2:])), *images.shape[2:])
        camera = self.scene.camera
        lens = None if views is None else camera.of_views(views)
        lens = None if lens is None else lens[:, None]  # for all candidates
        color = render_views(self.model.field, poses, camera, size, self.config.samples_per_ray, views, lens).color
        target, weights = resize_area(images, *size).movedim(1, -1)[:, None], None
        if self.scene.loss_masks is not None and views is not None:
            weights = resize_area(self.scene.loss_masks[views], *size).movedim(1, -1)[:, None]
        errors = mean_squared_error(color, target, (2, 3, 4), weights)
        if temperature is None or errors.shape[1] == 1:
            return errors.argmin(1)
        everyone, own = distributed.gather_rows(standardise_errors(errors))  # balanced over the global batch
        plan = balanced_assignment(everyone, temperature)
        return sample_assignment(plan[own], uniform)

    def update_buffers(self, model: NerfdiffModel) -> None:
        """Store the final poses of the training views in the model."""
        images = self.scene.encoder_images
        model.views.copy_(predict_clean(model, images).best_poses if self.poses is None else self.poses)

    def inspect(self, model: NerfdiffModel, step: int, folder: Path) -> dict[str, Any]:
        """Draw views and cameras, and return the alarms."""
        cameras = predict_clean(model, self.scene.encoder_images)
        save_model_previews(folder, step, model, self.scene, cameras, with_points=step == self.config.steps)
        if self.scene.layout != "object":
            return {}
        # half of the steps after the random part are left for the poses to settle
        settled = step > (1 + BALANCED_SHARE) / 2 * self.config.steps
        return scene_alarms(
            self.config,
            self.scene,
            model.field,
            cameras.best_poses,
            candidates=cameras.best_index,
            count=model.candidates.count,
            duplication=self.duplication,
            settled=settled,
        )
