"""Alarms for wrong cameras, computed without true poses.

For cameras around an object: collapse (all cameras on one side, at a few places, or assigned to a few candidates),
scatter (similar views far apart), a scene that does not explain its views, duplication (views agree better with a
held-out field after a rotation), and mirroring. A mirrored scene, turned inside out along the lines of sight, renders
nearly the same images, but its cameras have the opposite elevation or are upside down; where both signs of elevation
are allowed, the poses alone cannot show it. With true poses, :func:`factorkit.metrics.pose.is_mirrored` does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from factorkit.data.views.views import resize_area, target_size
from factorkit.metrics.pose import is_mirrored
from factorkit.nerfdiff.box import mask_centroids
from factorkit.nerfdiff.cameras.poses import azimuth_degrees, camera_directions
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.scene import Scene
from factorkit.report.content import Check, log_checks

MIN_AZIMUTH_SPREAD = 0.5  # 0 (all equal) to 1 (all around): uniform over 240 degrees is 0.6, over 180 degrees 0.4
MIN_SECTOR_USE = 0.6  # share of the circle's sectors with cameras
MIN_KEPT_SPREAD = 0.5  # share of both that cameras by structure from motion must keep: refinement moves them by little
VIEWS_PER_SECTOR, MAX_SECTORS = 6, 12
MIN_CANDIDATE_USE = 0.2  # effective number of candidates in use over their number
MAX_UNEXPLAINED = 0.25  # of the views' variance; correct runs have 0.003 to 0.11, wrong ones 0.37 and more
MAX_NEIGHBOUR_DEGREES = 30.0  # between the azimuths of similar views; the lower quartile is 45 at random positions
MAX_DUPLICATION = 0.05  # share of views that agree better with a held-out field after a rotation
MAX_INVERTED = 0.5  # share of cameras that are upside down or too low
MAX_SILHOUETTE_OFFSET = 0.04  # median distance of centroids in units of the image's side
ELEVATION_TOLERANCE = 10.0  # degrees below the lowest elevation of the settings
#: Share of cameras that moved far below all that was searched, or are upside down. Photos may be from a little below.
MAX_STRAY, STRAY_TOLERANCE = 0.05, 20.0
COMPARISON_SIDE, COMPARISON_VIEWS = 32, 32  # longer side of the compared images in pixels, and their number
SIMILARITY_SIDE = 16  # longer side in pixels of the images among which similar views are searched


def effective_use(indices: Tensor, count: int) -> float:
    """Return exp(entropy) of the choices [V] among ``count``, over its maximum: 1 / count to 1."""
    share = torch.bincount(indices.flatten(), minlength=count) / indices.numel()
    return float(torch.special.entr(share).sum().exp() / min(count, indices.numel()))


def azimuth_spread(poses: Tensor) -> float:
    """Return 1 minus the length of the azimuths' mean unit vector: 0 for equal azimuths, 1 for all around."""
    angle = azimuth_degrees(poses[:, :3, 3]).deg2rad()
    return float(1 - torch.stack([angle.cos(), angle.sin()]).mean(1).norm())


