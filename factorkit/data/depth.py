"""Bit depth of images of more than 8 bits a sample: their true values, and which value is white.

The container does not tell: files of 16 bits often hold 12, or 8. A file may name its depth. Otherwise the largest
value of all images of a set decides, so that a dark image of a bright set stays dark.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from factorkit.data.files import escape_name, format_examples
from factorkit.utils.errors import DataError

INTEGER_DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits that cameras, scanners and microscopes store
MAX_HEADER_BYTES = 2**16  # read of a file for the depth that it names
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, PLANAR, S_MAX_SAMPLE_VALUE = 258, 262, 281, 284, 341  # TIFF 6.0
WHITE_IS_ZERO, SEPARATE_PLANES = 0, 2
PLANES_REFUSED = "a TIFF of separate planes of more than 8 bits; save it with interleaved channels"
# Pillow keeps the high byte of each sample; read in the other byte order it keeps the low one.
LOW_BYTES = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
SERIAL_DECODE_PIXELS = 2**24  # larger images are decoded one at a time, to bound the memory of all threads

_serial_decode_lock = threading.Lock()


class ImageDecodeError(DataError):
    """An image that cannot be decoded. Functions that read many images may skip it."""


class DeepImage(NamedTuple):
    """An image of more than 8 bits a sample.

    Attributes:
        values: integers from 0 on, [H, W] or [H, W, C].
        mode: of Pillow, after reduction to 8 bits.
        kind: format and bits of the container; images of one kind share their depth within a set.
        declared: bits that the file names, and where; None if it names none.
        white_is_zero: whether small values are bright.
    """

    values: np.ndarray
    mode: str
    kind: str
    declared: tuple[int, str] | None
    white_is_zero: bool

    @property
    def top(self) -> int:
        """The largest value, without opacity."""
        has_alpha = self.mode.endswith("A")
        return int((self.values[..., :-1] if has_alpha else self.values).max(initial=0))

    def choose_depth(self, set_depth: int | None = None) -> int:
        """Return the bits that white has; ``set_depth`` is that of the set, which would leave some images all black."""
        if self.declared is not None:
            return self.declared[0]
        own = fit_depth(self.top)
        return own if set_depth is None or self.top >> (set_depth - 8) == 0 else max(own, set_depth)

    def reduce(self, set_depth: int | None = None) -> Image.Image:
        """Return the image with 8 bits a sample."""
        depth = self.choose_depth(set_depth)
        values = np.clip(self.values >> (depth - 8), 0, 255)
        if self.white_is_zero:
            values = 255 - values
        if self.mode.endswith("A"):
            alpha = self.values[..., -1]
            values[..., -1] = np.clip(alpha >> (max(depth, fit_depth(int(alpha.max(initial=0)))) - 8), 0, 255)
        return Image.fromarray(values.astype(np.uint8), self.mode)


def fit_depth(top: int) -> int:
    """Return the least of `INTEGER_DEPTHS` that holds a value."""
    return next((depth for depth in INTEGER_DEPTHS if top < 2**depth), INTEGER_DEPTHS[-1])


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has more than 8 bits a sample, of which Pillow keeps 8 or scales none."""
    return image.mode.startswith("I") or _find_rawmode(image)[-4:] in LOW_BYTES


def read_deep(image: Image.Image, upright: bool = True) -> DeepImage | None:
    """Read the true values of an image of more than 8 bits a sample; None for any other.

    Args:
        image: as opened: of a colour image that has been loaded, Pillow keeps only 8 bits.
        upright: apply the EXIF orientation.

    Raises:
        ImageDecodeError: negative values, or separate planes of 16 bits, which Pillow cannot read.
        OSError: or any other error of Pillow, for truncated and damaged files.
    """
    turn = apply_orientation if upright else lambda image: image
    if not is_deep(image):
        return None
    header_bits = _read_header_bits(image)  # before the pixels, which end the reading
    if image.mode.startswith("I"):
        values, mode = np.asarray(turn(image)), "L"
        if values.min(initial=0) < 0:
            raise ImageDecodeError(
                f"values from {values.min()} to {values.max()}; shift them to 0 and above, or convert to 8 bits"
            )
    else:
        low = _open_low_bytes(image)
        high, mode = np.asarray(turn(image)).astype(np.uint16), image.mode
        values = high << 8
        if high[..., :3].max(initial=0) < 64:  # else 16 bits, and the high bytes are all of the result
            if low is None:
                raise ImageDecodeError(PLANES_REFUSED)
            values += np.asarray(turn(low))
    bits = 32 if image.mode == "I" and image.format not in ("PNG", "PPM") else 16
    kind = f"{image.format or 'in-memory'} of {bits} bits"
    white_is_zero = mode == "L" and _tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO
    deep = DeepImage(values, mode, kind, None, white_is_zero)
    return deep._replace(declared=_find_declared_depth(image, deep, header_bits))


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, where there is none or the EXIF is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as in apply_orientation
        return 1


