"""A made-up forward-facing scene whose surfaces are known: a striped ball before a wall."""

from __future__ import annotations

import torch

from factorkit.data.views.views import Views
from factorkit.nerfdiff.cameras.poses import forward_facing_poses, position_grid
from factorkit.nerfdiff.rays import CameraModel, render_views

CAMERA = CameraModel(
    torch.tensor([[0.9, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]]), torch.tensor([0.0, 0.0, 1.0]), forward_facing=True
)
CENTRE, RADIUS = torch.tensor([0.2, -0.1, -2.5]), 0.5
WALL = 5.0  # its depth


def ball_and_wall(positions, directions, wall=WALL):
    """A field over the box: asked where a place is in the world."""
    world = CAMERA.from_ndc(positions)
    ball = (world - CENTRE).norm(dim=1) < RADIUS
    behind = world[:, 2] < -wall
    stripes = (world[:, :1] * 4).floor() % 2
    color = torch.where(ball[:, None], torch.tensor([1.0, 0.2, 0.0]) * (0.4 + 0.6 * stripes), 0.2 + 0.6 * stripes)
    return 400.0 * (ball | behind), color.expand(-1, 3)


def ball_alone(positions, directions):
    """The ball without stripes, before nothing."""
    density, color = ball_and_wall(positions, directions, wall=1e9)
    return density, torch.tensor([1.0, 0.2, 0.0]).expand(len(color), 3)


def forward_views(field=ball_and_wall, size=(18, 24), columns=4, rows=3) -> Views:
    """The scene seen by cameras on a lattice in their plane."""
    poses = forward_facing_poses(position_grid(columns, rows))
    images = render_views(field, poses, CAMERA, size, 256).color.movedim(-1, 1).clamp(0, 1)
    names = [f"view_{i:02d}" for i in range(len(poses))]
    k = CAMERA.pixel_intrinsics(*size).expand(len(poses), 3, 3)
    return Views(images, names, k, poses=poses, layout="forward", background=CAMERA.background)
