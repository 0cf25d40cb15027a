"""Scores of cameras and scene against true poses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.metrics.image import SSIM_WINDOW, lpips, psnr, ssim
from factorkit.metrics.pose import PoseErrors, is_mirrored, pose_errors
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.network import NerfdiffModel
from factorkit.nerfdiff.scene import has_intrinsics, match_size, mean_squared_error, relative_intrinsics, shared_camera
from factorkit.nerfdiff.stages.localise import TargetImages
from factorkit.nerfdiff.stages.registration import register_scene
from factorkit.nerfdiff.training_views import load_views
from factorkit.utils.errors import ConfigError, DataError, format_count

MIN_ALIGNMENT_CAMERAS = 3  # a similarity is underdetermined by fewer


class EvaluatedRun(Protocol):
    """What the evaluation uses of a :class:`factorkit.nerfdiff.run.NerfdiffRun`."""

    config: NerfdiffConfig
    model: NerfdiffModel
    folder: Path | None
    step: int

    @property
    def poses(self) -> Tensor:
        """See NerfdiffRun, as for all members."""

    @property
    def views(self) -> Views:
        """Training views with the run's poses."""

    def predict_pose(self, images: Any, t: int | None = None, refine: int = 0) -> Any:
        """Predict the cameras of images."""

    def render(
        self,
        poses: Tensor,
        size: int | tuple[int, int] | None = None,
        appearance_view: int | None = None,
        intrinsics: Tensor | None = None,
    ) -> Any:
        """Render the scene from poses."""


def true_training_poses(run: EvaluatedRun, views: Views | None = None) -> Tensor | None:
    """Return the true poses [V, 4, 4] of the training views, or of ``views`` if they have the same names; or None."""
    stored = load_views(run.folder)
    if stored is None:
        return None
    if stored.poses is None and views is not None and stored.names == views.names:
        return views.poses
    return stored.poses


def training_errors(run: EvaluatedRun) -> PoseErrors | None:
    """Return the errors of a finished run's poses of the training views; None if the true ones are unknown."""
    true = true_training_poses(run)
    return None if true is None else pose_errors(run.poses, true)


def evaluate(run: EvaluatedRun, views: Views, poses: Tensor | None = None, refine: int = 0) -> dict[str, Any]:
    """Score a run on views with true poses; see :meth:`factorkit.nerfdiff.run.NerfdiffRun.evaluate`."""
    true = views.poses if poses is None else torch.as_tensor(poses, dtype=torch.float32)
    if true is None:
        raise ConfigError("the views have no poses to compare with; give poses=")
    if true.shape != (len(views), 4, 4):
        raise DataError(
            f"poses of shape {tuple(true.shape)} for {format_count(len(views), 'view')}; give [{len(views)}, 4, 4]"
        )
    true_training = true_training_poses(run, views)
    predicted = run.predict_pose(views, refine=refine).poses
    if true_training is None and len(views) < MIN_ALIGNMENT_CAMERAS:
        raise DataError(
            f"{format_count(len(views), 'view')} cannot be aligned with the model's coordinates; give at least 3"
        )
    encoder = pose_errors(predicted, true)
    views = match_size(views, run.model.size)
    is_common = has_intrinsics(run.model.camera.intrinsics.cpu(), relative_intrinsics(views))
    intrinsics = None if is_common and views.size == run.model.size else views.intrinsics
    scores: dict[str, Any] = {"views": len(views), "size": list(views.size), "step": run.step, "refine": refine}
    scores["poses"] = run.config.poses
    if true_training is None:
        into_scene = encoder.alignment.inverse()
    else:
        training = pose_errors(run.poses, true_training)
        own = run.views.resize(run.model.size)
        lens = None if shared_camera(own).view_intrinsics is None else relative_intrinsics(own)
        target = TargetImages(own.images, lens, own.loss_masks)
        into_scene = register_scene(run.model, training.alignment.inverse(), true_training, target)
        scores |= _pose_scores("", training)
        scores["mirrored"] = is_mirrored(run.poses, true_training)
    scores |= _pose_scores("encoder_", encoder)
    for suffix, camera_poses in (("", into_scene.apply(true)), ("_encoder", predicted)):
        images = run.render(camera_poses, views.size, intrinsics=intrinsics).images
        if views.loss_masks is not None:  # pixels that are not scored, or that the views do not show
            error = mean_squared_error(images.cpu(), views.images, (1, 2, 3), views.loss_masks)
            scores[f"psnr{suffix}"] = (-10 * error.double().log10()).mean().item()
            images = torch.where(views.loss_masks > 0, images.cpu(), views.images)
        else:
            scores[f"psnr{suffix}"] = psnr(images, views.images).mean().item()
        if min(views.size) >= SSIM_WINDOW:
            scores[f"ssim{suffix}"] = ssim(images, views.images).mean().item()
        distance = lpips(images, views.images)
        if distance is not None:
            scores[f"lpips{suffix}"] = distance.mean().item()
    return scores


def _pose_scores(prefix: str, errors: PoseErrors) -> dict[str, float]:
    return {
        f"{prefix}rotation_median_deg": errors.rotation_median_deg,
        f"{prefix}under_10_deg": errors.under_10_deg,
        f"{prefix}rotation_max_deg": float(errors.rotation_degrees.max()),
        f"{prefix}translation_median": errors.translation_median,
    }
