"""Frames of a moving picture, one after the other: of a video or an animated picture, or the pictures of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from factorkit.data.images import to_rgb
from factorkit.data.source_base import Source, natural, shown
from factorkit.data.sources import open_source
from factorkit.data.videos import is_video, video_frames, video_rate
from factorkit.errors import DataError

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # formats whose frames share one canvas
ASSUMED_RATE = 24.0  # frames a second of pictures in a folder, and of videos that do not say


class Clip(NamedTuple):
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


def open_clip(source: Any) -> Clip:
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
            raise DataError(f"{shown(str(path))}: there is no such video. Check the path.")
        return Clip(path.stem, video_rate(path) or ASSUMED_RATE, None, _of_one_size(video_frames(path), path.name))
    pictures = source if isinstance(source, Source) else open_source(source)
    name = path.stem if path is not None else "clip"
    if len(pictures) == 1 and (image := _animated(pictures, source, name)) is not None:
        return Clip(name, _rate(image, name), image.n_frames, _of_one_size(_frames(image, name), name))
    order: Sequence[int] = range(len(pictures))
    if path is not None:
        order = sorted(order, key=lambda i: natural(pictures.names[i]))
    read = (np.asarray(pictures.read(i)) for i in order)
    return Clip(name, ASSUMED_RATE, len(pictures), _of_one_size(read, name))


def _animated(pictures: Source, source: Any, name: str) -> Any:
    """The only picture, as stored, if it is animated; None if not."""
    image = source if isinstance(source, Image.Image) else pictures.decode(0)  # copies hold one frame
    try:
        return image if image.format in ANIMATED and getattr(image, "n_frames", 1) > 1 else None
    except Exception as error:  # a GIF's frames are counted by going through the file
        raise DataError(f"{shown(name)}: its frames cannot be counted: {error}. Replace the file.") from error


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
            raise DataError(f"{shown(name)}: frame {number} cannot be decoded: {error}. Replace the file.") from error
        yield frame


def _of_one_size(frames: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    first = None
    for number, frame in enumerate(frames):
        first = frame.shape if first is None else first
        if frame.shape != first:
            (height, width), (old_height, old_width) = frame.shape[:2], first[:2]
            raise DataError(
                f"{shown(name)}: frame {number} has {width} x {height} pixels, the first {old_width} x {old_height}. "
                "Give the pictures of one clip alone, all of one size."
            )
        yield frame
