"""Where images lie: a folder, a file, a zip, an array or a list, all behind one small `Source`."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from factorkit.data.decode import ImageDecodeError, to_rgb
from factorkit.utils.errors import DataError

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jpe .jpeg .jpg .jp2 .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
# The formats behind those suffixes and no other, whatever a file is called: Pillow reads some forty, among them
# PostScript, which it gives to Ghostscript to run.
FORMATS = frozenset("AVIF BMP DIB GIF JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP".split())
LARGE = 2**24  # pixels; pictures beyond are decoded one at a time, lest as many as there are threads fill the memory
MOST_BYTES = 2**29  # of one encoded picture: 179 million pixels, Pillow's own limit, take as much without compression


_one_at_a_time = threading.Lock()


class Source(ABC):
    """Images that have names and can be read one by one, from any thread.

    Attributes:
        names: one for each image: a path relative to the source, with forward slashes, or a made-up one.
        positional: True where names are made up, so that only its position says which image is which.
        ignore_label: label of pixels of a mask that are not scored, if the data set defines one.
    """

    names: list[str]
    positional: bool = False
    ignore_label: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def decode(self, index: int) -> Image.Image:
        """The picture as it is stored: of any mode, not yet turned upright.

        Raises:
            ImageDecodeError: the bytes are no image, or one of a size that only an attack has.
            DataError: the bytes cannot be read from the disk.
        """

    def read(self, index: int, at_least: int | None = None) -> Image.Image:
        """The picture upright and in RGB.

        With `at_least`, a JPEG may come at 1/2, 1/4 or 1/8 of its size, which decodes several times faster, but with
        no side below that many pixels.

        Raises:
            ImageDecodeError: it cannot be decoded; the message names it and says why.
            DataError: it cannot be read from the disk.
        """
        image = self.decode(index)
        try:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            with _one_at_a_time if image.width * image.height > LARGE else contextlib.nullcontext():
                return to_rgb(image)
        except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            raise ImageDecodeError(f"{escape_name(self.names[index])}: cannot be decoded: {error}") from error

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the images do: of path, names, sizes and times, or of an array's content."""

    def subset(self, indices: Sequence[int] | np.ndarray) -> Source:
        """The images at these indices, in this order."""
        return Subset(self, indices)


