"""Which search finds the poses of a run, and structure from motion before the stages of the training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.video import is_video
from factorkit.data.views.loading import LazyView
from factorkit.data.views.open import list_views
from factorkit.data.views.views import Views
from factorkit.engine.run_folder import CONFIG, check_claim, claimed, locked, read_settings
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.held_out import MAX_CROSS
from factorkit.nerfdiff.registered_views import SFM_FOLDER
from factorkit.nerfdiff.scene import Scene
from factorkit.nerfdiff.stages.feature_images import MAX_SIDE, read_feature_images
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.stages.sfm import SfmResult, count_matching, find_cameras, import_pycolmap
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError, DataError, format_count

MIN_SIDE = 256  # pixels of the longer side below which images have too few features for structure from motion
SAMPLES = 5  # pairs of neighbouring views, evenly spaced, among which matches are counted
MIN_MATCHING = 0.6  # share of the sampled views that must match another for structure from motion
MIN_REGISTERED = 0.6  # share of the views that structure from motion must register
MIN_VIEWS = 4

Prepared = Callable[["PoseSearch"], tuple[Views, Scene, dict[str, Any]]]


@dataclass(frozen=True)
class PoseSearch:
    """How the poses of a run are found.

    Attributes:
        config: of the run, with ``search`` other than "auto".
        model: COLMAP model with the cameras of the registered views, with search="sfm"; else None.
        notes: sentences for the user on what was chosen, tried and registered.
    """

    config: NerfdiffConfig
    model: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRequest:
    """What a training was asked for.

    Attributes:
        data: see :func:`factorkit.data.views.open.open_views`.
        config: with "auto" or another search.
        reading: how the data are read.
        folder: of the run.
        settings: of the run except for those of the scene, which are known after structure from motion only.
        prepare: opens the views and the scene for a search.
        progress: show progress bars.
    """

    data: Any
    config: NerfdiffConfig
    reading: dict[str, Any]
    folder: Path
    settings: dict[str, Any]
    prepare: Prepared
    progress: bool


def choose_search(request: RunRequest) -> PoseSearch:
    """Choose the search for the poses of views; with "sfm", find their cameras in the run's folder.

    A run that was started before keeps its search. Collective.

    Raises:
        ConfigError: pycolmap is not installed.
        DataError: structure from motion found no cameras, and was demanded.
        CheckpointError: the folder holds another run.
    """
    config, stored = request.config, read_stored_settings(request.folder)
    if config.poses != "predicted":
        return PoseSearch(_with_search(config, "dictionary"))
    if config.search != "auto":
        return _find_by_sfm(request, stored) if config.search == "sfm" else PoseSearch(config)
    if "scene" in stored:
        config = replace(config, search=stored["search"])
        return _find_by_sfm(replace(request, config=config), stored) if config.search == "sfm" else PoseSearch(config)
    name, reason = distributed.run_on_first(lambda: decide(request.data, request.reading))
    note = f'search="{name}": {reason}.'
    if name == "sfm":
        found = _find_by_sfm(request, stored, note)
        if isinstance(found, PoseSearch):
            return found
        note = f'{note} Rejected: {found} Tried next: search="dictionary".'
        return PoseSearch(_with_search(config, "dictionary"), None, (note,))
    return PoseSearch(_with_search(config, name), None, (note,))


def decide(data: Any, reading: dict[str, Any]) -> tuple[str, str]:
    """Return the search for data, "sfm" or "dictionary", and why; it takes a few seconds at most."""
    if isinstance(data, Iterator):
        return "dictionary", "the images can be read only once"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when the views are opened
        views = list_training_views(data, reading)
    if len(views) < MIN_VIEWS:
        return "dictionary", f"{format_count(len(views), 'view')} are too few for structure from motion"
    side = max(views.size if isinstance(views, Views) else views[0].read_image().shape[:2])
    if side < MIN_SIDE:
        return "dictionary", f"images of {side} < {MIN_SIDE} pixels are too small for structure from motion"
    try:
        import_pycolmap()
    except ConfigError as error:
        return "dictionary", f"structure from motion would be tried on images of {side} pixels, but {error}"
    rows = np.linspace(0, len(views) - 2, min(SAMPLES, len(views) // 2)).round().astype(int)
    chosen = [int(row) + step for row in rows for step in (0, 1)]
    sample = views.select(chosen) if isinstance(views, Views) else [views[i] for i in chosen]
    matching = count_matching(read_feature_images(sample, progress=False))
    text = f"{matching} of {len(chosen)} sampled images match another one"
    if matching >= MIN_MATCHING * len(chosen):
        return "sfm", text
    return "dictionary", f"only {text}, which is too little texture or overlap for structure from motion"


def list_training_views(data: Any, reading: dict[str, Any]) -> Sequence[LazyView] | Views:
    """Return the training views at the size of their files, listed but not decoded."""
    return data if isinstance(data, Views) else list_views(data, "train", MAX_SIDE, **reading).views


def _find_by_sfm(request: RunRequest, stored: dict[str, Any], choice: str = "") -> Any:
    """Find cameras by structure from motion.

    Args:
        request: of the training.
        stored: settings of the run in the folder.
        choice: why this search was chosen; "": it was demanded, so that its result is not rejected.

    Returns:
        The search; or, if it is rejected, a sentence.
    """
    folder, config = request.folder, _with_search(request.config, "sfm")
    ordered = "no" if config.ordered == "auto" else config.ordered  # of the dictionary search
    config = replace(config, optimize_camera=config.optimize_camera or (), ordered=ordered)
    if "scene" in stored:  # otherwise the folder is claimed without a scene
        requested = {**request.settings, **config.to_dict(), "scene": stored["scene"]}
        distributed.run_on_first(lambda: check_claim(folder, requested, config.RESUMABLE))
        place = locked(folder)
    else:
        place = claimed(folder, request.settings, config.RESUMABLE)
    with distributed.enter_on_first(place):
        result = distributed.run_on_first(lambda: _register(request))
        found = PoseSearch(config, result.model, tuple(filter(None, (choice, *result.describe()))))
        if not choice:
            if result.model is None:
                raise DataError(f'{found.notes[-1]} Give more overlapping images, or search="dictionary" (--search)')
            return found
        if result.model is None or result.share < MIN_REGISTERED:
            return " ".join(result.describe())
        try:
            _, scene, settings = request.prepare(found)
        except DataError as error:
            return f"{error}."
        check = Training(config, scene, folder / SFM_FOLDER / "check", settings, request.progress)
        assert scene.initial_poses is not None
        errors = check.cross_fit("sfm", scene.initial_poses, scene)
    limit = MAX_CROSS[scene.layout]
    if not errors.cross <= limit:
        return (
            f"a field fitted to half of the views leaves {errors.cross:.2f} > {limit:g} of the variance of the others."
        )
    return found


def _register(request: RunRequest) -> SfmResult:
    data = request.data
    images = read_feature_images(list_training_views(data, request.reading), request.progress)
    ordered = isinstance(data, (str, os.PathLike)) and is_video(Path(data).expanduser())
    return find_cameras(images, request.folder / SFM_FOLDER, ordered, request.progress)


def _with_search(config: NerfdiffConfig, search: Any) -> NerfdiffConfig:
    return replace(config, search=search) if config.search == "auto" else config


def read_stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder; nothing if there is none."""
    return read_settings(folder) if (folder / CONFIG).is_file() else {}
