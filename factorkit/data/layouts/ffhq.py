"""FFHQ: 70,000 aligned faces, without masks or classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from factorkit.data.files import list_image_names
from factorkit.data.layouts.base import DatasetFiles, Reader
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

NUM_TRAIN = 60000  # the authors' readme: the first 60,000 for training, the last 10,000 for validation
FOLDERS = ("images1024x1024", "thumbnails128x128", "in-the-wild-images")  # the first that exists is read


def read(root: Path) -> DatasetFiles:
    folder = next(folder for folder in FOLDERS if (root / folder).exists())
    root = root / folder
    names = [name for name in list_image_names(root) if name.endswith(".png")]
    numbers = [name.rpartition("/")[2].removesuffix(".png") for name in names]
    if not names or not all(number.isdecimal() for number in numbers):
        raise DataError(f"{root}: expected 00000/00000.png to 69000/69999.png. Unpack the authors' archive again.")
    is_train = np.array([int(number) < NUM_TRAIN for number in numbers])
    splits = {"train": np.flatnonzero(is_train), "val": np.flatnonzero(~is_train)}
    return DatasetFiles(FileSource(root, names), splits=splits, notes=(f"read from {folder}",))


READER = Reader(
    name="ffhq",
    title="Flickr-Faces-HQ",
    url="https://github.com/NVlabs/ffhq-dataset",
    expects=f"{FOLDERS[0]}/00000/00000.png ... 69000/69999.png\nor the same below {FOLDERS[1]} or {FOLDERS[2]}",
    splits="official: train 60000, val 10000; holdout none trains on all 70000, as StyleGAN did",
    read=read,
)
