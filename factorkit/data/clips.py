"""Frames of a moving picture, one after the other: of a video file, or a folder's pictures in the order of names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from factorkit.data.source_base import Source, shown
from factorkit.data.sources import open_source
from factorkit.data.videos import is_video, video_frames, video_rate
from factorkit.errors import DataError

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
    """The frames of a video file, or of whatever else :func:`factorkit.data.open_source` takes, in its order.

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
    read = (np.asarray(pictures.read(i)) for i in range(len(pictures)))
    return Clip(name, ASSUMED_RATE, len(pictures), _of_one_size(read, name))


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
