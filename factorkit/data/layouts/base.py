"""What a reader of a data set answers, and what the readers share."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from factorkit.data.sources import Source, digest, said, shown
from factorkit.utils.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")  # the names every reader gives to the splits that have a customary use


@dataclass(frozen=True)
class Layout:
    """What a reader found.

    Attributes:
        images: all of them, of every split.
        masks: sets of masks by name, the customary one first; each of all images or of some, matched by name.
        splits: rows of `images` by name of the split; empty where the authors divide nothing.
        labels: the class of each image, int64 [N], -1 where it has none; None where the set has no classes.
        class_names: one for each class.
        clips: of videos, the rows of `images` in order, by name; may span splits' borders, never a frame.
        pairs: names without suffix of images that show the same thing.
        notes: what a user should know about how it was read, a sentence each.
    """

    images: Source
    masks: Mapping[str, Source] = field(default_factory=dict)
    splits: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    clips: Mapping[str, np.ndarray] | None = None
    pairs: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Reader:
    """One data set in the layout its authors publish.

    Attributes:
        name: what it is called in `factorkit prepare --list`.
        title: the same in full.
        url: the authors' page.
        expects: what has to lie on the disk, a line each.
        splits, masks, labels: what they are, in a sentence; empty where there are none.
        read: the layout behind what a user gave, or None where it is something else.
        extra: the pip extra it needs, if any.
    """

    name: str
    title: str
    url: str
    expects: str
    read: Callable[[Any], Layout | None]
    splits: str = ""
    masks: str = ""
    labels: str = ""
    extra: str = ""


class Labels(Source):
    """Masks computed from stored ones: `to_labels` takes the stored values [H, W] or [H, W, C] to labels [H, W].

    Labels outside of `known` are refused, `ignore` is the label that is not scored.
    """

    def __init__(
        self,
        stored: Source,
        to_labels: Callable[[np.ndarray], np.ndarray] = lambda values: values,
        *,
        known: Iterable[int] | None = None,
        ignore: int | None = None,
    ) -> None:
        self.stored, self.to_labels, self.ignore = stored, to_labels, ignore
        self.names = stored.names
        self.known = None if known is None else np.array(sorted({*known, *(() if ignore is None else (ignore,))}))

    def decode(self, index: int) -> Image.Image:
        image, name = self.stored.decode(index), shown(self.names[index])
        try:
            values = np.asarray(image.convert("L") if image.mode == "1" else image)
        except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            raise DataError(f"{name}: cannot be decoded: {error}. Replace the file or take it out.") from error
        labels = self.to_labels(values)
        if labels.ndim != 2:
            raise DataError(f"{name}: a mask in colour (mode {image.mode}), where this data set has labels. {FETCH}")
        if self.known is not None:
            foreign = np.setdiff1d(labels, self.known)
            if foreign.size:
                raise DataError(
                    f"{name}: label {', '.join(map(str, foreign[:5]))} is none of this data set's "
                    f"({self.known[0]} to {self.known[-1]}). {FETCH}"
                )
        return as_image(labels)

    def fingerprint(self) -> str:
        return digest("labels", self.stored.fingerprint())


FETCH = "Fetch this file anew from the authors, or take it out."


def as_image(labels: np.ndarray) -> Image.Image:
    """Labels [H, W] as a grey picture: of 8 bits where they fit, else of 32."""
    fits = labels.dtype == bool or (labels.min(initial=0) >= 0 and labels.max(initial=0) <= 255)
    return Image.fromarray(labels.astype(np.uint8 if fits else np.int32))


def first_channel(values: np.ndarray) -> np.ndarray:
    """[H, W] of [H, W] or [H, W, C]."""
    return values if values.ndim == 2 else values[..., 0]


def folder(data: Any, inside: Sequence[str] = ("",), *, holding: Sequence[str]) -> Path | None:
    """The folder a user gave, or the one of `inside` it, that holds all the files and folders of `holding`."""
    if not isinstance(data, (str, Path)):
        return None
    root = Path(data).expanduser()
    if not root.is_dir():
        return None
    places = (root / place for place in inside)
    found = next((place for place in places if all((place / name).exists() for name in holding)), None)
    return found.resolve() if found else None


def lines(path: Path, columns: int | None = None) -> list[list[str]]:
    """The words of each line that has any.

    Raises:
        DataError: the file cannot be read, is no text, or a line has another number of words than `columns`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}. {FETCH}") from error
    found = [line.split() for line in text.splitlines() if line.strip()]
    for number, words in enumerate(found, start=1):
        if columns is not None and len(words) != columns:
            raise DataError(f"{path}, line {number}: expected {columns} words, found '{' '.join(words)}'. {FETCH}")
    return found


def existing(root: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that are files below `root`; each folder is listed once."""
    listed: dict[str, set[str]] = {}
    found = []
    for name in names:
        parent, _, base = name.rpartition("/")
        if parent not in listed:
            place = root / parent
            with said(place, "so its files cannot be listed. Mend its permissions."):
                listed[parent] = set(os.listdir(place)) if place.is_dir() else set()
        if base in listed[parent]:
            found.append(name)
    return found


def require(root: Path, names: Sequence[str], what: str) -> None:
    """Raises DataError where one of these files is not there, saying how many."""
    there = set(existing(root, names))
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{root}: {len(missing)} of {len(names)} {what} are not there, the first is {shown(missing[0])}. "
            "Unpack the authors' archive again."
        )


def with_suffix(name: str, suffix: str) -> str:
    """A name with another suffix."""
    return PurePosixPath(name).with_suffix(suffix).as_posix()


def rows_of(names: Sequence[str], wanted: Iterable[str], where: str) -> np.ndarray:
    """Positions of `wanted` in `names`, int64.

    Raises:
        DataError: one of them is not there; `where` says which file wanted it.
    """
    row = {name: i for i, name in enumerate(names)}
    try:
        return np.array([row[name] for name in wanted], np.int64)
    except KeyError as error:
        raise DataError(f"{where} names {shown(error.args[0])}, which is not there. {FETCH}") from error


def needs(module: str, extra: str, what: str) -> Any:
    """The module of that name, which an extra of the package brings.

    Raises:
        ConfigError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{what} needs {module.split('.')[0]}: pip install 'factorkit[{extra}]'") from error
