"""Walks around an object: in which order views were taken, where an even walk has them, and where a field has them."""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.data.files import natural_order
from factorkit.data.views.views import resize_area, target_size
from factorkit.nerfdiff.cameras.poses import (
    azimuth_degrees,
    camera_directions,
    direction_grid,
    direction_vectors,
    orbit_poses,
)
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.scene import Scene, gaussian_blur
from factorkit.nerfdiff.stages.assignment import standardise_errors
from factorkit.nerfdiff.stages.dictionary import candidate_errors
from factorkit.nerfdiff.stages.recentre import foreground_offsets, recentre_scene

Way = Literal["left", "right"]
Order = Literal["names", "times"]  # what gives the order of the views: their names, or when they were taken

WAYS: tuple[Way, Way] = ("left", "right")
MAX_LIKENESS_RATIO = 0.8  # rings have .03 to .5; views in random order .97 to 1.07
MIN_ORDERED_VIEWS = 12
PARTS_OF_TURN = (0.5, 0.75)  # where no view returns to an earlier one; the refinement corrects the rest
MAX_RETURN_RATIO = 0.5  # of excess likenesses, after a turn over that of neighbours: turns .6 to 2.2, others up to .43
RETURN_SHARE = 0.05  # of the views: over so many more and fewer steps likenesses are averaged
WHOLE_TURN_TOLERANCE = 0.15  # in turns: this close to one turn the walk starts as one
MAX_NUMBER_GAP = 4.0  # in median steps: larger gaps between the numbers of names are pauses, not missing views
LIKENESS_SIDE, LIKENESS_BLUR = 32, 1.0  # longer side of the compared images and blur, in pixels
MAX_PACE = 6.0  # of a step over that of an even walk
PACE_COST = 0.1  # of a step for each time that of an even walk it differs by, in deviations of a view's errors
WALK_AZIMUTHS = 120  # at which views are compared
ELEVATION_STEP = 8.0  # degrees between the elevations at which views are compared, up to so far from their own
ELEVATION_REACH = 5  # views on either side over which elevations are averaged
MAX_ELEVATION = 85.0  # degrees
OPEN_LENGTH = 1.5  # of a walk that does not return, over that of an even one, at most


def likeness_ratio(images: Tensor) -> float:
    """Return the median squared difference of consecutive images [V, 3, H, W] over that of all pairs."""
    squared = _squared_differences(images)
    return float(squared.diagonal(1).median() / _median_pair(squared))


def return_lag(images: Tensor) -> int | None:
    """Return after how many steps images [V, 3, H, W] in their order return to where they were; None if they do not.

    What makes a view unlike all others (exposure, a wrong mask) is taken off: likenesses are those in excess of the
    means of both views. The first return counts.
    """
    squared, count = _squared_differences(images), len(images)
    others = ~torch.eye(count, dtype=torch.bool, device=squared.device)
    mean = squared.sum(1) / (count - 1)
    excess = squared - mean[:, None] - mean + mean.mean()
    pairs = torch.arange(count - 1, 0, -1).to(excess)
    sums = torch.stack([(excess * others).diagonal(lag).sum() for lag in range(1, count)])
    reach = max(1, round(RETURN_SHARE * count))
    kernel = torch.ones(1, 1, 2 * reach + 1).to(sums)
    total, weight = (F.conv1d(x[None, None], kernel, padding=reach)[0, 0] for x in (sums, pairs))
    profile = (total / weight).tolist()
    limit, away, best = MAX_RETURN_RATIO * profile[0], False, None
    for lag, value in enumerate(profile, 1):
        away = away or value > 0
        if away and value < limit:
            best = lag if best is None or value < profile[best - 1] else best
        elif best is not None:
            break
    return best


def _squared_differences(images: Tensor) -> Tensor:
    size = target_size(min(LIKENESS_SIDE, max(images.shape[2:])), *images.shape[2:])
    small = gaussian_blur(resize_area(images, *size), LIKENESS_BLUR).flatten(1)
    return torch.cdist(small, small).square()


def _median_pair(squared: Tensor) -> Tensor:
    others = ~torch.eye(len(squared), dtype=torch.bool, device=squared.device)
    return squared[others].median().clamp_min(1e-9)


