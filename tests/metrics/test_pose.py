"""Alignment and pose errors: exact answers for moved poses, outliers that have no say, and places without an answer."""

from __future__ import annotations

import pytest
import roma
import torch

from factorkit.metrics.pose import (
    Similarity,
    align_poses,
    is_mirrored,
    pose_errors,
    rotation_errors_degrees,
    scene_size,
    share_under_10_degrees,
)
from factorkit.rendering import look_at, orbit
from factorkit.utils.errors import DataError


def random_similarity(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rotation = roma.rotvec_to_rotmat(2 * torch.randn(3, dtype=torch.float64, generator=generator))
    return Similarity(rotation, torch.randn(3, dtype=torch.float64, generator=generator), torch.tensor(2.7).double())


def object_poses(count=20, seed=0):
    eye = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    up = torch.tensor([0.0, 0, 1]).double()
    return look_at(4 * torch.nn.functional.normalize(eye, dim=1), torch.zeros(3).double(), up)


def forward_poses(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    poses[:, :3, :3] = roma.rotvec_to_rotmat(0.1 * torch.randn(count, 3, dtype=torch.float64, generator=generator))
    poses[:, :3, 3] = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return poses


def rotate_poses(poses, degrees, axis=(0.0, 0.0, 1.0)):
    """About an axis through the origin, cameras and all."""
    vector = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float64)) * torch.tensor(axis).double()
    moved = poses.clone()
    moved[:, :3] = roma.rotvec_to_rotmat(vector) @ poses[:, :3]
    return moved


@pytest.mark.parametrize("poses", [object_poses(), forward_poses(), object_poses(2), forward_poses(2)])
def test_align_poses_similar_poses_recovers_the_similarity(poses):
    moved = random_similarity()
    found = align_poses(moved.apply(poses), poses)
    for part, expected in zip(found, moved.inverse(), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-7, rtol=1e-7)
    errors = pose_errors(moved.apply(poses), poses)
    assert errors.rotation_degrees.max() < 1e-4 and errors.translation.max() < 1e-7
    assert errors.under_10_deg == 1.0


def test_similarity_inverse_undoes_apply():
    moved, poses = random_similarity(), object_poses()
    torch.testing.assert_close(moved.inverse().apply(moved.apply(poses)), poses)
    there = moved.apply(poses)
    torch.testing.assert_close(there[:, :3, :3].mT @ there[:, :3, :3], torch.eye(3).double().expand(20, 3, 3))
    # A point one unit before a camera lands `scale` units before the moved camera.
    points = poses[:, :3, 3] - poses[:, :3, 2]
    torch.testing.assert_close(moved.apply_points(points), there[:, :3, 3] - 2.7 * there[:, :3, 2])
    assert moved.apply(poses.float()).dtype == torch.float32


def test_pose_errors_reversed_views_do_not_affect_the_rest():
    poses = object_poses(40)
    found = poses.clone()
    found[:14] = rotate_poses(poses[:14], 180.0)
    errors = pose_errors(random_similarity().apply(found), poses)
    assert errors.rotation_degrees[14:].max() < 1e-3
    assert errors.translation[14:].max() < 1e-5
    torch.testing.assert_close(errors.rotation_degrees[:14], torch.full((14,), 180.0).double(), atol=1e-3, rtol=0)
    assert errors.under_10_deg == pytest.approx(26 / 40)
    assert errors.rotation_median_deg < 1e-3


def test_pose_errors_with_outliers_measures_the_noise_of_inliers():
    poses, generator = object_poses(50), torch.Generator().manual_seed(3)
    small = roma.rotvec_to_rotmat(0.01 * torch.randn(50, 3, dtype=torch.float64, generator=generator))
    found = poses.clone()
    found[:, :3] = small @ poses[:, :3]
    found[:15] = object_poses(15, seed=9)
    errors = pose_errors(random_similarity(5).apply(found), poses)
    own = torch.rad2deg(roma.rotmat_geodesic_distance(small, torch.eye(3).double().expand(50, 3, 3)))
    # What is left is the noise that was put in, up to how well 35 views tell the alignment.
    assert (errors.rotation_degrees[15:] - own[15:]).abs().max() < 0.5
    assert errors.alignment.scale.item() == pytest.approx(1 / 2.7, rel=0.02)


def test_rotation_errors_known_angles_are_in_degrees():
    poses = object_poses(3)
    found = torch.stack([poses[0], rotate_poses(poses[1:2], 35.0)[0], rotate_poses(poses[2:], 180.0, (1.0, 0, 0))[0]])
    expected = torch.tensor([0.0, 35.0, 180.0]).double()
    torch.testing.assert_close(rotation_errors_degrees(found, poses), expected, atol=1e-5, rtol=0)
    assert share_under_10_degrees(torch.tensor([9.9, 10.1, 0.0, 50.0])) == 0.5


