from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data import ImageDecodeError, open_source
from factorkit.utils.errors import DataError

GREY = np.arange(2 * 5 * 6, dtype=np.uint8).reshape(2, 5, 6)
COLOUR = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)


def test_open_source_folder_is_searched_and_sorted(tmp_path, save):
    for name in ("b.png", "a/z.JPG", "a/ütö 花.webp", "c.bmp", "a/deep/er.tiff"):
        save(tmp_path / name, size=(7, 9))
    save(tmp_path / ".hidden.png")
    save(tmp_path / ".trash/x.png")
    save(tmp_path / "__MACOSX/x.png")
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(tmp_path)
    assert source.names == ["a/deep/er.tiff", "a/z.JPG", "a/ütö 花.webp", "b.png", "c.bmp"]
    assert len(source) == 5
    assert all(source.read(i).mode == "RGB" and source.read(i).size == (7, 9) for i in range(5))


def test_open_source_link_loop_terminates(tmp_path, save):
    save(tmp_path / "a/x.png")
    (tmp_path / "a/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match="skipped 1 link to missing images: dangling.png"):
        assert open_source(tmp_path).names == ["a/x.png"]


def test_open_source_folder_link_is_followed(tmp_path, save):
    save(tmp_path / "elsewhere/x.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert open_source(tmp_path / "set").names == ["linked/x.png"]
    (tmp_path / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert open_source(tmp_path).names == ["again/x.png"], "one folder under three names is read once, under the first"


def test_open_source_files_and_folders(tmp_path, save):
    a, b = save(tmp_path / "one/a.png"), save(tmp_path / "two/sub/b.png", colour=(1, 2, 3))
    assert open_source(str(a)).names == ["a.png"]
    (tmp_path / "blob").write_bytes(a.read_bytes())
    (tmp_path / "link.png").symlink_to(tmp_path / "blob")  # as Hugging Face's cache has them
    assert open_source(tmp_path / "link.png").names == ["link.png"]
    assert open_source(tmp_path / "link.png").read(0).size == open_source(a).read(0).size
    both = open_source([b, str(a)])
    assert both.names == ["two/sub/b.png", "one/a.png"] and both.read(0).getpixel((0, 0)) == (1, 2, 3)
    assert open_source([a, tmp_path / "two"]).names == ["one/a.png", "two/sub/b.png"]


def test_open_source_zip(tmp_path, save):
    image = save(tmp_path / "x.png", colour=(9, 8, 7))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("photos/ü.png", "photos/b/a.png", "__MACOSX/photos/._a.png", "readme.txt"):
            archive.write(image, name)
    source = open_source(tmp_path / "set.zip")
    assert source.names == ["photos/b/a.png", "photos/ü.png"]
    assert source.read(1).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize(
    "array",
    [
        COLOUR,
        COLOUR.astype(np.int64),
        COLOUR / 255,
        COLOUR.transpose(0, 3, 1, 2),
        torch.from_numpy(COLOUR).permute(0, 3, 1, 2),
        torch.from_numpy(COLOUR / 255).float().requires_grad_(),
        [Image.fromarray(image) for image in COLOUR],
    ],
    ids=["uint8", "int64", "float", "channels first", "tensor", "float tensor", "images"],
)
def test_array_source_accepts_all_shapes(array):
    source = open_source(array)
    assert source.positional and len(source) == len(set(source.names)) == 4
    for i in (0, 3):
        np.testing.assert_array_equal(np.asarray(source.read(i)), COLOUR[i])


@pytest.mark.parametrize("array", [GREY, GREY[..., None], GREY[:, None]], ids=["NHW", "NHW1", "N1HW"])
def test_array_source_grey_shapes(array):
    np.testing.assert_array_equal(np.asarray(open_source(array).read(1))[..., 2], GREY[1])


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_array_source_alpha_is_composited(layout, tmp_path):
    alpha = np.random.default_rng(3).integers(0, 256, (4, 5, 6, 1), np.uint8)
    array = np.concatenate([np.broadcast_to(GREY[0, :5, :6, None], (4, 5, 6, 3)), alpha], -1)
    Image.fromarray(array[2]).save(tmp_path / "x.png")
    stored = open_source(array if layout == "NHWC" else array.transpose(0, 3, 1, 2))
    assert len(stored) == 4
    np.testing.assert_array_equal(np.asarray(stored.read(2)), np.asarray(open_source(tmp_path).read(0)))


def test_array_source_four_pixel_images_have_no_alpha():
    assert open_source(np.zeros((2, 4, 4, 3), np.uint8)).decode(0).mode == "RGB"
    assert open_source(np.zeros((2, 3, 4, 4), np.uint8)).decode(0).mode == "RGB"
    assert len(open_source(np.zeros((2, 4, 4), bool))) == 2


def test_array_source_bool_keeps_values():
    stored = open_source(GREY > 30).decode(1)
    np.testing.assert_array_equal(np.asarray(stored), GREY[1] > 30)


def test_open_source_array_files(tmp_path):
    np.save(tmp_path / "a.npy", COLOUR)
    np.savez(tmp_path / "b.npz", images=COLOUR, other=GREY)
    np.savez(tmp_path / "c.npz", X=COLOUR, y=np.arange(4))
    np.savez(tmp_path / "d.npz", whatever=COLOUR)
    for name in ("a.npy", "b.npz", "c.npz", "d.npz"):
        np.testing.assert_array_equal(np.asarray(open_source(tmp_path / name).read(2)), COLOUR[2])
    assert isinstance(open_source(tmp_path / "a.npy").array, np.memmap)
    np.savez(tmp_path / "e.npz", p=COLOUR, q=COLOUR)
    with pytest.raises(DataError, match=r"no array named images or X \(available: p, q\)"):
        open_source(tmp_path / "e.npz")


def test_open_source_pickles_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    evil = np.array([Trap()], object)
    np.save(tmp_path / "evil.npy", evil, allow_pickle=True)
    np.savez(tmp_path / "evil.npz", images=evil)
    for name in ("evil.npy", "evil.npz"):
        with pytest.raises(DataError, match=name):
            open_source(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 8, 3), np.uint8), "channels first or last"),
        (np.zeros((8, 8, 3), np.uint8), "one image"),
        (np.zeros((8, 8, 4), np.uint8), "one image"),
        (np.zeros((8, 8, 2), np.uint8), "one image"),
        (np.zeros((2, 4, 8, 4), np.uint8), "channels first or last"),
        (np.zeros((2, 8, 8, 2), np.uint8), "channels"),
        (np.zeros((8, 8), np.uint8), "not a set of images"),
        (np.zeros((0, 8, 8), np.uint8), "not a set of images"),
        (np.full((1, 8, 8), -1.0), "values from -1.0"),
        (np.full((1, 8, 8), np.nan), "values from nan"),
        (np.full((1, 8, 8), 256), "values from 256.*If they are masks"),
        (np.full((1, 8, 8), -1), "values from -1 .*as ignore_label="),
        (np.full((1, 8, 8, 3), 256), "Rescale them.$"),
        (np.zeros((1, 8, 8), complex), "complex128"),
        (np.zeros((1, 8, 8, 3), bool), "bool"),
    ],
)
def test_array_source_invalid_array_raises(array, message):
    with pytest.raises(DataError, match=message):
        open_source(array)


