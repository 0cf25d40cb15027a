"""Which search finds the poses of a run, and which one follows a rejected one; structure from motion for a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
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
from factorkit.nerfdiff.scene import MIN_SCENE_VIEWS, Scene, choose_unbounded
from factorkit.nerfdiff.search_record import SearchRecord, Trial, exchange, judge_run, load_record
from factorkit.nerfdiff.stages.feature_images import MAX_SIDE, read_feature_images
from factorkit.nerfdiff.stages.matches import count_matching, import_pycolmap
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.stages.sfm import SfmResult, find_cameras
from factorkit.nerfdiff.training_views import SEARCH_FILE, complete_settings
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError, DataError, format_count

MIN_SIDE = 256  # pixels of the longer side below which images have too few features for structure from motion
SAMPLES = 5  # pairs of neighbouring views, evenly spaced, among which matches are counted
MIN_MATCHING = 0.6  # share of the sampled views that must match another for structure from motion
MIN_REGISTERED = 0.6  # share of the views that structure from motion must register
MIN_VIEWS = 4
MIN_SIDE_AFTER_DICTIONARY = 128  # pixels; there is nothing to lose


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
    record = distributed.run_on_first(lambda: load_record(request.folder))
    if record.next and ("scene" not in stored or stored["search"] != record.next):  # a change was interrupted
        return _change_search(request, record)
    if "scene" in stored:
        return _resume_search(request, stored["search"], stored)
    name, reason = distributed.run_on_first(lambda: decide(request.data, request.reading))
    note = f'search="{name}": {reason}.'
    if name == "sfm":
        search, trial = _try_sfm(request, _claimed_without_scene(request), note)
        if search is not None:
            return search
        distributed.run_on_first(lambda: record.add(trial).save(request.folder))
        note = f'{note} Rejected: {trial.problem} Tried next: search="dictionary".'
        name = "dictionary"
    return PoseSearch(_with_search(config, name), None, (note,))


def choose_next_search(request: RunRequest, search: PoseSearch) -> tuple[PoseSearch | None, list[str]]:
    """Judge the finished run of a search that was chosen; if alarms reject it, let the other search follow.

    If both are rejected, the one with the lower held-out error is kept. Runs of earlier versions, without a record,
    stay as they are. Collective.

    Returns:
        The search whose training takes the place of this one, or None if the run stays; and sentences on what was
        tried with what figures.
    """
    if request.config.search != "auto" or request.config.poses != "predicted":
        return None, []
    folder, name = request.folder, search.config.search
    if not distributed.run_on_first((folder / SEARCH_FILE).is_file):
        return None, []
    record, trial = distributed.run_on_first(lambda: (load_record(folder), judge_run(folder, name)))
    record, notes = record.add(trial), tuple[str, ...]()
    if trial.problem:
        other = "dictionary" if name == "sfm" else "sfm"
        rival = record.find(other) or _try_search(request, other)
        if isinstance(rival, Trial):
            record = record.add(rival) if rival.problem else record
            if rival.is_better_than(trial):
                record = replace(record, next=other)
                distributed.run_on_first(lambda: record.save(folder))
                reason = ", rejected too, but with a lower held-out error" if rival.problem else ""
                note = f'Rejected: {trial.problem}. Tried next: search="{other}"{reason}.'
                return _change_search(request, record), [note]
        else:
            notes = (f'search="{other}" was not tried: {rival}.',)
    return None, distributed.run_on_first(lambda: record.store(folder, name, notes))


def _try_search(request: RunRequest, name: str) -> Trial | str:
    """Return the first trial of the search that may follow a rejected one, or why it cannot."""
    if name == "sfm":
        find = partial(_find_obstacle, request.data, request.reading, MIN_SIDE_AFTER_DICTIONARY)
        place, choice = locked(request.folder), 'search="sfm": alarms rejected the dictionary.'
        return distributed.run_on_first(lambda: find()[0]) or _try_sfm(request, place, choice)[1]
    config = _with_search(request.config, name)
    try:
        _, scene, _ = request.prepare(PoseSearch(config))
        choose_unbounded(config, scene)
    except (ConfigError, DataError) as error:
        return str(error)
    return Trial(name)


def _change_search(request: RunRequest, record: SearchRecord) -> PoseSearch:
    """Let the training of a record's next search take the place of the rejected one, from its start if it has none."""
    with distributed.enter_on_first(locked(request.folder)):
        distributed.run_on_first(lambda: exchange(request.folder, record.next, request.settings))
    return _resume_search(request, record.next, read_stored_settings(request.folder))


def _resume_search(request: RunRequest, name: str, stored: dict[str, Any]) -> PoseSearch:
    config = _with_search(request.config, name)
    return _find_by_sfm(replace(request, config=config), stored) if name == "sfm" else PoseSearch(config)


