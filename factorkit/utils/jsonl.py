"""Files of JSON objects, one per line, that are only appended to; and the log of a run, which is such a file."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from factorkit.utils.safe_reading import parse_json

LOG_NAME = "log.jsonl"  # the log in a run folder
_BLOCK_BYTES = 1 << 16  # read at once in search of the last newline


class JsonLines:
    """Append JSON objects to ``path``.

    Opening removes a half-written last line, left by a killed process or a full disk. Each line reaches the operating
    system before :meth:`append` returns: a process killed afterwards loses nothing, and readers see whole lines.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        _drop_half_line(self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close())

    def append(self, record: dict[str, Any]) -> None:
        """Write one line.

        Raises:
            ValueError: the record contains NaN or an infinity, which JSON cannot express.
            OSError: the disk is full; earlier lines are intact.
        """
        try:
            rest = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError:  # a file name that is not UTF-8
            rest = json.dumps(record, allow_nan=False).encode() + b"\n"
        start = self._file.tell()
        try:
            while rest:  # a disk that fills up accepts a part first and refuses only the next part
                written = self._file.write(rest)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                rest = rest[written:]
        except OSError:
            self._file.truncate(start)  # otherwise the next line would be joined to this half
            raise

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._file.close()


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the byte offset and the JSON object of each line, in order; nothing where there is no file.

    Other lines are skipped: the last one may be half written, by a process that was killed or is writing right now.
    """
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb") as file:
        offset = 0
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield offset, record
            offset += len(line)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it is something else."""
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
        end = position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - _BLOCK_BYTES)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return every event in the log of a run folder, in order; an empty list where there is no log."""
    return [event for _, event in read_lines(Path(folder) / LOG_NAME)]


def timeline(log: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind that have a step, with rising steps.

    Where a step occurs again (a killed run repeated it, or a new seed trial began), the later line replaces all events
    from that step on: they belong to weights that are gone.
    """
    events: list[dict[str, Any]] = []
    for event in log:
        if event.get("event") != kind or not is_number(event.get("step")):
            continue
        while events and events[-1]["step"] >= event["step"]:
            events.pop()
        events.append(event)
    return events


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a finite number; booleans are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
