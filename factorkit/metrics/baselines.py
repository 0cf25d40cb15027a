"""Trivial predictors of a foreground mask, as lower bounds for a segmentation model.

Each is a function of all images and of the labels of the fitting images only, so no label of a scored image can leak:
predictor(images uint8 [N, H, W, 3], foreground bool [F, H, W], valid bool [F, H, W]) -> bool [N, H, W], where the
labels belong to the first F images.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from factorkit.metrics.segmentation import check_fit, fit_mapping, score_masks
from factorkit.utils.errors import ConfigError, DataError

Predictor = Callable[[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]], NDArray[np.bool_]]

CLUSTER_SAMPLE_PIXELS = 20_000  # enough for two means in three dimensions
GRABCUT_MIN_SIDE = 256  # pixels of the shorter side that GrabCut works at


def all_foreground(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """Predict foreground everywhere."""
    return np.ones(images.shape[:3], bool)


def centre_disc(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """Predict a disc at the centre with the radius that scores best on the fitting images."""
    height, width = images.shape[1:3]
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2)
    radii = np.arange(0.5, distance.max() + 1, max(0.5, min(height, width) / 64))
    return _repeat(_best_mask((distance <= radius for radius in radii), foreground, valid), len(images))


def mean_mask(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """Predict the mean of the fitting masks, cut at the threshold that scores best on them: position alone."""
    mean = (foreground & valid).sum(0) / np.maximum(valid.sum(0), 1)
    return _repeat(_best_mask((mean >= level for level in np.unique(mean)), foreground, valid), len(images))


def two_means_image(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """Split each image into two colour clusters; the one rarer on the border is the object. Uses no label."""
    height, width = images.shape[1:3]
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    predicted = np.empty(images.shape[:3], bool)
    for image, mask in zip(images, predicted, strict=True):
        pixels = image.reshape(-1, 3).astype(np.float32)
        cluster = _fit_two_means(pixels).predict(pixels).reshape(height, width) == 1
        mask[:] = cluster if cluster[border].mean() <= 0.5 else ~cluster
    return predicted


def two_means_set(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """Split the whole set into two colour clusters; the mapping to the object is fitted as for a model's regions."""
    pixels = images.reshape(-1, 3).astype(np.float32)
    labels = _fit_two_means(pixels).predict(pixels).reshape(images.shape[:3])
    return np.isin(labels, fit_mapping(labels[: len(foreground)], foreground, valid, num_regions=2))


def grabcut(images: NDArray, foreground: NDArray, valid: NDArray) -> NDArray:
    """Run GrabCut (Rother et al. 2004) from a centred rectangle of 80% of each side, 5 iterations. Uses no label."""
    import cv2

    height, width = images.shape[1:3]
    # GrabCut's boundary cost grows with length in pixels: on small images it outweighs the object and the cut is empty
    # (65 of 71 horses at 32 px). Enlarging the images fixes that.
    scale = max(1, round(GRABCUT_MIN_SIDE / min(height, width)))
    large_height, large_width = scale * height, scale * width
    top, left = round(0.1 * large_height), round(0.1 * large_width)

    def cut(image: NDArray) -> NDArray:
        large = cv2.resize(image[..., ::-1], (large_width, large_height), interpolation=cv2.INTER_CUBIC)
        state = np.full((large_height, large_width), cv2.GC_BGD, np.uint8)
        state[top : large_height - top, left : large_width - left] = cv2.GC_PR_FGD
        models = np.zeros((1, 65)), np.zeros((1, 65))  # colour models that cv2 fills in place
        cv2.setRNGSeed(0)  # the generator is per thread
        cv2.grabCut(large, state, (0, 0, 0, 0), *models, 5, cv2.GC_INIT_WITH_MASK)
        inside = (state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD)
        return inside.reshape(height, scale, width, scale).mean((1, 3)) > 0.5

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # half a second an image; cv2 releases the GIL
        return np.stack(list(pool.map(cut, images)))


BASELINES: dict[str, Predictor] = {
    f.__name__: f for f in (all_foreground, centre_disc, mean_mask, two_means_image, two_means_set, grabcut)
}


def score_baselines(
    images: ArrayLike,
    foreground: ArrayLike,
    valid: ArrayLike | None = None,
    num_fit_images: int = 16,
    names: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score trivial predictors as `evaluate_masks` scores a model: the first `num_fit_images` fit, the rest are scored.

    Args:
        images: uint8 [N, H, W, 3].
        foreground: bool [N, H, W].
        valid: bool [N, H, W], the pixels that count; None: all.
        names: keys of BASELINES; None: all of them.

    Returns:
        For each name acc, iou and dice, or {"unavailable": reason and cure} if its library is missing.

    Raises:
        ConfigError: an unknown name, or not 1 <= num_fit_images < N.
        DataError: images that do not match the masks.
    """
    images, foreground = np.asarray(images), np.asarray(foreground).astype(bool)
    valid = np.ones_like(foreground) if valid is None else np.asarray(valid).astype(bool)
    if images.dtype != np.uint8 or images.shape != (*foreground.shape, 3) or foreground.shape != valid.shape:
        raise DataError(
            f"baselines need uint8 images [N, H, W, 3] and masks [N, H, W] of the same sizes; got {images.dtype} "
            f"images {images.shape}, foreground {foreground.shape}, valid {valid.shape}"
        )
    check_fit(num_fit_images, len(images))
    unknown = [name for name in names or () if name not in BASELINES]
    if unknown:
        raise ConfigError(f"unknown baselines {', '.join(unknown)}; choose among {', '.join(BASELINES)}")

    rows: dict[str, dict[str, Any]] = {}
    for name in BASELINES if names is None else names:
        try:
            predicted = BASELINES[name](images, foreground[:num_fit_images], valid[:num_fit_images])
        except ImportError as error:
            rows[name] = {"unavailable": f"{error}; install the extra: pip install 'factorkit[baselines]'"}
        else:
            rows[name] = score_masks(predicted[num_fit_images:], foreground[num_fit_images:], valid[num_fit_images:])
    return rows


def _best_mask(candidates: Iterable[NDArray], foreground: NDArray, valid: NDArray) -> NDArray:
    """Return the candidate [H, W] with the greatest mean IoU on the fitting images."""
    return max(candidates, key=lambda mask: score_masks(_repeat(mask, len(foreground)), foreground, valid)["iou"])


def _repeat(mask: NDArray, n: int) -> NDArray:
    return np.broadcast_to(mask, (n, *mask.shape))


def _fit_two_means(pixels: NDArray) -> Any:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(pixels) > CLUSTER_SAMPLE_PIXELS:
        pixels = pixels[np.random.default_rng(0).permutation(len(pixels))[:CLUSTER_SAMPLE_PIXELS]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an image of one colour has a single cluster
        return KMeans(2, n_init=3, random_state=0).fit(pixels)
