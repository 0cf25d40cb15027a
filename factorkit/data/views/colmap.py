"""COLMAP models, text and binary (colmap.github.io, "Output Format"): cameras, images and points3D."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from factorkit.data.files import escape_name
from factorkit.data.views.arrangement import OPENCV_TO_OPENGL
from factorkit.data.views.cameras import (
    Distortion,
    FisheyeDistortion,
    IntrinsicsFunction,
    Lens,
    make_intrinsics,
    scale_intrinsics,
)
from factorkit.data.views.image_files import FileFinder
from factorkit.data.views.loading import LazyView, SceneSettings, image_reader
from factorkit.data.views.splits import read_listings, select_listed, select_split
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError, format_count

MODEL_FOLDERS = (".", "sparse/0", "sparse", "colmap/sparse/0")  # where a scene's model may be
# Beside or above the model.
IMAGE_FOLDERS = tuple("images images_factorkit images_2 images_4 images_8 image imgs input rgb .".split())
# Models by COLMAP's number, with their number of parameters.
CAMERA_MODELS = {
    "SIMPLE_PINHOLE": 3,
    "PINHOLE": 4,
    "SIMPLE_RADIAL": 4,
    "RADIAL": 5,
    "OPENCV": 8,
    "OPENCV_FISHEYE": 8,
    "FULL_OPENCV": 12,
    "FOV": 5,
    "SIMPLE_RADIAL_FISHEYE": 4,
    "RADIAL_FISHEYE": 5,
    "THIN_PRISM_FISHEYE": 12,
}
SINGLE_FOCAL = ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE")
UNSUPPORTED = ("FOV", "THIN_PRISM_FISHEYE")
BOUND_PERCENTILES = (0.1, 99.9)  # of the points' depths in each view, as in LLFF


@dataclass(frozen=True)
class _Camera:
    model: str
    width: int
    height: int
    parameters: tuple[float, ...]


@dataclass(frozen=True)
class _Image:
    name: str
    camera: int
    quaternion: tuple[float, float, float, float]  # w x y z, world to camera
    translation: tuple[float, float, float]
    number: int


def find_model(path: Path) -> Path | None:
    """Return the folder of the COLMAP model of a scene, or None."""
    if path.is_dir():
        for name in MODEL_FOLDERS:
            for suffix in ("bin", "txt"):
                if all((path / name / f"{part}.{suffix}").is_file() for part in ("cameras", "images")):
                    return path / name
    return None


def is_colmap(path: Path) -> bool:
    """Return whether this is a COLMAP model, or a folder with one in ., sparse, sparse/0 or colmap/sparse/0."""
    return find_model(path) is not None


def read_colmap(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split: by train.txt, val.txt and test.txt (names of images) in the model or beside it.

    Without them, by folders such as train/ and test/ in the names, else every 8th is for testing.

    Several cameras are allowed. Registered images without a file are left out, see `FileFinder`.

    Raises:
        DataError: damaged files, an unsupported camera model, no images, or most of them missing.
    """
    model, suffix = _require_model(path)
    cameras, images = _read_model(model, suffix)
    if not images:
        raise DataError(f"{model}: no registered images in this COLMAP model")
    images = sorted(images, key=lambda image: image.name)
    for image in images:
        if image.camera not in cameras:
            raise DataError(f"{model}: {escape_name(image.name)} has the missing camera {image.camera}")
    names = [image.name for image in images]
    folder = _find_image_folder(path, model, names)
    finder = FileFinder(folder)
    paths = finder.find_all(names, f"{model}/images.{suffix}")
    poses = np.stack([_pose(image) for image in images])
    check_rigid(torch.from_numpy(poses), names)
    prefix = "" if folder == path else f"{folder.name}/"
    notes = finder.notes
    sizes = {(camera.model, camera.width, camera.height) for camera in cameras.values()}
    notes += (
        f"COLMAP model {model.name or '.'}: {format_count(len(images), 'image')}, "
        f"{format_count(len(cameras), 'camera')} of {format_count(len(sizes), 'size')}.",
    )
    others = [other.name for other in sorted(model.parent.glob("[0-9]*")) if other.is_dir() and other != model]
    if model.name.isdigit() and others:
        notes += (f"Other models of the scene, which are not read: {', '.join(others)}.",)
    views = []
    lists = read_listings(dict.fromkeys([model, path]))
    rows, more = select_listed(lists, names, split, str(model)) if lists else select_split(names, split)
    notes += more
    for i in rows:
        if i not in paths:
            continue
        camera, name = cameras[images[i].camera], f"{prefix}{names[i]}"
        k, lens = _parse_camera(camera, name, model)
        intrinsics = scale_intrinsics(k, camera.height, camera.width, name)
        views.append(LazyView(name, image_reader(paths[i]), intrinsics, poses[i], None, lens))
    points = _read_points(model, suffix)
    scene_names = [f"{prefix}{name}" for name in names]
    return views, SceneSettings(scene_names, poses, _depth_range(points, poses), notes, points=points)


