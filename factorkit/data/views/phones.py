"""Captures of telephone apps: Polycam's raw keyframes and Record3D's metadata.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from factorkit.data.files import list_images
from factorkit.data.views.cameras import make_intrinsics, scale_intrinsics
from factorkit.data.views.image_files import FileFinder
from factorkit.data.views.loading import LazyView, SceneSettings, image_reader
from factorkit.data.views.splits import select_split
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.files import read_json

POLYCAM_FOLDERS = (
    ("corrected_images", "corrected_cameras"),
    ("images", "cameras"),
)  # the app's bundle adjustment first
RECORD3D_IMAGES = ("rgb", "rgbd", "images")
POLYCAM_WORLD = (2, 0, 1)  # rows of its matrices that become x, y, z: ARKit's y-up becomes z-up, as in nerfstudio


def is_polycam(path: Path) -> bool:
    """Return whether this is Polycam's raw export: keyframes/ with images and cameras, or that folder itself."""
    return _find_polycam(path) is not None


def _find_polycam(path: Path) -> tuple[Path, Path] | None:
    for root in (path / "keyframes", path):
        for images, cameras in POLYCAM_FOLDERS:
            if (root / images).is_dir() and (root / cameras).is_dir() and any((root / cameras).glob("*.json")):
                return root / images, root / cameras
    return None


def read_polycam(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split; every 8th is for testing. Axes as in nerfstudio: z up.

    Raises:
        DataError: invalid JSON, missing numbers, an invalid pose, or most of the images missing.
    """
    folders = _find_polycam(path)
    if folders is None:
        raise DataError(f"{path}: no keyframes of Polycam")
    image_folder, camera_folder = folders
    files = sorted(camera_folder.glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    finder = FileFinder(image_folder)
    paths = finder.find_all([file.stem for file in files], str(camera_folder))
    names, poses, views = [], [], []
    for i, image in paths.items():
        name = image.relative_to(path).as_posix()
        try:
            camera = read_json(files[i])
            matrix = np.eye(4)
            for row, source in enumerate(POLYCAM_WORLD):
                matrix[row] = [float(camera[f"t_{source}{column}"]) for column in range(4)]
            k = make_intrinsics(*(float(camera[key]) for key in ("fx", "fy", "cx", "cy")))
            intrinsics = scale_intrinsics(k, float(camera["height"]), float(camera["width"]), name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{files[i]}: not a camera of Polycam ({type(error).__name__}: {error}). It needs t_00 to t_23, fx, "
                "fy, cx, cy, width and height."
            ) from error
        names.append(name)
        poses.append(matrix)
        views.append(LazyView(name, image_reader(image), intrinsics, matrix))
    return _finish(views, names, poses, split, finder.notes)


def is_record3d(path: Path) -> bool:
    """Return whether this is a folder with Record3D's metadata.json and its images."""
    if not (path / "metadata.json").is_file() or not any((path / name).is_dir() for name in RECORD3D_IMAGES):
        return False
    try:
        return "poses" in read_json(path / "metadata.json")
    except (OSError, ValueError, TypeError):
        return False


def read_record3d(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split; every 8th is for testing.

    `poses` are quaternions x y z w and positions, `K` is stored column by column for images of `w` by `h`, and
    `perFrameIntrinsicCoeffs` (fx, fy, cx, cy) replaces it.

    Raises:
        DataError: missing numbers, an invalid pose, or most of the images missing.
    """
    file = path / "metadata.json"
    folder = next(path / name for name in RECORD3D_IMAGES if (path / name).is_dir())
    try:
        content: dict[str, Any] = read_json(file)
        values = np.array(content["poses"], dtype=np.float64).reshape(-1, 7)
        k = np.array(content["K"], dtype=np.float64).reshape(3, 3).T
        width, height = float(content["w"]), float(content["h"])
        per_frame = content.get("perFrameIntrinsicCoeffs")
        lenses = None if not per_frame else np.array(per_frame, dtype=np.float64).reshape(len(values), -1)[:, :4]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: not metadata of Record3D ({type(error).__name__}: {error}). It needs poses, K, w and h."
        ) from error
    suffixes = {image.suffix for image in list_images(folder)}
    if not suffixes or not len(values):
        raise DataError(
            f"{path}: {format_count(len(values), 'pose')} in metadata.json, but no images in {folder.name}/"
        )
    finder = FileFinder(folder)
    paths = finder.find_all([str(i) for i in range(len(values))], str(file))
    names, poses, views = [], [], []
    for i, image in paths.items():
        name = image.relative_to(path).as_posix()
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = _rotation(values[i, :4], name, file), values[i, 4:]
        own = k if lenses is None else make_intrinsics(*lenses[i])
        names.append(name)
        poses.append(matrix)
        views.append(LazyView(name, image_reader(image), scale_intrinsics(own, height, width, name), matrix))
    return _finish(views, names, poses, split, finder.notes)


def _rotation(quaternion: np.ndarray, name: str, file: Path) -> np.ndarray:
    """Return the rotation [3, 3] of a quaternion x y z w."""
    norm = np.linalg.norm(quaternion)
    if not norm > 0:
        raise DataError(f"{file}: the quaternion of {name} is {quaternion.tolist()}")
    x, y, z, w = quaternion / norm
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _finish(
    views: list[LazyView], names: list[str], poses: list[np.ndarray], split: str | None, notes: tuple[str, ...]
) -> tuple[list[LazyView], SceneSettings]:
    stacked = np.stack(poses)
    check_rigid(torch.from_numpy(stacked), names)
    rows, more = select_split(names, split)
    return [views[i] for i in rows], SceneSettings(names, stacked, None, notes + more)
