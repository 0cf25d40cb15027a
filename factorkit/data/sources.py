"""Where images lie: a folder, a file, a zip, an array or a list, all behind one small `Source`."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from factorkit.data.images import BrokenImage, to_rgb
from factorkit.errors import DataError

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jpe .jpeg .jpg .jp2 .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
IMAGE_KEYS = ("images", "X")  # the names looked for in an .npz, in this order
CHANNELS = (1, 3)


class Source(ABC):
    """Images that have names and can be read one by one, from any thread.

    Attributes:
        names: one for each image: a path relative to the source, with forward slashes, or a made-up one.
        positional: True where names are made up, so that only its position says which image is which.
    """

    names: list[str]
    positional: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def decode(self, index: int) -> Image.Image:
        """The picture as it is stored: of any mode, not yet turned upright.

        Raises:
            BrokenImage: the bytes are no image, or one of a size that only an attack has.
            DataError: the bytes cannot be read from the disk.
        """

    def read(self, index: int, at_least: int | None = None) -> Image.Image:
        """The picture upright and in RGB.

        With `at_least`, a JPEG may come at 1/2, 1/4 or 1/8 of its size, which decodes several times faster, but with
        no side below that many pixels.

        Raises:
            BrokenImage: it cannot be decoded; the message names it and says why.
            DataError: it cannot be read from the disk.
        """
        image = self.decode(index)
        try:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            return to_rgb(image)
        except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            raise BrokenImage(f"{self.names[index]}: cannot be decoded: {error}") from error

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the images do: of path, names, sizes and times, or of an array's content."""

    def subset(self, indices: Sequence[int]) -> Source:
        """The images at these indices, in this order."""
        return _Subset(self, list(indices))


class _Subset(Source):
    def __init__(self, whole: Source, indices: list[int]) -> None:
        self.whole, self.indices = whole, indices
        self.names = [whole.names[i] for i in indices]
        self.positional = whole.positional

    def decode(self, index: int) -> Image.Image:
        return self.whole.decode(self.indices[index])

    def fingerprint(self) -> str:
        return _digest("subset", self.whole.fingerprint(), self.indices)


class _EncodedSource(Source):
    """Images as encoded bytes: files on disk or members of an archive."""

    @abstractmethod
    def _bytes(self, index: int) -> bytes: ...

    def decode(self, index: int) -> Image.Image:
        name = self.names[index]
        try:
            data = self._bytes(index)
        except OSError as error:  # the disk's fault, not the picture's: leaving it out would hide it
            raise DataError(f"{name}: cannot be read: {error}. Mend the file or its permissions.") from error
        except Exception as error:  # zipfile: BadZipFile, zlib.error, RuntimeError for encrypted members, ...
            raise BrokenImage(f"{name}: cannot be unpacked: {error}") from error
        try:
            return Image.open(io.BytesIO(data))
        except Image.UnidentifiedImageError as error:
            raise BrokenImage(f"{name}: not an image ({len(data)} bytes that no reader recognises)") from error
        except Image.DecompressionBombError as error:
            raise BrokenImage(f"{name}: refused, too many pixels: {error} Scale it down first.") from error
        except Exception as error:
            raise BrokenImage(f"{name}: cannot be decoded: {error}") from error


class FileSource(_EncodedSource):
    """Image files; `names[i]` is `paths[i]` relative to `root`."""

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self.root, self.paths = root, list(paths)
        self.names = [path.relative_to(root).as_posix() for path in self.paths]

    def _bytes(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def fingerprint(self) -> str:
        return _digest("files", str(self.root), [(n, *_stamp(p)) for n, p in zip(self.names, self.paths, strict=True)])

    def subset(self, indices: Sequence[int]) -> FileSource:
        return FileSource(self.root, [self.paths[i] for i in indices])


class ZipSource(_EncodedSource):
    """The images of a .zip, or those below the folder `under` in it; names are relative to that folder."""

    def __init__(self, path: Path, under: str = "") -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path}: not a readable .zip: {error}. Download or pack it again.") from error
        self.path, self.under = path, under
        self.members = sorted(n for n in self.archive.namelist() if n.startswith(under) and _is_image(n))
        self.names = [member[len(under) :] for member in self.members]

    def _bytes(self, index: int) -> bytes:
        return self.archive.read(self.members[index])

    def fingerprint(self) -> str:
        return _digest("zip", str(self.path), self.under, _stamp(self.path))


