"""PASCAL VOC 2012, its segmentation part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from factorkit.data.layouts import base
from factorkit.data.sources import FileSource

CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor".split()
)
VOID = 255  # outlines and areas that are not annotated


def read(root: Path) -> base.DatasetFiles:
    lists = root / "ImageSets" / "Segmentation"
    stems_of = {
        split: [row[0] for row in base.read_table(lists / f"{split}.txt", columns=1)] for split in ("train", "val")
    }
    stems = sorted({*stems_of["train"], *stems_of["val"]})
    images, masks = ([f"{stem}.{suffix}" for stem in stems] for suffix in ("jpg", "png"))
    base.require_files(root / "JPEGImages", images, "images of ImageSets/Segmentation")
    base.require_files(root / "SegmentationClass", masks, "masks of ImageSets/Segmentation")
    class_masks = FileSource(root / "SegmentationClass", masks)
    mask_sets = {"class": base.LabelSource(class_masks, valid_labels=range(len(CLASSES) + 1), ignore_label=VOID)}
    if (root / "SegmentationObject").is_dir():
        mask_sets["object"] = base.LabelSource(FileSource(root / "SegmentationObject", masks), ignore_label=VOID)
    for number, name in enumerate(CLASSES, start=1):
        mask_sets[name] = base.LabelSource(class_masks, _select_class(number), valid_labels=(0, 1), ignore_label=VOID)
    splits = {split: base.find_rows(stems, names, f"{split}.txt") for split, names in stems_of.items()}
    splits |= _read_class_splits(root, stems_of, stems)
    return base.DatasetFiles(FileSource(root / "JPEGImages", images), mask_sets, splits)


def _select_class(number: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.where(values == VOID, VOID, values == number)


def _read_class_splits(root: Path, stems_of: dict[str, list[str]], stems: list[str]) -> dict[str, np.ndarray]:
    """Return the images of each split that show a class, as `val-sheep`: the dissertation scores class by class."""
    splits = {}
    for split, split_stems in stems_of.items():
        for name in CLASSES:
            path = root / "ImageSets" / "Main" / f"{name}_{split}.txt"
            if path.is_file():
                positive = {stem for stem, flag in base.read_table(path, columns=2) if flag == "1"}
                rows = base.find_rows(stems, (stem for stem in split_stems if stem in positive), path.name)
                if len(rows):
                    splits[f"{split}-{name}"] = rows
    return splits


READER = base.Reader(
    name="voc-2012",
    title="PASCAL VOC 2012, segmentation",
    url="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    expects="JPEGImages/2007_000027.jpg ...\nSegmentationClass/2007_000032.png ...\nSegmentationObject/ (optional)\n"
    "ImageSets/Segmentation/train.txt, val.txt\nImageSets/Main/aeroplane_val.txt ... (optional, for val-aeroplane ...)",
    splits="official: train 1464, val 1449; val-CLASS are the images of val that show a class",
    masks="class (1 to 20, 255 is not scored; default); object; aeroplane, bicycle, ... (that class alone)",
    read=read,
)
