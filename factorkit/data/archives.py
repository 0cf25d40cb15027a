"""Images in .zip and .tar archives, read in place: nothing is unpacked to disk."""

from __future__ import annotations

import copy
import re
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from factorkit.data.decode import ImageDecodeError
from factorkit.data.files import describe_unread, escape_name, is_image, is_unread_image, stat_file, wrap_os_errors
from factorkit.data.sources import EncodedSource, check_encoded_size, hash_values
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.output_record import RECORD_NAME, parse_record

# zipfile unpacks no more bytes than requested with these; with other methods 100 bytes may become 1 GB at once.
BOUNDED_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MAX_RECORD_BYTES = 2**28  # of a record of outputs in an archive


class ZipSource(EncodedSource):
    """The images of a .zip, or those below its folder `prefix`; names are relative to that folder."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except Exception as error:  # BadZipFile, struct.error and others for a damaged directory
            raise DataError(f"{path}: not a readable .zip: {error}. Download or create it again.") from error
        self.path, self.prefix = path, prefix
        members = (member for member in self.archive.infolist() if member.filename.startswith(prefix))
        images = [member for member in members if is_image(sanitize_member_name(member.filename))]
        unread = [m.filename for m in self.archive.infolist() if is_unread_image(sanitize_member_name(m.filename))]
        if unread and not prefix:
            warnings.warn(f"{path}: {describe_unread(unread)}", UserWarning, stacklevel=2)
        self.members = sorted(_leave_out_outputs(path, self.archive, images), key=lambda member: member.filename)
        self.names = [sanitize_member_name(member.filename[len(prefix) :]) for member in self.members]

    def select(self, indices: Sequence[int], names: Sequence[str]) -> ZipSource:
        """Return some of the images under other names."""
        part = copy.copy(self)
        part.__dict__.pop("depths", None)  # those of masks are not those of their images
        part.members, part.names = [self.members[i] for i in indices], list(names)
        return part

    def _read_bytes(self, index: int) -> bytes:
        member = self.members[index]  # not by name: two members may have the same name
        check_encoded_size(member.file_size)
        if member.compress_type not in BOUNDED_COMPRESSION:
            raise ImageDecodeError("unsupported compression method. Create the .zip again with deflate")
        with self.archive.open(member) as file:
            return file.read(member.file_size)  # the declared size may be wrong: never read more

    def fingerprint(self) -> str:
        """Return a hash of the archive's path, size and time, and the members' names."""
        return hash_values("zip", str(self.path), self.prefix, self.names, stat_file(self.path))


def _leave_out_outputs(
    path: Path, archive: zipfile.ZipFile, images: Sequence[zipfile.ZipInfo]
) -> list[zipfile.ZipInfo]:
    """Leave out, with a warning, the images that factorkit wrote into the folders that were packed."""
    folders: list[str] = []
    sizes: dict[str, set[int]] = {}
    for member in archive.infolist():
        name = sanitize_member_name(member.filename)
        if name.rpartition("/")[2] == RECORD_NAME and member.file_size <= MAX_RECORD_BYTES:
            folder = name.removesuffix(RECORD_NAME)
            try:
                is_output, files = parse_record(archive.read(member))
            except Exception:  # BadZipFile, zlib.error, RuntimeError for encrypted members, ...
                continue
            folders += [folder] if is_output else []
            sizes |= {folder + file: of_file for file, of_file in files.items()}
    rest = []
    for member in images:
        name = sanitize_member_name(member.filename)
        if not name.startswith(tuple(folders)) and member.file_size not in sizes.get(name, ()):
            rest.append(member)
    if len(rest) < len(images):
        warnings.warn(
            f"{path}: left out {format_count(len(images) - len(rest), 'image')} that factorkit wrote: results "
            "are not data",
            UserWarning,
            stacklevel=3,
        )
    return rest


class TarSource(EncodedSource):
    """Members of uncompressed .tar files, read by their offset.

    Args:
        paths: the archives.
        members: for each image (index of the archive, offset, size).
        names: name of each image.
    """

    def __init__(self, paths: Sequence[Path], members: Sequence[tuple[int, int, int]], names: Sequence[str]) -> None:
        self.paths, self.members, self.names = list(paths), list(members), list(names)

    def _read_bytes(self, index: int) -> bytes:
        archive, offset, size = self.members[index]
        check_encoded_size(size)
        with open(self.paths[archive], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ImageDecodeError(f"the archive {self.paths[archive].name} is truncated within this image")
        return data

    def fingerprint(self) -> str:
        """Return a hash of the archives' paths, sizes and times, and the members."""
        return hash_values("tar", [(str(path), stat_file(path)) for path in self.paths], self.members)

    def subset(self, indices: Sequence[int] | np.ndarray) -> TarSource:
        """Return the images at these indices, in this order."""
        part = TarSource(self.paths, [self.members[i] for i in indices], [self.names[i] for i in indices])
        part.depths = self.depths
        return part


def list_tar_members(path: Path) -> list[tuple[str, int, int]]:
    """List (name, offset, size) of all regular files of an uncompressed .tar, in the archive's order.

    Links, devices and sparse files are skipped.

    Raises:
        DataError: the file is not a .tar, or is compressed, truncated or unreadable.
    """
    try:
        with wrap_os_errors(path, "so it cannot be opened. Check its permissions."), tarfile.open(path, "r:") as tar:
            members = [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable .tar: {error}. Decompress it if it is compressed (gunzip); otherwise download it "
            "again."
        ) from error
    if members and members[-1][1] + members[-1][2] > path.stat().st_size:
        raise DataError(f"{path}: truncated within {escape_name(members[-1][0])}. Download this archive again.")
    return members


def sanitize_member_name(name: str) -> str:
    """Return a member's name as a path inside the archive: no leading slash, no drive, no `..`."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    safe = [part for part in parts if part not in ("/", "//", "..") and not re.fullmatch("[A-Za-z]:", part)]
    return "/".join(safe) or "unnamed"
