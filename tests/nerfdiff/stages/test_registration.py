"""A similarity that is a little off is mended by the images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import roma
import torch

from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.cameras.poses import direction_grid, orbit_poses
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.nerfdiff.fields.kinds import GridField
from factorkit.nerfdiff.rays import CameraModel, render_views
from factorkit.nerfdiff.stages.localise import TargetImages
from factorkit.nerfdiff.stages.registration import register_scene

DISTANCE = 3.0


def blobs() -> GridField:
    """Coloured blobs that no turn takes into one another."""
    field = GridField(20)
    axis = torch.linspace(-1, 1, 20)
    position = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    raw = torch.full((20, 20, 20, 4), -1.5)
    for centre, colour in (((0.4, 0, 0.2), 0), ((-0.3, 0.4, -0.2), 1), ((0, -0.5, 0.3), 2), ((0, 0, -0.4), 0)):
        near = (-(position - torch.tensor(centre)).square().sum(-1) / 0.03).exp()
        raw[..., 0] += 3 * near
        raw[..., 1 + colour] += 4 * near
    field.values.data.copy_(raw)
    return field.requires_grad_(False)


def gaussians() -> GaussianField:
    """Gaussians that no turn takes into one another."""
    torch.manual_seed(0)
    field = GaussianField(80)
    field.log_scales.data += 0.3 * torch.randn(80, 3)
    field.colors.data += torch.randn(80, 1, 3)
    return field.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("make_field", [blobs, gaussians])
def test_register_scene_refines_the_similarity_by_images(make_field):
    camera_model = CameraModel(torch.tensor([[1.4, 0, 0.5], [0, 1.4, 0.5], [0, 0, 1]]), torch.ones(3))
    model = SimpleNamespace(field=make_field(), camera=camera_model, samples_per_ray=24)
    in_scene = orbit_poses(direction_grid(8, [20.0, 50.0]), DISTANCE)
    images = render_views(model.field, in_scene, camera_model, (24, 24), 48).color.movedim(-1, 1)
    # the poses' own coordinates are another world's; what leads back from there is the answer
    turn = roma.rotvec_to_rotmat(torch.tensor([0.3, -0.8, 0.5])).double()
    truth = Similarity(turn, torch.tensor([0.2, 1.0, -0.4]).double(), torch.tensor(0.7).double())
    poses = truth.inverse().apply(in_scene)
    off = roma.rotvec_to_rotmat(torch.tensor([0.01, -0.02, 0.015])).double()
    start = Similarity(off @ turn, truth.translation + torch.tensor([0.03, -0.02, 0.04]), truth.scale * 1.01)

    result = register_scene(model, start, poses, TargetImages(images))

    def away(s: Similarity) -> tuple[float, float]:
        transformed = s.apply(poses)
        angle = roma.rotmat_geodesic_distance(transformed[:, :3, :3], in_scene[:, :3, :3]).rad2deg().max()
        return float(angle), float((transformed[:, :3, 3] - in_scene[:, :3, 3]).norm(dim=1).max())

    assert away(start)[0] > 1.4 and away(start)[1] > 0.04
    assert away(result)[0] < 0.15 and away(result)[1] < 0.02, (away(start), away(result))