def sector_use(poses: Tensor) -> float:
    """Return the effective share of the circle's sectors with cameras [V, 4, 4]: of 12, or fewer for few views."""
    count = min(MAX_SECTORS, max(2, len(poses) // VIEWS_PER_SECTOR))
    sector = (azimuth_degrees(poses[:, :3, 3]) / (360 / count)).long().clamp_max(count - 1)
    return effective_use(sector, count)


def neighbour_degrees(poses: Tensor, images: Tensor) -> Tensor:
    """Return degrees [V] between the azimuth of each view and that of the view with the most similar image.

    Args:
        poses: [V, 4, 4].
        images: [V, 3, H, W].
    """
    size = target_size(min(SIMILARITY_SIDE, max(images.shape[2:])), *images.shape[2:])
    small = resize_area(images, *size).flatten(1)
    nearest = torch.cdist(small, small).fill_diagonal_(torch.inf).argmin(1)
    angle = azimuth_degrees(poses[:, :3, 3])
    return ((angle[nearest] - angle + 180) % 360 - 180).abs()


def unexplained_variance(field: Field, scene: Scene, poses: Tensor, samples: int) -> float:
    """Return the mean squared error of small renders from poses [V, 4, 4] over the variance of the views.

    0 where the scene explains its views, about 1 where it is no better than their mean image.
    """
    size = target_size(min(COMPARISON_SIDE, max(scene.size)), *scene.size)
    rows = torch.linspace(0, len(poses) - 1, min(COMPARISON_VIEWS, len(poses))).round().long().to(poses.device)
    images = resize_area(scene.images[rows], *size)
    own = scene.camera.of_views(rows)
    color = render_views(field, poses[rows], scene.camera, size, samples, views=rows, intrinsics=own).color.movedim(
        -1, 1
    )
    return float((color - images).square().mean() / (images - images.mean(0)).square().mean().clamp_min(1e-9))


@torch.no_grad()
def silhouette_offset(field: Field, scene: Scene, poses: Tensor, samples: int) -> float | None:
    """Return how far the centroids of rendered objects are from those of the foreground, in units of the image's side.

    It is the median over up to 32 views at poses [V, 4, 4]; None if the foreground is unknown or nothing is rendered.
    """
    if scene.foreground is None:
        return None
    rows = torch.linspace(0, len(poses) - 1, min(COMPARISON_VIEWS, len(poses))).round().long().to(poses.device)
    scored = scene.foreground.scored[rows]
    masks, size = scene.foreground.masks[rows] & scored, (scored.shape[1], scored.shape[2])
    own = scene.camera.of_views(rows)
    rendered = (render_views(field, poses[rows], scene.camera, size, samples, intrinsics=own).opacity > 0.5) & scored
    seen = masks.flatten(1).any(1) & rendered.flatten(1).any(1)
    if not seen.any():
        return None
    distance = (mask_centroids(masks[seen]) - mask_centroids(rendered[seen])).norm(dim=1)
    return float(distance.median() / max(size))


def inverted_share(poses: Tensor, min_elevation: float, tolerance: float = ELEVATION_TOLERANCE) -> float:
    """Return the share of cameras [V, 4, 4] that are upside down or well below an elevation; both in degrees."""
    elevation = camera_directions(poses)[:, 2].clamp(-1, 1).asin().rad2deg()
    return float(((elevation < min_elevation - tolerance) | (poses[:, 2, 1] < 0)).double().mean())


def scene_alarms(
    config: NerfdiffConfig,
    scene: Scene,
    field: Field,
    poses: Tensor,
    *,
    candidates: Tensor | None = None,
    count: int = 1,
    duplication: float | None = None,
    settled: bool = True,
    exact: bool = True,
) -> dict[str, Any]:
    """Return the alarms of an object scene in training: numbers, "checks", and "failures", a sentence an alarm.

    Args:
        poses: of the views, [V, 4, 4].
        candidates: see :func:`pose_alarms`.
        count: see :func:`pose_alarms`.
        duplication: see :func:`pose_alarms`.
        settled: see :func:`pose_alarms`.
        exact: whether poses are continuous; on a grid of positions a large error is no failure.
    """
    error = unexplained_variance(field, scene, poses, config.samples_per_ray)
    is_registered = config.search == "sfm" and scene.initial_poses is not None
    start = scene.poses if config.poses == "known" else scene.initial_poses if is_registered else None
    alarms = pose_alarms(
        poses,
        candidates,
        count,
        duplication,
        images=scene.images,
        error=error if exact else None,
        min_elevation=None if config.poses == "known" or config.search == "sfm" else config.elevation_range[0],
        true=scene.poses,
        settled=settled,
        turns=scene.turns,
        start=start,
    )
    return {"error": error, **alarms}


def pose_alarms(
    poses: Tensor,
    candidates: Tensor | None = None,
    count: int = 1,
    duplication: float | None = None,
    *,
    images: Tensor | None = None,
    error: float | None = None,
    min_elevation: float | None = None,
    true: Tensor | None = None,
    settled: bool = True,
    turns: float = 1.0,
    start: Tensor | None = None,
) -> dict[str, Any]:
    """Return the alarms of cameras around an object: numbers, "checks", and "failures", a sentence an alarm.

    Args:
        poses: of the views, [V, 4, 4].
        candidates: index [V] of each view's candidate.
        duplication: share of the views that agree better with a held-out field after a rotation.
        images: the views, [V, 3, H, W].
        error: see :func:`unexplained_variance`.
        min_elevation: lowest elevation of the settings, in degrees.
        true: true poses [V, 4, 4], if known; they never cause a failure.
        settled: whether the search is past its random part; before it, scatter and error are no failures.
        turns: around the object that the views were taken on; cameras on a part of a turn stand on one side.
        start: poses [V, 4, 4] that were given, or found by structure from motion: these may be on one side, and only
            cameras that are nearer to one another than there have collapsed. None: a search around the object.
    """
    alarms: dict[str, Any] = {"azimuth_spread": azimuth_spread(poses), "sector_use": sector_use(poses)}
    spread, sectors = alarms["azimuth_spread"], alarms["sector_use"]
    min_spread, min_sectors = MIN_AZIMUTH_SPREAD, MIN_SECTOR_USE
    if start is not None and torch.equal(start, poses):
        min_spread = min_sectors = -math.inf  # given cameras stay where they are: measured only
    elif start is not None:
        min_spread = min(min_spread, MIN_KEPT_SPREAD * azimuth_spread(start))
        min_sectors = min(min_sectors, MIN_KEPT_SPREAD * sector_use(start))
    one_side = spread < min_spread
    text = f"collapse: all cameras are on one side (azimuth spread {spread:.2f} of 1)"
    checks = [Check("azimuth spread", spread, low=min_spread, failures=(text,) if one_side else ())]
    text = f"collapse: cameras are at a few places (sectors in use {sectors:.2f} of 1)"
    few_places = sectors < min_sectors and not one_side
    checks.append(Check("sectors in use", sectors, low=min_sectors, failures=(text,) if few_places else ()))
    if turns < 1:
        reason = f"since the views were taken on {turns:g} of a turn"
        checks = [Check(check.name, not_run=reason) for check in checks]

    def check(
        name: str,
        value: float | None,
        failed: bool,
        text: str,
        reason: str,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> None:
        failures = (text,) if failed else ()
        checks.append(Check(name, not_run=reason) if value is None else Check(name, value, low, high, failures))

    if candidates is not None and count > 1:
        use = alarms["candidate_use"] = effective_use(candidates, count)
        text = f"collapse: few candidates take all views (use {use:.2f} of 1)"
        check("candidates in use", use, use < MIN_CANDIDATE_USE, text, "", low=MIN_CANDIDATE_USE)
    unsettled = "since the poses have not settled yet"
    quartile, limit = None, max(MAX_NEIGHBOUR_DEGREES, 720 / len(poses))
    if images is not None:
        degrees = neighbour_degrees(poses, images)
        alarms["offset_quartile"], alarms["offset_median"] = (float(degrees.quantile(q)) for q in (0.25, 0.5))
        alarms["offset_opposite"] = float((degrees > 90).float().mean())
        # In a nearly symmetric scene half of the similar views are on the other side: the median proves nothing.
        quartile = alarms["offset_quartile"] if settled else None
    text = f"scatter: similar views are far apart (lower quartile {quartile or 0:.0f} degrees)"
    reason = unsettled if images is not None else "since no views were given"
    check("degrees between similar views", quartile, (quartile or 0) > limit, text, reason, high=limit)
    text = f"unexplained: renders from these cameras leave {error or 0:.0%} of the views' variance"
    reason = "since poses on a grid of positions cannot explain the views" if error is None else unsettled
    failed = error is not None and not error < MAX_UNEXPLAINED
    check("unexplained variance", error if settled else None, failed, text, reason, high=MAX_UNEXPLAINED)
    if duplication is not None:
        alarms["doubled"] = duplication
    checks.append(duplication_check(duplication))
    inverted = stray = None
    if min_elevation is not None:
        inverted = alarms["inverted"] = inverted_share(poses, min_elevation)
        stray = inverted_share(poses, min_elevation, STRAY_TOLERANCE)
    text = (
        f"mirror: {inverted or 0:.0%} of the cameras are upside down or below the given elevations, as in "
        "a scene turned inside out; narrow elevation_range=, or train with another seed="
    )
    reason = "since the poses are known"
    mirrored = (inverted or 0) > MAX_INVERTED
    check("inverted cameras", inverted, mirrored, text, reason, high=MAX_INVERTED)
    text = (
        f"stray cameras: {stray or 0:.0%} are upside down or {STRAY_TOLERANCE:g} degrees below elevation_range=, where "
        "none was searched: these are wrong, unless photos were taken from there; then widen it"
    )
    if mirrored:
        stray, reason = None, "since most cameras are inverted"
    check("stray cameras", stray, (stray or 0) > MAX_STRAY, text, reason, high=MAX_STRAY)
    if true is not None:
        alarms["mirrored"] = is_mirrored(poses, true)
    return {**alarms, **log_checks(checks)}


def silhouette_check(offset: float | None) -> Check:
    """Return the check of a :func:`silhouette_offset`."""
    if offset is None:
        return Check("silhouette offset", not_run="since neither masks nor a background of one colour show an object")
    text = (
        f"silhouettes: rendered objects are {offset:.0%} of the image's side away from those of the views; the cameras "
        'cannot follow an object off the centre without "aim" in optimize_camera (--optimize-camera aim distance roll)'
    )
    failures = (text,) if offset > MAX_SILHOUETTE_OFFSET else ()
    return Check("silhouette offset", offset, high=MAX_SILHOUETTE_OFFSET, failures=failures)


def duplication_check(duplication: float | None) -> Check:
    """Return the check of a share of views that agree better with a held-out field after a rotation."""
    if duplication is None:
        return Check("duplication", not_run="since no field was fitted to half of the views at this point")
    failures = (
        ()
        if duplication <= MAX_DUPLICATION
        else (
            f"duplication: {duplication:.0%} of the views agree better with a held-out field after a rotation; the "
            "scene may contain the object twice. Search with flip_rounds=8 or more",
        )
    )
    return Check("duplication", duplication, high=MAX_DUPLICATION, failures=failures)
