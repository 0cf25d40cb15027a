"""Open images from a folder, a file, an archive, an array or a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from factorkit.data.archives import ZipSource
from factorkit.data.decode import crop_square, to_rgb
from factorkit.data.files import (
    IMAGE_SUFFIXES,
    SUFFIX_LIST,
    describe_unread,
    escape_name,
    format_examples,
    is_unread_image,
    list_image_names,
    stat_file,
    warn_about_outputs,
)
from factorkit.data.sources import CHANNEL_COUNTS, ArraySource, FileSource, PillowSource, Source, hash_values
from factorkit.utils.errors import DataError
from factorkit.utils.files import read_arrays
from factorkit.utils.output_record import OutputFilter

IMAGE_KEYS = ("images", "X")  # arrays looked for in an .npz, in this order


def open_source(data: Any, *, keys: Sequence[str] = IMAGE_KEYS) -> Source:
    """Open images.

    Args:
        data: a folder (searched at any depth, sorted by relative path; hidden files, other files and what factorkit
            wrote are skipped), an image file, a .zip of images, a .npy or .npz array, a numpy array or torch tensor
            (see `ArraySource`), a Pillow image, a list of files and folders, a list of Pillow images, or a `Source`.
        keys: array names looked for in an .npz; a single array is used whatever its name.

    Raises:
        DataError: the path does not exist or has no images, or an array has an ambiguous shape.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, os.PathLike)):
        return _open_path(Path(data).expanduser(), keys)
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu()
        return ArraySource((data.float() if data.is_floating_point() else data).numpy(), "tensor")
    if isinstance(data, np.ndarray):
        return ArraySource(data)
    if isinstance(data, Image.Image):
        return PillowSource([data])
    if isinstance(data, Sequence) and data:
        if all(isinstance(item, Image.Image) for item in data):
            return PillowSource(data)
        if all(isinstance(item, (str, os.PathLike)) for item in data):
            return _open_files([Path(item).expanduser() for item in data])
    kind = f"an empty {type(data).__name__}" if isinstance(data, Sequence) and not data else type(data).__name__
    raise DataError(
        f"Cannot read images from {kind}: give a folder, a file, a .zip, .npy or .npz, an array or tensor "
        "[N, H, W, 3], a list of paths or a list of Pillow images."
    )


def read_images(images: Any) -> tuple[list[Image.Image], list[str]]:
    """Read any supported input as upright RGB images at their own sizes, with names; alpha is composited over white.

    Raises:
        DataError: an array or tensor that is no image, or nothing to read.
    """
    if isinstance(images, (list, tuple)) and images and all(isinstance(i, (torch.Tensor, np.ndarray)) for i in images):
        single = [image for item in images for image in read_images(item)[0]]
        return single, [f"{i:06d}" for i in range(len(single))]
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        images = images.float() if images.is_floating_point() else images  # numpy has no bfloat16
        if images.dim() == 3:
            images = images[None]
        if images.dim() != 4 or images.shape[1] not in CHANNEL_COUNTS:
            raise DataError(
                f"a tensor of images must be [B, C, H, W] or [C, H, W], C being 1, 3 or 4; got {tuple(images.shape)}"
            )
        images = images.permute(0, 2, 3, 1).numpy()
    elif isinstance(images, Image.Image):
        return [to_rgb(images)], ["image"]
    elif isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[-1] in CHANNEL_COUNTS:
        images = images[None]
    source = images if isinstance(images, Source) else open_source(images)
    return [source.read(i) for i in range(len(source))], list(source.names)


def read_squares(images: Any, side: int) -> np.ndarray:
    """Read images as :func:`read_images` and crop them as in training: uint8 [N, side, side, 3]."""
    return np.stack([crop_square(image, side) for image in read_images(images)[0]])


def _open_path(path: Path, keys: Sequence[str]) -> Source:
    suffix = path.suffix.lower()
    if not path.exists():
        name = escape_name(str(path))
        raise DataError(f"{name}: no such file or folder (current folder: {Path.cwd()}). Check the path.")
    if suffix in IMAGE_SUFFIXES and not path.is_dir():
        return _open_files([path])  # before resolve(): the target of a link may have no suffix
    path = path.resolve()
    if path.is_dir():
        return _open_files([path])
    if suffix == ".zip":
        source = ZipSource(path)
        if not source.names:
            raise DataError(f"{path}: no images in this .zip. Supported: {SUFFIX_LIST}.")
        return source
    if suffix in (".npy", ".npz"):
        fingerprint = hash_values("array file", str(path), *keys, stat_file(path))
        return ArraySource(_load_array(path, keys), str(path), fingerprint)
    if is_unread_image(path.name):
        raise DataError(f"{escape_name(str(path))}: {describe_unread([path.name])}.")
    raise DataError(f"{path}: unsupported suffix '{suffix}'. Supported: {SUFFIX_LIST}, .zip, .npy, .npz.")


def _open_files(paths: Sequence[Path]) -> FileSource:
    """Open files and folders; names are relative to their deepest common folder.

    A single file is read even if factorkit wrote it; in a list, which may come from a wildcard, its files are left out.
    """
    paths = [Path(os.path.abspath(path)) for path in paths]
    for path in paths:
        if not path.exists():
            raise DataError(f"{escape_name(str(path))}: no such file or folder. Check the path.")
        if is_unread_image(path.name) and not path.is_dir():
            raise DataError(f"{escape_name(str(path))}: {describe_unread([path.name])}.")
        if not path.is_dir() and path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"{escape_name(str(path))}: not an image ({SUFFIX_LIST}). A list may hold image files and folders only."
            )
    if len(paths) > 1:
        paths = _leave_out_outputs(paths)
    root = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in paths]))
    files: list[str] = []
    for path in paths:
        relative = path.relative_to(root).as_posix()
        if not path.is_dir():
            files.append(relative)
            continue
        names = list_image_names(path)
        if not names:
            raise DataError(f"{path}: no images in this folder or below it. Supported: {SUFFIX_LIST}.")
        files += names if relative == "." else [f"{relative}/{name}" for name in names]
    return FileSource(root, files)


def _leave_out_outputs(paths: Sequence[Path]) -> Sequence[Path]:
    outputs = OutputFilter(os.path.commonpath(paths))
    rest = [
        path
        for path in paths
        if not (outputs.skips_folder(str(path)) if path.is_dir() else outputs.skips_file(str(path.parent), path.name))
    ]
    if not rest:
        raise DataError(
            f"{format_examples(list(map(str, paths)))}: factorkit wrote all of these, and results are not data. Give "
            "your own images, or copy these to another folder first."
        )
    warn_about_outputs(Path(outputs.root), outputs)
    return rest


def _load_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    try:
        loaded = read_arrays(path, keys)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable array: {error} Save a numeric array with numpy.save.") from error
    if isinstance(loaded, np.ndarray):
        return loaded
    matches = [key for key in keys if key in loaded] or (list(loaded) if len(loaded) == 1 else [])
    if matches:
        return loaded[matches[0]]
    available = format_examples(list(loaded), len(loaded)) or "none"
    raise DataError(f"{path}: no array named {' or '.join(keys)} (available: {available}). Save it under that name.")
