"""The duplication test of trainings that have no flip test."""

from __future__ import annotations

import pytest
import torch

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff.cameras.poses import rotate_poses_about_z
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages.flip_test import ROTATIONS
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.nerfdiff.training_views import describe_scene
from factorkit.utils.files import read_log


@pytest.mark.parametrize("astray", [0, 6])
def test_measure_duplication_counts_rotated_views(astray, tmp_path):
    config = preset_config("demo", resolution=24, device="cpu", views_per_step=8)
    views = make_procedural_views(30, 24)
    scene = open_scene(views, 24, torch.device("cpu"))
    poses = scene.poses.clone()
    for i in range(astray):
        poses[5 * i] = rotate_poses_about_z(poses[5 * i], ROTATIONS[1 + i % 3])
    settings = {"scene": describe_scene(scene, views, known_poses=True)}
    result = Training(config, scene, tmp_path, settings, False).measure_duplication(poses)
    assert result == pytest.approx(astray / 30, abs=0.034)


@pytest.mark.parametrize("changes", [{"search": "joint"}, {"poses": "learned"}])
def test_duplication_without_flip_test_is_logged_once(changes, scene_views, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "measure_duplication", lambda self, poses: 0.4)
    monkeypatch.setattr("factorkit.nerfdiff.alarms.MIN_AZIMUTH_SPREAD", 2.0)
    for _ in range(2):  # the second call finds it told
        train_nerfdiff(scene_views, out=tmp_path / "run", **tiny, **changes)
    log = [event for event in read_log(tmp_path / "run") if event["event"] == "alarms"]
    before = [event for event in log if "held_out_checked" not in event]  # the last two repeat it
    assert [event["doubled"] for event in before if "doubled" in event] == [0.4] and len(log) == len(before) + 2
    *_, last = log
    assert last["step"] == tiny["steps"]
    assert last["failures"][0].startswith("collapse")  # what was said before is still said
    assert sum("duplication: 40%" in words for words in last["failures"]) == 1
    assert "duplication" in (tmp_path / "run" / "report.html").read_text()


def test_measure_duplication_forward_facing_is_none(tmp_path):
    config = preset_config("demo", device="cpu")
    scene = open_scene(make_procedural_views(6, 8), 8, torch.device("cpu"))
    scene = type(scene)(scene.images, scene.names, scene.camera, "forward", scene.distance, None)
    assert Training(config, scene, tmp_path, {}, False).measure_duplication(torch.eye(4).repeat(6, 1, 1)) is None
