"""``factorkit.train_nerfdiff``: views in, a run folder with cameras, scene and model out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.views import Views
from factorkit.engine.config import cpu_threads, resolve_device
from factorkit.engine.log import RunLog
from factorkit.engine.run_folder import claimed, copy_folder
from factorkit.engine.trainer import Trainer
from factorkit.nerfdiff.alarms import duplication
from factorkit.nerfdiff.build import build_model
from factorkit.nerfdiff.cameras.poses import (
    FreePoses,
    OrbitPoses,
    dictionary,
    forward_poses,
    orbit_poses,
    plane_dictionary,
    turned,
)
from factorkit.nerfdiff.config import NerfdiffConfig, preset_config
from factorkit.nerfdiff.fields.grid import Field, GridField, build_field
from factorkit.nerfdiff.fields.occupancy import cells_for, occupancy_grid
from factorkit.nerfdiff.fingerprint import completed, describe
from factorkit.nerfdiff.network import NerfdiffModel
from factorkit.nerfdiff.rays import Optics
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.scene import Scene, open_scene, require_poses
from factorkit.nerfdiff.stages.dictionary import SearchTask
from factorkit.nerfdiff.stages.distil import DistilTask
from factorkit.nerfdiff.stages.flip_test import best_turns, called_back, halves
from factorkit.nerfdiff.stages.joint import JointTask
from factorkit.nerfdiff.stages.refine import Fit, FitTask
from factorkit.nerfdiff.training_views import keep_views
from factorkit.nerfdiff.verdict import write_report
from factorkit.utils import distributed
from factorkit.utils.distributed import join_processes
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.jsonl import read_log, timeline
from factorkit.utils.rng import derived_seed

PLANE = (6, 4)  # places of forward-facing cameras across and up
FORWARD_HEAT = 0.5  # how coarse all is when their poses begin to move: a place of the plane is many pixels off
HALF_STEPS = 100  # of the fresh fields of the flip test
HALF_FIELD = 20  # vertices along each side of theirs
TUNING = 0.3  # of the encoder's learning rate, for the steps after it was distilled
HALF_SAMPLES = 32  # most steps along a ray with them
PROCEDURAL = 80  # views where none are given


def train_nerfdiff(
    data: Any = None, *, out: str | Path | None = None, preset: str | None = None, progress: bool = True, **changes: Any
) -> NerfdiffRun:
    """Find the cameras and the scene behind views; the same call again resumes, exactly.

    Args:
        data: :class:`factorkit.data.views.views.Views`, or whatever :func:`factorkit.data.views.views.open_views` reads; None: the
            procedural scene the package ships. Of files the training split is taken, of those without one all but
            every 8th view. Poses among the data are used with ``poses="known"`` alone, and else
            kept to score the result by.
        out: the run folder; None: ``runs/nerfdiff-<preset>``.
        preset: see :data:`factorkit.nerfdiff.config.PRESETS`; None: ``"demo"`` without data, else ``"fast"``.
        progress: show progress bars.
        **changes: any field of :class:`~factorkit.nerfdiff.config.NerfdiffConfig`.

    Returns:
        The finished run: predict_pose, reconstruct, render_path, sample, evaluate, save.

    Raises:
        ConfigError: a setting or combination that cannot work.
        DataError: no usable views.
        CheckpointError: the folder holds another run (other settings, pictures or cameras), or a checkpoint cannot be
            written or read.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once a checkpoint is written.

    Example:
        >>> from factorkit.data import make_procedural_views
        >>> views = make_procedural_views(10, 8, seed=1)    # ten pictures of 8 x 8 pixels, with true poses
        >>> tiny = {"resolution": 8, "num_candidates": 3, "num_azimuths": 6, "num_elevations": 2, "flip_rounds": 0}
        >>> tiny |= {"search_grid_resolution": 6, "grid_resolution": 8, "samples_per_ray": 6, "encoder_resolution": 8}
        >>> tiny |= {"model_channels": 8, "channel_mult": (1, 2), "num_rendered_views": 4, "batch_size": 4}
        >>> tiny |= {"search_steps": 4, "field_steps": 2, "steps": 2, "views_per_step": 3, "rays_per_view": 8}
        >>> scene = factorkit.train_nerfdiff(views, out="runs/scene", progress=False, **tiny)
        >>> scene.poses.shape
        torch.Size([10, 4, 4])
    """
    preset = preset or ("demo" if data is None else "fast")
    config = preset_config(preset, **changes)
    device = distributed.local_device(resolve_device(config.device))
    join_processes(device)
    distributed.check_batch(config.batch_size)
    distributed.check_batch(config.views_per_step, "views_per_step")
    folder = Path(out) if out is not None else Path("runs") / f"nerfdiff-{preset}"
    views = open_data(data, config).resize(config.resolution)
    known = config.poses == "known"
    scene = open_scene(views, config.resolution, device, known)
    if scene.layout == "object" and len(scene.images) < config.num_candidates:
        raise DataError(
            f"{len(scene.images)} views are fewer than num_candidates={config.num_candidates} candidates; give more"
        )
    if scene.layout == "forward" and config.pose_freedom:
        raise ConfigError(
            f"optimize_camera={config.optimize_camera}: forward-facing cameras turn and move in every way as it is; give "
            "focal or nothing"
        )
    settings = {"model": "nerfdiff", **config.to_dict(), "preset": preset, "scene": describe(scene, views, known)}

    complete = partial(completed, folder=folder, asked=settings)
    run_folder = claimed(folder, settings, config.RESUMABLE, complete=complete)
    with cpu_threads(config.threads), distributed.enter_on_first(run_folder):
        distributed.run_on_first(lambda: keep_views(folder, views))
        Training(config, scene, folder, settings, progress).run()
        return NerfdiffRun.load(folder, device=device)


def open_data(data: Any, config: NerfdiffConfig) -> Views:
    """The views behind what a user gave."""
    if isinstance(data, Views):
        return data
    if data is None:
        return make_procedural_views(PROCEDURAL, config.resolution)
    from factorkit.data.views.open import open_views

    return open_views(data, "train", config.resolution)


class Training:
    """The stages of a run, each a Trainer with checkpoints of its own under ``stages/``; the last is the run itself.

    A stage that is finished is read back and passed over, so that a killed run goes on in the stage it was in.
    """

    def __init__(self, config: NerfdiffConfig, scene: Scene, folder: Path, settings: dict[str, Any], progress: bool):
        self.config, self.scene, self.folder, self.settings = config, scene, folder, settings
        self.progress, self.device = progress, scene.images.device

    def run(self) -> None:
        """Train every stage that is not finished yet."""
        config, scene, doubled = self.config, self.scene, None
        field = self.own_field()
        if config.poses == "predicted" and config.search == "joint":
            start = torch.eye(4, device=self.device).repeat(len(scene.images), 1, 1)
            model = self.model(field, start, scene.optics)
            trained = self.trainer("joint", lambda stage: JointTask(stage, scene, model), folder=self.folder)
            self.tell_doubled(trained.views)
            return
        if config.poses == "known":
            fitted = self.fit("fit", field, FreePoses(require_poses(scene)).requires_grad_(False), sheets="fit")
        elif config.poses == "learned":
            hot = FORWARD_HEAT if scene.layout == "forward" else 0.0
            fitted = self.fit("fit", field, self.one_start(), sheets="fit", free=True, hot=hot)
            doubled = self.doubled(fitted.poses().detach())
        else:
            fitted, doubled = self.dictionary_search()
        # the distance, which sets the scene's scale, stays that of the focal length given
        optics = replace(scene.optics, intrinsics=fitted.optics.intrinsics.detach())
        scene = replace(scene, optics=optics)
        model = self.model(fitted.field, fitted.poses().detach(), optics)
        if not config.finetune_steps:
            self.trainer("distil", lambda stage: DistilTask(stage, scene, model, doubled), folder=self.folder)
            return
        model = self.trainer("distil", lambda stage: DistilTask(stage, scene, model, doubled))
        found = model.views.clone()
        changes = {
            "steps": config.finetune_steps,
            "balance_candidates": False,
            "learning_rate": TUNING * config.learning_rate,
        }
        tune = lambda stage: JointTask(stage, scene, model, found, doubled)  # noqa: E731
        self.trainer("tune", tune, folder=self.folder, **changes)

    def model(self, field: Field, views: Tensor, optics: Optics) -> NerfdiffModel:
        """The whole model around a field, its encoder with fresh weights."""
        torch.manual_seed(derived_seed("weights", self.config.seed))
        return build_model(self.config, self.settings["scene"], optics, field, views)

    def trainer(self, name: str, task, folder: Path | None = None, **changes: Any) -> nn.Module:
        """Train a stage to its end; answers its averaged model."""
        kept = () if folder is None else self.config.extra_ema_decays  # of the run alone, not of its stages
        config = self.config.stage(name, extra_ema_decays=kept, **changes)
        where = folder or self.folder / "stages" / name
        meta = self.settings | {"stage": name}
        shown = {"device": self.device, "progress": self.progress, "report": write_report if folder else None}
        trained = Trainer(task(config), config, where, meta, **shown).run()
        drawn = where / "samples"
        if folder is None and distributed.rank() == 0 and drawn.is_dir():  # the run's report shows what the stages drew
            copy_folder(drawn, self.folder / "samples")
        return trained

    def fit(
        self,
        name: str,
        field: Field,
        poses: nn.Module,
        chosen: Tensor | None = None,
        sheets: str | None = None,
        free: bool = False,
        samples: int | None = None,
        scene: Scene | None = None,
        hot: float = 0.0,
        **changes: Any,
    ) -> Fit:
        """Fit a field to the views, and the poses where they are free; with ``free`` the focal length, if it may be."""
        config, scene = self.config, scene or self.scene
        free_focal = free and "focal" in config.optimize_camera
        samples = samples or config.samples_per_ray
        model = Fit(field.to(self.device), poses.to(self.device), scene.optics, scene.size, samples, free_focal)
        changes = {
            "steps": config.field_steps,
            "batch_size": config.views_per_step,
            "learning_rate": config.field_learning_rate,
            "lr_decay_fraction": 0.5,
            "ema_decay": 0.0,
            **changes,
        }
        fitted = self.trainer(name, lambda stage: FitTask(stage, scene, model, chosen, sheets, hot), **changes)
        return cast(Fit, fitted)

    def one_start(self) -> nn.Module:
        """All views at one pose, free to leave it (Wang et al. 2021)."""
        count = len(self.scene.images)
        if self.scene.layout == "forward":
            return FreePoses(torch.eye(4).repeat(count, 1, 1))
        middle = sum(self.config.elevation_range) / 2
        generator = torch.Generator().manual_seed(derived_seed("one start", self.config.seed))
        start = dictionary(1, [middle]).repeat(count, 1) + 0.01 * torch.randn(count, 3, generator=generator)
        return OrbitPoses(F.normalize(start, dim=-1), self.scene.distance, self.config.pose_freedom)

    def dictionary_search(self) -> tuple[Fit, float | None]:
        """Search, refinement and flip test: the fit, and the share of views that the last round still turned."""
        config, scene = self.config, self.scene
        if scene.layout == "forward":
            places, stand = plane_dictionary(*PLANE), forward_poses
        else:
            low, high = config.elevation_range
            rings = [low + (high - low) * (i + 0.5) / config.num_elevations for i in range(config.num_elevations)]
            places, stand = dictionary(config.num_azimuths, rings), partial(orbit_poses, distance=scene.distance)
        field, places = self.field("grid", config.search_grid_resolution), places.to(self.device)
        found = self.trainer(
            "search",
            lambda stage: SearchTask(stage, scene, field, places, stand),
            steps=config.search_steps,
            batch_size=config.views_per_step,
            learning_rate=config.search_learning_rate,
            lr_decay_fraction=0.0,
            ema_decay=0.0,
            sample_every=max(1, config.search_steps // 5),
        )
        start = self.with_occupancy(found.field.refined(config.grid_resolution))
        direction = found.poses.places[found.poses.assigned]
        if scene.layout == "forward":
            poses = FreePoses(forward_poses(direction))
            fitted = self.fit("refine", start, poses, sheets="refine", free=True, hot=FORWARD_HEAT)
            return self.with_own_field(fitted), None
        fitted = self.refine("refine", start, OrbitPoses(direction, scene.distance, config.pose_freedom))
        found = fitted.poses.at(fitted.poses.direction.detach())
        kept = found.direction
        optics = replace(scene.optics, intrinsics=fitted.optics.intrinsics.detach())
        for number in range(max(1, config.flip_rounds)):
            found, moved = self.flip_round(number, found, places, replace(scene, optics=optics))
            if not moved:
                break
        if config.flip_rounds and (found.direction != kept).any():
            fitted = self.refine("refine again", self.with_occupancy(self.field("grid", config.grid_resolution)), found)
        return self.with_own_field(fitted), moved / len(kept)

    def with_own_field(self, fitted: Fit) -> Fit:
        """The poses with a field of the kind asked for; the search has a grid anyway."""
        return fitted if self.config.field == "grid" else self.fit("fit", self.own_field(), fitted.poses)

    def own_field(self) -> Field:
        """A fresh field of the kind asked for."""
        return self.with_occupancy(self.field(self.config.field, self.config.grid_resolution))

    def field(self, kind: str, resolution: int, seed: int | None = None) -> Field:
        """A fresh field of a kind, before the background and in the tones asked for."""
        config = self.config
        return build_field(
            kind,
            resolution,
            config.seed if seed is None else seed,
            background=config.background,
            views=len(self.scene.images),
            appearance=config.appearance_dim,
        ).to(self.device)

    def with_occupancy(self, field: Field) -> Field:
        """The field with an occupancy grid, if it is of the kind asked for and is to have one."""
        if self.config.occupancy and isinstance(field, GridField) == (self.config.field == "grid"):
            field.occupancy = occupancy_grid(cells_for(self.config.samples_per_ray))
        return field.to(self.device)

    def refine(self, name: str, field: Field, poses: OrbitPoses) -> Fit:
        return self.fit(name, field, poses.requires_grad_(), sheets=name.replace(" ", "_"), free=True)

    def flip_round(self, number: int, found: OrbitPoses, places: Tensor, scene: Scene) -> tuple[OrbitPoses, int]:
        """One round over both halves: where the views stand after it, and how many were turned or called back."""
        moved = 0
        for name, fitting, choosing in self.both_ways(len(found.direction), number):
            fitted = self.half_fit(f"flip {number}{name}", number, found, fitting, scene)
            before = found.direction[choosing]
            turns = best_turns(fitted.field, scene, found().detach(), choosing, fitted.samples)
            direction = found.direction.clone()
            direction[choosing] = torch.where(turns[:, None] != 0, turned(before, turns), before)
            found = found.at(direction)
            direction = direction.clone()
            direction[choosing] = called_back(fitted.field, scene, found, choosing, places, fitted.samples)
            found = found.at(direction)
            moved += int((direction[choosing] != before).any(1).sum())
        return found, moved

    def doubled(self, poses: Tensor) -> float | None:
        """Share of the views, at poses [V, 4, 4], that agree better after a turn with a field of the other half."""
        if self.scene.layout != "object":
            return None
        poses = distributed.gather_rows(poses)[0][: len(poses)]  # those of process 0, which alone draws sheets
        held, elsewhere = FreePoses(poses).requires_grad_(False), 0
        for name, fitting, choosing in self.both_ways(len(poses), 0):
            fitted = self.half_fit(f"half {name}", 0, held, fitting, self.scene)
            elsewhere += int(best_turns(fitted.field, self.scene, poses, choosing, fitted.samples).ne(0).sum())
        return elsewhere / len(poses)

    def tell_doubled(self, poses: Tensor) -> None:
        """Log the last alarms of the run once more, the share of doubled views at these poses among them."""
        told: dict[str, Any] = (timeline(read_log(self.folder), "alarms") or [{}])[-1]
        if distributed.maximum(int("doubled" in told)) or (doubled := self.doubled(poses)) is None:
            return
        if distributed.rank() == 0 and told:
            failures = duplication(doubled)
            told = {key: value for key, value in told.items() if key not in ("event", "time")}
            told |= {"doubled": doubled, "failures": [*told.get("failures", ()), *failures]}
            with RunLog(self.folder) as log:
                log.event("alarms", **told)
            write_report(self.folder)
            for failure in failures:
                tqdm.write(failure, file=sys.stderr)

    def both_ways(self, count: int, number: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of so many views, in one round: those that fit and those that choose, and the other way round."""
        one, other = halves(count, derived_seed("halves", self.config.seed, number))
        yield from (("a", one, other), ("b", other, one))

    def half_fit(self, name: str, number: int, poses: nn.Module, fitting: Tensor, scene: Scene) -> Fit:
        """A small fresh field of half of the views."""
        field = self.field("grid", HALF_FIELD, derived_seed("half", self.config.seed, number) % 2**31)
        return self.fit(
            name,
            field,
            poses,
            fitting,
            steps=HALF_STEPS,
            learning_rate=0.08,
            lr_decay_fraction=0.0,
            scene=scene,
            samples=min(self.config.samples_per_ray, HALF_SAMPLES),
            keep_checkpoints=1,
        )
