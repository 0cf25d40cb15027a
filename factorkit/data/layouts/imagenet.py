"""ImageNet (ILSVRC 2012) in folders, and the masks of Pixel-ImageNet beside it."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.layouts.base import (
    FETCH_AGAIN,
    DatasetFiles,
    LabelSource,
    Reader,
    find_root,
    import_extra,
    read_table,
    take_first_channel,
)
from factorkit.data.sources import FileSource, wrap_os_errors
from factorkit.utils.errors import DataError

WNID = re.compile(r"n\d{8}")
INSIDE = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "imagenet")
PER_CLASS = 20  # the dissertation scores at most 20 images of each class
DEVKIT = "ILSVRC2012_devkit_t12/data"


def read(data: Any) -> DatasetFiles | None:
    root = find_root(data, INSIDE, required=("train",))
    if root is None or not _classes(root / "train"):
        return None
    wnids = _classes(root / "train")
    names: list[str] = []
    labels, splits = [], {}
    for split in ("train", "val"):
        found, classes, notes = _split(root, split, wnids)
        splits[split] = np.arange(len(names), len(names) + len(found))
        names += found
        labels.append(classes)
    splits = {split: rows for split, rows in splits.items() if len(rows)}
    masks = _pixel_imagenet(root, names)
    if masks:
        scored = _at_most(masks["pixel"].names, PER_CLASS)
        rows = splits["train"]
        chosen = np.array([names[i].rpartition(".")[0] in scored for i in rows])
        splits |= {"test": rows[chosen], "train": rows[~chosen]}
    class_names = _class_names(root, wnids)
    return DatasetFiles(FileSource(root, names), masks, splits, np.concatenate(labels), class_names, notes=notes)


def _classes(place: Path) -> list[str]:
    with wrap_os_errors(place, "so its classes cannot be listed. Mend its permissions."):
        return sorted(p.name for p in place.iterdir() if WNID.fullmatch(p.name) and p.is_dir())


def _pictures(place: Path) -> list[str]:
    with wrap_os_errors(place, "so its images cannot be listed. Mend its permissions."):
        return sorted(p.name for p in place.iterdir() if p.suffix.lower() in (".jpeg", ".jpg", ".png"))


def _split(root: Path, split: str, wnids: Sequence[str]) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Names, classes and what to note; -1 is the class of images of which nobody says it."""
    place = root / split
    if not place.is_dir():
        return [], np.empty(0, np.int64), ()
    number = {wnid: i for i, wnid in enumerate(wnids)}
    if own := _classes(place):
        found = [(f"{split}/{wnid}/{name}", number.get(wnid, -1)) for wnid in own for name in _pictures(place / wnid)]
        return [name for name, _ in found], np.array([label for _, label in found], np.int64), ()
    flat = _pictures(place)
    stems = [Path(name).stem for name in flat]
    known = _kaggle(root) or _devkit(root, len(flat))
    labels = np.array([number.get(known.get(stem, ""), -1) for stem in stems], np.int64)
    note = () if known or not flat else (f"{split}/ has no classes: lay {DEVKIT} or LOC_val_solution.csv beside it",)
    return [f"{split}/{name}" for name in flat], labels, note


def _kaggle(root: Path) -> dict[str, str]:
    """The class of each validation image, of LOC_val_solution.csv: `ILSVRC2012_val_00000001,n01751748 111 ...`."""
    path = _above(root, "LOC_val_solution.csv")
    if path is None:
        return {}
    with wrap_os_errors(path, "so the classes cannot be read."), open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (KeyError, IndexError) as error:
        raise DataError(f"{path}: not read_table 'ImageId,PredictionString': {error}. {FETCH_AGAIN}") from error


def _devkit(root: Path, images: int) -> dict[str, str]:
    """The same of the authors' development kit: line i of the ground truth is the ILSVRC2012_ID of image i."""
    kit = _above(root, DEVKIT)
    if kit is None:
        return {}
    truth = [int(words[0]) for words in read_table(kit / "ILSVRC2012_validation_ground_truth.txt", columns=1)]
    loadmat = import_extra("scipy.io", "layouts", "reading the development kit of ImageNet").loadmat
    try:
        synsets = loadmat(kit / "meta.mat", squeeze_me=True)["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
        if len(truth) < images:
            raise ValueError(f"{len(truth)} classes for {images} images")
        return {f"ILSVRC2012_val_{i:08d}": wnid_of[number] for i, number in enumerate(truth, start=1)}
    except Exception as error:  # scipy: OSError, ValueError, MatReadError, KeyError, ...
        raise DataError(f"{kit}: cannot be read: {error}. {FETCH_AGAIN}") from error


def _class_names(root: Path, wnids: Sequence[str]) -> list[str]:
    """`n01440764 tench` where LOC_synset_mapping.txt is beside the images, else `n01440764`: words alone repeat."""
    path = _above(root, "LOC_synset_mapping.txt")
    words = {} if path is None else {line[0]: " ".join(line[1:]).split(",")[0] for line in read_table(path)}
    return [f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in wnids]


def _above(root: Path, name: str) -> Path | None:
    """A file beside the images, or above Data/CLS-LOC."""
    places = (root, *list(root.parents)[:3])
    return next((place / name for place in places if (place / name).exists()), None)


def _pixel_imagenet(root: Path, names: Sequence[str]) -> dict[str, LabelSource]:
    """The masks <wnid>/<image>.png of a folder beside the images whose name holds `pixel-imagenet`."""
    beside = (path for place in (root, root.parent) for path in sorted(place.iterdir()) if path.is_dir())
    place = next((path for path in beside if "pixel-imagenet" in path.name.lower() and _classes(path)), None)
    if place is None:
        return {}
    training = {name.rpartition(".")[0] for name in names if name.startswith("train/")}
    found = [f"{wnid}/{name}" for wnid in _classes(place) for name in _pictures(place / wnid)]
    stored = [name for name in found if f"train/{name.rpartition('.')[0]}" in training]
    if not stored:
        raise DataError(f"{place}: none of its {len(found)} masks has an image in {root / 'train'}. Lay both together.")
    return {"pixel": LabelSource(FileSource(place, stored, [f"train/{name}" for name in stored]), take_first_channel)}


def _at_most(masks: Sequence[str], count: int) -> set[str]:
    """Of each class the first images in the order of the SHA-256 of their names, without suffix."""
    by_class: dict[str, list[str]] = {}
    for name in masks:
        by_class.setdefault(name.split("/")[1], []).append(name.rpartition(".")[0])
    order = {c: sorted(found, key=lambda n: hashlib.sha256(n.encode()).digest()) for c, found in by_class.items()}
    return {name for found in order.values() for name in found[:count]}


READER = Reader(
    name="imagenet",
    title="ImageNet (ILSVRC 2012), with Pixel-ImageNet where it is there",
    url="https://www.image-net.org/challenges/LSVRC/2012/ and https://github.com/shiyinzhang/Pixel-ImageNet",
    expects="train/n01440764/*.JPEG ...\nval/n01440764/*.JPEG ... or val/ILSVRC2012_val_00000001.JPEG ...\n"
    f"{DEVKIT}/ or LOC_val_solution.csv (classes of a flat val/)\nLOC_synset_mapping.txt (words for the classes)\n"
    "pixel-imagenet*/n01440764/n01440764_10026.png ... (masks, here or one folder up)",
    splits="train, val; with masks also test: at most 20 labelled images of each class, which leave train",
    masks="pixel (0 background, 1, 2, ... objects), of Pixel-ImageNet",
    labels="1000 classes, in the order of their WordNet ids",
    read=read,
)
