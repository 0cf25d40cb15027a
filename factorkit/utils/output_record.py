"""One rule for every command that writes: a file that factorkit did not write for the same input is never replaced.

The record of a folder is a hidden file of JSON lines in it. A line names files with their sizes and times of change,
and the input that they were written for; it is appended before the files appear, so that a kill at any moment leaves no
file without its line. A folder that was empty when factorkit first wrote into it belongs to factorkit: data readers
skip it as a whole. In any other folder they skip the recorded files alone.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from factorkit.utils.errors import WriteError, format_count
from factorkit.utils.files import JsonLines, parse_line, read_lines, temporary_path
from factorkit.utils.line_index import LineIndex

RECORD_NAME = ".factorkit.jsonl"
OUTPUT_FOLDER = {"folder": "output"}  # the line that marks a folder as factorkit's
MAX_NAMES = 3  # in a message


class RecordedFile(NamedTuple):
    """One version of a file that factorkit wrote.

    Attributes:
        size: in bytes.
        time: of the last change, in ns.
        source: the input that it was written for.
        stem: start of its name, if the stem belongs to one input as a whole.
    """

    size: int
    time: int
    source: str
    stem: str | None


class OutputRecord:
    """Remembers which files of a folder factorkit wrote, and for which input.

    A file may be written if it does not exist, or if factorkit wrote it for the same input and nobody changed it since:
    a label image that a user corrected by hand is the user's.

    Args:
        folder: output folder, created when the first file is written.
        overwrite: replace other files as well, except the inputs.
        owns_folder: mark the folder as factorkit's if it is new or empty.
        inputs: files that are read; never replaced.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False, owns_folder: bool = True, inputs: Iterable[Path] = ()):
        self.folder, self.overwrite = Path(folder), overwrite
        self._inputs = inputs
        self._input_ids: set[tuple[int, int]] | None = None
        self._index = LineIndex(self.folder / RECORD_NAME)  # by name of a file, and by ("stem", stem)
        for offset, line in read_lines(self._index.path):
            self._remember(offset, line)
        self._reserved: dict[str, str] = {}  # stems of this process
        self._mark = owns_folder and not (self.folder / RECORD_NAME).exists() and _is_empty(self.folder)
        self._lines: JsonLines | None = None
        self._lock = threading.Lock()

    def check(self, names: Iterable[str], source: str) -> None:
        """Raise WriteError if one of the files must not be replaced by output for ``source``."""
        for name in names:
            if reason := self._conflict(name, source):
                raise WriteError(f"{self.folder / name} {reason}")

    def has_changed(self, name: str) -> bool:
        """Return whether an existing file is not as factorkit wrote it."""
        return self._written_version(name, os.stat(self.folder / name)) is None

    def distinct_stem(self, stem: str, source: str, is_same: Callable[[str], bool] | None = None) -> str:
        """Return ``stem``, or ``stem-2``, ``stem-3`` ... if it belongs to another input; the same one for each call.

        Args:
            stem: start of the names of an input's files.
            is_same: whether a recorded input, which is not ``source``, is the same one under its former name.
        """
        for candidate in itertools.chain((stem,), (f"{stem}-{i}" for i in itertools.count(2))):
            key = candidate.casefold()  # some file systems ignore case
            owner = self._reserved.get(key) or self._find_owner(candidate)
            if owner is not None and owner != source and key not in self._reserved and is_same and is_same(owner):
                self._append({"source": source, "stem": candidate, "files": {}})
                owner = source
            if owner in (None, source):
                self._reserved[key] = source
                return candidate
        raise AssertionError("unreachable")

    def source_of(self, name: str) -> str | None:
        """Return the input that the newest version of a file was written for; None if it is not recorded."""
        versions = self._find_versions(name)
        return versions[-1].source if versions else None

    def write(
        self, files: Mapping[str, Callable[[Path], object]], source: str, *, stem: str | None = None
    ) -> dict[str, int]:
        """Write files completely or not at all; may be called from several threads.

        Args:
            files: for each name a function that writes the file to a temporary path of the same suffix.
            stem: as returned by :meth:`distinct_stem`.

        Returns:
            The size of each file in bytes.

        Raises:
            WriteError: a file exists and must not be replaced.
            OSError: the disk is full or the folder cannot be written; earlier files stay.
        """
        self.check(files, source)
        temporaries: dict[str, Path] = {}
        try:
            for name, save in files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                temporaries[name] = temporary_path(path)
                save(temporaries[name])
            status = {name: os.stat(path) for name, path in temporaries.items()}
            line: dict[str, Any] = {
                "source": source,
                "files": {n: [s.st_size, s.st_mtime_ns] for n, s in status.items()},
            }
            self._append(line if stem is None else {**line, "stem": stem})
            for name, path in temporaries.items():  # keeps the time of change
                os.replace(path, self.folder / name)
        except BaseException:
            for path in temporaries.values():
                with suppress(OSError):
                    path.unlink()
            raise
        return {name: s.st_size for name, s in status.items()}

    @contextmanager
    def writing(self, name: str, source: str) -> Iterator[Path]:
        """Yield a temporary path whose content becomes the file ``name`` when the block succeeds.

        Raises:
            WriteError: the file exists and must not be replaced.
            OSError: the disk is full or the folder cannot be written; an earlier file stays.
        """
        self.check([name], source)
        temporary = temporary_path(self.folder / name)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            self.write({name: lambda path: os.replace(temporary, path)}, source)
        finally:
            with suppress(OSError):
                temporary.unlink()

    def open(self) -> None:
        """Create the record now, not with the first file. Raises OSError if it cannot be written."""
        with self._lock:
            self._open()

    def close(self) -> None:
        """Close the record. A second call does nothing."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def __enter__(self) -> OutputRecord:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _conflict(self, name: str, source: str) -> str | None:
        """Say why the file must not be replaced; None if it may be."""
        try:
            status = os.stat(self.folder / name)
        except OSError:
            if not os.path.islink(self.folder / name):
                return None
            status = os.lstat(self.folder / name)
        if (status.st_dev, status.st_ino) in self._ids_of_inputs():
            return "is one of the inputs. Give another --out (out=)"
        if self.overwrite:
            return None
        version = self._written_version(name, status)
        if version is None:
            reason = (
                "was changed after factorkit wrote it" if self._find_versions(name) else "was not written by factorkit"
            )
        else:
            owner = version.source if version.stem is None else self._find_owner(version.stem) or version.source
            if owner == source:
                return None
            reason = f"was written for another input ({owner.partition(chr(10))[0]})"
        return f"exists and {reason}. Give another --out (out=), or --overwrite (overwrite=True) to replace it"

    def _ids_of_inputs(self) -> set[tuple[int, int]]:
        if self._input_ids is None:
            self._input_ids = set()
            for path in self._inputs:
                with suppress(OSError):
                    status = os.stat(path)
                    self._input_ids.add((status.st_dev, status.st_ino))
        return self._input_ids

    def _written_version(self, name: str, status: os.stat_result) -> RecordedFile | None:
        return _find_version(self._find_versions(name), status)

    def _find_versions(self, name: str) -> list[RecordedFile]:
        """Return the recorded versions of a file, the newest last."""
        return [v for line in self._index.lines(name) for key, v in _list_versions(line) if key == name]

    def _find_owner(self, stem: str) -> str | None:
        """Return the newest input that a stem was recorded for."""
        lines = self._index.lines(("stem", stem.casefold()))
        owners = [line["source"] for line in lines if str(line.get("stem")).casefold() == stem.casefold()]
        return owners[-1] if owners else None

    def _open(self) -> JsonLines:
        if self._lines is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(self.folder / RECORD_NAME)
            if self._mark:
                self._lines.append(OUTPUT_FOLDER)
                self._mark = False
        return self._lines

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._remember(self._open().append(line), line)

    def _remember(self, offset: int, line: dict[str, Any]) -> None:
        if not isinstance(line.get("source"), str) or not isinstance(line.get("files"), dict):
            return
        if isinstance(line.get("stem"), str):
            self._index.add(("stem", line["stem"].casefold()), offset)
        for name in line["files"]:
            self._index.add(name, offset)


def check_file(path: Path, source: str, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise WriteError if a single file must not be written: to be called before the work that leads to it."""
    path = Path(path)
    OutputRecord(path.parent, overwrite=overwrite, owns_folder=False, inputs=inputs).check([path.name], source)


