"""The training views of a run: stored in its folder, and described so that it resumes only with the same views."""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.views import SceneLayout, Views
from factorkit.nerfdiff.config import SIZES
from factorkit.nerfdiff.scene import Scene, shared_camera
from factorkit.utils.errors import CheckpointError
from factorkit.utils.files import read_arrays, replacing

FILE_NAME = "views.npz"
SEARCH_FILE = "search.json"  # the record of the searches that were tried in a run folder
OPTIONAL = ("poses", "background", "loss_masks", "content_sizes")
DESCRIBED_DIGITS = 5  # of intrinsics, relative to the image's sides, and of colours


class TrainingData(NamedTuple):
    """Where the views of a run came from, so that an export finds their files again.

    Attributes:
        source: absolute path; None: objects in memory.
        reading: the arguments of :func:`factorkit.data.views.open.open_views` that they were read with.
        size: height and width before they were reduced, of views that were given as such; else None.
    """

    source: str | None
    reading: dict[str, Any]
    size: tuple[int, int] | None


UNKNOWN_DATA = TrainingData(None, {}, None)


def describe_data(data: Any, reading: dict[str, Any]) -> TrainingData:
    """Return where data that were given to a training lie."""
    values = {name: _absolute(value) for name, value in reading.items() if value is not None}
    if not isinstance(data, (str, os.PathLike)) or not all(isinstance(x, (str, float, int)) for x in values.values()):
        return TrainingData(None, {}, data.size if isinstance(data, Views) else None)
    return TrainingData(str(Path(data).expanduser().resolve()), values, None)


def _absolute(value: Any) -> Any:
    """Return an existing path as an absolute one, and other values unchanged."""
    if isinstance(value, (str, os.PathLike)) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def store_views(folder: Path, views: Views, data: TrainingData = UNKNOWN_DATA) -> None:
    """Write images and masks (8 bits a channel), names, cameras, background and origin to the run folder.

    Raises:
        CheckpointError: the file cannot be written.
    """
    arrays = {
        "images": (views.images * 255).round().byte().numpy(),
        "names": np.array(views.names),
        "intrinsics": views.intrinsics.numpy(),
        "layout": np.array(views.layout),
        "origin": np.array(views.origin),
        "data": np.array(json.dumps(data._asdict())),
    }
    if views.masks is not None:
        arrays["masks"] = (views.masks * 255).round().byte().numpy()
    for name in OPTIONAL:
        value = getattr(views, name)
        if value is not None:
            arrays[name] = (value.byte() if name == "loss_masks" else value).numpy()
    path = folder / FILE_NAME
    try:
        with replacing(path) as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]  # numpy types all keywords as bool
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}. Free some space, or give another out=") from error


