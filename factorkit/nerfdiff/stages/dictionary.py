"""Balanced dictionary search: every view takes one of a fixed set of places, and a field grows that agrees.

Each place has to take its share of the views, at a temperature that falls; without that, all views end up in one
place. Field and views begin blurred and sharpen as the temperature falls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.data.views.views import resize_area, target_size
from factorkit.nerfdiff.alarms import scene_alarms
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.grid import Field
from factorkit.nerfdiff.rays import Optics, render_views, toned
from factorkit.nerfdiff.scene import Scene
from factorkit.nerfdiff.stages.assignment import balanced_plan, drawn, spread
from factorkit.nerfdiff.stages.refine import EVERY, Fit, FitTask
from factorkit.nerfdiff.watch import cameras_sheet
from factorkit.utils import distributed
from factorkit.utils.rng import BatchDraw, derived_seed

COMPARED = 16  # pixels along the longer side of the pictures that are compared
TEMPERATURE = (0.02, 0.3)  # at the end and at the beginning, in units of a view's spread of errors
SHAKE = 0.04  # standard deviation of the places while the temperature falls: cells are no points

Stand = Callable[[Tensor], Tensor]


class AssignedPoses(nn.Module):
    """Views [V] that stand at places [D, 3] of a dictionary; which one is state, not parameter.

    Args:
        places: directions around an object, or places of forward-facing cameras.
        assigned: int64 [V].
        stand: places [..., 3] to poses [..., 4, 4].
    """

    def __init__(self, places: Tensor, assigned: Tensor, stand: Stand):
        super().__init__()
        self.stand = stand
        self.register_buffer("places", places)
        self.register_buffer("assigned", assigned)

    def forward(self, indices: Tensor, shake: Tensor | None = None) -> Tensor:
        """Poses [B, 4, 4] of these views, their places shaken by [B, 3]."""
        place = self.places[self.assigned[indices]]
        return self.stand(place if shake is None else place + shake)


class SearchTask(FitTask):
    """The search over ``places`` [D, 3]. Views start anywhere: a first field of noise is a worse guide than chance."""

    def __init__(self, config: NerfdiffConfig, scene: Scene, field: Field, places: Tensor, stand: Stand):
        generator = torch.Generator().manual_seed(derived_seed("first assignment", config.seed))
        assigned = torch.randint(len(places), (len(scene.images),), generator=generator).to(places.device)
        poses = AssignedPoses(places, assigned, stand)
        self.samples = min(config.samples_per_ray, config.search_grid_resolution)
        super().__init__(config, scene, Fit(field, poses, scene.optics, scene.size, self.samples), hot=1.0)

    def inspect(self, model: Fit, step: int, folder: Path) -> dict[str, Any]:
        """Where the views stand among the directions, drawn and in figures."""
        poses = model.poses
        chosen = poses(torch.arange(len(poses.assigned)))
        path = folder / f"{step:06d}_cameras_search.png"
        cameras_sheet(path, self.scene.layout, chosen, poses.stand(poses.places))
        if self.scene.layout != "object":
            return {}
        return scene_alarms(
            self.config,
            self.scene,
            model.field,
            chosen,
            chosen=poses.assigned,
            count=len(poses.places),
            settled=not self.heat(step),
            exact=False,
        )

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor):
        heat = self.heat(int(step))
        self.model.field.coarseness = heat
        if draw.first and int(step) and int(step) % EVERY == 0:
            self._assign(int(step), heat)
        return super().loss(model, indices, draw, step)

    def options(self, draw: BatchDraw, step: Tensor) -> dict[str, Tensor]:
        return {"shake": SHAKE * draw.normal(3)} if self.heat(step) else {}

    @torch.no_grad()
    def errors(self, step: int) -> Tensor:
        """Mean squared difference [V, D] between every view and the field seen from every place."""
        poses = self.model.poses
        candidates = poses.stand(poses.places)
        images = self.images(step)
        views = torch.arange(len(images), device=images.device)
        return distributed.map_shares(  # of the places, for to render them is most of the work
            lambda rows: (
                candidate_errors(self.model.field, candidates[rows], self.scene.optics, images, self.samples, views).T
            ),
            len(candidates),
        ).T

    def _assign(self, step: int, heat: float) -> None:
        errors = self.errors(step)
        if heat == 0:
            self.model.poses.assigned.copy_(errors.argmin(1))
            return
        low, high = TEMPERATURE
        generator = torch.Generator().manual_seed(derived_seed("assign", self.config.seed, step))
        uniform = torch.rand(len(errors), generator=generator).to(errors.device)
        plan = balanced_plan(spread(errors), low + (high - low) * heat)
        self.model.poses.assigned.copy_(drawn(plan, uniform))


@torch.no_grad()
def candidate_errors(
    field: Field, poses: Tensor, optics: Optics, images: Tensor, samples: int, views: Tensor | None = None
) -> Tensor:
    """Mean squared difference [V, D] of images [V, 3, H, W] and the field seen from poses [D, 4, 4], both small; in the
    tones of these ``views`` [V] or in the mean one."""
    size = target_size(min(COMPARED, max(images.shape[2:])), *images.shape[2:])
    seen = render_views(field, poses, optics, size, samples)
    small = resize_area(images, *size).movedim(1, -1)
    if views is None or field.appearance is None:
        return torch.cdist(small.flatten(1), seen.color.flatten(1)).square() / seen.color[0].numel()
    each = (toned(field, seen, optics, view.expand(len(poses))) - x for view, x in zip(views, small, strict=True))
    return torch.stack([difference.square().mean((1, 2, 3)) for difference in each])


def directions_of(poses: Tensor) -> Tensor:
    """Unit vectors [..., 3] from the origin to cameras [..., 4, 4]."""
    return F.normalize(poses[..., :3, 3], dim=-1)
