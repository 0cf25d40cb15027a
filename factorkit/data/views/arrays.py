"""Posed views in one .npz with `images`, `poses` and `focal`, as in tiny_nerf_data.npz."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from factorkit.data.views.cameras import make_intrinsics
from factorkit.data.views.loading import LazyView, SceneSettings
from factorkit.data.views.splits import split_every_eighth
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.files import read_arrays
from factorkit.utils.images import uint8_to_unit

KEYS = ("images", "poses", "focal")
NUM_TRAINING_VIEWS = (
    100  # the usual split of tiny_nerf_data.npz: its first 100 views for training, the rest for testing
)


def is_posed_array(path: Path) -> bool:
    """Return whether this is an .npz with poses."""
    if path.suffix.lower() != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "poses.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False  # the reader of plain images reports the error


def read_posed_array(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split: the first 100 are for training; of at most 100, every 8th is for testing.

    An array `names` is optional.

    Raises:
        DataError: missing arrays, inconsistent shapes, values outside [0, 1], or an invalid pose.
    """
    try:
        loaded = read_arrays(path, (*KEYS, "names"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable array: {error}") from error
    arrays = loaded if isinstance(loaded, dict) else {}
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise DataError(f"{path}: no array named {missing[0]}; this format has {', '.join(KEYS)}")
    images, poses, focal = (arrays[key] for key in KEYS)
    count = len(images) if images.ndim else 0
    if images.ndim != 4 or images.shape[3] not in (3, 4) or 0 in images.shape:
        raise DataError(f"{path}: images of shape {list(images.shape)}, expected [N, H, W, 3] or [N, H, W, 4]")
    names = [f"{i:06d}" for i in range(count)]
    if "names" in arrays:
        names = [str(name) for name in arrays["names"].reshape(-1)]
    for key, values in (("poses", poses), ("focal", focal)):
        if values.dtype.kind not in "fiu":
            raise DataError(f"{path}: {key} of type {values.dtype}, expected numbers")
    if poses.shape != (count, 4, 4) or len(names) != count or focal.size != 1:
        raise DataError(
            f"{path}: {format_count(count, 'image')}, but poses of shape {list(poses.shape)} and focal of shape "
            f"{list(focal.shape)}. "
            "Give a pose [4, 4] for each image, one focal length for all, and a name for each or none."
        )
    if images.dtype == np.uint8:
        images = uint8_to_unit(images)
    elif images.dtype.kind != "f" or not (images.min() >= 0 and images.max() <= 1):  # also refuses NaN
        raise DataError(
            f"{path}: images must be uint8, or floats in [0, 1], not {images.dtype} from {images.min()} to "
            f"{images.max()}"
        )
    poses = poses.astype(np.float64)
    check_rigid(torch.from_numpy(poses), names)
    height, width = images.shape[1:3]
    k = make_intrinsics(float(focal.item()), float(focal.item()), width / 2, height / 2)
    if count > NUM_TRAINING_VIEWS and split is not None:
        indices = list(range(NUM_TRAINING_VIEWS) if split == "train" else range(NUM_TRAINING_VIEWS, count))
    else:
        indices = split_every_eighth(count, split)
    views = [LazyView(names[i], _float_reader(images[i]), lambda height, width: k, poses[i]) for i in indices]
    return views, SceneSettings(names, poses)


def _float_reader(image: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: image.astype(np.float32, copy=False)
