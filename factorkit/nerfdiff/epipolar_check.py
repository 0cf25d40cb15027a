"""Check a run's cameras by points matched between its images, without labels and without the scene.

Points are matched by OpenCV's SIFT, and kept where one fundamental matrix explains them (RANSAC). Right cameras have
their points near the epipolar lines; the check sees no error along these lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from factorkit.data.views.cameras import undistort
from factorkit.data.views.views import LOSS_MASK_THRESHOLD
from factorkit.metrics.epipolar import epipolar_distance, fundamental_matrix
from factorkit.nerfdiff.export.images import ExportView
from factorkit.utils.errors import ConfigError, DataError, format_count
from factorkit.utils.images import unit_to_uint8

MAX_SIDE = 640  # pixels of the images that are matched; the distances are in these pixels
MAX_POINTS = 1000  # of a view, those with the highest contrast
MAX_VIEWS = 30  # evenly spaced ones are matched, each with each
MAX_DISTANCE = 2.0  # pixels from the epipolar line
MAX_RATIO = 0.8  # of the distances to the best and the second-best descriptor (Lowe 2004)
MIN_PAIR_MATCHES = 16  # from which on a pair of views counts
MIN_PAIRS = 3  # from which on the check has a result
RANSAC_DISTANCE, RANSAC_CONFIDENCE = 1.5, 0.999  # pixels; probability
OPAQUE = 128  # opacity from which on a pixel is matched


class EpipolarCheck(NamedTuple):
    """How well matched points agree with the cameras.

    Attributes:
        share: of the matches that are within 2 pixels of the epipolar lines, the mean of all pairs; None: too few
            matches to tell.
        median: distance in pixels, the median of all pairs' medians; None likewise.
        pairs: the matched pairs of views by name, each with its matches and its share, the worst first.
        message: what was matched, and the result, in one sentence.
    """

    share: float | None
    median: float | None
    pairs: list[dict[str, Any]]
    message: str


def check_epipolar(views: Sequence[ExportView], poses: Tensor, progress: bool = False) -> EpipolarCheck:
    """Match points between views and measure their distances to the epipolar lines of the cameras.

    Args:
        views: their images, intrinsics and loss masks at full size.
        poses: camera-to-world [V, 4, 4] of the same views.
        progress: show a progress bar.

    Raises:
        ConfigError: OpenCV is not installed.
        DataError: fewer than two views.
    """
    try:
        import cv2
    except ImportError as error:
        raise ConfigError("the epipolar check needs OpenCV: pip install 'factorkit[baselines]'") from error
    if len(views) < 2:
        raise DataError(f"{format_count(len(views), 'view')}: the epipolar check needs two or more")
    rows = sorted(set(np.linspace(0, len(views) - 1, min(len(views), MAX_VIEWS)).round().astype(int).tolist()))
    features = {row: _find_features(views[row]) for row in rows}
    matcher = cv2.BFMatcher(cv2.NORM_L2)
    pairs, shares, medians = [], [], []
    for i, j in tqdm(list(combinations(rows, 2)), "match views", disable=not progress):
        matches = _match(matcher, features[i], features[j])
        if len(matches[0]) < MIN_PAIR_MATCHES:
            continue
        fundamental = fundamental_matrix(
            poses[i].double().cpu(), features[i].intrinsics, poses[j].double().cpu(), features[j].intrinsics
        )
        distance = epipolar_distance(fundamental, *matches)
        share = float((distance <= MAX_DISTANCE).double().mean())
        shares.append(share)
        medians.append(float(distance.median()))
        pairs.append({"views": (views[i].name, views[j].name), "matches": len(distance), "share": share})
    tried = format_count(len(rows) * (len(rows) - 1) // 2, "pair")
    if len(pairs) < MIN_PAIRS:
        message = f"epipolar check not possible: only {len(pairs)} of {tried} of views have {MIN_PAIR_MATCHES} matches"
        return EpipolarCheck(None, None, pairs, message)
    mean, median = float(np.mean(shares)), float(np.median(medians))
    message = (
        f"{mean:.0%} of the points matched in {len(pairs)} of {tried} of views are within {MAX_DISTANCE:g} px of the "
        f"cameras' epipolar lines (median {median:.1f} px, in images of at most {MAX_SIDE} px)"
    )
    return EpipolarCheck(mean, median, sorted(pairs, key=lambda pair: pair["share"]), message)


class _Features(NamedTuple):
    points: np.ndarray  # float64 [P, 2] pixels
    descriptors: np.ndarray  # float32 [P, 128]
    intrinsics: Tensor  # float64 [3, 3]


def _find_features(view: ExportView) -> _Features:
    """Find the SIFT points of a view, reduced to MAX_SIDE pixels and undistorted, except on masked pixels."""
    import cv2

    pixels = Image.fromarray(view.read_pixels())
    use = np.ones(view.size, bool) if pixels.mode != "RGBA" else np.asarray(pixels)[..., 3] >= OPAQUE
    if view.read_loss_mask is not None:
        use = use & (view.read_loss_mask() > LOSS_MASK_THRESHOLD)
    scale = min(1.0, MAX_SIDE / max(view.size))
    height, width = (max(1, round(scale * side)) for side in view.size)
    k = view.intrinsics * np.array([width / view.size[1], height / view.size[0], 1.0])[:, None]
    gray = pixels.convert("RGB").convert("L").resize((width, height), Image.Resampling.BOX)
    mask = Image.fromarray(unit_to_uint8(use.astype(np.float32))).resize((width, height), Image.Resampling.NEAREST)
    planes = np.stack([np.asarray(gray), np.asarray(mask)])
    if view.distortion is not None:
        planes = undistort(torch.from_numpy(planes).float(), k, view.distortion)[0].round().byte().numpy()
    sift = cv2.SIFT.create(nfeatures=MAX_POINTS, enable_precise_upscale=True)
    keypoints, descriptors = sift.detectAndCompute(planes[0], (planes[1] > 127).astype(np.uint8))
    # OpenCV's pixel centres are whole numbers, ours are at a half.
    points = np.array([keypoint.pt for keypoint in keypoints], dtype=np.float64).reshape(-1, 2) + 0.5
    return _Features(
        points, np.zeros((0, 128), np.float32) if descriptors is None else descriptors, torch.from_numpy(k)
    )


def _match(matcher: Any, first: _Features, second: _Features) -> tuple[Tensor, Tensor]:
    """Return the points [P, 2] of both views that are each other's best match and agree with one geometry."""
    import cv2

    none = torch.zeros(0, 2, dtype=torch.float64)
    if min(len(first.points), len(second.points)) < MIN_PAIR_MATCHES:
        return none, none
    there = {
        m.queryIdx: m.trainIdx
        for m, n in matcher.knnMatch(first.descriptors, second.descriptors, 2)
        if m.distance < MAX_RATIO * n.distance
    }
    back = {m.queryIdx: m.trainIdx for m in matcher.match(second.descriptors, first.descriptors)}
    mutual = [(i, j) for i, j in there.items() if back.get(j) == i]
    if len(mutual) < MIN_PAIR_MATCHES:
        return none, none
    rows, columns = np.array(mutual).T
    x, y = first.points[rows], second.points[columns]
    cv2.setRNGSeed(0)
    _, inliers = cv2.findFundamentalMat(x, y, cv2.FM_RANSAC, RANSAC_DISTANCE, RANSAC_CONFIDENCE)
    if inliers is None:
        return none, none
    inside = inliers[:, 0].astype(bool)
    return torch.from_numpy(x[inside]), torch.from_numpy(y[inside])
