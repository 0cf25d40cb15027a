"""One instance of the ShapeNet renderings of Scene Representation Networks (Sitzmann et al. 2019)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from factorkit.data.files import list_images
from factorkit.data.views.cameras import estimate_depth_range, make_intrinsics, scale_intrinsics
from factorkit.data.views.loading import LazyView, SceneSettings, image_reader, split_every_eighth
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError

OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenCV: x right, y down, looking along z


def is_srn(path: Path) -> bool:
    """Return whether this is a folder with rgb/, pose/ and intrinsics.txt."""
    return (path / "rgb").is_dir() and (path / "pose").is_dir() and (path / "intrinsics.txt").is_file()


def read_srn(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split; every 8th is for testing.

    Raises:
        DataError: files with other contents than numbers, images and poses that do not match, or an invalid pose.
    """
    file = path / "intrinsics.txt"
    lines = [_parse_numbers(line, file) for line in _read_text(file).splitlines() if line.strip()]
    if len(lines) < 2 or len(lines[0]) < 3 or len(lines[-1]) != 2:
        raise DataError(f"{file}: expected `focal cx cy` in the first line and `height width` in the last")
    (focal, cx, cy), (height, width) = lines[0][:3], lines[-1]
    k = make_intrinsics(focal, focal, cx, cy)
    images = {image.stem: image for image in list_images(path / "rgb")}
    matrices = {file.stem: file for file in sorted((path / "pose").glob("*.txt"))}
    unmatched = sorted(images.keys() ^ matrices.keys())
    if unmatched or not images:
        raise DataError(
            f"{path}: {len(images)} images in rgb/ and {len(matrices)} poses in pose/, which must match by name"
            f"{f'; {unmatched[0]} is only in one of them' if unmatched else ''}"
        )
    stems = sorted(images)
    poses = np.stack([_read_pose(matrices[stem]) for stem in stems]) @ OPENCV_TO_OPENGL
    check_rigid(torch.from_numpy(poses), [f"pose/{stem}.txt" for stem in stems])
    near, far = estimate_depth_range(poses)
    views = []
    for i in split_every_eighth(len(stems), split):
        image = images[stems[i]]
        name = f"rgb/{image.name}"
        views.append(LazyView(name, image_reader(image), scale_intrinsics(k, height, width, name), poses[i]))
    return views, SceneSettings("object", near, far)


def _read_pose(file: Path) -> np.ndarray:
    values = _parse_numbers(_read_text(file), file)
    if len(values) != 16:
        raise DataError(f"{file}: {len(values)} numbers, but a pose has 16")
    return np.array(values).reshape(4, 4)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _parse_numbers(text: str, file: Path) -> list[float]:
    try:
        return [float(word) for word in text.split()]
    except ValueError as error:
        raise DataError(f"{file}: expected only numbers: {error}") from error
