"""Images with masks: matched by name or by position, cropped alike."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from factorkit.data.decode import crop_square, crop_square_labels
from factorkit.data.open import open_source
from factorkit.data.sources import Source, escape_name
from factorkit.utils.errors import DataError

MASK_KEYS = ("masks", "M")  # the names looked for in an .npz, in this order
MASK_ENDINGS = ("_mask", "_seg")
ASPECT_TOLERANCE = 0.01
NAMED = 3  # how many examples a message names


@dataclass(frozen=True)
class LabelledImages:
    """Images with their masks.

    Attributes:
        images: uint8 [N, R, R, 3].
        foreground: bool [N, R, R].
        valid: bool [N, R, R], False where the mask says to ignore_label the pixel (foreground is False there too).
        names: the images' names.
        labels: int32 [N, R, R], the masks' values as they are.
    """

    images: np.ndarray
    foreground: np.ndarray
    valid: np.ndarray
    names: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def load_labelled(images: Any, masks: Any, resolution: int, *, ignore_label: int | None = None) -> LabelledImages:
    """Load the images that have masks, both cropped to the centred square and resized (masks by nearest neighbour).

    Images and masks are anything `open_source` takes and are matched as `match_masks` does. A mask holds labels: a
    grey, palette or 1-bit picture, or a colour one whose channels agree. Of a palette the indices count; but where the
    picture uses just black and white, and black is not 0, its grey values do. Foreground is every label above 0 but
    `ignore_label` (None: the one the masks' maker ignores, if any). A mask of another size than its image is first brought to
    the image's size.

    Raises:
        ConfigError: a resolution below 1.
        DataError: nothing matches, a picture cannot be decoded, a mask is coloured, or its aspect ratio differs from
            its image's by more than 1%.
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
    pixels = np.stack([picture for picture, _ in loaded])
    return LabelledImages(pixels, (labels > 0) & valid, valid, [image_source.names[i] for i, _ in pairs], labels)


def match_masks(images: Source, masks: Source) -> list[tuple[int, int]]:
    """Pairs (image, mask) of indices, in the order of the images.

    Files match by their path without suffix (`a/x.jpg`, `a/x.png`), the mask's with or without `_mask` or `_seg` at
    its end; images without a mask are left out. Where either side is an array, position decides.

    Raises:
        DataError: masks without an image, two candidates for one, or different counts of arrays.
    """
    if images.positional or masks.positional:
        if len(images) != len(masks):
            raise DataError(f"{len(images)} images but {len(masks)} masks: arrays match by position. Give one each.")
        return [(i, i) for i in range(len(images))]
    images_by_stem: dict[str, list[int]] = {}
    for i, name in enumerate(images.names):
        images_by_stem.setdefault(strip_suffix(name), []).append(i)
    mask_of: dict[str, int] = {}
    orphans = []
    for j, name in enumerate(masks.names):
        key = next((key for key in _mask_stems(name) if key in images_by_stem), None)
        if key is None:
            orphans.append(name)
        elif key in mask_of:
            raise DataError(
                f"{escape_name(masks.names[mask_of[key]])} and {escape_name(name)}: two masks of one image. Keep one of them."
            )
        elif len(images_by_stem[key]) > 1:
            twins = " and ".join(escape_name(images.names[i]) for i in images_by_stem[key])
            raise DataError(f"{twins}: the mask {escape_name(name)} fits each of these images. Rename all but one.")
        else:
            mask_of[key] = j
    if orphans:
        raise DataError(
            f"{len(orphans)} of {len(masks)} masks have no image: {_examples(orphans)}. The images are named "
            f"{_examples(images.names)}. Give a mask its image's name, with or without {' or '.join(MASK_ENDINGS)}."
        )
    return [(i, mask_of[strip_suffix(name)]) for i, name in enumerate(images.names) if strip_suffix(name) in mask_of]


def strip_suffix(name: str) -> str:
    """A name without its suffix, with its folders."""
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.name else name


def _mask_stems(name: str) -> list[str]:
    full = strip_suffix(name)
    return [full] + [full.removesuffix(ending) for ending in MASK_ENDINGS if full.endswith(ending)]


def _examples(names: list[str]) -> str:
    return ", ".join(map(escape_name, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def _load_pair(images: Source, masks: Source, i: int, j: int, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture uint8 [R, R, 3] and its labels int32 [R, R]."""
    picture, labels = images.read(i), _labels(masks, j)
    height, width = labels.shape
    if (width, height) != picture.size:
        if abs(width * picture.height / (height * picture.width) - 1) > ASPECT_TOLERANCE:
            raise DataError(
                f"{escape_name(masks.names[j])}: a mask of {width} x {height} pixels on an image of {picture.width} x "
                f"{picture.height} ({escape_name(images.names[i])}). Crop or draw it to the image's shape."
            )
        labels = np.asarray(Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST))
    return crop_square(picture, resolution), crop_square_labels(labels, resolution)


def _labels(masks: Source, index: int) -> np.ndarray:
    """The labels of one mask, int32 [H, W]."""
    name = escape_name(masks.names[index])
    image = masks.decode(index)
    try:
        if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255):
            image = image.convert(image.mode.removesuffix("A"))
        if _black_is_a_label(image):
            image = image.convert("L")
        values = np.asarray(ImageOps.exif_transpose(image))
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{name}: cannot be decoded: {error}. Replace the file or take it out.") from error
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise DataError(f"{name}: a mask in colour (mode {image.mode}). Save labels as a grey or palette picture.")
        values = values[..., 0]
    if image.format == "JPEG" and not np.isin(values, (0, 255)).all():
        raise DataError(f"{name}: JPEG compression has blurred these labels. Threshold them and save as PNG.")
    if values.dtype.kind == "f":
        raise DataError(f"{name}: a mask of {values.dtype} values. Save labels as 8-bit integers.")
    return values.astype(np.int32)


def _black_is_a_label(image: Image.Image) -> bool:
    """Whether a palette picture is black and white alone, with an index other than 0 for black.

    Editors that reduce a black and white mask to a palette put its colours in any order.
    """
    if image.mode != "P" or len(used := np.unique(np.asarray(image)).tolist()) != 2:
        return False
    palette = image.getpalette() or []
    index_of = {tuple(palette[3 * i : 3 * i + 3]): i for i in used}
    return set(index_of) == {(0, 0, 0), (255, 255, 255)} and index_of[0, 0, 0] != 0
