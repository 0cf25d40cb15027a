"""Camera settings of transforms.json: each key that changes the geometry is honoured, or refused by its name.

The keys are those of nerfstudio, instant-ngp, NeRF's Blender scenes and Record3D's exports to these formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.files import format_examples
from factorkit.data.views.cameras import (
    Distortion,
    FisheyeDistortion,
    IntrinsicsFunction,
    Lens,
    fixed_intrinsics,
    fov_intrinsics,
    make_intrinsics,
    scale_intrinsics,
)
from factorkit.utils.errors import DataError

PINHOLE_MODELS = ("PINHOLE", "SIMPLE_PINHOLE")
BROWN_MODELS = ("OPENCV", "SIMPLE_RADIAL", "RADIAL", "FULL_OPENCV")
FISHEYE_MODELS = ("OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE")
CAMERA_MODELS = (*PINHOLE_MODELS, *BROWN_MODELS, *FISHEYE_MODELS)
FOCAL_KEYS = ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "x_fov", "y_fov")
DISTORTION_KEYS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
OTHER_KEYS = (
    "cx cy w h camera_model is_fisheye frames file_path transform_matrix mask_path train_filenames val_filenames "
    "test_filenames test_frames split"
)
READ_KEYS = {*FOCAL_KEYS, *DISTORTION_KEYS, *OTHER_KEYS.split()}
# Keys that change the geometry in a way that is not modelled: refused unless they have this neutral value.
REFUSED_KEYS = {
    "distortion_params": "a lens of other terms",
    "cameras": "a list of cameras to which frames refer",
    "latlong": "a panorama",
    "equirectangular": "a panorama",
    "orthographic": "a camera without perspective",
    **{f"ftheta_p{i}": "an f-theta lens" for i in range(5)},
    "rolling_shutter": "a rolling shutter",
    "shift_x": "a shifted lens",
    "shift_y": "a shifted lens",
    "fisheye_crop_radius": "a crop of the fisheye image",
    "transform_matrix_start": "a camera that moves during the exposure",
    "transform_matrix_end": "a camera that moves during the exposure",
    **dict.fromkeys(("s1", "s2", "s3", "s4", "sx1", "sy1"), "a thin-prism lens"),
}
# Intrinsics as other programs write them.
MATRIX_KEYS = ("K", "intrinsics", "intrinsic", "intrinsic_matrix", "camera_intrinsics")
SYNONYMS = {"fx": "fl_x", "fy": "fl_y", "width": "w", "height": "h"}
# World axes and scale are those of the file's matrices, whatever a program derives from these keys.
WORLD_KEYS = (
    "applied_transform applied_scale orientation_override auto_scale_poses_override offset scale aabb aabb_scale "
    "render_aabb up from_na scene_box"
).split()


def merge_settings(content: Mapping[str, Any], frame: Mapping[str, Any]) -> dict[str, Any]:
    """Return a frame's settings: its own, else the file's; its focal length replaces every kind of the file's."""
    content, frame = _with_usual_keys(content), _with_usual_keys(frame)
    own = set(FOCAL_KEYS) & frame.keys()
    shared = {key: value for key, value in content.items() if key != "frames" and not (own and key in FOCAL_KEYS)}
    if {"camera_model", "is_fisheye"} & frame.keys():
        shared = {key: value for key, value in shared.items() if key not in ("camera_model", "is_fisheye")}
    return {**shared, **{key: value for key, value in frame.items() if value is not None}}


def _with_usual_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with nerfstudio's keys for those of other programs: fx or a matrix K."""
    result = dict(settings)
    for key in MATRIX_KEYS:
        values = _focal_and_centre(result.get(key))
        if values is not None:
            del result[key]
            result = {**dict(zip(("fl_x", "fl_y", "cx", "cy"), values, strict=True)), **result}
    for key, usual in SYNONYMS.items():
        if key in result and usual not in result:
            result[usual] = result.pop(key)
    return result


def _focal_and_centre(value: Any) -> tuple[float, float, float, float] | None:
    """Return fx, fy, cx, cy of a matrix K, as rows or as 9 numbers in either order, or of 4 numbers; None of others."""
    try:
        k = np.array(value, dtype=np.float64)
    except (ValueError, TypeError):
        return None
    if k.shape == (4,):
        return float(k[0]), float(k[1]), float(k[2]), float(k[3])
    if k.shape == (9,):
        k = k.reshape(3, 3)
        k = k.T if k[2, 0] else k
    if k.shape not in ((3, 3), (3, 4), (4, 4)) or k[2, 0]:
        return None
    return float(k[0, 0]), float(k[1, 1]), float(k[0, 2]), float(k[1, 2])


def refuse_unmodelled(settings: Mapping[str, Any], name: str, file: Path) -> None:
    """Refuse settings that change the geometry in a way that is not modelled.

    Raises:
        DataError: one has another value than none, false, zero or the frame's own matrix.
    """
    for key, meaning in {**REFUSED_KEYS, **dict.fromkeys(MATRIX_KEYS, "another form of intrinsics")}.items():
        value = settings.get(key)
        if key.startswith("transform_matrix_") and value == settings.get("transform_matrix"):
            continue
        if _is_neutral(value):
            continue
        raise DataError(
            f"{file}: {name} has `{key}` = {value!r:.80}: {meaning} is not supported. Undistort the images to a "
            "pinhole camera first, or remove the key if it does not apply."
        )


def _is_neutral(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_neutral(item) for item in value)
    return value is None or value is False or (isinstance(value, (int, float)) and value == 0)


