"""One rule for every command that writes: a file that factorkit did not write for the same input is never replaced."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from factorkit.utils.atomic import replacing
from factorkit.utils.errors import WriteError
from factorkit.utils.jsonl import JsonLines, read_lines

RECORD_NAME = ".factorkit.jsonl"
CLOCK_TOLERANCE_NS = 2 * 10**9  # FAT stores times in steps of two seconds


class OutputRecord:
    """Remembers which files of a folder factorkit wrote, and for which input.

    The record is a hidden file of JSON lines in the folder. A folder that was empty when factorkit first wrote into it
    belongs to factorkit: data readers skip it as a whole. In any other folder they skip the recorded files alone.

    A file may be written if it does not exist, or if the record says that factorkit wrote it for the same input and
    its size and time of change are still the recorded ones. A label image that a user corrected by hand is the user's.

    Args:
        folder: output folder, created if missing.
        overwrite: replace other files as well.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False):
        self.folder, self.overwrite = Path(folder), overwrite
        self._entries = read_record(self.folder)
        self._owned = _is_owned(self.folder)
        self._lines: JsonLines | None = None

    def check(self, names: Sequence[str], source: str) -> None:
        """Raise WriteError if one of the files must not be replaced by output for ``source``."""
        for name in names:
            if reason := self._conflict(name, source):
                raise WriteError(
                    f"{self.folder / name} exists and {reason}. Give another --out, or --overwrite to replace it"
                )

    def distinct_stem(self, stem: str, endings: Sequence[str], source: str) -> str:
        """Return ``stem``, or ``stem-2``, ``stem-3`` ... where another input of the same name has its output.

        Raises:
            WriteError: one of the files is not factorkit's.
        """
        for candidate in itertools.chain((stem,), (f"{stem}-{i}" for i in itertools.count(2))):
            names = [candidate + ending for ending in endings]
            sources = {entry["source"] for name in names if (entry := self._entries.get(name)) is not None}
            if sources <= {source} or self.overwrite:
                self.check(names, source)
                return candidate
        raise AssertionError("unreachable")

    @contextmanager
    def writing(self, name: str, source: str) -> Iterator[Path]:
        """Yield a temporary path whose content becomes the file ``name`` when the block ends.

        Raises:
            WriteError: the file exists and must not be replaced.
            OSError: the disk is full or the folder cannot be written; an earlier file stays.
        """
        self.check([name], source)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._append({"file": name, "source": source, "since": time.time_ns()})
        with replacing(path) as temporary:
            yield temporary
        self.add([name], source)

    def add(self, names: Sequence[str], source: str) -> None:
        """Record finished files. Raises OSError if the disk is full."""
        for name in names:
            status = (self.folder / name).stat()
            self._append({"file": name, "source": source, "size": status.st_size, "time": status.st_mtime_ns})

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
        if self.overwrite:
            return None
        try:
            status = (self.folder / name).stat()
        except OSError:
            return None
        entry = self._entries.get(name)
        if entry is None:
            return "was not written by factorkit"
        if not _is_unchanged(entry, status):
            return "was changed after factorkit wrote it"
        return None if entry["source"] == source else f"was written for another input ({entry['source']})"

    def _append(self, entry: dict[str, Any]) -> None:
        if self._lines is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(self.folder / RECORD_NAME)
            if not self._entries and self._owned:
                self._lines.append({"folder": "output"})
        self._lines.append(entry)
        self._entries[entry["file"]] = entry


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the newest entry of each recorded file by its name; empty where there is no record."""
    lines = (line for _, line in read_lines(folder / RECORD_NAME))
    return {line["file"]: line for line in lines if isinstance(line.get("file"), str) and "source" in line}


def is_output_folder(folder: Path) -> bool:
    """Return whether everything in the folder is factorkit's, so that no reader may take it for data."""
    return any(line.get("folder") == "output" for _, line in itertools.islice(read_lines(folder / RECORD_NAME), 1))


def mark_output_folder(folder: Path) -> None:
    """Mark a new folder as factorkit's; do nothing where there is a record. Raises OSError if it cannot be written."""
    if not (folder / RECORD_NAME).exists():
        lines = JsonLines(folder / RECORD_NAME)
        lines.append({"folder": "output"})
        lines.close()


def recorded_files(folder: Path) -> set[str]:
    """Return the names of the files in ``folder`` that factorkit wrote and nobody changed since."""
    names = set()
    for name, entry in read_record(folder).items():
        try:
            status = os.stat(folder / name)
        except OSError:
            continue
        if _is_unchanged(entry, status):
            names.add(PurePosixPath(name).as_posix())
    return names


def _is_owned(folder: Path) -> bool:
    """Return whether the folder is factorkit's: marked, missing, or without anything but hidden files."""
    if (folder / RECORD_NAME).exists():
        return is_output_folder(folder)
    try:
        return all(name.startswith(".") for name in os.listdir(folder))
    except FileNotFoundError:
        return True


def _is_unchanged(entry: dict[str, Any], status: os.stat_result) -> bool:
    if "size" in entry:
        return entry["size"] == status.st_size and entry["time"] == status.st_mtime_ns
    # the process was killed between the file and its entry
    return status.st_mtime_ns >= entry["since"] - CLOCK_TOLERANCE_NS
