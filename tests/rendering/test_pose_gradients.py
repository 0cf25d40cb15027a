"""Gradients of an image for the pose in SE(3), by finite differences through rays, march, field and composite."""

from __future__ import annotations

import pytest
import torch

from factorkit import ops
from factorkit.rendering import OccupancyGrid, OccupancySampling, UniformSampling, image_rays, look_at, render

LOWER, UPPER = (-1.0, -0.9, -0.8), (1.0, 1.1, 0.9)
K = torch.tensor([[9.0, 0, 3.2], [0, 9.0, 2.4], [0, 0, 1]], dtype=torch.float64)


def pose_of(twist):
    """The camera moved by a twist (rotation, translation) in its own frame: pose exp(twist)."""
    eye, target = torch.tensor([2.1, 1.2, 0.9]), torch.tensor([0.05, 0.0, 0.1])
    base = look_at(eye.double(), target.double(), torch.tensor([0.0, 0, 1]).double())
    (x, y, z), zero = twist[:3], twist.new_zeros(())
    rows = [torch.stack([zero, -z, y]), torch.stack([z, zero, -x]), torch.stack([-y, x, zero])]
    top = torch.cat([torch.stack(rows), twist[3:, None]], dim=1)
    return base @ torch.linalg.matrix_exp(torch.cat([top, torch.zeros_like(top[:1])]))


def bump(positions, directions, radius=0.7):
    """Smooth, and exactly nothing outside a ball: cutting empty cells away changes no value and no gradient."""
    inside = (1 - positions.square().sum(1) / radius**2).clamp_min(0)
    return 30 * inside**3, torch.sin(3 * positions + directions)


def cloud(positions, directions):
    """Density up to the faces of the box, so that where a ray enters matters."""
    return 1 + torch.sin(2 * positions).sum(1).square(), torch.cos(2 * positions + directions)


def occupied(seed):
    grid = OccupancyGrid(LOWER, UPPER, resolution=16, threshold=0.0, levels=2)
    grid.update(lambda points: bump(points, points, radius=0.95)[0])  # wider: whole cells around the ball
    assert 0.05 < grid.share_occupied()[0] < 0.9
    return bump, OccupancySampling(grid, step=0.04, near=0.1), seed


def hash_field():
    """A field of the hash grid: gradients through its coordinates."""
    torch.manual_seed(0)
    resolutions = [3, 6, 11]
    table = torch.randn(3, 256, 2, dtype=torch.float64)

    def field(positions, directions):
        features = ops.hash_grid(positions / 4 + 0.5, table, resolutions, interpolation="quintic")
        return features[:, :3].sum(1).square(), ops.frequency(features[:, 3:], 1)[:, :3] + directions

    return field


CASES = {
    "packed": lambda: occupied(None),
    "packed, jittered": lambda: occupied(7),
    "dense": lambda: (cloud, UniformSampling(LOWER, UPPER, num_samples=24), None),
    "dense, jittered": lambda: (cloud, UniformSampling(LOWER, UPPER, num_samples=24), 7),
    "hash grid": lambda: (hash_field(), UniformSampling(LOWER, UPPER, num_samples=24), 3),
}


@pytest.mark.parametrize("name", CASES)
def test_render_pose_gradient_equals_finite_differences(name):
    field, sampling, seed = CASES[name]()
    torch.manual_seed(1)
    weights = [torch.randn(5, 6, 3).double(), torch.randn(5, 6).double(), torch.randn(5, 6).double()]

    def loss(twist, intrinsics=K):
        seen = render(field, image_rays(pose_of(twist), intrinsics, 5, 6), sampling, seed=seed)
        assert seen.opacity.max() > 0.5
        outputs = (seen.color, seen.depth, seen.opacity)
        return sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))

    twist, intrinsics = torch.zeros(6, dtype=torch.float64, requires_grad=True), K.clone().requires_grad_()
    found, found_k = torch.autograd.grad(loss(twist, intrinsics), (twist, intrinsics))
    h = 1e-5
    with torch.no_grad():
        steps = h * torch.eye(6, dtype=torch.float64)
        wanted = torch.stack([(loss(step) - loss(-step)) / (2 * h) for step in steps])
        for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)):
            step = torch.zeros_like(K)
            step[i, j] = h
            want = (loss(twist, K + step) - loss(twist, K - step)) / (2 * h)
            torch.testing.assert_close(found_k[i, j], want, rtol=1e-5, atol=1e-6)
    assert wanted.abs().min() > 1e-3  # every direction of SE(3) moves the image
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_render_pose_gradient_descent_recovers_the_pose():
    """A camera that is off by several degrees walks back to where the image was taken."""
    field, sampling, _ = occupied(None)
    with torch.no_grad():
        target = render(field, image_rays(pose_of(torch.zeros(6).double()), K, 5, 6), sampling).color
    twist = torch.tensor([0.05, -0.08, 0.06, 0.1, -0.1, 0.1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([twist], lr=0.5, max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        error = (render(field, image_rays(pose_of(twist), K, 5, 6), sampling).color - target).square().sum()
        error.backward()
        return error

    optimiser.step(closure)
    assert twist.abs().max() < 1e-3
