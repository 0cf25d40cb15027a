"""CUB-200-2011 with its segmentations, split into 10000, 788 and 1000 images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from factorkit.data.layouts import base
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

NUM_IMAGES, NUM_VAL, NUM_TEST = 11788, 788, 1000
SPLIT_FILE = "train_val_test_split.txt"  # from ReDO's repository; IEM and later work use the same split
HALF = 127  # of 255: grey values are the fraction of annotators who marked the pixel as bird


def read(root: Path) -> base.DatasetFiles:
    listing = base.read_table(root / "images.txt", columns=2)
    names = [name for _, name in listing]
    base.require_files(root / "images", names, "images of images.txt")
    class_names = [name for _, name in base.read_table(root / "classes.txt", columns=2)]
    labels = _read_numbers(root / "image_class_labels.txt", listing) - 1
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise DataError(f"{root / 'image_class_labels.txt'}: a class is missing from classes.txt. {base.FETCH_AGAIN}")
    masks = {}
    folder = next((f for f in (root / "segmentations", root.parent / "segmentations") if f.is_dir()), None)
    if folder is not None:
        mask_files = FileSource(
            folder, base.filter_existing(folder, [base.replace_suffix(name, ".png") for name in names])
        )
        masks["segmentation"] = base.LabelSource(mask_files, lambda values: base.take_first_channel(values) > HALF)
    if (root / SPLIT_FILE).is_file():
        parts = _read_numbers(root / SPLIT_FILE, listing)
        if not np.isin(parts, (0, 1, 2)).all():
            raise DataError(f"{root / SPLIT_FILE}: expected only 0 (train), 1 (val) and 2 (test). {base.FETCH_AGAIN}")
        note = f"the split is read from {SPLIT_FILE}"
    else:
        parts = choose_split(names)
        note = f"the split is chosen by a hash of the names; for the published one put ReDO's {SPLIT_FILE} here"
    splits = {split: np.flatnonzero(parts == i) for i, split in enumerate(base.SPLITS)}
    return base.DatasetFiles(FileSource(root / "images", names), masks, splits, labels, class_names, notes=(note,))


def choose_split(names: Sequence[str]) -> np.ndarray:
    """Choose a split by the SHA-256 of the names: 0 for train, 1 for val, 2 for test.

    Of 11788 names the first 1000 are test and the next 788 val; of fewer names, the same fractions.
    """
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    num_test, num_val = (round(len(names) * part / NUM_IMAGES) for part in (NUM_TEST, NUM_VAL))
    parts = np.zeros(len(names), np.int64)
    parts[order[:num_test]] = 2
    parts[order[num_test : num_test + num_val]] = 1
    return parts


def _read_numbers(path: Path, listing: list[list[str]]) -> np.ndarray:
    """Read one number per image, in the order of images.txt."""
    try:
        number_of = {key: int(number) for key, number in base.read_table(path, columns=2)}
        return np.array([number_of[key] for key, _ in listing], np.int64)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: expected one number for each image of images.txt: {error}. {base.FETCH_AGAIN}"
        ) from error


READER = base.Reader(
    name="cub-200-2011",
    title="Caltech-UCSD Birds-200-2011 with segmentations",
    url="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    expects="images/001.Black_footed_Albatross/*.jpg ...\nimages.txt, classes.txt, image_class_labels.txt\n"
    "segmentations/001.Black_footed_Albatross/*.png ... (here or one folder up)\n"
    f"{SPLIT_FILE} (from ReDO's repository; otherwise a split of the same sizes is chosen)",
    splits="train 10000, val 788, test 1000",
    masks="segmentation (more than half of the annotators)",
    labels="200 classes",
    read=read,
)
