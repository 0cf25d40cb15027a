"""What every place that images lie in has in common: names, reading one by one, and a fingerprint."""

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
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from factorkit.data.images import BrokenImage, to_rgb
from factorkit.errors import DataError

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
        ignore: of masks whose maker says so, the label that is not scored.
    """

    names: list[str]
    positional: bool = False
    ignore: int | None = None

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
            with _one_at_a_time if image.width * image.height > LARGE else contextlib.nullcontext():
                return to_rgb(image)
        except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            raise BrokenImage(f"{shown(self.names[index])}: cannot be decoded: {error}") from error

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
        self.positional, self.ignore = whole.positional, whole.ignore

    def decode(self, index: int) -> Image.Image:
        return self.whole.decode(self.indices[index])

    def fingerprint(self) -> str:
        return digest("subset", self.whole.fingerprint(), self.indices)


class EncodedSource(Source):
    """Images as encoded bytes: files on disk or members of an archive."""

    @abstractmethod
    def _bytes(self, index: int) -> bytes: ...

    def decode(self, index: int) -> Image.Image:
        name = shown(self.names[index])
        try:
            data = self._bytes(index)
        except BrokenImage as error:
            raise BrokenImage(f"{name}: {error}") from error
        except OSError as error:  # the disk's fault, not the picture's: leaving it out would hide it
            reason = error.strerror or str(error)
            raise DataError(f"{name}: cannot be read: {reason}. Mend the file or its permissions.") from error
        except Exception as error:  # zipfile: BadZipFile, zlib.error, RuntimeError for encrypted members, ...
            raise BrokenImage(f"{name}: cannot be unpacked: {error}") from error
        try:
            with warnings.catch_warnings():  # between half of its limit and the limit Pillow only warns
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(io.BytesIO(data), formats=formats())
        except Image.UnidentifiedImageError as error:
            raise BrokenImage(f"{name}: not an image ({len(data)} bytes that no reader recognises)") from error
        except Image.DecompressionBombError as error:
            raise BrokenImage(f"{name}: refused, too many pixels: {error} Scale it down first.") from error
        except Exception as error:
            raise BrokenImage(f"{name}: cannot be decoded: {error}") from error


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


def suffixes() -> str:
    """The suffixes of images, for a message."""
    return ", ".join(sorted(IMAGE_SUFFIXES))


def shown(name: str) -> str:
    """A file's name as a message can hold it: on one line, without what would steer a terminal."""
    return name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode("ascii")


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A key that sorts names as people do, numbers in them by their value: 2 before 10."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # by their length first, as Python refuses to read numbers of thousands of digits
    numbers = [part.lstrip("0") if part[0] in "0123456789" else None for part in parts]
    return [(1, 0, part) if n is None else (0, len(n), n) for part, n in zip(parts, numbers, strict=True)], name


def too_large(size: int) -> str:
    """What is said of a picture whose encoded bytes are beyond `MOST_BYTES`."""
    return f"refused, it takes {size / 2**20:.0f} MiB, more than any picture ({MOST_BYTES / 2**20:.0f} MiB)"


def stamp(path: Path) -> tuple[int, int]:
    """(bytes, time of change in ns): what says cheaply that a file is no longer what it was."""
    with said(path, "though it was listed. Try again."):
        status = path.stat()
        return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def said(path: Path, advice: str) -> Iterator[None]:
    """Turns an error of the disk into a DataError that names the path."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise DataError(f"{shown(str(path))}: {reason}, {advice}") from error


def digest(*parts: Any) -> str:
    """A hash over the representations of some values."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()
