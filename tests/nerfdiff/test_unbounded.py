"""Photos around an object in a room: when the field covers all of space, and that everything works with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from factorkit.data.views.views import Views
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.fields.base import viewer_sampling
from factorkit.nerfdiff.fields.kinds import build_field
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.scene import choose_unbounded, open_scene
from factorkit.nerfdiff.train import choose_capture_settings, list_notes, train_nerfdiff
from factorkit.rendering import Rays, contract, render
from factorkit.utils.errors import ConfigError
from tests.nerfdiff.textured import make_intrinsics_of, orbit, render_photo

CPU = torch.device("cpu")


def room(count=10, side=16) -> Views:
    k, poses = make_intrinsics_of((side, side)), orbit(360 * np.arange(count) / count)
    images = [render_photo(pose, k, (side, side))[0] for pose in poses]
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    intrinsics = torch.from_numpy(k).float().expand(count, 3, 3)
    return Views(tensor, [f"{i:02d}.jpg" for i in range(count)], intrinsics, poses=torch.from_numpy(poses).float())


def choose(views, **settings):
    config = preset_config("fast", resolution=max(views.size), **{"poses": "known", **settings})
    scene = open_scene(views, max(views.size), CPU, config.poses == "known")
    return choose_capture_settings(config, scene), scene


def test_unbounded_auto_depends_on_poses_masks_background_and_directions():
    views = room()
    config, scene = choose(views)
    assert config.unbounded == "yes" and any("all of space" in note for note in list_notes(views, scene, config))
    outwards = scene.poses @ torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    assert choose_unbounded(replace(config, unbounded="auto"), replace(scene, poses=outwards)) == "no"
    for settings in ({"poses": "predicted", "search": "dictionary"}, {"poses": "learned"}):
        assert choose(views, **settings)[0].unbounded == "no"
    assert choose(replace(views, background=torch.ones(3)))[0].unbounded == "no"
    assert choose(replace(views, masks=torch.ones(10, 1, 16, 16)))[0].unbounded == "no"
    found = replace(scene, poses=None, initial_poses=scene.poses)
    assert choose_unbounded(preset_config("fast", search="sfm"), found) == "yes"
    stored = {"scene": {}, "unbounded": "no"}
    assert choose_capture_settings(preset_config("fast", poses="known"), scene, stored).unbounded == "no"


def test_unbounded_sizes_are_smaller_unless_given_or_stored():
    views = room(8, 64)
    scene = open_scene(views, 64, CPU, True)

    def choose_sizes(stored=None, preset="fast", **settings):
        config = preset_config(preset, **{"poses": "known", "resolution": 64, **settings})
        config = choose_capture_settings(config, scene, stored or {})
        return config.grid_resolution, config.samples_per_ray, config.field_steps

    assert choose_sizes() == (48, 32, 600)
    assert choose_sizes(samples_per_ray=50) == (48, 50, 600)
    assert choose_sizes(unbounded="no") == (64, 64, 1200)
    stored = {"scene": {}, "unbounded": "yes", "field": "grid", "grid_resolution": 64, "samples_per_ray": 64}
    assert choose_sizes(stored | {"field_steps": 1200}) == (64, 64, 1200), "a run of an earlier version resumes"
    assert choose_sizes(preset=None) == (32, 32, 600)


def test_field_auto_is_gaussians_for_unbounded_scenes_too():
    views = room()
    large, scene = preset_config("fast", resolution=96, poses="known"), choose(views)[1]
    config = choose_capture_settings(large, scene)
    assert (config.field, config.unbounded, config.grid_resolution, config.field_steps) == ("gaussians", "yes", 48, 600)
    config = choose_capture_settings(preset_config("fast", resolution=96, poses="known", field="grid"), scene)
    assert (config.field, config.grid_resolution, config.field_steps) == ("grid", 72, 900)
    config = choose_capture_settings(replace(large, unbounded="no"), scene)
    assert (config.field, config.grid_resolution, config.field_steps) == ("gaussians", 64, 1200)
    notes = list_notes(views, scene, config, large)
    assert any('field="gaussians": views of 64 pixels or more' in note for note in notes)
    stored = preset_config("fast", resolution=96, field="grid").to_dict() | {"scene": {}, "unbounded": "no"}
    config = choose_capture_settings(large, scene, stored)
    assert (config.field, config.unbounded, config.grid_resolution) == ("grid", "no", 96), "an earlier run resumes"


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        ({}, "forward", "forward-facing"),
        ({"poses": "predicted", "search": "dictionary"}, "object", "needs known poses"),
    ],
)
def test_unbounded_yes_for_another_scene_is_refused(settings, layout, message):
    views = room()
    if layout == "forward":
        views = replace(views, layout="forward", poses=views.poses[:1].expand(10, 4, 4) + 0)
    with pytest.raises(ConfigError, match=message):
        choose(views, unbounded="yes", **settings)


def test_total_variation_unbounded_depends_on_slopes_not_on_the_number_of_vertices():
    ramps = []
    for vertices in (32, 64):
        field = build_field("grid", vertices, 0, unbounded=True)
        field.values.data = torch.linspace(-1, 1, vertices)[:, None, None, None].expand(-1, vertices, vertices, 4)
        ramps.append(float(field.total_variation().detach()))
    assert ramps[1] == pytest.approx(ramps[0], rel=0.04)  # one vertex in 32 and in 64 is no interval
    field.unbounded = False
    assert ramps[1] == pytest.approx(6 * 4 * float(field.total_variation().detach()))


@pytest.mark.parametrize("kind", ["grid", "hashgrid"])
def test_field_unbounded_is_the_box_field_of_contracted_positions(kind):
    field = build_field(kind, 8, 0, unbounded=True)
    positions = 3 * torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    density, color = field(positions, positions)
    field.unbounded = False
    plain, plain_color = field(contract(positions), positions)
    stretch = positions.abs().amax(1).clamp_min(1) ** 2
    assert torch.equal(color, plain_color) and torch.equal(density, plain / stretch)
    inside = positions.abs().amax(1) <= 1
    assert torch.equal(density[inside], plain[inside]) and (density > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("field", ["hashgrid", "gaussians"])
def test_train_room_renders_exports_and_resumes_as_unbounded(tmp_path, tiny, field):
    views, out = room(), tmp_path / "room"
    settings = tiny | {"resolution": 16, "poses": "known", "field": field, "field_steps": 12}
    settings |= {"num_gaussians": 200, "gaussian_steps": 12}
    run = train_nerfdiff(views, out=out, **settings)
    assert run.config.unbounded == "yes" and run.model.field.unbounded and run.model.field.occupancy is None
    again = NerfdiffRun.load(out)
    assert torch.equal(again.render_path("orbit", frames=2).images, run.render_path("orbit", frames=2).images)
    far = 3 * torch.randn(4096, 3, generator=torch.Generator().manual_seed(0))
    assert again.model.field(far, far)[0][far.abs().amax(1) > 1.5].max() > 0
    resumed = train_nerfdiff(views, out=out, **settings)
    assert resumed.step == run.step
    with pytest.raises(Exception, match="unbounded"):
        train_nerfdiff(views, out=out, **settings, unbounded="no")
    mesh = run.export(out / "mesh.ply", level=1e-3, resolution=16)  # of the box in the middle
    assert mesh.is_file()


def test_viewer_sampling_unbounded_field_sees_what_is_outside_the_box():
    field = build_field("grid", 8, 0, unbounded=True)
    with torch.no_grad():
        field.values.fill_(-9.0)
        field.values[:, :, 7, 0] = 9.0  # contracted, x near 1
    rays = Rays(torch.tensor([[-2.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]))
    corners = (-1.0,) * 3, (1.0,) * 3
    assert render(field, rays, viewer_sampling(field, *corners)).opacity > 0.9
    field.unbounded = False
    assert render(field, rays, viewer_sampling(field, *corners)).depth < 3
