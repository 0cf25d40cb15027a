from __future__ import annotations

import numpy as np
import pytest

from factorkit.data import load_labelled, open_dataset
from factorkit.data.layouts.celebamask import PARTS
from factorkit.utils.errors import DataError


@pytest.fixture
def celeba(tmp_path, draw, photo, text):
    """Faces 0, 1, 1999 and 2000: skin everywhere but the right quarter, hair above, a hat on 2000, a nose on 0."""
    root = tmp_path / "CelebAMask-HQ"
    column = np.arange(8)[None].repeat(8, 0)
    row = column.T
    for number in (0, 1, 1999, 2000):
        photo(root / f"CelebA-HQ-img/{number}.jpg", number % 256, (16, 16))
        parts = {"skin": column < 6, "hair": row < 2}
        parts |= {"nose": (row == 5) & (column == 3)} if number == 0 else {}
        parts |= {"hat": row < 1} if number == 2000 else {}
        for part, current in parts.items():
            pixels = 255 * current[..., None].repeat(3, -1)
            draw(root / f"CelebAMask-HQ-mask-anno/{number // 2000}/{number:05d}_{part}.png", pixels)
    mapping = ["idx orig_idx orig_file"]
    origin = {0: 119613, 1: 162771, 1999: 182637, 2000: 182638}
    mapping += [f"{i:10d} {origin.get(i, 5)} {origin.get(i, 5) + 1:06d}.jpg" for i in range(2001)]
    text(root / "CelebA-HQ-to-CelebA-mapping.txt", *mapping)
    return root


def test_splits_mapping_file_follow_celeba_numbers(celeba):
    dataset = open_dataset(celeba)
    result = {name: split.images.names for name, split in dataset.splits.items()}
    assert result == {"train": ["0.jpg"], "val": ["1.jpg", "1999.jpg"], "test": ["2000.jpg"]}
    assert dataset.train.names == ["0.jpg"] and dataset.test_images.names == ["2000.jpg"]
    assert dataset.layout == "celebamask-hq" and dataset.labels is None


def test_segments_masks_combine_parts_to_skin_and_hair(celeba):
    split = open_dataset(celeba).splits["test"]
    labels = load_labelled(split.images, split.masks, 8).labels[0]
    assert (labels[0] == 0).all(), "the hat covers the hair, and is background"
    assert (labels[1] == 2).all()
    assert (labels[2:, :6] == 1).all() and (labels[2:, 6:] == 0).all()


def test_parts_masks_are_painted_in_official_order(celeba):
    dataset = open_dataset(celeba, mask_set="parts")
    labelled = load_labelled(dataset.splits["train"].images, dataset.splits["train"].masks, 8)
    nose, skin, hair = (PARTS.index(part) + 1 for part in ("nose", "skin", "hair"))
    assert (skin, nose, hair, len(PARTS)) == (1, 2, 13, 18)
    assert labelled.labels[0, 5, 3] == nose and (labelled.labels[0, 2:, 0] == skin).all()
    assert (labelled.labels[0, :2] == hair).all() and (labelled.labels[0, 2:, 6:] == 0).all()


def test_read_incomplete_files_raise(celeba, text):
    for path in (celeba / "CelebAMask-HQ-mask-anno/1").iterdir():
        path.unlink()
    dataset = open_dataset(celeba)
    with pytest.raises(DataError, match="no masks for face 2000"):
        load_labelled(dataset.test_images, dataset.test_masks, 8)
    text(celeba / "CelebA-HQ-to-CelebA-mapping.txt", "idx orig_idx orig_file", "0 5 000006.jpg")
    with pytest.raises(DataError, match="mapping.txt: expected one line"):
        open_dataset(celeba)
    (celeba / "CelebA-HQ-to-CelebA-mapping.txt").unlink()
    assert "no official splits" in open_dataset(celeba).notes[0]
