"""Video files: their frames, upright, and how fast they follow each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from factorkit.data.source_base import shown
from factorkit.errors import ConfigError, DataError

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
            f"{shown(str(path))}: videos need imageio and av: pip install 'factorkit[video]' ({error})"
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
        raise DataError(f"{shown(str(path))}: a video without a single frame")


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
            raise DataError(f"{shown(str(path))}: this video cannot be decoded: it has no pictures")
        yield streams[0]


def _upright(frame: np.ndarray, degrees: float) -> np.ndarray:
    """The frame turned counterclockwise by the nearest quarter."""
    return np.ascontiguousarray(np.rot90(frame, round(degrees / 90)))


def _undecodable(path: Path, error: Exception, after: int) -> DataError:
    where = f" after {after} frames" if after else ""
    return DataError(
        f"{shown(str(path))}: this video cannot be decoded{where}: {error}. Convert it, or give its frames as pictures "
        "in a folder."
    )
