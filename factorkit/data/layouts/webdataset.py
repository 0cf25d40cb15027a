"""WebDataset shards: .tar files whose members with one base name are one sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from factorkit.data.archives import TarSource, list_tar_members, sanitize_member_name
from factorkit.data.files import IMAGE_SUFFIXES, escape_name, is_image
from factorkit.data.layouts.base import DatasetFiles, LabelSource, Reader
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.output_record import OutputFilter

SHARD_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MASK_WORDS = frozenset("mask seg segmentation".split())  # x.seg.png, x.mask.png
MAX_CLASS = 10**6  # larger numbers are refused
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read(path: Path) -> DatasetFiles | None:
    shards = _list_shards(path)
    if not shards:
        return None
    keys: list[str] = []
    names: list[str] = []
    images: list[tuple[int, int, int]] = []
    masks: dict[str, tuple[int, int, int]] = {}
    classes: dict[str, int] = {}
    rows: dict[str, list[int]] = {}
    for archive, shard in enumerate(shards):
        for member, offset, size in list_tar_members(shard):
            folder, slash, base = member.rpartition("/")
            stem, _, extension = base.partition(".")  # WebDataset: everything after the first dot
            key, words = f"{shard.stem}/{sanitize_member_name(folder + slash + stem)}", extension.lower().split(".")
            if words[-1] == "cls":
                classes[key] = _read_class(shard, member, offset, size)
            elif f".{words[-1]}" in IMAGE_SUFFIXES and MASK_WORDS & set(words):
                masks[key] = (archive, offset, size)
            elif f".{words[-1]}" in IMAGE_SUFFIXES:
                rows.setdefault(_find_split(shard), []).append(len(images))
                images.append((archive, offset, size))
                keys.append(key)
                names.append(f"{key}.{words[-1]}")
    if not images:
        raise DataError(f"{shards[0]}: no images in {format_count(len(shards), 'archive')}. Give other shards.")
    splits = {split: np.array(indices) for split, indices in rows.items() if split}
    labels, class_names = _number_classes(keys, classes)
    mask_keys = [key for key in dict.fromkeys(keys) if key in masks]
    mask_source = TarSource(shards, [masks[key] for key in mask_keys], [f"{key}.png" for key in mask_keys])
    mask_sets = {"masks": LabelSource(mask_source)} if mask_keys else {}
    return DatasetFiles(TarSource(shards, images, names), mask_sets, splits, labels, class_names)


def _list_shards(path: Path) -> list[Path]:
    """List the .tar files of a path, a pattern `name-{000..012}.tar`, or a folder that holds only shards."""
    if pattern := SHARD_RANGE.search(path.name):
        low, high = pattern.groups()
        numbers = (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1))
        before, after = path.name[: pattern.start()], path.name[pattern.end() :]
        shards = [path.with_name(f"{before}{number}{after}") for number in numbers]
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: {len(missing)} of the {format_count(len(shards), 'shard')} of {path.name} missing."
            )
    elif path.is_dir():
        outputs = OutputFilter(path)
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        entries = [
            entry
            for entry in entries
            if not (outputs.skips_folder(str(entry)) if entry.is_dir() else outputs.skips_file(str(path), entry.name))
        ]
        shards = sorted(entry for entry in entries if entry.suffix.lower() == ".tar" and entry.is_file())
        if any(entry.is_dir() or is_image(entry.name) for entry in entries):
            return []
    else:
        shards = [path] if path.is_file() else []
    return [shard.resolve() for shard in shards]


def _read_class(shard: Path, member: str, offset: int, size: int) -> int:
    with open(shard, "rb") as file:
        file.seek(offset)
        text = file.read(min(size, 64))
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < MAX_CLASS:
        raise DataError(f"{shard}: {escape_name(member)} is not a class number: {text!r}. Correct this shard.")
    return number


def _find_split(shard: Path) -> str:
    """Return the split that the shard's name contains as a word, or an empty string."""
    words = re.split(r"[^a-z]+", shard.stem.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _number_classes(keys: Sequence[str], classes: dict[str, int]) -> tuple[np.ndarray | None, list[str] | None]:
    if not classes:
        return None, None
    labels = np.array([classes.get(key, -1) for key in keys], np.int64)
    return labels, [str(i) for i in range(labels.max() + 1)]


READER = Reader(
    name="webdataset",
    title="WebDataset shards",
    url="https://github.com/webdataset/webdataset",
    expects="NAME-000000.tar ... (a folder of them, one of them, or the pattern NAME-{000000..000012}.tar),\n"
    "not compressed; in each x.jpg (or .png, .webp ...), x.cls, x.mask.png or x.seg.png",
    splits="by the word train, val or test in a shard's name",
    masks="masks (x.mask.png, x.seg.png)",
    labels="x.cls",
    read=read,
)
