"""Scenes as in LLFF (Mildenhall et al. 2019): poses_bounds.npy beside folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from factorkit.data.files import list_images
from factorkit.data.views.cameras import make_intrinsics, scale_intrinsics
from factorkit.data.views.loading import LazyView, SceneSettings, image_reader, split_every_eighth
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.files import read_arrays

FOLDERS = ("images_8", "images_4", "images_2", "images")


def is_llff(path: Path) -> bool:
    """Return whether this is a folder with poses_bounds.npy."""
    return (path / "poses_bounds.npy").is_file()


def read_llff(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split; every 8th of the sorted images is for testing.

    Raises:
        DataError: an invalid array, missing images, numbers of images and poses that differ, bounds without 0 < near <
            far, or an invalid pose.
    """
    file = path / "poses_bounds.npy"
    folder = next((path / name for name in FOLDERS if (path / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{path}: none of the folders {', '.join(FOLDERS)} exists")
    values = _read_poses_bounds(file)
    images = list_images(folder)
    if len(images) != len(values):
        raise DataError(
            f"{file}: {format_count(len(values), 'pose')}, but {folder} has "
            f"{format_count(len(images), 'image')}. There must be one pose for each "
            "image, in the order of their names."
        )
    names = [image.relative_to(path).as_posix() for image in images]
    is_bad = ~np.isfinite(values).all(1)
    if is_bad.any():
        raise DataError(f"{file}: values that are not finite for {names[int(is_bad.argmax())]}")
    matrices, bounds = values[:, :15].reshape(-1, 3, 5), values[:, 15:]
    is_bad = ~((bounds[:, 0] > 0) & (bounds[:, 0] < bounds[:, 1]))
    if is_bad.any():
        bad = int(is_bad.argmax())
        raise DataError(
            f"{file}: near {bounds[bad, 0]:g} and far {bounds[bad, 1]:g} of {names[bad]}: need 0 < near < far"
        )
    down, right, back, position, hwf = np.moveaxis(matrices, 2, 0)
    poses = np.tile(np.eye(4), (len(values), 1, 1))
    poses[:, :3] = np.stack([right, -down, back, position], axis=2)
    check_rigid(torch.from_numpy(poses), names)
    views = []
    for i in split_every_eighth(len(values), split):
        height, width, focal = hwf[i]
        k = make_intrinsics(focal, focal, width / 2, height / 2)
        views.append(
            LazyView(names[i], image_reader(images[i]), scale_intrinsics(k, height, width, names[i]), poses[i])
        )
    return views, SceneSettings(names, poses, (float(bounds[:, 0].min()), float(bounds[:, 1].max())))


def _read_poses_bounds(file: Path) -> np.ndarray:
    """Read the array float64 [V, 17]."""
    try:
        values = read_arrays(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable array: {error}") from error
    if isinstance(values, dict) or values.dtype.kind not in "fiu":
        raise DataError(f"{file}: not an array of numbers; expected 17 numbers for each image")
    if values.ndim != 2 or values.shape[1] != 17 or not len(values):
        raise DataError(f"{file}: an array of shape {list(values.shape)}, expected 17 numbers for each image")
    return values.astype(np.float64)
