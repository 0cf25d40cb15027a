"""The search that finds the poses of a run: structure from motion to the end, and what follows where it is rejected."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.metrics.pose import pose_errors
from factorkit.nerfdiff import search
from factorkit.nerfdiff.train import train_nerfdiff
from tests.nerfdiff.textured import make_intrinsics_of, orbit, render_photo

pytest.importorskip("pycolmap", reason="the extra `sfm`")
SIZE = (240, 320)
POSES = orbit(np.arange(0, 88, 11.0))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of textured photos without cameras."""
    folder = tmp_path_factory.mktemp("photos")
    for i, pose in enumerate(POSES):
        pixels = render_photo(pose, make_intrinsics_of(SIZE), SIZE)[0]
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def settings(tiny):
    return {**tiny, "resolution": 16, "fov": 60.0}


@pytest.mark.slow
def test_train_auto_textured_photos_use_structure_from_motion_to_the_end(tmp_path, photos, settings, monkeypatch):
    monkeypatch.setattr(search, "MAX_CROSS", {"object": np.inf, "forward": np.inf})  # the field has a few steps only
    run = train_nerfdiff(photos, out=tmp_path / "run", **settings)
    assert run.config.search == "sfm"
    poses = torch.from_numpy(POSES[[int(name.removesuffix(".png")) for name in run.views.names]]).float()
    assert len(poses) >= 7 and pose_errors(run.poses, poses).rotation_degrees.max() < 3
    run.export(tmp_path / "transforms.json")
    frames = json.loads((tmp_path / "transforms.json").read_text())["frames"]
    assert len(frames) == len(poses)
    again = train_nerfdiff(photos, out=tmp_path / "run", **settings)  # finished: it is loaded
    assert torch.equal(again.poses, run.poses)


@pytest.mark.slow
def test_train_auto_wrong_structure_from_motion_is_followed_by_the_dictionary(
    tmp_path, photos, settings, monkeypatch, capsys
):
    monkeypatch.setattr(search, "MAX_CROSS", {"object": 0.0, "forward": 0.0})
    run = train_nerfdiff(photos, out=tmp_path / "run", **{**settings, "progress": True})
    assert run.config.search == "dictionary"
    text = capsys.readouterr().err
    assert "Rejected: a field fitted to half of the views" in text and 'Tried next: search="dictionary"' in text
    again = train_nerfdiff(photos, out=tmp_path / "run", **settings)
    assert torch.equal(again.poses, run.poses) and again.config.search == "dictionary"
