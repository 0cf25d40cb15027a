from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from factorkit.nerfdiff.cameras.normalise import center_poses
from factorkit.nerfdiff.cameras.poses import (
    FreePoses,
    OrbitPoses,
    SharedMotion,
    azimuth_degrees,
    direction_grid,
    direction_vectors,
    dolly_poses,
    fibonacci_band,
    framing_distance,
    orbit_poses,
    rodrigues_poses,
    rotate_about_z,
    rotate_poses_about_z,
)
from factorkit.rendering import pixel_rays


def rigid(pose: torch.Tensor) -> bool:
    turn = pose[..., :3, :3]
    return torch.allclose(turn.mT @ turn, torch.eye(3).to(pose), atol=1e-5) and bool((torch.linalg.det(turn) > 0).all())


def test_rodrigues_poses_match_scipy_and_are_differentiable_at_zero():
    numbers = torch.randn(50, 6, dtype=torch.float64) * 2
    poses = rodrigues_poses(numbers)
    assert torch.allclose(poses[:, :3, :3], torch.from_numpy(Rotation.from_rotvec(numbers[:, :3].numpy()).as_matrix()))
    assert torch.equal(poses[:, :3, 3], numbers[:, 3:])
    still = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(rodrigues_poses(still)[0], torch.eye(4, dtype=torch.float64))
    (slope,) = torch.autograd.grad(rodrigues_poses(still)[0, 2, 1], still)
    assert slope[0].tolist() == pytest.approx([1, 0, 0, 0, 0, 0])
    half = torch.tensor([[math.pi, 0, 0, 0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(rodrigues_poses(half)[0, :3, :3], torch.diag(torch.tensor([1.0, -1, -1])).double())


def test_orbit_poses_look_at_the_origin_upright():
    directions = direction_vectors(torch.rand(30) * 360, torch.rand(30) * 170 - 85)
    poses = orbit_poses(directions, 3.0)
    assert rigid(poses) and torch.allclose(poses[:, :3, 3], 3 * directions, atol=1e-5)
    assert torch.allclose(poses[:, :3, 2], directions, atol=1e-5)  # backward axis
    assert poses[:, 2, 0].abs().max() < 1e-5 and (poses[:, 2, 1] > 0).all()  # right is level, up is up
    length = orbit_poses(directions * 7, 3.0)
    assert torch.allclose(length, poses, atol=1e-5), "a direction's length says nothing"


def test_orbit_poses_match_scipy_euler_angles():
    """Azimuth and elevation as Euler angles: tipped from straight down, then turned about z."""
    azimuth = torch.tensor([0.0, 90, 180, 270, 359.9, *(torch.rand(20) * 360).tolist()]).double()
    elevation = torch.tensor([0.0, -89.9, 89.9, 45, -30, *(torch.rand(20) * 170 - 85).tolist()]).double()
    angles = torch.stack([azimuth + 90, 90 - elevation], 1).numpy()
    wanted = torch.from_numpy(Rotation.from_euler("ZX", angles, degrees=True).as_matrix())
    assert torch.allclose(orbit_poses(direction_vectors(azimuth, elevation), 2.0)[:, :3, :3], wanted, atol=1e-9)


def test_orbit_poses_at_the_zenith_is_refused_and_near_it_has_a_gradient():
    with pytest.raises(ValueError, match="along `up`"):
        orbit_poses(torch.tensor([0.0, 0, 1]), 1.0)
    near = torch.tensor([1e-4, 0, 1], requires_grad=True)
    orbit_poses(near, 1.0).square().sum().backward()
    assert near.grad.isfinite().all()


def test_orbit_poses_offsets_move_the_named_parameter():
    directions = direction_vectors(torch.tensor([40.0]), torch.tensor([20.0]))
    plain = orbit_poses(directions, 2.0)[0]
    rolled = orbit_poses(directions, 2.0, {"roll": torch.tensor([0.3])})[0]
    assert torch.allclose(rolled[:3, 2:], plain[:3, 2:], atol=1e-6)
    assert torch.allclose(plain[:3, 0] @ rolled[:3, 0], torch.tensor(0.3).cos(), atol=1e-6)
    assert float(plain[:3, 1] @ rolled[:3, 0]) == pytest.approx(math.sin(0.3), abs=1e-6)
    aside = orbit_poses(directions, 2.0, {"aim": torch.tensor([[0.1, -0.2]])})[0]
    assert torch.allclose(aside[:3, 3] - plain[:3, 3], 0.2 * plain[:3, 0] - 0.4 * plain[:3, 1], atol=1e-6)
    far = orbit_poses(directions, 2.0, {"distance": torch.tensor([0.5])})[0]
    assert torch.allclose(far[:3, 3], plain[:3, 3] * math.exp(0.5), atol=1e-5)


def test_rotate_about_z_and_direction_grid():
    directions = direction_grid(24, [10, 40])
    assert directions.shape == (48, 3) and torch.allclose(directions.norm(dim=1), torch.ones(48))
    assert torch.allclose(azimuth_degrees(directions)[:24], torch.arange(24) * 15.0, atol=1e-3)
    assert torch.allclose(rotate_about_z(directions[:24], 15.0).roll(1, 0), directions[:24], atol=1e-5)
    each = rotate_about_z(directions, torch.arange(48) * 90.0)
    off = (azimuth_degrees(each) - azimuth_degrees(directions) - torch.arange(48) * 90 + 180) % 360
    assert torch.allclose(off, torch.full((48,), 180.0), atol=1e-2)


def test_fibonacci_band_fills_the_band_evenly():
    anchors = fibonacci_band(200, (10.0, 60.0))
    elevation = anchors[:, 2].asin().rad2deg()
    assert elevation.min() >= 10 and elevation.max() <= 60
    assert torch.histc(azimuth_degrees(anchors), 8, 0, 360).sub(25).abs().max() <= 5
    near = torch.cdist(anchors, anchors).fill_diagonal_(9).amin(1)
    assert near.min() > 0.5 * near.max()


def test_pose_parameters_start_at_the_given_poses_and_get_gradients():
    directions = direction_grid(5, [30])
    poses = OrbitPoses(directions, 2.5, ("roll", "aim", "distance"))
    assert torch.allclose(poses(), orbit_poses(directions, 2.5), atol=1e-6)
    poses(torch.tensor([1, 3])).square().sum().backward()
    for parameter in poses.parameters():
        assert parameter.grad[[0, 2, 4]].abs().sum() == 0 and parameter.grad.isfinite().all()
    base = orbit_poses(directions, 1.0)
    free = FreePoses(base)
    assert torch.allclose(free(), base)
    assert len(list(free.requires_grad_(False).parameters())) == 1 and torch.allclose(free(torch.tensor([4])), base[4:])


def test_shared_motion_pulls_all_cameras_towards_one_direction_about_the_origin():
    base = orbit_poses(F.normalize(torch.tensor([[1.0, 0.2, 0.0], [-0.5, 1.0, 0.0]]), dim=1), 3.0)
    poses = SharedMotion(base)
    assert torch.equal(poses(), base)
    poses.pull.data = torch.tensor([0.0, 0.0, 0.2])  # up: cameras at the height of the origin rise by 0.2 rad
    moved = poses()
    assert rigid(moved) and torch.allclose(
        moved[:, :3, 3],
        3 * direction_vectors(azimuth_degrees(base[:, :3, 3]), torch.full((2,), 0.2).rad2deg()),
        atol=1e-5,
    )
    assert torch.allclose(moved[:, :3, :3].mT @ moved[:, :3, 3:], base[:, :3, :3].mT @ base[:, :3, 3:], atol=1e-5)
    assert torch.allclose(poses(torch.tensor([1])), moved[1:])


def test_orbit_poses_angles_move_directions_over_the_zenith():
    directions = direction_grid(5, [30])
    poses = OrbitPoses(directions, 2.5)
    assert torch.equal(poses.direction, directions)
    poses.angles.data.copy_(torch.tensor([0.3, 0.4]).expand(5, 2))
    up = math.degrees(0.4)
    expected = direction_grid(5, [30 + up]), math.degrees(0.3)
    assert torch.allclose(poses.direction, rotate_about_z(*expected), atol=1e-6)
    poses.angles.data.copy_(torch.tensor([0.0, math.radians(100)]).expand(5, 2))  # 30 + 100 is 50 on the other side
    assert torch.allclose(poses.direction, rotate_about_z(direction_grid(5, [50]), 180.0), atol=1e-6)


def test_orbit_poses_near_the_zenith_converge():
    true = direction_vectors(torch.tensor([40.0]), torch.tensor([89.0]))
    poses = OrbitPoses(direction_vectors(torch.tensor([38.0]), torch.tensor([70.0])), 2.5)
    goal = orbit_poses(true, 2.5)
    optimizer = torch.optim.Adam(poses.parameters(), lr=0.005)
    for _ in range(200):
        optimizer.zero_grad()
        (poses() - goal).square().sum().backward()
        optimizer.step()
    assert (poses.direction * true).sum() > math.cos(math.radians(0.2))


def test_framing_distance_shows_a_ninth_more_than_the_box():
    focal = 1.3
    pose = orbit_poses(torch.tensor([1.0, 0, 0]), framing_distance(focal))
    k = torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]])
    rays = pixel_rays(pose, k, torch.tensor([[0.0, 0.5]]))
    t = -rays.origins[0, 0] / rays.directions[0, 0]
    assert float((rays.origins + t * rays.directions)[0, 1].abs()) == pytest.approx(1 / 0.9, rel=1e-4)


