"""Cameras in JSON files, to render from: what `factorkit pose` and `factorkit sample` write, and transforms.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.camera_keys import merge_settings, parse_distortion, parse_intrinsics, refuse_unmodelled
from factorkit.data.views.views import check_rigid, target_size
from factorkit.nerfdiff.export.originals import find_originals
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.splat_scene import SplatScene
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.files import read_json

FOCAL_KEYS = ("fl_x", "camera_angle_x", "x_fov")


class CameraFile(NamedTuple):
    """Cameras of a file.

    Attributes:
        names: of the cameras.
        poses: camera to world, OpenGL axes, float64 [B, 4, 4].
        intrinsics: K [3, 3] of each in pixels of its size, or None.
        sizes: height and width of each, or None.
        in_run: whether the coordinates are those of a run; None: the file does not say.
    """

    names: list[str]
    poses: Tensor
    intrinsics: list[Tensor] | None
    sizes: list[tuple[int, int]] | None
    in_run: bool | None


def read_cameras(path: Path) -> CameraFile:
    """Read cameras; a lens distortion is left out, since renders have none.

    Raises:
        DataError: another content, a pose that is not rigid, intrinsics of some cameras only, or without image size.
    """
    try:
        content: dict[str, Any] = read_json(path)
        frames = content.get("frames", [{"camera_to_world": matrix} for matrix in content.get("poses", ())])
        in_run = True if all("camera_to_world" in frame for frame in frames) else None
        matrices = [np.array(frame["camera_to_world" if in_run else "transform_matrix"], float) for frame in frames]
        names = [str(frame.get("name", frame.get("file_path", i))) for i, frame in enumerate(frames)]
        poses = torch.from_numpy(np.stack(matrices).reshape(-1, 4, 4))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a file of cameras ({type(error).__name__}: {error}). It needs `frames`, each with "
            "`camera_to_world` or `transform_matrix`, or `poses`."
        ) from error
    check_rigid(poses, names)
    settings = [merge_settings(content, frame) for frame in frames]
    known = [any(key in own for key in FOCAL_KEYS) for own in settings]
    if not any(known):
        return CameraFile(names, poses, None, None, in_run)
    intrinsics, sizes = [], []
    for own, has_focal, name in zip(settings, known, names, strict=True):
        if not has_focal or not {"w", "h"} <= own.keys():
            raise DataError(f"{path}: no focal length, `w` or `h` of {name}: give them for all cameras, or for none")
        refuse_unmodelled(own, name, path)
        parse_distortion(own, name, path)
        size = round(float(own["h"])), round(float(own["w"]))
        sizes.append(size)
        intrinsics.append(torch.from_numpy(parse_intrinsics(own, name, path)(*size)).float())
    return CameraFile(names, poses, intrinsics, sizes, in_run)


def render_cameras(
    run: NerfdiffRun | SplatScene, path: Path, coordinates: str | None = None, size: int | None = None
) -> list[Tensor]:
    """Render a scene from the cameras of a file, each with its own intrinsics and size.

    Args:
        run: with the scene; the coordinates of a splat file are its own.
        path: JSON file as ``factorkit pose`` and ``factorkit sample`` write it, or a transforms.json.
        coordinates: "run", or "given": those of the training data; None: the run's for files of factorkit.
        size: longer side of the images; None: that of the file, else as trained.

    Returns:
        Images [3, H, W] in [0, 1].

    Raises:
        ConfigError: the file does not say in which coordinates it is, or the data's are unknown.
        DataError: the file cannot be read.
    """
    cameras = read_cameras(path)
    if coordinates is None and cameras.in_run is None and isinstance(run, NerfdiffRun):
        raise ConfigError(
            f'{path}: give coordinates="run" (--coordinates run), as exports have by default, or "given", those of the '
            "training data"
        )
    poses = cameras.poses
    if coordinates == "given" and isinstance(run, NerfdiffRun):
        originals = find_originals(run.folder)
        to_given = None if originals is None else originals.align(run.poses)
        if to_given is None:
            raise ConfigError(f'{path}: coordinates="given", but no cameras are known of the training data')
        poses = to_given.inverse().apply(poses)
    images = []
    for i, pose in enumerate(poses.float().split(1)):
        target: int | tuple[int, int] | None = size
        lens = None
        if cameras.intrinsics is not None and cameras.sizes is not None:
            height, width = cameras.sizes[i]
            own_size = (height, width) if size is None else target_size(size, height, width)
            lens = cameras.intrinsics[i] * torch.tensor([own_size[1] / width, own_size[0] / height, 1.0])[:, None]
            target = own_size
        images.append(run.render(pose, target, intrinsics=lens).images[0])
    return images
