"""Turn the views that a reader lists into `Views`: decoded in parallel, undistorted, resized and composited."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from factorkit.data.decode import to_float
from factorkit.data.depth import SetDepths, is_deep
from factorkit.data.files import is_image
from factorkit.data.masks import to_opacity
from factorkit.data.sources import FileSource
from factorkit.data.views.arrangement import Arrangement
from factorkit.data.views.cameras import FisheyeDistortion, IntrinsicsFunction, Lens, undistort
from factorkit.data.views.views import (
    LOSS_MASK_THRESHOLD,
    SceneLayout,
    Views,
    make_background,
    resize_area,
    target_size,
)
from factorkit.utils.errors import ConfigError, DataError

BORDER_FRACTION = 0.9  # of the border pixels must have one colour for it to count as the background
BORDER_TOLERANCE = 2 / 255  # per channel
JPEG_LOSS_MASK_THRESHOLD = 0.5  # JPEG alters zeros


class Shot(NamedTuple):
    """How an image was taken: whether the focal length is known and no guess, and when, in seconds."""

    has_focal: bool = True
    time: float | None = None


@dataclass(frozen=True)
class LazyView:
    """One view that a reader has listed but not decoded.

    Attributes:
        name: name in messages and exports.
        read_image: returns float32 [H, W, 3] or, with straight (not premultiplied) opacity last, [H, W, 4], in [0, 1].
        intrinsics: returns K [3, 3] for an image of a given height and width.
        pose: [4, 4] or None.
        read_mask: returns the opacity, float32 [H, W], which replaces the image's own.
        distortion: lens distortion to be removed.
        read_loss_mask: returns float32 [H, W], below 0.5 where the image is not scored.
        read_shot: returns how the image was taken; None: with the intrinsics, at an unknown time.
    """

    name: str
    read_image: Callable[[], np.ndarray]
    intrinsics: IntrinsicsFunction
    pose: np.ndarray | None = None
    read_mask: Callable[[], np.ndarray] | None = None
    distortion: Lens | None = None
    read_loss_mask: Callable[[], np.ndarray] | None = None
    read_shot: Callable[[], Shot] | None = None


class SceneSettings(NamedTuple):
    """What a reader knows about the scene as a whole, whatever the split.

    Attributes:
        names: of all views, not only those of the split.
        poses: float64 [F, 4, 4] of all views in the coordinates of the files, OpenGL axes; None without cameras.
        bounds: nearest and farthest depth, or None.
        notes: sentences for the user on how the files were read.
        loss_folder: the folder of loss masks, if the files name one.
        points: float64 [P, 3], sparse points of the scene in the coordinates of the files, or None.
    """

    names: Sequence[str] = ()
    poses: np.ndarray | None = None
    bounds: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    loss_folder: Path | None = None
    points: np.ndarray | None = None


class _DecodedView(NamedTuple):
    size: tuple[int, int]  # height, width before resizing
    color: Tensor  # [3, H, W]
    opacity: Tensor | None  # [1, H, W]
    intrinsics: Tensor  # [3, 3]
    scored: Tensor | None  # [1, H, W], 0 or 1
    shot: Shot


def load_views(
    views: Sequence[LazyView],
    *,
    arrangement: Arrangement | None = None,
    layout: SceneLayout = "object",
    notes: Sequence[str] = (),
    points: np.ndarray | None = None,
    resolution: int | None = None,
    background: str | Sequence[float] | None = "white",
    seed: int = 0,
) -> Views:
    """Decode views; see :func:`factorkit.data.open_views` for the arguments.

    Raises:
        DataError: no views, an image that cannot be decoded, or anything `Views` refuses.
        ConfigError: a resolution above the images', or transparent images without a background.
    """
    if not views:
        raise DataError("the selected split has no views")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = list(pool.map(lambda view: _decode(view, resolution, background is not None), views))
    color = detect_border_color([view.color for view in decoded])
    decoded, content_sizes, sizes = _to_one_size(decoded, color)
    images, masks = torch.stack([view.color for view in decoded]), None
    if any(view.opacity is not None for view in decoded):
        opaque = torch.ones_like(images[0, :1])
        masks, color = torch.stack([opaque if view.opacity is None else view.opacity for view in decoded]), None
        if background is not None:
            backdrop, color = make_background(background, images.shape, seed)
            images = images + (1 - masks) * backdrop
    loss_masks = None
    if any(view.scored is not None for view in decoded):
        everywhere = torch.ones_like(images[0, :1])
        loss_masks = torch.stack([everywhere if view.scored is None else view.scored for view in decoded])
    if points is not None and arrangement is not None:
        points = arrangement.apply_to_points(points)
    times = [view.shot.time for view in decoded if view.shot.time is not None]
    poses = [arrangement.apply(view.pose) for view in views if view.pose is not None and arrangement is not None]
    return Views(
        images=images.clamp(0, 1),
        names=[view.name for view in views],
        intrinsics=torch.stack([view.intrinsics for view in decoded]),
        masks=masks,
        poses=torch.from_numpy(np.stack(poses)).float() if len(poses) == len(views) else None,
        near=None if arrangement is None else arrangement.near,
        far=None if arrangement is None else arrangement.far,
        layout=layout if arrangement is None else arrangement.layout,
        loss_masks=loss_masks,
        origin=(0.0, 0.0, 0.0) if arrangement is None else arrangement.origin,
        notes=(*notes, *sizes),
        background=color,
        content_sizes=content_sizes,
        points=None if points is None else torch.from_numpy(points).float(),
        has_focal=any(view.shot.has_focal for view in decoded),
        times=torch.tensor(times, dtype=torch.float64) if len(times) == len(decoded) else None,
    )


def _to_one_size(
    views: list[_DecodedView], color: Tensor | None
) -> tuple[list[_DecodedView], Tensor | None, tuple[str, ...]]:
    """Bring views to one size: the same longer side, and padding around those of another shape, which is not scored.

    Args:
        views: decoded.
        color: of the padding of opaque views; None: that of the nearest pixel.

    Returns:
        The views, the height and width [V, 2] of each within its padding (None without), and sentences for the user.
    """
    originals = len({view.size for view in views})
    longer = min(max(view.color.shape[1:]) for view in views)
    views = [_resize(view, *target_size(longer, *view.color.shape[1:])) for view in views]
    shapes = {(view.color.shape[1], view.color.shape[2]) for view in views}
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    text = f"The views have {originals} sizes and are brought to {width} x {height} pixels"
    if all(height - h <= 1 and width - w <= 1 for h, w in shapes):  # one shape up to rounding
        return [_resize(view, height, width) for view in views], None, (f"{text}.",) if originals > 1 else ()
    sizes, padded = [], 0
    for i, view in enumerate(views):
        for axis, side in ((1, height), (2, width)):
            if (side - view.color.shape[axis]) % 2 and view.color.shape[axis] > 1:  # centred exactly
                view = _trim(view, axis)
        h, w = view.color.shape[1:]
        views[i] = _pad(view, height, width, color)
        sizes.append((h, w))
        padded += (h, w) != (height, width)
    return views, torch.tensor(sizes), (f"{text}; {padded} are padded, which is not scored.",)


def _resize(view: _DecodedView, height: int, width: int) -> _DecodedView:
    h, w = view.color.shape[1:]
    if (h, w) == (height, width):
        return view
    return view._replace(
        color=resize_area(view.color, height, width),
        opacity=None if view.opacity is None else resize_area(view.opacity, height, width).clamp(0, 1),
        scored=None if view.scored is None else (resize_area(view.scored, height, width) > LOSS_MASK_THRESHOLD).float(),
        intrinsics=view.intrinsics * torch.tensor([width / w, height / h, 1.0])[:, None],
    )


def _trim(view: _DecodedView, axis: int) -> _DecodedView:
    """Cut half a pixel from both ends of an axis of [C, H, W], at the same scale."""

    def trim(x: Tensor) -> Tensor:
        return (x.narrow(axis, 0, x.shape[axis] - 1) + x.narrow(axis, 1, x.shape[axis] - 1)) / 2

    intrinsics = view.intrinsics.clone()
    intrinsics[2 - axis, 2] -= 0.5
    return view._replace(
        color=trim(view.color),
        opacity=None if view.opacity is None else trim(view.opacity),
        scored=None if view.scored is None else (trim(view.scored) > LOSS_MASK_THRESHOLD).float(),
        intrinsics=intrinsics,
    )


def _pad(view: _DecodedView, height: int, width: int, color: Tensor | None) -> _DecodedView:
    """Centre a view in an image of this size."""
    h, w = view.color.shape[1:]
    top, left = (height - h) // 2, (width - w) // 2
    sides = (left, width - w - left, top, height - h - top)
    pad = torch.nn.functional.pad
    scored = torch.ones(1, h, w) if view.scored is None else view.scored
    if view.opacity is not None:
        padded = pad(view.color, sides)  # premultiplied
    elif color is None:
        padded = pad(view.color[None], sides, mode="replicate")[0]
    else:
        padded = pad(view.color - color[:, None, None], sides) + color[:, None, None]
    intrinsics = view.intrinsics + torch.tensor([[0, 0, left], [0, 0, top], [0, 0, 0]])
    opacity = None if view.opacity is None else pad(view.opacity, sides)
    return view._replace(color=padded, opacity=opacity, scored=pad(scored, sides), intrinsics=intrinsics)


def _decode(view: LazyView, resolution: int | None, premultiply: bool) -> _DecodedView:
    """Decode, undistort and resize one view; `premultiply` multiplies colours by the opacity."""
    values = view.read_image()
    height, width = values.shape[:2]
    largest = max(height, width)
    if resolution is not None and resolution > largest:
        raise ConfigError(
            f"resolution={resolution}, but {view.name} is {width} x {height} pixels: give at most {largest}"
        )
    k = view.intrinsics(height, width)
    if view.read_mask is not None:
        mask = _read_same_size(view.read_mask, view.name, height, width)
        values = np.concatenate([values[..., :3], mask[..., None]], axis=2)
    elif not premultiply and values.shape[2] == 4:
        raise ConfigError(
            f"{view.name} is partly transparent, but background=None. "
            'Give a background: "white", "black", "noise" or a colour.'
        )
    if values.shape[2] == 4 and premultiply:
        values = np.concatenate([values[..., :3] * values[..., 3:], values[..., 3:]], axis=2)
    channels = torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1)
    scored = None
    if view.read_loss_mask is not None:
        loss_mask = _read_same_size(view.read_loss_mask, view.name, height, width)
        scored = torch.from_numpy(np.ascontiguousarray(loss_mask))[None]
    if view.distortion is not None:
        channels, visible = undistort(channels, k, view.distortion)
        if scored is not None:
            scored, _ = undistort(scored, k, view.distortion)
        if isinstance(view.distortion, FisheyeDistortion) and not visible.all():
            scored = visible[None].float() if scored is None else scored * visible
    new_height, new_width = target_size(resolution or largest, height, width)
    channels = resize_area(channels, new_height, new_width)
    intrinsics = torch.from_numpy(k * np.array([new_width / width, new_height / height, 1.0])[:, None]).float()
    opacity = channels[3:].clamp(0, 1) if len(channels) == 4 else None
    if scored is not None:
        scored = (resize_area(scored, new_height, new_width) > LOSS_MASK_THRESHOLD).float()
    shot = Shot() if view.read_shot is None else view.read_shot()
    return _DecodedView((height, width), channels[:3], opacity, intrinsics, scored, shot)


def _read_same_size(read: Callable[[], np.ndarray], name: str, height: int, width: int) -> np.ndarray:
    mask = read()
    if mask.shape != (height, width):
        raise DataError(
            f"the mask of {name} is {mask.shape[1]} x {mask.shape[0]} pixels, the image {width} x {height}. "
            "They must have the same size."
        )
    return mask


def image_reader(path: Path) -> Callable[[], np.ndarray]:
    """Return a function for `LazyView.read_image`.

    It ignores the EXIF orientation: the cameras of nerfstudio and COLMAP refer to stored pixels.
    """

    def read() -> np.ndarray:
        image = FileSource(path.parent, [path.name]).decode(0)
        depths = _depths_of_folder(path.parent, path.parent.stat().st_mtime_ns) if is_deep(image) else None
        return to_float(image, path.name, upright=False, depths=depths)

    return read


@functools.lru_cache(maxsize=8)
def _depths_of_folder(folder: Path, time: int) -> SetDepths:
    """Return the bit depths of the images in a folder, which are all views of one scene; ``time`` is of its change."""
    names = sorted(entry.name for entry in folder.iterdir() if is_image(entry.name) and entry.is_file())
    return FileSource(folder, names).depths


def loss_mask_reader(path: Path, is_inverted: bool = False) -> Callable[[], np.ndarray]:
    """Return a function for `LazyView.read_loss_mask`, for stored pixels: as in nerfstudio, all but 0 is scored.

    Inverted, 0 alone is scored, as in instant-ngp's masks of moving parts.
    """

    def read() -> np.ndarray:
        image = FileSource(path.parent, [path.name]).decode(0)
        threshold = JPEG_LOSS_MASK_THRESHOLD if image.format == "JPEG" else 0
        return ((to_opacity(image, path.name, upright=False) > threshold) != is_inverted).astype(np.float32)

    return read


def detect_border_color(images: Iterable[Tensor]) -> Tensor | None:
    """Return the colour [3] that 90% of the border pixels of images [3, H, W] have, or None."""
    borders = [(image[:, [0, -1]].flatten(1), image[..., [0, -1]].flatten(1)) for image in images]
    border = torch.cat([pixels for both in borders for pixels in both], dim=1)
    color = border.median(dim=1).values
    fraction = ((border - color[:, None]).abs() <= BORDER_TOLERANCE).all(0).float().mean()
    return color if fraction >= BORDER_FRACTION else None
