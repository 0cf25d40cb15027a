from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import factorkit
from factorkit.cli.main import main
from factorkit.engine.checkpoint import read_checkpoint
from factorkit.metrics.pose import rotation_errors_degrees
from factorkit.nerfdiff.cameras.poses import direction_vectors, orbit_poses
from factorkit.nerfdiff.epipolar_check import EPIPOLAR_CHECK, IN_TRAINING, EpipolarCheck
from factorkit.nerfdiff.export.frames import write_frames
from factorkit.nerfdiff.fields.kinds import GridField
from factorkit.nerfdiff.network import NerfdiffModel
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.stages.localise import TargetImages, refine_poses, select_best_poses
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.report.content import Check, read_checks
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.files import read_log
from tests.engine.trained import assert_identical


def test_predict_pose_returns_the_best_scored_candidate(finished, scene_views):
    result = finished.predict_pose(scene_views.images)
    assert (
        result.poses.shape == (10, 4, 4) and result.scores.shape == (10, 3) and result.candidates.shape == (10, 3, 4, 4)
    )
    best = result.scores.argmax(1)
    assert torch.equal(result.poses, result.candidates[torch.arange(10), best])
    alone = finished.predict_pose(scene_views.images[4])
    assert torch.allclose(alone.poses[0], result.poses[4], atol=1e-5), "a view's pose depends on its batch"
    with pytest.raises(ConfigError, match="t=100"):
        finished.predict_pose(scene_views.images, t=100)
    with pytest.raises(DataError, match=r"\(1, 10, 8, 8\)"):
        finished.predict_pose(scene_views.images[:, 0])


def test_predict_pose_larger_images_are_resized(finished, scene_views):
    larger = scene_views.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(finished.predict_pose(larger).poses, finished.predict_pose(scene_views).poses, atol=1e-4)


def test_predict_pose_images_of_another_camera_are_refused(finished, scene_views):
    images = scene_views.images
    for wrong, words in (
        (images[:, :, 2:], "6 x 8 pixels, but the training views have the shape of 8 x 8"),
        (images * 255, r"give colours in \[0, 1\]"),
        (torch.full_like(images, torch.nan), "nan to nan: give colours"),
    ):
        with pytest.raises(DataError, match=words):
            finished.predict_pose(wrong)
    for wrong in (finished.poses[0], torch.full((1, 4, 4), torch.nan)):
        with pytest.raises(DataError, match=r"give \[B, 4, 4\], all of them finite"):
            finished.render(wrong)


def test_render_wider_images_are_not_stretched(finished, monkeypatch):
    square, wide, high = (finished.render(finished.poses, size) for size in (12, (12, 20), (20, 12)))
    torch.testing.assert_close(wide.images[..., 4:16], square.images, atol=1e-3, rtol=0)
    taller = finished.render(finished.poses, 20)
    torch.testing.assert_close(high.images, taller.images[..., 4:16], atol=1e-3, rtol=0)
    monkeypatch.setattr("factorkit.nerfdiff.rendered_scene.MAX_RAYS", 300)  # two images at a time
    assert torch.equal(finished.render(finished.poses, 12).depth, square.depth)


def test_reconstruct_equals_renders_from_predicted_poses(finished, scene_views):
    rendered = finished.reconstruct(scene_views, size=12)
    again = finished.render(finished.predict_pose(scene_views).poses, 12)
    assert torch.equal(rendered.images, again.images) and rendered.images.shape == (10, 3, 12, 12)
    assert rendered.depth.shape == rendered.opacity.shape == (10, 12, 12)
    assert rendered.images.min() >= 0 and rendered.images.max() <= 1 and torch.equal(rendered.poses, again.poses)


