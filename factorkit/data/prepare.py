"""Decode a source once: all its images as squares of one resolution, in one memory-mapped array on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

from factorkit.data.decode import ImageDecodeError, crop_square
from factorkit.data.open import open_source
from factorkit.data.sources import ArraySource, Source, escape_name
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.safe_reading import read_json

LAYOUT = 2  # raise it whenever decoding, cropping or the files of an entry change: it is part of every key
BLOCK = 1024  # images in flight at once: bounds memory on sets of millions
ABANDONED_AFTER = 24 * 3600  # seconds; a killed preparation leaves its temporary folder to the next one to clear
TRIES = 3  # at images that somebody changes while they are prepared
NAMED = 5  # how many broken images a message names
PARTIAL = ".partial-"


@dataclass(frozen=True)
class PreparedImages:
    """Images ready for training.

    Attributes:
        images: uint8 [N, R, R, 3], read-only; a memory map wherever they lie on disk.
        names: one for each row.
        skipped: (name, reason) of each image that could not be decoded.
        source_rows: the position of each row in the source, int64 [N]: what belongs to the images, such as their classes, is
            taken from there.
        path: the folder in the cache, or None where the data needed no preparation.
    """

    images: np.ndarray
    names: list[str]
    skipped: list[tuple[str, str]]
    source_rows: np.ndarray
    path: Path | None

    def __len__(self) -> int:
        return len(self.names)


def prepare(
    data: Any, resolution: int, *, cache: Path | None = None, workers: int | None = None, progress: bool = True
) -> PreparedImages:
    """Crop every image to its centred square, resize it and keep the result; a second call opens that at once.

    An array that is already uint8 [N, R, R, 3] is used as it is. Otherwise the result lies under `cache`, keyed by
    the source's fingerprint and the resolution, so a source that changed is prepared anew. It appears there whole or
    not at all, also when two processes prepare the same source at the same time; one that changes meanwhile is
    prepared again. A preparation that failed leaves every earlier one as it was.

    Args:
        data: anything `open_source` takes.
        resolution: side of the squares, in pixels.
        cache: by default $FACTORKIT_CACHE, else `factorkit` in the user's cache folder.
        workers: decoding threads, by default one for each processor core.
        progress: show a progress bar on stderr.

    Warns:
        UserWarning: once, with count, names and reasons, where images could not be decoded and were left out.

    Raises:
        ConfigError: a resolution or number of workers below 1.
        DataError: the data cannot be opened or read, none of the images can be decoded, the cache has no room, or the
            data do not stop changing.
    """
    if resolution < 1 or (workers is not None and workers < 1):
        raise ConfigError(f"resolution={resolution}, workers={workers}: both must be 1 or more.")
    source = open_source(data)
    if isinstance(source, ArraySource) and _is_ready(source.array, resolution):
        images = source.array.view()
        images.flags.writeable = False
        return PreparedImages(images, source.names, [], np.arange(len(images)), None)
    place = (cache or cache_folder()) / "prepared"
    for _ in range(TRIES):
        fingerprint = source.fingerprint()
        entry = place / hashlib.sha256(f"{LAYOUT} {resolution} {fingerprint}".encode()).hexdigest()[:32]
        prepared = _open(entry, resolution) or _prepare(entry, source, fingerprint, resolution, workers, progress)
        if prepared is not None:
            break
    else:
        raise DataError("the images change faster than they are prepared. Wait until whoever writes them is done.")
    if prepared.skipped:
        warnings.warn(_report(prepared.skipped, len(source)), UserWarning, stacklevel=2)
    return prepared


def _prepare(
    entry: Path, source: Source, fingerprint: str, resolution: int, workers: int | None, progress: bool
) -> PreparedImages | None:
    """A new entry, or None where the source changed while it was made."""
    try:
        if not _make(entry, source, fingerprint, resolution, workers or os.cpu_count() or 1, progress):
            return None
    except OSError as error:  # a source reports its own as DataError, so this one is the cache's
        raise _cache_error(entry.parent, error, len(source) * resolution * resolution * 3) from error
    prepared = _open(entry, resolution)
    if prepared is None:
        raise DataError(f"{entry}: written, but unreadable. Check that disk, or set FACTORKIT_CACHE to another.")
    return prepared


def cache_folder() -> Path:
    """$FACTORKIT_CACHE, else $XDG_CACHE_HOME/factorkit, else ~/.cache/factorkit."""
    if chosen := os.environ.get("FACTORKIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "factorkit"


def _is_ready(array: np.ndarray, resolution: int) -> bool:
    return array.dtype == np.uint8 and array.shape[1:] == (resolution, resolution, 3)


def _open(entry: Path, resolution: int) -> PreparedImages | None:
    """A finished entry, or None where there is none or it is damaged."""
    try:
        index = read_json(entry / "index.json")
        images = np.load(entry / "images.npy", mmap_mode="r", allow_pickle=False)
        names, skipped = index["names"], [(name, reason) for name, reason in index["skipped"]]
        rows = np.array(index["skipped_rows"], np.int64)
        source_rows = np.delete(np.arange(len(names) + len(rows)), rows)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    if not _is_ready(images, resolution) or not len(images) == len(names) == len(source_rows):
        return None
    return PreparedImages(images, names, skipped, source_rows, entry)


def _make(entry: Path, source: Source, fingerprint: str, resolution: int, workers: int, progress: bool) -> bool:
    """Write an entry into a folder of its own and rename it into place; not where the source changed meanwhile."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(entry.parent)
    partial_entry = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=entry.parent))
    try:
        with open(partial_entry / "images.npy", "wb") as file:
            names, skipped, rows = _write_images(file, source, resolution, workers, progress)
        if source.fingerprint() != fingerprint:
            return False
        index = {"names": names, "skipped": skipped, "skipped_rows": rows, "resolution": resolution}
        (partial_entry / "index.json").write_text(json.dumps(index), encoding="utf-8")
        partial_entry.chmod(0o755)  # mkdtemp's 0o700 would lock others out of a shared cache
        if entry.exists() and _open(entry, resolution) is None:
            shutil.rmtree(entry)  # damaged
        try:
            partial_entry.rename(entry)
        except OSError:
            if _open(entry, resolution) is None:  # otherwise another process was faster, and its entry is as good
                raise
        return True
    finally:
        shutil.rmtree(partial_entry, ignore_errors=True)


