"""Regions without labels, scored against a foreground mask, or against classes after Hungarian matching.

All masks are arrays or tensors [N, H, W]; `foreground` and `valid` are boolean, and invalid pixels are not counted. A
score is computed per image and then averaged over images, as in ReDO (Chen et al. 2019) and IEM (Savarese et al. 2021).
Scores against classes count pixels over the whole set instead, as in semantic segmentation (thesis, tables 2.3, 2.4).
In a hierarchy the labels of the deepest level hold all levels: with splits (3, 3), label 3 i + j is part j of region i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from factorkit.utils.errors import ConfigError, DataError, format_count

MAX_REGIONS = 12  # every subset of the regions is tried
IGNORE_LABEL = -1  # in the true labels: a pixel that is not counted


def score_masks(
    predicted: ArrayLike, foreground: ArrayLike, valid: ArrayLike | None = None, *, per_image: bool = False
) -> dict[str, Any]:
    """Compute accuracy, IoU and Dice of boolean masks [N, H, W], each in [0, 1]: means over images, or arrays [N].

    acc is the share of valid pixels that agree; iou is intersection over union; dice is twice the
    intersection over the sum of the areas. If both masks of an image are empty, its iou and dice are 1.

    Raises:
        DataError: masks whose shapes differ, or an image without a valid pixel.

    Example:
        >>> from factorkit.metrics.segmentation import score_masks
        >>> score_masks([[[True, True], [False, False]]], [[[True, False], [False, False]]])
        {'acc': 0.75, 'iou': 0.5, 'dice': 0.6666666666666666}
    """
    predicted, foreground, valid = _as_masks(predicted, foreground, valid)
    result = {k: v[:, 0] for k, v in _PixelCounts.of_masks(predicted[:, None], foreground, valid).scores().items()}
    return result if per_image else {name: float(values.mean()) for name, values in result.items()}


def fit_mapping(labels: ArrayLike, foreground: ArrayLike, valid: ArrayLike | None, num_regions: int) -> tuple[int, ...]:
    """Choose the regions that are foreground: one choice for the whole set, fitted on labelled images.

    Of all subsets of the regions except the empty and the full one, return the one whose union has the greatest mean
    IoU on these images; the smaller one on a tie. With two regions this is Hungarian matching to {background,
    foreground}; with more it is the many-to-one form.

    Args:
        labels: int [N, H, W] in [0, num_regions).
        foreground: bool [N, H, W].
        valid: bool [N, H, W]; None: all pixels.
        num_regions: K.

    Raises:
        ConfigError: not 2 <= num_regions <= MAX_REGIONS.
        DataError: as `score_masks` does, or labels out of range.
    """
    labels, foreground, valid = _as_masks(labels, foreground, valid, num_regions)
    subsets = _subsets(num_regions)
    iou = _PixelCounts.of_subsets(labels, foreground, valid, num_regions, subsets).scores()["iou"]
    return subsets[int(iou.mean(0).argmax())]


def evaluate_masks(
    labels: ArrayLike, foreground: ArrayLike, valid: ArrayLike | None, num_regions: int, num_fit_images: int = 16
) -> dict[str, Any]:
    """Score label maps int [N, H, W] in [0, num_regions).

    The first `num_fit_images` images fit the mapping, the REST are scored.

    Returns:
        A JSON-serialisable dictionary:
            acc, iou, dice: with the one fixed mapping, see `fit_mapping`;
            oracle_acc, oracle_iou, oracle_dice: with the best subset chosen per image by its own label: an upper
                bound that no user can reach, not a result;
            mapping: the regions that are foreground; fitted_on, scored: numbers of images;
            areas: share of all pixels of the scored images in each region.

    Raises:
        ConfigError: not 1 <= num_fit_images < N, or as `fit_mapping` does.
        DataError: as `fit_mapping` does.
    """
    labels, foreground, valid = _as_masks(labels, foreground, valid, num_regions)
    check_fit(num_fit_images, len(labels))
    mapping = fit_mapping(labels[:num_fit_images], foreground[:num_fit_images], valid[:num_fit_images], num_regions)

    labels, foreground, valid = labels[num_fit_images:], foreground[num_fit_images:], valid[num_fit_images:]
    subsets = _subsets(num_regions)
    scores = _PixelCounts.of_subsets(labels, foreground, valid, num_regions, subsets).scores()
    fixed, best = subsets.index(mapping), scores["iou"].argmax(1)
    result: dict[str, Any] = {name: float(values[:, fixed].mean()) for name, values in scores.items()}
    result |= {f"oracle_{name}": float(values[np.arange(len(labels)), best].mean()) for name, values in scores.items()}
    areas = np.bincount(labels.ravel(), minlength=num_regions) / labels.size
    return result | {
        "mapping": list(mapping),
        "fitted_on": num_fit_images,
        "scored": len(labels),
        "areas": areas.tolist(),
    }


def check_fit(num_fit_images: int, num_images: int) -> None:
    """Raise ConfigError unless `num_fit_images` of the labelled images leave at least one on either side."""
    if num_images < 2:
        many = format_count(num_images, "labelled image")
        raise ConfigError(f"{many}: at least 2 are needed, to fit the mapping and to score it")
    if not 1 <= num_fit_images < num_images:
        raise ConfigError(
            f"num_fit_images={num_fit_images} of {format_count(num_images, 'labelled image')} choose the "
            "mapping, the rest are scored; "
            f"use 1 to {num_images - 1}"
        )


class _PixelCounts:
    """Numbers of valid pixels of M candidate masks of each image against its foreground; all arrays [N, M]."""

    def __init__(self, hits: NDArray, false_alarms: NDArray, foreground: NDArray, valid: NDArray) -> None:
        self.hits, self.false_alarms = hits, false_alarms
        self.misses = foreground[:, None] - hits
        self.valid = valid[:, None]

    @classmethod
    def of_masks(cls, candidates: NDArray, foreground: NDArray, valid: NDArray) -> _PixelCounts:
        """Count candidates bool [N, M, H, W]."""
        inside, outside = foreground & valid, ~foreground & valid
        hits = np.einsum("nmhw,nhw->nm", candidates, inside, dtype=np.int64)
        false_alarms = np.einsum("nmhw,nhw->nm", candidates, outside, dtype=np.int64)
        return cls(hits, false_alarms, inside.sum((1, 2)), valid.sum((1, 2)))

    @classmethod
    def of_subsets(
        cls, labels: NDArray, foreground: NDArray, valid: NDArray, num_regions: int, subsets: list[tuple[int, ...]]
    ) -> _PixelCounts:
        """Count the unions of the regions of each subset; counts add up, so no union is formed."""
        single = cls.of_masks(np.stack([labels == k for k in range(num_regions)], 1), foreground, valid)
        member = np.array([[k in subset for k in range(num_regions)] for subset in subsets], dtype=np.int64)
        foreground_area = single.hits[:, 0] + single.misses[:, 0]
        return cls(single.hits @ member.T, single.false_alarms @ member.T, foreground_area, single.valid[:, 0])

    def scores(self) -> dict[str, NDArray[np.float64]]:
        wrong = self.false_alarms + self.misses
        return {
            "acc": 1 - wrong / self.valid,
            "iou": _ratio(self.hits, self.hits + wrong),
            "dice": _ratio(2 * self.hits, 2 * self.hits + wrong),
        }


def _ratio(part: NDArray, whole: NDArray) -> NDArray[np.float64]:
    return np.where(whole == 0, 1.0, part / np.maximum(whole, 1))


def _subsets(num_regions: int) -> list[tuple[int, ...]]:
    """Return all subsets except the empty and the full one, the small ones first."""
    if not 2 <= num_regions <= MAX_REGIONS:
        raise ConfigError(
            f"{format_count(num_regions, 'region')} cannot be mapped to foreground; use 2 to {MAX_REGIONS}"
        )
    return [subset for size in range(1, num_regions) for subset in combinations(range(num_regions), size)]


def _as_masks(
    masks: ArrayLike, foreground: ArrayLike, valid: ArrayLike | None, num_regions: int | None = None
) -> tuple[NDArray, NDArray, NDArray]:
    """Return the three as arrays of one shape: bool masks, or int labels where `num_regions` is given."""
    masks, foreground = np.asarray(masks), np.asarray(foreground).astype(bool)
    valid = np.ones_like(foreground) if valid is None else np.asarray(valid).astype(bool)
    if masks.ndim != 3 or len(masks) == 0 or not masks.shape == foreground.shape == valid.shape:
        raise DataError(
            f"predicted masks {masks.shape}, foreground {foreground.shape} and valid {valid.shape} must all be "
            "[N, H, W] of the same sizes, with N at least 1"
        )
    empty = np.flatnonzero(~valid.any((1, 2)))
    if len(empty):
        raise DataError(f"images {empty[:8].tolist()} have no valid pixel to score; leave them out")
    if num_regions is None:
        return masks.astype(bool), foreground, valid
    if masks.min() < 0 or masks.max() >= num_regions:
        raise DataError(
            f"labels run from {masks.min()} to {masks.max()}, but there are {num_regions} regions: use 0 to K-1"
        )
    return masks.astype(np.int64), foreground, valid


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
