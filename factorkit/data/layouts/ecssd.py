"""ECSSD: 1000 natural images with one mask of what stands out."""

from __future__ import annotations

from typing import Any

from factorkit.data.layouts.base import Labels, Layout, Reader, existing, first_channel, folder, with_suffix
from factorkit.data.open_source import image_names
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

HALF = 127


def read(data: Any) -> Layout | None:
    root = folder(data, ("", "ECSSD"), holding=("images", "ground_truth_mask"))
    if root is None:
        return None
    names = image_names(root / "images")
    masks = existing(root / "ground_truth_mask", [with_suffix(name, ".png") for name in names])
    if not masks:
        raise DataError(f"{root}: no image has a mask of its name in ground_truth_mask. Unpack both archives here.")
    stored = FileSource(root / "ground_truth_mask", masks)
    labels = Labels(stored, lambda values: first_channel(values) > HALF)
    return Layout(FileSource(root / "images", names), {"ground_truth": labels})


READER = Reader(
    name="ecssd",
    title="Extended Complex Scene Saliency Dataset",
    url="https://www.cse.cuhk.edu.hk/leojia/projects/hsaliency/dataset.html",
    expects="images/0001.jpg ... 1000.jpg\nground_truth_mask/0001.png ... 1000.png",
    splits="none by the authors; held out by a hash of the names",
    masks="ground_truth",
    read=read,
)
