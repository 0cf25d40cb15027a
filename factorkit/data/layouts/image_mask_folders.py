"""Where images and masks lie in a folder or .zip: the one place that separates them."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from factorkit.data.archives import ZipSource
from factorkit.data.files import (
    escape_name,
    fold_name,
    fold_stem,
    format_examples,
    is_image,
    list_image_names,
    strip_suffix,
)
from factorkit.data.layouts.base import DatasetFiles
from factorkit.data.masks import ignored_stem, image_stems
from factorkit.data.sources import FileSource, Source
from factorkit.utils.errors import DataError, format_count

IMAGE_FOLDERS = frozenset("image images img imgs img_dir jpegimages photo photos rgb".split())
MASK_FOLDERS = frozenset(
    "mask masks ann_dir annotations gt groundtruth ground_truth label labels labelids matte mattes seg segmentation "
    "segmentations silhouette silhouettes segmentationclass trimap trimaps".split()
)
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
MIN_SHARED_NAMES = 2  # images of a group that has masks of others
MAX_COMPARED_GROUPS = 64  # the largest ones
NUM_PROBED_IMAGES, PROBED_SIZE = 4, (256, 256)  # decoded to see whether a group are masks; JPEGs about so large
MAX_MASK_VALUES, MIN_MASK_SHARE = 8, 0.95  # masks: so many values make up so much of each image
MIN_SOFT_SHARE, MIN_SOFT_SIDE = 0.4, 0.01  # soft masks: so much is nearly black or white, and so much is each of them
PATH_WORDS = re.compile(r"[0-9]+|[A-Z]+(?![a-z])|[^\W\d_][^\W\d_A-Z]*")  # numbers, CAPITALS, words, camelCase
NEAR_DUPLICATES_FILE = "near_duplicates.txt"
MAX_NEAR_DUPLICATES_BYTES = 2**26  # limit for reading the file from a .zip, so that a zip bomb cannot fill the memory


class ImageFolders(NamedTuple):
    """The images of a folder or .zip.

    Attributes:
        images: all images.
        masks: masks of the foreground, matched by name; None if there are none.
        ignored: instant-ngp's masks of moving parts, `dynamic_mask_x.png` for x.jpg; None if there are none.
    """

    images: Source
    masks: Source | None = None
    ignored: Source | None = None


def find_image_and_mask_folders(data: Any) -> ImageFolders | None:
    """Return the images of a folder or .zip and their masks; None for anything else.

    Recognised are, at any depth and whatever the case: a folder of `IMAGE_FOLDERS` beside one of `MASK_FOLDERS` (also
    several such pairs, as in train/ and val/), a folder of masks whose names match the images beside it, and masks
    beside their images, named by one of `MASK_ENDINGS` or `MASK_BEGINNINGS`. What else lies there is left out with a
    warning.

    Raises:
        DataError: images that look like masks are found, but not where masks are expected.
    """
    source = _open(data)
    if source is None:
        return None
    source, ignored = _separate_ignored(source)
    pairs = _split_names(source.names)
    if pairs is None:
        refuse_unrecognised_masks(source)
        return ImageFolders(source, None, ignored)
    if len(set(source.names)) < len(source.names):
        name = escape_name(next(name for i, name in enumerate(source.names) if name in source.names[:i]))
        raise DataError(f"{name} and {name}: two images of one name, so masks cannot be matched to them. Rename one.")
    if outside := len(source) - len(pairs[0]) - len(pairs[1]):
        read = {*pairs[0].values(), *pairs[1].values()}
        names = [name for name in source.names if name not in read]
        warnings.warn(
            f"{format_count(len(pairs[0]), 'image')} with {format_count(len(pairs[1]), 'mask')} used; "
            f"left out {format_count(outside, 'image')} outside the folders of images and masks: "
            f"{format_examples(names)}",
            UserWarning,
            stacklevel=2,
        )
    return ImageFolders(_select(source, pairs[0]), _select(source, pairs[1]), ignored)


def read(data: Any) -> DatasetFiles | None:
    """Read a folder or .zip of images and, if it has them, their masks; None for anything else."""
    folders = find_image_and_mask_folders(data)
    if folders is None:
        return None
    images, masks, ignored = folders
    if ignored is not None:
        warnings.warn(
            f"left out {format_count(len(ignored), 'mask')} of moving parts ({format_examples(ignored.names)}): they "
            "are not the foreground, and segdiff ignores no pixels",
            UserWarning,
            stacklevel=2,
        )
    if masks is None:
        return DatasetFiles(images)
    where, text = _read_near_duplicates(data)
    pairs = parse_near_duplicates(text, images, where) if text is not None else []
    splits: dict[str, np.ndarray] = {}
    tops = [name.split("/", 1)[0].casefold() for name in images.names]
    if set(tops) <= set(SPLIT_FOLDERS) and len(set(tops)) > 1:
        for row, folder in enumerate(tops):
            splits.setdefault(SPLIT_FOLDERS[folder], []).append(row)  # type: ignore[arg-type, attr-defined]
        splits = {name: np.array(rows) for name, rows in splits.items()}
    return DatasetFiles(images, {"masks": masks}, splits, near_duplicates=pairs)


def _open(data: Any) -> FileSource | ZipSource | None:
    """Open a folder or .zip; None for anything else, and where opening it fails: `open_source` will say why."""
    if not isinstance(data, (str, os.PathLike)):
        return None
    path = Path(data).expanduser()
    if path.is_dir():
        path = path.resolve()
        names = list_image_names(path)
        return FileSource(path, names) if names else None
    if path.suffix.lower() != ".zip" or not zipfile.is_zipfile(path):  # resolve() would fail on a loop of links
        return None
    try:
        return ZipSource(path.resolve())
    except DataError:
        return None


def _separate_ignored(source: FileSource | ZipSource) -> tuple[FileSource | ZipSource, Source | None]:
    """Separate instant-ngp's masks of moving parts from all other images."""
    stems = {fold_stem(name) for name in source.names}
    ignored = {name: name for name in source.names if ignored_stem(name) in stems}
    if not ignored:
        return source, None
    return _select(source, {name: name for name in source.names if name not in ignored}), _select(source, ignored)


