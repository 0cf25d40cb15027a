"""Two-view geometry compared with OpenCV, with projected points, and with its own definitions."""

from __future__ import annotations

import pytest
import roma
import torch

from factorkit.metrics.epipolar import (
    epipolar_distance,
    epipolar_lines,
    essential_matrix,
    fit_fundamental,
    fundamental_matrix,
    projection_matrix,
    sampson_distance,
    triangulate,
)
from factorkit.rendering import look_at
from factorkit.utils.errors import DataError

K = torch.tensor([[500.0, 0, 320], [0, 480, 250], [0, 0, 1]], dtype=torch.float64)


def random_views(count=2, num_points=40, seed=0):
    """Cameras around a cloud of points: poses [V, 4, 4], points [P, 3], pixels [V, P, 2]."""
    generator = torch.Generator().manual_seed(seed)
    eye = torch.tensor([0.0, -4, 1]).double() + 0.7 * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    poses = look_at(eye, torch.zeros(3).double(), torch.tensor([0.1, 0, 1]).double())
    points = 0.6 * torch.randn(num_points, 3, dtype=torch.float64, generator=generator)
    return poses, points, project(poses, points)


def project(poses, points):
    homogeneous = torch.nn.functional.pad(points, (0, 1), value=1.0) @ projection_matrix(poses, K).mT
    return homogeneous[..., :2] / homogeneous[..., 2:]


def test_projection_matrix_point_above_and_right_is_right_and_above_the_centre():
    pose = look_at(torch.tensor([0.0, 0, 5]), torch.zeros(3), torch.tensor([0.0, 1, 0])).double()
    pixel = project(pose, torch.tensor([[1.0, 0.5, 0]]).double())[0]
    torch.testing.assert_close(pixel, torch.tensor([320 + 500 / 5, 250 - 480 * 0.5 / 5]).double())


def test_fundamental_matrix_of_projected_points_is_zero_on_matches():
    poses, _, pixels = random_views()
    fundamental = fundamental_matrix(poses[0], K, poses[1], K)
    assert epipolar_distance(fundamental, *pixels).max() < 1e-9
    assert sampson_distance(fundamental, *pixels).max() < 1e-9
    assert epipolar_distance(fundamental, pixels[0], pixels[1] + 20).median() > 1
    rays = [torch.nn.functional.pad(p, (0, 1), value=1.0) @ torch.linalg.inv(K).T for p in pixels]
    assert ((rays[1] @ essential_matrix(*poses)) * rays[0]).sum(-1).abs().max() < 1e-12
    scales = torch.linalg.svdvals(essential_matrix(*poses))
    torch.testing.assert_close(scales, scales[0] * torch.tensor([1.0, 1, 0]).double())


def test_fundamental_matrix_exact_matches_agrees_with_opencv():
    cv2 = pytest.importorskip("cv2", reason="the extra `baselines`")
    poses, _, pixels = random_views(seed=5)
    other = torch.from_numpy(cv2.findFundamentalMat(pixels[0].numpy(), pixels[1].numpy(), cv2.FM_8POINT)[0])
    # In units of the focal length, since the entries for pixels differ by orders of magnitude.
    ours, other = (K.T @ f @ K for f in (fundamental_matrix(poses[0], K, poses[1], K), other))
    ours, other = ours / ours.norm(), other / other.norm()
    torch.testing.assert_close(other * (other * ours).sum().sign(), ours, atol=1e-4, rtol=0)


def test_essential_matrix_noisy_points_agrees_with_opencv_recover_pose():
    cv2 = pytest.importorskip("cv2", reason="the extra `baselines`")
    poses, _, pixels = random_views(seed=3)
    _, rotation, translation, _ = cv2.recoverPose(
        essential_matrix(*poses).numpy(), *(p.numpy() for p in pixels), K.numpy()
    )
    axes = torch.tensor([1.0, -1, -1]).double()
    first, second = poses[0, :3, :3] * axes, poses[1, :3, :3] * axes
    torch.testing.assert_close(torch.from_numpy(rotation), second.T @ first)
    expected = second.T @ (poses[0, :3, 3] - poses[1, :3, 3])
    torch.testing.assert_close(torch.from_numpy(translation)[:, 0], expected / expected.norm())


