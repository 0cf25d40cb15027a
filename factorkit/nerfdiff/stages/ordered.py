"""Starts for captures in order: the views on one even ring around the object, in the order they were taken in."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from factorkit.data.views.views import resize_area, target_size
from factorkit.nerfdiff.cameras.poses import direction_vectors
from factorkit.nerfdiff.scene import Scene, gaussian_blur
from factorkit.nerfdiff.stages.recentre import foreground_offsets, recentre_scene

Way = Literal["left", "right"]
Order = Literal["names", "times"]  # what gives the order of the views: their names, or when they were taken

MAX_LIKENESS_RATIO = 0.8  # rings have .03 to .5; views in random order .97 to 1.07
MIN_ORDERED_VIEWS = 12
RING_ELEVATIONS = (25.0, 10.0, 40.0)  # degrees, the first is tried both ways; the refinement corrects the rest
WAYS: tuple[Way, Way] = ("left", "right")
MAX_NUMBER_GAP = 4.0  # in median steps: larger gaps between the numbers of names are pauses, not missing views
LIKENESS_SIDE, LIKENESS_BLUR = 32, 1.0  # longer side of the compared images and blur, in pixels


def likeness_ratio(images: Tensor) -> float:
    """Return the median squared difference of consecutive images [V, 3, H, W] over that of all pairs."""
    size = target_size(min(LIKENESS_SIDE, max(images.shape[2:])), *images.shape[2:])
    small = gaussian_blur(resize_area(images, *size), LIKENESS_BLUR).flatten(1)
    squared = torch.cdist(small, small).square()
    pairs = squared[~torch.eye(len(small), dtype=torch.bool, device=small.device)]
    return float(squared.diagonal(1).median() / pairs.median().clamp_min(1e-9))


def find_order(scene: Scene) -> Order | None:
    """Return in which order the views of an object follow one another: consecutive ones are more alike than others."""
    if len(scene.images) < MIN_ORDERED_VIEWS:
        return None
    images = scene.images
    if scene.foreground is not None:
        images = recentre_scene(scene, foreground_offsets(scene.foreground)).images
    if likeness_ratio(images) < MAX_LIKENESS_RATIO:
        return "names"
    by_time = scene.times is not None and likeness_ratio(images[scene.times.argsort(stable=True)]) < MAX_LIKENESS_RATIO
    return "times" if by_time else None


def ring_azimuths(names: list[str], times: Tensor | None = None) -> Tensor:
    """Return azimuths [V] in degrees of views that are evenly spaced around an object, by the numbers of their names.

    Numbers that are missing leave gaps. Names without rising numbers, or with long gaps, count as one step each; so do
    views in the order of ``times`` [V], if given.
    """
    if times is not None:
        return (360 * times.argsort(stable=True).argsort() / len(names)).float()
    numbers = [re.findall(r"[0-9]+", name) for name in names]
    positions = torch.arange(len(names), dtype=torch.float64)
    if all(numbers):
        last = torch.tensor([float(found[-1]) for found in numbers], dtype=torch.float64)
        steps = last.diff()
        if (steps > 0).all() and steps.max() <= MAX_NUMBER_GAP * steps.median():
            positions = (last - last[0]) / steps.median()
    return (360 * positions / (positions[-1] + 1)).float()


def ring_directions(scene: Scene, way: Way, elevation: float) -> Tensor:
    """Return directions [V, 3] of an even ring at an elevation in degrees; "left" is counter-clockwise from above."""
    azimuths = ring_azimuths(scene.names, scene.times if find_order(scene) == "times" else None)
    return direction_vectors(azimuths if way == "left" else -azimuths, torch.full_like(azimuths, elevation))
