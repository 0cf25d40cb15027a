"""Distil the fitted scene into the encoder: training on noisy views and rendered views with their poses."""

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
from factorkit.nerfdiff.cameras.candidates import Candidates, LookAtCandidates
from factorkit.nerfdiff.cameras.poses import camera_directions, direction_vectors, orbit_poses
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.network import NerfdiffModel, predict_clean, to_signal
from factorkit.nerfdiff.previews.views import save_model_previews
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.scene import Scene
from factorkit.nerfdiff.stages.joint import add_noise
from factorkit.utils import distributed
from factorkit.utils.rng import BatchDraw, derived_seed

ERROR_SCALE = 1e-3  # squared error, of about 2 degrees, above which the loss grows with the root
ERROR_WEIGHT = 0.02
OVERLAP_SHARPNESS = 20.0  # of the shares by which candidates learn a view: two do within about 8 degrees of a boundary
ELEVATION_JITTER = 3.0  # degrees (standard deviation) between the elevations of rendered views and training views


class DistilTask:
    """Train the encoder to score the candidate nearest to each view's pose and to place those near it.

    The field stays fixed. Near the boundary of two candidates' cells both learn the pose: noise may give either of them
    the better score, and one that never learned poses beyond its cell may be anywhere there.

    Args:
        model: with the fitted field and the poses of the views.
        duplication: see :func:`factorkit.nerfdiff.alarms.pose_alarms`.
    """

    capturable = True

    def __init__(self, config: NerfdiffConfig, scene: Scene, model: NerfdiffModel, duplication: float | None = None):
        self.config, self.scene, self.model, self.duplication = config, scene, model, duplication
        model.field.requires_grad_(False)
        self.schedule = Schedule(config.timesteps, device=scene.images.device)
        images, poses = scene.encoder_images, model.views
        if config.num_rendered_views and scene.layout == "object":
            new_poses = self._sample_poses(config.num_rendered_views)
            size = target_size(min(config.encoder_resolution, max(scene.size)), *scene.size)

            def render(rows: slice) -> Tensor:
                return render_views(model.field, new_poses[rows], scene.camera, size, config.samples_per_ray).color

            color = distributed.map_shares(render, len(new_poses)).movedim(-1, 1)
            images, poses = torch.cat([images, resize_area(color, *scene.size)]), torch.cat([poses, new_poses])
        self.images, self.poses, self.size = images, poses, len(images)

    def _sample_poses(self, count: int) -> Tensor:
        """Return poses with random azimuths and elevations near those of the training views."""
        generator = torch.Generator().manual_seed(derived_seed("rendered", self.config.seed))
        known = camera_directions(self.model.views.cpu())
        rows = torch.randint(len(known), (count,), generator=generator)
        jitter = ELEVATION_JITTER * torch.randn(count, generator=generator)
        elevation = known[rows, 2].clamp(-1, 1).asin().rad2deg() + jitter
        directions = direction_vectors(360 * torch.rand(count, generator=generator), elevation.clamp(-88, 88))
        return orbit_poses(directions, self.scene.distance).to(self.scene.images.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the encoder at the learning rate."""
        return [{"params": list(self.model.encoder.parameters()), "scale": 1.0}]

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Return the pose loss of the candidates near the poses and the classification loss."""
        config = self.config
        rows = indices.to(self.images.device)
        x0, poses = to_signal(self.images[rows]), self.poses[rows]
        x_t, t = add_noise(x0, self.schedule, config, draw)
        cameras = self.model.predict_cameras(x_t, t)
        share = candidate_shares(self.model.candidates, poses)
        target = share.argmax(1)
        errors = pose_distance(cameras.poses, poses[:, None], self.scene.distance)
        classification = F.cross_entropy(cameras.scores, target, reduction="none")
        weight = 1 - t / config.timesteps  # high noise levels hardly show the pose; their errors would dominate
        objective = weight * (share * robust_error(errors)).sum(1) + config.classification_weight * classification
        correct = (cameras.best_index == target).float().mean()
        error = errors.gather(1, target[:, None])[:, 0]
        return StepLoss(objective, error, t / config.timesteps, {"classified": correct})

    def inspect(self, model: NerfdiffModel, step: int, folder: Path) -> dict[str, Any]:
        """Draw views and cameras, and return the alarms."""
        cameras = predict_clean(model, self.scene.encoder_images)
        save_model_previews(folder, step, model, self.scene, cameras, with_points=step == self.config.steps)
        if self.scene.layout != "object":
            return {}
        return scene_alarms(self.config, self.scene, model.field, model.views, duplication=self.duplication)


def robust_error(error: Tensor) -> Tensor:
    """Return a loss of squared errors that grows with their root: the squares alone hardly pull at the last degrees."""
    return ERROR_WEIGHT * ((1 + error / ERROR_SCALE).sqrt() - 1)


def candidate_shares(candidates: Candidates, poses: Tensor) -> Tensor:
    """Return the shares [B, N] by which the candidates learn poses [B, 4, 4]: the nearer its anchor, the more."""
    if isinstance(candidates, LookAtCandidates):
        return (OVERLAP_SHARPNESS * camera_directions(poses) @ candidates.anchors.T).softmax(1)
    return poses.new_ones(len(poses), candidates.count)  # of a single one


def pose_distance(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the squared difference [...] of poses [..., 4, 4]: of rotations, and of positions in units of ``scale``.

    For upright cameras that look at the origin from one distance it is about the squared angle.
    """
    rotation = (a[..., :3, :3] - b[..., :3, :3]).square().sum((-2, -1)) / 4
    return rotation + ((a[..., :3, 3] - b[..., :3, 3]) / scale).square().sum(-1) / 2
