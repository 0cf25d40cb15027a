"""Camera paths through a scene, for videos."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from factorkit.nerfdiff.cameras.poses import camera_directions, direction_vectors, orbit_poses
from factorkit.utils.errors import ConfigError

SPIRAL_DEGREES = 15.0  # by which the elevation of a spiral around an object varies
FORWARD_RADIUS = 0.6  # radius of a path in a forward-facing scene, in units of the cameras' standard deviation


def camera_path(kind: str, frames: int, poses: Tensor, layout: str) -> Tensor:
    """Return poses [frames, 4, 4] of a closed path at the mean elevation and distance of the views.

    Args:
        kind: "orbit" at one elevation, or "spiral", which varies it. In a forward-facing scene both are circles in the
            cameras' plane; the spiral also varies the depth.
        frames: at least 1.
        poses: of the views, [V, 4, 4].
        layout: "object" or "forward".

    Raises:
        ConfigError: unknown kind, or no frames.
    """
    if kind not in ("orbit", "spiral"):
        raise ConfigError(f"path={kind!r} is unknown; give orbit, spiral or poses")
    if frames < 1:
        raise ConfigError(f"frames={frames}: give at least 1")
    angle = torch.arange(frames) * (2 * math.pi / frames)
    wave = (2 * angle).sin() if kind == "spiral" else 0 * angle
    if layout == "forward":
        spread = poses[:, :3, 3].std(0, correction=0)
        circle = torch.stack([angle.cos(), angle.sin(), wave], dim=1)
        path = torch.eye(4).repeat(frames, 1, 1)
        path[:, :3, 3] = poses[:, :3, 3].mean(0) + FORWARD_RADIUS * spread * circle
        return path
    elevation = camera_directions(poses)[:, 2].clamp(-1, 1).asin().rad2deg().mean() + SPIRAL_DEGREES * wave
    distance = poses[:, :3, 3].norm(dim=1).mean()
    return orbit_poses(direction_vectors(angle.rad2deg(), elevation.clamp(-85, 85)), distance)
