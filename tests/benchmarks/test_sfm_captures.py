"""The turntables of benchmarks/sfm_captures.py: each fault changes what it names, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.captures import ALL
from benchmarks.sfm_captures import format_table, write_turntable

COUNT = 3


def open_turntable(folder, faults=()):
    poses = write_turntable(folder, faults, seed=3, count=COUNT, side=32)
    photos, masks = (
        np.stack([np.asarray(Image.open(folder / name / f"frame_{i:03d}.png")) for i in range(COUNT)])
        for name in ("photos", "masks")
    )
    return poses, photos, masks > 127


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return open_turntable(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("fault", ALL)
def test_write_turntable_a_fault_changes_photos_masks_or_cameras_only_as_named(tmp_path, plain, fault):
    poses, photos, masks = open_turntable(tmp_path, (fault,))
    of_camera, of_masks = fault in ("axis", "shift", "size", "roll", "pace"), fault in ("clutter", "masks")
    assert torch.equal(poses, plain[0]) != of_camera
    assert np.array_equal(photos, plain[1]) == (of_masks or fault == "focal")
    assert np.array_equal(masks, plain[2]) == (fault in ("light", "exposure", "focal"))
    if fault == "clutter":
        assert masks[plain[2]].all() and masks.sum() > plain[2].sum()
    if fault == "masks":
        lacks = [mask.sum() < 0.7 * whole.sum() for mask, whole in zip(masks, plain[2], strict=True)]
        assert sum(lacks) == 1


def test_write_turntable_background_stands_still_and_light_shades_the_block_alone(tmp_path, plain):
    block = torch.from_numpy(plain[2].any(0)).float()[None, None]
    outside = torch.nn.functional.max_pool2d(block, 3, stride=1, padding=1)[0, 0].numpy() == 0  # no pixel of its edge
    assert (plain[1][:, outside] == plain[1][0, outside]).all()
    _, lit, _ = open_turntable(tmp_path, ("light",))
    assert np.array_equal(lit[:, outside], plain[1][:, outside])
    assert lit[plain[2]].mean() < 0.9 * plain[1][plain[2]].mean()


def test_format_table_without_held_out_error_has_a_dash():
    record = {"registered": 58, "views": 60, "sfm_median_deg": 0.123, "sfm_largest_deg": 1.0, "median_deg": 0.2}
    record |= {"largest_deg": 2.0, "focal_ratio": 1.01, "held_out_cross": None, "failures": [], "processor_seconds": 9}
    assert "| all seed=0 | 58 of 60 | 0.12 (1.0) | 0.20 (2.0) | 1.010 | - | 0 | 9 |" in format_table(
        {"all seed=0": record}
    )
