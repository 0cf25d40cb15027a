"""Images of a scene without cameras: a folder, anything else with images, or the frames of a video."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from factorkit.data.decode import to_float
from factorkit.data.files import fold_stem
from factorkit.data.layouts.image_mask_folders import find_image_and_mask_folders
from factorkit.data.masks import IGNORED_BEGINNING, MASK_KEYS, ignored_stem, match_masks, to_opacity
from factorkit.data.open import open_source
from factorkit.data.sources import Source
from factorkit.data.video import read_video_frames
from factorkit.data.views.cameras import IntrinsicsFunction, make_intrinsics
from factorkit.data.views.loading import LazyView, SceneSettings, Shot
from factorkit.data.views.splits import select_split, split_every_eighth
from factorkit.data.views.views import resize_area, target_size
from factorkit.utils.errors import format_count
from factorkit.utils.images import uint8_to_unit

MAX_VIDEO_FRAMES = 120  # taken from longer videos, evenly spaced: neighbouring frames hardly differ
DEFAULT_FOV = 50.0  # degrees along the longer side
EXIF_IFD, EXIF_FOCAL_LENGTH_35MM = 0x8769, 0xA405  # EXIF 2.3, tables 3 and 4
EXIF_TIME, EXIF_TIME_FRACTION = 0x9003, 0x9291  # DateTimeOriginal, SubSecTimeOriginal
FILM_DIAGONAL = math.hypot(36.0, 24.0)  # mm, of 35 mm film


def read_images(
    source: Any, split: str | None, masks: Any, fov: float | None, default_fov: float = DEFAULT_FOV
) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split: by folders such as train/ and test/ in their names, else every 8th is for testing.

    A folder with images/ and masks/ is read with its masks. Images without a mask are left out. Where instant-ngp's
    `dynamic_mask_x.png` is not 0, x.jpg is not scored.

    Raises:
        DataError: as :func:`factorkit.data.open_source` and :func:`factorkit.data.masks.match_masks`.
    """
    ignored_of: dict[str, int] = {}
    ignored, notes = None, tuple[str, ...]()
    if (folders := find_image_and_mask_folders(source)) is not None:
        source, ignored = folders.images, folders.ignored
        masks = folders.masks if masks is None else masks
    masks = None if isinstance(masks, str) and masks == "none" else masks
    if ignored is not None:
        ignored_of = {ignored_stem(name) or "": j for j, name in enumerate(ignored.names)}
        notes = (f"{format_count(len(ignored), 'mask')} of moving parts ({IGNORED_BEGINNING}x.png): not scored there.",)
    images = open_source(source)
    mask_source = None if masks is None else open_source(masks, keys=MASK_KEYS)
    pairs = [(i, 0) for i in range(len(images))] if mask_source is None else match_masks(images, mask_source)
    views = []
    rows, more = select_split([images.names[i] for i, _ in pairs], split)
    for i, j in (pairs[k] for k in rows):
        read_exif = cache(partial(_read_exif, images, i))
        intrinsics = _fov_intrinsics(fov) if fov is not None else partial(_exif_intrinsics, read_exif, default_fov)
        read_mask = None if mask_source is None else partial(_read_opacity, mask_source, j)
        moving = ignored_of.get(fold_stem(images.names[i]))
        read_loss_mask = None if ignored is None or moving is None else partial(_read_scored, ignored, moving)
        read_image = partial(_read_float, images, i)
        read_shot = partial(_read_shot, read_exif, fov)
        views.append(
            LazyView(images.names[i], read_image, intrinsics, None, read_mask, None, read_loss_mask, read_shot)
        )
    return views, SceneSettings(images.names, notes=notes + more)


