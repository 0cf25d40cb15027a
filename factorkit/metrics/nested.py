"""How well regions within regions match labels within labels.

Labels of the deepest level say everything: of levels that split into (3, 3), label 3 i + j is part j of region i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from factorkit.metrics.segmentation import check_fit
from factorkit.utils.errors import ConfigError, DataError


def nested_accuracy(
    found: ArrayLike,
    truth: ArrayLike,
    regions: Sequence[int],
    classes: Sequence[int],
    *,
    valid: ArrayLike | None = None,
    num_fit_images: int = 16,
) -> dict[str, Any]:
    """Pixel accuracy of every level of a hierarchy: the first `num_fit_images` fit the mapping, the REST are scored.

    The mapping goes from the top: coarse regions are matched one to one with coarse classes, so that most pixels agree
    (Hungarian), then the parts of each region with the parts of its class, and so on. A region without a partner, and
    all inside it, is wrong.

    Args:
        found: int [N, H, W], labels of the deepest level, in [0, prod(regions)).
        truth: int [N, H, W], in [0, prod(classes)).
        regions, classes: into how many each level splits, the coarsest first; as many levels of each.
        valid: bool [N, H, W], the pixels that count; None: all.

    Returns:
        A dictionary fit for JSON, lists with one entry a level:
            accuracy: share of pixels whose region is matched with their class, at this level and all above it;
            within: the same among the pixels that are right at the level above;
            chance: the largest class's share of the scored pixels;
            mapping: for each region of the level its class, -1 for none;
        and fitted_on, scored: numbers of images.

    Raises:
        ConfigError: levels that do not pair up, or `num_fit_images` out of range.
        DataError: shapes that differ, no valid pixel, or labels out of range.
    """
    found, truth = np.asarray(found), np.asarray(truth)
    valid = np.ones(truth.shape, bool) if valid is None else np.asarray(valid).astype(bool)
    if len(regions) != len(classes) or not regions:
        raise ConfigError(
            f"regions of {len(regions)} levels {tuple(regions)} cannot be scored by classes of {len(classes)} levels "
            f"{tuple(classes)}; give labels of as many levels"
        )
    if found.ndim != 3 or not found.shape == truth.shape == valid.shape:
        raise DataError(f"labels {found.shape}, truth {truth.shape} and valid {valid.shape} must all be [N,H,W], alike")
    for name, labels, most in (("labels", found, math.prod(regions)), ("classes", truth[valid], math.prod(classes))):
        if labels.size == 0 or labels.min() < 0 or labels.max() >= most:
            raise DataError(f"{name} must be there and lie in 0 to {most - 1}, the product of their levels")
    check_fit(num_fit_images, len(found))
    counts = _confusion(
        found[:num_fit_images], truth[:num_fit_images], valid[:num_fit_images], math.prod(regions), math.prod(classes)
    )
    mappings = match_nested(counts, regions, classes)
    counts = _confusion(found[num_fit_images:], truth[num_fit_images:], valid[num_fit_images:], *counts.shape)
    right = [counts.sum()]
    chance = []
    for level, mapping in enumerate(mappings, start=1):
        below_class = math.prod(classes[level:])
        coarse = counts.reshape(len(mapping), -1, counts.shape[1] // below_class, below_class).sum((1, 3))
        right.append(sum(coarse[i, c] for i, c in enumerate(mapping) if c >= 0))
        chance.append(float(coarse.sum(0).max() / coarse.sum()))
    return {
        "accuracy": [float(r / right[0]) for r in right[1:]],
        "within": [float(r / max(above, 1)) for above, r in zip(right, right[1:], strict=False)],
        "chance": chance,
        "mapping": [mapping.tolist() for mapping in mappings],
        "fitted_on": num_fit_images,
        "scored": len(found) - num_fit_images,
    }


def match_nested(counts: NDArray, regions: Sequence[int], classes: Sequence[int]) -> list[NDArray[np.int64]]:
    """For each level and each of its regions the class, or -1; see :func:`nested_accuracy`.

    counts: [prod(regions), prod(classes)], pixels of each class in each region.

    Raises:
        ConfigError: scipy is not installed.
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


def _hungarian(counts: NDArray) -> list[tuple[int, int]]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ConfigError(
            f"matching regions with classes needs scipy: pip install 'factorkit[baselines]' ({error})"
        ) from error
    return list(zip(*(side.tolist() for side in linear_sum_assignment(counts, maximize=True)), strict=True))


def _confusion(found: NDArray, truth: NDArray, valid: NDArray, regions: int, classes: int) -> NDArray[np.int64]:
    """Pixels [regions, classes]."""
    pairs = found[valid].astype(np.int64) * classes + truth[valid]
    return np.bincount(pairs, minlength=regions * classes).reshape(regions, classes)
