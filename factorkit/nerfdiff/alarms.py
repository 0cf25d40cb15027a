"""What can be told without true poses when cameras were found wrongly.

From cameras around an object and their pictures: collapse (all cameras on one side, in a few places, or taken by a few
candidates), scatter (views that look alike stand apart), a scene that does not explain its views, duplication (a field
that never saw them agrees better with views after a turn).

Mirror: turned inside out along the lines of sight, a scene keeps its pictures but for perspective, and its cameras
stand at minus their elevation (or upside down). So cameras below the lowest elevation that was asked for tell of it;
where both signs of elevation are allowed, the poses alone cannot. With true poses,
:func:`factorkit.metrics.pose.is_mirrored` tells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from factorkit.data.views.views import resize_area, target_size
from factorkit.metrics.pose import is_mirrored
from factorkit.nerfdiff.cameras.poses import azimuths
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.grid import Field
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.scene import Scene

SPREAD = 0.5  # of azimuths, 0 (all the same) to 1 (all around): even ones over 240 degrees have 0.6, over 180 0.4
SECTORS, FULL = 0.6, 6  # share of the circle's sectors in use; so many views a sector, or sectors are wider
USE = 0.2  # effective number of candidates in use over their number: below, few do all the work
ERROR = 0.25  # of the views' own variance that their renders leave; found right 0.003 to 0.11, wrong from 0.37
APART = 30.0  # degrees between the azimuths of views that look alike: 45 if they stand anywhere
DOUBLED = 0.05  # share of views that agree better with the scene after a turn
BELOW = 10.0  # degrees a camera may be lower than asked for
SIDE, LOOKED_AT = 32, 32  # pixels along the longer side of the pictures compared, and how many views


def effective_use(chosen: Tensor, count: int) -> float:
    """exp(entropy) of how the choices [V] among ``count`` fall, over the most it can be: 1 / count to 1."""
    share = torch.bincount(chosen.flatten(), minlength=count) / chosen.numel()
    return float(torch.special.entr(share).sum().exp() / min(count, chosen.numel()))


def azimuth_spread(poses: Tensor) -> float:
    """1 minus the length of the mean of the azimuths' unit vectors: 0 all the same, 1 all around."""
    angle = azimuths(poses[:, :3, 3]).deg2rad()
    return float(1 - torch.stack([angle.cos(), angle.sin()]).mean(1).norm())


