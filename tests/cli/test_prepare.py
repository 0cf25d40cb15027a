"""`factorkit prepare`: the list of data sets, official layouts, full disks and malformed archives."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factorkit.data.layouts import read_layout


def test_prepare_list_names_expected_files_and_source(run_cli, run_json):
    code, out, _ = run_cli("prepare", "--list")
    assert code == 0
    for word in (
        "segmim/segmim_00001.jpg",
        "tstid",
        "CelebAMask-HQ-mask-anno",
        "ImageSets/2017/train.txt",
        "3dshapes.h5",
    ):
        assert word in out
    listed = run_json("prepare", "--list")["layouts"]
    names = ["flowers-102", "cub-200-2011", "celebamask-hq", "ffhq", "imagenet", "voc-2012", "davis-2017"]
    assert [entry["name"] for entry in listed] == [*names, "3d-shapes", "ecssd", "huggingface", "webdataset"]
    for entry in listed:
        assert entry["url"].startswith("http") and entry["expects"] and entry["splits"]
    assert [entry["name"] for entry in listed if entry["extra"]] == ["flowers-102", "3d-shapes", "huggingface"]


def test_readers_ignore_other_layouts(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for data in (tmp_path, tmp_path / "file.txt", tmp_path / "nowhere", str(tmp_path), np.zeros(3), None, 5, ["a"]):
        assert read_layout(data) is None


def test_prepare_circular_link_is_refused(run_refused, tmp_path):
    for name in ("x.zip", "photos"):
        (tmp_path / name).symlink_to(name)
        assert "no such file or folder" in run_refused("prepare", tmp_path / name)


def test_prepare_without_data_is_refused(run_refused):
    assert "--list" in run_refused("prepare")


@pytest.fixture
def ecssd(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(1, 11):
        for kind, pixels, suffix in (
            ("images", rng.integers(0, 256, (8, 8, 3)), "jpg"),
            ("ground_truth_mask", np.eye(8) * 255, "png"),
        ):
            (tmp_path / "ECSSD" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"ECSSD/{kind}/{i:04d}.{suffix}")
    return tmp_path / "ECSSD"


def test_prepare_names_layout_and_splits(ecssd, run_json, run_cli):
    result = run_json("prepare", ecssd, "--resolution", 8)
    assert (result["layout"], result["images"], result["held_out"], result["splits"]) == ("ecssd", 8, 2, {})
    assert "ecssd: no official splits" in run_cli("prepare", ecssd, "--resolution", 8)[1]


@pytest.mark.slow
def test_train_on_published_layout_is_scored(ecssd, run_json, flags, tmp_path):
    result = run_json(*flags(resolution=8, num_fit_images=1), "--data", ecssd, "--out", tmp_path / "run")
    assert 0 <= result["scores"]["iou"] <= 1


def test_prepare_bomb_or_broken_name_is_refused(run_refused, run_cli, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("../bo\nmb.png", bytes(10**6))
    message = run_refused("prepare", tmp_path / "x.zip", "--resolution", 8)
    assert "1 of 1 image could" in message and "unsupported compression method" in message and message.isprintable()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system limits no file's size")
def test_prepare_on_full_disk_is_refused(ecssd, tmp_path):
    """A real write that fails half way, by the file-size limit of the process."""
    environment = {**os.environ, "FACTORKIT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    limit += "; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    run = f"{limit}; from factorkit.cli.main import main; raise SystemExit(main(['prepare', {str(ecssd)!r}]))"
    ended = subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "cannot be stored here" in ended.stderr and "FACTORKIT_CACHE" in ended.stderr
    assert not list((tmp_path / "cache/prepared").iterdir())
