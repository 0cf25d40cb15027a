"""Cameras and images for nerfstudio and COLMAP."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.cameras import FisheyeDistortion, Lens
from factorkit.data.views.colmap import CAMERA_MODELS
from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.export.images import ExportView, Files, make_images, make_loss_masks
from factorkit.nerfdiff.export.shapes import Shape
from factorkit.utils.errors import DataError, format_count

TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))  # y down, looking along z
IMAGE_FOLDER = "images_factorkit"  # of transforms.json, which names it; images/ may hold the training images
MASK_FOLDER = "masks_factorkit"
COLMAP_IMAGE_FOLDER = "images"  # the one that readers of COLMAP scenes look into
COLMAP_FILES = CAMERAS_FILE, IMAGES_FILE, POINTS_FILE = tuple(
    f"sparse/0/{part}.bin" for part in ("cameras", "images", "points3D")
)
MODEL_NUMBERS = {name: number for number, name in enumerate(CAMERA_MODELS)}
LOCALISED_FILE = "localised.txt"  # names of the images whose poses were found in the finished scene
NO_TRACK = -1.0  # COLMAP's error of a point that was not triangulated


def make_transforms(file: str, views: Sequence[ExportView], poses: Tensor, applied: Similarity | None) -> Files:
    """Make a transforms.json in nerfstudio's format (docs.nerf.studio, "Data conventions"), and the images.

    OpenGL axes, intrinsics in pixels; cameras are written once if all frames share them.

    Args:
        file: name of the JSON file.
        poses: float64 [V, 4, 4], camera to world.
        applied: from the coordinates of the training data to those of the poses; None: they are the same. A point x of
            the data is at applied_scale * (applied_transform @ x).
    """
    cameras = [_transforms_camera(view) for view in views]
    shared = {key: value for key, value in cameras[0].items() if all(camera.get(key) == value for camera in cameras)}
    if any(camera != cameras[0] for camera in cameras):  # nerfstudio reads intrinsics from one place for all frames
        shared = {key: value for key, value in shared.items() if key == "camera_model"}
    names, files = make_images(views, IMAGE_FOLDER)
    masks, mask_files = make_loss_masks(views, MASK_FOLDER)
    frames = [
        {
            "file_path": f"{IMAGE_FOLDER}/{name}",
            **({} if mask is None else {"mask_path": mask}),
            **({"localised": True} if view.is_localised else {}),
            **{key: value for key, value in camera.items() if key not in shared},
            "transform_matrix": pose.tolist(),
        }
        for view, name, mask, camera, pose in zip(views, names, masks, cameras, poses, strict=True)
    ]
    transform, scale = torch.eye(3, 4, dtype=torch.float64), 1.0
    if applied is not None:
        scale = float(applied.scale)
        transform = torch.cat([applied.rotation, applied.translation[:, None] / scale], dim=1)
    content = {**shared, "applied_transform": transform.tolist(), "applied_scale": scale, "frames": frames}
    text = json.dumps(content, indent=2) + "\n"
    return {**files, **mask_files, file: lambda path: path.write_text(text, encoding="utf-8")}


def _transforms_camera(view: ExportView) -> dict[str, Any]:
    k, (height, width) = view.intrinsics, view.size
    model, terms = _nerfstudio_lens(view.distortion)
    sides = {"w": width, "h": height}
    focal = {"fl_x": float(k[0, 0]), "fl_y": float(k[1, 1]), "cx": float(k[0, 2]), "cy": float(k[1, 2])}
    return {"camera_model": model, **focal, **sides, **terms}


def _nerfstudio_lens(lens: Lens | None) -> tuple[str, dict[str, float]]:
    if lens is None:
        return "OPENCV", {}
    if isinstance(lens, FisheyeDistortion):
        return "OPENCV_FISHEYE", {"k1": lens.k1, "k2": lens.k2, "k3": lens.k3, "k4": lens.k4}
    terms = {"k1": lens.k1, "k2": lens.k2, "k3": lens.k3, "p1": lens.p1, "p2": lens.p2}
    if any(lens.denominator):
        return "FULL_OPENCV", {**terms, **dict(zip(("k4", "k5", "k6"), lens.denominator, strict=True))}
    return "OPENCV", {**terms, "k4": lens.k4}


def make_colmap(views: Sequence[ExportView], poses: Tensor, cloud: Shape) -> Files:
    """Make COLMAP's binary format (colmap.github.io, "Output Format") in sparse/0, and the images.

    One camera for each distinct one, world-to-camera quaternions and translations in OpenCV's axes, and points without
    tracks.

    Args:
        poses: float64 [V, 4, 4], camera to world, OpenGL axes.
        cloud: coloured points in the coordinates of the poses.

    Raises:
        DataError: a lens that none of COLMAP's camera models has.
    """
    import roma

    if unscored := sum(view.read_loss_mask is not None for view in views):
        warnings.warn(
            f"{format_count(unscored, 'image')} with pixels that are not scored: a COLMAP model has no place for their "
            "masks, which are left out; a transforms.json has",
            stacklevel=3,
        )
    names, files = make_images(views, COLMAP_IMAGE_FOLDER)
    cameras = [_colmap_camera(view) for view in views]
    numbers = {camera: i for i, camera in enumerate(dict.fromkeys(cameras), 1)}
    camera_bytes = struct.pack("<Q", len(numbers)) + b"".join(
        struct.pack(f"<iiQQ{len(parameters)}d", number, MODEL_NUMBERS[model], width, height, *parameters)
        for (model, width, height, parameters), number in numbers.items()
    )
    world_to_camera = torch.linalg.inv(poses @ TO_OPENCV)
    rotations = roma.special_procrustes(world_to_camera[:, :3, :3])
    quaternions = roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(rotations))
    image_bytes = struct.pack("<Q", len(names)) + b"".join(
        struct.pack("<I7dI", i, *quaternion.tolist(), *matrix[:3, 3].tolist(), numbers[camera])
        + name.encode("utf-8")
        + b"\0"
        + struct.pack("<Q", 0)  # no points
        for i, (name, quaternion, matrix, camera) in enumerate(
            zip(names, quaternions, world_to_camera, cameras, strict=True), 1
        )
    )
    layout = [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("track", "<u8")]
    points = np.zeros(len(cloud.points), layout)
    points["id"], points["xyz"], points["rgb"] = np.arange(1, len(points) + 1), cloud.points, cloud.colors
    points["error"] = NO_TRACK
    point_bytes = struct.pack("<Q", len(points)) + points.tobytes()
    for file, data in zip(COLMAP_FILES, (camera_bytes, image_bytes, point_bytes), strict=True):
        files[file] = partial(Path.write_bytes, data=data)
    if localised := "".join(f"{name}\n" for view, name in zip(views, names, strict=True) if view.is_localised):
        files[LOCALISED_FILE] = partial(Path.write_text, data=localised, encoding="utf-8")
    return files


def _colmap_camera(view: ExportView) -> tuple[str, int, int, tuple[float, ...]]:
    """Return model, width, height and parameters."""
    k, (height, width), lens = view.intrinsics, view.size, view.distortion
    pinhole = (float(k[0, 0]), float(k[1, 1]), float(k[0, 2]), float(k[1, 2]))
    if lens is None:
        return "PINHOLE", width, height, pinhole
    if isinstance(lens, FisheyeDistortion):
        return "OPENCV_FISHEYE", width, height, (*pinhole, lens.k1, lens.k2, lens.k3, lens.k4)
    if lens.k4:
        raise DataError(
            f"{view.name}: its lens has a term of r^8 (nerfstudio's k4 = {lens.k4:g}), which no camera model of COLMAP "
            "has. Export a transforms.json, or undistort the images first"
        )
    terms = (*pinhole, lens.k1, lens.k2, lens.p1, lens.p2)
    if lens.k3 or any(lens.denominator):
        return "FULL_OPENCV", width, height, (*terms, lens.k3, *lens.denominator)
    return "OPENCV", width, height, terms
