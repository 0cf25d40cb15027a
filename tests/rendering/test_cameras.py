"""Rays against a projection written by hand, and gradients to pose, intrinsics and pixels."""

from __future__ import annotations

import math

import pytest
import torch

from factorkit.rendering import image_rays, intrinsics_from_fov, look_at, orbit, pixel_rays


def random_pose(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = q * q.det().sign()
    pose[:3, 3] = torch.randn(3, dtype=torch.float64, generator=generator)
    return pose


K = torch.tensor([[80.0, 0, 33], [0, 90.0, 20], [0, 0, 1]], dtype=torch.float64)


def test_pixel_rays_points_project_back_to_their_pixels():
    pose, pixels = random_pose(), torch.rand(50, 2, dtype=torch.float64) * 60
    rays = pixel_rays(pose, K, pixels)
    torch.testing.assert_close(rays.directions.norm(dim=1), torch.ones(50, dtype=torch.float64))
    points = rays.origins + 3.7 * rays.directions
    local = (points - pose[:3, 3]) @ pose[:3, :3]
    assert (local[:, 2] < 0).all()  # before the camera, which looks along -z
    right = 33 + 80 * local[:, 0] / -local[:, 2]
    down = 20 - 90 * local[:, 1] / -local[:, 2]
    torch.testing.assert_close(torch.stack([right, down], 1), pixels)


def test_image_rays_pass_through_pixel_centres():
    poses = torch.stack([random_pose(1), random_pose(2)])
    rays = image_rays(poses, K, 3, 4)
    assert rays.origins.shape == rays.directions.shape == (2, 3, 4, 3)
    single = pixel_rays(poses[1], K, torch.tensor([[2.5, 1.5]], dtype=torch.float64))
    torch.testing.assert_close(rays.directions[1, 1, 2], single.directions[0])
    torch.testing.assert_close(rays.origins[1, 1, 2], poses[1, :3, 3])


def test_pixel_rays_gradients_reach_all_inputs():
    pose, k = random_pose()[:3].requires_grad_(), K.clone().requires_grad_()
    pixels = (torch.rand(4, 2, dtype=torch.float64) * 60).requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: tuple(pixel_rays(*v)), (pose, k, pixels))


def test_intrinsics_from_fov_spans_the_longer_side():
    k = intrinsics_from_fov(60.0, 48, 96)
    edges = pixel_rays(torch.eye(4), k, torch.tensor([[0.0, 24.0], [96.0, 24.0], [48.0, 24.0]])).directions
    angle = torch.rad2deg(torch.acos((edges[0] * edges[1]).sum()))
    assert angle.item() == pytest.approx(60, abs=1e-3)
    torch.testing.assert_close(edges[2], torch.tensor([0.0, 0.0, -1.0]))


def test_look_at_faces_the_target_with_up_upwards():
    eye, target = torch.tensor([1.0, 2, 3]), torch.tensor([-1.0, 0.5, 0])
    pose = look_at(eye, target, torch.tensor([0.0, 0, 1]))
    torch.testing.assert_close(pose[:3, :3].T @ pose[:3, :3], torch.eye(3))
    assert pose[:3, :3].det().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(-pose[:3, 2], (target - eye) / (target - eye).norm())
    assert pose[2, 1] > 0 and abs(pose[2, 0]) < 1e-6  # up is up, right is level
    with pytest.raises(ValueError, match="give another `up`"):
        look_at(torch.tensor([0.0, 0, 1]), torch.zeros(3), torch.tensor([0.0, 0, 1]))


def test_orbit_keeps_radius_and_elevation():
    poses = orbit(8, 3.0, 30.0)
    torch.testing.assert_close(poses[:, :3, 3].norm(dim=1), torch.full((8,), 3.0))
    torch.testing.assert_close(poses[:, 2, 3], torch.full((8,), 3 * math.sin(math.radians(30))))
    centre = poses[:, :3, 3] - 3 * poses[:, :3, 2]
    torch.testing.assert_close(centre, torch.zeros(8, 3), atol=1e-5, rtol=0)


def test_cameras_invalid_shapes_raise():
    with pytest.raises(ValueError, match=r"camera_to_world has shape \(3, 3\); give \[..., 3, 4\] or \[..., 4, 4\]"):
        pixel_rays(torch.eye(3), K, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"intrinsics has shape \(4, 4\)"):
        pixel_rays(torch.eye(4), torch.eye(4), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"pixels has shape \(2,\)"):
        pixel_rays(torch.eye(4), K, torch.zeros(2))
