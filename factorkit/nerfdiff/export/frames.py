"""Rendered frames as a folder of PNG files, a GIF or a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from factorkit.utils.errors import ConfigError
from factorkit.utils.images import images_to_pixels


def write_frames(path: Path, images: Tensor, rate: int = 30) -> Path:
    """Write images [B, 3, H, W] in [0, 1] to ``path``: .gif, .mp4, or without a suffix a folder of PNG files.

    Args:
        path: created with its parents.
        images: the frames.
        rate: frames per second.

    Raises:
        ConfigError: another suffix, or the packages that write videos are missing.
    """
    frames, suffix = images_to_pixels(images), path.suffix.lower()
    if suffix not in ("", ".gif", ".mp4"):
        raise ConfigError(f"{path}: frames are written to a .gif, an .mp4 or a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == "":
        path.mkdir(exist_ok=True)
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(path / f"{i:04d}.png")
    elif suffix == ".gif":
        first, *rest = (Image.fromarray(frame) for frame in frames)
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / rate), loop=0)
    else:
        _write_video(path, frames, rate)
    return path


def _write_video(path: Path, frames: np.ndarray, rate: int) -> None:
    try:
        import imageio.v3 as imageio

        even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # as the codec's chroma requires
        imageio.imwrite(path, even, plugin="pyav", codec="libx264", fps=rate)
    except ImportError as error:
        cure = "`pip install factorkit[video]` installs the encoder; a .gif needs nothing"
        raise ConfigError(f"{path}: {error}. {cure}") from error
