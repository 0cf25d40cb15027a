"""One picture: from whatever a file holds to 8-bit RGB, and to a square of the training resolution."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from factorkit.utils.errors import ConfigError, DataError


class ImageDecodeError(DataError):
    """One picture that cannot be decoded; where many are read, it may be left out."""


def to_rgb(image: Image.Image, upright: bool = True) -> Image.Image:
    """The picture as a person sees it: upright by its EXIF orientation, mode RGB, transparency composited over white.
    Not `upright`: with its pixels where they are stored.

    Integer pictures of more than 8 bits (modes I;16 and I) are divided by 256. Float pictures (mode F) are taken to
    run over [0, 1], or over [0, 255] where any value is above 1.

    Raises:
        ImageDecodeError: a float picture with values that are not finite or outside [0, 255].
        OSError, and whatever else Pillow raises: a truncated or damaged file.
    """
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # before transparency: Pillow clips these modes instead of scaling them
        image = Image.fromarray(np.clip(np.asarray(image) // 256, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = _from_float(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def crop_square(image: Image.Image, resolution: int) -> np.ndarray:
    """The largest centred square of an RGB picture, resized with antialiasing (Lanczos); uint8 [R, R, 3].

    Raises:
        ConfigError: a resolution below 1.
    """
    return np.asarray(_centre(image, resolution, Image.Resampling.LANCZOS))


def crop_square_labels(labels: np.ndarray, resolution: int) -> np.ndarray:
    """The same square of an integer label map [H, W], resized by nearest neighbour; int32 [R, R]."""
    return np.asarray(_centre(Image.fromarray(labels.astype(np.int32)), resolution, Image.Resampling.NEAREST))


def _centre(image: Image.Image, resolution: int, resampling: Image.Resampling) -> Image.Image:
    if resolution < 1:
        raise ConfigError(f"resolution={resolution}: give a number of pixels, 1 or more.")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    centre = image.crop((left, top, left + side, top + side))  # resize(box=...) would let the filter see outside of it
    return centre.resize((resolution, resolution), resampling)


def _from_float(values: np.ndarray) -> Image.Image:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # written so that NaN is refused too
        raise ImageDecodeError(f"float values from {low} to {high}; convert the picture to [0, 1] or to 8 bits")
    return Image.fromarray(np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8))
