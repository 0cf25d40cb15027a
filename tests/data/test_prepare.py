from __future__ import annotations

import errno
import importlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factorkit.data import crop_square, open_source, prepare
from factorkit.utils.errors import ConfigError, DataError

module = importlib.import_module("factorkit.data.prepare")  # `import ... as` would give the function of that name


@pytest.fixture
def photos(tmp_path):
    """Five different images of different sizes in a folder."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(5):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


def entries(cache):
    folder = cache / "prepared"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_prepare_keeps_order(photos, own_cache):
    prepared = prepare(photos, 8, workers=3, progress=False)
    source = open_source(photos)
    assert prepared.names == source.names and prepared.skipped == [] and len(prepared) == 5
    np.testing.assert_array_equal(prepared.images, [crop_square(source.read(i), 8) for i in range(5)])
    assert isinstance(prepared.images, np.memmap) and not prepared.images.flags.writeable
    assert prepared.path.parent.parent == own_cache
    np.testing.assert_array_equal(np.load(prepared.path / "images.npy"), prepared.images)  # a plain .npy for anybody


def test_prepare_more_images_than_one_block(photos, monkeypatch):
    whole = prepare(photos, 8, progress=False).images
    monkeypatch.setattr(module, "BLOCK_SIZE", 2)
    np.testing.assert_array_equal(prepare(photos, 8, cache=photos.parent / "other", progress=False).images, whole)


def test_prepare_second_call_decodes_nothing(photos, monkeypatch):
    first = prepare(photos, 8, progress=False)
    monkeypatch.setattr(module, "_decode", None)
    again = prepare(photos, 8, progress=False)
    assert again.path == first.path
    np.testing.assert_array_equal(again.images, first.images)


def test_prepare_resolution_and_changes_get_new_entries(photos, own_cache):
    first = prepare(photos, 8, progress=False)
    assert prepare(photos, 16, progress=False).images.shape == (5, 16, 16, 3)
    Image.new("RGB", (30, 30), "red").save(photos / "2.png")
    changed = prepare(photos, 8, progress=False)
    assert (changed.images[2] == (255, 0, 0)).all() and not (first.images[2] == (255, 0, 0)).all()
    (photos / "4.png").unlink()
    assert len(prepare(photos, 8, progress=False)) == 4
    assert len(entries(own_cache)) == 4


def test_prepare_broken_image_is_skipped_with_warning(photos, break_jpeg):
    break_jpeg(photos / "1b.jpg")
    with pytest.warns(UserWarning, match="could not be decoded") as caught:
        prepared = prepare(photos, 8, progress=False)
    assert len(caught) == 1 and str(caught[0].message).startswith("1 of 6 images could not be decoded")
    assert "1b.jpg (cannot be decoded: " in str(caught[0].message)
    assert prepared.names == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert [name for name, _ in prepared.skipped] == ["1b.jpg"]
    source = open_source(photos)
    np.testing.assert_array_equal(prepared.images[2], crop_square(source.read(3), 8))  # rows close up behind the gap
    with pytest.warns(UserWarning, match="1b.jpg"):
        assert prepare(photos, 8, progress=False).skipped == prepared.skipped


def test_prepare_only_broken_images_raise(tmp_path, break_jpeg, own_cache):
    for i in range(7):
        break_jpeg(tmp_path / f"{i}.jpg")
    with pytest.raises(DataError, match=r"7 of 7 images.*0\.jpg \(cannot be.*and 2 more.*check the files"):
        prepare(tmp_path, 8, progress=False)
    assert entries(own_cache) == []


def test_prepare_unreadable_source_raises(photos, own_cache):
    source = open_source(photos)
    source.fingerprint = lambda: "taken before the file went"
    (photos / "3.png").unlink()
    with pytest.raises(DataError, match="3.png: cannot be read"):
        prepare(source, 8, progress=False)
    assert entries(own_cache) == []


def test_prepare_interrupted_leaves_no_files(photos, own_cache, monkeypatch):
    class InterruptedTestError(Exception):
        pass

    decode = module._decode

    def fails_at_3(source, resolution, index):
        if index == 3:
            raise InterruptedTestError
        return decode(source, resolution, index)

    monkeypatch.setattr(module, "_decode", fails_at_3)
    with pytest.raises(InterruptedTestError):
        prepare(photos, 8, progress=False)
    assert entries(own_cache) == []
    monkeypatch.undo()
    assert len(prepare(photos, 8, cache=own_cache, progress=False)) == 5


def test_prepare_full_disk_raises_and_leaves_no_files(photos, own_cache, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="no space left.*FACTORKIT_CACHE"):
        prepare(photos, 8, progress=False)
    assert entries(own_cache) == []


def test_prepare_removes_abandoned_folders(photos, own_cache):
    old, running = (own_cache / "prepared" / f"{module.TEMPORARY_PREFIX}{name}" for name in ("old", "running"))
    for folder in (old, running):
        folder.mkdir(parents=True)
        (folder / "images.npy").write_bytes(b"x")
        os.utime(folder, (0, 0))
    os.utime(old / "images.npy", (0, 0))
    prepare(photos, 8, progress=False)
    assert running.exists() and not old.exists()


@pytest.mark.parametrize("damage", ["images.npy", "index.json", "names"])
def test_prepare_damaged_entry_is_rebuilt(photos, damage):
    first = prepare(photos, 8, progress=False)
    expected = np.array(first.images)
    if damage == "names":
        index = json.loads((first.path / "index.json").read_text())
        (first.path / "index.json").write_text(json.dumps({**index, "names": ["one"]}))
    else:
        (first.path / damage).write_bytes((first.path / damage).read_bytes()[:20])
    again = prepare(photos, 8, progress=False)
    assert again.path == first.path and len(again) == 5
    np.testing.assert_array_equal(again.images, expected)


def test_prepare_concurrent_processes_leave_one_entry(photos, own_cache, monkeypatch):
    """Another process finishes while this one is still decoding: its entry stays, and is what both return."""
    write, other = module._write_images, []

    def overtaken(*arguments):
        if not other:
            other.append(None)
            other[0] = prepare(photos, 8, progress=False)
        return write(*arguments)

    monkeypatch.setattr(module, "_write_images", overtaken)
    prepared = prepare(photos, 8, progress=False)
    assert prepared.path == other[0].path and entries(own_cache) == [prepared.path.name]


def test_prepare_array_at_resolution_is_unchanged(own_cache):
    array = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    prepared = prepare(array, 8, progress=False)
    assert np.shares_memory(prepared.images, array) and not prepared.images.flags.writeable and array.flags.writeable
    assert prepared.path is None and len(prepared.names) == 3 and entries(own_cache) == []
    assert prepare(array, 4, progress=False).images.shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(prepare(array / 255, 8, progress=False).images, array)


def test_get_cache_folder_follows_environment(monkeypatch, tmp_path):
    assert module.get_cache_folder() == Path(os.environ["FACTORKIT_CACHE"])
    monkeypatch.delenv("FACTORKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.get_cache_folder() == tmp_path / "factorkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.get_cache_folder() == tmp_path / ".cache/factorkit"


def test_prepare_unwritable_cache_raises(photos, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be stored here"):
        prepare(photos, 8, cache=tmp_path / "file", progress=False)


@pytest.mark.parametrize("wrong", [{"resolution": 0}, {"resolution": 8, "workers": 0}])
def test_prepare_invalid_arguments_raise(photos, wrong):
    with pytest.raises(ConfigError, match="must be 1 or more"):
        prepare(photos, **wrong)


def test_prepare_progress_bar_is_on_stderr(photos, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(photos, 8)
        shown = capsys.readouterr()
        prepare(photos, 9, progress=False)
    assert "preparing 8 px" in shown.err and "5/5" in shown.err and shown.out == ""
    assert capsys.readouterr().err == ""


def test_prepare_real_photos(real_data):
    some = open_source(real_data("flowers17_128") / "images").subset(range(20))
    prepared = prepare(some, 32, progress=False)
    assert prepared.images.shape == (20, 32, 32, 3) and prepared.images.std() > 30
