"""The encoder learns from what was found: noised views, and rendered ones, with their poses."""

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
from factorkit.nerfdiff.cameras.candidates import Candidates
from factorkit.nerfdiff.cameras.poses import directions, orbit_poses
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.network import NerfdiffModel, look, noisy, to_signal
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.scene import Scene
from factorkit.nerfdiff.stages.dictionary import directions_of
from factorkit.nerfdiff.watch import cameras_sheet, points_sheet, renders_sheet
from factorkit.utils import distributed
from factorkit.utils.rng import BatchDraw, derived_seed

SHAKE = 3.0  # degrees by which the elevations of rendered views depart from found ones


class DistilTask:
    """The candidate nearest to a view's pose is to get the score, and to move there.

    The field stays as it is.

    Args:
        doubled: as :func:`factorkit.nerfdiff.alarms.pose_alarms` takes it.
    """

    capturable = False

    def __init__(self, config: NerfdiffConfig, scene: Scene, model: NerfdiffModel, doubled: float | None = None):
        self.config, self.scene, self.model, self.doubled = config, scene, model, doubled
        model.field.requires_grad_(False)
        self.schedule = Schedule(config.timesteps, device=scene.images.device)
        images, poses = scene.images, model.views
        if config.num_rendered_views and scene.layout == "object":
            further = self._around(config.num_rendered_views)
            # twice as fine as the encoder reads is as good to it as the views' own size
            size = target_size(min(2 * config.encoder_resolution, max(scene.size)), *scene.size)

            def render(rows: slice) -> Tensor:
                return render_views(model.field, further[rows], scene.optics, size, config.samples_per_ray).color

            seen = distributed.map_shares(render, len(further)).movedim(-1, 1)
            images, poses = torch.cat([images, resize_area(seen, *scene.size)]), torch.cat([poses, further])
        self.images, self.poses, self.size = images, poses, len(images)

    def _around(self, count: int) -> Tensor:
        """Poses at random azimuths, at about the elevations of those found."""
        generator = torch.Generator().manual_seed(derived_seed("rendered", self.config.seed))
        found = directions_of(self.model.views.cpu())
        rows = torch.randint(len(found), (count,), generator=generator)
        elevation = found[rows, 2].clamp(-1, 1).asin().rad2deg() + SHAKE * torch.randn(count, generator=generator)
        around = directions(360 * torch.rand(count, generator=generator), elevation.clamp(-88, 88))
        return orbit_poses(around, self.scene.distance).to(self.scene.images.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.encoder.parameters()), "scale": 1.0}]

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        config = self.config
        rows = indices.to(self.images.device)
        x0, poses = to_signal(self.images[rows]), self.poses[rows]
        x_t, t = noisy(x0, self.schedule, config, draw)
        found = self.model.cameras(x_t, t)
        wanted = nearest_candidate(self.model.candidates, found.poses, poses)
        picked = found.poses[torch.arange(len(wanted)), wanted]
        away = pose_distance(picked, poses, self.scene.distance)
        missed = F.cross_entropy(found.scores, wanted, reduction="none")
        weight = 1 - t / config.timesteps  # late levels say little of the pose: their errors must not drown the others
        objective = weight * away + config.classification_weight * missed
        right = (found.chosen == wanted).float().mean()
        return StepLoss(objective, away, t / config.timesteps, {"classified": right})

    def inspect(self, model: NerfdiffModel, step: int, folder: Path) -> dict[str, Any]:
        """What the model makes of the views, and where it and the search put their cameras; what is wrong with that."""
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
        return scene_alarms(self.config, self.scene, model.field, model.views, doubled=self.doubled)


def nearest_candidate(candidates: Candidates, found: Tensor, poses: Tensor) -> Tensor:
    """Which candidate [B] is to stand for poses [B, 4, 4]: the nearest anchor, or the nearest as it stands now."""
    if hasattr(candidates, "nearest"):
        return candidates.nearest(poses)
    return (found[..., :3, 3] - poses[:, None, :3, 3]).square().sum(-1).argmin(1)


def pose_distance(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Squared difference [B] of poses [B, 4, 4]: of the viewing axes and sideways axes, and of the places over
    ``scale``. For upright cameras that look at the origin from one distance it is about the squared angle."""
    turn = (a[:, :3, :3] - b[:, :3, :3]).square().sum((1, 2)) / 4
    return turn + ((a[:, :3, 3] - b[:, :3, 3]) / scale).square().sum(1) / 2
