"""Grey images in which structure from motion looks for features, at the size of the files rather than the training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from factorkit.data.views.cameras import undistort
from factorkit.data.views.images import DEFAULT_FOV
from factorkit.data.views.loading import LazyView
from factorkit.data.views.views import Views, resize_area, target_size
from factorkit.utils.errors import DataError

MAX_SIDE = 1024  # pixels of the longer side: more costs time and registers no more
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class FeatureImage:
    """One image for structure from motion.

    Attributes:
        name: of the view.
        pixels: uint8 [H, W].
        mask: bool [H, W], where features may be; None: everywhere.
        intrinsics: K [3, 3] in pixels of this image: exact, or where the search for the focal length starts.
        focal: "exact" (of the files), "estimate" (EXIF or a given field of view) or "unknown".
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None
    intrinsics: np.ndarray
    focal: str

    @property
    def camera_key(self) -> tuple[object, ...]:
        """What images of one camera have in common: their size, and their focal length if it is known."""
        return (*self.pixels.shape, self.focal, *np.round(self.intrinsics.diagonal()[:2], 2).tolist())

    def digest(self) -> bytes:
        """Return a hash of everything that the result depends on."""
        parts = hashlib.sha256(repr((self.name, self.camera_key)).encode())
        for array in (self.pixels, self.intrinsics, self.mask):
            parts.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return parts.digest()


def read_feature_images(data: Sequence[LazyView] | Views, progress: bool) -> list[FeatureImage]:
    """Decode views for structure from motion: grey, at most 1024 pixels long, without features where they are masked.

    Views in memory are pinhole images by contract, and so are images whose files define their cameras, which are
    undistorted here: their intrinsics are exact, and only their poses are searched.

    Raises:
        DataError: an image that cannot be decoded, or whose mask has another size.
    """
    if isinstance(data, Views):
        return [_from_views(data, i) for i in range(len(data))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(_read, data)
        return list(tqdm(images, desc="sfm: images", total=len(data), disable=not progress, leave=False))


def _from_views(views: Views, index: int) -> FeatureImage:
    image = views.images[index]
    parts = [value[index, 0] for value in (views.masks, views.loss_masks) if value is not None]
    return _make(views.names[index], image, parts, views.intrinsics[index].double().numpy(), "exact")


def _read(view: LazyView) -> FeatureImage:
    values = view.read_image()
    height, width = values.shape[:2]
    parts = []
    for read, name in ((view.read_mask, "mask"), (view.read_loss_mask, "loss mask")):
        if read is not None:
            parts.append(torch.from_numpy(np.ascontiguousarray(read())))
            if parts[-1].shape != (height, width):
                raise DataError(f"the {name} of {view.name} has another size than the image: make them equal")
    color = torch.from_numpy(np.ascontiguousarray(values[..., :3])).movedim(-1, 0)
    if values.shape[2] == 4:
        opacity = torch.from_numpy(np.ascontiguousarray(values[..., 3]))
        color = color * opacity + 1 - opacity
        parts += [opacity] if view.read_mask is None else []
    k = view.intrinsics(height, width)
    if view.distortion is not None:
        color = undistort(color, k, view.distortion)[0]
        parts = [undistort(part[None], k, view.distortion)[0][0] for part in parts]
    guess = max(height, width) / (2 * np.tan(np.radians(DEFAULT_FOV) / 2))
    focal = "exact" if view.pose is not None else "unknown" if np.isclose(k[0, 0], guess) else "estimate"
    return _make(view.name, color, parts, k, focal)


def _make(name: str, color: torch.Tensor, masks: Sequence[torch.Tensor], k: np.ndarray, focal: str) -> FeatureImage:
    height, width = color.shape[1:]
    new_height, new_width = target_size(min(MAX_SIDE, max(height, width)), height, width)
    grey = resize_area((color * torch.tensor(LUMINANCE)[:, None, None]).sum(0), new_height, new_width)
    mask = None
    for part in masks:
        usable = (resize_area(part, new_height, new_width) > MASK_THRESHOLD).numpy()
        mask = usable if mask is None else mask & usable
    k = k * np.array([new_width / width, new_height / height, 1.0])[:, None]
    return FeatureImage(name, (grey.clamp(0, 1) * 255).round().byte().numpy(), mask, k, focal)
