"""Empty space left out: the same image, the same gradients, and a grid that follows the training."""

from __future__ import annotations

import pytest
import torch

import factorkit
from factorkit.data.views.views import Views
from factorkit.nerfdiff.cameras.poses import direction_grid, orbit_poses
from factorkit.nerfdiff.export.shapes import point_cloud
from factorkit.nerfdiff.fields.base import (
    OCCUPANCY_UPDATE_EVERY,
    build_occupancy_grid,
    occupancy_cells,
    occupied_sampling,
    update_occupancy,
)
from factorkit.nerfdiff.fields.kinds import GridField, build_field
from factorkit.nerfdiff.rays import CameraModel, render_pixels, render_views
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.rendering import OccupancySampling, UniformSampling

CAMERA = CameraModel(torch.tensor([[1.5, 0, 0.5], [0, 1.5, 0.5], [0, 0, 1]]), torch.tensor([0.2, 0.5, 1.0]))
POSES = orbit_poses(direction_grid(3, [25]), 3.3)


def ball(resolution: int = 11) -> GridField:
    """A solid ball of many colours and nothing around it."""
    position = torch.linspace(-1, 1, resolution)
    where = torch.stack(torch.meshgrid(position, position, position, indexing="ij"), -1)
    inside = (where.norm(dim=-1, keepdim=True) < 0.55).float()
    field = GridField(resolution)
    field.values.data = torch.cat([5 * inside - 3, where], -1)
    return field


def with_occupancy(field: GridField, cells: int = 32) -> GridField:
    field.occupancy = build_occupancy_grid(cells)
    for _ in range(8):
        field.occupancy.update(lambda p: field(p, p)[0])
    return field


@pytest.mark.parametrize("forward", [False, True])
def test_occupancy_render_equals_the_plain_one(forward):
    camera_model = CameraModel(CAMERA.intrinsics, CAMERA.background, forward)
    poses = torch.eye(4)[None] if forward else POSES
    plain = render_views(ball(), poses, camera_model, (14, 12), 256)
    field = with_occupancy(ball())
    rendered = render_views(field, poses, camera_model, (14, 12), 256)
    assert field.occupancy.share_occupied() < 0.3 and rendered.num_steps < 0.4 * plain.num_steps
    assert (rendered.opacity > 0.9).any() and (rendered.opacity < 0.01).any()
    for a, b in ((rendered.color, plain.color), (rendered.opacity, plain.opacity)):
        assert (a - b).abs().max() < 0.05 and (a - b).abs().mean() < 0.003
    solid = plain.opacity > 0.95
    assert (rendered.depth - plain.depth)[solid].abs().max() < (0.5 if forward else 0.02)


def test_occupied_sampling_part_of_the_box_has_a_grid_of_its_own():
    field = with_occupancy(ball())
    assert occupied_sampling(field, (-1.0,) * 3, (1.0,) * 3).occupancy is field.occupancy
    views = Views(torch.ones(3, 3, 16, 16), list("abc"), CAMERA.pixel_intrinsics(16, 16).expand(3, 3, 3), poses=POSES)
    points = point_cloud(field, views, (0.0, -1.0, -1.0), (1.0, 1.0, 1.0), 500).points
    assert len(points) and points[:, 0].min() > -0.02


def test_occupancy_gradients_match_finite_differences():
    torch.manual_seed(0)
    field = with_occupancy(ball(9)).double()
    camera_model = CameraModel(CAMERA.intrinsics.double(), CAMERA.background.double())
    direction = direction_grid(3, [25]).double().requires_grad_()
    pixels, weight = torch.randint(0, 12 * 12, (3, 20)), torch.randn(3, 20, 3).double()

    def loss(direction):
        return (
            render_pixels(field, orbit_poses(direction, 3.3), camera_model, pixels, (12, 12), 24, 5).color * weight
        ).sum()

    result = loss(direction)
    slope, change = torch.autograd.grad(result, (direction, field.values))
    assert slope.abs().max() > 0.1
    for _ in range(3):
        directions = torch.randn_like(direction)
        step = 1e-7 * directions
        rise = (loss(direction + step) - loss(direction - step)) / 2e-7
        assert rise.item() == pytest.approx((slope * directions).sum().item(), rel=1e-4, abs=1e-5)
    directions = torch.randn_like(field.values)
    with torch.no_grad():
        field.values += 1e-6 * directions
        above = loss(direction)
        field.values -= 2e-6 * directions
        below = loss(direction)
    assert ((above - below) / 2e-6).item() == pytest.approx((change * directions).sum().item(), rel=1e-4)


