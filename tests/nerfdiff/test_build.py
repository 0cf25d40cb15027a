from __future__ import annotations

import shutil

import pytest
import torch

from factorkit.cli.scene import load_contents, newest_checkpoint
from factorkit.engine.checkpoint import Checkpoints
from factorkit.nerfdiff.build import load_partial_run
from factorkit.nerfdiff.cameras.poses import OrbitPoses, orbit_poses
from factorkit.utils.errors import CheckpointError


@pytest.fixture
def begun(finished, tmp_path):
    """A copy of the finished tiny run, as it was before its encoder was trained."""
    folder = tmp_path / "begun"
    shutil.copytree(finished.folder, folder)
    shutil.rmtree(folder / "checkpoints")
    return folder


def test_load_partial_run_returns_the_newest_stage(begun, finished):
    for stage in ("refine again", "refine", "search"):
        if not (begun / "stages" / stage).exists():
            continue
        found = load_partial_run(begun)
        tensors, meta = Checkpoints(begun / "stages" / stage / "checkpoints").latest()
        assert (found.stage, found.step) == (stage, meta["step"]) and len(found.views) == 10
        assert torch.equal(found.field.values, tensors["ema.module.field.values"])
        if stage == "search":
            places = tensors["ema.module.poses.places"][tensors["ema.module.poses.assigned"]]
        else:
            where = {k: tensors[f"ema.module.poses.{k}"] for k in ("start", "angles")}
            free = OrbitPoses(where["start"], 1.0)
            free.load_state_dict(where)
            places = free.direction.detach()
        assert torch.allclose(found.views.poses, orbit_poses(places, finished.scene["distance"]), atol=1e-5)
        shown = load_contents(begun, "cpu")
        assert shown.step == found.step and shown.true is None
        shutil.rmtree(begun / "stages" / stage)
    assert newest_checkpoint(begun) is None
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_partial_run(begun)


def test_load_contents_finished_run_has_true_cameras(finished):
    assert newest_checkpoint(finished.folder).parent.parent == finished.folder
    shown = load_contents(finished.folder, "cpu")
    assert shown.step == finished.step and shown.true.shape == (10, 4, 4)
    assert torch.equal(shown.views.poses, finished.poses)