def test_pose_errors_translation_is_in_units_of_the_scene():
    poses = torch.eye(4).repeat(9, 1, 1).double()
    poses[:, 0, 3] = torch.linspace(0, 8, 9)
    found = poses.clone()
    found[4, 1, 3] = 2.0
    assert scene_size(poses) == pytest.approx(8)
    errors = pose_errors(found, poses)
    assert errors.translation[4].item() == pytest.approx(2 / 8, rel=1e-3)
    assert errors.translation[[0, 1, 2, 3, 5, 6, 7, 8]].max() < 1e-3
    assert pose_errors(found, poses, size=1.0).translation[4].item() == pytest.approx(2, rel=1e-3)


def test_align_poses_rotation_only_keeps_origin_and_scale():
    poses = object_poses()
    found = align_poses(rotate_poses(poses, 73.0), poses, "rotation")
    torch.testing.assert_close(found.rotation, rotate_poses(torch.eye(4).double()[None], -73.0)[0, :3, :3])
    assert found.scale == 1 and not found.translation.any()
    # What no rotation about the origin takes away stays as an error.
    farther = poses.clone()
    farther[:, :3, 3] *= 1.5
    assert pose_errors(farther, poses, "rotation", size=4.0).translation.median().item() == pytest.approx(0.5, abs=1e-6)
    assert pose_errors(farther, poses).translation.max() < 1e-7


def test_align_poses_one_camera_is_exact():
    poses = object_poses(1)
    errors = pose_errors(random_similarity().apply(poses), poses)
    assert errors.rotation_degrees.item() < 1e-5 and errors.translation.item() < 1e-9
    assert errors.alignment.scale == 1


def test_align_poses_collinear_cameras_is_exact():
    poses = torch.eye(4).repeat(6, 1, 1).double()
    poses[:, 0, 3] = torch.linspace(-1, 1, 6)
    errors = pose_errors(random_similarity(2).apply(poses), poses)
    assert errors.rotation_degrees.max() < 1e-4 and errors.translation.max() < 1e-7


def test_align_poses_coincident_cameras_is_finite():
    poses = forward_poses()
    found = poses.clone()
    found[:, :3, 3] = torch.tensor([3.0, 1.0, 2.0])
    errors = pose_errors(found, poses)
    assert errors.alignment.scale == 1
    assert errors.rotation_degrees.max() < 1e-3
    assert 0.1 < errors.translation.median() < 1
    both = pose_errors(found, found)
    assert both.translation.max() < 1e-9 and both.rotation_degrees.max() < 1e-5


def test_pose_errors_mirrored_arrangement_is_large():
    poses = object_poses(30)
    flip = torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0])).double()
    errors = pose_errors(flip @ poses @ torch.diag(torch.tensor([-1.0, 1, 1, 1])).double(), poses)
    assert errors.rotation_median_deg > 10
    assert errors.alignment.scale > 0 and torch.linalg.det(errors.alignment.rotation) > 0


def test_is_mirrored_depth_reversed_scene_is_true():
    """Orthographic images of points and of their mirror image, each by its own cameras, are the same."""
    poses = object_poses(30)
    points = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    flip, inwards = torch.diag(torch.tensor([1.0, 1.0, -1.0])).double(), torch.eye(4).double()
    inwards[2, 2] = -1
    wrong = poses @ inwards  # x right, y up as before, and z as it must not be ...
    wrong[:, :3, :3] = flip @ wrong[:, :3, :3]  # ... unless the world is mirrored, too
    wrong[:, :3, 3] = 4 * wrong[:, :3, 2]
    images = torch.einsum("vji,pj->vpi", poses[:, :3, :2], points)
    torch.testing.assert_close(torch.einsum("vji,pj->vpi", wrong[:, :3, :2], points @ flip), images)
    assert torch.linalg.det(wrong[:, :3, :3]).min() > 0
    assert is_mirrored(random_similarity().apply(wrong), poses)
    assert not is_mirrored(random_similarity().apply(poses), poses)
    assert not is_mirrored(object_poses(30, seed=8), poses)
    assert pose_errors(wrong, poses).rotation_median_deg > 30


def test_align_poses_reversed_centres_keeps_scale_positive():
    poses = forward_poses()
    found = poses.clone()
    found[:, :3, 3] *= -1
    errors = pose_errors(found, poses)
    assert errors.alignment.scale > 0 and errors.translation.median() > 0.1


def test_pose_errors_collapsed_poses_are_large():
    poses = orbit(24, 4.0, 30.0).double()
    errors = pose_errors(poses[:1].expand(24, 4, 4), poses)
    assert errors.under_10_deg < 0.2 and errors.rotation_median_deg > 30


@pytest.mark.parametrize("found", [torch.eye(4).expand(3, 4, 4), torch.eye(3).expand(2, 3, 3), torch.zeros(0, 4, 4)])
def test_align_poses_invalid_shapes_raise(found):
    with pytest.raises(DataError, match=r"\[V, 4, 4\]"):
        align_poses(found, torch.eye(4).expand(2, 4, 4) if len(found) else found)


def test_align_poses_nonfinite_values_raise():
    with pytest.raises(DataError, match="not finite"):
        align_poses(torch.full((2, 4, 4), torch.nan), torch.eye(4).expand(2, 4, 4))
