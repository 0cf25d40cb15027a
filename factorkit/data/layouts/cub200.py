"""CUB-200-2011 with its segmentations, split into 10000, 788 and 1000."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.layouts.base import (
    FETCH_AGAIN,
    SPLITS,
    DatasetFiles,
    LabelSource,
    Reader,
    filter_existing,
    find_root,
    read_table,
    replace_suffix,
    require_files,
    take_first_channel,
)
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

IMAGES, VAL, TEST = 11788, 788, 1000
SPLIT_FILE = "train_val_test_split.txt"  # of ReDO's repository; IEM and later work use the same
HALF = 127  # of 255: the grey of a mask is the share of annotators who saw the bird there


def read(data: Any) -> DatasetFiles | None:
    root = find_root(data, ("", "CUB_200_2011"), required=("images", "images.txt", "classes.txt"))
    if root is None:
        return None
    listed = read_table(root / "images.txt", columns=2)
    names = [name for _, name in listed]
    require_files(root / "images", names, "images of images.txt")
    class_names = [name for _, name in read_table(root / "classes.txt", columns=2)]
    labels = _by_id(root / "image_class_labels.txt", listed) - 1
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise DataError(f"{root / 'image_class_labels.txt'}: a class that classes.txt does not have. {FETCH_AGAIN}")
    masks = {}
    place = next((p for p in (root / "segmentations", root.parent / "segmentations") if p.is_dir()), None)
    if place is not None:
        stored = FileSource(place, filter_existing(place, [replace_suffix(name, ".png") for name in names]))
        masks["segmentation"] = LabelSource(stored, lambda values: take_first_channel(values) > HALF)
    if (root / SPLIT_FILE).is_file():
        parts = _by_id(root / SPLIT_FILE, listed)
        if not np.isin(parts, (0, 1, 2)).all():
            raise DataError(f"{root / SPLIT_FILE}: only 0 (train), 1 (val) and 2 (test) are known. {FETCH_AGAIN}")
        note = f"the split is that of {SPLIT_FILE}"
    else:
        parts = draw(names)
        note = (
            f"the split is drawn by a hash of the names; for the literature's lay ReDO's {SPLIT_FILE} beside images.txt"
        )
    splits = {split: np.flatnonzero(parts == i) for i, split in enumerate(SPLITS)}
    return DatasetFiles(FileSource(root / "images", names), masks, splits, labels, class_names, notes=(note,))


def draw(names: Sequence[str]) -> np.ndarray:
    """0 for train, 1 for val, 2 for test: of the names in the order of their SHA-256 the first 1000 of 11788 are test,
    the next 788 val; of fewer names, the same shares."""
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    test, val = (round(len(names) * part / IMAGES) for part in (TEST, VAL))
    parts = np.zeros(len(names), np.int64)
    parts[order[:test]] = 2
    parts[order[test : test + val]] = 1
    return parts


def _by_id(path: Path, listed: list[list[str]]) -> np.ndarray:
    """The number that a file gives to each image, in the order of images.txt."""
    try:
        value = {key: int(number) for key, number in read_table(path, columns=2)}
        return np.array([value[key] for key, _ in listed], np.int64)
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: not one number for each image of images.txt: {error}. {FETCH_AGAIN}") from error


READER = Reader(
    name="cub-200-2011",
    title="Caltech-UCSD Birds-200-2011 with segmentations",
    url="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    expects="images/001.Black_footed_Albatross/*.jpg ...\nimages.txt, classes.txt, image_class_labels.txt\n"
    "segmentations/001.Black_footed_Albatross/*.png ... (here or one folder up)\n"
    f"{SPLIT_FILE} (from ReDO's repository; without it a split of the same sizes is drawn)",
    splits="train 10000, val 788, test 1000",
    masks="segmentation (more than half of the annotators)",
    labels="200 classes",
    read=read,
)