class Subset(Source):
    """Some images of a source."""

    def __init__(self, whole: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.whole, self.indices = whole, [int(i) for i in indices]
        self.names = [whole.names[i] for i in self.indices]
        self.positional, self.ignore_label = whole.positional, whole.ignore_label

    def decode(self, index: int) -> Image.Image:
        return self.whole.decode(self.indices[index])

    def fingerprint(self) -> str:
        return hash_values("subset", self.whole.fingerprint(), self.indices)


class EncodedSource(Source):
    """Images as encoded bytes: files on disk or members of an archive."""

    @abstractmethod
    def _bytes(self, index: int) -> bytes: ...

    def decode(self, index: int) -> Image.Image:
        name = escape_name(self.names[index])
        try:
            data = self._bytes(index)
        except ImageDecodeError as error:
            raise ImageDecodeError(f"{name}: {error}") from error
        except OSError as error:  # the disk's fault, not the picture's: leaving it out would hide it
            reason = error.strerror or str(error)
            raise DataError(f"{name}: cannot be read: {reason}. Mend the file or its permissions.") from error
        except Exception as error:  # zipfile: BadZipFile, zlib.error, RuntimeError for encrypted members, ...
            raise ImageDecodeError(f"{name}: cannot be unpacked: {error}") from error
        try:
            with warnings.catch_warnings():  # between half of its limit and the limit Pillow only warns
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(io.BytesIO(data), formats=formats())
        except Image.UnidentifiedImageError as error:
            raise ImageDecodeError(f"{name}: not an image ({len(data)} bytes that no reader recognises)") from error
        except Image.DecompressionBombError as error:
            raise ImageDecodeError(f"{name}: refused, too many pixels: {error} Scale it down first.") from error
        except Exception as error:
            raise ImageDecodeError(f"{name}: cannot be decoded: {error}") from error


@functools.cache
def formats() -> list[str]:
    """Those of `FORMATS` that this Pillow reads."""
    Image.init()
    return [name for name in Image.ID if name in FORMATS]


def is_image(name: str) -> bool:
    """Whether a file of this name, relative to what a user gave, is taken for an image."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def list_suffixes() -> str:
    """The suffixes of images, for a message."""
    return ", ".join(sorted(IMAGE_SUFFIXES))


def escape_name(name: str) -> str:
    """A file's name as a message can hold it: on one line, without what would steer a terminal."""
    return name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode("ascii")


def natural_sort_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A key that sorts names as people do, numbers in them by their value: 2 before 10."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # by their length first, as Python refuses to read numbers of thousands of digits
    numbers = [part.lstrip("0") if part[0] in "0123456789" else None for part in parts]
    return [(1, 0, part) if n is None else (0, len(n), n) for part, n in zip(parts, numbers, strict=True)], name


def too_large(size: int) -> str:
    """What is said of a picture whose encoded bytes are beyond `MOST_BYTES`."""
    return f"refused, it takes {size / 2**20:.0f} MiB, more than any picture ({MOST_BYTES / 2**20:.0f} MiB)"


def stat_file(path: Path) -> tuple[int, int]:
    """(bytes, time of change in ns): what says cheaply that a file is no longer what it was."""
    with wrap_os_errors(path, "though it was listed. Try again."):
        status = path.stat()
        return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def wrap_os_errors(path: Path, advice: str) -> Iterator[None]:
    """Turns an error of the disk into a DataError that names the path."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise DataError(f"{escape_name(str(path))}: {reason}, {advice}") from error


def hash_values(*parts: Any) -> str:
    """A hash over the representations of some values."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()


CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGB with alpha
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
            raise ImageDecodeError(too_large(size))
        return path.read_bytes()

    def fingerprint(self) -> str:
        content = hashlib.sha256(repr(("files", str(self.root))).encode("utf-8", "surrogateescape"))
        for name, file in zip(self.names, self.files, strict=True):
            content.update(repr((name, *stat_file(self.root / file))).encode("utf-8", "surrogateescape"))
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
            self._fingerprint = hash_values("array", str(self.array.dtype), self.array.shape, content.hexdigest())
        return self._fingerprint

    def subset(self, indices: Sequence[int] | np.ndarray) -> ArraySource:
        part = ArraySource(self.array[list(indices)])
        part.names = [self.names[i] for i in indices]
        return part


class PillowSource(Source):
    """Pillow images held in memory."""

    positional = True

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self.pictures = list(pictures)
        self.names = [f"{i:06d}" for i in range(len(self.pictures))]

    def decode(self, index: int) -> Image.Image:
        return self.pictures[index].copy()

    def fingerprint(self) -> str:
        pixels = [(p.mode, p.size, hashlib.sha256(p.tobytes()).hexdigest()) for p in self.pictures]
        return hash_values("pictures", pixels)


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    """The array as [N, H, W, C], its values checked."""
    layouts = "Give [N, H, W], [N, H, W, C] or [N, C, H, W], C being 1, 3 or 4."
    where = f"{name} of shape {list(array.shape)}"
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"{where}: not a set of images. {layouts}")
    if array.ndim == 3:
        if array.shape[-1] <= (1 if array.dtype.kind == "b" else max(CHANNEL_COUNTS)):  # booleans have no colours
            raise DataError(f"{where}: one image [H, W, C], or {len(array)} thin ones? {layouts}")
        array = array[..., None]
    else:
        # pictures of 4 x 4 pixels are commoner than alpha: a fourth channel counts where no axis has 1 or 3
        first, last = ((n in CHANNEL_COUNTS) + (n in CHANNEL_COUNTS[:2]) for n in (array.shape[1], array.shape[-1]))
        if first == last:
            problem = "channels first or last?" if first else f"no axis of {CHANNEL_COUNTS} channels."
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
