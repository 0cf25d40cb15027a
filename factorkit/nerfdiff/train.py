"""``factorkit.train_nerfdiff``: from views to a run folder with cameras, scene and model."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.open import open_views
from factorkit.data.views.views import SceneLayout, Views
from factorkit.engine.config import cpu_threads, peak_memory, resolve_device
from factorkit.engine.run_folder import claimed
from factorkit.engine.trainer import Trainer
from factorkit.nerfdiff.config import MIN_GAUSSIAN_VIEWS, NerfdiffConfig, preset_config
from factorkit.nerfdiff.epipolar_check import add_epipolar_check
from factorkit.nerfdiff.fields.gaussians import TRAINING_BYTES
from factorkit.nerfdiff.previews.views import save_masks
from factorkit.nerfdiff.registered_views import open_registered_views
from factorkit.nerfdiff.report_views import save_own_size_views
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.scene import MIN_SCENE_VIEWS, Scene, choose_unbounded, open_scene, require_poses
from factorkit.nerfdiff.search import (
    PoseSearch,
    RunRequest,
    choose_next_search,
    choose_search,
    decide,
    load_record,
    read_stored_settings,
)
from factorkit.nerfdiff.stages.dictionary import SearchTask
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.stages.recentre import is_unevenly_framed
from factorkit.nerfdiff.stages.refine import UPDATE_EVERY
from factorkit.nerfdiff.stages.walks import find_order
from factorkit.nerfdiff.training_views import complete_settings, describe_data, describe_scene, store_views
from factorkit.nerfdiff.unregistered import localise_unregistered, report_registration
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError, DataError, format_count
from factorkit.utils.memory import require_memory

NUM_PROCEDURAL_VIEWS = 80  # without data
TIMED_STEPS = 3  # of each stage, in a dry run


def train_nerfdiff(
    data: Any = None,
    *,
    out: str | Path | None = None,
    preset: str | None = None,
    progress: bool = True,
    layout: SceneLayout | Literal["auto"] | None = None,
    masks: Any = None,
    loss_masks: Any = None,
    fov: float | None = None,
    box: float | None = None,
    **changes: Any,
) -> NerfdiffRun:
    """Find the cameras and the scene of views; result and errors are those of :func:`factorkit.train_nerfdiff`.

    Args:
        data: :class:`factorkit.data.views.views.Views`, or anything that
            :func:`factorkit.data.views.open.open_views` reads; None: the procedural scene of the package. From files,
            the training split is used, or all but every 8th view if there is none. Poses in the data are used only with
            ``poses="known"``, and otherwise kept for scoring.
        out: the run folder; None: ``runs/nerfdiff-<preset>``.
        preset: see :data:`factorkit.nerfdiff.config.PRESETS`; None: ``"demo"`` without data, else ``"fast"``.
        progress: show progress bars.
        layout, masks, loss_masks, fov: how the views are read, see :func:`factorkit.data.views.open.open_views`.
        box: see :func:`factorkit.nerfdiff.scene.open_scene`.
        **changes: any field of :class:`~factorkit.nerfdiff.config.NerfdiffConfig`.
    """
    preset = preset or default_preset(data)
    config = preset_config(preset, **changes)
    device = distributed.local_device(resolve_device(config.device))
    distributed.join_processes(device)
    distributed.check_batch(config.batch_size)
    distributed.check_batch(config.views_per_step, "views_per_step")
    folder = choose_folder(data, out, preset)
    reading = {"layout": layout, "masks": masks, "loss_masks": loss_masks, "fov": fov}
    source = _require_data(data, config, reading)
    settings = {"model": "nerfdiff", **config.to_dict(), "preset": preset}

    def prepare(search: PoseSearch) -> tuple[Views, Scene, dict[str, Any]]:
        return _prepare(source, search, preset, device, reading, box)

    request = RunRequest(source, config, reading, folder, settings, prepare, progress)

    def train(search: PoseSearch) -> NerfdiffRun:
        views, scene, settings = prepare(search)
        stored = read_stored_settings(folder)
        config = choose_capture_settings(search.config, scene, stored)
        settings |= config.to_dict()
        if progress:
            print_notes([*search.notes, *list_notes(views, scene, config, search.config)])

        complete = partial(complete_settings, folder=folder, requested=settings)
        run_folder = claimed(folder, settings, config.RESUMABLE, complete=complete)
        with cpu_threads(config.threads), distributed.enter_on_first(run_folder):
            if request.config.search == "auto" and "scene" not in stored:
                distributed.run_on_first(lambda: load_record(folder).save(folder))
            distributed.run_on_first(lambda: store_views(folder, views, describe_data(data, reading)))
            distributed.run_on_first(lambda: save_masks(folder / "samples" / "000000_masks.png", views))
            Training(config, scene, folder, settings, progress).run()
            run = NerfdiffRun.load(folder, device=device)
            intrinsics, distortion = run.camera_changes
            distributed.run_on_first(
                lambda: add_epipolar_check(folder, run.step, views, intrinsics, run.poses, distortion)
            )
            shown = distributed.run_on_first(lambda: save_own_size_views(run, folder, data))
            if shown and progress:
                print_notes([shown])
            if search.model is not None:
                localised = localise_unregistered(run, run.step, run.views, folder, source, reading)
                distributed.run_on_first(lambda: report_registration(folder, localised))
                if progress:
                    print_notes(localised.describe())
            return run

    search: PoseSearch | None = choose_search(request)
    while search is not None:
        run = train(search)
        search, notes = choose_next_search(request, search)
        if progress:
            print_notes(notes)
    return run


def print_notes(notes: Sequence[str]) -> None:
    """Print sentences on the views; collective."""
    distributed.run_on_first(lambda: print("".join(f"views: {note}\n" for note in notes), end="", file=sys.stderr))


def default_preset(data: Any) -> str:
    """Return the preset that is used if none is given."""
    return "demo" if data is None else "fast"


def choose_folder(data: Any, out: str | Path | None, preset: str | None) -> Path:
    """Return the run folder."""
    return Path(out) if out is not None else Path("runs") / f"nerfdiff-{preset or default_preset(data)}"


def check_options(data: Any, preset: str | None, options: dict[str, Any]) -> None:
    """Raise ConfigError for options of :func:`train_nerfdiff` that cannot work whatever the views."""
    reading = ("progress", "layout", "masks", "loss_masks", "fov", "box")
    preset_config(preset or default_preset(data), **{k: v for k, v in options.items() if k not in reading})


def estimate(
    data: Any = None,
    *,
    preset: str | None = None,
    layout: SceneLayout | Literal["auto"] | None = None,
    masks: Any = None,
    loss_masks: Any = None,
    fov: float | None = None,
    box: float | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Time a few steps of each stage on this machine, for ``--dry-run``; nothing is written.

    The arguments are those of :func:`train_nerfdiff`.

    Returns:
        preset, views, notes (sentences on how the views were read), parameters (of encoder and field), memory_gib (peak
        of a GPU, or growth of the process), device, stages (each with name, steps, views_per_second and seconds), and
        seconds, their sum. The flip test is counted with its maximum number of rounds.
    """
    preset = preset or default_preset(data)
    config = preset_config(preset, **changes)
    device = resolve_device(config.device)
    reading = {"layout": layout, "masks": masks, "loss_masks": loss_masks, "fov": fov}
    source, notes = _require_data(data, config, reading), list[str]()
    if config.poses == "predicted" and config.search == "auto":
        name, reason = decide(source, reading)
        notes.append(f'search="{name}": {reason}.')
        config = dataclasses.replace(config, search=name)  # type: ignore[arg-type]  # one of two
    if config.poses == "predicted" and config.search == "sfm":
        notes.append("A dry run finds no cameras by structure from motion: the stages are timed with the dictionary.")
        config = dataclasses.replace(config, search="dictionary")
    views, scene, settings = _prepare(source, PoseSearch(config), preset, device, reading, box)
    requested, config = config, choose_capture_settings(config, scene)
    settings |= config.to_dict()
    before = peak_memory(device) if device.type == "cpu" else 0
    # one round is timed, and counted as often as it may run
    trial = _StageTimer(dataclasses.replace(config, flip_rounds=min(1, config.flip_rounds)), scene, settings)
    with cpu_threads(config.threads):
        trial.run()
    for stage in trial.stages:
        if stage["name"].startswith("flip"):
            stage["seconds"] *= max(1, config.flip_rounds)
    return {
        "preset": preset,
        "views": len(views),
        "notes": [*notes, *list_notes(views, scene, config, requested)],
        "parameters": trial.parameters,
        "memory_gib": max(peak_memory(device) - before, 5 * 4 * trial.parameters) / 2**30,
        "device": str(device),
        "stages": trial.stages,
        "seconds": sum(stage["seconds"] for stage in trial.stages),
    }