@contextmanager
def writing_file(path: Path, source: str, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary path that becomes a single file; its folder stays the user's.

    Raises:
        WriteError: the file exists and must not be replaced.
        OSError: the disk is full or the folder cannot be written; an earlier file stays.
    """
    path = Path(path)
    with (
        OutputRecord(path.parent, overwrite=overwrite, owns_folder=False, inputs=inputs) as record,
        record.writing(path.name, source) as temporary,
    ):
        yield temporary


def is_output_folder(folder: str | os.PathLike[str]) -> bool:
    """Return whether everything in the folder is factorkit's, so that no reader may take it for data."""
    return any(line.get("folder") == OUTPUT_FOLDER["folder"] for _, line in read_lines(Path(folder) / RECORD_NAME))


def mark_output_folder(folder: Path) -> None:
    """Mark a folder as factorkit's, unless it is. Raises OSError if it cannot be written."""
    if not is_output_folder(folder):
        lines = JsonLines(folder / RECORD_NAME)
        lines.append(OUTPUT_FOLDER)
        lines.close()


class OutputFilter:
    """Recognises factorkit's own output among the files that a reader lists.

    Args:
        root: the folder that is listed.

    Attributes:
        folders: output folders that were left out.
        files: output files that were left out.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.path.realpath(root)
        self.folders: list[str] = []
        self.files: list[str] = []
        self._versions: dict[str, dict[str, list[RecordedFile]]] = {}  # by real folder and name
        self._read: set[str] = set()
        self._real_paths: dict[str, str] = {}
        for parent in Path(self.root).parents:
            self._read_record(str(parent))

    def skips_folder(self, folder: str) -> bool:
        """Return whether a folder, which is not the root, is factorkit's."""
        self._read_record(self._real_path(folder))
        if not os.path.exists(os.path.join(folder, RECORD_NAME)) or not is_output_folder(folder):
            return False
        self.folders.append(self._name(folder))
        return True

    def skips_file(self, folder: str, name: str) -> bool:
        """Return whether factorkit wrote a file, and nobody changed it since."""
        self._read_record(self._real_path(folder))
        versions = self._versions.get(self._real_path(folder), {}).get(name)
        if versions is None:
            return False
        path = os.path.join(folder, name)
        try:
            if _find_version(versions, os.stat(path)) is None:
                return False
        except OSError:
            return False
        self.files.append(self._name(path))
        return True

    def describe(self) -> str | None:
        """Say in one sentence what was left out, and why; None if nothing was."""
        parts = [
            f"{format_count(len(names), what)} "
            f"({', '.join(sorted(names)[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''})"
            for names, what in ((self.folders, "folder"), (self.files, "image"))
            if names
        ]
        return f"left out {' and '.join(parts)} that factorkit wrote: results are not data" if parts else None

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.root) if os.path.isabs(path) else path

    def _real_path(self, folder: str) -> str:
        if folder not in self._real_paths:
            self._real_paths[folder] = os.path.realpath(folder)
        return self._real_paths[folder]

    def _read_record(self, folder: str) -> None:
        if folder in self._read:
            return
        self._read.add(folder)
        if os.path.exists(os.path.join(folder, RECORD_NAME)):
            for _, line in read_lines(Path(folder) / RECORD_NAME):
                for name, version in _list_versions(line):
                    parent, _, base = name.rpartition("/")
                    names = self._versions.setdefault(os.path.join(folder, parent) if parent else folder, {})
                    names.setdefault(base, []).append(version)


