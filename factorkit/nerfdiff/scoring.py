"""How good cameras and scene are, beside the true ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from factorkit.data.views import Views
from factorkit.engine.folder import write_json
from factorkit.errors import ConfigError, DataError
from factorkit.metrics.image import WINDOW, lpips, psnr, ssim
from factorkit.metrics.pose import PoseErrors, pose_errors

if TYPE_CHECKING:
    from factorkit.nerfdiff.run import NerfdiffRun

GIVEN = "views.json"  # in a run folder: names and, where they came with poses, the true poses of the training views
FOR_ALIGNMENT = 3  # cameras below which a similarity says little


def keep_given(folder: Path, views: Views) -> None:
    """Write names and true poses of the training views into a run folder, for scoring alone."""
    poses = None if views.poses is None else views.poses.tolist()
    write_json(folder / GIVEN, {"names": list(views.names), "poses": poses})


def training_errors(run: NerfdiffRun, views: Views | None = None) -> PoseErrors | None:
    """Errors of the training views' found poses; None where nobody knows the true ones.

    Args:
        views: perhaps the training views themselves, by their names, with poses.
    """
    path = None if run.folder is None else run.folder / GIVEN
    if path is None or not path.is_file():
        return None
    given = json.loads(path.read_text(encoding="utf-8"))
    if given["poses"] is None and views is not None and views.poses is not None and given["names"] == views.names:
        given["poses"] = views.poses.tolist()
    return None if given["poses"] is None else pose_errors(run.poses, torch.tensor(given["poses"]))


def evaluate(run: NerfdiffRun, views: Views, poses: Tensor | None = None) -> dict[str, Any]:
    """Scores of a run on views with true poses; see :meth:`factorkit.nerfdiff.run.NerfdiffRun.evaluate`."""
    true = views.poses if poses is None else torch.as_tensor(poses, dtype=torch.float32)
    if true is None:
        raise ConfigError("the views come without poses, so there is nothing to compare with; give poses=")
    if true.shape != (len(views), 4, 4):
        raise DataError(f"poses of shape {tuple(true.shape)} for {len(views)} views; give [{len(views)}, 4, 4]")
    found = training_errors(run, views)
    predicted = run.predict_pose(views).poses
    if found is None and len(views) < FOR_ALIGNMENT:
        raise DataError(f"{len(views)} views cannot be aligned with the model's own coordinates; give at least 3")
    encoder = pose_errors(predicted, true)
    alignment = encoder.alignment if found is None else found.alignment
    views = views.resized(run.model.size)
    at_truth, at_encoder = run.render(alignment.inverse().apply(true)).images, run.render(predicted).images
    scores: dict[str, Any] = {"views": len(views), "size": list(views.size), "step": run.step}
    if found is not None:
        scores |= _poses("", found)
    scores |= _poses("encoder_", encoder)
    for suffix, images in (("", at_truth), ("_encoder", at_encoder)):
        scores[f"psnr{suffix}"] = psnr(images, views.images).mean().item()
        if min(views.size) >= WINDOW:
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
