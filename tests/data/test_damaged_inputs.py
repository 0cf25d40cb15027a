"""Malicious and damaged data: refused or skipped with a clear message."""

from __future__ import annotations

import gc
import os
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factorkit.data import ImageDecodeError, load_labelled, open_dataset, open_source, prepare
from factorkit.utils.errors import DataError


@pytest.fixture
def refuse(monkeypatch):
    """refuse(path): from now on nobody may read that file or list that folder; root could, whatever its mode."""

    def forbid(path: Path) -> None:
        forbidden = os.path.realpath(path)

        def guarded(act):
            def attempt(place, *arguments, **options):
                if not isinstance(place, int) and os.path.realpath(place) == forbidden:
                    raise PermissionError(13, "Permission denied", os.fspath(place))
                return act(place, *arguments, **options)

            return attempt

        monkeypatch.setattr(os, "scandir", guarded(os.scandir))
        monkeypatch.setattr(Path, "read_bytes", guarded(Path.read_bytes))

    return forbid


class Peak:
    """with Peak() as peak: the most bytes that Python held at once inside, beyond those before, is peak.bytes."""

    def __enter__(self) -> Peak:
        gc.collect()
        tracemalloc.start()
        return self

    def __exit__(self, *error) -> None:
        self.bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header says this size, with next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# --- archives ---


