"""JSON objects, one a line, in a file that is appended to and never rewritten."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factorkit.utils.safe_reading import parse_json

_BLOCK = 1 << 16


class JsonLines:
    """Appends to ``path``.

    Opening drops a half-written last line, left by a killed process or a full disk, so that the next one starts on a
    line of its own. Each line reaches the operating system before :meth:`append` returns: a process killed afterwards
    loses nothing, and a reader sees whole lines.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        _drop_half_line(self.path)
        self._file = open(self.path, "ab", buffering=0)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line.

        Raises:
            ValueError: NaN or an infinity, for which JSON has no word.
            OSError: the disk is full; what was written before stands.
        """
        try:
            rest = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError:  # a file name that is no UTF-8
            rest = json.dumps(record, allow_nan=False).encode() + b"\n"
        start = self._file.tell()
        try:
            while rest:  # a disk that fills up takes a part first and refuses only the next part
                taken = self._file.write(rest)
                if not taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                rest = rest[taken:]
        except OSError:
            self._file.truncate(start)  # else the next line would be joined to half of this one
            raise

    def close(self) -> None:
        """A second call does nothing."""
        self._file.close()


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each JSON object in the file and the byte its line begins at, in the order written; none where there is no file.

    Other lines are passed over: the last one may be half written, by a process that was killed or is writing at this
    moment.
    """
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb") as file:
        at = 0
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield at, record
            at += len(line)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _drop_half_line(path: Path) -> None:
    """Cut the file after its last newline."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = at = file.seek(0, os.SEEK_END)
        while at > 0:
            start = max(0, at - _BLOCK)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < end:
            file.truncate(at)
