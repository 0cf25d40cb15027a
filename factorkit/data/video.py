"""Frames of videos: of a video file, an animated image, or the images of a folder."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from factorkit.data.decode import to_rgb
from factorkit.data.files import VIDEO_SUFFIXES, escape_name, natural_sort_key
from factorkit.data.open import open_source
from factorkit.data.sources import Source
from factorkit.utils.errors import ConfigError, DataError, format_count

ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")  # formats whose frames all have the same size
HEADERS_WITH_DURATION = ("mov", "matroska", "avi")  # formats of FFmpeg whose header has the duration
DURATION_TOLERANCE = 0.25  # seconds; headers count the last frame and the sound differently
DEFAULT_FRAME_RATE = 24.0  # frames per second of image folders, and of videos without a frame rate


class Video(NamedTuple):
    """Frames with their rate.

    Attributes:
        name: name of the file or folder, without suffix.
        rate: average number of frames per second.
        length: number of frames, if known before they are decoded.
        frames: uint8 [H, W, 3], all of one size, decoded on demand; can be iterated once.
        times: presentation time of each frame decoded so far, in seconds; empty if the rate is constant.
        path: the video file, which may have sound; None for images.
    """

    name: str
    rate: float
    length: int | None
    frames: Iterator[np.ndarray]
    times: Sequence[Fraction] = ()
    path: Path | None = None


def open_video(source: Any, *, partial: bool = False) -> Video:
    """Open a video, an animated GIF, WebP, PNG or AVIF, or anything else that `open_source` accepts.

    Images of a folder or archive are ordered by name, numbers by value (2 before 10); those of a list by position.
    Iterating the frames raises DataError for frames that cannot be decoded or differ in size from the first, and at the
    end of a file that is shorter than its header says.

    Args:
        source: see above.
        partial: read a video file as far as it goes, with a warning.

    Raises:
        DataError: no such file, or no images in it.
        ConfigError: the video decoder is not installed.
    """
    path = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    if path is not None and is_video(path):
        if not path.is_file():
            raise DataError(f"{escape_name(str(path))}: no such video. Check the path.")
        times: list[Fraction] = []
        frames = _check_sizes(read_video_frames(path, partial=partial, times=times), path.name)
        return Video(path.stem, read_video_rate(path) or DEFAULT_FRAME_RATE, None, frames, times, path)
    images = source if isinstance(source, Source) else open_source(source)
    name = path.stem if path is not None else "clip"
    if len(images) == 1 and (image := _open_animated(images, source, name)) is not None:
        durations = _read_durations(image, name)
        rate = len(durations) / float(sum(durations)) if sum(durations) > 0 else DEFAULT_FRAME_RATE
        is_uneven = len(set(durations[:-1])) > 1 and min(durations[:-1]) > 0
        times = [Fraction(0), *itertools.accumulate(durations[:-1])] if is_uneven else []
        frames = _check_sizes(_read_animated_frames(image, name), name)
        return Video(name, rate, image.n_frames, frames, times)
    order: Sequence[int] = range(len(images))
    if path is not None:
        order = sorted(order, key=lambda i: natural_sort_key(images.names[i]))
    decoded = (np.asarray(images.read(i)) for i in order)
    return Video(name, DEFAULT_FRAME_RATE, len(images), _check_sizes(decoded, name))


def is_video(path: Path) -> bool:
    """Return whether the path has the suffix of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def _open_animated(images: Source, source: Any, name: str) -> Any:
    """Return the only image if it is animated, else None."""
    image = source if isinstance(source, Image.Image) else images.decode(0)  # PillowSource.decode copies one frame only
    try:
        return image if image.format in ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1 else None
    except Exception as error:  # counting the frames of a GIF reads the whole file
        raise DataError(f"{escape_name(name)}: its frames cannot be counted: {error}. Replace the file.") from error


def _read_durations(image: Any, name: str) -> list[Fraction]:
    """Return the duration of each frame in seconds."""
    return [Fraction(image.info.get("duration") or 0) / 1000 for _ in _read_animated_frames(image, name)]


def _read_animated_frames(image: Any, name: str) -> Iterator[np.ndarray]:
    for number in range(image.n_frames):
        try:
            image.seek(number)
            frame = np.asarray(to_rgb(image))
        except Exception as error:  # on damaged files Pillow raises OSError, EOFError, SyntaxError, ValueError, ...
            raise DataError(
                f"{escape_name(name)}: frame {number} cannot be decoded: {error}. Replace the file."
            ) from error
        yield frame