def _select(source: FileSource | ZipSource, named: dict[str, str]) -> FileSource | ZipSource:
    """Return the images of a source with other names, given as {new name: old name}."""
    row_of = {name: row for row, name in enumerate(source.names)}
    new_names = sorted(named)
    rows = [row_of[named[name]] for name in new_names]
    if isinstance(source, FileSource):
        files = [source.files[row] for row in rows]
        # the folder itself where there is one, so that the same images are the same data wherever they are opened
        shared = {file.removesuffix(name) for file, name in zip(files, new_names, strict=True)}
        if len(shared) == 1 and (folder := shared.pop()).endswith("/"):
            return FileSource(source.root / folder.rstrip("/"), new_names)
        return FileSource(source.root, files, new_names)
    return source.select(rows, new_names)


def _split_names(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]] | None:
    """Divide names into images and masks, as {name to match by: name}; None where there are no masks."""
    return _split_by_folders(names) or _split_by_mask_folder(names) or _split_by_endings(names)


def _split_by_folders(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]] | None:
    """Find folders of images beside folders of masks."""
    by_place: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    for name in names:
        parts = name.split("/")
        for depth, part in enumerate(parts[:-1]):
            kind = _folder_kind(part)
            if kind is not None:
                place = "/".join(parts[:depth])
                by_place.setdefault(place, ({}, {}))[kind].setdefault("/".join(parts[depth + 1 :]), name)
                break
    complete = {place: _strip_wrappers(*pair) for place, pair in by_place.items() if pair[0] and pair[1]}
    if not complete:
        return None
    if len(complete) == 1:
        return next(iter(complete.values()))
    shared = os.path.commonpath(list(complete)) if all(complete) else ""
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    for place, pair in complete.items():
        prefix = place[len(shared) :].lstrip("/")
        prefix = f"{prefix}/" if prefix else ""
        for merged, part_of in zip((images, masks), pair, strict=True):
            merged |= {prefix + key: name for key, name in part_of.items()}
    return images, masks


