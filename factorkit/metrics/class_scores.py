"""How well regions found without labels match a few classes: accuracy and mean IoU after Hungarian matching.

Maps are integer arrays [N, H, W]. Unlike :mod:`factorkit.metrics.segmentation`, which averages over images, pixels are
counted over the whole set, as semantic segmentation does (tables 2.3 and 2.4 of the dissertation).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from factorkit.utils.errors import ConfigError, DataError

IGNORED = -1  # in the truth: a pixel that counts nowhere


def overlaps(labels: ArrayLike, truth: ArrayLike, regions: int, classes: int) -> NDArray[np.int64]:
    """How many pixels lie in region k and class c: [regions, classes].

    labels: in [0, regions); truth: in [0, classes), or IGNORED.

    Raises:
        DataError: maps of different shapes, values out of range, or no pixel that counts.
    """
    given, true = np.asarray(labels), np.asarray(truth)
    if given.shape != true.shape or given.ndim != 3:
        raise DataError(f"labels {given.shape} and truth {true.shape} must be [N, H, W] of the same sizes")
    kept = true != IGNORED
    given, true = given[kept].astype(np.int64), true[kept].astype(np.int64)
    if not len(given):
        raise DataError("every pixel is ignored, so there is nothing to score")
    for name, values, count in (("labels", given, regions), ("truth", true, classes)):
        if values.min() < 0 or values.max() >= count:
            raise DataError(f"{name} run from {values.min()} to {values.max()}, there are {count}: 0 to {count - 1}")
    return np.bincount(given * classes + true, minlength=regions * classes).reshape(regions, classes)


def match_classes(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class of every region, [regions]: one to one by the Hungarian method where IoUs are greatest in sum.

    With more regions than classes those left over go to the class they share most pixels with; with fewer, some
    classes have no region.

    Raises:
        ConfigError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ConfigError(f"{error}; install the extra: pip install 'factorkit[baselines]'") from error
    counts = np.asarray(counts)
    found = counts.argmax(1)
    rows, columns = linear_sum_assignment(_ious(counts), maximize=True)
    found[rows] = columns
    return found


def class_scores(counts: NDArray[np.int64], mapping: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy and mean IoU, each in [0, 1], of regions taken for the classes ``mapping`` gives them.

    acc: share of the pixels; miou: mean over the classes that occur in the truth, those without a region counting 0.
    """
    merged = np.zeros((counts.shape[1],) * 2, np.int64)
    np.add.at(merged, mapping, counts)
    occurs = merged.sum(0) > 0
    return {"acc": float(np.trace(merged) / merged.sum()), "miou": float(np.diag(_ious(merged))[occurs].mean())}


def _ious(counts: NDArray) -> NDArray[np.float64]:
    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    return counts / np.maximum(union, 1)
