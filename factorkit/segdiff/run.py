"""A trained segdiff model and everything it can do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.decode import crop_square
from factorkit.data.open import open_source
from factorkit.data.sources import Source
from factorkit.data.video import open_video
from factorkit.engine.checkpoint import write_checkpoint
from factorkit.engine.config import cpu_threads, resolve_device
from factorkit.engine.run_folder import check_plausible, read_object, read_weights, write_json
from factorkit.segdiff.class_labels import select_labels
from factorkit.segdiff.config import ResolvedSegdiffConfig, SegdiffConfig
from factorkit.segdiff.editing.branches import Branches, take_apart
from factorkit.segdiff.editing.interpolate import Interpolation, interpolate_pictures
from factorkit.segdiff.editing.recompose import Recomposition, recompose_pictures
from factorkit.segdiff.evaluate import score_labelled_images, share_images
from factorkit.segdiff.hierarchy import HierarchicalUNet, hard_labels
from factorkit.segdiff.inference.folder import FolderSegments, segment_folder
from factorkit.segdiff.inference.outputs import DEFAULT_FORMATS, Frame, Generation, Segmentation
from factorkit.segdiff.inference.segment import QUALITIES, as_pictures, average_masks, check_segmenting, masks_of
from factorkit.segdiff.inference.video import VideoSegments, segment_frames, write_video
from factorkit.segdiff.inference.zero_shot import zero_shot_scores
from factorkit.segdiff.network import FactorizedUNet
from factorkit.segdiff.sampling import check_edit_time, draw_images
from factorkit.utils import distributed
from factorkit.utils.errors import CheckpointError, ConfigError
from factorkit.utils.images import pixels_to_signed, signed_to_unit

SCORES = "scores.json"


class SegdiffRun:
    """A trained factorized diffusion model: its averaged weights after ``step`` steps, and its run folder if any."""

    MODEL = "segdiff"

    def __init__(
        self,
        config: ResolvedSegdiffConfig,
        model: FactorizedUNet | HierarchicalUNet,
        device: torch.device,
        step: int,
        folder: Path | None = None,
    ):
        self.config, self.device, self.step, self.folder = config, device, step, folder
        self.model: FactorizedUNet | HierarchicalUNet = model.to(
            device, memory_format=torch.channels_last
        ).eval()  # type: ignore[call-overload]  # torch types memory_format without device
        self.schedule = config.build_schedule(device)

    # --- files ---

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device = "auto", weights: str | float = "average"
    ) -> SegdiffRun:
        """Load a run folder (its newest intact checkpoint) or a single ``.safetensors`` file.

        Args:
            path: the folder or file.
            device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a torch device.
            weights: ``"average"``, the moving average. For a folder also the decay of another average
                (``extra_ema_decays=``), or ``"last"``, the weights of the last step. Only scores of the average are
                written to the folder.

        Raises:
            CheckpointError: nothing there, damaged, or not a segdiff model.
            ConfigError: unknown ``weights``, or weights that the file does not hold.

        Example:
            >>> run = factorkit.SegdiffRun.load("runs/flowers", device="cpu")
            >>> run.config.regions
            2
        """
        path = Path(path)
        config, model, step = load_model(path, weights)
        torch_device = device if isinstance(device, torch.device) else resolve_device(device)
        return cls(config, model, torch_device, step, path if path.is_dir() and weights == "average" else None)

    def save(self, path: str | Path) -> Path:
        """Write the averaged weights and all settings as one ``.safetensors`` file for :func:`factorkit.load`.

        Raises:
            CheckpointError: ``path`` cannot be written; a file that was there before is unchanged.

        Example:
            >>> factorkit.load(run.save("flowers.safetensors")).step
            2
        """
        weights = {f"ema.module.{k}": v for k, v in self.model.state_dict().items()}
        return write_checkpoint(Path(path), weights, {"model": "segdiff", **self.config.to_dict(), "step": self.step})

    @property
    def scores(self) -> dict[str, Any] | None:
        """The result of the last :meth:`evaluate` in the run folder; None if there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.folder / SCORES if self.folder else None
        return read_object(path) if path and path.exists() else None

    # --- segmentation ---

    def segment(
        self,
        images: Any,
        t: int | None = None,
        *,
        size: int | None = None,
        upsample: str = "guided",
        quality: str = "fast",
    ) -> Segmentation:
        """Segment real images with one forward pass each; the decoders are never run.

        The whole image is segmented: its short side is resized to ``size``, its long side in proportion, and the masks
        are brought back to the pixels of the image. Images of more than four training resolutions per side are processed
        in overlapping tiles. All masks stay in memory; use :meth:`segment_folder` for many or huge images.

        Args:
            images: a path, folder, zip or list of them, a PIL image or list, an array [B, H, W, C] or [H, W, C], a
                tensor [B, C, H, W] or [C, H, W] (uint8, or float in [0, 1]; C is 1, 3, or 4 with alpha, which is
                composited over white), or a list of arrays or tensors of any sizes.
            t: time step of the noise, 0 to T-1; None: ``segment_t`` of the settings. Low steps keep detail, high ones
                blur it.
            size: pixels of the short side that the network sees; None: the training resolution. More shows it smaller
                things.
            upsample: ``"guided"`` aligns the masks with the edges of the image (:mod:`factorkit.nn.guided_filter`) if it
                has more pixels than the network sees; ``"bilinear"`` only interpolates them.
            quality: ``"fast"``; or ``"best"``, the mean of the masks of the image and of its mirror image, if training
                used mirror images.

        Raises:
            ConfigError: t out of range, or a plain DDPM, which has no regions.
            DataError: nothing to read, or an image that cannot be decoded.
            OutOfMemory: an image too large for the machine.

        Example:
            >>> seg = run.segment(pictures[:4])
            >>> seg.labels.shape, seg.masks.shape
            (torch.Size([4, 16, 16]), torch.Size([4, 2, 16, 16]))
            >>> bool((seg.masks.sum(1) - 1).abs().max() < 0.01)
            True
        """
        predict, size = self.predictor(t, quality), check_segmenting(self.config, size, upsample)
        pictures, names = as_pictures(images)
        masks = [masks_of(self.config, picture, predict, size, upsample) for picture in pictures]
        labels = [hard_labels(m, self.config.nesting) for m in masks]
        if len({m.shape for m in masks}) == 1:
            return Segmentation(torch.stack(labels), torch.stack(masks), names, self.config.nesting)
        return Segmentation(labels, masks, names, self.config.nesting)

    def segment_folder(
        self,
        images: Any,
        out: str | Path,
        *,
        formats: Sequence[str] = DEFAULT_FORMATS,
        t: int | None = None,
        size: int | None = None,
        upsample: str = "guided",
        quality: str = "fast",
        workers: int | None = None,
        progress: bool = True,
    ) -> FolderSegments:
        """Segment any number of images into files; the same call again continues where it stopped.

        Memory stays constant: threads read ahead and write, and each file appears complete or not at all. An image is
        processed again if it, the model or a setting has changed, or if a file is missing. Images that cannot be read
        are skipped, named in the result and in a warning, and tried again next time.

        Args:
            images: as for :meth:`segment`; results of an earlier call among them are ignored.
            out: output folder; folders of images keep their structure below it.
            formats: ``"labels"`` (NAME_labels.png, palette), ``"masks"`` (NAME_mask_K.png, grey, 8 bits),
                ``"overlays"`` (NAME_overlay.png), ``"coco"`` (annotations.json, COCO run lengths). contact_sheet.png
                with the first images is always written.
            t, size, upsample, quality: as for :meth:`segment`.
            workers: threads that read, and as many that write; None: one per core, at most 8.
            progress: show a progress bar with the time left.

        Raises:
            ConfigError: a setting out of range, or a plain DDPM.
            DataError: nothing to read, or no image can be read.
            WriteError: the disk is full or ``out`` cannot be written; finished files remain.
            CheckpointError: another process segments into ``out``.

        Example:
            >>> done = run.segment_folder(pictures[:4], "segmented", formats=("labels",), progress=False)
            >>> done.segmented, done.skipped
            (4, {})
        """
        predict, size = self.predictor(t, quality), check_segmenting(self.config, size, upsample)
        source = images if isinstance(images, Source) else open_source(images)
        settings = {"t": self._check_time(t), "size": size, "upsample": upsample, "quality": quality}
        with cpu_threads(self.config.threads):
            return segment_folder(
                self.model, self.config, predict, source, Path(out), settings, formats, workers, progress
            )

    def segment_video(
        self,
        video: Any,
        out: str | Path,
        *,
        smooth: float = 0.8,
        t: int | None = None,
        size: int | None = None,
        upsample: str = "guided",
        quality: str = "fast",
        progress: bool = True,
    ) -> VideoSegments:
        """Segment a video frame by frame into a video with the regions overlaid, at constant memory.

        Regions keep their numbers and colours from frame to frame. The video appears complete or not at all.

        Args:
            video: a video file, an animated GIF or WebP, a folder of frames in the order of their names (2 before 10),
                or any source of :func:`factorkit.data.open_source`.
            out: an .mp4, .mkv or .mov.
            smooth: weight of the earlier masks where the image does not move
                (:class:`~factorkit.segdiff.inference.video.Smoother`), in [0, 1); 0 turns smoothing off.
            t, size, upsample, quality: as for :meth:`segment`.
            progress: show a progress bar.

        Raises:
            ConfigError: a setting out of range, a plain DDPM, or imageio is not installed.
            DataError: nothing to read, frames of several sizes, or a video that does not decode to its end.
            WriteError: the disk is full or ``out`` cannot be written.
            OutOfMemory: frames too large for the machine.
        """
        source = open_video(video)
        size, predict = check_segmenting(self.config, size, upsample), self.predictor(t, quality)
        with cpu_threads(self.config.threads):
            frames = segment_frames(source.frames, self.config, predict, size=size, upsample=upsample, smooth=smooth)
            return write_video(source, frames, Path(out), self.config.num_leaf_regions, progress)

    def predictor(self, t: int | None, quality: str, label: int | None = None) -> Callable[[Tensor], Tensor]:
        """Return a function from images [N, 3, h, w] in [-1, 1] to their masks [N, K, h, w].

        Args:
            t, quality: as for :meth:`segment`.
            label: the class the model is conditioned on; None: no class.

        Raises:
            ConfigError: t out of range, or an unknown quality.
        """
        t = self._check_time(t)
        if quality not in QUALITIES:
            raise ConfigError(f"quality={quality!r} is unknown; choose one of {', '.join(QUALITIES)}")
        flip = quality == "best" and self.config.random_flip

        def predict(images: Tensor) -> Tensor:
            with self._autocast():
                return average_masks(self.model, images, t, self.schedule, flip, label)

        return predict

    # --- generation and editing ---

    def generate(
        self,
        n: int = 16,
        *,
        sampler: str = "ddim",
        steps: int | None = 50,
        seed: int = 0,
        trajectory: bool = False,
        progress: bool = False,
        classes: Any = None,
        guidance: float = 1.0,
    ) -> Generation:
        """Generate images and their masks from noise (thesis, algorithm 2).

        Args:
            n: number of images.
            sampler: ``"ddim"``, ``"heun"`` or ``"dpm++"`` for few steps, ``"ddpm"`` for many; see
                :func:`factorkit.diffusion.samplers.sample`. All of them support every kind of prediction.
            steps: denoising steps; None: all of the schedule.
            seed: determines the images.
            trajectory: keep every step (fig. 2.10).
            progress: show a progress bar.
            classes: classes of the images, for a run with classes (``config.class_names``): a name or label, a list of
                them, taken in turn (None in it is no class), or ``"all"``; None: no class.
            guidance: scale of classifier-free guidance; 1 is none, 2 to 4 is usual, at twice the cost.

        Raises:
            ConfigError: an unknown sampler or class, guidance without classes, or n or steps out of range.

        Example:
            >>> drawn_again = run.generate(2, steps=3, seed=1)
            >>> drawn_again.images.shape, drawn_again.labels.shape
            (torch.Size([2, 3, 16, 16]), torch.Size([2, 16, 16]))
        """
        if n < 1:
            raise ConfigError(f"n={n} must be at least 1")
        labels = select_labels(classes, self.config.class_names, n, guidance)

        def draw(rows: slice) -> Any:
            return draw_images(
                self.model,
                self.config,
                n,
                sampler=sampler,
                steps=steps,
                seed=seed,
                device=self.device,
                progress=progress and distributed.rank() == 0,
                trajectory=trajectory,
                labels=labels,
                guidance=guidance,
                rows=rows,
            )

        with self._autocast():
            samples = distributed.in_shares(draw, n)
        masks = samples.bottleneck.masks.float().cpu()
        frames = names = None
        if trajectory:
            frames = [Frame(s.t, signed_to_unit(s.x0), s.bottleneck.masks.float().cpu()) for s in samples.trajectory]
        if labels is not None:
            names = [self.config.class_names[i] if i >= 0 else None for i in labels.tolist()]
        images, labels_of_pixels = signed_to_unit(samples.images), hard_labels(masks, self.config.nesting)
        return Generation(images, masks, labels_of_pixels, frames, names)

    def interpolate(
        self,
        a: Any,
        b: Any,
        *,
        frames: int = 9,
        t: int | None = None,
        steps: int = 50,
        sampler: str = "ddpm",
        seed: int = 0,
    ) -> Interpolation:
        """Interpolate between images a and b: mix them at time step t with shared noise and denoise (fig. 2.12).

        Args:
            a, b: images as for :meth:`segment`, cropped to their central squares; as many of each, or one.
            frames: images along the way, both ends included.
            t: time step of the mixing; None: a quarter of those trained on (250 of 1000). The higher, the freer.
            steps: denoising steps, at most t + 1.
            sampler, seed: as for :meth:`generate`.

        Raises:
            ConfigError: frames, steps or t out of range, or an unknown sampler.
            DataError: nothing to read, or images that cannot be paired.
        """
        t = check_edit_time(self.config, t)
        options: dict[str, Any] = {"frames": frames, "t": t, "steps": steps, "sampler": sampler, "seed": seed}
        first, second = self._read_squares(a), self._read_squares(b)
        with self._autocast():
            return interpolate_pictures(self.model, self.config, self.schedule, first, second, **options)

    def branches(self, images: Any, t: int | None = None) -> Branches:
        """Return the output of each branch for images at one noise level, and its mask (fig. 2.9).

        Args:
            images: as for :meth:`segment`, cropped to their central squares.
            t: time step; None: a quarter of those trained on. At low ones every branch can copy its input.

        Raises:
            ConfigError: t out of range, or a model without branches (``decoding="concat"``).
            DataError: nothing to read.
        """
        t = check_edit_time(self.config, t)
        with self._autocast():
            return take_apart(self.model, self.config, self.schedule, self._read_squares(images), t)

    def recompose(
        self,
        images: Any,
        region: int,
        *,
        from_: Any = None,
        remove: bool = False,
        t: int | None = None,
        steps: int = 50,
        sampler: str = "ddpm",
        seed: int = 0,
    ) -> Recomposition:
        """Edit images by region: generate one anew (the default), transfer it from other images, or remove it.

        Pixels outside the edited areas stay bit-identical (:class:`~factorkit.segdiff.editing.recompose.Recomposer` has
        the formulas).

        Args:
            images: as for :meth:`segment`, cropped to their central squares.
            region: number of the region, 0 to K-1, as in the labels of :meth:`segment`.
            from_: images to transfer the region from, as many as images, or one; its old area is filled.
            remove: remove the region and fill its area.
            t: the region is held to its pixels down to this time step and denoised freely below it. None: with ``from_``
                a twentieth of the steps, which fits it in without changing it; else all of them. 0 pastes.
            steps: denoising steps.
            sampler, seed: as for :meth:`generate`.

        Raises:
            ConfigError: a plain DDPM, an unknown region or time step, ``from_`` with ``remove``, steps out of range, or
                an unknown sampler.
            DataError: nothing to read, or images that cannot be paired.
        """
        options: dict[str, Any] = {"region": region, "remove": remove, "t": t, "steps": steps}
        options |= {"sampler": sampler, "seed": seed}
        originals, sources = self._read_squares(images), None if from_ is None else self._read_squares(from_)
        with self._autocast():
            return recompose_pictures(self.model, self.config, self.schedule, originals, sources, **options)

    # --- evaluation ---

    def evaluate(
        self,
        images: Any,
        masks: Any,
        *,
        num_fit_images: int | None = None,
        ignore: int | None = None,
        baselines: bool = False,
        t: int | None = None,
        size: int | None = None,
        quality: str = "fast",
        nesting: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Score the regions against foreground masks: Acc, IoU, DICE per image, averaged.

        One mapping from regions to foreground is fitted on the first ``num_fit_images`` labelled images and applied to
        the rest, which are scored (``acc, iou, dice``). ``oracle_*`` chooses the best mapping for each image by its own
        label, an upper bound. In a hierarchy the regions of one level are mapped, named by ``level``: the deepest with
        at most 12. Images and masks are cropped as in training. The result is also written to ``scores.json``.

        Args:
            images, masks: folders, zips, lists or arrays; matched by name, arrays by position. Foreground is every
                value above 0 except ``ignore``.
            num_fit_images: labelled images that fit the mapping; None: as in the settings (16), fewer for a small set.
            ignore: mask value that is not scored; None: as in the settings.
            baselines: also score the trivial predictors and GrabCut on the same images.
            t: time step; None: as in the settings.
            size: side in pixels at which to score; None: the resolution of the model.
            quality: as for :meth:`segment`.
            nesting: number of classes at each level of nested labels (label 3 i + j of (3, 3) is part j of class i):
                score each level by :func:`~factorkit.metrics.class_matching.nested_accuracy` instead.

        Raises:
            ConfigError: ``num_fit_images`` leaves nothing to score, t out of range, a plain DDPM, or over 12 regions.
            DataError: images and masks that do not match.

        Example:
            >>> scores = run.evaluate(pictures, drawn, num_fit_images=8)
            >>> sorted(scores)[:3], 0 <= scores["iou"] <= 1
            (['acc', 'areas', 'confidence'], True)
        """
        self._require_regions()
        scores = score_labelled_images(
            self.config,
            share_images(self.predictor(t, quality)),
            images,
            masks,
            num_fit_images=num_fit_images,
            ignore=ignore,
            baselines=baselines,
            size=size,
            nesting=nesting,
        )
        scores["step"] = self.step
        if (folder := self.folder) is not None:
            distributed.on_first(lambda: write_json(folder / SCORES, scores))
        return scores

    def evaluate_zero_shot(
        self,
        data: Any,
        *,
        split: str = "val",
        label_map: Mapping[str, Any] | None = None,
        num_fit_images: int | None = None,
        t: int | None = None,
        quality: str = "fast",
        mask_set: str | None = None,
    ) -> dict[str, Any]:
        """Score the run on the classes of another data set, each by itself (table 2.7).

        Args:
            data: a data set with class masks, as :func:`factorkit.data.open_dataset` reads it, such as VOC 2012.
            split: the split to score.
            label_map: class of the run that the model is conditioned on, for each class of the data set; None: that of
                the thesis for VOC and a run on ImageNet.
            num_fit_images: images of each class that fit the mapping from regions to foreground; None: as in the
                settings.
            t, quality: as for :meth:`segment`.
            mask_set: which masks of the data set; None: its default.

        Returns:
            The scores of every class and their means, as
            :func:`~factorkit.segdiff.inference.zero_shot.zero_shot_scores`.

        Raises:
            ConfigError: a plain DDPM, an unknown split or class, t or quality out of range.
            DataError: nothing to score.
        """
        self._require_regions()
        return zero_shot_scores(
            self.config,
            lambda label: share_images(self.predictor(t, quality, label)),
            data,
            split=split,
            label_map=label_map,
            num_fit_images=num_fit_images or self.config.num_fit_images,
            mask_set=mask_set,
        )

    # --- helpers ---

    def _check_time(self, t: int | None) -> int:
        t = self.config.segment_t if t is None else t
        if not 0 <= t < self.config.timesteps:
            raise ConfigError(f"t={t} must lie between 0 and {self.config.timesteps - 1}")
        return t

    def _require_regions(self) -> None:
        if self.config.num_leaf_regions == 1:
            raise ConfigError("this run was trained with regions=1, the plain DDPM: it has no regions to score")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _read_squares(self, images: Any) -> Tensor:
        """Images cropped as in training, [n, 3, R, R] in [-1, 1]."""
        pictures, _ = as_pictures(images)
        squares = [crop_square(picture, self.config.resolution) for picture in pictures]
        return pixels_to_signed(torch.from_numpy(np.stack(squares)))


def load_model(
    path: Path, weights: str | float
) -> tuple[ResolvedSegdiffConfig, FactorizedUNet | HierarchicalUNet, int]:
    """Load settings, model and step; nothing is allocated before the settings are known to be plausible.

    Raises:
        CheckpointError: nothing there, damaged, or not a segdiff model.
        ConfigError: unknown ``weights``.
    """
    tensors, meta = read_weights(path, "segdiff", weights)
    fields = {f.name for f in dataclasses.fields(SegdiffConfig)}
    try:
        config = SegdiffConfig.from_dict({k: v for k, v in meta.items() if k in fields}).resolved()
        check_plausible(
            path,
            tensors,
            blocks=config.num_res_blocks,
            levels=len(config.channel_mult),
            regions=math.prod(config.nesting),
            channels=config.model_channels * max(config.channel_mult),
        )
        with torch.device("meta"):
            model = config.build()
        model.load_state_dict(tensors, assign=True)
        step = int(meta["step"])
    except (ConfigError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the weights in {path} do not match the model of its settings: {error}") from error
    return config, model, step
