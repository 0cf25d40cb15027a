"""The default layout of labelled images: `images/` and `masks/` in one folder or .zip, matched by name."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

from factorkit.data.archives import ZipSource
from factorkit.data.files import escape_name, is_image, strip_suffix
from factorkit.data.layouts.base import DatasetFiles
from factorkit.data.open import open_source
from factorkit.data.sources import Source
from factorkit.utils.errors import DataError

NEAR_DUPLICATES_FILE = "near_duplicates.txt"
MAX_NEAR_DUPLICATES_BYTES = 2**26  # limit for reading the file from a .zip, so that a zip bomb cannot fill the memory


def find_image_and_mask_folders(data: Any) -> tuple[Path, Path] | None:
    """Return the folders `images/` and `masks/` below `data`, or None if they are not both there."""
    if not isinstance(data, (str, os.PathLike)):
        return None
    root = Path(data).expanduser()
    images, masks = root / "images", root / "masks"
    return (images, masks) if images.is_dir() and masks.is_dir() else None


def read(data: Any) -> DatasetFiles | None:
    """Read a folder or .zip with `images/`, `masks/` and, optionally, `near_duplicates.txt`; None for anything else."""
    folders = find_image_and_mask_folders(data)
    if folders is None:
        return _read_zip(data)
    images, masks = (open_source(folder) for folder in folders)
    listing = folders[0].parent / NEAR_DUPLICATES_FILE
    pairs = parse_near_duplicates(listing.read_bytes(), images, str(listing)) if listing.is_file() else []
    return DatasetFiles(images, {"masks": masks}, near_duplicates=pairs)


def _read_zip(data: Any) -> DatasetFiles | None:
    if not isinstance(data, (str, os.PathLike)):
        return None
    path = Path(data).expanduser()
    if path.suffix.lower() != ".zip" or not zipfile.is_zipfile(path):  # resolve() would fail on a loop of links
        return None
    path = path.resolve()
    try:
        archive = zipfile.ZipFile(path)
    except Exception:  # BadZipFile and others for a damaged directory; reading the images will report it
        return None
    with archive:
        members = archive.namelist()
        folders = {"/".join(name.split("/")[:depth]) for name in members for depth in range(1, name.count("/") + 1)}
        roots = sorted(folder.removesuffix("images") for folder in folders if f"/{folder}".endswith("/images"))
        root = next((root for root in roots if f"{root}masks" in folders), None)
        if root is None:
            return None
        listing = f"{root}{NEAR_DUPLICATES_FILE}"
        text = _read_member(archive, listing, path) if listing in members else b""
    images, masks = ZipSource(path, f"{root}images/"), ZipSource(path, f"{root}masks/")
    if not images.names or not masks.names:
        raise DataError(f"{path}: its images/ or masks/ folder contains no images. Add images to both folders.")
    return DatasetFiles(
        images, {"masks": masks}, near_duplicates=parse_near_duplicates(text, images, f"{path}/{listing}")
    )


def _read_member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        with archive.open(name) as member:
            return member.read(MAX_NEAR_DUPLICATES_BYTES)
    except Exception as error:  # BadZipFile, zlib.error, RuntimeError for encrypted members, NotImplementedError, ...
        raise DataError(f"{path}: {name} cannot be unpacked: {error}. Create the .zip again.") from error


def parse_near_duplicates(text: bytes, images: Source, where: str) -> list[tuple[str, str]]:
    """Parse pairs of near-duplicate images, as names without suffix.

    Each line has two image names, with or without suffix, separated by a tab if they contain spaces. Text after `#` is
    a comment. Pairs with an unknown name are left out with a warning.

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
    stems = {strip_suffix(name) for name in images.names}
    num_names, unknown, pairs = 0, [], []
    for number, line in enumerate(lines, start=1):
        content = line.split("#")[0].strip()
        names = [name.strip() for name in content.split("\t") if name.strip()] if "\t" in content else content.split()
        if len(names) not in (0, 2):
            raise DataError(
                f"{where}, line {number}: expected two names (separated by a tab if they contain spaces), got "
                f"'{escape_name(line.strip())}'."
            )
        keys = [name if name in stems or not is_image(name) else strip_suffix(name) for name in names]
        num_names += len(names)
        unknown += [name for name, key in zip(names, keys, strict=True) if key not in stems]
        if names and stems.issuperset(keys):
            pairs.append((keys[0], keys[1]))
    if unknown:
        message = (
            f"{where}: {len(unknown)} of {num_names} names match no image, the first is {escape_name(unknown[0])}; "
            f"an example of an image name is {escape_name(images.names[0])}."
        )
        if len(unknown) == num_names:
            raise DataError(f"{message} Correct the names, or remove the file.")
        warnings.warn(f"{message} Near-duplicates of test images may be trained on.", UserWarning, stacklevel=2)
    return pairs
