"""Which images are trained on and which are scored: official splits, or a part held out by a hash of the names."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from factorkit.data.layouts import Layout
from factorkit.data.masks import match_masks, stem
from factorkit.data.sources import Source, is_image, shown
from factorkit.utils.errors import ConfigError, DataError

AUTO_SHARE, AUTO_MOST = 0.2, 200  # how many labelled images "auto" holds out where most images have masks
AUTO_SPLITS = ("test", "val")  # the first that a layout has is what "auto" scores on


@dataclass(frozen=True)
class Split:
    """One part of a data set, as its authors or its users divide it.

    Attributes:
        images: of this part.
        masks: of all of them or of some, matched by name; None where there are none.
        labels: the class of each image, int64 [N], -1 where it has none; None where the set has no classes.
        clips: of videos, the rows of `images` in order, by name.
    """

    images: Source
    masks: Source | None = None
    labels: np.ndarray | None = None
    clips: Mapping[str, np.ndarray] | None = None


@dataclass(frozen=True)
class Dataset:
    """Images to train on, and labelled ones to score on.

    Attributes:
        name: of the folder or file.
        train: the images used for training; their masks, if any, are never shown to it.
        test_images: labelled images, None where there are no masks. Not in `train`, unless `holdout` was "none".
        test_masks: one for each of `test_images`, for `load_labelled`.
        layout: which of `factorkit.data.layouts` it is, by name; None for plain images.
        labels: the class of each image of `train`, int64 [N], -1 where it has none; None where nothing says it.
        class_names: one for each class; None with `labels`.
        splits: every split of an official layout by name, those that are not used here too.
        notes: what a user should know about how it was read, a sentence each.
        nesting: where the masks are labels within labels, how many classes each level has, the coarsest first.
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


def divide(name: str, layout: Layout, holdout: str | int, mask_set: str | None, known: str | None = None) -> Dataset:
    """Split what a reader found; the arguments are those of `open_dataset`, and the layout's name."""
    masks = _masks(name, layout, mask_set)
    holdout = _holdout(name, layout, masks, holdout)
    images, labels = layout.images, layout.labels
    mask_of = {} if masks is None else dict(match_masks(images, masks))
    if isinstance(holdout, str) and holdout in layout.splits:
        held_out = layout.splits[holdout]
        test = [int(i) for i in held_out if int(i) in mask_of]
        train = np.setdiff1d(layout.splits.get("train", np.arange(len(images))), held_out)
    else:
        group_of = _groups([stem(n) for n in images.names], layout.pairs) if masks is not None else []
        test = list(mask_of) if isinstance(holdout, str) else _choose(list(mask_of), group_of, holdout)
        gone = set() if holdout == "none" else {group_of[i] for i in test}
        train = np.array([i for i in range(len(images)) if not (gone and group_of[i] in gone)], np.int64)
    if not len(train):
        raise DataError(
            f"{name}: nothing is left to train on, {len(test)} of {len(images)} images are held out and the others, if "
            'any, are their near-duplicates. Set holdout to fewer, or to "none" to train on all of them.'
        )

    def part(rows: Sequence[int] | np.ndarray) -> Split:
        stored = None if masks is None else masks.subset([mask_of[int(i)] for i in rows if int(i) in mask_of])
        return Split(images.subset(rows), stored, None if labels is None else labels[rows], _clips(layout, rows))

    return Dataset(
        name,
        images if len(train) == len(images) else images.subset(train),
        images.subset(test) if test else None,
        masks.subset([mask_of[i] for i in test]) if test and masks is not None else None,
        known,
        None if labels is None else labels[train],
        layout.class_names,
        {split: part(rows) for split, rows in layout.splits.items()},
        layout.notes,
    )


def _masks(name: str, layout: Layout, mask_set: str | None) -> Source | None:
    if mask_set is None:
        return next(iter(layout.masks.values()), None)
    if mask_set not in layout.masks:
        there = ", ".join(layout.masks) or "none"
        raise ConfigError(
            f"mask_set={mask_set!r}: the sets of masks of {name} are: {there}. Name one of them, or none."
        )
    return layout.masks[mask_set]


def _holdout(name: str, layout: Layout, masks: Source | None, holdout: str | int) -> str | int:
    """What the user asked for, with "auto" decided."""
    splits = layout.splits
    count = isinstance(holdout, int) and not isinstance(holdout, bool) and holdout >= 1
    if not (count or (isinstance(holdout, str) and holdout in ("auto", "masked", "none", *splits))):
        named = f", a split ({', '.join(splits)})" if splits else ""
        raise ConfigError(
            f'holdout={holdout!r}: give "auto", "masked", "none"{named} or a number of images, 1 or more.'
        )
    if holdout == "auto" and (official := next((s for s in AUTO_SPLITS if s in splits), None)):
        return official
    if masks is None:
        if holdout not in ("auto", "none", *splits):
            raise ConfigError(f'holdout={holdout!r}, but {name} has no masks. Put them in masks/, or use "auto".')
        return "none" if holdout == "auto" else holdout
    if holdout == "auto":
        labelled = len(masks)
        return "masked" if 2 * labelled <= len(layout.images) else max(1, min(AUTO_MOST, round(AUTO_SHARE * labelled)))
    return holdout


def _clips(layout: Layout, rows: Sequence[int] | np.ndarray) -> Mapping[str, np.ndarray] | None:
    """The layout's clips in the rows of one split; those that are not in it are left out."""
    if layout.clips is None:
        return None
    place = {int(row): i for i, row in enumerate(rows)}
    found = {clip: [place[int(row)] for row in frames if int(row) in place] for clip, frames in layout.clips.items()}
    return {clip: np.array(frames, np.int64) for clip, frames in found.items() if frames}


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
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(s) for s in stems]


PAIRS_FILE = "near_duplicates.txt"


def parse_pairs(text: bytes, images: Source, where: str) -> list[tuple[str, str]]:
    """The pairs listed in a text, as the stems of these images.

    A line has two names, with or without the suffix of an image, and a tab between them where they hold spaces; what
    follows a `#` is a comment. A pair that names no image is left out.

    Args:
        text: in UTF-8.
        images: what the names are looked for in.
        where: what messages call the text.

    Warns:
        UserWarning: of names that are of no image.

    Raises:
        DataError: a line of more or fewer names, no text, or none of its names is of an image.
    """
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: no text in UTF-8: {error}. It lists two names a line.") from error
    stems = {stem(name) for name in images.names}
    names, strangers, pairs = 0, [], []
    for number, line in enumerate(lines, start=1):
        listed = line.split("#")[0].strip()
        words = [word.strip() for word in listed.split("\t") if word.strip()] if "\t" in listed else listed.split()
        if len(words) not in (0, 2):
            raise DataError(
                f"{where}, line {number}: expected two names (put a tab between them where they hold spaces), found "
                f"'{shown(line.strip())}'."
            )
        found = [word if word in stems or not is_image(word) else stem(word) for word in words]
        names += len(words)
        strangers += [word for word, key in zip(words, found, strict=True) if key not in stems]
        if words and stems.issuperset(found):
            pairs.append((found[0], found[1]))
    if strangers:
        said = (
            f"{where}: {len(strangers)} of its {names} names are of no image, the first is {shown(strangers[0])}; "
            f"images are named like {shown(images.names[0])}."
        )
        if len(strangers) == names:
            raise DataError(f"{said} Write the names as they are, or take the file out.")
        warnings.warn(f"{said} The twins of those that are misspelt may be trained on.", UserWarning, stacklevel=2)
    return pairs
