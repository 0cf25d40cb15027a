"""Experiments with several data sets or levels (zero-shot transfer, videos, hierarchies), tiny, end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import factorkit
from factorkit.reproduce import reproduce
from factorkit.reproduce.experiments import video

CAT, VOID = 8, 255


@pytest.fixture
def voc(tmp_path):
    """Four cats to train on and three to score."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", 4), ("val", 3)):
        for n in range(count):
            values = np.zeros((20, 20), np.uint8)
            values[4:14, n : n + 9], values[0] = CAT, VOID
            Image.fromarray(values).save(root / f"SegmentationClass/{split}{n}.png")
            Image.fromarray(values * 20).convert("RGB").save(root / f"JPEGImages/{split}{n}.jpg")
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(f"{split}{n}" for n in range(count)))
    return root


@pytest.mark.slow
def test_table_2_7_scores_classes_with_images(small, voc, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="--voc FOLDER"):
        small("table2.7", rows=["cat"])
    with pytest.warns(UserWarning, match="too few images of VOC show dog"):
        report = small("table2.7", rows=["cat", "dog"], voc=voc)
    result = {row["row"]: row for row in report.data["rows"]}
    run = factorkit.load(tmp_path / "runs" / "small-photos-ours-seed0", device="cpu")
    expected = run.evaluate_zero_shot(voc)["classes"]["cat"]
    assert result["cat"]["cells"][0]["scores"]["miou"] == pytest.approx(expected["miou"])
    assert result["cat"]["cells"][0]["scores"]["images"] == 3
    assert report.data["images"] == ["images/cat-seed0.png"]
    assert json.dumps(report.data).count("0.66") >= 1, "the table also shows the dissertation's mIoU of cats"


@pytest.mark.slow
def test_fig_2_14_averaging_reduces_flicker(small, monkeypatch):
    monkeypatch.setattr(video, "PAN_FRAMES", 12)
    report = small("fig2.14")
    single, averaged = (row["cells"][0]["scores"] for row in report.data["rows"])
    assert single["frames"] == averaged["frames"] == 12 and averaged["changes"] <= single["changes"]
    assert len(report.data["images"]) == 2


@pytest.mark.slow
def test_fig_2_16_scores_both_levels(tmp_path, photos):
    tiny = {
        "resolution": 16,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "steps": 2,
        "batch_size": 4,
        "sample_every": 0,
    }
    report = reproduce("fig2.16", None, out=tmp_path, progress=False, norm_groups=2, **tiny)
    scores = report.data["rows"][0]["cells"][0]["scores"]
    assert scores["level2"] == pytest.approx(scores["level1"] * scores["within"])
    with Image.open(report.folder / report.data["images"][0]) as grid:
        assert grid.width > grid.height
