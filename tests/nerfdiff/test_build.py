from __future__ import annotations

import shutil

import pytest
import torch

from factorkit.cli.view import load_contents, newest_checkpoint
from factorkit.engine.checkpoint import Checkpoints
from factorkit.nerfdiff.build import load_partial_run
from factorkit.nerfdiff.cameras.poses import OrbitPoses, orbit_poses
from factorkit.utils.errors import CheckpointError


@pytest.fixture
def unfinished_run(finished, tmp_path):
    """A copy of the finished tiny run, as it was before its encoder was trained."""
    folder = tmp_path / "begun"
    shutil.copytree(finished.folder, folder)
    shutil.rmtree(folder / "checkpoints")
    return folder


@pytest.mark.slow
def test_load_partial_run_returns_the_newest_stage(unfinished_run, finished):
    for stage in ("refine again", "refine", "search"):
        if not (unfinished_run / "stages" / stage).exists():
            continue
        result = load_partial_run(unfinished_run)
        tensors, meta = Checkpoints(unfinished_run / "stages" / stage / "checkpoints").latest()
        assert (result.stage, result.step) == (stage, meta["step"]) and len(result.views) == 10
        assert torch.equal(result.field.values, tensors["ema.module.field.values"])
        if stage == "search":
            positions = tensors["ema.module.poses.places"][tensors["ema.module.poses.assigned"]]
        else:
            where = {k: tensors[f"ema.module.poses.{k}"] for k in ("start", "angles")}
            free = OrbitPoses(where["start"], 1.0)
            free.load_state_dict(where)
            positions = free.direction.detach()
        assert torch.allclose(result.views.poses, orbit_poses(positions, finished.scene["distance"]), atol=1e-5)
        contents = load_contents(unfinished_run, "cpu")
        assert contents.step == result.step and contents.true is None
        shutil.rmtree(unfinished_run / "stages" / stage)
    assert newest_checkpoint(unfinished_run) is None
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_partial_run(unfinished_run)


@pytest.mark.slow
def test_load_contents_finished_run_has_true_cameras(finished):
    assert newest_checkpoint(finished.folder).parent.parent == finished.folder
    contents = load_contents(finished.folder, "cpu")
    assert contents.step == finished.step and contents.true.shape == (10, 4, 4)
    assert torch.equal(contents.views.poses, finished.poses)
