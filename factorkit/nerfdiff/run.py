"""A trained nerfdiff model."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.diffusion.samplers import sample
from factorkit.engine.config import resolve_device
from factorkit.engine.run_folder import TrainedRun, check_plausible, identify_run, read_weights
from factorkit.nerfdiff.build import build_model
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.epipolar_check import EpipolarCheck, check_epipolar, record_check
from factorkit.nerfdiff.evaluate import evaluate
from factorkit.nerfdiff.export import CAMERA_KINDS, export, kind_of
from factorkit.nerfdiff.export.originals import find_originals
from factorkit.nerfdiff.fields.kinds import restore_field
from factorkit.nerfdiff.loaded_scene import LoadedScene
from factorkit.nerfdiff.network import CameraPrediction, NerfdiffModel, to_radiance
from factorkit.nerfdiff.rays import CameraModel
from factorkit.nerfdiff.registered_views import LocalisedViews, load_localised
from factorkit.nerfdiff.scene import shared_camera, straighten_views
from factorkit.nerfdiff.training_views import check_scene_description, load_views
from factorkit.utils import distributed
from factorkit.utils.errors import CheckpointError, ConfigError, first_mismatch


class DenoisingStep(NamedTuple):
    """One step from noise to view: noisy and predicted clean images [n, 3, H, W], and the cameras."""

    t: int
    noisy: Tensor
    images: Tensor
    cameras: CameraPrediction


class SampledViews(NamedTuple):
    """Views sampled from noise: images [n, 3, H, W] in [0, 1], poses [n, 4, 4], and all steps if requested."""

    images: Tensor
    poses: Tensor
    trajectory: list[DenoisingStep] | None


class NerfdiffRun(LoadedScene, TrainedRun):
    """A trained model: its averaged weights after ``step`` steps, and its folder if it has one."""

    MODEL = "nerfdiff"

    def __init__(
        self,
        config: NerfdiffConfig,
        scene: dict[str, Any],
        model: NerfdiffModel,
        device: torch.device,
        step: int,
        folder: Path | None = None,
    ):
        super().__init__(config, scene, model, device)
        self.step, self.folder = step, folder

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device = "auto", weights: str | float = "average"
    ) -> NerfdiffRun:
        """Load a run folder (its newest intact checkpoint) or a single ``.safetensors`` file.

        Args:
            path: either of them.
            device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a torch device.
            weights: as in :func:`factorkit.load`.

        Raises:
            CheckpointError: nothing there, damaged, or not a nerfdiff model.
            ConfigError: unknown ``weights``, or weights that are not stored.
        """
        path = Path(path)
        tensors, meta = read_weights(path, "nerfdiff", weights)
        fields = {f.name for f in dataclasses.fields(NerfdiffConfig)}
        try:
            config = NerfdiffConfig.from_dict({k: v for k, v in meta.items() if k in fields})
            config.validate()
            scene, step = check_scene_description(meta["scene"]), int(meta["step"])
            check_plausible(
                path,
                tensors,
                blocks=config.num_res_blocks,
                levels=len(config.channel_mult),
                cameras=config.num_candidates,
                channels=config.model_channels * max(config.channel_mult),
                depth=config.encoder_depth,
                size=min(config.encoder_resolution, max(scene["size"])) // config.encoder_stride or 1,
            )
            field_weights = {k.removeprefix("field."): v for k, v in tensors.items() if k.startswith("field.")}
            field = restore_field(field_weights, meta)
            camera = CameraModel(tensors["intrinsics"], tensors["background"], scene["layout"] == "forward")
            model = build_model(config, scene, camera, field, tensors["views"])
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"the weights in {path} do not match the model of its settings: {first_mismatch(error)}"
            ) from error
        device = device if isinstance(device, torch.device) else resolve_device(device)
        return cls(config, scene, model, device, step, path if path.is_dir() and weights == "average" else None)

    def _settings(self) -> dict[str, Any]:
        """Return what a checkpoint stores besides the weights."""
        return {**super()._settings(), "scene": self.scene}

    @property
    def views(self) -> Views:
        """The training views with the run's poses; rendered if the run has no folder."""
        stored = load_views(self.folder)
        camera, own = self.model.camera.to(torch.device("cpu")), None
        if stored is not None:
            own = shared_camera(stored).with_intrinsics(camera.intrinsics).of_views()
        intrinsics = camera.pixel_intrinsics(*self.model.size, own).expand(len(self.poses), 3, 3)
        if stored is not None:
            stored = straighten_views(stored, self.distortion)
            return replace(stored, poses=self.poses, intrinsics=intrinsics)
        images = self.render(self.poses).images
        names = [f"view_{i:04d}" for i in range(len(images))]
        background = None if self.model.field.background is not None else self.model.background.cpu()
        return Views(images, names, intrinsics, poses=self.poses, layout=self.scene["layout"], background=background)

    @property
    def distortion(self) -> float:
        """Radial term of the lens that the run found beyond that of the data, in units of the data's focal length."""
        return float(self.scene.get("distortion", 0.0))

    @property
    def camera_changes(self) -> tuple[Tensor, float]:
        """The intrinsics [3, 3] in units of width and height, and :attr:`distortion`, for images of the data."""
        return self.model.camera.intrinsics.cpu(), self.distortion

    @property
    def localised(self) -> LocalisedViews:
        """The images that structure from motion did not register, with poses where the finished scene explains them."""
        return load_localised(self.folder)

    def export(self, path: str | Path, *, data: Any = None, **options: Any) -> Path:
        """Write the scene or its cameras for other programs; of several processes only the first does.

        Cameras and images have the size of the training data, with their lenses and opacity, if the data still lie
        where they were; otherwise a warning says that they have the size of the training.

        Args:
            path: ``scene.ply`` (coloured points), ``mesh.ply`` (also .obj, .glb), ``splats.ply``
                (Gaussians; also .spz, and any other .ply of a scene of Gaussians), ``transforms.json`` (nerfstudio) or
                a folder (COLMAP's binary format).
            data: the training data, if they were moved or given as objects; a path or
                :class:`~factorkit.data.views.views.Views`.
            **options: of :func:`factorkit.nerfdiff.export.export`, such as ``coordinates`` and ``overwrite``.

        Raises:
            ConfigError: the path does not determine a kind, or ``coordinates="given"`` for data without cameras.
            DataError: the scene has no surface, or ``data`` are not the training data.
            WriteError: a file of another origin is in the way.
        """
        views = self.views  # without a folder rendered by all processes
        if distributed.rank() > 0:
            return Path(path)
        source = f"export: {identify_run(self.folder, self.model.state_dict())}"
        kind = options.pop("kind", None) or kind_of(Path(path), self.model.field)
        if kind in CAMERA_KINDS or options.get("coordinates") == "given":
            originals = find_originals(self.folder, data)
            if originals is not None and kind in CAMERA_KINDS:
                options["images"] = originals.list_images(*self.camera_changes)
                if len(options["images"]) > len(views):
                    options["localised"] = self.localised.poses
            options["to_given"] = None if originals is None else originals.align(self.poses)
        return export(path, views, self.model.field, kind=kind, source=source, **options)

    def evaluate(self, views: Views, poses: Tensor | None = None, refine: int = 0) -> dict[str, Any]:
        """Score cameras and scene against true poses, and write the scores to ``scores.json`` of the run folder.

        True and predicted coordinates are aligned by one similarity, over the training views if their true poses are
        known (training never uses them), else over the encoder's poses of ``views``. For renders at the true poses it
        is refined on the training images (:func:`factorkit.nerfdiff.stages.registration.register_scene`).

        Args:
            views: usually held out from training.
            poses: their true poses [B, 4, 4]; None: those stored with the views.
            refine: steps of refinement of the encoder's poses, as in :meth:`predict_pose`.

        Returns:
            rotation_median_deg, under_10_deg (a share), rotation_max_deg and translation_median (in scene units) of the
            training views, and mirrored (:func:`factorkit.metrics.pose.is_mirrored`); the first four with the prefix
            ``encoder_`` for the encoder's poses of ``views``; psnr, ssim and, where its weights are installed, lpips of
            renders at the aligned true poses, and with the suffix ``_encoder`` at the encoder's poses.

        Raises:
            ConfigError: no true poses.
            DataError: poses that do not match the views.
        """
        scores = evaluate(self, views, poses, refine)
        self._store_scores(scores)
        return scores

    def check_epipolar(self, data: Any = None, progress: bool = False) -> EpipolarCheck:
        """Check the cameras by points matched between the training images, without labels and without the scene.

        The images are read at their full size. Needs OpenCV (``factorkit[baselines]``); without it the check is "not
        run". The result becomes part of the run's alarms, and so of its verdict. A search is not judged by it again.

        Args:
            data: the training data, if they were moved or given as objects.
            progress: show a progress bar.

        Raises:
            ConfigError: no run folder.
            DataError: ``data`` are not the training data.
        """
        originals, folder = find_originals(self.folder, data), self.folder
        if originals is None or folder is None:
            raise ConfigError("the epipolar check needs a run folder: a single file does not name its training views")
        trained = range(len(self.poses))  # localised images have poses of another kind: the scene's, not the search's
        result = check_epipolar(originals.list_images(*self.camera_changes, trained), self.poses, progress)
        distributed.run_on_first(lambda: record_check(folder, self.step, result.check, is_later=True))
        return result

    def sample(
        self, n: int = 4, *, seed: int = 0, steps: int | None = None, sampler: str = "ddpm", trajectory: bool = False
    ) -> SampledViews:
        """Sample views and their cameras from noise (thesis, fig. 3.9).

        Args:
            n: number of views.
            seed: the same seed gives the same views.
            steps: denoising steps; None: all T.
            sampler: ``"ddpm"`` or ``"ddim"``.
            trajectory: return every step.

        Raises:
            ConfigError: n below 1, an unknown sampler, or steps out of range.
        """
        if n < 1:
            raise ConfigError(f"n={n}: give at least 1")

        def sample_rows(rows: slice) -> Any:
            return sample(
                self.model,
                (n, 3, *self.model.size),
                schedule=self.schedule,
                prediction="x0",
                sampler=sampler,
                steps=steps,
                seed=seed,
                rows=rows,
                trajectory=trajectory,
            )

        result = distributed.map_shares(sample_rows, n)
        all_steps = None
        if trajectory:
            all_steps = [
                DenoisingStep(
                    s.t, s.x_t.cpu(), to_radiance(s.x0).cpu(), CameraPrediction(*(x.cpu() for x in s.bottleneck))
                )
                for s in result.trajectory
            ]
        images = to_radiance(result.images).clamp(0, 1).cpu()
        return SampledViews(images, result.bottleneck.best_poses.cpu(), all_steps)
