"""ImageNet (ILSVRC 2012) in folders, with the masks of Pixel-ImageNet beside it."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from factorkit.data.files import warn_about_outputs, wrap_os_errors
from factorkit.data.layouts import base
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.output_record import OutputFilter

WNID = re.compile(r"n\d{8}")  # WordNet id
MAX_TEST_PER_CLASS = 20  # the dissertation scores at most 20 images of each class
DEVKIT = "ILSVRC2012_devkit_t12/data"


def read(root: Path) -> base.DatasetFiles | None:
    if not (wnids := _list_classes(root / "train")):
        return None
    names: list[str] = []
    labels, splits = [], {}
    for split in ("train", "val"):
        split_names, split_labels, notes = _read_split(root, split, wnids)
        if split_names:
            splits[split] = np.arange(len(names), len(names) + len(split_names))
        names += split_names
        labels.append(split_labels)
    masks = _read_pixel_imagenet(root, names)
    if masks:
        test_names = _choose_per_class(masks["pixel"].names, MAX_TEST_PER_CLASS)
        rows = splits["train"]
        is_test = np.array([names[i].rpartition(".")[0] in test_names for i in rows])
        splits |= {"test": rows[is_test], "train": rows[~is_test]}
    class_names = _read_class_names(root, wnids)
    return base.DatasetFiles(FileSource(root, names), masks, splits, np.concatenate(labels), class_names, notes=notes)


def _list_classes(folder: Path) -> list[str]:
    with wrap_os_errors(folder, "so its classes cannot be listed. Check its permissions."):
        return sorted(p.name for p in folder.iterdir() if WNID.fullmatch(p.name) and p.is_dir())


def _list_files(folder: Path, outputs: OutputFilter) -> list[str]:
    with wrap_os_errors(folder, "so its images cannot be listed. Check its permissions."):
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".jpeg", ".jpg", ".png"))
    return [name for name in names if not outputs.skips_file(str(folder), name)]


def _read_split(root: Path, split: str, wnids: Sequence[str]) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Return names, classes (-1 if unknown) and notes."""
    folder = root / split
    if not folder.is_dir():
        return [], np.empty(0, np.int64), ()
    number, outputs = {wnid: i for i, wnid in enumerate(wnids)}, OutputFilter(folder)
    if classes := _list_classes(folder):
        entries = [
            (f"{split}/{wnid}/{name}", number.get(wnid, -1))
            for wnid in classes
            for name in _list_files(folder / wnid, outputs)
        ]
        warn_about_outputs(folder, outputs)
        return [name for name, _ in entries], np.array([label for _, label in entries], np.int64), ()
    files = _list_files(folder, outputs)
    warn_about_outputs(folder, outputs)
    wnid_of = _read_kaggle_classes(root) or _read_devkit_classes(root, len(files))
    labels = np.array([number.get(wnid_of.get(Path(file).stem, ""), -1) for file in files], np.int64)
    note = f"{split}/ has no classes: put {DEVKIT} or LOC_val_solution.csv beside it"
    return [f"{split}/{file}" for file in files], labels, (note,) if files and not wnid_of else ()


def _read_kaggle_classes(root: Path) -> dict[str, str]:
    """Read the validation classes from LOC_val_solution.csv: `ILSVRC2012_val_00000001,n01751748 111 ...`."""
    path = _find_beside(root, "LOC_val_solution.csv")
    if path is None:
        return {}
    with wrap_os_errors(path, "so the classes cannot be read."), open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (KeyError, IndexError) as error:
        raise DataError(f"{path}: expected lines 'ImageId,PredictionString': {error}. {base.FETCH_AGAIN}") from error


