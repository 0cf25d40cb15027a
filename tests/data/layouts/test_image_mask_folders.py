"""Where masks lie beside images: the customary layouts are told apart, others are refused."""

from __future__ import annotations

import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image

from factorkit.data import load_labelled, open_dataset
from factorkit.utils.errors import DataError

LAYOUTS = {
    "images and masks": ("images/{}.jpg", "masks/{}.png"),
    "imgs and masks": ("imgs/{}.jpg", "masks/{}.png"),
    "capital letters": ("Images/{}.jpg", "Masks/{}.png"),
    "singular": ("image/{}.jpg", "mask/{}.png"),
    "mmsegmentation": ("img_dir/train/{}.jpg", "ann_dir/train/{}.png"),
    "one split": ("train/images/{}.jpg", "train/masks/{}.png"),
    "one level down": ("photos/images/{}.jpg", "photos/masks/{}.png"),
    "two levels down": ("a/b/imgs/{}.jpg", "a/b/gt/{}.png"),
    "mask ending": ("{}.jpg", "{}_mask.png"),
    "seg ending in folders": ("a/{}.jpg", "a/{}_seg.png"),
    "gt ending": ("{}.jpg", "{}_gt.png"),
    "segmentation ending": ("{}.jpg", "{}_segmentation.png"),
    "mask beginning": ("images/{}.jpg", "images/mask_{}.png"),
    "whole name": ("images/{}.jpg", "masks/{}.jpg.png"),
    "masks in a folder of their own below": ("images/{}.jpg", "annotations/trimaps/{}.png"),
    "images in a folder of their own below": ("images/all/part/{}.jpg", "masks/{}.png"),
    "masks below images": ("{}.jpg", "masks/{}.png"),
    "masks beside another folder": ("holiday/{}.jpg", "masks/{}.png"),
}


def write(root, image_name, mask_name, count=5, start=0):
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        mask = np.zeros((12, 12), np.uint8)
        mask[: 2 + i] = 255
        for name, array in ((image_name, pixels), (mask_name, mask)):
            path = root / name.format(f"x{i}")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def write_zip(folder, path, separator="/"):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                info = zipfile.ZipInfo("x")
                info.filename = str(file.relative_to(folder)).replace("/", separator)
                archive.writestr(info, file.read_bytes())
    return path


@pytest.mark.parametrize("form", ["folder", "zip", "zip of windows"])
@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_open_dataset_customary_layout_separates_masks(tmp_path, names, form):
    data = tmp_path / "data"
    write(data, *names)
    (data / "__MACOSX").mkdir()
    Image.new("RGB", (4, 4)).save(data / "__MACOSX" / "junk.png")
    if form != "folder":
        data = write_zip(data, tmp_path / "data.zip", "/" if form == "zip" else "\\")
    dataset = open_dataset(data, holdout="none")
    assert len(dataset.train) == len(dataset.test_masks) == 5
    assert all(name.endswith(".jpg") for name in dataset.train.names)
    labelled = load_labelled(dataset.test_images, dataset.test_masks, 12)
    for i, name in enumerate(labelled.names):
        rows = 2 + int(name.rpartition("x")[2].removesuffix(".jpg"))
        assert labelled.foreground[i].sum() == 12 * rows  # its own mask, not another image's


def test_open_dataset_splits_are_those_of_the_folders(tmp_path):
    write(tmp_path, "train/images/{}.jpg", "train/masks/{}.png", 4)
    write(tmp_path, "val/images/{}.jpg", "val/masks/{}.png", 2, start=4)
    dataset = open_dataset(tmp_path)
    assert len(dataset.train) == 4 and len(dataset.test_images) == 2
    assert dataset.test_images.names == ["val/x4.jpg", "val/x5.jpg"]


def test_open_dataset_unknown_folders_that_look_like_masks_are_refused(tmp_path):
    write(tmp_path, "left/{}.jpg", "right/{}.png")
    with pytest.raises(DataError, match="in right/.* look like masks of those in left/.*--images"):
        open_dataset(tmp_path)


def test_open_dataset_two_folders_of_photos_with_equal_names_are_images(tmp_path):
    write(tmp_path, "left/{}.jpg", "unused/{}.png")
    write(tmp_path, "right/{}.jpg", "unused/{}.png")
    for mask in (tmp_path / "unused").iterdir():
        mask.unlink()
    assert len(open_dataset(tmp_path).train) == 10


