"""Cameras and images for nerfstudio and COLMAP."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import roma
import torch
from PIL import Image

from factorkit.data.views.views import Views
from factorkit.nerfdiff.export.points import Shape
from factorkit.nerfdiff.scene import view_poses
from factorkit.utils.images import images_to_pixels

TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))  # y down, looking along z
IMAGE_FOLDER = "images_factorkit"  # written by exports only; images/ may hold the training images
COLMAP_FILES = CAMERAS_FILE, IMAGES_FILE, POINTS_FILE = ("cameras.txt", "images.txt", "points3D.txt")
Files = dict[str, Callable[[Path], Any]]  # what saves each file, by its name relative to the output folder
NO_TRACK = -1  # COLMAP's error of a point that was not triangulated


def make_transforms(file: str, views: Views) -> Files:
    """Make a transforms.json in nerfstudio's format (docs.nerf.studio, "Data conventions"), and the images.

    OpenGL axes, intrinsics in pixels; they are written once if all frames share them.
    """
    height, width = views.size
    intrinsics = [
        {
            "fl_x": k[0, 0].item(),
            "fl_y": k[1, 1].item(),
            "cx": k[0, 2].item(),
            "cy": k[1, 2].item(),
            "w": width,
            "h": height,
        }
        for k in views.intrinsics
    ]
    shared = intrinsics[0] if all(k == intrinsics[0] for k in intrinsics) else {}
    names, files = make_images(views)
    frames = [
        {"file_path": f"{IMAGE_FOLDER}/{name}", **({} if shared else k), "transform_matrix": pose.tolist()}
        for name, k, pose in zip(names, intrinsics, view_poses(views).double(), strict=True)
    ]
    content = {"camera_model": "OPENCV", **shared, "frames": frames}
    return {**files, file: partial(_write_text, text=json.dumps(content, indent=2) + "\n")}


def make_colmap(views: Views, cloud: Shape) -> Files:
    """Make COLMAP's text format (colmap.github.io, "Output Format") and the images.

    One PINHOLE camera for each distinct matrix of intrinsics, world-to-camera quaternions and translations in OpenCV's
    axes, and points without tracks.
    """
    names, files = make_images(views)
    height, width = views.size
    distinct, camera = torch.unique(views.intrinsics.double(), dim=0, return_inverse=True)
    lines = ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]"]
    for i, k in enumerate(distinct, 1):
        parameters = torch.stack((k[0, 0], k[1, 1], k[0, 2], k[1, 2]))
        lines.append(f"{i} PINHOLE {width} {height} {_format_numbers(parameters)}")
    files[CAMERAS_FILE] = partial(_write_lines, lines=lines)

    world_to_camera = torch.linalg.inv(view_poses(views).double() @ TO_OPENCV)
    rotations = roma.special_procrustes(world_to_camera[:, :3, :3])
    quaternions = roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(rotations))
    lines = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME, and on a line of its own POINTS2D[]: none"]
    for i, name in enumerate(names):
        pose = f"{_format_numbers(quaternions[i])} {_format_numbers(world_to_camera[i, :3, 3])}"
        lines += [f"{i + 1} {pose} {int(camera[i]) + 1} {name}", ""]
    files[IMAGES_FILE] = partial(_write_lines, lines=lines)

    lines = ["# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]: none"]
    for i, (point, color) in enumerate(zip(cloud.points.tolist(), cloud.colors.tolist(), strict=True), 1):
        lines.append(f"{i} {' '.join(f'{x:.7g}' for x in point)} {' '.join(map(str, color))} {NO_TRACK}")
    files[POINTS_FILE] = partial(_write_lines, lines=lines)
    return files


def make_images(views: Views) -> tuple[list[str], Files]:
    """Return the names of the views below ``IMAGE_FOLDER``, with forward slashes, and what saves them as PNG files.

    They are transparent if the views have masks and a known background.
    """
    names = file_names(views.names)
    images = views.images
    if views.masks is not None and views.background is not None:
        background = (1 - views.masks) * views.background[:, None, None]
        straight = (images - background) / views.masks.clamp_min(1e-6)
        images = torch.cat([straight * (views.masks > 0), views.masks], dim=1)
    pixels = images_to_pixels(images)
    return names, {f"{IMAGE_FOLDER}/{n}": Image.fromarray(p).save for n, p in zip(names, pixels, strict=True)}


def file_names(names: Sequence[str]) -> list[str]:
    """Return distinct names of PNG files below one folder, without spaces (which end COLMAP's fields)."""
    result: list[str] = []
    for name in names:
        parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
        path = PurePosixPath(*("_".join(part.replace(":", "_").split()) for part in parts) if parts else ("view",))
        unique = path.with_suffix(".png").as_posix()
        if unique in result:
            unique = f"{path.as_posix()}.png"
        while unique in result:
            unique = f"{unique.removesuffix('.png')}_.png"
        result.append(unique)
    return result


def _format_numbers(values: torch.Tensor) -> str:
    return " ".join(f"{x:.17g}" for x in values.tolist())


def _write_lines(path: Path, lines: list[str]) -> None:
    _write_text(path, "\n".join(lines) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