def test_distances_noisy_points_agree_with_opencv():
    cv2 = pytest.importorskip("cv2", reason="the extra `baselines`")
    poses, _, pixels = random_views(seed=1)
    fundamental = fundamental_matrix(poses[0], K, poses[1], K)
    noisy = pixels + torch.randn(pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lines = [
        torch.from_numpy(cv2.computeCorrespondEpilines(p.numpy()[:, None], i + 1, fundamental.numpy()))[:, 0]
        for i, p in enumerate(noisy)
    ]
    ours = epipolar_lines(fundamental, noisy[0])
    torch.testing.assert_close(ours / ours[:, :2].norm(dim=1, keepdim=True), lines[0])
    ends = [
        (torch.nn.functional.pad(p, (0, 1), value=1.0) * line).sum(1).abs()
        for p, line in zip(noisy, lines[::-1], strict=True)
    ]
    torch.testing.assert_close(epipolar_distance(fundamental, *noisy), (ends[0] + ends[1]) / 2)
    homogeneous = torch.nn.functional.pad(noisy, (0, 1), value=1.0).numpy()
    expected = [
        cv2.sampsonDistance(x[:, None], y[:, None], fundamental.numpy()) for x, y in zip(*homogeneous, strict=True)
    ]
    torch.testing.assert_close(sampson_distance(fundamental, *noisy) ** 2, torch.tensor(expected).double())


@pytest.mark.parametrize("count", [8, 40])
def test_fit_fundamental_exact_matches_recovers_the_matrix(count):
    poses, _, pixels = random_views(num_points=count)
    expected = fundamental_matrix(poses[0], K, poses[1], K)
    expected, fitted = expected / expected.norm(), fit_fundamental(*pixels)
    torch.testing.assert_close(fitted * (fitted * expected).sum().sign(), expected, atol=1e-8, rtol=1e-6)


def test_fit_fundamental_noisy_matches_agrees_with_opencv():
    cv2 = pytest.importorskip("cv2", reason="the extra `baselines`")
    _, _, pixels = random_views(seed=2)
    noisy = pixels + 0.5 * torch.randn(pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fitted = fit_fundamental(*noisy)
    other = torch.from_numpy(cv2.findFundamentalMat(noisy[0].numpy(), noisy[1].numpy(), cv2.FM_8POINT)[0])
    assert torch.linalg.det(fitted).abs() < 1e-12
    torch.testing.assert_close(
        epipolar_distance(fitted, *noisy), epipolar_distance(other, *noisy), atol=0.02, rtol=0.02
    )


@pytest.mark.parametrize("shapes", [((7, 2), (7, 2)), ((9, 2), (8, 2)), ((9, 3), (9, 3))])
def test_fit_fundamental_wrong_points_are_refused(shapes):
    with pytest.raises(DataError, match="P at least 8"):
        fit_fundamental(*(torch.zeros(s) for s in shapes))


def test_triangulate_projected_points_recovers_them():
    poses, points, pixels = random_views(count=3)
    torch.testing.assert_close(triangulate(projection_matrix(poses, K), pixels.transpose(0, 1)), points)


def test_triangulate_noisy_points_agrees_with_opencv():
    cv2 = pytest.importorskip("cv2", reason="the extra `baselines`")
    poses, points, pixels = random_views(seed=4)
    noisy = pixels + 0.5 * torch.randn(pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projections = projection_matrix(poses, K)

    def triangulate_with_opencv(first, second):
        homogeneous = torch.from_numpy(cv2.triangulatePoints(*projections.numpy(), first.T.numpy(), second.T.numpy()))
        return (homogeneous[:3] / homogeneous[3]).T

    torch.testing.assert_close(triangulate(projections, pixels.transpose(0, 1)), triangulate_with_opencv(*pixels))
    ours, expected = triangulate(projections, noisy.transpose(0, 1)), triangulate_with_opencv(*noisy)
    # Ours weights both views alike, so that noise moves the points a little differently.
    assert (ours - expected).norm(dim=1).median() < 0.1 * (expected - points).norm(dim=1).median()


def test_essential_matrix_cameras_in_one_place_has_no_lines():
    poses, _, pixels = random_views()
    turned = poses[0].clone()
    turned[:3, :3] = roma.rotvec_to_rotmat(torch.tensor([0.0, 0.1, 0]).double()) @ turned[:3, :3]
    fundamental = fundamental_matrix(poses[0], K, turned, K)
    assert (
        epipolar_distance(fundamental, *pixels).isinf().all() and sampson_distance(fundamental, *pixels).isinf().all()
    )


def test_sampson_distance_gradcheck():
    poses, _, pixels = random_views(num_points=4)
    noisy = pixels + 1.5

    def distance(first, second):
        return sampson_distance(fundamental_matrix(first, K, second, K), *noisy)

    assert torch.autograd.gradcheck(distance, [pose.clone().requires_grad_() for pose in poses])
