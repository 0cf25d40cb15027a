"""`factorkit segment` on folders."""

from __future__ import annotations

import json

import pytest
from PIL import Image


@pytest.mark.slow
def test_segment_options_apply_and_second_call_continues(run, photos, run_json, run_cli, tmp_path):
    words = ("segment", run, photos / "images", "--out", tmp_path, "--formats", "labels", "coco", "--size", 24)
    result = run_json(*words, "--upsample", "bilinear", "--workers", 1)
    assert result["segmented"] == 24 and result["already"] == 0
    annotated = json.loads((tmp_path / "annotations.json").read_text())
    assert result["annotations"] == str(tmp_path / "annotations.json") and len(annotated["images"]) == 24
    assert {path.name.rpartition("_")[2] for path in tmp_path.glob("*.png")} == {"labels.png", "overview.png"}
    code, out, _ = run_cli(*words, "--upsample", "bilinear")
    assert code == 0 and "24 segmented, 24 of them before" in out and "annotations: " in out


@pytest.mark.slow
def test_segment_bad_option_or_full_disk_has_no_traceback(run, photos, run_cli, run_refused, monkeypatch, tmp_path):
    words = ("segment", run, photos / "images", "--out", tmp_path / "out")
    assert "size=0" in run_refused(*words, "--size", 0)
    assert "workers=0" in run_refused(*words, "--workers", 0)
    assert "gif" in run_refused(*words, "--formats", "gif")
    (tmp_path / "file").write_text("mine")
    assert "file is a file; give another out=, a folder" in run_refused(*words[:-1], tmp_path / "file")

    def raise_disk_full(image, path, **options):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", raise_disk_full)
    code, out, err = run_cli(*words, "--json")
    assert code == 1 and "Traceback" not in err
    assert "No space left" in json.loads(out)["error"] and "same command again" in err
    monkeypatch.undo()


@pytest.mark.slow
def test_segment_video_writes_video_of_regions(run, photos, run_json, run_refused, tmp_path):
    out = tmp_path / "regions.mp4"
    words = ("segment", run, photos / "images", "--video", "--out", out, "--smooth", 0.5, "--quality", "best")
    result = run_json(*words)
    assert result["out"] == str(out) and out.exists() and result["frames"] == 24
    assert len(result["areas"]) == 2 and 0 <= result["changes"] <= 1
    assert "walk.MP4 is a video: add --video" in run_refused("segment", run, tmp_path / "walk.MP4", "--out", out)
    assert "takes one video" in run_refused("segment", run, photos, photos, "--video", "--out", out)
    assert "smooth=1.5" in run_refused("segment", run, photos, "--video", "--out", tmp_path / "b.mp4", "--smooth", 1.5)
    assert ".mp4" in run_refused("segment", run, photos, "--video", "--out", tmp_path / "regions")


def test_segment_says_which_images_are_unlike_the_training_set(run, photos, run_cli, monkeypatch, tmp_path):
    monkeypatch.setattr("factorkit.segdiff.inference.folder.is_unlike", lambda *arguments: True)
    images = photos / "images"
    code, out, _ = run_cli("segment", run, images / "00.png", "--out", tmp_path, "--formats", "labels")
    assert code == 0 and "1 image unlike the training set; check the regions: " in out and "00.png" in out
