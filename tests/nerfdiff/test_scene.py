from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from factorkit.data.procedural.scene import make_procedural_views, make_scene_field
from factorkit.nerfdiff.cameras.candidates import LookAtCandidates, SingleCandidate
from factorkit.nerfdiff.cameras.poses import (
    CONVERGENCE_DEPTH,
    direction_grid,
    direction_vectors,
    forward_facing_poses,
    orbit_poses,
    position_grid,
    rodrigues_poses,
)
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.fields.kinds import GridField
from factorkit.nerfdiff.rays import NDC_MARGIN, CameraModel, render_pixels, render_views
from factorkit.nerfdiff.scene import gather_pixels, gaussian_blur, open_scene, shared_camera
from factorkit.nerfdiff.stages.distil import candidate_shares, pose_distance
from factorkit.nerfdiff.stages.refine import regularisation
from factorkit.nerfdiff.training_views import load_views, store_views
from factorkit.rendering import Rendered

CPU = torch.device("cpu")


def test_render_pixels_equal_those_of_the_whole_image():
    torch.manual_seed(0)
    camera_model = CameraModel(torch.tensor([[1.5, 0, 0.5], [0, 2.0, 0.45], [0, 0, 1]]), torch.tensor([0.2, 0.5, 1.0]))
    poses = orbit_poses(direction_grid(3, [25]), 3.3)
    whole = render_views(make_scene_field(), poses, camera_model, (6, 9), 32).color
    pixels = torch.tensor([[0, 53, 13], [8, 9, 27], [1, 2, 40]])
    some = render_pixels(make_scene_field(), poses, camera_model, pixels, (6, 9), 32).color
    assert torch.allclose(some, gather_pixels(whole.movedim(-1, 1), pixels), atol=1e-5)
    assert torch.allclose(gather_pixels(whole.movedim(-1, 1), pixels)[1, 2], whole[1, 3, 0])


def test_open_scene_procedural_views_equal_renders_of_the_scene():
    views = make_procedural_views(3, 16, seed=2)
    scene = open_scene(views, 16, CPU)
    eye = scene.poses[:, :3, 3]
    assert torch.allclose(eye.norm(dim=1), torch.full((3,), scene.distance), atol=0.02)
    scale = 4.0 / scene.distance  # of the procedural scene's radius

    def field(p, d):
        sigma, color = make_scene_field()(p * scale, d)
        return sigma * scale, color

    rendered = render_views(field, scene.poses, scene.camera, (16, 16), 256).color.movedim(-1, 1)
    assert (rendered - views.images).abs().mean() < 0.02


