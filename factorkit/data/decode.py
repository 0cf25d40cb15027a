"""Decode one image: drop metadata that may stop Pillow, convert any mode and depth to 8-bit RGB, crop to a square."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image

from factorkit.data.depth import ImageDecodeError, SetDepths, apply_orientation, read_deep
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import uint8_to_unit

FLOAT_RANGES = (1, 255, 65535)  # white in float images
FLOAT_TOLERANCE = 0.05  # of resampled values beyond [0, 1]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# PNG 3, section 11: what the pixels, their depth, orientation and number of frames need
PNG_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
PNG_NEEDED = (b"tRNS", b"eXIf", b"sBIT", b"acTL", b"fcTL", b"fdAT")
PNG_TRANSPARENCY_BYTES = {0: 2, 2: 6}  # of tRNS, by colour type: grey, RGB
PNG_COLOR_TYPE = 25  # offset
# JPEG markers, ITU-T T.81 table B.1, that a decoder does not need, and the least length of those that it does
JPEG_START, JPEG_SCAN, JPEG_COMMENT, JPEG_EXIF = b"\xff\xd8", 0xDA, 0xFE, 0xE1
JPEG_APPLICATION = range(0xE0, 0xF0)
JPEG_NEEDED = {0xE0: 16, 0xEE: 14}  # JFIF and Adobe: they name the colour space


def to_rgb(image: Image.Image, upright: bool = True, depths: SetDepths | None = None) -> Image.Image:
    """Convert an image to RGB, upright by its EXIF orientation, transparency composited over white.

    Args:
        image: integer images of more than 8 bits are scaled by the depth that the file names, or else by the least one
            of 8, 10, 12, 14, 16, 24 and 32 that holds their values: files of 16 bits often hold 12, or 8. Float images
            (mode F) are in the first of [0, 1], [0, 255] and [0, 65535] that holds theirs.
        upright: False keeps the pixels as stored.
        depths: of the set that the image belongs to.

    Raises:
        ImageDecodeError: integers are negative; floats are not finite or outside [0, 65535].
        OSError: or any other error of Pillow, for truncated and damaged files.
    """
    image = _to_8_bits(image, upright, depths)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, upright: bool, depths: SetDepths | None) -> Image.Image:
    """Return the image with 8 bits a sample: convert() clips larger values instead of scaling them."""
    deep = read_deep(image, upright)
    if deep is not None:
        return deep.reduce(None if depths is None else depths.of(deep))
    image = apply_orientation(image) if upright else image
    return _float_to_grey(np.asarray(image)) if image.mode == "F" else image


def to_float(image: Image.Image, name: str, upright: bool = True, depths: SetDepths | None = None) -> np.ndarray:
    """Convert an image to float32 [H, W, 3], or [H, W, 4] if any pixel is transparent, in [0, 1].

    Raises:
        ImageDecodeError: it cannot be decoded; `name` is used in the message.
    """
    try:
        image = _to_8_bits(image, upright, depths)
        if image.has_transparency_data:
            values = np.asarray(image.convert("RGBA"))
            values = values if values[..., 3].min() < 255 else values[..., :3]
        else:
            values = np.asarray(image.convert("RGB"))
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageDecodeError(f"{name}: cannot be decoded: {error}") from error
    return uint8_to_unit(values)


def crop_square(image: Image.Image, resolution: int) -> np.ndarray:
    """Crop an RGB image to its centred square and resize it with antialiasing (Lanczos); uint8 [R, R, 3].

    Raises:
        ConfigError: a resolution below 1.
    """
    return np.asarray(_crop_and_resize(image, resolution, Image.Resampling.LANCZOS))


def crop_square_labels(labels: np.ndarray, resolution: int) -> np.ndarray:
    """Crop a label map [H, W] to the same square and resize it by nearest neighbour; int32 [R, R]."""
    return np.asarray(_crop_and_resize(Image.fromarray(labels.astype(np.int32)), resolution, Image.Resampling.NEAREST))


def _crop_and_resize(image: Image.Image, resolution: int, resampling: Image.Resampling) -> Image.Image:
    if resolution < 1:
        raise ConfigError(f"resolution={resolution}: give a number of pixels, 1 or more.")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # with resize(box=...) the filter reads outside the box
    return square.resize((resolution, resolution), resampling)


def _float_to_grey(values: np.ndarray) -> Image.Image:
    low, high = values.min(), values.max()
    # A little below 0 or above 1 comes from resampling. Also refuses NaN.
    if not (low >= -FLOAT_TOLERANCE and high <= FLOAT_RANGES[-1]):
        raise ImageDecodeError(f"float values from {low} to {high}; convert the image to [0, 1] or to 8 bits")
    scale = next(scale for scale in FLOAT_RANGES if high <= scale + (FLOAT_TOLERANCE if scale == 1 else 0))
    return Image.fromarray(np.rint(np.clip(values * (255 / scale), 0, 255)).astype(np.uint8))


# --- metadata: dropped where nothing here reads it, since Pillow refuses an image for damaged ones ---


def drop_png_metadata(data: bytes) -> bytes:
    """Return a PNG without the chunks that are not needed, or damaged; other data as they are."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, position, is_changed = [PNG_SIGNATURE], len(PNG_SIGNATURE), False
    while position + 12 <= len(data):  # length, type, content, checksum
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if kind in PNG_CRITICAL or (kind in PNG_NEEDED and _is_sound(data, kind, position, end)):
            kept.append(data[position:end])
        else:
            is_changed = True
        position = end
    return b"".join([*kept, data[position:]]) if is_changed else data


def _is_sound(data: bytes, kind: bytes, position: int, end: int) -> bool:
    """Return whether an ancillary chunk has the right checksum, and transparency the right length."""
    if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
        return False
    length = end - position - 12
    return kind != b"tRNS" or length == PNG_TRANSPARENCY_BYTES.get(data[PNG_COLOR_TYPE], length)


def drop_jpeg_metadata(data: bytes) -> bytes:
    """Return a JPEG with no metadata but EXIF, and JFIF and Adobe's marker if long enough; other data as they are."""
    if not data.startswith(JPEG_START):
        return data
    kept, position = [JPEG_START], 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], struct.unpack(">H", data[position + 2 : position + 4])[0]
        if marker == JPEG_SCAN:
            break
        is_needed = marker == JPEG_EXIF or length >= JPEG_NEEDED.get(marker, 2**16)
        if is_needed or not (marker in JPEG_APPLICATION or marker == JPEG_COMMENT):
            kept.append(data[position : position + 2 + length])
        position += 2 + length
    return b"".join([*kept, data[position:]])