class ModelCamera(NamedTuple):
    """Camera of one image of a model: K for its sizes, lens distortion, and the pose [4, 4] with OpenGL axes."""

    intrinsics: IntrinsicsFunction
    lens: Lens | None
    pose: np.ndarray


class ModelCameras(NamedTuple):
    """What a model holds: cameras by image name, points float64 [P, 3], and the range of their depths, if any."""

    cameras: dict[str, ModelCamera]
    points: np.ndarray | None
    bounds: tuple[float, float] | None


def read_model(path: Path) -> ModelCameras:
    """Read a model without looking for its images.

    Raises:
        DataError: damaged files, or an unsupported camera model.
    """
    model, suffix = _require_model(path)
    cameras, images = _read_model(model, suffix)
    found = {}
    for image in sorted(images, key=lambda image: image.name):
        if image.camera not in cameras:
            raise DataError(f"{model}: {escape_name(image.name)} has the missing camera {image.camera}")
        camera = cameras[image.camera]
        k, lens = _parse_camera(camera, image.name, model)
        found[image.name] = ModelCamera(
            scale_intrinsics(k, camera.height, camera.width, image.name), lens, _pose(image)
        )
    points = _read_points(model, suffix)
    poses = np.stack([camera.pose for camera in found.values()]) if found else np.zeros((0, 4, 4))
    return ModelCameras(found, points, _depth_range(points, poses))


def read_image_names(path: Path) -> list[str]:
    """Return the names of the registered images of a scene's model.

    Raises:
        DataError: damaged files.
    """
    return [image.name for image in _read_model(*_require_model(path))[1]]


def _require_model(path: Path) -> tuple[Path, str]:
    """Return the folder of the model, and the suffix of its files."""
    model = find_model(path)
    if model is None:
        raise DataError(f"{path}: no COLMAP model (cameras and images, .bin or .txt)")
    return model, "bin" if all((model / f"{part}.bin").is_file() for part in ("cameras", "images")) else "txt"


def _read_model(model: Path, suffix: str) -> tuple[dict[int, _Camera], list[_Image]]:
    try:
        cameras = (_read_cameras_bin if suffix == "bin" else _read_cameras_txt)(model / f"cameras.{suffix}")
        images = (_read_images_bin if suffix == "bin" else _read_images_txt)(model / f"images.{suffix}")
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise DataError(f"{model}: not a readable COLMAP model ({type(error).__name__}: {error})") from error
    return cameras, images


def _find_image_folder(path: Path, model: Path, names: list[str]) -> Path:
    """Return the folder that has most of the images."""
    roots = dict.fromkeys([path, model, *list(model.resolve().parents)[:3], path.resolve().parent])
    folders = [root / name for root in roots for name in IMAGE_FOLDERS if (root / name).is_dir()]
    folders = [path if folder.resolve() == path.resolve() else folder for folder in folders]
    counts = [sum(FileFinder(folder).find(name) is not None for name in names[:50]) for folder in folders]
    if not counts or max(counts) == 0:
        raise DataError(
            f"{model}: the images of this COLMAP model are missing, the first is {escape_name(names[0])}. Put them "
            f"into {path / 'images'}."
        )
    return folders[counts.index(max(counts))]


def _pose(image: _Image) -> np.ndarray:
    """Return camera to world, OpenGL axes."""
    w, x, y, z = np.array(image.quaternion) / np.linalg.norm(image.quaternion)
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    world_to_camera[:3, 3] = image.translation
    return np.linalg.inv(world_to_camera) @ OPENCV_TO_OPENGL


def _parse_camera(camera: _Camera, name: str, model: Path) -> tuple[np.ndarray, Lens | None]:
    """Return K and the lens distortion of a camera."""
    if camera.model in UNSUPPORTED:
        raise DataError(
            f"{model}: {name} has the camera model {camera.model}, which is not supported. Undistort the images first "
            "(colmap image_undistorter)."
        )
    values = camera.parameters
    fx, fy, cx, cy, *terms = (values[0], *values) if camera.model in SINGLE_FOCAL else values
    k = make_intrinsics(fx, fy, cx, cy)
    if not any(terms) and "FISHEYE" not in camera.model:
        return k, None
    if "FISHEYE" in camera.model:
        return k, FisheyeDistortion(*terms)
    if camera.model in ("SIMPLE_RADIAL", "RADIAL"):
        return k, Distortion(terms[0], terms[1] if len(terms) > 1 else 0.0)
    k1, k2, p1, p2, *more = terms
    k3, *denominator = more or (0.0, 0.0, 0.0, 0.0)
    a, b, c = denominator
    return k, Distortion(k1, k2, k3, p1, p2, denominator=(a, b, c))