@pytest.mark.parametrize("path", ["orbit", "spiral"])
def test_render_path_cameras_look_at_the_scene(finished, path):
    rendered = finished.render_path(path, size=6, frames=8)
    assert rendered.images.shape == (8, 3, 6, 6)
    eye, back = rendered.poses[:, :3, 3], rendered.poses[:, :3, 2]
    assert torch.allclose(torch.nn.functional.normalize(eye, dim=1), back, atol=1e-5)
    heights = eye[:, 2]
    assert (heights.std() < 1e-4) == (path == "orbit")
    inputs = finished.render_path(rendered.poses[:2], size=6)
    assert torch.allclose(inputs.images, rendered.images[:2], atol=1e-5)
    with pytest.raises(ConfigError, match="zigzag"):
        finished.render_path("zigzag")


def test_sample_returns_renders_from_noise(finished):
    drawn = finished.sample(3, seed=1, steps=5, trajectory=True)
    assert drawn.images.shape == (3, 3, 8, 8) and drawn.poses.shape == (3, 4, 4) and len(drawn.trajectory) == 5
    assert [f.t for f in drawn.trajectory] == sorted((f.t for f in drawn.trajectory), reverse=True)
    last = drawn.trajectory[-1]
    assert torch.equal(last.cameras.best_poses, drawn.poses) and torch.allclose(last.images, drawn.images, atol=1e-6)
    same, other = finished.sample(3, seed=1, steps=5), finished.sample(3, seed=2, steps=5)
    assert torch.equal(same.images, drawn.images) and not torch.equal(other.poses, drawn.poses)
    with pytest.raises(ConfigError, match="n=0"):
        finished.sample(0)


def test_load_save_round_trip_gives_the_same_model(finished, scene_views, tmp_path):
    folder = factorkit.load(finished.folder, device="cpu")
    single = factorkit.load(finished.save(tmp_path / "one.safetensors"), device="cpu")
    for other in (folder, single):
        assert torch.equal(other.predict_pose(scene_views).poses, finished.predict_pose(scene_views).poses)
        assert torch.equal(other.poses, finished.poses)
    assert single.views.images.shape == (10, 3, 8, 8) and folder.views.names == scene_views.names
    assert torch.equal(folder.views.poses, finished.poses)
    with pytest.raises(CheckpointError, match="not a run folder"):
        factorkit.load(tmp_path)


@pytest.mark.slow
def test_vit_encoder_run_trains_and_loads(scene_views, tmp_path, tiny):
    settings = {name: value for name, value in tiny.items() if name not in ("channel_mult", "model_channels")}
    settings |= {"encoder": "vit", "encoder_depth": 2, "model_channels": 16}
    run = train_nerfdiff(scene_views, out=tmp_path / "run", **settings)
    assert run.predict_pose(scene_views.images[:2]).poses.shape == (2, 4, 4)
    again = factorkit.load(run.save(tmp_path / "vit.safetensors"), device="cpu")
    assert_identical(again.model.state_dict(), run.model.state_dict())


