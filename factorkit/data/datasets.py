"""What a path holds, and which of its labelled images stay out of training."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.labelled import match_masks, stem
from factorkit.data.procedural import flowers
from factorkit.data.sources import ArraySource, Source, ZipSource, open_source
from factorkit.errors import ConfigError, DataError

AUTO_SHARE, AUTO_MOST = 0.2, 200  # how many labelled images "auto" holds out where most images have masks
TEST_SEED_OFFSET = 2**32  # procedural test pictures come from seeds nobody trains with
PAIRS_FILE = "near_duplicates.txt"


@dataclass(frozen=True)
class Dataset:
    """Images to train on, and labelled ones to score on.

    Attributes:
        name: of the folder or file.
        train: the images used for training; their masks, if any, are never shown to it.
        test_images: labelled images, None where there are no masks. Not in `train`, unless `holdout` was "none".
        test_masks: one for each of `test_images`, for `load_labelled`.
        labels: int64, the class of each image of `train` (-1: none), None where the data do not say.
        class_names: what `labels` index.
    """

    name: str
    train: Source
    test_images: Source | None
    test_masks: Source | None
    labels: np.ndarray | None = None
    class_names: list[str] | None = None


@dataclass(frozen=True)
class _Layout:
    """What a reader found: images, masks of all or some of them, and pairs of stems that show the same thing."""

    images: Source
    masks: Source | None = None
    pairs: list[tuple[str, str]] = field(default_factory=list)


def open_dataset(data: Any, *, holdout: str | int = "auto") -> Dataset:
    """Open images and, where they lie beside them, masks; keep labelled images out of training.

    Args:
        data: a folder or .zip with `images/` and `masks/` in it (and perhaps `near_duplicates.txt`: two stems a line,
            `#` for comments), or anything that `open_source` takes, which then has no masks.
        holdout: "masked" keeps every image with a mask out of training. A number keeps that many, chosen by a hash
            of their names, so that files added later do not reshuffle them; near-duplicates stay on one side, and
            fewer are held out where the last group of them does not fit. "none" trains on all images and offers the
            labelled ones for scoring although they were seen. "auto" is "masked" where at least half of the images
            have no mask, else a fifth of the labelled ones, at most 200.

    Near-duplicates of held-out images leave the training set too.

    Raises:
        ConfigError: a holdout that is none of these, or more than there are masks.
        DataError: the data cannot be opened, masks do not match, or nothing is left to train on.
    """
    if data is None:
        raise ConfigError("open_dataset needs a path or images. The shipped flowers: procedural_dataset(resolution).")
    layout = next(found for reader in READERS if (found := reader(data)) is not None)
    name = Path(data).resolve().name if isinstance(data, (str, os.PathLike)) else type(data).__name__
    if isinstance(holdout, bool) or not (holdout in ("auto", "masked", "none") or _is_count(holdout)):
        raise ConfigError(f'holdout={holdout!r}: give "auto", "masked", "none" or a number of images, 1 or more.')
    if layout.masks is None:
        if holdout not in ("auto", "none"):
            raise ConfigError(f'holdout={holdout!r}, but {name} has no masks. Put them in masks/, or use "auto".')
        return Dataset(name, layout.images, None, None)
    return _split(name, layout, layout.masks, holdout)


def procedural_dataset(resolution: int, train: int = 2000, test: int = 216, seed: int = 0) -> Dataset:
    """The shipped flowers: `train` unlabelled and `test` labelled pictures, drawn from different seeds.

    Raises:
        ConfigError: no training or test pictures, or what `flowers` refuses.
    """
    if train < 1 or test < 1:
        raise ConfigError(f"train={train}, test={test}: both must be 1 or more.")
    train_images, _ = flowers(train, resolution, seed)
    test_images, test_masks = flowers(test, resolution, TEST_SEED_OFFSET + seed)
    return Dataset("procedural flowers", ArraySource(train_images), ArraySource(test_images), ArraySource(test_masks))


def _read_folder_with_masks(data: Any) -> _Layout | None:
    if not isinstance(data, (str, os.PathLike)):
        return None
    root = Path(data).expanduser()
    if not ((root / "images").is_dir() and (root / "masks").is_dir()):
        return None
    listed = root / PAIRS_FILE
    pairs = _parse_pairs(listed.read_text(encoding="utf-8"), str(listed)) if listed.is_file() else []
    return _Layout(open_source(root / "images"), open_source(root / "masks"), pairs)


def _read_zip_with_masks(data: Any) -> _Layout | None:
    if not isinstance(data, (str, os.PathLike)):
        return None
    path = Path(data).expanduser().resolve()
    if path.suffix.lower() != ".zip" or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        folders = {"/".join(n.split("/")[:depth]) for n in archive.namelist() for depth in range(1, n.count("/") + 1)}
        tops = sorted(f.removesuffix("images") for f in folders if f"/{f}".endswith("/images"))
        top = next((top for top in tops if f"{top}masks" in folders), None)
        if top is None:
            return None
        listed = f"{top}{PAIRS_FILE}"
        text = archive.read(listed).decode() if listed in archive.namelist() else ""
    images, masks = ZipSource(path, f"{top}images/"), ZipSource(path, f"{top}masks/")
    if not images.names or not masks.names:
        raise DataError(f"{path}: its images/ or masks/ folder holds no pictures. Pack it again with both.")
    return _Layout(images, masks, _parse_pairs(text, f"{path}/{listed}"))


def _read_plain(data: Any) -> _Layout:
    return _Layout(open_source(data))


# Tried in order; the official layout of a further data set is one more reader before the last.
READERS: tuple[Callable[[Any], _Layout | None], ...] = (_read_folder_with_masks, _read_zip_with_masks, _read_plain)


def _split(name: str, layout: _Layout, masks: Source, holdout: str | int) -> Dataset:
    images = layout.images
    mask_of = dict(match_masks(images, masks))
    group_of = _groups([stem(n) for n in images.names], layout.pairs)
    if holdout == "auto":
        mostly_unlabelled = 2 * len(mask_of) <= len(images)
        holdout = "masked" if mostly_unlabelled else max(1, min(AUTO_MOST, round(AUTO_SHARE * len(mask_of))))
    test = list(mask_of) if isinstance(holdout, str) else _choose(list(mask_of), group_of, holdout)
    train = list(range(len(images)))
    if holdout != "none":
        held_out = {group_of[i] for i in test}
        train = [i for i in train if group_of[i] not in held_out]
    if not train:
        raise DataError(
            f"{name}: nothing is left to train on, {len(test)} of {len(images)} images are held out and the others, if "
            'any, are their near-duplicates. Set holdout to fewer, or to "none" to train on all of them.'
        )
    return Dataset(name, images.subset(train), images.subset(test), masks.subset([mask_of[i] for i in test]))


def _choose(labelled: Sequence[int], group_of: Sequence[str], count: int) -> list[int]:
    """Whole groups in the order of their hash, until `count` images are held out."""
    if count > len(labelled):
        raise ConfigError(f"holdout={count}, but only {len(labelled)} images have a mask. Hold out fewer.")
    members: dict[str, list[int]] = {}
    for i in labelled:
        members.setdefault(group_of[i], []).append(i)
    chosen: list[int] = []
    for group in sorted(members, key=lambda g: hashlib.sha256(g.encode("utf-8", "surrogateescape")).digest()):
        if len(chosen) + len(members[group]) <= count:
            chosen += members[group]
    if not chosen:
        raise DataError(f"holdout={count}: every labelled image has more near-duplicates than that. Hold out more.")
    return sorted(chosen)


def _groups(stems: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """For each stem the first (in sorted order) of all those it is a near-duplicate of, directly or through others."""
    parent = {s: s for s in stems}

    def root(s: str) -> str:
        while parent[s] != s:
            s = parent[s]
        return s

    for a, b in pairs:
        if a in parent and b in parent:  # lists may name images that were taken out since
            low, high = sorted((root(a), root(b)))
            parent[high] = low
    return [root(s) for s in stems]


def _parse_pairs(text: str, where: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].split()
        if len(words) not in (0, 2):
            raise DataError(f"{where}, line {number}: expected two names without suffix, found '{line.strip()}'.")
        if words:
            pairs.append((words[0], words[1]))
    return pairs


def _is_count(holdout: Any) -> bool:
    return isinstance(holdout, int) and holdout >= 1
