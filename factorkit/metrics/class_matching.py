"""Regions found without labels, scored against classes: accuracy and mean IoU after Hungarian matching.

Label maps are integer arrays [N, H, W]. Pixels are counted over the whole set, as in semantic segmentation (thesis,
tables 2.3 and 2.4), unlike in :mod:`factorkit.metrics.segmentation`, which averages over images.

In a hierarchy the labels of the deepest level hold all levels: with splits (3, 3), label 3 i + j is part j of region i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from factorkit.metrics.segmentation import check_fit
from factorkit.utils.errors import ConfigError, DataError

IGNORE_LABEL = -1  # in the true labels: a pixel that is not counted


def count_overlaps(labels: ArrayLike, truth: ArrayLike, num_regions: int, num_classes: int) -> NDArray[np.int64]:
    """Count the pixels in region k and class c: [num_regions, num_classes].

    Args:
        labels: in [0, num_regions).
        truth: in [0, num_classes), or IGNORE_LABEL.
        num_regions: K.
        num_classes: C.

    Raises:
        DataError: maps of different shapes, values out of range, or no pixel that counts.
    """
    regions, classes = np.asarray(labels), np.asarray(truth)
    if regions.shape != classes.shape or regions.ndim != 3:
        raise DataError(f"labels {regions.shape} and truth {classes.shape} must be [N, H, W] of the same sizes")
    counted = classes != IGNORE_LABEL
    regions, classes = regions[counted].astype(np.int64), classes[counted].astype(np.int64)
    if not len(regions):
        raise DataError("every pixel is ignored, so there is nothing to score")
    for name, values, count in (("labels", regions, num_regions), ("truth", classes, num_classes)):
        if values.min() < 0 or values.max() >= count:
            raise DataError(f"{name} run from {values.min()} to {values.max()}; use 0 to {count - 1}")
    return _bin_pairs(regions, classes, num_regions, num_classes)


def match_classes(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the class of each region, [regions]: the one-to-one Hungarian matching with the greatest sum of IoUs.

    Further regions than classes get the class they share most pixels with; with fewer, some classes have no region.

    Raises:
        ConfigError: scipy is not installed.
    """
    mapping = np.asarray(counts).argmax(1)
    for region, c in _hungarian(_ious(np.asarray(counts))):
        mapping[region] = c
    return mapping


def score_classes(counts: NDArray[np.int64], mapping: NDArray[np.int64]) -> dict[str, float]:
    """Return accuracy and mean IoU, each in [0, 1], of regions that are assigned to classes by ``mapping``.

    acc: share of the pixels; miou: mean over the classes that occur in the truth, where classes without a region are 0.
    """
    merged = np.zeros((counts.shape[1],) * 2, np.int64)
    np.add.at(merged, mapping, counts)
    occurs = merged.sum(0) > 0
    return {"acc": float(np.trace(merged) / merged.sum()), "miou": float(np.diag(_ious(merged))[occurs].mean())}


