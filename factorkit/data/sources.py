"""Where images lie: a folder, a file, a zip, an array or a list, all behind one small `Source`."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from factorkit.data.archives import ZipSource
from factorkit.data.images import BrokenImage
from factorkit.data.source_base import (
    IMAGE_SUFFIXES,
    MOST_BYTES,
    EncodedSource,
    Source,
    digest,
    is_image,
    said,
    shown,
    stamp,
    suffixes,
    too_large,
)
from factorkit.errors import DataError
from factorkit.reading import read_arrays

IMAGE_KEYS = ("images", "X")  # the names looked for in an .npz, in this order
CHANNELS = (1, 3, 4)  # grey, RGB, RGB with alpha
NAMED = 3  # how many examples a message names


class FileSource(EncodedSource):
    """Image files below a folder.

    Args:
        root: the folder.
        files: their paths relative to it, with forward slashes.
        names: what they are called; without: by those paths.
    """

    # one string an image and no Path: of ImageNet's 1.3 million, Paths alone took 0.6 GiB
    def __init__(self, root: Path, files: Iterable[str], names: Sequence[str] | None = None) -> None:
        self.root, self.files = root, list(files)
        self.names = self.files if names is None else list(names)

    def path(self, index: int) -> Path:
        return self.root / self.files[index]

    def _bytes(self, index: int) -> bytes:
        path = self.path(index)
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise BrokenImage(too_large(size))
        return path.read_bytes()

    def fingerprint(self) -> str:
        content = hashlib.sha256(repr(("files", str(self.root))).encode("utf-8", "surrogateescape"))
        for name, file in zip(self.names, self.files, strict=True):
            content.update(repr((name, *stamp(self.root / file))).encode("utf-8", "surrogateescape"))
        return content.hexdigest()

    def subset(self, indices: Sequence[int] | np.ndarray) -> FileSource:
        names = None if self.names is self.files else [self.names[i] for i in indices]
        return FileSource(self.root, [self.files[i] for i in indices], names)


class ArraySource(Source):
    """An array of images: [N, H, W], [N, H, W, C] or [N, C, H, W] with C in {1, 3, 4}; the fourth channel is alpha.

    Values are integers from 0 to 255 or floats from 0 to 1; booleans where there is one channel.
    """

    positional = True

    def __init__(self, array: np.ndarray, name: str = "array", fingerprint: str | None = None) -> None:
        self.array = _checked(array, name)
        self.names = [f"{i:06d}" for i in range(len(array))]
        self._fingerprint = fingerprint

    def decode(self, index: int) -> Image.Image:
        picture = self.array[index]
        if picture.dtype.kind == "f":
            picture = np.rint(np.clip(picture, 0, 1) * 255)
        if picture.dtype.kind != "b":
            picture = picture.astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(picture[..., 0] if picture.shape[-1] == 1 else picture))

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            content = hashlib.sha256()
            for picture in self.array:
                content.update(np.ascontiguousarray(picture))
            self._fingerprint = digest("array", str(self.array.dtype), self.array.shape, content.hexdigest())
        return self._fingerprint

    def subset(self, indices: Sequence[int] | np.ndarray) -> ArraySource:
        part = ArraySource(self.array[list(indices)])
        part.names = [self.names[i] for i in indices]
        return part


class PictureSource(Source):
    """Pillow images held in memory."""

    positional = True

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self.pictures = list(pictures)
        self.names = [f"{i:06d}" for i in range(len(self.pictures))]

    def decode(self, index: int) -> Image.Image:
        return self.pictures[index].copy()

    def fingerprint(self) -> str:
        pixels = [(p.mode, p.size, hashlib.sha256(p.tobytes()).hexdigest()) for p in self.pictures]
        return digest("pictures", pixels)


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
        return PictureSource([data])
    if isinstance(data, Sequence) and data:
        if all(isinstance(item, Image.Image) for item in data):
            return PictureSource(data)
        if all(isinstance(item, (str, os.PathLike)) for item in data):
            return _open_list([Path(item).expanduser() for item in data])
    raise DataError(
        f"Cannot read images from {_describe(data)}: give a folder, a file, a .zip, .npy or .npz, an array or tensor "
        "[N, H, W, 3], a list of paths or a list of Pillow images."
    )


def find_images(folder: Path) -> list[Path]:
    """Every image file below a folder, sorted by relative path; see :func:`image_names`."""
    return [folder / name for name in image_names(folder)]


def image_names(folder: Path) -> list[str]:
    """The relative path of every image file below a folder, sorted; links are followed, each folder is entered once.

    Warns:
        UserWarning: of links to pictures that are not there, or that lead to themselves.

    Raises:
        DataError: one of the folders cannot be listed.
    """

    def refuse(error: OSError) -> None:  # os.walk would pass over what it may not read, and its images be missing
        with said(Path(error.filename), "so its images cannot be listed. Mend its permissions, or take it out."):
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
        named = ", ".join(map(shown, sorted(astray)[:NAMED])) + (", ..." if len(astray) > NAMED else "")
        warnings.warn(
            f"{folder}: {len(astray)} images are links to files that are not there, and were left out: {named}",
            UserWarning, stacklevel=2,
        )  # fmt: skip
    return sorted(found)


def _open_path(path: Path, keys: Sequence[str]) -> Source:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(
            f"{shown(str(path))}: no such file or folder (looked in {Path.cwd()}). Check the spelling of the path."
        )
    if suffix in IMAGE_SUFFIXES and not path.is_dir():
        return _open_list([path])  # by the name it was given: what a link leads to may have no suffix
    path = path.resolve()
    if path.is_dir():
        return _open_list([path])
    if suffix == ".zip":
        source = ZipSource(path)
        if not source.names:
            raise DataError(f"{path}: no images in this .zip. Looked for {suffixes()}.")
        return source
    if suffix in (".npy", ".npz"):
        return ArraySource(_load_array(path, keys), str(path), digest("array file", str(path), *keys, stamp(path)))
    raise DataError(f"{path}: suffix '{suffix}' is none of {suffixes()}, .zip, .npy, .npz. Convert it to one of them.")


def _open_list(paths: Sequence[Path]) -> FileSource:
    """Files and folders together; names are relative to the deepest folder that holds them all."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    for path in paths:
        if not path.exists():
            raise DataError(f"{shown(str(path))}: no such file or folder. Check the spelling of the path.")
        if not path.is_dir() and path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"{shown(str(path))}: not an image ({suffixes()}). In a list, give image files and folders only."
            )
    root = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in paths]))
    found: list[str] = []
    for path in paths:
        relative = path.relative_to(root).as_posix()
        below = image_names(path) if path.is_dir() else [""]
        if not below:
            raise DataError(f"{path}: no images in this folder or below it. Looked for {suffixes()}.")
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
    found = ", ".join(map(shown, loaded)) or "nothing"
    raise DataError(f"{path}: none of its arrays ({found}) is named {' or '.join(keys)}. Save it under that name.")


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    """The array as [N, H, W, C], its values checked."""
    layouts = "Give [N, H, W], [N, H, W, C] or [N, C, H, W], C being 1, 3 or 4."
    where = f"{name} of shape {list(array.shape)}"
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"{where}: not a set of images. {layouts}")
    if array.ndim == 3:
        if array.shape[-1] <= (1 if array.dtype.kind == "b" else max(CHANNELS)):  # booleans have no colours
            raise DataError(f"{where}: one image [H, W, C], or {len(array)} thin ones? {layouts}")
        array = array[..., None]
    else:
        # pictures of 4 x 4 pixels are commoner than alpha: a fourth channel counts where no axis has 1 or 3
        first, last = ((n in CHANNELS) + (n in CHANNELS[:2]) for n in (array.shape[1], array.shape[-1]))
        if first == last:
            problem = "channels first or last?" if first else f"no axis of {CHANNELS} channels."
            raise DataError(f"{where}: {problem} {layouts}")
        array = np.moveaxis(array, 1, -1) if first > last else array
    if array.dtype.kind not in ("uif" if array.shape[-1] > 1 else "buif"):
        raise DataError(f"{where}: values of type {array.dtype} are no pixels. Give uint8, or floats in [0, 1].")
    if array.dtype.kind != "b" and array.dtype != np.uint8:
        low, high, top = array.min(), array.max(), 1 if array.dtype.kind == "f" else 255
        if not (low >= 0 and high <= top):  # written so that NaN is refused too
            advice = "Rescale them."
            if top == 255 and array.shape[-1] == 1:
                advice = (
                    "Rescale them if they are pictures. Labels of masks would not survive it: number those from 0 to "
                    "255, and where -1 means to ignore, use one of them instead and name it with ignore=."
                )
            raise DataError(f"{where}: {array.dtype} values from {low} to {high}, expected 0 to {top}. {advice}")
    return array


def _describe(data: Any) -> str:
    return f"an empty {type(data).__name__}" if isinstance(data, Sequence) and not data else type(data).__name__
