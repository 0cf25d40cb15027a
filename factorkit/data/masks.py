"""Masks: which image each belongs to, and loading them together with the images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from factorkit.data.decode import crop_square, crop_square_labels
from factorkit.data.depth import ImageDecodeError, apply_orientation, read_deep, read_orientation
from factorkit.data.files import escape_name, fold_stem, format_examples, is_image
from factorkit.data.mask_values import END_WIDTH, FULL_SCALES, MaskValues, decide_mask_values, refuse_ambiguous
from factorkit.data.open import open_source
from factorkit.data.sources import Source
from factorkit.utils.errors import ConfigError, DataError, format_count

MASK_KEYS = ("masks", "M")  # arrays looked for in an .npz, in this order
# A mask may be named like its image with one of these appended or prepended, or with its image's whole name
MASK_ENDINGS = ("_mask", "_seg", "_gt", "_segmentation", "_label", "_labels", "_matte", "_trimap", "-mask", ".mask")
MASK_BEGINNINGS = ("mask_",)
IGNORED_BEGINNING = "dynamic_mask_"  # of instant-ngp's masks of moving parts: what is not 0 does not count
ASPECT_TOLERANCE = 0.01  # relative difference between the aspect ratios of a mask and its image
OPACITY_SCALES = (1, *FULL_SCALES)  # full opacity; 1 of labels and floats
NO_FOREGROUND = "masks: no pixel is foreground in any of them"
MAX_BORDER_SHARE = 0.75  # of the pixels along the borders; more foreground there is worth a line


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


def load_labelled(
    images: Any,
    masks: Any,
    resolution: int,
    *,
    ignore_label: int | None = None,
    foreground: Sequence[int] | None = None,
    mask_threshold: int | None = None,
) -> LabelledImages:
    """Load all images that have a mask, cropped to the centred square and resized (masks by nearest neighbour).

    Images and masks are matched by `match_masks`. A mask must hold grey or palette values: colour images need equal
    channels. Palette images count by index, except black-and-white palettes where black is not index 0. A mask of
    another size than its image is first resized to the image's size. What the values mean is decided by
    `decide_mask_values` from all masks together, unless an argument says it.

    Args:
        images: anything that `open_source` accepts.
        masks: the same.
        resolution: side of the squares in pixels.
        ignore_label: value of pixels that are not scored; default: the data set's, or as decided.
        foreground: values of the foreground; all others are background.
        mask_threshold: foreground is every value from this one on.

    Raises:
        ConfigError: a resolution below 1, or both `foreground` and `mask_threshold`.
        DataError: no matches, an image that cannot be decoded, a coloured mask, values whose meaning is ambiguous, or a
            mask whose aspect ratio differs from its image's by more than 1%.
    """
    if foreground is not None and mask_threshold is not None:
        raise ConfigError(f"foreground={foreground} and mask_threshold={mask_threshold}: give one of them.")
    image_source, mask_source = open_source(images), open_source(masks, keys=MASK_KEYS)
    pairs = match_masks(image_source, mask_source)

    def load(pair: tuple[int, int]) -> _LoadedPair:
        return _load_pair(image_source, mask_source, *pair, resolution)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = list(pool.map(load, pairs))
    labels = np.stack([pair.labels for pair in loaded])
    if turned := [image_source.names[i] for (i, _), pair in zip(pairs, loaded, strict=True) if pair.is_turned_alone]:
        warnings.warn(
            f"masks: those of {format_count(len(turned), 'image')} ({format_examples(turned)}) have no EXIF "
            "orientation, as their images have: they are taken as drawn on the upright images",
            UserWarning,
            stacklevel=2,
        )
    is_defined = ignore_label is None and mask_source.ignore_label is not None
    ignore_label = mask_source.ignore_label if ignore_label is None else ignore_label
    if foreground is None and mask_threshold is None and not is_defined:
        counts: dict[int, int] = {}
        for pair in loaded:
            for value, count in pair.counts.items():
                counts[value] = counts.get(value, 0) + count
        meaning = decide_mask_values(counts, ignore_label)
        odd = [j for (_, j), pair in zip(pairs, loaded, strict=True) if pair.counts.keys() == {0, meaning.ignore}]
        if ignore_label is None and odd:
            white = format_examples([mask_source.names[j] for j in odd])
            raise refuse_ambiguous(
                meaning.summary, f"{white}: no value but 0 and {meaning.ignore}, which may be foreground"
            )
        if meaning.is_unusual:
            warnings.warn(str(meaning), UserWarning, stacklevel=2)
        _warn_about_foreground(meaning.select(labels))
    else:
        meaning = MaskValues(None if foreground is None else tuple(foreground), mask_threshold, ignore_label)
        if meaning.foreground != () and not meaning.select(labels).any():
            warnings.warn(NO_FOREGROUND, UserWarning, stacklevel=2)
    valid = np.ones(labels.shape, bool) if meaning.ignore is None else labels != meaning.ignore
    pixels = np.stack([pair.pixels for pair in loaded])
    names = [image_source.names[i] for i, _ in pairs]
    return LabelledImages(pixels, meaning.select(labels) & valid, valid, names, labels)


def _warn_about_foreground(foreground: np.ndarray) -> None:
    """Say that masks [N, R, R] have no foreground, or that it may be the background."""
    border = foreground.copy()
    border[:, 1:-1, 1:-1] = False
    share = border.sum() / max(1, foreground.size - foreground[:, 1:-1, 1:-1].size)
    if not foreground.any():
        warnings.warn(NO_FOREGROUND, UserWarning, stacklevel=3)
    elif share > MAX_BORDER_SHARE:
        warnings.warn(
            f"masks: {share:.0%} of the pixels along the borders are foreground. If the masks are inverted, set "
            "--foreground 0",
            UserWarning,
            stacklevel=3,
        )


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
            raise DataError(
                f"{format_count(len(images), 'image')} but {format_count(len(masks), 'mask')}: arrays match by "
                "position. Give one each."
            )
        return [(i, i) for i in range(len(images))]
    images_by_stem: dict[str, list[int]] = {}
    for i, name in enumerate(images.names):
        images_by_stem.setdefault(fold_stem(name), []).append(i)
    mask_of: dict[str, int] = {}
    unmatched: list[str] = []
    ignored: list[str] = []
    for j, name in enumerate(masks.names):
        stem = next((stem for stem in image_stems(name) if stem in images_by_stem), None)
        if stem is None:
            (ignored if ignored_stem(name) in images_by_stem else unmatched).append(name)
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
            f"{len(unmatched)} of {format_count(len(masks), 'mask')} {'has' if len(unmatched) == 1 else 'have'} "
            f"no image: {format_examples(unmatched)}. The images are named "
            f"{format_examples(images.names)}. Give a mask its image's name, with or without "
            f"{' or '.join(MASK_ENDINGS[:2])}."
        )
    if ignored:
        described = f"{format_count(len(ignored), 'mask')} of moving parts ({format_examples(ignored)})"
        if not mask_of:
            raise DataError(f"{described}: these are pixels to be ignored, not the foreground. Give other masks.")
        warnings.warn(f"left out {described}: they are not the foreground", UserWarning, stacklevel=2)
    stems = map(fold_stem, images.names)
    return [(i, mask_of[stem]) for i, stem in enumerate(stems) if stem in mask_of]


def ignored_stem(name: str) -> str | None:
    """Return the folded stem of the image whose moving parts a mask shows (`IGNORED_BEGINNING`); None for others."""
    folder, slash, base = fold_stem(name).rpartition("/")
    return folder + slash + base.removeprefix(IGNORED_BEGINNING) if base.startswith(IGNORED_BEGINNING) else None


def image_stems(mask_name: str) -> list[str]:
    """Return the folded stems that the image of a mask may have, the mask's own first."""
    stem = fold_stem(mask_name)
    folder, _, base = stem.rpartition("/")
    folder = f"{folder}/" if folder else ""
    stems = [stem] + [stem.removesuffix(ending) for ending in MASK_ENDINGS if stem.endswith(ending)]
    stems += [folder + base.removeprefix(part) for part in MASK_BEGINNINGS if base.startswith(part)]
    return stems + ([fold_stem(stem)] if is_image(stem) else [])  # x.jpg.png


