"""Segmenting moving pictures frame by frame, in memory that does not grow with their length.

A region has the same number in every frame because it has it in every picture: the model's regions are its own. What
is left is flicker, against which all frames get the same noise (:func:`~factorkit.segdiff.task.noised`), and frames
and masks are averaged over time where the picture stands still.
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

from factorkit.data.video import Video, video_libraries
from factorkit.segdiff import previews
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import hard_labels
from factorkit.segdiff.inference.segment import Seen, no_room, own_pixels, see, small_masks
from factorkit.utils.atomic import replacing
from factorkit.utils.errors import ConfigError, DataError, FactorkitError, OutOfMemory, WriteError, is_out_of_memory

FRAMES_AT_ONCE, PIXELS_AT_ONCE = 16, 1 << 24
STILL = 0.03  # of [0, 1]: a mean colour that has changed by much more is another thing's
CODEC = "libx264"


class VideoSegments(NamedTuple):
    """What segmenting a clip came to.

    Attributes:
        out: the video with the regions laid over its frames.
        frames: how many.
        rate: of them a second.
        areas: mean share of each region.
        changes: share of the pixels whose region differs from the last frame's, mean over frames: motion and flicker.
    """

    out: Path
    frames: int
    rate: float
    areas: list[float]
    changes: float


class Smoother:
    """Frames and masks averaged over time, ``s <- a s + (1 - a) x``, where the picture stands still.

    With d the difference between a frame and the running one, averaged over 5 x 5 pixels, and d^2 its mean square over
    the channels, ``a = keep exp(-d^2 / 2 STILL^2)`` for each pixel: what moves, and all of a cut, is taken at once. The
    frames too, because the guided filter carries a sensor's noise into masks that stand still.

    Args:
        keep: in [0, 1); 0 does not smooth. At rest the average spans about 1 / (1 - keep) frames.
    """

    def __init__(self, keep: float):
        if not 0 <= keep < 1:
            raise ConfigError(f"smooth={keep} must lie between 0 and 1, without 1; 0 does not smooth")
        self.keep = keep
        self._frame: Tensor | None = None
        self._masks: Tensor | None = None

    def frame(self, frame: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """The averaged frame, uint8 [H, W, 3], and the weights a, [H, W], with which its masks are to be averaged."""
        seen = torch.from_numpy(np.array(frame)).permute(2, 0, 1).float()
        if self._frame is None or self.keep == 0:
            self._frame = seen
            return frame, torch.zeros(seen.shape[1:])
        apart = F.avg_pool2d(F.pad((seen - self._frame)[None], (2, 2, 2, 2), mode="replicate"), 5, 1)[0] / 255
        keep = self.keep * torch.exp(-apart.square().mean(0) / (2 * STILL**2))
        self._frame = torch.lerp(seen, self._frame, keep)
        return self._frame.round().byte().permute(1, 2, 0).numpy(), keep

    def masks(self, masks: Tensor, keep: Tensor) -> Tensor:
        """Masks [K, h, w] of the frame that ``keep`` came with; the averaged ones, which still sum to 1."""
        if self._masks is not None:
            masks = torch.lerp(masks, self._masks, F.adaptive_avg_pool2d(keep[None], masks.shape[1:]))
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
    """Each frame, uint8 [H, W, 3], with its labels, uint8 [H, W].

    Args:
        frames: of one size.
        predict: images [N, 3, h, w] in [-1, 1] to masks [N, K, h, w].
        size, upsample: as :meth:`factorkit.SegdiffRun.segment`; smooth: :class:`Smoother`'s ``keep``.

    Raises:
        ConfigError: smooth out of range.
        OutOfMemory: frames too large for the machine.
    """
    smoother, frames = Smoother(smooth), iter(frames)
    first = next(frames, None)
    batch = [] if first is None else [first]
    pixels = 1 if first is None else first.shape[0] * first.shape[1]
    at_once = max(1, min(FRAMES_AT_ONCE, PIXELS_AT_ONCE // pixels))
    while batch := batch + list(islice(frames, at_once - len(batch))):
        try:
            calm = [smoother.frame(frame) for frame in batch]
            seen = [see(Image.fromarray(frame), config, size, upsample) for frame, _ in calm]
            masks = small_masks(predict, np.stack([one.small for one in seen]), config)
            for frame, one, soft, (_, keep) in zip(batch, seen, masks, calm, strict=True):
                yield frame, _labels(smoother.masks(soft, keep), one, config)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(no_room(Image.fromarray(batch[0]), size)) from error
        batch = []


def _labels(masks: Tensor, seen: Seen, config: ResolvedSegdiffConfig) -> np.ndarray:
    bands = [hard_labels(band, config.nesting).byte() for _, band in own_pixels(masks, seen)]
    return torch.cat(bands).numpy()


def write_video(
    clip: Video, found: Iterator[tuple[np.ndarray, np.ndarray]], out: Path, regions: int, progress: bool
) -> VideoSegments:
    """The clip with its regions laid over it as a video at ``out``, which appears whole or not at all.

    Raises:
        ConfigError: a suffix other than .mp4, .mkv or .mov, or imageio's encoder is not installed.
        DataError: a clip without frames, or one that cannot be decoded to its end.
        WriteError: the disk is full or ``out`` cannot be written.
    """
    if out.suffix.lower() not in (".mp4", ".mkv", ".mov"):
        raise ConfigError(f"{out}: a video is written as .mp4, .mkv or .mov; name the file so")
    _, imageio = video_libraries(out)
    areas, changed, count, last = np.zeros(regions), 0.0, 0, None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary, imageio.imopen(temporary, "w", plugin="pyav") as file:
            for frame, labels in tqdm(found, total=clip.length, desc="segmenting", unit="frame", disable=not progress):
                if last is None:
                    file.init_video_stream(CODEC, fps=clip.rate)
                file.write_frame(_even(previews.overlay_regions(frame, labels)))
                areas += np.bincount(labels.ravel(), minlength=regions) / labels.size
                changed += 0.0 if last is None else float((labels != last).mean())
                count, last = count + 1, labels
            if not count:
                raise DataError(f"{clip.name}: no frame to segment")
    except FactorkitError:
        raise
    except OSError as error:  # a clip reports its own as DataError; those of the encoder derive from OSError too
        raise WriteError(
            f"{out}: cannot be written: {error.strerror or error}. Free some space, mend the permissions, or give "
            "another out="
        ) from error
    return VideoSegments(out, count, clip.rate, (areas / count).tolist(), changed / max(1, count - 1))


def _even(frame: np.ndarray) -> np.ndarray:
    """The codec halves colours, so sides must be even: the last row or column is doubled where they are not."""
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
