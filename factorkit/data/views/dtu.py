"""Scenes as IDR and NeuS store DTU's and BlendedMVS's (Yariv et al. 2020, Wang et al. 2021): cameras_sphere.npz."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from factorkit.data.files import format_examples, list_images
from factorkit.data.views.arrangement import OPENCV_TO_OPENGL
from factorkit.data.views.cameras import fixed_intrinsics
from factorkit.data.views.loading import LazyView, SceneSettings, image_reader
from factorkit.data.views.splits import select_split
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.files import read_arrays

CAMERA_FILES = ("cameras_sphere.npz", "cameras.npz")
IMAGE_FOLDERS = ("image", "images", "rgb")
NUMBERED = re.compile(r"world_mat_(\d+)")


def is_dtu(path: Path) -> bool:
    """Return whether this is a folder with cameras_sphere.npz or cameras.npz beside image/."""
    has_images = any((path / name).is_dir() for name in IMAGE_FOLDERS)
    return has_images and any((path / name).is_file() and _has_world_mat(path / name) for name in CAMERA_FILES)


def _has_world_mat(file: Path) -> bool:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return any(NUMBERED.fullmatch(name) for name in archive.files)
    except Exception:  # whatever is wrong, it is no file of this kind
        return False


def read_dtu(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split; every 8th of the sorted images is for testing.

    World coordinates are those of `scale_mat`, in which the object lies in the unit sphere.

    Raises:
        DataError: numbers of images and matrices that differ, or a matrix that is no projection.
    """
    file = next(path / name for name in CAMERA_FILES if (path / name).is_file())
    try:
        loaded = read_arrays(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable: {error}") from error
    arrays = loaded if isinstance(loaded, dict) else {}
    numbers = sorted(int(match.group(1)) for name in arrays if (match := NUMBERED.fullmatch(name)))
    folder = next(path / name for name in IMAGE_FOLDERS if (path / name).is_dir())
    images = [image for image in list_images(folder) if image.parent == folder]
    if len(images) != len(numbers):
        raise DataError(
            f"{file}: {len(numbers)} matrices world_mat_N, but {folder} has {format_count(len(images), 'image')} "
            f"({format_examples([image.name for image in images])}). There must be one for each image, in their order."
        )
    names = [image.relative_to(path).as_posix() for image in images]
    poses, matrices = [], []
    for number, name in zip(numbers, names, strict=True):
        scale = arrays.get(f"scale_mat_{number}", np.eye(4))
        world = arrays[f"world_mat_{number}"]
        if (
            world.shape != (4, 4)
            or scale.shape != (4, 4)
            or not (np.isfinite(world).all() and np.isfinite(scale).all())
        ):
            raise DataError(f"{file}: world_mat_{number} or scale_mat_{number} is not a finite matrix [4, 4] ({name})")
        k, pose = _decompose((world.astype(np.float64) @ scale)[:3], name, file)
        poses.append(pose)
        matrices.append(k)
    stacked = np.stack(poses)
    check_rigid(torch.from_numpy(stacked), names)
    rows, notes = select_split(names, split)
    views = []
    for i in rows:
        intrinsics = fixed_intrinsics(matrices[i], names[i])
        views.append(LazyView(names[i], image_reader(images[i]), intrinsics, stacked[i]))
    return views, SceneSettings(names, stacked, notes=notes)


def _decompose(projection: np.ndarray, name: str, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Split P [3, 4] = K [R | t] into K and the pose, camera to world in OpenGL axes."""
    matrix = projection[:, :3]
    if abs(np.linalg.det(matrix)) < 1e-12 * np.linalg.norm(matrix) ** 3:
        raise DataError(f"{file}: the matrix of {name} is not a projection: it is singular")
    q, r = np.linalg.qr(np.flipud(matrix).T)  # RQ decomposition by QR of the reversed rows
    k, rotation = np.fliplr(np.flipud(r.T)), np.flipud(q.T)
    signs = np.diag(np.sign(np.diag(k)))
    k, rotation = k @ signs, signs @ rotation
    if np.linalg.det(rotation) < 0:  # P is defined up to its sign
        rotation, projection = -rotation, -projection
    position = -np.linalg.solve(projection[:, :3], projection[:, 3])
    k = k / k[2, 2]
    k[np.abs(k) < 1e-6 * k[0, 0]] = 0.0  # rounding of the decomposition
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation.T, position
    return k, pose @ OPENCV_TO_OPENGL
