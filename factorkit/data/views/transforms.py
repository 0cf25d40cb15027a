"""Views described by a transforms.json: NeRF's synthetic scenes from Blender, and nerfstudio's data format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from factorkit.data.sources import IMAGE_SUFFIXES
from factorkit.data.views.cameras import (
    Distortion,
    detect_layout,
    estimate_depth_range,
    fov_intrinsics,
    scale_intrinsics,
)
from factorkit.data.views.loading import Shot, every_eighth, mask_file, picture_file
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError
from factorkit.utils.safe_reading import read_json

SPLITS = {"train": ("train",), "test": ("test",), None: ("train", "val", "test")}
PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")


def is_transforms(path: Path) -> bool:
    """Whether this is a transforms file, or a folder with one."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("transforms.json", "transforms_train.json"))
    return path.suffix.lower() == ".json"


def read_transforms(path: Path, split: str | None) -> tuple[list[Shot], dict[str, Any]]:
    """The shots of a split, and the settings `views_read.load` takes with them.

    Blender's folders have one file for each split. nerfstudio's one file may list `train_filenames` and
    `test_filenames`; without, every 8th frame is for the test. A file that is named itself is one split by itself if
    its name says so (transforms_test.json).

    Raises:
        DataError: no JSON, no frames, a frame that names a missing picture, a matrix that is not rigid or not finite, a
            camera that no pinhole describes.
    """
    blender = path.is_dir() and (path / "transforms_train.json").is_file()
    if blender:
        files = [path / f"transforms_{name}.json" for name in SPLITS[split]]
        missing = [file for file in files if not file.is_file()]
        if split and missing:
            raise DataError(f"{missing[0]}: no such file, but the split {split!r} was asked for")
        files = [file for file in files if file.is_file()]
        parts = [_read_file(file, None) for file in files]
    else:
        file = path / "transforms.json" if path.is_dir() else path
        named = any(file.stem == f"transforms_{name}" for name in ("train", "val", "test"))
        parts = [_read_file(file, None if named else split)]
    shots = [shot for part, _ in parts for shot in part]
    poses = np.concatenate([poses for _, poses in parts])
    layout = "object" if blender else detect_layout(poses)
    near, far = estimate_depth_range(poses) if layout == "object" else (None, None)
    return shots, {"layout": layout, "near": near, "far": far}


def _read_file(file: Path, split: str | None) -> tuple[list[Shot], np.ndarray]:
    """The shots of a split, and the poses [F, 4, 4] of all frames, which tell what kind of scene it is."""
    try:
        content = read_json(file)
        frames = content["frames"]
        entries = [(frame["file_path"], frame["transform_matrix"]) for frame in frames]
        texts = [frame[key] for frame in frames for key in ("file_path", "mask_path") if frame.get(key) is not None]
        listed = [name for key in content if key.endswith("_filenames") for name in content[key]]
        if not all(isinstance(text, str) for text in [*texts, *listed]):
            raise TypeError("a file is named by something else than text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: not a transforms file ({type(error).__name__}: {error}). It needs `frames`, each with "
            "`file_path` and `transform_matrix`."
        ) from error
    if not frames:
        raise DataError(f"{file}: no frames in it")
    chosen = _chosen(content, [name for name, _ in entries], split)
    if not chosen:
        raise DataError(f"{file}: no frame belongs to the split {split!r}")
    sought = [_picture(file.parent, entries[i][0]) for i in chosen]
    paths = [path for path in sought if path is not None]
    missing = [entries[i][0] for i, path in zip(chosen, sought, strict=True) if path is None]
    if missing:
        raise DataError(
            f"{file}: {len(missing)} of {len(chosen)} pictures are missing, the first is {missing[0]} (looked in "
            f"{file.parent}). Bring them back or take their frames out."
        )
    names = [
        path.relative_to(file.parent).as_posix() if path.is_relative_to(file.parent) else str(path) for path in paths
    ]
    poses = np.stack([_matrix(matrix, name, file) for name, matrix in entries])
    check_rigid(torch.from_numpy(poses), [name for name, _ in entries])
    shots = []
    for i, path, name in zip(chosen, paths, names, strict=True):
        settings = {**content, **frames[i]}
        mask = settings.get("mask_path")
        if mask is not None and not (file.parent / mask).is_file():
            raise DataError(f"{file}: the mask {mask} of {name} is missing")
        shots.append(
            Shot(
                name,
                picture_file(path),
                _intrinsics(settings, name, file),
                poses[i],
                mask_file(file.parent / mask) if mask is not None else None,
                _distortion(settings, name, file),
            )
        )
    return shots, poses


