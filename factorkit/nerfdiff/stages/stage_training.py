"""One stage of a training run: its folder, its fit, and cross-fits to halves of the views."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from factorkit.engine.run_folder import copy_folder
from factorkit.engine.run_log import RunLog
from factorkit.engine.trainer import Trainer
from factorkit.nerfdiff.cameras.poses import FreePoses, SharedMotion
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.base import Field, build_occupancy_grid, occupancy_cells
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.nerfdiff.fields.kinds import GridField, build_field
from factorkit.nerfdiff.held_out import HeldOutErrors, SharedError, compare_held_out
from factorkit.nerfdiff.rays import sample_surface
from factorkit.nerfdiff.scene import Scene, scale_focal, straighten_scene, with_intrinsics
from factorkit.nerfdiff.stages.flip_test import split_in_halves
from factorkit.nerfdiff.stages.refine import COARSE_SIZES, FitTask, SceneFit, drawn_size
from factorkit.nerfdiff.verdict import write_report
from factorkit.utils import distributed
from factorkit.utils.files import read_log
from factorkit.utils.rng import derived_seed

GAUSSIAN_POSE_RATE = 0.1  # of the poses' learning rate: Adam moves each pose in every step, and a step has one view
HELD_OUT_STEPS = 100  # of the fresh fields of the flip test
HELD_OUT_LEARNING_RATE = 0.08
HELD_OUT_RESOLUTION = 20  # vertices along each side
HELD_OUT_MAX_SAMPLES = 32  # along a ray
# of the fields of the held-out checks, whatever the run has
CROSS_FIT: dict[str, Any] = {"batch_size": 8, "rays_per_view": 256}
SHARED_ERROR_RATE = 0.01  # learning rate of the pull, in radians, and of the logarithm of the focal length

Flip = tuple[str, Tensor, Tensor]  # name, views that fit a field, views that choose by it


class StageTraining:
    """Train the stages of a run, each with checkpoints of its own under ``stages/``; the last one is the run itself.

    A finished stage is loaded instead of trained, so an interrupted run resumes in the stage it was in.

    Args:
        settings: stored with every checkpoint.
    """

    def __init__(self, config: NerfdiffConfig, scene: Scene, folder: Path, settings: dict[str, Any], progress: bool):
        self.config, self.scene, self.folder, self.settings = config, scene, folder, settings
        self.progress, self.device = progress, scene.images.device

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

    def log_once(self, event: str, **values: Any) -> None:
        """Log an event of the run unless its log has one of this name: a resumed run decides again, alike."""
        if distributed.rank() == 0 and event not in {line.get("event") for line in read_log(self.folder)}:
            with RunLog(self.folder) as log:
                log.event(event, **values)

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
        optimize_distortion: bool = False,
        samples: int | None = None,
        initial_coarseness: float = 0.0,
        mask_weight: float = 0.0,
        **changes: Any,
    ) -> Any:
        """Fit a field, free poses and, if ``optimize_camera`` has them, focal length and lens; return the SceneFit.

        Args:
            field: to fit.
            poses: from view indices to poses.
            scene: None: that of the run.
            views: see :class:`FitTask`, as are ``preview_name``, ``initial_coarseness`` and ``mask_weight``.
            preview_name: see ``views``.
            optimize_focal: whether the setting's "focal" applies to this stage.
            optimize_distortion: the same of "distortion".
            samples: along each ray; None: those of the run.
            initial_coarseness: see ``views``.
            mask_weight: see ``views``.
            **changes: to the configuration.
        """
        config, scene, free = self.config, scene or self.scene, self.config.optimize_camera or ()
        model = SceneFit(
            field.to(self.device),
            poses.to(self.device),
            scene.camera,
            scene.size,
            samples or config.samples_per_ray,
            isinstance(poses, SharedMotion) or (optimize_focal and "focal" in free),
            optimize_distortion and "distortion" in free,
        )
        changes = {
            "steps": config.field_steps,
            "batch_size": config.views_per_step,
            "learning_rate": config.field_learning_rate,
            "lr_decay_fraction": 0.5,
            "ema_decay": 0.0,
            **changes,
        }

        def build_task(stage: NerfdiffConfig) -> FitTask:
            return FitTask(stage, scene, model, views, preview_name, initial_coarseness, mask_weight)

        fitted = self.train_stage(name, build_task, **changes)
        return fitted if views is not None else self._adopt_camera(fitted)

    def _adopt_camera(self, fitted: Any) -> Any:
        """Make the camera of a fit that of the run: its focal length and distance around an object, and its lens.

        The views are resampled without the radial term, so that all later stages have cameras without distortion.
        """
        if fitted.distortion is not None:
            term = float(fitted.distortion.detach())
            self.scene = straighten_scene(self.scene, term)
            self.settings = self.settings | {"scene": self.settings["scene"] | {"distortion": term}}
            fitted.distortion = None
        if fitted.log_focal is None or self.scene.layout == "forward":
            return fitted
        factor = float(fitted.log_focal.detach().exp())
        fitted.poses.dolly(factor)
        self.scene = scale_focal(self.scene, factor)
        fitted.initial_camera, fitted.log_focal = self.scene.camera, None
        scene = self.settings["scene"] | {"distance": self.scene.distance}
        self.settings = self.settings | {"scene": scene}
        return fitted

    def cross_fit(self, name: str, poses: Tensor, scene: Scene) -> HeldOutErrors:
        """Return the errors of fields that were fitted to half of the views at poses [V, 4, 4], in both roles."""
        return compare_held_out(*self._fit_halves(name, FreePoses(poses).requires_grad_(False), scene), scene)

    def measure_shared_error(self, name: str, poses: Tensor, scene: Scene) -> SharedError:
        """Return what cross-fits gain if errors that all cameras around an object may share are fitted too."""
        fits, halves = self._fit_halves(name, SharedMotion(poses), scene, pose_learning_rate=SHARED_ERROR_RATE)
        pull = torch.stack([fit.poses.pull.detach() for fit in fits]).norm(dim=1).mean().rad2deg()
        focal = torch.stack([fit.log_focal.detach() for fit in fits]).mean().exp()
        return SharedError(compare_held_out(fits, halves, scene).cross, float(pull), float(focal))

    def _fit_halves(
        self, name: str, poses: nn.Module, scene: Scene, **changes: Any
    ) -> tuple[list[Any], list[tuple[Tensor, Tensor]]]:
        """Fit a small field, and a copy of the free parameters of the poses, to each half of the views."""
        fits, halves = [], []
        for half, fitting, held_out in self.both_halves(len(scene.images), 0):
            fits.append(self.fit_half(f"{name}{half}", 0, deepcopy(poses), fitting, scene, **CROSS_FIT, **changes))
            halves.append((fitting, held_out))
        return fits, halves

    def both_halves(self, count: int, number: int) -> Iterator[Flip]:
        """Yield the two halves of the views in one round, in both roles."""
        one, other = split_in_halves(count, derived_seed("halves", self.config.seed, number))
        yield from (("a", one, other), ("b", other, one))

    def fit_half(self, name: str, number: int, poses: nn.Module, views: Tensor, scene: Scene, **changes: Any) -> Any:
        """Fit a small fresh field to half of the views, with changes to the configuration."""
        changes = {"steps": HELD_OUT_STEPS, "learning_rate": HELD_OUT_LEARNING_RATE, **changes}
        return self.fit_small(name, poses, number, scene=scene, views=views, **changes)

    def fit_small(self, name: str, poses: nn.Module, number: int = 0, **options: Any) -> Any:
        """Fit a small fresh field; options are those of :meth:`fit`."""
        seed = derived_seed("half", self.config.seed, number) % 2**31
        field = self.new_field("grid", HELD_OUT_RESOLUTION, seed)
        samples = min(self.config.samples_per_ray, HELD_OUT_MAX_SAMPLES)
        return self.fit(name, field, poses, samples=samples, lr_decay_fraction=0.0, keep_checkpoints=1, **options)

    def with_final_field(self, fitted: Any) -> Any:
        """Return the fit with the field of the settings; the search uses a grid."""
        is_final = self.config.field in ("grid", "gaussians")
        return fitted if is_final else self.fit("fit", self.final_field(), fitted.poses, scene=self.scene_with(fitted))

    def scene_with(self, fitted: Any) -> Scene:
        """Return the scene of the run with the focal length of a fit."""
        return with_intrinsics(self.scene, fitted.camera.intrinsics.detach())

    def final_field(self) -> Field:
        """Return a fresh field of the settings; for Gaussians the grid that they start from."""
        kind = "grid" if self.config.field == "gaussians" else self.config.field
        return self.add_occupancy(self.new_field(kind, self.config.grid_resolution))

    def fit_gaussians(self, fitted: Any) -> Any:
        """Return the fit of Gaussians that start from the grid, camera and poses of another fit."""
        config, field = self.config, self.new_field("gaussians", self.config.num_gaussians)
        assert isinstance(field, GaussianField)
        scene = self.scene_with(fitted)
        field.side = max(scene.size)
        (height, width), (first_height, first_width) = scene.size, drawn_size(scene.size, 0, config.gaussian_steps)
        if first_width < width and self.progress and distributed.rank() == 0:
            tqdm.write(
                f"Gaussians are drawn at {first_width} x {first_height} pixels first, at {width} x {height} from "
                f"{COARSE_SIZES[-1][0]:.0%} of the steps on, which take longer than the bar expects before",
                file=sys.stderr,
            )
        field.box_scale = scene.camera.box_scale
        seed, surface = derived_seed("start", config.seed), None
        if field.unbounded:
            poses = fitted.view_poses().detach()
            surface = sample_surface(
                fitted.field, poses, scene.camera, scene.size, config.samples_per_ray, config.num_gaussians, seed
            )
        field.start_from(fitted.field, seed, scene.points, surface)
        fitted = self.fit(
            "gaussians",
            field,
            fitted.poses,
            scene=scene,
            preview_name="gaussians",
            optimize_focal=config.poses != "known",
            steps=config.gaussian_steps,
            batch_size=distributed.world_size(),  # a view is a whole image
            pose_learning_rate=GAUSSIAN_POSE_RATE * config.pose_learning_rate,
        )
        fitted.field.box_scale = fitted.camera.box_scale
        return fitted

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
            unbounded=config.unbounded == "yes",
        ).to(self.device)

    def add_occupancy(self, field: Field) -> Field:
        """Add an occupancy grid if the settings have one for this kind of field."""
        wanted = self.config.occupancy and not field.unbounded  # whose steps follow the weights instead
        if wanted and isinstance(field, GridField) == (self.config.field == "grid"):
            field.occupancy = build_occupancy_grid(occupancy_cells(self.config.samples_per_ray))
        return field.to(self.device)
