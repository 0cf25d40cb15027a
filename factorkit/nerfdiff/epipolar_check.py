"""Check a run's cameras by points matched between its images, without labels and without the scene.

Points are matched by OpenCV's SIFT, and kept where one fundamental matrix explains them (RANSAC). Right cameras have
their points near the epipolar lines; the check sees no error along these lines.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from factorkit.data.views.cameras import undistort
from factorkit.data.views.views import LOSS_MASK_THRESHOLD, Views
from factorkit.metrics.epipolar import epipolar_distance, fundamental_matrix
from factorkit.nerfdiff.export.images import ExportView
from factorkit.nerfdiff.export.originals import Originals
from factorkit.nerfdiff.stages.matches import MAX_STILL, STILL_DISTANCE, is_still
from factorkit.nerfdiff.verdict import log_alarms
from factorkit.report.content import Check, Record, judged_alarms, read_checks
from factorkit.utils.errors import format_count
from factorkit.utils.files import read_log
from factorkit.utils.images import unit_to_uint8

EPIPOLAR_CHECK = "matched points near epipolar lines"
IN_TRAINING = "in_training"  # of its record, where a later evaluation replaced it: the record of the training
EPIPOLAR_FAILURE = "cameras do not fit matched points"  # how its failure begins
MIN_EPIPOLAR_SHARE = 0.85  # of the matches; figures of right and wrong cameras: docs/nerfdiff.md
MAX_DEGREES = 2.0  # from the epipolar line, as cameras that are 2 degrees off are right elsewhere
MIN_MOTION = 1.0  # degrees by which matches move, the median; below, wrong cameras pass too: docs/nerfdiff.md
NEAR_PIXELS = 2.0
MAX_SIDE = 640  # pixels of the images that are matched; the median is in these pixels
MIN_SIDE = 128  # pixels; smaller images have hardly any points
MAX_POINTS = 1000  # of a view, those with the highest contrast
MAX_VIEWS = 30  # evenly spaced ones are matched, each with each
PARTNERS = 2  # of each view, those with the most matches: where a texture repeats, others match wrongly
MAX_RATIO = 0.8  # of the distances to the best and the second-best descriptor (Lowe 2004)
MIN_PAIR_MATCHES = 16  # from which on a pair of views counts
MIN_PAIRS, MIN_VIEWS = 3, 0.5  # pairs, and share of the views that are in one, from which on the check has a result
RANSAC_DISTANCE, RANSAC_CONFIDENCE = 1.5, 0.999  # pixels; probability
OPAQUE = 128  # opacity from which on a pixel is matched


class EpipolarCheck(NamedTuple):
    """How well matched points agree with the cameras.

    Attributes:
        check: its value is the share of the matches within 2 degrees of the epipolar lines, the mean of all pairs.
        near: share of the matches within 2 pixels, the mean of all pairs; None: the check did not run. It depends on
            the size of the images, so no limit suits it.
        median: distance in pixels, the median of all pairs' medians; None: the check did not run.
        pairs: the pairs of views by name, each with its matches and its share, the worst first.
    """

    check: Check
    near: float | None
    median: float | None
    pairs: list[dict[str, Any]]


class ViewMatches(NamedTuple):
    """Points of one geometry that are matched between views.

    Attributes:
        pairs: numbers of two views, and their points [P, 2] and [P, 2] in pixels of the matched images.
        intrinsics: float64 [3, 3] by the number of each view that was compared, in the same pixels.
        not_run: why the cameras cannot be checked by them; "" if they can.
    """

    pairs: list[tuple[int, int, Tensor, Tensor]]
    intrinsics: dict[int, Tensor]
    not_run: str


def check_epipolar(views: Sequence[ExportView], poses: Tensor, progress: bool = False) -> EpipolarCheck:
    """Match points between views and measure their distances to the epipolar lines of the cameras.

    Args:
        views: their images, intrinsics and loss masks.
        poses: camera-to-world [V, 4, 4] of the same views.
        progress: show a progress bar.
    """
    return judge_matches(match_views(views, progress), poses, [view.name for view in views])


def add_epipolar_check(
    folder: Path, step: int, views: Views, intrinsics: Tensor, poses: Tensor, distortion: float = 0.0
) -> None:
    """Check the cameras of a finished training by its views, and add the result to its alarms, once.

    Args:
        folder: of the run.
        step: of its last checkpoint.
        views: the training views, at the resolution of the training.
        intrinsics: [3, 3] of the run in units of width and height.
        poses: camera-to-world [V, 4, 4].
        distortion: radial term of the lens that the run found.
    """
    if any(check.get("name") == EPIPOLAR_CHECK for check in read_checks(read_log(folder))):
        return
    if max(views.size) < MIN_SIDE:
        reason = f"since the views are trained on at fewer than {MIN_SIDE} pixels (evaluate --epipolar reads the files)"
        check = Check(EPIPOLAR_CHECK, not_run=reason)
    else:
        images = Originals(views, None, None, None).list_images(intrinsics, distortion)
        check = check_epipolar(images, poses).check
    record_check(folder, step, check)
    for failure in check.failures:
        print(failure, file=sys.stderr)


def record_check(folder: Path, step: int, check: Check, is_later: bool = False) -> None:
    """Put the check into the newest alarms of a run, in place of an earlier one, or into new alarms at this step.

    Args:
        folder: of the run.
        step: of its last checkpoint.
        check: the result.
        is_later: whether the training did not run it: the record keeps what the training had, see :func:`own_checks`.
    """
    alarms, failures = judged_alarms(read_log(folder))
    alarms, record = alarms or {"step": step}, check.to_dict()
    if is_later:
        record[IN_TRAINING] = next((own for own in own_checks(alarms) if own["name"] == EPIPOLAR_CHECK), None)
    checks = [other for other in alarms.get("checks", ()) if other["name"] != EPIPOLAR_CHECK]
    failures = [other for other in failures if not other.startswith(EPIPOLAR_FAILURE)]
    log_alarms(folder, alarms | {"checks": [*checks, record], "failures": [*failures, *check.failures]})


def own_checks(alarms: Record) -> list[Record]:
    """Return the checks of an "alarms" event as the training recorded them, without what a later evaluation changed."""
    own = [check.get(IN_TRAINING, check) for check in alarms.get("checks", ()) if isinstance(check, dict)]
    return [check for check in own if check is not None]


def judge_matches(matches: ViewMatches, poses: Tensor, names: Sequence[str]) -> EpipolarCheck:
    """Return the check of cameras, camera-to-world [V, 4, 4], by the matches of their views of these names."""
    pairs: list[dict[str, Any]] = []
    medians, near = [], []
    for i, j, first, second in matches.pairs:
        (p, k), (q, other_k) = ((poses[row].double().cpu(), matches.intrinsics[row]) for row in (i, j))
        distance = epipolar_distance(fundamental_matrix(p, k, q, other_k), first, second)
        degrees = (distance / ((k[0, 0] + other_k[0, 0]) / 2)).atan().rad2deg()
        share = float((degrees <= MAX_DEGREES).double().mean())
        pairs.append({"views": (names[i], names[j]), "matches": len(distance), "share": share})
        medians.append(float(distance.median()))
        near.append(float((distance <= NEAR_PIXELS).double().mean()))
    pairs.sort(key=lambda pair: pair["share"])
    if matches.not_run:
        return EpipolarCheck(Check(EPIPOLAR_CHECK, not_run=matches.not_run), None, None, pairs)
    share = float(np.mean([pair["share"] for pair in pairs]))
    worst = pairs[0]
    text = (
        f"{EPIPOLAR_FAILURE}: only {share:.2f} < {MIN_EPIPOLAR_SHARE:g} of the points matched in "
        f"{format_count(len(pairs), 'pair')} of views are within {MAX_DEGREES:g} degrees of the epipolar lines (worst: "
        f"{worst['views'][0]} and {worst['views'][1]}, {worst['share']:.2f}); the cameras are wrong, or what the "
        "images show moved. Train with another seed= or search=, correct given cameras, or mask what moved"
    )
    failures = () if share >= MIN_EPIPOLAR_SHARE else (text,)
    check = Check(EPIPOLAR_CHECK, share, low=MIN_EPIPOLAR_SHARE, failures=failures)
    return EpipolarCheck(check, float(np.mean(near)), float(np.median(medians)), pairs)


def match_views(views: Sequence[ExportView], progress: bool = False) -> ViewMatches:
    """Match each of at most 30 views with the two others that have the most points in common with it."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return ViewMatches([], {}, "since OpenCV is missing: pip install 'factorkit[baselines]'")
    if (side := max((max(view.size) for view in views), default=0)) < MIN_SIDE:
        return ViewMatches([], {}, f"since the images have {side} pixels, fewer than {MIN_SIDE}")
    rows = sorted(set(np.linspace(0, len(views) - 1, min(len(views), MAX_VIEWS)).round().astype(int).tolist()))
    features = {row: _find_features(views[row]) for row in tqdm(rows, "find points", disable=not progress)}
    matched = []
    for i, j in tqdm(list(combinations(rows, 2)), "match views", disable=not progress):
        x, y = _match(features[i], features[j])
        if len(x) >= MIN_PAIR_MATCHES:
            matched.append((i, j, x, y, np.abs(x - y).max(1) >= STILL_DISTANCE * max(features[i].size)))
    changing = [pair for pair in matched if pair[-1].mean() >= 1 - MAX_STILL]
    # A background that does not move has the geometry of cameras that do not move, as in structure from motion.
    if is_still(len(matched) - len(changing), len(matched)):
        matched = [(i, j, x[moving], y[moving], moving) for i, j, x, y, moving in matched]
    else:
        matched = changing  # two views that are equal have no epipolar lines
    agreeing = [(i, j, *_keep_one_geometry(x, y)) for i, j, x, y, _ in matched]
    pairs = _choose_partners([pair for pair in agreeing if len(pair[2]) >= MIN_PAIR_MATCHES])
    covered, needed = len({row for i, j, *_ in pairs for row in (i, j)}), MIN_VIEWS * len(rows)
    intrinsics, reason = {row: features[row].intrinsics for row in rows}, ""
    if len(pairs) < MIN_PAIRS or covered < needed:
        reason = (
            f"since only {format_count(len(pairs), 'pair')} of views, with {covered} of "
            f"{format_count(len(rows), 'view')}, have {MIN_PAIR_MATCHES} matches or more; "
            f"{MIN_PAIRS} pairs with {MIN_VIEWS:.0%} of the views are needed"
        )
    elif (motion := measure_motion(pairs, intrinsics)) < MIN_MOTION:
        reason = (
            f"since matched points move by {motion:.2f} degrees (median), less than {MIN_MOTION:g}: with "
            f"{MAX_DEGREES:g} degrees allowed, cameras that are all in one place would pass too"
        )
    return ViewMatches(pairs, intrinsics, reason)


