"""The training data of a run, found again for its exports."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.cameras import refine_lens
from factorkit.data.views.colmap import read_model
from factorkit.data.views.loading import LazyView
from factorkit.data.views.open import list_views
from factorkit.data.views.views import Views
from factorkit.engine.run_folder import read_settings
from factorkit.metrics.pose import Similarity, align_poses
from factorkit.nerfdiff.export.images import ExportView, check_same_images, list_file, list_files, list_stored
from factorkit.nerfdiff.registered_views import (
    MODEL_FOLDER,
    SFM_FOLDER,
    apply_cameras,
    list_unregistered,
    load_localised,
)
from factorkit.nerfdiff.scene import shared_camera
from factorkit.nerfdiff.training_views import TrainingData, load_data, load_views
from factorkit.utils.errors import ConfigError, DataError, format_count

FOCAL_ROUNDING = 1e-5  # relative difference of focal lengths that are equal up to rounding


@dataclass(frozen=True)
class Originals:
    """The training data of a run.

    Attributes:
        stored: the views as the run stored them, with the cameras of the data.
        data: the same views from the data: listed files, or views in memory; None: not found.
        poses: float64 [V, 4, 4] in the coordinates of the data, or None.
        problem: why the data were not found; None if no pixel is lost by that.
        is_named: whether the user named the data, so that other data are an error.
        localised: files of the images that were localised in the finished scene.
    """

    stored: Views
    data: Sequence[LazyView] | Views | None
    poses: Tensor | None
    problem: str | None
    is_named: bool = False
    localised: Sequence[LazyView] = ()

    def list_images(
        self, intrinsics: Tensor, distortion: float = 0.0, rows: Sequence[int] | None = None
    ) -> list[ExportView]:
        """List the images at full size, then the localised ones; those of the training if they are not found.

        A warning says that they have the size of the training then.

        Args:
            intrinsics: [3, 3] of the run in units of width and height: focal lengths that it optimised are kept.
            distortion: radial term of the lens that the run found beyond that of the data.
            rows: of the images to list, without the localised ones; None: all.

        Raises:
            DataError: the data that the user named hold other images than the run.
        """
        images, problem = None, self.problem
        try:
            images = self._list_data(rows)
        except (DataError, ConfigError) as error:
            if self.is_named:
                raise
            problem = str(error)
        if images is None:
            if problem is not None:
                height, width = self.stored.size
                warnings.warn(
                    f"{problem}: images and cameras are read at {width} x {height} pixels, the size of the "
                    "training, without lens distortion. Give the training data by data= (--data)",
                    stacklevel=3,
                )
            images = list_stored(self.stored if rows is None else self.stored.select(list(rows)))
        ratio = (intrinsics / shared_camera(self.stored).intrinsics).diagonal()[:2].double()
        fx, fy = torch.where((ratio - 1).abs() < FOCAL_ROUNDING, 1.0, ratio).tolist()
        factors = np.array([[fx, 1.0, 1.0], [1.0, fy, 1.0], [1.0, 1.0, 1.0]])
        return [
            view._replace(intrinsics=view.intrinsics * factors, distortion=refine_lens(view.distortion, distortion, fx))
            for view in images
        ]

    def _list_data(self, rows: Sequence[int] | None) -> list[ExportView] | None:
        chosen = list(range(len(self.stored)) if rows is None else rows)
        stored = self.stored.select(chosen)
        if isinstance(self.data, Views):
            data = self.data.select(chosen)
            check_same_images(data.resize(stored.size), stored)
            return list_stored(data)
        if self.data is None:
            return None
        localised = () if rows is not None else self.localised
        images = list_files([self.data[i] for i in chosen], stored)
        return [*images, *(list_file(view, is_localised=True) for view in localised)]

    def align(self, poses: Tensor) -> Similarity | None:
        """Return the similarity from a run's poses [V, 4, 4] to those of the data; None if the data have none."""
        return None if self.poses is None else align_poses(poses.double(), self.poses)


def find_originals(folder: Path | None, data: Any = None) -> Originals | None:
    """Find the training data of a run folder; None if no views are stored there.

    Args:
        data: where the training data are now: a path or views; None: where they were.

    Raises:
        ConfigError: ``data`` without a run folder.
        DataError: ``data`` list other views than the run.
    """
    stored, recorded = load_views(folder), load_data(folder)
    if stored is None:
        if data is not None:
            raise ConfigError("data= needs a run folder: a single file does not hold the names of the training views")
        return None
    is_named, source = data is not None, recorded.source if data is None else data
    if isinstance(source, Views):
        return Originals(stored, source, _file_poses(source), None, is_named)
    if source is None:
        lost = recorded.size is None or recorded.size != stored.size
        problem = "the run was trained on views in memory" if lost else None
        return Originals(stored, None, _file_poses(stored), problem)
    try:
        if not is_named and not os.path.exists(source):
            raise DataError(f"the training data are not in {source} any more")
        listed = list_views(source, "train", **_move_paths(recorded, source)).views
        with_cameras, localised = _apply_sfm(folder, listed)
        _check_names([view.name for view in with_cameras], stored.names, source)
    except (DataError, ConfigError) as error:
        if is_named:
            raise
        # The files of forward-facing scenes have other coordinates than their views.
        return Originals(stored, None, _file_poses(stored) if stored.layout == "object" else None, str(error))
    matrices = [view.pose for view in listed if view.pose is not None and view.name in stored.names]
    poses = torch.from_numpy(np.stack(matrices)) if len(matrices) == len(with_cameras) else None
    return Originals(stored, with_cameras, poses, None, is_named, localised)


def _apply_sfm(folder: Path | None, views: list[LazyView]) -> tuple[list[LazyView], list[LazyView]]:
    """Return the views that a run registered by structure from motion, with its cameras, and the localised ones.

    Of other runs: all views, and none.
    """
    if folder is None or read_settings(folder).get("search") != "sfm" or not (folder / MODEL_FOLDER).is_dir():
        return views, []
    model, names = read_model(folder / SFM_FOLDER), load_localised(folder).names
    return apply_cameras(views, model), [view for view in list_unregistered(views, model) if view.name in names]


def _check_names(names: list[str], stored: list[str], source: Any) -> None:
    if names != stored:
        missing = [name for name in stored if name not in names]
        problem = f"{missing[0]} is missing" if missing else f"there are {format_count(len(names), 'view')}"
        where = source if isinstance(source, (str, os.PathLike)) else "data="
        raise DataError(f"{where}: not the {format_count(len(stored), 'view')} of the run: {problem}")


def _file_poses(views: Views) -> Tensor | None:
    if views.poses is None:
        return None
    poses = views.poses.double().clone()
    poses[:, :3, 3] += torch.tensor(views.origin, dtype=torch.float64)
    return poses


def _move_paths(recorded: TrainingData, source: Any) -> dict[str, Any]:
    """Return the arguments of reading; paths below the former source are those below the new one."""
    if recorded.source is None or not isinstance(source, (str, os.PathLike)):
        return recorded.reading
    former, now = Path(recorded.source), Path(source).expanduser().resolve()
    moved = dict(recorded.reading)
    for name, value in moved.items():
        if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(former):
            moved[name] = str(now / Path(value).relative_to(former))
    return moved
