"""Decode a source once, to squares of one resolution in one memory-mapped array on disk."""

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
from numpy.lib import format as npy_format
from tqdm import tqdm

from factorkit.data.decode import ImageDecodeError, crop_square
from factorkit.data.files import escape_name
from factorkit.data.open import open_source
from factorkit.data.sources import ArraySource, Source
from factorkit.utils.errors import ConfigError, DataError, format_count
from factorkit.utils.files import read_json
from factorkit.utils.output_record import mark_output_folder

ENTRY_FORMAT = 3  # part of every cache key: increase it whenever decoding, cropping or the files of an entry change
BLOCK_SIZE = 1024  # images decoded ahead at once; bounds memory for sets of millions
ABANDONED_AFTER = 24 * 3600  # seconds; older temporary folders are left over from killed processes and removed
MAX_ATTEMPTS = 3  # for images that change while they are prepared
MAX_SKIPPED_NAMES = 5  # undecodable images named in a message
TEMPORARY_PREFIX = ".partial-"


@dataclass(frozen=True)
class PreparedImages:
    """Images ready for training.

    Attributes:
        images: uint8 [N, R, R, 3], read-only; memory-mapped if stored on disk.
        names: name of each row.
        skipped: (name, reason) of each image that could not be decoded.
        source_rows: position of each row in the source, int64 [N]; use it to select per-image data such as classes.
        path: folder in the cache; None if the data needed no preparation.
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
    """Crop all images to the centred square, resize them and store the result; a second call only opens it.

    A uint8 array [N, R, R, 3] is used as it is. Otherwise the result is stored in the cache, keyed by the source's
    fingerprint and the resolution, so a changed source is prepared again. Entries are written atomically, also by
    concurrent processes; a source that changes meanwhile is prepared again. A failure leaves earlier entries unchanged.

    Args:
        data: anything that `open_source` accepts.
        resolution: side of the squares in pixels.
        cache: cache folder; default: $FACTORKIT_CACHE, else `factorkit` in the user's cache folder.
        workers: decoding threads; default: one per CPU core.
        progress: show a progress bar on stderr.

    Warns:
        UserWarning: images could not be decoded and were skipped; with their count, names and reasons.

    Raises:
        ConfigError: a resolution or number of workers below 1.
        DataError: the data cannot be opened or read, no image can be decoded, the disk is full, or the data keep
            changing.
    """
    if resolution < 1 or (workers is not None and workers < 1):
        raise ConfigError(f"resolution={resolution}, workers={workers}: both must be 1 or more.")
    source = open_source(data)
    if isinstance(source, ArraySource) and _has_resolution(source.array, resolution):
        images = source.array.view()
        images.flags.writeable = False
        return PreparedImages(images, source.names, [], np.arange(len(images)), None)
    folder = (cache or get_cache_folder()) / "prepared"
    for _ in range(MAX_ATTEMPTS):
        fingerprint = source.fingerprint()
        entry = folder / hashlib.sha256(f"{ENTRY_FORMAT} {resolution} {fingerprint}".encode()).hexdigest()[:32]
        prepared = _open_entry(entry, resolution, source) or _create_entry(
            entry, source, fingerprint, resolution, workers or os.cpu_count() or 1, progress
        )
        if prepared is not None:
            break
    else:
        raise DataError("the images changed again and again while they were prepared. Wait until they are complete.")
    if prepared.skipped:
        warnings.warn(_describe_skipped(prepared.skipped, len(source)), UserWarning, stacklevel=2)
    return prepared


def get_cache_folder() -> Path:
    """Return $FACTORKIT_CACHE, else $XDG_CACHE_HOME/factorkit, else ~/.cache/factorkit."""
    if folder := os.environ.get("FACTORKIT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "factorkit"


def _has_resolution(array: np.ndarray, resolution: int) -> bool:
    return array.dtype == np.uint8 and array.shape[1:] == (resolution, resolution, 3)


def _open_entry(entry: Path, resolution: int, source: Source) -> PreparedImages | None:
    """Open a complete entry; None if it is missing or damaged, or its bit depth is that of a set that changed since."""
    try:
        index = read_json(entry / "index.json")
        images = np.load(entry / "images.npy", mmap_mode="r", allow_pickle=False)
        names, skipped = index["names"], [(name, reason) for name, reason in index["skipped"]]
        skipped_rows = np.array(index["skipped_rows"], np.int64)
        source_rows = np.delete(np.arange(len(names) + len(skipped_rows)), skipped_rows)
        depth_set, depth_note = index["depth_set"], index["depth_note"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    if not _has_resolution(images, resolution) or not len(images) == len(names) == len(source_rows):
        return None
    if depth_set is not None and depth_set != source.depths.fingerprint():
        return None
    if depth_note and not source.depths.note:
        warnings.warn(depth_note, UserWarning, stacklevel=3)
    return PreparedImages(images, names, skipped, source_rows, entry)


def _create_entry(
    entry: Path, source: Source, fingerprint: str, resolution: int, workers: int, progress: bool
) -> PreparedImages | None:
    """Write and open an entry; None if the source changed meanwhile."""
    try:
        if not _write_entry(entry, source, fingerprint, resolution, workers, progress):
            return None
    except OSError as error:  # of the cache: sources raise DataError
        cause = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise DataError(
            f"{entry.parent}: the prepared images cannot be stored here: {cause}. They take "
            f"{len(source) * resolution * resolution * 3 / 2**20:.0f} MiB; free space, or set FACTORKIT_CACHE to a "
            "folder on another disk."
        ) from error
    prepared = _open_entry(entry, resolution, source)
    if prepared is None:
        raise DataError(f"{entry}: written, but unreadable. Check the disk, or set FACTORKIT_CACHE to another one.")
    return prepared


def _write_entry(entry: Path, source: Source, fingerprint: str, resolution: int, workers: int, progress: bool) -> bool:
    """Write an entry to a temporary folder and rename it; return False if the source changed meanwhile."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(entry.parent)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=entry.parent))
    try:
        with open(temporary / "images.npy", "wb") as file:
            names, skipped, skipped_rows = _write_images(file, source, resolution, workers, progress)
        if source.fingerprint() != fingerprint:
            return False
        index: dict[str, Any] = {"names": names, "skipped": skipped, "skipped_rows": skipped_rows}
        index |= {"depth_set": source.depths.fingerprint() if source.depths.is_decided else None}
        index |= {"depth_note": source.depths.note, "resolution": resolution}
        (temporary / "index.json").write_text(json.dumps(index), encoding="utf-8")
        mark_output_folder(temporary)
        temporary.chmod(0o755)  # mkdtemp's 0o700 would lock other users out of a shared cache
        if entry.exists() and _open_entry(entry, resolution, source) is None:
            shutil.rmtree(entry)  # damaged, or of another depth
        try:
            temporary.rename(entry)
        except OSError:
            if _open_entry(entry, resolution, source) is None:  # otherwise another process has written the same entry
                raise
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_images(
    file: BinaryIO, source: Source, resolution: int, workers: int, progress: bool
) -> tuple[list[str], list[tuple[str, str]], list[int]]:
    """Write the .npy image by image; return names, skipped images and their rows.

    On a full disk a write raises an error, whereas writing to a memory map would kill the process.
    """
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    skipped_rows: list[int] = []
    _write_header(file, len(source), resolution)
    start = file.tell()
    bar = tqdm(desc=f"preparing {resolution} px", total=len(source), unit=" images", disable=not progress)
    with bar, closing(_decode_all(source, resolution, workers)) as squares:
        for row, (name, pixels) in enumerate(zip(source.names, squares, strict=True)):
            if isinstance(pixels, ImageDecodeError):
                skipped.append((name, str(pixels).removeprefix(f"{escape_name(name)}: ")))
                skipped_rows.append(row)
            else:
                file.write(pixels.data)
                names.append(name)
            bar.update()
    if not names:
        raise DataError(f"{_describe_skipped(skipped, len(source))} No images are left: check the files.")
    file.seek(0)
    _write_header(file, len(names), resolution)
    assert file.tell() == start, "a smaller count must not move the first image"
    file.flush()
    os.fsync(file.fileno())
    return names, skipped, skipped_rows


