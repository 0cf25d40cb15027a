"""Segmentation of a video frame by frame, in memory that does not grow with its length.

Regions are the model's own, so a region has the same number in every frame. What remains is flicker, which is reduced
in two ways: all frames get the same noise (:func:`~factorkit.segdiff.task.add_noise`), and frames and masks are
averaged over time where the image does not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from factorkit.data.video import Video, import_video_libraries
from factorkit.segdiff import previews
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import hard_labels
from factorkit.segdiff.inference.segment import (
    PreparedImage,
    describe_out_of_memory,
    predict_tiled,
    prepare_image,
    upsample_masks,
)
from factorkit.utils.atomic import replacing
from factorkit.utils.errors import (
    ConfigError,
    DataError,
    FactorkitError,
    OutOfMemoryError,
    WriteError,
    is_out_of_memory,
)

MAX_FRAMES_PER_BATCH, MAX_PIXELS_PER_BATCH = 16, 1 << 24
STILL_COLOUR_CHANGE = 0.03  # in [0, 1]: larger changes of the mean colour count as motion
CODEC = "libx264"
SUFFIXES = (".mp4", ".mkv", ".mov")


class VideoSegments(NamedTuple):
    """The result of segmenting a video.

    Attributes:
        out: the video with the regions laid over its frames.
        frames: number of frames.
        rate: frames per second.
        areas: mean share of each region.
        changes: share of the pixels whose region differs from the last frame's, mean over frames: motion and flicker.
    """

    out: Path
    frames: int
    rate: float
    areas: list[float]
    changes: float


class Smoother:
    """A running average of frames and masks, ``s <- a s + (1 - a) x``, where the image does not move.

    With d the difference of a frame and the running average, averaged over 5 x 5 pixels, and d^2 its mean square over
    the channels, ``a = keep exp(-d^2 / 2 STILL_COLOUR_CHANGE^2)`` for each pixel: motion and cuts take effect at once.
    Frames are averaged too, because the guided filter carries sensor noise into static masks.

    Args:
        keep: in [0, 1); 0 does not smooth. A static average spans about 1 / (1 - keep) frames.
    """

    def __init__(self, keep: float):
        if not 0 <= keep < 1:
            raise ConfigError(f"smooth={keep} must be at least 0 and below 1; 0 does not smooth")
        self.keep = keep
        self._frame: Tensor | None = None
        self._masks: Tensor | None = None

    def frame(self, frame: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Return the averaged frame, uint8 [H, W, 3], and the weights a, [H, W], to average its masks with."""
        current = torch.from_numpy(np.array(frame)).permute(2, 0, 1).float()
        if self._frame is None or self.keep == 0:
            self._frame = current
            return frame, torch.zeros(current.shape[1:])
        change = F.avg_pool2d(F.pad((current - self._frame)[None], (2, 2, 2, 2), mode="replicate"), 5, 1)[0] / 255
        keep = self.keep * torch.exp(-change.square().mean(0) / (2 * STILL_COLOUR_CHANGE**2))
        self._frame = torch.lerp(current, self._frame, keep)
        return self._frame.round().byte().permute(1, 2, 0).numpy(), keep

    def masks(self, masks: Tensor, keep: Tensor) -> Tensor:
        """Return averaged masks [K, h, w] of the frame that ``keep`` belongs to; they still sum to 1."""
        if self._masks is not None:
            masks = torch.lerp(masks, self._masks, F.adaptive_avg_pool2d(keep[None], (masks.shape[1], masks.shape[2])))
        self._masks = masks
        return masks


def segment_frames(
    frames: Iterable[np.ndarray],
    config: ResolvedSegdiffConfig,
    predict: Callable[[Tensor], Tensor],
    *,
    size: int,
    upsample: str,
    smooth: float,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each frame, uint8 [H, W, 3], with its labels, uint8 [H, W].

    Args:
        frames: of one size.
        config: of the run.
        predict: maps images [N, 3, h, w] in [-1, 1] to masks [N, K, h, w].
        size: as in :meth:`factorkit.SegdiffRun.segment`.
        upsample: as there.
        smooth: :class:`Smoother`'s ``keep``.

    Raises:
        ConfigError: smooth out of range.
        OutOfMemoryError: frames too large for the machine.
    """
    smoother, frames = Smoother(smooth), iter(frames)
    batch = list(islice(frames, 1))
    pixels = batch[0].shape[0] * batch[0].shape[1] if batch else 1
    batch_size = max(1, min(MAX_FRAMES_PER_BATCH, MAX_PIXELS_PER_BATCH // pixels))
    while batch := batch + list(islice(frames, batch_size - len(batch))):
        try:
            smoothed = [smoother.frame(frame) for frame in batch]
            prepared = [prepare_image(Image.fromarray(frame), config, size, upsample) for frame, _ in smoothed]
            masks = predict_tiled(predict, np.stack([image.small for image in prepared]), config)
            for frame, image, small_masks, (_, keep) in zip(batch, prepared, masks, smoothed, strict=True):
                yield frame, _full_size_labels(smoother.masks(small_masks, keep), image, config)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(describe_out_of_memory(Image.fromarray(batch[0]), size)) from error
        batch = []


def _full_size_labels(masks: Tensor, prepared: PreparedImage, config: ResolvedSegdiffConfig) -> np.ndarray:
    return torch.cat([hard_labels(b, config.nesting).byte() for _, b in upsample_masks(masks, prepared)]).numpy()


def write_video(
    video: Video, segmented: Iterator[tuple[np.ndarray, np.ndarray]], out: Path, num_regions: int, progress: bool
) -> VideoSegments:
    """Write a video with its regions laid over it to ``out``, atomically.

    Args:
        video: the input.
        segmented: its frames with labels, as from :func:`segment_frames`.
        out: .mp4, .mkv or .mov.
        num_regions: K.
        progress: show a progress bar.

    Raises:
        ConfigError: another suffix, or imageio's encoder is not installed.
        DataError: a video without frames, or one that cannot be decoded to its end.
        WriteError: the disk is full or ``out`` cannot be written.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{out}: give a name with one of the suffixes {', '.join(SUFFIXES)}")
    _, imageio = import_video_libraries(out)
    areas, changed, count, previous = np.zeros(num_regions), 0.0, 0, None
    bar = tqdm(segmented, total=video.length, desc="segmenting", unit="frame", disable=not progress)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with bar, replacing(out) as temporary, imageio.imopen(temporary, "w", plugin="pyav") as file:
            for frame, labels in bar:
                if previous is None:
                    file.init_video_stream(CODEC, fps=video.rate)
                else:
                    changed += float((labels != previous).mean())
                file.write_frame(_pad_to_even(previews.overlay_regions(frame, labels)))
                areas += np.bincount(labels.ravel(), minlength=num_regions) / labels.size
                count, previous = count + 1, labels
            if not count:
                raise DataError(f"{video.name}: no frame to segment")
    except FactorkitError:
        raise
    except OSError as error:  # of the encoder, whose errors derive from OSError too; a video raises DataError
        raise WriteError(
            f"{out}: cannot be written: {error.strerror or error}. Free some space, correct the permissions, or give "
            "another out="
        ) from error
    return VideoSegments(out, count, video.rate, (areas / count).tolist(), changed / max(1, count - 1))


def _pad_to_even(frame: np.ndarray) -> np.ndarray:
    """Repeat the last row or column of an odd side, because the codec halves the colour channels."""
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
