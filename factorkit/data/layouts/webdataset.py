"""WebDataset shards: .tar files whose members of one basename are one sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.archives import TarSource, inside, tar_members
from factorkit.data.layouts.base import DatasetFiles, LabelSource, Reader
from factorkit.data.sources import IMAGE_SUFFIXES, escape_name, is_image
from factorkit.utils.errors import DataError

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MASKS = frozenset("mask seg segmentation".split())  # x.seg.png, x.mask.png
MOST_CLASSES = 10**6  # a number beyond is no class
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read(data: Any) -> DatasetFiles | None:
    shards = _shards(data)
    if not shards:
        return None
    names: list[str] = []
    images: list[tuple[int, int, int]] = []
    masks: dict[str, tuple[int, int, int]] = {}
    classes: dict[str, int] = {}
    splits: dict[str, list[int]] = {}
    for archive, shard in enumerate(shards):
        for member, first, size in tar_members(shard):
            key, _, kind = _sample(member)
            name, words = f"{shard.stem}/{inside(key)}", kind.lower().split(".")
            if words[-1] == "cls":
                classes[name] = _class(shard, member, first, size)
            elif f".{words[-1]}" in IMAGE_SUFFIXES and MASKS & set(words):
                masks[name] = (archive, first, size)
            elif f".{words[-1]}" in IMAGE_SUFFIXES:
                splits.setdefault(_split_of(shard), []).append(len(images))
                images.append((archive, first, size))
                names.append(f"{name}.{words[-1]}")
    if not images:
        raise DataError(
            f"{shards[0]}: no image in this archive{' or the others' * (len(shards) > 1)}. Give other shards."
        )
    keys = [name.rpartition(".")[0] for name in names]
    found = {key: masks[key] for key in dict.fromkeys(keys) if key in masks}
    source = TarSource(shards, list(found.values()), [f"{key}.png" for key in found])
    rows = {split: np.array(where) for split, where in splits.items() if split}
    labels, class_names = _labels(keys, classes)
    by_name = {"masks": LabelSource(source)} if found else {}
    return DatasetFiles(TarSource(shards, images, names), by_name, rows, labels, class_names)


def _labels(keys: Sequence[str], classes: dict[str, int]) -> tuple[np.ndarray | None, list[str] | None]:
    if not classes:
        return None, None
    labels = np.array([classes.get(key, -1) for key in keys], np.int64)
    return labels, [str(i) for i in range(labels.max() + 1)]


def _shards(data: Any) -> list[Path]:
    """The .tar files behind a path, a pattern `name-{000..012}.tar`, or a folder of nothing but them."""
    if not isinstance(data, (str, Path)):
        return []
    path = Path(data).expanduser()
    if braces := BRACES.search(path.name):
        low, high = braces.groups()
        spelled = (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1))
        shards = [
            path.with_name(path.name[: braces.start()] + number + path.name[braces.end() :]) for number in spelled
        ]
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: no such shard, of {len(shards)} that {path.name} names {len(missing)} are missing."
            )
    elif path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        shards = sorted(entry for entry in entries if entry.suffix.lower() == ".tar" and entry.is_file())
        if any(entry.is_dir() or is_image(entry.name) for entry in entries):
            return []
    else:
        shards = [path] if path.suffix.lower() == ".tar" and path.is_file() else []
    return [shard.resolve() for shard in shards]


def _sample(member: str) -> tuple[str, str, str]:
    """Key and kind: all after the first dot of the last part of the name is the kind."""
    folder, slash, base = member.rpartition("/")
    key, dot, kind = base.partition(".")
    return f"{folder}{slash}{key}", dot, kind


def _class(shard: Path, member: str, first: int, size: int) -> int:
    with open(shard, "rb") as file:
        file.seek(first)
        text = file.read(min(size, 64))
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < MOST_CLASSES:
        raise DataError(f"{shard}: {escape_name(member)} holds no number of a class: {text!r}. Mend this shard.")
    return number


def _split_of(shard: Path) -> str:
    """The split that a word of the shard's name says, or nothing."""
    words = re.split(r"[^a-z]+", shard.stem.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


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
