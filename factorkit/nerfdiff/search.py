"""Which search finds the poses of a run, and structure from motion before the stages of the training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from factorkit.data.video import is_video
from factorkit.data.views.open import list_views
from factorkit.data.views.views import Views
from factorkit.engine.run_folder import CONFIG, check_claim, claimed, locked, read_settings
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.registered_views import SFM_FOLDER
from factorkit.nerfdiff.stages.feature_images import MAX_SIDE, read_feature_images
from factorkit.nerfdiff.stages.sfm import SfmResult, find_cameras
from factorkit.utils import distributed
from factorkit.utils.errors import DataError


@dataclass(frozen=True)
class PoseSearch:
    """How the poses of a run are found.

    Attributes:
        config: of the run, with ``search`` other than "auto".
        model: COLMAP model with the cameras of the registered views, with search="sfm"; else None.
        notes: sentences for the user on what was chosen and registered.
    """

    config: NerfdiffConfig
    model: Path | None = None
    notes: tuple[str, ...] = ()


def choose_search(
    data: Any, config: NerfdiffConfig, folder: Path, settings: dict[str, Any], reading: dict[str, Any], progress: bool
) -> PoseSearch:
    """Choose the search for the poses of views; with "sfm", find their cameras in ``folder``.

    A run that was started before keeps its search. Collective.

    Args:
        data: see :func:`factorkit.data.views.open.open_views`.
        config: with "auto" or another search.
        folder: of the run.
        settings: of the run except for those of the scene, which are known after structure from motion only.
        reading: how the data are read.
        progress: show progress bars.

    Raises:
        ConfigError: pycolmap is not installed.
        DataError: structure from motion found no cameras.
        CheckpointError: the folder holds another run.
    """
    if config.poses != "predicted":
        return PoseSearch(_resolved(config, "dictionary"))
    stored = _stored_settings(folder)
    if config.search == "auto":
        config = _resolved(config, stored["search"] if "scene" in stored else "dictionary")
    if config.search != "sfm":
        return PoseSearch(config)
    settings = settings | {"search": "sfm", "optimize_camera": list(config.optimize_camera or ())}

    def find() -> SfmResult:
        if "scene" in stored:
            check_claim(folder, settings | {"scene": stored["scene"]}, config.RESUMABLE)
            place = locked(folder)
        else:
            place = claimed(folder, settings, config.RESUMABLE)
        with place:
            views = data if isinstance(data, Views) else list_views(data, "train", MAX_SIDE, **reading).views
            images = read_feature_images(views, progress)
            ordered = isinstance(data, (str, Path)) and is_video(Path(data).expanduser())
            return find_cameras(images, folder / SFM_FOLDER, ordered, progress)

    result = distributed.run_on_first(find)
    if result.model is None:
        raise DataError(f'{result.describe()} Give more overlapping images, or search="dictionary" (--search)')
    return PoseSearch(config, result.model, (result.describe(),))


def _resolved(config: NerfdiffConfig, search: Any) -> NerfdiffConfig:
    return replace(config, search=search) if config.search == "auto" else config


def _stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder; nothing if there is none."""
    return read_settings(folder) if (folder / CONFIG).is_file() else {}