def _read_devkit_classes(root: Path, num_images: int) -> dict[str, str]:
    """Read the validation classes from the development kit: line i is the ILSVRC2012_ID of image i."""
    kit = _find_beside(root, DEVKIT)
    if kit is None:
        return {}
    numbers = [int(row[0]) for row in base.read_table(kit / "ILSVRC2012_validation_ground_truth.txt", columns=1)]
    loadmat = base.import_extra("scipy.io", "layouts", "reading the development kit of ImageNet").loadmat
    try:
        synsets = loadmat(kit / "meta.mat", squeeze_me=True)["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
        if len(numbers) < num_images:
            raise ValueError(f"{len(numbers)} classes for {format_count(num_images, 'image')}")
        return {f"ILSVRC2012_val_{i:08d}": wnid_of[number] for i, number in enumerate(numbers, start=1)}
    except Exception as error:  # scipy: OSError, ValueError, MatReadError, KeyError, ...
        raise DataError(f"{kit}: cannot be read: {error}. {base.FETCH_AGAIN}") from error


def _read_class_names(root: Path, wnids: Sequence[str]) -> list[str]:
    """Return names like `n01440764 tench` if LOC_synset_mapping.txt exists, else `n01440764`; words are not unique."""
    path = _find_beside(root, "LOC_synset_mapping.txt")
    words = {} if path is None else {row[0]: " ".join(row[1:]).split(",")[0] for row in base.read_table(path)}
    return [f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in wnids]


def _find_beside(root: Path, name: str) -> Path | None:
    """Find a file beside the images, or above Data/CLS-LOC."""
    folders = (root, *list(root.parents)[:3])
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def _read_pixel_imagenet(root: Path, names: Sequence[str]) -> dict[str, base.LabelSource]:
    """Read the masks <wnid>/<image>.png of a folder beside the images whose name contains `pixel-imagenet`."""
    candidates = (path for parent in (root, root.parent) for path in sorted(parent.iterdir()) if path.is_dir())
    folder = next((path for path in candidates if "pixel-imagenet" in path.name.lower() and _list_classes(path)), None)
    if folder is None:
        return {}
    train_stems = {name.rpartition(".")[0] for name in names if name.startswith("train/")}
    outputs = OutputFilter(folder)
    all_masks = [f"{wnid}/{name}" for wnid in _list_classes(folder) for name in _list_files(folder / wnid, outputs)]
    masks = [name for name in all_masks if f"train/{name.rpartition('.')[0]}" in train_stems]
    if not masks:
        raise DataError(
            f"{folder}: none of its {format_count(len(all_masks), 'mask')} has an image in {root / 'train'}. "
            "Check both."
        )
    source = FileSource(folder, masks, [f"train/{name}" for name in masks])
    return {"pixel": base.LabelSource(source, base.take_first_channel)}


def _choose_per_class(masks: Sequence[str], count: int) -> set[str]:
    """Choose the first images of each class by the SHA-256 of their names without suffix."""
    by_class: dict[str, list[str]] = {}
    for name in masks:
        by_class.setdefault(name.split("/")[1], []).append(name.rpartition(".")[0])
    ordered = (sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest()) for names in by_class.values())
    return {name for names in ordered for name in names[:count]}


READER = base.Reader(
    name="imagenet",
    title="ImageNet (ILSVRC 2012), with Pixel-ImageNet if available",
    url="https://www.image-net.org/challenges/LSVRC/2012/ and https://github.com/shiyinzhang/Pixel-ImageNet",
    expects="train/n01440764/*.JPEG ...\nval/n01440764/*.JPEG ... or val/ILSVRC2012_val_00000001.JPEG ...\n"
    f"{DEVKIT}/ or LOC_val_solution.csv (classes of a flat val/)\nLOC_synset_mapping.txt (words for the classes)\n"
    "pixel-imagenet*/n01440764/n01440764_10026.png ... (masks, here or one folder up)",
    splits="train, val; with masks also test: at most 20 labelled images of each class, removed from train",
    masks="pixel (0 background, 1, 2, ... objects), of Pixel-ImageNet",
    labels="1000 classes, in the order of their WordNet ids",
    read=read,
)
