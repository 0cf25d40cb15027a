from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.engine.checkpoint import Checkpoints
from factorkit.nerfdiff.build import load_partial_run
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages.stage_training import StageTraining
from factorkit.nerfdiff.train import choose_capture_settings, list_notes, train_nerfdiff
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.files import read_log

pytestmark = pytest.mark.usefixtures("short_flip_tests", "no_reports")


class Killed(BaseException):
    pass


def weights(folder):
    return Checkpoints(folder / "checkpoints").latest()[0]


#: by run: its settings, and the stages that are interrupted in turn with the step of each; others are in killed_run.py
INTERRUPTED = {
    "dictionary": ({"finetune_steps": 5}, {"search": 13, "refine": 3, "flip 0a": 5, "distil": 4, "tune": 4}),
    "transformer": ({"poses": "known", "encoder": "vit", "encoder_depth": 2}, {"distil": 4}),
    "thesis": ({"search": "joint", "balance_candidates": False, "candidate_type": "thesis"}, {"joint": 4}),
    "occupancy": ({"poses": "known", "field": "hashgrid", "occupancy": True, "field_steps": 24}, {"fit": 15}),
    "occupancy, joint": ({"search": "joint", "occupancy": True, "steps": 24}, {"joint": 22}),
    "freedoms": (
        {"optimize_camera": ("roll", "aim", "distance", "focal"), "background": "field", "appearance_dim": 2},
        {"refine": 3},
    ),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_training_interrupted_in_stages_resumes_bit_identically(name, tmp_path, scene_views, tiny, monkeypatch):
    changes, stages = INTERRUPTED[name]
    settings = tiny | changes
    if changes.get("encoder") == "vit":
        del settings["channel_mult"]
    train_nerfdiff(scene_views, out=tmp_path / "whole", **settings)
    for stage, fatal in stages.items():
        with monkeypatch.context() as patch:
            patch.setattr(StageTraining, "train_stage", die_in(stage, fatal))
            with pytest.raises(Killed):
                train_nerfdiff(scene_views, out=tmp_path / "killed", **settings)
    train_nerfdiff(scene_views, out=tmp_path / "killed", **settings)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert [k for k in whole if not torch.equal(whole[k], killed[k])] == []
    assert sum(e["event"] == "resume" for e in all_events(tmp_path / "killed")) >= len(stages)


def die_in(stage, fatal):
    """Return a train_stage that raises in this step of this stage."""
    plain = StageTraining.train_stage

    def train_stage(self, name, build_task, *rest, **changes):
        def build_mortal(config):
            task, steps = build_task(config), itertools.count(1)
            loss = task.loss

            def die(*arguments):
                if next(steps) == fatal:
                    raise Killed
                return loss(*arguments)

            task.loss = die
            return task

        return plain(self, name, build_mortal if name == stage else build_task, *rest, **changes)

    return train_stage


def test_train_other_final_field_keeps_the_focal_length_of_the_refinement(tmp_path, scene_views, tiny):
    settings = tiny | {"optimize_camera": ("focal",), "field": "hashgrid", "pose_learning_rate": 0.05, "flip_rounds": 0}
    run = train_nerfdiff(scene_views, out=tmp_path / "run", **settings)
    focal = float(weights(tmp_path / "run" / "stages" / "refine")["ema.module.log_focal"].exp())
    assert abs(focal - 1) > 1e-4
    ratio = run.views.intrinsics[0] / scene_views.intrinsics[0]
    assert ratio[[0, 1], [0, 1]].tolist() == pytest.approx([focal, focal], rel=1e-5)
    distance = run.poses[:, :3, 3].norm(dim=1) / open_scene(scene_views, 8, torch.device("cpu"), False).distance
    assert distance.tolist() == pytest.approx([focal] * len(scene_views), rel=1e-4), "the object keeps its size"
    predicted = NerfdiffRun.load(tmp_path / "run", device="cpu").predict_pose(scene_views).poses
    assert torch.allclose(predicted[:, :3, 3].norm(dim=1), run.poses[0, :3, 3].norm(), rtol=1e-4)
    for stage in ("fit", "refine"):
        partial = load_partial_run(tmp_path / "run")
        assert partial.stage == stage
        torch.testing.assert_close(partial.views.poses[:, :3, 3].norm(dim=1), run.poses[:, :3, 3].norm(dim=1))
        torch.testing.assert_close(partial.views.intrinsics, run.views.intrinsics)
        shutil.rmtree(tmp_path / "run" / "stages" / stage)
    events = [event for event in read_log(tmp_path / "run") if event["event"] == "focal"]
    assert [event["factor"] for event in events] == [pytest.approx(focal, rel=1e-5)]


def test_choose_capture_settings_a_guessed_focal_length_is_optimised_unless_the_run_was_started_without(scene_views):
    guess = open_scene(replace(scene_views, has_focal=False), 8, torch.device("cpu"), False)
    config = preset_config("fast")
    assert "focal" in choose_capture_settings(config, guess).optimize_camera
    assert "focal" not in choose_capture_settings(config, replace(guess, has_focal=True)).optimize_camera
    assert choose_capture_settings(replace(config, poses="known"), guess).optimize_camera == ()
    assert choose_capture_settings(config, guess, {"optimize_camera": [], "scene": {}}).optimize_camera == ()
    assert any(
        "focal length is a guess" in note
        for note in list_notes(scene_views, guess, choose_capture_settings(config, guess))
    )


def all_events(folder):
    return [e for log in folder.rglob("log.jsonl") for e in read_log(log.parent)]


def test_train_same_call_changes_nothing_and_another_is_refused(finished, scene_views, tiny):
    before = weights(finished.folder)
    again = train_nerfdiff(scene_views, out=finished.folder, **tiny)
    assert all(torch.equal(before[k], weights(finished.folder)[k]) for k in before) and again.step == tiny["steps"]
    with pytest.raises(CheckpointError, match="grid_resolution: 8 there, 9 requested"):
        train_nerfdiff(scene_views, out=finished.folder, **tiny | {"grid_resolution": 9})
    with pytest.raises(CheckpointError, match="scene"):
        train_nerfdiff(make_procedural_views(10, 8, seed=2), out=finished.folder, **tiny)


def test_train_true_poses_do_not_change_the_result(scene_views, tiny, finished, tmp_path):
    true = NerfdiffRun.load(finished.folder, device="cpu").model
    for name, poses in (("shuffled", scene_views.poses.flip(0)), ("none", None)):
        other = train_nerfdiff(replace(scene_views, poses=poses), out=tmp_path / name, **tiny).model
        assert all(torch.equal(x, y) for x, y in zip(true.parameters(), other.parameters(), strict=True))


def test_train_other_seed_differs(scene_views, tiny, finished, tmp_path):
    other = train_nerfdiff(scene_views, out=tmp_path / "other", **tiny | {"seed": 1})
    assert not torch.equal(other.poses, finished.poses)


def test_train_alarms_are_logged(finished):
    alarms = [e for e in read_log(finished.folder) if e["event"] == "alarms"]
    assert {"azimuth_spread", "doubled", "failures"} <= alarms[-1].keys()
    settings = json.loads((finished.folder / "config.json").read_text())
    assert settings["model"] == "nerfdiff" and settings["scene"]["views"] == 10


def test_train_invalid_input_raises(scene_views, tiny, tmp_path):
    out = {"out": tmp_path / "x"}
    with pytest.raises(DataError, match="1 view"):
        train_nerfdiff(scene_views.select([0]), **out, **tiny)
    with pytest.raises(DataError, match="10 views: fewer than num_candidates=11"):
        train_nerfdiff(scene_views, **out, **tiny | {"num_candidates": 11})
    from dataclasses import replace

    with pytest.raises(ConfigError, match="the views have no poses"):
        train_nerfdiff(replace(scene_views, poses=None), **out, **tiny | {"poses": "known"})
    blank = replace(scene_views, images=torch.ones(10, 3, 8, 8), masks=None)
    with pytest.raises(DataError, match="no foreground: all pixels"):
        train_nerfdiff(blank, **out, **tiny)
    for change, words in (
        ({"elevation_range": (50.0, 20.0)}, "elevation_range"),
        ({"field": "fog"}, "hashgrid"),
        ({"optimize_camera": ("wings",)}, "wings"),
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"timestep_power": 0.0}, "timestep_power"),
        ({"preset": "Lego"}, "lego"),
    ):
        with pytest.raises(ConfigError, match=words):
            train_nerfdiff(scene_views, **out, **tiny | change)
    assert not (tmp_path / "x").exists(), "a refused command must not claim the folder"
