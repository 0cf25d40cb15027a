"""Find the cameras of unposed views: a search for a start, refinement, and the flip test.

Captures in order also start from even walks around the object, in the order that their views were taken in: from one
turn, and unless the last views return to the first ones, from as many turns or parts of one as the views suggest.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from factorkit.data.files import natural_order
from factorkit.data.views.views import resize_area, target_size
from factorkit.nerfdiff.cameras.poses import (
    FreePoses,
    OrbitPoses,
    direction_grid,
    direction_vectors,
    forward_facing_poses,
    orbit_poses,
    position_grid,
    rotate_about_z,
)
from factorkit.nerfdiff.scene import Scene, gaussian_blur
from factorkit.nerfdiff.stages.dictionary import SearchTask, ToPoses
from factorkit.nerfdiff.stages.flip_test import best_rotations, reassign_outliers
from factorkit.nerfdiff.stages.recentre import aim_from_offsets, directions_with_aim, foreground_offsets, recentre_scene
from factorkit.nerfdiff.stages.stage_training import StageTraining
from factorkit.utils import distributed

FORWARD_GRID = (6, 4)  # positions of forward-facing cameras, across and up
FORWARD_COARSENESS = 0.5  # when forward-facing poses start to move: they are many pixels off
MASK_WEIGHT = 0.3  # of the silhouettes, in the refinement of objects off the centre or in order
MAX_RING_RATIO = 0.6  # of the held-out errors of both ways around: turns have .27 to .47
# of the short fit that separates starts
START_FIT: dict[str, Any] = {"steps": 150, "learning_rate": 0.05, "batch_size": 8, "rays_per_view": 256}

Way = Literal["left", "right"]
Order = Literal["names", "times"]  # what gives the order of the views: their names, or when they were taken

MAX_LIKENESS_RATIO = 0.8  # rings have .03 to .5; views in random order .97 to 1.07
MIN_ORDERED_VIEWS = 12
RING_ELEVATIONS = (25.0, 10.0, 40.0)  # degrees, the first is tried both ways; the refinement corrects the rest
PARTS_OF_TURN = (0.5, 0.75)  # where no view returns to an earlier one; the refinement corrects the rest
MAX_RETURN_RATIO = 0.5  # of excess likenesses, after a turn over that of neighbours: turns .6 to 2.2, others up to .43
RETURN_SHARE = 0.05  # of the views: over so many more and fewer steps likenesses are averaged
WHOLE_TURN_TOLERANCE = 0.15  # in turns: this close to one turn the walk starts as one
WAYS: tuple[Way, Way] = ("left", "right")
MAX_NUMBER_GAP = 4.0  # in median steps: larger gaps between the numbers of names are pauses, not missing views
LIKENESS_SIDE, LIKENESS_BLUR = 32, 1.0  # longer side of the compared images and blur, in pixels


class DictionarySearch:
    """Find the poses of all views of a training without structure from motion.

    Args:
        training: whose stages are trained.
    """

    def __init__(self, training: StageTraining):
        self.training, self.config = training, training.config
        self.centred, self.aim = self._recentre()

    @property
    def scene(self) -> Scene:
        """The scene of the training, whose focal length a fit may change."""
        return self.training.scene

    def _recentre(self) -> tuple[Scene, Tensor | None]:
        """Return the scene for the search, and the aim [V, 2] of the cameras of the original views, None if it is 0."""
        scene = self.scene
        if "aim" not in self.config.pose_parameters or scene.foreground is None:
            return scene, None
        offsets = foreground_offsets(scene.foreground)
        return recentre_scene(scene, offsets), aim_from_offsets(offsets)

    def run(self) -> tuple[Any, float | None]:
        """Search, refine and flip-test the poses.

        Returns:
            The fit, and the share of views that the last round of the flip test moved; None in a forward-facing scene.
        """
        training, config, scene = self.training, self.config, self.scene
        refine = partial(training.fit, optimize_focal=True)
        if scene.layout == "forward":
            start, place = self._assign_views(position_grid(*FORWARD_GRID), forward_facing_poses)
            free = FreePoses(forward_facing_poses(place))
            fitted = refine("refine", start, free, preview_name="refine", initial_coarseness=FORWARD_COARSENESS)
            return training.with_final_field(fitted), None
        low, high = config.elevation_range
        rows = config.num_elevations
        elevations = [low + (high - low) * (i + 0.5) / rows for i in range(rows)]
        places = direction_grid(config.num_azimuths, elevations).to(training.device)
        search = partial(self._assign_views, places, partial(orbit_poses, distance=scene.distance))
        if config.ordered == "yes":
            place = self._choose_start(lambda: search()[1])
        else:
            start, place = search()
        if self.aim is not None or config.ordered == "yes":
            refine = partial(refine, mask_weight=MASK_WEIGHT)
        if self.aim is not None or config.ordered == "yes" or "focal" in (config.optimize_camera or ()):
            # the cameras of the search are too far off for a field that is sharp already
            start, refine = self._fresh_field(), partial(refine, initial_coarseness=1.0)
        fitted = refine("refine", start, self._orbit_poses(place).requires_grad_(), preview_name="refine")
        self.centred, self.aim = self._recentre()  # with the focal length of the fit
        poses = fitted.poses.with_directions(fitted.poses.direction.detach())
        refined_directions, moved = poses.direction, 0
        refined_scene = training.scene_with(fitted)
        for number in range(max(1, config.flip_rounds)):
            poses, moved = self._flip_round(number, poses, places, refined_scene)
            if not moved:
                break
        if config.flip_rounds and (poses.direction != refined_directions).any():
            poses.requires_grad_()
            fitted = refine("refine again", self._fresh_field(), poses, preview_name="refine_again")
        return training.with_final_field(fitted), moved / len(refined_directions)

    def _fresh_field(self) -> Any:
        training = self.training
        return training.add_occupancy(training.new_field("grid", self.config.grid_resolution))

    def _assign_views(self, places: Tensor, to_poses: ToPoses) -> tuple[Any, Tensor]:
        """Assign the views to positions [D, 3]; return the fitted field and the position [V, 3] of each view."""
        training, config = self.training, self.config
        field, places = training.new_field("grid", config.search_grid_resolution), places.to(training.device)
        found = training.train_stage(
            "search",
            lambda stage: SearchTask(stage, self.centred, field, places, to_poses),
            steps=config.search_steps,
            batch_size=config.views_per_step,
            learning_rate=config.search_learning_rate,
            lr_decay_fraction=0.0,
            ema_decay=0.0,
            sample_every=max(1, config.search_steps // 5),
        )
        start = training.add_occupancy(found.field.resampled(config.grid_resolution))
        return start, found.poses.places[found.poses.assigned]

    def _choose_start(self, search: Callable[[], Tensor]) -> Tensor:
        """Return an even walk, or what ``search`` returns [V, 3]: from which a short fit explains held-out views best.

        The search is left out if one way around, with as many turns as fit best, explains the views much better than
        the other: then a walk fits.
        """
        training = self.training
        starts: dict[str, tuple[Tensor, float]] = {}  # directions, and turns around the object
        errors: dict[str, float] = {}

        def try_start(name: str, direction: Tensor, turns: float = 1.0) -> float:
            starts[name] = direction.to(training.device), turns
            poses = self._orbit_poses(starts[name][0]).requires_grad_()
            fitted = training.fit_small(f"start {name}", poses, initial_coarseness=1.0, **START_FIT)
            errors[name] = training.cross_fit(f"start {name} half ", fitted.poses().detach(), self.scene).cross
            return errors[name]

        def try_walk(way: Way, elevation: float, turns: float) -> float:
            name = f"{way} {elevation:g}" + (f" turns {turns:.3g}" if turns != 1 else "")
            return try_start(name, ring_directions(self.scene, way, elevation, turns), turns)

        first, *others = RING_ELEVATIONS
        turns, (one, other) = 1.0, WAYS
        better, worse = (try_walk(way, first, turns) for way in WAYS)
        if worse < better:
            one, other, better, worse = other, one, worse, better
        tried = {turns: better} | {number: try_walk(one, first, number) for number in other_turns(self.scene)}
        turns = min(tried, key=lambda number: tried[number])
        if turns != 1:
            better, worse = tried[turns], try_walk(other, first, turns)
            one, better, worse = (other, worse, better) if worse < better else (one, better, worse)
        for elevation in others:
            try_walk(one, elevation, turns)
        if not better < MAX_RING_RATIO * worse:
            try_start("search", search())
        best = min(errors, key=lambda name: errors[name])
        training.log_once("starts", held_out_cross=errors, best=best)
        direction, turns = starts[best]
        training.scene = replace(training.scene, turns=turns)
        if turns != 1 and training.progress and distributed.rank() == 0:
            tqdm.write(
                f"a walk of about {turns:.2g} turns around the object explains the views better than one whole turn",
                file=sys.stderr,
            )
        return direction

    def _orbit_poses(self, position: Tensor) -> OrbitPoses:
        """Return poses of cameras in directions [V, 3] from the origin, which see it at the centre of their object."""
        if self.aim is None:
            return OrbitPoses(position, self.scene.distance, self.config.pose_parameters)
        poses = OrbitPoses(directions_with_aim(position, self.aim), self.scene.distance, self.config.pose_parameters)
        poses.freedom["aim"].data.copy_(self.aim)
        return poses

    def _flip_round(self, number: int, poses: OrbitPoses, places: Tensor, scene: Scene) -> tuple[OrbitPoses, int]:
        """Run one round of the flip test over both halves; return the new poses and how many views were moved."""
        moved, training = 0, self.training
        for name, fitting, choosing in training.both_halves(len(poses.direction), number):
            held_out = training.fit_half(f"flip {number}{name}", number, poses, fitting, scene)
            before = poses.direction[choosing]
            degrees = best_rotations(held_out.field, scene, poses().detach(), choosing, held_out.samples)
            direction = poses.direction.clone()
            direction[choosing] = torch.where(degrees[:, None] != 0, rotate_about_z(before, degrees), before)
            poses = poses.with_directions(direction)
            direction = direction.clone()
            direction[choosing] = reassign_outliers(
                held_out.field, scene, poses, choosing, places, held_out.samples, self.centred
            )
            poses = poses.with_directions(direction)
            moved += int((direction[choosing] != before).any(1).sum())
        return poses, moved


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
    rows = ring_azimuths(scene.names, scene.times if find_order(scene) == "times" else None).argsort()
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
    azimuths = turns * ring_azimuths(scene.names, scene.times if find_order(scene) == "times" else None)
    return direction_vectors(azimuths if way == "left" else -azimuths, torch.full_like(azimuths, elevation))
