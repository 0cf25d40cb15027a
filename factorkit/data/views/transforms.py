"""Views in a transforms.json: NeRF's synthetic scenes from Blender, and nerfstudio's format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from factorkit.data.files import IMAGE_SUFFIXES
from factorkit.data.views.cameras import (
    Distortion,
    IntrinsicsFunction,
    detect_layout,
    estimate_depth_range,
    fov_intrinsics,
    make_intrinsics,
    scale_intrinsics,
)
from factorkit.data.views.loading import LazyView, SceneSettings, image_reader, mask_reader, split_every_eighth
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError
from factorkit.utils.safe_reading import read_json

BLENDER_SPLITS = {"train": ("train",), "test": ("test",), None: ("train", "val", "test")}
CAMERA_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
DEFAULT_SUFFIXES = (".png", ".jpg", ".jpeg")  # tried for `file_path` without suffix, as Blender's files have it


def is_transforms(path: Path) -> bool:
    """Return whether this is a transforms file, or a folder with one."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("transforms.json", "transforms_train.json"))
    return path.suffix.lower() == ".json"


def read_transforms(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split.

    Blender's folders have one file per split. nerfstudio's file may list `train_filenames` and `test_filenames`;
    otherwise every 8th frame is for testing. A file named after a split (transforms_test.json), if given itself, is
    read as a whole.

    Raises:
        DataError: invalid JSON, no frames, a missing image, an invalid pose, or an unsupported camera model.
    """
    is_blender = path.is_dir() and (path / "transforms_train.json").is_file()
    if is_blender:
        files = [path / f"transforms_{name}.json" for name in BLENDER_SPLITS[split]]
        missing = [file for file in files if not file.is_file()]
        if split and missing:
            raise DataError(f"{missing[0]}: no such file, but it is needed for split={split!r}")
        parts = [_read_file(file, None) for file in files if file.is_file()]
    else:
        file = path / "transforms.json" if path.is_dir() else path
        is_split_file = any(file.stem == f"transforms_{name}" for name in ("train", "val", "test"))
        parts = [_read_file(file, None if is_split_file else split)]
    views = [view for part, _ in parts for view in part]
    poses = np.concatenate([poses for _, poses in parts])
    layout = "object" if is_blender else detect_layout(poses)
    return views, SceneSettings(layout, *(estimate_depth_range(poses) if layout == "object" else (None, None)))


def _read_file(file: Path, split: str | None) -> tuple[list[LazyView], np.ndarray]:
    """Return the views of a split, and the poses [F, 4, 4] of all frames, which determine the scene's layout."""
    try:
        content = read_json(file)
        frames = content["frames"]
        entries = [(frame["file_path"], frame["transform_matrix"]) for frame in frames]
        texts = [frame[key] for frame in frames for key in ("file_path", "mask_path") if frame.get(key) is not None]
        texts += [name for key in content if key.endswith("_filenames") for name in content[key]]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a file name is not a string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: not a transforms file ({type(error).__name__}: {error}). It needs `frames`, each with "
            "`file_path` and `transform_matrix`."
        ) from error
    if not frames:
        raise DataError(f"{file}: no frames in it")
    indices = _select_frames(content, [name for name, _ in entries], split)
    if not indices:
        raise DataError(f"{file}: no frame belongs to the split {split!r}")
    path_of = {i: path for i in indices if (path := _find_image(file.parent, entries[i][0])) is not None}
    missing = [entries[i][0] for i in indices if i not in path_of]
    if missing:
        raise DataError(
            f"{file}: {len(missing)} of {len(indices)} images are missing, the first is {missing[0]} (looked in "
            f"{file.parent}). Restore them, or remove their frames."
        )
    poses = np.stack([_parse_pose(matrix, name, file) for name, matrix in entries])
    check_rigid(torch.from_numpy(poses), [name for name, _ in entries])
    views = []
    for i in indices:
        path, settings = path_of[i], {**content, **frames[i]}
        name = path.relative_to(file.parent).as_posix() if path.is_relative_to(file.parent) else str(path)
        mask = settings.get("mask_path")
        if mask is not None and not (file.parent / mask).is_file():
            raise DataError(f"{file}: the mask {mask} of {name} is missing")
        read_mask = None if mask is None else mask_reader(file.parent / mask)
        intrinsics, distortion = _parse_intrinsics(settings, name, file), _parse_distortion(settings, name, file)
        views.append(LazyView(name, image_reader(path), intrinsics, poses[i], read_mask, distortion))
    return views, poses


