"""Folders with unreadable files: these are named and skipped, the rest is segmented, and no result is lost."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.files import escape_name
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.inference import segmenter
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.errors import ConfigError, DataError, WriteError

TINY = {
    "masks": "network",
    "resolution": 16,
    "regions": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 2,
    "device": "cpu",
    "threads": 1,
}
ALL = ("labels", "masks", "overlays", "coco")


@pytest.fixture(scope="module")
def run():
    config = preset_config("demo", **TINY).resolved()
    torch.manual_seed(0)
    return SegdiffRun(config, config.build(), torch.device("cpu"), 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """One readable image beside the others."""
    place = tmp_path / "photos"
    place.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(place / "good.jpg")
    return place


def segment_quietly(run, folder, **options):
    return run.segment_folder(folder, folder.parent / "out", progress=False, **options)


def test_segment_folder_extreme_sizes_work(run, folder):
    for name, size in (("pixel", (1, 1)), ("wide", (30_000, 2)), ("high", (3, 30_000))):
        Image.new("RGB", size, "green").save(folder / f"{name}.png")
    result = segment_quietly(run, folder, formats=ALL)
    assert result.segmented == 4 and not result.skipped
    assert Image.open(result.out / "wide_mask_1.png").size == (30_000, 2)
    sizes = {i["file_name"]: i["width"] for i in json.loads(result.annotations.read_text())["images"]}
    assert sizes == {"good.jpg": 30, "pixel.png": 1, "wide.png": 30_000, "high.png": 3}


def test_segment_folder_broken_images_are_named_and_retried(run, folder, monkeypatch):
    whole = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    Image.new("RGB", (60, 60)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # Twice as many are refused.
    with pytest.warns(UserWarning, match=r"4 of 5 images could not be segmented.*cut\.jpg \(.*[Tt]runcated"):
        result = segment_quietly(run, folder)
    assert set(result.skipped) == {"cut.jpg", "empty.png", "text.png", "bomb.png"} and result.segmented == 1
    assert "too many pixels" in result.skipped["bomb.png"]
    (folder / "cut.jpg").write_bytes(whole)
    with pytest.warns(UserWarning, match="3 of 5"):
        assert segment_quietly(run, folder).segmented == 2


def test_segment_folder_nothing_readable_raises(run, folder):
    (folder / "good.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 image could be segmented: good\.jpg \("):
        segment_quietly(run, folder)


def test_segment_folder_unreadable_file_is_skipped(run, folder, monkeypatch):
    Image.new("RGB", (9, 9)).save(folder / "secret.png")
    read = Path.read_bytes

    def refuse(path):  # chmod does not restrict root.
        if path.name == "secret.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.warns(UserWarning, match=r"secret\.png \(.*Permission denied"):
        result = segment_quietly(run, folder)
    assert result.segmented == 1 and set(result.skipped) == {"secret.png"}
    monkeypatch.undo()
    assert segment_quietly(run, folder).segmented == 2, "it must be tried again with the same modification time"


@pytest.mark.skipif(sys.platform != "linux", reason="such names need a file system that takes any bytes")
def test_segment_folder_unprintable_names_work(run, folder):
    names = ["two\nlines.png", "tab\there.png", os.fsdecode(b"caf\xe9.png"), "\u202egnp.png"]
    for name in names:
        Image.new("RGB", (9, 9)).save(folder / name)
    (folder / "bad\nnews.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="could not be segmented") as caught:
        result = segment_quietly(run, folder, formats=ALL)
    assert "bad\\nnews.png" in str(caught[0].message) and "\n" not in str(caught[0].message)
    assert result.segmented == 5 and "bad\nnews.png" in result.skipped
    assert (result.out / "two\nlines_labels.png").is_file() and result.overview.is_file()
    listed = {image["file_name"] for image in json.loads(result.annotations.read_text())["images"]}
    assert listed == {*names, "good.jpg"}
    with pytest.warns(UserWarning, match="1 of 6"):
        assert segment_quietly(run, folder, formats=ALL).already == 5, "their lines in the list must be readable"
    assert escape_name("plain ünï.png") == "plain ünï.png" and escape_name("a\nb") == "a\\nb"


def test_segment_folder_too_long_name_is_skipped(run, folder):
    name = "x" * 247 + ".png"
    Image.new("RGB", (9, 9)).save(folder / name)
    with pytest.warns(UserWarning, match="too long"):
        result = segment_quietly(run, folder)
    assert result.segmented == 1 and set(result.skipped) == {name}


def test_segment_folder_link_loops_end(run, folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "there.png").symlink_to(folder / "back.png")
    (folder / "back.png").symlink_to(folder / "there.png")
    result = segment_quietly(run, folder)
    assert result.segmented == 1 and {p.name for p in result.out.glob("*_labels.png")} == {"good_labels.png"}


def test_segment_folder_vanishing_image_is_skipped(run, folder, monkeypatch):
    Image.new("RGB", (9, 9)).save(folder / "later.png")
    read = Path.read_bytes

    def gone(path):
        if path.name == "later.png":
            path.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", gone)
    with pytest.warns(UserWarning, match=r"later\.png"):
        assert segment_quietly(run, folder).segmented == 1


def test_segment_folder_out_of_memory_skips_one_image(run, folder, monkeypatch):
    for name, size in (("large.png", (90, 60)), ("other.png", (30, 20))):
        Image.new("RGB", size).save(folder / name)
    predict = segmenter.predict_masks

    def limited(model, images, *settings):
        if images.shape[2] > 16 or len(images) > 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes")
        return predict(model, images, *settings)

    monkeypatch.setattr(segmenter, "predict_masks", limited)
    assert segment_quietly(run, folder).segmented == 3, "they fit one at a time"
    monkeypatch.setattr(segmenter, "predict_masks", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(DataError, match=r"none of 3.*out of memory for 30 x 20 pixels; scale it down, or .*size=20"):
        segment_quietly(run, folder, size=20)


def test_segment_folder_output_not_writable_raises(run, folder):
    (folder.parent / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file; give another out=, a folder"):
        run.segment_folder(folder, folder.parent / "file", progress=False)
    with pytest.raises(WriteError, match=r"file.*cannot be written"):
        run.segment_folder(folder, folder.parent / "file/below", progress=False)
    assert (folder.parent / "file").read_text() == "mine"
