"""Stored cells belong to the data they were computed on, whatever their path."""

from __future__ import annotations

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from factorkit.reproduce import experiments, reproduce
from factorkit.reproduce.experiment import CellResult, Column, Experiment, Row
from factorkit.reproduce.runner import MAX_READ_FILES, fingerprint
from factorkit.utils.errors import CheckpointError


@pytest.fixture(autouse=True)
def counting_experiment(monkeypatch):
    """An experiment that returns the number of files of the data, and reads a variable."""

    def rows(setup):
        return [Row("files", lambda seed: CellResult({"files": len(list(setup.data.rglob("*.png")))}))]

    columns = (Column("files", "files"),)
    experiment = Experiment(
        name="table9.1", title="", data="", duration={}, columns=columns, rows=rows, seeds=1, inputs=("video",)
    )
    monkeypatch.setattr(experiments, "list_experiments", lambda: {"table9.1": experiment})


@pytest.fixture
def birds(tmp_path):
    """Three images with masks, in a folder."""
    folder = tmp_path / "A" / "birds.v1"
    for kind, shape in (("images", (16, 16, 3)), ("masks", (16, 16))):
        (folder / kind).mkdir(parents=True)
        for i in range(3):
            values = np.random.default_rng(i).integers(0, 2, shape).astype(np.uint8)
            Image.fromarray(values * 255).save(folder / kind / f"{i}.png")
    return folder


def pack_zip(folder, path):
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return path


def count_files(data, out, **inputs):
    return reproduce("table9.1", data, out=out, progress=False, **inputs).data["rows"][0]["mean"]["files"]


def test_cells_of_other_data_are_refused(birds, tmp_path):
    out = tmp_path / "out"
    assert count_files(birds, out) == 6
    renamed = shutil.copytree(birds, tmp_path / "A" / "birds.v2")
    assert count_files(renamed, out) == 6, "the same images under another name are the same data"
    moved = shutil.copytree(birds, tmp_path / "B" / "birds.v1")
    os.utime(moved / "masks" / "1.png", (1, 1))
    (moved / ".DS_Store").write_text("hidden")
    assert count_files(moved, out) == 6, "copies of the same images elsewhere are the same data"
    mask = moved / "masks" / "1.png"
    Image.fromarray(255 - np.asarray(Image.open(mask))).save(mask)
    with pytest.raises(CheckpointError, match="other data "):
        count_files(moved, out)


def test_fingerprint_distinguishes_zips_and_arrays(birds, tmp_path):
    first = pack_zip(birds, tmp_path / "C" / "images.zip")
    image = birds / "images" / "2.png"
    image.write_bytes(image.read_bytes()[:-1] + b"?")  # the same size
    second = pack_zip(birds, tmp_path / "D" / "images.zip")
    result = fingerprint(first), fingerprint(second)
    assert result[0]["bytes"] == result[1]["bytes"] and result[0]["sha256"] != result[1]["sha256"]
    array = np.zeros((64, 64, 64, 3), np.uint8)
    np.save(tmp_path / "x.npy", array)
    before = fingerprint(tmp_path / "x.npy")
    array[33, 7, 7] = 1
    np.save(tmp_path / "x.npy", array)
    assert fingerprint(tmp_path / "x.npy") != before


def test_fingerprint_of_many_files_counts_names_and_sizes(birds, monkeypatch):
    assert MAX_READ_FILES >= 10_000
    monkeypatch.setattr("factorkit.reproduce.runner.MAX_READ_FILES", 1)
    before = fingerprint(birds)
    (birds / "masks" / "2.png").rename(birds / "masks" / "3.png")
    assert fingerprint(birds) != before


def test_cells_of_other_video_are_refused(birds, tmp_path):
    out = birds / "out"  # The output folder lies within the data, but its files do not belong to them.
    assert count_files(birds, out) == 6
    with pytest.raises(CheckpointError, match=r"other data \(data.video: None there"):
        count_files(birds, out, video=birds / "images")


def test_folder_without_cells_accepts_other_data(birds, tmp_path):
    out = tmp_path / "out"
    count_files(birds, out)
    shutil.rmtree(out / "table9.1" / "cells")
    assert count_files(birds, out, video=birds / "images") == 6
    settings = json.loads((out / "table9.1" / "config.json").read_text())
    assert settings["data"]["video"]["name"] == "images"
