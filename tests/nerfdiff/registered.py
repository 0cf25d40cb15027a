"""A stand-in for structure from motion, without features and pycolmap: cameras of an orbit for all views but two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import roma
import torch

from factorkit.nerfdiff import search
from factorkit.nerfdiff.export.cameras import TO_OPENCV
from factorkit.nerfdiff.stages.feature_images import FeatureImage
from factorkit.nerfdiff.stages.sfm import MODEL, SfmResult
from factorkit.rendering import orbit


def find_cameras(images: Sequence[FeatureImage], folder: Path, ordered: bool, progress: bool) -> SfmResult:
    """Write a COLMAP model; see :func:`factorkit.nerfdiff.stages.sfm.find_cameras`."""
    names = tuple(image.name for image in images)
    cameras = torch.linalg.inv(orbit(len(names), 3.0, 20.0).double() @ TO_OPENCV)
    quaternions = roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(cameras[:, :3, :3]))
    height, width = images[0].pixels.shape
    fx, fy, cx, cy = images[0].intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]]
    lines = [
        " ".join(map(str, (i, *quaternion.tolist(), *camera[:3, 3].tolist(), 1, name))) + "\n\n"
        for i, (name, quaternion, camera) in enumerate(zip(names, quaternions, cameras, strict=True))
    ]
    model = folder / MODEL
    model.mkdir(parents=True, exist_ok=True)
    (model / "cameras.txt").write_text(f"1 PINHOLE {width} {height} {fx} {fy} {cx} {cy}\n")
    (model / "images.txt").write_text("".join(lines[:-2]))
    return SfmResult(names[:-2], names[-2:], model)


def stand_in(first: str, accept: bool = True) -> dict[str, Any]:
    """Return attributes of the module ``search``, with which this module finds cameras.

    Args:
        first: the search that is chosen by the views.
        accept: whether what structure from motion finds passes its first check.
    """
    limits = dict.fromkeys(search.MAX_CROSS, np.inf if accept else 0.0)
    return {
        "find_cameras": find_cameras,
        "decide": lambda data, reading: (first, "it is the first here"),
        "_find_obstacle": lambda data, reading, min_side: ("", []),
        "MAX_CROSS": limits,
    }
