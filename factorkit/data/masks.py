"""Masks: what their values mean, which image each belongs to, and loading them together with the images."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from factorkit.data.decode import ImageDecodeError, crop_square, crop_square_labels
from factorkit.data.files import escape_name, fold_stem, format_examples, is_image
from factorkit.data.open import open_source
from factorkit.data.sources import Source
from factorkit.utils.errors import DataError

MASK_KEYS = ("masks", "M")  # arrays looked for in an .npz, in this order
# A mask may be named like its image with one of these appended or prepended, or with its image's whole name
MASK_ENDINGS = ("_mask", "_seg", "_gt", "_segmentation", "_label", "_labels", "_matte", "_trimap", "-mask", ".mask")
MASK_BEGINNINGS = ("mask_", "dynamic_mask_")
ASPECT_TOLERANCE = 0.01  # relative difference between the aspect ratios of a mask and its image
OPACITY_SCALES = (1, 255, 65535)  # value of full opacity: labels and floats, 8 bits, 16 bits


@dataclass(frozen=True)
class LabelledImages:
    """Images with their masks.

    Attributes:
        images: uint8 [N, R, R, 3].
        foreground: bool [N, R, R].
        valid: bool [N, R, R], False for ignored pixels (where `foreground` is False too).
        names: names of the images.
        labels: int32 [N, R, R], the values of the masks.
    """

    images: np.ndarray
    foreground: np.ndarray
    valid: np.ndarray
    names: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def load_labelled(images: Any, masks: Any, resolution: int, *, ignore_label: int | None = None) -> LabelledImages:
    """Load all images that have a mask, cropped to the centred square and resized (masks by nearest neighbour).

    Images and masks are matched by `match_masks`. A mask must hold labels: a grey, palette or 1-bit image, or a colour
    image with equal channels. Palette images count by index, except black-and-white palettes where black is not index
    0. A mask of another size than its image is first resized to the image's size.

    Args:
        images: anything that `open_source` accepts.
        masks: the same.
        resolution: side of the squares in pixels.
        ignore_label: label of pixels that are not scored; default: the data set's, if it defines one. Foreground is
            every other label above 0.

    Raises:
        ConfigError: a resolution below 1.
        DataError: no matches, an image that cannot be decoded, a coloured mask, or a mask whose aspect ratio differs
            from its image's by more than 1%.
    """
    image_source, mask_source = open_source(images), open_source(masks, keys=MASK_KEYS)
    pairs = match_masks(image_source, mask_source)

    def load(pair: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return _load_pair(image_source, mask_source, *pair, resolution)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = list(pool.map(load, pairs))
    labels = np.stack([label for _, label in loaded])
    ignore_label = mask_source.ignore_label if ignore_label is None else ignore_label
    valid = np.ones(labels.shape, bool) if ignore_label is None else labels != ignore_label
    pixels = np.stack([image for image, _ in loaded])
    return LabelledImages(pixels, (labels > 0) & valid, valid, [image_source.names[i] for i, _ in pairs], labels)


def match_masks(images: Source, masks: Source) -> list[tuple[int, int]]:
    """Match masks to images.

    Files match by path without suffix (`a/x.jpg`, `a/x.png`), whatever the case and the Unicode form; a mask's name may
    also have one of `MASK_ENDINGS` or `MASK_BEGINNINGS`, or be the image's whole name (`x.jpg.png`). Images without a
    mask are left out. Arrays match by position.

    Returns:
        Pairs (image index, mask index), in the order of the images.

    Raises:
        DataError: masks without an image, two candidates for one mask or image, or arrays of different lengths.
    """
    if images.positional or masks.positional:
        if len(images) != len(masks):
            raise DataError(f"{len(images)} images but {len(masks)} masks: arrays match by position. Give one each.")
        return [(i, i) for i in range(len(images))]
    images_by_stem: dict[str, list[int]] = {}
    for i, name in enumerate(images.names):
        images_by_stem.setdefault(fold_stem(name), []).append(i)
    mask_of: dict[str, int] = {}
    unmatched = []
    for j, name in enumerate(masks.names):
        stem = next((stem for stem in image_stems(name) if stem in images_by_stem), None)
        if stem is None:
            unmatched.append(name)
        elif stem in mask_of:
            duplicates = " and ".join(map(escape_name, (masks.names[mask_of[stem]], name)))
            raise DataError(f"{duplicates}: two masks of one image. Keep one of them.")
        elif len(images_by_stem[stem]) > 1:
            candidates = " and ".join(escape_name(images.names[i]) for i in images_by_stem[stem])
            raise DataError(
                f"{candidates}: the mask {escape_name(name)} fits each of these images. Rename all but one."
            )
        else:
            mask_of[stem] = j
    if unmatched:
        raise DataError(
            f"{len(unmatched)} of {len(masks)} masks have no image: {format_examples(unmatched)}. The images are named "
            f"{format_examples(images.names)}. Give a mask its image's name, with or without "
            f"{' or '.join(MASK_ENDINGS[:2])}."
        )
    stems = map(fold_stem, images.names)
    return [(i, mask_of[stem]) for i, stem in enumerate(stems) if stem in mask_of]


def image_stems(mask_name: str) -> list[str]:
    """Return the folded stems that the image of a mask may have, the mask's own first."""
    stem = fold_stem(mask_name)
    folder, _, base = stem.rpartition("/")
    folder = f"{folder}/" if folder else ""
    stems = [stem] + [stem.removesuffix(ending) for ending in MASK_ENDINGS if stem.endswith(ending)]
    stems += [folder + base.removeprefix(part) for part in MASK_BEGINNINGS if base.startswith(part)]
    return stems + ([fold_stem(stem)] if is_image(stem) else [])  # x.jpg.png


