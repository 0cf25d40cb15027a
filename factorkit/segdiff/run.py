"""A trained segdiff model and what can be asked of it."""

from __future__ import annotations

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
from factorkit.engine.run_folder import read_object, write_json
from factorkit.segdiff.class_labels import chosen_labels
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.editing.branches import Branches, take_apart
from factorkit.segdiff.editing.interpolate import Interpolation, interpolate_pictures
from factorkit.segdiff.editing.recompose import Recomposition, recompose_pictures
from factorkit.segdiff.evaluate import class_scores, label_scores
from factorkit.segdiff.hierarchy import hard_labels
from factorkit.segdiff.inference.folder import FolderSegments, segment_folder
from factorkit.segdiff.inference.outputs import DEFAULT_FORMATS, Frame, Generation, Segmentation
from factorkit.segdiff.inference.segment import (
    Quality,
    as_pictures,
    averaged_masks,
    check_segmenting,
    masks_of,
    quality_of,
)
from factorkit.segdiff.inference.video import VideoSegments, segment_frames, write_video
from factorkit.segdiff.load import stored_model
from factorkit.segdiff.network import FactorizedUNet
from factorkit.segdiff.sampling import draw_images, edit_level
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed, signed_to_unit

SCORES = "scores.json"


class SegdiffRun:
    """A trained factorized diffusion model: its averaged weights after ``step`` steps, and its folder if it has one."""

    MODEL = "segdiff"

    def __init__(
        self, config: SegdiffConfig, model: FactorizedUNet, device: torch.device, step: int, folder: Path | None = None
    ):
        self.config, self.device, self.step, self.folder = config, device, step, folder
        self.model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.schedule = config.build_schedule(device)

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device = "auto", weights: str | float = "average"
    ) -> SegdiffRun:
        """Load a run folder (its newest whole checkpoint) or a single ``.safetensors`` file.

        Args:
            path: either of them.
            device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a torch device.
            weights: ``"average"``, the moving average; of a folder also the decay of another one that the training kept
                (``extra_ema_decays=``), or ``"last"``, those of its last step. Only scores of the average are
                written to the folder.

        Raises:
            CheckpointError: nothing there, damaged, or not a segdiff model.
            ConfigError: other ``weights``, or ones that are not there.

        Example:
            >>> run = factorkit.SegdiffRun.load("runs/flowers", device="cpu")
            >>> run.config.regions
            2
        """
        path = Path(path)
        config, model, step = stored_model(path, weights)
        chosen = device if isinstance(device, torch.device) else resolve_device(device)
        return cls(config, model, chosen, step, path if path.is_dir() and weights == "average" else None)

    def save(self, path: str | Path) -> Path:
        """Write the averaged weights and all settings as one ``.safetensors`` file for :func:`factorkit.load`.

        Raises:
            CheckpointError: ``path`` cannot be written; what stood there before stands.

        Example:
            >>> factorkit.load(run.save("flowers.safetensors")).step
            2
        """
        weights = {f"ema.module.{k}": v for k, v in self.model.state_dict().items()}
        return write_checkpoint(Path(path), weights, {"model": "segdiff", **self.config.to_dict(), "step": self.step})

    @property
    def scores(self) -> dict[str, Any] | None:
        """What :meth:`evaluate` last wrote into the run folder; None where it did not.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.folder / SCORES if self.folder else None
        return read_object(path) if path and path.exists() else None

    def segment(
        self,
        images: Any,
        t: int | None = None,
        *,
        size: int | None = None,
        upsample: str = "guided",
        quality: str | Quality = "fast",
    ) -> Segmentation:
        """Regions of real images, one forward pass each; the decoders are never run.

        The whole picture is segmented: its short side is brought to ``size``, the long side kept in proportion, and the
        masks are brought back to the picture's own pixels. More than four training resolutions to a side are seen in
        overlapping tiles. All masks are kept in memory: :meth:`segment_folder` is for many or for huge pictures.

        Args:
            images: a path, folder, zip or list of them, a PIL image or list, an array [B, H, W, C] or [H, W, C], a
                tensor [B, C, H, W] or [C, H, W] (either uint8 or float in [0, 1]; C is 1, 3, or 4 with alpha, which is
                composited over white as that of a file is), or a list of arrays or tensors of any sizes.
            t: noise level, 0 to T-1; None: the configuration's, 30 on the linear schedule and 0 of a competition. Low
                levels show the picture, high ones blur it.
            size: pixels of the short side at which the network looks; None: the training resolution. More shows it
                smaller things.
            upsample: ``"guided"`` lets the masks take over the picture's edges (:mod:`factorkit.nn.guided_filter`) where it
                has more pixels than the network saw, ``"bilinear"`` only interpolates them.
            quality: ``"fast"``, one look; ``"best"``, the mean of the masks of the picture and of its mirror image,
                where training showed any; or a :class:`~factorkit.segdiff.inference.segment.Quality`, of several draws
                of noise and levels around t.

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
        quality: str | Quality = "fast",
        workers: int | None = None,
        progress: bool = True,
    ) -> FolderSegments:
        """Segment any number of pictures into files, picture by picture; the same call again goes on where it stopped.

        Only few of them are in memory at once. Pictures are read ahead and results written by threads; each file
        appears whole or not at all. A picture is done again where it, the model or one of the settings has changed or
        a file is missing. Pictures that cannot be read are left out, named in the answer and in a warning, and tried
        again next time.

        Args:
            images: as :meth:`segment` takes them; results of an earlier call that lie among them are passed over.
            out: the folder to write to, made if it is not there; folders of pictures keep their structure below it.
            formats: ``"labels"`` (NAME_labels.png, palette), ``"masks"`` (NAME_mask_K.png, grey, 8 bits),
                ``"overlays"`` (NAME_overlay.png), ``"coco"`` (annotations.json, run lengths in COCO's form).
                contact_sheet.png with the first pictures comes with any of them.
            t, size, upsample, quality: as in :meth:`segment`.
            workers: threads that read, and as many that write; None: one a core, at most 8.
            progress: show a progress bar with the time left.

        Raises:
            ConfigError: a setting out of range, or a plain DDPM.
            DataError: nothing to read, or none of the pictures can be.
            WriteError: the disk is full or ``out`` cannot be written; what is finished stands.
            CheckpointError: another process segments into ``out``.

        Example:
            >>> done = run.segment_folder(pictures[:4], "segmented", formats=("labels",), progress=False)
            >>> done.segmented, done.skipped
            (4, {})
        """
        predict, size = self.predictor(t, quality), check_segmenting(self.config, size, upsample)
        source = images if isinstance(images, Source) else open_source(images)
        settings = {"t": self._level(t), "size": size, "upsample": upsample, "quality": str(quality)}
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
        quality: str | Quality = "fast",
        progress: bool = True,
    ) -> VideoSegments:
        """Segment a moving picture into a video with the regions laid over it, frame by frame; memory does not grow.

        Regions keep their numbers and colours from frame to frame, being the model's own. The video appears whole or
        not at all.

        Args:
            video: a video file, an animated GIF or WebP, or a folder of frames, in the order of their names (2 before
                10), or whatever else :func:`factorkit.data.open_source` takes.
            out: an .mp4, .mkv or .mov.
            smooth: how much masks are averaged over time where the picture stands still
                (:class:`~factorkit.segdiff.inference.video.Smoother`), in [0, 1); 0 not at all.
            t, size, upsample, quality: as in :meth:`segment`.
            progress: show a progress bar.

        Raises:
            ConfigError: a setting out of range, a plain DDPM, or imageio is not installed.
            DataError: nothing to read, frames of several sizes, or a video that does not decode to its end.
            WriteError: the disk is full or ``out`` cannot be written.
            OutOfMemory: frames too large for the machine.
        """
        clip = open_video(video)
        options = {"size": check_segmenting(self.config, size, upsample), "upsample": upsample, "smooth": smooth}
        predict = self.predictor(t, quality)
        with cpu_threads(self.config.threads):
            found = segment_frames(clip.frames, self.config, predict, **options)
            return write_video(clip, found, Path(out), self.config.num_leaf_regions, progress)

    def predictor(self, t: int | None, quality: str | Quality, label: int | None = None) -> Callable[[Tensor], Tensor]:
        """What takes images [N, 3, h, w] in [-1, 1] to their masks [N, K, h, w].

        Args:
            t: the level of noise; None: ``segment_t`` of the settings.
            quality: as in :meth:`segment`.
            label: the class that all images are told to be of, by its number; None: none.

        Raises:
            ConfigError: t out of range, or no such quality.
        """
        t, looks = self._level(t), quality_of(quality, self.config.random_flip)

        def predict(images: Tensor) -> Tensor:
            with self._precision():
                return averaged_masks(self.model, images, t, self.schedule, looks, label)

        return predict

    def _level(self, t: int | None) -> int:
        t = self.config.segment_t if t is None else t
        if not 0 <= t < self.config.timesteps:
            raise ConfigError(f"t={t} must lie between 0 and {self.config.timesteps - 1}")
        return t

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

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
        """Draw images and their masks from noise (thesis, algorithm 2).

        Args:
            n: how many.
            sampler: ``"ddim"``, ``"heun"`` or ``"dpm++"`` for few steps, ``"ddpm"`` for many;
                see :func:`factorkit.diffusion.samplers.sample`. Each goes with whatever the model predicts.
            steps: denoising steps; None: every one.
            seed: the same seed, the same images.
            trajectory: keep every step (fig. 2.10).
            progress: show a progress bar.

            classes: what the images are to be of, where the run has classes (``config.class_names``): a name or label,
                a list of them, taken in turn (None in it is no class), or ``"all"``; None: of anything.
            guidance: how strongly they are pushed to their class; 1 is not at all, 2 to 4 is usual, at twice the cost.

        Raises:
            ConfigError: an unknown sampler or class, guidance without classes, or n or steps out of range.

        Example:
            >>> drawn_again = run.generate(2, steps=3, seed=1)
            >>> drawn_again.images.shape, drawn_again.labels.shape
            (torch.Size([2, 3, 16, 16]), torch.Size([2, 16, 16]))
        """
        if n < 1:
            raise ConfigError(f"n={n}: at least one image has to be asked for")
        labels = chosen_labels(classes, self.config.class_names, n, guidance)
        draw = lambda rows: draw_images(  # noqa: E731
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
        with self._precision():
            drawn = distributed.in_shares(draw, n)
        masks = drawn.bottleneck.masks.float().cpu()
        frames = None
        if trajectory:
            frames = [Frame(s.t, signed_to_unit(s.x0), s.bottleneck.masks.float().cpu()) for s in drawn.trajectory]
        asked = None
        if labels is not None:
            asked = [self.config.class_names[i] if i >= 0 else None for i in labels.tolist()]
        return Generation(signed_to_unit(drawn.images), masks, hard_labels(masks, self.config.nesting), frames, asked)

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
        """The way from pictures a to pictures b, mixed at level t with shared noise and denoised (fig. 2.12).

        Args:
            a, b: pictures as :meth:`segment` takes them, cut to their centred squares; as many of each, or one.
            frames: pictures along the way, both ends included.
            t: level of the mixing; None: a quarter of those it was trained on (250 of 1000). The
                higher, the freer.
            steps: denoising steps, at most t + 1.
            sampler, seed: as in :meth:`generate`.

        Raises:
            ConfigError: frames, steps or t out of range, or an unknown sampler.
            DataError: nothing to read, or pictures that cannot be paired.
        """
        options = {"frames": frames, "t": edit_level(self.config, t), "steps": steps, "sampler": sampler, "seed": seed}
        a, b = self._squares(a), self._squares(b)
        with self._precision():
            return interpolate_pictures(self.model, self.config, self.schedule, a, b, **options)

    def branches(self, images: Any, t: int | None = None) -> Branches:
        """What each branch makes of pictures at one noise level, and its mask (fig. 2.9).

        Args:
            images: as :meth:`segment` takes them, cut to their centred squares.
            t: noise level; None: a quarter of those it was trained on. At low ones every branch can copy what it sees.

        Raises:
            ConfigError: t out of range, or a model without branches (``decoding="concat"``).
            DataError: nothing to read.
        """
        t = edit_level(self.config, t)
        with self._precision():
            return take_apart(self.model, self.config, self.schedule, self._squares(images), t)

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
        """Edit pictures by region: make one anew (the default), bring it from other pictures, or take it away.

        Places are painted by the branches of the regions that shall be there, everything else stays as it is, to the
        last digit (:class:`~factorkit.segdiff.editing.recompose.Recomposer` has the formulas).

        Args:
            images: as :meth:`segment` takes them, cut to their centred squares.
            region: which region, 0 to K-1; :meth:`segment` tells what each of them found.
            from_: the pictures to bring it from, as many as images, or one; the place it leaves is filled.
            remove: take the region away and fill its place.
            t: the region is held to its pixels down to this level, and painted freely below it. None: with ``from_``
                a twentieth of the levels, which fits it in but leaves it what it is; else all: it is made from noise.
                0 pastes.
            steps: denoising steps.
            sampler, seed: as in :meth:`generate`.

        Raises:
            ConfigError: a plain DDPM, a region or level that is not there, ``from_`` with ``remove``, steps out of
                range, or an unknown sampler.
            DataError: nothing to read, or pictures that cannot be paired.
        """
        options = {"region": region, "remove": remove, "t": t, "steps": steps, "sampler": sampler, "seed": seed}
        originals, sources = self._squares(images), None if from_ is None else self._squares(from_)
        with self._precision():
            return recompose_pictures(self.model, self.config, self.schedule, originals, sources, **options)

    def _squares(self, images: Any) -> Tensor:
        """Pictures as the training saw them, [n, 3, R, R] in [-1, 1]."""
        pictures, _ = as_pictures(images)
        return pixels_to_signed(torch.from_numpy(np.stack([crop_square(p, self.config.resolution) for p in pictures])))

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
        quality: str | Quality = "fast",
        nesting: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Score the regions against foreground masks: Acc, IoU, DICE per image, averaged.

        One mapping from regions to foreground is fitted on the first ``num_fit_images`` labelled images and the rest are scored
        with it (``acc, iou, dice``); ``oracle_*`` chooses the best mapping for each image by its own label, an upper
        bound. Of a hierarchy the regions of one level are mapped, which ``level`` says: the deepest with at most 12.
        Images and masks get the training's centred square crop. The result also goes to ``scores.json`` of the run
        folder.

        Args:
            images, masks: folders, zips, lists or arrays; matched by name, arrays by position. Foreground is every
                value above 0 but ``ignore``.
            num_fit_images: labelled images that fit the mapping; None: the configuration's (16), fewer where the set is small.
            ignore: mask value that is not scored; None: the configuration's.
            baselines: score the trivial predictors and GrabCut on the same images too.
            t: noise level; None: the configuration's.
            size: pixels a side at which to score; None: the model's resolution.
            quality: as in :meth:`segment`.
            nesting: the masks are labels within labels, of so many classes at each level (label 3 i + j of (3, 3) is
                part j of class i): score each level of a hierarchy by :func:`~factorkit.metrics.class_matching.nested_accuracy`
                instead.

        Raises:
            ConfigError: ``num_fit_images`` leaves nothing to score, t out of range, a plain DDPM, or more than 12 regions.
            DataError: images and masks that do not go together.

        Example:
            >>> scores = run.evaluate(pictures, drawn, num_fit_images=8)
            >>> sorted(scores)[:3], 0 <= scores["iou"] <= 1
            (['acc', 'areas', 'confidence'], True)
        """
        scores = label_scores(
            self,
            images,
            masks,
            num_fit_images=num_fit_images,
            ignore=ignore,
            baselines=baselines,
            t=t,
            size=size,
            quality=quality,
            nesting=nesting,
        )
        if self.folder is not None:
            distributed.on_first(lambda: write_json(self.folder / SCORES, scores))
        return scores

    def evaluate_zero_shot(
        self,
        data: Any,
        *,
        split: str = "val",
        label_map: Mapping[str, Any] | None = None,
        num_fit_images: int | None = None,
        t: int | None = None,
        quality: str | Quality = "fast",
        mask_set: str | None = None,
    ) -> dict[str, Any]:
        """Score the run on another data set's classes, each by itself (table 2.7).

        Args:
            data: a data set with class masks, as :func:`factorkit.data.open_dataset` reads it, such as VOC 2012.
            split: the one scored.
            label_map: the run's class that the model is told, for each of the data set's; None: the dissertation's
                for VOC and a run on ImageNet.
            num_fit_images: so many pictures of each class fit the mapping from regions to foreground; None: the setting's.
            t, quality: as in :meth:`segment`.
            mask_set: which of the data set's masks; None: its default.

        Returns:
            The scores of every class and their means, as :func:`~factorkit.segdiff.inference.zero_shot.zero_shot_scores`.

        Raises:
            ConfigError: the plain DDPM, a split or classes that are not there, t or quality out of range.
            DataError: nothing to score.
        """
        options = {"split": split, "label_map": label_map, "mask_set": mask_set}
        return class_scores(self, data, num_fit_images=num_fit_images, t=t, quality=quality, **options)
