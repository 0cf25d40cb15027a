"""The result of a data-set reader, and helpers that the readers share."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from factorkit.data.files import escape_name, wrap_os_errors
from factorkit.data.sources import Source, hash_values
from factorkit.utils.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")  # names that all readers use for the usual splits
FETCH_AGAIN = "Download this file again, or remove it."


@dataclass(frozen=True)
class DatasetFiles:
    """The contents of a data set, before it is divided into training and test images.

    Attributes:
        images: images of all splits.
        masks: sets of masks by name, the default one first; each has masks of some or all images, matched by name.
        splits: rows of `images` by split name; empty if there are no official splits.
        labels: class of each image, int64 [N], -1 without a class; None if the data set has no classes.
        class_names: name of each class.
        videos: for each video its rows of `images`, in order. A video may have frames in several splits.
        near_duplicates: pairs of names, without suffix, of images that show the same thing.
        notes: sentences for the user on how the data set was read.
    """

    images: Source
    masks: Mapping[str, Source] = field(default_factory=dict)
    splits: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    videos: Mapping[str, np.ndarray] | None = None
    near_duplicates: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Reader:
    """A reader of one published data set in its original layout.

    Attributes:
        name: short name, shown by `factorkit prepare --list`.
        title: full name.
        url: page of the authors.
        expects: expected files, one line each.
        splits, masks, labels: what the data set has, one sentence each; empty if it has none.
        read: returns the contents of the folder, file or object in which the data set was recognised (`SIGNS`); None if
            it is not this data set after all.
        extra: pip extra that the reader needs, if any.
    """

    name: str
    title: str
    url: str
    expects: str
    read: Callable[[Any], DatasetFiles | None]
    splits: str = ""
    masks: str = ""
    labels: str = ""
    extra: str = ""


class LabelSource(Source):
    """Masks computed from stored images.

    Args:
        source: the stored images.
        to_labels: converts stored values [H, W] or [H, W, C] to labels [H, W].
        valid_labels: all other labels are refused; None accepts any label.
        ignore_label: label of pixels that are not scored.
    """

    def __init__(
        self,
        source: Source,
        to_labels: Callable[[np.ndarray], np.ndarray] = lambda values: values,
        *,
        valid_labels: Iterable[int] | None = None,
        ignore_label: int | None = None,
    ) -> None:
        self.source, self.to_labels, self.ignore_label = source, to_labels, ignore_label
        self.names = source.names
        extra = () if ignore_label is None else (ignore_label,)
        self.valid_labels = None if valid_labels is None else np.array(sorted({*valid_labels, *extra}))

    def decode(self, index: int) -> Image.Image:
        """Return the labels of a mask as an image; raise DataError for labels that the data set has not."""
        image, name = self.source.decode(index), escape_name(self.names[index])
        try:
            values = np.asarray(image.convert("L") if image.mode == "1" else image)
        except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            raise DataError(f"{name}: cannot be decoded: {error}. Replace the file, or remove it.") from error
        labels = self.to_labels(values)
        if labels.ndim != 2:
            raise DataError(f"{name}: a colour image (mode {image.mode}), expected a mask of labels. {FETCH_AGAIN}")
        if self.valid_labels is not None:
            invalid = np.setdiff1d(labels, self.valid_labels)
            if invalid.size:
                raise DataError(
                    f"{name}: label {', '.join(map(str, invalid[:5]))} is not a label of this data set "
                    f"({self.valid_labels[0]} to {self.valid_labels[-1]}). {FETCH_AGAIN}"
                )
        return labels_to_image(labels)

    def fingerprint(self) -> str:
        """Return a hash of the images of labels."""
        return hash_values("labels", self.source.fingerprint())


def labels_to_image(labels: np.ndarray) -> Image.Image:
    """Convert labels [H, W] to a grey image of 8 bits, or of 32 bits if 8 are not enough."""
    fits = labels.dtype == bool or (labels.min(initial=0) >= 0 and labels.max(initial=0) <= 255)
    return Image.fromarray(labels.astype(np.uint8 if fits else np.int32))


def take_first_channel(values: np.ndarray) -> np.ndarray:
    """Reduce [H, W] or [H, W, C] to [H, W]."""
    return values if values.ndim == 2 else values[..., 0]


def read_table(path: Path, columns: int | None = None) -> list[list[str]]:
    """Read the words of each non-empty line of a text file.

    Raises:
        DataError: the file cannot be read, is not text, or a line does not have `columns` words.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}. {FETCH_AGAIN}") from error
    rows = [line.split() for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if columns is not None and len(row) != columns:
            raise DataError(f"{path}, line {number}: expected {columns} words, got '{' '.join(row)}'. {FETCH_AGAIN}")
    return rows


def filter_existing(root: Path, names: Iterable[str]) -> list[str]:
    """Return those names that are files below `root`; each folder is listed only once."""
    listings: dict[str, set[str]] = {}
    existing = []
    for name in names:
        parent, _, base = name.rpartition("/")
        if parent not in listings:
            folder = root / parent
            with wrap_os_errors(folder, "so its files cannot be listed. Check its permissions."):
                listings[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
        if base in listings[parent]:
            existing.append(name)
    return existing


def require_files(root: Path, names: Sequence[str], what: str) -> None:
    """Raise DataError if any of these files is missing below `root`."""
    existing = set(filter_existing(root, names))
    missing = [name for name in names if name not in existing]
    if missing:
        raise DataError(
            f"{root}: {len(missing)} of {len(names)} {what} missing, the first is {escape_name(missing[0])}. "
            "Unpack the authors' archive again."
        )


def replace_suffix(name: str, suffix: str) -> str:
    """Return the name with another suffix."""
    return PurePosixPath(name).with_suffix(suffix).as_posix()


def find_rows(names: Sequence[str], wanted: Iterable[str], where: str) -> np.ndarray:
    """Return the positions of `wanted` in `names`, int64.

    Raises:
        DataError: a name is missing; `where` is the file that lists it.
    """
    row_of = {name: i for i, name in enumerate(names)}
    try:
        return np.array([row_of[name] for name in wanted], np.int64)
    except KeyError as error:
        raise DataError(f"{where} lists {escape_name(error.args[0])}, which is missing. {FETCH_AGAIN}") from error


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a module that a pip extra of this package installs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {module.split('.')[0]}: pip install 'factorkit[{extra}]'") from error
