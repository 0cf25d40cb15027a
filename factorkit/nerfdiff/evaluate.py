"""How good cameras and scene are, beside the true ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.metrics.image import SSIM_WINDOW, lpips, psnr, ssim
from factorkit.metrics.pose import PoseErrors, Similarity, is_mirrored, pose_errors
from factorkit.nerfdiff.cameras.registration import registered
from factorkit.nerfdiff.training_views import kept_views
from factorkit.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from factorkit.nerfdiff.run import NerfdiffRun

FOR_ALIGNMENT = 3  # cameras below which a similarity says little


def training_errors(run: NerfdiffRun, views: Views | None = None) -> PoseErrors | None:
    """Errors of the training views' found poses; None where nobody knows the true ones.

    Args:
        views: perhaps the training views themselves, by their names, with poses.
    """
    true = kept_true(run, views)
    return None if true is None else pose_errors(run.poses, true)


def kept_true(run: NerfdiffRun, views: Views | None = None) -> Tensor | None:
    """The training views' true poses [V, 4, 4], those they came with or those of ``views`` of the same names."""
    given = kept_views(run.folder)
    if given is None:
        return None
    if given.poses is None and views is not None and given.names == views.names:
        return views.poses
    return given.poses


def registration(run: NerfdiffRun, views: Views | None, found: PoseErrors) -> Similarity:
    """From the true coordinates into the scene's: by the training views' poses, and then by their pictures."""
    true, start = kept_true(run, views), found.alignment.inverse()
    return registered(run.model, start, true, run.views.resize(run.model.size).images)


def evaluate(run: NerfdiffRun, views: Views, poses: Tensor | None = None, refine: int = 0) -> dict[str, Any]:
    """Scores of a run on views with true poses; see :meth:`factorkit.nerfdiff.run.NerfdiffRun.evaluate`."""
    true = views.poses if poses is None else torch.as_tensor(poses, dtype=torch.float32)
    if true is None:
        raise ConfigError("the views come without poses, so there is nothing to compare with; give poses=")
    if true.shape != (len(views), 4, 4):
        raise DataError(f"poses of shape {tuple(true.shape)} for {len(views)} views; give [{len(views)}, 4, 4]")
    found = training_errors(run, views)
    predicted = run.predict_pose(views, refine=refine).poses
    if found is None and len(views) < FOR_ALIGNMENT:
        raise DataError(f"{len(views)} views cannot be aligned with the model's own coordinates; give at least 3")
    encoder = pose_errors(predicted, true)
    into_scene = encoder.alignment.inverse() if found is None else registration(run, views, found)
    views = views.resize(run.model.size)
    at_truth, at_encoder = run.render(into_scene.apply(true)).images, run.render(predicted).images
    scores: dict[str, Any] = {"views": len(views), "size": list(views.size), "step": run.step, "refine": refine}
    if found is not None:
        scores |= _poses("", found)
        scores["mirrored"] = is_mirrored(run.poses, kept_true(run, views))
    scores |= _poses("encoder_", encoder)
    for suffix, images in (("", at_truth), ("_encoder", at_encoder)):
        scores[f"psnr{suffix}"] = psnr(images, views.images).mean().item()
        if min(views.size) >= SSIM_WINDOW:
            scores[f"ssim{suffix}"] = ssim(images, views.images).mean().item()
        distance = lpips(images, views.images)
        if distance is not None:
            scores[f"lpips{suffix}"] = distance.mean().item()
    return scores


def _poses(prefix: str, errors: PoseErrors) -> dict[str, float]:
    return {
        f"{prefix}rotation_median_deg": errors.rotation_median_deg,
        f"{prefix}under_10_deg": errors.under_10_deg,
        f"{prefix}rotation_max_deg": float(errors.rotation_degrees.max()),
        f"{prefix}translation_median": errors.translation_median,
    }
