from __future__ import annotations

import numpy as np
import pytest

from factorkit.data import load_labelled, open_dataset
from factorkit.data.layouts.cub200 import choose_split as draw_split
from factorkit.utils.errors import DataError

BIRDS = [
    ("001.Black_footed_Albatross", "Black_Footed_Albatross_0046_18"),
    ("001.Black_footed_Albatross", "B_0009_34"),
    ("002.Laysan_Albatross", "L_0001_55"),
    ("002.Laysan_Albatross", "L_0002_1027"),
]


@pytest.fixture
def cub(tmp_path, draw, photo, text):
    """Four birds of two classes; the masks' grey is the share of five annotators: columns of 0, 2, 3 and 5."""
    root = tmp_path / "CUB_200_2011"
    for i, (folder, bird) in enumerate(BIRDS):
        photo(root / f"images/{folder}/{bird}.jpg", 50 * i)
        mask = np.repeat([[0, 102, 153, 255]], 12, 0).repeat(4, 1)
        draw(root / f"segmentations/{folder}/{bird}.png", mask)
    text(root / "images.txt", *(f"{i} {folder}/{bird}.jpg" for i, (folder, bird) in enumerate(BIRDS, 1)))
    text(root / "image_class_labels.txt", "1 1", "2 1", "3 2", "4 2")
    text(root / "classes.txt", "1 001.Black_footed_Albatross", "2 002.Laysan_Albatross")
    return root


def test_splits_with_split_file_match_it(cub, text):
    text(cub / "train_val_test_split.txt", "1 2", "2 0", "3 1", "4 0")
    dataset = open_dataset(cub)
    assert dataset.layout == "cub-200-2011" and dataset.notes == ("the split is read from train_val_test_split.txt",)
    assert dataset.train.names == ["001.Black_footed_Albatross/B_0009_34.jpg", "002.Laysan_Albatross/L_0002_1027.jpg"]
    assert dataset.labels.tolist() == [0, 1] and dataset.class_names[1] == "002.Laysan_Albatross"
    assert dataset.test_images.names == ["001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"]
    assert dataset.splits["val"].images.names == ["002.Laysan_Albatross/L_0001_55.jpg"]


def test_masks_foreground_is_above_half_of_annotators(cub, text):
    text(cub / "train_val_test_split.txt", "1 2", "2 0", "3 1", "4 0")
    dataset = open_dataset(cub.parent)  # the folder above is taken too
    foreground = load_labelled(dataset.test_images, dataset.test_masks, 12).foreground[0]
    np.testing.assert_array_equal(foreground, np.repeat([[False] * 6 + [True] * 6], 12, 0))


def test_masks_one_folder_up_are_read(cub):
    (cub / "segmentations").rename(cub.parent / "segmentations")
    assert len(open_dataset(cub, holdout=1).test_masks) == 1


def test_choose_split_full_set_has_published_sizes():
    names = [f"{i:03d}.Bird/bird_{i:05d}.jpg" for i in range(11788)]
    parts = draw_split(names)
    assert np.bincount(parts).tolist() == [10000, 788, 1000]
    turned = draw_split(names[::-1])[::-1]
    np.testing.assert_array_equal(parts, turned, "the draw depends on names alone")
    assert len(set(np.flatnonzero(parts == 2) % 7)) == 7, "not simply the first"


def test_splits_without_split_file_are_chosen_and_noted(cub):
    dataset = open_dataset(cub, holdout="none")
    assert "chosen by a hash" in dataset.notes[0]
    assert sum(len(split.images) for split in dataset.splits.values()) == 4


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("images.txt", "5 nowhere.jpg", "1 of 5 images of images.txt missing, the first is nowhere.jpg"),
        ("images.txt", "5", "line 5: expected 2 words"),
        ("image_class_labels.txt", "1 3", "a class is missing from classes.txt"),
        ("image_class_labels.txt", "1 bird", "expected one number for each image"),
        ("train_val_test_split.txt", "1 0", "expected one number for each image"),
    ],
)
def test_read_damaged_table_raises(cub, file, line, message):
    with open(cub / file, "a") as listed:
        listed.write(f"{line}\n")
    with pytest.raises(DataError, match=message):
        open_dataset(cub)
