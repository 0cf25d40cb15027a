"""The stages of a training run, in order."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from factorkit.nerfdiff.alarms import duplication_check, silhouette_check, silhouette_offset
from factorkit.nerfdiff.box import box_checks
from factorkit.nerfdiff.build import build_model
from factorkit.nerfdiff.cameras.poses import FreePoses, OrbitPoses, direction_grid
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.held_out import (
    MIN_FIT_STEPS,
    MIN_HELD_OUT_VIEWS,
    HeldOutErrors,
    disparity_noise,
    forward_direction_check,
    held_out_checks,
    shared_error_check,
    shared_error_reason,
    to_fields,
)
from factorkit.nerfdiff.hull import hull_check
from factorkit.nerfdiff.network import NerfdiffModel
from factorkit.nerfdiff.rays import CameraModel
from factorkit.nerfdiff.scene import Scene, require_poses, with_intrinsics
from factorkit.nerfdiff.stages.distil import DistilTask
from factorkit.nerfdiff.stages.flip_test import best_rotations
from factorkit.nerfdiff.stages.joint import JointTask
from factorkit.nerfdiff.stages.pose_search import FORWARD_COARSENESS, DictionarySearch
from factorkit.nerfdiff.stages.refine import SceneFit
from factorkit.nerfdiff.stages.stage_training import StageTraining
from factorkit.nerfdiff.verdict import log_alarms
from factorkit.report.content import Check, log_checks
from factorkit.utils import distributed
from factorkit.utils.errors import format_count
from factorkit.utils.files import read_log, timeline
from factorkit.utils.rng import derived_seed

SFM_POSE_RATE = 0.1  # of the poses' learning rate: a small part of a pixel off, which full steps undo
# of the distillation, unless the settings have others: with neither, its learning rate would diverge for some seeds
DISTIL_WARMUP_STEPS = 50
DISTIL_GRADIENT_CLIP = 0.1
FINETUNE_RATE = 0.1  # of the encoder's learning rate, after distillation


class Training(StageTraining):
    """Train the stages of a run in order."""

    def run(self) -> None:
        """Train every stage that is not finished, and check the result on held-out views."""
        model = self.train_stages()
        self.log_held_out_checks(model)

    def train_stages(self) -> NerfdiffModel:
        """Train every stage that is not finished; return the model of the last one."""
        config, scene, duplication, joint = self.config, self.scene, None, None
        if config.poses == "predicted" and config.search == "joint":
            start = torch.eye(4, device=self.device).repeat(len(scene.images), 1, 1)
            model = self.build_model(self.final_field(), start, scene.camera)
            is_last = config.field != "gaussians"
            folder = self.folder if is_last else None
            joint = self.train_stage("joint", lambda stage: JointTask(stage, scene, model), folder=folder)
            if is_last:
                self.log_duplication(joint.views)
                return joint
            duplication = self.measure_duplication(joint.views)
            fitted: Any = SceneFit(
                joint.field, FreePoses(joint.views), scene.camera, scene.size, config.samples_per_ray
            )
        elif config.poses == "known":
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
            fitted = self.fit(
                "refine",
                self.final_field(),
                free,
                preview_name="refine",
                optimize_focal=True,
                optimize_distortion=True,
                pose_learning_rate=SFM_POSE_RATE * config.pose_learning_rate,
            )
            duplication = self.measure_duplication(fitted.poses().detach())
        else:
            fitted, duplication = DictionarySearch(self).run()
        if config.field == "gaussians":
            fitted = self.fit_gaussians(fitted)
        given, scene = scene.camera, self.scene_with(fitted)
        self.log_focal(given, scene.camera)
        model = self.build_model(fitted.field, fitted.poses().detach(), scene.camera)
        if joint is not None:
            model.encoder.load_state_dict(joint.encoder.state_dict())
        task = lambda stage: DistilTask(stage, scene, model, duplication)  # noqa: E731
        stability: dict[str, Any] = {
            "warmup_steps": config.warmup_steps or DISTIL_WARMUP_STEPS,
            "gradient_clip": config.gradient_clip or DISTIL_GRADIENT_CLIP,
        }
        if not config.finetune_steps:
            return self.train_stage("distil", task, folder=self.folder, **stability)
        model = self.train_stage("distil", task, **stability)
        kept_poses = model.views.clone()
        return self.train_stage(
            "tune",
            lambda stage: JointTask(stage, scene, model, kept_poses, duplication),
            folder=self.folder,
            steps=config.finetune_steps,
            balance_candidates=False,
            learning_rate=FINETUNE_RATE * config.learning_rate,
        )

    def log_focal(self, given: CameraModel, fitted: CameraModel) -> None:
        """Log and print the focal length of a fit, if it differs from the given one."""
        before, after = (float(camera.intrinsics.diagonal()[:2].min()) for camera in (given, fitted))
        if after == before:
            return
        field_of_view = math.degrees(2 * math.atan(0.5 / after))
        self.log_once("focal", factor=after / before, field_of_view=field_of_view)
        if self.progress and distributed.rank() == 0:
            tqdm.write(
                f"focal length: {after / before:.2f} times the given or guessed one fits the views best, a field of "
                f"view of {field_of_view:.1f} degrees along the longer side",
                file=sys.stderr,
            )

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
        log_alarms(self.folder, alarms)
        for failure in failures:
            tqdm.write(failure, file=sys.stderr)

    def measure_held_out(self, model: NerfdiffModel) -> tuple[HeldOutErrors | None, float | None, str]:
        """Cross-fit two small fields; return the errors, the disparity noise, and why errors are None."""
        config, count = self.config, len(self.scene.images)
        poses, scene = self._final_cameras(model)
        steps = config.steps if config.poses == "predicted" and config.search == "joint" else config.field_steps
        if count < MIN_HELD_OUT_VIEWS:
            return None, None, f"since {format_count(count, 'view')}: fewer than {MIN_HELD_OUT_VIEWS}"
        if steps < MIN_FIT_STEPS:
            reason = f"since the field was fitted for {format_count(steps, 'step')} only, fewer than {MIN_FIT_STEPS}"
            return None, None, reason
        noise = None
        if scene.layout == "forward":
            noise = disparity_noise(model.field, scene, poses, config.samples_per_ray)
        return self.cross_fit(f"cross {config.steps}", poses, scene), noise, ""

    def check_shared_error(self, model: NerfdiffModel, errors: HeldOutErrors | None, reason: str) -> Check:
        """Cross-fit two small fields with errors of the cameras that all share free, if there is need to."""
        shared, (poses, scene) = None, self._final_cameras(model)
        reason = shared_error_reason(self.scene.layout, model.field.unbounded, errors, reason)
        if not reason:
            shared = self.measure_shared_error(f"shared {self.config.steps}", poses, scene)
        return shared_error_check(errors, shared, reason)

    def _final_cameras(self, model: NerfdiffModel) -> tuple[Tensor, Scene]:
        """Return the poses of process 0, and the scene with the focal length of a model."""
        poses = distributed.gather_rows(model.views)[0][: len(self.scene.images)]
        return poses, with_intrinsics(self.scene, model.camera.intrinsics.detach())

    def log_held_out_checks(self, model: NerfdiffModel) -> None:
        """Add the checks on held-out views to the last alarms of the run, and log them again, once."""
        alarms: dict[str, Any] = (timeline(read_log(self.folder), "alarms") or [{}])[-1]
        if distributed.maximum(int("held_out_checked" in alarms)):
            return
        errors, noise, reason = self.measure_held_out(model)
        shared = self.check_shared_error(model, errors, reason)
        if distributed.rank() == 0 and alarms:
            checks = [*held_out_checks(self.scene.layout, errors, noise, reason, model.field.unbounded), shared]
            if self.scene.layout == "forward":
                checks.append(forward_direction_check(model.views))
            scene = with_intrinsics(self.scene, model.camera.intrinsics.detach())
            checks += box_checks(model.field, scene.foreground, model.views, scene.layout)
            offset = silhouette_offset(model.field, scene, model.views, self.config.samples_per_ray)
            hull = hull_check(scene.foreground, model.views, model.field.unbounded)
            added = log_checks([*checks, silhouette_check(offset), hull])
            alarms |= {"held_out_checked": True, **to_fields(errors, noise), "silhouette_offset": offset}
            self.log_alarms(alarms | {key: [*alarms.get(key, ()), *added[key]] for key in added}, added["failures"])

    def build_model(self, field: Field, views: Tensor, camera: CameraModel) -> NerfdiffModel:
        """Build the whole model around a field, its encoder with fresh weights."""
        torch.manual_seed(derived_seed("weights", self.config.seed))
        return build_model(self.config, self.settings["scene"], camera, field, views)
