"""Sources of images: files, arrays and Pillow images behind one interface, decoded one image at a time."""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factorkit.data.decode import ImageDecodeError, drop_jpeg_metadata, drop_png_metadata, to_rgb
from factorkit.data.depth import SetDepths, is_deep, limit_memory
from factorkit.data.files import HEIF_MODULE, escape_name, stat_file
from factorkit.utils.errors import DataError, format_count

# Formats that are decoded, whatever the suffix. Pillow reads about forty, including PostScript, which it passes to
# Ghostscript for execution.
FORMATS = frozenset("AVIF BMP DIB GIF JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP".split())
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")  # ISO/IEC 23008-12
MAX_ENCODED_BYTES = 2**29  # per image: 179 million pixels, Pillow's own limit, without compression
CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGB with alpha


class Source(ABC):
    """A sequence of named images that are decoded one by one, from any thread.

    Attributes:
        names: name of each image: a relative path with forward slashes, or a number.
        positional: True if names are mere numbers, so that images are identified by position only.
        ignore_label: label of mask pixels that are not scored, if the data set defines one.
        depths: bit depths of images of more than 8 bits, one for a whole set: subsets share them.
    """

    names: list[str]
    positional: bool = False
    ignore_label: int | None = None
    _warned_of_frames = False

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def depths(self) -> SetDepths:
        """The bit depths, decided when an image asks first."""
        return SetDepths(self)

    @abstractmethod
    def decode(self, index: int) -> Image.Image:
        """Return an image as stored: in any mode, EXIF orientation not applied.

        Raises:
            ImageDecodeError: the bytes are not an image, or it has too many pixels.
            DataError: the bytes cannot be read from disk.
        """

    def read(self, index: int, at_least: int | None = None) -> Image.Image:
        """Return an image upright and in RGB.

        Args:
            index: which image.
            at_least: allow a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster, with no
                side below this many pixels.

        Raises:
            ImageDecodeError: it cannot be decoded.
            DataError: it cannot be read from disk.
        """
        image = self.decode(index)
        try:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            num_frames = getattr(image, "n_frames", 1)
            if image.format != "MPO" and num_frames > 1 and not self._warned_of_frames:
                self._warned_of_frames = True
                name = escape_name(self.names[index])
                warnings.warn(
                    f"{name}: only the first of its {num_frames} frames or pages is read, as of all files with several",
                    UserWarning,
                    stacklevel=2,
                )
            if is_deep(image):
                self.depths.decide()  # not while memory is limited: it reads other images
            with limit_memory(image):
                return to_rgb(image, depths=self.depths)
        except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            raise ImageDecodeError(f"{escape_name(self.names[index])}: cannot be decoded: {error}") from error

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes with the images: of path, names, sizes and times, or of an array's values."""

    def subset(self, indices: Sequence[int] | np.ndarray) -> Source:
        """Return the images at these indices, in this order."""
        return Subset(self, indices)