def sector_use(poses: Tensor) -> float:
    """The effective share of the circle's sectors in which cameras [V, 4, 4] stand: of 12, or fewer for few views."""
    count = min(12, max(2, len(poses) // FULL))
    sector = (azimuths(poses[:, :3, 3]) / (360 / count)).long().clamp_max(count - 1)
    return effective_use(sector, count)


def offsets(poses: Tensor, images: Tensor) -> Tensor:
    """Degrees [V], 0 to 180, between the azimuths of each view and the one whose picture is most like its own.

    Args:
        poses: [V, 4, 4].
        images: [V, 3, H, W].
    """
    small = resize_area(images, *target_size(min(16, max(images.shape[2:])), *images.shape[2:])).flatten(1)
    nearest = torch.cdist(small, small).fill_diagonal_(torch.inf).argmin(1)
    angle = azimuths(poses[:, :3, 3])
    return ((angle[nearest] - angle + 180) % 360 - 180).abs()


def unexplained(field: Field, scene: Scene, poses: Tensor, samples: int) -> float:
    """Mean squared error of renders from poses [V, 4, 4] over that of the views' mean picture, for small pictures of
    some views: 0 where the scene explains them, about 1 where it tells nothing of a view."""
    size = target_size(min(SIDE, max(scene.size)), *scene.size)
    picked = torch.linspace(0, len(poses) - 1, min(LOOKED_AT, len(poses))).round().long().to(poses.device)
    images = resize_area(scene.images[picked], *size)
    seen = render_views(field, poses[picked], scene.optics, size, samples).color.movedim(-1, 1)
    return float((seen - images).square().mean() / (images - images.mean(0)).square().mean().clamp_min(1e-9))


def inverted_share(poses: Tensor, lowest: float) -> float:
    """Share of cameras [V, 4, 4] that are upside down or well below the elevation ``lowest``, in degrees."""
    height = torch.nn.functional.normalize(poses[:, :3, 3], dim=1)[:, 2].clamp(-1, 1).asin().rad2deg()
    return float(((height < lowest - BELOW) | (poses[:, 2, 1] < 0)).float().mean())


def scene_alarms(
    config: NerfdiffConfig,
    scene: Scene,
    field: Field,
    poses: Tensor,
    *,
    chosen: Tensor | None = None,
    count: int = 1,
    doubled: float | None = None,
    settled: bool = True,
    exact: bool = True,
) -> dict[str, Any]:
    """The alarms of an object scene in training: the figures, and "failures", which names in words what they give away.

    Args:
        poses: of the scene's views, [V, 4, 4].
        chosen, count, doubled, settled: as :func:`pose_alarms` takes them.
        exact: whether views stand where they please: on a lattice, a large error says little.
    """
    error = unexplained(field, scene, poses, config.samples_per_ray)
    lowest = None if config.poses == "known" else config.elevation_range[0]
    found = pose_alarms(
        poses,
        chosen,
        count,
        doubled,
        images=scene.images,
        error=error if exact else None,
        lowest=lowest,
        true=scene.poses,
        settled=settled,
    )
    return {"error": error, **found}


def pose_alarms(
    poses: Tensor,
    chosen: Tensor | None = None,
    count: int = 1,
    doubled: float | None = None,
    *,
    images: Tensor | None = None,
    error: float | None = None,
    lowest: float | None = None,
    true: Tensor | None = None,
    settled: bool = True,
) -> dict[str, Any]:
    """Figures and, in words, what they give away; for cameras around an object.

    Args:
        poses: of the views, [V, 4, 4].
        chosen: which of ``count`` candidates each view took, [V].
        doubled: share of the views that a held-out field saw better from another side.
        images: the views, [V, 3, H, W].
        error: as :func:`unexplained` measures it.
        lowest: elevation of cameras in degrees that was asked for.
        true: the true poses [V, 4, 4], where they are known.
        settled: whether the search for poses is past its random part; before, scatter and error are no failures.
    """
    found: dict[str, Any] = {"azimuth_spread": azimuth_spread(poses), "sector_use": sector_use(poses)}
    failures = []
    if found["azimuth_spread"] < SPREAD:
        failures.append(f"collapse: all cameras stand on one side (azimuth spread {found['azimuth_spread']:.2f} of 1)")
    elif found["sector_use"] < SECTORS:
        failures.append(f"collapse: cameras stand in a few places (sectors in use {found['sector_use']:.2f} of 1)")
    if chosen is not None and count > 1:
        found["candidate_use"] = effective_use(chosen, count)
        if found["candidate_use"] < USE:
            failures.append(f"collapse: few candidates take all views (use {found['candidate_use']:.2f} of 1)")
    if images is not None:
        apart = offsets(poses, images)
        found["offset_quartile"], found["offset_median"] = (float(apart.quantile(q)) for q in (0.25, 0.5))
        found["offset_opposite"] = float((apart > 90).float().mean())
        # a scene that nearly looks alike from two sides has its like there as often as not: the median says nothing
        if settled and found["offset_quartile"] > max(APART, 720 / len(poses)):
            quartile = f"lower quartile {found['offset_quartile']:.0f} degrees"
            failures.append(f"scatter: views that look alike stand apart ({quartile})")
    if settled and error is not None and not error < ERROR:
        failures.append(f"unexplained: renders from these cameras leave {error:.0%} of the views' variance")
    if doubled is not None:
        found["doubled"] = doubled
        failures += duplication(doubled)
    if lowest is not None:
        found["inverted"] = inverted_share(poses, lowest)
        if found["inverted"] > 0.5:
            failures.append(
                f"mirror: {found['inverted']:.0%} of the cameras stand below the elevations asked for or upside down, "
                "as those of a scene turned inside out do; narrow elevation_range=, or train from another seed="
            )
    if true is not None:
        found["mirrored"] = is_mirrored(poses, true)  # no failure: true poses have no say in the training
    return {**found, "failures": failures}


def duplication(doubled: float) -> list[str]:
    """What it gives away, in words, that so large a share of the views agrees better after a turn; perhaps nothing."""
    if doubled <= DOUBLED:
        return []
    seen = f"{doubled:.0%} of the views agree better with a field that never saw them after a turn"
    return [f"duplication: {seen}; the scene may stand there twice. Search with flip_rounds=8 or more"]
