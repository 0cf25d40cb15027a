"""Which class each image is of: from folders, from a file, or from a list."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from factorkit.data.masks import strip_suffix
from factorkit.data.sources import natural_sort_key
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.safe_reading import read_json

NAME_COLUMNS = ("name", "file", "filename", "path", "image", "image_id", "id")
CLASS_COLUMNS = ("class", "label", "category", "class_name")
NAMED = 3  # how many examples a message names


class Classes(NamedTuple):
    """Labels of images.

    Attributes:
        labels: int64 [N], an index into `names`; -1 for an image without a class.
        names: of the classes, sorted (numbers as numbers), each of at least one image.
    """

    labels: np.ndarray
    names: list[str]


def read_classes(spec: Any, names: Sequence[str], *, positional: bool = False, known: Classes | None = None) -> Classes:
    """The class of each image.

    Args:
        spec: one of
            "folders": the folder an image lies in, counted from the first folder at which the paths part;
            a .csv or .tsv with a column of names (name, file, path ...) and one of classes (class, label ...), or
            without a header of those names its first two columns; a .json object of names to classes;
            a mapping of names to classes; or, for arrays, a list, array or tensor with one class for each image of the
            whole data set, before any were held out;
            True or "auto": what the data set's own layout says, else "folders".
        names: of the images, as a `Source` has them.
        positional: whether those names are mere positions, as in a `Source`.
        known: what the layout says of just these images.

    A file names images by path, with or without suffix, or by the last part of it where that is unique. An empty class
    means that an image has none.

    Raises:
        ConfigError: a spec that is none of these, or needs what the data have not.
        DataError: a file that cannot be read, images it does not name, or fewer than two classes.
    """
    if spec is True or (isinstance(spec, str) and spec == "auto"):
        if known is not None:
            return _numbered([known.names[i] if i >= 0 else "" for i in known.labels], "the data set")
        spec = "folders"
    if isinstance(spec, str) and spec == "folders":
        return _numbered(_folders(names, positional), "the folders")
    if isinstance(spec, (str, os.PathLike)):
        path = Path(spec).expanduser()
        return _numbered(_looked_up(_read_table(path), names, str(path)), str(path))
    if isinstance(spec, Mapping):
        return _numbered(_looked_up({str(k): _word(v) for k, v in spec.items()}, names, "classes="), "classes=")
    if isinstance(spec, (Sequence, np.ndarray, torch.Tensor)):
        return _numbered(_by_position(spec, names, positional), "classes=")
    raise ConfigError(
        f'classes={spec!r}: give "folders", "auto", a .csv, .tsv or .json file, a mapping of names to classes, or a '
        "list with one class for each image"
    )


def _numbered(found: Sequence[str], where: str) -> Classes:
    names = sorted({name for name in found if name}, key=natural_sort_key)
    if len(names) < 2:
        listed = f"only {names[0]!r}" if names else "none"
        raise DataError(f"{where}: {listed} is there as a class of {len(found)} images; two or more make sense")
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    return Classes(np.array([number[name] for name in found], np.int64), names)


def _folders(names: Sequence[str], positional: bool) -> list[str]:
    parents = [PurePosixPath(name).parent.parts for name in names]
    loose = [name for name, parts in zip(names, parents, strict=True) if not parts]
    if positional or loose:
        what = "the images have positions, no folders" if positional else f"{_some(loose)} lie in no folder of a class"
        raise ConfigError(f'classes="folders", but {what}. Give a .csv of names and classes, or one folder a class')
    shared = len(os.path.commonprefix(parents))
    if all(len(parts) == shared for parts in parents):
        return [parts[-1] for parts in parents]
    short = [name for name, parts in zip(names, parents, strict=True) if len(parts) == shared]
    if short:
        raise ConfigError(f'classes="folders", but {_some(short)} lie beside the folders of the others. Move them')
    return [parts[shared] for parts in parents]


def _read_table(path: Path) -> dict[str, str]:
    try:
        if path.suffix.lower() == ".json":
            table = read_json(path)
            if not isinstance(table, dict):
                raise DataError(f"{path}: holds {type(table).__name__}. Give an object of image names to classes.")
            return {name: _word(value) for name, value in table.items()}
        if path.suffix.lower() not in (".csv", ".tsv"):
            raise ConfigError(f"classes={str(path)!r}: give a .csv, .tsv or .json file, or 'folders' or 'auto'")
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",") if row]
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        if isinstance(error, (DataError, ConfigError)):
            raise
        raise DataError(f"{path}: cannot be read: {error}. Give a .csv or .json of names and classes.") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    name_at = next((header.index(c) for c in NAME_COLUMNS if c in header), None)
    class_at = next((header.index(c) for c in CLASS_COLUMNS if c in header), None)
    if name_at is None or class_at is None:
        name_at, class_at = 0, 1
    else:
        rows = rows[1:]
    named: dict[str, str] = {}
    for row in rows:
        if len(row) <= max(name_at, class_at):
            raise DataError(f"{path}: the row {row} has no class. Give each row a name and a class.")
        name, word = row[name_at].strip(), row[class_at].strip()
        if named.setdefault(name, word) != word:
            raise DataError(f"{path}: {name} is of two classes, {named[name]!r} and {word!r}. Keep one of them.")
    return named


def _looked_up(table: Mapping[str, str], names: Sequence[str], where: str) -> list[str]:
    by_stem: dict[str, str] = {}
    for name, word in table.items():
        if by_stem.setdefault(strip_suffix(name), word) != word:
            by_stem[strip_suffix(name)] = "\0"  # a.jpg and a.png of two classes: the stem tells nothing
    ends = [PurePosixPath(name).name for name in names]
    unique = {end for end in ends if ends.count(end) == 1} if len(set(ends)) < len(ends) else set(ends)

    def find(name: str, end: str) -> str | None:
        keys = [name, strip_suffix(name)] + ([end, strip_suffix(end)] if end in unique else [])
        for key in keys:
            if key in table:
                return table[key]
            if by_stem.get(key, "\0") != "\0":
                return by_stem[key]
        return None

    found = [find(name, end) for name, end in zip(names, ends, strict=True)]
    missing = [name for name, word in zip(names, found, strict=True) if word is None]
    if missing:
        raise DataError(
            f"{where}: {_some(missing)} of {len(names)} images are not named there, which names {_some(list(table))}. "
            "Add them, with an empty class if they have none."
        )
    return [word for word in found if word is not None]


def _by_position(spec: Any, names: Sequence[str], positional: bool) -> list[str]:
    if not positional:
        raise ConfigError(
            "a list of classes goes with images in an array or a list; for files give a .csv or a mapping"
        )
    words = [_word(value) for value in (spec.tolist() if hasattr(spec, "tolist") else spec)]
    places = [int(name) for name in names]  # held-out images leave gaps
    if max(places) >= len(words):
        raise DataError(f"classes= has {len(words)} entries, but there is an image {max(places)}. Give one for each.")
    return [words[place] for place in places]


def _word(value: Any) -> str:
    return "" if value is None or (not isinstance(value, str) and value == -1) else str(value).strip()


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})"
