"""Rendered frames as a folder of PNG files, a GIF or a video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from factorkit.utils.errors import ConfigError
from factorkit.utils.images import images_to_pixels
from factorkit.utils.output_record import OutputRecord, check_file, writing_file


def check_frames(path: Path, source: str, *, overwrite: bool = False) -> None:
    """Raise the errors of :func:`write_frames` that are known before there are images."""
    if path.suffix.lower() not in ("", ".gif", ".mp4"):
        raise ConfigError(f"{path}: frames are written to a .gif, an .mp4 or a folder")
    if path.suffix:
        check_file(path, source, overwrite=overwrite)
    else:
        OutputRecord(path, overwrite=overwrite).check(["0000.png"], source)


def write_frames(
    path: Path, images: Tensor | Sequence[Tensor], rate: int = 30, *, source: str = "render", overwrite: bool = False
) -> Path:
    """Write images [B, 3, H, W] in [0, 1] to ``path``: .gif, .mp4, or without a suffix a folder of PNG files.

    Args:
        source: identifies the scene; files that were written for another one are not replaced.
        overwrite: replace them, and files of another origin, as well.

    Raises:
        WriteError: a file of another origin is in the way.
        ConfigError: another suffix, or the packages that write videos are missing.
    """
    check_frames(path, source, overwrite=overwrite)
    frames, suffix = [images_to_pixels(image[None])[0] for image in images], path.suffix.lower()
    if suffix and len({frame.shape for frame in frames}) > 1:
        raise ConfigError(f"{path}: the images have several sizes; write them to a folder, or give size= (--size)")
    if suffix == "":
        with OutputRecord(path, overwrite=overwrite) as record:
            record.write({f"{i:04d}.png": Image.fromarray(frame).save for i, frame in enumerate(frames)}, source)
        return path
    with writing_file(path, source, overwrite=overwrite) as temporary:
        if suffix == ".gif":
            first, *rest = (Image.fromarray(frame) for frame in frames)
            first.save(temporary, save_all=True, append_images=rest, duration=round(1000 / rate), loop=0)
        else:
            _write_video(temporary, np.stack(frames), rate)
    return path


def _write_video(path: Path, frames: np.ndarray, rate: int) -> None:
    try:
        import imageio.v3 as imageio

        even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # as the codec's chroma requires
        imageio.imwrite(path, even, plugin="pyav", codec="libx264", fps=rate)
    except ImportError as error:
        cure = "`pip install factorkit[video]` installs the encoder; a .gif needs nothing"
        raise ConfigError(f"{path}: {error}. {cure}") from error
