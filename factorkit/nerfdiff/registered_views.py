"""The views that structure from motion registered, with its cameras in place of those of the files; and the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.files import MAX_EXAMPLES, format_examples
from factorkit.data.views.arrangement import Arrangement, arrange
from factorkit.data.views.colmap import ModelCameras, read_model
from factorkit.data.views.loading import LazyView, load_views
from factorkit.data.views.open import list_views, open_views
from factorkit.data.views.views import SceneLayout, Views
from factorkit.engine.run_folder import read_object
from factorkit.utils.errors import CheckpointError, format_count

SFM_FOLDER = Path("stages", "sfm")  # in a run folder
MODEL_FOLDER = SFM_FOLDER / "sparse" / "0"
LOCALISED = SFM_FOLDER / "localised.json"


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
        The views with the poses of the model, in the coordinates and layout that COLMAP models are read in, and without
        ``has_focal`` if structure from motion found their lenses too; and the poses of the data for the same views, or
        None.

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
    views = replace(views, has_focal=all(view.pose is not None for view in listed.views))
    return views, _file_poses(listed.views, listed.arrangement, model)


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


def _file_poses(views: Sequence[LazyView], arrangement: Arrangement | None, model: ModelCameras) -> Tensor | None:
    poses = [view.pose for view in views if view.name in model.cameras]
    if arrangement is None or any(pose is None for pose in poses):
        return None
    return torch.from_numpy(np.stack([arrangement.apply(pose) for pose in poses if pose is not None])).float()


@dataclass(frozen=True)
class LocalisedViews:
    """Unregistered images and their poses.

    Attributes:
        names: of the images whose pose explains them.
        poses: [L, 4, 4] in the coordinates of the run.
        others: names of the images without a pose.
    """

    names: tuple[str, ...] = ()
    poses: Tensor = field(default_factory=lambda: torch.zeros(0, 4, 4))
    others: tuple[str, ...] = ()

    def describe(self, limit: int = MAX_EXAMPLES) -> list[str]:
        """Return sentences on what was localised, with up to ``limit`` names; none if all images were registered."""
        total, notes = len(self.names) + len(self.others), []
        if self.names:
            notes.append(
                f"Localised in the finished scene, not trained on: {len(self.names)} of the "
                f"{format_count(total, 'image')} that structure from motion did not register: "
                f"{format_examples(self.names, limit)}."
            )
        if self.others:
            notes.append(f"Without a pose, and left out of exports: {format_examples(self.others, limit)}.")
        return notes


def load_localised(folder: Path | None) -> LocalisedViews:
    """Load the localised images of a run folder; none if there are none.

    Raises:
        CheckpointError: the file is damaged.
    """
    if folder is None or not (folder / LOCALISED).is_file():
        return LocalisedViews()
    values = read_object(folder / LOCALISED)
    try:
        poses = torch.tensor(values["poses"], dtype=torch.float32).reshape(-1, 4, 4)
        return LocalisedViews(tuple(values["names"]), poses, tuple(values["others"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / LOCALISED} cannot be read: {error!r}. Restore it, or delete it") from error


def list_unregistered(views: Sequence[LazyView], model: ModelCameras) -> list[LazyView]:
    """Return the listed views that a model lacks, unless the files have cameras with the lens of the view before."""
    result, last = [], next(iter(model.cameras.values()))
    for view in views:
        camera = model.cameras.get(view.name)
        if camera is not None:
            last = camera
        elif view.pose is None:
            result.append(replace(view, intrinsics=last.intrinsics, distortion=last.lens))
        else:
            result.append(replace(view, pose=None))
    return result
