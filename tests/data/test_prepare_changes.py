"""Prepared images when their source changes, and when the disk is full."""

from __future__ import annotations

import builtins
import errno
import importlib
import os

import numpy as np
import pytest
from PIL import Image

from factorkit.data import open_source, prepare
from factorkit.utils.errors import DataError

module = importlib.import_module("factorkit.data.prepare")  # `import ... as` would give the function of that name


@pytest.fixture
def photos(tmp_path, save):
    for i in range(4):
        save(tmp_path / f"photos/{i}.png", (50 * i, 0, 0))
    return tmp_path / "photos"


def read_red_values(prepared) -> list[int]:
    return prepared.images[:, 0, 0, 0].tolist()


def test_prepare_changed_file_is_prepared_again(photos, save):
    source = open_source(photos)  # opened once, as by a program that runs for days
    assert read_red_values(prepare(source, 4, progress=False)) == [0, 50, 100, 150]
    save(photos / "2.png", (222, 0, 0), size=(30, 30))
    assert read_red_values(prepare(source, 4, progress=False)) == [0, 50, 222, 150]
    save(photos / "9.png", (250, 0, 0))
    assert read_red_values(prepare(photos, 4, progress=False)) == [0, 50, 222, 150, 250]


def test_prepare_overwritten_archive_or_array_is_prepared_again(tmp_path):
    path = tmp_path / "x.npy"
    for value in (3, 4):
        np.save(path, np.full((2, 6, 6, 3), value, np.uint8))
        os.utime(path, ns=(value, value))
        assert read_red_values(prepare(path, 4, progress=False)) == [value] * 2


def test_prepare_change_during_preparation_is_prepared_again(photos, save, own_cache, monkeypatch):
    """0.png is replaced after it was decoded: what was made so far is of no state that ever was."""
    decode, rounds = module._decode, []

    def replace_while_reading(source, resolution, index):
        pixels = decode(source, resolution, index)
        if len(rounds) == 3:
            save(photos / "0.png", (77, 0, 0), size=(40, 40))
            save(photos / "3.png", (88, 0, 0), size=(40, 40))
        rounds.append(index)
        return pixels

    monkeypatch.setattr(module, "_decode", replace_while_reading)
    assert read_red_values(prepare(photos, 4, workers=1, progress=False)) == [77, 50, 100, 88]
    assert len(rounds) == 8 and len(list((own_cache / "prepared").iterdir())) == 1


def test_prepare_images_that_keep_changing_raise(photos, save, own_cache, monkeypatch):
    decode, size = module._decode, [12]

    def replace_while_reading(source, resolution, index):
        size[0] += 1
        save(photos / "0.png", size=(size[0], size[0]))
        return decode(source, resolution, index)

    monkeypatch.setattr(module, "_decode", replace_while_reading)
    with pytest.raises(DataError, match="changed again and again while they were prepared"):
        prepare(photos, 4, workers=1, progress=False)
    assert not list((own_cache / "prepared").iterdir())


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 128 + 48, 128 + 4 * 48 + 10])
def test_prepare_full_disk_keeps_earlier_entries(photos, save, own_cache, monkeypatch, room):
    """In the header, after the first image, and while the header is written again."""
    before = prepare(photos, 4, progress=False)
    save(photos / "2.png", (222, 0, 0), size=(30, 30))
    opened = builtins.open

    def full(path, mode="r", *arguments, **options):
        file = opened(path, mode, *arguments, **options)
        return FullDisk(file, room) if str(path).endswith("images.npy") and "w" in mode else file

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(DataError, match="cannot be stored here: no space left.*FACTORKIT_CACHE"):
        prepare(photos, 4, progress=False)
    monkeypatch.setattr(builtins, "open", opened)
    assert [path.name for path in (own_cache / "prepared").iterdir()] == [before.path.name]
    assert read_red_values(before) == [0, 50, 100, 150] and np.load(before.path / "images.npy").shape == (4, 4, 4, 3)
    assert read_red_values(prepare(photos, 4, progress=False)) == [0, 50, 222, 150]


def test_source_rows_index_the_source(photos, break_jpeg):
    for name in ("0a.jpg", "3a.jpg"):
        break_jpeg(photos / name)
    classes = np.array([10, 99, 11, 12, 13, 99])  # 0.png 0a.jpg 1.png 2.png 3.png 3a.jpg
    for _ in range(2):  # made, then opened
        with pytest.warns(UserWarning, match="2 of 6 images"):
            prepared = prepare(photos, 4, progress=False)
        assert classes[prepared.source_rows].tolist() == [10, 11, 12, 13]
    ready = prepare(np.zeros((3, 4, 4, 3), np.uint8), 4)
    assert ready.source_rows.tolist() == [0, 1, 2]
    assert Image.fromarray(prepared.images[1]).size == (4, 4)
