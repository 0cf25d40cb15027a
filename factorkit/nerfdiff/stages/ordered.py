"""Starts for captures in order: the views on one even ring around the object, in the order of their names."""

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


def are_ordered(scene: Scene) -> bool:
    """Return whether the views of an object follow one another: consecutive ones are more alike than others."""
    if scene.foreground is not None:
        scene = recentre_scene(scene, foreground_offsets(scene.foreground))
    return len(scene.images) >= MIN_ORDERED_VIEWS and likeness_ratio(scene.images) < MAX_LIKENESS_RATIO


def ring_azimuths(names: list[str]) -> Tensor:
    """Return azimuths [V] in degrees of views that are evenly spaced around an object, by the numbers of their names.

    Numbers that are missing leave gaps. Names without rising numbers, or with long gaps, count as one step each.
    """
    numbers = [re.findall(r"[0-9]+", name) for name in names]
    positions = torch.arange(len(names), dtype=torch.float64)
    if all(numbers):
        last = torch.tensor([float(found[-1]) for found in numbers], dtype=torch.float64)
        steps = last.diff()
        if (steps > 0).all() and steps.max() <= MAX_NUMBER_GAP * steps.median():
            positions = (last - last[0]) / steps.median()
    return (360 * positions / (positions[-1] + 1)).float()


def ring_directions(names: list[str], way: Way, elevation: float) -> Tensor:
    """Return directions [V, 3] of an even ring at an elevation in degrees; "left" is counter-clockwise from above."""
    azimuths = ring_azimuths(names)
    return direction_vectors(azimuths if way == "left" else -azimuths, torch.full_like(azimuths, elevation))
