"""Tones of single images: they change colours, never densities, and are learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import factorkit
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff.cameras.poses import direction_grid, orbit_poses
from factorkit.nerfdiff.fields.base import Appearance
from factorkit.nerfdiff.fields.kinds import GridField, build_field
from factorkit.nerfdiff.rays import CameraModel, render_pixels, render_views
from factorkit.nerfdiff.stages.dictionary import candidate_errors
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.utils.errors import ConfigError

CAMERA = CameraModel(torch.tensor([[1.5, 0, 0.5], [0, 1.5, 0.5], [0, 0, 1]]), torch.tensor([0.2, 0.5, 1.0]))
POSES = orbit_poses(direction_grid(3, [25]), 3.3)


def field_with_appearance(background: str = "given", width: int = 2) -> GridField:
    torch.manual_seed(1)
    field = build_field("grid", 5, 3, background=background, views=4, appearance_dim=width)
    field.values.data.mul_(8)
    field.appearance.codes.data.normal_(std=0.3)
    return field


@pytest.mark.parametrize("background", ["given", "learned"])
def test_appearance_is_an_affine_map_of_radiance(background):
    field, views = field_with_appearance(background), torch.tensor([2, 0, 3])
    rendered = render_views(field, POSES, CAMERA, (4, 5), 24, views)
    codes = field.appearance.codes - field.appearance.codes.mean(0)
    for i, view in enumerate(views.tolist()):
        numbers = codes[view] @ field.appearance.map
        matrix, shift = numbers[:9].reshape(3, 3), numbers[9:]

        def mapped(p, d, matrix=matrix, shift=shift):
            sigma, color = field(p, d)
            return sigma, color + color @ matrix + shift

        behind = CAMERA.background
        if background == "learned":  # what is learned has the view's tone too, what is given has not
            behind = field.background(torch.zeros(3))
            behind = behind + behind @ matrix + shift
        expected = render_views(mapped, POSES[i : i + 1], replace(CAMERA, background=behind), (4, 5), 24)
        assert torch.allclose(rendered.color[i], expected.color[0], atol=1e-5)
    assert not torch.allclose(rendered.color, render_views(field, POSES, CAMERA, (4, 5), 24).color, atol=1e-3)


def test_appearance_leaves_densities_and_the_mean_code_is_identity():
    field, views = field_with_appearance(), torch.tensor([2, 0, 3])
    before = render_views(field, POSES, CAMERA, (4, 5), 24)
    rendered = render_views(field, POSES, CAMERA, (4, 5), 24, views)
    assert torch.equal(before.opacity, rendered.opacity) and torch.equal(before.depth, rendered.depth)
    p = torch.rand(50, 3) * 2 - 1
    sigma = field(p, p)[0]
    field.appearance.codes.data.normal_()
    assert torch.equal(field(p, p)[0], sigma)
    assert torch.equal(render_views(field, POSES, CAMERA, (4, 5), 24).color, before.color)
    field.appearance.codes.data.copy_(torch.tensor([1.0, -2.0]).expand(4, 2))  # all at their mean
    again = render_views(field, POSES, CAMERA, (4, 5), 24, views)
    assert torch.allclose(again.color, before.color, atol=1e-6)


def test_appearance_gradients_match_finite_differences():
    torch.manual_seed(0)
    appearance, views = Appearance(3, 2, seed=1).double(), torch.tensor([2, 0])
    color, opacity = torch.rand(2, 5, 3).double(), torch.rand(2, 5).double()

    def mapped(codes, matrix, color, opacity):
        return torch.func.functional_call(appearance, {"codes": codes, "map": matrix}, (views, color, opacity))

    inputs = (torch.randn(3, 2).double(), torch.randn(2, 12).double(), color, opacity)
    assert torch.autograd.gradcheck(mapped, [x.requires_grad_() for x in inputs])


def test_render_pixels_and_candidate_errors_use_the_views_appearance():
    field, views = field_with_appearance(), torch.tensor([1, 3, 0])
    pixels = torch.tensor([[0, 7], [3, 19], [11, 2]])
    rendered = render_views(field, POSES, CAMERA, (4, 5), 24, views).color.flatten(1, 2)
    some = render_pixels(field, POSES, CAMERA, pixels, (4, 5), 24, views=views).color
    assert torch.allclose(some, torch.stack([s[p] for s, p in zip(rendered, pixels, strict=True)]), atol=1e-5)
    images = render_views(field, POSES, CAMERA, (4, 5), 24, views).color.movedim(-1, 1)
    errors = candidate_errors(field, POSES, CAMERA, images, 24, views)
    assert errors.shape == (3, 3) and errors.diagonal().max() < 1e-9 and errors.argmin(1).tolist() == [0, 1, 2]
    assert candidate_errors(field, POSES, CAMERA, images, 24).diagonal().min() > 1e-5


@pytest.fixture(scope="module")
def tinted_views():
    """Views of the procedural scene, half of them of twice the red and half the blue of the others."""
    views = make_procedural_views(24, 16, seed=1)
    gain = torch.ones(24, 3, 1, 1)
    gain[::2] = torch.tensor([1.4, 1.0, 0.7])[:, None, None]
    gain[1::2] = torch.tensor([0.7, 1.0, 1.4])[:, None, None]
    images = (views.images - (1 - views.masks)) * gain + 1 - views.masks
    return replace(views, images=images.clamp(0, 1))


def test_appearance_codes_improve_views_of_varying_colour(tinted_views, tiny, tmp_path):
    settings = tiny | {
        "resolution": 16,
        "poses": "known",
        "grid_resolution": 16,
        "samples_per_ray": 20,
        "rays_per_view": 64,
        "views_per_step": 8,
        "field_steps": 150,
        "num_rendered_views": 0,
    }
    errors = {}
    for width in (0, 3):
        run = train_nerfdiff(tinted_views, out=tmp_path / str(width), **settings | {"appearance_dim": width})
        views = torch.arange(24) if width else None
        rendered = render_views(run.model.field, run.poses, run.model.camera, (16, 16), 20, views).color.movedim(-1, 1)
        errors[width] = (rendered - tinted_views.images).square().mean().item()
        if width:
            reds = [run.render(run.poses[:1], appearance_view=i).images[0, 0].mean() for i in (0, 1)]
            mean = run.render(run.poses[:1]).images[0, 0].mean()
            assert reds[0] > mean > reds[1]
            single = factorkit.load(run.save(tmp_path / "one.safetensors"), device="cpu")
            apply_appearance = (r.render_path(run.poses[:2], appearance_view=5).images for r in (run, single))
            assert torch.equal(*apply_appearance)
            with pytest.raises(ConfigError, match="appearance_view=24: give a view from 0 to 23"):
                run.render(run.poses[:1], appearance_view=24)
        else:
            with pytest.raises(ConfigError, match="appearance_dim=4"):
                run.render(run.poses[:1], appearance_view=0)
    assert errors[3] < 0.5 * errors[0], errors


@pytest.mark.parametrize("changes", [{}, {"search": "joint"}])
@pytest.mark.usefixtures("short_flip_tests")
def test_every_stage_has_appearance_codes(changes, tmp_path, scene_views, tiny):
    run = train_nerfdiff(scene_views, out=tmp_path / "run", **tiny | {"appearance_dim": 2} | changes)
    assert run.model.field.appearance.codes.shape == (10, 2) and (run.model.field.appearance.codes != 0).any()
    with pytest.raises(ConfigError, match="appearance_dim=-1"):
        train_nerfdiff(scene_views, out=tmp_path / "x", **tiny | {"appearance_dim": -1})
