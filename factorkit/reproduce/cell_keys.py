"""What tells one data set from another, wherever it lies and whenever it was copied there."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from factorkit.data.sources import escape_name, wrap_os_errors
from factorkit.utils.errors import DataError

READ_FILES = 20_000  # files that are looked into; of the others name and size are told
END = 2**15  # bytes read at either end of a file: all of most masks
PLACES = 64  # in between where a change may leave both ends as they were
COMPRESSED = frozenset(".jpg .jpeg .png .webp".split())  # a change moves or alters what stands at the end


def identify(data: Path | None, inputs: Mapping[str, Path] | None = None, out: Path | None = None) -> Any:
    """Identify data, and further inputs by name, for a folder's settings; JSON-able.

    Of a folder the names and sizes of all files and what stands at both ends of each (of 20 000 of them, evenly spaced,
    where there are more); of a zip the names, sizes and checksums of its members; of a .npy all of it. Hidden files do
    not count, nor do times, the folder's own place, and what lies below ``out``, where that is in it.

    Returns:
        {"name", "files", "bytes", "sha256"}, and the same again by the name of each further
        input; "procedural" without any data.

    Raises:
        DataError: there is nothing there, or it cannot be read.
    """
    found: Any = "procedural" if data is None else _identity(data, out)
    named = {name: _identity(path, out) for name, path in (inputs or {}).items()}
    return found if not named else {**({"name": found} if data is None else found), **named}


def _identity(place: Path, out: Path | None) -> dict[str, Any]:
    path = place.expanduser().resolve()
    if not path.exists():
        raise DataError(
            f"{escape_name(str(place))}: no such file or folder (looked in {Path.cwd()}). Check the spelling."
        )
    content, total = hashlib.sha256(), 0
    with wrap_os_errors(path, "so its data cannot be told from others. Mend its permissions."):
        files = sorted(_below(path, out)) if path.is_dir() else [""]
        step = max(1, -(-len(files) // READ_FILES))
        for number, name in enumerate(files):
            file = path / name if name else path
            size = file.stat().st_size
            total += size
            content.update(repr((name, size)).encode("utf-8", "surrogateescape"))
            if number % step == 0:
                content.update(_content(file, size))
    return {"name": path.name, "files": len(files), "bytes": total, "sha256": content.hexdigest()[:16]}


def _below(folder: Path, out: Path | None) -> Iterator[str]:
    """The relative paths of the files below a folder; links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise error

    entered = set() if out is None else {os.path.realpath(out)}
    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        true_path = os.path.realpath(here)
        if true_path in entered:
            folders.clear()
            continue
        entered.add(true_path)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(here, name)):
                yield Path(here, name).relative_to(folder).as_posix()


def _content(file: Path, size: int) -> bytes:
    """What stands in a file, or enough of it to tell it from another of its name and size."""
    kind = file.suffix.lower()
    if kind in (".zip", ".npz"):
        with suppress(zipfile.BadZipFile, ValueError, NotImplementedError), zipfile.ZipFile(file) as archive:
            members = [(m.filename, m.file_size, m.CRC) for m in archive.infolist()]
            return repr(members).encode("utf-8", "surrogateescape")
    content = hashlib.sha256()
    with open(file, "rb") as opened:
        if size <= 2 * END or kind == ".npy":
            while part := opened.read(2**20):
                content.update(part)
        else:
            between = [] if kind in COMPRESSED else range(0, size - END, max(END, size // PLACES))
            for place in (0, *between, size - END):
                opened.seek(place)
                content.update(opened.read(END))
    return content.digest()