def _data_lines(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        if not line.startswith("#"):
            yield line.strip()


def _read_cameras_txt(file: Path) -> dict[int, _Camera]:
    cameras = {}
    for line in filter(None, _data_lines(file)):
        number, model, width, height, *values = line.split()
        count = CAMERA_MODELS.get(model)
        if count is not None and len(values) != count:
            raise ValueError(f"camera {number}: {len(values)} parameters, but {model} has {count}")
        if count is None:
            raise ValueError(f"camera {number}: unknown model {model}")
        cameras[int(number)] = _Camera(model, int(width), int(height), tuple(map(float, values)))
    return cameras


def _read_images_txt(file: Path) -> list[_Image]:
    lines = list(_data_lines(file))
    while lines and not lines[0]:
        del lines[0]
    images = []
    for line in filter(None, lines[::2]):  # every other line lists the image's points, and may be empty
        number, *rest = line.split(maxsplit=9)
        qw, qx, qy, qz, tx, ty, tz = map(float, rest[:7])
        images.append(_Image(rest[8], int(rest[7]), (qw, qx, qy, qz), (tx, ty, tz), int(number)))
    return images


class _BinaryReader:
    """Read little-endian numbers one after another."""

    def __init__(self, file: Path) -> None:
        self.data, self.position = file.read_bytes(), 0

    def read(self, kinds: str) -> tuple[float, ...]:
        values = struct.unpack_from(f"<{kinds}", self.data, self.position)
        self.position += struct.calcsize(f"<{kinds}")
        return values

    def read_int(self, kind: str) -> int:
        return int(self.read(kind)[0])

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self.data):
            raise ValueError("the file ends early")

    def read_text(self) -> str:
        end = self.data.index(b"\0", self.position)
        text = self.data[self.position : end].decode("utf-8")
        self.position = end + 1
        return text


def _read_cameras_bin(file: Path) -> dict[int, _Camera]:
    reader, cameras = _BinaryReader(file), {}
    for _ in range(reader.read_int("Q")):
        number, kind = (int(value) for value in reader.read("Ii"))
        width, height = (int(value) for value in reader.read("QQ"))
        if not 0 <= kind < len(CAMERA_MODELS):
            raise ValueError(f"camera {number}: unknown model number {kind}")
        model, count = list(CAMERA_MODELS.items())[kind]
        cameras[number] = _Camera(model, width, height, reader.read(f"{count}d"))
    return cameras


def _read_images_bin(file: Path) -> list[_Image]:
    reader, images = _BinaryReader(file), []
    for _ in range(reader.read_int("Q")):
        number = reader.read_int("I")
        qw, qx, qy, qz, tx, ty, tz = reader.read("7d")
        camera, name = reader.read_int("I"), reader.read_text()
        reader.skip(reader.read_int("Q") * 24)  # points: x, y and the number of the 3D point
        images.append(_Image(name, camera, (qw, qx, qy, qz), (tx, ty, tz), number))
    return images


def _read_points(model: Path, suffix: str) -> np.ndarray | None:
    """Return the positions float64 [P, 3] of the sparse points; None if the file is missing or has none."""
    file = model / f"points3D.{suffix}"
    if not file.is_file() or file.stat().st_size == 0:
        return None
    try:
        points = _parse_points(file, suffix)
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise DataError(f"{file}: not readable ({type(error).__name__}: {error})") from error
    return points if len(points) else None


def _parse_points(file: Path, suffix: str) -> np.ndarray:
    if suffix == "txt":
        return np.array([[float(x) for x in line.split()[1:4]] for line in _data_lines(file) if line]).reshape(-1, 3)
    reader, points = _BinaryReader(file), []
    for _ in range(reader.read_int("Q")):
        reader.skip(8)
        points.append(reader.read("3d"))
        reader.skip(3 + 8)  # colour, error
        reader.skip(reader.read_int("Q") * 8)
    return np.array(points).reshape(-1, 3)


def _depth_range(points: np.ndarray | None, poses: np.ndarray) -> tuple[float, float] | None:
    """Return the nearest and farthest depth of the sparse points, without outliers; None without points."""
    ranges = []
    for pose in poses if points is not None else ():
        x, y, backward = pose[:3, :3].T @ (points - pose[:3, 3]).T
        depths = -backward[-backward > np.hypot(x, y)]  # within 45 degrees of the optical axis
        if len(depths):
            ranges.append(np.percentile(depths, BOUND_PERCENTILES))
    if not ranges:
        return None
    near, far = np.array(ranges)[:, 0].min(), np.array(ranges)[:, 1].max()
    return (float(near), float(far)) if near < far else None
