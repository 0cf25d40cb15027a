"""Camera paths through a found scene."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from factorkit.nerfdiff.cameras.poses import directions, orbit_poses
from factorkit.nerfdiff.stages.dictionary import directions_of
from factorkit.utils.errors import ConfigError

SWING = 15.0  # degrees a spiral rises and sinks around an object
SHIFT = 0.6  # of the cameras' own spread: how far a path of a forward-facing scene departs from their middle


def camera_path(kind: str, frames: int, found: Tensor, layout: str) -> Tensor:
    """Poses [frames, 4, 4] once around, at the height of the found cameras.

    Args:
        kind: "orbit" at one height, or "spiral", which rises and sinks on the way. Forward-facing scenes are circled
            before, looking ahead; their spiral also nears and leaves the scene.
        frames: at least 1.
        found: poses [V, 4, 4] of the views.
        layout: "object" or "forward".

    Raises:
        ConfigError: another kind, or no frames.
    """
    if kind not in ("orbit", "spiral"):
        raise ConfigError(f"path={kind!r} is unknown; give orbit, spiral or poses")
    if frames < 1:
        raise ConfigError(f"frames={frames}: give at least 1")
    turn = torch.arange(frames) * (2 * math.pi / frames)
    if layout == "forward":
        spread = found[:, :3, 3].std(0, correction=0)
        circle = torch.stack([turn.cos(), turn.sin(), (2 * turn).sin() if kind == "spiral" else 0 * turn], dim=1)
        poses = torch.eye(4).repeat(frames, 1, 1)
        poses[:, :3, 3] = found[:, :3, 3].mean(0) + SHIFT * spread * circle
        return poses
    height = directions_of(found)[:, 2].clamp(-1, 1).asin().rad2deg().mean()
    elevation = height + (SWING * (2 * turn).sin() if kind == "spiral" else 0 * turn)
    distance = found[:, :3, 3].norm(dim=1).mean()
    return orbit_poses(directions(turn.rad2deg(), elevation.clamp(-85, 85)), distance)