def _chosen(content: dict[str, Any], names: Sequence[str], split: str | None) -> list[int]:
    listed = content.get(f"{split}_filenames")
    if listed is not None:
        wanted = {PurePosixPath(name) for name in listed}  # ./images/0.png is images/0.png
        return [i for i, name in enumerate(names) if PurePosixPath(name) in wanted]
    return every_eighth(len(names), split)


def _picture(folder: Path, name: str) -> Path | None:
    """The file of a frame: Blender's files leave the suffix out."""
    path = folder / name
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return path if path.is_file() else None
    return next((found for suffix in (".png", ".jpg", ".jpeg") if (found := Path(f"{path}{suffix}")).is_file()), None)


def _matrix(values: Any, name: str, file: Path) -> np.ndarray:
    """A pose with its last row, which some writers leave out."""
    try:
        matrix = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{file}: the transform_matrix of {name} is no matrix of numbers: {error}") from error
    if matrix.shape == (3, 4):
        matrix = np.concatenate([matrix, [[0.0, 0, 0, 1]]])
    if matrix.shape != (4, 4):
        raise DataError(f"{file}: the transform_matrix of {name} has shape {list(matrix.shape)}, not [4, 4]")
    return matrix


def _intrinsics(settings: dict[str, Any], name: str, file: Path) -> Callable[[int, int], np.ndarray]:
    """K from `fl_x`, else from `camera_angle_x`: in pixels of a picture of `w` by `h`, without them of the file's."""
    try:
        if "fl_x" in settings:
            width, height, fx = (float(settings[key]) for key in ("w", "h", "fl_x"))
            fy = float(settings.get("fl_y", fx))
            cx, cy = float(settings.get("cx", width / 2)), float(settings.get("cy", height / 2))
            return scale_intrinsics(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), height, width, name)
        return _from_angle(settings, name)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{file}: no focal length for {name} ({type(error).__name__}: {error}). It needs `camera_angle_x`, "
            "alone or with both `w` and `h`, or `fl_x` with `w` and `h`."
        ) from error


def _from_angle(settings: dict[str, Any], name: str) -> Callable[[int, int], np.ndarray]:
    angle = float(settings["camera_angle_x"])
    angle_y, cx, cy = (float(settings[key]) if key in settings else None for key in ("camera_angle_y", "cx", "cy"))
    if not all(0 < value < math.pi for value in (angle, angle_y) if value is not None):
        raise ValueError("an angle that is not between 0 and pi radians")
    k = fov_intrinsics(angle, angle_y, cx, cy)
    if "w" not in settings and "h" not in settings:
        return k
    width, height = (float(settings[key]) for key in ("w", "h"))
    return scale_intrinsics(k(height, width), height, width, name)


def _distortion(settings: dict[str, Any], name: str, file: Path) -> Distortion | None:
    model = settings.get("camera_model", "OPENCV")
    if model not in PINHOLES:
        raise DataError(
            f"{file}: {name} was taken by a camera of the model {model}; only {', '.join(PINHOLES)} are "
            "read. Undistort the pictures first."
        )
    try:
        values = {key: float(settings.get(key, 0.0)) for key in ("k1", "k2", "k3", "p1", "p2")}
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{file}: the distortion of {name} is no number: {error}") from error
    if not all(math.isfinite(value) for value in values.values()):
        raise DataError(f"{file}: the distortion of {name} is not finite: {values}")
    return Distortion(**values) if any(values.values()) else None
