"""A folder is taken up again for the same cameras alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.nerfdiff.training_views import load_views
from factorkit.utils.errors import CheckpointError


@pytest.fixture(scope="module")
def known_run(tmp_path_factory, scene_views, tiny):
    """A run with the poses given."""
    return train_nerfdiff(scene_views, out=tmp_path_factory.mktemp("known") / "run", **tiny, poses="known")


@pytest.fixture
def older_run(known_run, tmp_path):
    """A copy of it, as a version made it that did not record the cameras."""
    folder = tmp_path / "older"
    shutil.copytree(known_run.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("intrinsics", "background", "poses"):
        del config["scene"][name]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(views):
    """Views of the same images by other cameras, by what is named."""
    aside = views.intrinsics.clone()
    aside[:, 0, 2] += 0.5
    return {
        "poses": replace(views, poses=views.poses.flip(0)),
        "intrinsics": replace(views, intrinsics=aside),
        "background": replace(views, background=torch.zeros(3)),
    }


@pytest.mark.parametrize("what", ["poses", "intrinsics", "background"])
def test_train_other_cameras_are_refused_and_stored_ones_stay(what, known_run, older_run, scene_views, tiny):
    other = changed(scene_views)[what]
    for folder in (known_run.folder, older_run):
        with pytest.raises(CheckpointError, match=rf"\(scene\.{what}: \S.* there, \S.* requested\)"):
            train_nerfdiff(other, out=folder, **tiny, poses="known")
        stored = load_views(folder)
        assert torch.equal(stored.poses, scene_views.poses) and torch.equal(stored.background, scene_views.background)


def test_train_scoring_poses_may_change(finished, scene_views, tiny, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    settings = tiny | {"extra_ema_decays": (0.5,)}
    again = train_nerfdiff(changed(scene_views)["poses"], out=tmp_path / "run", **settings)
    assert torch.equal(again.poses, finished.poses)
    assert torch.equal(load_views(again.folder).poses, scene_views.poses.flip(0))
    with pytest.raises(CheckpointError, match="scene.intrinsics"):
        train_nerfdiff(changed(scene_views)["intrinsics"], out=tmp_path / "run", **settings)


@pytest.mark.parametrize("stored", [True, False])
def test_train_resumes_a_run_of_an_older_version(stored, known_run, older_run, scene_views, tiny):
    if not stored:
        (older_run / "views.npz").write_bytes(b"damaged")
    else:
        assert torch.equal(NerfdiffRun.load(older_run, device="cpu").poses, known_run.poses)
    again = train_nerfdiff(scene_views, out=older_run, **tiny, poses="known")
    assert torch.equal(again.poses, known_run.poses)
    assert "poses" in json.loads((older_run / "config.json").read_text())["scene"]  # and compared from now on
