"""What readers of views find, and its way into `Views`: decoded in parallel, undistorted, reduced, composited."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from factorkit.data.decode import ImageDecodeError, to_rgb
from factorkit.data.sources import FileSource
from factorkit.data.views.cameras import Distortion, undistort
from factorkit.data.views.views import SceneLayout, Views, make_background, resize_area, target_size
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import uint8_to_unit

BORDER_SHARE, BORDER_TOLERANCE = 0.9, 2 / 255
MASK_RANGES = (1, 255, 65535)


@dataclass(frozen=True)
class Shot:
    """One view as a reader found it, not yet decoded.

    Attributes:
        name: what messages and exports call it.
        picture: reads it: float32 [H, W, 3], or [H, W, 4] with straight (not premultiplied) opacity last, in [0, 1].
        intrinsics: K [3, 3] of a picture of this height and width.
        pose: [4, 4] or None.
        mask: reads the opacity, float32 [H, W]; it takes the place of the picture's own.
        distortion: what the lens does to straight lines; taken out.
    """

    name: str
    picture: Callable[[], np.ndarray]
    intrinsics: Callable[[int, int], np.ndarray]
    pose: np.ndarray | None = None
    mask: Callable[[], np.ndarray] | None = None
    distortion: Distortion | None = None


def load(
    shots: Sequence[Shot],
    *,
    layout: SceneLayout,
    near: float | None = None,
    far: float | None = None,
    resolution: int | None = None,
    background: str | Sequence[float] | None = "white",
    seed: int = 0,
) -> Views:
    """Decode the shots and put them together; see :func:`factorkit.data.open_views` for the arguments.

    Raises:
        DataError: a picture that cannot be decoded, pictures of different sizes, and what `Views` refuses.
        ConfigError: a resolution beyond the pictures', pictures with opacity and no background to put them over.
    """

    if not shots:
        raise DataError("no view is left: the split that was asked for is empty")
    cut_out = background is not None

    def one(shot: Shot) -> tuple[tuple[int, int], Tensor, Tensor | None, Tensor]:
        return _decode(shot, resolution, cut_out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes, colors, opacities, intrinsics = zip(*pool.map(one, shots), strict=True)
    names = [shot.name for shot in shots]
    for name, size in zip(names, sizes, strict=True):
        if size != sizes[0]:
            raise DataError(
                f"{name} is {size[1]} x {size[0]} pixels, but {names[0]} is {sizes[0][1]} x {sizes[0][0]}: the views "
                "of a scene need one size. Crop or resize them, or leave the odd ones out."
            )
    images = torch.stack(colors)
    masks, color = None, border_color(images)
    if any(opacity is not None for opacity in opacities):
        masks, color = torch.stack([torch.ones_like(images[0, :1]) if x is None else x for x in opacities]), None
        if background is not None:
            behind, color = make_background(background, images.shape, seed)
            images = images + (1 - masks) * behind
    poses = [shot.pose for shot in shots if shot.pose is not None]
    return Views(
        images=images.clamp(0, 1),
        names=names,
        intrinsics=torch.stack(intrinsics),
        masks=masks,
        poses=torch.from_numpy(np.stack(poses)).float() if len(poses) == len(shots) else None,
        near=near,
        far=far,
        layout=layout,
        background=color,
    )


def picture_file(path: Path) -> Callable[[], np.ndarray]:
    """Reads an image file with a camera as :class:`Shot` wants it: as stored, whatever its EXIF orientation, since the
    cameras of nerfstudio and COLMAP are of stored pixels; ImageDecodeError or DataError where it cannot be decoded or read.
    """
    return lambda: pixels(FileSource(path.parent, [path.name]).decode(0), path.name, upright=False)


def mask_file(path: Path) -> Callable[[], np.ndarray]:
    """Reads the mask of a picture with a camera, as stored like the picture; see `opacity`."""
    return lambda: opacity(FileSource(path.parent, [path.name]).decode(0), path.name, upright=False)


def pixels(image: Image.Image, name: str, upright: bool = True) -> np.ndarray:
    """A picture float32 [H, W, 3], or [H, W, 4] where any of it is transparent; upright by its EXIF orientation, or as
    stored."""
    try:
        if image.has_transparency_data:
            found = np.asarray((ImageOps.exif_transpose(image) if upright else image).convert("RGBA"))
            found = found if found[..., 3].min() < 255 else found[..., :3]
        else:
            found = np.asarray(to_rgb(image, upright))
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageDecodeError(f"{name}: cannot be decoded: {error}") from error
    return uint8_to_unit(found)


def opacity(image: Image.Image, name: str, upright: bool = True) -> np.ndarray:
    """A mask float32 [H, W] in [0, 1]; upright by its EXIF orientation, or as stored. Its values count to the least of
    1 (labels, float pictures), 255 and 65535 (16 bits) that none of them is above."""
    try:
        image = ImageOps.exif_transpose(image) if upright else image
        wide = image.mode == "F" or image.mode.startswith("I")  # to "L" Pillow clips or truncates these
        found = np.asarray(image if wide else image.convert("L")).astype(np.float32)
    except Exception as error:  # as above
        raise ImageDecodeError(f"{name}: cannot be decoded: {error}") from error
    low, high = found.min(), found.max()
    if not (low >= 0 and high <= MASK_RANGES[-1]):  # written so that NaN is refused too
        raise ImageDecodeError(f"{name}: mask values from {low} to {high}; convert it to [0, 1] or to 8 bits")
    return found / next(top for top in MASK_RANGES if high <= top)


def border_color(images: Tensor) -> Tensor | None:
    """The colour [3] that nine in ten of the pixels along the borders of images [V, 3, H, W] have, or None."""
    rows, columns = images[..., [0, -1], :], images[..., :, [0, -1]]
    border = torch.cat([rows.flatten(2), columns.flatten(2)], dim=2).transpose(0, 1).flatten(1)
    color = border.median(dim=1).values
    same = ((border - color[:, None]).abs() <= BORDER_TOLERANCE).all(0).float().mean()
    return color if same >= BORDER_SHARE else None


def every_eighth(count: int, split: str | None) -> list[int]:
    """Indices of a split where the files name none: every 8th view is for the test (Mildenhall et al. 2019)."""
    keep = {None: lambda i: True, "train": lambda i: i % 8 != 0, "test": lambda i: i % 8 == 0}[split]
    return [i for i in range(count) if keep(i)]


def _decode(shot: Shot, resolution: int | None, cut_out: bool) -> tuple[tuple[int, int], Tensor, Tensor | None, Tensor]:
    """The size it had, colours [3, H, W] (times the opacity if `cut_out`), opacity [1, H, W] or None, K [3, 3]."""
    found = shot.picture()
    height, width = found.shape[:2]
    if resolution is not None and resolution > max(height, width):
        raise ConfigError(
            f"resolution={resolution}, but {shot.name} is {width} x {height} pixels: give at most {max(height, width)}"
        )
    k = shot.intrinsics(height, width)
    if shot.mask is not None:
        own = shot.mask()
        if own.shape != (height, width):
            raise DataError(
                f"the mask of {shot.name} is {own.shape[1]} x {own.shape[0]} pixels, the picture {width} x "
                f"{height}. Give it the picture's size."
            )
        found = np.concatenate([found[..., :3], own[..., None]], axis=2)
    elif not cut_out and found.shape[2] == 4:
        raise ConfigError(
            f"{shot.name} is transparent in places: with background=None there is nothing behind it. "
            'Give a background: "white", "black", "noise" or a colour.'
        )
    if found.shape[2] == 4 and cut_out:
        found = np.concatenate([found[..., :3] * found[..., 3:], found[..., 3:]], axis=2)
    values = torch.from_numpy(np.ascontiguousarray(found)).permute(2, 0, 1)
    if shot.distortion is not None:
        values = undistort(values, k, shot.distortion)
    new = target_size(resolution or max(height, width), height, width)
    values = resize_area(values, *new)
    scaled = torch.from_numpy(k * np.array([new[1] / width, new[0] / height, 1.0])[:, None]).float()
    return (height, width), values[:3], values[3:].clamp(0, 1) if len(values) == 4 else None, scaled
