"""The images of an export with their cameras: at full size from the files of the training, else from views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from factorkit.data.views.cameras import Lens
from factorkit.data.views.loading import LazyView, load_views
from factorkit.data.views.views import Views
from factorkit.utils.errors import DataError
from factorkit.utils.images import images_to_pixels, unit_to_uint8

Files = dict[str, Callable[[Path], Any]]  # what saves each file, by its name relative to the output folder
MAX_DIFFERENCE = 3 / 255  # mean difference between an image of the training and its file, read again


class ExportView(NamedTuple):
    """One image as it is exported.

    Attributes:
        name: of the view.
        size: height and width.
        intrinsics: float64 [3, 3], in pixels of this size.
        distortion: of the lens, which the image has; None: none.
        read_pixels: returns uint8 [H, W, 3], or [H, W, 4] with straight opacity.
        read_loss_mask: returns float32 [H, W], 0 where the image is not scored; None: it is scored everywhere.
        is_localised: whether its pose was found in the finished scene, so that the scene was not trained on it.
    """

    name: str
    size: tuple[int, int]
    intrinsics: np.ndarray
    distortion: Lens | None
    read_pixels: Callable[[], np.ndarray]
    read_loss_mask: Callable[[], np.ndarray] | None = None
    is_localised: bool = False


def list_stored(views: Views) -> list[ExportView]:
    """List views as they are; transparent if they have masks and a known background, and without padding."""
    images = views.images
    if views.masks is not None and views.background is not None:
        background = (1 - views.masks) * views.background[:, None, None]
        straight = (images - background) / views.masks.clamp_min(1e-6)
        images = torch.cat([straight * (views.masks > 0), views.masks], dim=1)
    result = []
    for i, (name, pixels) in enumerate(zip(views.names, images_to_pixels(images), strict=True)):
        size = height, width = views.own_size(i)  # without padding
        top, left = (views.size[0] - height) // 2, (views.size[1] - width) // 2
        inner = (slice(top, top + height), slice(left, left + width))
        loss_mask = None if views.loss_masks is None else views.loss_masks[i, 0].numpy()[inner]
        read_loss_mask = None if loss_mask is None or loss_mask.all() else partial(np.asarray, loss_mask)
        k = views.own_intrinsics(i, size).double().numpy()
        result.append(ExportView(name, size, k, None, partial(np.asarray, pixels[inner]), read_loss_mask))
    return result


def list_files(listed: Sequence[LazyView], stored: Views) -> list[ExportView]:
    """List the files that a run was trained on: full size, straight opacity, the lens as it is.

    Args:
        listed: what a reader lists now.
        stored: the views of the run.

    Raises:
        DataError: other images than those of the run.
        ConfigError: images smaller than those of the run.
    """
    background = None if stored.background is None else stored.background.tolist()
    again = load_views(listed, resolution=max(stored.size), background=background or "white")
    check_same_images(again.resize(stored.size), stored)
    return [list_file(view) for view in listed]


def list_file(view: LazyView, is_localised: bool = False) -> ExportView:
    """List one file: full size, straight opacity, the lens as it is."""
    size = height, width = view.read_image().shape[:2]
    k, read_pixels = view.intrinsics(height, width), partial(_read_pixels, view)
    return ExportView(view.name, size, k, view.distortion, read_pixels, view.read_loss_mask, is_localised)


def check_same_images(views: Views, stored: Views) -> None:
    """Raise DataError if views are not those that a run stored, at the same size."""
    if views.names != stored.names:
        raise DataError(f"the data are not the {len(stored)} views that the run was trained on. Give its training data")
    difference = (views.images - stored.images).abs().mean((1, 2, 3))
    if difference.max() > MAX_DIFFERENCE:
        name = stored.names[int(difference.argmax())]
        raise DataError(f"{name} is not the image that the run was trained on. Give its training data")


def _read_pixels(view: LazyView) -> np.ndarray:
    values = view.read_image()
    if view.read_mask is not None:
        values = np.concatenate([values[..., :3], view.read_mask()[..., None]], axis=2)
    return unit_to_uint8(values)


def make_images(views: Sequence[ExportView], folder: str) -> tuple[list[str], Files]:
    """Return the names of PNG files below ``folder``, with forward slashes, and what saves them."""
    names = file_names([view.name for view in views])
    return names, {f"{folder}/{n}": partial(_save, view.read_pixels) for n, view in zip(names, views, strict=True)}


def make_loss_masks(views: Sequence[ExportView], folder: str) -> tuple[list[str | None], Files]:
    """Return the names of the loss masks, None for views without one, and what saves them."""
    names: list[str | None] = []
    files: Files = {}
    for name, view in zip(file_names([view.name for view in views]), views, strict=True):
        names.append(None if view.read_loss_mask is None else f"{folder}/{name}")
        if view.read_loss_mask is not None:
            files[f"{folder}/{name}"] = partial(_save_loss_mask, view.read_loss_mask)
    return names, files


def _save(read_pixels: Callable[[], np.ndarray], path: Path) -> None:
    Image.fromarray(read_pixels()).save(path)


def _save_loss_mask(read_loss_mask: Callable[[], np.ndarray], path: Path) -> None:
    Image.fromarray(unit_to_uint8(read_loss_mask() > 0.5)).save(path)


def file_names(names: Sequence[str]) -> list[str]:
    """Return distinct names of PNG files below one folder, without spaces (which end COLMAP's fields)."""
    result: list[str] = []
    for name in names:
        parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
        path = PurePosixPath(*("_".join(part.replace(":", "_").split()) for part in parts) if parts else ("view",))
        unique = path.with_suffix(".png").as_posix()
        if unique in result:
            unique = f"{path.as_posix()}.png"
        while unique in result:
            unique = f"{unique.removesuffix('.png')}_.png"
        result.append(unique)
    return result
