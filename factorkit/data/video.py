"""Frames of a moving picture, one after the other: of a video or an animated picture, or the pictures of a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from factorkit.data.decode import to_rgb
from factorkit.data.open import open_source
from factorkit.data.sources import Source, escape_name, natural_sort_key
from factorkit.utils.errors import ConfigError, DataError

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # formats whose frames share one canvas
ASSUMED_RATE = 24.0  # frames a second of pictures in a folder, and of videos that do not say


class Video(NamedTuple):
    """A moving picture.

    Attributes:
        name: of its file or folder, without suffix.
        rate: frames a second, on average.
        length: how many frames there are, where that is known before they are read.
        frames: uint8 [H, W, 3], all of one size, decoded as they are asked for; once.
    """

    name: str
    rate: float
    length: int | None
    frames: Iterator[np.ndarray]


def open_video(source: Any) -> Video:
    """The frames of a video, an animated GIF, WebP, PNG or AVIF, or of whatever else
    :func:`factorkit.data.open_source` takes.

    Pictures of a folder or archive come in the order of their names, numbers in them by value (2 before 10); those of
    a list in its own.

    While frames are read DataError is raised by what cannot be decoded and by a frame of another size than the first.

    Raises:
        DataError: no such file, or nothing in it that is a picture.
        ConfigError: the decoder of videos is not installed.
    """
    path = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    if path is not None and is_video(path):
        if not path.is_file():
            raise DataError(f"{escape_name(str(path))}: there is no such video. Check the path.")
        return Video(path.stem, video_rate(path) or ASSUMED_RATE, None, _of_one_size(video_frames(path), path.name))
    pictures = source if isinstance(source, Source) else open_source(source)
    name = path.stem if path is not None else "clip"
    if len(pictures) == 1 and (image := _animated(pictures, source, name)) is not None:
        return Video(name, _rate(image, name), image.n_frames, _of_one_size(_frames(image, name), name))
    order: Sequence[int] = range(len(pictures))
    if path is not None:
        order = sorted(order, key=lambda i: natural_sort_key(pictures.names[i]))
    read = (np.asarray(pictures.read(i)) for i in order)
    return Video(name, ASSUMED_RATE, len(pictures), _of_one_size(read, name))


def _animated(pictures: Source, source: Any, name: str) -> Any:
    """The only picture, as stored, if it is animated; None if not."""
    image = source if isinstance(source, Image.Image) else pictures.decode(0)  # copies hold one frame
    try:
        return image if image.format in ANIMATED and getattr(image, "n_frames", 1) > 1 else None
    except Exception as error:  # a GIF's frames are counted by going through the file
        raise DataError(f"{escape_name(name)}: its frames cannot be counted: {error}. Replace the file.") from error


def _rate(image: Any, name: str) -> float:
    """Frames a second on average, by the time that each is said to be shown."""
    milliseconds = 0.0
    for _ in _frames(image, name):
        milliseconds += image.info.get("duration") or 0
    return 1000 * image.n_frames / milliseconds if milliseconds > 0 else ASSUMED_RATE


def _frames(image: Any, name: str) -> Iterator[np.ndarray]:
    for number in range(image.n_frames):
        try:
            image.seek(number)
            frame = np.asarray(to_rgb(image))
        except Exception as error:  # on damaged files Pillow raises OSError, EOFError, SyntaxError, ValueError, ...
            raise DataError(
                f"{escape_name(name)}: frame {number} cannot be decoded: {error}. Replace the file."
            ) from error
        yield frame


def _of_one_size(frames: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    first = None
    for number, frame in enumerate(frames):
        first = frame.shape if first is None else first
        if frame.shape != first:
            (height, width), (old_height, old_width) = frame.shape[:2], first[:2]
            raise DataError(
                f"{escape_name(name)}: frame {number} has {width} x {height} pixels, the first {old_width} x {old_height}. "
                "Give the pictures of one clip alone, all of one size."
            )
        yield frame


VIDEO_SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm".split())


def is_video(path: Path) -> bool:
    """Whether the suffix is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def video_libraries(path: Path) -> tuple[ModuleType, ModuleType]:
    """PyAV, which decodes, and imageio, which writes with it. Raises ConfigError where either is missing."""
    try:
        import av
        import imageio.v3 as imageio
        from imageio.plugins.pyav import PyAVPlugin  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{escape_name(str(path))}: videos need imageio and av: pip install 'factorkit[video]' ({error})"
        ) from error
    return av, imageio


def video_rate(path: Path) -> float | None:
    """Frames a second on average, so that as many of them last as long, be they evenly spaced or not; None: not said.

    Raises:
        DataError: a file that is no video.
        ConfigError: PyAV or imageio is not installed.
    """
    with _opened(path) as stream:
        rate = stream.average_rate or stream.guessed_rate
        return float(rate) if rate and rate > 0 else None


def video_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames, uint8 [H, W, 3], one after the other, turned as the file says that they are to be shown.

    Raises:
        DataError: a video that does not decode to its end, or holds no frame.
        ConfigError: PyAV or imageio is not installed.
    """
    count = 0
    with _opened(path) as stream:
        frames = stream.container.decode(stream)
        while True:
            try:
                frame = next(frames, None)
                picture = None if frame is None else _upright(frame.to_ndarray(format="rgb24"), frame.rotation)
            except Exception as error:  # av raises errors of its own, and OSError
                raise _undecodable(path, error, count) from error
            if picture is None:
                break
            yield picture
            count += 1
    if not count:
        raise DataError(f"{escape_name(str(path))}: a video without a single frame")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The stream of pictures in a file."""
    av, _ = video_libraries(path)
    with contextlib.ExitStack() as stack:
        try:
            # by handle: of a path, or of an address in it, av would choose the protocol
            container = stack.enter_context(av.open(stack.enter_context(open(path, "rb"))))
            streams = container.streams.video
        except Exception as error:
            raise _undecodable(path, error, 0) from error
        if not streams:
            raise DataError(f"{escape_name(str(path))}: this video cannot be decoded: it has no pictures")
        yield streams[0]


def _upright(frame: np.ndarray, degrees: float) -> np.ndarray:
    """The frame turned counterclockwise by the nearest quarter."""
    return np.ascontiguousarray(np.rot90(frame, round(degrees / 90)))


def _undecodable(path: Path, error: Exception, after: int) -> DataError:
    where = f" after {after} frames" if after else ""
    return DataError(
        f"{escape_name(str(path))}: this video cannot be decoded{where}: {error}. Convert it, or give its frames as pictures "
        "in a folder."
    )