def _strip_wrappers(images: dict[str, str], masks: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Drop a folder that all images or all masks are in, as annotations/trimaps/, where no names match with it."""
    mask_stems = {stem for name in masks for stem in image_stems(name)}
    if any(fold_stem(name) in mask_stems for name in images):
        return images, masks
    images, masks = ({name[_prefix_length(names) :]: file for name, file in names.items()} for names in (images, masks))
    return images, masks


def _prefix_length(names: dict[str, str]) -> int:
    """Return the length of the folder, with its slash, that all names are in."""
    if not all("/" in name for name in names):
        return 0
    folder = os.path.commonpath([os.path.dirname(name) for name in names])
    return len(folder) + 1 if folder else 0


def _folder_kind(folder: str) -> int | None:
    """Return 0 for a folder of images, 1 for a folder of masks, None for any other."""
    key = folder.casefold()
    return 0 if key in IMAGE_FOLDERS else 1 if key in MASK_FOLDERS else None


def _split_by_mask_folder(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]] | None:
    """Find a folder of masks whose names are those of the images beside or above it."""
    masks: dict[str, dict[str, str]] = {}
    for name in names:
        parts = name.split("/")
        depth = next((i for i, part in enumerate(parts[:-1]) if _folder_kind(part) == 1), None)
        if depth is not None:
            masks.setdefault("/".join(parts[:depth]), {})["/".join(parts[depth + 1 :])] = name
    if len(masks) != 1:
        return None
    place, found = next(iter(masks.items()))
    prefix = f"{place}/" if place else ""
    taken = set(found.values())
    images: dict[str, str] = {}
    stems = {stem for name in found for stem in image_stems(name)}
    for name in names:
        if name in taken or not name.startswith(prefix):
            continue
        inside = name[len(prefix) :]
        key = next((k for k in (inside, inside.split("/", 1)[-1]) if fold_stem(k) in stems), None)
        images.setdefault(key or inside, name)
    matched = {fold_stem(name) for name in images} & stems
    return (images, found) if matched else None


def _split_by_endings(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]] | None:
    """Find masks beside their images: x.jpg and x_mask.png, or mask_x.png."""
    stems = {fold_stem(name) for name in names}
    masks = {name: name for name in names if any(stem in stems for stem in image_stems(name)[1:])}
    images = {name: name for name in names if name not in masks}
    return (images, masks) if masks and images else None


def refuse_unrecognised_masks(source: Source) -> None:
    """Raise DataError if a group of images looks like masks of the others: few values, and names alike.

    A group are the images with one word in their paths: a folder, a suffix, or a part of the name. Without the words
    that all of the group have, a mask's path is what its image's path has too. Trained on as images, masks would spoil
    a training without a word.
    """
    composed = (unicodedata.normalize("NFC", name) for name in source.names)
    words = [frozenset(map(fold_name, PATH_WORDS.findall(name))) for name in composed]
    has_few_values = functools.cache(functools.partial(_has_few_values, source))
    counts = Counter(word for of_name in words for word in of_name)
    shared = [word for word, count in counts.most_common() if MIN_SHARED_NAMES <= count < len(words)]
    for word in shared[:MAX_COMPARED_GROUPS]:
        rows = [row for row, of_name in enumerate(words) if word in of_name]
        if not all(has_few_values(row) for row in rows[:: len(rows) // NUM_PROBED_IMAGES or 1][:NUM_PROBED_IMAGES]):
            continue
        rest = [row for row, of_name in enumerate(words) if word not in of_name]
        common = frozenset.intersection(*(words[row] for row in rows))
        image_of = _find_images([words[row] - common for row in rows], words, rest)
        if len(image_of) >= MIN_SHARED_NAMES and 2 * len(image_of) >= len(rows):
            mask, image = (source.names[row] for row in (rows[min(image_of)], image_of[min(image_of)]))
            raise DataError(
                f"{format_count(len(rows), 'image')} in {escape_name(mask.rpartition('/')[0]) or '.'}/, such as "
                f"{escape_name(mask)}, look like masks of those in {escape_name(image.rpartition('/')[0]) or '.'}/, "
                f"such as {escape_name(image)}: few values and names alike. Name the folders images/ and masks/, or "
                "give the folder of images alone as data (and both as --images and --masks to evaluate)."
            )


def _find_images(
    keys: Sequence[frozenset[str]], words: Sequence[frozenset[str]], rows: Sequence[int]
) -> dict[int, int]:
    """Return for each key, if any, the first of these rows whose words include all of the key."""
    rows_of: dict[str, list[int]] = {}
    for row in rows:
        for word in words[row]:
            rows_of.setdefault(word, []).append(row)
    found = {}
    for i, key in enumerate(keys):
        rarest = min((rows_of.get(word, []) for word in key), key=len, default=[])
        if (match := next((row for row in rarest if key <= words[row]), None)) is not None:
            found[i] = match
    return found


def _has_few_values(source: Source, row: int) -> bool:
    """Return whether an image has few colours or grey values, as masks have."""
    try:
        image = source.decode(row)
        image.draft(None, PROBED_SIZE)
        values = np.asarray(image)
    except (DataError, OSError, ValueError, SyntaxError):
        return False
    is_soft = False
    if values.ndim == 3 and (values[..., :3] != values[..., :1]).any():
        values = values[..., :3].astype(np.int32) @ (1, 256, 65536)
    else:
        values = values[..., 0] if values.ndim == 3 else values
        sides = (values <= 10).mean(), (values >= 245).mean()
        is_soft = values.dtype == np.uint8 and sum(sides) >= MIN_SOFT_SHARE and min(sides) >= MIN_SOFT_SIDE
    counts = np.sort(np.unique(values, return_counts=True)[1])
    return bool(is_soft or counts[-MAX_MASK_VALUES:].sum() >= MIN_MASK_SHARE * counts.sum())


def _read_near_duplicates(data: Any) -> tuple[str, bytes | None]:
    """Return the file of near-duplicates beside or above the images, and where it is."""
    path = Path(data).expanduser().resolve()
    if path.is_dir():
        found = sorted((p for p in path.rglob(NEAR_DUPLICATES_FILE) if p.is_file()), key=lambda p: len(p.parts))
        return (str(found[0]), found[0].read_bytes()) if found else (str(path), None)
    with zipfile.ZipFile(path) as archive:
        members = sorted((n for n in archive.namelist() if f"/{n}".endswith(f"/{NEAR_DUPLICATES_FILE}")), key=len)
        return f"{path}/{members[0] if members else ''}", _read_member(archive, members[0], path) if members else None


def _read_member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        with archive.open(name) as member:
            return member.read(MAX_NEAR_DUPLICATES_BYTES)
    except Exception as error:  # BadZipFile, zlib.error, RuntimeError for encrypted members, NotImplementedError, ...
        raise DataError(f"{path}: {name} cannot be unpacked: {error}. Create the .zip again.") from error


def parse_near_duplicates(text: bytes, images: Source, where: str) -> list[tuple[str, str]]:
    """Parse pairs of near-duplicate images, as names without suffix.

    Each line has two image names, with or without suffix, in any case and Unicode form, separated by a tab if they
    contain spaces. Text after `#` is a comment. Pairs with an unknown name are left out with a warning.

    Args:
        text: UTF-8 text.
        images: the images that the names refer to.
        where: the name of the text in messages.

    Raises:
        DataError: the text is not UTF-8, a line does not have two names, or none of the names is an image.
    """
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error}. Give two image names per line.") from error
    stem_of = {fold_stem(name): strip_suffix(name) for name in images.names}
    num_names, unknown, pairs = 0, [], []
    for number, line in enumerate(lines, start=1):
        content = line.split("#")[0].strip()
        names = [name.strip() for name in content.split("\t") if name.strip()] if "\t" in content else content.split()
        if len(names) not in (0, 2):
            raise DataError(
                f"{where}, line {number}: expected two names (separated by a tab if they contain spaces), got "
                f"'{escape_name(line.strip())}'."
            )
        keys = [
            stem_of.get(fold_name(name)) or (stem_of.get(fold_stem(name)) if is_image(name) else None) for name in names
        ]
        num_names += len(names)
        unknown += [name for name, key in zip(names, keys, strict=True) if key is None]
        if len(found := [key for key in keys if key is not None]) == 2:
            pairs.append((found[0], found[1]))
    if unknown:
        message = (
            f"{where}: {len(unknown)} of {num_names} names {'matches' if len(unknown) == 1 else 'match'} no "
            f"image, the first is {escape_name(unknown[0])}; "
            f"an example of an image name is {escape_name(images.names[0])}."
        )
        if len(unknown) == num_names:
            raise DataError(f"{message} Correct the names, or remove the file.")
        warnings.warn(f"{message} Near-duplicates of test images may be trained on.", UserWarning, stacklevel=2)
    return pairs