def measure_motion(pairs: list[tuple[int, int, Tensor, Tensor]], intrinsics: dict[int, Tensor]) -> float:
    """Return by how many degrees matches move between two views, the median of all pairs' medians."""
    medians = []
    for i, j, x, y in pairs:
        a, b = (F.pad(points, (0, 1), value=1.0) @ torch.linalg.inv(intrinsics[k]).mT for k, points in ((i, x), (j, y)))
        medians.append(float(F.cosine_similarity(a, b, dim=1).clamp(-1, 1).acos().rad2deg().median()))
    return float(np.median(medians))


def _choose_partners(pairs: list[tuple[int, int, Tensor, Tensor]]) -> list[tuple[int, int, Tensor, Tensor]]:
    """Keep the pairs that have the most matches of one of their views."""
    counts, kept = Counter[int](), []
    for pair in sorted(pairs, key=lambda pair: -len(pair[2])):
        if min(counts[pair[0]], counts[pair[1]]) < PARTNERS:
            kept.append(pair)
        counts.update(pair[:2])
    return kept


class _Features(NamedTuple):
    points: np.ndarray  # float64 [P, 2] pixels
    descriptors: np.ndarray  # float32 [P, 128]
    intrinsics: Tensor  # float64 [3, 3]
    size: tuple[int, int]  # height and width


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
    descriptors = np.zeros((0, 128), np.float32) if descriptors is None else descriptors
    return _Features(points, descriptors, torch.from_numpy(k), (height, width))


def _match(first: _Features, second: _Features) -> tuple[np.ndarray, np.ndarray]:
    """Return the points [P, 2] of both views that are each other's best match."""
    a, b = first.descriptors, second.descriptors
    if min(len(a), len(b)) < MIN_PAIR_MATCHES:
        return first.points[:0], second.points[:0]
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    rows, best, back = np.arange(len(a)), squared.argmin(1), squared.argmin(0)
    nearest = squared[rows, best]
    squared[rows, best] = np.inf
    kept = (back[best] == rows) & (nearest < MAX_RATIO**2 * squared.min(1))
    return first.points[kept], second.points[best[kept]]


def _keep_one_geometry(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the matches [P, 2] that one fundamental matrix explains."""
    import cv2

    inliers = None
    if len(x) >= MIN_PAIR_MATCHES:
        cv2.setRNGSeed(0)
        _, inliers = cv2.findFundamentalMat(x, y, cv2.FM_RANSAC, RANSAC_DISTANCE, RANSAC_CONFIDENCE)
    inside = np.zeros(len(x), bool) if inliers is None else inliers[:, 0].astype(bool)
    return torch.from_numpy(x[inside]), torch.from_numpy(y[inside])
