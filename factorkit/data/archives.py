"""Images in archives, read where they lie: nothing is ever unpacked to the disk, whatever a member calls itself."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from factorkit.data.decode import ImageDecodeError
from factorkit.data.sources import (
    MOST_BYTES,
    EncodedSource,
    escape_name,
    hash_values,
    is_image,
    stat_file,
    too_large,
    wrap_os_errors,
)
from factorkit.utils.errors import DataError

# zipfile unpacks these by no more than it is asked for; of the others a hundred bytes may become a gigabyte at once
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ZipSource(EncodedSource):
    """The images of a .zip, or those below the folder `under` in it; names are relative to that folder."""

    def __init__(self, path: Path, under: str = "") -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except Exception as error:  # BadZipFile, struct.error, ...: whatever a damaged directory leads to
            raise DataError(f"{path}: not a readable .zip: {error}. Download or pack it again.") from error
        self.path, self.under = path, under
        found = (member for member in self.archive.infolist() if member.filename.startswith(under))
        self.members = sorted((m for m in found if is_image(inside(m.filename))), key=lambda m: m.filename)
        self.names = [inside(member.filename[len(under) :]) for member in self.members]

    def _bytes(self, index: int) -> bytes:
        member = self.members[index]  # by member, not by name: two of one name are two pictures
        if member.file_size > MOST_BYTES:
            raise ImageDecodeError(too_large(member.file_size))
        if member.compress_type not in BOUNDED:
            raise ImageDecodeError("refused, packed by a method that cannot be bounded. Pack it again with deflate")
        with self.archive.open(member) as packed:
            return packed.read(member.file_size)  # no more, whatever there is: the size may be a lie

    def fingerprint(self) -> str:
        return hash_values("zip", str(self.path), self.under, stat_file(self.path))


class TarSource(EncodedSource):
    """Members of uncompressed .tar files, each read at its place.

    Args:
        paths: the archives.
        members: for each image (which archive, first byte, bytes).
        names: for each image.
    """

    def __init__(self, paths: Sequence[Path], members: Sequence[tuple[int, int, int]], names: Sequence[str]) -> None:
        self.paths, self.members, self.names = list(paths), list(members), list(names)

    def _bytes(self, index: int) -> bytes:
        archive, start, size = self.members[index]
        if size > MOST_BYTES:
            raise ImageDecodeError(too_large(size))
        with open(self.paths[archive], "rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) < size:
            raise ImageDecodeError(f"the archive {self.paths[archive].name} ends in the middle of it")
        return data

    def fingerprint(self) -> str:
        return hash_values("tar", [(str(path), stat_file(path)) for path in self.paths], self.members)

    def subset(self, indices: Sequence[int] | np.ndarray) -> TarSource:
        return TarSource(self.paths, [self.members[i] for i in indices], [self.names[i] for i in indices])


def tar_members(path: Path) -> list[tuple[str, int, int]]:
    """Of each plain file in an uncompressed .tar: its name, first byte and number of bytes, in the archive's order.

    Links, devices and sparse files are passed over.

    Raises:
        DataError: no .tar, compressed, cut off, or unreadable.
    """
    try:
        with (
            wrap_os_errors(path, "so it cannot be opened. Check its permissions."),
            tarfile.open(path, "r:") as archive,
        ):
            found = [(m.name, m.offset_data, m.size) for m in archive if m.isreg() and not m.issparse()]
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: no readable .tar: {error}. A compressed one has to be decompressed first (gunzip), a damaged one "
            "fetched again."
        ) from error
    if found and found[-1][1] + found[-1][2] > path.stat().st_size:
        raise DataError(f"{path}: it ends in the middle of {escape_name(found[-1][0])}. Fetch this archive again.")
    return found


def inside(name: str) -> str:
    """A member's name without what leads out of a folder: no leading slash, no drive, no `..`."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    kept = [part for part in parts if part not in ("/", "//", "..") and not re.fullmatch("[A-Za-z]:", part)]
    return "/".join(kept) or "unnamed"