def test_open_source_missing_empty_or_unsupported_raises(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").write_text("")
    with pytest.raises(DataError, match=r"no images in this folder.*\.jpg"):
        open_source(tmp_path / "empty")
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"film.mp4: left out .*extract the frames of videos"):
        open_source(tmp_path / "film.mp4")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(DataError, match=r"no images in this \.zip"):
        open_source(tmp_path / "empty.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match=r"not a readable \.zip"):
        open_source(tmp_path / "broken.zip")
    with pytest.raises(DataError, match="an empty list"):
        open_source([])
    with pytest.raises(DataError, match="from int"):
        open_source(7)


def test_read_broken_image_is_named(tmp_path, break_jpeg):
    break_jpeg(tmp_path / "cut.jpg")
    (tmp_path / "text.png").write_text("not an image")
    source = open_source(tmp_path)
    with pytest.raises(ImageDecodeError, match="^cut.jpg: cannot be decoded: .*truncated"):
        source.read(0)
    with pytest.raises(ImageDecodeError, match="^text.png: not an image"):
        source.read(1)


def test_read_decompression_bomb_raises(tmp_path, save, monkeypatch):
    save(tmp_path / "huge.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="^huge.png: too many pixels"):
        open_source(tmp_path).read(0)


def test_read_unreadable_file_raises_data_error(tmp_path, save):
    path = save(tmp_path / "x.png")
    source = open_source(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="^x.png: cannot be read") as caught:
        source.read(0)
    assert not isinstance(caught.value, ImageDecodeError)


def test_read_at_least_bounds_jpeg_reduction(tmp_path, save):
    save(tmp_path / "large.jpg", size=(800, 600))
    source = open_source(tmp_path)
    assert source.read(0).size == (800, 600)
    assert source.read(0, at_least=100).size == (200, 150)


def test_read_leaves_original_image_unchanged(tmp_path, save):
    mine = Image.open(save(tmp_path / "large.jpg", size=(800, 600)))
    open_source([mine]).read(0, at_least=100)
    assert mine.size == (800, 600)


def test_fingerprint_changes_with_files(tmp_path, save):
    save(tmp_path / "a.png")
    first = open_source(tmp_path).fingerprint()
    assert open_source(tmp_path).fingerprint() == first
    os.utime(tmp_path / "a.png", ns=(1, 1))
    touched = open_source(tmp_path).fingerprint()
    save(tmp_path / "b.png")
    added = open_source(tmp_path)
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    renamed = open_source(tmp_path).fingerprint()
    (tmp_path / "c.png").rename(tmp_path / "b.png")
    assert len({first, touched, added.fingerprint(), renamed}) == 4
    assert added.subset([0]).fingerprint() != added.subset([1]).fingerprint()


def test_fingerprint_of_array_depends_on_values():
    assert open_source(COLOUR).fingerprint() == open_source(COLOUR.copy()).fingerprint()
    changed = COLOUR.copy()
    changed[3, 4, 5, 2] ^= 1
    assert open_source(COLOUR).fingerprint() != open_source(changed).fingerprint()
    assert open_source(COLOUR[:2]).fingerprint() != open_source(COLOUR).fingerprint()


@pytest.mark.parametrize("kind", ["files", "zip", "array", "images"])
def test_subset_selects_names_and_images(kind, tmp_path):
    images = [Image.fromarray(p) for p in COLOUR]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(4):
            archive.write(tmp_path / f"{i}.png", f"{i}.png")
    data = {"files": tmp_path, "zip": tmp_path / "set.zip", "array": COLOUR, "images": images}[kind]
    whole = open_source(data)
    part = whole.subset([3, 1])
    assert part.names == [whole.names[3], whole.names[1]] and part.positional == whole.positional
    np.testing.assert_array_equal(np.asarray(part.read(0)), COLOUR[3])
    assert part.subset([1]).names == [whole.names[1]]
    assert part.fingerprint() != whole.fingerprint()
