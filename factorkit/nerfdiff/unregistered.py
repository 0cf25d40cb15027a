"""The images that structure from motion did not register: localised in the finished scene, and never trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from factorkit.data.views.cameras import refine_lens
from factorkit.data.views.colmap import read_model
from factorkit.data.views.loading import load_views as load_image_views
from factorkit.data.views.open import list_views, open_views
from factorkit.data.views.views import Views
from factorkit.engine.run_folder import read_object, write_json
from factorkit.nerfdiff.loaded_scene import LoadedScene
from factorkit.nerfdiff.registered_views import (
    LOCALISED,
    MODEL_FOLDER,
    SFM_FOLDER,
    LocalisedViews,
    list_unregistered,
    load_localised,
)
from factorkit.nerfdiff.scene import match_size, shared_camera
from factorkit.nerfdiff.stages.sfm import load_result
from factorkit.nerfdiff.training_views import load_views
from factorkit.nerfdiff.verdict import log_lines
from factorkit.utils import distributed

REFINE_STEPS = 100
MAX_ERROR_RATIO = 2.0  # of an image's mean squared error to the largest of the training views


def localise_unregistered(
    scene: LoadedScene, step: int, training: Views, folder: Path, data: Any, reading: dict[str, Any]
) -> LocalisedViews:
    """Find the poses of the images that structure from motion did not register: encoder, then photometric error.

    A pose counts if its render is hardly worse than those of the training views. The result is stored in the run
    folder, and loaded by the next call with the same step. Collective.

    Args:
        scene: of a finished run by ``search="sfm"``.
        step: of its training.
        training: its training views, with its poses.
        folder: of the run.
        data: of the training, as is ``reading``.
        reading: how the data are read.
    """

    def load() -> LocalisedViews | None:
        is_done = (folder / LOCALISED).is_file() and read_object(folder / LOCALISED).get("step") == step
        return load_localised(folder) if is_done else None

    if (done := distributed.run_on_first(load)) is not None:
        return done
    views = open_unregistered(data, reading, folder, max(scene.model.size), scene.scene.get("distortion", 0.0))
    result = LocalisedViews()
    if views is not None:
        stored = load_views(folder)
        assert stored is not None
        change = (scene.model.camera.intrinsics.cpu() / shared_camera(stored).intrinsics).diagonal()
        views = replace(views, intrinsics=views.intrinsics * (torch.ones(3, 3) + torch.diag(change - 1)))
        poses = scene.predict_pose(views, check=True, refine=REFINE_STEPS).poses
        limit = MAX_ERROR_RATIO * measure_errors(scene, training, scene.poses).max()
        is_found = measure_errors(scene, views, poses) <= limit
        names = [[n for n, y in zip(views.names, is_found.tolist(), strict=True) if y is x] for x in (True, False)]
        result = LocalisedViews(tuple(names[0]), poses[is_found], tuple(names[1]))
    values = {"step": step, "names": result.names, "poses": result.poses.tolist(), "others": result.others}
    distributed.run_on_first(lambda: write_json(folder / LOCALISED, values))
    return result


def report_registration(folder: Path, localised: LocalisedViews) -> None:
    """Write into the report of a run what was registered, with the names of all images that were not."""
    result = load_result(folder / SFM_FOLDER)
    if result is not None:
        count = len(result.unregistered)
        log_lines(folder, "sfm", [*result.describe(count), *localised.describe(count)])


def open_unregistered(
    data: Any, reading: dict[str, Any], folder: Path, resolution: int, distortion: float
) -> Views | None:
    """Open the training images without a pose, at a resolution and without the lens of the run; None if none."""
    model = read_model(folder / MODEL_FOLDER)
    if isinstance(data, Views):
        rows = [i for i, name in enumerate(data.names) if name not in model.cameras]
        return replace(open_views(data, **reading).select(rows).resize(resolution), poses=None) if rows else None
    views = list_unregistered(list_views(data, "train", resolution, **reading).views, model)
    views = [replace(view, distortion=refine_lens(view.distortion, distortion, 1.0)) for view in views]
    return load_image_views(views, resolution=resolution) if views else None


def measure_errors(scene: LoadedScene, views: Views, poses: Tensor) -> Tensor:
    """Return the mean squared error [V] between views and renders from poses [V, 4, 4]."""
    views = match_size(views, scene.model.size)
    difference = (scene.render(poses, views.size, intrinsics=views.intrinsics).images - views.images).square()
    if views.loss_masks is None:
        return difference.mean((1, 2, 3))
    return (difference * views.loss_masks).sum((1, 2, 3)) / (3 * views.loss_masks.sum((1, 2, 3))).clamp_min(1)
