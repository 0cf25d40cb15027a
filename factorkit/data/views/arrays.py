"""Posed views in one .npz: the layout of tiny_nerf_data.npz, `images`, `poses` and `focal`."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factorkit.data.views.cameras import estimate_depth_range
from factorkit.data.views.loading import Shot, every_eighth
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError
from factorkit.utils.images import uint8_to_unit
from factorkit.utils.safe_reading import read_arrays

KEYS = ("images", "poses", "focal")
TRAINING_VIEWS = 100  # tiny_nerf_data.npz is used with its first 100 views for training, the rest for the test


def is_posed_array(path: Path) -> bool:
    """Whether this is an .npz that holds poses."""
    if path.suffix.lower() != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "poses.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False  # reading it as pictures says what is wrong with it


def read_posed_array(path: Path, split: str | None) -> tuple[list[Shot], dict[str, Any]]:
    """The shots of a split and their settings: the first 100 views are for training, the rest for the test; of 100
    and fewer, every 8th is for the test. `names` is read where it is there.

    Raises:
        DataError: arrays that are missing or of shapes that do not fit, values outside of [0, 1], a pose that is not
            rigid or not finite.
    """
    try:
        loaded = read_arrays(path, (*KEYS, "names"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable array: {error}") from error
    missing = [key for key in KEYS if key not in loaded]
    if missing:
        raise DataError(f"{path}: no array named {missing[0]}; this layout has {', '.join(KEYS)}")
    images, poses, focal = (loaded[key] for key in KEYS)
    names = [str(name) for name in loaded["names"].reshape(-1)] if "names" in loaded else None
    if images.ndim != 4 or images.shape[3] not in (3, 4) or 0 in images.shape:
        raise DataError(f"{path}: images of shape {list(images.shape)}, expected [N, H, W, 3] or [N, H, W, 4]")
    for name, values in (("poses", poses), ("focal", focal)):
        if values.dtype.kind not in "fiu":
            raise DataError(f"{path}: {name} of type {values.dtype}, expected numbers")
    count = len(images)
    if poses.shape != (count, 4, 4) or names is not None and len(names) != count or focal.size != 1:
        found = f"poses of shape {list(poses.shape)} and focal of shape {list(focal.shape)}"
        raise DataError(
            f"{path}: {count} images, but {found}. Give a pose [4, 4] for each, one focal length for all, "
            "and a name for each or none."
        )
    names = names or [f"{i:06d}" for i in range(count)]
    if images.dtype == np.uint8:
        images = uint8_to_unit(images)
    elif images.dtype.kind != "f" or not (images.min() >= 0 and images.max() <= 1):  # so that NaN is refused too
        raise DataError(
            f"{path}: images must be uint8, or floats in [0, 1]; these are {images.dtype} from "
            f"{images.min()} to {images.max()}"
        )
    poses = poses.astype(np.float64)
    check_rigid(torch.from_numpy(poses), names)
    height, width = images.shape[1:3]
    k = np.array([[float(focal.item()), 0, width / 2], [0, float(focal.item()), height / 2], [0, 0, 1]])
    if count > TRAINING_VIEWS and split is not None:
        chosen = list(range(TRAINING_VIEWS) if split == "train" else range(TRAINING_VIEWS, count))
    else:
        chosen = every_eighth(count, split)
    near, far = estimate_depth_range(poses)
    shots = [Shot(names[i], _reader(images[i]), lambda height, width: k, poses[i]) for i in chosen]
    return shots, {"layout": "object", "near": near, "far": far}


def _reader(image: np.ndarray):
    return lambda: image.astype(np.float32, copy=False)
