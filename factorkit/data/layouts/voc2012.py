"""PASCAL VOC 2012, its segmentation part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.layouts.base import (
    DatasetFiles,
    LabelSource,
    Reader,
    find_root,
    find_rows,
    read_table,
    require_files,
)
from factorkit.data.sources import FileSource

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
VOID = 255  # outlines and what the annotators left open


def read(data: Any) -> DatasetFiles | None:
    inside = ("", "VOC2012", "VOCdevkit/VOC2012")
    root = find_root(data, inside, required=("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"))
    if root is None:
        return None
    sets = root / "ImageSets" / "Segmentation"
    of_split = {s: [words[0] for words in read_table(sets / f"{s}.txt", columns=1)] for s in ("train", "val")}
    stems = sorted({*of_split["train"], *of_split["val"]})
    images, masks = ([f"{stem}.{suffix}" for stem in stems] for suffix in ("jpg", "png"))
    require_files(root / "JPEGImages", images, "images of ImageSets/Segmentation")
    require_files(root / "SegmentationClass", masks, "masks of ImageSets/Segmentation")
    by_class = FileSource(root / "SegmentationClass", masks)
    known = range(len(CLASSES) + 1)
    sets_of_masks = {"class": LabelSource(by_class, valid_labels=known, ignore_label=VOID)}
    if (root / "SegmentationObject").is_dir():
        sets_of_masks["object"] = LabelSource(FileSource(root / "SegmentationObject", masks), ignore_label=VOID)
    for number, name in enumerate(CLASSES, start=1):
        sets_of_masks[name] = LabelSource(by_class, _only(number), valid_labels=(0, 1), ignore_label=VOID)
    splits = {split: find_rows(stems, found, f"{split}.txt") for split, found in of_split.items()}
    return DatasetFiles(
        FileSource(root / "JPEGImages", images), sets_of_masks, splits | _of_classes(root, of_split, stems)
    )


def _only(number: int):
    def labels(values: np.ndarray) -> np.ndarray:
        return np.where(values == VOID, VOID, values == number)

    return labels


def _of_classes(root: Path, of_split: dict[str, list[str]], stems: list[str]) -> dict[str, np.ndarray]:
    """Of each split the images that show a class, as `val-sheep`: the dissertation scores class by class."""
    found = {}
    for split, of_this in of_split.items():
        for name in CLASSES:
            path = root / "ImageSets" / "Main" / f"{name}_{split}.txt"
            if path.is_file():
                showing = {stem for stem, here in read_table(path, columns=2) if here == "1"}
                rows = find_rows(stems, (stem for stem in of_this if stem in showing), path.name)
                if len(rows):
                    found[f"{split}-{name}"] = rows
    return found


READER = Reader(
    name="voc-2012",
    title="PASCAL VOC 2012, segmentation",
    url="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    expects="JPEGImages/2007_000027.jpg ...\nSegmentationClass/2007_000032.png ...\nSegmentationObject/ (optional)\n"
    "ImageSets/Segmentation/train.txt, val.txt\nImageSets/Main/aeroplane_val.txt ... (optional, for val-aeroplane ...)",
    splits="the authors': train 1464, val 1449; val-CLASS are the images of val that show a class",
    masks="class (1 to 20, 255 is not scored; the default); object; aeroplane, bicycle, ... (that class alone)",
    read=read,
)