def describe_ignored(keys: Iterable[str]) -> tuple[str, ...]:
    """Return sentences on keys that are not read."""
    unread = set(keys) - READ_KEYS - REFUSED_KEYS.keys()
    world, others = sorted(unread & set(WORLD_KEYS)), sorted(unread - set(WORLD_KEYS))
    notes = []
    if world:
        notes.append(f"World coordinates are those of `transform_matrix`; not used: {', '.join(world)}.")
    if others:
        notes.append(f"Keys that are ignored: {format_examples(others, 20)}.")
    return tuple(notes)


def parse_intrinsics(settings: Mapping[str, Any], name: str, file: Path) -> IntrinsicsFunction:
    """Return K from `fl_x`, else from angles; in pixels of an image of `w` by `h`, or of the stored image.

    Raises:
        DataError: no focal length, or an invalid number.
    """
    try:
        if "fl_x" in settings:
            return _intrinsics_from_focal(settings, name)
        return _intrinsics_from_angles(settings, name)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{file}: no focal length for {name} ({type(error).__name__}: {error}). It needs `camera_angle_x`, "
            "alone or with both `w` and `h`, or `fl_x`, likewise."
        ) from error


def _intrinsics_from_focal(settings: Mapping[str, Any], name: str) -> IntrinsicsFunction:
    fx = float(settings["fl_x"])
    fy = float(settings.get("fl_y", fx))
    cx, cy = (float(settings[key]) if key in settings else None for key in ("cx", "cy"))

    def intrinsics(height: float, width: float) -> np.ndarray:
        return make_intrinsics(fx, fy, width / 2 if cx is None else cx, height / 2 if cy is None else cy)

    if "w" not in settings and "h" not in settings:  # as instant-ngp: the focal length is that of the stored image
        return lambda height, width: fixed_intrinsics(intrinsics(height, width), name)(height, width)
    width, height = (float(settings[key]) for key in ("w", "h"))
    return scale_intrinsics(intrinsics(height, width), height, width, name)


def _intrinsics_from_angles(settings: Mapping[str, Any], name: str) -> IntrinsicsFunction:
    angles: list[float | None] = []
    for radians, degrees in (("camera_angle_x", "x_fov"), ("camera_angle_y", "y_fov")):
        if radians in settings:
            angles.append(float(settings[radians]))
        else:
            angles.append(math.radians(float(settings[degrees])) if degrees in settings else None)
    angle_x, angle_y = angles
    if angle_x is None:
        raise KeyError("camera_angle_x")
    cx, cy = (float(settings[key]) if key in settings else None for key in ("cx", "cy"))
    if not all(0 < angle < math.pi for angle in (angle_x, angle_y) if angle is not None):
        raise ValueError("an angle is not between 0 and pi radians")
    intrinsics = fov_intrinsics(angle_x, angle_y, cx, cy)
    if "w" not in settings and "h" not in settings:
        return intrinsics
    width, height = (float(settings[key]) for key in ("w", "h"))
    return scale_intrinsics(intrinsics(height, width), height, width, name)


def parse_distortion(settings: Mapping[str, Any], name: str, file: Path) -> Lens | None:
    """Return the lens distortion, or None for a pinhole camera.

    `k4` is nerfstudio's term of r^8 for the models OPENCV and RADIAL, as in nerfstudio itself; `k4` to `k6` are
    OpenCV's divisor for FULL_OPENCV.

    Raises:
        DataError: another camera model, terms that the model does not have, or an invalid number.
    """
    is_fisheye = bool(settings.get("is_fisheye"))
    model = settings.get("camera_model", "OPENCV_FISHEYE" if is_fisheye else "OPENCV")
    if model not in CAMERA_MODELS:
        raise DataError(
            f"{file}: {name} has the camera model {model!r:.40}; supported: {', '.join(CAMERA_MODELS)}. Undistort the "
            "images first."
        )
    if is_fisheye and model not in FISHEYE_MODELS:
        raise DataError(
            f"{file}: {name} has `is_fisheye`, but the camera model {model}. Correct one of them: a fisheye lens is "
            "OPENCV_FISHEYE."
        )
    try:
        terms = {key: float(settings.get(key, 0.0)) for key in DISTORTION_KEYS}
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{file}: the distortion of {name} is not a number: {error}") from error
    if not all(math.isfinite(value) for value in terms.values()):
        raise DataError(f"{file}: the distortion of {name} is not finite: {terms}")
    if model in FISHEYE_MODELS:
        allowed: tuple[str, ...] = ("k1", "k2", "k3", "k4")
    elif model in PINHOLE_MODELS:
        allowed = ()
    else:
        allowed = DISTORTION_KEYS if model == "FULL_OPENCV" else ("k1", "k2", "k3", "k4", "p1", "p2")
    unknown = [key for key in DISTORTION_KEYS if terms[key] and key not in allowed]
    if unknown:
        raise DataError(
            f"{file}: {name} has `{unknown[0]}` = {terms[unknown[0]]:g}, which the camera model {model} does not have. "
            "Give the right `camera_model` (FULL_OPENCV has k1 to k6, p1, p2), or undistort the images first."
        )
    if model in FISHEYE_MODELS:
        return FisheyeDistortion(*(terms[key] for key in ("k1", "k2", "k3", "k4")))
    if not any(terms.values()):
        return None
    k1, k2, k3, k4, k5, k6, p1, p2 = terms.values()
    if model == "FULL_OPENCV":
        return Distortion(k1, k2, k3, p1, p2, denominator=(k4, k5, k6))
    return Distortion(k1, k2, k3, p1, p2, k4)
