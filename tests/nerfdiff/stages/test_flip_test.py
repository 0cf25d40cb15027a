from __future__ import annotations

import pytest
import torch

from factorkit.data.procedural.scene import make_scene_field
from factorkit.nerfdiff.cameras.poses import OrbitPoses, direction_grid, direction_vectors, orbit_poses, rotate_about_z
from factorkit.nerfdiff.rays import CameraModel, render_views
from factorkit.nerfdiff.scene import Scene
from factorkit.nerfdiff.stages.dictionary import AssignedPoses, candidate_errors
from factorkit.nerfdiff.stages.flip_test import ROTATIONS, best_rotations, reassign_outliers, split_in_halves

CAMERA = CameraModel(torch.tensor([[1.6, 0, 0.5], [0, 1.6, 0.5], [0, 0, 1]]), torch.ones(3))
DISTANCE = 3.6


def render_from(directions: torch.Tensor, size: int = 16) -> torch.Tensor:
    return render_views(make_scene_field(), orbit_poses(directions, DISTANCE), CAMERA, (size, size), 48).color.movedim(
        -1, 1
    )


def test_best_rotations_finds_the_true_side():
    torch.manual_seed(0)
    directions = direction_vectors(torch.rand(12) * 360, torch.rand(12) * 50 + 10)
    scene = Scene(render_from(directions), [str(i) for i in range(12)], CAMERA, "object", DISTANCE, None)
    wrong = torch.tensor(ROTATIONS)[torch.arange(12) % 4]
    selected = torch.tensor([0, 1, 2, 3, 5, 7, 10])
    turns = best_rotations(
        make_scene_field(), scene, OrbitPoses(rotate_about_z(directions, -wrong), DISTANCE)().detach(), selected, 48
    )
    assert torch.equal(turns, wrong[selected])


@pytest.mark.slow
def test_reassign_outliers_moves_an_outlier_and_keeps_the_others():
    torch.manual_seed(1)
    directions = direction_vectors(torch.rand(6) * 360, torch.rand(6) * 30 + 20)
    scene = Scene(render_from(directions, 24), [str(i) for i in range(6)], CAMERA, "object", DISTANCE, None)
    wrong = directions.clone()
    wrong[2], wrong[4] = rotate_about_z(directions[2], 70.0), rotate_about_z(directions[4], 3.0)
    selected = torch.tensor([1, 2, 4, 5])
    positions = direction_grid(24, [15, 25, 35, 45, 55])
    back = reassign_outliers(make_scene_field(), scene, OrbitPoses(wrong, DISTANCE), selected, positions, 48)
    assert torch.equal(back[[0, 2, 3]], wrong[[1, 4, 5]])
    assert (back[1] * directions[2]).sum() > 0.97


def test_split_in_halves_is_disjoint_and_depends_on_the_seed():
    a, b = split_in_halves(11, 3)
    assert len(a) == 5 and sorted([*a.tolist(), *b.tolist()]) == list(range(11))
    assert torch.equal(split_in_halves(11, 3)[0], a) and not torch.equal(split_in_halves(11, 4)[0], a)


def test_candidate_errors_are_lowest_at_the_true_direction():
    directions = direction_grid(8, [20, 50])
    images = render_from(directions[[3, 12, 7]], 32)
    errors = candidate_errors(make_scene_field(), orbit_poses(directions, DISTANCE), CAMERA, images, 48)
    assert errors.shape == (3, 16) and errors.argmin(1).tolist() == [3, 12, 7]
    same = render_views(make_scene_field(), orbit_poses(directions[:1], DISTANCE), CAMERA, (16, 16), 48).color.movedim(
        -1, 1
    )
    direct = (same - torch.nn.functional.avg_pool2d(images[:1], 2)).square().mean()
    assert torch.allclose(errors[0, 0], direct, rtol=1e-3)


def test_assigned_poses_are_at_their_positions():
    directions = direction_grid(4, [30])
    poses = AssignedPoses(directions, torch.tensor([2, 0]), lambda positions: orbit_poses(positions, 2.0))
    assert torch.allclose(poses(torch.tensor([0, 1]))[:, :3, 3], 2 * directions[[2, 0]], atol=1e-5)
    poses.assigned.copy_(torch.tensor([1, 1]))
    assert torch.allclose(poses(torch.tensor([0]))[:, :3, 3], 2 * directions[[1]], atol=1e-5)
    shaken = poses(torch.tensor([0]), torch.tensor([[0.1, 0, 0]]))
    assert not torch.allclose(shaken[:, :3, 3], 2 * directions[[1]], atol=1e-3)
    assert "assigned" in poses.state_dict(), "a resumed search goes on from it"
