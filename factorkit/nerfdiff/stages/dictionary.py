"""Balanced dictionary search: assign every view to one of a fixed set of positions while a field is fitted.

Each position takes its share of the views, at a falling temperature; without that constraint all views collapse to one
position. Field and views start blurred and sharpen as the temperature falls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from factorkit.data.views.views import resize_area, target_size
from factorkit.nerfdiff.alarms import scene_alarms
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.previews.views import save_cameras
from factorkit.nerfdiff.rays import CameraModel, apply_appearance, render_views
from factorkit.nerfdiff.scene import MIN_WEIGHT, Scene, mean_squared_error
from factorkit.nerfdiff.stages.assignment import balanced_assignment, sample_assignment, standardise_errors
from factorkit.nerfdiff.stages.refine import UPDATE_EVERY, FitTask, SceneFit
from factorkit.utils import distributed
from factorkit.utils.rng import BatchDraw, derived_seed

COMPARISON_SIDE = 16  # longer side in pixels of the compared images
SAME_INTRINSICS = 0.02  # relative to the image's side: the compared images are too small to show less
TEMPERATURE = (0.02, 0.3)  # at the end and at the start, in standard deviations of a view's errors
POSITION_JITTER = 0.04  # standard deviation added to positions while the temperature falls, to cover their cells

ToPoses = Callable[[Tensor], Tensor]  # positions [..., 3] to poses [..., 4, 4]


class AssignedPoses(nn.Module):
    """Poses of V views at positions of a dictionary.

    Args:
        places: directions around an object, or positions of forward-facing cameras, [D, 3].
        assigned: index of each view's position, int64 [V]; state, not a parameter.
        to_poses: from positions to poses.
    """

    places: Tensor
    assigned: Tensor

    def __init__(self, places: Tensor, assigned: Tensor, to_poses: ToPoses):
        super().__init__()
        self.to_poses = to_poses
        self.register_buffer("places", places)
        self.register_buffer("assigned", assigned)

    def forward(self, indices: Tensor, jitter: Tensor | None = None) -> Tensor:
        """Return poses [B, 4, 4] of views with these indices, their positions moved by ``jitter`` [B, 3]."""
        position = self.places[self.assigned[indices]]
        return self.to_poses(position if jitter is None else position + jitter)


class SearchTask(FitTask):
    """The search over ``places`` [D, 3]; views start at random positions."""

    poses: AssignedPoses

    def __init__(self, config: NerfdiffConfig, scene: Scene, field: Field, places: Tensor, to_poses: ToPoses):
        generator = torch.Generator().manual_seed(derived_seed("first assignment", config.seed))
        assigned = torch.randint(len(places), (len(scene.images),), generator=generator).to(places.device)
        self.poses = AssignedPoses(places, assigned, to_poses)
        self.samples = min(config.samples_per_ray, config.search_grid_resolution)
        model = SceneFit(field, self.poses, scene.camera, scene.size, self.samples)
        super().__init__(config, scene, model, initial_coarseness=1.0)

    def inspect(self, model: SceneFit, step: int, folder: Path) -> dict[str, Any]:
        """Draw the positions of the views, and return the alarms."""
        poses: Any = model.poses
        chosen = poses(torch.arange(len(poses.assigned)))
        path = folder / f"{step:06d}_cameras_search.png"
        save_cameras(path, self.scene.layout, chosen, poses.to_poses(poses.places))
        if self.scene.layout != "object":
            return {}
        return scene_alarms(
            self.config,
            self.scene,
            model.field,
            chosen,
            candidates=poses.assigned,
            count=len(poses.places),
            settled=not self.coarseness_at(step),
            exact=False,
        )

    def prepare(self, step: int) -> Hashable:
        """Set the blur of a step, and reassign the views where it is due."""
        form = super().prepare(step)
        if step and step % UPDATE_EVERY == 0:
            self._assign(step, self.coarseness_at(step))
        return form

    def pose_options(self, draw: BatchDraw) -> dict[str, Tensor]:
        """Return the jitter of the positions while the temperature falls."""
        return {"jitter": POSITION_JITTER * draw.normal(3)} if self.model.field.coarseness else {}

    @torch.no_grad()
    def errors(self) -> Tensor:
        """Return the mean squared difference [V, D] between every view and the field rendered from every position."""
        candidates = self.poses.to_poses(self.poses.places)
        images = self.target_images
        views = torch.arange(len(images), device=images.device)

        def errors_from(rows: slice) -> Tensor:
            field, camera = self.model.field, self.scene.camera
            masks = self.scene.loss_masks
            return candidate_errors(
                field, candidates[rows], camera, images, self.samples, views, masks, camera.of_views()
            ).T

        return distributed.map_shares(errors_from, len(candidates)).T

    def _assign(self, step: int, temperature_share: float) -> None:
        errors = self.errors()
        if temperature_share == 0:
            self.poses.assigned.copy_(errors.argmin(1))
            return
        low, high = TEMPERATURE
        generator = torch.Generator().manual_seed(derived_seed("assign", self.config.seed, step))
        uniform = torch.rand(len(errors), generator=generator).to(errors.device)
        plan = balanced_assignment(standardise_errors(errors), low + (high - low) * temperature_share)
        self.poses.assigned.copy_(sample_assignment(plan, uniform))


@torch.no_grad()
def candidate_errors(
    field: Field,
    poses: Tensor,
    camera: CameraModel,
    images: Tensor,
    samples: int,
    views: Tensor | None = None,
    loss_masks: Tensor | None = None,
    intrinsics: Tensor | None = None,
) -> Tensor:
    """Return the mean squared difference [V, D] of small images and small renders.

    Args:
        poses: to render from, [D, 4, 4].
        images: [V, 3, H, W].
        views: indices [V] of the images' appearance; None: the mean appearance.
        loss_masks: [V, 1, H, W], 0 at pixels that do not count; None: all count.
        intrinsics: of the images, [V, 3, 3], or of all of them, [3, 3], in units of width and height; None: those of
            the camera model.
    """
    if intrinsics is not None and intrinsics.dim() == 3:  # one set of renders for all images of one camera
        result = torch.empty(len(images), len(poses), device=images.device)
        kinds = torch.unique((intrinsics / SAME_INTRINSICS).round(), dim=0, return_inverse=True)[1]
        for kind in range(int(kinds.max()) + 1):
            rows = (kinds == kind).nonzero()[:, 0]
            appearance, masks = (None if x is None else x[rows] for x in (views, loss_masks))
            mean = intrinsics[rows].mean(0)
            result[rows] = candidate_errors(field, poses, camera, images[rows], samples, appearance, masks, mean)
        return result
    size = target_size(min(COMPARISON_SIDE, max(images.shape[2:])), *images.shape[2:])
    rendered = render_views(field, poses, camera, size, samples, intrinsics=intrinsics)
    small = resize_area(images, *size).movedim(1, -1)
    weights = None if loss_masks is None else resize_area(loss_masks, *size).movedim(1, -1).expand_as(small)
    if (views is None or field.appearance is None) and weights is not None:
        color, weight = rendered.color.flatten(1), weights.flatten(1)
        target = small.flatten(1)
        squared = (weight * target**2).sum(1, keepdim=True) - 2 * (weight * target) @ color.T + weight @ (color**2).T
        return squared.clamp_min(0) / weight.sum(1, keepdim=True).clamp_min(MIN_WEIGHT)
    if views is None or field.appearance is None:
        return torch.cdist(small.flatten(1), rendered.color.flatten(1)).square() / rendered.color[0].numel()
    errors = []
    for i, (view, image) in enumerate(zip(views, small, strict=True)):
        color = apply_appearance(field, rendered, camera, view.expand(len(poses)))
        errors.append(mean_squared_error(color, image, (1, 2, 3), None if weights is None else weights[i]))
    return torch.stack(errors)
