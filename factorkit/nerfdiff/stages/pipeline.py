"""The stages of a training run, in order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from factorkit.engine.run_folder import RunLog, copy_folder
from factorkit.engine.trainer import Trainer
from factorkit.nerfdiff.alarms import duplication_check
from factorkit.nerfdiff.box import box_checks
from factorkit.nerfdiff.build import build_model
from factorkit.nerfdiff.cameras.poses import (
    FreePoses,
    OrbitPoses,
    direction_grid,
    forward_facing_poses,
    orbit_poses,
    position_grid,
    rotate_about_z,
)
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.base import Field, build_occupancy_grid, occupancy_cells
from factorkit.nerfdiff.fields.kinds import GridField, build_field
from factorkit.nerfdiff.held_out import (
    MIN_FIT_STEPS,
    MIN_HELD_OUT_VIEWS,
    HeldOutErrors,
    compare_held_out,
    disparity_noise,
    forward_direction_check,
    held_out_checks,
    to_fields,
)
from factorkit.nerfdiff.network import NerfdiffModel
from factorkit.nerfdiff.rays import CameraModel
from factorkit.nerfdiff.scene import Scene, require_poses
from factorkit.nerfdiff.stages.dictionary import SearchTask, ToPoses
from factorkit.nerfdiff.stages.distil import DistilTask
from factorkit.nerfdiff.stages.flip_test import best_rotations, reassign_outliers, split_in_halves
from factorkit.nerfdiff.stages.joint import JointTask
from factorkit.nerfdiff.stages.refine import FitTask, SceneFit
from factorkit.nerfdiff.verdict import write_report
from factorkit.report.content import log_checks
from factorkit.utils import distributed
from factorkit.utils.errors import format_count
from factorkit.utils.files import read_log, timeline
from factorkit.utils.rng import derived_seed

FORWARD_GRID = (6, 4)  # positions of forward-facing cameras, across and up
FORWARD_COARSENESS = 0.5  # when forward-facing poses start to move: they are many pixels off
FINETUNE_RATE = 0.3  # of the encoder's learning rate, after distillation
HELD_OUT_STEPS = 100  # of the fresh fields of the flip test
HELD_OUT_LEARNING_RATE = 0.08
HELD_OUT_RESOLUTION = 20  # vertices along each side
HELD_OUT_MAX_SAMPLES = 32  # along a ray
CROSS_FIT = {"batch_size": 8, "rays_per_view": 256}  # of the fields of the held-out checks, whatever the run has

Flip = tuple[str, Tensor, Tensor]  # name, views that fit a field, views that choose by it


class Training:
    """Train the stages of a run, each with checkpoints of its own under ``stages/``; the last one is the run itself.

    A finished stage is loaded instead of trained, so an interrupted run resumes in the stage it was in.

    Args:
        settings: stored with every checkpoint.
    """

    def __init__(self, config: NerfdiffConfig, scene: Scene, folder: Path, settings: dict[str, Any], progress: bool):
        self.config, self.scene, self.folder, self.settings = config, scene, folder, settings
        self.progress, self.device = progress, scene.images.device

    def run(self) -> None:
        """Train every stage that is not finished, and check the result on held-out views."""
        model = self.train_stages()
        self.log_held_out_checks(model)

    def train_stages(self) -> NerfdiffModel:
        """Train every stage that is not finished; return the model of the last one."""
        config, scene, duplication = self.config, self.scene, None
        if config.poses == "predicted" and config.search == "joint":
            start = torch.eye(4, device=self.device).repeat(len(scene.images), 1, 1)
            model = self.build_model(self.final_field(), start, scene.camera)
            trained = self.train_stage("joint", lambda stage: JointTask(stage, scene, model), folder=self.folder)
            self.log_duplication(trained.views)
            return trained
        if config.poses == "known":
            poses = FreePoses(require_poses(scene)).requires_grad_(False)
            fitted = self.fit("fit", self.final_field(), poses, preview_name="fit")
        elif config.poses == "learned":
            fitted = self.fit(
                "fit",
                self.final_field(),
                self.initial_poses(),
                preview_name="fit",
                optimize_focal=True,
                initial_coarseness=FORWARD_COARSENESS if scene.layout == "forward" else 0.0,
            )
            duplication = self.measure_duplication(fitted.poses().detach())
        elif scene.initial_poses is not None:  # by structure from motion
            free = FreePoses(scene.initial_poses)
            fitted = self.fit("refine", self.final_field(), free, preview_name="refine", optimize_focal=True)
            duplication = self.measure_duplication(fitted.poses().detach())
        else:
            fitted, duplication = self.dictionary_search()
        # the distance, which sets the scale, stays that of the given focal length
        camera = scene.camera.with_intrinsics(fitted.camera.intrinsics.detach())
        scene = replace(scene, camera=camera)
        model = self.build_model(fitted.field, fitted.poses().detach(), camera)
        task = lambda stage: DistilTask(stage, scene, model, duplication)  # noqa: E731
        if not config.finetune_steps:
            return self.train_stage("distil", task, folder=self.folder)
        model = self.train_stage("distil", task)
        kept_poses = model.views.clone()
        return self.train_stage(
            "tune",
            lambda stage: JointTask(stage, scene, model, kept_poses, duplication),
            folder=self.folder,
            steps=config.finetune_steps,
            balance_candidates=False,
            learning_rate=FINETUNE_RATE * config.learning_rate,
        )

    def train_stage(
        self, name: str, build_task: Callable[[NerfdiffConfig], Any], folder: Path | None = None, **changes: Any
    ) -> Any:
        """Train a stage to its end and return its averaged model.

        Args:
            name: of the stage; it determines its random numbers.
            build_task: from the stage's configuration to its task.
            folder: of the run, for the last stage; None: a folder of the stage.
            **changes: to the configuration.
        """
        averages = () if folder is None else self.config.extra_ema_decays  # of the run, not of its stages
        config = self.config.stage(name, extra_ema_decays=averages, **changes)
        stage_folder = folder or self.folder / "stages" / name
        trained = Trainer(
            build_task(config),
            config,
            stage_folder,
            self.settings | {"stage": name},
            device=self.device,
            progress=self.progress,
            report=write_report if folder else None,
        ).run()
        previews = stage_folder / "samples"
        if folder is None and distributed.rank() == 0 and previews.is_dir():  # for the run's report
            copy_folder(previews, self.folder / "samples")
        return trained

    def fit(
        self,
        name: str,
        field: Field,
        poses: nn.Module,
        *,
        scene: Scene | None = None,
        views: Tensor | None = None,
        preview_name: str | None = None,
        optimize_focal: bool = False,
        samples: int | None = None,
        initial_coarseness: float = 0.0,
        **changes: Any,
    ) -> Any:
        """Fit a field, free poses and, if ``optimize_camera`` has it, the focal length; return the :class:`SceneFit`.

        Args:
            field: to fit.
            poses: from view indices to poses.
            scene: None: that of the run.
            views: see :class:`FitTask`, as are ``preview_name`` and ``initial_coarseness``.
            preview_name: see ``views``.
            optimize_focal: whether the setting's "focal" applies to this stage.
            samples: along each ray; None: those of the run.
            initial_coarseness: see ``views``.
            **changes: to the configuration.
        """
        config, scene = self.config, scene or self.scene
        model = SceneFit(
            field.to(self.device),
            poses.to(self.device),
            scene.camera,
            scene.size,
            samples or config.samples_per_ray,
            optimize_focal and "focal" in config.optimize_camera,
        )
        changes = {
            "steps": config.field_steps,
            "batch_size": config.views_per_step,
            "learning_rate": config.field_learning_rate,
            "lr_decay_fraction": 0.5,
            "ema_decay": 0.0,
            **changes,
        }
        build_task = lambda stage: FitTask(stage, scene, model, views, preview_name, initial_coarseness)  # noqa: E731
        return self.train_stage(name, build_task, **changes)

    def initial_poses(self) -> nn.Module:
        """Return free poses that all start at one (Wang et al. 2021)."""
        count = len(self.scene.images)
        if self.scene.layout == "forward":
            return FreePoses(torch.eye(4).repeat(count, 1, 1))
        elevation = sum(self.config.elevation_range) / 2
        generator = torch.Generator().manual_seed(derived_seed("one start", self.config.seed))
        jitter = 0.01 * torch.randn(count, 3, generator=generator)
        start = direction_grid(1, [elevation]).repeat(count, 1) + jitter
        return OrbitPoses(F.normalize(start, dim=-1), self.scene.distance, self.config.pose_parameters)

    def dictionary_search(self) -> tuple[Any, float | None]:
        """Search, refine and flip-test the poses.

        Returns:
            The fit, and the share of views that the last round of the flip test moved; None in a forward-facing scene.
        """
        config, scene = self.config, self.scene
        to_poses: ToPoses
        if scene.layout == "forward":
            places, to_poses = position_grid(*FORWARD_GRID), forward_facing_poses
        else:
            low, high = config.elevation_range
            rows = config.num_elevations
            elevations = [low + (high - low) * (i + 0.5) / rows for i in range(rows)]
            places, to_poses = (
                direction_grid(config.num_azimuths, elevations),
                partial(orbit_poses, distance=scene.distance),
            )
        field, places = self.new_field("grid", config.search_grid_resolution), places.to(self.device)
        found = self.train_stage(
            "search",
            lambda stage: SearchTask(stage, scene, field, places, to_poses),
            steps=config.search_steps,
            batch_size=config.views_per_step,
            learning_rate=config.search_learning_rate,
            lr_decay_fraction=0.0,
            ema_decay=0.0,
            sample_every=max(1, config.search_steps // 5),
        )
        start = self.add_occupancy(found.field.resampled(config.grid_resolution))
        place = found.poses.places[found.poses.assigned]
        refine = partial(self.fit, optimize_focal=True)
        if scene.layout == "forward":
            free = FreePoses(forward_facing_poses(place))
            fitted = refine("refine", start, free, preview_name="refine", initial_coarseness=FORWARD_COARSENESS)
            return self.with_final_field(fitted), None
        orbit = OrbitPoses(place, scene.distance, config.pose_parameters)
        fitted = refine("refine", start, orbit.requires_grad_(), preview_name="refine")
        poses = fitted.poses.with_directions(fitted.poses.direction.detach())
        refined_directions, moved = poses.direction, 0
        refined_scene = replace(scene, camera=scene.camera.with_intrinsics(fitted.camera.intrinsics.detach()))
        for number in range(max(1, config.flip_rounds)):
            poses, moved = self.flip_round(number, poses, places, refined_scene)
            if not moved:
                break
        if config.flip_rounds and (poses.direction != refined_directions).any():
            fresh = self.add_occupancy(self.new_field("grid", config.grid_resolution))
            fitted = refine("refine again", fresh, poses.requires_grad_(), preview_name="refine_again")
        return self.with_final_field(fitted), moved / len(refined_directions)

    def flip_round(self, number: int, poses: OrbitPoses, places: Tensor, scene: Scene) -> tuple[OrbitPoses, int]:
        """Run one round of the flip test over both halves; return the new poses and how many views were moved."""
        moved = 0
        for name, fitting, choosing in self.both_halves(len(poses.direction), number):
            held_out = self.fit_half(f"flip {number}{name}", number, poses, fitting, scene)
            before = poses.direction[choosing]
            degrees = best_rotations(held_out.field, scene, poses().detach(), choosing, held_out.samples)
            direction = poses.direction.clone()
            direction[choosing] = torch.where(degrees[:, None] != 0, rotate_about_z(before, degrees), before)
            poses = poses.with_directions(direction)
            direction = direction.clone()
            direction[choosing] = reassign_outliers(held_out.field, scene, poses, choosing, places, held_out.samples)
            poses = poses.with_directions(direction)
            moved += int((direction[choosing] != before).any(1).sum())
        return poses, moved

    def measure_duplication(self, poses: Tensor) -> float | None:
        """Return the share of views, at poses [V, 4, 4], that agree better with a held-out field after a rotation."""
        if self.scene.layout != "object":
            return None
        poses = distributed.gather_rows(poses)[0][: len(poses)]  # those of process 0, which alone writes previews
        fixed, rotated = FreePoses(poses).requires_grad_(False), 0
        for name, fitting, choosing in self.both_halves(len(poses), 0):
            held_out = self.fit_half(f"half {name}", 0, fixed, fitting, self.scene)
            rotated += int(best_rotations(held_out.field, self.scene, poses, choosing, held_out.samples).ne(0).sum())
        return rotated / len(poses)

    def log_duplication(self, poses: Tensor) -> None:
        """Add the duplication at these poses to the last alarms of the run, and log them again."""
        alarms: dict[str, Any] = (timeline(read_log(self.folder), "alarms") or [{}])[-1]
        if distributed.maximum(int("doubled" in alarms)) or (duplication := self.measure_duplication(poses)) is None:
            return
        if distributed.rank() == 0 and alarms:
            check = duplication_check(duplication)
            checks = [c for c in alarms.get("checks", ()) if c["name"] != check.name]
            alarms |= {"doubled": duplication, "failures": [*alarms.get("failures", ()), *check.failures]}
            self.log_alarms(alarms | {"checks": [*checks, check.to_dict()]}, check.failures)

    def log_alarms(self, alarms: dict[str, Any], failures: Sequence[str]) -> None:
        """Log the last alarms of the run again, with what was added to them, and print the new failures."""
        with RunLog(self.folder) as log:
            log.event("alarms", **{key: value for key, value in alarms.items() if key not in ("event", "time")})
        write_report(self.folder)
        for failure in failures:
            tqdm.write(failure, file=sys.stderr)

    def measure_held_out(self, model: NerfdiffModel) -> tuple[HeldOutErrors | None, float | None, str]:
        """Cross-fit two small fields; return the errors, the disparity noise, and why errors are None."""
        config, count = self.config, len(self.scene.images)
        poses = distributed.gather_rows(model.views)[0][:count]  # those of process 0
        scene = replace(self.scene, camera=self.scene.camera.with_intrinsics(model.camera.intrinsics.detach()))
        steps = config.steps if config.poses == "predicted" and config.search == "joint" else config.field_steps
        if count < MIN_HELD_OUT_VIEWS:
            return None, None, f"since {format_count(count, 'view')}: fewer than {MIN_HELD_OUT_VIEWS}"
        if steps < MIN_FIT_STEPS:
            reason = f"since the field was fitted for {format_count(steps, 'step')} only, fewer than {MIN_FIT_STEPS}"
            return None, None, reason
        noise = None
        if scene.layout == "forward":
            noise = disparity_noise(model.field, scene, poses, config.samples_per_ray)
        fixed = FreePoses(poses).requires_grad_(False)
        fields: list[Field] = []
        halves: list[tuple[Tensor, Tensor]] = []
        samples = 0
        for name, fitting, held_out in self.both_halves(count, 0):
            fitted = self.fit_half(f"cross {config.steps}{name}", 0, fixed, fitting, scene, **CROSS_FIT)
            fields, halves, samples = [*fields, fitted.field], [*halves, (fitting, held_out)], fitted.samples
        return compare_held_out(fields, halves, scene, poses, samples), noise, ""

    def log_held_out_checks(self, model: NerfdiffModel) -> None:
        """Add the checks on held-out views to the last alarms of the run, and log them again, once."""
        alarms: dict[str, Any] = (timeline(read_log(self.folder), "alarms") or [{}])[-1]
        if distributed.maximum(int("held_out_checked" in alarms)):
            return
        errors, noise, reason = self.measure_held_out(model)
        if distributed.rank() == 0 and alarms:
            checks = held_out_checks(self.scene.layout, errors, noise, reason)
            if self.scene.layout == "forward":
                checks.append(forward_direction_check(model.views))
            checks += box_checks(model.field, self.scene.foreground, model.views, self.scene.layout)
            added = log_checks(checks)
            alarms |= {"held_out_checked": True, **to_fields(errors, noise)}
            self.log_alarms(alarms | {key: [*alarms.get(key, ()), *added[key]] for key in added}, added["failures"])

    def both_halves(self, count: int, number: int) -> Iterator[Flip]:
        """Yield the two halves of the views in one round, in both roles."""
        one, other = split_in_halves(count, derived_seed("halves", self.config.seed, number))
        yield from (("a", one, other), ("b", other, one))

    def fit_half(self, name: str, number: int, poses: nn.Module, views: Tensor, scene: Scene, **changes: Any) -> Any:
        """Fit a small fresh field to half of the views, with changes to the configuration."""
        seed = derived_seed("half", self.config.seed, number) % 2**31
        return self.fit(
            name,
            self.new_field("grid", HELD_OUT_RESOLUTION, seed),
            poses,
            scene=scene,
            views=views,
            samples=min(self.config.samples_per_ray, HELD_OUT_MAX_SAMPLES),
            steps=HELD_OUT_STEPS,
            learning_rate=HELD_OUT_LEARNING_RATE,
            lr_decay_fraction=0.0,
            keep_checkpoints=1,
            **changes,
        )

    def build_model(self, field: Field, views: Tensor, camera: CameraModel) -> NerfdiffModel:
        """Build the whole model around a field, its encoder with fresh weights."""
        torch.manual_seed(derived_seed("weights", self.config.seed))
        return build_model(self.config, self.settings["scene"], camera, field, views)

    def with_final_field(self, fitted: Any) -> Any:
        """Return the fit with the field of the settings; the search uses a grid."""
        return fitted if self.config.field == "grid" else self.fit("fit", self.final_field(), fitted.poses)

    def final_field(self) -> Field:
        """Return a fresh field of the settings."""
        return self.add_occupancy(self.new_field(self.config.field, self.config.grid_resolution))

    def new_field(self, kind: str, resolution: int, seed: int | None = None) -> Field:
        """Return a fresh field of a kind, with the background and appearance of the settings."""
        config = self.config
        return build_field(
            kind,
            resolution,
            config.seed if seed is None else seed,
            background=config.background,
            views=len(self.scene.images),
            appearance_dim=config.appearance_dim,
        ).to(self.device)

    def add_occupancy(self, field: Field) -> Field:
        """Add an occupancy grid if the settings have one for this kind of field."""
        if self.config.occupancy and isinstance(field, GridField) == (self.config.field == "grid"):
            field.occupancy = build_occupancy_grid(occupancy_cells(self.config.samples_per_ray))
        return field.to(self.device)
