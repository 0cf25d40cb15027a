"""Classes of images: from folders, a file, a mapping or a list."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from factorkit.data.files import fold_name, fold_stem, format_examples, natural_sort_key, strip_suffix
from factorkit.utils.errors import ConfigError, DataError, format_count
from factorkit.utils.files import read_json

NAME_COLUMNS = ("name", "file", "filename", "path", "image", "image_id", "id")
CLASS_COLUMNS = ("class", "label", "category", "class_name")
AMBIGUOUS = "\0"  # marks names that belong to two classes: without suffix, or in another case


class Classes(NamedTuple):
    """Classes of images.

    Attributes:
        labels: int64 [N], an index into `names`; -1 for an image without a class.
        names: sorted class names (numbers by value), each of at least one image.
    """

    labels: np.ndarray
    names: list[str]


def read_classes(
    spec: Any, names: Sequence[str], *, positional: bool = False, dataset_classes: Classes | None = None
) -> Classes:
    """Find the class of each image.

    A file or mapping names images by path, with or without suffix, or by the last part of the path if that is unique
    (in either of them), whatever the case and the Unicode form.
    An empty class means that an image has none.

    Args:
        spec: one of
            "folders": the folder of each image, below the deepest folder common to all images;
            a .csv or .tsv with a column of names (name, file, path ...) and one of classes (class, label ...); without
            a header its first two columns; a .json object of names to classes;
            a mapping of names to classes; or, for arrays, a list, array or tensor with one class for each image of the
            whole data set, before any were held out;
            True or "auto": the classes of the data set, else "folders".
        names: names of the images, as in a `Source`.
        positional: whether the names are mere positions, as in a `Source`.
        dataset_classes: classes of these images according to the data set.

    Raises:
        ConfigError: invalid `spec`, or one that does not suit the images.
        DataError: the file cannot be read, lacks images, or there are fewer than two classes.
    """
    if spec is True or (isinstance(spec, str) and spec == "auto"):
        if dataset_classes is not None:
            names_of = [dataset_classes.names[i] if i >= 0 else "" for i in dataset_classes.labels]
            return _number_classes(names_of, "the data set")
        spec = "folders"
    if isinstance(spec, str) and spec == "folders":
        return _number_classes(_classes_of_folders(names, positional), "the folders")
    if isinstance(spec, (str, os.PathLike)):
        path = Path(spec).expanduser()
        return _number_classes(_look_up(_read_table(path), names, str(path)), str(path))
    if isinstance(spec, Mapping):
        table = {str(name): _to_class_name(value) for name, value in spec.items()}
        return _number_classes(_look_up(table, names, "classes="), "classes=")
    if isinstance(spec, (Sequence, np.ndarray, torch.Tensor)):
        return _number_classes(_classes_by_position(spec, names, positional), "classes=")
    raise ConfigError(
        f'classes={spec!r}: give "folders", "auto", a .csv, .tsv or .json file, a mapping of names to classes, or a '
        "list with one class for each image"
    )


def _number_classes(class_of: Sequence[str], where: str) -> Classes:
    names = sorted({name for name in class_of if name}, key=natural_sort_key)
    if len(names) < 2:
        available = f"only the class {names[0]!r}" if names else "no classes"
        raise DataError(
            f"{where}: {available} for {format_count(len(class_of), 'image')}; at least two classes are needed"
        )
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    return Classes(np.array([number[name] for name in class_of], np.int64), names)


def _classes_of_folders(names: Sequence[str], positional: bool) -> list[str]:
    parents = [PurePosixPath(name).parent.parts for name in names]
    loose = [name for name, parts in zip(names, parents, strict=True) if not parts]
    if positional or loose:
        problem = "images of an array have no folders" if positional else f"{_summarize(loose)} are in no class folder"
        raise ConfigError(f'classes="folders", but {problem}. Give a .csv of names and classes, or one folder a class')
    levels = zip(*parents, strict=False)
    depth = next((i for i, parts in enumerate(levels) if len(set(parts)) > 1), min(map(len, parents)))
    if all(len(parts) == depth for parts in parents):
        return [parts[-1] for parts in parents]
    shallow = [name for name, parts in zip(names, parents, strict=True) if len(parts) == depth]
    if shallow:
        raise ConfigError(
            f'classes="folders", but {_summarize(shallow)} are beside the folders of the others. Move them'
        )
    return [parts[depth] for parts in parents]


def _read_table(path: Path) -> dict[str, str]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            table = read_json(path)
            if not isinstance(table, dict):
                raise DataError(f"{path}: contains {type(table).__name__}. Give an object of image names to classes.")
            return {name: _to_class_name(value) for name, value in table.items()}
        if suffix not in (".csv", ".tsv"):
            raise ConfigError(f"classes={str(path)!r}: give a .csv, .tsv or .json file, or 'folders' or 'auto'")
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",") if row]
    except (DataError, ConfigError):
        raise
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}. Give a .csv or .json of names and classes.") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    name_column = next((header.index(c) for c in NAME_COLUMNS if c in header), None)
    class_column = next((header.index(c) for c in CLASS_COLUMNS if c in header), None)
    if name_column is None or class_column is None:
        name_column, class_column = 0, 1
    else:
        rows = rows[1:]
    class_of: dict[str, str] = {}
    for row in rows:
        if len(row) <= max(name_column, class_column):
            raise DataError(f"{path}: the row {row} has no class. Give each row a name and a class.")
        name, value = row[name_column].strip(), row[class_column].strip()
        if class_of.setdefault(name, value) != value:
            raise DataError(f"{path}: {name} has two classes, {class_of[name]!r} and {value!r}. Keep one of them.")
    return class_of


def _look_up(table: Mapping[str, str], names: Sequence[str], where: str) -> list[str]:
    by_key: dict[str, str] = {}
    for name, value in table.items():
        for key in {strip_suffix(name), fold_name(name), fold_stem(name)}:
            if by_key.setdefault(key, value) != value:
                by_key[key] = AMBIGUOUS
    by_last_part: dict[str, str] = {}  # for images without a folder, which the table may name with one
    for name, value in table.items():
        if by_last_part.setdefault(fold_stem(name).rpartition("/")[2], value) != value:
            by_last_part[fold_stem(name).rpartition("/")[2]] = AMBIGUOUS
    last_parts = [PurePosixPath(name).name for name in names]
    unique = set(last_parts)
    if len(unique) < len(last_parts):
        unique = {part for part in unique if last_parts.count(part) == 1}

    def find(name: str, last_part: str) -> str | None:
        for key in (name, last_part) if last_part in unique else (name,):
            for candidate in (key, strip_suffix(key), fold_name(key), fold_stem(key)):
                if candidate in table:
                    return table[candidate]
                if by_key.get(candidate, AMBIGUOUS) != AMBIGUOUS:
                    return by_key[candidate]
        value = by_last_part.get(fold_stem(name), AMBIGUOUS)
        return None if value == AMBIGUOUS else value

    class_of = [find(name, last_part) for name, last_part in zip(names, last_parts, strict=True)]
    missing = [name for name, value in zip(names, class_of, strict=True) if value is None]
    if missing:
        raise DataError(
            f"{where}: {_summarize(missing)} of {format_count(len(names), 'image')} missing from its names: "
            f"{_summarize(list(table))}. Add them, with an empty class if they have none."
        )
    return [value for value in class_of if value is not None]


def _classes_by_position(spec: Any, names: Sequence[str], positional: bool) -> list[str]:
    if not positional:
        raise ConfigError(
            "a list of classes is for images in an array or a list; for files give a .csv or a mapping of names"
        )
    values = [_to_class_name(value) for value in (spec.tolist() if hasattr(spec, "tolist") else spec)]
    positions = [int(name) for name in names]  # with gaps for held-out images
    if max(positions) >= len(values):
        raise DataError(
            f"classes= has {format_count(len(values), 'entry')}, but there is an image {max(positions)}. Give "
            "one for each."
        )
    return [values[position] for position in positions]


def _to_class_name(value: Any) -> str:
    return "" if value is None or (not isinstance(value, str) and value == -1) else str(value).strip()


def _summarize(names: Sequence[str]) -> str:
    return f"{len(names)} ({format_examples(names)})"
