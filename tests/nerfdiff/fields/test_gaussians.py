"""Gaussians as a field: rendering, relocation, the density grid, and a run with its splat file."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

import factorkit
from factorkit import rendering
from factorkit.data import make_procedural_views
from factorkit.data.procedural.scene import make_scene_field
from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.run_folder import read_settings
from factorkit.engine.trainer import Trainer
from factorkit.nerfdiff.build import build_model, load_partial_run
from factorkit.nerfdiff.cameras.poses import POSE_PARAMETERS, FreePoses, OrbitPoses
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.export import export
from factorkit.nerfdiff.fields.base import Appearance, build_background
from factorkit.nerfdiff.fields.gaussians import MIN_OPACITY, RATES, GaussianField, neighbour_distances
from factorkit.nerfdiff.fields.kinds import GridField, build_field, restore_field
from factorkit.nerfdiff.rays import CameraModel, render_pixels, render_views, sample_surface
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages.distil import DistilTask
from factorkit.nerfdiff.stages.refine import FitTask, SceneFit
from factorkit.nerfdiff.viewer import Viewer, ViewerScene, fov_and_aspect, render_viewpoint
from factorkit.utils.errors import ConfigError, OutOfMemoryError
from factorkit.utils.files import read_log
from factorkit.utils.rng import derived_seed
from tests.nerfdiff import forward

PlyData = pytest.importorskip("plyfile").PlyData

SIZE = (20, 24)


def make_field(count=60, seed=0):
    torch.manual_seed(seed)
    field = GaussianField(count, seed)
    for name, scale in (("colors", 0.5), ("directional", 0.2), ("opacities", 1.0), ("log_scales", 0.3)):
        getattr(field, name).data += scale * torch.randn_like(getattr(field, name))
    return field


def load_stage_field(stage, folder):
    tensors, _ = Checkpoints(stage / "checkpoints").latest()
    weights = {k.removeprefix("ema.module.field."): v for k, v in tensors.items() if k.startswith("ema.module.field.")}
    return restore_field(weights, read_settings(folder))


def make_camera():
    intrinsics = torch.tensor([[1.2, 0, 0.5], [0, 1.44, 0.5], [0, 0, 1]])
    return CameraModel(intrinsics, torch.tensor([0.2, 0.4, 0.6]))


def test_images_smaller_than_those_of_the_fit_are_means_of_larger_ones():
    field, camera, poses = make_field(), make_camera(), rendering.orbit(2, 4.0, 20.0)
    large = render_views(field, poses, camera, (40, 48), 1)
    field.side = 96
    small = render_views(field, poses, camera, (20, 24), 1)
    field.side = 48
    averaged = render_views(field, poses, camera, (20, 24), 1)
    for name in ("color", "depth", "opacity"):
        blocks = getattr(large, name).unflatten(2, (24, 2)).unflatten(1, (20, 2)).mean((2, 4))
        torch.testing.assert_close(getattr(averaged, name), blocks)
    assert (small.color - averaged.color).abs().max() > 1e-4  # of images of 96 pixels


def test_images_larger_than_those_of_the_fit_are_as_blurred_as_these():
    field, camera, pose = make_field(), make_camera(), rendering.orbit(1, 4.0, 20.0)
    field.log_scales.data -= 3  # smaller than a pixel
    field.side = 24
    small, large = (render_views(field, pose, camera, size, 1).opacity.mean() for size in ((20, 24), (80, 96)))
    assert large.item() == pytest.approx(small.item(), rel=0.15)
    field.side = 0
    assert render_views(field, pose, camera, (80, 96), 1).opacity.mean() < 0.5 * large


def test_pixels_equal_those_of_whole_images_and_poses_get_gradients():
    field, camera = make_field(), make_camera()
    poses = rendering.orbit(3, 4.0, 20.0).requires_grad_()
    whole = render_views(field, poses.detach(), camera, SIZE, 1)
    assert whole.color.shape == (3, *SIZE, 3) and whole.opacity.max() > 0.5
    pixels = torch.randint(0, SIZE[0] * SIZE[1], (3, 7))
    some = render_pixels(field, poses, camera, pixels, SIZE, 1)
    torch.testing.assert_close(some.color, whole.color.flatten(1, 2).gather(1, pixels[..., None].expand(-1, -1, 3)))
    some.color.sum().backward()
    assert (poses.grad[:, :3].abs().amax((1, 2)) > 0).all() and field.means.grad.isfinite().all()
    empty = whole.color[whole.opacity == 0]
    torch.testing.assert_close(empty, camera.background.expand_as(empty))


def test_depth_is_the_distance_along_the_ray():
    field, camera = GaussianField(1), make_camera()
    field.means.data = torch.tensor([[0.6, 0.3, -0.2]])
    field.opacities.data += 10
    pose = rendering.orbit(1, 4.0, 20.0)
    out = render_views(field, pose, camera, SIZE, 1)
    depth = (out.depth / out.opacity)[out.opacity > 0.9]
    distance = (pose[0, :3, 3] - field.means[0]).norm()
    assert len(depth) and (depth - distance).abs().max() < 0.1


def test_relocation_moves_invisible_gaussians_and_keeps_the_image():
    field, camera = make_field(40), make_camera()
    pose = rendering.orbit(1, 4.0, 20.0)
    field.opacities.data[::4] = -9.0
    with torch.no_grad():
        before = render_views(field, pose, camera, SIZE, 1).color
        opacity = field.opacities.sigmoid()
        field._relocate(opacity <= MIN_OPACITY, opacity, field.log_scales.exp(), torch.Generator().manual_seed(0))
        after = render_views(field, pose, camera, SIZE, 1).color
    assert (field.opacities.sigmoid() >= MIN_OPACITY).all()
    assert (after - before).abs().mean() < 0.02


@pytest.mark.parametrize("dead", [1, 3])
@torch.no_grad()
def test_relocation_copies_have_the_profile_of_the_one_before(dead):
    """Equation 9: along a line through the centre, copies in one place cover as much as the Gaussian did."""
    field = GaussianField(1 + dead)
    field.opacities.data[:] = torch.tensor([1.5, *[-9.0] * dead])
    field.log_scales.data.fill_(math.log(0.2))
    opacity, scale = field.opacities.sigmoid(), field.log_scales.exp()
    field._relocate(opacity <= MIN_OPACITY, opacity, scale, torch.Generator().manual_seed(0))
    x = torch.linspace(-3, 3, 6001).double()

    def profile(opacity, scale):
        return opacity.double() * (-0.5 * (x / scale.double()) ** 2).exp()

    new = field.opacities.sigmoid()[0], field.log_scales.exp()[0, 0]
    together = 1 - (1 - profile(*new)) ** (1 + dead)
    assert float(together.sum() / profile(opacity[0], scale[0, 0]).sum()) == pytest.approx(1, abs=1e-4)
    assert all(torch.equal(p[1:], p[:1].expand_as(p[1:])) for p in (field.means, field.opacities, field.log_scales))


def test_update_is_the_same_for_the_same_step():
    one, other = make_field(), make_field()
    for field in (one, other):
        field.opacities.data[::3] = -9.0
        field.update(50, 100, 0.03, 7)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.degree == 3 and not torch.equal(one.means, make_field().means)


def test_density_grid_has_the_optical_depth_of_a_gaussian():
    field = GaussianField(1)
    field.means.data.zero_()
    field.log_scales.data.fill_(math.log(0.1))
    field.opacities.data.fill_(0.0)  # half of the light passes
    line = torch.linspace(-1, 1, 401)
    points = torch.stack([line, 0 * line, 0 * line], 1)
    values = torch.stack([field(points + shift, points)[0] for shift in 0.02 * torch.randn(60, 3)])
    depth = values.mean(0).sum() * (line[1] - line[0])
    assert depth.item() == pytest.approx(math.log(2), rel=0.4)
    assert field(torch.full((1, 3), 1.5), points[:1])[0] == 0


@pytest.mark.parametrize("direction", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
def test_density_of_all_space_has_the_optical_depth_of_a_distant_gaussian(direction):
    field = build_field("gaussians", 64, 0, unbounded=True)  # at one place: few samples each are spread over cells
    field.means.data = torch.tensor([[4.0, 0.5, 0.0]]).repeat(64, 1)
    field.log_scales.data.fill_(math.log(0.6))
    field.opacities.data.fill_(torch.tensor(1 - 0.5 ** (1 / 64)).logit())  # half of the light passes all
    line = torch.linspace(-3, 3, 801)
    points = field.means[:1].detach() + line[:, None] * torch.tensor(direction)
    values = torch.stack([field(points + 0.1 * torch.randn(3), points)[0] for _ in range(60)])
    depth = values.mean(0).sum() * (line[1] - line[0])
    assert depth.item() == pytest.approx(math.log(2), rel=0.4)


def test_start_from_a_field_of_all_space_lies_on_what_the_views_show():
    room = build_field("grid", 33, 0, unbounded=True)
    line = torch.linspace(-1, 1, 33)
    outside = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).abs().amax(0) > 0.8  # beyond 2.5
    room.values.data = torch.where(outside[..., None], 3.0, -8.0).expand(33, 33, 33, 4).clone()
    poses = rendering.look_at(torch.tensor([[1.5, 0, 0.2], [0, 1.5, 0.2]]), torch.zeros(3), torch.tensor([0, 0, 1.0]))
    surface = sample_surface(room, poses, make_camera(), SIZE, 64, 301, 0)
    field = build_field("gaussians", 301, 0, unbounded=True)
    field.start_from(room, 0, None, surface)
    distance = field.means.abs().amax(1)
    assert len(surface) == 301 and (distance > 2).all() and (distance < 3.6).all()
    drawn = render_views(field, poses[:1], make_camera(), SIZE, 1)
    assert drawn.opacity.mean() > 0.5 and field.colors.std() < 0.5
    points = torch.full((400, 3), 9.0)
    field.start_from(room, 0, points, surface)
    assert int((field.means == 9).all(1).sum()) == 150, "sparse points of all space, at most half"


def test_start_from_a_grid_lies_where_it_is_dense():
    grid = GridField(12)
    grid.values.data[..., 0] = -5.0
    grid.values.data[7:11, 7:11, 7:11, 0] = 2.0
    field = GaussianField(200)
    field.start_from(grid, 0)
    inside = (field.means > 0.05) & (field.means < 1.0)
    assert inside.all(1).float().mean() > 0.9 and field.log_scales.exp().max() < 0.3


def test_start_from_sparse_points_begins_there_with_half_of_the_gaussians_at_most():
    grid = GridField(12)
    points = torch.cat([2 * torch.rand(150, 3) - 1, torch.full((5, 3), 3.0)])
    for count, expected in ((400, 150), (200, 100)):
        field = GaussianField(count)
        field.start_from(grid, 0, points)
        at_points = (field.means[:, None] == points).all(-1).any(1)
        assert int(at_points.sum()) == expected and field.means.abs().max() <= 1


def test_num_gaussians_beyond_the_memory_raises_with_the_memory_needed(tmp_path):
    with pytest.raises(OutOfMemoryError, match=r"num_gaussians=10000000000: they need 15\d\d\d\.\d GiB .* train fewer"):
        factorkit.train_nerfdiff(
            make_procedural_views(12, 8), out=tmp_path / "run", poses="known", field="gaussians", num_gaussians=10**10
        )
    assert not (tmp_path / "run").exists()


def test_box_of_a_forward_facing_scene_is_the_inverse_of_the_cameras_map():
    field, positions = make_field(), 2 * torch.rand(50, 3) - 1
    field.box_scale = forward.CAMERA.box_scale
    world = forward.CAMERA.from_ndc(positions)
    torch.testing.assert_close(field.from_box(positions), world)
    torch.testing.assert_close(field.to_box(world), positions, rtol=0, atol=1e-5)
    assert make_field().to_box(positions) is positions


def test_start_from_a_forward_facing_grid_lies_where_it_is_dense_in_the_world():
    grid = GridField(24)
    grid.values.data[..., 0] = -5.0
    grid.values.data[16:, 8:16, 8:16, 0] = 2.0  # [z, y, x]: from a depth of 3.3 to infinity
    field = GaussianField(400)
    field.box_scale = forward.CAMERA.box_scale
    field.start_from(grid, 0)
    depth = -field.means[:, 2]
    assert depth.isfinite().all() and (depth > 2.8).float().mean() > 0.95 and depth.max() > 50
    sides = (field.means[:, :2] * field.box_scale / depth[:, None]).abs().amax(1)
    assert sides.max() < 0.5
    sizes = field.log_scales.exp() / depth[:, None]
    torch.testing.assert_close(sizes, sizes[:1, :1].expand_as(sizes))


def test_density_in_a_forward_facing_box_has_the_optical_depth_along_the_axis():
    field = GaussianField(1)
    field.box_scale = forward.CAMERA.box_scale
    field.means.data = torch.tensor([[0.0, 0.0, -4.0]])
    field.log_scales.data.fill_(math.log(0.4))
    field.opacities.data.fill_(0.0)  # half of the light passes
    line = torch.linspace(-1, 1, 401)
    points = torch.stack([0 * line, 0 * line, line], 1)
    shifts = torch.cat([0.02 * torch.randn(60, 2), torch.zeros(60, 1)], 1)
    depth = torch.stack([field(points + shift, points)[0] for shift in shifts]).mean(0) * (line[1] - line[0])
    assert depth.sum().item() == pytest.approx(math.log(2), rel=0.4)
    assert (depth * line).sum() / depth.sum() == pytest.approx(1 - 2 / 4, abs=0.05)


@pytest.mark.slow
def test_forward_facing_run_explains_views_and_depths_better_than_its_grid(tmp_path):
    views = forward.forward_views()
    settings = {"resolution": 24, "poses": "known", "field": "gaussians", "num_gaussians": 400, "gaussian_steps": 1000}
    settings |= {"field_steps": 60, "steps": 1, "grid_resolution": 24, "samples_per_ray": 24, "threads": 1}
    settings |= {"encoder_resolution": 8, "model_channels": 8, "channel_mult": (1, 2)}
    run = factorkit.train_nerfdiff(views, out=tmp_path / "run", preset="fast", progress=False, **settings)
    field, camera, size = run.model.field, run.model.camera, run.model.size
    grid = load_stage_field(run.folder / "stages" / "fit", run.folder)
    errors = [render_views(f, run.poses, camera, size, 24).color for f in (grid, field)]
    errors = [(x.movedim(-1, 1) - views.images).square().mean().item() for x in errors]
    assert errors[1] < 0.8 * errors[0], errors
    drawn = render_views(field, run.poses[:1], camera, size, 1)
    true = render_views(forward.ball_and_wall, run.poses[:1], camera, size, 256)
    depths = [(x.depth / x.opacity)[0] for x in (drawn, true)]
    assert 0.75 < depths[0].median() / depths[1].median() < 1.3
    splats = factorkit.load(run.export(tmp_path / "scene.ply"))
    torch.testing.assert_close(splats.model.field.means, field.means, rtol=0, atol=0)
    cloud = run.export(tmp_path / "points.ply", points=500)
    depth = -PlyData.read(cloud)["vertex"]["z"]
    assert 2 < np.median(depth) < 8 and depth.min() >= 0.9


class OnePass:
    """What a step of a fit draws, for views in order."""

    rows = slice(0, 1)


def fit_gradients(changes, poses=None, optimize_focal=False, **scene_changes):
    """The gradients of one step on view 0 of a small scene, by name."""
    scene = replace(open_scene(make_procedural_views(6, 12, seed=1), 12, torch.device("cpu")), **scene_changes)
    config, field = preset_config("fast", resolution=12, field="gaussians", **changes), make_field(40)
    field.background = build_background(config.background, 0)
    if config.appearance_dim:
        field.appearance = Appearance(6, config.appearance_dim)
    poses = poses or FreePoses(scene.poses)
    fit = SceneFit(field, poses, scene.camera, scene.size, 1, optimize_focal)
    loss = FitTask(config, scene, fit).loss(fit, torch.tensor([0]), OnePass(), torch.tensor(0)).objective.sum()
    loss.backward()
    return {name: p.grad for name, p in fit.named_parameters()}, loss.item()


def test_gaussians_give_gradients_to_every_camera_parameter():
    scene = open_scene(make_procedural_views(6, 12, seed=1), 12, torch.device("cpu"))
    orbit = OrbitPoses(F.normalize(scene.poses[:, :3, 3], dim=1), scene.distance, POSE_PARAMETERS)
    names = {"poses.angles", "log_focal", *(f"poses.freedom.{name}" for name in POSE_PARAMETERS)}
    grads, _ = fit_gradients({}, orbit, optimize_focal=True)
    assert names <= set(grads)
    for name in names - {"log_focal"}:
        assert grads[name][0].abs().min() > 0 and not grads[name][1:].any(), name  # of the view alone
    assert grads["log_focal"] != 0


@pytest.mark.parametrize("background", ["learned", "field"])
def test_gaussians_give_gradients_to_background_and_appearance(background):
    grads, _ = fit_gradients({"background": background, "appearance_dim": 2})
    own = {name: grad for name, grad in grads.items() if name.startswith("field.background")}
    assert own and any(grad.abs().max() > 0 for grad in own.values())
    assert grads["field.appearance.codes"][0].abs().max() > 0


def test_pixels_that_loss_masks_leave_out_do_not_move_gaussians():
    masks = torch.ones(6, 1, 12, 12)
    plain, plain_loss = fit_gradients({"opacity_weight": 0.0, "tv_weight": 0.0}, loss_masks=masks)
    none, loss = fit_gradients({"opacity_weight": 0.0, "tv_weight": 0.0}, loss_masks=0 * masks)
    assert plain["field.means"].any() and plain_loss > 0
    assert loss == 0 and not any(grad.any() for grad in none.values() if grad is not None)


def test_regularisers_lower_opacities_and_scales():
    plain, _ = fit_gradients({"opacity_weight": 0.0, "tv_weight": 0.0})
    scaled, _ = fit_gradients({"opacity_weight": 0.0, "tv_weight": 1.0})
    fog, _ = fit_gradients({"opacity_weight": 1.0, "tv_weight": 0.0})
    for name in ("opacities", "log_scales"):
        assert (scaled[f"field.{name}"] > plain[f"field.{name}"]).all()
        assert fog[f"field.{name}"].sum() > plain[f"field.{name}"].sum()


def test_encoder_learns_from_new_views_drawn_from_the_gaussians():
    views = make_procedural_views(6, 12, seed=1)
    scene, field = open_scene(views, 12, torch.device("cpu")), make_field(40)
    config = preset_config("fast", resolution=12, field="gaussians", num_rendered_views=3, encoder_resolution=12)
    settings = {"layout": "object", "size": scene.size, "distance": scene.distance}
    task = DistilTask(config, scene, build_model(config, settings, scene.camera, field, scene.poses))
    assert len(task.images) == 9 and len(task.poses) == 9
    drawn = render_views(field, task.poses[6:], scene.camera, (12, 12), 1)
    torch.testing.assert_close(task.images[6:], drawn.color.movedim(-1, 1))
    assert drawn.opacity.max() > 0.5 and not any(p.requires_grad for p in field.parameters())


def test_viewer_draws_forward_facing_gaussians_and_shows_the_splats():
    pytest.importorskip("viser")
    views, field = forward.forward_views(columns=2, rows=1), make_field()
    field.box_scale = forward.CAMERA.box_scale
    field.means.data[:, 2] -= 4
    contents = ViewerScene(1, field.requires_grad_(False), views, forward.CAMERA.background)
    fov, _ = fov_and_aspect(views.intrinsics[0], *views.size)
    pixels = render_viewpoint(contents, None, views.poses[0], fov, 18, 24)
    want = render_views(field, views.poses[:1], forward.CAMERA, (18, 24), 1).color[0]
    assert np.abs(pixels / 255 - want.clamp(0, 1).numpy()).max() < 1 / 255 and want.std() > 0.05
    with Viewer(contents, port=0) as viewer:
        sent = []
        viewer.server.scene.add_gaussian_splats = lambda name, *parts: sent.append(parts[0])
        viewer.show(contents)
    assert (sent[0] == field.means.numpy()).all()


@pytest.mark.slow
def test_joint_search_ends_with_gaussians_and_the_encoder_of_the_search(tmp_path):
    data = make_procedural_views(12, 12, seed=1)
    settings = {"resolution": 12, "search": "joint", "field": "gaussians", "num_gaussians": 100, "gaussian_steps": 20}
    settings |= {"steps": 6, "num_rendered_views": 2, "samples_per_ray": 8, "grid_resolution": 10, "threads": 1}
    settings |= {"num_candidates": 3, "model_channels": 8, "channel_mult": (1, 2), "ema_decay": 0.0}
    run = factorkit.train_nerfdiff(data, out=tmp_path / "run", preset="fast", progress=False, **settings)
    assert isinstance(run.model.field, GaussianField) and load_partial_run(run.folder).stage == "gaussians"
    stage, _ = Checkpoints(run.folder / "stages" / "joint" / "checkpoints").latest()
    torch.manual_seed(derived_seed("weights", 0))
    fresh = build_model(run.config, run.scene, run.model.camera, run.model.field, run.poses).encoder
    names = [name for name, _ in fresh.named_parameters()]
    joint = torch.cat([stage[f"ema.module.encoder.{name}"].flatten() for name in names])
    end, start = (parameters_to_vector(x.parameters()) for x in (run.model.encoder, fresh))
    assert (end - joint).norm() < (end - start).norm()  # distilled from where the search ended


def test_nothing_in_view_is_the_background_with_gradients_of_zero():
    field, camera = make_field(), make_camera()
    pose = rendering.orbit(1, 4.0, 20.0)
    pose[:, :3, :3] = pose[:, :3, :3] @ torch.diag(torch.tensor([-1.0, 1.0, -1.0]))  # looks away
    out = render_pixels(field, pose.requires_grad_(), camera, torch.arange(480)[None], SIZE, 1)
    assert (out.opacity == 0).all() and torch.equal(out.color, camera.background.expand_as(out.color))
    out.color.sum().backward()
    assert all((x.grad == 0).all() for x in (pose, field.means, field.quaternions, field.log_scales, field.opacities))


@pytest.mark.slow
def test_training_moves_gaussians_that_are_not_finite_to_visible_ones(tmp_path):
    scene = open_scene(make_procedural_views(6, 8), 8, torch.device("cpu"))
    field, config = make_field(40), preset_config("fast", resolution=8, steps=60, sample_every=0, threads=1)
    fit = SceneFit(field, FreePoses(scene.poses), scene.camera, scene.size, 1)
    values = [
        *((name, value) for name in RATES for value in (math.nan, math.inf)),
        ("log_scales", 200.0),
    ]  # e^200 is infinite

    class Task(FitTask):
        def prepare(self, step):
            if step == 55:  # after the last relocation of invisible ones
                for row, (name, value) in enumerate(values):
                    getattr(field, name).data.view(40, -1)[row, -1] = value
            return super().prepare(step)

    task = Task(config, scene, fit)
    trained = Trainer(task, config, tmp_path, {}, device=torch.device("cpu"), progress=False).run()
    for row, (name, value) in enumerate(values):
        assert all(p.view(40, -1)[row].isfinite().all() for p in trained.field.parameters()), (name, value)
    assert trained.field.log_scales.max() < 100 and all(p.isfinite().all() for p in trained.parameters())
    assert "skip" not in {line.get("event") for line in read_log(tmp_path)}


def test_restored_field_renders_the_same():
    field, camera, pose = make_field(), make_camera(), rendering.orbit(1, 4.0, 20.0)
    settings = {"field": "gaussians", "grid_resolution": 32, "seed": 0, "scene": {"size": SIZE}}
    other = restore_field(field.state_dict(), settings)
    assert other.side == 24
    torch.testing.assert_close(render_views(other, pose, camera, SIZE, 1), render_views(field, pose, camera, SIZE, 1))


def test_splats_of_another_field_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no Gaussians"):
        export(tmp_path / "splats.ply", make_procedural_views(2, 8), make_scene_field())
    assert isinstance(build_field("gaussians", 5, 0), GaussianField)


@pytest.mark.slow
@pytest.mark.parametrize("poses", ["predicted", "learned"])
def test_run_without_poses_refines_them_with_the_gaussians(tmp_path, poses):
    settings = {"resolution": 12, "poses": poses, "field": "gaussians", "num_gaussians": 100, "gaussian_steps": 20}
    settings |= {"field_steps": 10, "search_steps": 15, "steps": 2, "num_rendered_views": 2, "samples_per_ray": 8}
    settings |= {"grid_resolution": 10, "flip_rounds": 1, "views_per_step": 4, "rays_per_view": 64, "threads": 1}
    settings |= {"optimize_camera": ("focal",), "search": "dictionary"}
    data = make_procedural_views(12, 12, seed=1)
    run = factorkit.train_nerfdiff(data, out=tmp_path / "run", preset="fast", progress=False, **settings)
    stage = load_partial_run(tmp_path / "run")
    assert stage.stage == "gaussians" and isinstance(run.model.field, GaussianField)
    torch.testing.assert_close(run.poses, stage.views.poses)
    focal = run.model.camera.intrinsics[0, 0]
    torch.testing.assert_close(stage.views.intrinsics[0, 0, 0] / 12, focal)
    (tmp_path / "run" / "stages" / "gaussians").rename(tmp_path / "gaussians")
    grid = load_partial_run(tmp_path / "run").views
    assert (grid.poses - run.poses).abs().max() > 1e-5 and abs(grid.intrinsics[0, 0, 0] / 12 - focal) > 1e-6
    assert run.render_path("orbit", frames=2).images.isfinite().all() and run.predict_pose(data).poses.shape == (
        12,
        4,
        4,
    )


@pytest.mark.slow
def test_run_with_gaussians_known_poses_renders_and_exports_as_a_scene(tmp_path):
    data = make_procedural_views(12, 16, seed=1)
    settings = {"resolution": 16, "poses": "known", "field": "gaussians", "num_gaussians": 150, "gaussian_steps": 60}
    settings |= {"field_steps": 20, "steps": 2, "num_rendered_views": 2, "samples_per_ray": 12, "grid_resolution": 12}
    settings |= {"background": "learned", "appearance_dim": 2, "threads": 1}
    run = factorkit.train_nerfdiff(data, out=tmp_path / "run", preset="fast", progress=False, **settings)
    assert isinstance(run.model.field, GaussianField) and len(run.model.field.means) == 150
    loaded = factorkit.load(tmp_path / "run")
    torch.testing.assert_close(loaded.render(run.poses[:2]).images, run.render(run.poses[:2]).images)
    assert "cameras_gaussians" in (run.folder / "report.html").read_text(encoding="utf-8")
    splats = factorkit.load(run.export(tmp_path / "splats.ply", data=data))
    torch.testing.assert_close(splats.model.field.means, run.model.field.means, rtol=0, atol=0)
    assert run.sample(1, steps=2).images.isfinite().all()


def test_neighbour_distances_points_on_a_line_are_the_mean_of_three():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [3, 0, 0], [7, 0, 0], [20, 0, 0]])
    torch.testing.assert_close(neighbour_distances(points), torch.tensor([11.0, 9, 9, 17, 49]) / 3)
    torch.testing.assert_close(neighbour_distances(points[:2]), torch.ones(2))
