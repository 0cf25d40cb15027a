"""Backgrounds nobody told the trainer of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import factorkit
from factorkit.nerfdiff.cameras.poses import direction_grid, orbit_poses
from factorkit.nerfdiff.fields.base import BACKGROUNDS, build_background
from factorkit.nerfdiff.fields.kinds import GridField, build_field
from factorkit.nerfdiff.rays import CameraModel, render_pixels, render_views
from factorkit.nerfdiff.stages.refine import field_parameter_groups
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.rendering import image_rays
from factorkit.utils.errors import ConfigError

CAMERA = CameraModel(torch.tensor([[1.5, 0, 0.5], [0, 1.5, 0.5], [0, 0, 1]]), torch.tensor([0.2, 0.5, 1.0]))
POSES = orbit_poses(direction_grid(3, [25]), 3.3)
SEA = torch.tensor([0.1, 0.4, 0.6])


def empty(background: str) -> GridField:
    """Nothing before a background."""
    field = build_field("grid", 4, 0, background=background)
    field.values.data.fill_(-20.0)
    return field


def test_learned_background_is_one_colour():
    field = empty("learned")
    optimizer = torch.optim.Adam(field.background.parameters(), 0.1)
    for _ in range(100):
        rendered = render_pixels(field, POSES, CAMERA, torch.arange(12).expand(3, 12), (4, 4), 6).color
        optimizer.zero_grad()
        (rendered - SEA).square().mean().backward()
        optimizer.step()
    rendered = render_views(field, POSES, CAMERA, (4, 4), 6)
    assert torch.allclose(rendered.color, SEA.expand_as(rendered.color), atol=0.01)
    assert torch.allclose(render_views(empty("given"), POSES, CAMERA, (4, 4), 6).color[0, 0, 0], CAMERA.background)


@pytest.mark.parametrize("forward", [False, True])
def test_background_field_depends_on_the_direction_alone(forward):
    """Also of a forward-facing scene, whose rays are bent before the field sees them."""
    torch.manual_seed(0)
    field, camera_model = empty("field"), CameraModel(CAMERA.intrinsics, CAMERA.background, forward)
    field.background.last.weight.data.normal_()
    transformed = torch.eye(4).repeat(2, 1, 1)
    transformed[1, :3, 3] = torch.tensor([0.1, 0.2, -0.1])
    rendered = render_views(field, transformed, camera_model, (5, 4), 6).color
    assert torch.allclose(rendered[0], rendered[1], atol=1e-6) and rendered[0].std() > 0.01
    directions = image_rays(transformed[:1], camera_model.pixel_intrinsics(5, 4), 5, 4).directions
    assert torch.allclose(rendered[:1], field.background(directions), atol=1e-6)
    pixels = torch.tensor([[3, 17], [3, 17]])
    some = render_pixels(field, transformed, camera_model, pixels, (5, 4), 6).color
    assert torch.allclose(some, rendered.flatten(1, 2)[:, pixels[0]])


def test_background_gradients_reach_background_and_pose():
    field = build_field("grid", 5, 0, background="field").double()
    torch.nn.init.normal_(field.background.last.weight)
    camera_model = CameraModel(CAMERA.intrinsics.double(), CAMERA.background.double())
    direction = direction_grid(3, [25]).double().requires_grad_()

    def loss(direction):
        pixels = torch.arange(12).expand(3, 12)
        return render_pixels(field, orbit_poses(direction, 3.3), camera_model, pixels, (4, 4), 9).color.sum()

    slope, change = torch.autograd.grad(loss(direction), (direction, field.background.last.bias))
    directions = torch.randn_like(direction)
    rise = (loss(direction + 1e-6 * directions) - loss(direction - 1e-6 * directions)) / 2e-6
    assert rise.item() == pytest.approx((slope * directions).sum().item(), rel=1e-5) and (change != 0).all()


def test_background_has_its_own_learning_rate():
    field = build_field("hashgrid", 8, 0, background="learned", views=4, appearance_dim=2)
    groups = field_parameter_groups(field, 1e-4, 1e-3)
    assert [g["scale"] for g in groups] == pytest.approx([0.1, 30.0, 10.0])
    assert sum(len(g["params"]) for g in groups) == len(list(field.parameters()))
    field.requires_grad_(False)
    assert field_parameter_groups(field, 1e-4, 1e-3) == []


def test_resampled_grid_keeps_background_and_appearance():
    field = build_field("grid", 4, 0, background="learned", views=3, appearance_dim=2)
    field.background.raw.data.fill_(0.7)
    field.appearance.codes.data.fill_(0.3)
    finer = field.resampled(6)
    assert torch.equal(finer.background.raw, field.background.raw) and finer.background is not field.background
    assert torch.equal(finer.appearance.codes, field.appearance.codes)


@pytest.mark.parametrize("background", BACKGROUNDS[1:])
@pytest.mark.parametrize("changes", [{}, {"search": "joint"}, {"poses": "known", "field": "hashgrid"}])
@pytest.mark.usefixtures("short_flip_tests")
def test_run_learns_and_stores_the_background(background, changes, tmp_path, scene_views, tiny):
    views = replace(scene_views.with_background(SEA), background=None, masks=None)
    settings = tiny | {"background": background, "field_steps": 20} | changes
    run = train_nerfdiff(views, out=tmp_path / "run", **settings)
    directions = torch.nn.functional.normalize(torch.randn(20, 3), dim=1)
    behind = run.model.field.background(directions)
    if "search" not in changes:  # whose few steps are fewer
        assert (behind - SEA).abs().mean() < 0.8 * (0.5 - SEA).abs().mean(), behind.mean(0)
    single = factorkit.load(run.save(tmp_path / "one.safetensors"), device="cpu")
    assert torch.equal(single.model.field.background(directions), behind)
    assert torch.equal(single.render(run.poses).images, run.render(run.poses).images)
    assert single.views.background is None
    if not changes:
        from factorkit.nerfdiff.build import load_partial_run

        assert load_partial_run(tmp_path / "run").field.background is not None
        run.export(tmp_path / "colmap", points=100)


def test_build_background_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="background='forest' is unknown; choose one of given, learned, field"):
        build_background("forest", 0)