class _StageTimer(Training):
    """A training that times a few steps of each stage and then takes it for finished."""

    def __init__(self, config: NerfdiffConfig, scene: Scene, settings: dict[str, Any]):
        super().__init__(config, scene, Path(), settings, progress=False)
        self.stages: list[dict[str, Any]] = []
        self.parameters = 0

    def train_stage(
        self, name: str, build_task: Callable[[NerfdiffConfig], Any], folder: Path | None = None, **changes: Any
    ) -> Any:
        config, start = self.config.stage(name, **changes), time.perf_counter()
        task = build_task(config)
        preparation = time.perf_counter() - start
        seconds = Trainer(task, config, self.folder, {}, device=self.device, progress=False).measure_step_seconds(
            TIMED_STEPS
        )
        views_per_second = config.batch_size / seconds
        if isinstance(task, SearchTask):
            start = time.perf_counter()
            task.errors()
            seconds += (time.perf_counter() - start) / UPDATE_EVERY
        stage = {"name": name, "steps": config.steps, "views_per_second": views_per_second}
        self.stages.append({**stage, "seconds": preparation + config.steps * seconds})
        self.parameters = max(self.parameters, sum(p.numel() for p in task.model.parameters()))
        return task.model

    def log_once(self, event: str, **values: Any) -> None:
        pass

    def log_duplication(self, poses: torch.Tensor) -> None:
        self.measure_duplication(poses)

    def log_held_out_checks(self, model: Any) -> None:
        errors, _, reason = self.measure_held_out(model)
        self.check_shared_error(model, errors, reason)


