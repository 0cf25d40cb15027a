from __future__ import annotations

import numpy as np
import pytest

from factorkit.data import load_labelled, open_dataset, prepare
from factorkit.utils.errors import ConfigError, DataError

savemat = pytest.importorskip("scipy.io").savemat
TRNID, VALID, TSTID = [6, 1], [2], [5, 3, 4, 7]


@pytest.fixture
def flowers(tmp_path, draw, photo):
    """Seven flowers: number n is grey 20 n and of class 10 n, red on painted blue in its upper half."""
    root = tmp_path / "102flowers"
    for n in range(1, 8):
        photo(root / f"jpg/image_{n:05d}.jpg", 20 * n)
        pixels = np.full((12, 16, 3), (0, 0, 254))
        pixels[:6] = (200, 40, 10 * n)
        draw(root / f"segmim/segmim_{n:05d}.jpg", pixels, quality=95)
    savemat(root / "setid.mat", {"trnid": [TRNID], "valid": [VALID], "tstid": [TSTID]})
    savemat(root / "imagelabels.mat", {"labels": [[10 * n for n in range(1, 8)]]})
    return root


def test_splits_default_train_on_test_ids(flowers):
    dataset = open_dataset(flowers)
    assert dataset.layout == "flowers-102" and dataset.name == "102flowers"
    assert dataset.train.names == [f"image_{n:05d}.jpg" for n in (3, 4, 5, 7)]
    assert dataset.test_images.names == ["image_00001.jpg", "image_00006.jpg"]
    assert dataset.labels.tolist() == [29, 39, 49, 69] and dataset.labels.dtype == np.int64
    assert len(dataset.class_names) == 102
    assert {name: split.images.names for name, split in dataset.splits.items()} == {
        "train": dataset.train.names,
        "val": ["image_00002.jpg"],
        "test": dataset.test_images.names,
    }
    assert dataset.splits["val"].labels.tolist() == [19]


def test_holdout_other_split_keeps_training_split(flowers):
    dataset = open_dataset(flowers, holdout="val")
    assert dataset.test_images.names == ["image_00002.jpg"] and len(dataset.train) == 4
    assert len(open_dataset(flowers, holdout="none").train) == 7
    with pytest.raises(ConfigError, match=r"a split \(train, val, test\)"):
        open_dataset(flowers, holdout="testing")
    with pytest.raises(DataError, match="no training images are left"):
        open_dataset(flowers, holdout="train")


def test_segmim_masks_foreground_is_not_blue(flowers, grey):
    dataset = open_dataset(flowers)
    labelled = load_labelled(dataset.test_images, dataset.test_masks, 12)
    assert labelled.foreground[:, :5].all() and not labelled.foreground[:, 7:].any()
    assert grey(dataset.test_images) == [20, 120], "masks go with their own images"
    assert prepare(dataset.train, 8, progress=False).images[:, 0, 0, 0].tolist() == [60, 80, 100, 140]


def test_redo_masks_missing_channel_is_background(flowers, draw):
    draw(flowers / "segmim/segmim_00001.jpg", np.full((12, 16, 3), (200, 0, 0)), quality=100)
    for mask_set, share in (("segmim", 1), ("redo", 0)):
        dataset = open_dataset(flowers, mask_set=mask_set)
        foreground = load_labelled(dataset.test_images, dataset.test_masks, 12).foreground[0]
        assert foreground.mean() == share
    with pytest.raises(ConfigError, match="segmim, redo"):
        open_dataset(flowers, mask_set="blue")


def test_read_without_optional_files_has_no_masks_or_classes(flowers):
    for path in (flowers / "segmim").iterdir():
        path.unlink()
    (flowers / "segmim").rmdir()
    (flowers / "imagelabels.mat").unlink()
    dataset = open_dataset(flowers)
    assert len(dataset.train) == 4 and dataset.test_images is None and dataset.labels is None


def test_read_damaged_files_raise(flowers):
    (flowers / "jpg/image_00003.jpg").unlink()
    with pytest.raises(DataError, match="1 of 7 images of setid.mat missing, the first is image_00003.jpg"):
        open_dataset(flowers)
    savemat(flowers / "setid.mat", {"trnid": [TRNID], "valid": [[1]], "tstid": [TSTID]})
    with pytest.raises(DataError, match="in two splits"):
        open_dataset(flowers)
    savemat(flowers / "setid.mat", {"trnid": [TRNID]})
    with pytest.raises(DataError, match="setid.mat: no variable 'tstid'"):
        open_dataset(flowers)
    (flowers / "setid.mat").write_bytes(b"not a matlab file")
    with pytest.raises(DataError, match="setid.mat: not a readable MATLAB file"):
        open_dataset(flowers)