@pytest.mark.slow
def test_zip_bomb_declared_size_is_refused(tmp_path, save, monkeypatch):
    monkeypatch.setattr("factorkit.data.sources.MAX_ENCODED_BYTES", 2**20)
    save(tmp_path / "good.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(2**25))
        archive.write(tmp_path / "good.png", "good.png")
    said = r"bomb.png \(too large: 32 MiB"
    with Peak() as peak, pytest.warns(UserWarning, match=said):
        prepared = prepare(tmp_path / "x.zip", 4, progress=False)
    assert prepared.names == ["good.png"] and peak.bytes < 2**22


@pytest.mark.slow
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bomb_wrong_declared_size_uses_little_memory(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("bomb.png", bytes(2**27))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 1000)  # the size that the central directory says
    (tmp_path / "x.zip").write_bytes(data)
    source = open_source(tmp_path / "x.zip")
    with Peak() as peak, pytest.raises(ImageDecodeError, match="bomb.png: "):
        source.read(0)
    assert peak.bytes < 2**20


def test_zip_damaged_directory_raises(tmp_path):
    """Its end says that it is a zip, and whoever believes that gets to the directory."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("images/a.png", b"a")
        archive.writestr("masks/a.png", b"a")
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(b"PK\x01\x02", b"PK\x01\x03"))
    assert zipfile.is_zipfile(tmp_path / "x.zip")
    with pytest.raises(DataError, match="not a readable .zip"):
        open_dataset(tmp_path / "x.zip")


def test_zip_member_outside_is_not_written(tmp_path, save, own_cache):
    save(tmp_path / "in/good.png")
    climbing = ("../../evil.png", "/tmp/evil.png", "..\\..\\evil.png", "a/../../evil.png", "C:\\evil.png")
    with zipfile.ZipFile(tmp_path / "in/x.zip", "w") as archive:
        for name in climbing:
            archive.writestr(name, (tmp_path / "in/good.png").read_bytes())
    before = {path for path in tmp_path.rglob("*")}
    prepared = prepare(tmp_path / "in/x.zip", 4, progress=False)
    assert sorted(prepared.names) == ["a/evil.png", "evil.png", "evil.png", "evil.png", "tmp/evil.png"]
    assert {path for path in tmp_path.rglob("*")} == before and not list(own_cache.rglob("*evil*"))


def test_zip_equal_member_names_are_two_images(tmp_path, save):
    for i, colour in enumerate(((255, 0, 0), (0, 255, 0))):
        save(tmp_path / f"{i}.png", colour)
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        warnings.simplefilter("ignore")
        for i in range(2):
            archive.write(tmp_path / f"{i}.png", "images/a.png")
    prepared = prepare(tmp_path / "x.zip", 4, progress=False)
    assert prepared.images[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0]]
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        warnings.simplefilter("ignore")
        archive.write(tmp_path / "0.png", "masks/a.png")
    with pytest.raises(DataError, match="a.png and .*a.png: two images of one name"):
        open_dataset(tmp_path / "x.zip")


def test_array_file_larger_than_memory_raises(tmp_path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1000, 1000, 3), }"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", npy)
    (tmp_path / "x.npy").write_bytes(npy)
    for name in ("x.npz", "x.npy"):
        with pytest.raises(DataError, match=name):
            open_source(tmp_path / name)


# --- images ---


def test_prepare_one_pixel_image(tmp_path, save):
    save(tmp_path / "a.png", (9, 8, 7), (1, 1))
    np.testing.assert_array_equal(prepare(tmp_path, 8, progress=False).images[0], np.full((8, 8, 3), (9, 8, 7)))


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (30_000, 40)])
def test_prepare_very_long_image(tmp_path, save, size):
    save(tmp_path / "a.png", (9, 8, 7), size)
    np.testing.assert_array_equal(prepare(tmp_path, 4, progress=False).images[0], np.full((4, 4, 3), (9, 8, 7)))


def test_prepare_too_many_pixels_is_not_decoded(tmp_path, save):
    save(tmp_path / "good.png")
    (tmp_path / "huge.png").write_bytes(png_claiming(30_000, 30_000))
    with Peak() as peak, pytest.warns(UserWarning, match="could not be decoded") as caught:
        prepared = prepare(tmp_path, 4, progress=False)
    assert len(caught) == 1 and "huge.png (too many pixels" in str(caught[0].message)
    assert prepared.names == ["good.png"] and prepared.source_rows.tolist() == [0] and peak.bytes < 2**22


def test_prepare_large_image_does_not_warn(tmp_path):
    (tmp_path / "large.png").write_bytes(png_claiming(11_000, 10_000))  # above the limit at which Pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_source(tmp_path).decode(0).size == (11_000, 10_000)


def test_prepare_large_images_are_decoded_one_at_a_time(tmp_path, save, monkeypatch):
    import factorkit.data.depth as depth
    import factorkit.data.sources as base

    for i in range(6):
        save(tmp_path / f"{i}.png", size=(40, 40))
    monkeypatch.setattr(depth, "SERIAL_DECODE_PIXELS", 100)
    held, to_rgb = [], base.to_rgb

    def record_call(image, **options):
        held.append(depth._serial_decode_lock.locked())
        return to_rgb(image, **options)

    monkeypatch.setattr(base, "to_rgb", record_call)
    prepare(tmp_path, 4, workers=4, progress=False)
    assert held == [True] * 6


def test_prepare_oversized_file_is_not_read(tmp_path, save):
    save(tmp_path / "good.png")
    with open(tmp_path / "film.png", "wb") as file:
        file.truncate(2**40)  # no disk holds it: a sparse file
    with Peak() as peak, pytest.warns(UserWarning, match=r"film.png \(too large: 1048576 MiB"):
        assert prepare(tmp_path, 4, progress=False).names == ["good.png"]
    assert peak.bytes < 2**22


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 500])
def test_prepare_truncated_image_is_skipped(tmp_path, save, break_jpeg, keep):
    save(tmp_path / "good.png")
    path = break_jpeg(tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=r"1 of 2 images could not be decoded and was skipped: cut.jpg \("):
        prepared = prepare(tmp_path, 4, progress=False)
    assert prepared.names == ["good.png"] and prepared.source_rows.tolist() == [1]


# --- folders ---


def test_open_source_broken_links_are_skipped_with_warning(tmp_path, save):
    save(tmp_path / "photos/deep/a.png")
    for link, target in (("loop.png", "loop.png"), ("gone.png", "nowhere.png"), ("deep/up", "..")):
        (tmp_path / "photos" / link).symlink_to(target)
    with pytest.warns(UserWarning, match="skipped 2 links to missing images: gone.png, loop.png"):
        source = open_source(tmp_path / "photos")
    assert source.names == ["deep/a.png"]
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(DataError, match="self: no such file or folder"):
        open_source(tmp_path / "self")


def test_open_source_unreadable_folder_raises(tmp_path, save, refuse):
    save(tmp_path / "photos/a.png")
    save(tmp_path / "photos/private/b.png")
    refuse(tmp_path / "photos/private")
    with pytest.raises(DataError, match="private: Permission denied, so its images cannot be listed"):
        open_source(tmp_path / "photos")


def test_prepare_unreadable_file_raises(tmp_path, save, refuse, own_cache):
    for name in "abc":
        save(tmp_path / f"photos/{name}.png")
    refuse(tmp_path / "photos/b.png")
    with pytest.raises(
        DataError, match="b.png: cannot be read: Permission denied. Check the file and its permissions."
    ):
        prepare(tmp_path / "photos", 4, progress=False)
    assert not list((own_cache / "prepared").iterdir())


@pytest.mark.parametrize("odd", ["two\nlines", "tab\tbell\a", "\x1b[31mred", "caf\udce9", "‮gnp"])
def test_messages_escape_unusual_names(tmp_path, save, break_jpeg, odd):
    try:
        save(tmp_path / f"photos/{odd}.png", (9, 8, 7))
    except (OSError, UnicodeError):
        pytest.skip("this disk refuses such a name")
    break_jpeg(tmp_path / f"photos/{odd}.jpg")
    with pytest.warns(UserWarning, match="could not be decoded") as caught:
        prepared = prepare(tmp_path / "photos", 4, progress=False)
    message = str(caught[0].message)
    assert message.isprintable() and message.count(".jpg") == 1, "the name is said once, on one line"
    assert prepared.names == [f"{odd}.png"] and prepared.skipped[0][0] == f"{odd}.jpg"
    with pytest.warns(UserWarning, match="could not be decoded"):
        again = prepare(tmp_path / "photos", 4, progress=False)
    assert again.names == prepared.names and again.skipped == prepared.skipped and again.path == prepared.path


def test_masks_with_unusual_names_match(tmp_path, save):
    for kind, mode, colour in (("images", "RGB", (9, 8, 7)), ("masks", "L", 1)):
        for name in ("two\nlines.png", "plain.png"):
            save(tmp_path / f"{kind}/{name}", colour, mode=mode)
    dataset = open_dataset(tmp_path, holdout="none")
    assert load_labelled(dataset.test_images, dataset.test_masks, 4).foreground.all()
    save(tmp_path / "masks/two\nlines_mask.png", 1, mode="L")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path)
    assert str(caught.value).isprintable() and "two masks of one image" in str(caught.value)


def test_masks_with_any_labels_are_read(tmp_path, save):
    """Of a folder of one's own every label above 0 is foreground, but one that is no label is refused."""
    save(tmp_path / "images/a.png", size=(4, 4))
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(_make_folder(tmp_path / "masks/a.png"))
    dataset = open_dataset(tmp_path, holdout="none")
    labelled = load_labelled(dataset.test_images, dataset.test_masks, 4)
    assert labelled.foreground.all() and (labelled.labels == 40_000).all()
    save(tmp_path / "masks/a.png", (1, 2, 3), (4, 4))
    with pytest.raises(DataError, match="a mask in colour"):
        load_labelled(dataset.test_images, dataset.test_masks, 4)


def _make_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
