"""Trivial predictors of a foreground mask: the marks a segmentation has to pass before it means anything.

Each is a function of all images and of the labels of the fitting images ONLY, so that no label of a scored image can
leak into it: predictor(images uint8 [N,H,W,3], foreground bool [F,H,W], valid bool [F,H,W]) -> bool [N,H,W], where the
labels are those of the first F images.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from factorkit.metrics.segmentation import check_fit, fit_mapping, scores
from factorkit.utils.errors import ConfigError, DataError

Predictor = Callable[[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]], NDArray[np.bool_]]

SET_PIXELS = 20_000  # of the whole set, for its common colour clusters: enough for two means in three dimensions
GRABCUT_SIDE = 256  # pixels of the shorter side that GrabCut works at


def all_foreground(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """Every pixel is object."""
    return np.ones(images.shape[:3], bool)


def centre_disc(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """A disc about the centre, of the radius that is best on the fitting images."""
    height, width = images.shape[1:3]
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2)
    radii = np.arange(0.5, distance.max() + 1, max(0.5, min(height, width) / 64))
    return _repeat(_best((distance <= r for r in radii), foreground, valid), len(images))


def mean_mask(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """The mean of the fitting images' masks, cut at the level that is best on them: what position alone can tell."""
    seen = valid.sum(0)
    mean = (foreground & valid).sum(0) / np.maximum(seen, 1)
    return _repeat(_best((mean >= level for level in np.unique(mean)), foreground, valid), len(images))


def two_means_image(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """Two colour clusters in each image; the object is the one that is rarer on the image's border. Uses no label."""
    height, width = images.shape[1:3]
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    predicted = np.empty(images.shape[:3], bool)
    for image, mask in zip(images, predicted, strict=True):
        pixels = image.reshape(-1, 3).astype(np.float32)
        second = _two_means(pixels).predict(pixels).reshape(height, width) == 1
        mask[:] = second if second[border].mean() <= 0.5 else ~second
    return predicted


def two_means_set(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """Two colour clusters for the whole set; which one is object is fitted like a model's regions are."""
    pixels = images.reshape(-1, 3).astype(np.float32)
    chosen = np.random.default_rng(0).permutation(len(pixels))[:SET_PIXELS]
    labels = _two_means(pixels[chosen]).predict(pixels).reshape(images.shape[:3])
    return np.isin(labels, fit_mapping(labels[: len(foreground)], foreground, valid, regions=2))


def grabcut(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """GrabCut (Rother et al. 2004) from a centred rectangle of 80% of each side, 5 iterations. Uses no label."""
    import cv2

    height, width = images.shape[1:3]
    # GrabCut's price of a boundary is per pixel of length: in a small image it outweighs the object, and the cut is
    # empty (65 of 71 horses at 32 px). Enlarged, the same images make the baseline that it deserves to be.
    scale = max(1, round(GRABCUT_SIDE / min(height, width)))
    large_height, large_width = scale * height, scale * width
    top, left = round(0.1 * large_height), round(0.1 * large_width)

    def cut(image: NDArray) -> NDArray:
        large = cv2.resize(image[..., ::-1], (large_width, large_height), interpolation=cv2.INTER_CUBIC)
        state = np.full((large_height, large_width), cv2.GC_BGD, np.uint8)
        state[top : large_height - top, left : large_width - left] = cv2.GC_PR_FGD
        models = np.zeros((1, 65)), np.zeros((1, 65))  # filled in from the rectangle's inside and outside
        cv2.setRNGSeed(0)  # of this thread
        cv2.grabCut(large, state, (0, 0, 0, 0), *models, 5, cv2.GC_INIT_WITH_MASK)
        inside = (state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD)
        return inside.reshape(height, scale, width, scale).mean((1, 3)) > 0.5

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # half a second an image, outside the interpreter's lock
        return np.stack(list(pool.map(cut, images)))


BASELINES: dict[str, Predictor] = {
    "all_foreground": all_foreground,
    "centre_disc": centre_disc,
    "mean_mask": mean_mask,
    "two_means_image": two_means_image,
    "two_means_set": two_means_set,
    "grabcut": grabcut,
}


def score_baselines(
    images: ArrayLike,
    foreground: ArrayLike,
    valid: ArrayLike | None = None,
    num_fit_images: int = 16,
    names: Sequence[str] | None = None,
) -> dict[str, dict[str, float] | dict[str, str]]:
    """Score trivial predictors as `evaluate_masks` scores a model: the first `num_fit_images` fit, the rest are scored.

    images: uint8 [N,H,W,3]; foreground, valid: bool [N,H,W]; names: keys of BASELINES, None for all of them.
    Returns acc, iou, dice for each name, or {"unavailable": why and what to install} where its library is missing.

    Raises ConfigError for an unknown name or unless 1 <= num_fit_images < N, DataError for images that do not fit the masks.
    """
    images, foreground = np.asarray(images), np.asarray(foreground).astype(bool)
    valid = np.ones_like(foreground) if valid is None else np.asarray(valid).astype(bool)
    if images.dtype != np.uint8 or images.shape != (*foreground.shape, 3) or foreground.shape != valid.shape:
        raise DataError(
            f"baselines need uint8 images [N,H,W,3] and masks [N,H,W] of the same sizes; got {images.dtype} images "
            f"{images.shape}, foreground {foreground.shape}, valid {valid.shape}"
        )
    check_fit(num_fit_images, len(images))
    unknown = [name for name in names or () if name not in BASELINES]
    if unknown:
        raise ConfigError(f"baseline(s) {', '.join(unknown)} are not known; use any of {', '.join(BASELINES)}")

    rows: dict[str, dict[str, Any]] = {}
    for name in BASELINES if names is None else names:
        try:
            predicted = BASELINES[name](images, foreground[:num_fit_images], valid[:num_fit_images])
        except ImportError as error:
            rows[name] = {"unavailable": f"{error}; install the extra: pip install 'factorkit[baselines]'"}
        else:
            rows[name] = scores(predicted[num_fit_images:], foreground[num_fit_images:], valid[num_fit_images:])
    return rows


def _best(candidates: Iterable[NDArray], foreground: NDArray, valid: NDArray) -> NDArray:
    """The one mask [H,W] among the candidates that has the greatest mean IoU on the fitting images."""
    return max(candidates, key=lambda mask: scores(_repeat(mask, len(foreground)), foreground, valid)["iou"])


def _repeat(mask: NDArray, n: int) -> NDArray:
    return np.broadcast_to(mask, (n, *mask.shape))


def _two_means(pixels: NDArray):
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an image of one colour has one cluster, and that is fine
        return KMeans(2, n_init=3, random_state=0).fit(pixels)
