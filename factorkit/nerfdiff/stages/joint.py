"""Encoder and field from nothing, by denoising alone (thesis, algorithms 3 and 4).

    L = min_i |render_i - x0|^2 + lambda cross_entropy(scores, argmin_i)                            (3.4)

The candidates are compared without gradient on small renders; the best alone is rendered with gradient, along random
rays. With ``balance_candidates`` every candidate gets its share of each batch in the first half of the training, at a temperature
that falls: the plain minimum lets all views run to one place.
"""

from __future__ import annotations

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
from factorkit.nerfdiff.fields.occupancy import look_again
from factorkit.nerfdiff.network import NerfdiffModel, look, noisy, to_signal
from factorkit.nerfdiff.rays import render_pixels, render_views
from factorkit.nerfdiff.scene import Scene, picked
from factorkit.nerfdiff.stages.assignment import balanced_plan, drawn, spread
from factorkit.nerfdiff.stages.dictionary import TEMPERATURE
from factorkit.nerfdiff.stages.refine import field_groups, prior
from factorkit.nerfdiff.watch import cameras_sheet, points_sheet, renders_sheet
from factorkit.utils import distributed
from factorkit.utils.rng import BatchDraw

ANNEALED = 0.5  # share of the steps over which candidates are balanced
COARSE = 0.4  # the field's coarseness at the beginning
COMPARED = 10  # pixels along the longer side of the renders that are compared


class JointTask:
    """The thesis' training of all parts together; of the encoder alone where the field is held.

    Args:
        found: poses of the views [V, 4, 4] that a search has found and the model is to keep; None: its own.
        doubled: as :func:`factorkit.nerfdiff.alarms.pose_alarms` takes it.
    """

    capturable = False

    def __init__(
        self,
        config: NerfdiffConfig,
        scene: Scene,
        model: NerfdiffModel,
        found: Tensor | None = None,
        doubled: float | None = None,
    ):
        self.config, self.scene, self.model, self.size, self.found = config, scene, model, len(scene.images), found
        self.doubled = doubled
        self.schedule = Schedule(config.timesteps, device=scene.images.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The encoder at the learning rate, the field at its own."""
        rate, base = self.config.field_learning_rate, self.config.learning_rate
        groups = [{"params": list(self.model.encoder.parameters()), "scale": 1.0}]
        return groups + field_groups(self.model.field, rate, base)

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        config, heat = self.config, max(0.0, 1 - int(step) / (ANNEALED * self.config.steps))
        self.model.field.coarseness = COARSE * heat
        if draw.first and self.found is None:
            look_again(self.model.field, int(step))
        indices = indices.to(self.scene.images.device)
        images = self.scene.images[indices]
        x_t, t = noisy(to_signal(images), self.schedule, config, draw)
        found = self.model.cameras(x_t, t)
        rows = torch.arange(len(images), device=images.device)
        best = self.choose(found.poses, images, heat, draw.uniform(), indices)
        pixels = draw.integers(0, images.shape[2] * images.shape[3], config.rays_per_view)
        seen = render_pixels(
            self.model.field,
            found.poses[rows, best],
            self.scene.optics,
            pixels,
            self.scene.size,
            config.samples_per_ray,
            int(step),
            indices,
            draw.rows.start * config.rays_per_view,
        )
        error = (seen.color - picked(images, pixels)).square().mean((1, 2))
        missed = F.cross_entropy(found.scores, best, reduction="none")
        objective = error + config.classification_weight * missed + prior(config, self.scene, self.model.field, seen)
        use = torch.bincount(best, minlength=found.scores.shape[1]) / len(best)
        right = (found.chosen == best).float().mean()
        return StepLoss(objective, error, t / config.timesteps, {"candidate_use": use, "classified": right})

    @torch.no_grad()
    def choose(
        self, poses: Tensor, images: Tensor, heat: float, uniform: Tensor, views: Tensor | None = None
    ) -> Tensor:
        """The candidate [B] that each of images [B, 3, H, W] is rendered from, of poses [B, N, 4, 4]; ``views`` [B] are
        their indices, for their tones."""
        size = target_size(min(COMPARED, max(images.shape[2:])), *images.shape[2:])
        seen = render_views(self.model.field, poses, self.scene.optics, size, self.config.samples_per_ray, views).color
        small = resize_area(images, *size).movedim(1, -1)
        errors = (seen - small[:, None]).square().mean((2, 3, 4))
        if not (self.config.balance_candidates and heat and errors.shape[1] > 1):
            return errors.argmin(1)
        low, high = TEMPERATURE
        everyone, mine = distributed.gather_rows(spread(errors))  # every candidate's share is of the whole batch
        return drawn(balanced_plan(everyone, low + (high - low) * heat)[mine], uniform)

    def update_buffers(self, model: NerfdiffModel) -> None:
        """Keep where the training views stand now."""
        model.views.copy_(look(model, self.scene.images).best if self.found is None else self.found)

    def inspect(self, model: NerfdiffModel, step: int, folder: Path) -> dict[str, Any]:
        """Where the training views stand now; what is wrong with that."""
        found = look(model, self.scene.images)
        renders_sheet(
            folder / f"{step:06d}_views.png", model.field, self.scene, found.best, self.config.samples_per_ray
        )
        path = folder / f"{step:06d}_cameras_encoder.png"
        cameras_sheet(path, self.scene.layout, found.best, found.poses)
        if step == self.config.steps:
            points_sheet(folder / f"{step:06d}_points.png", model.field, self.scene, model.views)
        if self.scene.layout != "object":
            return {}
        # past the annealing there is nothing random about it; half of what is left it gets to settle
        settled = step > (1 + ANNEALED) / 2 * self.config.steps
        return scene_alarms(
            self.config,
            self.scene,
            model.field,
            found.best,
            chosen=found.chosen,
            count=model.candidates.count,
            doubled=self.doubled,
            settled=settled,
        )