def read_video(
    path: Path, split: str | None, resolution: int | None, fov: float | None, default_fov: float = DEFAULT_FOV
) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split; every 8th of at most 120 evenly spaced frames is for testing.

    Raises:
        DataError: the video cannot be decoded, or has no frames.
        ConfigError: the video decoder is not installed.
    """
    # Decodes the file twice: the number of frames in the header is often missing or wrong.
    count = sum(1 for _ in read_video_frames(path))
    selected = set(np.linspace(0, count - 1, min(count, MAX_VIDEO_FRAMES)).round().astype(int).tolist())
    frames = [(i, _reduce(frame, resolution)) for i, frame in enumerate(read_video_frames(path)) if i in selected]
    digits = len(str(frames[-1][0]))
    intrinsics, read_shot = (
        _fov_intrinsics(default_fov if fov is None else fov),
        partial(Shot, has_focal=fov is not None),
    )
    views = [
        LazyView(f"{path.stem}_{i:0{digits}d}.png", partial(_frame_to_float, frame), intrinsics, read_shot=read_shot)
        for i, frame in frames
    ]
    names = [view.name for view in views]
    return [views[i] for i in split_every_eighth(len(views), split)], SceneSettings(names)


def _read_float(images: Source, index: int) -> np.ndarray:
    return to_float(images.decode(index), images.names[index], depths=images.depths)


def _read_opacity(masks: Source, index: int) -> np.ndarray:
    return to_opacity(masks.decode(index), masks.names[index])


def _read_scored(ignored: Source, index: int) -> np.ndarray:
    return (_read_opacity(ignored, index) == 0).astype(np.float32)


def _frame_to_float(frame: np.ndarray) -> np.ndarray:
    return uint8_to_unit(frame)


def _reduce(frame: np.ndarray, resolution: int | None) -> np.ndarray:
    """Reduce a frame uint8 [H, W, 3] to the resolution, so that all frames fit into memory."""
    height, width = frame.shape[:2]
    if resolution is None or resolution >= max(height, width):
        return frame
    reduced = resize_area(torch.from_numpy(frame).permute(2, 0, 1).float(), *target_size(resolution, height, width))
    return reduced.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def fit_masks(view: LazyView) -> LazyView:
    """Return a frame whose masks, made for the whole frame, have the size that it was reduced to."""

    def fitted(read: Callable[[], np.ndarray]) -> np.ndarray:
        return resize_area(torch.from_numpy(read()), *view.read_image().shape[:2]).clamp(0, 1).numpy()

    read_mask, read_loss_mask = (
        None if read is None else partial(fitted, read) for read in (view.read_mask, view.read_loss_mask)
    )
    return replace(view, read_mask=read_mask, read_loss_mask=read_loss_mask)


def _fov_intrinsics(fov: float) -> IntrinsicsFunction:
    """Return K for square pixels and a field of view in degrees along the longer side."""

    def intrinsics(height: int, width: int) -> np.ndarray:
        focal = max(height, width) / (2 * math.tan(math.radians(fov) / 2))
        return make_intrinsics(focal, focal, width / 2, height / 2)

    return intrinsics


class _Exif(NamedTuple):
    """Focal length in mm of 35 mm film and the time in seconds, None where they are not stored."""

    focal: float | None
    time: float | None


def _read_exif(source: Source, index: int) -> _Exif:
    values, time = source.decode(index).getexif().get_ifd(EXIF_IFD), None
    with suppress(ValueError):  # missing or malformed
        text = f"{values.get(EXIF_TIME)}".strip(" \0")
        time = datetime.strptime(text, "%Y:%m:%d %H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
        time += float(f"0.{values.get(EXIF_TIME_FRACTION, 0)}".strip(" \0"))
    return _Exif(float(values.get(EXIF_FOCAL_LENGTH_35MM) or 0) or None, time)


def _read_shot(read_exif: Callable[[], _Exif], fov: float | None) -> Shot:
    exif = read_exif()
    return Shot(fov is not None or exif.focal is not None, exif.time)


def _exif_intrinsics(read_exif: Callable[[], _Exif], default_fov: float, height: int, width: int) -> np.ndarray:
    """Return K from the EXIF focal length in 35 mm film (same diagonal field of view; EXIF 2.3, section 4.6.5)."""
    focal_35mm = read_exif().focal
    if focal_35mm is None:
        return _fov_intrinsics(default_fov)(height, width)
    focal = focal_35mm * math.hypot(height, width) / FILM_DIAGONAL
    return make_intrinsics(focal, focal, width / 2, height / 2)