class _LoadedPair(NamedTuple):
    pixels: np.ndarray  # uint8 [R, R, 3]
    labels: np.ndarray  # int32 [R, R]
    counts: dict[int, int]  # pixels of each value of the whole mask
    is_turned_alone: bool  # whether EXIF turns the image and not the mask, and their sizes do not show which is right


def _load_pair(images: Source, masks: Source, i: int, j: int, resolution: int) -> _LoadedPair:
    image, labels = images.read(i), read_labels(masks, j)
    values, counts = np.unique(labels, return_counts=True)
    height, width = labels.shape
    if (width, height) != image.size:
        if abs(width * image.height / (height * image.width) - 1) > ASPECT_TOLERANCE:
            is_turned = abs(height * image.height / (width * image.width) - 1) <= ASPECT_TOLERANCE
            advice = "Crop or redraw it to the image's aspect ratio."
            if is_turned:
                advice = "The image is turned upright by its EXIF orientation, the mask is not: turn the mask."
            raise DataError(
                f"{escape_name(masks.names[j])}: a mask of {width} x {height} pixels for an image of {image.width} x "
                f"{image.height} ({escape_name(images.names[i])}). {advice}"
            )
        labels = np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
    counts_by_value = dict(zip(values.tolist(), counts.tolist(), strict=True))
    turn = read_orientation(images.decode(i))
    is_turned_alone = turn in ((2, 3, 4, 5, 6, 7, 8) if image.width == image.height else (2, 3, 4))
    is_turned_alone = is_turned_alone and read_orientation(masks.decode(j)) == 1
    square = crop_square_labels(labels, resolution)
    return _LoadedPair(crop_square(image, resolution), square, counts_by_value, is_turned_alone)