def test_center_poses_moves_poses_around_the_origin():
    directions = direction_vectors(torch.rand(12) * 360, torch.rand(12) * 60 + 5)
    transformed = orbit_poses(directions, 4.0)
    transformed[:, :3, 3] += torch.tensor([5.0, -2, 1])
    assert torch.allclose(center_poses(transformed, 2.0), orbit_poses(directions, 2.0), atol=1e-3)


def test_with_directions_keeps_the_offsets():
    directions = direction_grid(4, [30])
    poses = OrbitPoses(directions, 2.5, ("roll", "aim"))
    poses.freedom["roll"].data.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    poses.freedom["aim"].data.fill_(0.05)
    transformed = poses.with_directions(rotate_about_z(directions, 90.0))
    turn = torch.eye(4)
    turn[:2, :2] = torch.tensor([[0.0, -1], [1, 0]])
    assert torch.allclose(transformed(), turn @ poses(), atol=1e-5)
    assert torch.allclose(rotate_poses_about_z(poses(), 90.0), transformed(), atol=1e-5)
    assert not any(p.requires_grad for p in transformed.parameters()) and all(
        p.requires_grad for p in poses.parameters()
    )


def test_dolly_poses_keep_the_origin_in_place_and_equal_those_of_orbit_poses():
    generator = torch.Generator().manual_seed(0)
    poses = OrbitPoses(F.normalize(torch.rand(4, 3, generator=generator), dim=1), 4.0, ("aim", "distance", "roll"))
    for values in poses.freedom.values():
        values.data.uniform_(-0.2, 0.2, generator=generator)
    before = poses().detach()
    moved = dolly_poses(before, 1.5)

    def seen(pose, focal):  # where the origin is in the image
        local = -pose[:, :3, :3].mT @ pose[:, :3, 3:]
        return focal * local[:, :2] / local[:, 2:]

    torch.testing.assert_close(seen(moved, 1.5), seen(before, 1.0))
    free = FreePoses(before)
    free.numbers.data.uniform_(-0.1, 0.1, generator=generator)
    expected = dolly_poses(free().detach(), 1.5)
    for module, result in ((poses, moved), (free, expected)):
        module.dolly(1.5)
        torch.testing.assert_close(module().detach(), result)
