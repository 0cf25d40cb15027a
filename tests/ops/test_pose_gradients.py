"""A camera's pose has the gradient that finite differences in SE(3) give, through march, field and composite."""

from __future__ import annotations

import torch

from factorkit import ops


def camera_rays(pose: torch.Tensor, side: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays of a pinhole camera that looks along -z, from its camera-to-world matrix [4, 4]."""
    line = torch.linspace(-0.4, 0.4, side, dtype=pose.dtype)
    y, x = torch.meshgrid(line, line, indexing="ij")
    local = torch.stack([x, -y, -torch.ones_like(x)], -1).reshape(-1, 3)
    return pose[:3, 3].expand_as(local), local @ pose[:3, :3].T


def moved(pose: torch.Tensor, twist: torch.Tensor) -> torch.Tensor:
    """exp(twist) pose, twist = (rotation, translation)."""
    w, v = twist[:3], twist[3:]
    zero = torch.zeros((), dtype=pose.dtype)
    rows = [zero, -w[2], w[1], v[0], w[2], zero, -w[0], v[1], -w[1], w[0], zero, v[2], zero, zero, zero, zero]
    return torch.linalg.matrix_exp(torch.stack(rows).reshape(4, 4)) @ pose


def field(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two soft blobs and a colour that varies in space."""
    one, two = (points - points.new_tensor(c) for c in ([0.2, 0.1, 0.0], [-0.3, -0.2, 0.3]))
    sigma = 6 * torch.exp(-8 * one.square().sum(-1)) + 4 * torch.exp(-12 * two.square().sum(-1))
    return sigma, torch.sigmoid(3 * points @ points.new_tensor([[1, 0.5, -1], [0, 2, 1], [-1, 1, 0]]))


def test_gradient_of_the_pose():
    torch.manual_seed(0)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, 3] = torch.tensor([0.1, -0.05, 2.5])
    cells = torch.rand(1, 16**3 // 8)
    occupancy = torch.where(cells < 0.1, 0, 255).to(torch.uint8)
    background = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    target = torch.rand(36, 3, dtype=torch.float64)

    def loss(twist: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        origins, directions = camera_rays(moved(pose, twist))
        near, far = origins.new_full((36,), 1.0), origins.new_full((36,), 4.0)
        s = ops.march_rays(origins, directions, near, far, occupancy, [-1] * 3, [1] * 3, step=0.03, seed=1)
        middle = (s.t_start + s.t_end)[:, None] / 2
        sigma, rgb = field(origins[s.ray] + middle * directions[s.ray])
        out = ops.composite(sigma, rgb, s.t_start, s.t_end, s.ray_offsets, background=background, distortion=True)
        value = (out.color - target).square().sum() + 0.1 * out.depth.square().sum() + out.opacity.sum()
        return value + 0.1 * out.distortion.sum(), s.t_start

    twist = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    value, at = loss(twist)
    (gradient,) = torch.autograd.grad(value, twist)
    assert len(at) > 500
    eps = 1e-6
    for axis in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[axis] = eps
        (up, t_up), (down, t_down) = loss(step), loss(-step)
        assert torch.equal(t_up, at) and torch.equal(t_down, at)  # no sample came or went within this step
        torch.testing.assert_close(gradient[axis], (up - down) / (2 * eps), rtol=1e-6, atol=1e-7)
    assert (gradient.abs() > 1e-2).all()