def test_render_views_forward_facing_wall_has_its_depth():
    """A wall across the view at depth 3: in normalised device coordinates z = 1 - 2 / 3."""
    camera_model = CameraModel(
        torch.tensor([[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]), torch.zeros(3), forward_facing=True
    )

    def wall(p, d):
        beyond = (p[:, 2] > 1 - 2 / 3.0).float()
        return 500 * beyond, torch.stack([p[:, 0] * NDC_MARGIN, p[:, 1] * NDC_MARGIN, beyond], 1)

    pose = torch.eye(4)[None].repeat(2, 1, 1)
    pose[1, 0, 3] = 0.5  # half a unit to the right
    rendered = render_views(wall, pose, camera_model, (5, 5), 512)
    assert torch.allclose(rendered.depth, torch.full((2, 5, 5), 3.0), atol=0.05) and (rendered.opacity > 0.99).all()
    middle = rendered.color[:, 2, 2, 0]
    # a place x at depth z is at 2 f x / z in normalised device coordinates, which at infinity show directions alone
    assert middle.tolist() == pytest.approx([0.0, 2 * 0.9 * 0.5 / 3], abs=0.02)


def test_forward_facing_poses_converge_at_one_point():
    positions = position_grid(5, 3)
    poses = forward_facing_poses(positions)
    assert poses.shape == (15, 4, 4) and torch.allclose(poses[7], torch.eye(4), atol=1e-6)
    point = torch.tensor([0.0, 0, -CONVERGENCE_DEPTH])
    directions = torch.nn.functional.normalize(point - positions, dim=1)
    assert torch.allclose(-poses[:, :3, 2], directions, atol=1e-5)


def test_gaussian_blur_keeps_constants_and_skips_small_radii():
    images = torch.rand(2, 3, 12, 9)
    assert gaussian_blur(images, 0.2) is images
    assert torch.allclose(gaussian_blur(torch.ones(1, 3, 12, 9), 2.0), torch.ones(1, 3, 12, 9), atol=1e-5)
    assert gaussian_blur(images, 2.0).var() < 0.2 * images.var()
    assert torch.allclose(gaussian_blur(images.flip(3), 1.5), gaussian_blur(images, 1.5).flip(3), atol=1e-5)


def test_shared_camera_equal_intrinsics_are_common_and_background_defaults_to_black():
    views = make_procedural_views(4, 8)
    camera_model = shared_camera(views)
    assert torch.allclose(camera_model.intrinsics, views.intrinsics[0] / torch.tensor([8.0, 8, 1])[:, None])
    assert torch.equal(camera_model.background, torch.ones(3)) and not camera_model.forward_facing
    assert torch.equal(shared_camera(replace(views, background=None, masks=None)).background, torch.zeros(3))
    assert shared_camera(replace(views, layout="forward")).forward_facing
    assert camera_model.view_intrinsics is None


def test_shared_camera_other_focal_length_keeps_own_intrinsics_and_contains_all_views():
    views = make_procedural_views(3, 8)
    intrinsics = views.intrinsics.clone()
    intrinsics[1, 0, 0] /= 2
    intrinsics[1, 0, 2] += 1
    camera_model = shared_camera(replace(views, intrinsics=intrinsics))
    assert torch.allclose(
        camera_model.pixel_intrinsics(8, 8, camera_model.of_views(torch.tensor([1]))), intrinsics[1:2]
    )
    left, right = (torch.tensor([[x, 4.0, 1.0]]) @ torch.linalg.inv(intrinsics[1]).T for x in (0.0, 8.0))
    columns = [(ray @ camera_model.pixel_intrinsics(8, 8).T)[0, 0].item() for ray in (left, right)]
    assert columns == pytest.approx([0, 8], abs=1e-4)
    scaled = camera_model.with_intrinsics(camera_model.intrinsics * torch.tensor([1.1, 1.1, 1])[:, None].expand(3, 3))
    assert scaled.of_views()[:, 0, 0].tolist() == pytest.approx((1.1 * camera_model.of_views()[:, 0, 0]).tolist())


def test_stored_views_equal_the_given_ones(tmp_path):
    views = make_procedural_views(3, 8)
    store_views(tmp_path, views)
    result = load_views(tmp_path)
    assert result.names == views.names and torch.equal(result.poses, views.poses) and result.layout == views.layout
    assert (result.images - views.images).abs().max() <= 0.5 / 255 + 1e-6
    assert load_views(tmp_path / "nowhere") is None and load_views(None) is None
    store_views(tmp_path, replace(views, poses=None))
    assert load_views(tmp_path).poses is None


def test_pose_distance_small_angle_is_its_square():
    a = orbit_poses(direction_vectors(torch.tensor([40.0]), torch.tensor([0.0])), 2.5)
    assert pose_distance(a, a, 2.5) == 0
    for angle in (1.0, 5.0, 10.0):
        b = orbit_poses(direction_vectors(torch.tensor([40.0 + angle]), torch.tensor([0.0])), 2.5)
        assert pose_distance(a, b, 2.5).sqrt().rad2deg().item() == pytest.approx(angle, rel=0.01)


def test_candidate_shares_fall_with_the_angle_to_the_anchor():
    candidates = LookAtCandidates(direction_grid(5, [30]), 2.0)
    directions = direction_vectors(torch.tensor([5.0, 150.0, 290.0, 36.0]), torch.tensor([40.0, 20.0, 30.0, 30.0]))
    shares = candidate_shares(candidates, orbit_poses(directions, 2.0))
    assert torch.allclose(shares.sum(1), torch.ones(4))
    assert shares[:3].argmax(1).tolist() == [0, 2, 4] and (shares[:3].amax(1) > 0.9).all()
    assert torch.allclose(shares[3], torch.tensor([0.5, 0.5, 0, 0, 0]), atol=0.01), "at the boundary of two cells"
    assert candidate_shares(SingleCandidate(), rodrigues_poses(torch.randn(3, 6))).tolist() == [[1], [1], [1]]


def test_regularisation_opacity_counts_for_object_scenes_only():
    field = GridField(4)
    opacity = torch.tensor([[0.1, 0.3], [1.0, 0.0]], requires_grad=True)
    rendered = Rendered(torch.zeros(2, 2, 3), torch.zeros(2, 2), opacity, None, None, torch.tensor(0))
    config = preset_config("fast", opacity_weight=0.5)
    around, ahead = (SimpleNamespace(layout=layout) for layout in ("object", "forward"))
    rough = config.tv_weight * field.total_variation()
    assert rough > 0 and torch.equal(regularisation(config, ahead, field, rendered), rough)
    result = regularisation(config, around, field, rendered)
    assert torch.allclose(result, rough + torch.tensor([0.1, 0.25]))
    assert torch.equal(torch.autograd.grad(result.sum(), opacity)[0], torch.full((2, 2), 0.25))
    field.unbounded = True
    assert torch.equal(regularisation(config, around, field, rendered), config.tv_weight * field.total_variation())
