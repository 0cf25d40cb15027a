"""ECSSD: 1000 natural images with a mask of the salient object."""

from __future__ import annotations

from typing import Any

from factorkit.data.files import list_image_names
from factorkit.data.layouts.base import (
    DatasetFiles,
    LabelSource,
    Reader,
    filter_existing,
    find_root,
    replace_suffix,
    take_first_channel,
)
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

HALF = 127  # of 255: antialiased outlines


def read(data: Any) -> DatasetFiles | None:
    root = find_root(data, ("", "ECSSD"), required=("images", "ground_truth_mask"))
    if root is None:
        return None
    names = list_image_names(root / "images")
    masks = filter_existing(root / "ground_truth_mask", [replace_suffix(name, ".png") for name in names])
    if not masks:
        raise DataError(f"{root}: no image has a mask of its name in ground_truth_mask. Unpack both archives here.")
    mask_files = FileSource(root / "ground_truth_mask", masks)
    labels = LabelSource(mask_files, lambda values: take_first_channel(values) > HALF)
    return DatasetFiles(FileSource(root / "images", names), {"ground_truth": labels})


READER = Reader(
    name="ecssd",
    title="Extended Complex Scene Saliency Dataset",
    url="https://www.cse.cuhk.edu.hk/leojia/projects/hsaliency/dataset.html",
    expects="images/0001.jpg ... 1000.jpg\nground_truth_mask/0001.png ... 1000.png",
    splits="no official splits; images are held out by a hash of the names",
    masks="ground_truth",
    read=read,
)
