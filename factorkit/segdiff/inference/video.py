"""Segmentation of a video frame by frame, in memory that does not grow with its length.

Regions are the model's own, so a region has the same number in every frame. What remains is flicker, which is reduced
in two ways: all frames get the same noise (:func:`~factorkit.segdiff.inference.segment.add_noise`), and frames and
masks are averaged over time where the image does not move.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from factorkit.data.video import Video, import_video_libraries
from factorkit.report.image_grid import overlay_regions
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.inference.segment import (
    PreparedImage,
    describe_out_of_memory,
    hard_labels,
    predict_tiled,
    prepare_image,
    upsample_masks,
)
from factorkit.utils.errors import (
    ConfigError,
    DataError,
    FactorkitError,
    OutOfMemoryError,
    WriteError,
    is_out_of_memory,
)
from factorkit.utils.output_record import check_file, writing_file

MAX_FRAMES_PER_BATCH, MAX_PIXELS_PER_BATCH = 16, 1 << 24
STILL_COLOUR_CHANGE = 0.03  # in [0, 1]: larger changes of the mean colour count as motion
CODEC, SOUND_CODEC = "libx264", "aac"
TIME_TOLERANCE = Fraction(1, 1000)  # seconds: Matroska rounds the times of a constant rate to milliseconds
TIME_STEPS = 90_000  # presentation times per second, as in MPEG: a multiple of all usual rates
MAX_RATE_DENOMINATOR = 1001  # of 30000/1001 and the like
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
        predict: maps images [N, 3, h, w] in [-1, 1] to masks [N, K, h, w].
        size: as in :meth:`factorkit.SegdiffRun.segment`.
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


def check_video_output(video: Any, out: Path, overwrite: bool) -> None:
    """Raise ConfigError for another suffix than a video's, WriteError if ``out`` must not be replaced."""
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{out}: give a name with one of the suffixes {', '.join(SUFFIXES)}")
    check_file(out, _describe_input(video), overwrite=overwrite, inputs=_list_paths(video))


def _list_paths(video: Any) -> list[Path]:
    return [Path(video)] if isinstance(video, (str, os.PathLike)) else []


def _describe_input(video: Any) -> str:
    paths = _list_paths(video)
    return f"segment --video: {os.path.realpath(paths[0]) if paths else type(video).__name__}"


def write_video(
    video: Video,
    segmented: Iterator[tuple[np.ndarray, np.ndarray]],
    out: Path,
    num_regions: int,
    progress: bool,
    *,
    source: Any = None,
    overwrite: bool = False,
) -> VideoSegments:
    """Write a video with its regions laid over it to ``out``, atomically, with the times and the sound of the input.

    Args:
        segmented: its frames with labels, as from :func:`segment_frames`.
        out: .mp4, .mkv or .mov.
        num_regions: K.
        source: what the user gave as the video.
        overwrite: also replace a file that was not written for this video.

    Raises:
        ConfigError: another suffix, or PyAV is not installed.
        DataError: a video without frames, or one that cannot be decoded to its end.
        WriteError: ``out`` must not be replaced, the disk is full, or ``out`` cannot be written.
    """
    check_video_output(source, out, overwrite)
    import_video_libraries(out)
    areas, changed, count, previous = np.zeros(num_regions), 0.0, 0, None
    bar = tqdm(segmented, total=video.length, desc="segmenting", unit="frame", disable=not progress)
    place: dict[str, Any] = {"overwrite": overwrite, "inputs": _list_paths(source)}
    try:
        with (
            bar,
            writing_file(out, _describe_input(source), **place) as temporary,
            closing(
                VideoWriter(temporary, Fraction(video.rate).limit_denominator(MAX_RATE_DENOMINATOR), video.path)
            ) as file,
        ):
            for frame, labels in bar:
                if previous is not None:
                    changed += float((labels != previous).mean())
                image = _pad_to_even(overlay_regions(frame, labels))
                file.write(image, video.times[count] if count < len(video.times) else None)
                areas += np.bincount(labels.ravel(), minlength=num_regions) / labels.size
                count, previous = count + 1, labels
            if not count:
                raise DataError(f"{video.name}: no frame to segment")
            file.finish()
    except FactorkitError:
        raise
    except OSError as error:  # of the encoder, whose errors derive from OSError too; a video raises DataError
        raise WriteError(
            f"{out}: cannot be written: {error.strerror or error}. Free some space, correct the permissions, or give "
            "another out="
        ) from error
    return VideoSegments(out, count, video.rate, (areas / count).tolist(), changed / max(1, count - 1))


