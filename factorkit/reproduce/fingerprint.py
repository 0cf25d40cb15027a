"""A fingerprint of the content of data, independent of its place and file times."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from factorkit.data.files import escape_name, wrap_os_errors
from factorkit.utils.errors import DataError
from factorkit.utils.output_record import OutputFilter

MAX_READ_FILES = 20_000  # of more files only the names and sizes count
BLOCK_BYTES = 2**15  # read at each end of a file: all of most masks
SAMPLED_BLOCKS = 64  # read in between, where a change may leave both ends as they were
COMPRESSED = frozenset((".jpg", ".jpeg", ".png", ".webp"))  # here a change moves or alters the end


def fingerprint(data: Path | None, inputs: Mapping[str, Path] | None = None, out: Path | None = None) -> Any:
    """Return a JSON-able fingerprint of data and of further inputs by name.

    Of a folder the names and sizes of all files and both ends of each file count (of 20,000 files, evenly spaced, if
    there are more); of a zip the names, sizes and checksums of its members; of a .npy everything. Hidden files, file
    times, the place of the folder, and files below ``out`` do not count.

    Returns:
        {"name", "files", "bytes", "sha256"}, and the same by the name of each further input; "procedural" without data.

    Raises:
        DataError: there is nothing, or it cannot be read.
    """
    own: Any = "procedural" if data is None else _fingerprint(data, out)
    if not inputs:
        return own
    own = {"name": own} if data is None else own
    return own | {key: _fingerprint(path, out) for key, path in inputs.items()}


def _fingerprint(data: Path, out: Path | None) -> dict[str, Any]:
    path = data.expanduser().resolve()
    if not path.exists():
        raise DataError(
            f"{escape_name(str(data))}: no such file or folder (looked in {Path.cwd()}). Check the spelling."
        )
    content, total = hashlib.sha256(), 0
    with wrap_os_errors(path, "so its data cannot be identified. Fix its permissions."):
        files = sorted(_list_files(path, out)) if path.is_dir() else [""]
        step = max(1, -(-len(files) // MAX_READ_FILES))
        for number, name in enumerate(files):
            file = path / name if name else path
            size = file.stat().st_size
            total += size
            content.update(repr((name, size)).encode("utf-8", "surrogateescape"))
            if number % step == 0:
                content.update(_read_sample(file, size))
    return {"name": path.name, "files": len(files), "bytes": total, "sha256": content.hexdigest()[:16]}


def _list_files(folder: Path, out: Path | None) -> Iterator[str]:
    """Yield the relative paths of the files below a folder; links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise error

    outputs = OutputFilter(folder)
    entered = set() if out is None else {os.path.realpath(out)}
    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        true_path = os.path.realpath(here)
        if true_path in entered:
            folders.clear()
            continue
        entered.add(true_path)
        if here != str(folder) and outputs.skips_folder(here):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in names:
            if name.startswith(".") or outputs.skips_file(here, name):
                continue
            if os.path.isfile(os.path.join(here, name)):
                yield Path(here, name).relative_to(folder).as_posix()


def _read_sample(file: Path, size: int) -> bytes:
    """Digest a file, or enough of it to distinguish it from another of its name and size."""
    suffix = file.suffix.lower()
    if suffix in (".zip", ".npz"):
        with suppress(zipfile.BadZipFile, ValueError, NotImplementedError), zipfile.ZipFile(file) as archive:
            members = [(m.filename, m.file_size, m.CRC) for m in archive.infolist()]
            return repr(members).encode("utf-8", "surrogateescape")
    content = hashlib.sha256()
    with open(file, "rb") as opened:
        if size <= 2 * BLOCK_BYTES or suffix == ".npy":
            while part := opened.read(2**20):
                content.update(part)
        else:
            step = max(BLOCK_BYTES, size // SAMPLED_BLOCKS)
            between = [] if suffix in COMPRESSED else range(0, size - BLOCK_BYTES, step)
            for place in (0, *between, size - BLOCK_BYTES):
                opened.seek(place)
                content.update(opened.read(BLOCK_BYTES))
    return content.digest()