class Subset(Source):
    """Some images of another source."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source, self.indices = source, [int(i) for i in indices]
        self.names = [source.names[i] for i in self.indices]
        self.positional, self.ignore_label, self.depths = source.positional, source.ignore_label, source.depths

    def decode(self, index: int) -> Image.Image:
        """Return the image of the source as stored."""
        return self.source.decode(self.indices[index])

    def fingerprint(self) -> str:
        """Return a hash of the source and the indices."""
        return hash_values("subset", self.source.fingerprint(), self.indices)


class EncodedSource(Source):
    """Images as encoded bytes: files on disk or members of an archive."""

    @abstractmethod
    def _read_bytes(self, index: int) -> bytes: ...

    def decode(self, index: int) -> Image.Image:
        """Decode the bytes of an image: of a known format, and not too large."""
        name = escape_name(self.names[index])
        try:
            data = self._read_bytes(index)
        except ImageDecodeError as error:
            raise ImageDecodeError(f"{name}: {error}") from error
        except OSError as error:  # a fault of the disk, not of the image: skipping the image would hide it
            reason = error.strerror or str(error)
            raise DataError(f"{name}: cannot be read: {reason}. Check the file and its permissions.") from error
        except Exception as error:  # zipfile: BadZipFile, zlib.error, RuntimeError for encrypted members, ...
            raise ImageDecodeError(f"{name}: cannot be unpacked: {error}") from error
        try:
            with warnings.catch_warnings():  # Pillow warns from half of its pixel limit on
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                data = drop_png_metadata(data)
                try:
                    return Image.open(io.BytesIO(data), formats=list_supported_formats())
                except Image.UnidentifiedImageError:
                    return Image.open(io.BytesIO(drop_jpeg_metadata(data)), formats=list_supported_formats())
        except Image.UnidentifiedImageError as error:
            problem = f"not an image ({format_count(len(data), 'byte')} in no known format)"
            if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
                problem = "HEIC, whatever its suffix; pip install 'factorkit[heic]' reads it"
            raise ImageDecodeError(f"{name}: {problem}") from error
        except Image.DecompressionBombError as error:
            raise ImageDecodeError(f"{name}: too many pixels: {error} Reduce its size first.") from error
        except Exception as error:
            raise ImageDecodeError(f"{name}: cannot be decoded: {error}") from error


class FileSource(EncodedSource):
    """Image files below a folder.

    Args:
        files: paths relative to the folder, with forward slashes.
        names: names of the images; default: `files`.
    """

    # Keeps one string per image instead of a Path: for ImageNet's 1.3 million files Paths took 0.6 GiB.
    def __init__(self, root: Path, files: Iterable[str], names: Sequence[str] | None = None) -> None:
        self.root, self.files = root, list(files)
        self.names = self.files if names is None else list(names)

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.root / self.files[index]

    def _read_bytes(self, index: int) -> bytes:
        path = self.path(index)
        check_encoded_size(path.stat().st_size)
        return path.read_bytes()

    def fingerprint(self) -> str:
        """Return a hash of the root, and of each file's name, size and time."""
        digest = hashlib.sha256(repr(("files", str(self.root))).encode("utf-8", "surrogateescape"))
        for name, file in zip(self.names, self.files, strict=True):
            digest.update(repr((name, *stat_file(self.root / file))).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def subset(self, indices: Sequence[int] | np.ndarray) -> FileSource:
        """Return the files at these indices, in this order."""
        names = None if self.names is self.files else [self.names[i] for i in indices]
        part = FileSource(self.root, [self.files[i] for i in indices], names)
        part.depths = self.depths
        return part


class ArraySource(Source):
    """An array of images [N, H, W], [N, H, W, C] or [N, C, H, W], C being 1 (grey), 3 (RGB) or 4 (with alpha).

    Values are integers from 0 to 255 or floats from 0 to 1; booleans only for one channel.
    """

    positional = True

    def __init__(self, array: np.ndarray, name: str = "array", fingerprint: str | None = None) -> None:
        self.array = _to_nhwc(array, name)
        self.names = [f"{i:06d}" for i in range(len(array))]
        self._fingerprint = fingerprint

    def decode(self, index: int) -> Image.Image:
        """Return a row of the array as an image."""
        values = self.array[index]
        if values.dtype.kind == "f":
            values = np.rint(np.clip(values, 0, 1) * 255)
        if values.dtype.kind != "b":
            values = values.astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[-1] == 1 else values))

    def fingerprint(self) -> str:
        """Return a hash of the values, computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for image in self.array:
                digest.update(np.ascontiguousarray(image))
            self._fingerprint = hash_values("array", str(self.array.dtype), self.array.shape, digest.hexdigest())
        return self._fingerprint

    def subset(self, indices: Sequence[int] | np.ndarray) -> ArraySource:
        """Return the rows at these indices, in this order."""
        part = ArraySource(self.array[list(indices)])
        part.names = [self.names[i] for i in indices]
        return part


class PillowSource(Source):
    """Pillow images in memory."""

    positional = True

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.images = list(images)
        self.names = [f"{i:06d}" for i in range(len(self.images))]

    def decode(self, index: int) -> Image.Image:
        """Return a copy of an image."""
        return self.images[index].copy()

    def fingerprint(self) -> str:
        """Return a hash of the pixels."""
        pixels = [(image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()) for image in self.images]
        return hash_values("images", pixels)


def hash_values(*values: Any) -> str:
    """Return a SHA-256 hash of the representations of some values."""
    return hashlib.sha256(repr(values).encode("utf-8", "surrogateescape")).hexdigest()


def check_encoded_size(size: int) -> None:
    """Raise ImageDecodeError if an encoded image has more than `MAX_ENCODED_BYTES`."""
    if size > MAX_ENCODED_BYTES:
        limit = MAX_ENCODED_BYTES / 2**20
        raise ImageDecodeError(f"too large: {size / 2**20:.0f} MiB, the limit for an image is {limit:.0f} MiB")


@functools.cache
def list_supported_formats() -> list[str]:
    """Return those of `FORMATS` that the installed Pillow reads, with HEIF where its reader is installed."""
    Image.init()
    if HEIF_MODULE is not None:
        importlib.import_module(HEIF_MODULE).register_heif_opener()
    return [name for name in Image.ID if name in FORMATS or (name == "HEIF" and HEIF_MODULE is not None)]


def _to_nhwc(array: np.ndarray, name: str) -> np.ndarray:
    """Check an array of images, and return it as [N, H, W, C]."""
    expected = "Give [N, H, W], [N, H, W, C] or [N, C, H, W], C being 1, 3 or 4."
    where = f"{name} of shape {list(array.shape)}"
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"{where}: not a set of images. {expected}")
    if array.ndim == 3:
        if array.shape[-1] <= (1 if array.dtype.kind == "b" else max(CHANNEL_COUNTS)):  # booleans have no colours
            raise DataError(f"{where}: ambiguous: one image [H, W, C], or {len(array)} narrow images? {expected}")
        array = array[..., None]
    else:
        # Images of 4 x 4 pixels are more common than alpha: 4 channels count only if no axis has 1 or 3.
        first, last = ((n in CHANNEL_COUNTS) + (n in CHANNEL_COUNTS[:2]) for n in (array.shape[1], array.shape[-1]))
        if first == last:
            problem = "ambiguous: channels first or last?" if first else f"no axis of {CHANNEL_COUNTS} channels."
            raise DataError(f"{where}: {problem} {expected}")
        array = np.moveaxis(array, 1, -1) if first > last else array
    if array.dtype.kind not in ("uif" if array.shape[-1] > 1 else "buif"):
        raise DataError(f"{where}: values of type {array.dtype} are not pixels. Give uint8, or floats in [0, 1].")
    if array.dtype.kind != "b" and array.dtype != np.uint8:
        low, high, limit = array.min(), array.max(), 1 if array.dtype.kind == "f" else 255
        if not (low >= 0 and high <= limit):  # also refuses NaN
            advice = "Rescale them."
            if limit == 255 and array.shape[-1] == 1:
                advice = (
                    "Rescale them if they are images. If they are masks, renumber the labels to 0 to 255; replace -1 "
                    "for ignored pixels by one of these and pass it as ignore_label=."
                )
            raise DataError(f"{where}: {array.dtype} values from {low} to {high}, expected 0 to {limit}. {advice}")
    return array