def test_open_dataset_images_outside_the_folders_are_named(tmp_path):
    write(tmp_path, "images/{}.jpg", "masks/{}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "cover.jpg")
    with pytest.warns(UserWarning, match=r"5 images with 5 masks used; left out 1 image outside .*: cover.jpg$"):
        assert len(open_dataset(tmp_path, holdout="none").train) == 5


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_open_dataset_masks_of_moving_parts_are_no_foreground(tmp_path, form):
    data = tmp_path / "data"
    write(data, "images/{}.jpg", "images/dynamic_mask_{}.png")
    data = write_zip(data, tmp_path / "data.zip") if form == "zip" else data
    with pytest.warns(
        UserWarning, match=r"left out 5 masks of moving parts \(.*dynamic_mask_x0.png, .*not the foreground"
    ):
        dataset = open_dataset(data)
    assert len(dataset.train) == 5 and dataset.test_images is None


def test_open_dataset_masks_of_moving_parts_leave_those_of_objects(tmp_path):
    write(tmp_path, "{}.jpg", "{}_mask.png")
    write(tmp_path, "{}.jpg", "dynamic_mask_{}.png")
    with pytest.warns(UserWarning, match="5 masks of moving parts"):
        dataset = open_dataset(tmp_path, holdout="none")
    assert len(dataset.train) == 5 and set(dataset.test_masks.names) == {f"x{i}_mask.png" for i in range(5)}


def test_load_labelled_masks_of_moving_parts_are_refused_or_left_out(tmp_path):
    write(tmp_path, "i/{}.jpg", "m/dynamic_mask_{}.png")
    with pytest.raises(DataError, match=r"5 masks of moving parts \(dynamic_mask_x0.png, .*pixels to be ignored"):
        load_labelled(tmp_path / "i", tmp_path / "m", 8)
    write(tmp_path, "i/{}.jpg", "m/{}.png")
    with pytest.warns(UserWarning, match="left out 5 masks of moving parts"):
        assert len(load_labelled(tmp_path / "i", tmp_path / "m", 8)) == 5


def test_match_masks_ignores_case_and_unicode_form(tmp_path):
    write(tmp_path, "images/{}.jpg", "masks/{}.png", 1)
    (tmp_path / "images" / "x0.jpg").rename(tmp_path / "images" / (unicodedata.normalize("NFC", "été") + ".JPG"))
    (tmp_path / "masks" / "x0.png").rename(tmp_path / "masks" / (unicodedata.normalize("NFD", "Été") + ".png"))
    assert len(load_labelled(tmp_path / "images", tmp_path / "masks", 8)) == 1


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a/{}.jpg", "b/{}.png"),
        ("a/{}.jpg", "b/{}_segmentation.png"),
        ("{}.jpg", "{}.png"),
        ("{}.jpg", "{}_xyz.png"),
        ("images/{}.jpg", "foo/xyz_{}.png"),
        ("leftImg8bit/train/a/{}_leftImg8bit.png", "gtFine/train/a/{}_gtFine_labelIds.png"),
        ("set/{}/image.png", "set/{}/label.png"),
        ("d/img_{}.png", "d/mask_{}.png"),
        ("d/{}_sat.jpg", "d/{}_mask.png"),
        ("d/{}.jpg", "d/{}MASK.png"),
        ("图像/{}.jpg", "掩码/{}.png"),
    ],
)
def test_unknown_places_of_masks_are_refused(tmp_path, image, mask):
    write(tmp_path / "data", image, mask)
    with pytest.raises(DataError, match=r"look like masks of those in .*--images and --masks"):
        open_dataset(tmp_path / "data")


def test_unknown_masks_of_few_colours_are_refused(tmp_path):
    write(tmp_path, "{}.jpg", "unused/{}.png", 2)
    for i in range(2):
        mask = Image.open(tmp_path / f"unused/x{i}.png").convert("L").point(lambda value: value // 2)
        Image.merge("RGB", (mask, mask.point(lambda value: 255 - value), mask)).save(tmp_path / f"x{i}_colour.png")
        (tmp_path / f"unused/x{i}.png").unlink()
    with pytest.raises(DataError, match="2 images in ./, such as x0_colour.png, look like masks"):
        open_dataset(tmp_path)


def test_grey_photos_of_equal_names_are_no_masks(tmp_path):
    for folder in ("monday", "tuesday"):
        for i in range(4):
            path = tmp_path / f"{folder}/{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 20), dtype=np.uint8)).save(path)
    assert len(open_dataset(tmp_path).train) == 8