def _check_sizes(frames: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    size = None
    for number, frame in enumerate(frames):
        size = frame.shape[:2] if size is None else size
        if frame.shape[:2] != size:
            raise DataError(
                f"{escape_name(name)}: frame {number} has {frame.shape[1]} x {frame.shape[0]} pixels, the first "
                f"{size[1]} x {size[0]}. All frames of a video must have one size."
            )
        yield frame


def import_video_libraries(path: Path) -> tuple[ModuleType, ModuleType]:
    """Import PyAV, which decodes videos, and imageio, which writes them; ConfigError if one is missing."""
    try:
        import av
        import imageio.v3 as imageio
        from imageio.plugins.pyav import PyAVPlugin  # noqa: F401  (checks that imageio finds PyAV)
    except ImportError as error:
        raise ConfigError(
            f"{escape_name(str(path))}: videos need imageio and av: pip install 'factorkit[video]' ({error})"
        ) from error
    return av, imageio


def read_video_rate(path: Path) -> float | None:
    """Return the average number of frames per second; None if the file does not define it.

    Raises:
        DataError: the file is not a video.
        ConfigError: PyAV or imageio is not installed.
    """
    with _open_stream(path) as stream:
        rate = stream.average_rate or stream.guessed_rate
        return float(rate) if rate and rate > 0 else None


def read_video_frames(
    path: Path, *, partial: bool = False, times: list[Fraction] | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames, uint8 [H, W, 3], with the rotation of the file applied.

    Args:
        partial: end with a warning, not with an error, where the file cannot be decoded or is cut off.
        times: receives the presentation time of each frame, in seconds.

    Raises:
        DataError: the video cannot be decoded to its end, ends before its header says so, or has no frames.
        ConfigError: PyAV or imageio is not installed.
    """
    count, time, end, problem = 0, Fraction(-1), Fraction(0), None
    with _open_stream(path) as stream:
        step = 1 / Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_FRAME_RATE)
        packets: Iterator[Any] = stream.container.demux()
        frames: list[Any] = []
        while True:
            try:
                while not frames:
                    packet = next(packets)  # an empty one of each stream comes last and flushes the decoder
                    if packet.pts is not None:
                        end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                    frames = packet.decode() if packet.stream is stream else []
                frame = frames.pop(0)
                image = _rotate(frame.to_ndarray(format="rgb24"), frame.rotation)
            except StopIteration:
                break
            except Exception as error:  # PyAV raises its own errors, and OSError
                with contextlib.suppress(Exception):  # frames that the decoder holds back
                    frames = stream.codec_context.decode(None) if partial and problem is None else []
                if not partial or (not count and not frames):
                    raise _decode_error(path, error, count) from error
                packets, problem = iter(()), f"cannot be decoded to its end ({error})"
                continue
            time = time + step if count else Fraction(0)
            if frame.pts is not None:
                time = frame.pts * stream.time_base
            if times is not None:
                times.append(time)
            yield image
            count += 1
        missing = _missing_seconds(stream, max(end, time + step), count, float(step))
    if not count:
        raise DataError(f"{escape_name(str(path))}: the video has no frames")
    if problem is None and missing > 0:
        problem = f"ends {missing:.2f} s before the end that its header names, after {format_count(count, 'frame')}"
        if not partial:
            raise DataError(
                f"{escape_name(str(path))}: the video {problem}. Copy it again; for a single video, --partial "
                "(partial=True) uses what there is"
            )
    if problem is not None:
        warnings.warn(f"{escape_name(str(path))}: the video {problem}; the rest is left out", UserWarning, stacklevel=2)


def _missing_seconds(stream: Any, end: Fraction, count: int, step: float) -> float:
    """Return how many seconds of a file are missing according to its header; 0 if all is there or nothing is known."""
    container = stream.container
    if container.duration is None or not any(name in container.format.name for name in HEADERS_WITH_DURATION):
        return 0.0
    start = min((s.start_time * s.time_base for s in container.streams if s.start_time is not None), default=0)
    missing = float(start) + container.duration / 1e6 - float(end)
    tolerance = 0.75 * step if stream.frames > count else max(2 * step, DURATION_TOLERANCE)
    return missing if missing > tolerance else 0.0


@contextlib.contextmanager
def _open_stream(path: Path) -> Iterator[Any]:
    """Open the first video stream of a file."""
    av, _ = import_video_libraries(path)
    with contextlib.ExitStack() as stack:
        try:
            # As a file object: given a path, PyAV would accept URLs and other protocols.
            container = stack.enter_context(av.open(stack.enter_context(open(path, "rb"))))
            streams = container.streams.video
        except Exception as error:
            raise _decode_error(path, error, 0) from error
        if not streams:
            raise DataError(
                f"{escape_name(str(path))}: this video cannot be decoded: no images in it. If it was cut "
                "off, copy it again"
            )
        yield streams[0]


def _rotate(frame: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate a frame counterclockwise, to the nearest quarter turn."""
    return np.ascontiguousarray(np.rot90(frame, round(degrees / 90)))


def _decode_error(path: Path, error: Exception, num_decoded: int) -> DataError:
    position = f" after {format_count(num_decoded, 'frame')}" if num_decoded else ""
    return DataError(
        f"{escape_name(str(path))}: this video cannot be decoded{position}: {error}. Convert it, or give its frames as "
        "images in a folder."
    )
