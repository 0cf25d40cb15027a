"""What a path holds: images, masks, classes and splits."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from factorkit.data.archives import ZipSource
from factorkit.data.layouts import Layout, read_layout
from factorkit.data.open_source import open_source
from factorkit.data.procedural.flowers import flowers
from factorkit.data.procedural.rooms import NESTING, rooms
from factorkit.data.sources import ArraySource
from factorkit.data.splits import PAIRS_FILE, Dataset, Split, divide, parse_pairs
from factorkit.utils.errors import ConfigError, DataError

TEST_SEED_OFFSET = 2**32  # procedural test pictures come from seeds nobody trains with
MOST_PAIRS = 2**26  # bytes of such a file that are read


def open_dataset(data: Any, *, holdout: str | int = "auto", mask_set: str | None = None) -> Dataset:
    """Open images and, where they lie beside them, masks; keep labelled images out of training.

    Args:
        data: a folder or .zip with `images/` and `masks/` in it (and perhaps `near_duplicates.txt`: two names a line,
            with or without suffix, a tab between them where they hold spaces; `#` for comments), a data set in the
            layout its authors publish (`factorkit.data.layouts`), or anything that `open_source` takes, which then has
            no masks.
        holdout: "masked" keeps every image with a mask out of training. A number keeps that many, chosen by a hash
            of their names, so that files added later do not reshuffle them; near-duplicates stay on one side, and
            fewer are held out where the last group of them does not fit. "none" trains on all images and offers the
            labelled ones for scoring although they were seen. The name of a split ("test", "val", ...) trains on the
            split "train" and scores on that one. "auto" is "test", else "val", where the layout has them; without
            splits it is "masked" where at least half of the images have no mask, else a fifth of the labelled ones,
            at most 200.
        mask_set: of a layout with several sets of masks, which; by default its first.

    Near-duplicates of held-out images leave the training set too.

    Raises:
        ConfigError: a holdout that is none of these, or more than there are masks; a set of masks that is not there;
            a layout whose extra is not installed.
        DataError: the data cannot be opened, masks do not match, or nothing is left to train on.

    Example:
        >>> from factorkit.data import open_dataset
        >>> dataset = open_dataset(pictures)
        >>> len(dataset.train), dataset.test_images is None
        (24, True)
    """
    if data is None:
        raise ConfigError("open_dataset needs a path or images. The shipped flowers: procedural_dataset(resolution).")
    known = None
    layout = next((found for reader in READERS if (found := reader(data)) is not None), None)
    if layout is None and (read := read_layout(data)) is not None:
        known, layout = read[0].name, read[1]
    layout = Layout(open_source(data)) if layout is None else layout
    name = Path(data).expanduser().resolve().name if isinstance(data, (str, os.PathLike)) else type(data).__name__
    return divide(name, layout, holdout, mask_set, known)


def procedural_dataset(
    resolution: int, train: int = 2000, test: int = 216, seed: int = 0, nested: bool = False
) -> Dataset:
    """The shipped flowers: `train` unlabelled and `test` labelled pictures, drawn from different seeds.

    With `nested` the shipped rooms instead, whose masks are labels within labels.

    Raises:
        ConfigError: no training or test pictures, or what `flowers` refuses.
    """
    if train < 1 or test < 1:
        raise ConfigError(f"train={train}, test={test}: both must be 1 or more.")
    draw, name = (rooms, "procedural rooms") if nested else (flowers, "procedural flowers")
    train_images, _ = draw(train, resolution, seed)
    images, masks = map(ArraySource, draw(test, resolution, TEST_SEED_OFFSET + seed))
    return Dataset(name, ArraySource(train_images), images, masks, nesting=NESTING if nested else None)


def _read_folder_with_masks(data: Any) -> Layout | None:
    if not isinstance(data, (str, os.PathLike)):
        return None
    root = Path(data).expanduser()
    if not ((root / "images").is_dir() and (root / "masks").is_dir()):
        return None
    listed = root / PAIRS_FILE
    images, masks = open_source(root / "images"), open_source(root / "masks")
    pairs = parse_pairs(listed.read_bytes(), images, str(listed)) if listed.is_file() else []
    return Layout(images, {"masks": masks}, pairs=pairs)


def _read_zip_with_masks(data: Any) -> Layout | None:
    if not isinstance(data, (str, os.PathLike)):
        return None
    path = Path(data).expanduser()
    if path.suffix.lower() != ".zip" or not zipfile.is_zipfile(path):  # False for links in circles, where resolve fails
        return None
    path = path.resolve()
    try:
        archive = zipfile.ZipFile(path)
    except Exception:  # BadZipFile, and what a damaged directory leads to: who reads its pictures says so
        return None
    with archive:
        folders = {"/".join(n.split("/")[:depth]) for n in archive.namelist() for depth in range(1, n.count("/") + 1)}
        tops = sorted(f.removesuffix("images") for f in folders if f"/{f}".endswith("/images"))
        top = next((top for top in tops if f"{top}masks" in folders), None)
        if top is None:
            return None
        listed = f"{top}{PAIRS_FILE}"
        text = _read_pairs(archive, listed, path) if listed in archive.namelist() else b""
    images, masks = ZipSource(path, f"{top}images/"), ZipSource(path, f"{top}masks/")
    if not images.names or not masks.names:
        raise DataError(f"{path}: its images/ or masks/ folder holds no pictures. Pack it again with both.")
    return Layout(images, {"masks": masks}, pairs=parse_pairs(text, images, f"{path}/{listed}"))


# Tried in order, before the official layouts.
READERS: tuple[Callable[[Any], Layout | None], ...] = (_read_folder_with_masks, _read_zip_with_masks)


def _read_pairs(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        with archive.open(name) as packed:
            return packed.read(MOST_PAIRS)
    except Exception as error:  # BadZipFile, zlib.error, RuntimeError for encrypted members, NotImplementedError, ...
        raise DataError(f"{path}: {name} in it cannot be unpacked: {error}. Pack it again.") from error


__all__ = ["Dataset", "Split", "open_dataset", "procedural_dataset"]
