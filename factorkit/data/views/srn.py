"""One instance of the ShapeNet renderings of Scene Representation Networks (Sitzmann et al. 2019)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from factorkit.data.open import list_images
from factorkit.data.views.cameras import estimate_depth_range, scale_intrinsics
from factorkit.data.views.loading import Shot, every_eighth, picture_file
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError

TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # from OpenCV's axes: x right, y down, looking along z


def is_srn(path: Path) -> bool:
    """Whether this is a folder with rgb/, pose/ and intrinsics.txt."""
    return (path / "rgb").is_dir() and (path / "pose").is_dir() and (path / "intrinsics.txt").is_file()


def read_srn(path: Path, split: str | None) -> tuple[list[Shot], dict[str, Any]]:
    """The shots of a split (every 8th view is for the test) and their settings.

    Raises:
        DataError: files that are no numbers in this layout, pictures without a pose or poses without a picture, a pose
            that is not rigid or not finite.
    """
    file = path / "intrinsics.txt"
    lines = [_numbers(line, file) for line in _text(file).splitlines() if line.strip()]
    if len(lines) < 2 or len(lines[0]) < 3 or len(lines[-1]) != 2:
        raise DataError(f"{file}: expected `focal cx cy` in the first line and `height width` in the last")
    (focal, cx, cy), (height, width) = lines[0][:3], lines[-1]
    k = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
    pictures = {picture.stem: picture for picture in list_images(path / "rgb")}
    matrices = {file.stem: file for file in sorted((path / "pose").glob("*.txt"))}
    alone = sorted(pictures.keys() ^ matrices.keys())
    if alone or not pictures:
        raise DataError(
            f"{path}: {len(pictures)} pictures in rgb/ and {len(matrices)} poses in pose/, which must "
            f"match by name{f'; {alone[0]} has no partner' if alone else ''}"
        )
    names = sorted(pictures)
    poses = np.stack([_pose(matrices[name]) for name in names]) @ TO_OPENGL
    check_rigid(torch.from_numpy(poses), [f"pose/{name}.txt" for name in names])
    near, far = estimate_depth_range(poses)
    shots = []
    for i in every_eighth(len(names), split):
        name, picture = f"rgb/{pictures[names[i]].name}", pictures[names[i]]
        shots.append(Shot(name, picture_file(picture), scale_intrinsics(k, height, width, name), poses[i]))
    return shots, {"layout": "object", "near": near, "far": far}


def _pose(file: Path) -> np.ndarray:
    values = _numbers(_text(file), file)
    if len(values) != 16:
        raise DataError(f"{file}: {len(values)} numbers, but a pose has 16")
    return np.array(values).reshape(4, 4)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _numbers(text: str, file: Path) -> list[float]:
    try:
        return [float(word) for word in text.split()]
    except ValueError as error:
        raise DataError(f"{file}: not numbers alone: {error}") from error
