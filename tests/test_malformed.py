"""A share of the thousand malformed inputs of `benchmarks.fuzz`, and what it found."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import factorkit
from benchmarks import fuzz, fuzz_targets, malformed
from factorkit.data import open_dataset, open_source, open_views, prepare, read_classes
from factorkit.engine.checkpoint import read_checkpoint, write_checkpoint
from factorkit.engine.config import MAX_TIMESTEPS
from factorkit.rendering import orbit
from factorkit.segdiff.config import preset_config
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.files import read_arrays

COUNT = 153  # nine of each kind
STORED = Path(__file__).parent / "engine" / "stored"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Every kind of input, and the good runs that some of them need."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("good") / "runs"
    return folder, fuzz_targets.targets(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_malformed_inputs_raise_clear_errors_or_are_skipped(good, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "targets", lambda folder: good[1])
    verdicts = list(fuzz.fuzz(range(COUNT), 2, tmp_path))
    result = [f"input {v.number} ({v.kind}): {v.outcome}\n{v.message}" for v in verdicts if v.outcome not in fuzz.FINE]
    assert not result, "\n\n".join(result)
    outcomes = [v.outcome for v in verdicts]
    assert len(outcomes) == COUNT and outcomes.count("refused") > 60 and outcomes.count("skipped") > 2


@pytest.mark.slow
def test_undamaged_inputs_are_read(good, tmp_path, monkeypatch):
    for name in ("damage", "damage_tree", "damage_array"):
        monkeypatch.setattr(fuzz_targets, name, lambda good, rng: good, raising=False)
    monkeypatch.setattr(fuzz_targets, "damage_json", lambda tree, rng: json.dumps(tree).encode())
    monkeypatch.setattr(fuzz_targets, "damage_npy", lambda array, rng: malformed.encode_npy(array))
    monkeypatch.setattr(fuzz_targets, "damage_npz", lambda arrays, rng: malformed.encode_npz(arrays))
    monkeypatch.setattr(fuzz_targets, "damage_words", lambda words, rng: words)
    monkeypatch.setattr(fuzz_targets, "pick", lambda rng, options: options[0])
    monkeypatch.setattr(fuzz, "targets", lambda folder: good[1])
    verdicts = list(fuzz.fuzz(range(len(good[1])), 0, tmp_path))
    assert {v.kind: v.outcome for v in verdicts} == {target.name: "read" for target in good[1]}, verdicts


# --- cases that the fuzzing has found ---


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("transforms.json", open_views),
        ("classes.json", lambda folder: read_classes(folder / "classes.json", ["a.png", "b.png"])),
        ("config.json", lambda folder: factorkit.load(folder)),
    ],
)
def test_json_nested_too_deeply_raises(tmp_path, name, read):
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises((DataError, CheckpointError), match=rf"{name}.*nested too deeply"):
        read(tmp_path)


def test_postscript_named_png_is_not_decoded(tmp_path):
    fuzz_targets.small(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(fuzz_targets.POSTSCRIPT)
    with pytest.warns(UserWarning, match=r"bad\.png \(not an image"):
        assert prepare(tmp_path, 8, progress=False).names == ["good.png"]


@pytest.mark.parametrize(
    "array", [np.zeros((4, 17), [("a", "f4"), ("b", "i2")]), np.full((4, 17), "x"), np.zeros((4, 17), "c16")]
)
def test_llff_without_numbers_raises(tmp_path, array):
    for i in range(4):
        fuzz_targets.small(tmp_path / "images" / f"{i}.png", i)
    np.save(tmp_path / "poses_bounds.npy", array)
    with pytest.raises(DataError, match=r"poses_bounds\.npy: not an array of numbers"):
        open_views(tmp_path)


def test_npy_header_larger_than_file_is_not_allocated(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000, 17), }"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(800))
    with pytest.raises(ValueError, match="file size|mmap length"):
        read_arrays(tmp_path / "x.npy")


def test_npz_bomb_is_refused_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr("factorkit.utils.files.machine_memory", lambda: 2**20)
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((2, 1024, 1024, 3), np.uint8), X=np.zeros(3))
    with pytest.raises(DataError, match=r"x\.npz.*more memory than this machine has"):
        open_source(tmp_path / "x.npz")
    assert read_arrays(tmp_path / "x.npz", ["X"])["X"].shape == (3,), "what nobody asked for is not unpacked"


def test_npz_damaged_member_raises_value_error(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=np.arange(3000))
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        at = archive.infolist()[0].header_offset
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[at + 60 : at + 90] = b"\xff" * 30
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"\S"):  # the cause depends on the version of zlib
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("min_snr_gamma", [1, 2]),
        ("model_channels", "64"),
        ("channel_mult", 3),
        ("steps", 2.5),
        ("device", None),
        ("num_res_blocks", {}),
    ],
)
def test_settings_of_wrong_type_raise(setting, value):
    with pytest.raises(ConfigError, match=f"^{setting}="):
        preset_config("demo", **{setting: value})


def test_settings_too_many_timesteps_raise():
    with pytest.raises(ConfigError, match="timesteps=.*at most"):
        preset_config("demo", timesteps=MAX_TIMESTEPS + 1).resolved()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_channels": 10**9},
        {"num_res_blocks": 10**9},
        {"channel_mult": [1] * 10**5},
        {"regions": 10**9},
        {"step": "x"},
        {"step": None},
        {"model_channels": [8]},
        {"channel_mult": []},
    ],
)
def test_checkpoint_settings_inconsistent_with_weights_raise(tmp_path, changes):
    tensors, meta = read_checkpoint(STORED / "segdiff_1.safetensors")
    path = write_checkpoint(tmp_path / "x.safetensors", tensors, {**meta, **changes})
    with pytest.raises(CheckpointError, match="x.safetensors"):
        factorkit.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"scene": None},
        {"scene": {"layout": "object", "distance": "far", "size": [8, 8]}},
        {"model_channels": 10**9},
        {"scene": {"layout": "object", "distance": 3.5, "size": [8, 10**9]}},
        {"num_candidates": 10**9},
        {"step": []},
    ],
)
def test_checkpoint_invalid_scene_raises(tmp_path, changes):
    tensors, meta = read_checkpoint(STORED / "nerfdiff_1.safetensors")
    path = write_checkpoint(tmp_path / "x.safetensors", tensors, {**meta, **changes})
    with pytest.raises(CheckpointError, match="x.safetensors"):
        factorkit.load(path)


def test_checkpoint_without_settings_raises(tmp_path):
    tensors, _ = read_checkpoint(STORED / "segdiff_1.safetensors")
    path = write_checkpoint(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(CheckpointError, match="x.safetensors"):
        factorkit.load(path)


@pytest.mark.slow
def test_stored_views_incomplete_raise(good, tmp_path):
    shutil.copytree(good[0] / "nerfdiff", tmp_path / "run")
    with np.load(tmp_path / "run/views.npz", allow_pickle=False) as result:
        arrays = dict(result)
    del arrays["layout"]
    np.savez(tmp_path / "run/views.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"cannot read .*views\.npz"):
        _ = factorkit.load(tmp_path / "run").views


def test_near_duplicates_binary_file_raises(tmp_path):
    fuzz_targets.labelled(tmp_path, 2)
    (tmp_path / "near_duplicates.txt").write_bytes(b"\xff\xfe 0 1")
    with pytest.raises(DataError, match=r"near_duplicates\.txt: not UTF-8 text"):
        open_dataset(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in [*tmp_path.rglob("*.png"), tmp_path / "near_duplicates.txt"]:
            archive.write(path, path.relative_to(tmp_path).as_posix())
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[data.rindex(b"PK\x03\x04")] = 0
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"near_duplicates\.txt cannot be unpacked"):
        open_dataset(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": [{"file_path": 5, "transform_matrix": []}]}, "a file name is not a string"),
        ({"train_filenames": [[1]]}, "a file name is not a string"),
        ({"w": 0}, "0 x 20 pixels"),
        ({"k1": "a"}, "distortion of .* is not a number"),
        ({"k1": float("nan")}, "distortion of .* is not finite"),
        ({"fl_x": 10**400}, "no focal length"),
        ({"camera_angle_x": 0.0, "fl_x": None}, "no focal length"),
    ],
)
def test_transforms_wrong_types_raise(tmp_path, change, message):
    poses = orbit(2, 4.0, 30.0).tolist()
    frames = [{"file_path": f"{i}.png", "transform_matrix": pose} for i, pose in enumerate(poses)]
    for i in range(2):
        fuzz_targets.small(tmp_path / f"{i}.png", i)
    content = {"fl_x": 30.0, "w": 24, "h": 20, "frames": frames, **change}
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        open_views(tmp_path, "train")


def test_srn_zero_image_size_raises(tmp_path):
    fuzz_targets.make_srn(tmp_path, np.random.default_rng(0))
    (tmp_path / "in/pose/000001.txt").write_text((tmp_path / "in/pose/000000.txt").read_text())
    (tmp_path / "in/intrinsics.txt").write_text("30 12 10 0.\n0. 0. 0.\n1.\n0 24\n")
    with pytest.raises(DataError, match="24 x 0 pixels"):
        open_views(tmp_path / "in")


def test_classes_empty_name_is_accepted(tmp_path):
    (tmp_path / "x.csv").write_text("name,class\n,a\na.png,a\nb.png,b\n")
    assert read_classes(tmp_path / "x.csv", ["a.png", "b.png"]).names == ["a", "b"]
