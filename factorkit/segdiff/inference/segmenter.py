"""A loaded model, and how it segments images, folders and videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.open import open_source, read_images, read_squares
from factorkit.data.sources import Source
from factorkit.data.video import open_video
from factorkit.engine.config import autocast, cpu_threads
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.segdiff.inference.folder import FolderSegments, segment_folder
from factorkit.segdiff.inference.outputs import DEFAULT_FORMATS
from factorkit.segdiff.inference.segment import (
    QUALITIES,
    Segmentation,
    check_segment_settings,
    hard_labels,
    is_unlike,
    predict_masks,
    segment_image,
)
from factorkit.segdiff.inference.video import VideoSegments, check_video_output, segment_frames, write_video
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed


class LoadedModel:
    """A model, its settings and its noise schedule on a device: what segmenting, generating and editing share."""

    def __init__(self, config: ResolvedSegdiffConfig, model: SegdiffModel, device: torch.device) -> None:
        self.config, self.device = config, device
        # torch does not type memory_format together with a device.
        self.model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.schedule = config.build_schedule(device)

    def _autocast(self) -> torch.autocast:
        return autocast(self.config, self.device)

    def _check_time(self, t: int | None) -> int:
        t = self.config.segment_t if t is None else t
        if not 0 <= t < self.config.timesteps:
            raise ConfigError(f"t={t} must lie between 0 and {self.config.timesteps - 1}")
        return t

    def _read_squares(self, images: Any) -> Tensor:
        """Images cropped as in training, [n, 3, R, R] in [-1, 1]."""
        return pixels_to_signed(torch.from_numpy(read_squares(images, self.config.resolution)))


class Segmenter(LoadedModel):
    """The segmenting methods of :class:`~factorkit.segdiff.run.SegdiffRun`."""

    @property
    def scores(self) -> dict[str, Any] | None:
        """The last scores against labels; None if there are none."""
        return None

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
        are brought back to the pixels of the image. Images of more than four training resolutions per side are
        processed in overlapping tiles. All masks stay in memory; use :meth:`segment_folder` for many or huge images.

        Args:
            images: a path, folder, zip or list of them, a PIL image or list, an array [B, H, W, C] or [H, W, C], a
                tensor [B, C, H, W] or [C, H, W] (uint8, or float in [0, 1]; C is 1, 3, or 4 with alpha, which is
                composited over white), or a list of arrays or tensors of any sizes.
            t: time step of the noise, 0 to T-1; None: ``segment_t`` of the settings. Low steps keep detail, high ones
                blur it.
            size: pixels of the short side that the network sees; None: the training resolution. More shows it smaller
                things.
            upsample: ``"guided"`` aligns the masks with the edges of the image (:mod:`factorkit.nn.guided_filter`) if
                it has more pixels than the network sees; ``"bilinear"`` only interpolates them.
            quality: ``"fast"``; or ``"best"``, the mean of the masks of the image and of its mirror image, if training
                used mirror images.

        Raises:
            ConfigError: t out of range, or a plain DDPM, which has no regions.
            DataError: nothing to read, or an image that cannot be decoded.
            OutOfMemoryError: an image too large for the machine.

        Example:
            >>> seg = run.segment(images[:4])
            >>> seg.labels.shape, seg.masks.shape
            (torch.Size([4, 16, 16]), torch.Size([4, 2, 16, 16]))
            >>> bool((seg.masks.sum(1) - 1).abs().max() < 0.01)
            True
        """
        predict, size = self.predictor(t, quality), check_segment_settings(self.config, size, upsample)
        decoded, names = read_images(images)
        judge = self._judge(t)
        results = [segment_image(self.config, image, predict, judge, size, upsample) for image in decoded]
        masks, unlike = [masks for masks, _ in results], tuple(unlike for _, unlike in results)
        labels = [hard_labels(m, self.config.nesting) for m in masks]
        if len({m.shape for m in masks}) == 1:
            return Segmentation(torch.stack(labels), torch.stack(masks), names, self.config.nesting, unlike)
        return Segmentation(labels, masks, names, self.config.nesting, unlike)

    def segment_folder(
        self,
        images: Any,
        out: str | Path,
        *,
        formats: Sequence[str] = DEFAULT_FORMATS,
        region: str | int = "auto",
        tolerance: float = 1.0,
        t: int | None = None,
        size: int | None = None,
        upsample: str = "guided",
        quality: str = "fast",
        workers: int | None = None,
        progress: bool = True,
        overwrite: bool = False,
    ) -> FolderSegments:
        """Segment any number of images into files; the same call again continues where it stopped.

        Memory stays constant: threads read ahead and write, and each file appears complete or not at all. An image is
        processed again if it, the model or a setting has changed, or if a file is missing. Images that cannot be read
        are skipped, named in the result and in a warning, and tried again next time.

        Args:
            images: as for :meth:`segment`; results of an earlier call among them are ignored.
            out: output folder; folders of images keep their structure below it. Images of one name from different
                folders get distinct names (img, img-2), and annotations.json holds the images of all calls.
            formats: ``"labels"`` (NAME_labels.png, palette), ``"grey-labels"`` (NAME_labels_grey.png, grey values 0 to
                K-1), ``"masks"`` (NAME_mask_K.png, grey, 8 bits), ``"overlays"`` (NAME_overlay.png), ``"cutout"``
                (NAME_cutout_K.png, RGBA), ``"coco"`` (annotations.json, COCO run lengths), ``"coco-polygons"``
                (polygons.json, run lengths for regions with holes), ``"labelme"`` (labelme/NAME.json), ``"yolo"``
                (yolo/labels/NAME.txt and yolo/classes.txt). overview.png with the first images is always written.
            region: what cut-outs show: a number from 0 to K-1, or ``"auto"``
                (:func:`~factorkit.segdiff.inference.cutout_region.choose_cutout_region`; the result says which).
            tolerance: of the polygons' simplification in pixels; 0 keeps every corner.
            t, size, upsample, quality: as for :meth:`segment`.
            workers: threads that read, and as many that write; None: one per core, at most 8.
            progress: show a progress bar with the time left.
            overwrite: also replace files that this method did not write for the same image, and results that were
                changed since.

        Raises:
            ConfigError: a setting out of range, or a plain DDPM.
            DataError: nothing to read, or no image can be read.
            WriteError: a file of another origin is in the way, the disk is full or ``out`` cannot be written; finished
                files remain.
            CheckpointError: another process segments into ``out``.

        Example:
            >>> done = run.segment_folder(images[:4], "segmented", formats=("labels",), progress=False)
            >>> done.segmented, done.skipped
            (4, {})
        """
        predict, size = self.predictor(t, quality), check_segment_settings(self.config, size, upsample)
        source = images if isinstance(images, Source) else open_source(images)
        settings = {"t": self._check_time(t), "size": size, "upsample": upsample, "quality": quality}
        with cpu_threads(self.config.threads):
            return segment_folder(
                self.model,
                self.config,
                predict,
                source,
                Path(out),
                settings,
                formats,
                workers,
                progress,
                overwrite,
                region,
                tolerance,
                self.scores,
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
        partial: bool = False,
        overwrite: bool = False,
    ) -> VideoSegments:
        """Segment a video frame by frame into a video with the regions overlaid, at constant memory.

        Regions keep their numbers and colours from frame to frame. Frames keep their times, also at a variable rate;
        the sound is taken over. The video appears complete or not at all.

        Args:
            video: a video file, an animated GIF or WebP, a folder of frames in the order of their names (2 before 10),
                or any source of :func:`factorkit.data.open_source`.
            out: an .mp4, .mkv or .mov.
            smooth: weight of the earlier masks where the image does not move
                (:class:`~factorkit.segdiff.inference.video.Smoother`), in [0, 1); 0 turns smoothing off.
            t, size, upsample, quality: as for :meth:`segment`.
            progress: show a progress bar.
            partial: use a video that is cut off or damaged as far as it goes, with a warning.
            overwrite: also replace a file that was not written for this video. The input is never replaced.

        Raises:
            ConfigError: a setting out of range, a plain DDPM, or imageio is not installed.
            DataError: nothing to read, frames of several sizes, or a video that does not decode to its end.
            WriteError: ``out`` is the input or a file of another origin, the disk is full, or it cannot be written.
            OutOfMemoryError: frames too large for the machine.
        """
        check_video_output(video, Path(out), overwrite)
        source = open_video(video, partial=partial)
        size, predict = check_segment_settings(self.config, size, upsample), self.predictor(t, quality)
        with cpu_threads(self.config.threads):
            frames = segment_frames(source.frames, self.config, predict, size=size, upsample=upsample, smooth=smooth)
            return write_video(
                source, frames, Path(out), self.config.num_leaf_regions, progress, source=video, overwrite=overwrite
            )

    def _judge(self, t: int | None) -> Callable[[np.ndarray, Tensor], bool]:
        """Return :func:`is_unlike` of this model at time step t."""
        return partial(is_unlike, self.model, self._check_time(t))

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
                masks = predict_masks(self.model, images, t, self.schedule, label)
                if flip:
                    masks = (masks + predict_masks(self.model, images.flip(3), t, self.schedule, label).flip(3)) / 2
                return masks

        return predict
