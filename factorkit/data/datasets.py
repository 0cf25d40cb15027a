"""Data sets: what to train on and what to score on, by official splits or by a hash of the image names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.files import strip_suffix
from factorkit.data.layouts import DatasetFiles, image_mask_folders, read_layout
from factorkit.data.masks import match_masks
from factorkit.data.open import open_source
from factorkit.data.procedural.flowers import draw_flowers
from factorkit.data.procedural.rooms import NESTING, draw_rooms
from factorkit.data.sources import ArraySource, Source
from factorkit.utils.errors import ConfigError, DataError, format_count

AUTO_HOLDOUT_FRACTION, AUTO_HOLDOUT_MAX = 0.2, 200  # images held out by "auto" if most images have a mask
AUTO_SPLITS = ("test", "val")  # the first of these that a layout has is used by "auto"
TEST_SEED_OFFSET = 2**32  # keeps the seeds of procedural test images apart from all training seeds


@dataclass(frozen=True)
class Split:
    """One official split of a data set.

    Attributes:
        images: images of the split.
        masks: masks of some or all images, matched by name; None if there are none.
        labels: class of each image, int64 [N], -1 without a class; None if the data set has no classes.
        videos: for each video its rows of `images`, in order; None if the data set has no videos.
    """

    images: Source
    masks: Source | None = None
    labels: np.ndarray | None = None
    videos: Mapping[str, np.ndarray] | None = None


@dataclass(frozen=True)
class Dataset:
    """Images for training, and labelled images for scoring.

    Attributes:
        name: name of the folder or file.
        train: training images. Their masks, if any, are never used for training.
        test_images: labelled images; None if there are no masks. Disjoint from `train` unless `holdout` was "none".
        test_masks: one mask per image of `test_images`, for `load_labelled`.
        layout: name of the recognised layout (`factorkit.data.layouts`); None for plain images.
        labels: class of each image of `train`, int64 [N], -1 without a class; None if the data set has no classes.
        class_names: name of each class; None if `labels` is None.
        splits: all official splits by name.
        notes: sentences for the user on how the data set was read.
        nesting: for nested masks the number of classes at each level, coarsest first.
    """

    name: str
    train: Source
    test_images: Source | None
    test_masks: Source | None
    layout: str | None = None
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    splits: Mapping[str, Split] = field(default_factory=dict)
    notes: Sequence[str] = ()
    nesting: tuple[int, ...] | None = None


def open_dataset(data: Any, *, holdout: str | int = "auto", mask_set: str | None = None) -> Dataset:
    """Open images and their masks, and keep labelled images out of training.

    Near-duplicates of held-out images are removed from the training set too.

    Args:
        data: a folder or .zip with `images/` and `masks/` (and optionally `near_duplicates.txt`: two image names per
            line, with or without suffix, separated by a tab if they contain spaces; `#` starts a comment), a published
            data set in its original layout (`factorkit.data.layouts`), or anything that `open_source` accepts, without
            masks.
        holdout: which labelled images to keep out of training.
            "masked": all images with a mask.
            A number: that many images, chosen by a hash of their names, so that added files do not change the choice.
            Near-duplicates stay together, so fewer images are held out if the last group does not fit.
            "none": no image; the labelled images are scored although they are trained on.
            A split name ("test", "val", ...): train on "train", score on that split.
            "auto": "test", else "val", if the layout has it. Otherwise "masked" if at least half of the images have no
            mask, else a fifth of the labelled images, at most 200.
        mask_set: which set of masks to use if the layout has several; default: its first.

    Raises:
        ConfigError: invalid `holdout`, more held-out images than masks, unknown `mask_set`, or a missing extra.
        DataError: the data cannot be opened, masks do not match, or no training images are left.

    Example:
        >>> from factorkit.data import open_dataset
        >>> dataset = open_dataset(images)
        >>> len(dataset.train), dataset.test_images is None
        (24, True)
    """
    if data is None:
        raise ConfigError(
            "open_dataset needs a path or images. For the built-in flowers use make_procedural_dataset(resolution)."
        )
    files, layout = None, None
    if (result := read_layout(data)) is not None:
        layout, files = result[0].name, result[1]
    files = image_mask_folders.read(data) if files is None else files
    files = DatasetFiles(open_source(data)) if files is None else files
    # after open_source, which reports paths that cannot be resolved
    name = Path(data).expanduser().resolve().name if isinstance(data, (str, os.PathLike)) else type(data).__name__
    return split_dataset(name, files, holdout, mask_set, layout)


def make_procedural_dataset(
    resolution: int, train: int = 2000, test: int = 216, seed: int = 0, nested: bool = False
) -> Dataset:
    """Draw the built-in flowers: `train` unlabelled and `test` labelled images, from different seeds.

    With `nested`, draw the built-in rooms, whose masks have two levels.

    Raises:
        ConfigError: no training or test images, or an argument that `draw_flowers` rejects.
    """
    if train < 1 or test < 1:
        raise ConfigError(f"train={train}, test={test}: both must be 1 or more.")
    draw, name = (draw_rooms, "procedural rooms") if nested else (draw_flowers, "procedural flowers")
    train_images, _ = draw(train, resolution, seed)
    images, masks = map(ArraySource, draw(test, resolution, TEST_SEED_OFFSET + seed))
    return Dataset(name, ArraySource(train_images), images, masks, nesting=NESTING if nested else None)


def split_dataset(
    name: str, files: DatasetFiles, holdout: str | int, mask_set: str | None, layout: str | None = None
) -> Dataset:
    """Divide the files of a data set into training and test images; for the arguments see `open_dataset`."""
    masks = _select_masks(name, files, mask_set)
    holdout = _resolve_holdout(name, files, masks, holdout)
    images, labels = files.images, files.labels
    mask_of = {} if masks is None else dict(match_masks(images, masks))
    if isinstance(holdout, str) and holdout in files.splits:
        test_rows = files.splits[holdout]
        test = [int(i) for i in test_rows if int(i) in mask_of]
        train = np.setdiff1d(files.splits.get("train", np.arange(len(images))), test_rows)
    else:
        stems = [strip_suffix(name) for name in images.names]
        group_of = _group_near_duplicates(stems, files.near_duplicates) if masks is not None else []
        test = list(mask_of) if isinstance(holdout, str) else _choose_test_rows(list(mask_of), group_of, holdout)
        test_groups = set() if holdout == "none" else {group_of[i] for i in test}
        train_rows = (i for i in range(len(images)) if not (test_groups and group_of[i] in test_groups))
        train = np.array(list(train_rows), np.int64)
    if not len(train):
        raise DataError(
            f"{name}: no training images are left: {len(test)} of {format_count(len(images), 'image')} held "
            "out, and the rest, if "
            'any, are near-duplicates of them. Reduce holdout, or use holdout="none" to train on all images.'
        )

    def make_split(rows: np.ndarray) -> Split:
        split_masks = None if masks is None else masks.subset([mask_of[int(i)] for i in rows if int(i) in mask_of])
        split_labels = None if labels is None else labels[rows]
        return Split(images.subset(rows), split_masks, split_labels, _select_videos(files, rows))

    return Dataset(
        name,
        images if len(train) == len(images) else images.subset(train),
        images.subset(test) if test else None,
        masks.subset([mask_of[i] for i in test]) if test and masks is not None else None,
        layout,
        None if labels is None else labels[train],
        files.class_names,
        {split: make_split(rows) for split, rows in files.splits.items()},
        files.notes,
    )


def _select_masks(name: str, files: DatasetFiles, mask_set: str | None) -> Source | None:
    if mask_set is None:
        return next(iter(files.masks.values()), None)
    if mask_set not in files.masks:
        available = ", ".join(files.masks) or "none"
        raise ConfigError(f"mask_set={mask_set!r}: {name} has these mask sets: {available}. Choose one, or omit it.")
    return files.masks[mask_set]


def _resolve_holdout(name: str, files: DatasetFiles, masks: Source | None, holdout: str | int) -> str | int:
    """Check `holdout` and replace "auto" by its meaning."""
    splits = files.splits
    is_count = isinstance(holdout, int) and not isinstance(holdout, bool) and holdout >= 1
    if not (is_count or (isinstance(holdout, str) and holdout in ("auto", "masked", "none", *splits))):
        split_names = f", a split ({', '.join(splits)})" if splits else ""
        raise ConfigError(
            f'holdout={holdout!r}: use "auto", "masked", "none"{split_names} or a number of images, 1 or more.'
        )
    if holdout == "auto" and (official := next((s for s in AUTO_SPLITS if s in splits), None)):
        return official
    if masks is None:
        if holdout not in ("auto", "none", *splits):
            raise ConfigError(f'holdout={holdout!r}, but {name} has no masks. Add a folder masks/, or use "auto".')
        return "none" if holdout == "auto" else holdout
    if holdout == "auto":
        if 2 * len(masks) <= len(files.images):
            return "masked"
        return max(1, min(AUTO_HOLDOUT_MAX, round(AUTO_HOLDOUT_FRACTION * len(masks))))
    return holdout


def _select_videos(files: DatasetFiles, rows: np.ndarray) -> Mapping[str, np.ndarray] | None:
    """Return the videos with frames in `rows`, as positions within `rows`."""
    if files.videos is None:
        return None
    position = {int(row): i for i, row in enumerate(rows)}
    videos = {
        name: [position[int(row)] for row in frames if int(row) in position] for name, frames in files.videos.items()
    }
    return {name: np.array(frames, np.int64) for name, frames in videos.items() if frames}


def _choose_test_rows(labelled: Sequence[int], group_of: Sequence[str], count: int) -> list[int]:
    """Choose whole groups in the order of their hash, up to `count` images."""
    if count > len(labelled):
        raise ConfigError(
            f"holdout={count}, but only {format_count(len(labelled), 'image')} with a mask. Reduce holdout."
        )
    members: dict[str, list[int]] = {}
    for i in labelled:
        members.setdefault(group_of[i], []).append(i)
    chosen: list[int] = []
    for group in sorted(members, key=lambda g: hashlib.sha256(g.encode("utf-8", "surrogateescape")).digest()):
        if len(chosen) + len(members[group]) <= count:
            chosen += members[group]
    if not chosen:
        raise DataError(f"holdout={count}: each labelled image has more near-duplicates than that. Increase holdout.")
    return sorted(chosen)


def _group_near_duplicates(stems: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Name the group of each stem: the first, in sorted order, of all its direct and indirect near-duplicates."""
    parent = {stem: stem for stem in stems}

    def find_root(stem: str) -> str:
        while parent[stem] != stem:
            stem = parent[stem]
        return stem

    for a, b in pairs:
        low, high = sorted((find_root(a), find_root(b)))
        parent[high] = low
    return [find_root(stem) for stem in stems]