def find_order(scene: Scene) -> Order | None:
    """Return in which order the views of an object follow one another: consecutive ones are more alike than others."""
    if len(scene.images) < MIN_ORDERED_VIEWS:
        return None
    images = _centred_images(scene)
    if likeness_ratio(images[order_of_names(scene.names)]) < MAX_LIKENESS_RATIO:
        return "names"
    by_time = scene.times is not None and likeness_ratio(images[scene.times.argsort(stable=True)]) < MAX_LIKENESS_RATIO
    return "times" if by_time else None


def other_turns(scene: Scene) -> tuple[float, ...]:
    """Return how often, other than once, the views of an object may go around it, by their order and likeness."""
    rows = even_azimuths(scene).argsort()
    lag = return_lag(_centred_images(scene)[rows])
    if lag is None:
        return PARTS_OF_TURN
    turns = len(rows) / lag
    return (turns,) if abs(turns - 1) > WHOLE_TURN_TOLERANCE else ()


def _centred_images(scene: Scene) -> Tensor:
    if scene.foreground is None:
        return scene.images
    return recentre_scene(scene, foreground_offsets(scene.foreground)).images


def ring_azimuths(names: list[str], times: Tensor | None = None) -> Tensor:
    """Return azimuths [V] in degrees of views that are evenly spaced around an object, by the numbers of their names.

    Numbers that are missing leave gaps. Names without rising numbers, or with long gaps, count as one step each; so do
    views in the order of ``times`` [V], if given.
    """
    if times is not None:
        return (360 * times.argsort(stable=True).argsort() / len(names)).float()
    order = order_of_names(names)
    numbers = [re.findall(r"[0-9]+", names[i]) for i in order]
    positions = torch.arange(len(names), dtype=torch.float64)
    if all(numbers):
        last = torch.tensor([float(found[-1]) for found in numbers], dtype=torch.float64)
        steps = last.diff()
        if (steps > 0).all() and steps.max() <= MAX_NUMBER_GAP * steps.median():
            positions = (last - last[0]) / steps.median()
    azimuths = (360 * positions / (positions[-1] + 1)).float()
    return azimuths[torch.tensor(order).argsort()]


def order_of_names(names: list[str]) -> list[int]:
    """Return the rows of views in their order: as given, or of a listing, where 10 is before 2, in natural order."""
    return natural_order(names) if names == sorted(names) else list(range(len(names)))


def ring_directions(scene: Scene, way: Way, elevation: float, turns: float = 1.0) -> Tensor:
    """Return directions [V, 3] of an even walk of some turns around the object.

    Args:
        way: "left" is counter-clockwise from above.
        elevation: in degrees.
        turns: around the object.
    """
    azimuths = turns * even_azimuths(scene)
    return direction_vectors(azimuths if way == "left" else -azimuths, torch.full_like(azimuths, elevation))


def even_azimuths(scene: Scene) -> Tensor:
    """Return azimuths [V] in degrees of an even turn, in the order of the views; see :func:`ring_azimuths`."""
    return ring_azimuths(scene.names, scene.times if find_order(scene) == "times" else None)


def unevenness(direction: Tensor, even: Tensor) -> float:
    """Return by how many degrees the azimuths of directions [V, 3] differ from those of others, turned to fit best."""
    degrees = azimuth_degrees(direction.cpu()) - azimuth_degrees(even.cpu())
    difference = torch.polar(torch.ones_like(degrees), degrees.deg2rad())
    return float((difference / difference.mean()).angle().rad2deg().square().mean().sqrt())