def choose_capture_settings(
    config: NerfdiffConfig, scene: Scene, stored: Mapping[str, Any] = MappingProxyType({})
) -> NerfdiffConfig:
    """Return the configuration with what is open chosen by the views.

    These are ``optimize_camera``, ``ordered``, ``unbounded``, ``field`` and its sizes. The choices of ``stored``
    settings, those of a run that is resumed, stay.
    """
    searched = is_object_search(config, scene)
    parameters, ordered = config.optimize_camera, config.ordered
    if parameters is None and stored.get("optimize_camera") is not None:
        parameters = tuple(stored["optimize_camera"])
    if parameters is None:
        by_hand = searched and config.candidate_type == "look_at" and is_unevenly_framed(scene)
        parameters = (
            *(("aim", "distance", "roll") if by_hand else ()),
            *(("focal",) if searched and not scene.has_focal else ()),
        )
    if ordered == "auto" and "scene" in stored:
        ordered = stored.get("ordered", "no")
    if ordered == "auto":
        ordered = "yes" if searched and find_order(scene) is not None else "no"
    config = config.with_choices(stored)
    unbounded = choose_unbounded(config, scene)
    if "scene" not in stored:
        config = config.with_field("gaussians" if config.field == "auto" else config.field, unbounded)
        if searched and (parameters or ordered == "yes"):
            config = config.with_steps_for(len(scene.images))
    return dataclasses.replace(config, optimize_camera=parameters, ordered=ordered, unbounded=unbounded)


def has_found_lenses(config: NerfdiffConfig, scene: Scene) -> bool:
    """Return whether focal length and distortion of the views were found by structure from motion."""
    return config.poses == "predicted" and config.search == "sfm" and not scene.has_focal


def is_object_search(config: NerfdiffConfig, scene: Scene) -> bool:
    """Return whether the dictionary searches cameras around an object."""
    return scene.layout == "object" and config.poses == "predicted" and config.search in ("auto", "dictionary")


