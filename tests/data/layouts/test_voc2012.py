from __future__ import annotations

import numpy as np
import pytest

from factorkit.data import load_labelled, open_dataset
from factorkit.utils.errors import DataError

SHEEP, VOID = 17, 255


@pytest.fixture
def voc(tmp_path, draw, photo, text):
    """Two images to train on and two to score: a sheep on the left, void between; only 2007_000004 shows it."""
    root = tmp_path / "VOCdevkit/VOC2012"
    mask = np.repeat([[SHEEP] * 4 + [VOID] * 4 + [0] * 4], 12, 0)
    for i in range(1, 6):  # the fifth belongs to other challenges
        photo(root / f"JPEGImages/2007_00000{i}.jpg", 40 * i, (12, 12))
    for i in range(1, 5):
        values = np.where(mask == SHEEP, 0, mask) if i == 3 else mask
        draw(root / f"SegmentationClass/2007_00000{i}.png", values, palette=True)
        draw(root / f"SegmentationObject/2007_00000{i}.png", np.where(mask == SHEEP, 2, mask), palette=True)
    text(root / "ImageSets/Segmentation/train.txt", "2007_000002", "2007_000001")
    text(root / "ImageSets/Segmentation/val.txt", "2007_000003", "2007_000004")
    text(root / "ImageSets/Main/sheep_val.txt", "2007_000003 -1", "2007_000004  1", "2007_000005  1")
    return root


def test_voc_has_official_splits_and_masks(voc, tmp_path):
    for path in (voc, tmp_path / "VOCdevkit", tmp_path):
        dataset = open_dataset(path)
        assert dataset.layout == "voc-2012"
        assert dataset.train.names == ["2007_000001.jpg", "2007_000002.jpg"]
        assert dataset.test_images.names == ["2007_000003.jpg", "2007_000004.jpg"]
    labelled = load_labelled(dataset.test_images, dataset.test_masks, 12)
    assert (labelled.labels[1, :, :4] == SHEEP).all() and labelled.foreground[1, :, :4].all()
    assert not labelled.valid[:, :, 4:8].any(), "void pixels are not scored by default"
    assert not labelled.foreground[0].any() and labelled.valid[0, :, :4].all()


def test_voc_single_class_masks_are_binary(voc):
    dataset = open_dataset(voc, holdout="val-sheep", mask_set="sheep")
    assert dataset.test_images.names == ["2007_000004.jpg"] and len(dataset.train) == 2
    labelled = load_labelled(dataset.test_images, dataset.test_masks, 12)
    assert (labelled.labels[0, :, :4] == 1).all() and not labelled.valid[0, :, 4:8].any()
    other = open_dataset(voc, mask_set="dog")
    assert not load_labelled(other.test_images, other.test_masks, 12).foreground.any()
    objects = open_dataset(voc, mask_set="object")
    assert (load_labelled(objects.test_images, objects.test_masks, 12).labels[:, :, :4] == 2).all()


def test_voc_unknown_label_raises(voc, draw):
    draw(voc / "SegmentationClass/2007_000003.png", np.full((12, 12), 33), palette=True)
    dataset = open_dataset(voc)
    with pytest.raises(DataError, match=r"2007_000003.png: label 33 is not a label of this data set \(0 to 255\)"):
        load_labelled(dataset.test_images, dataset.test_masks, 12)
