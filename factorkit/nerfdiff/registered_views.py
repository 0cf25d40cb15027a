"""The views that structure from motion registered, with its cameras in place of those of the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.arrangement import Arrangement, arrange
from factorkit.data.views.colmap import ModelCameras, read_model
from factorkit.data.views.loading import LazyView, load_views
from factorkit.data.views.open import list_views, open_views
from factorkit.data.views.views import SceneLayout, Views

SFM_FOLDER = Path("stages", "sfm")  # in a run folder
MODEL_FOLDER = SFM_FOLDER / "sparse" / "0"


def apply_cameras(views: Sequence[LazyView], model: ModelCameras) -> list[LazyView]:
    """Return the registered ones of listed views, with poses, and unless the files have cameras with their lenses.

    The images of files with cameras were undistorted for structure from motion, which kept their intrinsics.
    """
    result = []
    for view in views:
        camera = model.cameras.get(view.name)
        if camera is None:
            continue
        if view.pose is None:
            view = replace(view, intrinsics=camera.intrinsics, distortion=camera.lens)
        result.append(replace(view, pose=camera.pose))
    return result


def open_registered_views(
    data: Any, reading: dict[str, Any], model_folder: Path, resolution: int
) -> tuple[Views, Tensor | None]:
    """Open the registered training views at a resolution.

    Args:
        data: see :func:`factorkit.data.views.open.open_views`, as is ``reading``.
        reading: how the data are read.
        model_folder: COLMAP model with the names of the views.
        resolution: pixels of the longer side.

    Returns:
        The views with the poses of the model, in the coordinates and layout that COLMAP models are read in; and the
        poses of the data for the same views, or None.

    Raises:
        DataError: the cameras are all in one place, or look at nothing in common.
    """
    model = read_model(model_folder)
    layout = reading.get("layout")
    if isinstance(data, Views):
        return _open_views(open_views(data, **reading), model, layout).resize(resolution), _poses_of(data, model)
    listed = list_views(data, "train", resolution, **reading)
    arrangement = _arrange(model, layout, str(data))
    views = load_views(
        apply_cameras(listed.views, model),
        arrangement=arrangement,
        layout=arrangement.layout,
        notes=listed.notes,
        points=model.points,
        resolution=resolution,
    )
    return views, _given_poses(listed.views, listed.arrangement, model)


def _arrange(model: ModelCameras, layout: SceneLayout | None, where: str) -> Arrangement:
    poses = np.stack([camera.pose for camera in model.cameras.values()])
    return arrange(poses, model.bounds, None if layout == "auto" else layout, f"{where}, by structure from motion")


def _open_views(views: Views, model: ModelCameras, layout: SceneLayout | None) -> Views:
    arrangement = _arrange(model, layout, "the views")
    rows = [i for i, name in enumerate(views.names) if name in model.cameras]
    poses = [arrangement.apply(model.cameras[views.names[i]].pose) for i in rows]
    points = None if model.points is None else torch.from_numpy(arrangement.apply_to_points(model.points)).float()
    return replace(
        views.select(rows),
        poses=torch.from_numpy(np.stack(poses)).float(),
        near=arrangement.near,
        far=arrangement.far,
        layout=arrangement.layout,
        origin=arrangement.origin,
        points=points,
    )


def _poses_of(views: Views, model: ModelCameras) -> Tensor | None:
    rows = [i for i, name in enumerate(views.names) if name in model.cameras]
    return None if views.poses is None else views.poses[rows]


def _given_poses(views: Sequence[LazyView], arrangement: Arrangement | None, model: ModelCameras) -> Tensor | None:
    poses = [view.pose for view in views if view.name in model.cameras]
    if arrangement is None or any(pose is None for pose in poses):
        return None
    return torch.from_numpy(np.stack([arrangement.apply(pose) for pose in poses if pose is not None])).float()