def _write_images(
    file: BinaryIO, source: Source, resolution: int, workers: int, progress: bool
) -> tuple[list[str], list[tuple[str, str]], list[int]]:
    """Write the .npy image by image: on a full disk a write fails cleanly where a memory map would kill the process."""
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    rows: list[int] = []  # of the skipped ones
    _write_header(file, len(source), resolution)
    start = file.tell()
    bar = tqdm(desc=f"preparing {resolution} px", total=len(source), unit=" images", disable=not progress)
    with bar, closing(_decode_all(source, resolution, workers)) as squares:
        for row, (name, pixels) in enumerate(zip(source.names, squares, strict=True)):
            if isinstance(pixels, ImageDecodeError):
                skipped.append((name, str(pixels).removeprefix(f"{escape_name(name)}: ")))
                rows.append(row)
            else:
                file.write(pixels.data)
                names.append(name)
            bar.update()
    if not names:
        raise DataError(f"{_report(skipped, len(source))} There is nothing left to train on: check the files.")
    file.seek(0)
    _write_header(file, len(names), resolution)
    assert file.tell() == start, "a smaller count must not move the first image"
    file.flush()
    os.fsync(file.fileno())
    return names, skipped, rows


def _write_header(file: BinaryIO, count: int, resolution: int) -> None:
    shape = (count, resolution, resolution, 3)
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _decode_all(source: Source, resolution: int, workers: int) -> Generator[np.ndarray | ImageDecodeError, None, None]:
    """The squares in order, decoded by threads: Pillow releases the interpreter lock."""
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(source), BLOCK):
            block = range(first, min(first + BLOCK, len(source)))
            yield from pool.map(partial(_decode, source, resolution), block)


def _decode(source: Source, resolution: int, index: int) -> np.ndarray | ImageDecodeError:
    try:
        return crop_square(source.read(index, at_least=2 * resolution), resolution)  # 2: Lanczos still does the work
    except ImageDecodeError as error:
        return error


def _clear_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{PARTIAL}*"):
        try:
            last_written = max(p.stat().st_mtime for p in (path, *path.iterdir()))
            if time.time() - last_written > ABANDONED_AFTER:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # its own process was faster


def _report(skipped: list[tuple[str, str]], total: int) -> str:
    named = "; ".join(f"{escape_name(name)} ({reason})" for name, reason in skipped[:NAMED])
    more = f"; and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    return f"{len(skipped)} of {total} images could not be decoded and were left out: {named}{more}."


def _cache_error(folder: Path, error: OSError, needed: int) -> DataError:
    cause = "no room left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    return DataError(
        f"{folder}: the prepared images cannot be stored here: {cause}. They take {needed / 2**20:.0f} MiB; make room, "
        "or set FACTORKIT_CACHE to a folder on another disk."
    )
