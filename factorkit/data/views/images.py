"""Pictures of a scene without any cameras: a folder, whatever else holds images, or the frames of a video."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from factorkit.data.masks import MASK_KEYS, match_masks
from factorkit.data.open import open_source
from factorkit.data.sources import Source
from factorkit.data.video import video_frames
from factorkit.data.views.loading import Shot, every_eighth, opacity, pixels
from factorkit.data.views.views import resize_area, target_size
from factorkit.utils.images import uint8_to_unit

VIDEO_FRAMES = 120  # of a longer video so many are taken, evenly spread: neighbouring frames hardly differ
ASSUMED_FOV = 50.0  # degrees along the longer side
EXIF_IFD, FOCAL_LENGTH_35MM = 0x8769, 0xA405
FILM_DIAGONAL = math.hypot(36.0, 24.0)  # mm


def read_pictures(source: Any, split: str | None, masks: Any, fov: float | None) -> tuple[list[Shot], dict[str, Any]]:
    """The shots of a split (every 8th is for the test) and their settings.

    A folder that holds images/ and masks/ is a set with masks; pictures without a mask are left out.

    Raises:
        DataError: as :func:`factorkit.data.open_source` and :func:`factorkit.data.masks.match_masks` do.
    """
    if masks is None and isinstance(source, Path) and (source / "images").is_dir() and (source / "masks").is_dir():
        source, masks = source / "images", source / "masks"
    pictures = open_source(source)
    if masks is None:
        pairs: list[tuple[int, int | None]] = [(i, None) for i in range(len(pictures))]
    else:
        mask_source = open_source(masks, keys=MASK_KEYS)
        pairs = [*match_masks(pictures, mask_source)]
    shots = []
    for at in every_eighth(len(pairs), split):
        i, j = pairs[at]
        shots.append(
            Shot(
                pictures.names[i],
                partial(_read, pictures, i, pixels),
                _assumed(fov) if fov is not None else _from_exif(pictures, i),
                mask=None if j is None else partial(_read, mask_source, j, opacity),
            )
        )
    return shots, {"layout": "object"}


def read_video(
    path: Path, split: str | None, resolution: int | None, fov: float | None
) -> tuple[list[Shot], dict[str, Any]]:
    """The shots of a split (every 8th is for the test) among at most 120 frames evenly spread, and their settings.

    Raises:
        DataError: a video that does not decode, or holds no frame.
        ConfigError: the decoder of videos is not installed.
    """
    # Twice through the file: what it says of its length is often missing or wrong.
    count = sum(1 for _ in video_frames(path))
    wanted = set(np.linspace(0, count - 1, min(count, VIDEO_FRAMES)).round().astype(int).tolist())
    frames = [(i, _reduced(frame, resolution)) for i, frame in enumerate(video_frames(path)) if i in wanted]
    digits = len(str(frames[-1][0]))
    shots = [
        Shot(f"{path.stem}_{frames[i][0]:0{digits}d}.png", partial(_as_float, frames[i][1]), _assumed(fov))
        for i in every_eighth(len(frames), split)
    ]
    return shots, {"layout": "object"}


def _read(source: Source, index: int, convert: Callable[[Image.Image, str], np.ndarray]) -> np.ndarray:
    return convert(source.decode(index), source.names[index])


def _reduced(frame: np.ndarray, resolution: int | None) -> np.ndarray:
    """A frame uint8 [H, W, 3] not much larger than needed, so that a long video stays small in memory."""
    height, width = frame.shape[:2]
    if resolution is None or resolution >= max(height, width):
        return frame
    smaller = resize_area(torch.from_numpy(frame).permute(2, 0, 1).float(), *target_size(resolution, height, width))
    return smaller.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _as_float(frame: np.ndarray) -> np.ndarray:
    return uint8_to_unit(frame)


def _assumed(fov: float | None) -> Callable[[int, int], np.ndarray]:
    """K of a camera with square pixels that sees this angle, in degrees, along its longer side."""

    def at(height: int, width: int) -> np.ndarray:
        return _centred(max(height, width) / (2 * math.tan(math.radians(fov or ASSUMED_FOV) / 2)), height, width)

    return at


def _from_exif(source: Source, index: int) -> Callable[[int, int], np.ndarray]:
    """K from the focal length that a camera of 35 mm film with the same diagonal view would have (EXIF 2.3, 4.6.5)."""

    def at(height: int, width: int) -> np.ndarray:
        focal = source.decode(index).getexif().get_ifd(EXIF_IFD).get(FOCAL_LENGTH_35MM)
        if not focal:
            return _assumed(None)(height, width)
        return _centred(float(focal) * math.hypot(height, width) / FILM_DIAGONAL, height, width)

    return at


def _centred(focal: float, height: int, width: int) -> np.ndarray:
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
