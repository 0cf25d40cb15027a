"""Fit a field to views whose poses are known, free, or refined from the result of a search."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from factorkit.data.views.views import resize_area
from factorkit.engine.step import StepLoss
from factorkit.nerfdiff.alarms import scene_alarms
from factorkit.nerfdiff.cameras.poses import dolly_poses
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.base import Field, ImageField, update_occupancy
from factorkit.nerfdiff.previews.views import save_cameras
from factorkit.nerfdiff.rays import CameraModel, render_pixels, straighten_points
from factorkit.nerfdiff.scene import MIN_WEIGHT, Scene, gather_pixels, gaussian_blur, mean_squared_error
from factorkit.rendering import Rendered
from factorkit.utils.rng import BatchDraw

ADAM_BETAS = (0.9, 0.99)  # few rays pass a cell in each step, so long averages would be of an outdated scene
SHARPENING_SHARE = 0.6  # of the steps, after which nothing is blurred any more
IMAGE_BLUR = 0.094  # standard deviation at full coarseness, in units of the longer side
MASK_TOLERANCE = 0.25  # squared difference of opacity about which a pixel's mask begins to count as wrong
#: Gaussians are drawn smaller at first, (up to this share of the steps, by this factor), for views of at least so many
#: pixels: smaller ones gain nothing per second (docs/nerfdiff.md)
COARSE_SIZES, MIN_COARSE_SIDE = ((0.5, 4), (0.75, 2)), 384
UPDATE_EVERY = 10  # steps between changes of the blur, and between assignments of the search


class SceneFit(nn.Module):
    """A field and the poses of its views.

    Args:
        poses: a module that maps view indices [B] to poses [B, 4, 4].
        size: height and width of the views.
        optimize_focal: whether the focal length is a parameter, starting at that of ``camera``. Around an object the
            distances change with it, so that the object keeps its size in the images.
        optimize_distortion: whether a radial term of the lens of all views is a parameter, starting at 0, in units of
            the focal length of ``camera``.
    """

    def __init__(
        self,
        field: Field,
        poses: nn.Module,
        camera: CameraModel,
        size: tuple[int, int],
        samples: int,
        optimize_focal: bool = False,
        optimize_distortion: bool = False,
    ):
        super().__init__()
        self.field, self.poses = field, poses
        self.initial_camera, self.size, self.samples = camera, size, samples
        start = torch.zeros((), device=camera.intrinsics.device)
        self.log_focal = nn.Parameter(start.clone()) if optimize_focal else None
        self.distortion = nn.Parameter(start.clone()) if optimize_distortion else None

    @property
    def camera(self) -> CameraModel:
        """The camera model with the current focal length."""
        if self.log_focal is None:
            return self.initial_camera
        intrinsics = self.initial_camera.intrinsics
        scale = torch.stack([self.log_focal.exp(), self.log_focal.exp(), torch.ones_like(self.log_focal)])
        focal = torch.diag(intrinsics.diagonal() * scale)
        return self.initial_camera.with_intrinsics(focal + (intrinsics - torch.diag(intrinsics.diagonal())))

    def view_poses(self, indices: Tensor | slice = slice(None), **pose_options: Any) -> Tensor:
        """Return the poses [B, 4, 4] of views, at the distance of the current focal length."""
        poses: Tensor = self.poses(indices, **pose_options)
        if self.log_focal is None or self.initial_camera.forward_facing:
            return poses
        return dolly_poses(poses, self.log_focal.exp())

    def forward(
        self, indices: Tensor, pixels: Tensor, seed: int | Tensor, first_ray: int = 0, **pose_options: Any
    ) -> Rendered:
        """Render pixels [B, R] of views [B]; see :func:`factorkit.nerfdiff.rays.render_pixels`."""
        poses, camera, straighten = self.view_poses(indices, **pose_options), self.camera, None
        own = camera.of_views(indices)
        if self.distortion is not None:
            first = self.initial_camera.pixel_intrinsics(*self.size, self.initial_camera.of_views(indices))
            straighten = partial(straighten_points, intrinsics=first, term=self.distortion)
        return render_pixels(
            self.field, poses, camera, pixels, self.size, self.samples, seed, indices, first_ray, own, straighten
        )


def field_parameter_groups(field: Field, rate: float, base_rate: float) -> list[dict[str, Any]]:
    """Return Adam's groups of a field with learning rate ``rate``, in units of the configured ``base_rate``."""
    return [
        {"params": parameters, "scale": speed / base_rate, "betas": ADAM_BETAS}
        for parameters, speed in field.parameter_rates(rate)
    ]