def _write_header(file: BinaryIO, count: int, resolution: int) -> None:
    shape = (count, resolution, resolution, 3)
    npy_format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _decode_all(source: Source, resolution: int, workers: int) -> Generator[np.ndarray | ImageDecodeError, None, None]:
    """Yield the squares in order, decoded by threads: Pillow releases the GIL."""
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(source), BLOCK_SIZE):
            block = range(start, min(start + BLOCK_SIZE, len(source)))
            yield from pool.map(partial(_decode, source, resolution), block)


def _decode(source: Source, resolution: int, index: int) -> np.ndarray | ImageDecodeError:
    try:  # twice the resolution, so that the Lanczos filter does the final reduction
        return crop_square(source.read(index, at_least=2 * resolution), resolution)
    except ImageDecodeError as error:
        return error


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        try:
            last_written = max(p.stat().st_mtime for p in (path, *path.iterdir()))
            if time.time() - last_written > ABANDONED_AFTER:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # removed by another process


def _describe_skipped(skipped: list[tuple[str, str]], total: int) -> str:
    named = "; ".join(f"{escape_name(name)} ({reason})" for name, reason in skipped[:MAX_SKIPPED_NAMES])
    more = f"; and {len(skipped) - MAX_SKIPPED_NAMES} more" if len(skipped) > MAX_SKIPPED_NAMES else ""
    return (
        f"{len(skipped)} of {format_count(total, 'image')} could not be decoded and "
        f"{'was' if len(skipped) == 1 else 'were'} skipped: {named}{more}."
    )
