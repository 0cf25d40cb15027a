"""Folders rgb/, pose/ and intrinsics.txt: ShapeNet-SRN (Sitzmann et al. 2019) and NSVF (Liu et al. 2020)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from factorkit.data.files import format_examples, list_images
from factorkit.data.views.arrangement import OPENCV_TO_OPENGL
from factorkit.data.views.cameras import IntrinsicsFunction, fixed_intrinsics, make_intrinsics, scale_intrinsics
from factorkit.data.views.image_files import MAX_MISSING_FRACTION
from factorkit.data.views.loading import LazyView, SceneSettings, image_reader
from factorkit.data.views.splits import split_every_eighth
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError, format_count

NSVF_SPLITS = {"0": "train", "1": "val", "2": "test"}  # the digit before the first underscore of a name
NSVF_NAME = re.compile(r"([012])_.+")


def is_srn(path: Path) -> bool:
    """Return whether this is a folder with rgb/, pose/ and intrinsics.txt."""
    return (path / "rgb").is_dir() and (path / "pose").is_dir() and (path / "intrinsics.txt").is_file()


def read_srn(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split: by NSVF's names (0_ train, 1_ val, 2_ test), else every 8th is for testing.

    Raises:
        DataError: files with other contents than numbers, more than half of the images or poses without their
            counterpart, or an invalid pose.
    """
    intrinsics_of = _read_intrinsics(path / "intrinsics.txt")
    images = {image.stem: image for image in list_images(path / "rgb")}
    matrices = {file.stem: file for file in sorted((path / "pose").glob("*.txt"))}
    stems, unmatched = sorted(images.keys() & matrices.keys()), sorted(images.keys() ^ matrices.keys())
    if unmatched or not images:
        problem = (
            f"{format_count(len(images), 'image')} in rgb/ and {format_count(len(matrices), 'pose')} in pose/, "
            "which must match by name"
            f"{f'; {unmatched[0]} is only in one of them' if unmatched else ''}"
        )
        if len(unmatched) > MAX_MISSING_FRACTION * len(images | matrices) or not images:
            raise DataError(f"{path}: {problem}")
        warnings.warn(f"{path}: left out {len(unmatched)}: {problem}: {format_examples(unmatched)}.", stacklevel=2)
    poses = np.stack([_read_pose(matrices[stem]) for stem in stems]) @ OPENCV_TO_OPENGL
    check_rigid(torch.from_numpy(poses), [f"pose/{stem}.txt" for stem in stems])
    views = []
    names = [f"rgb/{images[stem].name}" for stem in stems]
    for i in _select(stems, split):
        views.append(LazyView(names[i], image_reader(images[stems[i]]), intrinsics_of(names[i]), poses[i]))
    return views, SceneSettings(names, poses)


def _select(stems: list[str], split: str | None) -> list[int]:
    """Return the rows of a split. NSVF's validation views are for testing if there are no test views."""
    matches = [NSVF_NAME.fullmatch(stem) for stem in stems]
    splits = [NSVF_SPLITS[match.group(1)] for match in matches if match is not None]
    if split is None or len(splits) < len(stems) or len(set(splits)) < 2:
        return split_every_eighth(len(stems), split)
    test = "test" if "test" in splits else "val"
    target = "train" if split == "train" else test
    return [i for i, name in enumerate(splits) if name == target]


def _read_intrinsics(file: Path) -> Callable[[str], IntrinsicsFunction]:
    """Return a function from a view's name to its intrinsics.

    SRN: `focal cx cy` in the first line, `height width` in the last. NSVF: that, or K as 3 or 4 rows.
    """
    lines = [_parse_numbers(line, file) for line in _read_text(file).splitlines() if line.strip()]
    if len(lines) in (3, 4) and all(len(line) in (3, 4) for line in lines):
        matrix = np.array([line[:3] for line in lines[:3]])
        return lambda name: fixed_intrinsics(matrix, name)
    if len(lines) < 2 or len(lines[0]) < 3 or len(lines[-1]) != 2:
        raise DataError(
            f"{file}: expected `focal cx cy` in the first line and `height width` in the last, or a matrix of 3 or 4 "
            "rows"
        )
    (focal, cx, cy), (height, width) = lines[0][:3], lines[-1]
    k = make_intrinsics(focal, focal, cx, cy)
    return lambda name: scale_intrinsics(k, height, width, name)


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