def nested_accuracy(
    labels: ArrayLike,
    truth: ArrayLike,
    regions: Sequence[int],
    classes: Sequence[int],
    *,
    valid: ArrayLike | None = None,
    num_fit_images: int = 16,
) -> dict[str, Any]:
    """Compute the pixel accuracy of each level of a hierarchy.

    The first `num_fit_images` images fit the mapping, the rest are scored. The mapping goes top-down: coarse regions
    are matched one to one with coarse classes so that most pixels agree (Hungarian), then the parts of each region with
    the parts of its class, and so on. A region without a partner, and everything inside it, is wrong.

    Args:
        labels: int [N, H, W], labels of the deepest level, in [0, prod(regions)).
        truth: int [N, H, W], in [0, prod(classes)).
        regions: number of parts that each level splits into, the coarsest first.
        classes: the same for the classes; as many levels.
        valid: bool [N, H, W], the pixels that count; None: all.

    Returns:
        A JSON-serialisable dictionary. Lists with one entry per level:
            accuracy: share of pixels whose region is matched with their class, at this level and all above it;
            within: the same among the pixels that are right at the level above;
            chance: the largest class's share of the scored pixels;
            mapping: for each region of the level its class, -1 for none;
        and fitted_on, scored: numbers of images.

    Raises:
        ConfigError: levels that do not pair up, `num_fit_images` out of range, or scipy is not installed.
        DataError: shapes that differ, no valid pixel, or labels out of range.
    """
    labels, truth = np.asarray(labels), np.asarray(truth)
    valid = np.ones(truth.shape, bool) if valid is None else np.asarray(valid).astype(bool)
    if len(regions) != len(classes) or not regions:
        raise ConfigError(
            f"regions of {len(regions)} levels {tuple(regions)} cannot be scored by classes of {len(classes)} levels "
            f"{tuple(classes)}; give labels of as many levels"
        )
    if labels.ndim != 3 or not labels.shape == truth.shape == valid.shape:
        raise DataError(f"labels {labels.shape}, truth {truth.shape}, valid {valid.shape}: give one shape [N, H, W]")
    num_regions, num_classes = math.prod(regions), math.prod(classes)
    for name, values, count in (("labels", labels, num_regions), ("truth", truth[valid], num_classes)):
        if values.size == 0 or values.min() < 0 or values.max() >= count:
            raise DataError(f"{name} must be in 0 to {count - 1}, the product of their levels, and not empty")
    check_fit(num_fit_images, len(labels))

    def count_pixels(part: slice) -> NDArray[np.int64]:
        keep = valid[part]
        return _bin_pairs(labels[part][keep].astype(np.int64), truth[part][keep], num_regions, num_classes)

    mappings = match_nested(count_pixels(slice(num_fit_images)), regions, classes)
    counts = count_pixels(slice(num_fit_images, None))
    correct = [counts.sum()]
    chance = []
    for level, mapping in enumerate(mappings, start=1):
        parts_below = math.prod(classes[level:])
        coarse = counts.reshape(len(mapping), -1, num_classes // parts_below, parts_below).sum((1, 3))
        correct.append(sum(coarse[i, c] for i, c in enumerate(mapping) if c >= 0))
        chance.append(float(coarse.sum(0).max() / coarse.sum()))
    return {
        "accuracy": [float(pixels / correct[0]) for pixels in correct[1:]],
        "within": [float(pixels / max(above, 1)) for above, pixels in pairwise(correct)],
        "chance": chance,
        "mapping": [mapping.tolist() for mapping in mappings],
        "fitted_on": num_fit_images,
        "scored": len(labels) - num_fit_images,
    }


def match_nested(counts: NDArray, regions: Sequence[int], classes: Sequence[int]) -> list[NDArray[np.int64]]:
    """Return the class of each region at each level, -1 for none; see :func:`nested_accuracy`.

    counts: [prod(regions), prod(classes)], pixels of each class in each region.
    """
    blocks = counts.reshape(regions[0], -1, classes[0], counts.shape[1] // classes[0])  # [I, parts, C, parts]
    top = np.full(regions[0], -1, np.int64)
    deeper = [np.full((regions[0], math.prod(regions[1:level])), -1, np.int64) for level in range(2, len(regions) + 1)]
    for i, c in _hungarian(blocks.sum((1, 3))):
        top[i] = c
        if deeper:
            inner = match_nested(blocks[i, :, c], regions[1:], classes[1:])
            for level, (mapping, parts) in enumerate(zip(deeper, inner, strict=True), start=2):
                mapping[i] = np.where(parts >= 0, c * math.prod(classes[1:level]) + parts, -1)
    return [top, *(mapping.reshape(-1) for mapping in deeper)]


def _hungarian(gains: NDArray) -> list[tuple[int, int]]:
    """Match rows with columns one to one so that the sum of gains is greatest."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ConfigError(f"{error}; install the extra: pip install 'factorkit[baselines]'") from error
    return list(zip(*(side.tolist() for side in linear_sum_assignment(gains, maximize=True)), strict=True))


def _ious(counts: NDArray) -> NDArray[np.float64]:
    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    return counts / np.maximum(union, 1)


def _bin_pairs(labels: NDArray, truth: NDArray, num_regions: int, num_classes: int) -> NDArray[np.int64]:
    pairs = np.bincount(labels * num_classes + truth, minlength=num_regions * num_classes)
    return pairs.reshape(num_regions, num_classes)
