"""A trained nerfdiff model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views, resize_area, target_size
from factorkit.diffusion.samplers import sample
from factorkit.diffusion.schedule import Schedule
from factorkit.engine.checkpoint import write_checkpoint
from factorkit.engine.config import resolve_device
from factorkit.engine.run_folder import check_plausible, identify_run, read_object, read_weights, write_json
from factorkit.nerfdiff.build import build_model
from factorkit.nerfdiff.cameras.paths import camera_path
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.evaluate import evaluate
from factorkit.nerfdiff.export import CAMERA_KINDS, export, kind_of
from factorkit.nerfdiff.export.originals import find_originals
from factorkit.nerfdiff.fields.kinds import restore_field
from factorkit.nerfdiff.network import CameraPrediction, NerfdiffModel, to_radiance, to_signal
from factorkit.nerfdiff.rays import CameraModel, render_views, same_aspect_ratio
from factorkit.nerfdiff.scene import has_intrinsics, match_camera, match_size, relative_intrinsics, shared_camera
from factorkit.nerfdiff.stages.localise import TargetImages, refine_poses, select_best_poses
from factorkit.nerfdiff.training_views import check_scene_description, load_views
from factorkit.utils import distributed
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.output_record import writing_file
from factorkit.utils.rng import derived_seed

SCORES_FILE = "scores.json"
MAX_RAYS = 1 << 18  # of whole images in memory at once
ENCODER_BATCH = 64  # images
NOISE_PERCENT = 4  # of T: the default noise level at which real views are encoded


class PosePrediction(NamedTuple):
    """Cameras of images: the best poses [B, 4, 4], scores [B, N] and all candidates [B, N, 4, 4]."""

    poses: Tensor
    scores: Tensor
    candidates: Tensor


class RenderedViews(NamedTuple):
    """Images [B, 3, H, W] in [0, 1], depth [B, H, W] (expected; 0 where empty), opacity [B, H, W], poses [B, 4, 4]."""

    images: Tensor
    depth: Tensor
    opacity: Tensor
    poses: Tensor


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


class NerfdiffRun:
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
        self.config, self.scene, self.device, self.step, self.folder = config, scene, device, step, folder
        self.model = model.to(device).eval()
        self.schedule = Schedule(config.timesteps, device=device)

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
            levels = len(config.channel_mult)
            check_plausible(
                path,
                tensors,
                blocks=config.num_res_blocks,
                levels=levels,
                cameras=config.num_candidates,
                channels=config.model_channels * max(config.channel_mult),
                size=min(config.encoder_resolution, max(scene["size"])) >> min(levels, 30) or 1,
            )
            field_weights = {k.removeprefix("field."): v for k, v in tensors.items() if k.startswith("field.")}
            field = restore_field(field_weights, meta)
            camera = CameraModel(tensors["intrinsics"], tensors["background"], scene["layout"] == "forward")
            model = build_model(config, scene, camera, field, tensors["views"])
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the weights in {path} do not fit the model of its settings: {error}") from error
        device = device if isinstance(device, torch.device) else resolve_device(device)
        return cls(config, scene, model, device, step, path if path.is_dir() and weights == "average" else None)

    def save(self, path: str | Path, *, overwrite: bool = False, source: str | None = None) -> Path:
        """Write the averaged weights and all settings as one ``.safetensors`` file for :func:`factorkit.load`.

        Of several processes only the first writes.

        Args:
            path: the file.
            overwrite: also replace a file that was not written for this run.
            source: identifies the run; None: its folder, else its weights.

        Raises:
            WriteError: another file is in the way.
            CheckpointError: ``path`` cannot be written; an existing file is then unchanged.
        """
        weights = {f"ema.module.{k}": v for k, v in self.model.state_dict().items()}
        opened = partial(
            writing_file, source=f"save: {source or identify_run(self.folder, weights)}", overwrite=overwrite
        )
        meta = {"model": "nerfdiff", **self.config.to_dict(), "scene": self.scene, "step": self.step}
        if distributed.rank() > 0:
            return Path(path)
        return write_checkpoint(Path(path), weights, meta, opened)

    @property
    def poses(self) -> Tensor:
        """The poses of the training views, [V, 4, 4]."""
        return self.model.views.cpu()

    @property
    def views(self) -> Views:
        """The training views with the run's poses; rendered if the run has no folder."""
        stored = load_views(self.folder)
        camera, own = self.model.camera.to(torch.device("cpu")), None
        if stored is not None:
            own = shared_camera(stored).with_intrinsics(camera.intrinsics).of_views()
        intrinsics = camera.pixel_intrinsics(*self.model.size, own).expand(len(self.poses), 3, 3)
        if stored is not None:
            return replace(stored, poses=self.poses, intrinsics=intrinsics)
        images = self.render(self.poses).images
        names = [f"view_{i:04d}" for i in range(len(images))]
        background = None if self.model.field.background is not None else self.model.background.cpu()
        return Views(images, names, intrinsics, poses=self.poses, layout=self.scene["layout"], background=background)

    def export(self, path: str | Path, *, data: Any = None, **options: Any) -> Path:
        """Write the scene or its cameras for other programs; of several processes only the first does.

        Cameras and images have the size of the training data, with their lenses and opacity, if the data still lie
        where they were; otherwise a warning says that they are written at the size of the training.

        Args:
            path: ``scene.ply`` (coloured points), ``mesh.ply`` (also .obj, .glb), ``transforms.json`` (nerfstudio) or a
                folder (COLMAP's binary format).
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
        kind = options.pop("kind", None) or kind_of(Path(path))
        if kind in CAMERA_KINDS or options.get("coordinates") == "given":
            originals = find_originals(self.folder, data)
            if originals is not None and kind in CAMERA_KINDS:
                options["images"] = originals.list_images(self.model.camera.intrinsics.cpu())
            options["to_given"] = None if originals is None else originals.align(self.poses)
        return export(path, views, self.model.field, kind=kind, source=source, **options)

    def predict_pose(self, images: Any, t: int | None = None, refine: int = 0, check: bool = False) -> PosePrediction:
        """Predict the cameras of images with one forward pass of the encoder, optionally refined by rendering.

        Args:
            images: [B, 3, H, W] in [0, 1], taken with the camera of the training views;
                :class:`~factorkit.data.views.views.Views`, which the encoder sees as that camera does, and ``refine``
                and ``check`` with their own intrinsics; or files, Pillow images and arrays, anything that
                :func:`~factorkit.data.views.open.open_views` reads, with
                the field of view of EXIF, else that of the training views.
            t: noise level added before encoding, 0 to T-1; None: 4% of T, as low levels are in training (0 without
                noise).
            refine: steps of minimising the photometric error, starting from where ``check`` leads; about 60 remove the
                encoder's error of a few degrees.
            check: compare small renders from all candidates with the image instead of using the best score; around an
                object also from each candidate rotated by 180 degrees about z. Needed for nearly symmetric scenes.

        Raises:
            ConfigError: t is out of range.
            DataError: images of another shape or range.

        Example:
            >>> prediction = scene.predict_pose(views)
            >>> prediction.poses.shape, prediction.scores.shape
            (torch.Size([10, 4, 4]), torch.Size([10, 3]))
        """
        resized, target = self._check_images(images)
        level = NOISE_PERCENT * self.config.timesteps // 100 if t is None else t
        if not 0 <= level < self.config.timesteps:
            raise ConfigError(f"t={t} must be between 0 and {self.config.timesteps - 1}")

        def predict(rows: slice) -> tuple[Tensor, CameraPrediction]:
            parts = []
            for signal in to_signal(resized)[rows].split(ENCODER_BATCH):
                times = torch.full((len(signal),), level if self.config.noise else 0, device=self.device)
                if self.config.noise:
                    generator = torch.Generator().manual_seed(derived_seed("look", level))
                    eps = torch.randn(signal.shape[1:], generator=generator).to(self.device).expand_as(signal)
                    signal = self.schedule.noise(signal, eps, times)
                with torch.no_grad():
                    parts.append(self.model.predict_cameras(signal, times))
            cameras = CameraPrediction(*(torch.cat(x) for x in zip(*parts, strict=True)))
            if check or refine:
                return select_best_poses(self.model, target.select(rows), cameras.poses), cameras
            return cameras.best_poses, cameras

        best, cameras = distributed.map_shares(predict, len(resized))
        if refine:
            distance = float(best[:, :3, 3].norm(dim=1).mean())
            best = distributed.map_shares(
                lambda rows: refine_poses(self.model, target.select(rows), best[rows], refine, distance), len(resized)
            )
        return PosePrediction(best.cpu(), cameras.scores.cpu(), cameras.poses.cpu())

    def _to_views(self, images: Any) -> Views | Tensor:
        """Open what is neither views nor a tensor."""
        if isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.ndim > 2 and images.shape[-3] == 3:
            images = torch.from_numpy(images)  # as a tensor: [B, 3, H, W]
        elif isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[2] in (3, 4):
            images = images[None]
        return images if isinstance(images, (Views, Tensor)) else self.open_images(images)

    def _check_images(self, images: Any) -> tuple[Tensor, TargetImages]:
        """Return images [B, 3, H, W] at the model's size for the encoder, and what renders are compared with."""
        images = self._to_views(images)
        if isinstance(images, Views):
            own, camera = match_size(images, self.model.size), self.model.camera
            encoder_images = match_camera(images, camera, self.model.size).images.to(self.device)
            is_common = has_intrinsics(camera.intrinsics.cpu(), relative_intrinsics(own))
            intrinsics = None if is_common else relative_intrinsics(own)
            return encoder_images, TargetImages(own.images, intrinsics, own.loss_masks).to(self.device)
        if images.dim() == 3:
            images = images[None]
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise DataError(f"images of shape {tuple(images.shape)} ({images.dtype}): give [B, 3, H, W] in [0, 1]")
        if len(images) and not -0.01 <= float(images.min()) <= float(images.max()) <= 1.01:
            raise DataError(f"images from {float(images.min()):g} to {float(images.max()):g}: give colours in [0, 1]")
        (height, width), size = images.shape[2:], self.model.size
        if not same_aspect_ratio((height, width), size):
            raise DataError(
                f"images of {height} x {width} pixels, but the training views have the shape of {size[0]} x {size[1]}: "
                "crop them to that shape"
            )
        resized = resize_area(images.float(), *size).to(self.device)
        return resized, TargetImages(resized)

    def open_images(self, source: Any, fov: float | None = None) -> Views:
        """Open images for this run: on its background, with its field of view unless cameras or EXIF define another.

        Args:
            source: anything that :func:`~factorkit.data.views.open.open_views` reads.
            fov: field of view in degrees along the longer side, for images without cameras; None: from EXIF, else the
                run's.

        Raises:
            DataError: the images cannot be opened.
        """
        height, width = self.model.size
        axis = 0 if width >= height else 1
        own_fov = math.degrees(2 * math.atan(0.5 / float(self.model.camera.intrinsics[axis, axis])))
        background, layout = self.model.background.tolist(), self.scene["layout"]
        options: dict[str, Any] = {"background": background, "fov": fov, "layout": layout, "default_fov": own_fov}
        try:
            return open_views(source, None, max(self.model.size), **options)
        except ConfigError:  # the images are smaller than those of the run
            return open_views(source, **options)

    def render(
        self,
        poses: Tensor,
        size: int | tuple[int, int] | None = None,
        appearance_view: int | None = None,
        intrinsics: Tensor | None = None,
    ) -> RenderedViews:
        """Render the scene from poses [B, 4, 4] in the model's coordinates.

        Args:
            poses: camera-to-world.
            size: the longer side, or height and width; None: as trained. Another aspect ratio than in training shows
                more or less to the left and right.
            appearance_view: index of the training view whose appearance to apply, with ``appearance_dim=``; None: the
                mean appearance.
            intrinsics: K [3, 3] or [B, 3, 3] in pixels of images of ``size``; None: those of the training views.

        Raises:
            ConfigError: no such appearance, or another aspect ratio in a forward-facing scene without ``intrinsics``.
            DataError: poses or intrinsics of another shape, or poses that are not finite.
        """
        size = self.model.size if size is None else target_size(size, *self.model.size)
        if poses.dim() != 3 or poses.shape[1:] != (4, 4) or not poses.isfinite().all():
            raise DataError(f"poses of shape {tuple(poses.shape)}: give [B, 4, 4], all of them finite")
        camera, own = self.model.camera, None
        if intrinsics is None:
            camera = camera.with_image_shape(self.model.size, size)
        elif intrinsics.shape not in ((3, 3), (len(poses), 3, 3)):
            raise DataError(f"intrinsics of shape {tuple(intrinsics.shape)}: give [3, 3] or [{len(poses)}, 3, 3]")
        else:
            own = (intrinsics.cpu() / torch.tensor([size[1], size[0], 1.0])[:, None]).expand(len(poses), 3, 3)
            own = own.to(self.device)
        field, views = self.model.field, None
        if appearance_view is not None:
            if field.appearance is None:
                raise ConfigError(f"appearance_view={appearance_view} needs a run trained with appearance_dim=4 or so")
            if not 0 <= appearance_view < len(self.poses):
                raise ConfigError(f"appearance_view={appearance_view}: give a view from 0 to {len(self.poses) - 1}")
            views = torch.full((len(poses),), appearance_view, device=self.device)
        samples = self._samples_per_ray(size)

        def render_rows(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            parts = []
            for index in torch.arange(len(poses))[rows].split(max(1, MAX_RAYS // (size[0] * size[1]))):
                of_views = None if views is None else views[index]
                lens = None if own is None else own[index]
                rendered = render_views(field, poses[index].to(self.device), camera, size, samples, of_views, lens)
                color = rendered.color.movedim(-1, 1).clamp(0, 1)
                parts.append((color.cpu(), rendered.depth.cpu(), rendered.opacity.cpu()))
            color, depth, opacity = (torch.cat(x) for x in zip(*parts, strict=True))
            return color, depth, opacity

        return RenderedViews(*distributed.map_shares(render_rows, len(poses)), poses)

    def _samples_per_ray(self, size: tuple[int, int]) -> int:
        """Return the samples along a ray of an image: more than in training, since they are not jittered."""
        return max(2 * self.config.samples_per_ray, max(size) // 2)

    def reconstruct(self, images: Any, size: int | tuple[int, int] | None = None) -> RenderedViews:
        """Render the scene from the predicted poses of images, with their own intrinsics if they are views or files.

        Args:
            images: as in :meth:`predict_pose`.
            size: the longer side, or height and width; None: as trained. Views of another shape than those of the
                training keep it.

        Raises:
            DataError: images of another shape or range.
        """
        images = self._to_views(images)
        poses = self.predict_pose(images).poses
        if not isinstance(images, Views):
            return self.render(poses, size)
        own = match_size(images, self.model.size)
        if own.size == self.model.size and has_intrinsics(self.model.camera.intrinsics.cpu(), relative_intrinsics(own)):
            return self.render(poses, size)
        size = own.size if size is None else target_size(size, *own.size)
        scale = torch.tensor([size[1] / own.size[1], size[0] / own.size[0], 1.0])[:, None]
        return self.render(poses, size, intrinsics=own.intrinsics * scale)

    def render_path(
        self,
        path: str | Tensor = "orbit",
        size: int | tuple[int, int] | None = None,
        frames: int = 60,
        appearance_view: int | None = None,
    ) -> RenderedViews:
        """Render the scene along a camera path (thesis, fig. 3.8).

        Args:
            path: ``"orbit"``, ``"spiral"``, or poses [B, 4, 4] in the model's coordinates.
            size: as in :meth:`render`.
            frames: of an orbit or spiral.
            appearance_view: as in :meth:`render`.

        Raises:
            ConfigError: an unknown path, no frames, or no such appearance.

        Example:
            >>> video = scene.render_path("orbit", frames=3, size=12)
            >>> video.images.shape, video.depth.shape
            (torch.Size([3, 3, 12, 12]), torch.Size([3, 12, 12]))
        """
        if isinstance(path, str):
            path = camera_path(path, frames, self.poses, self.scene["layout"])
        return self.render(path, size, appearance_view)

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
        folder = self.folder
        if folder is not None:
            distributed.run_on_first(lambda: write_json(folder / SCORES_FILE, scores))
        return scores

    @property
    def scores(self) -> dict[str, Any] | None:
        """What :meth:`evaluate` last wrote to the run folder; None if it did not.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.folder / SCORES_FILE if self.folder else None
        return read_object(path) if path and path.exists() else None

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
