"""Known poses are brought into the space that a model works in, and left alone where they are there already."""

from __future__ import annotations

from dataclasses import replace

import pytest
import roma
import torch

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.metrics.image import psnr
from factorkit.metrics.pose import align_poses
from factorkit.nerfdiff.cameras.normalise import DEFAULT_SPREAD, align_forward, align_up_axis, center_poses, rms_spread
from factorkit.nerfdiff.cameras.poses import (
    direction_grid,
    direction_vectors,
    forward_facing_poses,
    orbit_poses,
    position_grid,
)
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.utils.errors import DataError
from tests.nerfdiff.forward import forward_views

CPU = torch.device("cpu")


def transform_poses(poses, degrees=(90.0, 40.0, 0.0), position=(3.0, -2.0, 5.0), scale=1.0):
    """Poses under a similarity."""
    motion = torch.eye(4)
    motion[:3, :3] = roma.rotvec_to_rotmat(torch.tensor(degrees).deg2rad())
    result = poses.clone()
    result[:, :3, 3] *= scale
    motion[:3, 3] = torch.tensor(position)
    return motion @ result


@pytest.mark.parametrize("axis", [(1.0, 0, 0), (-1.0, 0, 0), (2.0, 0, 0), (0, 1.0, 0), (0.6, 0.2, 0.1)])
def test_align_up_axis_rotates_another_up_axis_to_z(axis):
    views = make_procedural_views(12, 8, seed=1)
    turned = transform_poses(views.poses, tuple(90 * x for x in axis))
    right, result = (open_scene(replace(views, poses=p), 8, CPU).poses for p in (views.poses, turned))
    assert torch.allclose(result[:, 2, 1:], right[:, 2, 1:], atol=0.02)  # heights of ups, directions and places
    turns = result[:, :3, :3] @ right[:, :3, :3].mT
    assert torch.allclose(turns, turns[:1].expand_as(turns), atol=1e-4)  # one rotation for all


def test_align_up_axis_upright_poses_stay_unchanged():
    around = orbit_poses(direction_grid(8, [30, 60]), 3.0)
    high = orbit_poses(
        direction_vectors(torch.linspace(-40, 40, 9), torch.full((9,), 65.0)), 3.0
    )  # they lean over together
    assert torch.nn.functional.normalize(high[:, :3, 1].mean(0), dim=0)[2] < 0.6
    roll = torch.linspace(0, 360, 17)[:16, None].deg2rad() * torch.tensor([0, 0, 1.0])
    rolled = around.clone()
    rolled[:, :3, :3] = around[:, :3, :3] @ roma.rotvec_to_rotmat(roll)  # no common up
    for poses in (around, high, rolled, transform_poses(around, (20.0, 0, 0)), transform_poses(around, (0, 0, 120.0))):
        assert align_up_axis(poses) is poses


def test_center_poses_one_position_is_refused():
    views = make_procedural_views(6, 8)
    for noise in (0.0, 1e-6):
        poses = views.poses.clone()
        poses[:, :3, 3] = torch.tensor([1.0, 2, 3]) + noise * torch.randn(6, 3)
        with pytest.raises(DataError, match="all cameras at one position"):
            center_poses(poses, 2.0)
    scene = open_scene(replace(views, poses=poses), 8, CPU, known_poses=False)  # true poses alone may be any
    assert torch.equal(scene.poses, poses)


def test_align_forward_normalised_poses_stay_unchanged():
    poses = forward_facing_poses(position_grid(4, 3))
    aside = transform_poses(poses, (5.0, 0, 0), (0.1, 0.05, 0.0))  # as the training split's mean is not that of all
    for inputs, near in ((poses, None), (poses, 1.2), (aside, 1.2), (poses[1:], None)):
        assert align_forward(inputs, near) is inputs


def test_align_forward_moves_poses_to_the_origin():
    poses = forward_facing_poses(position_grid(5, 3))
    assert torch.allclose(align_forward(transform_poses(poses), 1.2), poses, atol=1e-5)
    assert torch.allclose(align_forward(transform_poses(poses, scale=7.0), 7 * 1.2), poses, atol=1e-5)
    assert torch.allclose(align_forward(transform_poses(poses, (0, 0, 0), (0, 0, 0), 7.0), 7 * 1.2), poses, atol=1e-5)
    for scale in (0.01, 1.0, 300.0):  # nothing tells the scale: the places' spread does
        result = align_forward(transform_poses(poses, scale=scale), None)
        assert rms_spread(result[:, :3, 3]) == pytest.approx(DEFAULT_SPREAD, rel=1e-4)
        assert torch.allclose(result[:, :3, :3], poses[:, :3, :3], atol=1e-4)
    still = transform_poses(torch.eye(4).repeat(3, 1, 1))
    assert torch.allclose(align_forward(still, None), torch.eye(4), atol=1e-5)  # a turning head has no spread to go by


def test_align_forward_without_common_direction_is_refused():
    with pytest.raises(DataError, match="look all ways"):
        align_forward(orbit_poses(direction_grid(8, [10]), 3.0), None)
    rolled = torch.stack([torch.eye(4), torch.diag(torch.tensor([-1.0, -1, 1, 1]))])  # ups that cancel
    rolled[:, 0, 3] = torch.tensor([9.0, 11.0])
    assert torch.allclose(align_forward(rolled, 1.2)[:, :3, 3], torch.tensor([[-1.0, 0, 0], [1, 0, 0]]))


@pytest.mark.slow
def test_forward_run_moved_world_has_the_same_quality(tiny, tmp_path):
    views = forward_views(size=(9, 12), columns=3, rows=3)
    elsewhere = replace(views, poses=transform_poses(views.poses), near=1.2)
    settings = tiny | {"resolution": 12, "poses": "known", "field_steps": 40}
    run = train_nerfdiff(elsewhere, out=tmp_path / "run", **settings)
    assert torch.allclose(run.poses, views.poses, atol=1e-5)
    scores = run.evaluate(elsewhere)  # beside the poses as they were given
    assert scores["rotation_max_deg"] < 0.1 and scores["translation_median"] < 1e-3 and not scores["mirrored"]
    assert torch.allclose(align_poses(run.poses, elsewhere.poses).apply(run.poses), elsewhere.poses, atol=1e-4)
    assert scores["psnr"] > psnr(run.render(run.poses).images, views.images).mean() - 0.5
