"""Views of several focal lengths in one scene."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from factorkit.data.procedural.scene import make_procedural_views, make_scene_field
from factorkit.nerfdiff.alarms import unexplained_variance
from factorkit.nerfdiff.cameras.poses import FreePoses, direction_grid, dolly_poses, orbit_poses
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.scene import (
    gather_pixels,
    match_size,
    open_scene,
    relative_intrinsics,
    scale_focal,
    shared_camera,
    with_intrinsics,
)
from factorkit.nerfdiff.stages.dictionary import candidate_errors
from factorkit.nerfdiff.stages.refine import FitTask, SceneFit
from factorkit.nerfdiff.train import train_nerfdiff

CPU = torch.device("cpu")


def join(one, other):
    """One scene of two sets of views."""
    per_view = {key: torch.cat([getattr(one, key), getattr(other, key)]) for key in ("images", "intrinsics", "poses")}
    names = [f"{i}.png" for i in range(len(one) + len(other))]
    return replace(one, names=names, masks=None, **per_view)


def make_views(count: int, size: int, seed: int):
    """Half of the views with a field of view of 50 degrees, half with 75."""
    return join(
        make_procedural_views(count // 2, size, seed=seed, fov=50),
        make_procedural_views(count // 2, size, seed=seed + 50, fov=75),
    )


@pytest.fixture(scope="module")
def views():
    return make_views(6, 12, 1)


def test_open_scene_encoder_sees_all_views_through_one_camera(views):
    scene = open_scene(views, 12, CPU)
    assert scene.camera.of_views().shape == (6, 3, 3)
    wide = scene.camera.of_views()[5]
    torch.testing.assert_close(scene.camera.intrinsics, wide)
    torch.testing.assert_close(scene.encoder_images[5], views.images[5], atol=1e-5, rtol=0)
    assert (scene.encoder_images[0] - views.images[0]).abs().mean() > 0.01
    assert torch.equal(scene.encoder_images[0, :, 0, 0], torch.ones(3))  # outside of the narrow view
    same = open_scene(views.select(slice(0, 3)), 12, CPU)
    assert same.camera.view_intrinsics is None
    assert same.encoder_images is same.images


def test_scene_fit_renders_each_view_by_its_own_intrinsics(views):
    camera = shared_camera(views)
    model = SceneFit(make_scene_field(), FreePoses(views.poses), camera, (12, 12), 32)
    rows, pixels = torch.tensor([0, 5]), torch.arange(144).expand(2, -1)
    color = model(rows, pixels, 0).color
    assert (color - gather_pixels(views.images[rows], pixels)).square().mean() < 0.01
    pairs = zip(views.poses[rows], camera.of_views(rows), strict=True)
    field, size = make_scene_field(), (12, 12)
    own = [render_views(field, pose, camera, size, 64, intrinsics=k).color.flatten(0, 1) for pose, k in pairs]
    assert (color - torch.stack(own)).square().mean() < 0.003
    one = SceneFit(make_scene_field(), FreePoses(views.poses), replace(camera, view_intrinsics=None), (12, 12), 32)
    assert (one(rows, pixels, 0).color[0] - gather_pixels(views.images[rows], pixels)[0]).square().mean() > 0.02


def test_scene_fit_focal_length_scales_those_of_all_views(views):
    camera = shared_camera(views)
    model = SceneFit(make_scene_field(), FreePoses(views.poses), camera, (12, 12), 8, optimize_focal=True)
    model.log_focal.data.fill_(0.1)
    ratio = model.camera.of_views() / camera.of_views()
    assert ratio[:, 0, 0].tolist() == pytest.approx([1.10517] * 6, abs=1e-4)
    assert ratio[:, 0, 2].tolist() == pytest.approx([1.0] * 6)


def test_candidate_errors_of_two_cameras_equal_those_of_each(views):
    camera, field = shared_camera(views), make_scene_field()
    poses = orbit_poses(direction_grid(5, [30]), 4.0)
    errors = candidate_errors(field, poses, camera, views.images, 16, intrinsics=camera.of_views())
    for i in (0, 5):
        own = replace(camera, intrinsics=camera.of_views()[i], view_intrinsics=None)
        torch.testing.assert_close(errors[i : i + 1], candidate_errors(field, poses, own, views.images[i : i + 1], 16))


def test_with_intrinsics_other_focal_length_is_that_of_the_foreground_too():
    scene = open_scene(make_procedural_views(3, 12, seed=1), 12, CPU)
    longer = with_intrinsics(scene, scene.camera.intrinsics * torch.tensor([1.5, 1.2, 1.0])[:, None])
    before, after = scene.foreground.intrinsics, longer.foreground.intrinsics
    expected = before.diagonal(dim1=1, dim2=2) * torch.tensor([1.5, 1.2, 1.0])
    torch.testing.assert_close(after.diagonal(dim1=1, dim2=2), expected)
    assert torch.equal(after[:, :2, 2], before[:, :2, 2]) and longer.distance == scene.distance


@pytest.mark.slow
def test_fit_task_alarms_use_the_focal_length_of_the_fit(tmp_path):
    views = make_procedural_views(6, 12, seed=1)
    scene = open_scene(views, 12, CPU)
    short = scale_focal(scene, 1 / 1.5)
    field = make_scene_field()
    field.capturable = False
    model = SceneFit(
        field, FreePoses(dolly_poses(views.poses, 1 / 1.5)), short.camera, (12, 12), 32, optimize_focal=True
    )
    model.log_focal.data.fill_(math.log(1.5))
    task = FitTask(preset_config("fast", resolution=12), short, model, preview_name="refine")
    with torch.no_grad():
        error = task.inspect(model, 10, tmp_path)["error"]
    true = unexplained_variance(make_scene_field(), scene, views.poses, task.config.samples_per_ray)
    assert error == pytest.approx(true, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"search": "joint"}])
@pytest.mark.usefixtures("short_flip_tests")
def test_train_two_focal_lengths_run_keeps_them_and_resumes(tmp_path, tiny, settings):
    views = make_views(6, 8, 1)
    run = train_nerfdiff(views, out=tmp_path / "run", **{**tiny, **settings})
    torch.testing.assert_close(run.views.intrinsics, views.intrinsics, atol=1e-4, rtol=0)
    again = train_nerfdiff(views, out=tmp_path / "run", **{**tiny, **settings})
    assert torch.equal(again.poses, run.poses)
    result = run.predict_pose(views, refine=1)
    assert result.poses.shape == (6, 4, 4)
    renders = run.reconstruct(views.select([0, 5]))
    assert renders.images.shape == (2, 3, 8, 8)
    scores = run.evaluate(views)
    assert scores["size"] == [8, 8]


@pytest.mark.slow
def test_train_two_focal_lengths_explain_held_out_views_better_than_one_averaged(tmp_path):
    settings = {"preset": "fast", "resolution": 16, "poses": "known", "grid_resolution": 16, "samples_per_ray": 24}
    settings |= {"field_steps": 80, "steps": 2, "num_rendered_views": 0, "batch_size": 8, "views_per_step": 8}
    views, held_out = make_views(20, 16, 1), make_views(4, 16, 9)
    mean = replace(views, intrinsics=views.intrinsics.mean(0).expand(20, 3, 3))
    scores = [
        train_nerfdiff(v, out=tmp_path / name, progress=False, **settings).evaluate(held_out)["psnr"]
        for name, v in (("own", views), ("mean", mean))
    ]
    assert scores[0] > scores[1] + 2  # 28.6 and 24.4 dB


@pytest.mark.slow
def test_reconstruct_views_of_another_camera_shows_what_they_show(finished, scene_views):
    """A wider camera sees more around the same middle."""
    k = scene_views.intrinsics * torch.tensor([0.5, 0.5, 1])[:, None]
    k[:, :2, 2] = torch.tensor([8.0, 4.0])
    images = torch.nn.functional.pad(scene_views.images, (4, 4, 0, 0), value=1.0)
    wide = replace(scene_views, images=images, intrinsics=k, masks=None)
    assert match_size(wide, finished.model.size).size == (4, 8)
    renders = finished.reconstruct(wide, 16)
    assert renders.images.shape == (10, 3, 8, 16)
    own = relative_intrinsics(wide)[0] * torch.tensor([16.0, 8.0, 1.0])[:, None]
    torch.testing.assert_close(renders.images, finished.render(renders.poses, (8, 16), intrinsics=own).images)
