"""benchmarks/room.py on tiny settings: the photos show one room at their poses, and a run is made and scored once."""

from __future__ import annotations

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import room
from benchmarks.room_photos import FOCAL, make_photos, make_room, render_photo, walk_around
from tests.nerfdiff.textured import make_intrinsics_of

SIZE = (24, 32)


def test_room_photo_shows_a_point_of_another_photo_where_its_pose_projects_it():
    size = (90, 120)
    solids, (one, other), k = make_room(0), walk_around(40, 0)[:2], make_intrinsics_of(size, FOCAL)
    images = [render_photo(solids, pose, k, size) for pose in (one, other)]
    y, x = (index.ravel() for index in np.mgrid[10:80:5, 10:110:5])
    rays = np.stack([(x + 0.5 - k[0, 2]) / k[0, 0], -(y + 0.5 - k[1, 2]) / k[1, 1], -np.ones(x.size)])
    rays = one[:3, :3] @ rays
    distance = np.stack([solid.intersect(one[:3, 3], rays) for solid in solids]).min(0)
    local = ((one[:3, 3] - other[:3, 3])[:, None] + distance * rays).T @ other[:3, :3]
    column = k[0, 2] - k[0, 0] * local[:, 0] / local[:, 2]
    row = k[1, 2] + k[1, 1] * local[:, 1] / local[:, 2]
    seen = (column > 0) & (column < size[1]) & (row > 0) & (row < size[0])
    colors = images[1][row[seen].astype(int), column[seen].astype(int)]
    error = np.abs(colors - images[0][y[seen], x[seen]]).mean(1)
    shuffled = np.abs(np.roll(colors, 7, 0) - images[0][y[seen], x[seen]]).mean(1)
    assert seen.mean() > 0.6 and np.median(error) < 0.4 * np.median(shuffled)


def test_make_photos_depends_on_the_seed_and_changes_the_light_of_training_photos_only():
    training, held_out = make_photos(0, count=16, size=SIZE)
    assert (len(training), len(held_out)) == (14, 2) and not {*training.names} & {*held_out.names}
    tiled = make_photos(0, count=16, size=SIZE, tiles=True)[0]
    assert torch.equal(tiled.poses, training.poses) and not torch.equal(tiled.images, training.images)
    again, other = make_photos(0, count=16, size=SIZE), make_photos(1, count=16, size=SIZE)
    assert torch.equal(again[0].images, training.images) and torch.equal(again[0].poses, training.poses)
    assert (other[0].images - training.images).abs().mean() > 0.05
    changed = make_photos(0, count=16, size=SIZE, exposure=0.1, noise=0.02)
    assert torch.equal(changed[1].images, held_out.images)
    gain = (changed[0].images / training.images.clamp_min(0.05)).mean((1, 2, 3))
    assert gain.std() > 0.02 and (gain - 1).abs().max() < 0.15


@pytest.mark.slow
def test_room_benchmark_runs_once_and_appears_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(room, "RESULTS", tmp_path / "room.json")
    monkeypatch.setattr(room, "make_photos", partial(make_photos, count=24, size=SIZE))
    settings = ["field_steps=20", "grid_resolution=8", "samples_per_ray=8", 'field="grid"', "encoder_resolution=8"]
    monkeypatch.setattr(sys, "argv", ["room", "--seeds", "0", "--size", "16", "--set", *settings])
    room.main()
    (key, record), *others = json.loads(room.RESULTS.read_text()).items()
    assert not others and key.startswith("16 px known field_steps=20") and record["commit"]
    assert record["registered"] == record["photos"] == 21 and record["unbounded"] == "yes"
    assert record["rotation_max_deg"] < 0.1 and 5 < record["psnr"] < 30 and record["held_out_cross"] > 0
    monkeypatch.setattr(room, "train_and_score", None)  # a second call would fail
    room.main()
    assert f"| {key} | grid | {record['psnr']:.2f} |" in capsys.readouterr().out.splitlines()[-1]
