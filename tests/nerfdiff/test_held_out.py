"""Checks of finished runs on held-out views."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.views import Views
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.held_out import (
    HeldOutErrors,
    SharedError,
    forward_direction_check,
    held_out_checks,
    shared_error_check,
    shared_error_reason,
)
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.nerfdiff.verdict import judge_cameras, write_report
from factorkit.report.content import read_checks
from factorkit.utils.files import read_log

COUNT, SIZE = 16, 16
SMALL = {
    "preset": "fast",
    "poses": "known",
    "resolution": SIZE,
    "grid_resolution": 16,
    "samples_per_ray": 16,
    "field_steps": 20,
    "steps": 2,
    "num_rendered_views": 0,
    "batch_size": 8,
    "views_per_step": 8,
    "sample_every": 0,
    "device": "cpu",
    "threads": 1,
    "progress": False,
}


def forward_views(kind: str) -> Views:
    """A textured square at depth 2 before a wall at depth 6, or noise, or the scene with exchanged cameras."""
    generator = torch.Generator().manual_seed(0)
    poses = torch.eye(4).repeat(COUNT, 1, 1)
    poses[:, :2, 3] = torch.rand(COUNT, 2, generator=generator) - 0.5
    focal = 1.2 * SIZE
    intrinsics = torch.tensor([[focal, 0, SIZE / 2], [0, focal, SIZE / 2], [0, 0, 1]]).repeat(COUNT, 1, 1)
    y, x = torch.meshgrid(*[(torch.arange(SIZE) + 0.5 - SIZE / 2) / focal] * 2, indexing="ij")
    layers = []
    for depth in (6, 2):
        texture = F.interpolate(torch.rand(1, 3, 6, 6, generator=generator), size=64, mode="bicubic").clamp(0, 1)
        grid = torch.stack([poses[:, 0, 3, None, None] + depth * x, poses[:, 1, 3, None, None] - depth * y], -1)
        layers.append((F.grid_sample(texture.expand(COUNT, -1, -1, -1), grid / 4, align_corners=False), grid))
    square = (layers[1][1].abs() < 0.7).all(-1)[:, None]
    images = torch.where(square, layers[1][0], layers[0][0])
    if kind == "noise":
        images = torch.rand(images.shape, generator=generator)
    if kind == "exchanged":
        poses = poses[torch.randperm(COUNT, generator=generator)]
    names = [f"{i:02d}.png" for i in range(COUNT)]
    return Views(images, names, intrinsics, poses=poses, near=1.2, far=9.0, layout="forward")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "wrong"), [("scene", False), ("noise", True), ("exchanged", True)])
def test_forward_run_is_checked_on_held_out_views(kind, wrong, tmp_path):
    views = forward_views(kind)
    run = train_nerfdiff(views, out=tmp_path / "run", **SMALL)
    log = read_log(run.folder)
    checks = {check["name"]: check for check in read_checks(log)}
    error = checks["held-out error"]
    assert error["high"] == 0.9 and error["status"] == ("failed" if wrong else "passed")
    assert error["value"] > 1 if wrong else error["value"] < 0.6
    assert checks["disparity noise"]["status"] == "measured"
    assert checks["degrees from the mean direction"]["status"] == "passed"
    verdict = judge_cameras(log, {})
    assert verdict.status == ("bad" if wrong else "open")
    assert ("no alarm went off" in " ".join(verdict.details)) is not wrong
    assert "held-out error" in write_report(run.folder).read_text()
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    log = read_log(run.folder)
    again = train_nerfdiff(views, out=tmp_path / "run", **SMALL)
    assert read_log(run.folder) == log, "a finished run is checked once"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_object_run_with_known_poses_is_checked_on_held_out_views(wrong, tmp_path):
    views = make_procedural_views(24, SIZE, seed=1)
    if wrong:
        views = Views(
            views.images, views.names, views.intrinsics, poses=views.poses.roll(7, 0), background=views.background
        )
    train_nerfdiff(views, out=tmp_path / "run", **SMALL)
    (check,) = [c for c in read_checks(read_log(tmp_path / "run")) if c["name"] == "held-out error"]
    assert check["high"] == 0.2 and (check["value"] > 0.4 if wrong else check["value"] < 0.1)


@pytest.mark.slow
def test_a_check_that_did_not_run_is_named_and_never_green(tmp_path):
    run = train_nerfdiff(forward_views("noise"), out=tmp_path / "run", **SMALL | {"field_steps": 3})
    log = read_log(run.folder)
    verdict = judge_cameras(log, {})
    assert verdict.status == "open" and verdict.headline.startswith("No verdict: no check")
    line = "held-out error: not run, since the field was fitted for 3 steps only, fewer than 20."
    assert line in verdict.details and "no alarm went off" not in " ".join(verdict.details)


@pytest.mark.parametrize(
    ("layout", "cross", "nearest", "failures"),
    [
        ("unbounded", 0.41, 0.3, 0),
        ("unbounded", 1.02, 0.79, 1),
        ("forward", 0.72, 0.73, 0),  # the fern
        ("forward", 0.33, 1.11, 1),  # a turntable taken for forward-facing
        ("object", 0.15, 0.93, 0),
        ("object", 0.24, 0.41, 1),
        ("object", 0.58, 1.69, 2),
        ("object", 0.02, 1.3, 0),  # two views are nearly equal
        ("forward", float("nan"), 0.5, 1),
    ],
)
def test_held_out_limits(layout, cross, nearest, failures):
    unbounded = layout == "unbounded"
    layout = "object" if unbounded else layout
    checks = held_out_checks(layout, HeldOutErrors(cross, nearest), 0.2, "", unbounded)
    assert sum(len(check.failures) for check in checks) == failures


def test_cameras_around_an_object_are_no_forward_facing_scene():
    around = forward_direction_check(make_procedural_views(8, 4).poses)
    assert around.status == "failed" and around.failures[0].startswith("layout: ") and around.value > 60
    side_by_side = forward_direction_check(forward_views("scene").poses)
    assert side_by_side.status == "passed" and side_by_side.value == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("layout", "unbounded", "cross", "reason"),
    [
        ("object", False, 0.15, ""),
        ("object", False, 0.03, "since the held-out error is at most 0.05"),
        ("object", False, 0.3, "since the held-out error is beyond its limit already"),
        ("object", True, 0.15, "since it is measured around objects only"),
        ("forward", False, 0.15, "since it is measured around objects only"),
        ("object", False, None, "since 3 views"),
    ],
)
def test_shared_error_is_measured_only_where_it_can_name_something(layout, unbounded, cross, reason):
    errors = None if cross is None else HeldOutErrors(cross, 0.2)
    assert shared_error_reason(layout, unbounded, errors, "since 3 views") == reason
    if reason:
        assert shared_error_check(errors, None, reason).not_run == reason


def test_shared_error_check_fails_where_freed_cameras_explain_held_out_views_better():
    errors = HeldOutErrors(0.15, 0.2)
    assert shared_error_check(errors, SharedError(0.14, 1.0, 1.05), "").status == "passed"
    check = shared_error_check(errors, SharedError(0.08, 10.2, 1.05), "")
    assert check.status == "failed" and "10 degrees nearer to one direction, with 1.05 times" in check.failures[0]


@pytest.mark.slow
def test_a_doubled_focal_length_is_named_by_cross_fits_with_freed_cameras(tmp_path):
    views = make_procedural_views(24, SIZE, seed=1)
    views.intrinsics[:, :2, :2] *= 2
    config = preset_config(**{k: v for k, v in SMALL.items() if k != "progress"})
    scene = open_scene(views, SIZE, torch.device("cpu"), False)
    training = Training(config, scene, tmp_path, {"scene": {}}, progress=False)
    errors = training.cross_fit("cross", scene.poses, scene)
    shared = training.measure_shared_error("shared", scene.poses, scene)
    assert shared_error_check(errors, shared, "").status == "failed" and shared.focal < 0.8
    assert training.scene is scene, "a fit to half of the views does not change the focal length of the run"
