"""Whether the silhouettes of all views fit one object at the cameras found: no labels, colours or field are used.

The visual hull is the part of the box that lies inside the foreground of nearly all views. With right masks and cameras
its silhouettes are those of the views; masks that hold parts of a background, or wrong cameras, leave little of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.nerfdiff.box import Foreground
from factorkit.rendering import image_rays
from factorkit.report.content import Check

HULL_CELLS = 48  # along each side of the box
MAX_CARVING_VIEWS, COMPARED_VIEWS = 128, 32  # views that carve the hull, and that it is compared with
MIN_AGREEING_VIEWS = 0.9  # of those that see a cell, in whose foreground it lies: some masks may be wrong
MIN_SEEING_VIEWS = 0.5  # of all, that see a cell of the hull
MIN_HULL_VIEWS = 8  # fewer carve too little for the hull to have the views' silhouettes
SAMPLES_PER_CELL = 1.5  # along a ray
MIN_HULL_AGREEMENT = 0.75
HULL_CHECK = "agreement with the visual hull"


@torch.no_grad()
def measure_hull_agreement(foreground: Foreground, poses: Tensor) -> float:
    """Return the mean IoU of the foreground with the silhouettes of its visual hull.

    Args:
        foreground: of the views.
        poses: [V, 4, 4], in coordinates in which the box is [-1, 1]^3.
    """
    hull = carve_hull(foreground, poses)
    rows = choose_rows(len(poses), COMPARED_VIEWS).to(poses.device)
    masks, scored = foreground.masks[rows], foreground.scored[rows]
    ious = []
    for pose, intrinsics, mask, seen in zip(poses[rows], foreground.intrinsics[rows], masks, scored, strict=True):
        silhouette = render_silhouette(hull, pose, intrinsics, *mask.shape) & seen
        union = (silhouette | mask).sum()
        ious.append((silhouette & mask).sum() / union.clamp_min(1))
    return float(torch.stack(ious).mean())


def carve_hull(foreground: Foreground, poses: Tensor) -> Tensor:
    """Return which cells of the box lie in the foreground of nearly all views that see them, bool [N, N, N]."""
    centre = (torch.arange(HULL_CELLS, device=poses.device) + 0.5) / HULL_CELLS * 2 - 1
    cells = torch.stack(torch.meshgrid(centre, centre, centre, indexing="ij"), -1).reshape(-1, 3)
    inside, seen = torch.zeros(len(cells), device=poses.device), torch.zeros(len(cells), device=poses.device)
    rows = choose_rows(len(poses), MAX_CARVING_VIEWS).tolist()
    for i in rows:
        is_seen, is_inside = foreground.covers(i, poses[i], cells)
        seen += is_seen
        inside += is_inside
    kept = (seen >= MIN_SEEING_VIEWS * len(rows)) & (inside >= MIN_AGREEING_VIEWS * seen)
    return kept.reshape(HULL_CELLS, HULL_CELLS, HULL_CELLS)


def render_silhouette(hull: Tensor, pose: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels see the hull, bool [height, width]."""
    rays = image_rays(pose, intrinsics, height, width)
    origins, directions = rays.origins, torch.nn.functional.normalize(rays.directions, dim=-1)
    distance, reach = pose[:3, 3].norm(), 3**0.5  # from the centre of the box to its corners
    count = int(SAMPLES_PER_CELL * reach * HULL_CELLS)
    depths = torch.linspace(-reach, reach, count, device=pose.device) + distance
    points = origins[..., None, :] + depths.clamp_min(0)[:, None] * directions[..., None, :]
    cells = ((points + 1) / 2 * HULL_CELLS).floor().long()
    within = ((cells >= 0) & (cells < HULL_CELLS)).all(-1)
    x, y, z = cells.clamp(0, HULL_CELLS - 1).unbind(-1)
    return (hull[x, y, z] & within).any(-1)


def choose_rows(count: int, most: int) -> Tensor:
    """Return at most so many of ``count`` rows, evenly spaced."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def hull_check(foreground: Foreground | None, poses: Tensor, unbounded: bool = False) -> Check:
    """Return the check that the foreground of the views fits one object at their poses [V, 4, 4]."""
    reason = ""
    if foreground is None:
        reason = "since neither masks nor a background of one colour show an object"
    elif unbounded:
        reason = "since the field covers all of space"
    elif len(poses) < MIN_HULL_VIEWS:
        reason = f"since there are {len(poses)} views, fewer than {MIN_HULL_VIEWS}"
    elif foreground.is_cut_by_images():
        reason = "since the images cut the object"
    if foreground is None or reason:
        return Check(HULL_CHECK, not_run=reason)
    agreement = measure_hull_agreement(foreground, poses)
    text = (
        f"silhouettes do not fit one object: the foreground of the views agrees {agreement:.2f} < "
        f"{MIN_HULL_AGREEMENT:g} (IoU) with its visual hull at these cameras; the masks, or the cameras, are wrong. "
        "Look at the masks"
    )
    failures = () if agreement >= MIN_HULL_AGREEMENT else (text,)
    return Check(HULL_CHECK, agreement, low=MIN_HULL_AGREEMENT, failures=failures)
