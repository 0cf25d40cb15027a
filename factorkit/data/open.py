"""Open images, whatever holds them: a folder, an archive, an array, or a list."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from factorkit.data.archives import ZipSource
from factorkit.data.sources import (
    IMAGE_SUFFIXES,
    NAMED,
    ArraySource,
    FileSource,
    PillowSource,
    Source,
    escape_name,
    hash_values,
    is_image,
    list_suffixes,
    stat_file,
    wrap_os_errors,
)
from factorkit.utils.errors import DataError
from factorkit.utils.safe_reading import read_arrays

IMAGE_KEYS = ("images", "X")  # the names looked for in an .npz, in this order


def open_source(data: Any, *, keys: Sequence[str] = IMAGE_KEYS) -> Source:
    """Open images wherever they lie.

    Args:
        data: a folder (searched to any depth, sorted by relative path; hidden files and files that are no images are
            passed over), an image file, a .zip of images, a .npy or .npz array, a numpy array or torch tensor (see
            `ArraySource`), a Pillow image, a list of files and folders, a list of Pillow images, or a `Source`.
        keys: the arrays looked for in an .npz; its only array is taken whatever its name.

    Raises:
        DataError: there is nothing there, nothing that can be read, or an array whose layout is ambiguous.
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
            return _open_list([Path(item).expanduser() for item in data])
    raise DataError(
        f"Cannot read images from {_describe(data)}: give a folder, a file, a .zip, .npy or .npz, an array or tensor "
        "[N, H, W, 3], a list of paths or a list of Pillow images."
    )


def list_images(folder: Path) -> list[Path]:
    """Every image file below a folder, sorted by relative path; see :func:`list_image_names`."""
    return [folder / name for name in list_image_names(folder)]


def list_image_names(folder: Path) -> list[str]:
    """The relative path of every image file below a folder, sorted; links are followed, each folder is entered once.

    Warns:
        UserWarning: of links to pictures that are not there, or that lead to themselves.

    Raises:
        DataError: one of the folders cannot be listed.
    """

    def refuse(error: OSError) -> None:  # os.walk would pass over what it may not read, and its images be missing
        with wrap_os_errors(
            Path(error.filename), "so its images cannot be listed. Mend its permissions, or take it out."
        ):
            raise error

    found: list[str] = []
    astray: list[str] = []
    entered: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        true_path = os.path.realpath(here)
        if true_path in entered:  # a loop of links would never end
            folders.clear()
            continue
        entered.add(true_path)
        folders.sort()
        below = Path(here).relative_to(folder).as_posix()
        for name in files:
            relative = name if below == "." else f"{below}/{name}"
            if is_image(relative):
                (found if os.path.isfile(os.path.join(here, name)) else astray).append(relative)
    if astray:
        named = ", ".join(map(escape_name, sorted(astray)[:NAMED])) + (", ..." if len(astray) > NAMED else "")
        warnings.warn(
            f"{folder}: {len(astray)} images are links to files that are not there, and were left out: {named}",
            UserWarning,
            stacklevel=2,
        )
    return sorted(found)


def _open_path(path: Path, keys: Sequence[str]) -> Source:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(
            f"{escape_name(str(path))}: no such file or folder (looked in {Path.cwd()}). Check the spelling of the path."
        )
    if suffix in IMAGE_SUFFIXES and not path.is_dir():
        return _open_list([path])  # by the name it was given: what a link leads to may have no suffix
    path = path.resolve()
    if path.is_dir():
        return _open_list([path])
    if suffix == ".zip":
        source = ZipSource(path)
        if not source.names:
            raise DataError(f"{path}: no images in this .zip. Looked for {list_suffixes()}.")
        return source
    if suffix in (".npy", ".npz"):
        return ArraySource(
            _load_array(path, keys), str(path), hash_values("array file", str(path), *keys, stat_file(path))
        )
    raise DataError(
        f"{path}: suffix '{suffix}' is none of {list_suffixes()}, .zip, .npy, .npz. Convert it to one of them."
    )


def _open_list(paths: Sequence[Path]) -> FileSource:
    """Files and folders together; names are relative to the deepest folder that holds them all."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    for path in paths:
        if not path.exists():
            raise DataError(f"{escape_name(str(path))}: no such file or folder. Check the spelling of the path.")
        if not path.is_dir() and path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"{escape_name(str(path))}: not an image ({list_suffixes()}). In a list, give image files and folders only."
            )
    root = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in paths]))
    found: list[str] = []
    for path in paths:
        relative = path.relative_to(root).as_posix()
        below = list_image_names(path) if path.is_dir() else [""]
        if not below:
            raise DataError(f"{path}: no images in this folder or below it. Looked for {list_suffixes()}.")
        prefix = "" if relative == "." else f"{relative}/"
        found += [prefix + name if name else relative for name in below]
    return FileSource(root, found)


def _load_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    try:
        loaded = read_arrays(path, keys)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable array: {error} Save plain numbers, with numpy.save.") from error
    if isinstance(loaded, np.ndarray):
        return loaded
    wanted = [key for key in keys if key in loaded] or (list(loaded) if len(loaded) == 1 else [])
    if wanted:
        return loaded[wanted[0]]
    found = ", ".join(map(escape_name, loaded)) or "nothing"
    raise DataError(f"{path}: none of its arrays ({found}) is named {' or '.join(keys)}. Save it under that name.")


def _describe(data: Any) -> str:
    return f"an empty {type(data).__name__}" if isinstance(data, Sequence) and not data else type(data).__name__
