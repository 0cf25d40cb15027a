"""A loaded nerfdiff model: it predicts the poses of images, and renders the scene."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views, resize_area, target_size
from factorkit.diffusion.schedule import Schedule
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.network import CameraPrediction, NerfdiffModel, to_signal
from factorkit.nerfdiff.rays import same_aspect_ratio
from factorkit.nerfdiff.rendered_scene import RenderedScene, RenderedViews
from factorkit.nerfdiff.scene import has_intrinsics, match_camera, match_size, relative_intrinsics
from factorkit.nerfdiff.stages.localise import TargetImages, refine_poses, select_best_poses
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.rng import derived_seed

ENCODER_BATCH = 64  # images
NOISE_PERCENT = 4  # of T: the default noise level at which real views are encoded


class PosePrediction(NamedTuple):
    """Cameras of images: the best poses [B, 4, 4], scores [B, N] and all candidates [B, N, 4, 4]."""

    poses: Tensor
    scores: Tensor
    candidates: Tensor


class LoadedScene(RenderedScene):
    """The methods of :class:`~factorkit.nerfdiff.run.NerfdiffRun` that predict poses and render."""

    model: NerfdiffModel

    def __init__(
        self, config: NerfdiffConfig, scene: dict[str, Any], model: NerfdiffModel, device: torch.device
    ) -> None:
        self.config, self.scene, self.device = config, scene, device
        self.model = model.to(device).eval()
        self.schedule = Schedule(config.timesteps, device=device)

    def predict_pose(self, images: Any, t: int | None = None, refine: int = 0, check: bool = False) -> PosePrediction:
        """Predict the cameras of images with one forward pass of the encoder, optionally refined by rendering.

        Args:
            images: [B, 3, H, W] in [0, 1], taken with the camera of the training views;
                :class:`~factorkit.data.views.views.Views`, which the encoder sees as that camera does, and ``refine``
                and ``check`` with their own intrinsics; or files, Pillow images and arrays, anything that
                :func:`~factorkit.data.views.open.open_views` reads, with
                the field of view of EXIF, else that of the training views.
            t: noise level added before encoding, 0 to T-1; None: 4% of T, as low levels are in training (0 without
                noise).
            refine: steps of minimising the photometric error, starting from where ``check`` leads; about 60 remove the
                encoder's error of a few degrees.
            check: compare small renders from all candidates with the image instead of using the best score; around an
                object also from each candidate rotated by 180 degrees about z. Needed for nearly symmetric scenes.

        Raises:
            ConfigError: t is out of range.
            DataError: images of another shape or range.

        Example:
            >>> prediction = scene.predict_pose(views)
            >>> prediction.poses.shape, prediction.scores.shape
            (torch.Size([10, 4, 4]), torch.Size([10, 3]))
        """
        resized, target = self._check_images(images)
        level = NOISE_PERCENT * self.config.timesteps // 100 if t is None else t
        if not 0 <= level < self.config.timesteps:
            raise ConfigError(f"t={t} must be between 0 and {self.config.timesteps - 1}")

        def predict(rows: slice) -> tuple[Tensor, CameraPrediction]:
            parts = []
            for signal in to_signal(resized)[rows].split(ENCODER_BATCH):
                times = torch.full((len(signal),), level if self.config.noise else 0, device=self.device)
                if self.config.noise:
                    generator = torch.Generator().manual_seed(derived_seed("look", level))
                    eps = torch.randn(signal.shape[1:], generator=generator).to(self.device).expand_as(signal)
                    signal = self.schedule.noise(signal, eps, times)
                with torch.no_grad():
                    parts.append(self.model.predict_cameras(signal, times))
            cameras = CameraPrediction(*(torch.cat(x) for x in zip(*parts, strict=True)))
            if check or refine:
                return select_best_poses(self.model, target.select(rows), cameras.poses), cameras
            return cameras.best_poses, cameras

        best, cameras = distributed.map_shares(predict, len(resized))
        if refine:
            distance = float(best[:, :3, 3].norm(dim=1).mean())
            best = distributed.map_shares(
                lambda rows: refine_poses(self.model, target.select(rows), best[rows], refine, distance), len(resized)
            )
        return PosePrediction(best.cpu(), cameras.scores.cpu(), cameras.poses.cpu())

    def _to_views(self, images: Any) -> Views | Tensor:
        """Open what is neither views nor a tensor."""
        if isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.ndim > 2 and images.shape[-3] == 3:
            images = torch.from_numpy(images)  # as a tensor: [B, 3, H, W]
        elif isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[2] in (3, 4):
            images = images[None]
        return images if isinstance(images, (Views, Tensor)) else self.open_images(images)

    def _check_images(self, images: Any) -> tuple[Tensor, TargetImages]:
        """Return images [B, 3, H, W] at the model's size for the encoder, and what renders are compared with."""
        images = self._to_views(images)
        if isinstance(images, Views):
            own, camera = match_size(images, self.model.size), self.model.camera
            encoder_images = match_camera(images, camera, self.model.size).images.to(self.device)
            is_common = has_intrinsics(camera.intrinsics.cpu(), relative_intrinsics(own))
            intrinsics = None if is_common else relative_intrinsics(own)
            return encoder_images, TargetImages(own.images, intrinsics, own.loss_masks).to(self.device)
        if images.dim() == 3:
            images = images[None]
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise DataError(f"images of shape {tuple(images.shape)} ({images.dtype}): give [B, 3, H, W] in [0, 1]")
        if len(images) and not -0.01 <= float(images.min()) <= float(images.max()) <= 1.01:
            raise DataError(f"images from {float(images.min()):g} to {float(images.max()):g}: give colours in [0, 1]")
        (height, width), size = images.shape[2:], self.model.size
        if not same_aspect_ratio((height, width), size):
            raise DataError(
                f"images of {height} x {width} pixels, but the training views have the shape of {size[0]} x {size[1]}: "
                "crop them to that shape"
            )
        resized = resize_area(images.float(), *size).to(self.device)
        return resized, TargetImages(resized)

    def open_images(self, source: Any, fov: float | None = None) -> Views:
        """Open images for this run: on its background, with its field of view unless cameras or EXIF define another.

        Args:
            source: anything that :func:`~factorkit.data.views.open.open_views` reads.
            fov: field of view in degrees along the longer side, for images without cameras; None: from EXIF, else the
                run's.

        Raises:
            DataError: the images cannot be opened.
        """
        height, width = self.model.size
        axis = 0 if width >= height else 1
        own_fov = math.degrees(2 * math.atan(0.5 / float(self.model.camera.intrinsics[axis, axis])))
        background, layout = self.model.background.tolist(), self.scene["layout"]
        options: dict[str, Any] = {"background": background, "fov": fov, "layout": layout, "default_fov": own_fov}
        try:
            return open_views(source, None, max(self.model.size), **options)
        except ConfigError:  # the images are smaller than those of the run
            return open_views(source, **options)

    def reconstruct(self, images: Any, size: int | tuple[int, int] | None = None) -> RenderedViews:
        """Render the scene from the predicted poses of images, with their own intrinsics if they are views or files.

        Args:
            images: as in :meth:`predict_pose`.
            size: the longer side, or height and width; None: as trained. Views of another shape than those of the
                training keep it.

        Raises:
            DataError: images of another shape or range.
        """
        images = self._to_views(images)
        poses = self.predict_pose(images).poses
        if not isinstance(images, Views):
            return self.render(poses, size)
        own = match_size(images, self.model.size)
        if own.size == self.model.size and has_intrinsics(self.model.camera.intrinsics.cpu(), relative_intrinsics(own)):
            return self.render(poses, size)
        size = own.size if size is None else target_size(size, *own.size)
        scale = torch.tensor([size[1] / own.size[1], size[0] / own.size[0], 1.0])[:, None]
        return self.render(poses, size, intrinsics=own.intrinsics * scale)