@torch.no_grad()
def follow_walk(
    field: Field, poses: Tensor, scene: Scene, samples: int, way: Way, turns: float, even: Tensor
) -> Tensor:
    """Return directions [V, 3]: of the walk in the order of the views on which they differ least from a field.

    Views that are near each other in that order are near each other in space: each may only go on, by up to
    :data:`MAX_PACE` steps of an even walk.

    Args:
        field: rendered from all around, at the elevations of the poses.
        poses: of the views, [V, 4, 4].
        scene: with views that show the object at the centre.
        samples: along each ray.
        way: "left" is counter-clockwise from above.
        turns: around the object, of an even walk.
        even: azimuths [V] of one even turn.
    """
    even, rows, device = turns * even, even.argsort(), poses.device

    def smooth(elevation: Tensor) -> Tensor:
        padded = F.pad(elevation[rows][None], (ELEVATION_REACH, ELEVATION_REACH), mode="replicate")
        return F.avg_pool1d(padded, 2 * ELEVATION_REACH + 1, 1)[0][rows.argsort()]

    own = smooth(camera_directions(poses)[:, 2].clamp(-1, 1).asin().rad2deg().cpu())
    levels = torch.arange(float(own.min()) - ELEVATION_STEP, float(own.max()) + 1.01 * ELEVATION_STEP, ELEVATION_STEP)
    levels = levels.clamp(-MAX_ELEVATION, MAX_ELEVATION)
    places = orbit_poses(direction_grid(WALK_AZIMUTHS, levels.tolist()).to(device), scene.distance)
    views, intrinsics = torch.arange(len(own), device=device), scene.camera.of_views()
    errors = candidate_errors(field, places, scene.camera, scene.images, samples, views, scene.loss_masks, intrinsics)
    errors = errors.cpu().view(len(own), len(levels), WALK_AZIMUTHS)
    is_far = (levels - own[:, None]).abs() > 1.01 * ELEVATION_STEP
    error, level = errors.masked_fill(is_far[..., None], math.inf).min(1)
    forward = torch.arange(WALK_AZIMUTHS) * (1 if way == "left" else -1) % WALK_AZIMUTHS
    steps = torch.cat([even[rows], even.new_tensor([360 * turns])]).diff() * WALK_AZIMUTHS / 360
    walk = cheapest_walk(standardise_errors(error)[rows][:, forward], steps, closed=turns == 1)
    azimuth = forward[walk][rows.argsort()]
    elevation = smooth(levels[level[torch.arange(len(own)), azimuth]])
    return direction_vectors(azimuth * (360 / WALK_AZIMUTHS), elevation).to(device)


def cheapest_walk(errors: Tensor, steps: Tensor, closed: bool) -> Tensor:
    """Return the azimuths [V], as indices below A, of the cheapest walk that never turns back, by Viterbi's algorithm.

    Its cost is the errors on the way, and for each step :data:`PACE_COST` times how many steps of the even walk it
    differs from that. No step is longer than :data:`MAX_PACE` of those.

    Args:
        errors: of each view, in order, at azimuths at even distances, [V, A]; the walk goes to higher ones.
        steps: of the even walk, in distances of azimuths, [V], the last one from the last view to where it ends.
        closed: whether it ends where it began, after one turn; otherwise where it costs least.
    """
    count = errors.shape[1]
    length = count if closed else math.ceil(OPEN_LENGTH * float(steps.sum()))
    reach = max(1, math.ceil(MAX_PACE * float(steps.max())))
    taken, offsets = torch.arange(reach + 1), torch.arange(length + 1)
    place = (torch.arange(count)[:, None] + offsets) % count  # by the first azimuth, and how far from it

    def pace_cost(step: Tensor) -> Tensor:
        cost = PACE_COST * (taken / step - 1).abs()
        return cost.masked_fill(taken > max(1.0, MAX_PACE * float(step)), math.inf)

    cost = torch.full(place.shape, math.inf)
    cost[:, 0] = errors[0]
    back = []
    for error, step in zip(errors[1:], steps[:-1], strict=True):
        before = F.pad(cost, (reach, 0), value=math.inf).unfold(1, reach + 1, 1)  # from far to near
        cost, nearness = (before + pace_cost(step).flip(0)).min(2)
        cost = cost + error[place]
        back.append(reach - nearness)
    if closed:
        rest = length - offsets
        cost = cost + pace_cost(steps[-1])[rest.clamp_max(reach)].masked_fill(rest > reach, math.inf)
    first, offset = divmod(int(cost.argmin()), length + 1)
    walked = [offset]
    for taken_before in reversed(back):
        walked.append(walked[-1] - int(taken_before[first, walked[-1]]))
    return (first + torch.tensor(walked[::-1])) % count
