from __future__ import annotations

import numpy as np
import pytest

from factorkit.data import load_labelled, open_dataset
from factorkit.utils.errors import DataError

TENCH, GOLDFISH, OSTRICH = "n01440764", "n01443537", "n01518878"


@pytest.fixture
def imagenet(tmp_path, photo):
    """Three classes of 3 training images, and 3 validation images in one folder."""
    root = tmp_path / "ILSVRC2012"
    for c, wnid in enumerate((TENCH, GOLDFISH, OSTRICH)):
        for i in range(3):
            photo(root / f"train/{wnid}/{wnid}_{i}.JPEG", 50 * c + i)
    for i in (1, 2, 3):
        photo(root / f"val/ILSVRC2012_val_{i:08d}.JPEG", 200 + i)
    return root


def test_imagenet_classes_follow_folder_order(imagenet):
    dataset = open_dataset(imagenet)
    assert dataset.layout == "imagenet" and dataset.class_names == [TENCH, GOLDFISH, OSTRICH]
    assert dataset.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 and dataset.labels.dtype == np.int64
    assert dataset.train.names[3] == f"train/{GOLDFISH}/{GOLDFISH}_0.JPEG"
    assert dataset.test_images is None
    assert dataset.splits["val"].labels.tolist() == [-1] * 3 and "val/ has no classes" in dataset.notes[0]


def test_imagenet_devkit_gives_validation_classes(imagenet, text):
    savemat = pytest.importorskip("scipy.io").savemat
    kit = imagenet / "ILSVRC2012_devkit_t12/data"
    text(kit / "ILSVRC2012_validation_ground_truth.txt", "2", "1", "9")
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(1, OSTRICH, "ostrich"), (2, TENCH, "tench"), (9, "n00000009", "a kind of animal")], kinds)
    savemat(kit / "meta.mat", {"synsets": synsets})
    dataset = open_dataset(imagenet)
    assert dataset.splits["val"].labels.tolist() == [0, 2, -1] and not dataset.notes
    text(kit / "ILSVRC2012_validation_ground_truth.txt", "2")
    with pytest.raises(DataError, match="1 classes for 3 images"):
        open_dataset(imagenet)


def test_imagenet_kaggle_csv_gives_validation_classes(imagenet, tmp_path, text):
    (tmp_path / "k/ILSVRC/Data").mkdir(parents=True)
    imagenet.rename(tmp_path / "k/ILSVRC/Data/CLS-LOC")
    rows = [f"ILSVRC2012_val_{i:08d},{wnid} 111 1 2 3 " for i, wnid in ((2, GOLDFISH), (1, OSTRICH), (3, TENCH))]
    text(tmp_path / "k/LOC_val_solution.csv", "ImageId,PredictionString", *rows)
    text(tmp_path / "k/LOC_synset_mapping.txt", f"{TENCH} tench, Tinca tinca", f"{OSTRICH} ostrich, Struthio camelus")
    dataset = open_dataset(tmp_path / "k")
    assert dataset.splits["val"].labels.tolist() == [2, 1, 0]
    assert dataset.class_names == [f"{TENCH} tench", GOLDFISH, f"{OSTRICH} ostrich"]


def test_imagenet_validation_folders_give_classes(imagenet, photo):
    for path in (imagenet / "val").iterdir():
        path.unlink()
    photo(imagenet / f"val/{OSTRICH}/ILSVRC2012_val_00000007.JPEG", 9)
    assert open_dataset(imagenet).splits["val"].labels.tolist() == [2]


def test_pixel_imagenet_test_split_is_limited_per_class(imagenet, draw, monkeypatch):
    monkeypatch.setattr("factorkit.data.layouts.imagenet.MAX_TEST_PER_CLASS", 2)
    values = np.zeros((12, 16))
    values[:6, :8], values[:6, 8:] = 1, 2
    for wnid, count in ((TENCH, 3), (OSTRICH, 1)):
        for i in range(count):
            draw(imagenet.parent / f"pixel-imagenet-v2/{wnid}/{wnid}_{i}.png", values)
    dataset = open_dataset(imagenet)
    result = sorted(name.split("/")[1] for name in dataset.test_images.names)
    assert result == [TENCH, TENCH, OSTRICH]
    assert not set(dataset.train.names) & set(dataset.test_images.names) and len(dataset.train) == 6
    assert sorted(dataset.labels.tolist()) == [0, 1, 1, 1, 2, 2]
    labels = load_labelled(dataset.test_images, dataset.test_masks, 12).labels
    assert (labels[:, 6:] == 0).all() and set(np.unique(labels[:, :6])) == {1, 2}


def test_pixel_imagenet_unrelated_masks_raise(imagenet, draw):
    draw(imagenet / f"pixel-imagenet/{TENCH}/{TENCH}_77.png", np.ones((4, 4)))
    with pytest.raises(DataError, match="none of its 1 mask has an image"):
        open_dataset(imagenet)
