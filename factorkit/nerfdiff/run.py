"""A trained nerfdiff model and what can be asked of it."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from factorkit.data.views.views import Views, resize_area, target_size
from factorkit.diffusion.samplers import sample
from factorkit.diffusion.schedule import Schedule
from factorkit.engine.checkpoint import write_checkpoint
from factorkit.engine.config import resolve_device
from factorkit.engine.run_folder import check_plausible, read_object, read_weights, write_json
from factorkit.nerfdiff.build import build_model, checked_scene, restored_field
from factorkit.nerfdiff.cameras.localise import checked, refined
from factorkit.nerfdiff.cameras.paths import camera_path
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.evaluate import evaluate
from factorkit.nerfdiff.export.points import export
from factorkit.nerfdiff.network import Cameras, NerfdiffModel, to_radiance, to_signal
from factorkit.nerfdiff.rays import Optics, render_views, same_shape
from factorkit.nerfdiff.training_views import kept_views
from factorkit.utils import distributed
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.rng import derived_seed

SCORES = "scores.json"
RAYS = 1 << 18  # of whole pictures held at once
POSE_LEVEL = 4  # of 100: noise at which real views are looked at


class PosePrediction(NamedTuple):
    """Cameras of given views: the chosen poses [B, 4, 4], scores [B, N] and all candidates [B, N, 4, 4]."""

    poses: Tensor
    scores: Tensor
    candidates: Tensor


class Pictures(NamedTuple):
    """What cameras see: images [B, 3, H, W] in [0, 1], expected depth [B, H, W] (0 where there is nothing), opacity
    [B, H, W], and the poses [B, 4, 4] they were seen from."""

    images: Tensor
    depth: Tensor
    opacity: Tensor
    poses: Tensor


class Frame(NamedTuple):
    """One step from noise to view: the noisy image and the clean one it is taken for, [n, 3, H, W], and the cameras."""

    t: int
    noisy: Tensor
    images: Tensor
    cameras: Cameras


class Novel(NamedTuple):
    """Views drawn from noise: images [n, 3, H, W] in [0, 1], their poses [n, 4, 4], each step where asked for."""

    images: Tensor
    poses: Tensor
    trajectory: list[Frame] | None


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
        """Load a run folder (its newest whole checkpoint) or a single ``.safetensors`` file.

        Args:
            path: either of them.
            device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a torch device.
            weights: as of :func:`factorkit.load`.

        Raises:
            CheckpointError: nothing there, damaged, or not a nerfdiff model.
            ConfigError: other ``weights``, or ones that are not there.
        """
        path = Path(path)
        found, meta = read_weights(path, "nerfdiff", weights)
        fields = {f.name for f in dataclasses.fields(NerfdiffConfig)}
        try:
            config = NerfdiffConfig.from_dict({k: v for k, v in meta.items() if k in fields})
            config.validate()
            scene, step = checked_scene(meta["scene"]), int(meta["step"])
            levels = len(config.channel_mult)
            check_plausible(
                path,
                found,
                blocks=config.num_res_blocks,
                levels=levels,
                cameras=config.num_candidates,
                channels=config.model_channels * max(config.channel_mult),
                size=min(config.encoder_resolution, max(scene["size"])) >> min(levels, 30) or 1,
            )
            field = restored_field({k[6:]: v for k, v in found.items() if k.startswith("field.")}, meta)
            optics = Optics(found["intrinsics"], found["background"], scene["layout"] == "forward")
            model = build_model(config, scene, optics, field, found["views"])
            model.load_state_dict(found)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the weights in {path} do not fit the model of its settings: {error}") from error
        chosen = device if isinstance(device, torch.device) else resolve_device(device)
        return cls(config, scene, model, chosen, step, path if path.is_dir() and weights == "average" else None)

    def save(self, path: str | Path) -> Path:
        """Write the averaged weights and all settings as one ``.safetensors`` file for :func:`factorkit.load`.

        Raises:
            CheckpointError: ``path`` cannot be written; what stood there before stands.
        """
        weights = {f"ema.module.{k}": v for k, v in self.model.state_dict().items()}
        meta = {"model": "nerfdiff", **self.config.to_dict(), "scene": self.scene, "step": self.step}
        return write_checkpoint(Path(path), weights, meta)

    @property
    def poses(self) -> Tensor:
        """Where the training views were taken from, as the search found: [V, 4, 4]."""
        return self.model.views.cpu()

    @property
    def views(self) -> Views:
        """The training views at their found poses: the pictures given where the run has a folder, else rendered."""
        given = kept_views(self.folder)
        intrinsics = self.model.optics.pixels(*self.model.size).cpu().expand(len(self.poses), 3, 3)
        if given is not None:
            return replace(given, poses=self.poses, intrinsics=intrinsics)
        images = self.render(self.poses).images
        names = [f"view_{i:04d}" for i in range(len(images))]
        background = None if self.model.field.background is not None else self.model.background.cpu()
        return Views(images, names, intrinsics, poses=self.poses, layout=self.scene["layout"], background=background)

    def export(self, path: str | Path, **options: Any) -> Path:
        """Write scene or cameras for other programs: ``scene.ply`` (coloured points), ``mesh.ply`` (also .obj, .glb),
        ``transforms.json`` (nerfstudio) or a folder (COLMAP's text); see :func:`factorkit.nerfdiff.export.points.export`,
        which ``options`` go to.

        Raises:
            ConfigError: a path that says nothing of the kind.
            DataError: a scene without a surface.
        """
        return export(path, self.views, self.model.field, **options)

    def predict_pose(self, images: Any, t: int | None = None, refine: int = 0, check: bool = False) -> PosePrediction:
        """Where pictures were taken from, at one look of the encoder each, and perhaps compared with the scene.

        Args:
            images: [B, 3, H, W] in [0, 1] or :class:`~factorkit.data.views.views.Views`, of the camera trained on.
            t: noise added before looking, 0 to T-1; None: a little, as in training (none without noise).
            refine: so many steps down the photometric error of each picture, the scene held, from where ``check``
                leads: about 60 take the few degrees that a look leaves.
            check: choose, instead of the best score, the candidate from which the scene looks most like the picture, in
                small renders; around an object each turned half about z is one more. Scenes that nearly look alike from
                two sides need it.

        Raises:
            ConfigError: t out of range.
            DataError: images of another shape.

        Example:
            >>> found = scene.predict_pose(views)
            >>> found.poses.shape, found.scores.shape
            (torch.Size([10, 4, 4]), torch.Size([10, 3]))
        """
        pictures = self._sized(images)
        signal = to_signal(pictures)
        level = POSE_LEVEL * self.config.timesteps // 100 if t is None else t
        if not 0 <= level < self.config.timesteps:
            raise ConfigError(f"t={t} must lie between 0 and {self.config.timesteps - 1}")

        def looked(rows: slice) -> tuple[Tensor, Cameras]:
            found = []
            for part in signal[rows].split(64):
                times = torch.full((len(part),), level if self.config.noise else 0, device=self.device)
                if self.config.noise:
                    generator = torch.Generator().manual_seed(derived_seed("look", level))
                    eps = torch.randn(part.shape[1:], generator=generator).to(self.device).expand_as(part)
                    part = self.schedule.noise(part, eps, times)
                with torch.no_grad():
                    found.append(self.model.cameras(part, times))
            cameras = Cameras(*(torch.cat(x) for x in zip(*found, strict=True)))
            chosen = checked(self.model, pictures[rows], cameras.poses) if check or refine else cameras.best
            return chosen, cameras

        best, cameras = distributed.map_shares(looked, len(pictures))
        if refine:
            distance = float(best[:, :3, 3].norm(dim=1).mean())
            best = distributed.map_shares(
                lambda rows: refined(self.model, pictures[rows], best[rows], refine, distance), len(pictures)
            )
        return PosePrediction(best.cpu(), cameras.scores.cpu(), cameras.poses.cpu())

    def _sized(self, images: Any) -> Tensor:
        """Pictures [B, 3, H, W] at the model's size, on its device."""
        images = images.images if isinstance(images, Views) else torch.as_tensor(images)
        if images.dim() == 3:
            images = images[None]
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise DataError(f"images of shape {tuple(images.shape)} ({images.dtype}): give [B, 3, H, W] in [0, 1]")
        if len(images) and not -0.01 <= float(images.min()) <= float(images.max()) <= 1.01:
            raise DataError(f"images from {float(images.min()):g} to {float(images.max()):g}: give colours in [0, 1]")
        (height, width), size = images.shape[2:], self.model.size
        if not same_shape((height, width), size):
            raise DataError(
                f"pictures of {height} x {width} pixels, but this scene's cameras take {size[0]} x {size[1]}: crop "
                "them to that shape"
            )
        return resize_area(images.float(), *self.model.size).to(self.device)

    def render(self, poses: Tensor, size: int | tuple[int, int] | None = None, tone: int | None = None) -> Pictures:
        """The scene from poses [B, 4, 4] in the model's own coordinates.

        Args:
            size: of the longer side, or height and width; None: as trained. Another shape than the training's shows
                more or less to the left and right.
            tone: number of the training view whose tone the pictures are to have, with ``appearance_dim=``; None: the mean
                of all.

        Raises:
            ConfigError: a tone where there are none, or of a view that is not there; another shape of pictures of a
                forward-facing scene.
            DataError: poses that are none.
        """
        size = self.model.size if size is None else target_size(size, *self.model.size)
        if poses.dim() != 3 or poses.shape[1:] != (4, 4) or not poses.isfinite().all():
            raise DataError(f"poses of shape {tuple(poses.shape)}: give [B, 4, 4], all of them finite")
        optics = self.model.optics.shaped(self.model.size, size)
        field, views = self.model.field, None
        if tone is not None:
            if field.appearance is None or not 0 <= tone < len(self.poses):
                had = (
                    "all views are of one tone: train with appearance_dim=4"
                    if field.appearance is None
                    else (f"there are views 0 to {len(self.poses) - 1}")
                )
                raise ConfigError(f"tone={tone}: {had}")
            views = torch.full((len(poses),), tone, device=self.device)

        def pictured(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            found = []
            for some in torch.arange(len(poses))[rows].split(max(1, RAYS // (size[0] * size[1]))):
                toned = None if views is None else views[some]
                seen = render_views(field, poses[some].to(self.device), optics, size, self.samples(size), toned)
                found.append((seen.color.movedim(-1, 1).clamp(0, 1).cpu(), seen.depth.cpu(), seen.opacity.cpu()))
            color, depth, opacity = (torch.cat(x) for x in zip(*found, strict=True))
            return color, depth, opacity

        return Pictures(*distributed.map_shares(pictured, len(poses)), poses)

    def samples(self, size: tuple[int, int]) -> int:
        """Steps along a ray of a picture: more than in training, as nothing is drawn at random any more."""
        return max(2 * self.config.samples_per_ray, max(size) // 2)

    def reconstruct(self, images: Any, size: int | tuple[int, int] | None = None) -> Pictures:
        """Pictures of the scene from where :meth:`predict_pose` says that ``images`` were taken.

        Args:
            images: as :meth:`predict_pose` takes them.
            size: as for :meth:`render`.

        Raises:
            DataError: images of another shape.
        """
        return self.render(self.predict_pose(images).poses, size)

    def render_path(
        self,
        path: str | Tensor = "orbit",
        size: int | tuple[int, int] | None = None,
        frames: int = 60,
        tone: int | None = None,
    ) -> Pictures:
        """Pictures along a camera path (thesis, fig. 3.8).

        Args:
            path: ``"orbit"``, ``"spiral"``, or poses [B, 4, 4] in the model's own coordinates.
            size: of the longer side, or height and width; None: as trained.
            frames: of an orbit or spiral.
            tone: as for :meth:`render`.

        Raises:
            ConfigError: an unknown path, no frames, or a tone there is not.

        Example:
            >>> film = scene.render_path("orbit", frames=3, size=12)
            >>> film.images.shape, film.depth.shape
            (torch.Size([3, 3, 12, 12]), torch.Size([3, 12, 12]))
        """
        if isinstance(path, str):
            path = camera_path(path, frames, self.poses, self.scene["layout"])
        return self.render(path, size, tone)

    def evaluate(self, views: Views, poses: Tensor | None = None, refine: int = 0) -> dict[str, Any]:
        """Score cameras and scene beside true ones; the result also goes to ``scores.json`` of the run folder.

        Found and true coordinates are aligned by one similarity over the training views, where their true poses came
        with them (the training never saw those), else over the encoder's poses of ``views``. For pictures at the true
        poses it is sharpened on the training pictures (:func:`factorkit.nerfdiff.cameras.registration.registered`).

        Args:
            views: pictures the model was not trained on, usually.
            poses: their true poses [B, 4, 4]; None: those that come with the views.
            refine: steps the encoder's poses are refined by, as in :meth:`predict_pose`.

        Returns:
            rotation_median_deg, under_10_deg (a share), rotation_max_deg, translation_median (in units of the scene) of
            the training views' found poses, and whether those are mirrored (:func:`factorkit.metrics.pose.is_mirrored`);
            the first four with ``encoder_`` before them for the encoder's poses of ``views``;
            psnr, ssim and, where its weights are there, lpips of renders at the aligned true poses, and with
            ``_encoder`` behind it of renders at the encoder's.

        Raises:
            ConfigError: no true poses.
            DataError: poses that do not match the views.
        """
        scores = evaluate(self, views, poses, refine)
        if self.folder is not None:
            distributed.run_on_first(lambda: write_json(self.folder / SCORES, scores))
        return scores

    @property
    def scores(self) -> dict[str, Any] | None:
        """What :meth:`evaluate` last wrote into the run folder; None where it did not.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.folder / SCORES if self.folder else None
        return read_object(path) if path and path.exists() else None

    def sample(
        self, n: int = 4, *, seed: int = 0, steps: int | None = None, sampler: str = "ddpm", trajectory: bool = False
    ) -> Novel:
        """Views and their cameras from pure noise (thesis, fig. 3.9).

        Args:
            n: how many.
            seed: the same seed, the same views.
            steps: denoising steps; None: all T.
            sampler: ``"ddpm"`` or ``"ddim"``.
            trajectory: keep every step.

        Raises:
            ConfigError: n below 1, an unknown sampler, or steps out of range.
        """
        if n < 1:
            raise ConfigError(f"n={n}: at least one view has to be asked for")
        draw = lambda rows: sample(  # noqa: E731
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
        drawn = distributed.map_shares(draw, n)
        frames = None
        if trajectory:
            frames = [
                Frame(s.t, s.x_t.cpu(), to_radiance(s.x0).cpu(), Cameras(*(x.cpu() for x in s.bottleneck)))
                for s in drawn.trajectory
            ]
        return Novel(to_radiance(drawn.images).clamp(0, 1).cpu(), drawn.bottleneck.best.cpu(), frames)