class VideoWriter:
    """Encodes frames with their presentation times, and copies the sound of another file beside them.

    Args:
        rate: nominal frames per second; frames without a time follow each other at this rate.
        sound: a file whose sound is taken over; encoded anew only if the container cannot hold its codec.
    """

    def __init__(self, path: Path, rate: Fraction, sound: Path | None):
        import av

        self._av, self._rate, self._stack = av, rate, ExitStack()
        self._container = self._stack.enter_context(av.open(str(path), "w"))
        self._stream = cast(Any, self._container.add_stream(CODEC, rate=rate))
        self._stream.pix_fmt = "yuv420p"
        self._pts, self._count = -1, 0
        self._sounds: list[Any] = []  # iterators of [time in seconds, packets]
        if sound is not None:
            self._open_sound(sound)
        self._waiting = [next(packets, None) for packets in self._sounds]

    def write(self, image: np.ndarray, time: Fraction | None) -> None:
        """Encode a frame, uint8 [H, W, 3] with even sides, to be shown at ``time`` in seconds."""
        if not self._count:
            self._stream.height, self._stream.width = image.shape[:2]
            self._stream.codec_context.time_base = 1 / self._rate if time is None else Fraction(1, TIME_STEPS)
        base, even_time = self._stream.codec_context.time_base, self._count / self._rate
        if time is not None and abs(time - even_time) <= TIME_TOLERANCE:
            time = even_time
        self._count += 1
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self._pts = self._pts + 1 if time is None else max(self._pts + 1, round(time / base))  # strictly rising
        frame.pts, frame.time_base = self._pts, base
        self._copy_sound(float(self._pts * base))
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what is left. Without this the file is incomplete."""
        self._container.mux(self._stream.encode())
        self._copy_sound(math.inf)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def _open_sound(self, path: Path) -> None:
        for index in range(len(self._open_input(path).streams.audio)):
            stream = self._open_input(path).streams.audio[index]
            if self._can_hold(path, index):
                self._sounds.append(self._read_packets(stream, self._container.add_stream_from_template(stream)))
            else:
                layout = {1: "mono", 2: "stereo"}.get(stream.layout.nb_channels, stream.layout.name)  # may be unnamed
                encoder = self._container.add_stream(SOUND_CODEC, rate=stream.rate, layout=layout)
                self._sounds.append(self._encode_anew(stream, encoder))

    def _can_hold(self, path: Path, index: int) -> bool:
        """Return whether the container holds the codec of a sound: only writing a piece of it shows it."""
        try:
            stream = self._open_input(path).streams.audio[index]
            with self._av.open(io.BytesIO(), "w", format=self._container.format.name) as trial:
                packets = self._read_packets(stream, trial.add_stream_from_template(stream))
                trial.start_encoding()
                trial.mux(next(packets, (0, []))[1])
        except (self._av.FFmpegError, ValueError):
            return False
        return True

    def _open_input(self, path: Path) -> Any:
        return self._stack.enter_context(self._av.open(self._stack.enter_context(open(path, "rb"))))

    def _read_packets(self, stream: Any, target: Any) -> Iterator[tuple[float, list[Any]]]:
        with suppress(self._av.FFmpegError):  # the frames of a cut-off file end with an error of their own
            for packet in stream.container.demux(stream):
                if packet.dts is not None:
                    time = float(packet.dts * packet.time_base)
                    packet.stream = target
                    yield time, [packet]

    def _encode_anew(self, stream: Any, target: Any) -> Iterator[tuple[float, list[Any]]]:
        with suppress(self._av.FFmpegError):
            for frame in stream.container.decode(stream):
                yield frame.time or 0.0, target.encode(frame)
        yield math.inf, target.encode()

    def _copy_sound(self, until: float) -> None:
        """Write the sound up to a time: interleaved, so that neither the writer nor a player buffers the whole file."""
        for i, packets in enumerate(self._sounds):
            while (waiting := self._waiting[i]) is not None and waiting[0] <= until:
                self._container.mux(waiting[1])
                self._waiting[i] = next(packets, None)


def _pad_to_even(frame: np.ndarray) -> np.ndarray:
    """Repeat the last row or column of an odd side, because the codec halves the colour channels."""
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
