"""How well regions found without labels match a foreground mask.

All masks are arrays or tensors [N,H,W]; `foreground` and `valid` are boolean, and pixels that are not valid count
nowhere. A score is computed for each image and then averaged over images, as ReDO (Chen et al. 2019) and IEM
(Savarese et al. 2021) do.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from factorkit.utils.errors import ConfigError, DataError

MAX_REGIONS = 12  # every subset of the regions is tried


def scores(
    predicted: ArrayLike, foreground: ArrayLike, valid: ArrayLike | None = None, *, per_image: bool = False
) -> dict[str, float] | dict[str, NDArray[np.float64]]:
    """Accuracy, IoU and DICE of boolean masks [N,H,W], each in [0, 1]: means over images, or arrays [N].

    acc is the share of valid pixels that agree; iou is |A∩B| / |A∪B|; dice is 2|A∩B| / (|A| + |B|). Where both masks
    are empty, iou and dice are 1: nothing was to be found and nothing was.

    Raises DataError for masks whose shapes differ, and for images without a valid pixel.

    Example:
        >>> from factorkit.metrics.segmentation import scores
        >>> scores([[[True, True], [False, False]]], [[[True, False], [False, False]]])
        {'acc': 0.75, 'iou': 0.5, 'dice': 0.6666666666666666}
    """
    predicted, foreground, valid = _masks(predicted, foreground, valid)
    counts = _Counts.of(predicted[:, None], foreground, valid)
    result = {name: values[:, 0] for name, values in counts.scores().items()}
    return result if per_image else {name: float(values.mean()) for name, values in result.items()}


def fit_mapping(labels: ArrayLike, foreground: ArrayLike, valid: ArrayLike | None, regions: int) -> tuple[int, ...]:
    """Which of the regions are foreground: ONE answer for the whole set, fitted on labelled images.

    Of all subsets of the regions but the empty and the full one, the subset whose union has the greatest mean IoU on
    these images; the smaller one on a tie. With two regions this is Hungarian matching of regions to {background,
    foreground}; with more it is its many-to-one form, each region matched to one of the two.

    labels: int [N,H,W] in [0, regions). Raises ConfigError unless 2 <= regions <= MAX_REGIONS, DataError as `scores`
    does and for labels out of range.
    """
    labels, foreground, valid = _masks(labels, foreground, valid, regions)
    subsets = _subsets(regions)
    iou = _Counts.of_subsets(labels, foreground, valid, regions, subsets).scores()["iou"]
    return subsets[int(iou.mean(0).argmax())]


def evaluate_masks(
    labels: ArrayLike, foreground: ArrayLike, valid: ArrayLike | None, regions: int, num_fit_images: int = 16
) -> dict[str, float | int | list[int] | list[float]]:
    """Score label maps int [N,H,W] in [0, regions): the first `num_fit_images` fit the mapping, the REST are scored.

    Returns a dictionary fit for JSON:
        acc, iou, dice: with the one fixed mapping, see `fit_mapping`;
        oracle_acc, oracle_iou, oracle_dice: with the subset of greatest IoU chosen for each image by its own label,
            which no user could do: an upper bound, not a result;
        mapping: the regions that are foreground; fitted_on, scored: numbers of images;
        areas: share of all pixels of the scored images in each region.

    Raises ConfigError unless 1 <= num_fit_images < N, and otherwise as `fit_mapping` does.
    """
    labels, foreground, valid = _masks(labels, foreground, valid, regions)
    check_fit(num_fit_images, len(labels))
    mapping = fit_mapping(labels[:num_fit_images], foreground[:num_fit_images], valid[:num_fit_images], regions)

    labels, foreground, valid = labels[num_fit_images:], foreground[num_fit_images:], valid[num_fit_images:]
    subsets = _subsets(regions)
    each = _Counts.of_subsets(labels, foreground, valid, regions, subsets).scores()
    fixed, best = subsets.index(mapping), each["iou"].argmax(1)
    result = {name: float(values[:, fixed].mean()) for name, values in each.items()}
    result |= {f"oracle_{name}": float(values[np.arange(len(labels)), best].mean()) for name, values in each.items()}
    areas = np.bincount(labels.ravel(), minlength=regions) / labels.size
    return result | {
        "mapping": list(mapping),
        "fitted_on": num_fit_images,
        "scored": len(labels),
        "areas": areas.tolist(),
    }


def check_fit(num_fit_images: int, images: int) -> None:
    """Raise ConfigError unless ``num_fit_images`` of the labelled images leave at least one on either side."""
    if not 1 <= num_fit_images < images:
        raise ConfigError(
            f"num_fit_images={num_fit_images} of {images} labelled images: these choose the mapping, the rest are scored; "
            f"use 1 to {images - 1}"
            if images > 1
            else f"{images} labelled image(s): at least 2 are needed, one to choose the mapping and one to score"
        )


class _Counts:
    """Pixels of M candidate masks of each image against its foreground, valid ones only; all arrays [N,M]."""

    def __init__(self, hit: NDArray, false_alarm: NDArray, foreground: NDArray, valid: NDArray) -> None:
        self.hit, self.false_alarm = hit, false_alarm
        self.missed = foreground[:, None] - hit
        self.valid = valid[:, None]

    @classmethod
    def of(cls, candidates: NDArray, foreground: NDArray, valid: NDArray) -> _Counts:
        """candidates: bool [N,M,H,W]."""
        inside, outside = foreground & valid, ~foreground & valid
        hit = np.einsum("nmhw,nhw->nm", candidates, inside, dtype=np.int64)
        false_alarm = np.einsum("nmhw,nhw->nm", candidates, outside, dtype=np.int64)
        return cls(hit, false_alarm, inside.sum((1, 2)), valid.sum((1, 2)))

    @classmethod
    def of_subsets(
        cls, labels: NDArray, foreground: NDArray, valid: NDArray, regions: int, subsets: list[tuple[int, ...]]
    ) -> _Counts:
        """The candidates are the unions of the regions in each subset; counts add up, so no union is formed."""
        single = cls.of(np.stack([labels == k for k in range(regions)], 1), foreground, valid)
        member = np.array([[k in subset for k in range(regions)] for subset in subsets], dtype=np.int64)
        foreground_area = single.hit[:, 0] + single.missed[:, 0]
        return cls(single.hit @ member.T, single.false_alarm @ member.T, foreground_area, single.valid[:, 0])

    def scores(self) -> dict[str, NDArray[np.float64]]:
        wrong = self.false_alarm + self.missed
        return {
            "acc": 1 - wrong / self.valid,
            "iou": _ratio(self.hit, self.hit + wrong),
            "dice": _ratio(2 * self.hit, 2 * self.hit + wrong),
        }


def _ratio(part: NDArray, whole: NDArray) -> NDArray[np.float64]:
    return np.where(whole == 0, 1.0, part / np.maximum(whole, 1))


def _subsets(regions: int) -> list[tuple[int, ...]]:
    """All subsets but the empty and the full one, the small ones first."""
    if not 2 <= regions <= MAX_REGIONS:
        raise ConfigError(f"{regions} regions cannot be mapped to foreground and background; use 2 to {MAX_REGIONS}")
    return [subset for size in range(1, regions) for subset in combinations(range(regions), size)]


def _masks(
    found: ArrayLike, foreground: ArrayLike, valid: ArrayLike | None, regions: int | None = None
) -> tuple[NDArray, NDArray, NDArray]:
    """The three as arrays of one shape: bool masks, or int labels where `regions` is given."""
    found, foreground = np.asarray(found), np.asarray(foreground).astype(bool)
    valid = np.ones_like(foreground) if valid is None else np.asarray(valid).astype(bool)
    if found.ndim != 3 or len(found) == 0 or not found.shape == foreground.shape == valid.shape:
        raise DataError(
            f"predicted masks {found.shape}, foreground {foreground.shape} and valid {valid.shape} must all be "
            "[N,H,W] of the same sizes, with N at least 1"
        )
    empty = np.flatnonzero(~valid.any((1, 2)))
    if len(empty):
        raise DataError(f"image(s) {empty[:8].tolist()} have no valid pixel to score; leave them out")
    if regions is None:
        return found.astype(bool), foreground, valid
    if found.min() < 0 or found.max() >= regions:
        raise DataError(f"labels run from {found.min()} to {found.max()}, but there are {regions} regions: 0 to K-1")
    return found.astype(np.int64), foreground, valid
