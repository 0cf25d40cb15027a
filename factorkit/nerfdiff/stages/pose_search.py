"""Find the cameras of unposed views: a search for a start, refinement, and the flip test.

Captures in order also start from even walks around the object, in the order that their views were taken in: from one
turn, and unless the last views return to the first ones, from as many turns or parts of one as the views suggest. If
the best of them shows that the views are spaced unevenly, their own walk is a start too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from factorkit.nerfdiff.cameras.poses import (
    FreePoses,
    OrbitPoses,
    direction_grid,
    forward_facing_poses,
    orbit_poses,
    position_grid,
    rotate_about_z,
)
from factorkit.nerfdiff.scene import Scene
from factorkit.nerfdiff.stages.dictionary import SearchTask, ToPoses
from factorkit.nerfdiff.stages.flip_test import best_rotations, reassign_outliers
from factorkit.nerfdiff.stages.recentre import aim_from_offsets, directions_with_aim, foreground_offsets, recentre_scene
from factorkit.nerfdiff.stages.stage_training import StageTraining
from factorkit.nerfdiff.stages.walks import (
    WAYS,
    Way,
    even_azimuths,
    follow_walk,
    other_turns,
    ring_directions,
    unevenness,
)
from factorkit.utils import distributed

FORWARD_GRID = (6, 4)  # positions of forward-facing cameras, across and up
FORWARD_COARSENESS = 0.5  # when forward-facing poses start to move: they are many pixels off
MASK_WEIGHT = 0.3  # of the silhouettes, in the refinement of objects off the centre or in order
MAX_RING_RATIO = 0.6  # of the held-out errors of both ways around: turns have .27 to .47
# of the short fit that separates starts
START_FIT: dict[str, Any] = {"steps": 150, "learning_rate": 0.05, "batch_size": 8, "rays_per_view": 256}
RING_ELEVATIONS = (25.0, 10.0, 40.0)  # degrees, the first is tried both ways; the refinement corrects the rest
UNEVEN_ROUNDS = 2  # of walks through the field of the last one; more gain little
MIN_UNEVENNESS = 10.0  # degrees from an even walk: uneven ones have 12 to 16, others 5 to 9


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
        the other: then a walk fits. Where the best fit shows the views unevenly spaced, their walk is a start too.
        """
        training = self.training
        starts: dict[str, tuple[Tensor, float]] = {}  # directions, and turns around the object
        fits: dict[str, Any] = {}
        errors: dict[str, float] = {}

        def try_start(name: str, direction: Tensor, turns: float = 1.0) -> float:
            starts[name] = direction.to(training.device), turns
            poses = self._orbit_poses(starts[name][0]).requires_grad_()
            fits[name] = training.fit_small(f"start {name}", poses, initial_coarseness=1.0, **START_FIT)
            errors[name] = training.cross_fit(f"start {name} half ", fits[name].poses().detach(), self.scene).cross
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
        even, uneven = even_azimuths(self.scene), dict[str, float]()
        for number in range(1, UNEVEN_ROUNDS + 1):
            name, fitted = f"uneven {number}", fits[best]
            walk = follow_walk(fitted.field, fitted.poses().detach(), self.centred, fitted.samples, one, turns, even)
            uneven[name] = unevenness(walk, ring_directions(self.scene, one, first, turns))
            if uneven[name] < MIN_UNEVENNESS or try_start(name, walk, turns) > errors[best]:
                break
            best = name
        training.log_once("starts", held_out_cross=errors, best=best)
        direction, turns = starts[best]
        training.scene = replace(training.scene, turns=turns)
        if turns != 1:
            self._say(
                f"a walk of about {turns:.2g} turns around the object explains the views better than one whole turn"
            )
        if best in uneven:
            self._say(f"the views are spaced unevenly on their walk: {uneven[best]:.0f} degrees from even steps")
        return direction

    def _say(self, text: str) -> None:
        if self.training.progress and distributed.rank() == 0:
            tqdm.write(text, file=sys.stderr)

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