def apply_orientation(image: Image.Image) -> Image.Image:
    """Turn an image upright by its EXIF orientation; an image whose EXIF is damaged stays as it is stored."""
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, MemoryError):  # of the pixels
        raise
    except Exception:  # SyntaxError, struct.error, TypeError, ... of the metadata: the pixels are sound
        return image


@contextlib.contextmanager
def limit_memory(image: Image.Image) -> Iterator[None]:
    """Let no two threads decode very large images at once."""
    is_large = image.width * image.height > SERIAL_DECODE_PIXELS
    with _serial_decode_lock if is_large else contextlib.nullcontext():
        yield


class SetDepths:
    """The depths of the images of a set, decided when the first image of more than 8 bits is read.

    Images of one kind, such as 16-bit PNG, have the least depth that holds the values of all of them. An image keeps a
    depth that its file names; one that would be all black has its own. One warning names the images of each depth.

    Args:
        source: the set, a :class:`factorkit.data.sources.Source`.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._depths: dict[str, int] | None = None
        self.note = ""  # what was decided, once an image of more than 8 bits was read

    def of(self, image: DeepImage) -> int | None:
        """Return the depth of the images of this image's kind; None if the set has none."""
        return self.decide().get(image.kind)

    def decide(self) -> dict[str, int]:
        """Decide the depths, reading the whole set in the first call; return them by kind."""
        with self._lock:
            if self._depths is None:
                self._depths = self._measure_all()
                if self.note:
                    warnings.warn(self.note, UserWarning, stacklevel=4)
            return self._depths

    @property
    def is_decided(self) -> bool:
        """Whether an image of more than 8 bits was read."""
        return self._depths is not None

    def fingerprint(self) -> str:
        """Return a hash that changes with the whole set, see `Source.fingerprint`."""
        return self._source.fingerprint()

    def _measure_all(self) -> dict[str, int]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            measured = [item for item in pool.map(self._measure, range(len(self._source))) if item is not None]
        depths: dict[str, int] = {}
        for _, image, _ in measured:
            depths[image.kind] = max(depths.get(image.kind, 0), image.choose_depth())
        groups: dict[tuple[str, int, str], list[str]] = {}
        brightest: dict[str, tuple[int, str]] = {}
        for name, image, top in measured:
            depth, reason = image.choose_depth(depths[image.kind]), "largest value"
            if image.declared is not None:
                reason = image.declared[1]
            elif depth < depths[image.kind]:
                reason = "own values, since they would be black"
            else:
                brightest[image.kind] = max(brightest.get(image.kind, (0, "")), (top, name))
            groups.setdefault((image.kind, depth, reason), []).append(name)
        parts = []
        for (kind, depth, reason), names in groups.items():
            if depth == 16 and kind.endswith("16 bits") and len(groups) == 1:
                continue  # nothing to decide
            if reason == "largest value":
                top, name = brightest[kind]
                reason = f"largest value, {top} in {escape_name(name)}"
            parts.append(f"{len(names)} {kind} ({format_examples(names)}) read as {depth} bits by their {reason}")
        self.note = "images of more than 8 bits: " + "; ".join(parts) if parts else ""
        return depths

    def _measure(self, index: int) -> tuple[str, DeepImage, int] | None:
        """Return name, image without values, and largest value; None for images of 8 bits and damaged ones."""
        try:
            image = self._source.decode(index)
            with limit_memory(image):
                deep = read_deep(image)
        except Exception:  # of the image: reading it reports the error
            return None
        return None if deep is None else (self._source.names[index], _summarise(deep), deep.top)


def _summarise(image: DeepImage) -> DeepImage:
    """Return the image with its largest value as its only one."""
    return image._replace(values=np.full((1, 1), image.top), mode="L")