def _find_obstacle(data: Any, reading: dict[str, Any], min_side: int) -> tuple[str, Sequence[LazyView] | Views]:
    """Return why structure from motion is not possible, or "", and the training views."""
    if isinstance(data, Iterator):
        return "the images can be read only once", []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when the views are opened
        views = list_training_views(data, reading)
    if len(views) < MIN_VIEWS:
        return f"{format_count(len(views), 'view')} are too few for structure from motion", views
    side = max(views.size if isinstance(views, Views) else views[0].read_image().shape[:2])
    if side < min_side:
        return f"images of {side} < {min_side} pixels are too small for structure from motion", views
    try:
        import_pycolmap()
    except ConfigError as error:
        return f"structure from motion would be tried on images of {side} pixels, but {error}", views
    return "", views


def decide(data: Any, reading: dict[str, Any]) -> tuple[str, str]:
    """Return the search for data, "sfm" or "dictionary", and why; it takes a few seconds at most."""
    obstacle, views = _find_obstacle(data, reading, MIN_SIDE)
    if obstacle:
        return "dictionary", obstacle
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
    return (
        data
        if isinstance(data, Views)
        else list_views(data, "train", MAX_SIDE, min_views=MIN_SCENE_VIEWS, **reading).views
    )


def _find_by_sfm(request: RunRequest, stored: dict[str, Any]) -> PoseSearch:
    """Find cameras by structure from motion, which was demanded or accepted before.

    Raises:
        DataError: it found none.
    """
    folder, config = request.folder, _sfm_config(request.config)
    if "scene" in stored:  # otherwise the folder is claimed without a scene
        requested = {**request.settings, **config.with_choices(stored).to_dict(), "scene": stored["scene"]}
        distributed.run_on_first(lambda: check_claim(folder, requested, config.RESUMABLE))
        place: AbstractContextManager[object] = locked(folder)
    else:
        place = _claimed_without_scene(request)
    with distributed.enter_on_first(place):
        result = distributed.run_on_first(lambda: _register(request))
    notes = tuple(result.describe())
    if result.model is None:
        raise DataError(f'{notes[-1]} Give more overlapping images, or search="dictionary" (--search)')
    return PoseSearch(config, result.model, notes)


def _claimed_without_scene(request: RunRequest) -> AbstractContextManager[object]:
    """Claim a folder before its views are known; one that an earlier call claimed in vain is free."""
    complete = partial(complete_settings, folder=request.folder, requested=request.settings)
    return claimed(request.folder, request.settings, request.config.RESUMABLE, complete=complete)


def _try_sfm(
    request: RunRequest, place: AbstractContextManager[object], choice: str
) -> tuple[PoseSearch | None, Trial]:
    """Find cameras by structure from motion, and check them; return None in place of a search that is rejected.

    Args:
        request: of the training.
        place: claims or locks the folder.
        choice: why this search was chosen.
    """
    with distributed.enter_on_first(place):
        result = distributed.run_on_first(lambda: _register(request))
        if result.model is None or result.share < MIN_REGISTERED:
            return None, Trial("sfm", None, " ".join(result.describe()))
        search = PoseSearch(_sfm_config(request.config), result.model, (choice, *result.describe()))
        try:
            _, scene, settings = request.prepare(search)
        except DataError as error:
            return None, Trial("sfm", None, f"{error}.")
        config = replace(search.config, unbounded=choose_unbounded(search.config, scene))
        check = Training(config, scene, request.folder / SFM_FOLDER / "check", settings, request.progress)
        assert scene.initial_poses is not None
        cross = check.cross_fit("sfm", scene.initial_poses, scene).cross
    limit = MAX_CROSS["unbounded" if config.unbounded == "yes" else scene.layout]
    if cross <= limit:
        return search, Trial("sfm", cross)
    problem = f"a field fitted to half of the views leaves {cross:.2f} > {limit:g} of the variance of the others."
    return None, Trial("sfm", cross, problem)


def _sfm_config(config: NerfdiffConfig) -> NerfdiffConfig:
    """Return the configuration of a run by structure from motion; what only the dictionary has is off."""
    ordered = "no" if config.ordered == "auto" else config.ordered
    return replace(_with_search(config, "sfm"), optimize_camera=config.optimize_camera or (), ordered=ordered)


def _register(request: RunRequest) -> SfmResult:
    data = request.data
    images = read_feature_images(list_training_views(data, request.reading), request.progress)
    video = isinstance(data, (str, os.PathLike)) and is_video(Path(data).expanduser())
    ordered = request.config.ordered == "yes" or (request.config.ordered == "auto" and video)
    return find_cameras(images, request.folder / SFM_FOLDER, ordered, request.progress)


def _with_search(config: NerfdiffConfig, search: Any) -> NerfdiffConfig:
    return replace(config, search=search) if config.search == "auto" else config


def read_stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder; nothing if there is none. Collective.

    Process 0 may write them as soon as it has read them, before another process would.
    """
    return distributed.run_on_first(lambda: read_settings(folder) if (folder / CONFIG).is_file() else {})
