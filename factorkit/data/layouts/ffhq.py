"""FFHQ: 70,000 aligned faces, without masks or classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from factorkit.data.layouts.base import DatasetFiles, Reader, find_root
from factorkit.data.open import list_image_names
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

TRAIN = 60000  # the authors' readme: the first 60,000 for training, the last 10,000 for validation
SIZES = ("images1024x1024", "thumbnails128x128", "in-the-wild-images")  # the first that is there is read


def read(data: Any) -> DatasetFiles | None:
    places = [(size, find_root(data, ("", "ffhq-dataset"), required=(size,))) for size in SIZES]
    found = next(((root, size) for size, root in places if root is not None), None)
    if found is None:
        return None
    root = found[0] / found[1]
    names = [name for name in list_image_names(root) if name.endswith(".png")]
    numbers = [name.rpartition("/")[2].removesuffix(".png") for name in names]
    if not names or not all(number.isdecimal() for number in numbers):
        raise DataError(f"{root}: expected 00000/00000.png to 69000/69999.png. Unpack the authors' archive again.")
    train = np.array([int(number) < TRAIN for number in numbers])
    splits = {"train": np.flatnonzero(train), "val": np.flatnonzero(~train)}
    return DatasetFiles(FileSource(root, names), splits=splits, notes=(f"read from {found[1]}",))


READER = Reader(
    name="ffhq",
    title="Flickr-Faces-HQ",
    url="https://github.com/NVlabs/ffhq-dataset",
    expects=f"{SIZES[0]}/00000/00000.png ... 69000/69999.png\nor the same below {SIZES[1]} or {SIZES[2]}",
    splits="the authors': train 60000, val 10000; holdout none trains on all 70000, as StyleGAN did",
    read=read,
)