def _find_rawmode(image: Any) -> str:
    """Return how Pillow will unpack a colour image; empty for images in memory, and for further frames."""
    if image.format not in ("PNG", "TIFF") or not getattr(image, "tile", None) or image.tell():
        return ""
    args = image.tile[0][3]
    is_animated = image.format == "PNG" and getattr(image, "is_animated", False)
    if _has_planes(image) and image.tile[0][0] == "raw" and max(_tags(image).get(BITS_PER_SAMPLE, (8,))) > 8:
        raise ImageDecodeError(PLANES_REFUSED)  # Pillow reads them as 8 bits
    return "" if is_animated else args if isinstance(args, str) else str(args[0])


def _has_planes(image: Any) -> bool:
    return image.format == "TIFF" and _tags(image).get(PLANAR) == SEPARATE_PLANES


def _open_low_bytes(image: Any) -> Image.Image | None:
    """Open the low bytes of a colour image of 16 bits a sample as another image; None if Pillow cannot read them."""
    if _has_planes(image):
        return None
    rawmode = _find_rawmode(image)
    position = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(position)
    low: Any = Image.open(io.BytesIO(data), formats=[image.format])
    if rawmode == "LA;16B":  # no LA;16L: as two-byte samples, which are grey and opacity once more
        low.tile = [_with_rawmode(tile, "RGBA") for tile in low.tile]
        low.load()
        return Image.merge("RGBA", (low.getchannel(1),) * 3 + (low.getchannel(3),))
    low.tile = [_with_rawmode(tile, rawmode[:-4] + LOW_BYTES[rawmode[-4:]]) for tile in low.tile]
    return low


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    args = rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:])
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)  # plain before Pillow 11


def _tags(image: Any) -> Any:
    return getattr(image, "tag_v2", {})


def _find_declared_depth(image: Any, deep: DeepImage, header_bits: int | None) -> tuple[int, str] | None:
    """Return the bits that a file names for its values, and where; None if it names none, or wrong ones."""
    if header_bits is not None and image.format != "PNG":  # Pillow scales these to 16 bits
        return 16, "header"
    if header_bits is not None:
        low = deep.values & (2 ** (16 - header_bits) - 1)
        # The standard stores values scaled to 16 bits; a dark image of scaled values has nothing in its low bits.
        is_filled = (np.abs(low.astype(np.int64) - (deep.values >> header_bits)) <= 1).all()
        return 16 if deep.top >= 2**header_bits or is_filled else header_bits, "sBIT"
    tags = _tags(image)
    stored = max(tags.get(BITS_PER_SAMPLE, (16,)))
    if stored in INTEGER_DEPTHS and stored < 16:
        return stored, "BitsPerSample"
    for tag, name in ((S_MAX_SAMPLE_VALUE, "SMaxSampleValue"), (MAX_SAMPLE_VALUE, "MaxSampleValue")):
        value = tags.get(tag)
        most = int(max(value) if isinstance(value, tuple) else value or 0)
        bits = most.bit_length()
        if bits in INTEGER_DEPTHS and most == 2**bits - 1 and deep.top <= most:  # else the largest value, not the range
            return bits, name
    return None


def _read_header_bits(image: Any) -> int | None:
    """Return the bits that the header of a PNG (sBIT), PNM or JPEG 2000 names; None if none, or those of the file."""
    if image.format not in ("PNG", "PPM", "JPEG2000") or getattr(image, "fp", None) is None:
        return None
    position = image.fp.tell()
    image.fp.seek(0)
    header = image.fp.read(MAX_HEADER_BYTES)
    image.fp.seek(position)
    if image.format == "PNG":
        start = header.partition(b"IDAT")[0].find(b"sBIT")
        samples = header[start + 4 : start + 4 + int.from_bytes(header[start - 4 : start], "big")] if start > 0 else b""
        bits = max(samples[: 3 if len(samples) >= 3 else 1], default=0)  # without opacity
        return bits if bits in INTEGER_DEPTHS else None
    if image.format == "PPM":
        words = re.sub(rb"#[^\n]*\n", b" ", header).split(None, 4)
        bits = int(words[3]).bit_length() if words[3].isdigit() else 16
    else:  # the SIZ marker, 38 bytes, and the bits less one of the first component, ITU-T T.800 table A.9
        start = header.find(b"\xff\x51")
        bits = (header[start + 40] & 127) + 1 if start >= 0 else 16
    return bits if bits < 16 else None