def test_load_other_weights_than_the_average(finished):
    tensors = read_checkpoint(max((finished.folder / "checkpoints").glob("step_*")))[0]
    for weights, prefix in ((0.5, "ema_0.5.module."), ("last", "model.")):
        other = factorkit.load(finished.folder, device="cpu", weights=weights)
        assert all(torch.equal(v, tensors[prefix + k]) for k, v in other.model.state_dict().items())
    pairs = zip(other.model.parameters(), finished.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    stages = [read_checkpoint(path)[0] for path in finished.folder.glob("stages/*/checkpoints/step_*")]
    assert stages and not any(name.startswith("ema_") for stage in stages for name in stage), "the run's own alone"


@pytest.mark.slow
def test_evaluate_scores_cameras_and_renders(finished, scene_views):
    scores = finished.evaluate(scene_views)
    assert scores["psnr"] != scores["psnr_encoder"] and scores["views"] == 10
    assert scores["poses"] == finished.config.poses, "given poses are no evidence"
    assert json.loads((finished.folder / "scores.json").read_text()) == finished.scores == scores
    with pytest.raises(DataError, match="3, 4, 4"):
        finished.evaluate(scene_views, poses=torch.eye(4).repeat(3, 1, 1))


def test_evaluate_perfect_run_in_any_coordinates_scores_perfectly(finished, scene_views, tmp_path, monkeypatch):
    """Found poses that are the true ones, turned and scaled, have no error, and renders at them are compared there."""
    from factorkit.metrics.pose import Similarity
    from factorkit.nerfdiff import evaluate as scoring

    turn = orbit_poses(direction_vectors(torch.tensor(50.0), torch.tensor(20.0)), 1.0)[:3, :3].double()
    transformed = Similarity(turn, torch.tensor([0.3, -1, 2]).double(), torch.tensor(1.7).double())
    true = transformed.apply(finished.poses)
    inputs = scene_views.__class__(scene_views.images, scene_views.names, scene_views.intrinsics, poses=true)
    monkeypatch.setattr(scoring, "load_views", lambda folder: inputs)
    monkeypatch.setattr(scoring, "register_scene", lambda model, start, *_: start)  # the images are of another field
    calls = []
    plain = type(finished).render
    monkeypatch.setattr(
        type(finished), "render", lambda self, poses, *a, **k: calls.append(poses) or plain(self, poses, *a, **k)
    )
    scores = scoring.evaluate(finished, inputs)
    assert scores["rotation_median_deg"] < 0.01 and scores["translation_median"] < 1e-4
    assert torch.allclose(calls[0], finished.poses, atol=1e-4)


@pytest.mark.parametrize("name", ["scene.ply", "transforms.json", "colmap"])
def test_export_of_a_run_has_every_view(finished, tmp_path, name):
    path = finished.export(tmp_path / name, **({} if name == "transforms.json" else {"points": 200}))
    if name == "transforms.json":
        frames = json.loads(path.read_text())["frames"]
        assert len(frames) == 10
        assert np.allclose(frames[3]["transform_matrix"], finished.poses[3].numpy(), atol=1e-5)
    else:
        assert path.exists()


def test_write_frames_images_and_gif(tmp_path):
    images = torch.rand(3, 3, 6, 8)
    folder = write_frames(tmp_path / "frames", images)
    assert sorted(p.name for p in folder.glob("*.png")) == ["0000.png", "0001.png", "0002.png"]
    assert np.abs(np.asarray(Image.open(folder / "0001.png")) / 255 - images[1].permute(1, 2, 0).numpy()).max() < 0.003
    with Image.open(write_frames(tmp_path / "a.gif", images)) as gif:
        assert gif.n_frames == 3 and gif.size == (8, 6)
    with pytest.raises(ConfigError, match="xyz"):
        write_frames(tmp_path / "a.xyz", images)


@pytest.fixture(scope="module")
def half_symmetric():
    """A field that looks nearly alike after half a turn, and eight images of it from known directions."""
    torch.manual_seed(0)
    field = GridField(7, seed=4)
    values = 8 * field.values.data
    turned = values.flip(-2, -3) if values.shape[-1] == 4 else values.flip(-1, -2)
    field.values.data.copy_(0.5 * (values + turned) + 0.04 * values)
    directions = direction_vectors(torch.arange(8) * 45.0 + 10, torch.tensor([15.0, 30, 45, 20] * 2))
    return field, directions


def test_select_best_poses_nearly_symmetric_scene_finds_the_side(finished, half_symmetric):
    field, directions = half_symmetric
    camera_model, parts = finished.model.camera, (finished.model.encoder, finished.model.candidates)
    model = NerfdiffModel(*parts, field, finished.poses, camera_model, (32, 32), 16)
    true = orbit_poses(directions, finished.scene["distance"])
    images = render_views(field, true, camera_model, (32, 32), 16).color.movedim(-1, 1)
    half = torch.tensor([-1.0, -1, 1, 1])[:, None]
    anywhere = orbit_poses(torch.nn.functional.normalize(torch.randn(8, 2, 3), dim=-1), finished.scene["distance"])
    near = orbit_poses(directions + 0.02 * torch.randn(8, 3), finished.scene["distance"])
    sides = torch.stack([near, half * near], 1)
    there = render_views(field, sides, camera_model, (32, 32), 16).color.movedim(-1, 2)
    assert (there[:, 0] - there[:, 1]).square().mean() < 0.05 * images.var(), "the sides look nearly alike"
    for inputs in (near[:, None], (half * near)[:, None], torch.cat([anywhere, half * near[:, None]], 1)):
        result = select_best_poses(model, TargetImages(images), inputs)
        assert rotation_errors_degrees(result, true).max() < 5
    forward = NerfdiffModel(*parts, field, finished.poses, replace(camera_model, forward_facing=True), (32, 32), 16)
    assert torch.equal(select_best_poses(forward, TargetImages(images), near[:, None]), near), (
        "one candidate, and no other side to look from"
    )


def test_select_best_poses_are_candidates_or_opposites(finished, scene_views):
    plain, result = finished.predict_pose(scene_views), finished.predict_pose(scene_views, check=True)
    assert torch.equal(plain.candidates, result.candidates) and torch.equal(plain.scores, result.scores)
    half = torch.tensor([-1.0, -1, 1, 1])[:, None]
    among = torch.cat([plain.candidates, half * plain.candidates], 1)
    assert ((among - result.poses[:, None]).abs().amax((2, 3)).amin(1) < 1e-6).all()
    model = finished.model
    rendered = render_views(model.field, among, model.camera, (8, 8), model.samples_per_ray).color.movedim(-1, 2)
    least = (rendered - scene_views.images[:, None]).square().mean((2, 3, 4)).argmin(1)
    assert torch.allclose(result.poses, among[torch.arange(10), least], atol=1e-6)


def test_refine_poses_converges_from_a_nearby_pose(finished):
    torch.manual_seed(0)
    field = GridField(5, seed=4)
    field.values.data.mul_(8)
    camera_model = finished.model.camera
    model = NerfdiffModel(
        finished.model.encoder, finished.model.candidates, field, finished.poses.clone(), camera_model, (16, 16), 16
    )
    directions = direction_vectors(torch.tensor([20.0, 140.0, 260.0]), torch.tensor([30.0, 45.0, 15.0]))
    true = orbit_poses(directions, finished.scene["distance"])
    images = render_views(field, true, camera_model, (16, 16), 16).color.movedim(-1, 1)
    off = orbit_poses(directions + 0.06 * torch.randn(3, 3), finished.scene["distance"])
    before = [x.clone() for x in model.state_dict().values()]
    result = refine_poses(model, TargetImages(images), off, 40, finished.scene["distance"])
    far, near = (rotation_errors_degrees(x, true) for x in (off, result))
    assert near.max() < 1.0 < far.min(), (far, near)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in field.parameters())
    # cameras that lean and stand nearer or farther are not brought to an orbit
    leaning = orbit_poses(directions, finished.scene["distance"], {"roll": torch.tensor([0.7, -0.7, 0.6])})
    leaning[:, :3, 3] *= torch.tensor([0.9, 1.0, 1.1])[:, None]
    model.views.copy_(leaning[torch.arange(len(model.views)) % 3])
    images = render_views(field, leaning, camera_model, (16, 16), 16).color.movedim(-1, 1)
    stored = refine_poses(model, TargetImages(images), leaning, 5, finished.scene["distance"])
    assert rotation_errors_degrees(stored, leaning).max() < 1.0
    assert (stored - leaning)[:, :3, 3].norm(dim=1).max() < 0.1


