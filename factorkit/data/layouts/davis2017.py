"""DAVIS-2017: videos as folders of frames, with the objects of each frame."""

from __future__ import annotations

from typing import Any

import numpy as np

from factorkit.data.layouts.base import (
    DatasetFiles,
    LabelSource,
    Reader,
    filter_existing,
    find_root,
    read_table,
    replace_suffix,
)
from factorkit.data.open import list_image_names
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

SETS = ("train", "val", "test-dev")
SIZES = ("480p", "Full-Resolution")  # the first that is there is read


def read(data: Any) -> DatasetFiles | None:
    root = find_root(data, ("", "DAVIS"), required=("JPEGImages", "ImageSets/2017"))
    size = next((size for size in SIZES if root is not None and (root / "JPEGImages" / size).is_dir()), None)
    if root is None or size is None:
        return None
    frames, notes = root / "JPEGImages" / size, [f"read from {size}"]
    names: list[str] = []
    clips: dict[str, np.ndarray] = {}
    splits = {}
    for split in SETS:
        path = root / "ImageSets" / "2017" / f"{split}.txt"
        if not path.is_file():
            continue
        first = len(names)
        for (video,) in read_table(path, columns=1):
            if not (frames / video).is_dir():
                raise DataError(f"{path} names {video}, but {frames} has no such folder. Unpack the archive again.")
            found = [f"{video}/{name}" for name in list_image_names(frames / video)]
            clips[video] = np.arange(len(names), len(names) + len(found))
            names += found
        splits[split] = np.arange(first, len(names))
    if not names:
        raise DataError(f"{root / 'ImageSets' / '2017'}: no frames of train.txt or val.txt. Unpack the archive again.")
    annotations = root / "Annotations" / size
    stored = FileSource(annotations, filter_existing(annotations, [replace_suffix(name, ".png") for name in names]))
    masks = {"objects": LabelSource(stored, ignore_label=255)} if len(stored) else {}
    return DatasetFiles(FileSource(frames, names), masks, splits, videos=clips, notes=notes)


READER = Reader(
    name="davis-2017",
    title="DAVIS 2017, video object segmentation",
    url="https://davischallenge.org/davis2017/code.html",
    expects="JPEGImages/480p/bear/00000.jpg ... (or Full-Resolution)\nAnnotations/480p/bear/00000.png ...\n"
    "ImageSets/2017/train.txt, val.txt",
    splits="the authors': train 60 videos, val 30, test-dev 30",
    masks="objects (0 background, 1, 2, ... objects); clips: the frames of each video, in order",
    read=read,
)