def list_notes(
    views: Views, scene: Scene, config: NerfdiffConfig, requested: NerfdiffConfig | None = None
) -> list[str]:
    """Return sentences for the user on how the views were read and prepared, and on what was chosen by them.

    Args:
        views: as read.
        scene: prepared from them.
        config: of the run.
        requested: the configuration before the choices by the views; None: without them.
    """
    notes = [*views.notes, *([scene.note] if scene.note else [])]
    if requested is not None and config.field != requested.field:
        notes.append(f'field="{config.field}": views of {MIN_GAUSSIAN_VIEWS} pixels or more (--field).')
    if "aim" in config.pose_parameters and config.search == "dictionary" and scene.foreground is not None:
        notes.append(
            "The search recentres the views by their foreground, and the cameras need not look at the object's centre "
            '(optimize_camera has "aim"; --optimize-camera changes it).'
        )
    freed = [name for name in ("focal", "distortion") if name in (config.optimize_camera or ())]
    if freed and has_found_lenses(config, scene):
        names = " and ".join({"focal": "focal length", "distortion": "radial distortion"}[name] for name in freed)
        notes.append(
            f"The {names} found by structure from motion {'is' if len(freed) == 1 else 'are'} refined with the field "
            f"(optimize_camera has {' and '.join(map(repr, freed))})."
        )
    elif not scene.has_focal and "focal" in freed:
        notes.append(
            "The focal length is a guess, since neither cameras, EXIF nor fov= (--fov) give it, and is optimised "
            '(optimize_camera has "focal").'
        )
    if config.ordered == "yes" and is_object_search(config, scene):
        source = "the times in their EXIF data" if find_order(scene) == "times" else "their names"
        notes.append(f"The views are taken for a walk around the object in the order of {source} (--ordered no).")
    if requested is not None and is_object_search(config, scene) and config.field_steps > requested.field_steps:
        notes.append(
            f"field_steps={config.field_steps}, more than {requested.field_steps}, as each of the {len(scene.images)} "
            "views moves its camera only when it is drawn (--field-steps)."
        )
    if config.unbounded == "yes":
        notes.append(
            "The field covers all of space, the box in its middle at full resolution: cameras surround what they look "
            "at, and neither masks nor a background of one colour show an object (--unbounded no: the box alone). "
            f"Unless they were given, the sizes suit such scenes: grid_resolution={config.grid_resolution}, "
            f"samples_per_ray={config.samples_per_ray}, field_steps={config.field_steps}."
        )
    elif scene.layout == "object" and scene.foreground is None and config.background == "given":
        notes.append(
            "The views have neither masks nor a background of one colour: it is taken for black. Give masks (--masks), "
            'or background="learned" or "field" (--background).'
        )
    return notes


def _require_data(data: Any, config: NerfdiffConfig, reading: dict[str, Any]) -> Any:
    """Return the data of a run; None: the procedural scene."""
    if data is not None:
        return data
    if unused := [name for name, value in reading.items() if value not in (None, "auto")]:
        raise ConfigError(f"{unused[0]}= is for views that are read, but there is no data")
    return make_procedural_views(NUM_PROCEDURAL_VIEWS, config.resolution)


def _prepare(
    data: Any, search: PoseSearch, preset: str, device: torch.device, reading: dict[str, Any], box: float | None
) -> tuple[Views, Scene, dict[str, Any]]:
    """Return the views at the run's resolution, the scene, and the settings that are stored with the run."""
    config, data_poses = search.config, None
    if search.model is not None:
        views, data_poses = open_registered_views(data, reading, search.model, config.resolution)
    elif isinstance(data, Views):
        views = open_views(data, **reading)
    else:
        views = open_views(data, "train", config.resolution, min_views=MIN_SCENE_VIEWS, **reading)
    views = views.resize(config.resolution)
    known_poses = config.poses == "known" or search.model is not None
    if box is not None and search.model is not None:
        raise ConfigError(f"box={box:g} is in the units of known poses; structure from motion has none")
    scene = open_scene(views, config.resolution, device, known_poses, box)
    if config.poses == "known":
        require_poses(scene)
    if scene.layout == "object" and len(scene.images) < config.num_candidates:
        raise DataError(
            f"{format_count(len(scene.images), 'view')}: fewer than num_candidates={config.num_candidates}; give more"
        )
    if config.field in ("auto", "gaussians"):
        needed, what = config.num_gaussians * TRAINING_BYTES, f"num_gaussians={config.num_gaussians}: they"
        require_memory(needed, device, what, "train fewer")
    if scene.layout == "forward" and config.pose_parameters:
        raise ConfigError(
            f"optimize_camera={config.optimize_camera}: forward-facing cameras are optimised in all six degrees of "
            'freedom already; give "focal" or nothing'
        )
    if "distortion" in (config.optimize_camera or ()) and not has_found_lenses(config, scene):
        raise ConfigError(
            f'optimize_camera={config.optimize_camera}: "distortion" refines the lens that structure from motion found '
            '(search="sfm", of images without cameras); leave it out'
        )
    scene_settings = describe_scene(scene, views, known_poses)
    if search.model is not None:  # the poses of the data, in other coordinates, serve for scoring only
        views = dataclasses.replace(views, poses=data_poses)
        scene = dataclasses.replace(scene, initial_poses=scene.poses, poses=data_poses)
    return views, scene, {"model": "nerfdiff", **config.to_dict(), "preset": preset, "scene": scene_settings}
