"""Forward-facing scenes in the layout of LLFF (Mildenhall et al. 2019): poses_bounds.npy beside folders of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from factorkit.data.open import list_images
from factorkit.data.views.cameras import compute_mean_pose, scale_intrinsics
from factorkit.data.views.loading import Shot, every_eighth, picture_file
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError
from factorkit.utils.safe_reading import read_arrays

FOLDERS = ("images_8", "images_4", "images_2", "images")
NEAREST = 0.75  # the scene is scaled to put its nearest point at 1 / NEAREST, a little beyond NDC's near plane at 1


def is_llff(path: Path) -> bool:
    """Whether this is a folder with poses_bounds.npy."""
    return (path / "poses_bounds.npy").is_file()


def read_llff(path: Path, split: str | None) -> tuple[list[Shot], dict[str, Any]]:
    """The shots of a split (every 8th of the sorted pictures is for the test) and their settings.

    The cameras' mean pose becomes the world's axes, and lengths are scaled so that the nearest point of the scene is
    1 / 0.75 away: what normalised device coordinates with their near plane at 1 need
    (:func:`factorkit.rendering.ndc_rays`).

    Raises:
        DataError: an array of another layout, pictures that are missing or more or fewer than poses, bounds with near
            not below far, a pose that is not rigid.
    """
    file = path / "poses_bounds.npy"
    folder = next((path / name for name in FOLDERS if (path / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{path}: none of the folders {', '.join(FOLDERS)} is there")
    try:
        values = read_arrays(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable array: {error}") from error
    if isinstance(values, dict) or values.dtype.kind not in "fiu":
        raise DataError(f"{file}: no array of numbers; LLFF's has 17 for each picture")
    values = values.astype(np.float64)
    if values.ndim != 2 or values.shape[1] != 17 or not len(values):
        raise DataError(f"{file}: an array of shape {list(values.shape)}; LLFF's has 17 numbers for each picture")
    pictures = list_images(folder)
    if len(pictures) != len(values):
        raise DataError(
            f"{file}: {len(values)} poses, but {folder} holds {len(pictures)} pictures. There must be one "
            "pose for each picture, in the order of their names."
        )
    names = [picture.relative_to(path).as_posix() for picture in pictures]
    if not np.isfinite(values).all():
        raise DataError(f"{file}: values that are not finite for {names[int((~np.isfinite(values)).any(1).argmax())]}")
    matrices, bounds = values[:, :15].reshape(-1, 3, 5), values[:, 15:]
    if not ((bounds[:, 0] > 0) & (bounds[:, 0] < bounds[:, 1])).all():
        bad = int((~((bounds[:, 0] > 0) & (bounds[:, 0] < bounds[:, 1]))).argmax())
        raise DataError(
            f"{file}: near {bounds[bad, 0]:g} and far {bounds[bad, 1]:g} of {names[bad]}: need 0 < near < far"
        )
    down, right, back, place, lens = np.moveaxis(matrices, 2, 0)
    poses = np.tile(np.eye(4), (len(values), 1, 1))
    poses[:, :3] = np.stack([right, -down, back, place], axis=2)
    check_rigid(torch.from_numpy(poses), names)
    scale = 1 / (NEAREST * bounds[:, 0].min())
    poses = np.linalg.inv(compute_mean_pose(poses)) @ poses
    poses[:, :3, 3] *= scale
    shots = []
    for i in every_eighth(len(values), split):
        height, width, focal = lens[i]
        k = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        shots.append(Shot(names[i], picture_file(pictures[i]), scale_intrinsics(k, height, width, names[i]), poses[i]))
    near, far = 0.9 * bounds[:, 0].min() * scale, bounds[:, 1].max() * scale
    return shots, {"layout": "forward", "near": float(near), "far": float(far)}
