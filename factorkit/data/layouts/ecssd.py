"""ECSSD: 1000 natural images with a mask of the salient object."""

from __future__ import annotations

from pathlib import Path

from factorkit.data.files import list_image_names
from factorkit.data.layouts import base
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

HALF = 127  # of 255: antialiased outlines


def read(root: Path) -> base.DatasetFiles:
    names = list_image_names(root / "images")
    masks = base.filter_existing(root / "ground_truth_mask", [base.replace_suffix(name, ".png") for name in names])
    if not masks:
        raise DataError(f"{root}: no image has a mask of its name in ground_truth_mask. Unpack both archives here.")
    mask_files = FileSource(root / "ground_truth_mask", masks)
    labels = base.LabelSource(mask_files, lambda values: base.take_first_channel(values) > HALF)
    return base.DatasetFiles(FileSource(root / "images", names), {"ground_truth": labels})


READER = base.Reader(
    name="ecssd",
    title="Extended Complex Scene Saliency Dataset",
    url="https://www.cse.cuhk.edu.hk/leojia/projects/hsaliency/dataset.html",
    expects="images/0001.jpg ... 1000.jpg\nground_truth_mask/0001.png ... 1000.png",
    splits="no official splits; images are held out by a hash of the names",
    masks="ground_truth",
    read=read,
)