def parse_record(data: bytes) -> tuple[bool, dict[str, set[int]]]:
    """Parse the record of a folder in an archive: whether the folder is factorkit's, and the sizes of its files."""
    sizes: dict[str, set[int]] = {}
    lines = [line for line in map(parse_line, data.splitlines()) if line is not None]
    for line in lines:
        for name, version in _list_versions(line):
            sizes.setdefault(name, set()).add(version.size)
    return any(line.get("folder") == OUTPUT_FOLDER["folder"] for line in lines), sizes


def _list_versions(line: dict[str, Any]) -> Iterator[tuple[str, RecordedFile]]:
    """Yield name and version of each file in a line of a record."""
    source, stem, versions = line.get("source"), line.get("stem"), line.get("files")
    if not isinstance(source, str) or not isinstance(versions, dict):
        return
    for name, version in versions.items():
        if isinstance(version, list) and len(version) == 2:
            yield name, RecordedFile(version[0], version[1], source, stem if isinstance(stem, str) else None)


def _find_version(versions: Iterable[RecordedFile], status: os.stat_result) -> RecordedFile | None:
    """Return the newest version with the size and the time of change of a file: a kill may have left an older one."""
    same = [v for v in versions if (v.size, v.time) == (status.st_size, status.st_mtime_ns)]
    return same[-1] if same else None


def _is_empty(folder: Path) -> bool:
    """Return whether the folder is missing, or has nothing but hidden files."""
    try:
        return all(name.startswith(".") for name in os.listdir(folder))
    except FileNotFoundError:
        return True