def _select_frames(content: dict[str, Any], names: Sequence[str], split: str | None) -> list[int]:
    filenames = content.get(f"{split}_filenames")
    if filenames is None:
        return split_every_eighth(len(names), split)
    selected = {PurePosixPath(name) for name in filenames}  # normalises ./images/0.png to images/0.png
    return [i for i, name in enumerate(names) if PurePosixPath(name) in selected]


def _find_image(folder: Path, name: str) -> Path | None:
    path = folder / name
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return path if path.is_file() else None
    candidates = (Path(f"{path}{suffix}") for suffix in DEFAULT_SUFFIXES)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _parse_pose(values: Any, name: str, file: Path) -> np.ndarray:
    """Return a pose [4, 4]; some writers omit its last row."""
    try:
        matrix = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{file}: the transform_matrix of {name} is not a matrix of numbers: {error}") from error
    if matrix.shape == (3, 4):
        matrix = np.concatenate([matrix, [[0.0, 0, 0, 1]]])
    if matrix.shape != (4, 4):
        raise DataError(f"{file}: the transform_matrix of {name} has shape {list(matrix.shape)}, not [4, 4]")
    return matrix


def _parse_intrinsics(settings: dict[str, Any], name: str, file: Path) -> IntrinsicsFunction:
    """Return K from `fl_x`, else from `camera_angle_x`; in pixels of an image of `w` by `h`, or of the stored image."""
    try:
        if "fl_x" in settings:
            width, height, fx = (float(settings[key]) for key in ("w", "h", "fl_x"))
            fy = float(settings.get("fl_y", fx))
            cx, cy = float(settings.get("cx", width / 2)), float(settings.get("cy", height / 2))
            return scale_intrinsics(make_intrinsics(fx, fy, cx, cy), height, width, name)
        return _intrinsics_from_angles(settings, name)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{file}: no focal length for {name} ({type(error).__name__}: {error}). It needs `camera_angle_x`, "
            "alone or with both `w` and `h`, or `fl_x` with `w` and `h`."
        ) from error


def _intrinsics_from_angles(settings: dict[str, Any], name: str) -> IntrinsicsFunction:
    angle_x = float(settings["camera_angle_x"])
    angle_y, cx, cy = (float(settings[key]) if key in settings else None for key in ("camera_angle_y", "cx", "cy"))
    if not all(0 < angle < math.pi for angle in (angle_x, angle_y) if angle is not None):
        raise ValueError("an angle is not between 0 and pi radians")
    intrinsics = fov_intrinsics(angle_x, angle_y, cx, cy)
    if "w" not in settings and "h" not in settings:
        return intrinsics
    width, height = (float(settings[key]) for key in ("w", "h"))
    return scale_intrinsics(intrinsics(height, width), height, width, name)


def _parse_distortion(settings: dict[str, Any], name: str, file: Path) -> Distortion | None:
    model = settings.get("camera_model", "OPENCV")
    if model not in CAMERA_MODELS:
        raise DataError(
            f"{file}: {name} has the camera model {model}; supported: {', '.join(CAMERA_MODELS)}. Undistort the images "
            "first."
        )
    try:
        values = {key: float(settings.get(key, 0.0)) for key in ("k1", "k2", "k3", "p1", "p2")}
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{file}: the distortion of {name} is not a number: {error}") from error
    if not all(math.isfinite(value) for value in values.values()):
        raise DataError(f"{file}: the distortion of {name} is not finite: {values}")
    return Distortion(**values) if any(values.values()) else None