def test_predict_pose_accepts_files_pillow_images_and_arrays(finished, scene_views, tmp_path):
    pixels = (scene_views.images[:2] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    expected = finished.predict_pose(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).poses
    for i in range(2):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    for source in (
        tmp_path,
        pixels,
        [Image.fromarray(image) for image in pixels],
        [tmp_path / "0.png", tmp_path / "1.png"],
    ):
        torch.testing.assert_close(finished.predict_pose(source).poses, expected)
    torch.testing.assert_close(finished.predict_pose(tmp_path / "0.png").poses, expected[:1])
    torch.testing.assert_close(finished.predict_pose(Image.fromarray(pixels[1])).poses, expected[1:])
    torch.testing.assert_close(finished.predict_pose(pixels[0]).poses, expected[:1])
    floats = np.moveaxis(pixels, 3, 1).astype(np.float32) / 255
    torch.testing.assert_close(finished.predict_pose(floats).poses, expected)
    Image.fromarray(pixels[0][:4, :4]).save(tmp_path / "0.png")
    assert finished.predict_pose(tmp_path / "0.png").poses.shape == (1, 4, 4)


@pytest.mark.slow
def test_predict_pose_and_evaluate_use_the_views_own_intrinsics(finished, scene_views):
    """A wider image of the same scene, which has the training view in its middle."""
    wide = torch.nn.functional.pad(scene_views.images, (4, 4, 2, 2), value=0.5)
    intrinsics = scene_views.intrinsics.clone()
    intrinsics[:, :2, 2] += torch.tensor([4.0, 2.0])
    views = replace(scene_views, images=wide, masks=None, intrinsics=intrinsics)
    torch.testing.assert_close(finished.predict_pose(views).poses, finished.predict_pose(scene_views).poses)
    own, images = finished.evaluate(views), views.resize(8)
    assert own["size"] == [6, 8]
    renders = finished.render(finished.predict_pose(views).poses, (6, 8), intrinsics=images.intrinsics).images
    expected = -10 * (renders - images.images).square().mean((1, 2, 3)).log10()
    assert own["psnr_encoder"] == pytest.approx(expected.mean().item(), abs=1e-3)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run's folder, whose log may be changed."""
    return shutil.copytree(finished.folder, tmp_path / "copy")


def test_check_epipolar_small_images_are_not_checked(finished, copied, tmp_path):
    assert "the images have 8 pixels" in NerfdiffRun.load(copied).check_epipolar().check.not_run
    for _ in range(2):
        record = read_checks(read_log(copied))[-1]
        assert "the images have 8 pixels" in record["reason"] and "evaluate --epipolar" in record[IN_TRAINING]["reason"]
        NerfdiffRun.load(copied).check_epipolar()
    with pytest.raises(ConfigError, match="needs a run folder"):
        NerfdiffRun.load(finished.save(tmp_path / "run.safetensors")).check_epipolar()


def test_train_nerfdiff_lists_the_epipolar_check_among_its_alarms(finished):
    (check,) = [check for check in read_checks(read_log(finished.folder)) if check["name"] == EPIPOLAR_CHECK]
    assert check["status"] == "not run" and "fewer than 128 pixels" in check["reason"]


@pytest.mark.parametrize("share", [None, 0.3, 0.99])
def test_evaluate_epipolar_is_shown_like_other_alarms(copied, monkeypatch, capsys, share):
    failures = ("cameras do not fit matched points: only 0.30",) if share == 0.3 else ()
    check = Check(EPIPOLAR_CHECK, share, low=0.85, failures=failures, not_run="since there are no points")
    pairs = [{"views": ("a.png", "b.png"), "matches": 20, "share": share}]
    result = EpipolarCheck(check, *((None, None) if share is None else (0.7, 1.5)), pairs)
    monkeypatch.setattr("factorkit.nerfdiff.run.check_epipolar", lambda *args: result)
    assert main(["evaluate", str(copied), "--epipolar"]) == 0
    text = capsys.readouterr().out
    line = f"{EPIPOLAR_CHECK}: " + (
        "not run, since there are no points" if share is None else f"{check.status}, {share:.3f} (at least 0.85)"
    )
    assert text.count(f"{line}.") == 2, "on its own, and among the checks of the verdict"
    assert ("a.png and b.png" in text) == (share is not None)
    assert main(["evaluate", str(copied), "--epipolar", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["share"] == share and [f for f in data["failures"] if f in failures] == list(failures)
    assert [other["status"] for other in data["checks"] if other["name"] == EPIPOLAR_CHECK] == [check.status]
    assert "cameras do not fit" in (copied / "report.html").read_text() or not failures