def read_labels(masks: Source, index: int) -> np.ndarray:
    """Read the labels of one mask, int32 [H, W]; see `load_labelled`.

    Raises:
        DataError: the mask cannot be decoded, or its values are not labels.
    """
    name = escape_name(masks.names[index])
    image = masks.decode(index)
    try:
        if (deep := read_deep(image)) is not None:
            values = deep.values
            if deep.mode.endswith("A") and values[..., -1].min() == values[..., -1].max():
                values = values[..., :-1]
        else:
            if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255):
                image = image.convert(image.mode.removesuffix("A"))
            if _is_inverted_palette(image):
                image = image.convert("L")
            values = np.asarray(apply_orientation(image))
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{name}: cannot be decoded: {error}. Replace the file, or remove it.") from error
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise DataError(f"{name}: a mask in colour (mode {image.mode}). Save labels as a grey or palette image.")
        values = values[..., 0]
    between = np.bincount(values.ravel(), minlength=256)[64:192].sum() if image.format == "JPEG" else 0
    if between > values.size // 4 or (image.format == "JPEG" and 0 < values.max() < END_WIDTH):
        raise DataError(f"{name}: JPEG compression has altered the labels. Save masks as PNG.")
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
        if (deep := read_deep(image, upright)) is not None:  # convert("L") clips or truncates these
            values = deep.values if deep.values.ndim == 2 else deep.values[..., 0]
        else:
            image = apply_orientation(image) if upright else image
            values = np.asarray(image if image.mode == "F" else image.convert("L"))
        values = values.astype(np.float32)
    except Exception as error:  # as in read_labels
        raise ImageDecodeError(f"{name}: cannot be decoded: {error}") from error
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= OPACITY_SCALES[-1]):  # also refuses NaN
        raise ImageDecodeError(f"{name}: mask values from {low} to {high}; convert it to [0, 1] or to 8 bits")
    return values / next(scale for scale in OPACITY_SCALES if high <= scale)