def regularisation(config: NerfdiffConfig, scene: Scene, field: Field, rendered: Rendered) -> Tensor:
    """Return what is added to the photometric error [B]: total variation, and in object scenes the mean opacity.

    Fog in the colour of the background is invisible in the training views, but not in others.
    """
    variation = config.tv_weight * field.total_variation()
    if scene.layout != "object" or field.unbounded:
        return variation
    return variation + config.opacity_weight * rendered.opacity.mean(1)


def robust_error(squared: Tensor, tolerance: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean [B] of squared differences [B, R] that count less, the larger they are (Geman and McClure 1985).

    Args:
        squared: differences of rays.
        tolerance: squared difference that counts half.
        weights: [B, R]; None: all 1.
    """
    robust = squared / (1 + squared / tolerance)
    return robust.mean(1) if weights is None else (robust * weights).sum(1) / weights.sum(1).clamp_min(MIN_WEIGHT)


def drawn_size(size: tuple[int, int], step: int, steps: int) -> tuple[int, int]:
    """Return height and width at which Gaussians are drawn at a step, for views of a size: coarse to fine."""
    for share, factor in COARSE_SIZES:
        if step < share * steps and max(size) >= MIN_COARSE_SIDE:
            return max(1, round(size[0] / factor)), max(1, round(size[1] / factor))
    return size


class FitTask:
    """Minimise the squared error of random rays of the views; of whole images, coarse to fine, for Gaussians.

    Args:
        views: indices of the views to fit; None: all.
        preview_name: part of the file names of previews; None: no previews.
        initial_coarseness: blur of field and views at the start, 0 (none) to 1: for poses that are far off.
        mask_weight: weight of the silhouettes beside the photometric error, where the views have masks. Masks may be
            wrong, and show what does not move with the object: then colours count robustly too.

    Attributes:
        target_images: the views [V, 3, H, W], blurred or made smaller as far as the step requires.
        target_masks: the masks [V, 1, H, W], likewise; None where they have no weight.
        loss_masks: [V, 1, H, W], likewise but never blurred; None: all pixels count.
    """

    takes_device_indices = True

    def __init__(
        self,
        config: NerfdiffConfig,
        scene: Scene,
        model: SceneFit,
        views: Tensor | None = None,
        preview_name: str | None = None,
        initial_coarseness: float = 0.0,
        mask_weight: float = 0.0,
    ):
        self.config, self.scene, self.model = config, scene, model
        self.preview_name, self.initial_coarseness = preview_name, initial_coarseness
        self.mask_weight = mask_weight if scene.masks is not None else 0.0
        # where an error is as large as the differences of the views, a pixel tells little about its camera
        self.color_tolerance = (scene.images - scene.images.mean(0)).square().mean() if self.mask_weight else None
        self.capturable = model.field.capturable
        self._blur = 0.0  # of the targets, in pixels
        # copies where they will be blurred
        self.target_images = scene.images.clone() if initial_coarseness else scene.images
        masks = scene.masks if self.mask_weight else None
        self.target_masks = masks.clone() if masks is not None and initial_coarseness else masks
        self.loss_masks = scene.loss_masks
        self.views = (torch.arange(len(scene.images)) if views is None else views).to(scene.images.device)
        self.size = len(self.views)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the field at the stage's learning rate, and the free poses, focal length and distortion at theirs."""
        base_rate = self.config.learning_rate
        groups = field_parameter_groups(self.model.field, base_rate, base_rate)
        poses = [p for p in self.model.poses.parameters() if p.requires_grad]
        poses += [p for p in (self.model.log_focal, self.model.distortion) if p is not None]
        if poses:
            scale = self.config.pose_learning_rate / base_rate
            groups.append({"params": poses, "scale": scale, "betas": ADAM_BETAS})
        return groups

    def prepare(self, step: int) -> Hashable:
        """Set the blur of a step, and update occupancy and Gaussians; see :class:`factorkit.engine.step.Task`."""
        field, config = self.model.field, self.config
        field.coarseness = self.coarseness_at(step)
        update_occupancy(field, step)
        if isinstance(field, ImageField):
            field.update(step, config.steps, config.learning_rate, config.seed)
            self._resize_targets(field, drawn_size(self.scene.size, step, config.steps))
        self._blur_targets(step)
        return field.coarseness > 0, field.is_blurred

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Return the photometric loss of random rays."""
        rows = self.views[indices]
        images = self.target_images[rows.to(self.scene.images.device)]
        count = images.shape[2] * images.shape[3]
        if isinstance(self.model.field, ImageField):
            pixels = torch.arange(count, device=images.device).expand(len(rows), -1)
        else:
            pixels = draw.integers(0, count, self.config.rays_per_view)
        first_ray = draw.rows.start * self.config.rays_per_view
        rendered = model(rows, pixels, step, first_ray, **self.pose_options(draw))
        scored = self.loss_masks
        weights = None if scored is None else gather_pixels(scored[rows.to(scored.device)], pixels)
        colors = gather_pixels(images, pixels)
        objective = error = mean_squared_error(rendered.color, colors, (1, 2), weights)
        if self.target_masks is not None and self.color_tolerance is not None:
            masks = gather_pixels(self.target_masks[rows.to(self.scene.images.device)], pixels)[..., 0]
            counted = None if weights is None else weights[..., 0]
            objective = robust_error((rendered.color - colors).square().mean(-1), self.color_tolerance, counted)
            silhouettes = robust_error((rendered.opacity - masks).square(), MASK_TOLERANCE, counted)
            objective = objective + self.mask_weight * silhouettes
        objective = objective + regularisation(self.config, self.scene, self.model.field, rendered)
        return StepLoss(objective, error, torch.zeros_like(error), {})

    def coarseness_at(self, step: int) -> float:
        """Return the coarseness at a step: linear from its initial value to 0."""
        return self.initial_coarseness * max(0.0, 1 - step / (SHARPENING_SHARE * self.config.steps))

    def _blur_targets(self, step: int) -> None:
        """Blur views and masks as far as the step requires."""
        coarseness = self.coarseness_at(step // UPDATE_EVERY * UPDATE_EVERY)
        sigma = round(coarseness * IMAGE_BLUR * max(self.scene.size), 2)
        if self._blur != sigma:
            self._blur = sigma
            self.target_images.copy_(gaussian_blur(self.scene.images, sigma))
            if self.target_masks is not None and self.scene.masks is not None:
                self.target_masks.copy_(gaussian_blur(self.scene.masks, sigma))

    def _resize_targets(self, field: ImageField, size: tuple[int, int]) -> None:
        """Let the model draw images of a size with ``field``, and make views and masks as large."""
        if size == self.model.size:
            return
        self.model.size, field.side = size, max(size)
        masks = self.scene.masks if self.mask_weight else None
        self.target_images = resize_area(self.scene.images, *size)
        self.target_masks, self.loss_masks = (
            None if x is None else resize_area(x, *size) for x in (masks, self.scene.loss_masks)
        )

    def pose_options(self, draw: BatchDraw) -> dict[str, Tensor]:
        """Return further arguments of the pose module."""
        return {}

    def inspect(self, model: SceneFit, step: int, folder: Path) -> dict[str, Any]:
        """Draw the cameras, and return the alarms."""
        if self.preview_name is None:
            return {}
        poses = model.view_poses(torch.arange(len(self.scene.images)))
        save_cameras(folder / f"{step:06d}_cameras_{self.preview_name}.png", self.scene.layout, poses)
        if self.scene.layout != "object":
            return {}
        scene = replace(self.scene, camera=model.camera)  # the poses are at the distance of its focal length
        return scene_alarms(self.config, scene, model.field, poses, settled=step == self.config.steps)
