"""Cameras and their pictures for nerfstudio and for COLMAP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import roma
import torch
from PIL import Image

from factorkit.data.views.views import Views
from factorkit.nerfdiff.export.mesh import Shape
from factorkit.utils.images import images_to_pixels

TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))  # y down, looking along z
PICTURES = "images_factorkit"  # a folder that only exports write: in images/ may lie the pictures the scene was made of
NO_TRACK = -1  # COLMAP's error of a point that no one has triangulated


def write_transforms(path: Path, views: Views) -> None:
    """A transforms.json in nerfstudio's data format (docs.nerf.studio, "Data conventions") and its pictures in
    images_factorkit/: OpenGL's axes, intrinsics in pixels, for all frames at once where they are the same."""
    height, width = views.size
    lenses = [
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
    shared = lenses[0] if all(lens == lenses[0] for lens in lenses) else {}
    names = write_pictures(path.parent / PICTURES, views)
    frames = [
        {"file_path": f"{PICTURES}/{name}", **({} if shared else lens), "transform_matrix": pose.tolist()}
        for name, lens, pose in zip(names, lenses, views.poses.double(), strict=True)
    ]
    content = {"camera_model": "OPENCV", **shared, "frames": frames}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_colmap(folder: Path, views: Views, cloud: Shape) -> None:
    """COLMAP's text format (colmap.github.io, "Output Format"): a PINHOLE camera for each distinct K, world-to-camera
    quaternions and translations in OpenCV's axes, the points without tracks; pictures in images_factorkit/."""
    names = write_pictures(folder / PICTURES, views)
    height, width = views.size
    distinct, camera = torch.unique(views.intrinsics.double(), dim=0, return_inverse=True)
    lines = ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]"]
    for i, k in enumerate(distinct, 1):
        lens = k[0, 0], k[1, 1], k[0, 2], k[1, 2]
        lines.append(f"{i} PINHOLE {width} {height} {_words(torch.stack(lens))}")
    _write(folder / "cameras.txt", lines)

    seen = torch.linalg.inv(views.poses.double() @ TO_OPENCV)
    turns = roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(roma.special_procrustes(seen[:, :3, :3])))
    lines = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME, and on a line of its own POINTS2D[]: none"]
    for i, name in enumerate(names):
        lines += [f"{i + 1} {_words(turns[i])} {_words(seen[i, :3, 3])} {int(camera[i]) + 1} {name}", ""]
    _write(folder / "images.txt", lines)

    lines = ["# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]: none"]
    for i, (place, color) in enumerate(zip(cloud.points.tolist(), cloud.colors.tolist(), strict=True), 1):
        lines.append(f"{i} {' '.join(f'{x:.7g}' for x in place)} {' '.join(map(str, color))} {NO_TRACK}")
    _write(folder / "points3D.txt", lines)


def write_pictures(folder: Path, views: Views) -> list[str]:
    """PNG files named like the views, transparent where there are masks over a known background; their names relative
    to the folder, with forward slashes."""
    names = file_names(views.names)
    images = views.images
    if views.masks is not None and views.background is not None:
        behind = (1 - views.masks) * views.background[:, None, None]
        straight = (images - behind) / views.masks.clamp_min(1e-6)
        images = torch.cat([straight * (views.masks > 0), views.masks], dim=1)
    pixels = images_to_pixels(images)
    for name, picture in zip(names, pixels, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(picture)).save(path)
    return names


def file_names(names: Sequence[str]) -> list[str]:
    """Names of PNG files below one folder: no way out of it, no blanks (COLMAP's fields end there), no two alike."""
    found: list[str] = []
    for name in names:
        parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
        path = PurePosixPath(*("_".join(part.replace(":", "_").split()) for part in parts) if parts else ("view",))
        wanted = path.with_suffix(".png").as_posix()
        if wanted in found:
            wanted = f"{path.as_posix()}.png"
        while wanted in found:
            wanted = f"{wanted.removesuffix('.png')}_.png"
        found.append(wanted)
    return found


def _words(values: torch.Tensor) -> str:
    return " ".join(f"{x:.17g}" for x in values.tolist())


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