class ArraySource(Source):
    """An array of images: [N, H, W], [N, H, W, C] or [N, C, H, W] with C in {1, 3}.

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
            self._fingerprint = _digest("array", str(self.array.dtype), self.array.shape, content.hexdigest())
        return self._fingerprint

    def subset(self, indices: Sequence[int]) -> ArraySource:
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
        return _digest("pictures", pixels)


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
    """Every image file below a folder, sorted by relative path; links are followed, each folder is entered once."""
    found, entered = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        true_path = os.path.realpath(here)
        if true_path in entered:  # a loop of links would never end
            folders.clear()
            continue
        entered.add(true_path)
        folders.sort()
        found += [Path(here, name) for name in files]
    found = [path for path in found if _is_image(path.relative_to(folder).as_posix()) and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _open_path(path: Path, keys: Sequence[str]) -> Source:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder (looked in {Path.cwd()}). Check the spelling of the path.")
    path = path.resolve()
    if path.is_dir() or suffix in IMAGE_SUFFIXES:
        return _open_list([path])
    if suffix == ".zip":
        source = ZipSource(path)
        if not source.names:
            raise DataError(f"{path}: no images in this .zip. Looked for {_suffixes()}.")
        return source
    if suffix in (".npy", ".npz"):
        return ArraySource(_load_array(path, keys), str(path), _digest("array file", str(path), *keys, _stamp(path)))
    raise DataError(f"{path}: suffix '{suffix}' is none of {_suffixes()}, .zip, .npy, .npz. Convert it to one of them.")


def _open_list(paths: Sequence[Path]) -> FileSource:
    """Files and folders together; names are relative to the deepest folder that holds them all."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder. Check the spelling of the path.")
        images = find_images(path) if path.is_dir() else [path]
        if not images:
            raise DataError(f"{path}: no images in this folder or below it. Looked for {_suffixes()}.")
        found += images
    for path in found:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{path}: not an image ({_suffixes()}). In a list, give image files and folders only.")
    root = os.path.commonpath([path if path.is_dir() else path.parent for path in paths])
    return FileSource(Path(root), found)


def _load_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            wanted = [key for key in keys if key in loaded.files] or (loaded.files if len(loaded.files) == 1 else [])
            if wanted:
                return loaded[wanted[0]]
            found = ", ".join(loaded.files) or "nothing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable array: {error} Save plain numbers, with numpy.save.") from error
    raise DataError(f"{path}: none of its arrays ({found}) is named {' or '.join(keys)}. Save it under that name.")


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    """The array as [N, H, W, C], its values checked."""
    layouts = "Give [N, H, W], [N, H, W, 3] or [N, 3, H, W]."
    where = f"{name} of shape {list(array.shape)}"
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"{where}: not a set of images. {layouts}")
    last = array.shape[-1] in CHANNELS
    if array.ndim == 3:
        if last:
            raise DataError(f"{where}: one image [H, W, C], or {len(array)} thin ones? {layouts}")
        array = array[..., None]
    else:
        first = array.shape[1] in CHANNELS
        if first == last:
            problem = "channels first or last?" if first else f"no axis of {CHANNELS} channels."
            raise DataError(f"{where}: {problem} {layouts}")
        array = np.moveaxis(array, 1, -1) if first else array
    if array.dtype.kind not in ("uif" if array.shape[-1] > 1 else "buif"):
        raise DataError(f"{where}: values of type {array.dtype} are no pixels. Give uint8, or floats in [0, 1].")
    if array.dtype.kind != "b" and array.dtype != np.uint8:
        low, high, top = array.min(), array.max(), 1 if array.dtype.kind == "f" else 255
        if not (low >= 0 and high <= top):  # written so that NaN is refused too
            raise DataError(f"{where}: {array.dtype} values from {low} to {high}, expected 0 to {top}. Rescale them.")
    return array


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


def _describe(data: Any) -> str:
    return f"an empty {type(data).__name__}" if isinstance(data, Sequence) and not data else type(data).__name__


def _stamp(path: Path) -> tuple[int, int]:
    """(bytes, time of change in ns): what says cheaply that a file is no longer what it was."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {os.strerror(error.errno or errno.EIO)}, though it was listed. Try again.") from error
    return status.st_size, status.st_mtime_ns


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()