def _load_pair(images: Source, masks: Source, i: int, j: int, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the image uint8 [R, R, 3] and its labels int32 [R, R]."""
    image, labels = images.read(i), read_labels(masks, j)
    height, width = labels.shape
    if (width, height) != image.size:
        if abs(width * image.height / (height * image.width) - 1) > ASPECT_TOLERANCE:
            raise DataError(
                f"{escape_name(masks.names[j])}: a mask of {width} x {height} pixels for an image of {image.width} x "
                f"{image.height} ({escape_name(images.names[i])}). Crop or redraw it to the image's aspect ratio."
            )
        labels = np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
    return crop_square(image, resolution), crop_square_labels(labels, resolution)


def read_labels(masks: Source, index: int) -> np.ndarray:
    """Read the labels of one mask, int32 [H, W]; see `load_labelled`.

    Raises:
        DataError: the mask cannot be decoded, or its values are not labels.
    """
    name = escape_name(masks.names[index])
    image = masks.decode(index)
    try:
        if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255):
            image = image.convert(image.mode.removesuffix("A"))
        if _is_inverted_palette(image):
            image = image.convert("L")
        values = np.asarray(ImageOps.exif_transpose(image))
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{name}: cannot be decoded: {error}. Replace the file, or remove it.") from error
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise DataError(f"{name}: a mask in colour (mode {image.mode}). Save labels as a grey or palette image.")
        values = values[..., 0]
    if image.format == "JPEG" and not np.isin(values, (0, 255)).all():
        raise DataError(f"{name}: JPEG compression has altered the labels. Threshold them and save as PNG.")
    if values.dtype.kind == "f":
        raise DataError(f"{name}: a mask of {values.dtype} values. Save labels as 8-bit integers.")
    return values.astype(np.int32)


def _is_inverted_palette(image: Image.Image) -> bool:
    """Return whether a palette image uses just black and white, with black not at index 0.

    Editors that reduce a black-and-white mask to a palette store its colours in any order.
    """
    if image.mode != "P" or len(indices := np.unique(np.asarray(image)).tolist()) != 2:
        return False
    palette = image.getpalette() or []
    index_of = {tuple(palette[3 * i : 3 * i + 3]): i for i in indices}
    return set(index_of) == {(0, 0, 0), (255, 255, 255)} and index_of[0, 0, 0] != 0


def to_opacity(image: Image.Image, name: str, upright: bool = True) -> np.ndarray:
    """Convert a soft mask to opacity, float32 [H, W] in [0, 1].

    Values are divided by the least of 1 (labels, floats), 255 (8 bits) and 65535 (16 bits) that none exceeds.

    Raises:
        ImageDecodeError: it cannot be decoded, or has other values; `name` is used in the message.
    """
    try:
        image = ImageOps.exif_transpose(image) if upright else image
        is_wide = image.mode == "F" or image.mode.startswith("I")  # convert("L") clips or truncates these
        values = np.asarray(image if is_wide else image.convert("L")).astype(np.float32)
    except Exception as error:  # as in read_labels
        raise ImageDecodeError(f"{name}: cannot be decoded: {error}") from error
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= OPACITY_SCALES[-1]):  # also refuses NaN
        raise ImageDecodeError(f"{name}: mask values from {low} to {high}; convert it to [0, 1] or to 8 bits")
    return values / next(scale for scale in OPACITY_SCALES if high <= scale)