def test_update_occupancy_is_periodic_and_skips_blurred_fields():
    field = ball()
    update_occupancy(field, OCCUPANCY_UPDATE_EVERY)  # has no grid
    field.occupancy = build_occupancy_grid(32)
    for step in (0, OCCUPANCY_UPDATE_EVERY - 1, OCCUPANCY_UPDATE_EVERY + 1):
        update_occupancy(field, step)
    field.coarseness = 0.5
    update_occupancy(field, OCCUPANCY_UPDATE_EVERY)
    assert field.occupancy.num_updates == 0 and field.occupancy.share_occupied() == 1
    field.coarseness = 0.0
    update_occupancy(field, OCCUPANCY_UPDATE_EVERY)
    update_occupancy(field, 2 * OCCUPANCY_UPDATE_EVERY)
    assert field.occupancy.num_updates == 2 and 0.02 < field.occupancy.share_occupied() < 0.3


def test_occupancy_sampling_has_the_step_of_uniform_sampling():
    field = ball()
    field.occupancy = build_occupancy_grid(32)  # all of it occupied
    plain, rendered = (render_views(f, POSES, CAMERA, (6, 6), 64) for f in (ball(), field))
    assert (rendered.color - plain.color).abs().max() < 0.05
    from factorkit.nerfdiff.rays import build_sampling

    assert isinstance(build_sampling(ball(), 64), UniformSampling)
    assert build_sampling(field, 64) == OccupancySampling(field.occupancy, step=2 / 64)
    assert build_sampling(field, 64, forward_facing=True).step == 1 / 64
    assert (occupancy_cells(32), occupancy_cells(64), occupancy_cells(128)) == (32, 64, 64)


def test_occupied_sampling_uses_the_trained_grid():
    field, corners = with_occupancy(ball()), ((-1.0,) * 3, (1.0,) * 3)
    own, made = occupied_sampling(field, *corners), occupied_sampling(ball(), *corners)
    assert own.occupancy is field.occupancy and own.step == made.step


@pytest.mark.parametrize("changes", [{}, {"search": "joint"}, {"poses": "known", "field": "hashgrid"}])
@pytest.mark.usefixtures("short_flip_tests")
def test_run_trains_and_stores_the_occupancy_grid(changes, tmp_path, scene_views, tiny):
    steps = 2 * OCCUPANCY_UPDATE_EVERY + 2
    settings = tiny | {"occupancy": True, "field_steps": steps, "steps": steps} | changes
    run = train_nerfdiff(scene_views, out=tmp_path / "run", **settings)
    grid = run.model.field.occupancy
    assert grid.num_updates == (1 if "search" in changes else 2), "the joint training is blurred in its first half"
    again = factorkit.load(tmp_path / "run", device="cpu")
    assert torch.equal(again.model.field.occupancy.bits, grid.bits)
    assert torch.equal(again.render(run.poses).images, run.render(run.poses).images)
    single = factorkit.load(run.save(tmp_path / "one.safetensors"), device="cpu")
    assert torch.equal(single.model.field.occupancy.density, grid.density)


@pytest.mark.usefixtures("short_flip_tests")
def test_refine_grid_of_another_field_kind_has_no_occupancy(tmp_path, scene_views, tiny, monkeypatch):
    """With another kind of field asked for, the refinement's lattice goes without: it gains nothing."""
    from factorkit.nerfdiff.build import load_partial_run

    run = train_nerfdiff(scene_views, out=tmp_path / "run", **tiny | {"occupancy": True, "field": "hashgrid"})
    assert run.model.field.occupancy is not None
    stages = {path.name for path in (tmp_path / "run" / "stages").iterdir()}
    assert {"refine", "fit"} <= stages and load_partial_run(tmp_path / "run").field.occupancy is not None
    assert build_field("grid", 4, 0).occupancy is None