def load_views(folder: Path | None) -> Views | None:
    """Load the views that :func:`store_views` wrote; None if there are none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = None if folder is None else folder / FILE_NAME
    if path is None or not path.is_file():
        return None
    try:
        arrays = read_arrays(path)
        optional: dict[str, Any] = {k: torch.from_numpy(arrays[k]) for k in OPTIONAL if k in arrays}
        if "loss_masks" in optional:
            optional["loss_masks"] = optional["loss_masks"].float()
        if "masks" in arrays:
            optional["masks"] = torch.from_numpy(arrays["masks"]).float() / 255
        if "origin" in arrays:
            optional["origin"] = tuple(arrays["origin"].tolist())
        return Views(
            torch.from_numpy(arrays["images"]).float() / 255,
            [str(name) for name in arrays["names"]],
            torch.from_numpy(arrays["intrinsics"]),
            layout=cast(SceneLayout, str(arrays["layout"])),
            **optional,
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:  # of shapes, types and names
        raise CheckpointError(f"cannot read {path}: {error}. Run the training command again to restore it") from error


def load_data(folder: Path | None) -> TrainingData:
    """Load where the views of a run came from; nothing for runs of earlier versions.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = None if folder is None else folder / FILE_NAME
    if path is None or not path.is_file():
        return UNKNOWN_DATA
    try:
        arrays = read_arrays(path)
        if "data" not in arrays:
            return UNKNOWN_DATA
        values = json.loads(str(arrays["data"]))
        return TrainingData(values["source"], dict(values["reading"]), values["size"] and tuple(values["size"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Run the training command again to restore it") from error


def describe_scene(scene: Scene, views: Views, known_poses: bool) -> dict[str, Any]:
    """Return what identifies the views of a run, and the model's shape, for its stored settings.

    Args:
        scene: prepared from ``views``.
        views: at the scene's size.
        known_poses: whether their poses are used in training; poses that only serve for scoring may change.
    """
    return {
        "views": len(scene.images),
        "size": list(scene.size),
        "layout": scene.layout,
        "distance": scene.distance,
        "sha256": _digest(scene.images),
        **({} if scene.loss_masks is None else {"loss_masks": _digest(scene.loss_masks)}),
        **describe_cameras(views, known_poses),
    }


def describe_cameras(views: Views, known_poses: bool) -> dict[str, Any]:
    """Return intrinsics (fx, fy, cx, cy in units of width and height), background and, if used, a hash of the poses.

    Intrinsics that differ between views are described by a hash too.
    """
    camera = shared_camera(views)
    values = [camera.intrinsics[at] for at in ((0, 0), (1, 1), (0, 2), (1, 2))]
    description: dict[str, Any] = {
        "intrinsics": [round(float(x), DESCRIBED_DIGITS) for x in values],
        "background": [round(x, DESCRIBED_DIGITS) for x in camera.background.tolist()],
    }
    if camera.view_intrinsics is not None:
        description["view_intrinsics"] = _digest((camera.view_intrinsics * 10**DESCRIBED_DIGITS).round())
    if known_poses and views.poses is not None:
        description["poses"] = _digest(views.poses.float())
    return description


def complete_settings(settings: dict[str, Any], folder: Path, requested: dict[str, Any]) -> dict[str, Any]:
    """Add to stored settings of an earlier version what they lack: ``ordered``, and the cameras.

    These come from the stored views, or from the ``requested`` settings if there are none. A folder that was claimed
    for structure from motion, but has no scene yet, is free for any other settings: it holds no training.
    """
    settings = {"ordered": "no", **settings}
    scene = settings.get("scene")
    if scene is None and not (folder / SEARCH_FILE).is_file():
        return requested
    if scene is None:  # in the middle of a change from one search to another
        chosen = ("scene", "search", "ordered", "optimize_camera", "unbounded", "field", *SIZES)
        return settings | {name: requested[name] for name in chosen if name in requested}
    if not isinstance(scene, dict) or "intrinsics" in scene:
        return settings
    stored = None
    with suppress(CheckpointError):
        stored = load_views(folder)
    if stored is not None:
        cameras = describe_cameras(stored, requested["poses"] == "known")
    else:
        cameras = {k: v for k, v in requested["scene"].items() if k in ("intrinsics", "background", "poses")}
    return {**settings, "scene": {**scene, **cameras}}


def check_scene_description(scene: Any) -> dict[str, Any]:
    """Return a stored scene description after checking what the model is built from.

    Raises:
        ValueError: layout, distance or size is missing or impossible.
    """
    if not isinstance(scene, dict) or scene.get("layout") not in ("object", "forward"):
        raise ValueError(f"scene={scene!r:.80} has no layout")
    distance, size = scene.get("distance"), scene.get("size")
    if not isinstance(distance, (int, float)) or not 0 < distance < math.inf:
        raise ValueError(f"the scene's distance={distance!r:.80} is not a positive number")
    distortion = scene.get("distortion", 0.0)
    if not isinstance(distortion, (int, float)) or not math.isfinite(distortion):
        raise ValueError(f"the scene's distortion={distortion!r:.80} is not a number")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**15 for side in size)):
        raise ValueError(f"the scene's size={size!r:.80} is not a height and a width")
    return scene


def _digest(values: Tensor) -> str:
    """Return the beginning of a hash of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]
