"""Decode one image: from any mode and bit depth to 8-bit RGB, and to a square of the training resolution."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import uint8_to_unit


class ImageDecodeError(DataError):
    """An image that cannot be decoded. Functions that read many images may skip it."""


def to_rgb(image: Image.Image, upright: bool = True) -> Image.Image:
    """Convert an image to RGB, upright by its EXIF orientation, transparency composited over white.

    Args:
        image: integer images of more than 8 bits (modes I;16 and I) are divided by 256. Float images (mode F) are in
            [0, 1], or in [0, 255] if any value is above 1.
        upright: False keeps the pixels as stored.

    Raises:
        ImageDecodeError: a float image has values that are not finite or outside [0, 255].
        OSError: or any other error of Pillow, for truncated and damaged files.
    """
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # before convert(), which clips these modes instead of scaling them
        image = Image.fromarray(np.clip(np.asarray(image) // 256, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = _float_to_grey(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_float(image: Image.Image, name: str, upright: bool = True) -> np.ndarray:
    """Convert an image to float32 [H, W, 3], or [H, W, 4] if any pixel is transparent, in [0, 1].

    Raises:
        ImageDecodeError: it cannot be decoded; `name` is used in the message.
    """
    try:
        if image.has_transparency_data:
            values = np.asarray((ImageOps.exif_transpose(image) if upright else image).convert("RGBA"))
            values = values if values[..., 3].min() < 255 else values[..., :3]
        else:
            values = np.asarray(to_rgb(image, upright))
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
    if not (low >= 0 and high <= 255):  # also refuses NaN
        raise ImageDecodeError(f"float values from {low} to {high}; convert the image to [0, 1] or to 8 bits")
    return Image.fromarray(np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8))
